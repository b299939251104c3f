//! Running a machine: a thread per vCPU, and the main loop that hears what happens.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anemone_accel_api::{EventFd, Stop, Vcpu};
use anemone_ipc::Channel;
use anemone_ipc::vmm::{DeviceUse, Event, FromVmm, ToVmm};
use anemone_sandbox::Mode;
use anemone_virt::{Board, Outcome, PowerEvent, Signals};
use anemone_virtio::Reconnect;

use crate::build::Machine;
use crate::device::Running;
use crate::error::Error;
use crate::threads::{Role, Threads};
use crate::{jail, pmem};

/// Milliseconds without an event after which memory of the start is given back.
const QUIET_MS: i32 = 500;

const SHUTDOWN: u32 = 1 << 0;
const RESET: u32 = 1 << 1;
const PANIC: u32 = 1 << 2;
const TRIPLE_FAULT: u32 = 1 << 3;

/// What has happened to the guest since the main loop last looked. However often it happens, it
/// takes no more room.
pub struct Happenings {
    flags: AtomicU32,
    /// The first failure; later ones are mostly its consequences.
    failure: Mutex<Option<Event>>,
    /// What happened to back ends. A device reports a few events for each connection that the
    /// supervisor sends, so their number is bounded.
    devices: Mutex<Vec<Event>>,
    wake: EventFd,
}

impl Happenings {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            flags: AtomicU32::new(0),
            failure: Mutex::default(),
            devices: Mutex::default(),
            wake: EventFd::new()?,
        })
    }

    fn set(&self, flag: u32) {
        self.flags.fetch_or(flag, Ordering::AcqRel);
        self.wake.signal();
    }

    /// Readable when something has happened.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The VM cannot go on.
    pub fn fail(&self, event: Event) {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(event);
        self.wake.signal();
    }

    /// Something happened to a back end.
    pub fn device(&self, event: Event) {
        self.devices
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
        self.wake.signal();
    }

    /// All events since the last call, those that end the guest last.
    fn take(&self) -> Vec<Event> {
        self.wake.take();
        let flags = self.flags.swap(0, Ordering::AcqRel);
        let reset = |cause: &str| Event::Reset {
            cause: cause.to_owned(),
        };
        let mut events =
            std::mem::take(&mut *self.devices.lock().unwrap_or_else(PoisonError::into_inner));
        if flags & PANIC != 0 {
            events.push(Event::Panic);
        }
        if flags & SHUTDOWN != 0 {
            events.push(Event::Shutdown);
        } else if flags & RESET != 0 {
            events.push(reset("reset register"));
        } else if flags & TRIPLE_FAULT != 0 {
            events.push(reset("triple fault"));
        }
        events.extend(
            self.failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        events
    }
}

impl Signals for Happenings {
    fn signal(&self, outcome: Outcome) {
        self.set(match outcome {
            Outcome::Shutdown => SHUTDOWN,
            Outcome::Reset => RESET,
            Outcome::Panic => PANIC,
        });
    }
}

/// Runs the machine until the guest is over; the process ends then, and with it the vCPUs.
pub fn run(
    mut machine: Machine,
    channel: Channel,
    threads: &mut Threads,
    mode: Mode,
) -> Result<(), Error> {
    for (index, vcpu) in (0..).zip(std::mem::take(&mut machine.vcpus)) {
        let (board, happenings) = (machine.board.clone(), machine.happenings.clone());
        let has_pmem = !machine.pmem.is_empty();
        // It stays when it has stopped: to unmap what it has is not among what its thread may do.
        let mut vcpu = ManuallyDrop::new(vcpu);
        threads.give(&Role::Vcpu(index), move |restricted| {
            run_vcpu(
                index,
                &mut **vcpu,
                &board,
                &happenings,
                restricted,
                has_pmem,
            );
        })?;
    }
    jail::restrict_run(mode)?;
    let mut panicked = false;
    // Loading a kernel takes memory that running it does not. Not at once: the vCPUs are just
    // starting, and would only map again what is given back.
    let mut quiet = Some(QUIET_MS);
    loop {
        if !wait(&machine, &channel, quiet)? {
            quiet = None;
            anemone_process::release_memory();
        }
        #[cfg(feature = "serial")]
        if let Some(serial) = &mut machine.serial {
            serial.run();
        }
        if !orders(&machine, &channel)? {
            return Ok(());
        }
        let lost = pmem::lost(&machine.pmem);
        for event in machine.happenings.take().into_iter().chain(lost) {
            // A guest may report its panic as often as it likes; it is told once.
            if event == Event::Panic && std::mem::replace(&mut panicked, true) {
                continue;
            }
            let over = ends_the_guest(&event);
            if over {
                channel.send(&devices(&machine), &[])?;
            }
            channel.send(&FromVmm::Event(event), &[])?;
            if over {
                return Ok(());
            }
        }
    }
}

fn ends_the_guest(event: &Event) -> bool {
    match event {
        Event::Shutdown | Event::Reset { .. } | Event::Failed { .. } => true,
        Event::Panic
        | Event::BackendLost { .. }
        | Event::BackendBack { .. }
        | Event::BackendUnfit { .. } => false,
    }
}

/// What the guest has made of its devices.
fn devices(machine: &Machine) -> FromVmm {
    let used = |device: &Running| DeviceUse {
        id: device.id.clone(),
        untouched: device.function.untouched().map(|why| why.to_string()),
    };
    FromVmm::Devices(machine.devices.iter().map(used).collect())
}

/// Waits for the supervisor, the guest or the serial line, at most so many milliseconds; `false` if
/// nothing has come.
fn wait(machine: &Machine, channel: &Channel, limit: Option<i32>) -> Result<bool, Error> {
    let entry = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut poll = vec![
        entry(channel.as_fd().as_raw_fd()),
        entry(machine.happenings.wake.as_fd().as_raw_fd()),
    ];
    #[cfg(feature = "serial")]
    poll.extend(
        machine
            .serial
            .iter()
            .flat_map(crate::serial::Pump::poll_entries),
    );
    // SAFETY: the entries are initialised and counted; a negative descriptor is skipped.
    let ready = unsafe {
        libc::poll(
            poll.as_mut_ptr(),
            poll.len() as libc::nfds_t,
            limit.unwrap_or(-1),
        )
    };
    if ready < 0 {
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(Error::os("poll")(e));
        }
    }
    Ok(ready != 0)
}

/// Carries out the supervisor's orders; `false` once it has hung up.
fn orders(machine: &Machine, channel: &Channel) -> Result<bool, Error> {
    channel
        .set_nonblocking(true)
        .map_err(Error::os("control channel"))?;
    let mut asked = false;
    let outcome = loop {
        match channel.recv::<ToVmm>() {
            Ok(mut received) => match &received.message {
                ToVmm::PowerButton => machine.board.raise(PowerEvent::Button),
                ToVmm::Devices => asked = true,
                ToVmm::Reconnect {
                    id,
                    connection,
                    socket,
                } => {
                    let device = machine.devices.iter().find(|device| device.id == *id);
                    let (connection, socket) = (*connection, *socket);
                    let Some(device) = device else {
                        break Err(Error::Protocol("there is no device of that name"));
                    };
                    let socket = received.take(socket)?.into();
                    device.work.reconnect(Reconnect { connection, socket });
                }
                ToVmm::Start | ToVmm::Configure(_) => {
                    break Err(Error::Protocol("the machine is already running"));
                }
            },
            Err(e) if e.is_would_block() => break Ok(true),
            Err(anemone_ipc::Error::Closed) => break Ok(false),
            Err(e) => break Err(e.into()),
        }
    };
    channel
        .set_nonblocking(false)
        .map_err(Error::os("control channel"))?;
    if asked && matches!(outcome, Ok(true)) {
        channel.send(&devices(machine), &[])?;
    }
    outcome
}

fn run_vcpu(
    index: u32,
    vcpu: &mut dyn Vcpu,
    board: &Board,
    to: &Arc<Happenings>,
    jail: Result<(), Error>,
    has_pmem: bool,
) {
    let failed = |what: String| {
        to.fail(Event::Failed {
            message: format!("vCPU {index}: {what}"),
        });
    };
    if let Err(e) = jail {
        return failed(e.to_string());
    }
    loop {
        match vcpu.run(board) {
            Ok(Stop::Kicked) => {}
            Ok(Stop::TripleFault) => return to.set(TRIPLE_FAULT),
            Ok(Stop::Ended) => return to.set(SHUTDOWN),
            // KVM has no more to say when memory is missing.
            Err(e) if has_pmem && is_missing_memory(&e) => {
                return failed(format!(
                    "{e}: memory is missing; somebody may have made a file of persistent memory \
                     shorter, or its storage has failed"
                ));
            }
            Err(e) => return failed(e.to_string()),
        }
    }
}

fn is_missing_memory(error: &anemone_accel_api::Error) -> bool {
    matches!(error, anemone_accel_api::Error::Os { source, .. }
        if source.raw_os_error() == Some(libc::EFAULT))
}
