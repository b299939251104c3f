//! Direct boot: puts a kernel, its initramfs and its command line into guest memory and says in
//! which state the first CPU enters it. No firmware runs.
//!
//! | kernel file | what is loaded | entered | boot data |
//! |---|---|---|---|
//! | bzImage, payload compressed by gzip, xz, lzma, zstd or lz4 | the ELF inside, decompressed here | 64-bit, at the ELF's entry | zero page with the file's own setup header |
//! | bzImage, any other payload | the protected-mode part | 64-bit, at its start + 0x200; it decompresses itself | zero page with the file's own setup header |
//! | ELF64 with a PVH note | its segments | 32-bit flat, at the address in the note | `hvm_start_info` version 1 |
//! | ELF64 without | its segments | 64-bit, at the ELF's entry | zero page made here |
//!
//! A kernel whose ELF is entered directly runs where it was linked: address space randomisation
//! of the kernel image (KASLR) is the work of the decompressor that this skips. Randomisation of
//! its memory areas, modules and processes is not affected.
//!
//! Page tables, boot data and the command line lie in the first 128 KiB (`layout.rs` says where);
//! the initramfs lies as high as the kernel allows.
//!
//! Formats: Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`; Xen
//! `public/arch-x86/hvm/start_info.h`; System V ABI, chapter 4 (ELF).
#![forbid(unsafe_code)]

mod bzimage;
mod elf;
mod error;
mod layout;
mod linux;
mod payload;
mod place;
mod pvh;
mod source;

use std::fs::File;

use anemone_accel_api::{Regs, Sregs};
use vm_memory::GuestMemoryMmap;

use crate::bzimage::BzImage;
use crate::elf::Elf;
pub use crate::error::Error;
use crate::linux::Initrd;
use crate::place::Places;
use crate::source::Source;

/// What a range of guest-physical addresses is, as the guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeKind {
    /// Usable memory.
    Ram,
    /// Not to be touched or given to devices: e820 type 2.
    Reserved,
    /// ACPI tables, which the guest may reuse after reading them: e820 type 3.
    Acpi,
}

impl RangeKind {
    /// Number of the type, the same in an e820 table and in PVH's memory map.
    fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::Acpi => 3,
        }
    }
}

/// One entry of the memory map that the guest is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// What lies there.
    pub kind: RangeKind,
}

/// What to boot and on what machine.
#[derive(Debug)]
pub struct BootRequest<'a> {
    /// The kernel, read by absolute offsets; the position of the descriptor is changed.
    pub kernel: &'a File,
    /// The initramfs, from offset 0 to its end; the position of the descriptor is changed.
    pub initrd: Option<&'a File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Everything the guest is told about its physical memory, in ascending order, at most 128
    /// entries, none overlapping. Only [`RangeKind::Ram`] is loaded into; the first 0x2_0000
    /// bytes must be of that kind.
    pub memory_map: &'a [MemoryRange],
    /// Guest-physical address of the ACPI RSDP.
    pub rsdp: u64,
    /// End of the memory that begins at 0, at most 4 GiB. The initramfs lies below it.
    pub low_ram_end: u64,
}

/// State of the first CPU at the kernel's entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// General registers.
    pub regs: Regs,
    /// System registers.
    pub sregs: Sregs,
    /// What was found, for logs: for example
    /// `bzImage 6.1.0-50-cloud-amd64, LZ4 payload, 64-bit entry`.
    pub description: String,
}

/// Loads what `request` names into `memory` and returns how the first CPU starts.
///
/// `memory` must read as zero wherever nothing has been loaded, which is how a new memfd reads:
/// the parts of a kernel that its file does not store are left as they are. The system calls
/// made are `statx`, `pread64`, `lseek` and `read` on the two descriptors, and what the
/// allocator needs; buffers of up to 128 MiB (for some compression formats) are given back.
pub fn load(memory: &GuestMemoryMmap, request: &BootRequest<'_>) -> Result<Entry, Error> {
    let kernel = Source::new("kernel", request.kernel)?;
    let mut places = Places::new(memory, request)?;
    places.take("the boot data", layout::BOOT_DATA)?;

    let magic = kernel.prefix(elf::MAGIC.len())?;
    if magic == elf::MAGIC {
        load_elf(memory, request, &kernel, &mut places)
    } else {
        load_bzimage(memory, request, &kernel, &mut places)
    }
}

fn load_bzimage(
    memory: &GuestMemoryMmap,
    request: &BootRequest<'_>,
    kernel: &Source<'_>,
    places: &mut Places,
) -> Result<Entry, Error> {
    let image = BzImage::parse(kernel)?;
    layout::check_cmdline(request.cmdline, image.cmdline_size)?;
    let (entry, how) = image.load(memory, kernel, places)?;
    let initrd = load_initrd(memory, request, places, image.initrd_limit)?;
    linux::write(memory, request, image.zero_page(), initrd)?;
    let (regs, sregs) = linux::cpu(entry);
    Ok(Entry {
        regs,
        sregs,
        description: format!("bzImage {}, {how}, 64-bit entry", image.release),
    })
}

fn load_elf(
    memory: &GuestMemoryMmap,
    request: &BootRequest<'_>,
    kernel: &Source<'_>,
    places: &mut Places,
) -> Result<Entry, Error> {
    layout::check_cmdline(request.cmdline, layout::LINUX_CMDLINE_MAX)?;
    let elf = Elf::parse(&kernel.prefix(elf::PREFIX)?, kernel.size)?;
    elf.place(places)?;
    for segment in &elf.segments {
        kernel.copy(memory, segment.offset, segment.address, segment.file_size)?;
    }
    let initrd = load_initrd(memory, request, places, request.low_ram_end)?;
    let entry = elf.pvh_entry(kernel)?;
    let (regs, sregs) = if let Some(entry) = entry {
        pvh::write(memory, request, initrd)?;
        pvh::cpu(entry)
    } else {
        linux::write(memory, request, linux::ZeroPage::new(), initrd)?;
        linux::cpu(elf.entry()?)
    };
    let entered = if entry.is_some() { "PVH" } else { "64-bit" };
    Ok(Entry {
        regs,
        sregs,
        description: format!("ELF, {entered} entry"),
    })
}

/// Puts the initramfs as high as it fits below `limit` and the end of low memory.
fn load_initrd(
    memory: &GuestMemoryMmap,
    request: &BootRequest<'_>,
    places: &mut Places,
    limit: u64,
) -> Result<Option<Initrd>, Error> {
    let Some(file) = request.initrd else {
        return Ok(None);
    };
    let source = Source::new("initramfs", file)?;
    let limit = limit.min(request.low_ram_end).min(layout::MAPPED_END);
    let address = places.take_highest("the initramfs", source.size, limit)?;
    source.copy(memory, 0, address, source.size)?;
    Ok(Some(Initrd {
        address,
        size: source.size,
    }))
}
