//! Denied calls against the real kernel: the report, the end, and `--sandbox log`.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use anemone_sandbox::{Mode, ProcessJail, enter, restrict};
use common::{User, call, filter, run, users};

const CLOSED: u64 = 0xFFFF;

#[test]
fn a_denied_call_is_reported_and_ends_the_process() {
    let main = filter("main", 0, "");
    for user in users() {
        let outcome = run(*user, || {
            anemone_log::init("anemone-blk[disk0]", log::LevelFilter::Info);
            enter(&ProcessJail::default()).unwrap();
            restrict(main, Mode::On).unwrap();
            call(libc::SYS_openat, [0x11, 0x22, 0x33, 0x44, 0x55, 0x66]);
            0
        });
        assert_eq!(outcome.signal, Some(libc::SIGSYS), "{outcome:?}");
        let (start, rest) = outcome.stderr.split_once(": process ").unwrap();
        assert_eq!(start, "anemone-blk[disk0]: denied");
        let (numbers, rest) = rest.split_once(" \"").unwrap();
        let (process, thread) = numbers.split_once(", thread ").unwrap();
        assert_eq!(process, thread, "the only thread");
        let (_name, rest) = rest.split_once("\": ").unwrap();
        let (what, rest) = rest.split_once(" at rip 0x").unwrap();
        assert_eq!(
            what,
            "openat (257) args [0x11, 0x22, 0x33, 0x44, 0x55, 0x66]"
        );
        assert!(rest.ends_with("; not in policy \"main\"\n"), "{rest}");
        assert_eq!(outcome.stderr.lines().count(), 1);
    }
}

#[test]
fn a_thread_is_named_and_judged_by_the_policy_that_denies() {
    let main = filter(
        "main",
        0,
        "include threads\ngetppid # both threads may\nioctl arg1==1|2 # some",
    );
    let worker = filter(
        "worker",
        1,
        "getppid # both threads may\nioctl arg1==1 # fewer\nsync # not in main",
    );
    let deny = |what: u32| {
        run(User::Same, move || {
            enter(&ProcessJail::default()).unwrap();
            restrict(main, Mode::On).unwrap();
            let body = move || {
                restrict(worker, Mode::On).unwrap();
                assert!(call(libc::SYS_getppid, [0; 6]) >= 0);
                assert_eq!(
                    call(libc::SYS_ioctl, [CLOSED, 1, 0, 0, 0, 0]),
                    -i64::from(libc::EBADF)
                );
                match what {
                    0 => call(libc::SYS_ioctl, [CLOSED, 2, 0, 0, 0, 0]),
                    1 => call(libc::SYS_sync, [0; 6]),
                    _ => 0,
                }
            };
            let thread = std::thread::Builder::new()
                .name("queue0".to_owned())
                .spawn(body)
                .unwrap();
            thread.join().unwrap();
            // The first thread still may what the other may not.
            assert_eq!(
                call(libc::SYS_ioctl, [CLOSED, 2, 0, 0, 0, 0]),
                -i64::from(libc::EBADF)
            );
            0
        })
    };
    let outcome = deny(0);
    assert_eq!(outcome.signal, Some(libc::SIGSYS), "{outcome:?}");
    assert!(
        outcome
            .stderr
            .contains("\"queue0\": ioctl (16) args [0xffff, 0x2,"),
        "{outcome:?}"
    );
    assert!(
        outcome.stderr.contains("not in policy \"worker\""),
        "{outcome:?}"
    );
    // What the inherited filter denies stays denied, and the report says which one it was.
    let outcome = deny(1);
    assert_eq!(outcome.signal, Some(libc::SIGSYS), "{outcome:?}");
    assert!(
        outcome.stderr.contains("\"queue0\": sync (162)"),
        "{outcome:?}"
    );
    assert!(
        outcome.stderr.contains("not in policy \"main\""),
        "{outcome:?}"
    );
    let outcome = deny(2);
    assert_eq!(outcome.exit, Some(0), "{outcome:?}");
}

#[test]
fn a_panic_and_a_foreign_sigsys_end_the_process_as_they_should() {
    let raise = "getpid # raise\ngettid # raise\ntgkill arg2==SIGSYS # raise";
    let main = filter("main", 0, raise);
    let panic = run(User::Same, || {
        restrict(main, Mode::On).unwrap();
        panic!("on purpose")
    });
    assert_eq!(panic.exit, Some(101), "{panic:?}");
    assert!(panic.stderr.contains("on purpose"), "{panic:?}");
    assert!(!panic.stderr.contains("denied"), "{panic:?}");
    // It would need more than any policy has.
    let abort = run(User::Same, || {
        restrict(main, Mode::On).unwrap();
        std::process::abort()
    });
    assert_eq!(abort.signal, Some(libc::SIGSYS), "{abort:?}");
    let foreign = run(User::Same, || {
        restrict(main, Mode::On).unwrap();
        // SAFETY: integers only.
        unsafe { libc::raise(libc::SIGSYS) };
        0
    });
    assert_eq!(foreign.signal, Some(libc::SIGSYS), "{foreign:?}");
    assert!(!foreign.stderr.contains("denied"), "{foreign:?}");
}

#[test]
fn a_crash_is_reported_and_ends_the_process() {
    let main = filter("main", 0, "");
    let outcome = run(User::Same, || {
        anemone_log::init("anemone-rng[rng0]", log::LevelFilter::Info);
        restrict(main, Mode::On).unwrap();
        // SAFETY: none: it is the fault that the test is about, in a process made for it.
        unsafe { std::ptr::with_exposed_provenance::<u8>(0x1230).read_volatile() };
        0
    });
    assert_eq!(outcome.signal, Some(libc::SIGSEGV), "{outcome:?}");
    let start = "anemone-rng[rng0]: crashed: SIGSEGV at address 0x1230, rip 0x";
    assert!(outcome.stderr.starts_with(start), "{outcome:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
}

#[test]
fn a_thread_that_blocks_the_signal_dies_too() {
    let main = filter("main", 0, "");
    let outcome = run(User::Same, || {
        restrict(main, Mode::On).unwrap();
        // SAFETY: the set is initialised before its use.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        }
        call(libc::SYS_sync, [0; 6]);
        0
    });
    assert_eq!(outcome.signal, Some(libc::SIGSYS), "{outcome:?}");
}

#[test]
fn log_mode_reports_and_goes_on() {
    let main = filter(
        "main",
        0,
        "getppid # allowed, not in the gate\nuname errno=EPERM # fails",
    );
    for user in users() {
        let outcome = run(*user, || {
            anemone_log::init("role", log::LevelFilter::Info);
            enter(&ProcessJail {
                mode: Mode::Log,
                ..ProcessJail::default()
            })
            .unwrap();
            restrict(main, Mode::Log).unwrap();
            assert!(call(libc::SYS_getppid, [0; 6]) >= 0);
            assert_eq!(call(libc::SYS_uname, [0; 6]), -i64::from(libc::EPERM));
            for _ in 0..100 {
                assert!(call(libc::SYS_umask, [0o22, 0, 0, 0, 0, 0]) >= 0);
            }
            assert_eq!(
                call(libc::SYS_getpriority, [99, 0, 0, 0, 0, 0]),
                -i64::from(libc::EINVAL)
            );
            0
        });
        assert_eq!(outcome.exit, Some(0), "{outcome:?}");
        let lines: Vec<_> = outcome.stderr.lines().collect();
        let of = |name: &str| lines.iter().filter(|l| l.contains(name)).count();
        // Calls 1, 2, 3, 4, 8, 16, 32, 64.
        assert_eq!(of(": umask (95) args [0x12,"), 8, "{lines:#?}");
        assert_eq!(
            of("not in policy \"main\"; let through (call 64 of this kind)"),
            1
        );
        assert_eq!(of("getpriority (140) args [0x63,"), 1);
        assert_eq!(of("getppid"), 0);
        assert_eq!(of("uname"), 0);
        assert!(
            lines
                .iter()
                .all(|l| l.starts_with("role: denied: process ")),
            "{lines:#?}"
        );
    }
}

#[test]
fn log_mode_judges_each_thread_by_its_own_policy() {
    let main = filter(
        "main",
        0,
        "include threads\ngetppid # first thread\nsync # never called\numask # both",
    );
    let worker = filter("worker", 1, "umask # both");
    let outcome = run(User::Same, || {
        restrict(main, Mode::Log).unwrap();
        let own = std::thread::Builder::new().name("own".to_owned());
        let own = own.spawn(|| {
            restrict(worker, Mode::Log).unwrap();
            call(libc::SYS_getppid, [0; 6]);
            call(libc::SYS_umask, [0o22, 0, 0, 0, 0, 0]);
        });
        own.unwrap().join().unwrap();
        // A thread without a policy of its own is judged by the one it inherits.
        std::thread::spawn(|| call(libc::SYS_getppid, [0; 6]))
            .join()
            .unwrap();
        std::thread::spawn(|| call(libc::SYS_getpgid, [0; 6]))
            .join()
            .unwrap();
        call(libc::SYS_getppid, [0; 6]);
        0
    });
    assert_eq!(outcome.exit, Some(0), "{outcome:?}");
    let lines: Vec<_> = outcome.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains("\"own\": getppid (110)"), "{lines:#?}");
    assert!(
        lines[0].contains("not in policy \"worker\"; let through"),
        "{lines:#?}"
    );
    assert!(
        lines[1].contains("getpgid (121)") && lines[1].contains("\"main\""),
        "{lines:#?}"
    );
}

#[test]
fn log_mode_survives_signals() {
    let main = filter(
        "main",
        0,
        "getppid # answered by the monitor\nsetitimer # the test's timer",
    );
    extern "C" fn nothing(_: libc::c_int) {}
    let outcome = run(User::Same, || {
        // SAFETY: a handler that does nothing; the timer is initialised.
        unsafe {
            libc::signal(libc::SIGALRM, nothing as *const () as usize);
            let every = libc::timeval {
                tv_sec: 0,
                tv_usec: 100,
            };
            let timer = libc::itimerval {
                it_interval: every,
                it_value: every,
            };
            restrict(main, Mode::Log).unwrap();
            libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const timer, 0);
        }
        let end = std::time::Instant::now() + Duration::from_millis(200);
        while std::time::Instant::now() < end {
            assert!(call(libc::SYS_getppid, [0; 6]) >= 0);
        }
        0
    });
    assert_eq!(outcome.exit, Some(0), "{outcome:?}");
}
