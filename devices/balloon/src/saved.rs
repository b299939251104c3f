//! What outlives the process: how large the balloon is to be, and how large it is.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// Pages of the balloon, whatever pages guest and host have (virtio 1.3, 5.5.6).
pub const PAGE: u64 = 4096;

/// The fields of the configuration space (virtio 1.3, 5.5.4), in pages. A copy lies in a memfd, which
/// the supervisor keeps; it is read and written, never mapped, so that nobody who has it can
/// do harm by making it shorter.
#[derive(Debug)]
pub struct Saved {
    file: File,
    target: u32,
    actual: u32,
}

impl Saved {
    /// An empty balloon that is to have `target` pages.
    ///
    /// # Errors
    /// There is no memory or no descriptor left.
    pub fn new(target: u32) -> io::Result<Self> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"balloon".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut saved = Self {
            // SAFETY: a new descriptor that nothing else owns.
            file: unsafe { File::from_raw_fd(fd) },
            target,
            actual: 0,
        };
        saved.write()?;
        Ok(saved)
    }

    /// Goes on with what another process has saved.
    ///
    /// # Errors
    /// It cannot be read; nothing has changed then.
    pub fn adopt(&mut self, fd: OwnedFd) -> io::Result<()> {
        let mut file = File::from(fd);
        let mut bytes = [0; 8];
        file.rewind()?;
        file.read_exact(&mut bytes)?;
        let [a, b, c, d, e, f, g, h] = bytes;
        self.target = u32::from_le_bytes([a, b, c, d]);
        self.actual = u32::from_le_bytes([e, f, g, h]);
        self.file = file;
        Ok(())
    }

    /// The configuration space.
    pub fn bytes(&self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&self.target.to_le_bytes());
        bytes[4..].copy_from_slice(&self.actual.to_le_bytes());
        bytes
    }

    /// How large the balloon is to be, in bytes.
    pub fn target(&self) -> u64 {
        u64::from(self.target) * PAGE
    }

    /// How large it is, in bytes, as the guest says.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual) * PAGE
    }

    /// Sets the target in pages.
    pub fn set_target(&mut self, pages: u32) {
        self.target = pages;
        self.save();
    }

    /// Sets the size in pages.
    pub fn set_actual(&mut self, pages: u32) {
        self.actual = pages;
        self.save();
    }

    fn save(&mut self) {
        if let Err(error) = self.write() {
            anemone_log::warn_limited!("the size of the balloon cannot be saved: {error}");
        }
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.rewind()?;
        self.file.write_all(&self.bytes())
    }
}

impl AsFd for Saved {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_handed_on() {
        let mut first = Saved::new(100).unwrap();
        first.set_actual(60);
        let mut second = Saved::new(1).unwrap();
        second
            .adopt(first.as_fd().try_clone_to_owned().unwrap())
            .unwrap();
        assert_eq!(second.bytes(), [100, 0, 0, 0, 60, 0, 0, 0]);
        second.set_target(7);
        // Both have the same file.
        first
            .adopt(second.as_fd().try_clone_to_owned().unwrap())
            .unwrap();
        assert_eq!((first.target(), first.actual()), (7 * PAGE, 60 * PAGE));
        second.file.set_len(4).unwrap();
        let short = second.as_fd().try_clone_to_owned().unwrap();
        assert!(first.adopt(short).is_err());
        assert_eq!((first.target(), first.actual()), (7 * PAGE, 60 * PAGE));
    }
}
