//! Terminals.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

fn check(rc: libc::c_int) -> io::Result<libc::c_int> {
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rc)
}

/// Turns the result of a call that makes a descriptor into its owner.
fn owned(rc: RawFd) -> io::Result<OwnedFd> {
    let fd = check(rc)?;
    // SAFETY: the callers pass the result of a call that has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new pseudo-terminal: its master and the name of its other side.
pub fn open_pty() -> io::Result<(OwnedFd, String)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the path is a C string.
    let master = owned(unsafe { libc::open(c"/dev/ptmx".as_ptr(), flags) })?;
    let (mut number, unlock): (libc::c_uint, libc::c_int) = (0, 0);
    let fd = master.as_raw_fd();
    // SAFETY: both ioctls access one int through the pointer.
    unsafe {
        check(libc::ioctl(fd, libc::TIOCSPTLCK, &raw const unlock))?;
        check(libc::ioctl(fd, libc::TIOCGPTN, &raw mut number))?;
    }
    Ok((master, format!("/dev/pts/{number}")))
}

/// Puts a pseudo-terminal into raw mode and into the state of one whose user has gone: until
/// somebody opens its other side, the master reports a hang-up.
pub fn prepare_pty(master: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes its flags by value and returns a new descriptor.
    let peer = owned(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) })?;
    let mut mode = terminal_mode(peer.as_fd())?;
    // SAFETY: cfmakeraw only changes the structure.
    unsafe { libc::cfmakeraw(&raw mut mode) };
    set_terminal_mode(peer.as_fd(), &mode)
}

fn terminal_mode(terminal: BorrowedFd<'_>) -> io::Result<libc::termios> {
    let mut mode = MaybeUninit::uninit();
    // SAFETY: tcgetattr fills the structure when it succeeds.
    unsafe {
        check(libc::tcgetattr(terminal.as_raw_fd(), mode.as_mut_ptr()))?;
        Ok(mode.assume_init())
    }
}

fn set_terminal_mode(terminal: BorrowedFd<'_>, mode: &libc::termios) -> io::Result<()> {
    // SAFETY: the structure outlives the call.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, mode) })?;
    Ok(())
}

/// A terminal in raw mode; dropping it restores the mode it had.
pub struct RawMode {
    terminal: OwnedFd,
    saved: libc::termios,
}

impl RawMode {
    /// Puts `terminal` into raw mode if it is one.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let saved = match terminal_mode(terminal) {
            Ok(mode) => mode,
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut raw = saved;
        // SAFETY: cfmakeraw only changes the structure.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        set_terminal_mode(terminal, &raw)?;
        let terminal = terminal.try_clone_to_owned()?;
        Ok(Some(Self { terminal, saved }))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may have gone.
        let _ = set_terminal_mode(self.terminal.as_fd(), &self.saved);
    }
}

/// Columns and rows of a terminal.
pub fn window_size(terminal: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ fills one winsize.
    let rc = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    check(rc).ok().map(|_| (size.ws_col, size.ws_row))
}

/// Makes reading and writing of `fd` return instead of waiting, without a change for other
/// processes that share it where that is possible: a terminal or a pipe is opened anew. What
/// cannot be is left as it is, and then may wait: the second value says so.
pub fn nonblocking(fd: OwnedFd, write: bool) -> io::Result<(OwnedFd, bool)> {
    let number = fd.as_raw_fd();
    let mut stat: MaybeUninit<libc::stat> = MaybeUninit::uninit();
    // SAFETY: fstat fills the structure when it succeeds.
    let kind = unsafe {
        check(libc::fstat(number, stat.as_mut_ptr()))?;
        stat.assume_init().st_mode & libc::S_IFMT
    };
    if kind == libc::S_IFSOCK {
        set_nonblocking(fd.as_fd())?;
        return Ok((fd, false));
    }
    if kind != libc::S_IFCHR && kind != libc::S_IFIFO {
        return Ok((fd, false));
    }
    let access = if write {
        libc::O_WRONLY
    } else {
        libc::O_RDONLY
    };
    let flags = access | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let path = format!("/proc/self/fd/{number}\0");
    // SAFETY: the path ends with a zero.
    match owned(unsafe { libc::open(path.as_ptr().cast(), flags) }) {
        Ok(own) => Ok((own, false)),
        Err(_) => Ok((fd, true)),
    }
}

/// Whether `fd` is a file to which writing appends.
pub fn appends(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: F_GETFL takes no pointer.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let mut stat: MaybeUninit<libc::stat> = MaybeUninit::uninit();
    // SAFETY: fstat fills the structure when it succeeds.
    let kind = unsafe {
        check(libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()))?;
        stat.assume_init().st_mode & libc::S_IFMT
    };
    Ok(flags & libc::O_APPEND != 0 && kind == libc::S_IFREG)
}

/// Sets O_NONBLOCK for everybody who shares `fd`.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe {
        let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
        let flags = flags | libc::O_NONBLOCK;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags))?;
    }
    Ok(())
}

/// What `fd` is ready for after waiting up to `timeout` milliseconds.
pub fn poll(fd: BorrowedFd<'_>, events: libc::c_short, timeout: i32) -> libc::c_short {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: `poll` is one valid pollfd. On failure nothing is ready.
    unsafe { libc::poll(&raw mut poll, 1, timeout) };
    poll.revents
}
