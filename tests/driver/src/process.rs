//! Back ends as processes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anemone_ipc::device::{FromDevice, ToDevice};
use anemone_ipc::{CONTROL_FD, Channel};
use tempfile::TempDir;

use crate::{Device, Error, Options, Result};

/// How long a process may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A back end that listens at a socket of its own. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    folder: TempDir,
}

impl Process {
    /// Starts an Anemone device process: `binary args… --socket PATH`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(binary: impl AsRef<OsStr>, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary);
        command.args(args);
        Self::with(command, |command, socket| {
            command.arg("--socket").arg(socket);
        })
    }

    /// Starts any back end; `add_socket` adds the path at which it is to listen to its arguments.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn with(
        mut command: Command,
        add_socket: impl FnOnce(&mut Command, &Path),
    ) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        add_socket(&mut command, &folder.path().join("socket"));
        let child = command.spawn()?;
        Ok(Self { child, folder })
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// Connects to it, waiting until it listens.
    ///
    /// # Errors
    /// It has ended, or does not listen in time.
    pub fn connect(&mut self) -> Result<UnixStream> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(stream) = UnixStream::connect(self.socket()) {
                return Ok(stream);
            }
            if let Some(status) = self.child.try_wait()? {
                return Err(Error::Ended(status));
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout("it does not listen"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Connects to it and sets the device up.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect) and [`Device::connect`].
    pub fn device(&mut self, options: &Options) -> Result<Device> {
        Device::connect(self.connect()?, options)
    }

    /// The process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        wait(&mut self.child)
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        // SAFETY: no pointers; the child has not been waited for, so its number is still its own.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        self.wait()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// A device process as the supervisor starts it: control channel, and one connected socket for
/// [`connection`](Self::connection). Killed when dropped.
#[derive(Debug)]
pub struct Supervised {
    child: Child,
    /// The supervisor's end of the control channel.
    pub control: Channel,
    /// The front end's end of the first connection, until it is taken.
    pub connection: Option<UnixStream>,
}

impl Supervised {
    /// Starts `binary args… --control-fd 3 --parent-pid PID --fd 4`, with `fds` at the numbers from
    /// 5 on; standard input and output are /dev/null.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(binary: impl AsRef<OsStr>, args: &[&str], fds: Vec<OwnedFd>) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let args = [args, &["--fd", "4"]].concat();
        let nothing = BTreeMap::new();
        let mut supervised = Self::spawn(binary, &args, Some(theirs.into()), fds, &nothing)?;
        supervised.connection = Some(ours);
        Ok(supervised)
    }

    /// Like [`start`](Self::start), for a process that does not serve vhost-user: no `--fd`, and
    /// number 4 is /dev/null.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_stream(
        binary: impl AsRef<OsStr>,
        args: &[&str],
        fds: Vec<OwnedFd>,
    ) -> Result<Self> {
        Self::spawn(binary, args, None, fds, &BTreeMap::new())
    }

    /// Like [`start_stream`](Self::start_stream), in place of an earlier process that has had this
    /// kept. A process that serves vhost-user wants to be [connected](Self::connect) then.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_again(
        binary: impl AsRef<OsStr>,
        args: &[&str],
        fds: Vec<OwnedFd>,
        kept: &BTreeMap<u64, OwnedFd>,
    ) -> Result<Self> {
        Self::spawn(binary, args, None, fds, kept)
    }

    fn spawn(
        binary: impl AsRef<OsStr>,
        args: &[&str],
        connection: Option<OwnedFd>,
        fds: Vec<OwnedFd>,
        kept: &BTreeMap<u64, OwnedFd>,
    ) -> Result<Self> {
        let (control, theirs) = anemone_ipc::pair()?;
        if !kept.is_empty() {
            let keys = kept.keys().copied().collect();
            let fds: Vec<_> = kept.values().map(AsFd::as_fd).collect();
            control.send(&ToDevice::Kept { keys }, &fds)?;
        }
        let fourth = match connection {
            Some(fd) => fd,
            None => std::fs::File::open("/dev/null")?.into(),
        };
        let mut inherited = vec![theirs.into_fd(), fourth];
        inherited.extend(fds);
        // Above all target numbers, so that none is overwritten before it is copied.
        let high = CONTROL_FD + inherited.len() as RawFd;
        let mut lifted = Vec::new();
        for fd in &inherited {
            // SAFETY: no pointers.
            let fd = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, high) };
            lifted.push(crate::new_fd(fd)?);
        }
        let numbers: Vec<RawFd> = lifted.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new(binary);
        command
            .args(args)
            .args(["--control-fd", "3", "--parent-pid"])
            .arg(std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let place = move || {
            for (target, number) in (CONTROL_FD..).zip(&numbers) {
                // SAFETY: no pointers, and async-signal-safe.
                if unsafe { libc::dup2(*number, target) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure only calls dup2, which is async-signal-safe.
        let child = unsafe { command.pre_exec(place) }.spawn()?;
        drop(lifted);
        Ok(Self {
            child,
            control,
            connection: None,
        })
    }

    /// Waits until the process says that it serves.
    ///
    /// # Errors
    /// It says something else, or ends.
    pub fn ready(&self) -> Result<()> {
        match self.control.recv::<FromDevice>()?.message {
            FromDevice::Ready { .. } => Ok(()),
            _ => Err(Error::Timeout("it is not ready")),
        }
    }

    /// Sets the device up over the first connection.
    ///
    /// # Errors
    /// The connection has been taken, or as for [`Device::connect`].
    pub fn device(&mut self, options: &Options) -> Result<Device> {
        let socket = self.connection.take();
        let socket = socket.ok_or(Error::Timeout("the connection has been taken"))?;
        Device::connect(socket, options)
    }

    /// Gives the process another connection and returns the front end's end.
    ///
    /// # Errors
    /// The control channel fails.
    pub fn connect(&self) -> Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let message = ToDevice::Connect {
            socket: anemone_ipc::FdIndex(0),
        };
        self.control.send(&message, &[theirs.as_fd()])?;
        Ok(ours)
    }

    /// The process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits until it ends by itself.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        wait(&mut self.child)
    }

    /// Closes the control channel and waits until the process ends.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn close(mut self) -> Result<ExitStatus> {
        let (unused, _) = anemone_ipc::pair()?;
        drop(std::mem::replace(&mut self.control, unused));
        wait(&mut self.child)
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn wait(child: &mut Child) -> Result<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > deadline {
            return Err(Error::Timeout("it does not end"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn end(child: &mut Child) {
    // Both fail only for a process that has been waited for.
    let _ = child.kill();
    let _ = child.wait();
}
