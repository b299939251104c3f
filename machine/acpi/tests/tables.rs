//! The tables as a guest finds them, as `iasl` reads them, and as they were released.

use std::path::Path;
use std::process::{Command, Output};
use std::{env, fs};

use anemone_acpi::{AcpiConfig, Tables, build};

const ADDRESS: u64 = 0x9_0000;

fn config(cpus: u32, serial: bool) -> AcpiConfig {
    AcpiConfig {
        cpus,
        ecam_base: 0xFC00_0000,
        ecam_buses: 32,
        mmio32: (0xC000_0000, 0x3C00_0000),
        mmio64: (0x10_0000_0000, 0x10_0000_0000),
        low_ram: 0x2000_0000,
        high_ram: (1 << 32, 0),
        ged_gsi: 9,
        ged_port: 0x608,
        sleep_control: 0x600,
        sleep_status: 0x601,
        reset_port: 0x602,
        reset_value: 1,
        serial: serial.then_some((0x3F8, 4)),
        ioapic_address: 0xFEC0_0000,
        lapic_address: 0xFEE0_0000,
    }
}

/// Every shape the machine takes.
fn configurations() -> Vec<(String, AcpiConfig)> {
    let mut all = Vec::new();
    for cpus in [1, 4, 64] {
        for serial in [false, true] {
            let suffix = if serial { "-serial" } else { "" };
            all.push((format!("cpus-{cpus}{suffix}"), config(cpus, serial)));
        }
    }
    all
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[offset + i]))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[offset + i]))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The table at a guest-physical address, found by its own length and verified.
fn table_at(tables: &Tables, address: u64) -> &[u8] {
    let start = (address - tables.address) as usize;
    let length = u32_at(&tables.blob, start + 4) as usize;
    let table = &tables.blob[start..start + length];
    assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
    assert_eq!(&table[10..24], b"ANEMONVIRT-1  ");
    assert_eq!(&table[28..32], b"ANEM");
    table
}

/// Follows the pointers from the RSDP as a guest does: FACP, APIC, MCFG, DSDT.
fn walk(tables: &Tables) -> [&[u8]; 4] {
    let rsdp = &tables.blob[(tables.rsdp - tables.address) as usize..][..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!(rsdp[15], 2);
    assert_eq!(sum(&rsdp[..20]), 0);
    assert_eq!(sum(rsdp), 0);
    let xsdt = table_at(tables, u64_at(rsdp, 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    assert_eq!(xsdt.len(), 36 + 3 * 8);
    let [fadt, madt, mcfg] = [0, 1, 2].map(|n| table_at(tables, u64_at(xsdt, 36 + n * 8)));
    let dsdt = table_at(tables, u64_at(fadt, 140));
    let found = [fadt, madt, mcfg, dsdt];
    assert_eq!(
        found.map(|table| &table[..4]),
        [b"FACP", b"APIC", b"MCFG", b"DSDT"]
    );
    found
}

#[test]
fn a_guest_finds_every_table() {
    for (name, config) in configurations() {
        let tables = build(&config, ADDRESS);
        walk(&tables);
        let mut end = 0;
        for (signature, range) in &tables.tables {
            assert!(range.start >= end && range.start % 64 == 0, "{name}");
            assert!(tables.blob[range.clone()].starts_with(signature.as_bytes()));
            end = range.end;
        }
        assert_eq!(end, tables.blob.len());
    }
}

#[test]
fn the_address_changes_pointers_only() {
    let config = config(4, true);
    let low = build(&config, ADDRESS);
    let high = build(&config, 0x1FF0_0000);
    assert_eq!(low.tables, high.tables);
    assert_eq!(high.rsdp, 0x1FF0_0000);
    let [.., low_dsdt] = walk(&low);
    let [.., high_dsdt] = walk(&high);
    assert_eq!(low_dsdt, high_dsdt);
}

/// Offsets of ACPI 6.3, table 5-33.
#[test]
fn the_fadt_describes_hardware_reduced_acpi() {
    let tables = build(&config(1, false), ADDRESS);
    let [fadt, ..] = walk(&tables);
    let register = |offset: usize| {
        assert_eq!(fadt[offset..offset + 4], [1, 8, 0, 1], "one byte of I/O");
        u64_at(fadt, offset + 4)
    };
    assert_eq!((fadt[8], fadt[131]), (6, 3), "version");
    assert_eq!(fadt[109..111], [0x24, 0], "boot architecture");
    let flags = u32_at(fadt, 112);
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    assert_eq!((register(116), fadt[128]), (0x602, 1), "reset");
    assert_eq!((register(244), register(256)), (0x600, 0x601), "sleep");
    assert_eq!(&fadt[268..276], b"ANEMONE\0");
    assert!(fadt[46..109].iter().all(|byte| *byte == 0), "legacy");
    assert!(fadt[148..244].iter().all(|byte| *byte == 0), "fixed blocks");
}

/// Structures of ACPI 6.3, 5.2.12.
#[test]
fn the_madt_lists_the_interrupt_controllers() {
    for cpus in [1, 4, 64, 300] {
        let tables = build(&config(cpus, false), ADDRESS);
        let [_, madt, ..] = walk(&tables);
        assert_eq!(u32_at(madt, 36), 0xFEE0_0000);
        assert_eq!(u32_at(madt, 40), 0, "no 8259");
        let (cpu_entries, rest) = madt[44..].split_at(cpus as usize * 16);
        for (index, entry) in cpu_entries.chunks(16).enumerate() {
            assert_eq!(entry[..4], [9, 16, 0, 0]);
            let id = index as u32;
            assert_eq!([4, 8, 12].map(|at| u32_at(entry, at)), [id, 1, id]);
        }
        assert_eq!(rest.len(), 12);
        assert_eq!(rest[..4], [1, 12, 0, 0]);
        assert_eq!((u32_at(rest, 4), u32_at(rest, 8)), (0xFEC0_0000, 0));
    }
}

#[test]
fn the_mcfg_names_the_configuration_space() {
    for (buses, last) in [(1, 0), (32, 31), (256, 255)] {
        let mut config = config(1, false);
        config.ecam_buses = buses;
        config.ecam_base = 0xE000_0000;
        config.mmio32 = (0xC000_0000, 0x2000_0000);
        let tables = build(&config, ADDRESS);
        let [_, _, mcfg, _] = walk(&tables);
        assert_eq!(mcfg.len(), 60);
        assert_eq!(u64_at(mcfg, 44), 0xE000_0000);
        assert_eq!(mcfg[52..60], [0, 0, 0, last, 0, 0, 0, 0]);
    }
}

/// The tables of a released machine version never change. To accept a change before a release,
/// run the test with `ANEMONE_BLESS=1` and commit the files.
#[test]
fn the_tables_are_the_released_ones() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (name, config) in configurations() {
        let file = directory.join(format!("{name}.hex"));
        let found = hex(&build(&config, ADDRESS));
        if env::var_os("ANEMONE_BLESS").is_some() {
            fs::write(&file, &found).unwrap();
        }
        let released = fs::read_to_string(&file).unwrap();
        let line = found.lines().zip(released.lines()).find(|(a, b)| a != b);
        assert!(
            found == released,
            "{} differs, first in (now, released) {line:?}",
            file.display()
        );
    }
}

/// One line of 32 bytes each, under a line with the table's signature and length.
fn hex(tables: &Tables) -> String {
    let mut text = String::new();
    for (signature, range) in &tables.tables {
        text += &format!("{} {}\n", signature.trim_end(), range.len());
        for line in tables.blob[range.clone()].chunks(32) {
            text.extend(line.iter().map(|byte| format!("{byte:02x}")));
            text += "\n";
        }
    }
    text
}

fn iasl(directory: &Path, arguments: &[&str]) -> (Output, String) {
    let output = Command::new("iasl")
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("iasl must be installed (package acpica-tools)");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output, text)
}

/// `iasl` takes every table apart without an error or warning, and compiles what it made of the
/// DSDT back to the same bytes without a message of any kind.
#[test]
fn iasl_accepts_every_table() {
    for (name, config) in configurations() {
        let tables = build(&config, ADDRESS);
        let directory = tempfile::tempdir().unwrap();
        for (signature, range) in &tables.tables {
            if signature == "RSD PTR " {
                continue;
            }
            let file = format!("{signature}.aml");
            let bytes = &tables.blob[range.clone()];
            fs::write(directory.path().join(&file), bytes).unwrap();
            let (output, text) = iasl(directory.path(), &["-d", &file]);
            let clean = !["error", "warning", "invalid", "unknown"]
                .iter()
                .any(|word| text.to_lowercase().contains(word));
            assert!(output.status.success() && clean, "{name} {file}: {text}");
        }
        let (output, text) = iasl(directory.path(), &["-on", "-p", "again", "DSDT.dsl"]);
        let verdict = "0 Errors, 0 Warnings, 0 Remarks";
        assert!(
            output.status.success() && text.contains(verdict),
            "{name}: {text}"
        );
        let again = fs::read(directory.path().join("again.aml")).unwrap();
        let [.., dsdt] = walk(&tables);
        // The compiler signs its work, and so the header differs. `-on`: names stay as written.
        assert!(again[36..] == dsdt[36..], "{name}: other bytes");
    }
}
