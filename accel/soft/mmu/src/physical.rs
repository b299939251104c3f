//! Guest-physical memory: slots, who may hold pointers into them, and what was written.
//!
//! # Changing slots while vCPUs run
//! The slots are an immutable [`Map`]; every vCPU holds one and caches host addresses from it. A
//! change publishes a new map under the lock, raises a new generation, sets a bit in every vCPU's
//! attention word and then waits until each vCPU has either acknowledged that generation
//! ([`Mmu::poll`](crate::Mmu::poll), which drops what the vCPU cached) or is parked, that is, uses no
//! guest memory at all. So when [`Memory::remove_slot`] returns, no vCPU can reach the slot's
//! memory any more and it may be unmapped. The same rendezvous takes write permission back when
//! the dirty log is read and when a page becomes code.
//!
//! A vCPU thread that waits for a rendezvous is parked itself, and leaves the parked state only
//! under the lock, so two vCPUs that change the map at the same time cannot wait for each other.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anemone_accel_api::MemorySlot;
use thiserror::Error;

use crate::raw::{self, Atomic, Value};

/// Size of the smallest page and unit of everything here, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Why a slot could not be added or used.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum SlotError {
    /// The slot is empty, wraps around, or is not made of whole pages.
    #[error(
        "memory slot {0}: guest address, host address and size must be multiples of 4096, the size not 0, and the end below 2^52"
    )]
    Shape(u32),
    /// The number is taken.
    #[error("memory slot {0} exists already")]
    Exists(u32),
    /// Guest-physical ranges overlap.
    #[error("memory slot {0} overlaps memory slot {1}")]
    Overlap(u32, u32),
    /// There is no such slot.
    #[error("there is no memory slot {0}")]
    Missing(u32),
    /// The slot was added without a dirty log.
    #[error("memory slot {0} was not added with dirty logging")]
    NotLogged(u32),
}

/// Is told of writes to pages that hold decoded code.
pub trait CodeWatch: Send + Sync {
    /// `length` bytes at guest-physical `physical`, within one page, were written by vCPU
    /// `vcpu` (`None`: by [`Memory::write`]). The bytes are in memory already.
    ///
    /// Drop the decoded code that overlaps. When none is left on the page, call
    /// [`Memory::release_code`], so that further writes are fast.
    ///
    /// The calling vCPU is parked: taking a lock under which another vCPU calls
    /// [`Mmu::protect_code`](crate::Mmu::protect_code) does not deadlock.
    fn code_written(&self, memory: &Memory, vcpu: Option<u32>, physical: u64, length: usize);
}

/// The page holds decoded code: writes take the slow path.
const CODE: u8 = 1;
/// Some vCPU may have a fast write entry for the page.
const WRITER: u8 = 2;

pub(crate) struct Region {
    slot: u32,
    guest: u64,
    size: u64,
    host: usize,
    read_only: bool,
    states: Box<[AtomicU8]>,
    dirty: Option<Box<[AtomicU64]>>,
}

/// What a write to a page must do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum WriteKind {
    /// Nothing more; a fast entry may be kept.
    Plain,
    /// Tell the [`CodeWatch`] afterwards.
    Code,
}

impl Region {
    fn contains(&self, physical: u64) -> bool {
        physical.wrapping_sub(self.guest) < self.size
    }

    fn page(&self, physical: u64) -> usize {
        ((physical - self.guest) / PAGE_SIZE) as usize
    }

    /// Host address of a guest-physical address in this region. Valid to the end of the page.
    pub(crate) fn host(&self, physical: u64) -> *mut u8 {
        debug_assert!(self.contains(physical));
        std::ptr::with_exposed_provenance_mut(self.host + (physical - self.guest) as usize)
    }

    /// Notes a write to come on the page, for the dirty log and for code tracking.
    pub(crate) fn begin_write(&self, physical: u64) -> WriteKind {
        let page = self.page(physical);
        if let Some(dirty) = &self.dirty {
            dirty[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
        let state = &self.states[page];
        let mut seen = state.load(Ordering::SeqCst);
        if seen == 0 {
            seen = state.fetch_or(WRITER, Ordering::SeqCst);
        }
        if seen & CODE != 0 {
            WriteKind::Code
        } else {
            WriteKind::Plain
        }
    }
}

/// The slots of one moment, sorted by guest address.
#[derive(Default)]
pub(crate) struct Map(Vec<Arc<Region>>);

/// Outcome of setting bits in a page-table entry.
pub(crate) enum EntryUpdate {
    Done,
    /// Somebody else changed the entry first.
    Raced,
    /// Done, and the page holds decoded code.
    WroteCode,
}

impl Map {
    #[inline]
    pub(crate) fn find(&self, physical: u64) -> Option<&Region> {
        let after = self.0.partition_point(|r| r.guest <= physical);
        let region = self.0.get(after.checked_sub(1)?)?;
        region.contains(physical).then_some(&**region)
    }

    /// Where a write goes: memory that is not read-only.
    pub(crate) fn find_writable(&self, physical: u64) -> Option<&Region> {
        self.find(physical).filter(|r| !r.read_only)
    }

    /// Reads a naturally aligned page-table entry. Outside memory it reads as all-ones, as an
    /// access does that nothing on the bus claims.
    pub(crate) fn read_entry<T: Value + From<u32>>(&self, physical: u64) -> Option<T> {
        debug_assert_eq!(physical % T::SIZE as u64, 0);
        let region = self.find(physical)?;
        // SAFETY: aligned, so within a page of the region, whose memory is mapped while this
        // vCPU has not acknowledged its removal.
        Some(unsafe { T::read(region.host(physical)) })
    }

    /// Replaces a page-table entry if it still is `old`. In read-only memory, and where there
    /// is none, the write has no effect, as for any other write.
    pub(crate) fn update_entry<T: Atomic>(&self, physical: u64, old: T, new: T) -> EntryUpdate {
        debug_assert_eq!(physical % T::SIZE as u64, 0);
        let Some(region) = self.find_writable(physical) else {
            return EntryUpdate::Done;
        };
        let kind = region.begin_write(physical);
        // SAFETY: as in `read_entry`; aligned, so within a cache line.
        let found = unsafe { T::compare_exchange(region.host(physical), old, new) };
        if found != old {
            EntryUpdate::Raced
        } else if kind == WriteKind::Code {
            EntryUpdate::WroteCode
        } else {
            EntryUpdate::Done
        }
    }

    /// Splits `length` bytes into pieces that lie in one page each.
    fn pieces(physical: u64, length: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let at = physical.wrapping_add(done as u64);
            let piece = (length - done).min((PAGE_SIZE - at % PAGE_SIZE) as usize);
            let range = done..done + piece;
            done += piece;
            (piece != 0).then_some((at, range))
        })
    }

    pub(crate) fn read(&self, physical: u64, into: &mut [u8]) -> bool {
        if !Self::pieces(physical, into.len()).all(|(at, _)| self.find(at).is_some()) {
            return false;
        }
        for (at, range) in Self::pieces(physical, into.len()) {
            if let Some(region) = self.find(at) {
                // SAFETY: the piece lies in one page of a mapped region.
                unsafe { raw::read_bytes(region.host(at), &mut into[range]) };
            }
        }
        true
    }

    /// Writes, and calls `code` for every piece on a page with code, after the writes.
    pub(crate) fn write(
        &self,
        physical: u64,
        from: &[u8],
        mut code: impl FnMut(u64, usize),
    ) -> bool {
        if !Self::pieces(physical, from.len()).all(|(at, _)| self.find_writable(at).is_some()) {
            return false;
        }
        for (at, range) in Self::pieces(physical, from.len()) {
            if let Some(region) = self.find_writable(at) {
                let kind = region.begin_write(at);
                // SAFETY: the piece lies in one page of a mapped region.
                unsafe { raw::write_bytes(region.host(at), &from[range.clone()]) };
                if kind == WriteKind::Code {
                    code(at, range.len());
                }
            }
        }
        true
    }
}

/// Bits of a vCPU's attention word that belong to this crate; the others are the engine's.
pub const ATTENTION_MMU: u32 = RELOAD | REVOKE;
/// Take the new map and drop everything cached.
pub(crate) const RELOAD: u32 = 1;
/// Drop fast write entries.
pub(crate) const REVOKE: u32 = 2;

/// Value of [`Member::seen`] of a vCPU that uses no guest memory.
const PARKED: u64 = u64::MAX;

/// A vCPU as the memory knows it.
pub(crate) struct Member {
    pub(crate) attention: Arc<AtomicU32>,
    seen: AtomicU64,
}

struct Inner {
    map: Arc<Map>,
    generation: u64,
    members: Vec<Arc<Member>>,
}

/// The guest-physical memory of a VM, shared by its vCPUs.
pub struct Memory {
    inner: Mutex<Inner>,
    watch: Arc<dyn CodeWatch>,
    /// Makes locked accesses across cache lines exclude each other.
    split_lock: Mutex<()>,
}

impl Memory {
    /// Memory without slots. `watch` hears of writes to pages with decoded code.
    pub fn new(watch: Arc<dyn CodeWatch>) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                map: Arc::default(),
                generation: 1,
                members: Vec::new(),
            }),
            watch,
            split_lock: Mutex::new(()),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn lock_split(&self) -> MutexGuard<'_, ()> {
        self.split_lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a slot. When this returns, every vCPU sees it.
    ///
    /// Must not be called by a vCPU thread that is not [parked](crate::Mmu::parked).
    ///
    /// # Safety
    /// `slot.host` must point at `slot.size` bytes, readable and (unless read-only) writable,
    /// that stay mapped until [`remove_slot`](Self::remove_slot) has returned or this value and
    /// every [`Mmu`](crate::Mmu) on it are gone, and that this process accesses only in ways that
    /// tolerate concurrent change.
    pub unsafe fn add_slot(&self, slot: MemorySlot) -> Result<(), SlotError> {
        let host = slot.host.expose_provenance();
        let pages = slot.guest | slot.size | host as u64;
        if !pages.is_multiple_of(PAGE_SIZE)
            || slot.size == 0
            || slot.guest >= 1 << 52
            || slot.size > (1 << 52) - slot.guest
            || host.checked_add(slot.size as usize).is_none()
        {
            return Err(SlotError::Shape(slot.slot));
        }
        let mut inner = self.lock();
        for other in &inner.map.0 {
            if other.slot == slot.slot {
                return Err(SlotError::Exists(slot.slot));
            }
            if other.guest < slot.guest + slot.size && slot.guest < other.guest + other.size {
                return Err(SlotError::Overlap(slot.slot, other.slot));
            }
        }
        let count = (slot.size / PAGE_SIZE) as usize;
        let region = Region {
            slot: slot.slot,
            guest: slot.guest,
            size: slot.size,
            host,
            read_only: slot.read_only,
            states: (0..count).map(|_| AtomicU8::new(0)).collect(),
            dirty: slot
                .log_dirty
                .then(|| (0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect()),
        };
        let mut regions = inner.map.0.clone();
        let at = regions.partition_point(|r| r.guest < slot.guest);
        regions.insert(at, Arc::new(region));
        inner.map = Arc::new(Map(regions));
        self.rendezvous(inner, RELOAD);
        Ok(())
    }

    /// Removes a slot. When this returns, nothing here reaches its memory any more. Decoded
    /// code from it is not reported: the caller drops it.
    ///
    /// Must not be called by a vCPU thread that is not [parked](crate::Mmu::parked).
    pub fn remove_slot(&self, slot: u32) -> Result<(), SlotError> {
        let mut inner = self.lock();
        let mut regions = inner.map.0.clone();
        let at = regions
            .iter()
            .position(|r| r.slot == slot)
            .ok_or(SlotError::Missing(slot))?;
        regions.remove(at);
        inner.map = Arc::new(Map(regions));
        self.rendezvous(inner, RELOAD);
        Ok(())
    }

    /// The pages of a slot written since the last call, one bit per page, lowest address in bit
    /// 0 of the first word. Writes that happened before the call returned are in it; later ones
    /// are in the next.
    ///
    /// Must not be called by a vCPU thread that is not [parked](crate::Mmu::parked).
    pub fn dirty_log(&self, slot: u32) -> Result<Vec<u64>, SlotError> {
        let inner = self.lock();
        let region = inner
            .map
            .0
            .iter()
            .find(|r| r.slot == slot)
            .ok_or(SlotError::Missing(slot))?;
        let dirty = region.dirty.as_ref().ok_or(SlotError::NotLogged(slot))?;
        // First the bits, then the permissions: a write through an old fast entry ends before
        // the rendezvous, and its page is in this result.
        let log = dirty.iter().map(|w| w.swap(0, Ordering::SeqCst)).collect();
        self.rendezvous(inner, REVOKE);
        Ok(log)
    }

    /// Copies out of memory, from any thread; false, and nothing copied, if not all of the
    /// range is memory.
    pub fn read(&self, physical: u64, into: &mut [u8]) -> bool {
        // The lock keeps a slot from being removed meanwhile.
        self.lock().map.read(physical, into)
    }

    /// Copies into memory, from any thread; false, and nothing written, if not all of the range
    /// is writable memory.
    pub fn write(&self, physical: u64, from: &[u8]) -> bool {
        let mut code = Vec::new();
        let inner = self.lock();
        let done = inner
            .map
            .write(physical, from, |at, length| code.push((at, length)));
        drop(inner);
        for (at, length) in code {
            self.report_code(None, at, length);
        }
        done
    }

    /// Allows fast writes to the page again: no decoded code from it is left. Call it under the
    /// lock under which [`Mmu::protect_code`](crate::Mmu::protect_code) is called.
    pub fn release_code(&self, physical: u64) {
        if let Some(region) = self.lock().map.find(physical) {
            region.states[region.page(physical)].fetch_and(!CODE, Ordering::SeqCst);
        }
    }

    pub(crate) fn report_code(&self, vcpu: Option<u32>, physical: u64, length: usize) {
        self.watch.code_written(self, vcpu, physical, length);
    }

    /// Marks a page as code. The caller is a parked vCPU. False if it is not memory.
    pub(crate) fn protect_code(&self, physical: u64) -> bool {
        loop {
            let inner = self.lock();
            let Some(region) = inner.map.find(physical) else {
                return false;
            };
            let state = &region.states[region.page(physical)];
            if state.fetch_or(CODE, Ordering::SeqCst) & WRITER == 0 {
                return true;
            }
            let map = inner.map.clone();
            self.rendezvous(inner, REVOKE);
            // Only now is it sure that nobody has a fast entry. A release in between would
            // show, and starts it all again.
            if let Some(region) = map.find(physical) {
                let _ = region.states[region.page(physical)].compare_exchange(
                    CODE | WRITER,
                    CODE,
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                );
            }
        }
    }

    /// Asks every vCPU for `bits` and waits until each has seen it or is parked.
    fn rendezvous(&self, mut inner: MutexGuard<'_, Inner>, bits: u32) {
        inner.generation += 1;
        let generation = inner.generation;
        let members = inner.members.clone();
        for member in &members {
            member.attention.fetch_or(bits, Ordering::SeqCst);
        }
        drop(inner);
        for member in members {
            let mut turns = 0u32;
            while member.seen.load(Ordering::SeqCst) < generation {
                turns += 1;
                match turns {
                    0..64 => std::hint::spin_loop(),
                    64..256 => std::thread::yield_now(),
                    _ => std::thread::sleep(Duration::from_micros(50)),
                }
            }
        }
    }

    /// Enters a vCPU, parked.
    pub(crate) fn join(&self, attention: Arc<AtomicU32>) -> Arc<Member> {
        let member = Arc::new(Member {
            attention,
            seen: AtomicU64::new(PARKED),
        });
        self.lock().members.push(member.clone());
        member
    }

    pub(crate) fn leave(&self, member: &Arc<Member>) {
        member.seen.store(PARKED, Ordering::SeqCst);
        self.lock().members.retain(|m| !Arc::ptr_eq(m, member));
    }

    /// Acknowledges everything so far (also: ends being parked). The caller applies the returned
    /// bits before its next access.
    pub(crate) fn acknowledge(&self, member: &Member) -> (u32, Arc<Map>) {
        let inner = self.lock();
        let bits = member.attention.fetch_and(!ATTENTION_MMU, Ordering::SeqCst) & ATTENTION_MMU;
        member.seen.store(inner.generation, Ordering::SeqCst);
        (bits, inner.map.clone())
    }

    pub(crate) fn park(member: &Member) {
        member.seen.store(PARKED, Ordering::SeqCst);
    }
}
