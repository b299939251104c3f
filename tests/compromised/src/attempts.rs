//! The attempts that need nothing but a thread: each is a sequence of system calls of which one that
//! succeeds would be a hole.

use std::ffi::CStr;
use std::sync::atomic::AtomicU8;

use crate::call::{Answer, Refusal, call, call_32};
use crate::outcome::Outcome;
use crate::plan::Plan;

/// One thing to try.
pub struct Attempt {
    /// Name in reports.
    pub name: &'static str,
    /// Errors that are a refusal. Others mean that the attempt itself was wrong.
    pub refusals: &'static [i32],
    /// Tries it.
    pub run: fn(&Plan) -> Outcome,
}

/// The answer to what needs a right.
const RIGHTS: &[i32] = &[libc::EPERM, libc::EACCES, libc::ENOSYS];
/// The answers to what needs a name besides: there is none, or the last part is a link.
const NAMES: &[i32] = &[
    libc::EPERM,
    libc::EACCES,
    libc::ENOSYS,
    libc::ENOENT,
    libc::ELOOP,
    libc::EXDEV,
];
/// The answers to what makes executable memory: a thread of the VMM has no new memory at all.
const MEMORY: &[i32] = &[libc::EPERM, libc::EACCES, libc::ENOSYS, libc::ENOMEM];

/// Descriptors that are looked through.
pub const DESCRIPTORS: std::ops::Range<u64> = 0..96;

const AT_FDCWD: u64 = libc::AT_FDCWD as u32 as u64;
const PAGE: u64 = 4096;

macro_rules! attempts {
    ($($name:literal, $refusals:ident, $run:expr;)*) => {
        &[$(Attempt { name: $name, refusals: $refusals, run: $run }),*]
    };
}

/// All of them, in the order in which they are tried.
pub const ATTEMPTS: &[Attempt] = attempts! {
    // Files.
    "open /etc/passwd", NAMES, |_| open(c"/etc/passwd");
    "open the canary by its path", NAMES, |plan| open(&plan.canary);
    "open the canary beside /proc/self/fd/N", NAMES, |_| most((3..20).map(|fd| {
        open(&path(format!("/proc/self/fd/{fd}/../canary")))
    }));
    "open the canary at ../ of a descriptor", NAMES, |_| each_descriptor(|fd| open_at(fd, c"../canary"));
    "open /proc/self/mem", NAMES, |_| open(c"/proc/self/mem");
    "open mem of another process", NAMES, |plan| each(plan, |pid| open(&path(format!("/proc/{pid}/mem"))));
    "open maps of another process", NAMES, |plan| each(plan, |pid| open(&path(format!("/proc/{pid}/maps"))));
    "open a descriptor of another process", NAMES, |plan| each(plan, |pid| open(&path(format!("/proc/{pid}/fd/2"))));
    "open /dev/mem", NAMES, |_| open(c"/dev/mem");
    "open /dev/kvm", NAMES, |_| open(c"/dev/kvm");
    "make a file beside the canary", NAMES, |plan| make(&plan.planted());
    "make a folder beside the canary", NAMES, |plan| {
        tried(call(libc::SYS_mkdirat, [AT_FDCWD, address(&plan.planted()), 0o700]))
    };
    "make a device node beside the canary", NAMES, |plan| {
        let node = (libc::S_IFCHR | 0o600).into();
        tried(call(libc::SYS_mknodat, [AT_FDCWD, address(&plan.planted()), node, libc::makedev(1, 3)]))
    };
    "link beside the canary", NAMES, |plan| {
        let (from, to) = (address(&plan.canary), plan.planted());
        worst([
            tried(call(libc::SYS_linkat, [AT_FDCWD, from, AT_FDCWD, address(&to), 0])),
            tried(call(libc::SYS_symlinkat, [from, AT_FDCWD, address(&to)])),
        ])
    };
    "rename the canary", NAMES, |plan| {
        let (from, to) = (address(&plan.canary), plan.planted());
        tried(call(libc::SYS_renameat2, [AT_FDCWD, from, AT_FDCWD, address(&to), 0]))
    };
    "remove the canary", NAMES, |plan| {
        worst([
            tried(call(libc::SYS_unlink, [address(&plan.canary)])),
            tried(call(libc::SYS_unlinkat, [AT_FDCWD, address(&plan.canary), 0])),
        ])
    };
    "change the mode of the canary", NAMES, |plan| {
        tried(call(libc::SYS_fchmodat, [AT_FDCWD, address(&plan.canary), 0o777]))
    };
    "change the owner of the canary", NAMES, |plan| {
        tried(call(libc::SYS_fchownat, [AT_FDCWD, address(&plan.canary), 1, 1, 0]))
    };
    "cut the canary short", NAMES, |plan| tried(call(libc::SYS_truncate, [address(&plan.canary), 0]));
    "status of the canary", NAMES, |plan| {
        let mut status = [0u64; 64];
        let (name, room) = (address(&plan.canary), status.as_mut_ptr() as u64);
        worst([
            tried(call(libc::SYS_newfstatat, [AT_FDCWD, name, room, 0])),
            tried(call(libc::SYS_statx, [AT_FDCWD, name, libc::AT_EMPTY_PATH as u64, 0x7FF, room])),
        ])
    };
    "read the link /proc/self/exe", NAMES, |_| {
        let mut room = [0u8; 64];
        let name = address(c"/proc/self/exe");
        tried(call(libc::SYS_readlinkat, [AT_FDCWD, name, room.as_mut_ptr() as u64, 64]))
    };
    "a handle of the canary", NAMES, |plan| {
        let mut handle = [0u32; 40];
        handle[0] = 128;
        let mut mount = 0i32;
        let (name, handle) = (address(&plan.canary), handle.as_mut_ptr() as u64);
        tried(call(libc::SYS_name_to_handle_at, [AT_FDCWD, name, handle, &raw mut mount as u64, 0]))
    };
    "watch /etc", NAMES, |_| tried(call(libc::SYS_inotify_init1, [0]));
    // The file system itself.
    "change the working directory", NAMES, |_| tried(call(libc::SYS_chdir, [address(c"/")]));
    "change the root", NAMES, |_| tried(call(libc::SYS_chroot, [address(c"/")]));
    "mount", NAMES, |_| {
        let tmpfs = address(c"tmpfs");
        tried(call(libc::SYS_mount, [tmpfs, address(c"/mnt"), tmpfs, 0, 0]))
    };
    "fsopen", RIGHTS, |_| tried(call(libc::SYS_fsopen, [address(c"tmpfs"), 0]));
    "open_tree", NAMES, |_| tried(call(libc::SYS_open_tree, [AT_FDCWD, address(c"/"), 1]));
    "unshare the mount namespace", RIGHTS, |_| tried(call(libc::SYS_unshare, [libc::CLONE_NEWNS as u64]));
    "unshare the user namespace", RIGHTS, |_| tried(call(libc::SYS_unshare, [libc::CLONE_NEWUSER as u64]));
    "enter a namespace of another process", RIGHTS, |plan| each(plan, |pid| {
        let process = call(libc::SYS_pidfd_open, [pid, 0]);
        then(process, |fd| tried(call(libc::SYS_setns, [fd, libc::CLONE_NEWNS as u64])))
    });
    // Sockets.
    "socket AF_UNIX", RIGHTS, |_| socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
    "socket AF_INET", RIGHTS, |_| socket(libc::AF_INET, libc::SOCK_STREAM, 0);
    "socket AF_INET6", RIGHTS, |_| socket(libc::AF_INET6, libc::SOCK_DGRAM, 0);
    "socket AF_INET raw", RIGHTS, |_| socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP);
    "socket AF_NETLINK", RIGHTS, |_| socket(libc::AF_NETLINK, libc::SOCK_RAW, 0);
    "socket AF_PACKET", RIGHTS, |_| socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
    "socket AF_VSOCK", RIGHTS, |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0);
    "socketpair of another family", RIGHTS, |_| {
        let mut ends = [0i32; 2];
        // TIPC is the only other family with pairs; whether this host has it does not matter.
        let pair = call(
            libc::SYS_socketpair,
            [libc::AF_TIPC as u64, libc::SOCK_STREAM as u64, 0, ends.as_mut_ptr() as u64],
        );
        match pair {
            // The kernel was asked.
            Err(Refusal::Errno(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Outcome::Done(0),
            other => tried(other),
        }
    };
    "connect to the abstract socket", RIGHTS, |plan| {
        let (name, length) = abstract_name(&plan.socket);
        let connect = |fd| tried(call(libc::SYS_connect, [fd, name.as_ptr() as u64, length]));
        let own = call(libc::SYS_socket, [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0]);
        match own {
            Ok(fd) => connect(fd as u64),
            // Without a socket of its own, with each that it has.
            Err(_) => each_descriptor(connect),
        }
    };
    "bind a socket that it holds", RIGHTS, |plan| {
        let (name, length) = abstract_name(&format!("{}-planted", plan.socket));
        each_descriptor(|fd| tried(call(libc::SYS_bind, [fd, name.as_ptr() as u64, length])))
    };
    "listen at a socket that it holds", RIGHTS, |_| {
        each_descriptor(|fd| tried(call(libc::SYS_listen, [fd, 1])))
    };
    "options of a socket that it holds", RIGHTS, |_| {
        let one = 1i32;
        let option = [libc::SOL_SOCKET as u64, libc::SO_REUSEADDR as u64, &raw const one as u64, 4];
        let [level, name, value, length] = option;
        each_descriptor(|fd| tried(call(libc::SYS_setsockopt, [fd, level, name, value, length])))
    };
    // Other processes.
    "ptrace attach", RIGHTS, |plan| each(plan, |pid| ptrace(libc::PTRACE_ATTACH, pid));
    "ptrace seize", RIGHTS, |plan| each(plan, |pid| ptrace(libc::PTRACE_SEIZE, pid));
    "read memory of another process", RIGHTS, |plan| each(plan, |pid| vm_copy(libc::SYS_process_vm_readv, pid));
    "write memory of another process", RIGHTS, |plan| each(plan, |pid| vm_copy(libc::SYS_process_vm_writev, pid));
    "pidfd_open", RIGHTS, |plan| each(plan, |pid| tried(call(libc::SYS_pidfd_open, [pid, 0])));
    "pidfd_getfd", RIGHTS, |plan| each(plan, |pid| {
        let process = call(libc::SYS_pidfd_open, [pid, 0]);
        // Without one, of each descriptor that it has: the supervisor's side may be a pidfd.
        match process {
            Ok(fd) => tried(call(libc::SYS_pidfd_getfd, [fd as u64, 2, 0])),
            Err(_) => each_descriptor(|fd| tried(call(libc::SYS_pidfd_getfd, [fd, 2, 0]))),
        }
    });
    "signal another process", RIGHTS, |plan| each(plan, |pid| tried(call(libc::SYS_kill, [pid, 0])));
    "signal a thread of another process", RIGHTS, |plan| each(plan, |pid| {
        worst([
            tried(call(libc::SYS_tgkill, [pid, pid, 0])),
            tried(call(libc::SYS_tkill, [pid, 0])),
        ])
    });
    "signal everybody", RIGHTS, |_| tried(call(libc::SYS_kill, [u64::MAX, 0]));
    "have signals sent to another process", RIGHTS, |plan| each(plan, |pid| {
        each_descriptor(|fd| tried(call(libc::SYS_fcntl, [fd, libc::F_SETOWN as u64, pid])))
    });
    "limits of another process", RIGHTS, |plan| each(plan, |pid| {
        let mut limit = [0u64; 2];
        let room = limit.as_mut_ptr() as u64;
        tried(call(libc::SYS_prlimit64, [pid, libc::RLIMIT_CORE.into(), 0, room]))
    });
    "CPUs of another process", RIGHTS, |plan| each(plan, |pid| {
        let mut mask = [u64::MAX; 16];
        tried(call(libc::SYS_sched_setaffinity, [pid, 128, mask.as_mut_ptr() as u64]))
    });
    "compare with another process", RIGHTS, |plan| each(plan, |pid| tried(call(libc::SYS_kcmp, [pid, pid, 1, 0, 0])));
    // New processes and programs.
    "execve", RIGHTS, |_| execute(libc::SYS_execve, 0);
    "execveat", RIGHTS, |_| execute(libc::SYS_execveat, AT_FDCWD);
    "fork", RIGHTS, |_| child(call(libc::SYS_fork, []));
    "clone of a process", RIGHTS, |_| child(call(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0]));
    "clone into a user namespace", RIGHTS, |_| {
        child(call(libc::SYS_clone, [(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64, 0, 0, 0, 0]))
    };
    "clone3", RIGHTS, |_| {
        let mut arguments = [0u64; 8];
        arguments[4] = libc::SIGCHLD as u64;
        child(call(libc::SYS_clone3, [arguments.as_ptr() as u64, size_of_val(&arguments) as u64]))
    };
    // Rights.
    "setuid", RIGHTS, |_| tried(call(libc::SYS_setuid, [0]));
    "setresuid", RIGHTS, |_| tried(call(libc::SYS_setresuid, [0, 0, 0]));
    "setgroups", RIGHTS, |_| tried(call(libc::SYS_setgroups, [0, 0]));
    "capset", RIGHTS, |_| {
        let header = [0x2008_0522u32, 0];
        let sets = [1u32, 1, 0, 0, 0, 0];
        tried(call(libc::SYS_capset, [header.as_ptr() as u64, sets.as_ptr() as u64]))
    };
    "become dumpable", RIGHTS, |_| tried(call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0]));
    "outlive the parent", RIGHTS, |_| tried(call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, 0, 0, 0, 0]));
    "sethostname", RIGHTS, |_| tried(call(libc::SYS_sethostname, [address(c"canary"), 6]));
    "personality", RIGHTS, |_| tried(call(libc::SYS_personality, [0xFFFF_FFFF]));
    "rt_sigaction of SIGSYS", RIGHTS, |_| {
        let mut action = [0u64; 4];
        let [signal, room] = [libc::SIGSYS as u64, action.as_mut_ptr() as u64];
        tried(call(libc::SYS_rt_sigaction, [signal, 0, room, 8]))
    };
    // Gates to large parts of the kernel.
    "bpf", RIGHTS, |_| {
        // A map of one element.
        let map = [0x0000_0004_0000_0002u64, 0x0000_0001_0000_0004, 0, 0];
        tried(call(libc::SYS_bpf, [0, map.as_ptr() as u64, 20]))
    };
    "userfaultfd", RIGHTS, |_| tried(call(libc::SYS_userfaultfd, [1]));
    "perf_event_open", RIGHTS, |_| {
        let mut event = [0u64; 14];
        // A software event, the CPU clock, of this thread.
        event[0] = 1 | 112 << 32;
        tried(call(libc::SYS_perf_event_open, [event.as_ptr() as u64, 0, u64::MAX, u64::MAX, 0]))
    };
    "keyctl", RIGHTS, |_| tried(call(libc::SYS_keyctl, [0, -3i64 as u64, 1]));
    "add_key", RIGHTS, |_| {
        let (kind, name) = (address(c"user"), address(c"canary"));
        tried(call(libc::SYS_add_key, [kind, name, name, 6, -2i64 as u64]))
    };
    "io_uring_setup", RIGHTS, |_| {
        let mut parameters = [0u64; 15];
        tried(call(libc::SYS_io_uring_setup, [1, parameters.as_mut_ptr() as u64]))
    };
    "fanotify_init", RIGHTS, |_| tried(call(libc::SYS_fanotify_init, [0, 0]));
    "shmget", RIGHTS, |_| tried(call(libc::SYS_shmget, [0, PAGE, 0o600]));
    "mq_open", RIGHTS, |_| {
        tried(call(libc::SYS_mq_open, [address(c"canary"), (libc::O_CREAT | libc::O_RDWR) as u64, 0o600, 0]))
    };
    "syslog", RIGHTS, |_| tried(call(libc::SYS_syslog, [10, 0, 0]));
    "landlock_create_ruleset", RIGHTS, |_| tried(call(libc::SYS_landlock_create_ruleset, [0, 0, 1]));
    "seccomp listener", RIGHTS, |_| {
        // One instruction that allows all.
        let program = [0x7FFF_0000_0000_0006u64];
        let filter = [1u64, program.as_ptr() as u64];
        let listen = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let install = libc::SECCOMP_SET_MODE_FILTER.into();
        tried(call(libc::SYS_seccomp, [install, listen, filter.as_ptr() as u64]))
    };
    "ioctl of any kind", RIGHTS, |_| each_descriptor(|fd| tried(call(libc::SYS_ioctl, [fd, libc::FIOCLEX])));
    "socket by the x32 table", RIGHTS, |_| {
        socket_by(0x4000_0000 + libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0)
    };
    // Code.
    "mmap executable", MEMORY, |_| map(libc::PROT_READ | libc::PROT_EXEC);
    "mmap writable and executable", MEMORY, |_| map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    "mmap a descriptor executable", MEMORY, |_| each_descriptor(|fd| {
        let rights = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        tried(call(libc::SYS_mmap, [0, PAGE, rights, libc::MAP_SHARED as u64, fd, 0]))
    });
    "mprotect executable", MEMORY, |_| {
        let rights = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        tried(call(libc::SYS_mprotect, [page(), PAGE, rights]))
    };
    "pkey_mprotect executable", MEMORY, |_| {
        let rights = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        tried(call(libc::SYS_pkey_mprotect, [page(), PAGE, rights, u64::MAX]))
    };
    "memfd_create, mapped executable", MEMORY, |_| {
        let file = call(libc::SYS_memfd_create, [address(c"code"), 0]);
        then(file, |fd| {
            let rights = (libc::PROT_READ | libc::PROT_EXEC) as u64;
            tried(call(libc::SYS_mmap, [0, PAGE, rights, libc::MAP_SHARED as u64, fd, 0]))
        })
    };
    "merge memory with that of others", MEMORY, |_| {
        tried(call(libc::SYS_madvise, [page(), PAGE, libc::MADV_MERGEABLE as u64]))
    };
};

/// The attempt after which a jailed process is no more, and nothing is left to report it: filters
/// have but one answer to the tables of other architectures.
pub const FATAL: &Attempt = &Attempt {
    name: "socket by the 32-bit table",
    refusals: &[],
    run: |_| {
        /// `socket` (asm/unistd_32.h).
        const SOCKET: u32 = 359;
        let (family, kind) = (libc::AF_INET as u32, libc::SOCK_STREAM as u32);
        tried(call_32(SOCKET, [family, kind, 0]))
    },
};

/// A call as it is.
fn tried(answer: Answer) -> Outcome {
    match answer {
        Ok(value) => Outcome::Done(value as u64),
        Err(Refusal::Denied) => Outcome::Denied,
        Err(Refusal::Errno(errno)) => Outcome::Errno(errno),
    }
}

/// What follows the first call where that succeeds.
fn then(answer: Answer, next: impl FnOnce(u64) -> Outcome) -> Outcome {
    match answer {
        Ok(value) => next(value as u64),
        refused => tried(refused),
    }
}

/// What gives away most.
fn worst<const N: usize>(outcomes: [Outcome; N]) -> Outcome {
    outcomes.into_iter().max().unwrap_or(Outcome::Nothing)
}

/// Tries it with each process of the VM.
fn each(plan: &Plan, attempt: impl Fn(u64) -> Outcome) -> Outcome {
    most(plan.processes.iter().map(|&pid| attempt(pid as u64)))
}

/// Tries it with each descriptor; those that are not open or not of that kind do not count.
pub fn each_descriptor(attempt: impl Fn(u64) -> Outcome) -> Outcome {
    let unsuited = |outcome: &Outcome| {
        matches!(
            outcome,
            Outcome::Errno(
                libc::EBADF
                    | libc::ENOTDIR
                    | libc::ENOTSOCK
                    | libc::ENODEV
                    | libc::EINVAL
                    | libc::EISCONN
                    | libc::EOPNOTSUPP
                    | libc::ENOPROTOOPT
            )
        )
    };
    most(
        DESCRIPTORS
            .map(attempt)
            .filter(|outcome| !unsuited(outcome)),
    )
}

/// What gives away most of the same with different objects, up to a denial: filters do not know
/// objects.
fn most(outcomes: impl Iterator<Item = Outcome>) -> Outcome {
    let mut most = Outcome::Nothing;
    for outcome in outcomes {
        most = most.max(outcome);
        if outcome == Outcome::Denied {
            break;
        }
    }
    most
}

fn address(text: &CStr) -> u64 {
    text.as_ptr() as u64
}

fn path(text: String) -> std::ffi::CString {
    std::ffi::CString::new(text).unwrap_or_default()
}

/// Opens a file in all ways there are.
fn open(path: &CStr) -> Outcome {
    let name = address(path);
    worst([
        open_at(AT_FDCWD, path),
        opened(call(libc::SYS_open, [name, libc::O_RDONLY as u64])),
        opened(call(
            libc::SYS_openat,
            [AT_FDCWD, name, libc::O_PATH as u64],
        )),
    ])
}

fn open_at(folder: u64, path: &CStr) -> Outcome {
    let name = address(path);
    let plain = libc::O_CLOEXEC as u64;
    let how = [plain, 0, 0];
    let (how, size) = (how.as_ptr() as u64, size_of_val(&how) as u64);
    worst([
        opened(call(libc::SYS_openat, [folder, name, plain])),
        opened(call(
            libc::SYS_openat,
            [folder, name, plain | libc::O_NOFOLLOW as u64],
        )),
        opened(call(libc::SYS_openat2, [folder, name, how, size])),
    ])
}

fn make(path: &CStr) -> Outcome {
    let name = address(path);
    let flags = (libc::O_CREAT | libc::O_WRONLY | libc::O_CLOEXEC | libc::O_NOFOLLOW) as u64;
    worst([
        opened(call(libc::SYS_openat, [AT_FDCWD, name, flags, 0o600])),
        opened(call(libc::SYS_creat, [name, 0o600])),
    ])
}

/// A descriptor, which is not kept.
fn opened(answer: Answer) -> Outcome {
    if let Ok(fd) = answer {
        let _ = call(libc::SYS_close, [fd as u64]);
    }
    tried(answer)
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> Outcome {
    socket_by(libc::SYS_socket, family, kind, protocol)
}

fn socket_by(
    number: i64,
    family: libc::c_int,
    kind: libc::c_int,
    protocol: libc::c_int,
) -> Outcome {
    let [family, kind, protocol] = [family, kind, protocol].map(|word| word as u64);
    opened(call(number, [family, kind, protocol]))
}

/// A `sockaddr_un` in the abstract namespace, and its length.
fn abstract_name(name: &str) -> (Vec<u8>, u64) {
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.push(0);
    bytes.extend_from_slice(name.as_bytes());
    let length = bytes.len() as u64;
    (bytes, length)
}

fn ptrace(request: libc::c_uint, pid: u64) -> Outcome {
    tried(call(libc::SYS_ptrace, [request.into(), pid, 0, 0]))
}

/// Moves a word between this process and another that has it at the same place.
fn vm_copy(number: i64, pid: u64) -> Outcome {
    let (own, other) = ([page(), 8u64], [page(), 8u64]);
    let (own, other) = (own.as_ptr() as u64, other.as_ptr() as u64);
    tried(call(number, [pid, own, 1, other, 1, 0]))
}

fn execute(number: i64, folder: u64) -> Outcome {
    let name = address(c"/bin/true");
    let none: [u64; 1] = [0];
    let none = none.as_ptr() as u64;
    tried(match number {
        libc::SYS_execve => call(number, [name, none, none]),
        _ => call(number, [folder, name, none, none, 0]),
    })
}

/// The parent's side of a new process, which ends at once.
fn child(answer: Answer) -> Outcome {
    if answer == Ok(0) {
        let _ = call(libc::SYS_exit_group, [0]);
    }
    tried(answer)
}

fn map(rights: libc::c_int) -> Outcome {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    tried(call(
        libc::SYS_mmap,
        [0, PAGE, rights as u64, flags, u64::MAX, 0],
    ))
}

/// A page that nothing else uses.
fn page() -> u64 {
    #[repr(align(4096))]
    struct Page([AtomicU8; PAGE as usize]);
    static SPARE: Page = Page([const { AtomicU8::new(0) }; PAGE as usize]);
    SPARE.0.as_ptr() as u64
}
