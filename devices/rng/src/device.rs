//! The entropy device (virtio 1.3, 5.4): the driver makes buffers available, the device fills them.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use anemone_device::{Bucket, Chain, Device, RingError, Vring, Watch};
use anemone_log::warn_limited;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestMemoryMmap};

/// Most bytes for one chain; the specification lets the device fill a part of the buffers.
const MAX_BYTES: u64 = 64 * 1024;
/// Chains served in one go, so that a busy guest does not keep the main loop.
const CHAINS_PER_TURN: usize = 32;

const KICK: u64 = 0;
const TIMER: u64 = 1;

/// The device.
pub struct Rng {
    ring: Option<Vring>,
    /// The driver has broken the ring.
    broken: bool,
    bucket: Option<Bucket>,
}

impl Rng {
    /// A device that gives as much as is asked for, or as much as the bucket holds.
    pub fn new(bucket: Option<Bucket>) -> Self {
        Self {
            ring: None,
            broken: false,
            bucket,
        }
    }

    fn serve(&mut self) {
        let Some(ring) = &mut self.ring else {
            return;
        };
        if let Err(error) = serve(ring, &mut self.bucket) {
            ring.give_up(&error);
            self.broken = true;
        }
    }
}

impl Device for Rng {
    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn start_queue(&mut self, ring: Vring) -> io::Result<()> {
        self.ring = Some(ring);
        self.broken = false;
        Ok(())
    }

    fn stop_queue(&mut self, _index: usize) -> u16 {
        let ring = self.ring.take();
        ring.map_or(0, |ring| ring.queue.next_avail())
    }

    fn event_fds(&self) -> Vec<Watch<'_>> {
        let timer = self.bucket.as_ref().and_then(Bucket::timer);
        match (&self.ring, timer) {
            // While the bucket is empty there is nothing to do for a kick.
            (Some(_), Some(timer)) => vec![(timer, TIMER)],
            (Some(ring), None) if !self.broken => vec![(ring.kick.as_fd(), KICK)],
            _ => Vec::new(),
        }
    }

    fn handle_event(&mut self, token: u64) {
        let ready = match token {
            TIMER => self.bucket.as_mut().is_some_and(Bucket::take_timer),
            _ => self.ring.as_ref().is_some_and(|ring| {
                let live = ring.clear_kick();
                self.broken |= !live;
                live
            }),
        };
        if ready && !self.broken {
            self.serve();
        }
    }
}

fn serve(ring: &mut Vring, bucket: &mut Option<Bucket>) -> Result<(), RingError> {
    let memory = Arc::clone(&ring.memory);
    for _ in 0..CHAINS_PER_TURN {
        let limit = match bucket {
            Some(bucket) => bucket.available().min(MAX_BYTES),
            None => MAX_BYTES,
        };
        if limit == 0 {
            ring.notify()?;
            if let Some(Err(error)) = bucket.as_mut().map(Bucket::wait) {
                log::error!("the timer does not start: {error}");
            }
            return Ok(());
        }
        let Some(chain) = ring.pop()? else {
            ring.notify()?;
            if ring.enable_kicks()? {
                continue;
            }
            return Ok(());
        };
        let head = chain.head_index();
        let written = fill(&memory, chain, limit);
        if let Some(bucket) = bucket {
            bucket.spend(written.into());
        }
        ring.push_used(head, written)?;
    }
    ring.notify()?;
    ring.kick_again();
    Ok(())
}

/// Fills up to `limit` bytes of the writable buffers; returns how many.
fn fill(memory: &GuestMemoryMmap, chain: Chain, limit: u64) -> u32 {
    let mut random = [0u8; 256];
    let mut written = 0;
    for buffer in chain.writable() {
        let end = (written + u64::from(buffer.len())).min(limit);
        let mut addr = buffer.addr();
        while written < end {
            let part = &mut random[..usize::try_from(end - written).unwrap_or(256).min(256)];
            if let Err(error) = get_random(part) {
                log::error!("the host gives no random numbers: {error}");
                return written as u32;
            }
            if let Err(error) = memory.write_slice(part, addr) {
                warn_limited!("a buffer of the driver is not in guest memory: {error}");
                return written as u32;
            }
            written += part.len() as u64;
            // The end of the buffer was found in guest memory, or it is the end of the loop.
            addr.0 = addr.0.wrapping_add(part.len() as u64);
        }
    }
    // At most MAX_BYTES.
    written as u32
}

fn get_random(buffer: &mut [u8]) -> io::Result<()> {
    // Reads of up to 256 bytes are never cut short by a signal (getrandom(2)).
    // SAFETY: the buffer is as long as the length given.
    let n = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if usize::try_from(n) == Ok(buffer.len()) {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
