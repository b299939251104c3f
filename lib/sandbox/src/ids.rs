//! A user namespace in which files of the host keep their owners.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Makes a user namespace whose ids are those of this process's own namespace: all of them where
/// it may give them away, as root may, else its own user and group; other owners then look like
/// the overflow ids (65534). Any process of this user can enter it, now or later, and has
/// capabilities there, which count for files whose owner and group the namespace has.
///
/// # Errors
/// The host allows no user namespaces, or /proc is not there.
pub fn id_namespace() -> io::Result<OwnedFd> {
    let (end, child_end) = pipe()?;
    // SAFETY: the child only makes system calls, allocates nothing and ends in _exit.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        // SAFETY: integers, and one byte of a constant. The parent closes its end of the pair
        // when it is done, or when it dies.
        unsafe {
            libc::close(end.as_raw_fd());
            if libc::unshare(libc::CLONE_NEWUSER) == 0 {
                let fd = child_end.as_raw_fd();
                libc::write(fd, c"+".as_ptr().cast(), 1);
                let mut byte = 0u8;
                libc::read(fd, (&raw mut byte).cast(), 1);
            }
            libc::_exit(0);
        }
    }
    drop(child_end);
    let namespace = describe(child, &end);
    drop(end);
    // SAFETY: a null status is allowed; the child is ours and nobody else waits for it.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    namespace
}

/// Waits for the child's namespace, says what its ids are and opens it.
fn describe(child: libc::pid_t, end: &OwnedFd) -> io::Result<OwnedFd> {
    let mut byte = [0];
    if File::from(end.as_fd().try_clone_to_owned()?).read(&mut byte)? == 0 {
        return Err(io::Error::other("no user namespace can be made"));
    }
    let of_child = |name: &str| format!("/proc/{child}/{name}");
    let all = fs::read_to_string("/proc/self/uid_map")
        .and_then(|map| fs::write(of_child("uid_map"), same(&map)))
        .and_then(|()| fs::read_to_string("/proc/self/gid_map"))
        .and_then(|map| fs::write(of_child("gid_map"), same(&map)));
    if all.is_err() {
        // SAFETY: no arguments.
        let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
        // A map can be written once, and the first may have been.
        let own = fs::write(of_child("uid_map"), format!("{user} {user} 1"));
        if fs::read_to_string(of_child("uid_map"))?.is_empty() {
            own?;
        }
        fs::write(of_child("setgroups"), "deny")?;
        fs::write(of_child("gid_map"), format!("{group} {group} 1"))?;
    }
    Ok(File::open(of_child("ns/user"))?.into())
}

/// The map by which each id that this process knows is itself.
fn same(map: &str) -> String {
    let mut text = String::new();
    for line in map.lines() {
        let mut numbers = line.split_whitespace();
        if let (Some(first), Some(count)) = (numbers.next(), numbers.nth(1)) {
            let _ = writeln!(text, "{first} {first} {count}");
        }
    }
    text
}

/// A connected pair of sockets.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two descriptors.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are open and nothing else owns them.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}
