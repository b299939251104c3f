//! The software TLB: two levels.
//!
//! **Level 1** turns a linear address into a host address in a handful of instructions: one
//! two-way array per kind of access and per [`Context`], so that an entry being there means that
//! the access is allowed and has no side effect that is still to be done. The twelve low bits of
//! its tags hold the number of the current address space, so that all entries are dropped by
//! taking a new number.
//!
//! **Level 2** holds the results of page walks with rights, PCID and global flag: level 1 is
//! refilled from it after collisions, after a change of address space (global pages) and for MMIO
//! pages, which level 1 never holds.

use crate::walk::Translation;
use crate::{Access, Context};

/// Sets in each level-1 array; each has two entries.
pub const SETS: usize = 256;
const PAGE_MASK: u64 = !0xFFF;

/// Two entries of level 1, as an inline lookup reads them.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Set {
    /// Page of the linear address, with the address-space number in the low 12 bits; 0: empty.
    pub tag: [u64; 2],
    /// Added (wrapping) to the linear address this gives the host address; in the arrays for
    /// [`Access::Fetch`] the guest-physical address.
    pub addend: [u64; 2],
}

/// Level 1. The layout is fixed for translated code.
///
/// The lookup of `size` bytes at linear address `a` for one access and context:
/// `set = array + (a >> 12 & (SETS - 1)) * 32`; `tag = (a + size - 1 & !0xFFF) | id`;
/// a `set.tag[way]` equal to it is a hit. An access that crosses a page compares the second page
/// with the first one's set, which never holds it, and so misses.
#[repr(C)]
pub struct Level1 {
    /// Number of the current address space, 1 to 4094; 4095, which nothing matches, while parked.
    pub id: u64,
    /// Indexed by [`Access`], [`Context`], set.
    pub arrays: [[[Set; SETS]; 3]; 3],
}

impl Level1 {
    /// Offset of [`id`](Self::id) in bytes.
    pub const ID_OFFSET: usize = std::mem::offset_of!(Level1, id);

    /// Offset in bytes of the array for an access.
    pub const fn array_offset(access: Access, context: Context) -> usize {
        let index = access as usize * 3 + context as usize;
        std::mem::offset_of!(Level1, arrays) + index * SETS * size_of::<Set>()
    }

    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            id: 1,
            arrays: [[[Set::default(); SETS]; 3]; 3],
        })
    }

    /// The address that the entry gives, if there is one and the access lies in one page.
    #[inline(always)]
    pub(crate) fn lookup(
        &self,
        access: Access,
        context: Context,
        linear: u64,
        size: usize,
    ) -> Option<u64> {
        let set =
            &self.arrays[access as usize][context as usize][linear as usize >> 12 & (SETS - 1)];
        let tag = linear.wrapping_add(size as u64 - 1) & PAGE_MASK | self.id;
        if set.tag[0] == tag {
            Some(linear.wrapping_add(set.addend[0]))
        } else if set.tag[1] == tag {
            Some(linear.wrapping_add(set.addend[1]))
        } else {
            None
        }
    }

    /// Makes `linear` translate to `target`; the older entry of the set goes.
    pub(crate) fn insert(&mut self, access: Access, context: Context, linear: u64, target: u64) {
        let tag = linear & PAGE_MASK | self.id;
        let set =
            &mut self.arrays[access as usize][context as usize][linear as usize >> 12 & (SETS - 1)];
        if set.tag[0] != tag {
            set.tag[1] = set.tag[0];
            set.addend[1] = set.addend[0];
        }
        set.tag[0] = tag;
        set.addend[0] = target.wrapping_sub(linear);
    }

    pub(crate) fn clear(&mut self) {
        for array in self.arrays.as_flattened_mut() {
            array.fill(Set::default());
        }
    }

    pub(crate) fn clear_writes(&mut self) {
        for array in &mut self.arrays[Access::Write as usize] {
            array.fill(Set::default());
        }
    }

    /// Drops a 4 KiB page of every address space.
    pub(crate) fn drop_page(&mut self, linear: u64) {
        for array in self.arrays.as_flattened_mut() {
            for tag in &mut array[linear as usize >> 12 & (SETS - 1)].tag {
                if (*tag ^ linear) & PAGE_MASK == 0 {
                    *tag = 0;
                }
            }
        }
    }
}

const WAYS: usize = 4;
const SMALL_SETS: usize = 512;
const LARGE_SETS: usize = 64;

/// An entry of level 2.
#[derive(Clone, Copy)]
struct Entry {
    /// First linear address of the piece (4 KiB or 2 MiB).
    linear: u64,
    /// Address space, or the global one; 0: empty.
    space: u32,
    translation: Translation,
}

const EMPTY: Entry = Entry {
    linear: 0,
    space: 0,
    translation: Translation {
        physical: 0,
        shift: 12,
        writable: false,
        user: false,
        no_execute: false,
        global: false,
        dirty: false,
    },
};

/// Level 2 and the numbers of address spaces.
pub(crate) struct Level2 {
    small: Box<[[Entry; WAYS]; SMALL_SETS]>,
    /// Pages of 2 MiB and more, in pieces of 2 MiB.
    large: Box<[[Entry; WAYS]; LARGE_SETS]>,
    /// Pages above 2 MiB may be in `large`.
    has_huge: bool,
    /// Address space of each PCID; valid if above `floor`.
    spaces: Box<[u32; 4096]>,
    floor: u32,
    /// Last number given out.
    last: u32,
    /// Number under which global pages are.
    global: u32,
    /// Regions from which level 1 may hold pieces of large pages: a Bloom filter that INVLPG asks.
    pieces: Box<[u64; PIECE_WORDS]>,
}

const PIECE_WORDS: usize = 256;
/// First number for global pages; address spaces stay below.
const GLOBAL: u32 = 1 << 31;

/// The number that level 1 has while the vCPU is parked; no entry has it.
pub(crate) const PARKED_ID: u64 = 4095;

/// What level 1 knows of an address space: never 0, which marks empty entries.
pub(crate) fn level1_id(space: u32) -> u64 {
    u64::from(space & 4095)
}

fn piece_bit(linear: u64, shift: u8) -> (usize, u64) {
    let hash = ((linear >> shift) ^ u64::from(shift) << 56).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((hash >> 56) as usize % PIECE_WORDS, 1 << (hash >> 50 & 63))
}

impl Level2 {
    pub(crate) fn new() -> Self {
        Self {
            small: Box::new([[EMPTY; WAYS]; SMALL_SETS]),
            large: Box::new([[EMPTY; WAYS]; LARGE_SETS]),
            has_huge: false,
            spaces: Box::new([0; 4096]),
            floor: 0,
            last: 0,
            global: GLOBAL,
            pieces: Box::new([0; PIECE_WORDS]),
        }
    }

    /// The number of a PCID's address space, a new one after it was flushed. Sets level 1's.
    pub(crate) fn enter(&mut self, level1: &mut Level1, pcid: u16) -> u32 {
        let pcid = usize::from(pcid) & 4095;
        if self.spaces[pcid] <= self.floor {
            if self.last >= GLOBAL - 8192 {
                *self = Self::new();
                self.clear_level1(level1);
            }
            self.last += 1;
            if level1_id(self.last) == PARKED_ID {
                // Level 1 sees only twelve bits: start a new round with nothing from the old.
                self.clear_level1(level1);
                self.floor = self.last;
                self.last += 2;
            }
            self.spaces[pcid] = self.last;
        }
        level1.id = level1_id(self.spaces[pcid]);
        self.spaces[pcid]
    }

    pub(crate) fn clear_level1(&mut self, level1: &mut Level1) {
        level1.clear();
        self.pieces.fill(0);
    }

    /// Drops everything but global pages.
    pub(crate) fn flush_spaces(&mut self) {
        self.floor = self.last;
    }

    /// Drops what is not global of one PCID.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.spaces[usize::from(pcid) & 4095] = 0;
    }

    /// Drops everything.
    pub(crate) fn flush_all(&mut self) {
        self.flush_spaces();
        self.global = self.global.wrapping_add(1) | GLOBAL;
        if self.global == GLOBAL {
            // Around: nothing may be left from the first time.
            self.small.as_flattened_mut().fill(EMPTY);
            self.large.as_flattened_mut().fill(EMPTY);
        }
    }

    fn set(&mut self, linear: u64, large: bool) -> &mut [Entry; WAYS] {
        if large {
            &mut self.large[(linear >> 21) as usize % LARGE_SETS]
        } else {
            &mut self.small[(linear >> 12) as usize % SMALL_SETS]
        }
    }

    /// Finds the translation of the 4 KiB page of `linear`.
    pub(crate) fn find(&mut self, linear: u64, space: u32) -> Option<Translation> {
        let global = self.global;
        let valid = |e: &&Entry| e.space == space || e.space == global;
        let page = linear & !0xFFF;
        if let Some(e) = self
            .set(linear, false)
            .iter()
            .filter(valid)
            .find(|e| e.linear == page)
        {
            return Some(e.translation);
        }
        let piece = linear & !0x1F_FFFF;
        let set = self.set(linear, true);
        let e = set.iter().filter(valid).find(|e| e.linear == piece)?;
        let mut translation = e.translation;
        translation.physical |= linear & 0x1F_F000;
        Some(translation)
    }

    pub(crate) fn insert(&mut self, linear: u64, space: u32, translation: Translation) {
        let large = translation.shift > 12;
        let within = if large { 0x1F_FFFF } else { 0xFFF };
        self.has_huge |= translation.shift > 21;
        let entry = Entry {
            linear: linear & !within,
            space: if translation.global {
                self.global
            } else {
                space
            },
            translation: Translation {
                physical: translation.physical & !within,
                ..translation
            },
        };
        let set = self.set(linear, large);
        // The place of an older version if there is one; else the oldest goes.
        let at = set
            .iter()
            .position(|e| e.linear == entry.linear && e.space == entry.space);
        set[..=at.unwrap_or(WAYS - 1)].rotate_right(1);
        set[0] = entry;
    }

    /// Notes that level 1 gets a piece of a page of this size.
    pub(crate) fn note_piece(&mut self, linear: u64, shift: u8) {
        if shift > 12 {
            let (word, bit) = piece_bit(linear, shift);
            self.pieces[word] |= bit;
        }
    }

    /// Drops the page of `linear`, of whatever size, from every address space.
    pub(crate) fn drop_page(&mut self, level1: &mut Level1, linear: u64) {
        let page = linear & !0xFFF;
        for entry in self.set(linear, false) {
            if entry.linear == page {
                entry.space = 0;
            }
        }
        let covers = |e: &Entry| (e.linear ^ linear) >> e.translation.shift == 0;
        if self.has_huge {
            for entry in self.large.as_flattened_mut() {
                if covers(entry) {
                    entry.space = 0;
                }
            }
        } else {
            for entry in self.set(linear, true) {
                if covers(entry) {
                    entry.space = 0;
                }
            }
        }
        let noted = [21, 22, 30].iter().any(|&shift| {
            let (word, bit) = piece_bit(linear, shift);
            self.pieces[word] & bit != 0
        });
        if noted {
            self.clear_level1(level1);
        } else {
            level1.drop_page(linear);
        }
    }
}
