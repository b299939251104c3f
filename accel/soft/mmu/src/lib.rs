//! Guest-physical memory and linear-address translation of a software x86-64 CPU.
//!
//! ```text
//!   engine  --load/store/update/fetch-->  Mmu (one per vCPU)
//!                                          level-1 TLB: linear -> host, a few instructions
//!                                          level-2 TLB: linear -> physical and rights
//!                                          page walk
//!                                         Memory (one per VM): slots, dirty log, code pages
//! ```
//!
//! [`Memory`] holds the slots, [`Mmu`] is one vCPU's way to them. An access either happens as a
//! whole, or ends in a [`Fault`] and has changed nothing but accessed and dirty flags, as on
//! hardware. Segmentation and alignment checks come before and are the caller's; in 32-bit modes
//! the caller cuts linear addresses to 32 bits.
//!
//! # The engine's duties
//! - Look at the attention word between blocks and call [`Mmu::poll`] when a bit of
//!   [`ATTENTION_MMU`] is set. Other threads wait for it.
//! - [`Mmu::park`] before anything that waits, and around bus accesses ([`Mmu::parked`]).
//! - Choose the [`Context`] by privilege level, by EFLAGS.AC and by whether the access is implicit.
//! - Complete [`Fault::Mmio`] with [`Mmu::load_mmio`] and [`Mmu::store_mmio`].
//!
//! # Code
//! Decoded code is kept per guest-physical page. [`Mmu::protect_code`] makes every vCPU's writes
//! to the page, also those through page walks, reach the [`CodeWatch`].
//!
//! Devices in other processes write to shared memory unseen (and so does the host). A guest that
//! lets a device fill a page must map the page anew before it executes it, and that shows as
//! [`Fetched::fresh`]: an engine that keeps code across such a moment must then compare the bytes
//! it decoded with memory. A guest that executes a page while a device rewrites it, without any
//! change of translation in between, is not served.
//!
//! # Deviations
//! Paging structures outside memory slots read as all-ones; accessed and dirty flags in read-only
//! memory are not set. INVPCID of one address drops it for every PCID. 5-level paging and
//! protection keys are not offered.

mod mmu;
mod physical;
mod raw;
mod tlb;
mod walk;

use std::ops::Range;

pub use mmu::{Fetched, Invpcid, Mmu, ReservedPdpte, Statistics, bus_pieces};
pub use physical::{ATTENTION_MMU, CodeWatch, Memory, PAGE_SIZE, SlotError};
pub use raw::{Atomic, Value};
pub use tlb::{Level1, SETS, Set};
pub use walk::{Features, Mode, Paging, code, cr0, cr4, efer, is_canonical};

/// Kind of access. The discriminants index [`Level1::arrays`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Data read.
    Read = 0,
    /// Data write, or read-modify-write.
    Write = 1,
    /// Instruction fetch.
    Fetch = 2,
}

/// Who makes an access (SDM volume 3, 4.6). The discriminants index [`Level1::arrays`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// Explicit access at CPL 3.
    User = 0,
    /// Explicit access at CPL 0 to 2 with EFLAGS.AC clear; implicit access to a system structure
    /// at any CPL; fetch at CPL 0 to 2.
    Supervisor = 1,
    /// Explicit data access at CPL 0 to 2 with EFLAGS.AC set. Without SMAP it makes no
    /// difference, and [`Supervisor`](Self::Supervisor) shares its TLB entries.
    SupervisorAc = 2,
}

/// Why an access did not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// #PF: `address` for CR2 and the error code ([`code`]).
    PageFault {
        /// Linear address; of the second page's first byte if that page faulted.
        address: u64,
        /// Error code.
        code: u32,
    },
    /// In long mode: bits 63:47 of the address are not equal. #GP(0), or #SS(0) for the stack.
    NonCanonical,
    /// Not all of it is memory (or, for a write, writable memory). Translation and rights are good.
    Mmio(Mmio),
}

/// A translated access that the bus must take part in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mmio {
    /// Guest-physical address of the first byte.
    pub physical: u64,
    /// Bytes in all.
    pub size: u8,
    /// Bytes at `physical`; fewer than `size` if the access crosses a page.
    pub length: u8,
    /// Guest-physical address of the other bytes.
    pub rest: u64,
}

impl Mmio {
    fn whole(physical: u64, size: usize) -> Self {
        Self {
            physical,
            size: size as u8,
            length: size as u8,
            rest: 0,
        }
    }

    /// The parts: guest-physical address and the bytes of the value that lie there.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, Range<usize>)> + use<> {
        let (length, size) = (usize::from(self.length), usize::from(self.size));
        [(self.physical, 0..length), (self.rest, length..size)]
            .into_iter()
            .filter(|(_, range)| !range.is_empty())
    }
}
