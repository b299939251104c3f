//! The file behind the memory, and how it is brought to the storage.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a file cannot be served.
#[derive(Debug, Error)]
pub enum Error {
    /// `open` failed.
    #[error("cannot open {} for {access}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What it was opened for.
        access: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Another process holds a conflicting lock.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The file system cannot lock.
    #[error("cannot lock {}: {source}", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
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
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            // Opening a FIFO by mistake would wait for its other end.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(|source| Error::Open {
                path: path.to_owned(),
                access: match read_only {
                    true => "reading",
                    false => "reading and writing",
                },
                source,
            })?;
        lock(&file, path, read_only)?;
        Self::new(file, read_only)
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
        let own = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .or_else(|_| file.try_clone())?;
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

/// Locks the whole file for as long as it is open.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), Error> {
    // SAFETY: all-zero is a valid flock: from offset 0 to the end, wherever that is, and an open
    // file description lock wants its process id 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = match read_only {
        true => libc::F_RDLCK,
        false => libc::F_WRLCK,
    } as libc::c_short;
    // SAFETY: F_OFD_SETLK reads the flock, which lives for the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    Err(match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Error::InUse(path.to_owned()),
        _ => Error::Lock {
            path: path.to_owned(),
            source,
        },
    })
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
