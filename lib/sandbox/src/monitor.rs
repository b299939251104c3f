//! `--sandbox log`: calls outside the policy are reported and carried out.
//!
//! A thread's filter chain can have only one listener, so the filters of a process cannot be
//! stacked here as they are otherwise. Instead the first thread that restricts itself installs
//! the gate, which allows what all policies of the program allow and asks the listener about the
//! rest; threads started later inherit it. The listener is a thread without a filter. It judges
//! each call by the policies of the thread that made it, reports what they deny, and lets the
//! call go on. It must neither allocate nor lock: the thread that waits for it may be inside the
//! allocator, or hold the lock of standard error.

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::Error;
use crate::filter::{Call, Filter};
use crate::report::{Denied, ThreadName};
use crate::seccomp::{identity, install};

/// linux/seccomp.h.
const NEW_LISTENER: libc::c_ulong = 1 << 3;
const RECEIVE: libc::c_ulong = 0xC050_2100;
const SEND: libc::c_ulong = 0xC018_2101;
const CONTINUE: u32 = 1;

/// `struct seccomp_notif`.
#[repr(C)]
struct Notification {
    id: u64,
    thread: u32,
    flags: u32,
    call: Call,
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// A thread that has restricted itself.
struct Restricted {
    thread: AtomicI32,
    filter: AtomicPtr<Filter>,
    name: [AtomicU64; 2],
}

/// Threads beyond these are judged by the policy they inherited alone.
const THREADS: usize = 256;

static RESTRICTED: [Restricted; THREADS] = [const {
    Restricted {
        thread: AtomicI32::new(0),
        filter: AtomicPtr::new(ptr::null_mut()),
        name: [AtomicU64::new(0), AtomicU64::new(0)],
    }
}; THREADS];

/// Slots of [`RESTRICTED`] taken so far.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// How often each system call was let through; the last counts all unknown ones.
static LET_THROUGH: [AtomicU32; 512] = [const { AtomicU32::new(0) }; 512];

/// Values of the cell in which a monitor finds its listener.
const NOT_YET: RawFd = -1;
const NOT_NEEDED: RawFd = -2;

pub(crate) fn restrict(filter: &'static Filter) -> Result<(), Error> {
    let (thread, name, first) = identity();
    if !first {
        // The gate that the thread has is the same for all policies of a program.
        enrol(thread, &name, filter);
        return Ok(());
    }
    // The monitor starts first, because it must not inherit the gate; it learns the listener by
    // a plain store, because from then on any call of this thread may need the monitor.
    let listener = Arc::new(AtomicI32::new(NOT_YET));
    let cell = Arc::clone(&listener);
    without_signals(|| {
        thread::Builder::new()
            .name("sandbox-log".to_owned())
            .stack_size(64 * 1024)
            .spawn(move || monitor(&cell, filter))
    })
    .map_err(Error::Monitor)?;
    let (fd, result) = match install(filter.gate, NEW_LISTENER) {
        Ok(fd) => (fd, Ok(())),
        // This thread has inherited a gate.
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => (NOT_NEEDED, Ok(())),
        Err(e) => (NOT_NEEDED, Err(Error::Seccomp(e))),
    };
    // From here on, and not for the calls above, the thread is judged by the filter.
    enrol(thread, &name, filter);
    listener.store(fd, Ordering::Release);
    result
}

/// Notes that `filter` is one of those of `thread`.
fn enrol(thread: i32, name: &ThreadName, filter: &'static Filter) {
    let Some(slot) = RESTRICTED.get(TAKEN.fetch_add(1, Ordering::Relaxed)) else {
        return;
    };
    let (low, high) = name.0.split_at(8);
    for (cell, half) in slot.name.iter().zip([low, high]) {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(half);
        cell.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
    }
    slot.filter
        .store(ptr::from_ref(filter).cast_mut(), Ordering::Relaxed);
    slot.thread.store(thread, Ordering::Release);
}

/// Runs `f` with all signals blocked, so that a thread it starts never takes one.
fn without_signals<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are initialised before they are read; the old mask is put back.
    unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        let mut before: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let result = f();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
        result
    }
}

/// Answers the listener for as long as the process lives.
fn monitor(cell: &AtomicI32, inherited: &'static Filter) {
    let listener = loop {
        match cell.load(Ordering::Acquire) {
            NOT_YET => thread::sleep(Duration::from_micros(100)),
            NOT_NEEDED => return,
            fd => break fd,
        }
    };
    loop {
        // SAFETY: all-zero is a valid notification, and what the kernel wants to find there.
        let mut asked: Notification = unsafe { mem::zeroed() };
        // SAFETY: RECEIVE writes one notification.
        if unsafe { libc::ioctl(listener, RECEIVE, &raw mut asked) } != 0 {
            match io::Error::last_os_error().raw_os_error() {
                // The thread was interrupted or died before it was received.
                Some(libc::EINTR | libc::ENOENT) => continue,
                _ => return,
            }
        }
        let mut answer = Answer {
            id: asked.id,
            value: 0,
            error: 0,
            flags: 0,
        };
        match judge(asked.thread as i32, &asked.call, inherited) {
            Verdict::Errno(number) => answer.error = -i32::from(number),
            Verdict::Allow => answer.flags = CONTINUE,
            Verdict::Deny {
                policy,
                thread_name,
            } => {
                answer.flags = CONTINUE;
                let counter = &LET_THROUGH[(asked.call.number as usize).min(LET_THROUGH.len() - 1)];
                let count = counter.fetch_add(1, Ordering::Relaxed).saturating_add(1);
                if count <= 3 || count.is_power_of_two() {
                    let thread = asked.thread as i32;
                    let (call, let_through) = (asked.call, Some(count));
                    Denied {
                        thread,
                        thread_name,
                        call,
                        policy,
                        let_through,
                    }
                    .print();
                }
            }
        }
        // SAFETY: SEND reads one answer. It fails if the thread is gone by now, which is fine.
        unsafe { libc::ioctl(listener, SEND, &raw const answer) };
    }
}

enum Verdict {
    Allow,
    Errno(u16),
    Deny {
        policy: &'static str,
        thread_name: ThreadName,
    },
}

/// What the filters of a thread would do, had they been stacked: the severest answer counts.
fn judge(thread: i32, call: &Call, inherited: &'static Filter) -> Verdict {
    // The call of `restrict`, by a thread that has inherited a gate. No policy has it.
    if i64::from(call.number) == libc::SYS_seccomp && call.arguments[1] == NEW_LISTENER {
        return Verdict::Allow;
    }
    let severity = |answer: u32| (answer & libc::SECCOMP_RET_ACTION_FULL) as i32;
    let mut worst = inherited.evaluate(call);
    let mut policy = inherited.name;
    let mut thread_name = [0; 16];
    for slot in &RESTRICTED[..TAKEN.load(Ordering::Relaxed).min(THREADS)] {
        if slot.thread.load(Ordering::Acquire) != thread {
            continue;
        }
        for (half, cell) in thread_name.chunks_exact_mut(8).zip(&slot.name) {
            half.copy_from_slice(&cell.load(Ordering::Relaxed).to_ne_bytes());
        }
        // SAFETY: null or a pointer from a static reference.
        let Some(filter) = (unsafe { slot.filter.load(Ordering::Relaxed).as_ref() }) else {
            continue;
        };
        let answer = filter.evaluate(call);
        if severity(answer) <= severity(worst) {
            (worst, policy) = (answer, filter.name);
        }
    }
    match worst & libc::SECCOMP_RET_ACTION_FULL {
        libc::SECCOMP_RET_ALLOW => Verdict::Allow,
        libc::SECCOMP_RET_ERRNO => Verdict::Errno(worst as u16),
        _ => Verdict::Deny {
            policy,
            thread_name: ThreadName(thread_name),
        },
    }
}
