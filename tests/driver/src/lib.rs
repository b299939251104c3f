//! The loop driver: plays guest and virtual machine monitor against a real device back end, over
//! its vhost-user socket. For tests, fault injection and benchmarks; no guest, no KVM.
//!
//! [`Process`] starts a back end, [`Device`] sets it up as a monitor would, [`Queue`] drives a
//! virtqueue as a guest's driver would, in good faith or not, and the modules named after
//! devices, such as [`blk`], speak their languages.
//!
//! [`Replaceable`] is a device whose process is killed and replaced while the driver goes on, and
//! [`Kills`] does that at random moments. A test of a device that must survive looks like this:
//!
//! ```text
//!   let mut device = Replaceable::start(BINARY, &args, fds, &Options::default())?;
//!   let mut kills = Kills::new(200, Duration::from_millis(3));      // prints the seed
//!   while !kills.done() || in_flight > 0 {
//!       …offer chains, unless kills.done(); publish, kick…
//!       kills.strike(&mut device)?;                      // kills and replaces if it is time
//!       device.device.queues[0].wait(kills.wait())?;
//!       …take what was returned, and check what it did…
//!   }
//!   assert_eq!(device.device.queues[0].strays(), 0);     // nothing was returned twice
//!   kills.report("anemone-…");                           // prints the distribution of the pause
//! ```
//!
//! `ANEMONE_SEED=N` runs the same kills and the same load again; the moments are those of the host.
//! `ANEMONE_KILLS=N` kills more often, or less.
//!
//! With [`Options::bounce`] the back end does not see guest memory: the VMM's code copies between
//! it and a region, in a thread of its own.
//!
//! Guest memory is one region at guest address 0. Mistakes of the caller, such as an address
//! outside it, panic.

pub mod balloon;
pub mod bench;
pub mod blk;
mod bounce;
mod device;
pub mod fs;
mod memory;
pub mod net;
pub mod pmem;
mod process;
mod queue;
mod replace;
pub mod spy;
pub mod vsock;

pub use bounce::Bounced;
pub use device::{Device, Options, features};
pub use memory::Memory;
pub use process::{Process, Supervised};
pub use queue::{Buffer, Descriptor, Queue, Used, flags};
pub use replace::{Kills, Random, Replaceable};

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
    /// The device returned a chain that it does not have.
    #[error("the device returned the chain at descriptor {0}, which is not in flight")]
    NotInFlight(u32),
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
