//! What clients of the control socket ask of a running VM.

use std::time::{Duration, Instant};

use anemone_config::Size;
use anemone_ipc::device::ToDevice;
use anemone_ipc::vmm::ToVmm;

use super::backend::{Backend, Running};
use super::{Phase, Session};
use crate::control::protocol::{Process, Request, Response, Status};
use crate::control::server::{ClientId, Waits};
use crate::error::Error;
use crate::reach::Place;
use crate::registry;

/// How long the VMM may take to tell what the guest makes of its devices; without it a status says
/// what was known before.
const USE_LIMIT: Duration = Duration::from_secs(1);
/// The same for the guest and its statistics.
const BALLOON_LIMIT: Duration = Duration::from_secs(2);

impl Session<'_> {
    /// Hears the clients and answers those who have waited for something.
    pub(super) fn serve_clients(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        let requests = control.turn(now);
        for (client, waits) in control.late(now) {
            match waits {
                Waits::Use => self.answer_status(client),
                Waits::Restart(_) => self.answer_failed(client, "it has taken too long"),
                Waits::Balloon(index) => self.answer_balloon(client, index),
            }
        }
        for (client, request) in requests {
            match request {
                Request::Status if self.phase == Phase::Running => {
                    let asked = self.vmm.channel.send(&ToVmm::Devices, &[]);
                    let limit = asked.map_or(Duration::ZERO, |()| USE_LIMIT);
                    self.client_waits(client, Waits::Use, Some(limit));
                }
                Request::Status => self.answer_status(client),
                Request::RestartDevice { id } => match self.restart_device(&id)? {
                    Ok(index) => self.client_waits(client, Waits::Restart(index), None),
                    Err(why) => self.answer_failed(client, &why),
                },
                Request::Balloon { size } => match self.ask_balloon(size) {
                    Ok(index) => {
                        self.client_waits(client, Waits::Balloon(index), Some(BALLOON_LIMIT));
                    }
                    Err(why) => self.answer_failed(client, &why),
                },
                Request::PowerButton if self.phase == Phase::Running => {
                    self.press_power_button();
                    self.answer(client, &Response::Done);
                }
                Request::PowerButton => self.answer_failed(client, "the guest does not run"),
            }
        }
        // Answers go out at once where they can.
        if let Some(control) = &mut self.control {
            control.flush();
        }
        Ok(())
    }

    fn client_waits(&mut self, client: ClientId, waits: Waits, limit: Option<Duration>) {
        if let Some(control) = &mut self.control {
            control.wait(client, waits, limit);
        }
    }

    fn answer(&mut self, client: ClientId, response: &Response) {
        if let Some(control) = &mut self.control {
            control.answer(client, response);
        }
    }

    fn answer_failed(&mut self, client: ClientId, message: &str) {
        let message = message.to_owned();
        self.answer(client, &Response::Failed { message });
    }

    fn answer_status(&mut self, client: ClientId) {
        let status = Box::new(self.status());
        self.answer(client, &Response::Status(status));
    }

    /// Answers everybody who waits for this.
    pub(super) fn answer_waiting(&mut self, waits: Waits) {
        let clients = self.control.as_ref().map(|c| c.waiting(waits));
        for client in clients.unwrap_or_default() {
            match waits {
                Waits::Use => self.answer_status(client),
                Waits::Restart(index) => {
                    let pause = self.backends[index].pause.unwrap_or_default();
                    let pause = milliseconds(pause);
                    self.answer(client, &Response::Restarted { pause });
                }
                Waits::Balloon(index) => self.answer_balloon(client, index),
            }
        }
    }

    /// Begins to put a new process in the place of a device's; an inner error is why not.
    fn restart_device(&mut self, id: &str) -> Result<Result<usize, String>, Error> {
        let Some(index) = self.backends.iter().position(|backend| backend.id == id) else {
            let ids: Vec<_> = self.backends.iter().map(|b| b.id.as_str()).collect();
            let ids = ids.join(", ");
            return Ok(Err(format!("there is no device `{id}`; there are: {ids}")));
        };
        if self.phase != Phase::Running {
            return Ok(Err("the guest does not run".to_owned()));
        }
        let backend = &mut self.backends[index];
        match &mut backend.service {
            Running::Elsewhere(_) => Ok(Err(format!(
                "the back end of `{id}` is no process of this VM; it is connected to again whenever \
                 it is started again"
            ))),
            Running::Child(child) => {
                child.end_as_planned(Instant::now());
                Ok(Ok(index))
            }
        }
    }

    /// Tells the balloon its size, if there is one, and asks how it is; the index of its device.
    fn ask_balloon(&mut self, size: Option<u64>) -> Result<usize, String> {
        let memory = self.host.vm.config.memory.size.bytes();
        if let Some(size) = size.filter(|size| *size >= memory || size % 4096 != 0) {
            return Err(format!(
                "a balloon of {} bytes: allowed is a multiple of 4K below the {} of the guest's \
                 memory",
                size,
                Size(memory)
            ));
        }
        let (index, child) = (self.backends.iter_mut().enumerate())
            .filter_map(|(index, backend)| Some((index, backend.child_mut()?)))
            .find(|(_, child)| child.is_balloon())
            .ok_or("the VM has no balloon (`--balloon`)")?;
        child
            .tell(&ToDevice::Balloon { target: size }, &[])
            .map_err(|error| error.to_string())?;
        Ok(index)
    }

    /// Answers with what is known of the balloon. A guest without a driver tells no statistics, and
    /// one that is busy tells them late.
    fn answer_balloon(&mut self, client: ClientId, index: usize) {
        let child = self.backends.get(index).and_then(Backend::child);
        match child.and_then(|child| child.balloon.as_ref()) {
            Some(state) => {
                let response = Response::Balloon(state.into());
                self.answer(client, &response);
            }
            None => self.answer_failed(client, "the balloon has not told its state yet"),
        }
    }

    fn status(&self) -> Status {
        let config = &self.host.vm.config;
        let pid = std::process::id();
        let process = |role: &str, pid| Process {
            role: role.to_owned(),
            device: None,
            pid,
            program: None,
            socket: None,
            state: "serving".to_owned(),
            restarts: 0,
            last_pause: None,
            memory: "none".to_owned(),
            landlock: None,
            reaches: Vec::new(),
            untouched: None,
        };
        let supervisor = Process {
            program: std::env::current_exe().ok(),
            landlock: Some(self.landlock),
            reaches: self.places.iter().map(Place::text).collect(),
            ..process("supervisor", Some(pid))
        };
        let vmm = Process {
            program: Some(self.host.vmm_path.clone()),
            memory: "shared".to_owned(),
            landlock: Some(self.vmm.landlock),
            ..process("vmm", Some(self.vmm.process.pid()))
        };
        let mut processes = vec![supervisor, vmm];
        let devices = self.host.vm.devices.iter();
        let roles = devices
            .map(|device| (registry::name_of(&device.kind), device.memory.to_string()))
            .chain([("serial", "none".to_owned())]);
        for (backend, (role, memory)) in self.backends.iter().zip(roles) {
            let untouched = self.untouched.iter().find(|d| d.id == backend.id);
            let mut device = Process {
                device: Some(backend.id.clone()),
                last_pause: backend.pause.map(milliseconds),
                memory,
                untouched: untouched.and_then(|device| device.untouched.clone()),
                ..process(role, None)
            };
            if backend.lost_at.is_some() {
                device.state = "lost".to_owned();
            }
            match &backend.service {
                Running::Child(child) => {
                    device.pid = child.process.as_ref().map(crate::spawn::Process::pid);
                    device.program = Some(child.path().to_owned());
                    device.restarts = child.restarts.count;
                    device.landlock = Some(child.landlock);
                    device.reaches = child.reaches();
                }
                Running::Elsewhere(external) => {
                    device.socket = Some(external.path().to_owned());
                    device.restarts = external.reconnections;
                }
            }
            processes.push(device);
        }
        Status {
            name: match &config.name {
                Some(name) => name.to_string(),
                None => pid.to_string(),
            },
            pid,
            phase: match self.phase {
                Phase::Disconnected => "disconnected",
                Phase::Starting { .. } => "starting",
                Phase::Running => "running",
                Phase::Stopping { .. } => "stopping",
            }
            .to_owned(),
            accel: self.host.accel.name().to_owned(),
            processes,
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
