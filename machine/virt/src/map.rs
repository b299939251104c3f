//! Addresses, ports and interrupt numbers of `virt-1`.
//!
//! ```text
//! 0              low RAM, up to 3 GiB
//! C000_0000      32-bit PCI memory, 960 MiB; a device's BARs at a place fixed by its slot
//! FC00_0000      ECAM, 32 buses of 1 MiB
//! FEC0_0000      I/O APIC
//! FEE0_0000      local APICs
//! FEFF_C000      four pages for KVM on older Intel hosts
//! FFC0_0000      firmware
//! 1_0000_0000    high RAM, then (next GiB boundary) the area for memory devices
//! pci64_base     64-bit PCI memory, 64 GiB
//! pmem_base      persistent memory, by slot, each at a multiple of 1 GiB
//! ```
//!
//! ECAM lies where stock UEFI firmware never places a BAR, just below the I/O APIC.

/// Name of the machine version.
pub const NAME: &str = "virt-1";

/// First address that low RAM cannot have.
pub const LOW_RAM_MAX: u64 = 0xC000_0000;
/// Start of 32-bit PCI memory.
pub const PCI32_BASE: u64 = 0xC000_0000;
/// Length of 32-bit PCI memory.
pub const PCI32_SIZE: u64 = ECAM_BASE - PCI32_BASE;
/// 32-bit PCI memory set aside for the BARs of each slot.
pub const PCI32_PER_SLOT: u64 = 0x10_0000;
/// Memory-mapped PCI configuration space.
pub const ECAM_BASE: u64 = 0xFC00_0000;
/// Buses in ECAM.
pub const ECAM_BUSES: u16 = 32;
/// Length of ECAM.
pub const ECAM_SIZE: u64 = (ECAM_BUSES as u64) << 20;
/// I/O APIC registers.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// Length of the I/O APIC's page.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Local APIC registers.
pub const LAPIC_BASE: u64 = 0xFEE0_0000;
/// Start of high RAM.
pub const HIGH_RAM_BASE: u64 = 1 << 32;
/// Length of 64-bit PCI memory.
pub const PCI64_SIZE: u64 = 64 << 30;
/// Where the ACPI tables lie in low RAM, and the room they have.
pub const ACPI_TABLES: (u64, u64) = (0xE_0000, 0x1_F000);
/// The page with the real-mode reset vector, kept from the guest's memory management.
pub const RESET_PAGE: (u64, u64) = (0xF_F000, 0x1000);
/// Where a PC's firmware is entered in real mode, F000:FFF0 and FFFF:0000.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// What stands at [`RESET_VECTOR`]: write [`RESET_VALUE`] to [`RESET`], halt.
///
/// Linux on hardware-reduced ACPI reboots through UEFI; without UEFI it does not try the ACPI
/// reset register but jumps here.
pub const RESET_CODE: [u8; 9] = {
    let [low, high] = RESET.to_le_bytes();
    // mov dx, RESET; mov al, RESET_VALUE; out dx, al; hlt; jmp to the hlt
    [0xBA, low, high, 0xB0, RESET_VALUE, 0xEE, 0xF4, 0xEB, 0xFD]
};

/// ACPI sleep control register, one byte.
pub const SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register, one byte.
pub const SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register, one byte.
pub const RESET: u16 = 0x602;
/// What resets the machine when written to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// Event word of the generic event device, four bytes, cleared by reading.
pub const GED_EVENTS: u16 = 0x608;
/// PCI configuration, eight ports: CONFIG_ADDRESS and CONFIG_DATA.
pub const PCI_CONFIG: u16 = 0xCF8;
/// The optional 16550 UART, eight ports.
pub const SERIAL: u16 = 0x3F8;

/// Global system interrupt of the UART.
pub const SERIAL_GSI: u8 = 4;
/// Global system interrupt of the generic event device.
pub const GED_GSI: u8 = 9;
/// Pins of the I/O APIC.
pub const GSIS: u8 = 24;
/// First interrupt route for MSI-X; the numbers below it name I/O APIC pins.
pub const FIRST_MSI_ROUTE: u32 = 32;
/// MSI-X routes set aside for each slot.
pub const MSI_ROUTES_PER_SLOT: u32 = 128;

/// Least guest memory in bytes.
pub const MEMORY_MIN: u64 = 32 << 20;
/// Guest memory comes in pieces of this many bytes.
pub const MEMORY_UNIT: u64 = 2 << 20;
/// Most virtual CPUs.
pub const CPUS_MAX: u32 = 64;

/// How `memory` bytes are split into low and high RAM.
pub fn split_ram(memory: u64) -> (u64, u64) {
    let low = memory.min(LOW_RAM_MAX);
    (low, memory - low)
}

/// Start of 64-bit PCI memory for a machine with `memory` bytes: the first multiple of 64 GiB
/// above high RAM with room for as much memory again to be plugged in.
pub fn pci64_base(memory: u64) -> u64 {
    (HIGH_RAM_BASE + memory * 2).next_multiple_of(PCI64_SIZE)
}

/// Persistent memory comes in pieces of this many bytes: a subsection of Linux's memory map, and a
/// large page.
pub const PMEM_UNIT: u64 = 2 << 20;
/// Each persistent memory begins at a multiple of this.
pub const PMEM_ALIGN: u64 = 1 << 30;

/// Start of the area of persistent memory for a machine with `memory` bytes of RAM: right after
/// 64-bit PCI memory.
pub fn pmem_base(memory: u64) -> u64 {
    pci64_base(memory) + PCI64_SIZE
}

/// Where persistent memories lie. `devices` are pairs of slot and size in bytes, in any order; the
/// result is in the same order. They follow one another in the order of their slots. `None` if they
/// do not end below 2^`address_bits`.
pub fn place_pmem(memory: u64, devices: &[(u8, u64)], address_bits: u32) -> Option<Vec<u64>> {
    let mut order: Vec<usize> = (0..devices.len()).collect();
    order.sort_by_key(|&i| devices[i].0);
    let mut places = vec![0; devices.len()];
    let mut next = pmem_base(memory);
    for i in order {
        places[i] = next;
        next = next
            .checked_add(devices[i].1)?
            .checked_next_multiple_of(PMEM_ALIGN)?;
    }
    let end = 1 << address_bits.min(52);
    (devices.is_empty() || next <= end).then_some(places)
}

/// Where the BARs of the function in `slot` start after power-on.
pub fn slot_bar_base(slot: u8) -> u64 {
    PCI32_BASE + u64::from(slot) * PCI32_PER_SLOT
}

/// The interrupt routes of the function in `slot`.
pub fn slot_first_route(slot: u8) -> u32 {
    FIRST_MSI_ROUTE + u32::from(slot) * MSI_ROUTES_PER_SLOT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_do_not_overlap() {
        let all = [
            (0, LOW_RAM_MAX),
            (PCI32_BASE, PCI32_SIZE),
            (ECAM_BASE, ECAM_SIZE),
            (IOAPIC_BASE, IOAPIC_SIZE),
            (LAPIC_BASE, 0x1000),
            (HIGH_RAM_BASE, 1 << 40),
        ];
        assert!(all.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        assert!(slot_bar_base(31) + PCI32_PER_SLOT <= ECAM_BASE);
        // The kernel takes at most 4096 routes.
        assert!(slot_first_route(31) < 4096);
    }

    #[test]
    fn persistent_memory_lies_in_the_order_of_slots() {
        let base = pmem_base(512 << 20);
        assert_eq!(base, 128 << 30);
        let gib = 1 << 30;
        let devices = [(25, 2 << 20), (9, gib + (2 << 20)), (24, 4 * gib)];
        let places = place_pmem(512 << 20, &devices, 48).unwrap();
        assert_eq!(places, [base + 6 * gib, base, base + 2 * gib]);
        // A 39-bit host has room up to 512 GiB.
        assert!(place_pmem(512 << 20, &[(24, 384 * gib)], 39).is_some());
        assert!(place_pmem(512 << 20, &[(24, 384 * gib + 1)], 39).is_none());
        assert!(place_pmem(512 << 20, &[(24, u64::MAX), (25, u64::MAX)], 52).is_none());
        assert_eq!(place_pmem(512 << 20, &[], 36), Some(vec![]));
    }

    #[test]
    fn ram_is_split_below_and_above_four_gibibytes() {
        assert_eq!(split_ram(512 << 20), (512 << 20, 0));
        assert_eq!(split_ram(5 << 30), (3 << 30, 2 << 30));
        assert!(pci64_base(5 << 30) >= HIGH_RAM_BASE + (10u64 << 30));
        assert_eq!(pci64_base(32 << 20) % PCI64_SIZE, 0);
    }
}
