//! Frame of a device back end: a process that serves one virtio device over vhost-user.
//!
//! A device implements [`Device`] and [`Program`] and calls [`run`] from `main`. The frame parses
//! the common arguments, enters the jail, speaks vhost-user with the front end, maps guest memory,
//! checks and starts the virtqueues, and runs the main loop:
//!
//! ```text
//!             open            start_queue            stop_queue
//!   Program ────────▶ Device ─────────────▶ serving ────────────▶ Device ──▶ …
//!                       ▲   a front end has set      the front end stops a ring,
//!                       │   up a ring and enabled it changes memory, or is gone
//!                       └── reset: the front end has gone or asks for the initial state
//! ```
//!
//! The front end is not trusted with the process's life: a request that makes no sense is refused
//! or ends the connection, and the process serves the next one.
//!
//! The process may be killed at any moment, and another with the same arguments takes its place:
//!
//! - Chains between [`Vring::pop`] and [`Vring::push_used`] come out of `pop` again, the oldest
//!   first, and [`Vring::popped_again`] says so. What a request does is thus done at least once; a
//!   device for which twice is not once sees to it itself.
//! - [`Host::keep`] has the supervisor keep descriptors, which [`Device::restore`] gets in the new
//!   process. State that must survive is memory in a file that is mapped shared and kept: what
//!   belongs together is written aside and made to count by one store, and is validated when it is
//!   read.
//! - The old process has ended, and been waited for, before the new one is started.

mod args;
mod bucket;
mod file;
mod host;
mod inflight;
mod jail;
mod main_loop;
mod memory;
mod parts;
mod session;
mod timer;
mod vring;
mod walk;

pub use anemone_process::inherited_fd;
pub use anemone_sandbox::{Filter, Mode, ProcessJail, Share};
pub use args::{About, Common, parse_fd};
pub use bucket::Bucket;
pub use file::{FileError, open_again, open_locked};
pub use host::Host;
pub use main_loop::{listen, run};
pub use parts::Parts;
pub use timer::Timer;
pub use vring::{Chain, RingError, Vring};
pub use walk::{Side, Unusable, walk};

/// The state of a balloon, for [`Host::balloon`].
pub use anemone_ipc::device::Balloon as BalloonState;
/// Reads the command line: what [`Program::option`] gets values from.
pub use lexopt;

use std::error::Error;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

/// A descriptor to watch and the token that comes back with its events.
pub type Watch<'a> = (BorrowedFd<'a>, u64);

/// A virtio device, as its back end process implements it.
///
/// All methods are called on the main thread. A device may serve its rings on threads of its own
/// (started in `start_threads`) or on the main thread through [`Device::event_fds`].
pub trait Device {
    /// Device-specific virtio feature bits offered. The frame adds VIRTIO_F_VERSION_1,
    /// VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC and the vhost-user ones.
    fn features(&self) -> u64;

    /// Number of virtqueues. It never changes.
    fn queue_count(&self) -> usize;

    /// Device-specific configuration as it is now.
    fn config(&self) -> Vec<u8>;

    /// The driver wrote configuration bytes; they lie inside [`config`](Self::config).
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// A ring has been set up and enabled. Its kick is readable from the start, so a device that
    /// waits for kicks sees what was made available before. An error refuses the request that
    /// started the ring.
    fn start_queue(&mut self, ring: Vring) -> io::Result<()>;

    /// Finish or drop what the ring has in flight, stop using it and drop the [`Vring`], which
    /// keeps guest memory mapped; returns the next available index. Called only for a ring that
    /// was started. What is dropped comes again when the ring is started the next time if the ring
    /// [is tracked](Vring::is_tracked), and is lost to the driver if not.
    fn stop_queue(&mut self, index: usize) -> u16;

    /// Return to the initial state: the front end has gone or has asked for a reset. No ring is
    /// started.
    fn reset(&mut self) {}

    /// Descriptors the main loop should watch for reading: kicks of rings served on the main
    /// thread and inputs of the device, each with a token. Asked again after every callback, so a
    /// device that cannot take input now leaves it out. A hang-up counts as readable.
    fn event_fds(&self) -> Vec<Watch<'_>> {
        Vec::new()
    }

    /// Descriptors the main loop should watch for writing.
    fn output_fds(&self) -> Vec<Watch<'_>> {
        Vec::new()
    }

    /// The descriptor with this token is ready. May be called when it no longer is: the
    /// descriptors must be non-blocking.
    fn handle_event(&mut self, _token: u64) {}

    /// Widens the jail by what the device needs beyond its sockets and the guest's memory.
    fn widen(&self, _jail: &mut ProcessJail) {}

    /// Start the threads that serve the rings. Called once, in the jail, just before the first
    /// thread takes on its policy: threads that are started here inherit none, must take on one of
    /// their own before they do anything else, and the first needs no right to start any.
    fn start_threads(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Called once, before anything else, with the device's way to the outside.
    fn attach(&mut self, _host: &Host) {}

    /// An earlier process of this device has had this kept ([`Host::keep`]) under this key. Called
    /// after `attach` and before there is a front end or any event, once for each key. What the earlier process
    /// has left in a file or in memory may be of any moment of its work, and the earlier process
    /// may have been taken over by its guest: nothing in it is to be trusted.
    fn restore(&mut self, _key: u64, _fd: OwnedFd) {}

    /// Descriptors that the device has open at most, beside those of the frame and its rings: the
    /// process is limited to so many.
    fn open_files(&self) -> u64 {
        0
    }

    /// The answer to [`Host::dial`]: the connected socket, or none.
    fn dialed(&mut self, _id: u64, _socket: Option<OwnedFd>) {}

    /// The balloon is to have this size in bytes, if one is given; answer with [`Host::balloon`] when
    /// the guest has told its statistics.
    fn balloon(&mut self, _target: Option<u64>) {}

    /// The terminal behind the device has a new size, in characters.
    fn window_size(&mut self, _columns: u16, _rows: u16) {}
}

/// A device process: its own arguments, and how they become a device.
pub trait Program: Default {
    /// The device.
    type Device: Device;

    /// Name and help text.
    const ABOUT: About;

    /// System calls of the main thread and of the threads it starts.
    const FILTER: &'static Filter;

    /// Takes the option `--name` of the command line, its value from `parser` if it has one.
    /// `Ok(false)` says that the device has no such option.
    fn option(&mut self, name: &str, parser: &mut lexopt::Parser) -> Result<bool, lexopt::Error>;

    /// Whether the process serves vhost-user. A console that serves a byte stream does not.
    fn serves_vhost_user(&self) -> bool {
        true
    }

    /// Opens what is named by path and makes the device. Called before the process enters its
    /// jail, and must not start threads. The error is shown to the user.
    fn open(self, common: &Common) -> Result<Self::Device, Box<dyn Error>>;
}
