//! The page walk (SDM volume 3, chapter 4): one linear address through the paging structures.

use crate::physical::{EntryUpdate, Map};
use crate::{Access, Context};

/// CR0 bits (SDM volume 3, 2.5).
pub mod cr0 {
    #![allow(missing_docs, reason = "the names are the architecture's")]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits (SDM volume 3, 2.5).
pub mod cr4 {
    #![allow(missing_docs, reason = "the names are the architecture's")]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// IA32_EFER bits (SDM volume 3, 2.2.1).
pub mod efer {
    #![allow(missing_docs, reason = "the names are the architecture's")]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Page-fault error code (SDM volume 3, 4.7).
pub mod code {
    /// The translation exists; its rights or a reserved bit forbid the access.
    pub const PRESENT: u32 = 1;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// The access was made in user mode.
    pub const USER: u32 = 1 << 2;
    /// A reserved bit was set.
    pub const RESERVED: u32 = 1 << 3;
    /// The access was an instruction fetch (only with NX or SMEP on).
    pub const FETCH: u32 = 1 << 4;
}

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;
/// Bits 51:12.
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// What the CPU model says about paging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// MAXPHYADDR, 36 to 52 (CPUID.80000008H:EAX\[7:0\]).
    pub physical_bits: u8,
    /// 1 GiB pages (CPUID.80000001H:EDX\[26\]).
    pub gigabyte_pages: bool,
}

/// The registers that paging depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Paging {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
}

/// Paging mode (SDM volume 3, 4.1.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Linear addresses are physical.
    Off,
    /// 32-bit paging.
    Legacy,
    /// PAE paging.
    Pae,
    /// 4-level paging.
    FourLevel,
}

impl Paging {
    /// The mode that the registers select.
    pub fn mode(&self) -> Mode {
        if self.cr0 & cr0::PG == 0 {
            Mode::Off
        } else if self.cr4 & cr4::PAE == 0 {
            Mode::Legacy
        } else if self.efer & efer::LMA == 0 {
            Mode::Pae
        } else {
            Mode::FourLevel
        }
    }
}

/// Whether bits 63:47 of a linear address are equal (4-level paging). Others raise #GP or #SS
/// before paging is asked, which is the caller's task.
#[inline]
pub fn is_canonical(linear: u64) -> bool {
    (linear << 16) as i64 >> 16 == linear as i64
}

/// A translation of one page, as a TLB holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the 4 KiB piece that was asked for.
    pub physical: u64,
    /// log2 of the size of the page: 12, 21, 22 or 30.
    pub shift: u8,
    /// R/W in every entry.
    pub writable: bool,
    /// U/S in every entry: a user-mode address.
    pub user: bool,
    /// XD in some entry.
    pub no_execute: bool,
    /// Global page.
    pub global: bool,
    /// The dirty flag is set.
    pub dirty: bool,
}

/// Walk state that outlives a walk.
pub(crate) struct Walker {
    pub(crate) paging: Paging,
    pub(crate) features: Features,
    /// The PDPTE registers (SDM volume 3, 4.4.1).
    pub(crate) pdptes: [u64; 4],
}

/// Why a walk gave no translation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Page fault with this error code.
    Fault(u32),
    /// An accessed or dirty flag was set in an entry (of this many bytes) on a page with code.
    WroteCode(u64, usize),
}

impl Walker {
    /// Bits of 64-bit entries that are reserved whatever the entry is.
    fn reserved(&self, mode: Mode) -> u64 {
        let top = if mode == Mode::Pae { 63 } else { 52 };
        let high = (1u64 << top) - (1u64 << self.features.physical_bits.min(52));
        if self.paging.efer & efer::NXE == 0 {
            high | XD
        } else {
            high
        }
    }

    /// Reads the PDPTEs that CR3 points at; `None` if a reserved bit is set in a present one.
    pub(crate) fn read_pdptes(&self, map: &Map) -> Option<[u64; 4]> {
        let reserved = (self.reserved(Mode::Pae) | XD) | 0b1_1110_0110;
        let mut pdptes = [0; 4];
        for (i, entry) in pdptes.iter_mut().enumerate() {
            let at = (self.paging.cr3 & 0xFFFF_FFE0) + 8 * i as u64;
            *entry = map.read_entry::<u64>(at).unwrap_or(u64::MAX);
            if *entry & P != 0 && *entry & reserved != 0 {
                return None;
            }
        }
        Some(pdptes)
    }

    /// Whether rights allow the access (SDM volume 3, 4.6.1).
    pub(crate) fn permits(&self, t: &Translation, access: Access, context: Context) -> bool {
        let Paging { cr0, cr4, .. } = self.paging;
        if access == Access::Fetch && t.no_execute {
            return false;
        }
        if context == Context::User {
            return t.user && (access != Access::Write || t.writable);
        }
        match access {
            Access::Fetch => !t.user || cr4 & cr4::SMEP == 0,
            Access::Read | Access::Write => {
                let smap = t.user && cr4 & cr4::SMAP != 0 && context != Context::SupervisorAc;
                !smap && (access == Access::Read || t.writable || cr0 & cr0::WP == 0)
            }
        }
    }

    /// The error code of a fault of this access, without the bits that say why.
    fn error_code(&self, access: Access, context: Context) -> u32 {
        let Paging { cr4, efer, .. } = self.paging;
        let nx = cr4 & cr4::PAE != 0 && efer & efer::NXE != 0;
        let access = match access {
            Access::Write => code::WRITE,
            Access::Fetch if nx || cr4 & cr4::SMEP != 0 => code::FETCH,
            _ => 0,
        };
        access
            | if context == Context::User {
                code::USER
            } else {
                0
            }
    }

    /// Walks, checks rights, and sets accessed and dirty flags.
    pub(crate) fn walk(
        &self,
        map: &Map,
        linear: u64,
        access: Access,
        context: Context,
    ) -> Result<Translation, Stop> {
        let mode = self.paging.mode();
        if mode == Mode::Off {
            return Ok(Translation {
                physical: linear & 0xFFFF_F000,
                shift: 12,
                writable: true,
                user: true,
                no_execute: false,
                global: false,
                dirty: true,
            });
        }
        // Another CPU may change an entry between its reading and the setting of its flags; the
        // walk then starts again, as if it had come later.
        loop {
            if let Some(result) = self.attempt(map, mode, linear, access, context) {
                return result;
            }
        }
    }

    /// One walk; `None` if an entry changed meanwhile.
    fn attempt(
        &self,
        map: &Map,
        mode: Mode,
        linear: u64,
        access: Access,
        context: Context,
    ) -> Option<Result<Translation, Stop>> {
        let fault = |why: u32| Some(Err(Stop::Fault(why | self.error_code(access, context))));
        let Paging { cr3, cr4, .. } = self.paging;
        let (levels, bits, width) = match mode {
            Mode::FourLevel => (4, 9, 8),
            Mode::Pae => (3, 9, 8),
            Mode::Legacy | Mode::Off => (2, 10, 4),
        };
        let mut table = match mode {
            Mode::FourLevel => cr3 & ADDRESS & ((1 << self.features.physical_bits) - 1),
            _ => cr3 & 0xFFFF_F000,
        };
        let reserved = if width == 8 { self.reserved(mode) } else { 0 };
        let (mut rights, mut no_execute) = (RW | US, false);
        let mut used = [(0u64, 0u64); 4];
        let mut depth = 0;
        for level in (1..=levels).rev() {
            let shift = 12 + (level - 1) * bits;
            let index = linear >> shift & ((1 << bits) - 1);
            if mode == Mode::Pae && level == 3 {
                // Checked when the register was loaded; no rights and no accessed flag.
                let entry = self.pdptes[index as usize & 3];
                if entry & P == 0 {
                    return fault(0);
                }
                table = entry & ADDRESS;
                continue;
            }
            let at = table + index * width;
            let entry = match width {
                4 => map
                    .read_entry::<u32>(at)
                    .map_or(u64::from(u32::MAX), u64::from),
                _ => map.read_entry::<u64>(at).unwrap_or(u64::MAX),
            };
            if entry & P == 0 {
                return fault(0);
            }
            let large =
                level > 1 && entry & PS != 0 && (mode != Mode::Legacy || cr4 & cr4::PSE != 0);
            if entry & (reserved | self.reserved_by_size(mode, level, large)) != 0 {
                return fault(code::PRESENT | code::RESERVED);
            }
            rights &= entry;
            no_execute |= width == 8 && entry & XD != 0;
            used[depth] = (at, entry);
            depth += 1;
            if level > 1 && !large {
                table = entry & if width == 8 { ADDRESS } else { 0xFFFF_F000 };
                continue;
            }
            let offset = (1u64 << shift) - 1;
            let frame = match (width, large) {
                (4, true) => entry & 0xFFC0_0000 | (entry >> 13 & 0xFF) << 32,
                (4, false) => entry & 0xFFFF_F000,
                _ => entry & ADDRESS & !offset,
            };
            let mut translation = Translation {
                physical: frame | linear & offset & !0xFFF,
                shift: shift as u8,
                writable: rights & RW != 0,
                user: rights & US != 0,
                no_execute,
                global: entry & G != 0 && cr4 & cr4::PGE != 0,
                dirty: entry & D != 0,
            };
            if !self.permits(&translation, access, context) {
                return fault(code::PRESENT);
            }
            translation.dirty |= access == Access::Write;
            let dirty = if access == Access::Write { D } else { 0 };
            for (i, &(at, old)) in used[..depth].iter().enumerate() {
                let new = old | A | if i + 1 == depth { dirty } else { 0 };
                if new == old {
                    continue;
                }
                let update = match width {
                    4 => map.update_entry(at, old as u32, new as u32),
                    _ => map.update_entry(at, old, new),
                };
                match update {
                    EntryUpdate::Done => {}
                    EntryUpdate::Raced => return None,
                    EntryUpdate::WroteCode => {
                        return Some(Err(Stop::WroteCode(at, width as usize)));
                    }
                }
            }
            return Some(Ok(translation));
        }
        // The lowest level is always a leaf.
        fault(0)
    }

    /// Reserved bits that depend on the entry's level and on whether it maps a page (SDM
    /// volume 3, tables 4-4 to 4-6 and 4-9 to 4-20).
    fn reserved_by_size(&self, mode: Mode, level: u32, large: bool) -> u64 {
        match (mode, level, large) {
            (Mode::Legacy, 2, true) => {
                let bits = u32::from(self.features.physical_bits.clamp(32, 40));
                (1 << 22) - (1 << (bits - 19))
            }
            (Mode::FourLevel, 4, true) => PS,
            (Mode::FourLevel, 3, true) if !self.features.gigabyte_pages => PS,
            (Mode::FourLevel, 3, true) => (1 << 30) - (1 << 13),
            (_, 2, true) => (1 << 21) - (1 << 13),
            _ => 0,
        }
    }
}
