//! The jail of this process: a policy for each class of thread.

use anemone_sandbox::{Mode, ProcessJail};

use crate::error::Error;

anemone_sandbox::include_policies!();

/// What the command line says about the jail.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub mode: Mode,
    pub parent_pid: Option<u32>,
}

/// Descriptors this process may have: a few per device, queue and vCPU.
const OPEN_FILES: u64 = 16_384;

/// Enters the jail; no system call is forbidden yet. Returns the version of Landlock's interface in
/// use; 0 where there is none.
pub fn enter(settings: &Settings) -> Result<u32, Error> {
    let layers = anemone_sandbox::enter(&ProcessJail {
        mode: settings.mode,
        parent_pid: settings.parent_pid,
        open_files: OPEN_FILES,
        ..ProcessJail::default()
    })?;
    log::info!("jail: {layers}");
    Ok(layers.landlock_abi())
}

/// Restricts the first thread to what building a machine takes. The other threads are there.
pub fn restrict_build(mode: Mode) -> Result<(), Error> {
    Ok(anemone_sandbox::restrict(&policies::MAIN, mode)?)
}

/// Restricts the first thread, which from now on only waits and reports.
pub fn restrict_run(mode: Mode) -> Result<(), Error> {
    Ok(anemone_sandbox::restrict(&policies::RUN, mode)?)
}

/// Restricts a process that finds out what accelerators of this host can do.
pub fn restrict_probe(mode: Mode) -> Result<(), Error> {
    Ok(anemone_sandbox::restrict(&policies::PROBE, mode)?)
}
