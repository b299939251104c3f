//! The ACPI tables of `virt-1`, made from numbers: a pure function.
#![forbid(unsafe_code)]

use std::ops::Range;

/// What the tables describe. Addresses are guest-physical; ranges are (base, size).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of CPUs; their APIC ids and processor UIDs are 0 to `cpus - 1`.
    pub cpus: u32,
    /// PCI Express configuration space (ECAM), 1 MiB per bus.
    pub ecam_base: u64,
    /// Buses in it, from 0 on, 1 to 256.
    pub ecam_buses: u16,
    /// Window for 32-bit BARs.
    pub mmio32: (u64, u64),
    /// Window for 64-bit BARs; size 0 for none.
    pub mmio64: (u64, u64),
    /// Size of the memory that begins at 0.
    pub low_ram: u64,
    /// Memory above 4 GiB; size 0 for none.
    pub high_ram: (u64, u64),
    /// Interrupt of the generic event device.
    pub ged_gsi: u32,
    /// I/O port of its event word: 4 bytes, cleared by reading.
    pub ged_port: u16,
    /// I/O port of the sleep control register, 1 byte.
    pub sleep_control: u16,
    /// I/O port of the sleep status register, 1 byte.
    pub sleep_status: u16,
    /// I/O port of the reset register, 1 byte.
    pub reset_port: u16,
    /// What the guest writes there to reset the machine.
    pub reset_value: u8,
    /// The 16550 at (port, GSI), if the machine has one.
    pub serial: Option<(u16, u32)>,
    /// The I/O APIC: id 0, its inputs are GSI 0 and up.
    pub ioapic_address: u32,
    /// The local APICs.
    pub lapic_address: u32,
}

/// The tables, ready to be put into guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tables {
    /// Guest-physical address of the RSDP.
    pub rsdp: u64,
    /// All tables, to be placed at `address`.
    pub blob: Vec<u8>,
    /// Guest-physical address of `blob`.
    pub address: u64,
    /// Signature of each table and where it lies in `blob`; the RSDP is `RSD PTR `.
    pub tables: Vec<(String, Range<usize>)>,
}

/// Makes the tables for a place in guest memory. `address` must be a multiple of 16 and the
/// memory from it on must be kept from the guest (`Acpi` or `Reserved` in the memory map).
pub fn build(config: &AcpiConfig, address: u64) -> Tables {
    let _ = config;
    Tables {
        rsdp: address,
        blob: Vec::new(),
        address,
        tables: Vec::new(),
    }
}
