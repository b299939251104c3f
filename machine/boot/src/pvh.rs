//! The PVH boot protocol (Xen `public/arch-x86/hvm/start_info.h`, `docs/misc/pvh.pandoc`).

use anemone_accel_api::{Regs, Sregs};
use vm_memory::GuestMemoryMmap;

use crate::layout::{self, CMDLINE, PVH_MEMORY_MAP, START_INFO};
use crate::linux::Initrd;
use crate::{BootRequest, Error};

const MAGIC: u32 = 0x336E_C578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// `hvm_start_info` has 56 bytes; the module list follows it.
const MODULES: u64 = START_INFO + 64;

/// Writes `hvm_start_info` and what it points at. The initramfs is module 0.
pub(crate) fn write(
    memory: &GuestMemoryMmap,
    request: &BootRequest<'_>,
    initrd: Option<Initrd>,
) -> Result<(), Error> {
    let mut info = Vec::new();
    let modules = u32::from(initrd.is_some());
    let flags = 0;
    for field in [MAGIC, VERSION, flags, modules] {
        info.extend_from_slice(&field.to_le_bytes());
    }
    for address in [MODULES, CMDLINE, request.rsdp, PVH_MEMORY_MAP] {
        info.extend_from_slice(&address.to_le_bytes());
    }
    let entries = request.memory_map.len() as u32;
    info.extend_from_slice(&entries.to_le_bytes());
    info.extend_from_slice(&0u32.to_le_bytes());
    layout::write(memory, START_INFO, &info)?;

    if let Some(Initrd { address, size }) = initrd {
        // No command line of its own; a reserved field.
        let module: Vec<u8> = [address, size, 0, 0]
            .iter()
            .flat_map(|field| field.to_le_bytes())
            .collect();
        layout::write(memory, MODULES, &module)?;
    }

    let mut map = Vec::new();
    for range in request.memory_map {
        map.extend_from_slice(&range.start.to_le_bytes());
        map.extend_from_slice(&range.size.to_le_bytes());
        map.extend_from_slice(&range.kind.number().to_le_bytes());
        map.extend_from_slice(&0u32.to_le_bytes());
    }
    layout::write(memory, PVH_MEMORY_MAP, &map)?;
    layout::write_cmdline(memory, request.cmdline)?;
    layout::write_tables32(memory)
}

/// The first CPU at the entry point: EBX points at `hvm_start_info`.
pub(crate) fn cpu(entry: u32) -> (Regs, Sregs) {
    let (mut regs, sregs) = layout::cpu32(entry);
    regs.rbx = START_INFO;
    (regs, sregs)
}
