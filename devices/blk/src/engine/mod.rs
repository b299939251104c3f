//! How file operations are carried out: with one io_uring per queue, or with plain system calls.

mod sync;
mod uring;

use std::io;
use std::os::fd::RawFd;

pub use sync::SyncEngine;
pub use uring::{DisabledRing, UringEngine};

/// An operation on the image.
#[derive(Debug, Clone, Copy)]
pub enum Op<'a> {
    /// Fill the buffers with bytes from `offset` on.
    Read {
        /// Destination, at most 1024 parts.
        buffers: &'a [libc::iovec],
        /// Position in the image.
        offset: u64,
    },
    /// Store the bytes of the buffers from `offset` on.
    Write {
        /// Source, at most 1024 parts.
        buffers: &'a [libc::iovec],
        /// Position in the image.
        offset: u64,
        /// Complete only when the data would survive a power failure.
        stable: bool,
    },
    /// Make all completed writes survive a power failure.
    Sync,
    /// `fallocate` with the mode bits of linux/falloc.h.
    Allocate {
        /// FALLOC_FL_… bits.
        mode: libc::c_int,
        /// First byte.
        offset: u64,
        /// Number of bytes, not 0.
        len: u64,
    },
    /// Tell a block device that a range is unused.
    Discard {
        /// First byte.
        offset: u64,
        /// Number of bytes, not 0.
        len: u64,
    },
}

/// What [`Engine::wait`] reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// An operation has ended.
    Done {
        /// The token it was submitted with.
        token: u16,
        /// As a system call: bytes transferred or 0, or a negated error number.
        result: i32,
    },
    /// The kick descriptor cannot be waited for; no more kicks will be noticed.
    KickLost,
}

/// Carries out operations and waits for their ends and for kicks of the guest.
///
/// `attach` (`submit` | `wait`)* `detach`, and again for the next ring.
pub trait Engine {
    /// Takes up a ring. `kick` is an eventfd that stays open until `detach`.
    fn attach(&mut self, kick: RawFd) -> io::Result<()>;

    /// Starts an operation; its end arrives as [`Event::Done`] with the same token.
    ///
    /// # Safety
    ///
    /// The array of buffers and the memory they point to stay valid until that event. The memory
    /// is shared with the guest and is never referenced from Rust.
    unsafe fn submit(&mut self, token: u16, op: &Op<'_>) -> io::Result<()>;

    /// Makes progress and appends what has happened to `events`. With `block`, waits until there
    /// is an event, a kick or a stop request; may also return without any.
    fn wait(&mut self, block: bool, events: &mut Vec<Event>) -> io::Result<()>;

    /// Gives up the ring. Nothing is in flight any more.
    fn detach(&mut self) -> io::Result<()>;
}

/// Carries out one operation with a plain system call; the result is that of [`Event::Done`].
///
/// # Safety
///
/// The buffers are valid during the call and are never referenced from Rust.
pub(crate) unsafe fn perform(fd: RawFd, op: &Op<'_>) -> i32 {
    /// _IO(0x12, 119), linux/fs.h
    const BLKDISCARD: libc::Ioctl = 0x1277;
    // Offsets are inside the image, whose size the kernel gave as an off_t.
    let result = match *op {
        // SAFETY: the caller vouches for the buffers.
        Op::Read { buffers, offset } => unsafe {
            libc::preadv(
                fd,
                buffers.as_ptr(),
                buffers.len() as libc::c_int,
                offset as libc::off_t,
            )
        },
        Op::Write {
            buffers,
            offset,
            stable,
        } => {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: the caller vouches for the buffers.
            unsafe {
                libc::pwritev2(
                    fd,
                    buffers.as_ptr(),
                    buffers.len() as libc::c_int,
                    offset as libc::off_t,
                    flags,
                )
            }
        }
        // SAFETY: takes no pointer.
        Op::Sync => unsafe { libc::fdatasync(fd) as isize },
        // SAFETY: takes no pointer.
        Op::Allocate { mode, offset, len } => unsafe {
            libc::fallocate(fd, mode, offset as libc::off_t, len as libc::off_t) as isize
        },
        Op::Discard { offset, len } => {
            let range = [offset, len];
            // SAFETY: BLKDISCARD reads two u64 through the pointer.
            unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) as isize }
        }
    };
    if result < 0 {
        return -io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
    }
    // The kernel transfers less than 2 GiB in one call.
    i32::try_from(result).unwrap_or(i32::MAX)
}
