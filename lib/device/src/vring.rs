//! A started virtqueue.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A chain of descriptors that the driver has made available. Walking it ends early at a
/// descriptor that is out of bounds, in a loop or in a nested indirect table.
pub type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// In the available ring's flags: the driver does not want interrupts (virtio 1.3, 2.7.6).
const VRING_AVAIL_F_NO_INTERRUPT: u16 = 1;

/// The driver has broken the ring: processing it cannot go on until it is set up again.
#[derive(Debug, Error)]
#[error("virtqueue {index} is broken: {source}")]
pub struct RingError {
    index: usize,
    source: virtio_queue::Error,
}

/// One started virtqueue, handed to the device. It owns the ring until
/// [`Device::stop_queue`](crate::Device::stop_queue).
#[derive(Debug)]
pub struct Vring {
    /// Number of the queue.
    pub index: usize,
    /// The ring; `next_avail` is where the front end said. Its three parts lie in guest memory.
    pub queue: Queue,
    /// Guest memory of this moment. A new table restarts all queues.
    pub memory: Arc<GuestMemoryMmap>,
    /// Readable when the guest has made descriptors available (an eventfd, non-blocking).
    pub kick: OwnedFd,
    /// Written to raise the queue's interrupt (an eventfd); absent while the front end polls. The
    /// frame may put another eventfd behind the same number at any time.
    pub call: Option<Arc<OwnedFd>>,
    /// Written when the ring is given up.
    pub(crate) err: Option<Arc<OwnedFd>>,
    /// virtio features the driver has accepted.
    pub features: u64,
    /// Number of chains that were returned since the driver was last told.
    pub(crate) untold: u16,
}

impl Vring {
    /// Takes the next available chain.
    ///
    /// # Errors
    /// The driver claims more available chains than the ring has entries.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let index = self.index;
        match self.queue.iter(Arc::clone(&self.memory)) {
            Ok(mut available) => Ok(available.next()),
            Err(source) => Err(RingError { index, source }),
        }
    }

    /// Puts the `count` chains that were popped last back: the next [`pop`](Self::pop) returns the
    /// first of them. None of them may have been returned to the driver.
    pub fn put_back(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }

    /// Returns the chain that starts at `head` to the driver, `written` bytes of it filled.
    /// [`notify`](Self::notify) tells the driver.
    ///
    /// # Errors
    /// `head` is not a descriptor of this ring.
    pub fn push_used(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        self.push_used_all(&[(head, written)])
    }

    /// Returns several chains, each with the number of bytes filled, at once: the driver sees all
    /// of them or none.
    ///
    /// # Errors
    /// As for [`push_used`](Self::push_used).
    pub fn push_used_all(&mut self, chains: &[(u16, u32)]) -> Result<(), RingError> {
        let size = self.queue.size();
        // virtio 1.3, 2.7.8: flags and index, then elements of 8 bytes. The whole ring was found in
        // guest memory when it started.
        let ring = self.queue.used_ring();
        let mut next = self.queue.next_used();
        for &(head, written) in chains {
            if head >= size {
                return Err(self.broken(virtio_queue::Error::InvalidDescriptorIndex));
            }
            let element = u64::from(head) | u64::from(written) << 32;
            let at = GuestAddress(ring + 4 + 8 * u64::from(next % size));
            self.memory
                .write_slice(&element.to_le_bytes(), at)
                .map_err(|error| self.broken(virtio_queue::Error::GuestMemory(error)))?;
            next = next.wrapping_add(1);
            self.untold = self.untold.saturating_add(1);
        }
        self.queue.set_next_used(next);
        self.memory
            .store(next.to_le(), GuestAddress(ring + 2), Ordering::Release)
            .map_err(|error| self.broken(virtio_queue::Error::GuestMemory(error)))
    }

    /// Interrupts the driver if chains were returned since the last call and it wants to know.
    ///
    /// # Errors
    /// The ring cannot be read; not possible while guest memory is as it was at the start.
    pub fn notify(&mut self) -> Result<(), RingError> {
        if self.untold > 0
            && self.wants_interrupt()?
            && let Some(call) = &self.call
        {
            signal(call);
        }
        self.untold = 0;
        Ok(())
    }

    fn wants_interrupt(&self) -> Result<bool, RingError> {
        // The used index must be visible before the driver's wish is read: the driver changes its
        // wish and then looks at the index (virtio 1.3, 2.7.7).
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        if !self.queue.event_idx_enabled() {
            return Ok(self.load(ring)? & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        // Is the event index among those just passed?
        let event = self.load(ring + 4 + 2 * u64::from(self.queue.size()))?;
        let passed = self.queue.next_used().wrapping_sub(event);
        Ok(passed.wrapping_sub(1) < self.untold)
    }

    fn load(&self, at: u64) -> Result<u16, RingError> {
        self.memory
            .load::<u16>(GuestAddress(at), Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|error| self.broken(virtio_queue::Error::GuestMemory(error)))
    }

    /// Asks the driver for kicks; true if chains became available meanwhile, for which no kick may
    /// come.
    ///
    /// # Errors
    /// As for [`notify`](Self::notify).
    pub fn enable_kicks(&mut self) -> Result<bool, RingError> {
        let result = self.queue.enable_notification(&*self.memory);
        result.map_err(|source| self.broken(source))
    }

    /// Tells the driver that kicks are not needed for now. Merely a hint.
    ///
    /// # Errors
    /// As for [`notify`](Self::notify).
    pub fn disable_kicks(&mut self) -> Result<(), RingError> {
        let result = self.queue.disable_notification(&*self.memory);
        result.map_err(|source| self.broken(source))
    }

    /// Makes the kick unreadable until the next one. False when nothing can be read and nothing
    /// ever will: the front end gave something that is not an eventfd.
    pub fn clear_kick(&self) -> bool {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is 8 bytes long and outlives the call.
        let n = unsafe { libc::read(self.kick.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
        n == 8 || (n < 0 && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock)
    }

    /// Makes the kick readable, for a device that has to come back to the ring later.
    pub fn kick_again(&self) {
        signal(&self.kick);
    }

    /// Reports a broken ring to the front end. The device must not touch the ring any more, but
    /// still answers [`Device::stop_queue`](crate::Device::stop_queue).
    pub fn give_up(&self, why: &RingError) {
        anemone_log::warn_limited!("{why}");
        if let Some(err) = &self.err {
            signal(err);
        }
    }

    fn broken(&self, source: virtio_queue::Error) -> RingError {
        RingError {
            index: self.index,
            source,
        }
    }
}

/// Adds one to an eventfd.
pub(crate) fn signal(fd: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // An eventfd that is full is readable already, which is all that a signal says.
    // SAFETY: the buffer is 8 bytes long and outlives the call.
    unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), 8) };
}
