//! A timer as a descriptor for the main loop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

/// A timerfd on the monotonic clock.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
    armed: bool,
}

impl Timer {
    /// A timer that does not run.
    ///
    /// # Errors
    /// The descriptor cannot be had.
    pub fn new() -> io::Result<Self> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: no pointers.
        let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: a new descriptor that nothing else owns.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            armed: false,
        })
    }

    /// Runs it once; a zero time stops it.
    ///
    /// # Errors
    /// The time is out of the kernel's range.
    pub fn set(&mut self, time: Duration) -> io::Result<()> {
        let seconds = libc::time_t::try_from(time.as_secs()).map_err(io::Error::other)?;
        let spec = libc::itimerspec {
            it_interval: libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: libc::timespec {
                tv_sec: seconds,
                tv_nsec: time.subsec_nanos().into(),
            },
        };
        // SAFETY: `spec` outlives the call; the old value is not asked for.
        let rc = unsafe {
            libc::timerfd_settime(self.fd.as_raw_fd(), 0, &raw const spec, ptr::null_mut())
        };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        self.armed = !time.is_zero();
        Ok(())
    }

    /// Whether it has run out since it was set; it then stops.
    pub fn expired(&mut self) -> bool {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is 8 bytes long and outlives the call.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
        if n == 8 {
            self.armed = false;
        }
        n == 8
    }

    /// What to watch while it runs.
    pub fn watch(&self) -> Option<BorrowedFd<'_>> {
        self.armed.then(|| self.fd.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_out_once_and_stops() {
        let mut timer = Timer::new().unwrap();
        assert!(timer.watch().is_none() && !timer.expired());
        timer.set(Duration::from_millis(1)).unwrap();
        assert!(timer.watch().is_some());
        while !timer.expired() {
            std::thread::yield_now();
        }
        assert!(timer.watch().is_none() && !timer.expired());
        timer.set(Duration::from_secs(1000)).unwrap();
        timer.set(Duration::ZERO).unwrap();
        assert!(timer.watch().is_none());
    }
}
