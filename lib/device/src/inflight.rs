//! Memory in which chains that have been taken and not returned are tracked, so that a process that
//! takes this one's place can take them again (Spec of vhost-user, "Inflight I/O tracking").
//!
//! The front end keeps the memory and hands it to each back end. It holds one structure for each
//! virtqueue:
//!
//! ```text
//!    0  features (64 bits, 0), version (16 bits, 1; 0 is nothing yet), number of entries,
//!       last_batch_head, used_idx
//!   16  for each descriptor: inflight (8 bits), 5 unused, next (16 bits), counter (64 bits)
//! ```
//!
//! The order of stores is what makes it work, whenever the process is killed between two of them:
//!
//! ```text
//!   taken      counter, inflight = 1
//!   returned   next = last_batch_head, last_batch_head = head, used ring and its index,
//!              inflight = 0, used_idx
//!   start      used_idx is not the used ring's index: the chains from last_batch_head on were
//!              returned; what is in flight then is taken again, the lowest counter first; the next
//!              available index is the used ring's index plus the number of chains in flight
//! ```
//!
//! Nothing that is read here is trusted: another process has written it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use anemone_log::warn_limited;
use anemone_vhost_user::InflightDescription;

const PAGE: u64 = 4096;
/// Structures of different virtqueues do not share a cache line.
const ALIGNMENT: u64 = 64;
const VERSION: u16 = 1;
/// Largest virtqueue of virtio (1.3, 2.7).
const MAX_QUEUE_SIZE: u16 = 32768;

#[repr(C)]
struct Header {
    features: AtomicU64,
    version: AtomicU16,
    entries: AtomicU16,
    last_batch_head: AtomicU16,
    used_idx: AtomicU16,
}

#[repr(C)]
struct Entry {
    inflight: AtomicU8,
    _unused: [AtomicU8; 5],
    next: AtomicU16,
    counter: AtomicU64,
}

/// Bytes for one virtqueue.
fn stride(queue_size: u16) -> u64 {
    let bytes = size_of::<Header>() + size_of::<Entry>() * usize::from(queue_size);
    (bytes as u64).next_multiple_of(ALIGNMENT)
}

/// The memory that this process has to give. It is made before the process is in its jail, which
/// then needs no right to make any; pages that are never touched cost nothing.
#[derive(Debug)]
pub(crate) struct Pool {
    file: File,
    queues: u16,
    /// Somebody has it, or had.
    used: bool,
}

impl Pool {
    /// Memory for a device of so many virtqueues, sealed against resizing.
    pub fn new(queues: usize) -> io::Result<Self> {
        let queues = u16::try_from(queues).map_err(io::Error::other)?;
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"inflight".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nothing else owns.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let size = u64::from(queues) * stride(MAX_QUEUE_SIZE);
        file.set_len(size.next_multiple_of(PAGE))?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: F_ADD_SEALS takes no pointer.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            file,
            queues,
            used: false,
        })
    }

    /// The memory for GET_INFLIGHT_FD, zeroed. What was given away before is the same memory.
    ///
    /// # Errors
    /// Why there is none, for the log.
    pub fn give(
        &mut self,
        asked: &InflightDescription,
    ) -> Result<(InflightDescription, BorrowedFd<'_>), String> {
        let InflightDescription {
            queues, queue_size, ..
        } = *asked;
        if queues == 0 || queues > self.queues {
            return Err(format!("{queues} queues, there are {}", self.queues));
        }
        if queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
            return Err(format!(
                "queues of {queue_size} entries, 1 to {MAX_QUEUE_SIZE} are possible"
            ));
        }
        let description = InflightDescription {
            size: u64::from(queues) * stride(queue_size),
            offset: 0,
            ..*asked
        };
        if self.used {
            let region = Region::map(&description, self.file.as_fd())?;
            (0..queues).for_each(|index| region.clear(index));
        }
        self.used = true;
        Ok((description, self.file.as_fd()))
    }
}

/// Mapped memory of SET_INFLIGHT_FD.
#[derive(Debug)]
pub(crate) struct Region {
    start: NonNull<u8>,
    length: usize,
    queues: u16,
    queue_size: u16,
}

// SAFETY: the mapping belongs to this value until it is dropped and is only accessed through atomics,
// as memory shared with another process must be anyway.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Checks a description and maps the memory.
    ///
    /// # Errors
    /// What is wrong with it, for the log.
    pub fn map(description: &InflightDescription, fd: BorrowedFd<'_>) -> Result<Self, String> {
        let InflightDescription {
            size,
            offset,
            queues,
            queue_size,
        } = *description;
        if queues == 0 || queue_size == 0 || queue_size > MAX_QUEUE_SIZE {
            return Err(format!("{queues} queues of {queue_size} entries"));
        }
        let needed = u64::from(queues) * stride(queue_size);
        if size < needed {
            return Err(format!(
                "{size} bytes for {queues} queues of {queue_size} entries, {needed} are needed"
            ));
        }
        if !offset.is_multiple_of(PAGE) {
            return Err(format!(
                "its offset {offset:#x} is not a multiple of {PAGE}"
            ));
        }
        // Touching a page past the end of the file would kill the process. Memory of our own making
        // cannot shrink; a front end that shrinks its own ends its own device.
        let file = File::from(fd.try_clone_to_owned().map_err(|e| e.to_string())?);
        let length = file.metadata().map_err(|e| e.to_string())?.len();
        if offset.checked_add(needed).is_none_or(|end| end > length) {
            return Err(format!(
                "{needed:#x} bytes at {offset:#x} of a file of {length:#x} bytes"
            ));
        }
        let length = usize::try_from(needed).map_err(|e| e.to_string())?;
        let offset = libc::off_t::try_from(offset).map_err(|e| e.to_string())?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().to_string());
        }
        let start = NonNull::new(start.cast()).ok_or("mapped at address 0")?;
        Ok(Self {
            start,
            length,
            queues,
            queue_size,
        })
    }

    /// Makes a queue's structure one that has never been used.
    pub fn clear(&self, index: u16) {
        let (header, entries) = self.queue(index);
        header.version.store(0, Ordering::Relaxed);
        for entry in entries {
            entry.inflight.store(0, Ordering::Relaxed);
        }
    }

    /// Makes all structures ones that have never been used.
    pub fn clear_all(&self) {
        (0..self.queues).for_each(|index| self.clear(index));
    }

    fn queue(&self, index: u16) -> (&Header, &[Entry]) {
        assert!(index < self.queues, "in-flight memory has no queue {index}");
        let offset = usize::from(index) * stride(self.queue_size) as usize;
        // SAFETY: `map` has checked that the mapping has room for `queues` structures; each begins at
        // a multiple of 64 in pages, so it is aligned. They consist of atomics only, for which every
        // bit pattern is valid, and live as long as the mapping, which `self` owns.
        unsafe {
            let header = self.start.add(offset);
            let entries = header.add(size_of::<Header>());
            (
                header.cast::<Header>().as_ref(),
                std::slice::from_raw_parts(entries.cast().as_ptr(), self.queue_size.into()),
            )
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, which nothing refers to any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

/// What a ring goes on with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Where in the available ring.
    pub next_avail: u16,
    /// Heads of the chains in flight, the oldest first.
    pub again: Vec<u16>,
}

/// Tracks one started ring.
#[derive(Debug)]
pub(crate) struct Tracker {
    region: Arc<Region>,
    index: u16,
    counter: u64,
}

impl Tracker {
    /// Takes up the tracking of ring `index`, which has `size` entries and whose used ring is at
    /// `used_idx`. A ring that has not been tracked yet goes on at `base`.
    ///
    /// # Errors
    /// There is no room for the ring, or it was tracked in a way that is not known here.
    pub fn start(
        region: &Arc<Region>,
        index: usize,
        size: u16,
        used_idx: u16,
        base: u16,
    ) -> Result<(Self, Recovered), String> {
        let number = u16::try_from(index).ok().filter(|&n| n < region.queues);
        let (Some(number), true) = (number, size <= region.queue_size) else {
            return Err(format!(
                "in-flight memory is for {} rings of {} entries",
                region.queues, region.queue_size
            ));
        };
        let (header, entries) = region.queue(number);
        let mut tracker = Self {
            region: Arc::clone(region),
            index: number,
            counter: 0,
        };
        header.entries.store(region.queue_size, Ordering::Relaxed);
        match header.version.load(Ordering::Relaxed) {
            0 => {
                region.clear(number);
                header.features.store(0, Ordering::Relaxed);
                header.last_batch_head.store(0, Ordering::Relaxed);
                header.used_idx.store(used_idx, Ordering::Relaxed);
                header.version.store(VERSION, Ordering::Release);
                let recovered = Recovered {
                    next_avail: base,
                    again: Vec::new(),
                };
                return Ok((tracker, recovered));
            }
            VERSION => {}
            other => {
                return Err(format!(
                    "in-flight memory of version {other}, not {VERSION}"
                ));
            }
        }
        let returned = used_idx.wrapping_sub(header.used_idx.load(Ordering::Relaxed));
        forget_returned(header, entries, returned);
        header.used_idx.store(used_idx, Ordering::Release);
        let (entries, beyond) = entries.split_at(size.into());
        let mut in_flight: Vec<(u64, u16)> = Vec::new();
        for (head, entry) in (0..).zip(entries) {
            if entry.inflight.load(Ordering::Relaxed) != 0 {
                in_flight.push((entry.counter.load(Ordering::Relaxed), head));
            }
        }
        for entry in beyond {
            if entry.inflight.swap(0, Ordering::Relaxed) != 0 {
                warn_limited!("ring {index}: a chain in flight begins beyond its {size} entries");
            }
        }
        in_flight.sort_unstable();
        if let Some((counter, _)) = in_flight.last() {
            tracker.counter = counter.wrapping_add(1);
        }
        // At most as many as the ring has entries.
        let count = in_flight.len() as u16;
        let recovered = Recovered {
            next_avail: used_idx.wrapping_add(count),
            again: in_flight.into_iter().map(|(_, head)| head).collect(),
        };
        Ok((tracker, recovered))
    }

    /// A chain is taken from the available ring.
    pub fn taken(&mut self, head: u16) {
        let (_, entries) = self.region.queue(self.index);
        // A head that is not of the ring cannot be returned either.
        if let Some(entry) = entries.get(usize::from(head)) {
            entry.counter.store(self.counter, Ordering::Relaxed);
            entry.inflight.store(1, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
        }
    }

    /// A chain is about to be returned.
    pub fn returning(&self, head: u16) {
        let (header, entries) = self.region.queue(self.index);
        if let Some(entry) = entries.get(usize::from(head)) {
            let last = header.last_batch_head.load(Ordering::Relaxed);
            entry.next.store(last, Ordering::Relaxed);
            header.last_batch_head.store(head, Ordering::Release);
        }
    }

    /// The chains have been returned; the used ring is at `used_idx`.
    pub fn returned(&self, heads: impl IntoIterator<Item = u16>, used_idx: u16) {
        let (header, entries) = self.region.queue(self.index);
        for head in heads {
            if let Some(entry) = entries.get(usize::from(head)) {
                entry.inflight.store(0, Ordering::Release);
            }
        }
        header.used_idx.store(used_idx, Ordering::Release);
    }

    /// A chain goes back to the available ring.
    pub fn not_taken(&self, head: u16) {
        let (_, entries) = self.region.queue(self.index);
        if let Some(entry) = entries.get(usize::from(head)) {
            entry.inflight.store(0, Ordering::Release);
        }
    }
}

/// Marks the last `count` chains that were returned as such.
fn forget_returned(header: &Header, entries: &[Entry], count: u16) {
    let mut head = header.last_batch_head.load(Ordering::Relaxed);
    // A batch has at most as many chains as the ring has entries.
    for _ in 0..count.min(entries.len() as u16) {
        let Some(entry) = entries.get(usize::from(head)) else {
            warn_limited!(
                "in-flight memory names descriptor {head}, there are {}",
                entries.len()
            );
            return;
        };
        entry.inflight.store(0, Ordering::Relaxed);
        head = entry.next.load(Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    fn region() -> Arc<Region> {
        let mut pool = Pool::new(2).unwrap();
        let (description, fd) = pool.give(&asked(2, SIZE)).unwrap();
        Arc::new(Region::map(&description, fd).unwrap())
    }

    fn asked(queues: u16, queue_size: u16) -> InflightDescription {
        InflightDescription {
            size: 0,
            offset: 0,
            queues,
            queue_size,
        }
    }

    fn start(region: &Arc<Region>, used_idx: u16) -> (Tracker, Recovered) {
        Tracker::start(region, 1, SIZE, used_idx, 77).unwrap()
    }

    #[test]
    fn what_is_in_flight_comes_again_in_its_order() {
        let region = region();
        let (mut tracker, recovered) = start(&region, 0xfffe);
        assert_eq!((recovered.next_avail, recovered.again), (77, vec![]));
        for head in [5, 2, 7, 0] {
            tracker.taken(head);
        }
        for (head, used) in [(2, 0xffff), (5, 0)] {
            tracker.returning(head);
            tracker.returned([head], used);
        }
        tracker.taken(2);
        tracker.taken(SIZE);
        let (mut tracker, recovered) = start(&region, 0);
        assert_eq!((recovered.next_avail, recovered.again), (3, vec![7, 0, 2]));
        // Chains that are taken later count as later.
        tracker.taken(1);
        assert_eq!(start(&region, 0).1.again, [7, 0, 2, 1]);
        // The other queue's are its own.
        let other = Tracker::start(&region, 0, SIZE, 3, 3).unwrap().1;
        assert_eq!((other.next_avail, other.again), (3, vec![]));
        region.clear_all();
        assert!(start(&region, 0).1.again.is_empty());
    }

    /// Killed between any two stores of returning a chain, it is either returned or in flight.
    #[test]
    fn a_chain_is_returned_at_the_moment_the_used_index_says() {
        let region = region();
        let (mut tracker, _) = start(&region, 9);
        tracker.taken(3);
        tracker.taken(4);
        tracker.returning(3);
        assert_eq!(start(&region, 9).1.again, [3, 4]);
        tracker.returning(3);
        let recovered = start(&region, 10).1;
        assert_eq!((recovered.next_avail, recovered.again), (11, vec![4]));
        // The same again, for a chain whose number is still that of the last batch.
        tracker.taken(3);
        tracker.returning(3);
        assert_eq!(start(&region, 10).1.again, [4, 3]);
        tracker.returning(3);
        assert_eq!(start(&region, 11).1.again, [4]);
        tracker.returning(4);
        let (header, entries) = region.queue(1);
        entries[4].inflight.store(0, Ordering::Relaxed);
        let recovered = start(&region, 12).1;
        assert_eq!((recovered.next_avail, recovered.again), (12, vec![]));
        assert_eq!(header.used_idx.load(Ordering::Relaxed), 12);
    }

    #[test]
    fn scribbled_memory_neither_panics_nor_loops() {
        let region = region();
        let (header, entries) = region.queue(1);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..2000 {
            header.version.store(VERSION, Ordering::Relaxed);
            header.entries.store(random() as u16, Ordering::Relaxed);
            header.features.store(random(), Ordering::Relaxed);
            header
                .last_batch_head
                .store(random() as u16 % 10, Ordering::Relaxed);
            header.used_idx.store(random() as u16, Ordering::Relaxed);
            for entry in entries {
                entry.inflight.store(random() as u8 % 3, Ordering::Relaxed);
                entry.next.store(random() as u16 % 10, Ordering::Relaxed);
                entry.counter.store(random() % 3, Ordering::Relaxed);
            }
            let size = 1 << (random() % 4);
            let used = random() as u16;
            let (_, recovered) = Tracker::start(&region, 1, size, used, 0).unwrap();
            let mut heads = recovered.again.clone();
            let count = heads.len() as u16;
            assert_eq!(recovered.next_avail, used.wrapping_add(count));
            heads.sort_unstable();
            heads.dedup();
            assert_eq!(heads.len(), recovered.again.len());
            assert!(heads.iter().all(|&head| head < size));
        }
        header.version.store(2, Ordering::Relaxed);
        let error = Tracker::start(&region, 1, SIZE, 0, 0).unwrap_err();
        assert!(error.contains("version 2"), "{error}");
        assert!(Tracker::start(&region, 2, SIZE, 0, 0).is_err());
        assert!(Tracker::start(&region, 0, 2 * SIZE, 0, 0).is_err());
    }

    #[test]
    fn impossible_memory_is_refused() {
        let mut pool = Pool::new(3).unwrap();
        for (queues, size) in [(0, 8), (4, 8), (1, 0), (1, 32769)] {
            assert!(pool.give(&asked(queues, size)).is_err());
        }
        let (good, _) = pool.give(&asked(3, 32768)).unwrap();
        let file = pool.file.try_clone().unwrap();
        let map = |description| Region::map(&description, file.as_fd()).map(drop);
        map(good).unwrap();
        for (bad, part) in [
            (
                InflightDescription {
                    size: good.size - 1,
                    ..good
                },
                "are needed",
            ),
            (InflightDescription { queues: 0, ..good }, "0 queues"),
            (InflightDescription { queues: 4, ..good }, "are needed"),
            (
                InflightDescription {
                    queue_size: 0,
                    ..good
                },
                "0 entries",
            ),
            (
                InflightDescription {
                    queue_size: 65535,
                    ..good
                },
                "65535",
            ),
            (InflightDescription { offset: 1, ..good }, "multiple"),
            (
                InflightDescription {
                    offset: 4096,
                    ..good
                },
                "file of",
            ),
            (
                InflightDescription {
                    offset: !0xfff,
                    ..good
                },
                "file of",
            ),
            (
                InflightDescription {
                    size: u64::MAX,
                    queues: 65535,
                    ..good
                },
                "file of",
            ),
        ] {
            let error = map(bad).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(Region::map(&good, File::open("/dev/null").unwrap().as_fd()).is_err());
        assert!(file.set_len(0).is_err(), "it is not sealed");
    }

    #[test]
    fn memory_given_again_has_nothing_in_flight() {
        let mut pool = Pool::new(1).unwrap();
        let (description, fd) = pool.give(&asked(1, SIZE)).unwrap();
        let region = Arc::new(Region::map(&description, fd).unwrap());
        Tracker::start(&region, 0, SIZE, 0, 0).unwrap().0.taken(1);
        let (description, fd) = pool.give(&asked(1, SIZE)).unwrap();
        let region = Arc::new(Region::map(&description, fd).unwrap());
        let recovered = Tracker::start(&region, 0, SIZE, 5, 4).unwrap().1;
        assert_eq!((recovered.next_avail, recovered.again), (4, vec![]));
    }
}
