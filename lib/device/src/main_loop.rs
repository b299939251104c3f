//! The life of a device process.

use std::error::Error;
use std::io;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;

use anemone_ipc::device::{FromDevice, ToDevice};
use anemone_ipc::{Channel, Error as ChannelError, FdIndex};

use crate::args::{self, Common, Request};
use crate::inflight::Pool;
use crate::session::Session;
use crate::{Device, Filter, Host, Program, jail};

/// After so long without an event, set-up is taken to be over.
const QUIET_MS: i32 = 500;
/// Exit status for wrong arguments and for what cannot be opened.
const EXIT_USAGE: u8 = 2;

/// Runs the process to its end: what `main` returns.
pub fn run<P: Program>() -> ExitCode {
    let name = P::ABOUT.name;
    let (program, common) = match args::parse::<P>(std::env::args_os().skip(1)) {
        Ok(Request::Serve(program, common)) => (program, common),
        Ok(Request::Print(text)) => {
            // Nobody is left to tell if standard output is closed.
            let _ = io::stdout().write_all(text.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{name}: {error}\nTry {name} --help.");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let role = match &common.id {
        Some(id) => format!("{name}[{id}]"),
        None => name.to_owned(),
    };
    anemone_log::init(&role, common.log_level);
    anemone_process::several_heaps();
    match serve(program, common) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Open(error)) => {
            log::error!("{error}");
            ExitCode::from(EXIT_USAGE)
        }
        Err(Failure::Run(error)) => {
            log::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

enum Failure {
    /// Something named on the command line cannot be used.
    Open(Box<dyn Error>),
    Run(Box<dyn Error>),
}

fn serve<P: Program>(program: P, mut common: Common) -> Result<(), Failure> {
    // What else was inherited is nobody's business here.
    anemone_sandbox::close_extra_fds(&anemone_process::inherited_fds())
        .map_err(|e| Failure::Run(e.into()))?;
    let vhost_user = program.serves_vhost_user();
    let host = Host::new(common.control.take().map(Channel::new));
    let opened = open(program, &common);
    let (device, listener) = opened.map_err(|error| {
        host.send(&FromDevice::Failed {
            message: error.to_string(),
        });
        Failure::Open(error)
    })?;
    let mut main = MainLoop {
        pool: Pool::new(device.queue_count()).map_err(|e| Failure::Run(e.into()))?,
        device,
        session: None,
        listener,
        signals: block_signals().map_err(|e| Failure::Run(e.into()))?,
        expectant: vhost_user && host.control().is_some() && common.connection.is_none(),
        interrupt_ends: host.control().is_none(),
        untrimmed: true,
        host,
    };
    main.start(&common, P::FILTER).map_err(|error| {
        main.host.send(&FromDevice::Failed {
            message: error.to_string(),
        });
        Failure::Run(error)
    })?;
    if let Some(socket) = common.connection.take() {
        main.connect(socket);
    }
    main.run().map_err(Failure::Run)
}

fn open<P: Program>(
    program: P,
    common: &Common,
) -> Result<(P::Device, Option<UnixListener>), Box<dyn Error>> {
    // The device first: a wrong image is found before the socket appears.
    let device = program.open(common)?;
    let listener = match &common.socket {
        Some(path) => Some(listen(path).map_err(|e| format!("{}: {e}", path.display()))?),
        None => None,
    };
    Ok((device, listener))
}

/// Listens at `path`, in place of a socket that nobody listens at any more.
///
/// # Errors
/// Another process listens there, or the socket cannot be made.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)
            }
            _ => Err(error),
        },
        other => other,
    }
}

/// Where an event of the main loop comes from.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signal,
    Control,
    Listener,
    Session,
    Device(u64),
}

struct MainLoop<D> {
    device: D,
    session: Option<Session>,
    /// In-flight memory for the front end.
    pool: Pool,
    listener: Option<UnixListener>,
    signals: OwnedFd,
    /// What an earlier process has had kept may still come: the device has not begun. Where there
    /// is nothing of the kind, the first connection is there from the start.
    expectant: bool,
    /// Without a supervisor the keyboard's interrupt ends the process; a supervisor receives the
    /// same interrupt and decides for its children.
    interrupt_ends: bool,
    /// Code that only the start or a request of the front end needs may be in memory.
    untrimmed: bool,
    host: Host,
}

impl<D: Device> MainLoop<D> {
    fn start(&mut self, common: &Common, filter: &'static Filter) -> Result<(), Box<dyn Error>> {
        if let Some(control) = self.host.control() {
            control.set_nonblocking(true)?;
        }
        if let Some(listener) = &self.listener {
            listener.set_nonblocking(true)?;
        }
        let landlock = jail::enter(common, &mut self.device, filter)?;
        self.device.attach(&self.host);
        self.host.send(&FromDevice::Ready { landlock });
        Ok(())
    }

    fn run(&mut self) -> Result<(), Box<dyn Error>> {
        let result = loop {
            match self.turn() {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if let Some(session) = self.session.take() {
            session.finish(&mut self.device);
        }
        result
    }

    /// Waits for events and handles them. There are few descriptors and they come and go with
    /// every callback, so the list is made anew each time instead of being kept in the kernel,
    /// where a number that is closed and used again would be lost.
    fn turn(&mut self) -> Result<ControlFlow<()>, Box<dyn Error>> {
        let mut sources = Vec::with_capacity(8);
        let mut polls: Vec<libc::pollfd> = Vec::with_capacity(8);
        let mut watch = |fd: RawFd, events, source| {
            sources.push(source);
            polls.push(libc::pollfd {
                fd,
                events,
                revents: 0,
            });
        };
        watch(self.signals.as_raw_fd(), libc::POLLIN, Source::Signal);
        if let Some(control) = self.host.control() {
            watch(control.as_fd().as_raw_fd(), libc::POLLIN, Source::Control);
        }
        match (&self.session, &self.listener) {
            (Some(session), _) => {
                watch(session.as_fd().as_raw_fd(), libc::POLLIN, Source::Session);
            }
            (None, Some(listener)) => watch(listener.as_raw_fd(), libc::POLLIN, Source::Listener),
            (None, None) => {}
        }
        if !self.expectant {
            for (fd, token) in self.device.event_fds() {
                watch(fd.as_raw_fd(), libc::POLLIN, Source::Device(token));
            }
            for (fd, token) in self.device.output_fds() {
                watch(fd.as_raw_fd(), libc::POLLOUT, Source::Device(token));
            }
        }
        let timeout = match self.untrimmed || cfg!(feature = "compromised") {
            true => QUIET_MS,
            false => -1,
        };
        // SAFETY: `polls` is an array of pollfd of the length given.
        let n = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
        if n == 0 {
            self.untrimmed = false;
            anemone_process::release_memory();
            #[cfg(feature = "compromised")]
            if self.session.as_ref().is_some_and(Session::serves) {
                anemone_compromised::serving(anemone_log::role());
            }
        }
        if n < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => Ok(ControlFlow::Continue(())),
                _ => Err(error.into()),
            };
        }
        for (poll, source) in polls.iter().zip(sources) {
            if poll.revents & libc::POLLNVAL != 0 {
                return Err(format!("{source:?} watches a closed descriptor {}", poll.fd).into());
            }
            if poll.revents != 0 && self.handle(source)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn handle(&mut self, source: Source) -> Result<ControlFlow<()>, Box<dyn Error>> {
        match source {
            Source::Signal => return self.take_signal(),
            Source::Control => return self.take_control_message(),
            Source::Listener => {
                if let Some(listener) = &self.listener
                    && let Ok((socket, _)) = listener.accept()
                {
                    self.connect(socket.into());
                }
            }
            Source::Session => self.serve_session(),
            Source::Device(token) => self.device.handle_event(token),
        }
        Ok(match self.host.quits() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })
    }

    fn serve_session(&mut self) {
        let Some(session) = &mut self.session else {
            return;
        };
        self.untrimmed = true;
        match session.handle_requests(&mut self.device, &mut self.pool) {
            Ok(()) => return,
            Err(anemone_vhost_user::Error::Closed) => log::debug!("the front end has gone"),
            Err(error) => anemone_log::warn_limited!("connection ended: {error}"),
        }
        self.disconnect();
    }

    fn connect(&mut self, socket: OwnedFd) {
        self.disconnect();
        self.expectant = false;
        let socket = UnixStream::from(socket);
        self.session = Some(Session::new(socket, &self.device, &self.host));
    }

    fn disconnect(&mut self) {
        if let Some(session) = self.session.take() {
            session.end(&mut self.device);
        }
    }

    fn take_signal(&mut self) -> Result<ControlFlow<()>, Box<dyn Error>> {
        // SAFETY: an all-zero signalfd_siginfo is valid; it is plain numbers.
        let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
        let size = size_of_val(&info);
        // SAFETY: the buffer is as long as the length given.
        let n = unsafe { libc::read(self.signals.as_raw_fd(), (&raw mut info).cast(), size) };
        let interrupt = info.ssi_signo == libc::SIGINT as u32;
        if usize::try_from(n) == Ok(size) && (!interrupt || self.interrupt_ends) {
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    }

    fn take_control_message(&mut self) -> Result<ControlFlow<()>, Box<dyn Error>> {
        let Some(control) = self.host.control() else {
            return Ok(ControlFlow::Continue(()));
        };
        let mut received = match control.recv::<ToDevice>() {
            Ok(received) => received,
            Err(ChannelError::Closed) => return Ok(ControlFlow::Break(())),
            Err(error) if error.is_would_block() => return Ok(ControlFlow::Continue(())),
            Err(error) => return Err(error.into()),
        };
        match received.message {
            ToDevice::Connect { socket } => {
                let socket = received.take(socket)?;
                self.connect(socket);
            }
            ToDevice::Kept { ref keys } => {
                for (index, key) in (0..).zip(keys.clone()) {
                    let fd = received.take(FdIndex(index))?;
                    self.device.restore(key, fd);
                }
            }
            ToDevice::Dialed { id, socket } => {
                let socket = socket.map(|index| received.take(index)).transpose()?;
                self.device.dialed(id, socket);
            }
            ToDevice::Balloon { target } => self.device.balloon(target),
            ToDevice::WindowSize { columns, rows } => self.device.window_size(columns, rows),
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// Keeps SIGINT and SIGTERM from all threads and makes them readable from a descriptor.
fn block_signals() -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use and outlives the calls; a
    // non-negative result of signalfd is a new descriptor.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        let rc = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        if rc != 0 {
            return Err(io::Error::from_raw_os_error(rc));
        }
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
