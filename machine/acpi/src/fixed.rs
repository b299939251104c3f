//! The tables with a fixed layout.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::IoApic;
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;

use crate::{AcpiConfig, CREATOR_ID, CREATOR_REVISION, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// FADT, IA-PC boot architecture flags (ACPI 6.3, 5.2.9.3): there is no VGA and no CMOS clock;
/// the clear bits say that there are no other PC devices and no 8042 either. Without the second
/// bit Linux looks for the clock for a second or more.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_RTC: u16 = 1 << 5;

/// Offset of the creator id and revision in the header of every table.
const CREATOR: usize = 28;

/// A table: header and body.
pub(crate) fn header(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    signed(&table)
}

/// The bytes of a table, with the machine's creator instead of the library's: the tables must
/// not change when the library does.
fn signed(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes[CREATOR..CREATOR + 4].copy_from_slice(&CREATOR_ID);
    bytes[CREATOR + 4..CREATOR + 8].copy_from_slice(&CREATOR_REVISION.to_le_bytes());
    bytes[9] = 0;
    bytes[9] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    bytes
}

/// FADT (ACPI 6.3, 5.2.9). Everything that hardware-reduced ACPI does without is zero. There is
/// no power management timer: the guest has better clocks, and probing it costs milliseconds.
pub(crate) fn fadt(config: &AcpiConfig, dsdt: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            port.into(),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // x86 guests take it for granted.
        .flag(Flags::Wbinvd)
        // Neither button is a fixed register: power is a control method device, and there is
        // none for sleep.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.fadt_minor_version = 3;
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_RTC).into();
    fadt.reset_reg = port(config.reset_port);
    fadt.reset_value = config.reset_value;
    fadt.sleep_control_reg = port(config.sleep_control);
    fadt.sleep_status_reg = port(config.sleep_status);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"ANEMONE\0").into();
    signed(&fadt.finalize())
}

/// MADT (ACPI 6.3, 5.2.12). All CPUs have x2APIC entries, so that one form serves any number of
/// them. The flags are zero: there is no 8259 (PCAT_COMPAT). There are no interrupt source
/// overrides: those correct what an ISA interrupt is taken for, and here each interrupt's
/// trigger mode and polarity stand in its device's resources.
pub(crate) fn madt(config: &AcpiConfig) -> Vec<u8> {
    const X2APIC: u8 = 9;
    const X2APIC_LENGTH: u8 = 16;
    const ENABLED: u32 = 1;

    let mut body = Vec::new();
    body.extend_from_slice(&config.lapic_address.to_le_bytes());
    body.extend_from_slice(&0u32.to_le_bytes());
    for cpu in 0..config.cpus {
        body.extend_from_slice(&[X2APIC, X2APIC_LENGTH, 0, 0]);
        // APIC id, flags, processor UID.
        for field in [cpu, ENABLED, cpu] {
            body.extend_from_slice(&field.to_le_bytes());
        }
    }
    IoApic::new(0, config.ioapic_address, 0).to_aml_bytes(&mut body);
    header(*b"APIC", 5, &body)
}

/// MCFG (PCI Firmware Specification 3.2, 4.1.2).
pub(crate) fn mcfg(config: &AcpiConfig) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(config.ecam_base, 0, 0, crate::dsdt::last_bus(config));
    signed(&mcfg)
}
