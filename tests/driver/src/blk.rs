//! virtio-blk requests (virtio 1.3, 5.2).

use std::time::Duration;

use crate::{Buffer, Error, Memory, Queue, Result};

/// Bytes of a sector.
pub const SECTOR: usize = 512;
/// Longest wait for one request.
const PATIENCE: Duration = Duration::from_secs(20);

/// Request types.
#[allow(missing_docs, reason = "names of the specification")]
pub mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status of a finished request.
#[allow(missing_docs, reason = "names of the specification")]
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
    /// Not of the specification: the device has not written a status.
    pub const NONE: u8 = 0xaa;
}

/// The three parts of a request in guest memory.
#[derive(Debug, Clone, Copy)]
struct Slot {
    header: u64,
    data: u64,
    status: u64,
}

/// Requests with memory of their own, `depth` of which may be in flight on one queue.
#[derive(Debug)]
pub struct Requests {
    slots: Vec<Slot>,
    data_len: u32,
    indirect: bool,
    free: Vec<usize>,
    /// The slot of the chain that begins at each head.
    by_head: Vec<Option<usize>>,
}

/// A finished request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// The slot that [`Requests::submit`] returned.
    pub slot: usize,
    /// Its [`status`].
    pub status: u8,
    /// Bytes the device says it has written.
    pub written: u32,
}

impl Requests {
    /// Room for `depth` requests with up to `data_len` bytes of data each on queues of
    /// `queue_size` entries. `indirect` puts each into an indirect table, as Linux does.
    pub fn new(
        memory: &Memory,
        queue_size: u16,
        depth: usize,
        data_len: u32,
        indirect: bool,
    ) -> Self {
        let slots = (0..depth)
            .map(|_| Slot {
                header: memory.alloc(16, 16),
                data: memory.alloc(data_len.into(), 4096),
                status: memory.alloc(1, 1),
            })
            .collect();
        Self {
            slots,
            data_len,
            indirect,
            free: (0..depth).rev().collect(),
            by_head: vec![None; queue_size.into()],
        }
    }

    /// Adds a request; its slot, or `None` when `depth` are in flight or the queue is full. Publish
    /// and kick afterwards. `write` says that the data goes to the driver.
    pub fn submit(
        &mut self,
        memory: &Memory,
        queue: &mut Queue,
        kind: u32,
        sector: u64,
        len: u32,
    ) -> Option<usize> {
        assert!(len <= self.data_len, "no room for {len} bytes of data");
        let slot = *self.free.last()?;
        let parts = self.slots[slot];
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.write(parts.header, &header);
        memory.write(parts.status, &[status::NONE]);
        let header = Buffer {
            addr: parts.header,
            len: 16,
        };
        let data = Buffer {
            addr: parts.data,
            len,
        };
        let result = Buffer {
            addr: parts.status,
            len: 1,
        };
        let to_driver = matches!(kind, request::IN | request::GET_ID);
        let (readable, writable): (&[Buffer], &[Buffer]) = match (len, to_driver) {
            (0, _) => (&[header], &[result]),
            (_, true) => (&[header], &[data, result]),
            (_, false) => (&[header, data], &[result]),
        };
        let head = match self.indirect {
            true => queue.add_indirect(readable, writable)?,
            false => queue.add(readable, writable)?,
        };
        self.free.pop();
        self.by_head[usize::from(head)] = Some(slot);
        Some(slot)
    }

    /// Takes a finished request.
    pub fn finish(&mut self, memory: &Memory, queue: &mut Queue) -> Option<Finished> {
        let used = queue.take_used()?;
        let slot = self.by_head.get_mut(used.head as usize)?.take()?;
        let mut status = [0];
        memory.read(self.slots[slot].status, &mut status);
        self.free.push(slot);
        Some(Finished {
            slot,
            status: status[0],
            written: used.len,
        })
    }

    /// Number of requests in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Guest address of a slot's data.
    pub fn data(&self, slot: usize) -> u64 {
        self.slots[slot].data
    }

    /// The slot that the next request will take.
    pub fn next_slot(&self) -> Option<usize> {
        self.free.last().copied()
    }
}

/// One request at a time, waited for.
#[derive(Debug)]
pub struct Blk<'a> {
    memory: &'a Memory,
    queue: &'a mut Queue,
    requests: Requests,
}

impl<'a> Blk<'a> {
    /// Requests with up to `data_len` bytes of data over `queue`.
    pub fn new(memory: &'a Memory, queue: &'a mut Queue, data_len: u32) -> Self {
        let requests = Requests::new(memory, queue.size(), 1, data_len, false);
        Self {
            memory,
            queue,
            requests,
        }
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// [`Error::Status`] or [`Error::Timeout`].
    pub fn read(&mut self, sector: u64, len: usize) -> Result<Vec<u8>> {
        let slot = self.run(request::IN, sector, len as u32)?;
        Ok(self.memory.read_vec(self.requests.data(slot), len))
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        self.put(data);
        self.run(request::OUT, sector, data.len() as u32)?;
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn flush(&mut self) -> Result<()> {
        self.run(request::FLUSH, 0, 0)?;
        Ok(())
    }

    /// Gives sectors up.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn discard(&mut self, sector: u64, count: u32) -> Result<()> {
        self.range(request::DISCARD, sector, count, 0)
    }

    /// Zeroes sectors; with `unmap` they may be given up as well.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn write_zeroes(&mut self, sector: u64, count: u32, unmap: bool) -> Result<()> {
        self.range(request::WRITE_ZEROES, sector, count, unmap.into())
    }

    /// The device's serial number, up to 20 bytes.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn id(&mut self) -> Result<Vec<u8>> {
        let slot = self.run(request::GET_ID, 0, 20)?;
        let mut id = self.memory.read_vec(self.requests.data(slot), 20);
        let end = id.iter().position(|&byte| byte == 0).unwrap_or(20);
        id.truncate(end);
        Ok(id)
    }

    fn range(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> Result<()> {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&count.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.put(&segment);
        self.run(kind, 0, 16)?;
        Ok(())
    }

    fn put(&mut self, data: &[u8]) {
        if let Some(slot) = self.requests.next_slot() {
            self.memory.write(self.requests.data(slot), data);
        }
    }

    fn run(&mut self, kind: u32, sector: u64, len: u32) -> Result<usize> {
        self.requests
            .submit(self.memory, self.queue, kind, sector, len)
            .ok_or(Error::Timeout("an earlier request is still in flight"))?;
        self.queue.publish();
        self.queue.kick();
        if !self.queue.wait(PATIENCE)? {
            return Err(Error::Timeout("a request"));
        }
        match self.requests.finish(self.memory, self.queue) {
            Some(finished) if finished.status == status::OK => Ok(finished.slot),
            Some(finished) => Err(Error::Status(finished.status)),
            None => Err(Error::Timeout("an unknown chain was returned")),
        }
    }
}
