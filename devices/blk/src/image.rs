//! The file or block device behind the disk: opening, locking, size and geometry.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anemone_device::{FileError, open_again, open_locked};
use thiserror::Error;

/// Bytes of a virtio sector, whatever the block size of the disk is (virtio 1.2, 5.2.6).
pub const SECTOR_SIZE: u64 = 512;

/// Why an image cannot be served.
#[derive(Debug, Error)]
pub enum Error {
    /// It cannot be opened, or somebody else uses it.
    #[error(transparent)]
    File(#[from] FileError),
    /// A descriptor was handed over that does not allow writing.
    #[error("the image was opened read-only, but the disk is writable: add --readonly")]
    ReadOnlyDescriptor,
    /// Not something with blocks in it.
    #[error("the image is neither a regular file nor a block device")]
    Kind,
    /// virtio-blk counts in sectors of 512 bytes.
    #[error(
        "the image has {0} bytes, which is not a multiple of 512: a raw disk has whole sectors \
         (`truncate -s %512 FILE` rounds it up)"
    )]
    Size(u64),
    /// `fstat` or an ioctl on the image failed.
    #[error("cannot read the {what} of the image: {source}")]
    Query {
        /// Property asked for.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

/// Block sizes and alignments that the guest is told (virtio 1.2, 5.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Logical blocks per physical block, as a power of two.
    pub physical_exponent: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Suggested smallest transfer in logical blocks.
    pub min_io: u16,
    /// Suggested transfer in logical blocks, 0 for none.
    pub opt_io: u32,
}

/// An open disk image.
#[derive(Debug)]
pub struct Image {
    /// For access.
    file: File,
    /// Keeps the lock. The lock belongs to this open file and not to `file`, because the kernel
    /// keeps files that were registered with a ring open for some time after the process has
    /// ended, and the image must be free for the next user at once.
    _lock: File,
    sectors: u64,
    read_only: bool,
    block_device: bool,
    in_memory: bool,
    geometry: Geometry,
}

impl Image {
    /// Opens `path` and locks it against other users: exclusively when writable, shared when not.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        Self::from_file(open_locked(path, read_only)?, read_only)
    }

    /// Takes over an image that the caller has opened and locked.
    pub fn from_fd(fd: OwnedFd, read_only: bool) -> Result<Self, Error> {
        // SAFETY: F_GETFL takes no pointer.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(query("access mode", io::Error::last_os_error()));
        }
        if !read_only && flags & libc::O_ACCMODE != libc::O_RDWR {
            return Err(Error::ReadOnlyDescriptor);
        }
        Self::from_file(File::from(fd), read_only)
    }

    fn from_file(file: File, read_only: bool) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(|e| query("type", e))?;
        let block_device = metadata.file_type().is_block_device();
        if !block_device && !metadata.is_file() {
            return Err(Error::Kind);
        }
        let (size, geometry) = if block_device {
            block_device_properties(file.as_raw_fd())?
        } else {
            (metadata.len(), file_geometry(metadata.blksize()))
        };
        if size % SECTOR_SIZE != 0 {
            return Err(Error::Size(size));
        }
        let in_memory = !block_device && lives_in_memory(&file)?;
        // A ring takes O_NONBLOCK on a file in memory as leave to access it at once instead of in a
        // helper thread.
        let flags = if in_memory { libc::O_NONBLOCK } else { 0 };
        let again = open_again(&file, read_only, flags | libc::O_NOCTTY);
        Ok(Self {
            file: again.map_err(|e| query("descriptor", e))?,
            _lock: file,
            sectors: size / SECTOR_SIZE,
            read_only,
            block_device,
            in_memory,
            geometry,
        })
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether this is a block device rather than a regular file.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Whether the file lives in memory (tmpfs, ramfs), so that no access waits for a device.
    pub fn in_memory(&self) -> bool {
        self.in_memory
    }

    /// Block sizes and alignments.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
}

impl AsRawFd for Image {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn query(what: &'static str, source: io::Error) -> Error {
    Error::Query { what, source }
}

/// Geometry of an image in a file: any sector can be accessed, whole file system blocks are best.
fn file_geometry(fs_block: u64) -> Geometry {
    // File systems with huge pages report them as the block; the guest should not align to those.
    let physical = fs_block.clamp(SECTOR_SIZE, 4096);
    Geometry {
        block_size: SECTOR_SIZE as u32,
        physical_exponent: (physical / SECTOR_SIZE).ilog2() as u8,
        alignment_offset: 0,
        min_io: (physical / SECTOR_SIZE) as u16,
        opt_io: 0,
    }
}

/// Size in bytes and geometry of a block device (linux/fs.h).
fn block_device_properties(fd: RawFd) -> Result<(u64, Geometry), Error> {
    const BLKIOMIN: libc::Ioctl = 0x1278;
    const BLKIOOPT: libc::Ioctl = 0x1279;
    const BLKALIGNOFF: libc::Ioctl = 0x127a;
    const BLKPBSZGET: libc::Ioctl = 0x127b;
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

    let read_int = |request, what| {
        let mut value: libc::c_int = 0;
        // SAFETY: these ioctls store one int through the pointer.
        if unsafe { libc::ioctl(fd, request, &raw mut value) } != 0 {
            return Err(query(what, io::Error::last_os_error()));
        }
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 stores one u64 through the pointer.
    if unsafe { libc::ioctl(fd, BLKGETSIZE64, &raw mut size) } != 0 {
        return Err(query("size", io::Error::last_os_error()));
    }
    let block_size =
        read_int(libc::BLKSSZGET as libc::Ioctl, "logical block size")?.max(SECTOR_SIZE as u32);
    let in_blocks = |bytes: u32| bytes / block_size;
    let physical = in_blocks(read_int(BLKPBSZGET, "physical block size")?).max(1);
    let geometry = Geometry {
        block_size,
        physical_exponent: physical.ilog2() as u8,
        alignment_offset: u8::try_from(in_blocks(read_int(BLKALIGNOFF, "alignment")?)).unwrap_or(0),
        min_io: u16::try_from(in_blocks(read_int(BLKIOMIN, "smallest I/O size")?)).unwrap_or(0),
        opt_io: in_blocks(read_int(BLKIOOPT, "optimal I/O size")?),
    };
    Ok((size, geometry))
}

fn lives_in_memory(file: &File) -> Result<bool, Error> {
    const RAMFS_MAGIC: i64 = 0x8584_58f6;
    // SAFETY: all-zero is a valid statfs.
    let mut statfs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: fstatfs fills the structure, which lives for the call.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut statfs) } != 0 {
        return Err(query("file system type", io::Error::last_os_error()));
    }
    Ok(matches!(statfs.f_type, libc::TMPFS_MAGIC | RAMFS_MAGIC))
}
