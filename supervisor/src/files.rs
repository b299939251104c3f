//! Opens what the configuration names, and says what is wrong with it.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anemone_config::{PMEM_UNIT, Share, ShareOwner};
use thiserror::Error;

use crate::sys;

/// A file or socket of the configuration cannot be used.
#[derive(Debug, Error)]
#[error("{owner}: {}: {reason}", path.display())]
pub struct OpenError {
    owner: String,
    path: PathBuf,
    reason: Reason,
}

/// What is wrong with it.
#[derive(Debug, Error)]
pub enum Reason {
    /// The system's answer.
    #[error("{0}")]
    System(#[from] io::Error),
    /// A folder, a pipe or a device where a file was expected.
    #[error("not a {0}")]
    NotA(&'static str),
    /// Nothing in it.
    #[error("the file is empty")]
    Empty,
    /// Not a whole number of sectors.
    #[error("the size of {0} bytes is not a multiple of 512")]
    PartialSector(u64),
    /// Not a whole number of the pieces that persistent memory comes in.
    #[error(
        "the size of {0} bytes is not a multiple of 2 MiB: make it one (`truncate -s %2M FILE`), or \
         give the guest less of it with `size`"
    )]
    PartialPmem(u64),
    /// There is less than what the guest is to have.
    #[error("`size` is {wanted} bytes, but there are only {size}")]
    TooShort {
        /// Size of the file.
        size: u64,
        /// What was asked for.
        wanted: u64,
    },
    /// Only root can act for others.
    #[error("files of the guest's users can only be made by root; leave `owner=guest` out")]
    NotRoot,
    /// The user may not write.
    #[error("it is read-only and cannot be opened for writing; add `readonly` to the device")]
    ReadOnly,
    /// Somebody holds the lock.
    #[error("it is in use by another VM{0}")]
    Locked(&'static str),
    /// It cannot fit.
    #[error("its {size} bytes do not fit into the guest's memory of {memory} bytes")]
    TooLarge {
        /// Size of the file.
        size: u64,
        /// Size of guest memory.
        memory: u64,
    },
    /// Somebody listens there already.
    #[error("another program listens at this socket")]
    SocketTaken,
    /// Nobody listens there.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
}

impl OpenError {
    /// An error about `path`, which `owner` (a key or a device) names.
    pub fn new(owner: impl Into<String>, path: &Path, reason: impl Into<Reason>) -> Self {
        Self {
            owner: owner.into(),
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// Opens a kernel or an initial RAM file system: a regular file, smaller than guest memory.
pub fn open_boot_file(owner: &str, path: &Path, memory: u64) -> Result<File, OpenError> {
    let error = |reason| OpenError::new(owner, path, reason);
    // Looked at before it is opened: opening a pipe would wait for its writer.
    let metadata = path.metadata().map_err(|e| error(e.into()))?;
    if !metadata.is_file() {
        return Err(error(Reason::NotA("regular file")));
    }
    match metadata.len() {
        0 => return Err(error(Reason::Empty)),
        size if size >= memory => return Err(error(Reason::TooLarge { size, memory })),
        _ => {}
    }
    File::open(path).map_err(|e| error(e.into()))
}

/// Opens a disk image, a regular file or a block device.
pub fn open_image(id: &str, path: &Path, readonly: bool) -> Result<File, OpenError> {
    let owner = format!("disk `{id}`");
    let (file, size) = open_storage(&owner, path, readonly)?;
    match size {
        size if size % 512 != 0 => Err(OpenError::new(owner, path, Reason::PartialSector(size))),
        _ => Ok(file),
    }
}

/// A file that is persistent memory of a guest.
#[derive(Debug)]
pub struct PmemFile {
    /// A regular file or a block device.
    pub file: File,
    /// How much of it the guest has, a multiple of 2 MiB.
    pub size: u64,
    /// The guest cannot write.
    pub readonly: bool,
}

/// Opens persistent memory: `wanted` bytes of a file, or all of it.
pub fn open_pmem(
    id: &str,
    path: &Path,
    wanted: Option<u64>,
    readonly: bool,
) -> Result<PmemFile, OpenError> {
    let owner = format!("pmem `{id}`");
    let (file, size) = open_storage(&owner, path, readonly)?;
    let reason = match wanted {
        Some(wanted) if wanted > size => Reason::TooShort { size, wanted },
        None if !size.is_multiple_of(PMEM_UNIT) => Reason::PartialPmem(size),
        _ => {
            return Ok(PmemFile {
                file,
                size: wanted.unwrap_or(size),
                readonly,
            });
        }
    };
    Err(OpenError::new(owner, path, reason))
}

/// Opens a directory that is to be shared, to be the place from which its process works.
pub fn open_share(id: &str, path: &Path, share: &Share) -> Result<OwnedFd, OpenError> {
    let error = |reason| OpenError::new(format!("fs `{id}`"), path, reason);
    if share.owner == ShareOwner::Guest && sys::effective_user() != 0 {
        return Err(error(Reason::NotRoot));
    }
    let metadata = path.metadata().map_err(|e| error(e.into()))?;
    if !metadata.is_dir() {
        return Err(error(Reason::NotA("directory")));
    }
    // One that the user cannot list is of no use to the guest.
    path.read_dir().map_err(|e| error(e.into()))?;
    let directory = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(path);
    Ok(directory.map_err(|e| error(e.into()))?.into())
}

/// Opens a regular file or a block device that is not empty; with its size.
fn open_storage(owner: &str, path: &Path, readonly: bool) -> Result<(File, u64), OpenError> {
    let error = |reason| OpenError::new(owner, path, reason);
    let metadata = path.metadata().map_err(|e| error(e.into()))?;
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(error(Reason::NotA("regular file or block device")));
    }
    if !readonly && has_no_writer(&metadata) {
        return Err(error(Reason::ReadOnly));
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!readonly)
        .open(path)
        .map_err(|e| {
            error(match e.raw_os_error() {
                Some(libc::EACCES | libc::EPERM | libc::EROFS)
                    if !readonly && File::open(path).is_ok() =>
                {
                    Reason::ReadOnly
                }
                _ => e.into(),
            })
        })?;
    // The metadata of a block device does not hold its size.
    let size = file
        .seek(SeekFrom::End(0))
        .and_then(|size| file.rewind().map(|()| size))
        .map_err(|e| error(e.into()))?;
    match size {
        0 => Err(error(Reason::Empty)),
        size => Ok((file, size)),
    }
}

/// Nobody may write the file. Its owner means it; to root the system would not say so.
fn has_no_writer(metadata: &Metadata) -> bool {
    metadata.is_file() && metadata.mode() & 0o222 == 0
}

/// Reserves an image for this VM: for itself, or with other readers.
pub fn lock_image(owner: &str, path: &Path, file: &File, readonly: bool) -> Result<(), OpenError> {
    let error = |reason| OpenError::new(owner, path, reason);
    match sys::lock(file.as_fd(), !readonly) {
        Ok(true) => Ok(()),
        Ok(false) => Err(error(Reason::Locked(if readonly {
            ", which writes to it"
        } else {
            " or twice by this one (images can be shared only if all users add `readonly`)"
        }))),
        // Some network file systems have no locks; the VM runs without.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOLCK | libc::EOPNOTSUPP)) => {
            log::warn!("{owner}: {}: cannot be locked: {e}", path.display());
            Ok(())
        }
        Err(e) => Err(error(e.into())),
    }
}

/// Opens the file that a console's output is appended to.
pub fn open_output(owner: &str, path: &Path) -> Result<OwnedFd, OpenError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|e| OpenError::new(owner, path, e))
}

/// A socket that listens at a path, which disappears with it.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: UnixListener,
    path: PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Whoever removed it already has done this work.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens at `path`. A socket left there by a process that is gone is replaced.
pub fn listen(owner: &str, path: &Path) -> Result<Listener, OpenError> {
    let error = |reason| OpenError::new(owner, path, reason);
    let socket = match UnixListener::bind(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            match path.symlink_metadata() {
                Ok(metadata) if metadata.file_type().is_socket() => {}
                _ => return Err(error(Reason::NotA("socket"))),
            }
            match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
                _ => return Err(error(Reason::SocketTaken)),
            }
            std::fs::remove_file(path)
                .and_then(|()| UnixListener::bind(path))
                .map_err(|e| error(e.into()))?
        }
        other => other.map_err(|e| error(e.into()))?,
    };
    Ok(Listener {
        socket,
        path: path.to_owned(),
    })
}

/// Whether there may be a socket at `path`, as far as can be told without making it.
pub fn can_listen(owner: &str, path: &Path) -> Result<(), OpenError> {
    let error = |reason| OpenError::new(owner, path, reason);
    match path.symlink_metadata() {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(()),
        Ok(_) => Err(error(Reason::NotA("socket"))),
        Err(_) => {
            let folder = path
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            match folder.metadata() {
                Ok(metadata) if metadata.is_dir() => Ok(()),
                Ok(_) => Err(OpenError::new(owner, folder, Reason::NotA("folder"))),
                Err(e) => Err(OpenError::new(owner, folder, e)),
            }
        }
    }
}

/// Connects to a back end that runs already.
pub fn connect(owner: &str, path: &Path) -> Result<UnixStream, OpenError> {
    UnixStream::connect(path).map_err(|e| OpenError::new(owner, path, Reason::Connect(e)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn images_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let message = |readonly| open_image("d", &path, readonly).unwrap_err().to_string();
        assert!(message(false).contains("No such file"));
        std::fs::write(&path, b"").unwrap();
        assert!(message(false).ends_with("the file is empty"));
        std::fs::write(&path, [0; 513]).unwrap();
        assert!(message(false).contains("513 bytes is not a multiple of 512"));
        std::fs::write(&path, [0; 1024]).unwrap();
        assert!(open_image("d", &path, false).is_ok());
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
        assert!(message(false).contains("add `readonly`"));
        assert!(open_image("d", &path, true).is_ok());
        let error = open_image("d", folder.path(), true).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("not a regular file or block device")
        );
    }

    #[test]
    fn a_share_is_a_directory() {
        let folder = tempfile::tempdir().unwrap();
        let config = anemone_config::Config {
            kernel: Some("k".into()),
            fs: vec![anemone_config::Fs {
                tag: Some("t".parse().unwrap()),
                path: Some("p".into()),
                ..Default::default()
            }],
            ..Default::default()
        };
        let vm = config.resolve().unwrap();
        let share = vm.devices.iter().find_map(|device| match &device.kind {
            anemone_config::Kind::Fs(share) => Some(share),
            _ => None,
        });
        let share = share.unwrap();
        assert!(open_share("f", folder.path(), share).is_ok());
        let file = folder.path().join("file");
        File::create(&file).unwrap();
        for (path, part) in [
            (file, "not a directory"),
            (folder.path().join("no"), "No such"),
        ] {
            let text = open_share("f", &path, share).unwrap_err().to_string();
            assert!(
                text.starts_with("fs `f`: ") && text.contains(part),
                "{text}"
            );
        }
    }

    #[test]
    fn persistent_memory_has_whole_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let file = File::create(&path).unwrap();
        let open = |wanted| open_pmem("p", &path, wanted, false);
        let message = |wanted| open(wanted).unwrap_err().to_string();
        assert!(message(None).ends_with("the file is empty"));
        file.set_len((5 << 20) + 1).unwrap();
        let text = message(None);
        assert!(text.starts_with("pmem `p`: "), "{text}");
        assert!(text.contains("not a multiple of 2 MiB"), "{text}");
        assert_eq!(open(Some(4 << 20)).unwrap().size, 4 << 20);
        assert!(message(Some(6 << 20)).contains("`size` is 6291456 bytes"));
        file.set_len(6 << 20).unwrap();
        assert_eq!(open(None).unwrap().size, 6 << 20);
        assert!(open_pmem("p", folder.path(), None, true).is_err());
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let live = listen("console", &path).unwrap();
        let error = listen("console", &path).unwrap_err().to_string();
        assert!(error.contains("another program listens"), "{error}");
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "text").unwrap();
        let error = listen("console", &path).unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert!(path.exists());
        assert!(can_listen("v", &path).is_err());
        assert!(can_listen("v", &folder.path().join("new")).is_ok());
        assert!(can_listen("v", Path::new("new")).is_ok());
        assert!(can_listen("v", &path.join("below")).is_err());
        assert!(can_listen("v", &folder.path().join("no/such")).is_err());
    }
}
