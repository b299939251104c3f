//! Landlock: which files and ports a process may still open, and whom it may reach besides.
//! Structures and constants are those of linux/landlock.h.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::jail::{check, owned};

const EXECUTE: u64 = 1 << 0;
const WRITE_FILE: u64 = 1 << 1;
const READ_FILE: u64 = 1 << 2;
const READ_DIRECTORY: u64 = 1 << 3;
const REMOVE_DIRECTORY: u64 = 1 << 4;
const REMOVE_FILE: u64 = 1 << 5;
const TRUNCATE: u64 = 1 << 14;
const IOCTL_OF_DEVICES: u64 = 1 << 15;
const BIND_AND_CONNECT_TCP: u64 = 3;
const ABSTRACT_SOCKETS: u64 = 1 << 0;
const SIGNALS: u64 = 1 << 1;

/// What may be done with an object and, if it is a directory, with all that is below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Files and directories are read.
    Read,
    /// They are read, changed, made and removed; nothing is executed.
    Change,
    /// A single file or device is read.
    ReadFile,
    /// The same, and written.
    ReadWriteFile,
    /// Programs are executed and read.
    Execute,
    /// Names are removed, of files and of folders.
    Remove,
}

impl Access {
    /// The rights, of those that a ruleset handles.
    fn rights(self, handled: u64) -> u64 {
        handled
            & match self {
                Self::Read => READ_FILE | READ_DIRECTORY,
                Self::Change => !(EXECUTE | IOCTL_OF_DEVICES),
                Self::ReadFile => READ_FILE | IOCTL_OF_DEVICES,
                Self::ReadWriteFile => READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_OF_DEVICES,
                Self::Execute => EXECUTE | READ_FILE,
                Self::Remove => REMOVE_FILE | REMOVE_DIRECTORY,
            }
    }
}

/// An object that stays reachable.
#[derive(Debug, Clone, Copy)]
pub struct Grant {
    /// The object, open; O_PATH is enough.
    pub object: RawFd,
    /// What may be done with it.
    pub access: Access,
}

/// Denies the calling thread, and what it starts later, all that this kernel's Landlock handles but
/// the grants: other files, TCP ports, abstract sockets of processes that are not under the same
/// rules and, unless `signals`, signals to them. Returns the version of Landlock's interface.
/// Allocates nothing.
///
/// # Errors
/// This kernel has no Landlock, or the thread may gain privileges (no_new_privs).
pub fn landlock(grants: &[Grant], signals: bool) -> io::Result<u32> {
    /// Rights on files, as many bits as the interface version has.
    const FILE_RIGHTS: [u32; 5] = [13, 14, 15, 15, 16];
    let abi = landlock_version()?;
    let bits = FILE_RIGHTS[(abi as usize).clamp(1, FILE_RIGHTS.len()) - 1];
    let scoped = match signals {
        true => ABSTRACT_SOCKETS,
        false => ABSTRACT_SOCKETS | SIGNALS,
    };
    let handled = [(1u64 << bits) - 1, BIND_AND_CONNECT_TCP, scoped];
    let known: usize = match abi {
        ..4 => 1,
        4..6 => 2,
        _ => 3,
    };
    // SAFETY: the structure is 64-bit masks, the first `known` of which this kernel knows.
    let ruleset = unsafe {
        let size = known * size_of::<u64>();
        owned(libc::syscall(
            libc::SYS_landlock_create_ruleset,
            handled.as_ptr(),
            size,
            0,
        ))?
    };
    for grant in grants {
        allow(&ruleset, *grant, handled[0])?;
    }
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })?;
    Ok(abi)
}

/// Version of the interface of this kernel's Landlock.
///
/// # Errors
/// It has none.
pub fn landlock_version() -> io::Result<u32> {
    const CREATE_VERSION: libc::c_long = 1;
    let none: *const u64 = std::ptr::null();
    // SAFETY: this form takes no memory.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            none,
            0usize,
            CREATE_VERSION,
        )
    };
    check(abi)?;
    Ok(abi as u32)
}

/// Adds a grant to a ruleset that handles the rights on files `handled`.
fn allow(ruleset: &OwnedFd, grant: Grant, handled: u64) -> io::Result<()> {
    const PATH_BENEATH: libc::c_long = 1;
    #[repr(C, packed)]
    struct Rule {
        allowed: u64,
        parent: i32,
    }
    let rule = Rule {
        allowed: grant.access.rights(handled),
        parent: grant.object,
    };
    // SAFETY: a rule of the type named, which outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0,
        )
    })
}
