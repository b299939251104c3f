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
//! Formats: Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`; Xen
//! `public/arch-x86/hvm/start_info.h`; System V ABI, chapter 4 (ELF).
#![forbid(unsafe_code)]

use std::fs::File;

use anemone_accel_api::{Regs, Sregs};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

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
    /// The kernel, read by absolute offsets; the descriptor's position is changed.
    pub kernel: &'a File,
    /// The initramfs, from offset 0 to its end; the descriptor's position is changed.
    pub initrd: Option<&'a File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// Everything the guest is told about its physical memory, in ascending order, at most 128
    /// entries, none overlapping. Only [`RangeKind::Ram`] is loaded into.
    pub memory_map: &'a [MemoryRange],
    /// Guest-physical address of the ACPI RSDP.
    pub rsdp: u64,
    /// End of the memory that begins at 0. The initramfs lies below it.
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

/// Why a kernel cannot be booted.
#[derive(Debug, Error)]
pub enum Error {
    /// The file is neither a bzImage nor an ELF file.
    #[error("the kernel is neither a bzImage (no `HdrS` at offset 0x202) nor an ELF file")]
    UnknownFormat,
}

/// Loads what `request` names into `memory` and returns how the first CPU starts.
///
/// `memory` must read as zero wherever nothing has been loaded, which is how a new memfd reads:
/// the parts of a kernel that its file does not store are left as they are.
pub fn load(memory: &GuestMemoryMmap, request: &BootRequest<'_>) -> Result<Entry, Error> {
    let _ = (memory, request);
    Err(Error::UnknownFormat)
}
