//! What can be wrong with a kernel, an initramfs or the memory for them.

use std::io;

use thiserror::Error;

/// Why a kernel cannot be booted.
#[derive(Debug, Error)]
pub enum Error {
    /// A file could not be read.
    #[error("the {file} cannot be read at offset {offset:#x}: {source}")]
    Read {
        /// `kernel` or `initramfs`.
        file: &'static str,
        /// Where in the file.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// A directory, a pipe or a device instead of a file.
    #[error("the {0} is not a regular file")]
    NotAFile(&'static str),
    /// An empty file.
    #[error("the {0} is empty")]
    Empty(&'static str),
    /// Neither format.
    #[error(
        "the kernel is neither an ELF file nor a bzImage (which has 0xAA55 at offset 0x1fe and \
         `HdrS` at 0x202)"
    )]
    UnknownFormat,
    /// A file ends before something that its header announces.
    #[error("the kernel is cut off: its {what} ends at offset {end:#x}, the file at {size:#x}")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Where that should end.
        end: u64,
        /// Where the file ends.
        size: u64,
    },
    /// A bzImage of before Linux 3.8.
    #[error(
        "the kernel speaks boot protocol {}.{:02}, which is too old: 2.12 (Linux 3.8) is needed",
        .0 >> 8, .0 & 0xFF
    )]
    OldProtocol(u16),
    /// A bzImage whose setup header contradicts itself or the format.
    #[error("the kernel's setup header is damaged: {0}")]
    SetupHeader(&'static str),
    /// A bzImage without a 64-bit entry.
    #[error("the kernel is a 32-bit kernel; only x86-64 kernels can be booted")]
    NoEntry64,
    /// The compressed kernel in a bzImage cannot be decompressed.
    #[error("the kernel's {format} payload is damaged: {source}")]
    Payload {
        /// Name of the compression format.
        format: &'static str,
        /// The decoder's answer.
        source: io::Error,
    },
    /// The compressed kernel in a bzImage ends too early.
    #[error(
        "the kernel's {format} payload is cut off: it decompresses to {got} bytes, the ELF file in \
         it needs {needed}"
    )]
    PayloadTruncated {
        /// Name of the compression format.
        format: &'static str,
        /// How much there was.
        got: u64,
        /// How much there should be.
        needed: u64,
    },
    /// Not an ELF file for x86-64.
    #[error("the kernel is not an ELF file for x86-64: {0}")]
    ElfFormat(&'static str),
    /// An ELF file whose headers contradict themselves or the format.
    #[error("the kernel's ELF {what} is damaged: {why}")]
    Elf {
        /// Which header.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The entry point is not in what was loaded, or out of reach.
    #[error("the kernel's entry point {0:#x} lies in no segment below 4 GiB")]
    Entry(u64),
    /// A part of the kernel does not lie in guest memory.
    #[error(
        "{what} needs the addresses {start:#x} to {end:#x}, which are not all guest memory (from 0 \
         it reaches to {low_ram_end:#x})"
    )]
    NoMemory {
        /// What does not fit.
        what: &'static str,
        /// Its first address.
        start: u64,
        /// The address after its last.
        end: u64,
        /// End of low memory.
        low_ram_end: u64,
    },
    /// Two things want the same memory.
    #[error("{what} needs the addresses {start:#x} to {end:#x}, part of which {other} occupies")]
    Overlap {
        /// What does not fit.
        what: &'static str,
        /// Its first address.
        start: u64,
        /// The address after its last.
        end: u64,
        /// What is there already.
        other: &'static str,
    },
    /// There is no free piece of memory that is big enough.
    #[error(
        "{what} has {size} bytes, but the largest free piece of guest memory below {limit:#x} has \
         {largest}"
    )]
    NoRoom {
        /// What does not fit.
        what: &'static str,
        /// Its size.
        size: u64,
        /// It must lie below this address.
        limit: u64,
        /// Size of the largest free piece.
        largest: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {length} bytes; this kernel takes at most {limit}")]
    CmdlineTooLong {
        /// Its length.
        length: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// The command line cannot be passed.
    #[error("the kernel command line contains a NUL byte at offset {0}")]
    CmdlineNul(usize),
    /// The memory map of the request is not one.
    #[error("the memory map is wrong at entry {entry}: {why}")]
    MemoryMap {
        /// Index of the entry.
        entry: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Guest memory could not be accessed.
    #[error("guest memory at {address:#x} cannot be accessed: {source}")]
    GuestMemory {
        /// Where.
        address: u64,
        /// The reason.
        source: vm_memory::GuestMemoryError,
    },
}
