//! A guest's driver for virtio-console.

#![allow(dead_code, reason = "not every test file uses everything")]

use std::time::Duration;

use anemone_driver::{Buffer, Device, Options};

/// Longer than anything here takes.
pub const LONG: Duration = Duration::from_secs(20);
/// The program under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_anemone-console");

const RECEIVEQ: usize = 0;
const TRANSMITQ: usize = 1;
const SIZE: u32 = 1024;

/// What to set the device up with.
pub fn options() -> Options {
    Options {
        queues: 2,
        queue_size: 64,
        ..Options::default()
    }
}

/// A driver with a piece of memory for each queue.
pub struct Guest {
    pub device: Device,
    receive: u64,
    transmit: u64,
}

impl Guest {
    pub fn new(device: Device) -> Self {
        let receive = device.memory.alloc(u64::from(64 * SIZE), 4096);
        let transmit = device.memory.alloc(1 << 20, 4096);
        Self {
            device,
            receive,
            transmit,
        }
    }

    /// Makes output available without waiting for the device.
    pub fn publish(&mut self, text: &[u8]) {
        self.device.memory.write(self.transmit, text);
        let queue = &mut self.device.queues[TRANSMITQ];
        // In two pieces of odd lengths, as a chain may be.
        let first = (text.len() / 3) as u32;
        let rest = text.len() as u32 - first;
        let pieces = [
            Buffer {
                addr: self.transmit,
                len: first,
            },
            Buffer {
                addr: self.transmit + u64::from(first),
                len: rest,
            },
        ];
        queue.add(&pieces, &[]).unwrap();
        queue.publish();
        queue.kick();
    }

    /// Writes to the console and waits until the device has taken it.
    pub fn write(&mut self, text: &[u8]) {
        self.publish(text);
        assert!(self.written(LONG), "the device does not take its output");
    }

    /// Waits until the device has taken what was published.
    pub fn written(&mut self, timeout: Duration) -> bool {
        let queue = &mut self.device.queues[TRANSMITQ];
        queue.wait(timeout).unwrap() && queue.take_used().is_some()
    }

    /// Reads `length` bytes, making descriptors available one after the other.
    pub fn read(&mut self, length: usize) -> Vec<u8> {
        let mut text = Vec::new();
        while text.len() < length {
            let queue = &mut self.device.queues[RECEIVEQ];
            let buffer = Buffer {
                addr: self.receive,
                len: SIZE.min((length - text.len()) as u32),
            };
            queue.add(&[], &[buffer]).unwrap();
            queue.publish();
            queue.kick();
            assert!(queue.wait(LONG).unwrap(), "{} bytes came", text.len());
            let used = queue.take_used().unwrap();
            assert!(used.len >= 1 && used.len <= buffer.len);
            let part = self.device.memory.read_vec(self.receive, used.len as usize);
            text.extend(part);
        }
        text
    }
}

/// Text that is different everywhere.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| b' ' + ((i / 89 + i % 89) % 90) as u8)
        .collect()
}
