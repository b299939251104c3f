//! The file behind the memory, and how it is brought to the storage.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anemone_device::{FileError, open_again, open_locked};
use thiserror::Error;

/// Why a file cannot be served.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be opened, or somebody else uses it.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not something that keeps bytes.
    #[error("the file is neither a regular file nor a block device")]
    Kind,
    /// `fstat` or `dup` failed.
    #[error("cannot use the file: {0}")]
    Use(#[from] io::Error),
}

/// The file behind the memory.
///
/// An error of writing back is reported once to each open file description that existed when it
/// happened (fsync(2)). A process that is killed right after the kernel has told it of one would
/// take the knowledge with it, and its successor's flush would succeed. So each process flushes
/// through a description of its own, and asks the one that all of them inherit as well, once.
#[derive(Debug)]
pub struct Backing {
    own: File,
    /// Also keeps the lock.
    inherited: File,
    /// [`inherited`](Self::inherited) has been asked.
    asked: bool,
    read_only: bool,
}

impl Backing {
    /// Opens `path` and locks it against other users: exclusively when writable, shared when not.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        Self::new(open_locked(path, read_only)?, read_only)
    }

    /// Takes over a file that the caller has opened and locked.
    pub fn from_fd(fd: OwnedFd, read_only: bool) -> Result<Self, Error> {
        Self::new(File::from(fd), read_only)
    }

    fn new(file: File, read_only: bool) -> Result<Self, Error> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind);
        }
        // Where there is no /proc both are one description, and a kill at the one moment that is
        // described above goes unnoticed.
        let own = open_again(&file, read_only, 0)?;
        Ok(Self {
            own,
            inherited: file,
            asked: false,
            read_only,
        })
    }

    /// Brings everything that was written to the storage.
    ///
    /// # Errors
    /// Something could not be written since the last call, in this process or one before it.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        let result = self.own.sync_data();
        if std::mem::replace(&mut self.asked, true) {
            return result;
        }
        // What there was to write has been written just now.
        result.and(self.inherited.sync_data())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_hears_once_of_an_error_that_its_predecessor_was_told() {
        // A pipe cannot be flushed: it stands for a description that has an error to tell.
        let (pipe, _writer) = io::pipe().unwrap();
        let mut backing = Backing {
            own: tempfile::tempfile().unwrap(),
            inherited: File::from(OwnedFd::from(pipe)),
            asked: false,
            read_only: false,
        };
        assert!(backing.flush().is_err());
        assert!(backing.flush().is_ok());
    }

    #[test]
    fn nothing_is_flushed_that_nobody_can_write() {
        let (pipe, _writer) = io::pipe().unwrap();
        let file = File::from(OwnedFd::from(pipe));
        let mut backing = Backing {
            own: file.try_clone().unwrap(),
            inherited: file,
            asked: false,
            read_only: true,
        };
        assert!(backing.flush().is_ok());
    }
}
