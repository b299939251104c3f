//! One vCPU's view of memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anemone_accel_api::Bus;

use crate::physical::{ATTENTION_MMU, Map, Member, Memory, PAGE_SIZE, RELOAD, WriteKind};
use crate::raw::{Atomic, Value};
use crate::tlb::{Level1, Level2, PARKED_ID, level1_id};
use crate::walk::{
    Features, Mode, Paging, Stop, Translation, Walker, cr0, cr4, efer, is_canonical,
};
use crate::{Access, Context, Fault, Mmio};

/// A PDPTE that CR3 points at has a reserved bit set: the register write raises #GP(0) (SDM
/// volume 3, 4.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReservedPdpte;

/// What INVPCID invalidates (SDM volume 2, INVPCID).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Invpcid {
    /// Type 0: one address of one PCID.
    Address {
        /// PCID, 12 bits.
        pcid: u16,
        /// Linear address.
        linear: u64,
    },
    /// Type 1: one PCID, without global pages.
    Single(u16),
    /// Type 2: everything.
    All,
    /// Type 3: everything but global pages.
    AllNonGlobal,
}

/// A page of code as seen by [`Mmu::fetch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// Guest-physical address of the byte asked for.
    pub physical: u64,
    /// The translation was not in the first-level TLB. See the crate's text on device writes.
    pub fresh: bool,
}

/// Counts of slow-path events, for tuning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Level-1 misses.
    pub misses: u64,
    /// Level-1 misses that needed a page walk.
    pub walks: u64,
}

/// Where an access ends up.
enum Place {
    Memory {
        /// Good to the end of the page.
        host: *mut u8,
        physical: u64,
        /// A write must be told to the watch.
        code: bool,
    },
    Bus(u64),
}

/// Address translation and guest memory access of one vCPU. Belongs to the vCPU's thread.
///
/// A new value is parked: call [`unpark`](Self::unpark) before the first access.
pub struct Mmu {
    level1: Box<Level1>,
    level2: Level2,
    space: u32,
    walker: Walker,
    map: Arc<Map>,
    memory: Arc<Memory>,
    member: Arc<Member>,
    vcpu: u32,
    parked: bool,
    statistics: Statistics,
}

impl Mmu {
    /// The view of vCPU number `vcpu`, with paging off.
    ///
    /// `attention` is the word that the engine looks at between blocks of instructions: when a
    /// bit of [`ATTENTION_MMU`] is set in it, call [`poll`](Self::poll). Its other bits are free.
    pub fn new(
        memory: Arc<Memory>,
        vcpu: u32,
        features: Features,
        attention: Arc<AtomicU32>,
    ) -> Self {
        let mut level1 = Level1::new();
        let mut level2 = Level2::new();
        let space = level2.enter(&mut level1, 0);
        level1.id = PARKED_ID;
        Self {
            level1,
            level2,
            space,
            walker: Walker {
                paging: Paging::default(),
                features: Features {
                    physical_bits: features.physical_bits.clamp(32, 52),
                    ..features
                },
                pdptes: [0; 4],
            },
            map: Arc::default(),
            member: memory.join(attention),
            memory,
            vcpu,
            parked: true,
            statistics: Statistics::default(),
        }
    }

    /// Answers other threads' requests, if there are any. Call it often, at a point where no
    /// address that came from here is in use.
    #[inline(always)]
    pub fn poll(&mut self) {
        if self.member.attention.load(Ordering::Relaxed) & ATTENTION_MMU != 0 && !self.parked {
            self.acknowledge();
        }
    }

    #[cold]
    fn acknowledge(&mut self) {
        let (bits, map) = self.memory.acknowledge(&self.member);
        if bits & RELOAD != 0 || !Arc::ptr_eq(&map, &self.map) {
            self.map = map;
            self.level2.flush_all();
            self.level2.clear_level1(&mut self.level1);
            self.enter_space();
        } else if bits != 0 {
            self.level1.clear_writes();
        }
    }

    /// From now on this vCPU makes no access and holds up nobody: before waiting (HLT, start-up),
    /// and when the run loop returns. Accesses in this state end the parking by themselves.
    pub fn park(&mut self) {
        self.parked = true;
        // Even level 1 must miss: what it points at may go away.
        self.level1.id = PARKED_ID;
        Memory::park(&self.member);
    }

    /// Ends [`park`](Self::park).
    pub fn unpark(&mut self) {
        if self.parked {
            self.level1.id = level1_id(self.space);
            self.acknowledge();
            self.parked = false;
        }
    }

    /// Runs something that may wait, take locks or change memory slots, such as a bus access.
    pub fn parked<R>(&mut self, work: impl FnOnce() -> R) -> R {
        self.park();
        let result = work();
        self.unpark();
        result
    }

    /// The registers in effect.
    pub fn paging(&self) -> Paging {
        self.walker.paging
    }

    /// The memory behind.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Counts so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// The first-level TLB, for translated code. The address stays the same.
    pub fn level1(&self) -> *const Level1 {
        &raw const *self.level1
    }

    fn pcid(&self) -> u16 {
        let Paging { cr3, cr4, .. } = self.walker.paging;
        if cr4 & cr4::PCIDE != 0 {
            (cr3 & 0xFFF) as u16
        } else {
            0
        }
    }

    fn enter_space(&mut self) {
        let pcid = self.pcid();
        self.space = self.level2.enter(&mut self.level1, pcid);
    }

    /// Sets CR0, CR4 and EFER as one, with the invalidations that a change of their bits makes
    /// (SDM volume 3, 4.10.4.1). Validity of the bits themselves is the caller's to check. With
    /// PAE paging, loads the PDPTEs; on error nothing changes.
    pub fn set_control(&mut self, cr0: u64, cr4: u64, efer: u64) -> Result<(), ReservedPdpte> {
        let old = self.walker.paging;
        self.set_paging(Paging {
            cr0,
            cr4,
            efer,
            cr3: old.cr3,
        })
    }

    /// Sets all registers, for example when state is restored. Invalidates what a change needs,
    /// everything if CR3 changes. With PAE paging, loads the PDPTEs; on error nothing changes.
    pub fn set_paging(&mut self, new: Paging) -> Result<(), ReservedPdpte> {
        self.unpark();
        let old = std::mem::replace(&mut self.walker.paging, new);
        let changed = |get: fn(&Paging) -> u64, bits| (get(&old) ^ get(&new)) & bits != 0;
        let structure = changed(|p| p.cr0, cr0::PG)
            || changed(|p| p.cr3, !0)
            || changed(|p| p.cr4, cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE)
            || changed(|p| p.efer, efer::LMA | efer::NXE);
        let rights = changed(|p| p.cr0, cr0::WP) || changed(|p| p.cr4, cr4::SMEP | cr4::SMAP);
        // 4.4.1: these bits, and CR3, load the registers anew.
        let load =
            structure || changed(|p| p.cr0, cr0::CD | cr0::NW) || changed(|p| p.cr4, cr4::SMEP);
        if new.mode() == Mode::Pae && load {
            let Some(pdptes) = self.walker.read_pdptes(&self.map) else {
                self.walker.paging = old;
                return Err(ReservedPdpte);
            };
            self.walker.pdptes = pdptes;
        }
        if structure {
            self.level2.flush_all();
            self.enter_space();
        } else if rights {
            // Level 2 keeps rights as the tables give them; only level 1 has the decisions.
            self.level2.clear_level1(&mut self.level1);
        }
        Ok(())
    }

    /// MOV to CR3 (SDM volume 3, 4.10.4.1): bit 63 of `value` with CR4.PCIDE set keeps what is
    /// cached for the new PCID.
    pub fn set_cr3(&mut self, value: u64) -> Result<(), ReservedPdpte> {
        self.unpark();
        let old = self.walker.paging.cr3;
        let pcide = self.walker.paging.cr4 & cr4::PCIDE != 0;
        let keep = pcide && value >> 63 != 0;
        self.walker.paging.cr3 = if pcide { value & !(1 << 63) } else { value };
        if self.walker.paging.mode() == Mode::Pae {
            let Some(pdptes) = self.walker.read_pdptes(&self.map) else {
                self.walker.paging.cr3 = old;
                return Err(ReservedPdpte);
            };
            self.walker.pdptes = pdptes;
        }
        if !keep {
            let pcid = self.pcid();
            self.level2.flush_pcid(pcid);
        }
        self.enter_space();
        Ok(())
    }

    /// INVLPG.
    pub fn invlpg(&mut self, linear: u64) {
        self.level2.drop_page(&mut self.level1, linear);
    }

    /// INVPCID; the caller has checked its operands.
    pub fn invpcid(&mut self, what: Invpcid) {
        self.unpark();
        match what {
            // Dropping the address of every PCID is allowed (4.10.4.1) and simpler.
            Invpcid::Address { linear, .. } => return self.invlpg(linear),
            Invpcid::Single(pcid) => self.level2.flush_pcid(pcid),
            Invpcid::All => self.level2.flush_all(),
            Invpcid::AllNonGlobal => self.level2.flush_spaces(),
        }
        self.enter_space();
    }

    /// Drops everything cached, for INIT and the like.
    pub fn flush(&mut self) {
        self.invpcid(Invpcid::All);
    }

    /// The linear address of the byte after a page; 32-bit linear addresses wrap.
    fn next_page(&self, linear: u64) -> u64 {
        let next = (linear & !0xFFF).wrapping_add(PAGE_SIZE);
        if self.walker.paging.efer & efer::LMA == 0 {
            next & 0xFFFF_FFFF
        } else {
            next
        }
    }

    /// Translates as an access of this kind does: with faults, accessed and dirty flags, through
    /// the TLB.
    pub fn translate(
        &mut self,
        linear: u64,
        access: Access,
        context: Context,
    ) -> Result<u64, Fault> {
        self.unpark();
        Ok(self.translation(linear, access, context)?.physical | linear & 0xFFF)
    }

    fn translation(
        &mut self,
        linear: u64,
        access: Access,
        context: Context,
    ) -> Result<Translation, Fault> {
        self.statistics.misses += 1;
        if self.walker.paging.efer & efer::LMA != 0 && !is_canonical(linear) {
            return Err(Fault::NonCanonical);
        }
        if let Some(t) = self.level2.find(linear, self.space)
            && (access != Access::Write || t.dirty)
            && self.walker.permits(&t, access, context)
        {
            return Ok(t);
        }
        loop {
            self.statistics.walks += 1;
            match self.walker.walk(&self.map, linear, access, context) {
                Ok(t) => {
                    self.level2.insert(linear, self.space, t);
                    return Ok(t);
                }
                Err(Stop::Fault(code)) => {
                    // A fault invalidates what is cached for the page (4.10.4.1).
                    self.invlpg(linear);
                    return Err(Fault::PageFault {
                        address: linear,
                        code,
                    });
                }
                // The flag is set, so the next walk gets further.
                Err(Stop::WroteCode(at, length)) => self.report_code(at, length),
            }
        }
    }

    fn report_code(&mut self, physical: u64, length: usize) {
        let memory = self.memory.clone();
        let vcpu = self.vcpu;
        self.parked(|| memory.report_code(Some(vcpu), physical, length));
    }

    /// Translates a page and enters it into level 1 where that is allowed.
    fn place(&mut self, linear: u64, access: Access, context: Context) -> Result<Place, Fault> {
        let t = self.translation(linear, access, context)?;
        let physical = t.physical | linear & 0xFFF;
        let region = match access {
            Access::Write => self.map.find_writable(physical),
            Access::Read | Access::Fetch => self.map.find(physical),
        };
        let Some(region) = region else {
            return Ok(Place::Bus(physical));
        };
        let host = region.host(physical);
        let code = access == Access::Write && region.begin_write(physical) == WriteKind::Code;
        if !code {
            let target = if access == Access::Fetch {
                physical
            } else {
                host as u64
            };
            self.level2.note_piece(linear, t.shift);
            self.level1.insert(access, context, linear, target);
        }
        Ok(Place::Memory {
            host,
            physical,
            code,
        })
    }

    /// Loads a value. Any alignment; an access within one page of memory is a single host load.
    #[inline(always)]
    pub fn load<T: Value>(&mut self, linear: u64, context: Context) -> Result<T, Fault> {
        match self.level1.lookup(Access::Read, context, linear, T::SIZE) {
            // SAFETY: an entry's page is mapped until this vCPU acknowledges its removal, which
            // drops the entry; the access lies within the page.
            Some(host) => Ok(unsafe { T::read(pointer(host)) }),
            None => self.load_slow(linear, context),
        }
    }

    /// The host address of an access that the first-level TLB answers: a translated page with the
    /// rights, in which the access lies as a whole. For [`Access::Write`] the page holds no code.
    ///
    /// The pointer is good until this vCPU's next call of [`poll`](Self::poll),
    /// [`park`](Self::park) or anything that may do so.
    #[inline(always)]
    pub fn hit(
        &self,
        access: Access,
        context: Context,
        linear: u64,
        size: usize,
    ) -> Option<*mut u8> {
        self.level1
            .lookup(access, context, linear, size)
            .map(pointer)
    }

    /// Stores a value if the first-level TLB answers; false, and nothing done, if it does not.
    #[inline(always)]
    pub fn store_hit<T: Value>(&mut self, linear: u64, value: T, context: Context) -> bool {
        match self.level1.lookup(Access::Write, context, linear, T::SIZE) {
            Some(host) => {
                // SAFETY: as in `store`.
                unsafe { T::write(pointer(host), value) };
                true
            }
            None => false,
        }
    }

    #[cold]
    fn load_slow<T: Value>(&mut self, linear: u64, context: Context) -> Result<T, Fault> {
        self.unpark();
        if crosses(linear, T::SIZE) {
            let split = self.split(linear, T::SIZE, Access::Read, context)?;
            let mut bytes = [0; 32];
            let (first, second) = bytes[..T::SIZE].split_at_mut(usize::from(split.length));
            if self.map.read(split.physical, first) && self.map.read(split.rest, second) {
                return Ok(T::from_bytes(&bytes));
            }
            return Err(Fault::Mmio(split));
        }
        match self.place(linear, Access::Read, context)? {
            // SAFETY: within a page that is mapped while this vCPU does not acknowledge.
            Place::Memory { host, .. } => Ok(unsafe { T::read(host) }),
            Place::Bus(physical) => Err(Fault::Mmio(Mmio::whole(physical, T::SIZE))),
        }
    }

    /// Stores a value. Any alignment; an access within one page of memory is a single host store.
    #[inline(always)]
    pub fn store<T: Value>(
        &mut self,
        linear: u64,
        value: T,
        context: Context,
    ) -> Result<(), Fault> {
        match self.level1.lookup(Access::Write, context, linear, T::SIZE) {
            Some(host) => {
                // SAFETY: as in `load`; entries for writing are of writable memory.
                unsafe { T::write(pointer(host), value) };
                Ok(())
            }
            None => self.store_slow(linear, value, context),
        }
    }

    #[cold]
    fn store_slow<T: Value>(
        &mut self,
        linear: u64,
        value: T,
        context: Context,
    ) -> Result<(), Fault> {
        self.unpark();
        if crosses(linear, T::SIZE) {
            let split = self.split(linear, T::SIZE, Access::Write, context)?;
            if !self.is_writable(&split) {
                return Err(Fault::Mmio(split));
            }
            let mut code = [None; 2];
            self.write_split(&split, &value.to_bytes(), &mut code);
            self.report_all(code);
            return Ok(());
        }
        // SAFETY: `write_place` gives an address with room for the value.
        self.write_place(linear, T::SIZE, context, |host| unsafe {
            T::write(host, value)
        })
    }

    /// Gives `work` the host address of `size` writable bytes in one page, and tells of code there.
    fn write_place<R>(
        &mut self,
        linear: u64,
        size: usize,
        context: Context,
        work: impl FnOnce(*mut u8) -> R,
    ) -> Result<R, Fault> {
        match self.place(linear, Access::Write, context)? {
            Place::Bus(physical) => Err(Fault::Mmio(Mmio::whole(physical, size))),
            Place::Memory {
                host,
                physical,
                code,
            } => {
                let result = work(host);
                if code {
                    self.report_code(physical, size);
                }
                Ok(result)
            }
        }
    }

    /// Translates both halves of an access that crosses a page, first half first.
    fn split(
        &mut self,
        linear: u64,
        size: usize,
        access: Access,
        context: Context,
    ) -> Result<Mmio, Fault> {
        let length = PAGE_SIZE - linear % PAGE_SIZE;
        let next = self.next_page(linear);
        // Before a page fault of the first half.
        if self.walker.paging.efer & efer::LMA != 0 && !is_canonical(next) {
            return Err(Fault::NonCanonical);
        }
        let physical = self.translation(linear, access, context)?.physical | linear & 0xFFF;
        let rest = self.translation(next, access, context)?.physical;
        Ok(Mmio {
            physical,
            size: size as u8,
            length: length as u8,
            rest,
        })
    }

    /// A locked read-modify-write: replaces the value by `change(value)` and returns the old one.
    /// `change` may be called several times. Needs write permission first, as the instruction does.
    ///
    /// Within a cache line this is the host's locked instruction. Across lines (and for 16 bytes
    /// that are not aligned, which the guest's instruction forbids) it excludes only other such
    /// accesses and is not atomic against plain ones.
    #[inline]
    pub fn update<T: Atomic>(
        &mut self,
        linear: u64,
        context: Context,
        change: impl Fn(T) -> T,
    ) -> Result<T, Fault> {
        match self.level1.lookup(Access::Write, context, linear, T::SIZE) {
            // SAFETY: as in `store`.
            Some(host) => Ok(unsafe { update_at(&self.memory, pointer(host), change) }),
            None => self.update_slow(linear, context, change),
        }
    }

    /// LOCK CMPXCHG, CMPXCHG8B and CMPXCHG16B: stores `new` if memory holds `expected`; returns
    /// what it held. Otherwise as [`update`](Self::update).
    #[inline]
    pub fn compare_exchange<T: Atomic>(
        &mut self,
        linear: u64,
        expected: T,
        new: T,
        context: Context,
    ) -> Result<T, Fault> {
        self.update(
            linear,
            context,
            |old| if old == expected { new } else { old },
        )
    }

    #[cold]
    fn update_slow<T: Atomic>(
        &mut self,
        linear: u64,
        context: Context,
        change: impl Fn(T) -> T,
    ) -> Result<T, Fault> {
        self.unpark();
        let memory = self.memory.clone();
        if !crosses(linear, T::SIZE) {
            return self.write_place(linear, T::SIZE, context, |host| {
                // SAFETY: `write_place` gives an address with room for the value.
                unsafe { update_at(&memory, host, change) }
            });
        }
        let split = self.split(linear, T::SIZE, Access::Write, context)?;
        if !self.is_writable(&split) {
            return Err(Fault::Mmio(split));
        }
        let mut code = [None; 2];
        let old = {
            // Nobody waits for another vCPU under this lock: code is reported after it.
            let _guard = memory.lock_split();
            let mut bytes = [0; 32];
            let (first, second) = bytes[..T::SIZE].split_at_mut(usize::from(split.length));
            self.map.read(split.physical, first);
            self.map.read(split.rest, second);
            let old = T::from_bytes(&bytes);
            self.write_split(&split, &change(old).to_bytes(), &mut code);
            old
        };
        self.report_all(code);
        Ok(old)
    }

    /// Whether both halves are memory that can be written: nothing is written before that is sure.
    fn is_writable(&self, split: &Mmio) -> bool {
        self.map.find_writable(split.physical).is_some()
            && self.map.find_writable(split.rest).is_some()
    }

    /// Writes both halves and notes the pieces that lie on pages with code.
    fn write_split(&self, split: &Mmio, bytes: &[u8; 32], code: &mut [Option<(u64, usize)>; 2]) {
        let (first, second) = bytes[..usize::from(split.size)].split_at(usize::from(split.length));
        self.map
            .write(split.physical, first, |at, n| code[0] = Some((at, n)));
        self.map
            .write(split.rest, second, |at, n| code[1] = Some((at, n)));
    }

    fn report_all(&mut self, code: [Option<(u64, usize)>; 2]) {
        for (at, length) in code.into_iter().flatten() {
            self.report_code(at, length);
        }
    }

    /// Translates an instruction address to guest-physical; the page may be read by
    /// [`read_physical`](Self::read_physical) from there to its end.
    #[inline(always)]
    pub fn fetch(&mut self, linear: u64, context: Context) -> Result<Fetched, Fault> {
        match self.level1.lookup(Access::Fetch, context, linear, 1) {
            Some(physical) => Ok(Fetched {
                physical,
                fresh: false,
            }),
            None => self.fetch_slow(linear, context),
        }
    }

    #[cold]
    fn fetch_slow(&mut self, linear: u64, context: Context) -> Result<Fetched, Fault> {
        self.unpark();
        match self.place(linear, Access::Fetch, context)? {
            Place::Memory { physical, .. } => Ok(Fetched {
                physical,
                fresh: true,
            }),
            Place::Bus(physical) => Err(Fault::Mmio(Mmio::whole(physical, 1))),
        }
    }

    /// From now on writes to the guest-physical page, by any vCPU, reach the
    /// [`CodeWatch`](crate::CodeWatch). False if it is not memory.
    ///
    /// Call it **before** the bytes to decode are read, and hold from here until the decoded
    /// code can be found by the watch the lock that the watch takes. This may wait for other
    /// vCPUs; no address that came from here stays good.
    pub fn protect_code(&mut self, physical: u64) -> bool {
        let memory = self.memory.clone();
        self.parked(|| memory.protect_code(physical))
    }

    /// Copies out of guest-physical memory; false, and nothing copied, if not all of it is memory.
    pub fn read_physical(&mut self, physical: u64, into: &mut [u8]) -> bool {
        self.unpark();
        self.map.read(physical, into)
    }

    /// Copies into guest-physical memory; false, and nothing written, if not all of it is writable.
    pub fn write_physical(&mut self, physical: u64, from: &[u8]) -> bool {
        self.unpark();
        let mut code = Vec::new();
        let done = self
            .map
            .write(physical, from, |at, length| code.push((at, length)));
        for (at, length) in code {
            self.report_code(at, length);
        }
        done
    }

    /// Completes a load that ended in [`Fault::Mmio`]: asks memory and the bus for their parts.
    /// The vCPU is parked during bus accesses.
    pub fn load_mmio<T: Value>(&mut self, mmio: &Mmio, bus: &dyn Bus) -> T {
        let mut bytes = [0; 32];
        for (at, range) in mmio.pieces() {
            let part = &mut bytes[range];
            if !self.read_physical(at, part) {
                self.parked(|| {
                    bus_pieces(at, part.len()).for_each(|(at, r)| bus.mmio_read(at, &mut part[r]))
                });
            }
        }
        T::from_bytes(&bytes)
    }

    /// Completes a store that ended in [`Fault::Mmio`]. The vCPU is parked during bus accesses.
    pub fn store_mmio<T: Value>(&mut self, mmio: &Mmio, value: T, bus: &dyn Bus) {
        let bytes = value.to_bytes();
        for (at, range) in mmio.pieces() {
            let part = &bytes[range];
            if !self.write_physical(at, part) {
                self.parked(|| {
                    bus_pieces(at, part.len()).for_each(|(at, r)| bus.mmio_write(at, &part[r]))
                });
            }
        }
    }
}

impl Drop for Mmu {
    fn drop(&mut self) {
        self.memory.leave(&self.member);
    }
}

/// Splits a bus access into naturally aligned ones of 1, 2, 4 or 8 bytes: address, and the bytes of
/// the access that lie there.
pub fn bus_pieces(physical: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = physical.wrapping_add(done as u64);
        let size = [8, 4, 2, 1]
            .into_iter()
            .find(|&n| at.is_multiple_of(n as u64) && n <= length - done)?;
        done += size;
        Some((at, done - size..done))
    })
}

/// # Safety
/// As for [`Value::write`].
#[inline(always)]
unsafe fn update_at<T: Atomic>(memory: &Memory, host: *mut u8, change: impl Fn(T) -> T) -> T {
    if !T::is_lockable(host) {
        let _guard = memory.lock_split();
        // SAFETY: the caller's.
        unsafe {
            let old = T::read(host);
            T::write(host, change(old));
            return old;
        }
    }
    // SAFETY: the caller's.
    let mut old = unsafe { T::read(host) };
    loop {
        // SAFETY: the caller's, and lockable.
        let found = unsafe { T::compare_exchange(host, old, change(old)) };
        if found == old {
            return old;
        }
        old = found;
    }
}

fn crosses(linear: u64, size: usize) -> bool {
    linear % PAGE_SIZE + size as u64 > PAGE_SIZE
}

#[inline(always)]
fn pointer(host: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(host as usize)
}
