//! Starts a program as posix_spawn(3) does, with namespaces: the child borrows this process's
//! memory until it is the new program, and this process waits for that long.
//!
//! A process cannot move into another PID namespace: it must be born there. To make one takes a
//! user namespace, as whose owner an ordinary user may. The new program is the first process of
//! both and sees no parent (`getppid` answers 0).

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::sys;

/// The namespaces in which a child begins.
#[derive(Debug, Clone, Copy)]
pub enum Namespaces<'a> {
    /// Those of this process.
    Same,
    /// A user namespace in which nobody has a name, and a PID namespace.
    New,
    /// This user namespace, and a PID namespace.
    Users(BorrowedFd<'a>),
}

/// Capabilities that entering the jail takes (linux/capability.h): SETPCAP, SYS_CHROOT, SYS_ADMIN.
const ENTERING: u64 = 1 << 8 | 1 << 18 | 1 << 21;
/// The same for one that acts for the users of its namespace: CHOWN, DAC_OVERRIDE, FOWNER, FSETID,
/// SETGID, SETUID, SETFCAP besides.
const ACTING: u64 = ENTERING | 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;

/// What a child is started with. Lists end with a null pointer.
pub struct Start<'a> {
    pub path: &'a CStr,
    pub arguments: &'a [*const c_char],
    /// Descriptors and the numbers that they get, one after the other.
    pub places: &'a [(RawFd, RawFd)],
    /// Signals that the child does not see.
    pub blocked: &'a libc::sigset_t,
    pub namespaces: Namespaces<'a>,
    /// `cgroup.procs` of the control group that the child is to be in.
    pub group: Option<BorrowedFd<'a>>,
}

/// Room for system calls and a few small functions.
type Stack = [MaybeUninit<u128>; 1024];

/// What the child reads, and where it says what went wrong.
struct Shared<'a> {
    start: &'a Start<'a>,
    /// This process, to see whether it is still there.
    parent: BorrowedFd<'a>,
    /// The stack of a child's child.
    stack: *mut Stack,
    /// The process that becomes the program.
    pid: AtomicI32,
    /// The error number of what failed.
    error: AtomicI32,
}

impl Start<'_> {
    /// Starts the child; returns its process id.
    pub fn run(&self) -> io::Result<libc::pid_t> {
        let parent = sys::pidfd_open(std::process::id().cast_signed())?;
        let mut stacks: [Stack; 2] = [[MaybeUninit::uninit(); 1024]; 2];
        let [first, second] = &mut stacks;
        let shared = Shared {
            start: self,
            parent: parent.as_fd(),
            stack: second,
            pid: AtomicI32::new(0),
            error: AtomicI32::new(0),
        };
        let namespaces = match self.namespaces {
            Namespaces::New => libc::CLONE_NEWUSER | libc::CLONE_NEWPID,
            Namespaces::Same | Namespaces::Users(_) => 0,
        };
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD | namespaces;
        // A handler that ran in the child would run in this process's memory.
        let restore = block_all_signals();
        // SAFETY: the stack and `shared` outlive the child's use of them, for with CLONE_VFORK this
        // process stands still until then.
        let child = unsafe {
            let argument = (&raw const shared).cast_mut().cast();
            libc::clone(run_child, top(first), flags, argument)
        };
        let cloned = if child < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        };
        // SAFETY: the set is the one from before.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const restore, ptr::null_mut()) };
        cloned?;
        let pid = match self.namespaces {
            Namespaces::Users(_) => {
                reap(child);
                shared.pid.into_inner()
            }
            _ => child,
        };
        match shared.error.into_inner() {
            0 => Ok(pid),
            error => {
                if pid > 0 {
                    reap(pid);
                }
                Err(io::Error::from_raw_os_error(error))
            }
        }
    }
}

/// The end of a stack, where it begins.
fn top(stack: *mut Stack) -> *mut c_void {
    stack.wrapping_add(1).cast()
}

/// Waits for a child that has ended, or is about to.
fn reap(pid: libc::pid_t) {
    // SAFETY: a null status is allowed; a signal may end the call early.
    while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

/// Blocks all signals; returns what was blocked before.
fn block_all_signals() -> libc::sigset_t {
    // SAFETY: sigfillset makes one set valid, and the call the other.
    unsafe {
        let mut all = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_BLOCK, all.as_ptr(), before.as_mut_ptr());
        before.assume_init()
    }
}

/// The child: becomes the program, or has a child in other namespaces that does.
extern "C" fn run_child(shared: *mut c_void) -> c_int {
    // SAFETY: what `run` passes; it waits.
    let shared = unsafe { &*shared.cast::<Shared<'_>>() };
    let Namespaces::Users(users) = shared.start.namespaces else {
        return become_program(shared);
    };
    // SAFETY: integers; and as in `run`, this process stands still in its turn.
    let child = unsafe {
        if libc::setns(users.as_raw_fd(), libc::CLONE_NEWUSER) < 0 {
            return shared.fail();
        }
        let flags = libc::CLONE_VM
            | libc::CLONE_VFORK
            | libc::CLONE_PARENT
            | libc::CLONE_NEWPID
            | libc::SIGCHLD;
        let argument = ptr::from_ref(shared).cast_mut().cast();
        libc::clone(run_grandchild, top(shared.stack), flags, argument)
    };
    if child < 0 {
        return shared.fail();
    }
    shared.pid.store(child, Ordering::Relaxed);
    0
}

extern "C" fn run_grandchild(shared: *mut c_void) -> c_int {
    // SAFETY: what `run_child` passes; both of the processes before this one wait.
    become_program(unsafe { &*shared.cast::<Shared<'_>>() })
}

/// Returns only if something fails.
fn become_program(shared: &Shared<'_>) -> c_int {
    let start = shared.start;
    let kept = match start.namespaces {
        Namespaces::Same => Ok(()),
        Namespaces::New => keep_capabilities(ENTERING),
        Namespaces::Users(_) => keep_capabilities(ACTING),
    };
    if join(start.group).is_err() || kept.is_err() || die_with(shared.parent).is_err() {
        return shared.fail();
    }
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: integers, and strings and lists that are as `Start` says. An all-zero sigaction is
    // valid; SIGPIPE, which the standard library ignores, becomes what it was.
    unsafe {
        for &(from, to) in start.places {
            let placed = match from == to {
                true => libc::fcntl(to, libc::F_SETFD, 0),
                false => libc::dup2(from, to),
            };
            if placed < 0 {
                return shared.fail();
            }
        }
        let default: libc::sigaction = MaybeUninit::zeroed().assume_init();
        libc::sigaction(libc::SIGPIPE, &raw const default, ptr::null_mut());
        libc::sigprocmask(libc::SIG_SETMASK, start.blocked, ptr::null_mut());
        libc::execve(
            start.path.as_ptr(),
            start.arguments.as_ptr(),
            environment.as_ptr(),
        );
    }
    shared.fail()
}

impl Shared<'_> {
    /// Says what has failed.
    fn fail(&self) -> c_int {
        // SAFETY: the C library's own variable.
        let error = unsafe { *libc::__errno_location() };
        self.error.store(error, Ordering::Relaxed);
        1
    }
}

/// Nothing more to say: the error number is the thread's.
struct Failed;

fn check(result: c_int) -> Result<(), Failed> {
    if result < 0 { Err(Failed) } else { Ok(()) }
}

/// The kernel is to kill this process with its parent, which may have died already. That stays over
/// exec, and over changes of credentials that add nothing (prctl(2), PR_SET_PDEATHSIG).
fn die_with(parent: BorrowedFd<'_>) -> Result<(), Failed> {
    let mut dead = [sys::readable(parent)];
    // SAFETY: integers, and a list of one descriptor.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
        match libc::poll(dead.as_mut_ptr(), 1, 0) {
            0 => Ok(()),
            _ => Err(Failed),
        }
    }
}

/// Moves into a control group, before there is memory that would be counted elsewhere.
fn join(group: Option<BorrowedFd<'_>>) -> Result<(), Failed> {
    let Some(group) = group else { return Ok(()) };
    // SAFETY: one byte of a constant; 0 is the process that writes.
    let written = unsafe { libc::write(group.as_raw_fd(), c"0".as_ptr().cast(), 1) };
    check(written as c_int)
}

/// Keeps these capabilities of the new namespace over exec. That takes none away before: exec would
/// else add some where the user is root, and forget the signal of [`die_with`].
fn keep_capabilities(keep: u64) -> Result<(), Failed> {
    /// `_LINUX_CAPABILITY_VERSION_3` (linux/capability.h).
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let (low, high) = (keep as u32, (keep >> 32) as u32);
    // Effective, permitted, inheritable; twice 32.
    let sets = [!0, !0, low, !0, !0, high];
    // SAFETY: the structures that the call reads, with this thread's number 0; then integers.
    unsafe {
        let set = libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr());
        check(set as c_int)?;
        for capability in (0..64).filter(|bit| keep >> bit & 1 == 1) {
            let raise = libc::PR_CAP_AMBIENT_RAISE;
            check(libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0))?;
        }
    }
    Ok(())
}
