//! Where the process gives up its rights.

use std::error::Error;

use anemone_sandbox::{Filter, ProcessJail};

use crate::{Common, Device};

/// Descriptors of the frame, of a memory table and of a few messages on their way.
const OPEN_FILES: u64 = 64;
/// Descriptors for each virtqueue: those of the protocol, and what a device adds.
const OPEN_FILES_PER_QUEUE: u64 = 16;

/// Gives up everything that serving the device does not need. Returns the version of Landlock's
/// interface in use; 0 where there is none.
pub fn enter(
    common: &Common,
    device: &mut dyn Device,
    filter: &'static Filter,
) -> Result<u32, Box<dyn Error>> {
    let queues = device.queue_count() as u64;
    let mut jail = ProcessJail {
        mode: common.sandbox,
        parent_pid: common.parent_pid,
        open_files: OPEN_FILES + OPEN_FILES_PER_QUEUE * queues + device.open_files(),
        ..ProcessJail::default()
    };
    device.widen(&mut jail);
    let layers = anemone_sandbox::enter(&jail)?;
    device
        .start_threads()
        .map_err(|e| format!("cannot start threads: {e}"))?;
    anemone_sandbox::restrict(filter, common.sandbox)?;
    Ok(layers.landlock_abi())
}
