//! System calls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(rc: libc::c_int) -> io::Result<libc::c_int> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rc)
}

/// Which sockets have something to do, each reported once when that begins (edge-triggered).
#[derive(Debug)]
pub struct Poller {
    fd: OwnedFd,
}

/// What happened to a socket.
#[derive(Debug, Clone, Copy)]
pub struct Ready {
    /// The token it was added with.
    pub token: u64,
    /// There may be something to read.
    pub readable: bool,
    /// There may be room to write.
    pub writable: bool,
    /// The other side will not write any more.
    pub no_more: bool,
    /// The other side has gone.
    pub hung_up: bool,
}

impl Poller {
    /// Events taken in one call.
    const BATCH: usize = 64;

    /// An empty set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the result is a new descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?) };
        Ok(Self { fd })
    }

    /// Watches a socket for bytes to read, and for its end; what is so already is reported, too.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        self.set(libc::EPOLL_CTL_ADD, fd, token, 0)
    }

    /// Begins or ends to watch it for room to write, too. Only while there is none: each time the
    /// other side reads would be an event.
    pub fn watch_room(&self, fd: BorrowedFd<'_>, token: u64, on: bool) -> io::Result<()> {
        let more = if on { libc::EPOLLOUT } else { 0 };
        self.set(libc::EPOLL_CTL_MOD, fd, token, more)
    }

    fn set(
        &self,
        operation: libc::c_int,
        fd: BorrowedFd<'_>,
        token: u64,
        more: libc::c_int,
    ) -> io::Result<()> {
        let events = libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLET | more;
        let mut event = libc::epoll_event {
            events: events as u32,
            u64: token,
        };
        let (set, fd) = (self.fd.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: the event outlives the call.
        check(unsafe { libc::epoll_ctl(set, operation, fd, &raw mut event) })?;
        Ok(())
    }

    /// Ends the watch. Closing the descriptor would not: another process has a copy.
    pub fn remove(&self, fd: BorrowedFd<'_>) {
        let (set, fd) = (self.fd.as_raw_fd(), fd.as_raw_fd());
        // SAFETY: the event is not used. It can only fail for a socket that is not watched.
        unsafe { libc::epoll_ctl(set, libc::EPOLL_CTL_DEL, fd, std::ptr::null_mut()) };
    }

    /// What has happened since the last call, up to a limit.
    pub fn ready(&self) -> Vec<Ready> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; Self::BATCH];
        let most = Self::BATCH as libc::c_int;
        // SAFETY: the array is as long as said.
        let n = unsafe { libc::epoll_wait(self.fd.as_raw_fd(), events.as_mut_ptr(), most, 0) };
        let count = usize::try_from(n).unwrap_or(0);
        events[..count]
            .iter()
            .map(|event| {
                let (flags, token) = (event.events as libc::c_int, event.u64);
                let has = |bits| flags & bits != 0;
                let hung_up = has(libc::EPOLLHUP | libc::EPOLLERR);
                Ready {
                    token,
                    readable: hung_up || has(libc::EPOLLIN | libc::EPOLLRDHUP),
                    writable: hung_up || has(libc::EPOLLOUT),
                    no_more: hung_up || has(libc::EPOLLRDHUP),
                    hung_up,
                }
            })
            .collect()
    }

    /// Readable when [`ready`](Self::ready) has something to say.
    pub fn watch(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.fd.as_fd()
    }
}

/// How many bytes wait to be read.
pub fn waiting(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Copies the first bytes that wait without taking them.
pub fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    let (at, length) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the buffer is as long as said.
    let n = unsafe { libc::recv(fd.as_raw_fd(), at, length, flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Sends one message without waiting. How much was sent is in its `msg_len`, which is not touched
/// on failure.
///
/// # Safety
/// The message must be valid, and so its buffers.
pub unsafe fn send(fd: BorrowedFd<'_>, message: *mut libc::mmsghdr) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the caller's promise.
    check(unsafe { libc::sendmmsg(fd.as_raw_fd(), message, 1, flags) })?;
    Ok(())
}

/// Receives up to `count` messages without waiting. How much each got is in its `msg_len`, which
/// is not touched for those that got nothing.
///
/// # Safety
/// The messages must be valid, and so their buffers.
pub unsafe fn receive(
    fd: BorrowedFd<'_>,
    messages: *mut libc::mmsghdr,
    count: usize,
) -> io::Result<()> {
    let (count, none) = (count as libc::c_uint, std::ptr::null_mut());
    // SAFETY: the caller's promise; there is no time limit.
    let rc = unsafe { libc::recvmmsg(fd.as_raw_fd(), messages, count, libc::MSG_DONTWAIT, none) };
    check(rc)?;
    Ok(())
}

/// Ends one direction or both: what the kernel calls `SHUT_RD`, `SHUT_WR`, `SHUT_RDWR`.
pub fn shut_down(fd: BorrowedFd<'_>, how: libc::c_int) {
    // SAFETY: no pointers. It fails if the other side has gone, which is the same.
    unsafe { libc::shutdown(fd.as_raw_fd(), how) };
}

/// Takes the next client of a listening socket.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for; the result is a new descriptor.
    unsafe {
        let fd: RawFd = check(libc::accept4(
            listener.as_raw_fd(),
            none,
            std::ptr::null_mut(),
            flags,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// An anonymous file of `size` bytes that keeps its size.
pub fn memory_file(size: u64) -> io::Result<OwnedFd> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a constant string; the result is a new descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(check(libc::memfd_create(c"vsock".as_ptr(), flags))?) };
    let size = libc::off_t::try_from(size).map_err(io::Error::other)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no pointers.
    unsafe {
        check(libc::ftruncate(fd.as_raw_fd(), size))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals))?;
    }
    Ok(fd)
}
