//! The jail of this process: one policy for the whole, a narrower one for each class of thread.

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

/// Enters the jail; from here on only the main policy's system calls are left. Returns the version of
/// Landlock's interface in use; 0 where there is none.
pub fn enter(settings: &Settings) -> Result<u32, Error> {
    let layers = anemone_sandbox::enter(&ProcessJail {
        mode: settings.mode,
        parent_pid: settings.parent_pid,
        open_files: OPEN_FILES,
        ..ProcessJail::default()
    })?;
    log::info!("jail: {layers}");
    anemone_sandbox::restrict(&policies::MAIN, settings.mode)?;
    Ok(layers.landlock_abi())
}

/// Narrows the calling thread, which is about to run a vCPU of an accelerator.
pub fn restrict_vcpu(accel: &str, mode: Mode) -> Result<(), Error> {
    let policy = match accel {
        "soft" => &policies::VCPU_SOFT,
        "none" => &policies::VCPU_NONE,
        _ => &policies::VCPU,
    };
    Ok(anemone_sandbox::restrict(policy, mode)?)
}

/// Narrows the calling thread, which is about to wait for the event counters of devices.
#[cfg_attr(
    not(feature = "soft"),
    allow(dead_code, reason = "the policies are those of every build")
)]
pub fn restrict_irqfd(mode: Mode) -> Result<(), Error> {
    Ok(anemone_sandbox::restrict(&policies::IRQFD, mode)?)
}

/// Narrows the calling thread, which is about to talk to a back end.
pub fn restrict_device(mode: Mode) -> Result<(), Error> {
    Ok(anemone_sandbox::restrict(&policies::DEVICE, mode)?)
}

/// Narrows the first thread, which from now on only waits and reports.
pub fn restrict_run(mode: Mode) -> Result<(), Error> {
    Ok(anemone_sandbox::restrict(&policies::RUN, mode)?)
}
