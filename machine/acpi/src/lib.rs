//! The ACPI tables of `virt-1`, made from numbers: a pure function.
//!
//! | table | says |
//! |---|---|
//! | RSDP, XSDT | where the others are; there is no RSDT, so every consumer must know ACPI 2.0 |
//! | FACP | hardware-reduced ACPI: no fixed registers but sleep, status and reset; no PC devices |
//! | APIC | one x2APIC entry per CPU, one I/O APIC whose inputs are GSI 0 to 23, no 8259 |
//! | MCFG | the PCI Express configuration space of segment 0 |
//! | DSDT | host bridge, generic event device, power button, CPUs, serial port (`dsdt.rs`) |
//!
//! The tables are part of what a machine version promises, so a golden test holds every byte of
//! them. They follow ACPI 6.3: nothing of a later version is needed, and old interpreters know it.
#![forbid(unsafe_code)]

mod dsdt;
mod fixed;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;

const OEM_ID: [u8; 6] = *b"ANEMON";
const OEM_TABLE_ID: [u8; 8] = *b"VIRT-1  ";
const OEM_REVISION: u32 = 1;
const CREATOR_ID: [u8; 4] = *b"ANEM";
const CREATOR_REVISION: u32 = 1;

/// Every table begins at a multiple of this.
const ALIGNMENT: usize = 64;

/// What the tables describe. Addresses are guest-physical; ranges are (base, size).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiConfig {
    /// Number of CPUs, 1 to 4096; their APIC ids and processor UIDs are 0 to `cpus - 1`.
    pub cpus: u32,
    /// PCI Express configuration space (ECAM), 1 MiB per bus, below 4 GiB.
    pub ecam_base: u64,
    /// Buses in it, from 0 on, 1 to 256.
    pub ecam_buses: u16,
    /// Window for 32-bit BARs, below 4 GiB.
    pub mmio32: (u64, u64),
    /// Window for 64-bit BARs; size 0 for none.
    pub mmio64: (u64, u64),
    /// Size of the memory that begins at 0. No table says it (the guest is told by its boot
    /// protocol); [`build`] checks the windows against it.
    pub low_ram: u64,
    /// Memory above 4 GiB; size 0 for none. Checked like `low_ram`.
    pub high_ram: (u64, u64),
    /// Interrupt of the generic event device, an edge-triggered input of the I/O APIC.
    pub ged_gsi: u32,
    /// I/O port of its event word: 4 bytes, cleared by reading.
    pub ged_port: u16,
    /// I/O port of the sleep control register, 1 byte. Power-off writes `0x34` (sleep type 5
    /// and the enable bit).
    pub sleep_control: u16,
    /// I/O port of the sleep status register, 1 byte. Power-off writes `0x80` (clear wake
    /// status) before it writes the control register.
    pub sleep_status: u16,
    /// I/O port of the reset register, 1 byte.
    pub reset_port: u16,
    /// What the guest writes there to reset the machine.
    pub reset_value: u8,
    /// The 16550 at (port, GSI), if the machine has one. The GSI is edge-triggered.
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

/// Makes the tables for a place in guest memory. `address` must be a multiple of 64, and the
/// memory there must be kept from the guest (`Acpi` or `Reserved` in its memory map). The RSDP
/// need not be below 1 MiB: it is passed to the kernel by its boot protocol.
///
/// Their size does not depend on `address`, and grows with the CPUs by about 44 bytes each: 1.3 KiB for
/// one, 4 KiB for 64.
pub fn build(config: &AcpiConfig, address: u64) -> Tables {
    check(config, address);

    let dsdt = fixed::header(*b"DSDT", 2, &dsdt::body(config));
    let madt = fixed::madt(config);
    let mcfg = fixed::mcfg(config);

    let mut tables = Tables {
        rsdp: address,
        blob: vec![0; Rsdp::len().next_multiple_of(ALIGNMENT)],
        address,
        tables: vec![("RSD PTR ".to_owned(), 0..Rsdp::len())],
    };
    let dsdt = tables.push(&dsdt);
    let pointers = [
        tables.push(&fixed::fadt(config, dsdt)),
        tables.push(&madt),
        tables.push(&mcfg),
    ];
    let body: Vec<u8> = pointers.iter().flat_map(|p| p.to_le_bytes()).collect();
    let xsdt = tables.push(&fixed::header(*b"XSDT", 1, &body));

    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.blob[..rsdp.len()].copy_from_slice(&rsdp);
    tables
}

impl Tables {
    /// Adds a table and returns its guest-physical address.
    fn push(&mut self, table: &[u8]) -> u64 {
        let start = self.blob.len().next_multiple_of(ALIGNMENT);
        self.blob.resize(start, 0);
        self.blob.extend_from_slice(table);
        let signature = String::from_utf8_lossy(&table[..4]).into_owned();
        self.tables.push((signature, start..self.blob.len()));
        self.address + start as u64
    }
}

/// Contradictions that would make the guest put a BAR over memory, or that a descriptor cannot
/// hold. They can only come from the machine's own address map.
fn check(config: &AcpiConfig, address: u64) {
    const FOUR_GIB: u64 = 1 << 32;
    let end = |range: (u64, u64)| range.0 + range.1;
    let ecam = (config.ecam_base, u64::from(config.ecam_buses) << 20);
    debug_assert!(address.is_multiple_of(ALIGNMENT as u64));
    debug_assert!((1..=4096).contains(&config.cpus));
    debug_assert!((1..=256).contains(&config.ecam_buses));
    for window in [ecam, config.mmio32] {
        debug_assert!(window.0 >= config.low_ram && end(window) <= FOUR_GIB);
    }
    debug_assert!(config.mmio64.1 == 0 || config.mmio64.0 >= end(config.high_ram).max(FOUR_GIB));
}
