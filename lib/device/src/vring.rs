//! A started virtqueue.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::inflight::Tracker;

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
///
/// A front end that can go on with another process when this one has ended gives the frame memory
/// for it. Then every chain counts as in flight from [`pop`](Self::pop) to
/// [`push_used`](Self::push_used), and what is in flight when the ring stops or the process ends,
/// however it ends, comes out of `pop` again when the ring is started the next time, the oldest
/// chain first. So take chains with `pop` and return them with `push_used`, never through `queue`.
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
    /// Where what is in flight is tracked, if the front end has given memory for it.
    pub(crate) tracker: Option<Tracker>,
    /// Chains to be taken again.
    pub(crate) again: Option<Again>,
    /// The last chain came from there.
    pub(crate) popped_again: bool,
    /// Number of chains that have been popped and did not.
    pub(crate) popped_new: u64,
}

impl Vring {
    /// Takes the next available chain; first those that were in flight when the ring was last
    /// stopped or its process ended.
    ///
    /// # Errors
    /// The driver claims more available chains than the ring has entries.
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        self.popped_again = self.pops_again();
        if let (true, Some(again)) = (self.popped_again, &mut self.again) {
            return Ok(again.next());
        }
        let index = self.index;
        let chain = match self.queue.iter(Arc::clone(&self.memory)) {
            Ok(mut available) => available.next(),
            Err(source) => return Err(RingError { index, source }),
        };
        if let (Some(chain), Some(tracker)) = (&chain, &mut self.tracker) {
            tracker.taken(chain.head_index());
            self.popped_new += 1;
        }
        Ok(chain)
    }

    /// Whether the chain that [`pop`](Self::pop) returned last had been taken before, in this
    /// process or an earlier one, and not returned: what it asks for may have been done already,
    /// in part or as a whole. A device for which twice is not the same as once has to look.
    pub fn popped_again(&self) -> bool {
        self.popped_again
    }

    /// Whether the next chain that [`pop`](Self::pop) returns will be such a one.
    pub fn pops_again(&self) -> bool {
        self.again.as_ref().is_some_and(Again::is_left)
    }

    /// Whether chains in flight are tracked: one that a device drops when it stops the ring comes
    /// again. Otherwise it is lost to the driver.
    pub fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }

    /// Puts the `count` chains that were popped last back: the next [`pop`](Self::pop) returns the
    /// first of them. None of them may have been returned to the driver.
    pub fn put_back(&mut self, count: u16) {
        let Some(tracker) = &self.tracker else {
            let next = self.queue.next_avail().wrapping_sub(count);
            self.queue.set_next_avail(next);
            return;
        };
        let new = count.min(u16::try_from(self.popped_new).unwrap_or(u16::MAX));
        for _ in 0..new {
            // The last one first: should the process be killed between two, those that still count
            // as in flight are the first ones after the last that was returned.
            let next = self.queue.next_avail().wrapping_sub(1);
            let entry = u64::from(next % self.queue.size());
            if let Ok(head) = self.load(self.queue.avail_ring() + 4 + 2 * entry) {
                tracker.not_taken(head);
            }
            self.queue.set_next_avail(next);
        }
        self.popped_new -= u64::from(new);
        if let Some(again) = &mut self.again {
            again.put_back(count - new);
        }
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
            if let Some(tracker) = &self.tracker {
                tracker.returning(head);
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
            .map_err(|error| self.broken(virtio_queue::Error::GuestMemory(error)))?;
        if let Some(tracker) = &self.tracker {
            tracker.returned(chains.iter().map(|&(head, _)| head), next);
        }
        Ok(())
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
        let more = result.map_err(|source| self.broken(source))?;
        Ok(more || self.pops_again())
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

/// Chains of a ring that the driver does not offer a second time. virtio-queue makes chains only
/// from an available ring, so this has one of its own, at a guest address where no memory is.
#[derive(Debug)]
pub(crate) struct Again {
    queue: Queue,
    /// Guest memory and that ring.
    memory: Arc<GuestMemoryMmap>,
    count: u16,
}

impl Again {
    /// Chains of `queue` that start at `heads`, at most as many as it has entries.
    ///
    /// # Errors
    /// There is no room for another region in guest memory.
    pub fn new(
        heads: &[u16],
        queue: &Queue,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<Self>, String> {
        const PAGE: u64 = 4096;
        if heads.is_empty() {
            return Ok(None);
        }
        // The available ring: flags, index, and an entry for each chain (virtio 1.3, 2.7.6).
        let words = [0, heads.len() as u16]
            .into_iter()
            .chain(heads.iter().copied());
        let bytes: Vec<u8> = words.flat_map(u16::to_le_bytes).collect();
        let mut ends = memory.iter().map(|region| region.last_addr().0);
        let (start, memory) = ends
            .find_map(|last| {
                let start = GuestAddress(last.checked_add(1)?.checked_next_multiple_of(PAGE)?);
                let size = bytes.len().next_multiple_of(PAGE as usize);
                let region = GuestRegionMmap::from_range(start, size, None).ok()?;
                Some((start, memory.insert_region(Arc::new(region)).ok()?))
            })
            .ok_or("no room for the list of chains to be taken again")?;
        memory
            .write_slice(&bytes, start)
            .map_err(|e| e.to_string())?;
        let mut own = Queue::new(queue.size()).map_err(|e| e.to_string())?;
        own.try_set_desc_table_address(GuestAddress(queue.desc_table()))
            .and_then(|()| own.try_set_avail_ring_address(start))
            .map_err(|e| e.to_string())?;
        own.set_ready(true);
        Ok(Some(Self {
            queue: own,
            memory: Arc::new(memory),
            count: heads.len() as u16,
        }))
    }

    fn is_left(&self) -> bool {
        self.queue.next_avail() < self.count
    }

    fn put_back(&mut self, count: u16) {
        let next = self.queue.next_avail().saturating_sub(count);
        self.queue.set_next_avail(next);
    }

    fn next(&mut self) -> Option<Chain> {
        self.queue.iter(Arc::clone(&self.memory)).ok()?.next()
    }
}

/// Adds one to an eventfd.
pub(crate) fn signal(fd: &OwnedFd) {
    let one = 1u64.to_ne_bytes();
    // An eventfd that is full is readable already, which is all that a signal says.
    // SAFETY: the buffer is 8 bytes long and outlives the call.
    unsafe { libc::write(fd.as_raw_fd(), one.as_ptr().cast(), 8) };
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::fs::File;

    use anemone_vhost_user::InflightDescription;

    use super::*;
    use crate::inflight::{Pool, Region};

    const SIZE: u16 = 16;
    const TABLE: u64 = 0x1000;
    const AVAILABLE: u64 = 0x2000;
    const USED: u64 = 0x3000;

    /// The ring as the session starts it.
    fn start(memory: &Arc<GuestMemoryMmap>, region: &Arc<Region>) -> Vring {
        let mut queue = Queue::new(SIZE).unwrap();
        queue
            .try_set_desc_table_address(GuestAddress(TABLE))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(AVAILABLE))
            .unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        let used = queue.used_idx(&**memory, Ordering::Acquire).unwrap().0;
        queue.set_next_used(used);
        let (tracker, recovered) = Tracker::start(region, 0, SIZE, used, 0).unwrap();
        queue.set_next_avail(recovered.next_avail);
        let again = Again::new(&recovered.again, &queue, memory).unwrap();
        Vring {
            index: 0,
            queue,
            memory: Arc::clone(memory),
            kick: File::open("/dev/null").unwrap().into(),
            call: None,
            err: None,
            features: 0,
            untold: 0,
            tracker: Some(tracker),
            again,
            popped_again: false,
            popped_new: 0,
        }
    }

    /// Offers, takes, returns in any order and number, puts back, and starts anew, at random: every
    /// chain is returned once, and a new start finds what was in flight in the order in which it was
    /// taken.
    #[test]
    fn whatever_happens_each_chain_is_taken_until_it_is_returned() {
        let ranges = [(GuestAddress(0), 0x4000)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let mut pool = Pool::new(1).unwrap();
        let asked = InflightDescription {
            size: 0,
            offset: 0,
            queues: 1,
            queue_size: SIZE,
        };
        let (description, fd) = pool.give(&asked).unwrap();
        let region = Arc::new(Region::map(&description, fd).unwrap());
        let mut state = 0x2545_f491_4f6c_dd1du64;
        let mut random = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let mut ring = start(&memory, &region);
        let mut free: Vec<u16> = (0..SIZE).collect();
        // Offered and not taken; in flight, the oldest first; of those, the ones to be taken again.
        let mut offered: VecDeque<u16> = VecDeque::new();
        let mut in_flight: Vec<u16> = Vec::new();
        let mut pending: VecDeque<u16> = VecDeque::new();
        // What was popped since the start and not put back, and whether again; what of it is held.
        let mut popped: Vec<(u16, bool)> = Vec::new();
        let mut held: Vec<u16> = Vec::new();
        let mut available = 0u16;
        for _ in 0..200_000 {
            match random(10) {
                0..3 if !free.is_empty() => {
                    let head = free.swap_remove(random(free.len()));
                    let entry = AVAILABLE + 4 + 2 * u64::from(available % SIZE);
                    memory.write_obj(head, GuestAddress(entry)).unwrap();
                    available = available.wrapping_add(1);
                    memory
                        .write_obj(available, GuestAddress(AVAILABLE + 2))
                        .unwrap();
                    offered.push_back(head);
                }
                0..6 => {
                    assert_eq!(ring.pops_again(), !pending.is_empty());
                    let head = ring.pop().unwrap().map(|chain| chain.head_index());
                    let expected = match ring.popped_again() {
                        true => pending.pop_front(),
                        false => offered.pop_front(),
                    };
                    assert_eq!(head, expected);
                    if let Some(head) = head {
                        popped.push((head, ring.popped_again()));
                        held.push(head);
                        if !ring.popped_again() {
                            in_flight.push(head);
                        }
                    }
                }
                6..8 if !held.is_empty() => {
                    // Some of those that are held, in any order.
                    let count = 1 + random(held.len());
                    let heads: Vec<_> = (0..count)
                        .map(|_| held.swap_remove(random(held.len())))
                        .collect();
                    let next = ring.queue.next_used();
                    let chains: Vec<_> = heads.iter().map(|&head| (head, 7)).collect();
                    ring.push_used_all(&chains).unwrap();
                    for (i, head) in (0..).zip(&heads) {
                        let at = USED + 4 + 8 * u64::from(next.wrapping_add(i) % SIZE);
                        let element: u64 = memory.read_obj(GuestAddress(at)).unwrap();
                        assert_eq!(element, u64::from(*head) | 7 << 32);
                    }
                    in_flight.retain(|head| !heads.contains(head));
                    popped.iter_mut().for_each(|(head, _)| {
                        if heads.contains(head) {
                            *head = u16::MAX;
                        }
                    });
                    free.extend(heads);
                }
                8 => {
                    let last = popped
                        .iter()
                        .rev()
                        .take_while(|(head, _)| *head != u16::MAX);
                    let count = random(last.count() + 1);
                    ring.put_back(count as u16);
                    for (head, again) in popped.split_off(popped.len() - count).into_iter().rev() {
                        held.retain(|&other| other != head);
                        if again {
                            pending.push_front(head);
                        } else {
                            offered.push_front(head);
                            in_flight.retain(|&other| other != head);
                        }
                    }
                }
                _ => {
                    ring = start(&memory, &region);
                    (held, popped) = (Vec::new(), Vec::new());
                    pending = in_flight.iter().copied().collect();
                }
            }
        }
    }
}
