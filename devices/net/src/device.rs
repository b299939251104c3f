//! The network device: features, configuration space, control queue, and its queue pairs.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anemone_device::{Chain, Device, Host, RingError, Vring, Watch};
use anemone_log::warn_limited;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::control::{self, Mode, Request};
use crate::filter::{Filter, Mac};
use crate::net::{STATUS_LINK_UP, feature};
use crate::pair::Command;
use crate::tap;
use crate::uplink::Uplink;
use crate::worker::Worker;

/// Commands served in one go, so that a busy guest does not keep the main loop.
const COMMANDS_PER_TURN: usize = 16;

const CONTROL: u64 = 0;
const KEEPER: u64 = 1;
const PAUSE: u64 = 2;
const LOST: u64 = 3;

/// What the device shows and does.
pub struct Settings {
    /// Address of the guest; it chooses one itself when absent.
    pub mac: Option<Mac>,
    /// Largest IP packet.
    pub mtu: Option<u16>,
    /// Only frames from and to the guest's address pass.
    pub mac_filter: bool,
    /// Feature bits that the taps have.
    pub offloads: u64,
}

/// A virtio-net device.
pub struct Net {
    settings: Settings,
    workers: Vec<Worker>,
    /// Second descriptors of the taps, one for each pair; empty without taps.
    taps: Vec<OwnedFd>,
    uplink: Option<Uplink>,
    host: Option<Host>,
    control: Option<Vring>,
    control_broken: bool,
    /// Features for which the taps have been set.
    accepted: u64,
    /// Queue pairs that the driver uses, where it says so on a control queue of ours. A front end
    /// that serves the control queue itself starts and stops queues instead.
    pairs_in_use: usize,
    /// Receive queues that are started.
    started: Vec<bool>,
    /// Queues of the taps that are attached.
    attached: Vec<bool>,
    all_multicast: bool,
    promiscuous: bool,
    groups: Option<Vec<Mac>>,
    link_up: bool,
}

impl Net {
    /// A device with these queue pairs.
    pub fn new(
        settings: Settings,
        workers: Vec<Worker>,
        taps: Vec<OwnedFd>,
        uplink: Option<Uplink>,
    ) -> Self {
        let pairs = workers.len();
        Self {
            settings,
            workers,
            taps,
            uplink,
            host: None,
            control: None,
            control_broken: false,
            accepted: 0,
            pairs_in_use: 1,
            started: vec![false; pairs],
            attached: vec![true; pairs],
            all_multicast: false,
            promiscuous: false,
            groups: None,
            link_up: true,
        }
    }

    /// Number of the control queue for a driver with these features (5.1.2).
    fn control_index(&self, features: u64) -> Option<usize> {
        match features {
            bits if bits & feature::CTRL_VQ == 0 => None,
            bits if bits & feature::MQ == 0 => Some(2),
            _ => Some(2 * self.workers.len()),
        }
    }

    /// Attaches the queues of the tap that the driver reads, and detaches the others, so that no
    /// frame waits where nobody fetches it.
    fn attach_queues(&mut self) {
        if self.taps.len() < 2 {
            return;
        }
        for (pair, tap) in self.taps.iter().enumerate() {
            let in_use = self.control.is_none() || pair < self.pairs_in_use;
            let wanted = self.started[pair] && in_use;
            if wanted == self.attached[pair] {
                continue;
            }
            let worker = &mut self.workers[pair];
            // A detached queue cannot be read, so the thread must know before and after.
            let result = (|| {
                if !wanted {
                    worker.run(Command::Active(false))?;
                }
                tap::attach(tap.as_fd(), wanted)?;
                if wanted {
                    worker.run(Command::Active(true))?;
                }
                Ok::<_, io::Error>(())
            })();
            match result {
                Ok(()) => self.attached[pair] = wanted,
                Err(error) => log::error!("queue {pair} of the tap: {error}"),
            }
        }
    }

    fn set_offloads(&mut self, features: u64) {
        if self.accepted == features {
            return;
        }
        // The queues of a tap share its offloads.
        if let Some(tap) = self.taps.first()
            && let Err(error) = tap::set_offloads(tap.as_fd(), features)
        {
            log::error!("the tap does not take the offloads: {error}");
        }
        self.accepted = features;
    }

    fn filter(&self) -> Option<Filter> {
        let mac = self.settings.mac.filter(|_| self.settings.mac_filter)?;
        let mut filter = Filter::new(mac);
        if !self.all_multicast && !self.promiscuous {
            filter.set_groups(self.groups.clone());
        }
        Some(filter)
    }

    fn update_filters(&mut self) {
        let filter = self.filter();
        for (pair, worker) in self.workers.iter_mut().enumerate() {
            if let Err(error) = worker.run(Command::Filter(filter.clone())) {
                log::error!("queue pair {pair}: {error}");
            }
        }
    }

    fn serve_control(&mut self) {
        let Some(mut ring) = self.control.take() else {
            return;
        };
        let result = self.serve_commands(&mut ring);
        self.control = Some(ring);
        // Which pairs are in use depends on whether there is a control queue.
        self.attach_queues();
        if let (Err(error), Some(ring)) = (result, &self.control) {
            ring.give_up(&error);
            self.control_broken = true;
        }
    }

    fn serve_commands(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        let memory = std::sync::Arc::clone(&ring.memory);
        for _ in 0..COMMANDS_PER_TURN {
            let Some(chain) = ring.pop()? else {
                ring.notify()?;
                if ring.enable_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let done = command(&memory, chain.clone()).is_some_and(|c| self.obey(&c));
            let written = acknowledge(&memory, chain, done);
            ring.push_used(head, written)?;
        }
        ring.notify()?;
        ring.kick_again();
        Ok(())
    }

    /// Carries a command out; whether it could be.
    fn obey(&mut self, command: &[u8]) -> bool {
        match control::parse(command) {
            Some(Request::Pairs(pairs)) => {
                let pairs = usize::from(pairs);
                let possible = (1..=self.workers.len()).contains(&pairs);
                if possible {
                    self.pairs_in_use = pairs;
                }
                return possible;
            }
            Some(_) if !self.settings.mac_filter => return false,
            Some(Request::Everything { mode, on }) => match mode {
                Mode::Promiscuous => self.promiscuous = on,
                Mode::AllMulticast => self.all_multicast = on,
            },
            Some(Request::Groups(groups)) => self.groups = Some(groups),
            None => {
                warn_limited!("a command that was not offered");
                return false;
            }
        }
        self.update_filters();
        true
    }

    /// Gives the queue pair another connection, or none.
    fn connect(&mut self, socket: Option<OwnedFd>) {
        for worker in &mut self.workers {
            let socket = socket.as_ref().map(|fd| {
                set_nonblocking(fd)?;
                fd.try_clone()
            });
            let result = socket
                .transpose()
                .and_then(|s| worker.run(Command::Connection(s)));
            if let Err(error) = result {
                log::error!("a connection cannot be used: {error}");
            }
        }
    }

    /// Tells the driver when the link comes or goes.
    fn update_link(&mut self) {
        let up = self.uplink.as_ref().is_none_or(Uplink::is_up);
        if up != self.link_up {
            self.link_up = up;
            log::info!("the link is {}", if up { "up" } else { "down" });
            if let Some(host) = &self.host {
                host.config_changed();
            }
        }
    }
}

impl Device for Net {
    fn features(&self) -> u64 {
        let given = |yes, bits| if yes { bits } else { 0 };
        let many = self.workers.len() > 1;
        let filter = self.settings.mac_filter;
        feature::MRG_RXBUF
            | feature::STATUS
            | self.settings.offloads
            | given(self.settings.mac.is_some(), feature::MAC)
            | given(self.settings.mtu.is_some(), feature::MTU)
            | given(many, feature::MQ)
            | given(filter, feature::CTRL_RX)
            | given(many || filter, feature::CTRL_VQ)
    }

    fn queue_count(&self) -> usize {
        // A front end may put the control queue at number 2 for a driver without MQ.
        2 * self.workers.len() + 1
    }

    /// `struct virtio_net_config` up to `mtu` (5.1.4).
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(12);
        config.extend(self.settings.mac.unwrap_or(Mac([0; 6])).0);
        let status = if self.link_up { STATUS_LINK_UP } else { 0 };
        config.extend(status.to_le_bytes());
        config.extend((self.workers.len() as u16).to_le_bytes());
        config.extend(self.settings.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn start_threads(&mut self) -> io::Result<()> {
        self.workers.iter_mut().try_for_each(Worker::start_thread)
    }

    fn start_queue(&mut self, ring: Vring) -> io::Result<()> {
        self.set_offloads(ring.features);
        let index = ring.index;
        if self.control_index(ring.features) == Some(index) {
            self.control = Some(ring);
            self.control_broken = false;
            self.attach_queues();
            return Ok(());
        }
        let none = || io::Error::new(io::ErrorKind::InvalidInput, "there is no such queue");
        let pair = index / 2;
        let worker = self.workers.get_mut(pair).ok_or_else(none)?;
        if index.is_multiple_of(2) {
            worker.run(Command::StartRx(ring))?;
            self.started[pair] = true;
            self.attach_queues();
        } else {
            worker.run(Command::StartTx(ring))?;
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> u16 {
        if let Some(ring) = self.control.take_if(|ring| ring.index == index) {
            return ring.queue.next_avail();
        }
        let pair = index / 2;
        let Some(worker) = self.workers.get_mut(pair) else {
            return 0;
        };
        let command = match index % 2 {
            0 => Command::StopRx,
            _ => Command::StopTx,
        };
        let base = worker.run(command).unwrap_or_else(|error| {
            log::error!("queue {index}: {error}");
            0
        });
        if index.is_multiple_of(2) {
            self.started[pair] = false;
            self.attach_queues();
        }
        base
    }

    fn reset(&mut self) {
        self.pairs_in_use = 1;
        (self.all_multicast, self.promiscuous, self.groups) = (false, false, None);
        if self.settings.mac_filter {
            self.update_filters();
        }
    }

    fn attach(&mut self, host: &Host) {
        self.host = Some(host.clone());
    }

    fn event_fds(&self) -> Vec<Watch<'_>> {
        let mut watches = Vec::new();
        if let Some(ring) = &self.control
            && !self.control_broken
        {
            watches.push((ring.kick.as_fd(), CONTROL));
        }
        for worker in &self.workers {
            watches.push((worker.lost().as_fd(), LOST));
        }
        if let Some(uplink) = &self.uplink {
            watches.extend(uplink.channel().map(|fd| (fd, KEEPER)));
            watches.extend(uplink.timer().map(|fd| (fd, PAUSE)));
        }
        watches
    }

    fn handle_event(&mut self, token: u64) {
        match (token, &mut self.uplink) {
            (CONTROL, _) => {
                let live = self.control.as_ref().is_some_and(Vring::clear_kick);
                self.control_broken |= !live;
                if live {
                    self.serve_control();
                }
            }
            (LOST, uplink) => {
                let mut lost = false;
                for worker in &self.workers {
                    lost |= worker.lost().take();
                }
                match uplink {
                    _ if !lost => {}
                    Some(uplink) => uplink.failed(),
                    None => {
                        // Nobody can make another one from in here.
                        log::error!("the connection to the network is gone");
                        std::process::exit(1);
                    }
                }
            }
            (KEEPER, Some(uplink)) => {
                if let Some(socket) = uplink.channel_event() {
                    self.connect(Some(socket));
                }
            }
            (PAUSE, Some(uplink)) => uplink.timer_event(),
            _ => {}
        }
        self.update_link();
    }
}

/// The bytes of a command without the acknowledgement; `None` if they cannot be read.
fn command(memory: &GuestMemoryMmap, chain: Chain) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for buffer in chain.readable() {
        let start = bytes.len();
        let end = start + buffer.len() as usize;
        if end > control::MAX_COMMAND {
            return None;
        }
        bytes.resize(end, 0);
        memory.read_slice(&mut bytes[start..], buffer.addr()).ok()?;
    }
    Some(bytes)
}

/// Writes the acknowledgement into the first writable byte; the number of bytes written.
fn acknowledge(memory: &GuestMemoryMmap, chain: Chain, done: bool) -> u32 {
    let ack = if done { control::OK } else { control::ERR };
    let buffer = chain.writable().find(|buffer| buffer.len() > 0);
    let written = buffer.is_some_and(|b| memory.write_slice(&[ack], b.addr()).is_ok());
    written.into()
}

/// Makes reads and writes return when they would wait.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: F_GETFL and F_SETFL take no pointers; the descriptor is open.
    let rc = unsafe {
        let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    match rc {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
