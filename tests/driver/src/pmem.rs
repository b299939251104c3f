//! virtio-pmem requests (virtio 1.3, 5.19).

use std::time::Duration;

use crate::{Buffer, Error, Memory, Queue, Result};

/// Longest wait for one request.
const PATIENCE: Duration = Duration::from_secs(20);

/// The type of a flush request.
pub const FLUSH: u32 = 0;
/// Not of the specification: the device has not written a result.
pub const NONE: u32 = 0x5555_5555;

/// Requests with memory of their own, one for each entry of a queue.
#[derive(Debug)]
pub struct Requests {
    base: u64,
    indirect: bool,
    free: Vec<u16>,
    /// The place of the chain that begins at each head.
    by_head: Vec<Option<u16>>,
}

/// A finished request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// What [`Requests::submit`] returned.
    pub place: u16,
    /// Its result: 0, or a failure.
    pub result: u32,
    /// Bytes the device says it has written.
    pub written: u32,
}

impl Requests {
    /// Room for requests on a queue of `queue_size` entries. `indirect` puts each into an indirect
    /// table, as Linux does.
    pub fn new(memory: &Memory, queue_size: u16, indirect: bool) -> Self {
        let places = if indirect { queue_size } else { queue_size / 2 };
        Self {
            base: memory.alloc(8 * u64::from(places), 8),
            indirect,
            free: (0..places).rev().collect(),
            by_head: vec![None; queue_size.into()],
        }
    }

    /// Adds a request of this type; its place, or `None` when the queue is full. Publish and kick
    /// afterwards.
    pub fn submit(&mut self, memory: &Memory, queue: &mut Queue, kind: u32) -> Option<u16> {
        let place = *self.free.last()?;
        let addr = self.base + 8 * u64::from(place);
        memory.write(addr, &kind.to_le_bytes());
        memory.write(addr + 4, &NONE.to_le_bytes());
        let request = [Buffer { addr, len: 4 }];
        let result = [Buffer {
            addr: addr + 4,
            len: 4,
        }];
        let head = match self.indirect {
            true => queue.add_indirect(&request, &result)?,
            false => queue.add(&request, &result)?,
        };
        self.free.pop();
        self.by_head[usize::from(head)] = Some(place);
        Some(place)
    }

    /// Takes the next finished request.
    ///
    /// # Errors
    /// The device has returned something that was not in flight.
    pub fn finish(&mut self, memory: &Memory, queue: &mut Queue) -> Result<Option<Finished>> {
        let Some(used) = queue.take_used() else {
            return Ok(None);
        };
        let place = self
            .by_head
            .get_mut(used.head as usize)
            .and_then(Option::take)
            .ok_or(Error::NotInFlight(used.head))?;
        self.free.push(place);
        let mut result = [0; 4];
        memory.read(self.base + 8 * u64::from(place) + 4, &mut result);
        Ok(Some(Finished {
            place,
            result: u32::from_le_bytes(result),
            written: used.len,
        }))
    }

    /// One flush, from its request to its result.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn flush(&mut self, memory: &Memory, queue: &mut Queue) -> Result<Finished> {
        self.submit(memory, queue, FLUSH)
            .ok_or(Error::Timeout("the queue is full"))?;
        queue.publish();
        queue.kick();
        if !queue.wait(PATIENCE)? {
            return Err(Error::Timeout("a flush has not ended"));
        }
        let finished = self.finish(memory, queue)?;
        finished.ok_or(Error::Timeout("a flush has not ended"))
    }
}
