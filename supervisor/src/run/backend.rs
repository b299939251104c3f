//! The back end of one device: opened, started, connected.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anemone_config::{self as config, Device, Kind, RestartLimit, SerialPort, Vm};
use anemone_ipc::device::{Balloon, ToDevice};
use anemone_ipc::{Channel, FdIndex};

use crate::accel::Environment;
use crate::cgroup;
use crate::clone::Namespaces;
use crate::error::{Error, system};
use crate::files::{self, PmemFile};
use crate::net::{self, OpenCard};
use crate::programs::Programs;
use crate::reach::Place;
use crate::registry;
use crate::sink::{self, OpenSink};
use crate::spawn::{Process, Program};
use crate::sys::{self, Exit};
use crate::vmm::control_options;
use crate::wiring::PmemFiles;

use super::dial::Dialer;
use super::kept::Kept;
use super::restart::Restarts;

/// A process that dies closes its channels a moment before it can be waited for.
const ENDING: Duration = Duration::from_millis(50);
/// Time that a process which has been asked to end may take for what is in flight.
const PLANNED_LIMIT: Duration = Duration::from_secs(10);

/// A back end whose files are open and whose program has been found, but which does not run yet.
#[derive(Debug)]
pub struct Prepared {
    id: String,
    service: Service,
}

/// Who will serve.
#[derive(Debug)]
enum Service {
    /// A process to be started.
    Start { path: PathBuf, part: Part },
    /// A program that listens at this path, connected.
    Connected { path: PathBuf, stream: UnixStream },
}

/// What a process is given besides its connection.
#[derive(Debug)]
enum Part {
    Disk {
        image: OwnedFd,
        readonly: bool,
        serial: Option<String>,
        queues: u16,
    },
    Console(OpenSink),
    Serial(OpenSink),
    Rng(Option<config::Size>),
    Balloon {
        size: u64,
        deflate_on_oom: bool,
        reporting: bool,
        stats_interval: Option<u16>,
    },
    Pmem {
        file: OwnedFd,
        readonly: bool,
    },
    Vsock(Dialer),
    Share {
        directory: OwnedFd,
        namespace: Option<OwnedFd>,
        share: Box<config::Share>,
    },
    Net(OpenCard),
}

impl Prepared {
    /// Opens what a virtio device needs, or connects to the back end that has it.
    pub fn device(
        device: &Device,
        pmem: Option<&PmemFile>,
        programs: &Programs,
    ) -> Result<Self, Error> {
        let id = device.id.to_string();
        let binary = match &device.backend {
            config::Backend::Process(binary) => binary.as_deref(),
            config::Backend::Socket(path) => {
                let stream = files::connect(&id, path)?;
                let path = path.clone();
                return Ok(Self {
                    id,
                    service: Service::Connected { path, stream },
                });
            }
        };
        let path = find(programs, &device.kind, binary)?;
        let part = match &device.kind {
            Kind::Disk {
                path,
                readonly,
                serial,
            } => Part::Disk {
                image: open_image(&id, path.clone().unwrap_or_default(), *readonly)?.into(),
                readonly: *readonly,
                serial: serial.clone(),
                queues: device.queues,
            },
            Kind::Console { sink } => {
                let sink = sink.as_ref().unwrap_or(&config::Sink::Stdio);
                Part::Console(sink::open(&id, sink)?)
            }
            Kind::Rng { rate } => Part::Rng(*rate),
            &Kind::Balloon {
                size,
                deflate_on_oom,
                reporting,
                stats_interval,
            } => Part::Balloon {
                size,
                deflate_on_oom,
                reporting,
                stats_interval,
            },
            Kind::Pmem { readonly, .. } => Part::Pmem {
                file: clone_of(pmem)?,
                readonly: *readonly,
            },
            Kind::External { .. } => {
                let text = format!("device `{id}`: its back end is always a socket");
                return Err(Error::Failed(text));
            }
            Kind::Fs(share) => {
                let path = share.path.clone().unwrap_or_default();
                Part::Share {
                    directory: files::open_share(&id, &path, share)?,
                    // Made while this process still has its capabilities, for every process that
                    // will serve the share.
                    namespace: anemone_sandbox::id_namespace()
                        .inspect_err(|e| log::debug!("{id}: no user namespace: {e}"))
                        .ok(),
                    share: Box::new(share.clone()),
                }
            }
            Kind::Vsock { cid, socket } => Part::Vsock(Dialer::open(&id, *cid, socket)?),
            Kind::Net(card) => Part::Net(net::open(&id, card, programs)?),
        };
        Ok(Self {
            id,
            service: Service::Start { path, part },
        })
    }

    /// Opens what the 16550 needs.
    pub fn serial(port: &SerialPort, programs: &Programs) -> Result<Self, Error> {
        let id = port.id.to_string();
        let kind = Kind::Console { sink: None };
        Ok(Self {
            service: Service::Start {
                path: find(programs, &kind, port.binary.as_deref())?,
                part: Part::Serial(sink::open(&id, &port.sink)?),
            },
            id,
        })
    }

    /// Starts the process, if it is one to start. The second result is the VMM's end of the
    /// connection.
    pub fn start(
        self,
        environment: Environment<'_>,
        limit: RestartLimit,
    ) -> Result<(Backend, UnixStream), Error> {
        let (service, stream) = match self.service {
            Service::Start { path, part } => {
                let (ours, theirs) = UnixStream::pair().map_err(system("socketpair"))?;
                let serial = matches!(part, Part::Serial(_));
                let mut child = Child {
                    path,
                    kept: Kept::new(part.kept_room()),
                    part,
                    process: None,
                    channel: None,
                    ready: false,
                    landlock: 0,
                    stream: None,
                    next: None,
                    restarts: Restarts::new(limit, Instant::now()),
                    balloon: None,
                    due: None,
                    planned: None,
                };
                if serial {
                    child.stream = Some(theirs);
                    child.start(&self.id, environment, None)?;
                } else {
                    child.start(&self.id, environment, Some(&theirs))?;
                }
                (Running::Child(Box::new(child)), ours)
            }
            Service::Connected { path, stream } => {
                (Running::Elsewhere(External::new(path)), stream)
            }
        };
        let backend = Backend {
            id: self.id,
            service,
            connection: 0,
            lost_at: None,
            pause: None,
        };
        Ok((backend, stream))
    }
}

impl Part {
    /// How many descriptors its process may have kept for the next one.
    fn kept_room(&self) -> usize {
        match self {
            Self::Disk { .. }
            | Self::Rng(_)
            | Self::Balloon { .. }
            | Self::Pmem { .. }
            | Self::Net(_) => 4,
            // Memory with its state, and the client of a socket.
            Self::Console(_) | Self::Serial(_) => 8,
            // A descriptor for each connection.
            Self::Vsock(_) => 4096,
            // Its tables, and a descriptor for each open file. Beyond that they are opened by name.
            Self::Share { .. } => 8192,
        }
    }

    fn pass<'a>(&'a self, program: &mut Program<'a>) {
        match self {
            Self::Disk {
                image,
                readonly,
                serial,
                queues,
            } => {
                program
                    .fd_option("--image-fd", image.as_fd())
                    .option("--queues", queues);
                if *readonly {
                    program.arg("--readonly");
                }
                if let Some(serial) = serial {
                    program.option("--serial", serial);
                }
            }
            Self::Console(sink) | Self::Serial(sink) => sink.pass(program),
            Self::Rng(Some(rate)) => {
                program.option("--rate", rate.0);
            }
            Self::Rng(None) => {}
            Self::Balloon {
                size,
                deflate_on_oom,
                reporting,
                stats_interval,
            } => {
                program.option("--target", size);
                if *deflate_on_oom {
                    program.arg("--deflate-on-oom");
                }
                if *reporting {
                    program.arg("--reporting");
                }
                if let Some(seconds) = stats_interval {
                    program.option("--stats-interval", seconds);
                }
            }
            Self::Pmem { file, readonly } => {
                program.fd_option("--file-fd", file.as_fd());
                if *readonly {
                    program.arg("--readonly");
                }
            }
            Self::Vsock(dialer) => dialer.pass(program),
            Self::Share {
                directory,
                namespace,
                share,
            } => {
                program
                    .fd_option("--directory-fd", directory.as_fd())
                    .option("--tag", &share.tag)
                    .option("--cache", share.cache)
                    .option("--owner", share.owner)
                    .option("--queues", share.queues);
                if let Some(namespace) = namespace {
                    program
                        .namespaces(Namespaces::Users(namespace.as_fd()))
                        .fd_option("--namespace-fd", namespace.as_fd());
                }
                if share.readonly {
                    program.arg("--readonly");
                }
                for (name, map) in [("--uid-map", &share.uid_map), ("--gid-map", &share.gid_map)] {
                    if let Some(map) = map {
                        program.option(name, map);
                    }
                }
            }
            Self::Net(card) => card.pass(program),
        }
    }
}

fn find(programs: &Programs, kind: &Kind, binary: Option<&Path>) -> Result<PathBuf, Error> {
    // Another program can serve a device whose own back end is not in the build.
    let program = match binary {
        Some(_) => "",
        None => registry::device(registry::name_of(kind))?.program,
    };
    Ok(programs.find(program, binary)?)
}

fn open_image(id: &str, path: PathBuf, readonly: bool) -> Result<File, Error> {
    let file = files::open_image(id, &path, readonly)?;
    files::lock_image(&format!("disk `{id}`"), &path, &file, readonly)?;
    Ok(file)
}

/// The file that the VMM maps, for the process that flushes it.
fn clone_of(pmem: Option<&PmemFile>) -> Result<OwnedFd, Error> {
    match pmem {
        Some(pmem) => Ok(pmem.file.try_clone().map_err(system("dup"))?.into()),
        None => Err(Error::Failed("persistent memory without a file".to_owned())),
    }
}

/// Opens what all devices of the VM need, in the order of [`Vm::devices`] and then the 16550.
pub fn prepare(vm: &Vm, pmem: &PmemFiles, programs: &Programs) -> Result<Vec<Prepared>, Error> {
    let devices = vm
        .devices
        .iter()
        .enumerate()
        .map(|(index, device)| Prepared::device(device, pmem.of(index), programs));
    let serial = vm
        .serial
        .iter()
        .map(|port| Prepared::serial(port, programs));
    devices.chain(serial).collect()
}

/// A back end at work, or on its way back to it.
#[derive(Debug)]
pub struct Backend {
    /// Name of the device.
    pub id: String,
    /// Who serves.
    pub service: Running,
    /// Number of the VMM's connection to it.
    pub connection: u32,
    /// Since when the guest has waited for it.
    pub lost_at: Option<Instant>,
    /// How long the guest has waited for it the last time.
    pub pause: Option<Duration>,
}

/// Who serves a device.
#[derive(Debug)]
pub enum Running {
    /// A process of this program.
    Child(Box<Child>),
    /// A program that somebody else has started.
    Elsewhere(External),
}

/// A device process, and what it takes to start it again.
#[derive(Debug)]
pub struct Child {
    path: PathBuf,
    part: Part,
    /// The process; none while it is to be started again.
    pub process: Option<Process>,
    /// The channel to it, non-blocking; closing it ends the process.
    pub channel: Option<Channel>,
    /// It has said that it serves.
    pub ready: bool,
    /// Version of Landlock's interface that its jail uses, as it has told with that.
    pub landlock: u32,
    /// Its end of the byte stream of the 16550, which one process after the other serves.
    stream: Option<UnixStream>,
    /// A connection for the next process, whose other end a VMM that is starting has already.
    pub next: Option<UnixStream>,
    /// What the next process is to get of this one.
    pub kept: Kept,
    /// How often it was started again.
    pub restarts: Restarts,
    /// The state of the balloon as last told, where it is one.
    pub balloon: Option<Balloon>,
    /// When it is to be started again.
    pub due: Option<Instant>,
    /// It has been asked to end, so that another one can take its place; until when it may take.
    pub planned: Option<Instant>,
}

impl Child {
    /// The program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has the process finish what is in flight and end. Another one will take its place.
    pub fn end_as_planned(&mut self, now: Instant) {
        if self.process.is_some() {
            self.channel = None;
            self.planned = Some(now + PLANNED_LIMIT);
        }
    }

    /// What its process may open by name.
    pub fn reaches(&self) -> Vec<String> {
        match &self.part {
            Part::Share { share, .. } => vec![Place::of_share(share).text()],
            _ => Vec::new(),
        }
    }

    /// Whether it is a memory balloon.
    pub fn is_balloon(&self) -> bool {
        matches!(self.part, Part::Balloon { .. })
    }

    /// Connects its guest to a socket of the host; false if it has no sockets.
    pub fn dial(&mut self, id: u64, port: u32) -> bool {
        match (&mut self.part, &self.channel) {
            (Part::Vsock(dialer), Some(channel)) => {
                dialer.answer(channel, id, port);
                true
            }
            (Part::Vsock(_), None) => true,
            _ => false,
        }
    }

    /// Starts the process. The first one gets its connection right away.
    pub fn start(
        &mut self,
        id: &str,
        environment: Environment<'_>,
        connection: Option<&UnixStream>,
    ) -> Result<(), Error> {
        let (channel, far) = anemone_ipc::pair().map_err(system("socketpair"))?;
        channel
            .set_nonblocking(true)
            .map_err(system("socketpair"))?;
        let far = far.into_fd();
        let mut program = Program::new(&self.path);
        control_options(&mut program, &far, environment);
        program.option("--id", id);
        let groups = environment.groups;
        program.group(groups.and_then(|groups| groups.procs(&cgroup::of_device(id))));
        if let Some(stream) = &self.stream {
            program.fd_option("--stream-fd", stream.as_fd());
        } else if let Some(connection) = connection {
            program.fd_option("--fd", connection.as_fd());
        }
        self.part.pass(&mut program);
        self.due = None;
        self.ready = false;
        // Who has no connection to wait for begins at once: what was kept has to be there already.
        // To the others it goes while they take it, there may be much.
        let early = self.is_stream();
        let mut given = Ok(());
        if early {
            given = self.kept.give(&channel);
        }
        self.process = Some(program.start()?);
        if !early {
            given = self.kept.give(&channel);
        }
        self.channel = Some(channel);
        unless_closed(given)
    }

    /// Ends the process if it does not end by itself right now. Returns "NAME, pid N" and how it
    /// ended, unless this is what has ended it.
    pub fn stop(&mut self) -> (String, Option<Exit>) {
        self.ready = false;
        let Some(mut process) = self.process.take() else {
            return (String::new(), None);
        };
        let exit = process.wait(ENDING);
        process.kill();
        // Only now: a process whose channel closes ends as if all were well.
        self.channel = None;
        (process.name(), exit)
    }

    /// Whether it serves the byte stream of the 16550, over which no vhost-user is spoken.
    pub fn is_stream(&self) -> bool {
        self.stream.is_some()
    }

    /// Whether it owns standard input and output.
    pub fn on_stdio(&self) -> bool {
        match &self.part {
            Part::Console(sink) | Part::Serial(sink) => sink.is_stdio(),
            _ => false,
        }
    }

    /// Sends a message; a child that is too slow to take it misses it.
    pub fn tell(&self, message: &ToDevice, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        match &self.channel {
            Some(channel) => Ok(channel.send(message, fds)?),
            None => Ok(()),
        }
    }

    /// Has it serve a connection, now or as soon as it runs.
    pub fn connect(&mut self, connection: UnixStream) -> Result<(), Error> {
        if self.process.is_none() {
            self.next = Some(connection);
            return Ok(());
        }
        let Some(channel) = &self.channel else {
            return Ok(());
        };
        let socket = FdIndex(0);
        unless_closed(channel.send(&ToDevice::Connect { socket }, &[connection.as_fd()]))
    }
}

/// A process that has closed its channel is on its way out, which is seen next.
fn unless_closed(outcome: Result<(), anemone_ipc::Error>) -> Result<(), Error> {
    match outcome {
        Ok(()) | Err(anemone_ipc::Error::Closed) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A program that somebody else has started.
#[derive(Debug)]
pub struct External {
    path: PathBuf,
    /// When to try to connect to it.
    pub due: Option<Instant>,
    pause: Duration,
    /// How often it was connected to again.
    pub reconnections: u64,
}

impl External {
    /// The pause after the first attempt that fails; it doubles from one to the next.
    const FIRST_PAUSE: Duration = Duration::from_millis(50);
    const LONGEST_PAUSE: Duration = Duration::from_secs(2);

    fn new(path: PathBuf) -> Self {
        Self {
            path,
            due: None,
            pause: Self::FIRST_PAUSE,
            reconnections: 0,
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// It serves the guest: the next loss is a new one.
    pub fn serves(&mut self) {
        self.pause = Self::FIRST_PAUSE;
    }

    /// Tries again after a pause.
    pub fn later(&mut self, now: Instant) {
        self.due = Some(now + self.pause);
        self.pause = (self.pause * 2).min(Self::LONGEST_PAUSE);
    }

    /// Tries to connect, without waiting. There is no limit of time: it is not this program that
    /// starts it again.
    pub fn connect(&mut self, now: Instant) -> io::Result<UnixStream> {
        let outcome = sys::connect_now(&self.path);
        match outcome {
            Ok(_) => {
                self.due = None;
                self.reconnections += 1;
            }
            Err(_) => self.later(now),
        }
        outcome
    }
}

impl Backend {
    /// The process, where this program starts it.
    pub fn child(&self) -> Option<&Child> {
        match &self.service {
            Running::Child(child) => Some(child),
            Running::Elsewhere(_) => None,
        }
    }

    /// The process, where this program starts it.
    pub fn child_mut(&mut self) -> Option<&mut Child> {
        match &mut self.service {
            Running::Child(child) => Some(child),
            Running::Elsewhere(_) => None,
        }
    }

    /// When something is to be done for it.
    pub fn due(&self) -> Option<Instant> {
        match &self.service {
            Running::Child(child) => child.due.or(child.planned),
            Running::Elsewhere(external) => external.due,
        }
    }

    /// The guest has to wait for it.
    pub fn lost(&mut self, now: Instant) {
        self.lost_at.get_or_insert(now);
    }

    /// It serves the guest again; returns how long the guest has waited.
    pub fn back(&mut self, now: Instant) -> Duration {
        match &mut self.service {
            Running::Child(child) => child.restarts.serves(now),
            Running::Elsewhere(external) => external.serves(),
        }
        let since = self.lost_at.take();
        let pause = since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.pause = Some(pause);
        pause
    }
}
