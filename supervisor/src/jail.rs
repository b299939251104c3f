//! The supervisor's own jail. It still starts and ends processes, so it is wider than theirs; it
//! is entered when everything that the configuration names is open.

use anemone_config::Sandbox;
use anemone_sandbox::Mode;

use crate::accel::Opened;
use crate::error::Error;

anemone_sandbox::include_policies!();

/// Gives up all privileges and takes on the system-call policy.
///
/// Not under `--sandbox log`: a process tree has room for one listener, and the children need it.
pub fn enter(sandbox: Sandbox, accel: &Opened) -> Result<(), Error> {
    let policy = match accel {
        Opened::Soft => &policies::SOFT,
        Opened::Kvm(_) | Opened::None(_) => &policies::MAIN,
    };
    let failed = |e: &dyn std::fmt::Display| Error::Failed(format!("the supervisor's jail: {e}"));
    anemone_sandbox::renounce().map_err(|e| failed(&e))?;
    match sandbox {
        Sandbox::On => anemone_sandbox::restrict(policy, Mode::On).map_err(|e| failed(&e)),
        Sandbox::Log => Ok(()),
    }
}
