//! The engine for hosts without io_uring, and for images in memory, where nothing ever waits.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use super::{Engine, Event, Op, perform};

/// Carries out every operation on the spot.
pub struct SyncEngine<'a> {
    image: RawFd,
    stop: BorrowedFd<'a>,
    /// -1, which poll passes over, while there is none.
    kick: RawFd,
    done: Vec<Event>,
}

impl<'a> SyncEngine<'a> {
    /// An engine for the image with this descriptor; `stop` being readable ends a wait.
    pub fn new(image: &'a impl AsRawFd, stop: BorrowedFd<'a>) -> Self {
        Self {
            image: image.as_raw_fd(),
            stop,
            kick: -1,
            done: Vec::new(),
        }
    }
}

impl Engine for SyncEngine<'_> {
    fn attach(&mut self, kick: RawFd) -> io::Result<()> {
        self.kick = kick;
        Ok(())
    }

    unsafe fn submit(&mut self, token: u16, op: &Op<'_>) -> io::Result<()> {
        // SAFETY: the caller keeps the buffers valid beyond this call.
        let result = unsafe { perform(self.image, op) };
        self.done.push(Event::Done { token, result });
        Ok(())
    }

    fn wait(&mut self, block: bool, events: &mut Vec<Event>) -> io::Result<()> {
        if !self.done.is_empty() {
            events.append(&mut self.done);
            return Ok(());
        }
        if !block {
            return Ok(());
        }
        let mut fds = [self.kick, self.stop.as_raw_fd()].map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        });
        // SAFETY: two pollfd structures, which live for the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        }
        if fds[0].revents != 0 && !clear(fds[0].fd) {
            self.kick = -1;
            events.push(Event::KickLost);
        }
        Ok(())
    }

    fn detach(&mut self) -> io::Result<()> {
        self.kick = -1;
        Ok(())
    }
}

/// Makes an eventfd unreadable until it is written again; false for what is not an eventfd.
fn clear(kick: RawFd) -> bool {
    let mut count = 0u64;
    // SAFETY: at most 8 bytes are stored in `count`.
    let n = unsafe { libc::read(kick, (&raw mut count).cast(), 8) };
    n == 8 || (n < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock)
}
