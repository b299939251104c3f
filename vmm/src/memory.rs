//! Guest memory: one sealed memfd, mapped here and lent to the back ends.

use std::fs::File;
use std::os::fd::OwnedFd;

use anemone_accel_api::{MemorySlot, Vm};
use anemone_boot::{MemoryRange, RangeKind};
use anemone_virt::map;
use anemone_virtio::GuestRam;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::Error;

/// The RAM of a machine: start, length, and offset in the memfd.
fn regions(memory: u64) -> Vec<(u64, u64, u64)> {
    let (low, high) = map::split_ram(memory);
    let mut regions = vec![(0, low, 0)];
    if high > 0 {
        regions.push((map::HIGH_RAM_BASE, high, low));
    }
    regions
}

/// Maps the memfd.
pub fn map_ram(fd: &OwnedFd, memory: u64) -> Result<GuestMemoryMmap, Error> {
    if !(map::MEMORY_MIN..=1 << 40).contains(&memory) || !memory.is_multiple_of(map::MEMORY_UNIT) {
        return Err(Error::Config(format!(
            "memory of {memory} bytes: {} machines have 32 MiB to 1 TiB in steps of 2 MiB",
            map::NAME
        )));
    }
    let file = || {
        fd.try_clone()
            .map(File::from)
            .map_err(Error::os("dup of guest memory"))
    };
    if file()?
        .metadata()
        .map_err(Error::os("fstat of guest memory"))?
        .len()
        < memory
    {
        return Err(Error::Protocol("guest memory is shorter than configured"));
    }
    let ranges = regions(memory)
        .into_iter()
        .map(|(start, size, offset)| {
            let file = FileOffset::new(file()?, offset);
            let size = usize::try_from(size)
                .map_err(|_| Error::Config(format!("{size} bytes do not fit this host")))?;
            Ok((GuestAddress(start), size, Some(file)))
        })
        .collect::<Result<Vec<_>, Error>>()?;
    GuestMemoryMmap::from_ranges_with_files(ranges)
        .map_err(|e| Error::Config(format!("guest memory cannot be mapped: {e}")))
}

/// Gives the accelerator its memory slots.
pub fn map_slots(vm: &dyn Vm, ram: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let slot = MemorySlot {
            slot,
            guest: region.start_addr().0,
            size: region.len(),
            host: region.as_ptr(),
            read_only: false,
            log_dirty: false,
        };
        // SAFETY: `ram` stays mapped until the process ends, and is only accessed through
        // vm-memory, which makes volatile accesses.
        unsafe { vm.map_memory(slot)? };
    }
    Ok(())
}

/// Guest memory as the back ends get it.
pub fn shared_ram(fd: &OwnedFd, memory: u64, mapped: GuestMemoryMmap) -> Result<GuestRam, Error> {
    let regions = regions(memory)
        .into_iter()
        .map(|(start, size, offset)| Ok((start, size, fd.try_clone()?, offset)))
        .collect::<std::io::Result<_>>()
        .map_err(Error::os("dup of guest memory"))?;
    Ok(GuestRam { regions, mapped })
}

/// What the guest is told about its address space.
pub fn memory_map(memory: u64) -> Vec<MemoryRange> {
    let range = |start, size, kind| MemoryRange { start, size, kind };
    let (acpi, acpi_size) = map::ACPI_TABLES;
    let (low, high) = map::split_ram(memory);
    let mut ranges = vec![
        range(0, acpi, RangeKind::Ram),
        range(acpi, acpi_size, RangeKind::Acpi),
        range(map::RESET_PAGE.0, map::RESET_PAGE.1, RangeKind::Reserved),
        range(1 << 20, low - (1 << 20), RangeKind::Ram),
        range(map::ECAM_BASE, map::ECAM_SIZE, RangeKind::Reserved),
    ];
    if high > 0 {
        ranges.push(range(map::HIGH_RAM_BASE, high, RangeKind::Ram));
    }
    ranges
}
