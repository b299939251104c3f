//! The back end of one device: opened, started, connected.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anemone_config::{self as config, Device, Kind, SerialPort, Vm};
use anemone_ipc::device::ToDevice;
use anemone_ipc::{Channel, FdIndex};

use crate::accel::Environment;
use crate::error::{Error, system};
use crate::files::{self, PmemFile};
use crate::programs::Programs;
use crate::registry;
use crate::sink::{self, OpenSink};
use crate::spawn::{Process, Program};
use crate::vmm::control_options;
use crate::wiring::PmemFiles;

use super::dial::Dialer;

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
    Pmem {
        file: OwnedFd,
        readonly: bool,
    },
    Vsock(Dialer),
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
            Kind::Pmem { readonly, .. } => Part::Pmem {
                file: clone_of(pmem)?,
                readonly: *readonly,
            },
            Kind::Vsock { cid, socket } => Part::Vsock(Dialer::open(&id, *cid, socket)?),
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
    pub fn start(self, environment: Environment<'_>) -> Result<(Backend, UnixStream), Error> {
        let (path, part) = match self.service {
            Service::Start { path, part } => (path, part),
            Service::Connected { path, stream } => {
                return Ok((
                    Backend {
                        id: self.id,
                        service: Running::Elsewhere(path),
                    },
                    stream,
                ));
            }
        };
        let (ours, theirs) = UnixStream::pair().map_err(system("socketpair"))?;
        let (channel, far) = anemone_ipc::pair().map_err(system("socketpair"))?;
        channel
            .set_nonblocking(true)
            .map_err(system("socketpair"))?;
        let far = far.into_fd();
        let mut program = Program::new(&path);
        control_options(&mut program, &far, environment);
        program.option("--id", &self.id);
        if matches!(part, Part::Serial(_)) {
            program.fd_option("--stream-fd", theirs.as_fd());
        } else {
            program.fd_option("--fd", theirs.as_fd());
        }
        part.pass(&mut program);
        let process = program.start()?;
        let (sink, stream, dialer) = match part {
            Part::Console(sink) => (Some(sink), false, None),
            Part::Serial(sink) => (Some(sink), true, None),
            Part::Vsock(dialer) => (None, false, Some(dialer)),
            Part::Disk { .. } | Part::Rng(_) | Part::Pmem { .. } => (None, false, None),
        };
        Ok((
            Backend {
                id: self.id,
                service: Running::Child(Child {
                    process,
                    channel: Some(channel),
                    ready: false,
                    sink,
                    stream,
                    dialer,
                }),
            },
            ours,
        ))
    }
}

impl Part {
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
            Self::Pmem { file, readonly } => {
                program.fd_option("--file-fd", file.as_fd());
                if *readonly {
                    program.arg("--readonly");
                }
            }
            Self::Vsock(dialer) => dialer.pass(program),
        }
    }
}

fn find(
    programs: &Programs,
    kind: &Kind,
    binary: Option<&std::path::Path>,
) -> Result<PathBuf, Error> {
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

/// A back end at work.
#[derive(Debug)]
pub struct Backend {
    /// Name of the device.
    pub id: String,
    service: Running,
}

#[derive(Debug)]
enum Running {
    Child(Child),
    Elsewhere(PathBuf),
}

/// A device process.
#[derive(Debug)]
pub struct Child {
    /// The process.
    pub process: Process,
    /// The channel to it, non-blocking; closing it ends the process.
    pub channel: Option<Channel>,
    /// It has said that it serves.
    pub ready: bool,
    sink: Option<OpenSink>,
    stream: bool,
    /// For sockets of the guest.
    dialer: Option<Dialer>,
}

impl Child {
    /// Connects its guest to a socket of the host; false if it has no sockets.
    pub fn dial(&mut self, id: u64, port: u32) -> bool {
        if let (Some(dialer), Some(channel)) = (&mut self.dialer, &self.channel) {
            dialer.answer(channel, id, port);
        }
        self.dialer.is_some()
    }

    /// Whether it owns standard input and output.
    pub fn on_stdio(&self) -> bool {
        self.sink.as_ref().is_some_and(OpenSink::is_stdio)
    }

    /// Sends a message; a child that is too slow to take it misses it.
    pub fn tell(&self, message: &ToDevice, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        match &self.channel {
            Some(channel) => Ok(channel.send(message, fds)?),
            None => Ok(()),
        }
    }
}

impl Backend {
    /// The process, where this program has started it.
    pub fn child(&self) -> Option<&Child> {
        match &self.service {
            Running::Child(child) => Some(child),
            Running::Elsewhere(_) => None,
        }
    }

    /// The process, where this program has started it.
    pub fn child_mut(&mut self) -> Option<&mut Child> {
        match &mut self.service {
            Running::Child(child) => Some(child),
            Running::Elsewhere(_) => None,
        }
    }

    /// A new connection for a new VMM, in place of `old`.
    pub fn reconnect(&self, old: UnixStream) -> Result<UnixStream, Error> {
        match &self.service {
            // A byte stream has no state: the next VMM goes on with the same one.
            Running::Child(child) if child.stream => Ok(old),
            Running::Child(child) => {
                let (ours, theirs) = UnixStream::pair().map_err(system("socketpair"))?;
                let socket = FdIndex(0);
                child.tell(&ToDevice::Connect { socket }, &[theirs.as_fd()])?;
                Ok(ours)
            }
            Running::Elsewhere(path) => Ok(files::connect(&self.id, path)?),
        }
    }
}
