//! What all processes of a VM do with themselves: take over inherited descriptors, and give back
//! memory that only their start needed.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

/// Why an inherited descriptor cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Error {
    /// It has been taken over already.
    #[error("descriptor {0} is named twice")]
    Twice(RawFd),
    /// There is none of this number.
    #[error("descriptor {0} is not open in this process")]
    NotOpen(RawFd),
}

/// Descriptors taken over so far, each once.
static TAKEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// The descriptors that were taken over so far.
pub fn inherited_fds() -> Vec<RawFd> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Takes over a descriptor that the process has inherited, by its number, and keeps it from being
/// inherited further. Each number can be taken once.
///
/// # Errors
/// [`Error::NotOpen`] and [`Error::Twice`].
pub fn inherited_fd(number: RawFd) -> Result<OwnedFd, Error> {
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(Error::Twice(number));
    }
    // SAFETY: F_SETFD takes no pointer and fails for a number that is not open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(Error::NotOpen(number));
    }
    taken.push(number);
    // SAFETY: the descriptor is open. It was inherited, as the command line is read before the
    // process opens any of its own, and the list above makes this its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Connects to the UNIX socket that stands for `port` of a guest's sockets below `path`:
/// `path`, an underscore, and the number. Never waits: where the listener's queue is full, it fails.
///
/// # Errors
/// Nobody listens there or can be asked now, or the path is too long.
pub fn dial(path: &Path, port: u32) -> io::Result<OwnedFd> {
    let mut bytes = path.as_os_str().as_bytes().to_vec();
    bytes.extend_from_slice(format!("_{port}").as_bytes());
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // The zero at the end has to fit, too.
    if bytes.len() >= address.sun_path.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(&bytes) {
        *to = *from as libc::c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: integers only.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address is valid, and as long as said.
    match unsafe { libc::connect(fd, (&raw const address).cast(), length) } {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes all threads share the main heap, which grows and shrinks by `brk` alone: a thread that
/// allocates needs no other system call. To be called before any other thread is there.
pub fn one_heap() {
    // SAFETY: no pointers. An allocator that does not know these parameters refuses them.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_MAX, 0);
    }
}

/// Lets threads have heaps of their own, and share them when there are many threads. Without a number
/// the C library asks for that of the CPUs when a ninth heap is wanted, by a system call that no
/// jail needs for anything else. To be called before any other thread is there.
pub fn several_heaps() {
    // SAFETY: no pointers. An allocator that does not know this parameter refuses it.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 16) };
}

/// Gives back what only the start of the process needed: free heap, and the pages of its code and
/// constants. The kernel maps again what is touched, from its page cache; most never is: it
/// belongs to the start (relocation, arguments, the jail) or to what does not happen (unwinding,
/// formatting of numbers). No effect on failure.
pub fn release_memory() {
    // SAFETY: no pointers; only free memory is touched.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback has the type that the call expects and uses no data.
    unsafe { libc::dl_iterate_phdr(Some(release_segments), ptr::null_mut()) };
}

/// Lets go of the segments of a loaded object that nobody can have written to.
unsafe extern "C" fn release_segments(
    object: *mut libc::dl_phdr_info,
    _: libc::size_t,
    _: *mut libc::c_void,
) -> libc::c_int {
    const PAGE: usize = 4096;
    // SAFETY: the caller passes a valid object with its program headers.
    let (base, headers) = unsafe {
        let object = &*object;
        let count = usize::from(object.dlpi_phnum);
        let headers = std::slice::from_raw_parts(object.dlpi_phdr, count);
        (object.dlpi_addr as usize, headers)
    };
    for header in headers {
        let read_only = header.p_flags & libc::PF_W == 0;
        if header.p_type != libc::PT_LOAD || !read_only {
            continue;
        }
        // A page that a writable segment begins in is left alone.
        let start = base
            .wrapping_add(header.p_vaddr as usize)
            .next_multiple_of(PAGE);
        let end = base.wrapping_add((header.p_vaddr + header.p_memsz) as usize) & !(PAGE - 1);
        if end > start {
            // SAFETY: whole pages of a private mapping that was never writable: their content is
            // that of the file, with or without this call.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn descriptors_are_taken_once() {
        let number = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        let fd = inherited_fd(number).unwrap();
        assert_eq!(inherited_fd(number).unwrap_err(), Error::Twice(number));
        assert_eq!(inherited_fd(9999).unwrap_err(), Error::NotOpen(9999));
        assert!(inherited_fds().contains(&number));
        drop(fd);
    }

    #[test]
    fn nothing_is_lost_with_the_pages() {
        let text = format!("kept {}", 1);
        release_memory();
        assert_eq!(text, "kept 1");
    }
}
