//! The Linux 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`, "64-bit Boot
//! Protocol", and `zero-page.rst`; `arch/x86/include/uapi/asm/bootparam.h`).

use anemone_accel_api::{Regs, Sregs};
use vm_memory::GuestMemoryMmap;

use crate::layout::{self, CMDLINE, LINUX_CMDLINE_MAX, ZERO_PAGE};
use crate::{BootRequest, Error};

const ACPI_RSDP_ADDR: usize = 0x070;
const E820_ENTRIES: usize = 0x1E8;
/// Offset of the setup header, both in the zero page and in a bzImage.
pub(crate) const SETUP_HEADER: usize = 0x1F1;
const BOOT_FLAG: usize = 0x1FE;
const HEADER: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21C;
const CMD_LINE_PTR: usize = 0x228;
const CMDLINE_SIZE: usize = 0x238;
/// What follows the room for a setup header.
pub(crate) const SETUP_HEADER_END: usize = 0x290;
const E820_TABLE: usize = 0x2D0;

/// A boot loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
const LOADED_HIGH: u8 = 1 << 0;
/// The version that [`ZeroPage::new`] speaks: 2.15, Linux 5.5.
const PROTOCOL: u16 = 0x020F;

/// Where the initramfs is. It lies below 4 GiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Initrd {
    pub(crate) address: u64,
    pub(crate) size: u64,
}

/// `struct boot_params`.
pub(crate) struct ZeroPage([u8; 4096]);

impl ZeroPage {
    /// With the setup header of a kernel that has none.
    pub(crate) fn new() -> Self {
        let mut page = Self([0; 4096]);
        page.set(BOOT_FLAG, 0xAA55u16.to_le_bytes());
        page.set(HEADER, *b"HdrS");
        page.set(VERSION, PROTOCOL.to_le_bytes());
        page.set(CMDLINE_SIZE, (LINUX_CMDLINE_MAX as u32).to_le_bytes());
        page
    }

    /// With the setup header of a bzImage, from [`SETUP_HEADER`] on.
    pub(crate) fn with_setup_header(header: &[u8]) -> Self {
        let mut page = Self([0; 4096]);
        let room = &mut page.0[SETUP_HEADER..SETUP_HEADER_END];
        let length = header.len().min(room.len());
        room[..length].copy_from_slice(&header[..length]);
        page
    }

    fn set<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) {
        self.0[offset..offset + N].copy_from_slice(&bytes);
    }

    /// Fills in what a boot loader has to say.
    fn describe(&mut self, request: &BootRequest<'_>, initrd: Option<Initrd>) {
        self.set(TYPE_OF_LOADER, [LOADER_UNDEFINED]);
        self.set(LOADFLAGS, [LOADED_HIGH]);
        self.set(CMD_LINE_PTR, (CMDLINE as u32).to_le_bytes());
        self.set(ACPI_RSDP_ADDR, request.rsdp.to_le_bytes());
        if let Some(Initrd { address, size }) = initrd {
            self.set(RAMDISK_IMAGE, (address as u32).to_le_bytes());
            self.set(RAMDISK_SIZE, (size as u32).to_le_bytes());
        }
        self.set(E820_ENTRIES, [request.memory_map.len() as u8]);
        for (entry, range) in request.memory_map.iter().enumerate() {
            let at = E820_TABLE + entry * 20;
            self.set(at, range.start.to_le_bytes());
            self.set(at + 8, range.size.to_le_bytes());
            self.set(at + 16, range.kind.number().to_le_bytes());
        }
    }
}

/// Writes everything the kernel finds by its registers.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    request: &BootRequest<'_>,
    mut zero_page: ZeroPage,
    initrd: Option<Initrd>,
) -> Result<(), Error> {
    zero_page.describe(request, initrd);
    layout::write(memory, ZERO_PAGE, &zero_page.0)?;
    layout::write_cmdline(memory, request.cmdline)?;
    layout::write_tables64(memory)
}

/// The first CPU at the 64-bit entry point: RSI points at the zero page.
pub(crate) fn cpu(entry: u64) -> (Regs, Sregs) {
    let (mut regs, sregs) = layout::cpu64(entry);
    regs.rsi = ZERO_PAGE;
    (regs, sregs)
}
