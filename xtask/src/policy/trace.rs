//! Runs a command and watches which rules of the policies its processes use, through ptrace(2).
//!
//! A filter that only we see (SECCOMP_RET_TRACE for `seccomp`) lets everything run at full speed
//! until a process installs a filter. If that is one of the compiled policies, all further system
//! calls of the thread, and of the threads and processes it starts, are stopped at and matched
//! with the rules.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{CString, OsStr};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::ptr;

use anyhow::{Context as _, Result};

/// A system call: its number and arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Number in the 64-bit table.
    pub number: u32,
    /// Arguments.
    pub arguments: [u64; 6],
}

/// Knows filters and is told of the calls made under them.
pub trait Observer {
    /// The filter whose program consists of these bytes, installed by this program.
    fn recognise(&mut self, program: &str, bytes: &[u8]) -> Option<usize>;

    /// A thread to which all these filters apply makes a call.
    fn call(&mut self, filters: &[usize], call: Call);
}

/// A thread of the command or of a process that it has started.
#[derive(Debug, Clone, Default)]
struct Thread {
    /// Filters in force, as the observer numbers them.
    filters: Vec<usize>,
    /// A filter that the thread is about to install.
    installing: Option<usize>,
}

/// linux/ptrace.h.
const GET_SYSCALL_INFO: libc::c_uint = 0x420E;
const LISTEN: libc::c_uint = 0x4208;
const OPTIONS: i32 = libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_TRACESECCOMP
    | libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_EXITKILL;

/// `struct ptrace_syscall_info` (linux/ptrace.h) as far as it is needed.
#[repr(C)]
#[derive(Default)]
struct SyscallInfo {
    operation: u8,
    padding: [u8; 3],
    architecture: u32,
    instruction_pointer: u64,
    stack_pointer: u64,
    /// At the start: the number and the arguments. At the end: the result.
    words: [u64; 7],
    data: u64,
}

const OPERATION_ENTRY: u8 = 1;
const OPERATION_EXIT: u8 = 2;

/// Runs a command to its end, and its descendants to theirs; returns its exit status.
pub fn run(words: &[impl AsRef<OsStr>], observer: &mut dyn Observer) -> Result<i32> {
    let child = start(words)?;
    let mut tracer = Tracer {
        observer,
        threads: HashMap::from([(child, Thread::default())]),
        early: BTreeSet::new(),
    };
    let mut exit = None;
    // Not the children of other threads of this program.
    let flags = libc::__WALL | libc::__WNOTHREAD;
    loop {
        let mut status = 0;
        // SAFETY: the pointer is to a live integer.
        let tid = unsafe { libc::waitpid(-1, &raw mut status, flags) };
        if tid < 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => continue,
                Some(libc::ECHILD) => break,
                _ => return Err(error).context("waitpid"),
            }
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            tracer.threads.remove(&tid);
            if tid == child {
                exit = Some(match libc::WIFEXITED(status) {
                    true => libc::WEXITSTATUS(status),
                    false => 128 + libc::WTERMSIG(status),
                });
            }
        } else if libc::WIFSTOPPED(status) {
            tracer.stopped(tid, status);
        }
    }
    exit.context("the command has left no exit status")
}

/// Starts the command and becomes its tracer before it does anything.
fn start(words: &[impl AsRef<OsStr>]) -> Result<libc::pid_t> {
    let words = words
        .iter()
        .map(|word| CString::new(word.as_ref().as_bytes()))
        .collect::<Result<Vec<_>, _>>()?;
    let mut arguments: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
    arguments.push(ptr::null());
    let (mut wait, mut go) = io::pipe()?;
    let filter = seccomp_stops();
    let description = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: this program has no other thread that could hold a lock the child needs; until exec
    // it only makes system calls.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error()).context("fork");
    }
    if child == 0 {
        // SAFETY: all strings end with NUL, the list with a null pointer; the filter is alive.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::close(go.as_raw_fd());
            if wait.read_exact(&mut [0]).is_err() {
                libc::_exit(127);
            }
            let install = || {
                let mode = libc::SECCOMP_SET_MODE_FILTER;
                libc::syscall(libc::SYS_seccomp, mode, 0, &raw const description) == 0
            };
            // Only who may do everything needs no promise.
            if install() || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && install() {
                libc::execvp(arguments[0], arguments.as_ptr());
            }
            libc::_exit(127);
        }
    }
    ptrace(libc::PTRACE_SEIZE, child, OPTIONS as u64).context("ptrace seize")?;
    go.write_all(&[0])?;
    Ok(child)
}

/// A filter that stops at `seccomp` and lets everything else pass.
fn seccomp_stops() -> [libc::sock_filter; 4] {
    let instruction = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    [
        // linux/bpf_common.h: load a word, jump if equal, return. The number comes first.
        instruction(0x20, 0, 0, 0),
        instruction(0x15, 0, 1, libc::SYS_seccomp as u32),
        instruction(0x06, 0, 0, libc::SECCOMP_RET_TRACE),
        instruction(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

struct Tracer<'a> {
    observer: &'a mut dyn Observer,
    threads: HashMap<libc::pid_t, Thread>,
    /// Threads that have stopped before their parents told of them.
    early: BTreeSet<libc::pid_t>,
}

impl Tracer<'_> {
    fn stopped(&mut self, tid: libc::pid_t, status: i32) {
        let signal = libc::WSTOPSIG(status);
        if !self.threads.contains_key(&tid) {
            self.early.insert(tid);
            return;
        }
        match status >> 16 {
            0 if signal == libc::SIGTRAP | 0x80 => self.at_call(tid),
            0 => return self.resume(tid, signal),
            libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
                self.begun(tid);
            }
            libc::PTRACE_EVENT_EXEC => self.executed(tid),
            libc::PTRACE_EVENT_SECCOMP => self.installs(tid),
            // A stop of the whole process by a signal; it goes on when a SIGCONT comes.
            libc::PTRACE_EVENT_STOP if signal != libc::SIGTRAP => {
                // It may have been killed meanwhile.
                let _ = ptrace(LISTEN, tid, 0);
                return;
            }
            _ => {}
        }
        self.resume(tid, 0);
    }

    /// Lets a thread go on; under a filter, to its next system call.
    fn resume(&self, tid: libc::pid_t, signal: i32) {
        let watched = self
            .threads
            .get(&tid)
            .is_some_and(|t| !t.filters.is_empty() || t.installing.is_some());
        let request = if watched {
            libc::PTRACE_SYSCALL
        } else {
            libc::PTRACE_CONT
        };
        // It may have been killed meanwhile; then its end is reported.
        let _ = ptrace(request, tid, signal as u64);
    }

    /// A thread or process has begun: what applies to its parent applies to it.
    fn begun(&mut self, parent: libc::pid_t) {
        let Some(child) = message(parent) else { return };
        let filters = self.threads[&parent].filters.clone();
        self.threads.insert(
            child,
            Thread {
                filters,
                ..Thread::default()
            },
        );
        if self.early.remove(&child) {
            self.resume(child, 0);
        }
    }

    /// Another program: the filters stay. The thread that called has become the first one.
    fn executed(&mut self, tid: libc::pid_t) {
        if let Some(former) = message(tid).filter(|former| *former != tid)
            && let Some(thread) = self.threads.remove(&former)
        {
            self.threads.insert(tid, thread);
        }
    }

    /// A thread is about to call `seccomp`.
    fn installs(&mut self, tid: libc::pid_t) {
        let filter = syscall_info(tid).and_then(|info| {
            let [_, operation, _, description, ..] = info.words;
            (operation == u64::from(libc::SECCOMP_SET_MODE_FILTER))
                .then(|| read_program(tid, description))
                .flatten()
        });
        let program = fs::read_link(format!("/proc/{tid}/exe")).unwrap_or_default();
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let known = filter.and_then(|bytes| self.observer.recognise(&name, &bytes));
        if let Some(thread) = self.threads.get_mut(&tid) {
            thread.installing = known;
        }
    }

    fn at_call(&mut self, tid: libc::pid_t) {
        let Some(info) = syscall_info(tid) else {
            return;
        };
        let Some(thread) = self.threads.get_mut(&tid) else {
            return;
        };
        match info.operation {
            OPERATION_ENTRY => {
                let mut arguments = [0; 6];
                arguments.copy_from_slice(&info.words[1..]);
                let call = Call {
                    number: info.words[0] as u32,
                    arguments,
                };
                self.observer.call(&thread.filters, call);
            }
            OPERATION_EXIT => {
                if let Some(filter) = thread.installing.take()
                    && (info.words[0] as i64) >= 0
                {
                    thread.filters.push(filter);
                }
            }
            _ => {}
        }
    }
}

/// The number that comes with an event.
fn message(tid: libc::pid_t) -> Option<libc::pid_t> {
    let mut number: libc::c_ulong = 0;
    ptrace(libc::PTRACE_GETEVENTMSG, tid, &raw mut number as u64).ok()?;
    libc::pid_t::try_from(number).ok()
}

fn syscall_info(tid: libc::pid_t) -> Option<SyscallInfo> {
    let mut info = SyscallInfo::default();
    // SAFETY: the third argument is the length of the structure at the fourth.
    let n = unsafe {
        libc::ptrace(
            GET_SYSCALL_INFO,
            tid,
            size_of::<SyscallInfo>(),
            &raw mut info,
        )
    };
    (n > 0).then_some(info)
}

/// The bytes of the program that a `struct sock_fprog` in another process describes.
fn read_program(tid: libc::pid_t, description: u64) -> Option<Vec<u8>> {
    let memory = fs::File::open(format!("/proc/{tid}/mem")).ok()?;
    let mut words = [0; 16];
    memory.read_exact_at(&mut words, description).ok()?;
    let length = u16::from_ne_bytes([words[0], words[1]]);
    let mut address = [0; 8];
    address.copy_from_slice(&words[8..]);
    let mut program = vec![0; usize::from(length) * size_of::<libc::sock_filter>()];
    memory
        .read_exact_at(&mut program, u64::from_ne_bytes(address))
        .ok()?;
    Some(program)
}

fn ptrace(request: libc::c_uint, tid: libc::pid_t, data: u64) -> io::Result<()> {
    // SAFETY: the data is a number, or the address of a live number for the one request that
    // writes one.
    let rc = unsafe { libc::ptrace(request, tid, ptr::null_mut::<libc::c_void>(), data) };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Everything {
        seen: Vec<(String, usize)>,
        calls: Vec<(usize, u32)>,
    }

    impl Observer for Everything {
        fn recognise(&mut self, program: &str, bytes: &[u8]) -> Option<usize> {
            self.seen.push((program.to_owned(), bytes.len()));
            Some(self.seen.len() - 1)
        }
        fn call(&mut self, filters: &[usize], call: Call) {
            self.calls.push((filters.len(), call.number));
        }
    }

    /// A process without a filter is not looked at; its exit status comes through.
    #[test]
    fn commands_without_filters_run_unseen() {
        let mut observer = Everything::default();
        let status = run(&["sh", "-c", "true & wait; exit 7"], &mut observer).unwrap();
        assert_eq!(status, 7);
        assert!(observer.seen.is_empty() && observer.calls.is_empty());
    }
}
