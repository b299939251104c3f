//! System calls on a directory and one name in it. Errors are error numbers, as the guest gets them.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, iovec, off_t};

/// A result with an error number.
pub type Outcome<T> = Result<T, i32>;

/// Flags of every open: what is opened is a name in a directory and nothing that it points at, and
/// a pipe is not waited for.
const ALWAYS: c_int = libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK;

/// The error number of the last call.
pub fn errno() -> i32 {
    std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO)
}

fn check(result: impl Into<i64>) -> Outcome<i64> {
    match result.into() {
        n if n < 0 => Err(errno()),
        n => Ok(n),
    }
}

/// Opens a name. The flags of every open are added.
pub fn open(dir: BorrowedFd<'_>, name: &CStr, flags: c_int, mode: u32) -> Outcome<OwnedFd> {
    // SAFETY: a C string; a new descriptor belongs to nobody yet.
    unsafe {
        let fd = libc::openat(dir.as_raw_fd(), name.as_ptr(), flags | ALWAYS, mode);
        check(fd)?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Status of a name, not of what it points at.
pub fn stat(dir: BorrowedFd<'_>, name: &CStr) -> Outcome<libc::stat> {
    let mut stat = std::mem::MaybeUninit::zeroed();
    // SAFETY: a C string and room for the result, which is plain numbers.
    unsafe {
        let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
        let dir = dir.as_raw_fd();
        check(libc::fstatat(dir, name.as_ptr(), stat.as_mut_ptr(), flags))?;
        Ok(stat.assume_init())
    }
}

/// Status of what is open.
pub fn stat_fd(fd: BorrowedFd<'_>) -> Outcome<libc::stat> {
    stat(fd, c"")
}

/// File system of what is open.
pub fn statfs(fd: BorrowedFd<'_>) -> Outcome<libc::statfs> {
    let mut stat = std::mem::MaybeUninit::zeroed();
    // SAFETY: room for the result, which is plain numbers.
    unsafe {
        check(libc::fstatfs(fd.as_raw_fd(), stat.as_mut_ptr()))?;
        Ok(stat.assume_init())
    }
}

/// Text of a symbolic link.
pub fn read_link(dir: BorrowedFd<'_>, name: &CStr) -> Outcome<Vec<u8>> {
    let mut text = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: a C string, and a buffer of the length given.
    let n = unsafe {
        libc::readlinkat(
            dir.as_raw_fd(),
            name.as_ptr(),
            text.as_mut_ptr().cast(),
            text.len(),
        )
    };
    text.truncate(check(n as i64)? as usize);
    Ok(text)
}

pub fn make_directory(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Outcome<()> {
    // SAFETY: a C string.
    check(unsafe { libc::mkdirat(dir.as_raw_fd(), name.as_ptr(), mode) }).map(drop)
}

pub fn make_node(dir: BorrowedFd<'_>, name: &CStr, mode: u32, device: u64) -> Outcome<()> {
    // SAFETY: a C string.
    check(unsafe { libc::mknodat(dir.as_raw_fd(), name.as_ptr(), mode, device) }).map(drop)
}

pub fn make_symlink(dir: BorrowedFd<'_>, name: &CStr, target: &CStr) -> Outcome<()> {
    // SAFETY: C strings.
    check(unsafe { libc::symlinkat(target.as_ptr(), dir.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// A second name for a file.
pub fn link(from: (BorrowedFd<'_>, &CStr), dir: BorrowedFd<'_>, name: &CStr) -> Outcome<()> {
    let (old_dir, old) = (from.0.as_raw_fd(), from.1.as_ptr());
    // SAFETY: C strings.
    check(unsafe { libc::linkat(old_dir, old, dir.as_raw_fd(), name.as_ptr(), 0) }).map(drop)
}

/// Removes a name; a directory's with [`libc::AT_REMOVEDIR`].
pub fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: c_int) -> Outcome<()> {
    // SAFETY: a C string.
    check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }).map(drop)
}

pub fn rename(
    from: (BorrowedFd<'_>, &CStr),
    to: (BorrowedFd<'_>, &CStr),
    flags: u32,
) -> Outcome<()> {
    let (old_dir, old) = (from.0.as_raw_fd(), from.1.as_ptr());
    let (new_dir, new) = (to.0.as_raw_fd(), to.1.as_ptr());
    // SAFETY: C strings.
    let rc = unsafe { libc::syscall(libc::SYS_renameat2, old_dir, old, new_dir, new, flags) };
    check(rc).map(drop)
}

/// Mode of a name, which must not be a symbolic link.
pub fn chmod(dir: BorrowedFd<'_>, name: &CStr, mode: u32) -> Outcome<()> {
    // SAFETY: a C string.
    check(unsafe { libc::fchmodat(dir.as_raw_fd(), name.as_ptr(), mode, 0) }).map(drop)
}

pub fn chmod_fd(fd: BorrowedFd<'_>, mode: u32) -> Outcome<()> {
    // SAFETY: integers only.
    check(unsafe { libc::fchmod(fd.as_raw_fd(), mode) }).map(drop)
}

/// Owner and group of a name, or of what is open if the name is empty. All-ones changes nothing.
pub fn chown(dir: BorrowedFd<'_>, name: &CStr, uid: u32, gid: u32) -> Outcome<()> {
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
    // SAFETY: a C string.
    let rc = unsafe { libc::fchownat(dir.as_raw_fd(), name.as_ptr(), uid, gid, flags) };
    check(rc).map(drop)
}

/// Times of a name, or of what is open if there is no name.
pub fn set_times(
    dir: BorrowedFd<'_>,
    name: Option<&CStr>,
    times: &[libc::timespec; 2],
) -> Outcome<()> {
    let (path, flags) = match name {
        Some(name) => (name.as_ptr(), libc::AT_SYMLINK_NOFOLLOW),
        None => (std::ptr::null(), 0),
    };
    // SAFETY: a C string or none, as utimensat(2) allows (the C library's function does not), and
    // two times.
    let rc = unsafe {
        libc::syscall(
            libc::SYS_utimensat,
            dir.as_raw_fd(),
            path,
            times.as_ptr(),
            flags,
        )
    };
    check(rc).map(drop)
}

pub fn truncate(fd: BorrowedFd<'_>, size: u64) -> Outcome<()> {
    let size = off_t::try_from(size).map_err(|_| libc::EFBIG)?;
    // SAFETY: integers only.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), size) }).map(drop)
}

pub fn allocate(fd: BorrowedFd<'_>, mode: u32, offset: u64, length: u64) -> Outcome<()> {
    let offset = off_t::try_from(offset).map_err(|_| libc::EFBIG)?;
    let length = off_t::try_from(length).map_err(|_| libc::EFBIG)?;
    // SAFETY: integers only.
    check(unsafe { libc::fallocate(fd.as_raw_fd(), mode as c_int, offset, length) }).map(drop)
}

pub fn seek(fd: BorrowedFd<'_>, offset: u64, whence: c_int) -> Outcome<u64> {
    let offset = off_t::try_from(offset).map_err(|_| libc::EINVAL)?;
    // SAFETY: integers only.
    check(unsafe { libc::lseek(fd.as_raw_fd(), offset, whence) }).map(|n| n as u64)
}

/// Makes what was written durable.
pub fn sync(fd: BorrowedFd<'_>, data_only: bool) -> Outcome<()> {
    // SAFETY: integers only.
    let rc = unsafe {
        match data_only {
            true => libc::fdatasync(fd.as_raw_fd()),
            false => libc::fsync(fd.as_raw_fd()),
        }
    };
    check(rc).map(drop)
}

/// Makes a whole file system durable.
pub fn sync_all(fd: BorrowedFd<'_>) -> Outcome<()> {
    // SAFETY: integers only.
    check(unsafe { libc::syncfs(fd.as_raw_fd()) }).map(drop)
}

pub fn copy_range(
    from: BorrowedFd<'_>,
    from_offset: u64,
    to: BorrowedFd<'_>,
    to_offset: u64,
    length: usize,
) -> Outcome<u64> {
    let mut from_offset = off_t::try_from(from_offset).map_err(|_| libc::EINVAL)?;
    let mut to_offset = off_t::try_from(to_offset).map_err(|_| libc::EINVAL)?;
    // SAFETY: the offsets outlive the call.
    let n = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            length,
            0,
        )
    };
    check(n as i64).map(|n| n as u64)
}

/// Reads the next entries of a directory as the kernel has them (`struct linux_dirent64`).
pub fn read_directory(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Outcome<usize> {
    // SAFETY: a buffer of the length given.
    let n = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            fd.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    };
    check(n).map(|n| n as usize)
}

/// Reads at an offset.
///
/// # Safety
/// The parts must be memory that the kernel may write to for the length of the call.
pub unsafe fn read_at(
    fd: BorrowedFd<'_>,
    parts: &[iovec],
    offset: u64,
    flags: c_int,
) -> Outcome<usize> {
    let offset = off_t::try_from(offset).map_err(|_| libc::EINVAL)?;
    let count = c_int::try_from(parts.len()).map_err(|_| libc::EINVAL)?;
    // SAFETY: as the caller says.
    let n = unsafe { libc::preadv2(fd.as_raw_fd(), parts.as_ptr(), count, offset, flags) };
    check(n as i64).map(|n| n as usize)
}

/// Writes at an offset, or at the end of the file with [`libc::RWF_APPEND`].
///
/// # Safety
/// The parts must be memory that can be read for the length of the call.
pub unsafe fn write_at(
    fd: BorrowedFd<'_>,
    parts: &[iovec],
    offset: u64,
    flags: c_int,
) -> Outcome<usize> {
    let offset = off_t::try_from(offset).map_err(|_| libc::EINVAL)?;
    let count = c_int::try_from(parts.len()).map_err(|_| libc::EINVAL)?;
    // SAFETY: as the caller says.
    let n = unsafe { libc::pwritev2(fd.as_raw_fd(), parts.as_ptr(), count, offset, flags) };
    check(n as i64).map(|n| n as usize)
}

/// Value of an extended attribute; the length alone if the buffer is empty.
pub fn get_attribute(fd: BorrowedFd<'_>, name: &CStr, value: &mut [u8]) -> Outcome<usize> {
    let (to, size) = (value.as_mut_ptr().cast(), value.len());
    // SAFETY: a C string, and a buffer of the length given.
    let n = unsafe { libc::fgetxattr(fd.as_raw_fd(), name.as_ptr(), to, size) };
    check(n as i64).map(|n| n as usize)
}

pub fn set_attribute(fd: BorrowedFd<'_>, name: &CStr, value: &[u8], flags: c_int) -> Outcome<()> {
    let (from, size) = (value.as_ptr().cast(), value.len());
    // SAFETY: a C string, and a buffer of the length given.
    let rc = unsafe { libc::fsetxattr(fd.as_raw_fd(), name.as_ptr(), from, size, flags) };
    check(rc).map(drop)
}

/// Names of the extended attributes, each ended by a NUL.
pub fn list_attributes(fd: BorrowedFd<'_>) -> Outcome<Vec<u8>> {
    // XATTR_LIST_MAX
    let mut list = vec![0u8; 65536];
    // SAFETY: a buffer of the length given.
    let n = unsafe { libc::flistxattr(fd.as_raw_fd(), list.as_mut_ptr().cast(), list.len()) };
    list.truncate(check(n as i64)? as usize);
    Ok(list)
}

pub fn remove_attribute(fd: BorrowedFd<'_>, name: &CStr) -> Outcome<()> {
    // SAFETY: a C string.
    check(unsafe { libc::fremovexattr(fd.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// Acts as a user of the share on the calling thread until dropped.
pub struct Acting {
    /// The process's own user and group.
    own: (u32, u32),
}

impl Acting {
    /// Takes the file system ids of this user and group; gives `own` back in the end.
    pub fn new(uid: u32, gid: u32, own: (u32, u32)) -> Outcome<Self> {
        let acting = Self { own };
        // SAFETY: integers only. The raw calls change the thread; they tell the id from before and
        // no error, so it is asked for again.
        let taken = unsafe {
            libc::syscall(libc::SYS_setfsgid, gid);
            libc::syscall(libc::SYS_setfsuid, uid);
            libc::syscall(libc::SYS_setfsgid, -1) == i64::from(gid)
                && libc::syscall(libc::SYS_setfsuid, -1) == i64::from(uid)
        };
        match taken {
            true => Ok(acting),
            false => Err(libc::EPERM),
        }
    }
}

impl Drop for Acting {
    fn drop(&mut self) {
        // SAFETY: integers only. The process's own ids, which it always may take.
        unsafe {
            libc::syscall(libc::SYS_setfsuid, self.own.0);
            libc::syscall(libc::SYS_setfsgid, self.own.1);
        }
    }
}

/// A memfd of this length that can never change its length.
pub fn sealed_memory(name: &CStr, length: usize) -> std::io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a C string; integers; a new descriptor belongs to nobody yet.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), flags);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        if libc::ftruncate(fd.as_raw_fd(), length as off_t) < 0
            || libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) < 0
        {
            return Err(std::io::Error::last_os_error());
        }
        Ok(fd)
    }
}

const SEALS: c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// Whether a descriptor is what [`sealed_memory`] makes.
pub fn is_sealed_memory(fd: impl AsFd, length: usize) -> bool {
    // SAFETY: integers only.
    let seals = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0
        && seals & SEALS == SEALS
        && stat_fd(fd.as_fd()).is_ok_and(|stat| stat.st_size == length as off_t)
}
