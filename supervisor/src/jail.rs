//! The supervisor's own jail. It still starts and ends processes, so it is wider than theirs; it
//! is entered when everything that the configuration names is open.

use anemone_config::{Kind, Sandbox, Vm};
use anemone_sandbox::Mode;

use crate::accel::Opened;
use crate::error::Error;
use crate::reach::{self, Place};

anemone_sandbox::include_policies!();

/// Gives up all privileges and all files but `places`, and takes on the system-call policy. What a
/// shared directory takes is in those for a VM that has one alone. Returns the version of Landlock's
/// interface in use; 0 where there is none.
///
/// Not under `--sandbox log`: a process tree has room for one listener, and the children need it.
pub fn enter(vm: &Vm, accel: &Opened, places: &[Place]) -> Result<u32, Error> {
    let shares = vm.devices.iter().any(|d| matches!(d.kind, Kind::Fs(_)));
    let policy = match (accel, shares) {
        (Opened::Soft, true) => &policies::SOFT_SHARE,
        (Opened::Soft, false) => &policies::SOFT,
        (Opened::Kvm(_) | Opened::None(_), true) => &policies::SHARE,
        (Opened::Kvm(_) | Opened::None(_), false) => &policies::MAIN,
    };
    let failed = |e: &dyn std::fmt::Display| Error::Failed(format!("the supervisor's jail: {e}"));
    anemone_sandbox::renounce().map_err(|e| failed(&e))?;
    let landlock = reach::narrow_to(places).unwrap_or_else(|error| {
        log::warn!("this host refuses a layer of the supervisor's jail: landlock: {error}");
        0
    });
    match vm.config.sandbox {
        Sandbox::On => anemone_sandbox::restrict(policy, Mode::On).map_err(|e| failed(&e))?,
        Sandbox::Log => {}
    }
    Ok(landlock)
}
