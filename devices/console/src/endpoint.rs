//! The host's side of the console. A peer that goes away never is an error: what is written while
//! nobody is there is lost, as on a serial line with nothing plugged in.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use anemone_device::{Timer, Watch};
use anemone_log::warn_limited;

use crate::state::{CAPACITY, Lane, State};
use crate::sys;

/// Token of the descriptor that can be read.
pub const INPUT: u64 = 10;
/// Token of the descriptor that can be written.
pub const OUTPUT: u64 = 11;
/// Token of what tells that a peer may have come.
pub const ARRIVAL: u64 = 12;

/// Between two looks whether somebody has opened the pseudo-terminal; the kernel does not tell.
const PTY_NAP: Duration = Duration::from_millis(250);
/// Most bytes in one write that may wait. A pipe or terminal that another process keeps in blocking mode takes
/// so many without waiting once it has said that it can be written.
const CAREFUL_SIZE: usize = 256;

/// Where the console's bytes come from and go to.
pub struct Endpoint {
    kind: Kind,
    /// Restores the terminal at the end.
    _raw_mode: Option<sys::RawMode>,
    size: Option<(u16, u16)>,
}

enum Kind {
    /// Separate descriptors; each is dropped when its peer has gone, for good.
    Pair {
        input: Option<File>,
        output: Option<File>,
        /// Writing may wait, so it is done in small pieces.
        careful: bool,
        /// The output is appended to a file.
        appends: bool,
    },
    /// The master of a pseudo-terminal; the timer runs while nobody has the other side open.
    Pty { master: File, absent: Timer },
    /// One client at a time; others wait until it leaves.
    Unix {
        listener: UnixListener,
        client: Option<UnixStream>,
    },
}

impl Endpoint {
    /// Inherited descriptors.
    pub fn pair(input: Option<OwnedFd>, output: OwnedFd) -> io::Result<Self> {
        let size = input.as_ref().and_then(|fd| sys::window_size(fd.as_fd()));
        let input = input.map(|fd| sys::nonblocking(fd, false)).transpose()?;
        let appends = sys::appends(output.as_fd())?;
        let (output, careful) = sys::nonblocking(output, true)?;
        let kind = Kind::Pair {
            input: input.map(|(fd, _)| fd.into()),
            output: Some(output.into()),
            careful,
            appends,
        };
        Ok(Self {
            kind,
            _raw_mode: None,
            size,
        })
    }

    /// The process's own standard streams; a terminal is in raw mode until the end.
    pub fn stdio(input: OwnedFd, output: OwnedFd) -> io::Result<Self> {
        let raw_mode = sys::RawMode::enter(input.as_fd())?;
        let mut endpoint = Self::pair(Some(input), output)?;
        endpoint._raw_mode = raw_mode;
        Ok(endpoint)
    }

    /// The master of a pseudo-terminal. Somebody may have opened it while an earlier process served
    /// it.
    pub fn pty(master: OwnedFd) -> io::Result<Self> {
        sys::prepare_pty(master.as_fd())?;
        sys::set_nonblocking(master.as_fd())?;
        let mut absent = Timer::new()?;
        if sys::poll(master.as_fd(), 0, 0) & libc::POLLHUP != 0 {
            absent.set(PTY_NAP)?;
        }
        let kind = Kind::Pty {
            master: master.into(),
            absent,
        };
        Ok(Self {
            kind,
            _raw_mode: None,
            size: None,
        })
    }

    /// A listening socket.
    pub fn unix(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let kind = Kind::Unix {
            listener,
            client: None,
        };
        Ok(Self {
            kind,
            _raw_mode: None,
            size: None,
        })
    }

    /// Columns and rows of the terminal behind it, if it is one.
    pub fn size(&self) -> Option<(u16, u16)> {
        self.size
    }

    /// What to watch for input, if any can be taken, and for arrivals.
    pub fn watch_input(&self, wanted: bool) -> Option<Watch<'_>> {
        let input = match &self.kind {
            Kind::Pair { input, .. } => input.as_ref().map(File::as_fd),
            Kind::Pty { master, absent } => match absent.watch() {
                Some(timer) => return Some((timer, ARRIVAL)),
                None => Some(master.as_fd()),
            },
            Kind::Unix { listener, client } => match client {
                Some(client) => Some(client.as_fd()),
                None => return Some((listener.as_fd(), ARRIVAL)),
            },
        };
        input.filter(|_| wanted).map(|fd| (fd, INPUT))
    }

    /// What can be written, if somebody is there.
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Pair { output, .. } => output.as_ref().map(File::as_fd),
            Kind::Pty { master, absent } => match absent.watch() {
                Some(_) => None,
                None => Some(master.as_fd()),
            },
            Kind::Unix { client, .. } => client.as_ref().map(UnixStream::as_fd),
        }
    }

    /// Reads what has been typed; the number of bytes, 0 for none. [`State::put_input`] counts them.
    pub fn read(&mut self, state: &mut State, buffer: &mut [u8]) -> usize {
        if buffer.is_empty() {
            return 0;
        }
        let result = match &mut self.kind {
            Kind::Pair {
                input: Some(file), ..
            } => file.read(buffer),
            Kind::Pty { master, absent } if absent.watch().is_none() => master.read(buffer),
            Kind::Unix {
                client: Some(client),
                ..
            } => state.receive(Lane::Input, client.as_fd(), buffer),
            _ => return 0,
        };
        match result {
            Ok(n) if n > 0 => n,
            Err(error) if is_temporary(&error) => 0,
            // The end, or an error, which ends it as well (a pseudo-terminal says EIO).
            _ => {
                self.input_gone();
                0
            }
        }
    }

    /// Writes some of the output; whether the peer has taken any.
    pub fn write(&mut self, state: &mut State) -> bool {
        if let Kind::Pty { master, .. } = &self.kind
            && sys::poll(master.as_fd(), 0, 0) & libc::POLLHUP != 0
        {
            // The kernel would keep the bytes for whoever comes next, and then stop taking any.
            self.input_gone();
        }
        let limit = match &self.kind {
            Kind::Pair { careful: true, .. } => CAREFUL_SIZE,
            _ => CAPACITY,
        };
        let result = match &self.kind {
            Kind::Pair {
                output: Some(file),
                appends: true,
                ..
            } => state.append(file),
            _ => match self.output() {
                Some(output) => state.send(output, limit),
                None => {
                    state.skip_output(CAPACITY);
                    return true;
                }
            },
        };
        match result {
            Ok(n) => n > 0,
            Err(error) if is_temporary(&error) => false,
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                warn_limited!("console output is lost: {error}");
                state.skip_output(limit);
                true
            }
            Err(error) => {
                log::debug!("console output: {error}");
                match &mut self.kind {
                    Kind::Pair { output, .. } => *output = None,
                    _ => self.input_gone(),
                }
                state.skip_output(CAPACITY);
                true
            }
        }
    }

    /// The output goes on that an earlier process may have been writing.
    pub fn resume(&self, state: &mut State) {
        if let Kind::Pair {
            output: Some(file),
            appends: true,
            ..
        } = &self.kind
        {
            state.resolve_append(file);
        }
    }

    /// The client of the socket, if there is one.
    pub fn client(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Unix { client, .. } => client.as_ref().map(UnixStream::as_fd),
            _ => None,
        }
    }

    /// Goes on with the client of an earlier process.
    pub fn restore_client(&mut self, fd: OwnedFd) {
        if let Kind::Unix { client, .. } = &mut self.kind {
            let socket = UnixStream::from(fd);
            match socket.set_nonblocking(true) {
                Ok(()) => *client = Some(socket),
                Err(error) => log::error!("console client: {error}"),
            }
        }
    }

    /// The peer has gone; another may come where that is possible.
    fn input_gone(&mut self) {
        match &mut self.kind {
            Kind::Pair { input, .. } => *input = None,
            Kind::Pty { absent, .. } => nap(absent),
            Kind::Unix { client, .. } => *client = None,
        }
    }

    /// Something watched for arrivals is ready.
    pub fn arrival(&mut self) {
        match &mut self.kind {
            Kind::Pair { .. } => {}
            Kind::Pty { master, absent } => {
                let expired = absent.expired();
                if expired && sys::poll(master.as_fd(), 0, 0) & libc::POLLHUP != 0 {
                    nap(absent);
                }
            }
            Kind::Unix { listener, client } => {
                if client.is_none()
                    && let Ok((socket, _)) = listener.accept()
                {
                    match socket.set_nonblocking(true) {
                        Ok(()) => *client = Some(socket),
                        Err(error) => log::error!("console client: {error}"),
                    }
                }
            }
        }
    }
}

fn nap(timer: &mut Timer) {
    if let Err(error) = timer.set(PTY_NAP) {
        log::error!("the timer does not start: {error}");
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
