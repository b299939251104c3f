//! An event counter, the currency of doorbells and interrupts.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A non-blocking eventfd (eventfd(2)), closed on exec.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A counter at zero.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a system call on integers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded; nothing else owns the new descriptor.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// A second descriptor of a counter that somebody else owns, non-blocking as that one is.
    pub fn duplicate(fd: BorrowedFd<'_>) -> crate::Result<Self> {
        let copy = fd.try_clone_to_owned();
        copy.map(Self).map_err(|source| crate::Error::Os {
            what: "dup",
            source,
        })
    }

    /// Adds one. A counter that is full stays so: the reader has an event waiting all the same.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes are readable. The only possible error is a full counter.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Takes the count and sets it to zero; zero means that nothing had happened.
    pub fn take(&self) -> u64 {
        let mut count = [0u8; 8];
        // SAFETY: eight bytes are writable.
        let n = unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        if n == 8 { u64::from_ne_bytes(count) } else { 0 }
    }

    /// Whether the count is not zero, without taking it.
    pub fn is_set(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd; a timeout of zero does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) == 1 && poll.revents & libc::POLLIN != 0 }
    }
}

impl From<OwnedFd> for EventFd {
    /// Wraps an eventfd that is already non-blocking.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_clears() {
        let event = EventFd::new().unwrap();
        assert!(!event.is_set());
        assert_eq!(event.take(), 0);
        event.signal();
        event.signal();
        assert!(event.is_set());
        assert_eq!(event.take(), 2);
        assert!(!event.is_set());
    }
}
