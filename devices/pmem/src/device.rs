//! The persistent memory device (virtio 1.3, 5.19). Its one virtqueue carries flush requests.

use std::io;
use std::os::fd::AsFd;

use anemone_device::{Chain, Device, RingError, Vring, Watch};
use anemone_log::warn_limited;
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::flusher::Flusher;

/// The only type of request (virtio 1.3, 5.19.6).
const FLUSH: u32 = 0;
/// Result of a request: done, or -1 for failed.
const SUCCESS: u32 = 0;
const FAILURE: u32 = u32::MAX;
/// Chains taken in one go, so that a busy guest does not keep the main loop.
const CHAINS_PER_TURN: usize = 32;

const KICK: u64 = 0;
const FLUSHED: u64 = 1;

/// A flush request of the driver.
struct Request {
    head: u16,
    /// Where its result goes, in pieces.
    result: Vec<(GuestAddress, usize)>,
}

/// The device. Its configuration space, which says where the memory is, belongs to the front end,
/// which has put it there.
///
/// Requests wait in a batch while the flush of the batch before runs: one flush serves them all,
/// and each of them has a flush that begins after it was made.
pub struct Pmem {
    flusher: Flusher,
    ring: Option<Vring>,
    /// The driver has broken the ring.
    broken: bool,
    /// Requests for the next flush.
    waiting: Vec<Request>,
    /// Requests that the running flush serves; empty when none runs.
    running: Vec<Request>,
}

impl Pmem {
    /// A device whose memory `flusher` flushes.
    pub fn new(flusher: Flusher) -> Self {
        Self {
            flusher,
            ring: None,
            broken: false,
            waiting: Vec::new(),
            running: Vec::new(),
        }
    }

    /// No more requests are taken than the ring has entries, whatever the driver says.
    fn has_room(&self, ring: &Vring) -> bool {
        self.waiting.len() + self.running.len() < usize::from(ring.queue.size())
    }

    fn work(&mut self, step: impl FnOnce(&mut Self, &mut Vring) -> Result<(), RingError>) {
        let Some(mut ring) = self.ring.take() else {
            return;
        };
        if let Err(error) = step(self, &mut ring) {
            ring.give_up(&error);
            self.broken = true;
        }
        self.ring = Some(ring);
    }

    /// Takes what the driver has made available.
    fn take(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        let mut turns = 0..CHAINS_PER_TURN;
        while self.has_room(ring) {
            let Some(_) = turns.next() else {
                ring.kick_again();
                break;
            };
            let Some(chain) = ring.pop()? else {
                if ring.enable_kicks()? {
                    continue;
                }
                break;
            };
            let request = Request {
                head: chain.head_index(),
                result: result_pieces(&chain),
            };
            match kind(&ring.memory, &chain) {
                Some(FLUSH) => self.waiting.push(request),
                other => {
                    warn_limited!("a request of type {other:?} is not a flush");
                    request.answer(ring, FAILURE)?;
                }
            }
        }
        self.begin();
        ring.notify()
    }

    /// Begins the next flush, if one is wanted and none runs.
    fn begin(&mut self) {
        if self.running.is_empty() && !self.waiting.is_empty() {
            self.running = std::mem::take(&mut self.waiting);
            self.flusher.begin();
        }
    }

    /// The running flush has ended.
    fn finish(&mut self, ring: &mut Vring, success: bool) -> Result<(), RingError> {
        let result = if success { SUCCESS } else { FAILURE };
        for request in std::mem::take(&mut self.running) {
            request.answer(ring, result)?;
        }
        ring.notify()
    }

    /// Waits for what has been taken. The driver must not find a request unanswered.
    fn drain(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        while !self.running.is_empty() {
            let success = self.flusher.wait();
            self.finish(ring, success)?;
            self.begin();
        }
        Ok(())
    }
}

impl Device for Pmem {
    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_threads(&mut self) -> io::Result<()> {
        self.flusher.start()
    }

    fn start_queue(&mut self, ring: Vring) -> io::Result<()> {
        self.ring = Some(ring);
        self.broken = false;
        Ok(())
    }

    fn stop_queue(&mut self, _index: usize) -> u16 {
        if !self.broken {
            self.work(Self::drain);
        } else if !self.running.is_empty() {
            self.flusher.wait();
        }
        // After an error some are left, without a flush that runs.
        self.waiting.clear();
        self.running.clear();
        let ring = self.ring.take();
        ring.map_or(0, |ring| ring.queue.next_avail())
    }

    fn event_fds(&self) -> Vec<Watch<'_>> {
        let mut watches = vec![(self.flusher.as_fd(), FLUSHED)];
        if let Some(ring) = &self.ring
            && !self.broken
            && self.has_room(ring)
        {
            watches.push((ring.kick.as_fd(), KICK));
        }
        watches
    }

    fn handle_event(&mut self, token: u64) {
        if token == FLUSHED {
            // What a stopped queue has waited for is counted, too, but has left no result.
            match self.flusher.ended() {
                Some(_) if self.broken => self.running.clear(),
                Some(success) => self.work(|device, ring| {
                    device.finish(ring, success)?;
                    device.take(ring)
                }),
                None => {}
            }
        } else if let Some(ring) = &self.ring
            && !self.broken
        {
            match ring.clear_kick() {
                true => self.work(Self::take),
                false => self.broken = true,
            }
        }
    }
}

impl Request {
    fn answer(&self, ring: &mut Vring, result: u32) -> Result<(), RingError> {
        let bytes = result.to_le_bytes();
        let mut written = 0;
        for &(address, length) in &self.result {
            let piece = &bytes[written..written + length];
            if let Err(error) = ring.memory.write_slice(piece, address) {
                warn_limited!("a result of the driver is not in guest memory: {error}");
                break;
            }
            written += length;
        }
        ring.push_used(self.head, written as u32)
    }
}

/// The first four bytes of the descriptors, in pieces; the driver may divide them as it likes.
fn first_four(descriptors: impl Iterator<Item = Descriptor>) -> Vec<(GuestAddress, usize)> {
    let mut left = 4;
    let mut pieces = Vec::with_capacity(1);
    for descriptor in descriptors {
        let length = left.min(descriptor.len() as usize);
        if length > 0 {
            pieces.push((descriptor.addr(), length));
        }
        left -= length;
        if left == 0 {
            break;
        }
    }
    pieces
}

/// Where the result of a request goes.
fn result_pieces(chain: &Chain) -> Vec<(GuestAddress, usize)> {
    first_four(chain.clone().writable())
}

/// The type of a request, if all of it can be read.
fn kind(memory: &GuestMemoryMmap, chain: &Chain) -> Option<u32> {
    let mut bytes = [0; 4];
    let mut read = 0;
    for (address, length) in first_four(chain.clone().readable()) {
        let piece = &mut bytes[read..read + length];
        memory.read_slice(piece, address).ok()?;
        read += length;
    }
    (read == bytes.len()).then(|| u32::from_le_bytes(bytes))
}
