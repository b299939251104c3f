//! `anemone run`: starts the processes of a VM, reacts to what happens, and ends them.
//!
//! ```text
//!            all ready: Start              Shutdown, quit, failure
//!  Starting ───────────────▶ Running ───────────────────────────────▶ closed
//!     ▲                         │ Reset, panic (as configured)
//!     └── a new VMM process ◀───┘ the device processes stay
//!             ▲       │ an external back end is not there
//!             └─ Disconnected
//! ```
//!
//! Once the guest has run, a back end that is lost ends nothing: [`recovery`] starts it again or
//! connects to it again, in every phase.

mod backend;
mod commands;
mod dial;
mod kept;
mod recovery;
mod restart;

use std::io::stdin;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anemone_config::{OnPanic, OnReboot, Vm};
use anemone_ipc::device::{Balloon, FromDevice, ToDevice};
use anemone_ipc::vmm::{DeviceUse, Event, FromVmm, ToVmm};
use log::LevelFilter;

use crate::accel::{self, Environment, Opened};
use crate::acpi_dump;
use crate::cgroup::{self, Groups};
use crate::control::protocol::BalloonState;
use crate::control::server::{Server, Waits};
use crate::error::{Error, printable, system};
use crate::jail;
use crate::programs::Programs;
use crate::reach::{self, Place};
use crate::registry;
use crate::spawn::Process;
use crate::sys::{self, Exit, Signals};
use crate::terminal::RawMode;
use crate::vmm::Vmm;
use crate::wiring::{BootFiles, PmemFiles, Wiring};
use backend::{Backend, Child, Prepared};
use recovery::Why;

/// Time the processes may take until all are ready. Unpacking a kernel in a VM within a VM is slow.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Time the guest has to power off when it is asked to.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// Time the VMM may take to end after the guest has ended.
const VMM_END_LIMIT: Duration = Duration::from_secs(3);
/// Time the device processes may take to finish what they have begun.
const DEVICE_END_LIMIT: Duration = Duration::from_secs(10);
/// Pause before a guest starts again that has used up its budget of resets.
const RESET_DELAY: Duration = Duration::from_secs(1);
/// Messages taken from one process before others have their turn.
const BURST: usize = 64;
/// Time without an event after which memory of the start is given back.
const QUIET: Duration = Duration::from_millis(500);

/// Runs the VM until it ends.
pub fn run(vm: Vm, log_level: LevelFilter, dump_to: Option<&Path>) -> Result<(), Error> {
    sys::close_on_exec_from(3).map_err(system("close_range"))?;
    sys::raise_open_files().map_err(system("setrlimit"))?;
    let signals = Signals::new(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGWINCH])
        .map_err(system("signalfd"))?;
    // All that can be wrong with the configuration is found before anything starts.
    let programs = Programs::new();
    let vmm_path = programs.find(registry::VMM, None)?;
    let boot = BootFiles::open(&vm)?;
    let pmem = PmemFiles::open(&vm, true)?;
    // Before any process, so that all begin in it; dropped after all.
    let groups = make_groups(&vm)?;
    let prepared = backend::prepare(&vm, &pmem, &programs)?;
    let environment = Environment {
        programs: &programs,
        sandbox: vm.config.sandbox,
        log_level,
        groups: groups.as_ref(),
    };
    let accel = accel::open(&vm, environment, &signals)?;
    let host = Host {
        vm: &vm,
        boot,
        pmem,
        accel,
        environment,
        vmm_path,
        signals,
    };
    let mut session = Session::start(&host, prepared, dump_to)?;
    let result = session.serve();
    session.close(&result);
    result.map(|_| ())
}

/// Makes the control groups that the configuration wants.
fn make_groups(vm: &Vm) -> Result<Option<Groups>, Error> {
    let ids = vm.devices.iter().filter_map(|device| match device.backend {
        anemone_config::Backend::Process(_) => Some(&device.id),
        anemone_config::Backend::Socket(_) => None,
    });
    let ids = ids.chain(vm.serial.iter().map(|port| &port.id));
    let names: Vec<_> = [cgroup::VMM.to_owned()]
        .into_iter()
        .chain(ids.map(|id| cgroup::of_device(id.as_str())))
        .collect();
    let name = vm.config.name.as_ref().map_or("vm", |name| name.as_str());
    Groups::make(&vm.config.cgroup, name, &names)
}

/// What stays the same while VMM processes come and go.
struct Host<'a> {
    vm: &'a Vm,
    boot: BootFiles,
    pmem: PmemFiles,
    accel: Opened,
    environment: Environment<'a>,
    vmm_path: PathBuf,
    signals: Signals,
}

impl Host<'_> {
    /// Makes the control socket. A VM runs without one as well.
    fn listen(&self) -> Option<Server> {
        let name = self.vm.config.name.as_ref().map(anemone_config::Id::as_str);
        let server = Server::new(name);
        server
            .inspect_err(|error| log::warn!("there is no control socket: {error}"))
            .ok()
    }

    fn start_vmm(&self) -> Result<Vmm, Error> {
        let cpus = self.vm.config.cpus.count.get();
        let devices: Vec<_> = self.vm.devices.iter().map(|d| d.id.as_str()).collect();
        let accel = Some(&self.accel);
        Vmm::start(&self.vmm_path, self.environment, accel, cpus, &devices)
    }
}

/// The processes of the VM. Fields are dropped, and processes killed, in this order.
struct Session<'a> {
    host: &'a Host<'a>,
    vmm: Vmm,
    backends: Vec<Backend>,
    /// The VMM's ends of the back ends' connections, in their order.
    connections: Vec<UnixStream>,
    phase: Phase,
    /// The guest has run: from now on back ends may come and go.
    has_run: bool,
    /// Where others ask it things; none where the host has no place for it.
    control: Option<Server>,
    /// What the last VMM has said about devices that no driver has used.
    untouched: Vec<DeviceUse>,
    dump_to: Option<(&'a Path, std::os::fd::OwnedFd)>,
    raw_mode: Option<RawMode>,
    /// Whether this process still has what only its start needed.
    untrimmed: bool,
    /// What it still reaches by name, with which version of Landlock (0: none, all is reached).
    places: Vec<Place>,
    landlock: u32,
    /// A guest that resets over and over must not make this host start processes as fast as it can.
    resets: anemone_log::Limiter,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has reset, there is no VMM, and an external back end is not there.
    Disconnected,
    Starting {
        deadline: Instant,
        vmm_ready: bool,
    },
    Running,
    /// The guest has been asked to power off.
    Stopping {
        deadline: Instant,
    },
}

/// How the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It powered off; the VMM ends by itself.
    Shutdown,
    /// The user ended it.
    Quit,
}

/// What a turn of the loop decided.
enum Turn {
    Continue,
    Restart,
    End(End),
}

/// What poll found ready.
#[derive(Debug, Clone, Copy)]
enum Source {
    Vmm,
    Backend(usize),
    VmmExit,
    BackendExit(usize),
    Signals,
    Control,
}

impl Phase {
    fn starting() -> Self {
        Self::Starting {
            deadline: Instant::now() + START_LIMIT,
            vmm_ready: false,
        }
    }
}

impl<'a> Session<'a> {
    /// Starts all processes: the VMM first, which has most to do, then the devices.
    fn start(
        host: &'a Host<'a>,
        prepared: Vec<Prepared>,
        dump_to: Option<&'a Path>,
    ) -> Result<Self, Error> {
        let vmm = host.start_vmm()?;
        let mut backends = Vec::with_capacity(prepared.len());
        let mut connections = Vec::with_capacity(prepared.len());
        let limit = host.vm.config.restart.limit;
        for part in prepared {
            let (backend, connection) = part.start(host.environment, limit)?;
            backends.push(backend);
            connections.push(connection);
        }
        let dump_to = match dump_to {
            Some(folder) => {
                let file = sys::memfd("acpi-tables", 0).map_err(system("memfd_create"))?;
                Some((folder, file))
            }
            None => None,
        };
        let mut session = Self {
            host,
            vmm,
            backends,
            connections,
            phase: Phase::starting(),
            has_run: false,
            control: host.listen(),
            untouched: Vec::new(),
            dump_to,
            raw_mode: None,
            untrimmed: true,
            places: Vec::new(),
            landlock: 0,
            resets: anemone_log::Limiter::new(),
        };
        session.configure()?;
        // All is open, and the children are busy: this costs the start no time. The tables are
        // written first, by a process that may still do so.
        if session.dump_to.is_none() {
            session.enter_jail()?;
        }
        Ok(session)
    }

    fn enter_jail(&mut self) -> Result<(), Error> {
        let vm = self.host.vm;
        let children = self.backends.iter().filter_map(Backend::child);
        let programs = children.map(Child::path);
        let programs = programs.chain([self.host.vmm_path.as_path()]);
        let socket = self.control.as_ref().map(Server::path);
        let groups = self.host.environment.groups.map(Groups::parent);
        self.places = reach::of(vm, programs, socket, groups);
        self.landlock = jail::enter(vm, &self.host.accel, &self.places)?;
        Ok(())
    }

    fn configure(&mut self) -> Result<(), Error> {
        let vm = self.host.vm;
        let sent = Wiring {
            vm,
            boot: &self.host.boot,
            pmem: &self.host.pmem,
            accel: Some(&self.host.accel),
            sockets: Some(&self.connections),
            // The 16550 comes after the devices, if there is one.
            serial: self.connections.get(vm.devices.len()),
            acpi_dump: self.dump_to.as_ref().map(|(_, file)| file),
        }
        .send(&self.vmm.channel);
        match sent {
            // It has ended before it listened: how it did says more.
            Err(Error::Channel(anemone_ipc::Error::Closed)) => Err(self.vmm.failure()),
            other => other,
        }
    }

    /// A new VMM process with new memory; the devices stay.
    fn restart(&mut self) -> Result<(), Error> {
        self.vmm.process.kill();
        if self.resets.allow().is_none() {
            let mut signals = [sys::readable(self.host.signals.as_fd())];
            sys::poll(&mut signals, Some(RESET_DELAY)).map_err(system("poll"))?;
        }
        self.reconnect_all()
    }

    /// Starts the VMM of a guest that has run before, once all connections are there.
    fn begin_again(&mut self) -> Result<(), Error> {
        self.host.boot.rewind()?;
        self.vmm = self.host.start_vmm()?;
        self.phase = Phase::starting();
        self.configure()
    }

    /// Reacts to what happens until the guest ends.
    fn serve(&mut self) -> Result<End, Error> {
        loop {
            match self.turn()? {
                Turn::Continue => {}
                Turn::Restart => self.restart()?,
                Turn::End(end) => return Ok(end),
            }
        }
    }

    fn turn(&mut self) -> Result<Turn, Error> {
        let now = Instant::now();
        let left = match &self.phase {
            Phase::Running if self.untrimmed => Some(QUIET),
            Phase::Running | Phase::Disconnected => None,
            Phase::Starting { deadline, .. } | Phase::Stopping { deadline } => {
                let left = deadline.saturating_duration_since(now);
                if left.is_zero() {
                    return Err(self.out_of_time());
                }
                Some(left)
            }
        };
        let due = self.backends.iter().filter_map(Backend::due);
        let clients = self.control.as_ref().and_then(|control| control.due(now));
        let due = due.chain(clients).min();
        let due = due.map(|due| due.saturating_duration_since(now));
        let ready = self.wait(left.into_iter().chain(due).min())?;
        if ready.is_empty() && due.is_none() && self.phase == Phase::Running && self.untrimmed {
            self.untrimmed = false;
            anemone_process::release_memory();
        }
        let heard = ready.iter().any(|source| matches!(source, Source::Control));
        for source in ready {
            let turn = match source {
                Source::Vmm => self.hear_vmm()?,
                Source::Backend(index) => self.hear_backend(index)?,
                Source::VmmExit => return Err(self.vmm.failure()),
                // Its last message, or the end of its channel, may have been enough.
                Source::BackendExit(index)
                    if self.backends[index]
                        .child()
                        .is_some_and(|c| c.process.is_none()) =>
                {
                    Turn::Continue
                }
                Source::BackendExit(index) => self.backend_down(index, Why::Ended)?,
                Source::Signals => self.take_signals()?,
                // All clients are heard below.
                Source::Control => Turn::Continue,
            };
            if !matches!(turn, Turn::Continue) {
                return Ok(turn);
            }
        }
        if heard || clients.is_some_and(|due| due <= Instant::now()) {
            self.serve_clients()?;
        }
        self.bring_back()?;
        self.begin_if_ready()?;
        Ok(Turn::Continue)
    }

    /// What is ready. Messages come before the ends of their senders.
    fn wait(&self, limit: Option<Duration>) -> Result<Vec<Source>, Error> {
        let mut sources = Vec::new();
        let mut fds = Vec::new();
        let has_vmm = self.phase != Phase::Disconnected;
        if has_vmm {
            sources.push(Source::Vmm);
            fds.push(sys::readable(self.vmm.channel.as_fd()));
        }
        let children = || {
            self.backends
                .iter()
                .enumerate()
                .filter_map(|(index, backend)| backend.child().map(|child| (index, child)))
        };
        for (index, child) in children() {
            if let Some(channel) = &child.channel {
                sources.push(Source::Backend(index));
                fds.push(sys::readable(channel.as_fd()));
            }
        }
        if has_vmm {
            sources.push(Source::VmmExit);
            fds.push(sys::readable(self.vmm.process.as_fd()));
        }
        for (index, child) in children() {
            if let Some(process) = &child.process {
                sources.push(Source::BackendExit(index));
                fds.push(sys::readable(process.as_fd()));
            }
        }
        sources.push(Source::Signals);
        fds.push(sys::readable(self.host.signals.as_fd()));
        for (fd, events) in self.control.iter().flat_map(Server::watched) {
            sources.push(Source::Control);
            fds.push(libc::pollfd {
                events,
                ..sys::readable(fd)
            });
        }
        sys::poll(&mut fds, limit).map_err(system("poll"))?;
        let ready = sources.into_iter().zip(&fds);
        Ok(ready
            .filter(|(_, fd)| fd.revents != 0)
            .map(|(source, _)| source)
            .collect())
    }

    fn hear_vmm(&mut self) -> Result<Turn, Error> {
        for _ in 0..BURST {
            let message = match self.vmm.channel.recv::<FromVmm>() {
                Ok(received) => received.message,
                Err(error) if error.is_would_block() => break,
                Err(anemone_ipc::Error::Closed) => return Err(self.vmm.failure()),
                Err(error) => return Err(self.vmm_nonsense(&error.to_string())),
            };
            let turn = match message {
                FromVmm::Ready(summary) => match &mut self.phase {
                    Phase::Starting { vmm_ready, .. } if !*vmm_ready => {
                        *vmm_ready = true;
                        self.vmm.landlock = summary.landlock;
                        Turn::Continue
                    }
                    _ => return Err(self.vmm_nonsense("it was ready already")),
                },
                FromVmm::Refused { message } => match self.refused_for_a_lost_back_end()? {
                    Turn::Continue => return Err(Error::Refused(printable(&message))),
                    turn => turn,
                },
                FromVmm::Event(event) => self.guest_event(event)?,
                FromVmm::Devices(used) => {
                    self.untouched = used;
                    self.answer_waiting(Waits::Use);
                    Turn::Continue
                }
            };
            if !matches!(turn, Turn::Continue) {
                return Ok(turn);
            }
        }
        Ok(Turn::Continue)
    }

    fn vmm_nonsense(&self, what: &str) -> Error {
        Error::Failed(format!(
            "{} broke the protocol: {}",
            self.vmm.process.name(),
            printable(what)
        ))
    }

    fn guest_event(&mut self, event: Event) -> Result<Turn, Error> {
        let config = &self.host.vm.config;
        match event {
            Event::Shutdown => Ok(Turn::End(End::Shutdown)),
            Event::Reset { cause } => {
                let stop = matches!(self.phase, Phase::Stopping { .. });
                if stop || config.on_reboot == OnReboot::Stop {
                    return Ok(Turn::End(End::Shutdown));
                }
                log::info!("the guest resets ({})", printable(&cause));
                self.vmm.process.wait(VMM_END_LIMIT);
                Ok(Turn::Restart)
            }
            Event::Panic => match config.on_panic {
                OnPanic::Stop => Err(Error::Failed(
                    "the guest's kernel panicked; its console says why".to_owned(),
                )),
                OnPanic::Restart => {
                    log::warn!("the guest's kernel panicked; starting it again");
                    Ok(Turn::Restart)
                }
                OnPanic::Ignore => {
                    anemone_log::warn_limited!("the guest's kernel panicked; it goes on");
                    Ok(Turn::Continue)
                }
            },
            Event::BackendLost {
                id,
                connection,
                reason,
            } => {
                let index = self.device(&id)?;
                self.back_end_lost(index, connection, &printable(&reason))
            }
            Event::BackendBack { id, connection } => {
                let index = self.device(&id)?;
                self.back_end_back(index, connection);
                Ok(Turn::Continue)
            }
            Event::BackendUnfit { id, reason } => {
                let index = self.device(&id)?;
                anemone_log::warn_limited!(
                    "device `{}`: the back end that serves now cannot go on where the one before \
                     was lost ({}); the guest's driver is told to reset the device",
                    self.backends[index].id,
                    printable(&reason)
                );
                Ok(Turn::Continue)
            }
            Event::Failed { message } => Err(Error::Failed(format!(
                "{}: {}",
                self.vmm.process.name(),
                printable(&message)
            ))),
        }
    }

    /// The back end of that name.
    fn device(&self, id: &str) -> Result<usize, Error> {
        let position = self.backends.iter().position(|backend| backend.id == id);
        position.ok_or_else(|| self.vmm_nonsense(&format!("there is no device `{id}`")))
    }

    fn hear_backend(&mut self, index: usize) -> Result<Turn, Error> {
        for _ in 0..BURST {
            let Some(channel) = self.backends[index]
                .child()
                .and_then(|c| c.channel.as_ref())
            else {
                break;
            };
            let mut received = match channel.recv::<FromDevice>() {
                Ok(received) => received,
                Err(error) if error.is_would_block() => break,
                Err(anemone_ipc::Error::Closed) => return self.backend_down(index, Why::Ended),
                Err(error) => {
                    let reason = format!("it broke the protocol: {error}");
                    return self.backend_down(index, Why::Said(&printable(&reason)));
                }
            };
            let id = self.backends[index].id.clone();
            let Some(child) = self.backends[index].child_mut() else {
                break;
            };
            match &received.message {
                &FromDevice::Ready { landlock } => {
                    child.ready = true;
                    child.landlock = landlock;
                }
                FromDevice::Failed { message } => {
                    return self.backend_down(index, Why::Said(&printable(message)));
                }
                &FromDevice::Keep { key, fd } => match received.take(fd) {
                    Ok(fd) => child.kept.keep(&id, key, fd),
                    Err(_) => {
                        return self.backend_down(index, Why::Said("it broke the protocol"));
                    }
                },
                &FromDevice::Forget { key } => child.kept.forget(key),
                &FromDevice::Dial { id, port } => {
                    if !child.dial(id, port) {
                        let reason = "it has no business with sockets";
                        return self.backend_down(index, Why::Said(reason));
                    }
                }
                FromDevice::Balloon(state)
                    if child.is_balloon() && state.statistics.len() <= Balloon::STATISTICS =>
                {
                    log::info!("device `{id}`: {}", BalloonState::from(state));
                    child.balloon = Some(state.clone());
                    self.answer_waiting(Waits::Balloon(index));
                }
                // Only the console on this terminal has a user who can ask for something.
                _ if !child.on_stdio() => {
                    return self.backend_down(index, Why::Said("it broke the protocol"));
                }
                FromDevice::QuitRequested => return Ok(Turn::End(End::Quit)),
                FromDevice::PowerRequested => self.press_power_button(),
                FromDevice::Balloon(_) => {
                    return self.backend_down(index, Why::Said("it broke the protocol"));
                }
            }
        }
        Ok(Turn::Continue)
    }

    fn out_of_time(&self) -> Error {
        if let Phase::Starting { vmm_ready, .. } = self.phase {
            let vmm = (!vmm_ready).then_some(&self.vmm.process);
            let children = self.backends.iter().filter_map(Backend::child);
            let late = children.filter(|child| !child.ready);
            let late = late.filter_map(|child| child.process.as_ref());
            let names: Vec<_> = vmm.into_iter().chain(late).map(Process::name).collect();
            return Error::Failed(format!(
                "not ready within {} seconds: {}",
                START_LIMIT.as_secs(),
                names.join("; ")
            ));
        }
        Error::Failed(format!(
            "the guest did not power off within {} seconds and was ended",
            STOP_LIMIT.as_secs()
        ))
    }

    fn begin_if_ready(&mut self) -> Result<(), Error> {
        let Phase::Starting {
            vmm_ready: true, ..
        } = self.phase
        else {
            return Ok(());
        };
        let mut children = self.backends.iter().filter_map(Backend::child);
        if !children.all(|child| child.ready) {
            return Ok(());
        }
        if let Some((folder, file)) = self.dump_to.take() {
            acpi_dump::write(file, folder)?;
            self.enter_jail()?;
        }
        self.vmm.channel.send(&ToVmm::Start, &[])?;
        self.phase = Phase::Running;
        self.has_run = true;
        let mut children = self.backends.iter().filter_map(Backend::child);
        if self.raw_mode.is_none() && children.any(|child| child.on_stdio()) {
            self.raw_mode = RawMode::enter().map_err(system("terminal"))?;
            if self.raw_mode.is_some() {
                eprint!(
                    "anemone: the guest's console is on this terminal; Ctrl-A x ends the VM, \
                     Ctrl-A h lists the keys\r\n"
                );
            }
        }
        self.send_window_size();
        Ok(())
    }

    /// Tells the console on this terminal how large it is.
    fn send_window_size(&self) {
        let Ok((columns, rows)) = sys::window_size(stdin().as_fd()) else {
            return;
        };
        let mut children = self.backends.iter().filter_map(Backend::child);
        if let Some(child) = children.find(|child| child.on_stdio())
            && let Err(error) = child.tell(&ToDevice::WindowSize { columns, rows }, &[])
        {
            log::debug!("window size: {error}");
        }
    }

    fn take_signals(&mut self) -> Result<Turn, Error> {
        while let Some(signal) = self.host.signals.take() {
            if signal == libc::SIGWINCH {
                self.send_window_size();
                continue;
            }
            let name = sys::signal_name(signal);
            match self.phase {
                Phase::Running => {
                    self.press_power_button();
                    log::info!("{name}: asked the guest to power off");
                    self.phase = Phase::Stopping {
                        deadline: Instant::now() + STOP_LIMIT,
                    };
                }
                Phase::Starting { .. } | Phase::Disconnected => {
                    return Err(Error::Failed(format!(
                        "ended by {name} before the guest ran"
                    )));
                }
                Phase::Stopping { .. } => {
                    return Err(Error::Failed(format!(
                        "ended by a second signal, {name}, before the guest had powered off"
                    )));
                }
            }
        }
        Ok(Turn::Continue)
    }

    fn press_power_button(&self) {
        if let Err(error) = self.vmm.channel.send(&ToVmm::PowerButton, &[]) {
            log::warn!("power button: {error}");
        }
    }

    /// Says why the guest has never used a device, where it has not.
    fn tell_untouched(&self) {
        for device in &self.untouched {
            if let Some(why) = &device.untouched {
                let (id, why) = (printable(&device.id), printable(why));
                log::warn!("device `{id}`: the guest never used it: {why}");
            }
        }
    }

    /// Ends all processes: the VMM at once unless it is about to end, the devices after they have
    /// finished what they have begun.
    fn close(mut self, result: &Result<End, Error>) {
        self.tell_untouched();
        if matches!(result, Ok(End::Shutdown)) {
            self.vmm.process.wait(VMM_END_LIMIT);
        }
        self.vmm.process.kill();
        self.connections.clear();
        let deadline = Instant::now() + DEVICE_END_LIMIT;
        for backend in &mut self.backends {
            if let Some(child) = backend.child_mut() {
                child.channel = None;
            }
        }
        for backend in &mut self.backends {
            let id = backend.id.clone();
            let Some(process) = backend.child_mut().and_then(|child| child.process.as_mut()) else {
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            match process.wait(left) {
                Some(Exit::Status(0)) => {}
                // What went wrong has a message already.
                Some(_) if result.is_err() => {}
                Some(exit) => log::warn!("device `{id}`: {}, {exit}", process.name()),
                None => log::warn!("device `{id}`: {} does not end", process.name()),
            }
        }
    }
}
