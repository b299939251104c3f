//! The system calls that the standard library lacks, each as a safe function.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// The system's error for a negative result.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes over the descriptor that a system call has just returned.
///
/// # Safety
/// `result` must be what a call returned that makes a descriptor or fails with a negative number.
pub unsafe fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: not negative, so a new descriptor that nothing else owns.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Marks all descriptors from `first` on to be closed on exec, whoever left them open.
pub fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: flags of descriptors change, nothing else.
    check(unsafe {
        libc::close_range(
            first.unsigned_abs(),
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC as libc::c_int,
        )
    })?;
    Ok(())
}

/// Memory of `size` bytes that can neither grow nor shrink, for a guest.
pub fn guest_memory(size: u64) -> io::Result<OwnedFd> {
    sealed_memory("guest-memory", size)
}

/// An anonymous file of `size` bytes that can neither grow nor shrink.
pub fn sealed_memory(name: &str, size: u64) -> io::Result<OwnedFd> {
    let fd = memfd(name, libc::MFD_ALLOW_SEALING)?;
    let size = libc::off_t::try_from(size).map_err(io::Error::other)?;
    // SAFETY: plain system calls on a descriptor of this function.
    unsafe {
        check(libc::ftruncate(fd.as_raw_fd(), size))?;
        check(libc::fcntl(
            fd.as_raw_fd(),
            libc::F_ADD_SEALS,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
        ))?;
    }
    Ok(fd)
}

/// An anonymous file.
pub fn memfd(name: &str, flags: libc::c_uint) -> io::Result<OwnedFd> {
    let name = CString::new(name)?;
    // SAFETY: `name` ends with NUL and outlives the call.
    unsafe { owned(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags)) }
}

/// Copies a descriptor to the first free number from `lowest` on.
pub fn duplicate_from(fd: BorrowedFd<'_>, lowest: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call makes a new descriptor or fails.
    unsafe { owned(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, lowest)) }
}

/// Locks the whole file until its last descriptor is closed (an open file description lock,
/// fcntl(2)): shared for readers, exclusive for a writer. False if another one holds it.
pub fn lock(file: BorrowedFd<'_>, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    // SAFETY: an all-zero flock is valid; zero start and length mean the whole file.
    let mut range: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    range.l_type = kind as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: the call reads a flock through the pointer.
    match check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) }) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Opens a new pseudo-terminal in raw mode; returns its controlling end and its number N, as in
/// `/dev/pts/N`.
pub fn open_pty() -> io::Result<(OwnedFd, u32)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let mut number: libc::c_uint = 0;
    // SAFETY: the path ends with NUL; the requests read an int and write an unsigned int.
    let fd = unsafe {
        let fd = owned(libc::open(c"/dev/ptmx".as_ptr(), flags))?;
        let unlock: libc::c_int = 0;
        check(libc::ioctl(
            fd.as_raw_fd(),
            libc::TIOCSPTLCK,
            &raw const unlock,
        ))?;
        check(libc::ioctl(fd.as_raw_fd(), libc::TIOCGPTN, &raw mut number))?;
        fd
    };
    let mut mode = terminal_mode(fd.as_fd())?;
    make_raw(&mut mode);
    set_terminal_mode(fd.as_fd(), &mode)?;
    Ok((fd, number))
}

/// The settings of a terminal; an error where the descriptor is none.
pub fn terminal_mode(fd: BorrowedFd<'_>) -> io::Result<libc::termios> {
    let mut mode = MaybeUninit::uninit();
    // SAFETY: the call fills in the termios unless it fails.
    unsafe {
        check(libc::tcgetattr(fd.as_raw_fd(), mode.as_mut_ptr()))?;
        Ok(mode.assume_init())
    }
}

/// Changes the settings of a terminal.
pub fn set_terminal_mode(fd: BorrowedFd<'_>, mode: &libc::termios) -> io::Result<()> {
    // SAFETY: the call reads a termios through the pointer.
    check(unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, mode) })?;
    Ok(())
}

/// Every byte passes as it is.
pub fn make_raw(mode: &mut libc::termios) {
    // SAFETY: the call changes the termios and nothing else.
    unsafe { libc::cfmakeraw(mode) };
}

/// Width and height of a terminal in characters.
pub fn window_size(fd: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    // SAFETY: all-zero is a valid winsize; the call fills it in.
    unsafe {
        let mut size: libc::winsize = MaybeUninit::zeroed().assume_init();
        check(libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size))?;
        Ok((size.ws_col, size.ws_row))
    }
}

/// Whether this process belongs to the foreground of the terminal.
pub fn in_foreground(terminal: BorrowedFd<'_>) -> bool {
    // SAFETY: no pointers.
    unsafe { libc::tcgetpgrp(terminal.as_raw_fd()) == libc::getpgrp() }
}

/// A descriptor that becomes readable when the process ends.
pub fn pidfd_open(pid: libc::pid_t) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the call makes a descriptor (closed on exec) or fails.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        owned(fd as libc::c_int)
    }
}

/// Sends SIGKILL to a child that has not been waited for.
pub fn kill(pid: libc::pid_t) {
    // SAFETY: no pointers. The number of a child that has not been waited for is not reused.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// How a process ended: its exit status, or the signal that killed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited.
    Status(i32),
    /// A signal killed it.
    Signal(i32),
}

/// Collects the child behind `pidfd`; `None` if it still runs and `block` is false.
pub fn wait(pidfd: BorrowedFd<'_>, block: bool) -> io::Result<Option<Exit>> {
    let flags = libc::WEXITED | if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: all-zero is a valid siginfo; the call fills it in.
        let (result, info) = unsafe {
            let mut info: libc::siginfo_t = MaybeUninit::zeroed().assume_init();
            let id = pidfd.as_raw_fd().unsigned_abs();
            (libc::waitid(libc::P_PIDFD, id, &raw mut info, flags), info)
        };
        match check(result) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) => {
                // SAFETY: after waitid the fields of a child's end are valid, or zero if it runs.
                let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
                return Ok(match (pid, info.si_code) {
                    (0, _) => None,
                    (_, libc::CLD_EXITED) => Some(Exit::Status(status)),
                    _ => Some(Exit::Signal(status)),
                });
            }
        }
    }
}

/// What [`poll`] waits for: readable, or hung up.
pub fn readable(fd: BorrowedFd<'_>) -> libc::pollfd {
    libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    }
}

/// Waits until a descriptor is ready or the time is over; `None` waits for ever. A signal handler
/// may end it early, with nothing ready.
pub fn poll(fds: &mut [libc::pollfd], timeout: Option<Duration>) -> io::Result<()> {
    // Rounded up, so that nothing spins through the last millisecond.
    let milliseconds = timeout.map_or(-1, |time| {
        libc::c_int::try_from(time.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX)
    });
    // SAFETY: the pointer and the length are those of the slice.
    let result = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, milliseconds) };
    match check(result) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// The signals that the supervisor handles, as a descriptor.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals and takes them through a descriptor from now on.
    pub fn new(signals: &[libc::c_int]) -> io::Result<Self> {
        let set = signal_set(signals);
        // SAFETY: the set outlives the calls.
        unsafe {
            check(libc::sigprocmask(
                libc::SIG_BLOCK,
                &raw const set,
                std::ptr::null_mut(),
            ))?;
            let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
            owned(libc::signalfd(-1, &raw const set, flags)).map(Self)
        }
    }

    /// The next signal that has arrived, if there is one.
    pub fn take(&self) -> Option<libc::c_int> {
        // SAFETY: all-zero is a valid signalfd_siginfo; the call fills in at most its length.
        unsafe {
            let mut info: libc::signalfd_siginfo = MaybeUninit::zeroed().assume_init();
            let length = size_of::<libc::signalfd_siginfo>();
            let got = libc::read(self.0.as_raw_fd(), (&raw mut info).cast(), length);
            (got == length as isize).then_some(info.ssi_signo.cast_signed())
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A set of signals.
pub fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    // SAFETY: sigemptyset makes the set valid.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        set.assume_init()
    }
}

/// Name of a signal.
pub fn signal_name(signal: i32) -> String {
    let name = match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGXFSZ => "SIGXFSZ",
        libc::SIGSYS => "SIGSYS",
        _ => return format!("signal {signal}"),
    };
    name.to_owned()
}

/// Whether this process may use io_uring (io_uring_setup(2)).
pub fn probe_io_uring() -> io::Result<()> {
    // struct io_uring_params of 120 bytes, all zero: nothing special is asked for.
    let mut parameters = [0u64; 15];
    // SAFETY: the call reads and writes 120 bytes, and makes a descriptor or fails.
    unsafe {
        let fd = libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr());
        owned(fd as libc::c_int)?;
    }
    Ok(())
}

/// Soft and hard limit of a resource; `None` is unlimited.
pub fn limit(resource: libc::__rlimit_resource_t) -> io::Result<(Option<u64>, Option<u64>)> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call fills in the structure.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
    let number = |value| (value != libc::RLIM_INFINITY).then_some(value);
    Ok((number(limit.rlim_cur), number(limit.rlim_max)))
}

/// Lets this process have as many descriptors open as its hard limit says. The default of most hosts
/// has programs in mind that use select(2); a VM may keep thousands of connections.
pub fn raise_open_files() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the calls fill in and read the structure.
    unsafe {
        check(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit))?;
        limit.rlim_cur = limit.rlim_max;
        check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit))?;
    }
    Ok(())
}

/// Connects to a listening UNIX socket without waiting: one whose queue of connections is full is
/// an error, as is one that nobody listens at. The result blocks.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: all-zero is a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // One byte stays zero.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let length = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is as long as is said; a descriptor that is not negative is new.
    let socket = unsafe {
        let socket = owned(libc::socket(libc::AF_UNIX, kind, 0))?;
        let address = (&raw const address).cast();
        check(libc::connect(socket.as_raw_fd(), address, length))?;
        UnixStream::from(socket)
    };
    socket.set_nonblocking(false)?;
    Ok(socket)
}

/// The user at the other end of a connected UNIX socket.
pub fn peer_user(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut length = size_of_val(&peer) as libc::socklen_t;
    // SAFETY: the call fills in at most `length` bytes of the structure.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut length,
        )
    })?;
    Ok(peer.uid)
}

/// Effective user id.
pub fn effective_user() -> u32 {
    // SAFETY: no pointers; it cannot fail.
    unsafe { libc::geteuid() }
}

/// The type of the file system that a path is on (statfs(2)).
pub fn file_system(path: &Path) -> io::Result<i64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `path` ends with NUL; the call fills in the structure unless it fails.
    unsafe {
        let mut statfs: MaybeUninit<libc::statfs> = MaybeUninit::uninit();
        check(libc::statfs(path.as_ptr(), statfs.as_mut_ptr()))?;
        Ok(statfs.assume_init().f_type)
    }
}

/// A short extended attribute; none where there is none.
pub fn attribute(path: &Path, name: &CStr) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut value = vec![0; 64];
    // SAFETY: both texts end with NUL; the call writes at most the length given.
    let length = unsafe {
        let room = value.len();
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_mut_ptr().cast(),
            room,
        )
    };
    value.truncate(usize::try_from(length).ok()?);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    #[test]
    fn guest_memory_keeps_its_size() {
        let fd = guest_memory(4 << 20).unwrap();
        let file = File::from(fd);
        assert_eq!(file.metadata().unwrap().len(), 4 << 20);
        assert!(file.set_len(8 << 20).is_err());
        assert!(file.set_len(0).is_err());
    }

    #[test]
    fn locks_exclude_each_other() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"x").unwrap();
        let open = || file.reopen().unwrap();
        let (first, second, third) = (open(), open(), open());
        assert!(lock(first.as_fd(), false).unwrap());
        assert!(lock(second.as_fd(), false).unwrap());
        assert!(!lock(third.as_fd(), true).unwrap());
        drop((first, second));
        assert!(lock(third.as_fd(), true).unwrap());
        assert!(!lock(open().as_fd(), false).unwrap());
    }

    #[test]
    fn a_pty_has_a_name() {
        let (_master, number) = open_pty().unwrap();
        assert!(std::path::Path::new(&format!("/dev/pts/{number}")).exists());
    }
}
