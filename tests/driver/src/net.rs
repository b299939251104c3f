//! virtio-net packets (virtio 1.3, 5.1).

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Buffer, Error, Memory, Queue, Result};

/// Length of `struct virtio_net_hdr` with `num_buffers`.
pub const HEADER: usize = 12;
/// Longest wait for a packet.
const PATIENCE: Duration = Duration::from_secs(20);

/// Feature bits.
#[allow(missing_docs, reason = "names of the specification")]
pub mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const CTRL_RX: u64 = 1 << 18;
    pub const MQ: u64 = 1 << 22;
}

/// A frame as the driver received it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The header.
    pub header: [u8; HEADER],
    /// The frame.
    pub frame: Vec<u8>,
    /// Buffers it was spread over.
    pub buffers: usize,
}

/// The buffers of a receive queue, all of one length.
#[derive(Debug)]
pub struct Receiver {
    memory: Arc<Memory>,
    length: u32,
    free: Vec<u64>,
    by_head: Vec<Option<u64>>,
}

impl Receiver {
    /// `count` buffers of `length` bytes for a queue of `queue_size` entries.
    pub fn new(memory: &Arc<Memory>, queue_size: u16, count: usize, length: u32) -> Self {
        Self {
            memory: Arc::clone(memory),
            length,
            free: (0..count)
                .map(|_| memory.alloc(length.into(), 64))
                .collect(),
            by_head: vec![None; queue_size.into()],
        }
    }

    /// Offers all buffers that are free.
    pub fn refill(&mut self, queue: &mut Queue) {
        let mut added = false;
        while let Some(&addr) = self.free.last() {
            let buffer = Buffer {
                addr,
                len: self.length,
            };
            let Some(head) = queue.add(&[], &[buffer]) else {
                break;
            };
            self.by_head[usize::from(head)] = Some(addr);
            self.free.pop();
            added = true;
        }
        if added {
            queue.publish();
            queue.kick();
        }
    }

    /// Counts the frames that have arrived, without looking at them.
    pub fn count(&mut self, queue: &mut Queue) -> u64 {
        let mut frames = 0;
        while let Some(used) = queue.take_used() {
            self.free.extend(
                self.by_head
                    .get_mut(used.head as usize)
                    .and_then(Option::take),
            );
            frames += 1;
        }
        frames
    }

    /// Takes a frame that has arrived. The device must have made all of it visible at once.
    ///
    /// # Errors
    /// The device has returned what it was not given, or lengths that cannot be.
    pub fn take(&mut self, queue: &mut Queue) -> Result<Option<Packet>> {
        let mut bytes = Vec::new();
        let mut buffers = 0;
        let mut expected = 1;
        while buffers < expected {
            let Some(used) = queue.take_used() else {
                return match buffers {
                    0 => Ok(None),
                    _ => Err(Error::Timeout("the rest of a frame")),
                };
            };
            let slot = self.by_head.get_mut(used.head as usize);
            let Some(addr) = slot.and_then(Option::take) else {
                return Err(Error::Timeout("an unknown chain was returned"));
            };
            if used.len > self.length {
                return Err(Error::Timeout("more was written than there was room for"));
            }
            bytes.extend(self.memory.read_vec(addr, used.len as usize));
            self.free.push(addr);
            if buffers == 0 {
                let Some(&[low, high]) = bytes.get(HEADER - 2..HEADER) else {
                    return Err(Error::Timeout("a frame without a header"));
                };
                expected = usize::from(u16::from_le_bytes([low, high])).max(1);
            }
            buffers += 1;
        }
        let frame = bytes.split_off(HEADER);
        let mut header = [0; HEADER];
        header.copy_from_slice(&bytes);
        Ok(Some(Packet {
            header,
            frame,
            buffers,
        }))
    }

    /// Waits for a frame.
    ///
    /// # Errors
    /// As for [`take`](Self::take), or none comes.
    pub fn receive(&mut self, queue: &mut Queue) -> Result<Packet> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(packet) = self.take(queue)? {
                self.refill(queue);
                return Ok(packet);
            }
            if !queue.wait(end.saturating_duration_since(Instant::now()))? {
                return Err(Error::Timeout("a frame"));
            }
        }
    }
}

/// The buffers of a transmit queue.
#[derive(Debug)]
pub struct Sender {
    memory: Arc<Memory>,
    length: usize,
    free: Vec<u64>,
    by_head: Vec<Option<u64>>,
}

impl Sender {
    /// Room for `count` frames of up to `length` bytes on a queue of `queue_size` entries.
    pub fn new(memory: &Arc<Memory>, queue_size: u16, count: usize, length: usize) -> Self {
        let room = (HEADER + length) as u64;
        Self {
            memory: Arc::clone(memory),
            length,
            free: (0..count).map(|_| memory.alloc(room, 64)).collect(),
            by_head: vec![None; queue_size.into()],
        }
    }

    /// Takes back what has been sent; how many.
    pub fn reap(&mut self, queue: &mut Queue) -> u64 {
        let mut count = 0;
        while let Some(used) = queue.take_used() {
            self.free.extend(
                self.by_head
                    .get_mut(used.head as usize)
                    .and_then(Option::take),
            );
            count += 1;
        }
        count
    }

    /// Adds a frame; false if there is no room. Publish and kick afterwards.
    pub fn add(&mut self, queue: &mut Queue, header: &[u8; HEADER], frame: &[u8]) -> bool {
        assert!(
            frame.len() <= self.length,
            "no room for {} bytes",
            frame.len()
        );
        let Some(addr) = self.free.pop() else {
            return false;
        };
        self.memory.write(addr, header);
        self.memory.write(addr + HEADER as u64, frame);
        self.offer(queue, addr, frame.len())
    }

    /// Adds a frame of `length` bytes with whatever is in its buffer; false if there is no room.
    pub fn add_stale(&mut self, queue: &mut Queue, length: usize) -> bool {
        match self.free.pop() {
            Some(addr) => self.offer(queue, addr, length),
            None => false,
        }
    }

    fn offer(&mut self, queue: &mut Queue, addr: u64, length: usize) -> bool {
        let buffer = Buffer {
            addr,
            len: (HEADER + length) as u32,
        };
        match queue.add(&[buffer], &[]) {
            Some(head) => {
                self.by_head[usize::from(head)] = Some(addr);
                true
            }
            None => {
                self.free.push(addr);
                false
            }
        }
    }

    /// Number of frames that the device has not returned.
    pub fn in_flight(&self) -> usize {
        self.by_head.iter().flatten().count()
    }

    /// Sends a frame and waits until the device has taken it.
    ///
    /// # Errors
    /// It does not.
    pub fn send(&mut self, queue: &mut Queue, header: &[u8; HEADER], frame: &[u8]) -> Result<()> {
        self.reap(queue);
        if !self.add(queue, header, frame) {
            return Err(Error::Timeout("room for a frame"));
        }
        queue.publish();
        queue.kick();
        while self.in_flight() > 0 {
            if !queue.wait(PATIENCE)? {
                return Err(Error::Timeout("a frame was not taken"));
            }
            self.reap(queue);
        }
        Ok(())
    }
}

/// Sends a command over the control queue: class, command and data; the device's acknowledgement.
///
/// # Errors
/// It does not come.
pub fn command(memory: &Arc<Memory>, queue: &mut Queue, bytes: &[u8]) -> Result<u8> {
    const NONE: u8 = 0xaa;
    let start = memory.alloc(bytes.len() as u64 + 1, 16);
    let ack = start + bytes.len() as u64;
    memory.write(start, bytes);
    memory.write(ack, &[NONE]);
    let readable = Buffer {
        addr: start,
        len: bytes.len() as u32,
    };
    let writable = Buffer { addr: ack, len: 1 };
    queue
        .add(&[readable], &[writable])
        .ok_or(Error::Timeout("room for a command"))?;
    queue.publish();
    queue.kick();
    if !queue.wait(PATIENCE)? || queue.take_used().is_none() {
        return Err(Error::Timeout("an acknowledgement"));
    }
    Ok(memory.read_vec(ack, 1)[0])
}
