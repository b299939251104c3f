//! The FUSE protocol (Linux, include/uapi/linux/fuse.h, version 7.38): numbers and layouts. All
//! fields are in the byte order of the machine.

/// Major version.
pub const MAJOR: u32 = 7;
/// Newest minor version spoken.
pub const MINOR: u32 = 38;
/// Oldest minor version spoken: structures have not changed since.
pub const OLDEST_MINOR: u32 = 31;
/// The root directory's node.
pub const ROOT: u64 = 1;

/// Length of the header of a request.
pub const IN_HEADER: usize = 40;
/// Length of the header of a reply.
pub const OUT_HEADER: usize = 16;
/// Length of `fuse_entry_out`.
pub const ENTRY_OUT: usize = 128;
/// Length of `fuse_dirent` without the name.
pub const DIRENT: usize = 24;
/// Longest name of a directory entry.
pub const NAME_MAX: usize = 255;

/// Operations.
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// What INIT agrees on.
pub mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const EXPORT_SUPPORT: u32 = 1 << 4;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// Bits of `fuse_setattr_in.valid`.
pub mod set {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `fuse_open_in.open_flags`: clear set-user-id and set-group-id when truncating.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// `fuse_write_in.write_flags`: clear set-user-id and set-group-id.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `fuse_fsync_in.fsync_flags`: the data and what is needed to read them.
pub const FSYNC_DATA: u32 = 1;
/// `fuse_getattr_in.getattr_flags`: the handle is valid.
pub const GETATTR_FH: u32 = 1;
/// `fuse_open_out.open_flags`: no cache for this file.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// `fuse_open_out.open_flags`: what is cached stays so.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `fuse_open_out.open_flags`: the directory's entries may be cached.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;

/// The header of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InHeader {
    /// Length with the header.
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub nodeid: u64,
    pub uid: u32,
    pub gid: u32,
}

impl InHeader {
    /// Reads it.
    pub fn from_bytes(bytes: &[u8; IN_HEADER]) -> Self {
        let mut fields = Fields(bytes);
        // Forty bytes hold all of these.
        let mut word = || fields.u32().unwrap_or_default();
        let (len, opcode) = (word(), word());
        let mut long = || u64::from(word()) | u64::from(word()) << 32;
        let (unique, nodeid) = (long(), long());
        Self {
            len,
            opcode,
            unique,
            nodeid,
            uid: word(),
            gid: word(),
        }
    }
}

/// The arguments of a request, read from front to back. What is missing is `EINVAL`.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], i32> {
        let (first, rest) = self.0.split_first_chunk().ok_or(libc::EINVAL)?;
        self.0 = rest;
        Ok(*first)
    }

    pub fn u32(&mut self) -> Result<u32, i32> {
        self.take().map(u32::from_ne_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, i32> {
        self.take().map(u64::from_ne_bytes)
    }

    pub fn skip(&mut self, length: usize) -> Result<(), i32> {
        self.0 = self.0.get(length..).ok_or(libc::EINVAL)?;
        Ok(())
    }

    pub fn bytes(&mut self, length: usize) -> Result<&'a [u8], i32> {
        let bytes = self.0.get(..length).ok_or(libc::EINVAL)?;
        self.skip(length)?;
        Ok(bytes)
    }

    /// A text that ends with a NUL, without it.
    pub fn text(&mut self) -> Result<&'a [u8], i32> {
        let end = self.0.iter().position(|&byte| byte == 0);
        let text = self.bytes(end.ok_or(libc::EINVAL)?)?;
        self.skip(1)?;
        Ok(text)
    }
}

/// What a reply is made of.
#[derive(Debug, Default)]
pub struct Out(pub Vec<u8>);

impl Out {
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn zeroes(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    /// `struct fuse_attr`.
    pub fn attr(&mut self, stat: &libc::stat, uid: u32, gid: u32) -> &mut Self {
        self.u64(stat.st_ino)
            .u64(stat.st_size as u64)
            .u64(stat.st_blocks as u64)
            .u64(stat.st_atime as u64)
            .u64(stat.st_mtime as u64)
            .u64(stat.st_ctime as u64)
            .u32(stat.st_atime_nsec as u32)
            .u32(stat.st_mtime_nsec as u32)
            .u32(stat.st_ctime_nsec as u32)
            .u32(stat.st_mode)
            .u32(stat.st_nlink as u32)
            .u32(uid)
            .u32(gid)
            // The protocol has the kernel's 32-bit form: 12 bits of major, 20 of minor number.
            .u32(rdev(stat.st_rdev))
            .u32(stat.st_blksize as u32)
            .u32(0)
    }
}

/// The kernel's 32-bit form of a device number.
fn rdev(device: u64) -> u32 {
    let (major, minor) = (libc::major(device), libc::minor(device));
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// The device number in the kernel's 32-bit form.
pub fn device(rdev: u32) -> u64 {
    libc::makedev((rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & !0xff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_way() {
        for (major, minor) in [(1, 3), (8, 255), (259, 256), (4095, 0xf_ffff), (0, 0)] {
            let number = libc::makedev(major, minor);
            assert_eq!(device(rdev(number)), number);
        }
        assert_eq!(rdev(libc::makedev(8, 1)), 0x801);
    }

    #[test]
    fn fields_end_where_the_request_ends() {
        let mut fields = Fields(b"\x01\0\0\0name\0rest");
        assert_eq!(fields.u32(), Ok(1));
        assert_eq!(fields.text(), Ok(&b"name"[..]));
        assert_eq!(fields.text(), Err(libc::EINVAL));
        assert_eq!(fields.u64(), Err(libc::EINVAL));
        assert_eq!(fields.bytes(5), Err(libc::EINVAL));
        assert_eq!(fields.bytes(4), Ok(&b"rest"[..]));
    }
}
