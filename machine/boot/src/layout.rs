//! Where boot data lies in guest memory, and how CPUs find it.
//!
//! | address | size | what |
//! |---|---|---|
//! | 0x0_1000 | 4 KiB | global descriptor table |
//! | 0x0_2000 | 4 KiB | zero page (`boot_params`) |
//! | 0x0_3000 | 4 KiB | PVH: `hvm_start_info`, then its module list |
//! | 0x0_4000 | 4 KiB | PVH: memory map |
//! | 0x0_7000 | 4 KiB | stack, growing down from 0x8000 |
//! | 0x0_9000 | 24 KiB | page tables: PML4, PDPT, four page directories; the first 4 GiB map to themselves |
//! | 0x1_0000 | 64 KiB | command line |
//!
//! The first page is left empty, because many kernels do not use it. Kernels copy what they need of all this
//! before they hand out the memory below 1 MiB.

use std::ops::Range;

use anemone_accel_api::{DescriptorTable, Regs, Segment, Sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::Error;

const GDT: u64 = 0x1000;
pub(crate) const ZERO_PAGE: u64 = 0x2000;
pub(crate) const START_INFO: u64 = 0x3000;
pub(crate) const PVH_MEMORY_MAP: u64 = 0x4000;
const STACK_TOP: u64 = 0x8000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xA000;
const PAGE_DIRECTORIES: u64 = 0xB000;
pub(crate) const CMDLINE: u64 = 0x1_0000;
const CMDLINE_SIZE: u64 = 0x1_0000;

/// All of it, and what lies below it.
pub(crate) const BOOT_DATA: Range<u64> = 0..CMDLINE + CMDLINE_SIZE;

/// End of what the page tables map; 32-bit code reaches as far.
pub(crate) const MAPPED_END: u64 = 1 << 32;

/// What an x86 Linux takes (`COMMAND_LINE_SIZE` less the NUL), for files that do not say.
pub(crate) const LINUX_CMDLINE_MAX: usize = 2047;

/// Most entries of a memory map: the room in a zero page.
pub(crate) const MEMORY_MAP_MAX: usize = 128;

/// Selectors that the Linux boot protocol asks for; PVH leaves them open.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CODE64: u64 = 0x00AF_9B00_0000_FFFF;
const CODE32: u64 = 0x00CF_9B00_0000_FFFF;
const DATA: u64 = 0x00CF_9300_0000_FFFF;
/// A busy task state segment at 0 of the least length: CPUs must have one, nothing uses it.
const TASK: u64 = 0x0000_8B00_0000_0067;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS bit that is always set. Interrupts are off.
const RFLAGS: u64 = 1 << 1;
/// The local APIC is at its architectural place, enabled, and this is the first CPU.
const APIC_BASE: u64 = 0xFEE0_0000 | 1 << 11 | 1 << 8;

/// Refuses a command line that the kernel would not get whole.
pub(crate) fn check_cmdline(cmdline: &str, limit: usize) -> Result<(), Error> {
    let limit = limit.min(CMDLINE_SIZE as usize - 1);
    if let Some(offset) = cmdline.find('\0') {
        return Err(Error::CmdlineNul(offset));
    }
    if cmdline.len() > limit {
        let length = cmdline.len();
        return Err(Error::CmdlineTooLong { length, limit });
    }
    Ok(())
}

pub(crate) fn write(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| Error::GuestMemory { address, source })
}

/// Writes the command line and the NUL after it.
pub(crate) fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), Error> {
    write(memory, CMDLINE, cmdline.as_bytes())?;
    write(memory, CMDLINE + cmdline.len() as u64, &[0])
}

fn descriptors(code: u64) -> [u64; 6] {
    // The sixth is the upper half of a 64-bit task state segment.
    [0, 0, code, DATA, TASK, 0]
}

fn words(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// What a CPU finds in memory when it is entered in 64-bit mode: descriptors, and page tables
/// with pages of 2 MiB.
pub(crate) fn write_tables64(memory: &GuestMemoryMmap) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let directories = (0..4).map(|n| (PAGE_DIRECTORIES + (n << 12)) | PRESENT_WRITABLE);
    let pages = (0..4 * 512).map(|n| n << 21 | LARGE | PRESENT_WRITABLE);
    write(memory, GDT, &words(descriptors(CODE64)))?;
    write(memory, PML4, &words([PDPT | PRESENT_WRITABLE]))?;
    write(memory, PDPT, &words(directories))?;
    write(memory, PAGE_DIRECTORIES, &words(pages))
}

/// What a CPU finds in memory when it is entered in 32-bit mode without paging.
pub(crate) fn write_tables32(memory: &GuestMemoryMmap) -> Result<(), Error> {
    write(memory, GDT, &words(descriptors(CODE32)))
}

/// The first CPU in 64-bit mode at `rip`. Valid once [`write_tables64`] has been called.
pub(crate) fn cpu64(rip: u64) -> (Regs, Sregs) {
    let regs = Regs {
        rip,
        rsp: STACK_TOP,
        rflags: RFLAGS,
        ..Regs::default()
    };
    let sregs = Sregs {
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: PML4,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..segments(CODE64)
    };
    (regs, sregs)
}

/// The first CPU in 32-bit mode at `rip`. Valid once [`write_tables32`] has been called.
pub(crate) fn cpu32(rip: u32) -> (Regs, Sregs) {
    let regs = Regs {
        rip: rip.into(),
        rsp: STACK_TOP,
        rflags: RFLAGS,
        ..Regs::default()
    };
    let sregs = Sregs {
        cr0: CR0_PE | CR0_ET,
        ..segments(CODE32)
    };
    (regs, sregs)
}

fn segments(code: u64) -> Sregs {
    let data = Segment::from_descriptor(DATA_SELECTOR, DATA);
    Sregs {
        cs: Segment::from_descriptor(CODE_SELECTOR, code),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::from_descriptor(TASK_SELECTOR, TASK),
        gdt: DescriptorTable {
            base: GDT,
            limit: size_of_val(&descriptors(code)) as u16 - 1,
        },
        apic_base: APIC_BASE,
        ..Sregs::default()
    }
}
