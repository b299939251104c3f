//! The layers that are put on once, before a process touches anything untrusted.

use std::ffi::CStr;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::landlock::{Access, Grant, landlock};
use crate::layers::{Layer, Layers, State};
use crate::{Error, Mode, report};

/// What a process wants of its jail.
#[derive(Debug, Clone)]
pub struct ProcessJail {
    /// Under [`Mode::Log`] the process stays open to debuggers; everything else is the same.
    pub mode: Mode,
    /// The process that started this one and whose death must end it.
    pub parent_pid: Option<u32>,
    /// Highest number of descriptors the process will have open.
    pub open_files: u64,
    /// Longest file the process may write, in bytes. `None` for one that writes files of the
    /// user's choice, as a disk's back end does; 0 for one that writes none (pipes, sockets,
    /// terminals and shared memory that has its size already are not files here).
    pub file_size: Option<u64>,
    /// A directory of the host that stays reachable, with all that is below it. `None` for a
    /// process that reaches no file at all.
    pub share: Option<Share>,
    /// Capabilities that it keeps, as a mask: a process that acts for users of a share. They count
    /// in [`Share::namespace`] only.
    pub capabilities: u64,
}

/// A directory that a jailed process works in. It becomes the process's root, so that no path and
/// no symbolic link leads out of it, and Landlock allows what is below it and nothing else.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// The directory, open.
    pub directory: RawFd,
    /// Files may be changed, made and removed.
    pub writable: bool,
    /// The user namespace to enter, in place of a new one in which no user has a name: one that
    /// [`id_namespace`](crate::id_namespace) has made.
    pub namespace: Option<RawFd>,
}

impl Default for ProcessJail {
    /// No parent, 64 descriptors, files of any size.
    fn default() -> Self {
        Self {
            mode: Mode::On,
            parent_pid: None,
            open_files: 64,
            file_size: None,
            share: None,
            capabilities: 0,
        }
    }
}

/// Puts the calling process into its jail. To be called first thing, while the process has one
/// thread, and followed by [`restrict`](crate::restrict).
///
/// From then on no path leads anywhere: what the process needs must be open already. A layer
/// that the host refuses is recorded, reported in the log, and the others stay.
///
/// # Errors
/// [`Error::ParentGone`] where `parent_pid` is not the parent (any more), [`Error::Threads`]
/// where the process has several threads.
pub fn enter(jail: &ProcessJail) -> Result<Layers, Error> {
    #[cfg(feature = "compromised")]
    anemone_compromised::prepare();
    let layers = apply(jail)?;
    let refused: Vec<String> = layers
        .refused()
        .map(|(layer, error)| format!("{}: {error}", layer.name()))
        .collect();
    if !refused.is_empty() {
        log::warn!(
            "this host refuses layers of the jail: {}",
            refused.join("; ")
        );
    }
    Ok(layers)
}

/// [`enter`] without a word, and without allocating: it also runs in a forked child.
pub(crate) fn apply(jail: &ProcessJail) -> Result<Layers, Error> {
    let mut layers = Layers::default();
    // Without any namespace flag this only asks whether the process has one thread.
    // SAFETY: integers only.
    if check(unsafe { libc::unshare(libc::CLONE_THREAD) }).is_err_and(|e| is_invalid(&e)) {
        return Err(Error::Threads);
    }
    layers.set(Layer::ResourceLimits, State::of(limit_resources(jail)));
    // A process outside of its namespaces shows no parent.
    // SAFETY: no arguments.
    let parent = unsafe { libc::getppid() } as u32;
    let users = match jail.share {
        _ if parent == 0 && jail.parent_pid.is_some() => {
            layers.set(Layer::PidNamespace, State::Active);
            Users::Entered
        }
        Some(Share {
            namespace: Some(namespace),
            ..
        }) => Users::Enter(namespace),
        _ => Users::New,
    };
    report::remember_process();
    unshare_namespaces(&mut layers, users);
    let root = match jail.share {
        Some(share) => change_root(share.directory),
        None => empty_root(),
    };
    layers.set(Layer::EmptyRoot, State::of(root));
    if jail.capabilities != 0 {
        act_for_users()?;
    }
    layers.set(Layer::BoundingSet, State::of(clear_bounding_set()));
    layers.set(
        Layer::Capabilities,
        State::of(keep_capabilities(jail.capabilities)),
    );
    layers.set(
        Layer::NoNewPrivileges,
        State::of(prctl(libc::PR_SET_NO_NEW_PRIVS, 1)),
    );
    let share = jail.share.map(|share| Grant {
        object: share.directory,
        access: match share.writable {
            true => Access::Change,
            false => Access::Read,
        },
    });
    match landlock(share.as_slice(), false) {
        Ok(abi) => {
            layers.set(Layer::Landlock, State::Active);
            layers.set_landlock_abi(abi);
        }
        Err(e) => layers.set(Layer::Landlock, State::of(Err(e))),
    }
    if jail.mode == Mode::On {
        layers.set(
            Layer::NotDumpable,
            State::of(prctl(libc::PR_SET_DUMPABLE, 0)),
        );
    }
    layers.set(Layer::SystemCallFilter, State::of(trap_available()));
    // Last, because the kernel forgets the signal when credentials change. The question after
    // the call closes the gap in which the parent could have died unnoticed; the process that
    // makes a PID namespace asks before exec, and the signal stays.
    if let Some(parent) = jail.parent_pid {
        let asked = prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
        layers.set(Layer::ParentDeath, State::of(asked));
        // SAFETY: no arguments.
        let now = unsafe { libc::getppid() } as u32;
        if now != parent && !layers.is_active(Layer::PidNamespace) {
            return Err(Error::ParentGone(parent));
        }
    }
    Ok(layers)
}

/// The part of [`enter`] that a supervisor can stand, which still starts processes and whose
/// children enter jails of their own: no capability, no new privileges, no core dump.
///
/// # Errors
/// The first layer that the host refuses.
pub fn renounce() -> io::Result<()> {
    limit(libc::RLIMIT_CORE, 0)?;
    // Only who has a capability can empty the bounding set; who has none needs not.
    let _ = clear_bounding_set();
    drop_capabilities()?;
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)
}

/// The result of a system call that answers 0 or more on success.
pub(crate) fn check(result: impl Into<i64>) -> io::Result<()> {
    if result.into() < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn is_invalid(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take integers; the others must be 0.
    check(unsafe { libc::prctl(option, argument, 0, 0, 0) })
}

fn limit_resources(jail: &ProcessJail) -> io::Result<()> {
    limit(libc::RLIMIT_CORE, 0)?;
    limit(libc::RLIMIT_NOFILE, jail.open_files)?;
    jail.file_size
        .map_or(Ok(()), |size| limit(libc::RLIMIT_FSIZE, size))
}

/// Lowers a limit to `most`; one that is lower already stays.
fn limit(resource: libc::__rlimit_resource_t, most: u64) -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the calls write and read one rlimit.
    unsafe {
        check(libc::getrlimit(resource, &raw mut limit))?;
        limit.rlim_max = limit.rlim_max.min(most);
        limit.rlim_cur = limit.rlim_max;
        check(libc::setrlimit(resource, &raw const limit))
    }
}

/// The user namespace.
#[derive(Debug, Clone, Copy)]
enum Users {
    /// To be made.
    New,
    /// To be entered.
    Enter(RawFd),
    /// The process has begun in one, with a PID namespace that belongs to it.
    Entered,
}

/// All at once if possible, else each that the host grants: a user namespace first, because it
/// gives an ordinary user the right to the others.
fn unshare_namespaces(layers: &mut Layers, users: Users) {
    const NAMESPACES: [(Layer, libc::c_int); 5] = [
        (Layer::UserNamespace, libc::CLONE_NEWUSER),
        (Layer::MountNamespace, libc::CLONE_NEWNS),
        (Layer::IpcNamespace, libc::CLONE_NEWIPC),
        (Layer::UtsNamespace, libc::CLONE_NEWUTS),
        (Layer::CgroupNamespace, libc::CLONE_NEWCGROUP),
    ];
    // SAFETY: integers only.
    let unshare = |flags| check(unsafe { libc::unshare(flags) });
    let mut namespaces = &NAMESPACES[..];
    let entered = match users {
        Users::New => None,
        // SAFETY: integers only.
        Users::Enter(users) => Some(check(unsafe { libc::setns(users, libc::CLONE_NEWUSER) })),
        Users::Entered => Some(Ok(())),
    };
    if let Some(entered) = entered {
        layers.set(Layer::UserNamespace, State::of(entered));
        namespaces = &NAMESPACES[1..];
    }
    let at_once = unshare(namespaces.iter().fold(0, |flags, (_, flag)| flags | flag)).is_ok();
    for &(layer, flag) in namespaces {
        layers.set(
            layer,
            if at_once {
                State::Active
            } else {
                State::of(unshare(flag))
            },
        );
    }
}

/// Makes an empty directory the root and the working directory: a file system that is mounted
/// nowhere, or, without the right to make one, a directory that no longer exists.
fn empty_root() -> io::Result<()> {
    let root = detached_tmpfs().or_else(|e| unlinked_directory().map_err(|_| e))?;
    change_root(root.as_raw_fd())
}

/// Makes a directory the root and the working directory.
fn change_root(root: RawFd) -> io::Result<()> {
    // SAFETY: a descriptor and a constant string.
    unsafe {
        check(libc::fchdir(root))?;
        check(libc::chroot(c".".as_ptr()))
    }
}

/// For a thread that takes the file system ids of others: none of this process's groups goes with
/// them, and a change of ids leaves capabilities as they are.
fn act_for_users() -> Result<(), Error> {
    /// linux/securebits.h.
    const NO_SETUID_FIXUP: libc::c_ulong = 1 << 2;
    // SAFETY: an empty list needs no memory.
    let groups = check(unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()) });
    groups
        .and_then(|()| prctl(libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP))
        .map_err(Error::Ids)
}

/// A read-only tmpfs outside all mount namespaces.
fn detached_tmpfs() -> io::Result<OwnedFd> {
    // linux/mount.h.
    const CLOSE_ON_EXEC: libc::c_long = 1;
    const COMMAND_CREATE: libc::c_long = 6;
    const READ_ONLY_NO_SUID_NO_DEV_NO_EXEC: libc::c_long = 1 | 2 | 4 | 8;
    // SAFETY: a constant string, and integers.
    unsafe {
        let context = owned(libc::syscall(
            libc::SYS_fsopen,
            c"tmpfs".as_ptr(),
            CLOSE_ON_EXEC,
        ))?;
        let none: *const libc::c_char = std::ptr::null();
        check(libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            COMMAND_CREATE,
            none,
            none,
            0,
        ))?;
        owned(libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            CLOSE_ON_EXEC,
            READ_ONLY_NO_SUID_NO_DEV_NO_EXEC,
        ))
    }
}

/// A directory that was removed while open: nothing is in it, and nothing can be made in it.
fn unlinked_directory() -> io::Result<OwnedFd> {
    let mut result = Err(io::Error::from_raw_os_error(libc::ENOENT));
    for parent in ["/dev/shm", "/tmp", "/run"] {
        let mut name = [0u8; 64];
        write!(
            &mut name[..63],
            "{parent}/anemone-jail-{}",
            report::process()
        )?;
        let Ok(name) = CStr::from_bytes_until_nul(&name) else {
            continue;
        };
        // SAFETY: the string ends with a NUL.
        result = unsafe {
            check(libc::mkdir(name.as_ptr(), 0o700)).and_then(|()| {
                let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
                let directory = owned(libc::open(name.as_ptr(), flags));
                check(libc::rmdir(name.as_ptr()))?;
                directory
            })
        };
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Owns the descriptor that a system call returned.
///
/// # Safety
/// `result` must be negative or a descriptor that nothing else owns.
pub(crate) unsafe fn owned(result: impl Into<i64>) -> io::Result<OwnedFd> {
    let result = result.into();
    check(result)?;
    // SAFETY: as the caller says; descriptors are small numbers.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

/// Empties the bounding set, which an ordinary user without a namespace may not.
fn clear_bounding_set() -> io::Result<()> {
    for capability in 0..64 {
        match prctl(libc::PR_CAPBSET_DROP, capability) {
            // Past the last capability that this kernel has.
            Err(e) if capability > 0 && is_invalid(&e) => break,
            result => result?,
        }
    }
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    keep_capabilities(0)
}

/// Gives up all capabilities but those of the mask.
fn keep_capabilities(keep: u64) -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
    const VERSION_3: u32 = 0x2008_0522;
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong,
    )?;
    let header = [VERSION_3, 0];
    let (low, high) = (keep as u32, (keep >> 32) as u32);
    let sets = [low, low, 0, high, high, 0];
    // SAFETY: the header is a version and this thread's number 0; the data are twice three words
    // of 32 capabilities: effective, permitted, inheritable.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) })
}

/// Whether the kernel's filters can trap.
fn trap_available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads one word.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    })
}

/// What a process of this user could have on this host, found out in a child that is jailed and
/// ends.
///
/// # Errors
/// Where the host cannot give a pipe or a process.
pub fn probe() -> io::Result<Layers> {
    let mut ends = [0; 2];
    // SAFETY: the call writes two descriptors.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both are open and nothing else owns them.
    let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    let jail = ProcessJail {
        parent_pid: Some(std::process::id()),
        ..ProcessJail::default()
    };
    // As the supervisor does: a process begins in its PID namespace.
    let namespaces = libc::CLONE_NEWUSER | libc::CLONE_NEWPID;
    let mut pid_namespace = State::Active;
    let mut child = fork_into(namespaces);
    if let Err(refused) = child {
        pid_namespace = State::of(Err(refused));
        child = fork_into(0);
    }
    let child = child?;
    if child == 0 {
        let status = match apply(&jail) {
            Ok(mut layers) => {
                layers.set(Layer::PidNamespace, pid_namespace);
                let bytes = layers.to_bytes();
                // SAFETY: the array has that length. A pipe takes it whole.
                unsafe { libc::write(write.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) };
                0
            }
            Err(_) => 1,
        };
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(status) };
    }
    drop(write);
    let mut bytes = [0; Layers::BYTES];
    let answer = io::Read::read_exact(&mut std::fs::File::from(read), &mut bytes);
    // SAFETY: a null status is allowed; the child is ours and nobody else waits for it.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    answer.map(|()| Layers::from_bytes(&bytes))
}

/// Forks into new namespaces; 0 for the child, which may only make system calls, allocate nothing and
/// end in _exit.
fn fork_into(namespaces: libc::c_int) -> io::Result<libc::pid_t> {
    let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
    // SAFETY: as fork(2): nothing is shared, and the stack is a copy of this one.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    check(child)?;
    Ok(child as libc::pid_t)
}

/// Closes all descriptors but 0, 1, 2 and those in `keep`.
pub fn close_extra_fds(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<RawFd> = keep.iter().copied().filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep {
        close_range(first, fd as u32 - 1)?;
        first = fd as u32 + 1;
    }
    close_range(first, u32::MAX)
}

/// Closes the descriptors from `first` to `last`; none if that is an empty range.
fn close_range(first: u32, last: u32) -> io::Result<()> {
    if first > last {
        return Ok(());
    }
    // SAFETY: integers only; the caller answers for what is closed.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })
}
