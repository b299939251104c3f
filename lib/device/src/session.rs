//! One vhost-user connection, seen from the back end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anemone_log::warn_limited;
use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, MAX_CONFIG_SIZE, protocol_features};
use anemone_vhost_user::{
    Backend, BackendRequestSender, Command, Error, Incoming, Request, VringAddr,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::inflight::{Pool, Region, Tracker};
use crate::memory::Memory;
use crate::vring::Again;
use crate::{Device, Host, Vring};

const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// Protocol features of every device.
const PROTOCOL_FEATURES: u64 = protocol_features::MQ
    | protocol_features::REPLY_ACK
    | protocol_features::BACKEND_REQ
    | protocol_features::CONFIG
    | protocol_features::INFLIGHT_SHMFD
    | protocol_features::RESET_DEVICE;

/// How long sending a reply may take. Replies are short, so only a front end that reads nothing
/// makes it wait.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// Requests taken in one go, so that a talkative front end does not keep the main loop.
const REQUESTS_PER_TURN: usize = 64;

/// A virtqueue as the front end has described it so far.
#[derive(Debug, Default)]
struct Ring {
    size: u16,
    addr: Option<VringAddr>,
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<Arc<OwnedFd>>,
    err: Option<Arc<OwnedFd>>,
    enabled: bool,
    started: bool,
}

/// The state of one connection.
#[derive(Debug)]
pub struct Session {
    backend: Backend,
    host: Host,
    features: u64,
    /// The front end has told its protocol features. Some tell them, and enable rings, before they
    /// tell the other features.
    protocol: bool,
    memory: Option<Memory>,
    /// Where chains in flight are tracked.
    inflight: Option<Arc<Region>>,
    rings: Vec<Ring>,
}

/// A request that is refused, and why.
type Outcome<T> = Result<T, String>;

impl Session {
    pub fn new(socket: UnixStream, device: &dyn Device, host: &Host) -> Self {
        let mut rings = Vec::new();
        rings.resize_with(device.queue_count(), Ring::default);
        Self {
            backend: Backend::new(socket, REPLY_TIMEOUT),
            host: host.clone(),
            features: 0,
            protocol: false,
            memory: None,
            inflight: None,
            rings,
        }
    }

    /// Whether there is a driver.
    #[cfg(feature = "compromised")]
    pub fn serves(&self) -> bool {
        self.rings.iter().any(|ring| ring.started)
    }

    /// Handles the requests that have arrived. An error ends the connection.
    pub fn handle_requests(
        &mut self,
        device: &mut dyn Device,
        pool: &mut Pool,
    ) -> Result<(), Error> {
        for _ in 0..REQUESTS_PER_TURN {
            match self.backend.try_recv()? {
                Some(incoming) => self.handle(incoming, device, pool)?,
                None => break,
            }
        }
        Ok(())
    }

    /// Stops everything; the device is ready for another connection.
    pub fn end(mut self, device: &mut dyn Device) {
        self.stop_serving(device);
        device.reset();
    }

    /// Stops everything, because the process ends. The guest may go on with the next one.
    pub fn finish(mut self, device: &mut dyn Device) {
        self.stop_serving(device);
    }

    fn stop_serving(&mut self, device: &mut dyn Device) {
        self.stop_all(device);
        self.host.set_requests(None);
    }

    fn handle(
        &mut self,
        incoming: Incoming,
        device: &mut dyn Device,
        pool: &mut Pool,
    ) -> Result<(), Error> {
        let Incoming {
            command,
            code,
            need_reply,
        } = incoming;
        match command {
            Command::GetFeatures => self.backend.reply_u64(code, offered(device)),
            Command::GetProtocolFeatures => self.backend.reply_u64(code, PROTOCOL_FEATURES),
            Command::GetQueueNum => self.backend.reply_u64(code, self.rings.len() as u64),
            Command::GetConfig { offset, size } => {
                let data = read_config(device, offset as usize, size as usize);
                self.backend.reply_config(offset, data.as_deref())
            }
            Command::GetVringBase { index } => {
                let Ok(number) = self.number(index) else {
                    return Err(Error::Protocol(format!("GET_VRING_BASE of ring {index}")));
                };
                self.stop(number, device);
                let ring = &mut self.rings[number];
                // The ring starts again when a new kick descriptor arrives.
                (ring.kick, ring.call, ring.err) = (None, None, None);
                let base = ring.base;
                self.backend.reply_vring_base(index, base)
            }
            Command::GetInflightFd(asked) => {
                let running = self.rings.iter().any(|ring| ring.started);
                let memory = match running {
                    true => Err("rings are started".to_owned()),
                    false => pool.give(&asked),
                };
                if let Err(why) = &memory {
                    warn_limited!("GET_INFLIGHT_FD refused: {why}");
                }
                let memory = memory.as_ref().ok();
                self.backend.reply_inflight(memory.map(|(d, fd)| (d, *fd)))
            }
            other => {
                let name = match Request::from_code(code) {
                    Some(request) => request.to_string(),
                    None => format!("request {code}"),
                };
                match self.apply(other, device) {
                    Ok(()) if need_reply => self.backend.reply_u64(code, 0),
                    Ok(()) => Ok(()),
                    Err(why) if need_reply => {
                        warn_limited!("{name} refused: {why}");
                        self.backend.reply_u64(code, 1)
                    }
                    Err(why) => Err(Error::Protocol(format!("{name}: {why}"))),
                }
            }
        }
    }

    /// Handles a request that has no answer of its own.
    fn apply(&mut self, command: Command, device: &mut dyn Device) -> Outcome<()> {
        match command {
            Command::SetOwner => Ok(()),
            Command::SetFeatures(features) => self.set_features(features, device),
            Command::SetProtocolFeatures(features) => match features & !PROTOCOL_FEATURES {
                0 => {
                    self.protocol = true;
                    Ok(())
                }
                unknown => Err(format!("{unknown:#x} were not offered")),
            },
            Command::ResetOwner => {
                self.forget_rings(device);
                Ok(())
            }
            Command::ResetDevice => {
                self.forget_rings(device);
                device.reset();
                Ok(())
            }
            Command::SetMemTable(table) => {
                let memory = Memory::map(table)?;
                self.stop_all(device);
                self.memory = Some(memory);
                self.start_all(device)
            }
            Command::SetVringNum { index, size } => {
                let size = u16::try_from(size)
                    .ok()
                    .filter(|size| size.is_power_of_two())
                    .ok_or_else(|| format!("{size} entries: not a power of two up to 32768"))?;
                self.change(index, device, |ring| ring.size = size)
            }
            Command::SetVringAddr { addr, .. } if addr.log.is_some() => {
                Err("logging was not offered".into())
            }
            Command::SetVringAddr { index, addr } => {
                self.change(index, device, |ring| ring.addr = Some(addr))
            }
            Command::SetVringBase { index, base } => {
                let base = u16::try_from(base).map_err(|_| format!("base {base}"))?;
                self.change(index, device, |ring| ring.base = base)
            }
            Command::SetVringKick { index, fd: None } => {
                Err(format!("ring {index} without a kick descriptor"))
            }
            Command::SetVringKick {
                index,
                fd: Some(fd),
            } => {
                set_nonblocking(&fd).map_err(|e| format!("kick descriptor: {e}"))?;
                self.change(index, device, |ring| ring.kick = Some(fd))
            }
            Command::SetVringCall { index, fd } => self.set_call(index, fd, device),
            Command::SetVringErr { index, fd } => {
                self.change(index, device, |ring| ring.err = fd.map(Arc::new))
            }
            Command::SetVringEnable { index, enable } => {
                if self.features & F_PROTOCOL_FEATURES == 0 && !self.protocol {
                    return Err("protocol features have not been negotiated".into());
                }
                self.change(index, device, |ring| ring.enabled = enable)
            }
            Command::SetConfig { offset, data } => {
                let offset = offset as usize;
                if offset + data.len() > device.config().len() {
                    return Err(format!("{} bytes at {offset}", data.len()));
                }
                device.write_config(offset, &data);
                Ok(())
            }
            Command::SetBackendReqFd(socket) => {
                let sender = BackendRequestSender::new(UnixStream::from(socket));
                self.host.set_requests(Some(sender));
                Ok(())
            }
            Command::SetInflightFd { description, fd } => {
                let region = Region::map(&description, fd.as_fd())?;
                self.stop_all(device);
                self.inflight = Some(Arc::new(region));
                self.start_all(device)
            }
            Command::Unknown(_) => Err("not known here".into()),
            Command::GetFeatures
            | Command::GetProtocolFeatures
            | Command::GetQueueNum
            | Command::GetConfig { .. }
            | Command::GetInflightFd(_)
            | Command::GetVringBase { .. } => Ok(()),
        }
    }

    fn set_features(&mut self, features: u64, device: &mut dyn Device) -> Outcome<()> {
        match features & !offered(device) {
            0 => {}
            unknown => return Err(format!("{unknown:#x} were not offered")),
        }
        self.stop_all(device);
        self.features = features;
        if features & F_PROTOCOL_FEATURES == 0 {
            // Spec, "Ring states": without the feature rings begin enabled.
            for ring in &mut self.rings {
                ring.enabled = true;
            }
        }
        self.start_all(device)
    }

    /// An eventfd replaces another without a pause, as front ends do to mask an interrupt.
    fn set_call(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
        device: &mut dyn Device,
    ) -> Outcome<()> {
        let number = self.number(index)?;
        let ring = &self.rings[number];
        if ring.started
            && let (Some(current), Some(new)) = (&ring.call, &fd)
        {
            // SAFETY: both descriptors are open and owned here; the number that is replaced stays
            // owned by `current`.
            let rc = unsafe { libc::dup3(new.as_raw_fd(), current.as_raw_fd(), libc::O_CLOEXEC) };
            return match rc {
                -1 => Err(format!("call descriptor: {}", io::Error::last_os_error())),
                _ => Ok(()),
            };
        }
        self.change(index, device, |ring| ring.call = fd.map(Arc::new))
    }

    /// Changes a ring. A started one is stopped for it and starts again.
    fn change(
        &mut self,
        index: u32,
        device: &mut dyn Device,
        change: impl FnOnce(&mut Ring),
    ) -> Outcome<()> {
        let number = self.number(index)?;
        self.stop(number, device);
        change(&mut self.rings[number]);
        self.start(number, device)
    }

    fn number(&self, index: u32) -> Outcome<usize> {
        let number = index as usize;
        if number < self.rings.len() {
            return Ok(number);
        }
        Err(format!("ring {index}, there are {}", self.rings.len()))
    }

    fn start_all(&mut self, device: &mut dyn Device) -> Outcome<()> {
        (0..self.rings.len()).try_for_each(|number| self.start(number, device))
    }

    fn stop_all(&mut self, device: &mut dyn Device) {
        for number in 0..self.rings.len() {
            self.stop(number, device);
        }
    }

    fn forget_rings(&mut self, device: &mut dyn Device) {
        self.stop_all(device);
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        // The driver begins anew; it does not wait for what it asked for before.
        if let Some(region) = &self.inflight {
            region.clear_all();
        }
    }

    fn stop(&mut self, number: usize, device: &mut dyn Device) {
        let ring = &mut self.rings[number];
        if ring.started {
            ring.base = device.stop_queue(number);
            ring.started = false;
        }
    }

    /// Starts a ring if it is enabled and its description is complete.
    fn start(&mut self, number: usize, device: &mut dyn Device) -> Outcome<()> {
        let ring = &mut self.rings[number];
        let (Some(memory), Some(addr), Some(kick)) = (&self.memory, &ring.addr, &ring.kick) else {
            return Ok(());
        };
        if ring.started || !ring.enabled || ring.size == 0 {
            return Ok(());
        }
        if self.features & VIRTIO_F_VERSION_1 == 0 {
            return Err("the driver has not accepted VIRTIO_F_VERSION_1".into());
        }
        let mut queue = queue(ring, addr, memory, self.features)
            .map_err(|why| format!("ring {number}: {why}"))?;
        let (mut tracker, mut chains) = (None, None);
        if let Some(region) = &self.inflight {
            let used = queue.next_used();
            let (new, recovered) = Tracker::start(region, number, ring.size, used, ring.base)
                .map_err(|why| format!("ring {number}: {why}"))?;
            queue.set_next_avail(recovered.next_avail);
            if !recovered.again.is_empty() {
                let count = recovered.again.len();
                log::info!("ring {number}: {count} chains were in flight and are taken again");
            }
            chains = Again::new(&recovered.again, &queue, &memory.guest)
                .map_err(|why| format!("ring {number}: {why}"))?;
            tracker = Some(new);
        }
        let kick = kick.try_clone().map_err(|e| e.to_string())?;
        let again = kick.try_clone().map_err(|e| e.to_string())?;
        let vring = Vring {
            index: number,
            queue,
            memory: Arc::clone(&memory.guest),
            kick,
            call: ring.call.clone(),
            err: ring.err.clone(),
            features: self.features,
            untold: 0,
            tracker,
            again: chains,
            popped_again: false,
            popped_new: 0,
        };
        device
            .start_queue(vring)
            .map_err(|e| format!("ring {number}: {e}"))?;
        ring.started = true;
        // An earlier process may have taken a kick and not the chains, or returned chains and not
        // interrupted. One of either too many does no harm.
        crate::vring::signal(&again);
        if let Some(call) = &ring.call {
            crate::vring::signal(call);
        }
        Ok(())
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.backend.as_fd()
    }
}

fn offered(device: &dyn Device) -> u64 {
    device.features()
        | VIRTIO_F_VERSION_1
        | VIRTIO_RING_F_EVENT_IDX
        | VIRTIO_RING_F_INDIRECT_DESC
        | F_PROTOCOL_FEATURES
}

/// A front end may ask for more than the device has: fields of features it does not offer. They
/// read as zero.
fn read_config(device: &dyn Device, offset: usize, size: usize) -> Option<Vec<u8>> {
    let end = offset
        .checked_add(size)
        .filter(|&end| end <= MAX_CONFIG_SIZE)?;
    let mut config = device.config();
    config.resize(config.len().max(end), 0);
    Some(config[offset..end].to_vec())
}

/// Checks that a ring lies in guest memory and makes it.
fn queue(ring: &Ring, addr: &VringAddr, memory: &Memory, features: u64) -> Outcome<Queue> {
    // virtio 1.3, 2.7: sizes of the three parts, with the event fields at their ends.
    let size = usize::from(ring.size);
    let parts = [
        ("descriptor table", addr.descriptor, 16 * size),
        ("available ring", addr.available, 6 + 2 * size),
        ("used ring", addr.used, 6 + 8 * size),
    ];
    let mut found = [GuestAddress(0); 3];
    for (part, (name, user, length)) in found.iter_mut().zip(parts) {
        *part = memory
            .guest_addr(user)
            .map(GuestAddress)
            .filter(|&start| memory.guest.check_range(start, length))
            .ok_or_else(|| format!("{name} at {user:#x} is not in guest memory"))?;
    }
    let [table, available, used] = found;
    let mut queue = Queue::new(ring.size).map_err(|e| e.to_string())?;
    queue
        .try_set_desc_table_address(table)
        .and_then(|()| queue.try_set_avail_ring_address(available))
        .and_then(|()| queue.try_set_used_ring_address(used))
        .map_err(|e| e.to_string())?;
    queue.set_event_idx(features & VIRTIO_RING_F_EVENT_IDX != 0);
    queue.set_next_avail(ring.base);
    queue.set_ready(true);
    // The used index is not part of the protocol: it goes on from where the ring says.
    let next_used = queue
        .used_idx(&*memory.guest, std::sync::atomic::Ordering::Acquire)
        .map_err(|e| e.to_string())?;
    queue.set_next_used(next_used.0);
    Ok(queue)
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take no pointers; the descriptor is open.
    let rc = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if rc < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
