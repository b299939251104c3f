//! The loop driver: plays guest and virtual machine monitor against a real device back end, over
//! its vhost-user socket. For tests, fault injection and benchmarks; no guest, no KVM.
//!
//! [`Process`] starts a back end, [`Device`] sets it up as a monitor would, [`Queue`] drives a
//! virtqueue as a guest's driver would, in good faith or not, and [`blk`] speaks virtio-blk.
//!
//! Guest memory is one region at guest address 0. Mistakes of the caller, such as an address
//! outside it, panic.

pub mod blk;
mod device;
mod memory;
mod process;
mod queue;

pub use device::{Device, Options, features};
pub use memory::Memory;
pub use process::{Process, Supervised};
pub use queue::{Buffer, Descriptor, Queue, Used, flags};

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitStatus;

use thiserror::Error;

/// Why driving a back end failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The conversation over the socket failed.
    #[error(transparent)]
    VhostUser(#[from] anemone_vhost_user::Error),
    /// A system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The control channel failed.
    #[error(transparent)]
    Control(#[from] anemone_ipc::Error),
    /// The back end did not do its part in time.
    #[error("the back end did not answer in time: {0}")]
    Timeout(&'static str),
    /// The back end's process ended.
    #[error("the back end ended: {0}")]
    Ended(ExitStatus),
    /// The device answered a request with this status.
    #[error("the device answered with status {0}")]
    Status(u8),
}

/// Result of driving a back end.
pub type Result<T> = std::result::Result<T, Error>;

/// Turns the result of a system call that makes a descriptor into an owner.
fn new_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the callers pass the result of a call that has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
