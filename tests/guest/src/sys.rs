//! System calls of a first process: mounts, modules, the second serial port, power off.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

fn check(rc: i64) -> io::Result<()> {
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn c(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(io::Error::other)
}

/// Mounts a file system without options of its own.
pub fn mount(source: &str, target: &str, kind: &str, flags: libc::c_ulong) -> io::Result<()> {
    let (source, path, kind) = (c(source)?, c(target)?, c(kind)?);
    // SAFETY: three NUL-terminated strings that outlive the call, and no data.
    let rc = unsafe {
        libc::mount(
            source.as_ptr(),
            path.as_ptr(),
            kind.as_ptr(),
            flags,
            std::ptr::null(),
        )
    };
    check(rc.into()).map_err(|e| io::Error::other(format!("mount {target}: {e}")))
}

/// Makes the file tree as a running system has it.
///
/// The initial RAM file system is bound onto itself first: the kernel lets no process change its
/// root away from the very first mount, and what is tested here does exactly that.
pub fn make_file_tree() -> io::Result<()> {
    fs::create_dir_all("/root-of-all")?;
    mount("/", "/root-of-all", "none", libc::MS_BIND)?;
    std::env::set_current_dir("/root-of-all")?;
    mount("/root-of-all", "/", "none", libc::MS_MOVE)?;
    let here = c(".")?;
    // SAFETY: a NUL-terminated string.
    check(unsafe { libc::chroot(here.as_ptr()) }.into())?;
    std::env::set_current_dir("/")?;

    for dir in ["proc", "sys", "dev", "tmp", "run"] {
        fs::create_dir_all(format!("/{dir}"))?;
    }
    mount("proc", "/proc", "proc", 0)?;
    mount("sysfs", "/sys", "sysfs", 0)?;
    mount("devtmpfs", "/dev", "devtmpfs", 0)?;
    for dir in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(dir)?;
    }
    mount("devpts", "/dev/pts", "devpts", 0)?;
    mount("tmpfs", "/dev/shm", "tmpfs", 0)?;
    mount("tmpfs", "/tmp", "tmpfs", 0)?;
    for (path, mode) in [
        ("/tmp", 0o1777),
        ("/dev/ptmx", 0o666),
        ("/dev/pts/ptmx", 0o666),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// Loads every module in `/modules`, in the order of their names.
pub fn load_modules() -> io::Result<()> {
    let mut paths: Vec<_> = fs::read_dir("/modules")?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<io::Result<_>>()?;
    paths.sort();
    for path in paths {
        load_module(&path)
            .map_err(|e| io::Error::other(format!("cannot load {}: {e}", path.display())))?;
    }
    Ok(())
}

fn load_module(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let options = c("")?;
    // SAFETY: an open descriptor and a NUL-terminated string; the kernel reads both.
    check(unsafe {
        libc::syscall(
            libc::SYS_finit_module,
            file.as_raw_fd(),
            options.as_ptr(),
            0 as libc::c_int,
        )
    })
}

/// Makes the loopback work, and a network that leads nowhere: passt takes the guest's address and
/// route from one.
pub fn make_network() -> io::Result<()> {
    for words in [
        "link set lo up",
        "address add 192.0.2.2/24 dev dummy0",
        "link set dummy0 up",
        "route add default via 192.0.2.1",
    ] {
        let status = Command::new("/bin/ip").args(words.split(' ')).status()?;
        if !status.success() {
            return Err(io::Error::other(format!("ip {words}: {status}")));
        }
    }
    Ok(())
}

/// Makes a network namespace for this thread and the processes that it will start.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }.into())
}

/// Opens a terminal and takes all processing of bytes away from it.
pub fn open_raw_terminal(path: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    // SAFETY: an all-zero termios is a valid one to be filled.
    let mut mode: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor, and a termios the call fills.
    check(unsafe { libc::tcgetattr(file.as_raw_fd(), &raw mut mode) }.into())?;
    // SAFETY: changes the struct only.
    unsafe { libc::cfmakeraw(&raw mut mode) };
    // SAFETY: an open descriptor, and a termios the call reads.
    check(unsafe { libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &raw const mode) }.into())?;
    Ok(file)
}

/// Starts a session of its own for the calling process, with the terminal on its standard input.
/// For use between fork and exec: makes system calls only.
pub fn take_terminal() -> io::Result<()> {
    // SAFETY: no pointers.
    if unsafe { libc::setsid() } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: standard input is open; the argument is a plain number.
    check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into())
}

/// Sends a signal.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no pointers.
    check(unsafe { libc::kill(pid, signal) }.into())
}

/// Makes this process the parent of processes below it that lose theirs, as the first process is
/// of all (PR_SET_CHILD_SUBREAPER of prctl(2)).
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }.into())
}

/// Collects processes that lost their parent and came to us. Only while no child of our own is
/// being waited for.
pub fn reap_orphans() {
    // SAFETY: a null status pointer is allowed.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

/// Powers the machine off. Returns only if the kernel refuses.
pub fn power_off() -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe { libc::sync() };
    // SAFETY: no pointers; file systems have been synced.
    check(unsafe { libc::reboot(libc::RB_POWER_OFF) }.into())
}
