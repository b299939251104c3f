//! Children that are jailed, and what they leave behind.

// Each test file uses a part of this, and helpers of tests fail as tests do.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anemone_policy::{Denial, Policy};
use anemone_sandbox::{Filter, Instruction, instruction};

/// What the tests themselves do besides what the base allows.
const TEST: &str = "include base\ninclude heap\ninclude events\n\
    exit # threads end\nrt_sigprocmask # the same\nclock_nanosleep # they sleep\n";

/// Compiles a policy: what every test needs and what is given.
pub fn filter(name: &str, index: u16, text: &str) -> &'static Filter {
    let common = |file: &str| {
        let path = anemone_policy::common_folder().join(format!("{file}.policy"));
        Some((
            path.display().to_string(),
            std::fs::read_to_string(path).ok()?,
        ))
    };
    let text = format!("{TEST}{text}");
    let policy = Policy::parse(name, name, &text, &common).unwrap();
    let gate = Policy::parse("gate", "gate", TEST, &common).unwrap();
    let convert = |policy: &Policy, denial| -> &'static [Instruction] {
        let program = policy.program(denial).unwrap();
        let program = program.iter().map(|i| instruction(i.code, i.jt, i.jf, i.k));
        program.collect::<Vec<_>>().leak()
    };
    let (program, gate) = (
        convert(&policy, Denial::Trap(index)),
        convert(&gate, Denial::Notify),
    );
    Box::leak(Box::new(Filter::new(
        name.to_owned().leak(),
        index,
        program,
        gate,
    )))
}

/// Who runs a child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Whoever runs the tests.
    Same,
    /// An ordinary user without any rights. Only root can become it.
    Nobody,
}

/// The users that this test run can test.
pub fn users() -> &'static [User] {
    // SAFETY: no arguments.
    match unsafe { libc::geteuid() } {
        0 => &[User::Same, User::Nobody],
        _ => &[User::Same],
    }
}

/// How a child ended and what it wrote to standard error.
#[derive(Debug)]
pub struct Outcome {
    pub exit: Option<i32>,
    pub signal: Option<i32>,
    pub stderr: String,
}

pub struct Child {
    pub pid: i32,
    stderr: OwnedFd,
    /// Closing it tells the child to go on from [`Handle::pause`].
    go: Option<OwnedFd>,
    paused: OwnedFd,
}

/// The child's side.
pub struct Handle {
    go: i32,
    paused: i32,
}

impl Handle {
    /// Lets the parent look; returns when it has.
    pub fn pause(&self) {
        let mut byte = 0u8;
        // SAFETY: one byte is written and one read.
        unsafe {
            libc::write(self.paused, (&raw const byte).cast(), 1);
            libc::read(self.go, (&raw mut byte).cast(), 1);
        }
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: the call writes two descriptors, which nothing else owns.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
    }
}

/// Forks a child as `user` that runs `body` and exits with what it returns; 99 for a panic.
pub fn start(user: User, body: impl FnOnce(&Handle) -> i32) -> Child {
    start_in(0, user, body)
}

/// The same in new namespaces (`CLONE_NEW…`), for a test that is alone in its process: what a thread
/// holds locked at that moment stays locked in the child.
pub fn start_in(namespaces: i32, user: User, body: impl FnOnce(&Handle) -> i32) -> Child {
    let (stderr, stderr_child) = pipe();
    let (go_child, go) = pipe();
    let (paused, paused_child) = pipe();
    // SAFETY: the child has one thread and leaves by _exit.
    unsafe {
        let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
        let pid = match namespaces {
            0 => libc::fork(),
            _ => libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) as i32,
        };
        assert!(pid >= 0);
        if pid == 0 {
            libc::dup2(stderr_child.as_raw_fd(), 2);
            drop((stderr, stderr_child, go, paused));
            if user == User::Nobody {
                assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
                assert_eq!(libc::setresgid(65534, 65534, 65534), 0);
                assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
            }
            let handle = Handle {
                go: go_child.as_raw_fd(),
                paused: paused_child.as_raw_fd(),
            };
            let body = std::panic::AssertUnwindSafe(|| body(&handle));
            libc::_exit(std::panic::catch_unwind(body).unwrap_or(99));
        }
        Child {
            pid,
            stderr,
            go: Some(go),
            paused,
        }
    }
}

impl Child {
    /// Waits until the child pauses; false if it ended instead.
    pub fn wait_for_pause(&mut self) -> bool {
        let mut byte = 0u8;
        // The other end is open in the child alone.
        // SAFETY: one byte is read.
        unsafe { libc::read(self.paused.as_raw_fd(), (&raw mut byte).cast(), 1) == 1 }
    }

    /// Lets the child go on and waits for its end.
    pub fn finish(mut self) -> Outcome {
        drop(self.go.take());
        let mut stderr = String::new();
        File::from(self.stderr).read_to_string(&mut stderr).unwrap();
        let mut status = 0;
        // SAFETY: the child is ours.
        let ended = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        assert_eq!(ended, self.pid);
        Outcome {
            exit: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)),
            signal: libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status)),
            stderr,
        }
    }
}

/// Runs a child to its end.
pub fn run(user: User, body: impl FnOnce() -> i32) -> Outcome {
    start(user, |_| body()).finish()
}

/// The last error number of this thread.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// A system call; its result, or the negated error number.
pub fn call(number: libc::c_long, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the tests pass addresses of memory that is alive, or none.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result < 0 {
        -i64::from(errno())
    } else {
        result
    }
}

/// Makes the system calls `numbers` fail with `error` in this process from now on, as a
/// container's own filter does.
pub fn forbid(numbers: &[libc::c_long], error: u16) {
    let mut program = vec![instruction(0x20, 0, 0, 0)];
    for number in numbers {
        program.push(instruction(0x15, 0, 1, *number as u32));
        program.push(instruction(
            0x06,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | u32::from(error),
        ));
    }
    program.push(instruction(0x06, 0, 0, libc::SECCOMP_RET_ALLOW));
    let description = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program is alive and as long as it says.
    unsafe {
        // Without no_new_privs where possible, so that the jail has it still to set.
        let filter = libc::SECCOMP_SET_MODE_FILTER;
        let attempt = || libc::syscall(libc::SYS_seccomp, filter, 0, &raw const description);
        if attempt() != 0 {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(attempt(), 0);
        }
    }
}
