//! A console on the user's terminal: raw while the guest runs, as it was afterwards.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use crate::common::{Lab, signal};

/// A terminal of 120 by 40 characters: the far end and the one that a program uses.
fn terminal() -> (File, File) {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    let mut number: libc::c_uint = 0;
    let locked: libc::c_int = 0;
    let size = libc::winsize {
        ws_row: 40,
        ws_col: 120,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: each pointer is to a value of the type that the request takes.
    let far = unsafe {
        let fd = libc::open(c"/dev/ptmx".as_ptr(), flags);
        assert!(fd >= 0);
        assert_eq!(libc::ioctl(fd, libc::TIOCSPTLCK, &raw const locked), 0);
        assert_eq!(libc::ioctl(fd, libc::TIOCGPTN, &raw mut number), 0);
        assert_eq!(libc::ioctl(fd, libc::TIOCSWINSZ, &raw const size), 0);
        File::from_raw_fd(fd)
    };
    let near = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/dev/pts/{number}"))
        .unwrap();
    (far, near)
}

/// Whether keys reach the program one by one and unchanged.
fn is_raw(terminal: &File) -> bool {
    // SAFETY: the call fills in the value.
    let mode = unsafe {
        let mut mode: MaybeUninit<libc::termios> = MaybeUninit::uninit();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), mode.as_mut_ptr()), 0);
        mode.assume_init()
    };
    let cooked = libc::ICANON | libc::ECHO | libc::ISIG;
    assert!(mode.c_lflag & cooked == 0 || mode.c_lflag & cooked == cooked);
    mode.c_lflag & cooked == 0
}

/// Runs a VM whose console is on the terminal, through this script of the VMM, until `during`.
fn on_terminal(lab: &Lab, during: impl Fn(&std::process::Child)) -> (Option<i32>, String, bool) {
    // Kept open: a terminal whose far end is closed has no settings.
    let (_far, near) = terminal();
    assert!(!is_raw(&near));
    let mut command = lab.command(&["run", "--kernel", "kernel", "--accel", "none,socket=accel"]);
    command
        .stdin(near.try_clone().unwrap())
        .stdout(near.try_clone().unwrap())
        .stderr(Stdio::piped());
    // SAFETY: two system calls, as a shell makes them for the job in front.
    unsafe {
        command.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    let _driver = lab.drive();
    lab.wait_for("the window size", || lab.log("console").contains("window"));
    let raw = is_raw(&near);
    during(&child);
    let outcome = lab.finish(child);
    assert!(!is_raw(&near), "the terminal is left raw");
    (outcome.status, outcome.stderr, raw)
}

#[test]
fn the_terminal_is_raw_while_the_guest_runs() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start power shutdown");
    let (status, stderr, raw) = on_terminal(&lab, |child| signal(child, libc::SIGTERM));
    assert_eq!(status, Some(0), "{stderr}");
    assert!(raw);
    assert!(stderr.contains("Ctrl-A x ends the VM"), "{stderr}");
    let console = lab.log("console");
    assert!(console.contains("--stdio --escape"), "{console}");
    assert!(console.contains("window 120x40"), "{console}");
}

#[test]
fn a_new_size_is_passed_on() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start power shutdown");
    let (status, ..) = on_terminal(&lab, |child| {
        signal(child, libc::SIGWINCH);
        lab.wait_for("the second message", || {
            lab.log("console").matches("window 120x40").count() == 2
        });
        signal(child, libc::SIGTERM);
    });
    assert_eq!(status, Some(0));
}

#[test]
fn it_is_restored_after_a_failure() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start power kill:11");
    let (status, stderr, raw) = on_terminal(&lab, |child| signal(child, libc::SIGTERM));
    assert_eq!(status, Some(1), "{stderr}");
    assert!(raw);
    assert!(stderr.contains("SIGSEGV"), "{stderr}");
}

#[test]
fn the_user_quits() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start hang");
    lab.write("console.script", "ready sleep:300 quit");
    let (status, stderr, _) = on_terminal(&lab, |_| {});
    assert_eq!(status, Some(0), "{stderr}");
}
