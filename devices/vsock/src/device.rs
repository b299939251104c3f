//! The socket device (virtio 1.3, 5.10): three rings and the sockets of the host.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use anemone_device::{Device, Host, RingError, Side, Vring, Watch};
use anemone_ipc::Channel;
use anemone_log::warn_limited;
use libc::iovec;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::connections::{Buffers, Connections, Delivery, Incoming};
use crate::packet::{HEADER_SIZE, Header};
use crate::parts;
use crate::state::SLOTS;
use crate::sys;

/// Stream sockets.
const VIRTIO_VSOCK_F_STREAM: u64 = 1 << 0;
/// The one event there is (5.10.6.7).
const VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: u32 = 0;

/// To the guest, from the guest, events.
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Tokens of the rings' kicks are the rings' numbers.
const LISTENER: u64 = 3;
const SOCKETS: u64 = 4;
const BROKER: u64 = 5;

/// Chains of one ring handled in one go, so that a busy guest does not keep the main loop.
const ROUNDS: usize = 64;
/// Clients taken in one go.
const CLIENTS: usize = 16;
/// Descriptors beside those of the rings and of the connections.
const OTHER_FILES: u64 = 16;

/// A started ring, unless the driver has broken it.
struct Ring {
    vring: Vring,
    broken: bool,
}

/// The device.
pub struct Vsock {
    cid: u64,
    listener: UnixListener,
    connections: Connections,
    rings: [Option<Ring>; 3],
    buffers: Buffers,
    /// A packet of the guest in pieces. Kept for its memory only.
    packet: Vec<iovec>,
    /// A ring has started since there is a front end.
    begun: bool,
    /// Whether the guest has connections of an earlier time is not known yet.
    unknown: bool,
    /// It has, and they are lost.
    lost: bool,
}

impl Vsock {
    /// A device whose guest has the address `cid`.
    ///
    /// # Errors
    /// A descriptor cannot be had.
    pub fn new(cid: u64, listener: UnixListener, broker: Option<Channel>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            cid,
            listener,
            connections: Connections::new(cid, broker)?,
            rings: [None, None, None],
            buffers: Buffers::default(),
            packet: Vec::new(),
            begun: false,
            unknown: false,
            lost: false,
        })
    }

    /// Works on a ring until the driver turns out to have broken it.
    fn on_ring(
        &mut self,
        index: usize,
        work: impl FnOnce(&mut Self, &mut Vring) -> Result<(), RingError>,
    ) {
        let Some(mut ring) = self.rings[index].take() else {
            return;
        };
        if !ring.broken
            && let Err(error) = work(self, &mut ring.vring)
        {
            ring.vring.give_up(&error);
            ring.broken = true;
        }
        self.rings[index] = Some(ring);
    }

    /// Moves packets both ways until nothing moves.
    fn pump(&mut self) {
        self.on_ring(TX, Self::take_packets);
        self.connections.dial();
        self.on_ring(RX, Self::deliver);
        if self.lost {
            self.on_ring(EVENT, Self::report_loss);
        }
    }

    fn take_packets(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        for _ in 0..ROUNDS {
            // The guest has to take refusals first; then its buffers kick.
            if self.connections.is_congested() {
                return ring.notify();
            }
            let Some(chain) = ring.pop()? else {
                ring.notify()?;
                if ring.enable_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let (head, again) = (chain.head_index(), ring.popped_again());
            let used = ring.queue.next_used();
            // The pieces point into it.
            let memory = Arc::clone(&ring.memory);
            self.packet.clear();
            let sound = parts::gather(&memory, chain, Side::Readable, &mut self.packet);
            match parts::split_header(&mut self.packet, 0) {
                Some(payload) if sound => {
                    let mut bytes = [0; HEADER_SIZE];
                    // SAFETY: pieces of guest memory, which is mapped, and an array.
                    unsafe { parts::copy(&self.packet[..payload], &[parts::of(&mut bytes)]) };
                    self.packet.drain(..payload);
                    self.connections.take_packet(Incoming {
                        header: Header::parse(&bytes),
                        payload: &mut self.packet,
                        head,
                        used,
                        again,
                    });
                }
                _ => warn_limited!("a packet of the driver has no whole header"),
            }
            ring.push_used(head, 0)?;
        }
        ring.notify()?;
        ring.kick_again();
        Ok(())
    }

    fn deliver(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        let mut buffers = std::mem::take(&mut self.buffers);
        let congested = self.connections.is_congested();
        let mut more = true;
        for _ in 0..ROUNDS {
            match self.connections.deliver(ring, &mut buffers)? {
                Delivery::Done => {}
                Delivery::Idle => {
                    more = false;
                    break;
                }
                Delivery::Starved => {
                    ring.notify()?;
                    more = ring.enable_kicks()?;
                    break;
                }
            }
        }
        self.buffers = buffers;
        ring.notify()?;
        if more || (congested && !self.connections.is_congested()) {
            ring.kick_again();
        }
        Ok(())
    }

    /// Tells the guest that its connections are gone (5.10.6.7).
    fn report_loss(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        let Some(chain) = ring.pop()? else {
            return Ok(());
        };
        let head = chain.head_index();
        let written = write_event(&ring.memory, chain.writable());
        self.lost = false;
        ring.push_used(head, written)?;
        ring.notify()
    }

    fn accept(&mut self) {
        for _ in 0..CLIENTS {
            match sys::accept(self.listener.as_fd()) {
                Ok(client) => self.connections.accept(client),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    warn_limited!("a client of the host cannot be accepted: {error}");
                    return;
                }
            }
        }
    }
}

/// Writes the event; how many bytes.
fn write_event(
    memory: &GuestMemoryMmap,
    mut buffers: impl Iterator<Item = virtio_queue::desc::split::Descriptor>,
) -> u32 {
    let event = VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.to_le_bytes();
    let written = buffers
        .next()
        .filter(|buffer| buffer.len() as usize >= event.len())
        .map(|buffer| memory.write_slice(&event, buffer.addr()));
    match written {
        Some(Ok(())) => event.len() as u32,
        _ => {
            warn_limited!("a buffer of the driver has no room for an event");
            0
        }
    }
}

impl Device for Vsock {
    fn features(&self) -> u64 {
        VIRTIO_VSOCK_F_STREAM
    }

    fn queue_count(&self) -> usize {
        self.rings.len()
    }

    fn open_files(&self) -> u64 {
        SLOTS as u64 + OTHER_FILES
    }

    /// guest_cid (64 bits).
    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn start_queue(&mut self, vring: Vring) -> io::Result<()> {
        let index = vring.index;
        let used = vring.queue.next_used();
        if !std::mem::replace(&mut self.begun, true) {
            self.unknown = self.connections.take_over();
        }
        // A ring at its beginning belongs to a driver that has no connections.
        if index == RX && std::mem::take(&mut self.unknown) {
            self.lost = used != 0;
        }
        self.rings[index] = Some(Ring {
            vring,
            broken: false,
        });
        if index == RX {
            self.on_ring(RX, |device, ring| {
                let mut buffers = std::mem::take(&mut device.buffers);
                device.connections.resume(ring, &mut buffers)?;
                device.buffers = buffers;
                Ok(())
            });
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> u16 {
        let ring = self.rings[index].take();
        ring.map_or(0, |ring| ring.vring.queue.next_avail())
    }

    fn reset(&mut self) {
        self.connections.forget_all();
        (self.begun, self.lost) = (false, false);
    }

    fn event_fds(&self) -> Vec<Watch<'_>> {
        let mut watches = Vec::with_capacity(6);
        for (index, ring) in self.rings.iter().enumerate() {
            if let Some(ring) = ring.as_ref().filter(|ring| !ring.broken) {
                watches.push((ring.vring.kick.as_fd(), index as u64));
            }
        }
        // Nobody can be connected to a guest that is not there (yet): clients wait.
        if self.rings[RX].as_ref().is_some_and(|ring| !ring.broken) {
            watches.push((self.listener.as_fd(), LISTENER));
            watches.push((self.connections.poller(), SOCKETS));
        }
        watches.extend(self.connections.broker().map(|fd| (fd, BROKER)));
        watches
    }

    fn handle_event(&mut self, token: u64) {
        match token {
            LISTENER => self.accept(),
            SOCKETS => {
                self.connections.poll();
            }
            BROKER => self.connections.take_answers(),
            index => {
                if let Some(Some(ring)) = self.rings.get_mut(index as usize) {
                    ring.broken |= !ring.vring.clear_kick();
                }
            }
        }
        self.pump();
    }

    fn attach(&mut self, host: &Host) {
        self.connections.attach(host);
    }

    fn restore(&mut self, key: u64, fd: OwnedFd) {
        self.connections.restore(key, fd);
    }

    fn dialed(&mut self, id: u64, socket: Option<OwnedFd>) {
        self.connections.dialed(id, socket);
        self.pump();
    }
}
