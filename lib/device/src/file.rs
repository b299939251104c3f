//! The file of a device that stores something: opened by its path and locked against other users.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Why a file cannot be had.
#[derive(Debug, Error)]
pub enum FileError {
    /// `open` failed.
    #[error("cannot open {} for {access}: {source}{hint}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What it was opened for.
        access: &'static str,
        /// Why not.
        source: io::Error,
        /// What the user may do about it, or nothing.
        hint: &'static str,
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
}

/// Opens `path` and locks it for as long as it is open: exclusively when writable, shared when not.
///
/// # Errors
/// It cannot be opened, or somebody else uses it.
pub fn open_locked(path: &Path, read_only: bool) -> Result<File, FileError> {
    // Without O_NONBLOCK, opening a FIFO by mistake would wait for its other end.
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|source| FileError::Open {
            path: path.to_owned(),
            access: match read_only {
                true => "reading",
                false => "reading and writing",
            },
            hint: match source.raw_os_error() {
                Some(libc::EACCES | libc::EROFS | libc::EPERM) if !read_only => {
                    " (--readonly serves it for reading only)"
                }
                _ => "",
            },
            source,
        })?;
    // SAFETY: all-zero is a valid flock: from offset 0 to the end, wherever that is, and an open
    // file description lock wants its process id 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = match read_only {
        true => libc::F_RDLCK,
        false => libc::F_WRLCK,
    } as libc::c_short;
    // SAFETY: F_OFD_SETLK reads the flock, which lives for the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) } == 0 {
        return Ok(file);
    }
    let source = io::Error::last_os_error();
    Err(match source.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => FileError::InUse(path.to_owned()),
        _ => FileError::Lock {
            path: path.to_owned(),
            source,
        },
    })
}

/// Opens the same file once more, with these flags. Where that is not possible (no /proc, or a file
/// that only the parent may open), both share one open file.
///
/// # Errors
/// There is no descriptor left.
pub fn open_again(file: &File, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .or_else(|_| file.try_clone())
}
