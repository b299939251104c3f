//! What the tests share: memory, random numbers and a slow walker written from the manual.

#![allow(dead_code, reason = "no test file uses all of it")]

use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex};

use anemone_accel_api::MemorySlot;
use anemone_soft_mmu::{Access, CodeWatch, Context, Features, Memory, Mmu, Paging};

pub const FEATURES: Features = Features {
    physical_bits: 40,
    gigabyte_pages: true,
};

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 8) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Page-aligned memory with a guard page's worth of known bytes on both sides.
pub struct Host {
    bytes: Vec<u8>,
    start: usize,
    size: usize,
}

const GUARD: usize = 4096;

impl Host {
    pub fn new(size: usize) -> Self {
        let bytes = vec![0xA5; size + 2 * GUARD + 4096];
        let start = bytes.as_ptr().align_offset(4096) + GUARD;
        let mut host = Self { bytes, start, size };
        for i in 0..size {
            host.bytes[start + i] = 0;
        }
        host
    }

    pub fn pointer(&mut self) -> *mut u8 {
        // SAFETY: within the vector.
        unsafe { self.bytes.as_mut_ptr().add(self.start) }
    }

    pub fn slot(&mut self, slot: u32, guest: u64) -> MemorySlot {
        MemorySlot {
            slot,
            guest,
            size: self.size as u64,
            host: self.pointer(),
            read_only: false,
            log_dirty: false,
        }
    }

    pub fn guards_intact(&self) -> bool {
        let after = self.start + self.size;
        let read = |i: usize| {
            // SAFETY: within the vector; volatile because guests write behind the compiler's back.
            unsafe { std::ptr::read_volatile(&self.bytes[i]) }
        };
        (self.start - GUARD..self.start).all(|i| read(i) == 0xA5)
            && (after..after + GUARD).all(|i| read(i) == 0xA5)
    }
}

pub type Write = (Option<u32>, u64, usize);

/// Notes writes to code and releases the page.
#[derive(Default)]
pub struct Watch(pub Mutex<Vec<Write>>);

impl CodeWatch for Watch {
    fn code_written(&self, memory: &Memory, vcpu: Option<u32>, physical: u64, length: usize) {
        self.0.lock().unwrap().push((vcpu, physical, length));
        memory.release_code(physical);
    }
}

/// A VM of one slot at guest-physical 0.
pub struct Machine {
    pub mmu: Mmu,
    pub memory: Arc<Memory>,
    pub watch: Arc<Watch>,
    pub host: Host,
}

impl Machine {
    pub fn new(size: usize) -> Self {
        let mut host = Host::new(size);
        let watch = Arc::new(Watch::default());
        let memory = Memory::new(watch.clone());
        // SAFETY: the vector is not reallocated and is dropped after the Mmu.
        unsafe { memory.add_slot(host.slot(0, 0)).unwrap() };
        let mut mmu = Mmu::new(memory.clone(), 0, FEATURES, Arc::new(AtomicU32::new(0)));
        mmu.unpark();
        Self {
            mmu,
            memory,
            watch,
            host,
        }
    }

    pub fn peek(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.memory.read(at, &mut bytes));
        u64::from_le_bytes(bytes)
    }

    pub fn poke(&self, at: u64, value: u64) {
        assert!(self.memory.write(at, &value.to_le_bytes()));
    }
}

/// Outcome of [`reference`]: physical address and page size, or error code.
pub type Outcome = Result<(u64, u64), u32>;

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

/// Bits `high` down to `low`, in place.
fn field(value: u64, high: u32, low: u32) -> u64 {
    (low..=high)
        .filter(|&n| bit(value, n))
        .map(|n| 1u64 << n)
        .sum()
}

/// The walk as the manual's tables tell it, one format after the other. `memory` is
/// guest-physical memory from 0; it gets accessed and dirty flags.
pub fn reference(
    memory: &mut [u8],
    features: Features,
    paging: Paging,
    pdptes: [u64; 4],
    linear: u64,
    access: Access,
    context: Context,
) -> Outcome {
    let m = u32::from(features.physical_bits);
    let (wp, pg) = (bit(paging.cr0, 16), bit(paging.cr0, 31));
    let (pse, pae) = (bit(paging.cr4, 4), bit(paging.cr4, 5));
    let (smep, smap) = (bit(paging.cr4, 20), bit(paging.cr4, 21));
    let (lma, nxe) = (bit(paging.efer, 10), bit(paging.efer, 11));
    let user_mode = context == Context::User;
    let mut error = 0;
    if access == Access::Write {
        error |= 2;
    }
    if user_mode {
        error |= 4;
    }
    if access == Access::Fetch && ((pae && nxe) || smep) {
        error |= 16;
    }
    if !pg {
        return Ok((linear & 0xFFFF_FFFF, 4096));
    }
    let read = |memory: &[u8], at: u64, size: usize| -> u64 {
        let mut bytes = [0xFF; 8];
        if size == 4 {
            bytes[4..].fill(0);
        }
        if let Some(from) = memory.get(at as usize..at as usize + size) {
            bytes[..size].copy_from_slice(from);
        }
        u64::from_le_bytes(bytes)
    };
    let mut used = Vec::new();
    let frame;
    let page;
    if !pae {
        let at = field(paging.cr3, 31, 12) + field(linear, 31, 22) / (1 << 22) * 4;
        let pde = read(memory, at, 4);
        used.push((at, 4, pde));
        if !bit(pde, 0) {
            return Err(error);
        }
        if bit(pde, 7) && pse {
            // Table 4-4.
            let limit = m.min(40);
            if field(pde, 21, limit - 19) != 0 {
                return Err(error | 9);
            }
            frame = field(pde, 31, 22) | field(pde, limit - 20, 13) >> 13 << 32;
            page = 4 << 20;
        } else {
            let at = field(pde, 31, 12) + field(linear, 21, 12) / 4096 * 4;
            let pte = read(memory, at, 4);
            used.push((at, 4, pte));
            if !bit(pte, 0) {
                return Err(error);
            }
            frame = field(pte, 31, 12);
            page = 4096;
        }
    } else {
        let high = |entry: u64| {
            let top = if lma { 51 } else { 62 };
            field(entry, top, m) != 0 || (bit(entry, 63) && !nxe)
        };
        let mut table;
        if lma {
            let at = field(paging.cr3, m - 1, 12) + field(linear, 47, 39) / (1 << 39) * 8;
            let pml4e = read(memory, at, 8);
            used.push((at, 8, pml4e));
            if !bit(pml4e, 0) {
                return Err(error);
            }
            if high(pml4e) || bit(pml4e, 7) {
                return Err(error | 9);
            }
            table = field(pml4e, m - 1, 12);
        } else {
            let pdpte = pdptes[(field(linear, 31, 30) >> 30) as usize];
            if !bit(pdpte, 0) {
                return Err(error);
            }
            table = field(pdpte, m - 1, 12);
        }
        let mut big = None;
        if lma {
            let at = table + field(linear, 38, 30) / (1 << 30) * 8;
            let pdpte = read(memory, at, 8);
            used.push((at, 8, pdpte));
            if !bit(pdpte, 0) {
                return Err(error);
            }
            if high(pdpte) {
                return Err(error | 9);
            }
            if bit(pdpte, 7) {
                if !features.gigabyte_pages || field(pdpte, 29, 13) != 0 {
                    return Err(error | 9);
                }
                big = Some((field(pdpte, m - 1, 30), 1 << 30));
            }
            table = field(pdpte, m - 1, 12);
        }
        if big.is_none() {
            let at = table + field(linear, 29, 21) / (1 << 21) * 8;
            let pde = read(memory, at, 8);
            used.push((at, 8, pde));
            if !bit(pde, 0) {
                return Err(error);
            }
            if high(pde) {
                return Err(error | 9);
            }
            if bit(pde, 7) {
                if field(pde, 20, 13) != 0 {
                    return Err(error | 9);
                }
                big = Some((field(pde, m - 1, 21), 2 << 20));
            }
            table = field(pde, m - 1, 12);
        }
        if let Some((f, p)) = big {
            (frame, page) = (f, p);
        } else {
            let at = table + field(linear, 20, 12) / 4096 * 8;
            let pte = read(memory, at, 8);
            used.push((at, 8, pte));
            if !bit(pte, 0) {
                return Err(error);
            }
            if high(pte) {
                return Err(error | 9);
            }
            frame = field(pte, m - 1, 12);
            page = 4096;
        }
    }
    let all = |n| used.iter().all(|&(_, _, entry)| bit(entry, n));
    let (writable, user) = (all(1), all(2));
    let executable = !used
        .iter()
        .any(|&(_, size, entry)| size == 8 && bit(entry, 63));
    let allowed = match (user_mode, access) {
        (true, Access::Read) => user,
        (true, Access::Write) => user && writable,
        (true, Access::Fetch) => user && executable,
        (false, Access::Fetch) => executable && !(user && smep),
        (false, Access::Read) => !(user && smap) || context == Context::SupervisorAc,
        (false, Access::Write) => {
            (!(user && smap) || context == Context::SupervisorAc) && (writable || !wp)
        }
    };
    if !allowed {
        return Err(error | 1);
    }
    let last = used.len() - 1;
    for (i, (at, size, _)) in used.into_iter().enumerate() {
        if let Some(entry) = memory.get_mut(at as usize..at as usize + size) {
            entry[0] |= 0x20;
            if i == last && access == Access::Write {
                entry[0] |= 0x40;
            }
        }
    }
    Ok((frame | linear & (page - 1), page))
}
