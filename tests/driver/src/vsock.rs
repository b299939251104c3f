//! A guest's socket driver (virtio 1.3, 5.10): packets in good faith or not, and streams with
//! credit.

use std::borrow::BorrowMut;
use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use crate::{Buffer, Device, Error, Queue, Result};

/// Length of a packet's header.
pub const HEADER: usize = 44;
/// The host's address.
pub const HOST_CID: u64 = 2;
/// Packet type of streams.
pub const STREAM: u16 = 1;
/// Queue numbers.
#[allow(missing_docs, reason = "names of the specification")]
pub mod queue {
    pub const RX: usize = 0;
    pub const TX: usize = 1;
    pub const EVENT: usize = 2;
}
/// Packet operations.
#[allow(missing_docs, reason = "names of the specification")]
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}
/// Flags of a SHUTDOWN: the sender receives, or sends, no more.
#[allow(missing_docs, reason = "names of the specification")]
pub mod shutdown {
    pub const RCV: u32 = 1;
    pub const SEND: u32 = 2;
}

/// Most data in a packet of the guest.
const MAX_DATA: usize = 64 << 10;
/// Data in one of the guest's receive buffers, as in Linux.
const RX_DATA: usize = 4096;
const RX_BUFFERS: usize = 48;
const TX_BUFFERS: usize = 16;
/// Longest wait for a free transmit buffer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Receive buffer of a stream.
pub const BUFFER: u32 = 64 << 10;

/// A packet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields of struct virtio_vsock_hdr")]
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    /// What follows the header.
    pub data: Vec<u8>,
}

impl Packet {
    /// The header as bytes.
    pub fn header(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let long = |at| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let word = |at| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let half = |at| u16::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: bytes[HEADER..].to_vec(),
        }
    }
}

/// A stream of the guest.
#[derive(Debug, Default)]
pub struct Stream {
    /// Ports: the guest's, the host's.
    pub ports: (u32, u32),
    /// The other side has accepted.
    pub open: bool,
    /// The other side has sent RST.
    pub reset: bool,
    /// What the other side has shut down.
    pub shut: u32,
    /// Bytes that have come and were not read.
    pub data: VecDeque<u8>,
    sent: u32,
    peer_buffer: u32,
    peer_taken: u32,
    read: u32,
    told: u32,
}

impl Stream {
    /// Bytes that may be sent.
    pub fn credit(&self) -> u32 {
        self.peer_buffer
            .saturating_sub(self.sent.wrapping_sub(self.peer_taken))
    }
}

/// A guest with its socket driver.
#[derive(Debug)]
pub struct Guest<D = Device> {
    /// The device, or what has it.
    pub device: D,
    /// The guest's address.
    pub cid: u64,
    /// All streams there have been; their numbers are the indices.
    pub streams: Vec<Stream>,
    /// Streams that came from the host and were not asked for yet.
    pub accepted: VecDeque<usize>,
    /// Ports that accept.
    pub listening: HashSet<u32>,
    by_ports: HashMap<(u32, u32), usize>,
    next_port: u32,
    rx: HashMap<u32, u64>,
    tx: HashMap<u32, u64>,
    tx_free: Vec<u64>,
}

impl<D: BorrowMut<Device>> Guest<D> {
    /// Takes over a device whose queues run, and gives it receive buffers.
    pub fn new(device: D, cid: u64) -> Self {
        let memory = device.borrow().memory.clone();
        let tx = (0..TX_BUFFERS).map(|_| memory.alloc((HEADER + MAX_DATA) as u64, 16));
        let mut guest = Self {
            tx_free: tx.collect(),
            device,
            cid,
            streams: Vec::new(),
            accepted: VecDeque::new(),
            listening: HashSet::new(),
            by_ports: HashMap::new(),
            next_port: 10_000,
            rx: HashMap::new(),
            tx: HashMap::new(),
        };
        for _ in 0..RX_BUFFERS {
            let buffer = memory.alloc((HEADER + RX_DATA) as u64, 16);
            guest.offer(buffer);
        }
        guest.publish(queue::RX);
        guest
    }

    fn queues(&mut self) -> &mut [Queue] {
        &mut self.device.borrow_mut().queues
    }

    fn offer(&mut self, buffer: u64) {
        let parts = [
            Buffer {
                addr: buffer,
                len: HEADER as u32,
            },
            Buffer {
                addr: buffer + HEADER as u64,
                len: RX_DATA as u32,
            },
        ];
        let head = self.queues()[queue::RX].add(&[], &parts);
        // Each buffer had its descriptors before.
        self.rx.insert(head.map_or(u32::MAX, u32::from), buffer);
    }

    fn publish(&mut self, index: usize) {
        let queue = &mut self.queues()[index];
        queue.publish();
        queue.kick();
    }

    /// Sends a packet as it is, in one descriptor or two.
    ///
    /// # Errors
    /// The device does not return earlier packets in time.
    pub fn send(&mut self, packet: &Packet) -> Result<()> {
        let buffer = self.transmit_buffer(PATIENCE)?;
        let buffer = buffer.ok_or(Error::Timeout("packets are not returned"))?;
        let memory = self.device.borrow().memory.clone();
        memory.write(buffer, &packet.header());
        memory.write(buffer + HEADER as u64, &packet.data);
        let mut parts = vec![Buffer {
            addr: buffer,
            len: HEADER as u32,
        }];
        if !packet.data.is_empty() {
            parts.push(Buffer {
                addr: buffer + HEADER as u64,
                len: packet.data.len() as u32,
            });
        }
        let head = self.queues()[queue::TX].add(&parts, &[]);
        self.tx.insert(head.map_or(u32::MAX, u32::from), buffer);
        self.publish(queue::TX);
        Ok(())
    }

    fn transmit_buffer(&mut self, timeout: Duration) -> Result<Option<u64>> {
        loop {
            while let Some(used) = self.queues()[queue::TX].take_used() {
                self.tx_free.extend(self.tx.remove(&used.head));
            }
            if let Some(buffer) = self.tx_free.pop() {
                return Ok(Some(buffer));
            }
            if timeout.is_zero() || !self.queues()[queue::TX].wait(timeout)? {
                return Ok(None);
            }
        }
    }

    /// Whether the device has returned all packets.
    pub fn is_quiet(&mut self) -> bool {
        while let Some(used) = self.queues()[queue::TX].take_used() {
            self.tx_free.extend(self.tx.remove(&used.head));
        }
        self.tx.is_empty()
    }

    /// The next packet as it is; `None` if none has come after `timeout`.
    ///
    /// # Errors
    /// Polling fails.
    pub fn receive(&mut self, timeout: Duration) -> Result<Option<Packet>> {
        loop {
            let Some(used) = self.queues()[queue::RX].take_used() else {
                if timeout.is_zero() || !self.queues()[queue::RX].wait(timeout)? {
                    return Ok(None);
                }
                continue;
            };
            let Some(buffer) = self.rx.remove(&used.head) else {
                return Err(Error::Timeout("a buffer was returned twice"));
            };
            let length = used.len as usize;
            let bytes = self
                .device
                .borrow()
                .memory
                .read_vec(buffer, length.max(HEADER));
            self.offer(buffer);
            self.publish(queue::RX);
            if length >= HEADER {
                return Ok(Some(Packet::parse(&bytes)));
            }
        }
    }

    /// A packet of a stream.
    pub fn packet(&mut self, number: usize, op: u16) -> Packet {
        let stream = &mut self.streams[number];
        stream.told = stream.read;
        Packet {
            src_cid: self.cid,
            dst_cid: HOST_CID,
            src_port: stream.ports.0,
            dst_port: stream.ports.1,
            kind: STREAM,
            op,
            buf_alloc: BUFFER,
            fwd_cnt: stream.read,
            ..Packet::default()
        }
    }

    /// Asks for a connection to the host's port; the stream's number.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn connect(&mut self, port: u32) -> Result<usize> {
        self.next_port += 1;
        let number = self.add_stream((self.next_port, port));
        let packet = self.packet(number, op::REQUEST);
        self.send(&packet)?;
        Ok(number)
    }

    fn add_stream(&mut self, ports: (u32, u32)) -> usize {
        let number = self.streams.len();
        self.streams.push(Stream {
            ports,
            ..Stream::default()
        });
        self.by_ports.insert(ports, number);
        number
    }

    /// Sends as much as credit allows and one packet holds; how much. Nothing, if no transmit
    /// buffer is free.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn write(&mut self, number: usize, data: &[u8]) -> Result<usize> {
        let credit = self.streams[number].credit() as usize;
        let length = data.len().min(credit).min(MAX_DATA);
        if length == 0 {
            return Ok(0);
        }
        let Some(buffer) = self.transmit_buffer(Duration::ZERO)? else {
            return Ok(0);
        };
        self.tx_free.push(buffer);
        let mut packet = self.packet(number, op::RW);
        packet.len = length as u32;
        packet.data = data[..length].to_vec();
        let stream = &mut self.streams[number];
        stream.sent = stream.sent.wrapping_add(length as u32);
        self.send(&packet)?;
        Ok(length)
    }

    /// Takes what has come, and gives the other side credit for it.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn read(&mut self, number: usize) -> Result<Vec<u8>> {
        let stream = &mut self.streams[number];
        let data: Vec<u8> = stream.data.drain(..).collect();
        stream.read = stream.read.wrapping_add(data.len() as u32);
        let untold = stream.read.wrapping_sub(stream.told);
        if untold >= BUFFER / 2 && !stream.reset {
            let packet = self.packet(number, op::CREDIT_UPDATE);
            self.send(&packet)?;
        }
        Ok(data)
    }

    /// Shuts directions of a stream down.
    ///
    /// # Errors
    /// As for [`send`](Self::send).
    pub fn shut_down(&mut self, number: usize, flags: u32) -> Result<()> {
        let mut packet = self.packet(number, op::SHUTDOWN);
        packet.flags = flags;
        self.send(&packet)
    }

    /// Handles the packets that have come; false if there was none after `timeout`.
    ///
    /// # Errors
    /// As for [`send`](Self::send), or the device breaks the protocol.
    pub fn poll(&mut self, timeout: Duration) -> Result<bool> {
        let mut packet = self.receive(timeout)?;
        let any = packet.is_some();
        while let Some(current) = packet {
            self.handle(current)?;
            packet = self.receive(Duration::ZERO)?;
        }
        Ok(any)
    }

    /// Handles packets until `done` says so; false if it does not in time.
    ///
    /// # Errors
    /// As for [`poll`](Self::poll).
    pub fn poll_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) -> Result<bool> {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            if Instant::now() > deadline {
                return Ok(false);
            }
            self.poll(Duration::from_millis(20))?;
        }
        Ok(true)
    }

    fn handle(&mut self, packet: Packet) -> Result<()> {
        if packet.src_cid != HOST_CID || packet.dst_cid != self.cid {
            return Err(Error::Timeout("a packet has wrong addresses"));
        }
        if packet.len as usize != packet.data.len() {
            return Err(Error::Timeout("a packet has a wrong length"));
        }
        let ports = (packet.dst_port, packet.src_port);
        let Some(&number) = self.by_ports.get(&ports) else {
            return self.unknown(&packet, ports);
        };
        let stream = &mut self.streams[number];
        stream.peer_buffer = packet.buf_alloc;
        stream.peer_taken = packet.fwd_cnt;
        match packet.op {
            op::RESPONSE if stream.open => {
                return Err(Error::Timeout("a connection was accepted twice"));
            }
            op::RESPONSE => stream.open = true,
            op::RST => {
                stream.reset = true;
                self.by_ports.remove(&ports);
            }
            op::SHUTDOWN => stream.shut |= packet.flags,
            op::RW => {
                stream.data.extend(&packet.data);
                let unread = stream.data.len() + stream.read.wrapping_sub(stream.told) as usize;
                if unread > BUFFER as usize {
                    return Err(Error::Timeout("the device sends more than it may"));
                }
            }
            op::CREDIT_REQUEST => {
                let update = self.packet(number, op::CREDIT_UPDATE);
                self.send(&update)?;
            }
            op::CREDIT_UPDATE => {}
            _ => return Err(Error::Timeout("a packet has a wrong operation")),
        }
        Ok(())
    }

    fn unknown(&mut self, packet: &Packet, ports: (u32, u32)) -> Result<()> {
        if packet.op == op::REQUEST && self.listening.contains(&ports.0) {
            let number = self.add_stream(ports);
            let stream = &mut self.streams[number];
            stream.open = true;
            stream.peer_buffer = packet.buf_alloc;
            stream.peer_taken = packet.fwd_cnt;
            self.accepted.push_back(number);
            let response = self.packet(number, op::RESPONSE);
            return self.send(&response);
        }
        if packet.op == op::RST {
            return Ok(());
        }
        self.send(&Packet {
            src_cid: self.cid,
            dst_cid: HOST_CID,
            src_port: ports.0,
            dst_port: ports.1,
            kind: STREAM,
            op: op::RST,
            ..Packet::default()
        })
    }
}
