//! Starts a child with exactly the descriptors it is meant to have.

use std::ffi::{CString, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Once;
use std::time::{Duration, Instant};

use thiserror::Error as ThisError;

use crate::clone::{Namespaces, Start};
use crate::sys::{self, Exit};

/// A program could not be started.
#[derive(Debug, ThisError)]
#[error("cannot start {}: {source}", program.display())]
pub struct Error {
    program: PathBuf,
    source: io::Error,
}

/// Signals that a terminal sends to every process in front of it. The supervisor acts on them;
/// its children must not, or the guest would die of a Ctrl-C that was to power it off.
const LEFT_TO_SUPERVISOR: [libc::c_int; 6] = [
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGHUP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// What a child finds at descriptors 0 and 1. Descriptor 2 is always the supervisor's.
#[derive(Debug, Clone, Copy)]
pub enum Stdio<'a> {
    /// `/dev/null`.
    Null,
    /// What the supervisor has there.
    Inherit,
    /// `/dev/null` for input, this for output.
    Output(BorrowedFd<'a>),
}

/// A child to be started.
#[derive(Debug)]
pub struct Program<'a> {
    path: &'a Path,
    args: Vec<OsString>,
    fds: Vec<(RawFd, BorrowedFd<'a>)>,
    stdio: Stdio<'a>,
    namespaces: Namespaces<'a>,
    group: Option<BorrowedFd<'a>>,
}

impl<'a> Program<'a> {
    /// A program without arguments; its standard input and output are `/dev/null`.
    pub fn new(path: &'a Path) -> Self {
        let name = path.file_name().unwrap_or(path.as_os_str());
        Self {
            path,
            args: vec![name.to_owned()],
            fds: Vec::new(),
            stdio: Stdio::Null,
            namespaces: Namespaces::Same,
            group: None,
        }
    }

    /// Sets the namespaces in which the child begins. Where the host refuses them, that is
    /// reported, and it begins in those of this process.
    pub fn namespaces(&mut self, namespaces: Namespaces<'a>) -> &mut Self {
        self.namespaces = namespaces;
        self
    }

    /// Sets the control group that the child is to be in, by its `cgroup.procs`.
    pub fn group(&mut self, procs: Option<BorrowedFd<'a>>) -> &mut Self {
        self.group = procs;
        self
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl Into<OsString>) -> &mut Self {
        self.args.push(arg.into());
        self
    }

    /// Adds an option and its value.
    pub fn option(&mut self, name: &str, value: impl fmt::Display) -> &mut Self {
        self.arg(name).arg(value.to_string())
    }

    /// Passes a descriptor as `number`.
    pub fn fd(&mut self, number: RawFd, fd: BorrowedFd<'a>) -> &mut Self {
        self.fds.push((number, fd));
        self
    }

    /// Passes a descriptor at the next free number, which is the value of option `name`.
    pub fn fd_option(&mut self, name: &str, fd: BorrowedFd<'a>) -> &mut Self {
        let number = self.first_free();
        self.fd(number, fd).option(name, number)
    }

    /// Sets standard input and output.
    pub fn stdio(&mut self, stdio: Stdio<'a>) -> &mut Self {
        self.stdio = stdio;
        self
    }

    fn first_free(&self) -> RawFd {
        self.fds
            .iter()
            .map(|(number, _)| number + 1)
            .max()
            .unwrap_or(anemone_ipc::CONTROL_FD)
    }

    /// Starts the child, with an empty environment and the signals of
    /// [`LEFT_TO_SUPERVISOR`] blocked.
    pub fn start(&self) -> Result<Process, Error> {
        self.try_start().map_err(|source| Error {
            program: self.path.to_owned(),
            source,
        })
    }

    fn try_start(&self) -> io::Result<Process> {
        let path = CString::new(self.path.as_os_str().as_bytes())?;
        let args = self
            .args
            .iter()
            .map(|arg| CString::new(arg.clone().into_vec()))
            .collect::<Result<Vec<_>, _>>()?;
        let mut argv: Vec<*const libc::c_char> = args.iter().map(|arg| arg.as_ptr()).collect();
        argv.push(ptr::null());
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let mut places: Vec<_> = self
            .fds
            .iter()
            .map(|(number, fd)| (fd.as_raw_fd(), *number))
            .collect();
        match self.stdio {
            Stdio::Inherit => {}
            Stdio::Null => places.extend([(null.as_raw_fd(), 0), (null.as_raw_fd(), 1)]),
            Stdio::Output(fd) => places.extend([(null.as_raw_fd(), 0), (fd.as_raw_fd(), 1)]),
        }
        // A source that lies where another one is going would be overwritten on the way.
        let mut moved = Vec::new();
        let end = self.first_free();
        for (source, number) in &mut places {
            if *source < end && source != number {
                // SAFETY: open, and borrowed or owned until the end of this function.
                let fd = unsafe { BorrowedFd::borrow_raw(*source) };
                let copy = sys::duplicate_from(fd, end)?;
                *source = copy.as_raw_fd();
                moved.push(copy);
            }
        }
        let blocked = sys::signal_set(&LEFT_TO_SUPERVISOR);
        let start = |namespaces| {
            Start {
                path: &path,
                arguments: &argv,
                places: &places,
                blocked: &blocked,
                namespaces,
                group: self.group,
            }
            .run()
        };
        let pid = match (self.namespaces, start(self.namespaces)) {
            (Namespaces::Same, result) => result?,
            (_, Ok(pid)) => pid,
            (_, Err(refused)) => {
                let pid = start(Namespaces::Same)?;
                static REPORT: Once = Once::new();
                REPORT.call_once(|| {
                    log::warn!("this host refuses layers of the jail: pid-namespace: {refused}");
                });
                pid
            }
        };
        let program = self.path.file_name().unwrap_or(self.path.as_os_str());
        match sys::pidfd_open(pid) {
            Ok(pidfd) => Ok(Process {
                program: program.to_string_lossy().into_owned(),
                pid,
                pidfd,
                exit: None,
            }),
            Err(error) => {
                sys::kill(pid);
                Err(error)
            }
        }
    }
}

/// A child. Dropping it kills it: nothing is left behind.
#[derive(Debug)]
pub struct Process {
    program: String,
    pid: libc::pid_t,
    pidfd: OwnedFd,
    exit: Option<Exit>,
}

impl Process {
    /// How it ended, if it has.
    pub fn exit(&mut self) -> Option<Exit> {
        if self.exit.is_none() {
            // waitid fails only for a process that is not a child.
            self.exit = sys::wait(self.pidfd.as_fd(), false).unwrap_or(None);
        }
        self.exit
    }

    /// Waits for its end, at most so long.
    pub fn wait(&mut self, limit: Duration) -> Option<Exit> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Some(exit) = self.exit() {
                return Some(exit);
            }
            if left.is_zero() {
                return None;
            }
            let mut ready = [sys::readable(self.pidfd.as_fd())];
            sys::poll(&mut ready, Some(left)).ok()?;
        }
    }

    /// Kills it and waits for its end.
    pub fn kill(&mut self) {
        if self.exit().is_none() {
            sys::kill(self.pid);
            self.exit = sys::wait(self.pidfd.as_fd(), true).unwrap_or(None);
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// "PROGRAM, pid N".
    pub fn name(&self) -> String {
        format!("{}, pid {}", self.program, self.pid)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "exited with status {status}"),
            Self::Signal(libc::SIGSYS) => f.write_str(
                "was killed by SIGSYS: its jail forbids a system call, which it reports above",
            ),
            Self::Signal(signal) => write!(f, "was killed by {}", sys::signal_name(*signal)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    /// What a shell command of the child writes to its standard output.
    fn output(script: &str, fds: &[(RawFd, BorrowedFd<'_>)]) -> String {
        let file = tempfile::tempfile().unwrap();
        let mut program = Program::new(Path::new("/bin/sh"));
        program.arg("-c").arg(script);
        for (number, fd) in fds {
            program.fd(*number, *fd);
        }
        program.stdio(Stdio::Output(file.as_fd()));
        let mut process = program.start().unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)), Some(Exit::Status(0)));
        let mut text = String::new();
        let mut file = file;
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn only_the_descriptors_named_are_there() {
        sys::close_on_exec_from(3).unwrap();
        let other = tempfile::tempfile().unwrap();
        // Not a pattern: to list the folder the shell would open it.
        let text = output(
            "fd=0; while [ $fd -lt 100 ]; do [ -L /proc/$$/fd/$fd ] && echo $fd; \
             fd=$((fd + 1)); done; env; readlink /proc/$$/fd/0",
            &[(3, other.as_fd())],
        );
        // The shell sets these itself.
        let own = |line: &&str| !line.starts_with("PWD=") && !line.starts_with("_=");
        let lines: Vec<_> = text.lines().filter(own).collect();
        assert_eq!(lines, ["0", "1", "2", "3", "/dev/null"]);
    }

    #[test]
    fn descriptors_can_change_places() {
        let folder = tempfile::tempdir().unwrap();
        let open = |name: &str| File::create(folder.path().join(name)).unwrap();
        // Numbers that are each other's targets.
        let (low, high) = (
            sys::duplicate_from(open("a").as_fd(), 20).unwrap(),
            open("b"),
        );
        let high = sys::duplicate_from(high.as_fd(), 21).unwrap();
        let (a, b) = (low.as_raw_fd(), high.as_raw_fd());
        let text = output(
            &format!("readlink /proc/$$/fd/{a} /proc/$$/fd/{b}"),
            &[(b, low.as_fd()), (a, high.as_fd())],
        );
        let names: Vec<_> = text
            .lines()
            .filter_map(|line| line.rsplit('/').next())
            .collect();
        assert_eq!(names, ["b", "a"]);
    }

    /// What `script` writes as the first process of new namespaces.
    fn output_in(namespaces: Namespaces<'_>, script: &str) -> String {
        let file = tempfile::tempfile().unwrap();
        let mut program = Program::new(Path::new("/bin/sh"));
        program.arg("-c").arg(script).namespaces(namespaces);
        program.stdio(Stdio::Output(file.as_fd()));
        let mut process = program.start().unwrap();
        assert_eq!(process.wait(Duration::from_secs(10)), Some(Exit::Status(0)));
        let mut text = String::new();
        let mut file = file;
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn a_child_begins_in_its_namespaces() {
        let script = "echo $$ $PPID; readlink /proc/self/ns/user /proc/self/ns/pid; \
                      grep CapPrm /proc/self/status";
        let here = output_in(Namespaces::Same, script);
        let new = output_in(Namespaces::New, script);
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let (here, new) = (lines(&here), lines(&new));
        assert!(here[0].ends_with(&format!(" {}", std::process::id())));
        assert_eq!(new[0], "1 0");
        assert_ne!(here[1], new[1]);
        assert_ne!(here[2], new[2]);
        assert_eq!(new[3], "CapPrm:\t0000000000240100");

        let users = anemone_sandbox::id_namespace().unwrap();
        let link = std::fs::read_link(format!("/proc/self/fd/{}", users.as_raw_fd())).unwrap();
        let given = lines(&output_in(Namespaces::Users(users.as_fd()), script));
        assert_eq!(given[0], "1 0");
        assert_eq!(given[1], link.to_string_lossy());
        assert_ne!(given[2], here[2]);
    }

    #[test]
    fn a_child_begins_here_where_the_namespaces_are_refused() {
        let none = tempfile::tempfile().unwrap();
        let text = output_in(Namespaces::Users(none.as_fd()), "echo $PPID");
        assert_eq!(text.trim(), std::process::id().to_string());
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Program::new(Path::new("/no/such")).start().unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot start /no/such: No such file")
        );
    }

    #[test]
    fn a_dropped_process_is_gone() {
        let mut program = Program::new(Path::new("/bin/sleep"));
        program.arg("1000");
        let process = program.start().unwrap();
        let pid = process.pid;
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn exits_are_told_apart() {
        let mut program = Program::new(Path::new("/bin/sh"));
        program.arg("-c").arg("kill -SEGV $$");
        let exit = program
            .start()
            .unwrap()
            .wait(Duration::from_secs(10))
            .unwrap();
        assert_eq!(exit.to_string(), "was killed by SIGSEGV");
        let mut program = Program::new(Path::new("/bin/sh"));
        program.arg("-c").arg("exit 7");
        let exit = program
            .start()
            .unwrap()
            .wait(Duration::from_secs(10))
            .unwrap();
        assert_eq!(exit.to_string(), "exited with status 7");
    }
}
