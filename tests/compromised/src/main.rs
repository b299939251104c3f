//! The same attempts without a jail, each in a process of its own: here they must succeed, or they
//! would prove nothing. Needs root.

use std::env;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::FromRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::process::ExitCode;

use anemone_compromised::{ATTEMPTS, Attempt, FATAL, FIND, MEMORY_ATTEMPTS, Outcome, Plan, Report};

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    let [canary, socket] = &arguments[..] else {
        eprintln!("usage: anemone-compromised CANARY SOCKET");
        return ExitCode::from(2);
    };
    match run(canary.into(), &socket.to_string_lossy()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("anemone-compromised: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(canary: PathBuf, socket: &str) -> io::Result<()> {
    // Things to try something with, and the canary's folder from below.
    let _folder = File::open(canary.with_file_name("sub"))?;
    let _unbound = UnixDatagram::unbound()?;
    let name = format!("{socket}-bound");
    let _bound = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    let _memory = shared_memory(64 << 10)?;
    let text = fs::read(&canary)?;
    // What nobody has anywhere is left out: memory past the end of a file.
    let real =
        |attempt: &&Attempt| !attempt.refusals.contains(&libc::EFAULT) && attempt.name != FIND;
    let all = ATTEMPTS.iter().chain(MEMORY_ATTEMPTS).chain([FATAL]);
    for attempt in all.filter(real) {
        let target = fork(|| {
            loop {
                // SAFETY: no arguments.
                unsafe { libc::pause() };
            }
        })?;
        let plan = Plan {
            canary: CString::new(canary.clone().into_os_string().into_vec())?,
            socket: socket.to_owned(),
            processes: vec![target],
        };
        let outcome = alone(attempt, &plan);
        // SAFETY: a child of ours that nobody has waited for.
        unsafe { libc::kill(target, libc::SIGKILL) };
        wait(target)?;
        // What has succeeded is undone.
        let planted = PathBuf::from(OsString::from_vec(plan.planted().into_bytes()));
        let _ = fs::remove_file(&planted).or_else(|_| fs::remove_dir(&planted));
        let _ = fs::remove_file(&canary);
        fs::write(&canary, &text)?;
        Report {
            role: "no jail".into(),
            round: 0,
            policy: "none".into(),
            name: attempt.name.into(),
            outcome: outcome?,
        }
        .print();
    }
    Ok(())
}

fn shared_memory(length: u64) -> io::Result<File> {
    // SAFETY: a constant string; a result that is not negative is a new descriptor.
    let file = unsafe {
        match libc::memfd_create(c"memory".as_ptr(), libc::MFD_ALLOW_SEALING) {
            ..0 => return Err(io::Error::last_os_error()),
            fd => File::from_raw_fd(fd),
        }
    };
    file.set_len(length)?;
    Ok(file)
}

/// Makes the attempt in a child with namespaces of its own, so that little outlives it.
fn alone(attempt: &Attempt, plan: &Plan) -> io::Result<Outcome> {
    const OWN: libc::c_int = libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
    let child = fork(|| {
        // SAFETY: integers only.
        if unsafe { libc::unshare(OWN) } != 0 {
            return 255;
        }
        // SAFETY: constant strings; no file system type or data.
        unsafe {
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let none = std::ptr::null();
            libc::mount(none, c"/".as_ptr(), none, private, none.cast());
        }
        match (attempt.run)(plan) {
            Outcome::Done(_) => 0,
            Outcome::Errno(errno) => errno,
            _ => 254,
        }
    })?;
    let status = wait(child)?;
    if !libc::WIFEXITED(status) {
        return Err(io::Error::other(format!(
            "{}: ended by signal {}",
            attempt.name,
            libc::WTERMSIG(status)
        )));
    }
    // Another program, started by the attempt, has succeeded as well.
    Ok(match libc::WEXITSTATUS(status) {
        0 => Outcome::Done(0),
        254 | 255 => Outcome::Nothing,
        errno => Outcome::Errno(errno),
    })
}

fn fork(child: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: this process has one thread, so its child may do what it may.
    let pid = unsafe { libc::fork() };
    match pid {
        // SAFETY: ends the child.
        0 => unsafe { libc::_exit(child()) },
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(pid),
    }
}

fn wait(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    match unsafe { libc::waitpid(pid, &raw mut status, 0) } {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(status),
    }
}
