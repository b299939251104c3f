//! The process with a peer, and a driver's side of it.

#![allow(dead_code, reason = "not every test file uses everything")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::Duration;

use anemone_driver::net::{Packet, Receiver, Sender};
use anemone_driver::{Bounced, Device, Options, Supervised};

pub const BINARY: &str = env!("CARGO_BIN_EXE_anemone-net");
pub const LONG: Duration = Duration::from_secs(20);
pub const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const PLAIN: [u8; 12] = [0; 12];

/// The queue entries of all tests.
const QUEUE: u16 = 128;

/// A peer that speaks the stream protocol, on the other end of `--stream-fd 5`.
pub struct StreamPeer(pub UnixStream);

impl StreamPeer {
    /// Starts the process with this peer.
    pub fn start(args: &[&str]) -> (Supervised, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LONG)).unwrap();
        let all = [&["--stream-fd", "5"][..], args].concat();
        let process = Supervised::start(BINARY, &all, vec![theirs.into()]).unwrap();
        process.ready().unwrap();
        (process, Self(ours))
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.0
            .write_all(&(frame.len() as u32).to_be_bytes())
            .unwrap();
        self.0.write_all(frame).unwrap();
    }

    pub fn receive(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut frame).unwrap();
        frame
    }
}

/// A peer for which a packet is a frame, on the other end of `--socket-fd 5`.
pub struct PacketPeer(pub UnixDatagram);

impl PacketPeer {
    pub fn start(args: &[&str]) -> (Supervised, Self) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_read_timeout(Some(LONG)).unwrap();
        let all = [&["--socket-fd", "5"][..], args].concat();
        let process = Supervised::start(BINARY, &all, vec![theirs.into()]).unwrap();
        process.ready().unwrap();
        (process, Self(ours))
    }

    pub fn receive(&self) -> Vec<u8> {
        let mut frame = vec![0; 70_000];
        let length = self.0.recv(&mut frame).unwrap();
        frame.truncate(length);
        frame
    }
}

/// A driver: device, receive buffers, transmit buffers.
pub struct Card {
    pub device: Device,
    pub rx: Receiver,
    pub tx: Sender,
}

impl Card {
    /// Sets the device up with one queue pair and receive buffers of this length.
    pub fn connect(process: &mut Supervised, features: u64, length: u32) -> Self {
        Self::over(Self::socket(process), features, length)
    }

    fn socket(process: &mut Supervised) -> UnixStream {
        let socket = process.connection.take();
        socket.unwrap_or_else(|| process.connect().unwrap())
    }

    pub fn over(socket: UnixStream, features: u64, length: u32) -> Self {
        Self::with(socket, features, length, None)
    }

    /// The process does not see the driver's memory.
    pub fn bounced(process: &mut Supervised, features: u64, length: u32) -> Self {
        let bounce = Bounced::usual(1, 2);
        Self::with(Self::socket(process), features, length, Some(bounce))
    }

    fn with(socket: UnixStream, features: u64, length: u32, bounce: Option<Bounced>) -> Self {
        let options = Options {
            queues: 2,
            queue_size: QUEUE,
            memory: 64 << 20,
            features,
            bounce,
            ..Options::default()
        };
        let device = Device::connect(socket, &options).unwrap();
        let rx = Receiver::new(&device.memory, QUEUE, usize::from(QUEUE), length);
        let tx = Sender::new(&device.memory, QUEUE, usize::from(QUEUE), 66_000);
        let mut card = Self { device, rx, tx };
        card.rx.refill(&mut card.device.queues[0]);
        card
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.tx
            .send(&mut self.device.queues[1], &PLAIN, frame)
            .unwrap();
    }

    pub fn receive(&mut self) -> Packet {
        self.rx.receive(&mut self.device.queues[0]).unwrap()
    }

    /// What has arrived after `time`.
    pub fn receive_within(&mut self, time: Duration) -> Option<Packet> {
        let queue = &mut self.device.queues[0];
        queue.wait(time).unwrap();
        let packet = self.rx.take(queue).unwrap();
        self.rx.refill(queue);
        packet
    }
}

/// A frame of `length` bytes, recognisable by its number.
pub fn frame(to: [u8; 6], from: [u8; 6], number: u32, length: usize) -> Vec<u8> {
    let mut bytes = [&to[..], &from[..], &[0x88, 0xb5], &number.to_le_bytes()].concat();
    let start = bytes.len();
    bytes.extend((start..length).map(|i| (i as u32).wrapping_mul(31).wrapping_add(number) as u8));
    bytes.truncate(length);
    bytes
}

/// A small generator for reproducible choices (Marsaglia's xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
