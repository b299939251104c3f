//! The process of passt.

use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;

/// How long passt may take until it listens.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause before another look whether it does.
const GLANCE: Duration = Duration::from_millis(2);
/// Lines of passt's messages that are kept.
const LINES: usize = 8;

/// passt cannot be used.
#[derive(Debug, Error)]
pub enum StartError {
    /// The folder of its socket cannot be made.
    #[error("{}: {source}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It cannot be started.
    #[error("{}: {source} (for root, passt runs as the user nobody)", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It ended before it listened.
    #[error("{0}")]
    Ended(String),
    /// It does not listen.
    #[error("passt does not listen within {} seconds", PATIENCE.as_secs())]
    Silent,
}

/// What passt is told.
#[derive(Debug)]
pub struct Settings {
    /// The program.
    pub program: PathBuf,
    /// Its options.
    pub forwarding: Forwarding,
}

/// Which ports it forwards, and what it tells the guest.
#[derive(Debug, Default)]
pub struct Forwarding {
    /// Largest IP packet.
    pub mtu: Option<u16>,
    /// In the form of passt's options.
    pub tcp: Vec<String>,
    /// The same.
    pub udp: Vec<String>,
    /// Packets to the gateway go to this host's loopback.
    pub host_loopback: bool,
}

impl Forwarding {
    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["--foreground".to_owned(), "--quiet".to_owned()];
        let mut option = |name: &str, value: &str| {
            arguments.extend([name.to_owned(), value.to_owned()]);
        };
        if let Some(mtu) = self.mtu {
            option("--mtu", &mtu.to_string());
        }
        for (name, ports) in [("--tcp-ports", &self.tcp), ("--udp-ports", &self.udp)] {
            // Without a word of its own, UDP follows TCP.
            if ports.is_empty() {
                option(name, "none");
            }
            for spec in ports {
                option(name, spec);
            }
        }
        if !self.host_loopback {
            arguments.push("--no-map-gw".to_owned());
        }
        arguments
    }
}

/// A folder that nobody else can look into, removed when dropped.
#[derive(Debug)]
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self, StartError> {
        // Names are not secret: the folder is made new, or not at all.
        let mut number = 0;
        loop {
            let name = format!("anemone-passt-{}-{number}", std::process::id());
            let path = Path::new("/tmp").join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(source) => return Err(StartError::Folder { path, source }),
            }
        }
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let removed = fs::remove_dir_all(&self.0);
        if let Err(error) = removed {
            log::warn!("{}: {error}", self.0.display());
        }
    }
}

/// A running passt, killed when dropped.
#[derive(Debug)]
pub struct Passt {
    child: Child,
    pidfd: OwnedFd,
    messages: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
    folder: Folder,
}

impl Passt {
    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// It does not; what it said is part of the message.
    pub fn start(settings: &Settings) -> Result<Self, StartError> {
        let folder = Folder::make()?;
        let fail = |source| StartError::Program {
            program: settings.program.clone(),
            source,
        };
        let mut command = Command::new(&settings.program);
        command
            .args(settings.forwarding.arguments())
            .arg("--socket")
            .arg(folder.socket())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: getpid has no arguments.
        let parent = unsafe { libc::getpid() };
        let die_with_parent = move || {
            // SAFETY: no pointers, and async-signal-safe.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                match libc::getppid() == parent {
                    true => Ok(()),
                    false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
                }
            }
        };
        // SAFETY: the closure only makes system calls that are async-signal-safe.
        let spawned = unsafe { command.pre_exec(die_with_parent) }.spawn();
        let mut child = spawned.map_err(fail)?;
        let pidfd = pidfd_open(child.id()).map_err(fail)?;
        let messages = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stderr.take().map(|stderr| {
            let messages = Arc::clone(&messages);
            thread::spawn(move || listen(stderr, &messages))
        });
        let mut passt = Self {
            child,
            pidfd,
            messages,
            reader,
            folder,
        };
        let deadline = Instant::now() + PATIENCE;
        while !passt.folder.socket().exists() {
            if passt.child.try_wait().map_err(fail)?.is_some() {
                return Err(StartError::Ended(passt.obituary()));
            }
            if Instant::now() > deadline {
                return Err(StartError::Silent);
            }
            thread::sleep(GLANCE);
        }
        Ok(passt)
    }

    /// Readable when it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it has ended, and its last words.
    pub fn obituary(mut self) -> String {
        let _ = self.child.kill();
        let status = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = match status {
            Ok(status) => describe(status),
            Err(error) => format!("has ended: {error}"),
        };
        match messages.is_empty() {
            true => format!("passt {ended}"),
            false => format!("passt {ended}: {}", messages.join("; ")),
        }
    }

    /// A new connection. passt has one client at a time: it takes this one once it has noticed that
    /// the one before is gone, and closes it before that.
    pub fn connect(&self) -> io::Result<OwnedFd> {
        // What it said while it started is of no concern once it serves.
        self.messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        let path = self.folder.socket();
        // SAFETY: all-zero is a valid sockaddr_un; it is plain numbers.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        let bytes = path.as_os_str().as_bytes();
        if bytes.len() >= address.sun_path.len() {
            return Err(io::ErrorKind::InvalidFilename.into());
        }
        for (to, from) in address.sun_path.iter_mut().zip(bytes) {
            *to = from.cast_signed();
        }
        let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the address is valid and as long as the length says; the socket is new and ours.
        // Non-blocking, so that a passt that takes no connections does not keep this process.
        unsafe {
            let fd = libc::socket(libc::AF_UNIX, flags, 0);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let socket = OwnedFd::from_raw_fd(fd);
            let length = size_of_val(&address) as libc::socklen_t;
            match libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) {
                0 => Ok(socket),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // Both fail only for a process that has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "has ended".to_owned(),
    }
}

/// Keeps the last lines that passt says, and logs them.
fn listen(stderr: impl io::Read, messages: &Mutex<Vec<String>>) {
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        let line: String = line.chars().filter(|c| !c.is_control()).take(200).collect();
        if line.trim().is_empty() {
            continue;
        }
        log::info!("passt: {line}");
        let mut messages = messages.lock().unwrap_or_else(PoisonError::into_inner);
        if messages.len() == LINES {
            messages.remove(0);
        }
        messages.push(line.trim().to_owned());
    }
}

fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the call makes a descriptor (closed on exec) or fails.
    unsafe {
        match libc::syscall(libc::SYS_pidfd_open, pid, 0) {
            fd @ 0.. => Ok(OwnedFd::from_raw_fd(fd as libc::c_int)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_say_what_is_not_forwarded() {
        let mut forwarding = Forwarding::default();
        let line = |f: &Forwarding| f.arguments().join(" ");
        assert_eq!(
            line(&forwarding),
            "--foreground --quiet --tcp-ports none --udp-ports none --no-map-gw"
        );
        forwarding.tcp = vec!["127.0.0.1/8080:80".to_owned(), "22".to_owned()];
        forwarding.mtu = Some(9000);
        forwarding.host_loopback = true;
        assert_eq!(
            line(&forwarding),
            "--foreground --quiet --mtu 9000 --tcp-ports 127.0.0.1/8080:80 --tcp-ports 22 \
             --udp-ports none"
        );
    }

    #[test]
    fn what_a_program_says_before_it_ends_is_kept() {
        let settings = |program: &str| Settings {
            program: program.into(),
            forwarding: Forwarding::default(),
        };
        let error = Passt::start(&settings("/no/such/passt")).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("/no/such/passt: No such file"),
            "{error}"
        );
        // It does not know the options.
        let error = Passt::start(&settings("/bin/ls")).unwrap_err().to_string();
        assert!(error.starts_with("passt exited with status 2: "), "{error}");
    }
}
