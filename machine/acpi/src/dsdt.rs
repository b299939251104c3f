//! The DSDT: the devices that enumerate themselves in no other way.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path,
    ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use crate::AcpiConfig;

/// Bit of the event word that means "the power button was pressed".
const EVENT_POWER_BUTTON: u8 = 1 << 3;

/// What `Notify` tells of a power button that was pressed (ACPI 6.3, table 5-183).
const BUTTON_PRESSED: u8 = 0x80;

/// Sleep type of S5, soft off.
const SLEEP_TYPE_OFF: u8 = 5;

/// Number of the last bus in the configuration space.
pub(crate) fn last_bus(config: &AcpiConfig) -> u8 {
    u8::try_from(config.ecam_buses.saturating_sub(1)).unwrap_or(u8::MAX)
}

/// The definition block, without its header.
pub(crate) fn body(config: &AcpiConfig) -> Vec<u8> {
    let mut devices = vec![host_bridge(config), motherboard(config), cpus(config)];
    devices.extend(events(config));
    if let Some((port, gsi)) = config.serial {
        devices.push(serial(port, gsi));
    }

    let mut body = Vec::new();
    let devices = devices.iter().map(|d| d as &dyn Aml).collect();
    Scope::new("\\_SB_".into(), devices).to_aml_bytes(&mut body);
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &SLEEP_TYPE_OFF, &ZERO, &ZERO]);
    Name::new("\\_S5_".into(), &off).to_aml_bytes(&mut body);
    body
}

/// A term that is encoded already: terms borrow their parts, and so cannot be returned.
struct Encoded(Vec<u8>);

impl Encoded {
    fn device(name: &str, children: Vec<&dyn Aml>) -> Self {
        Self::term(&Device::new(name.into(), children))
    }

    fn term(term: &dyn Aml) -> Self {
        let mut bytes = Vec::new();
        term.to_aml_bytes(&mut bytes);
        Self(bytes)
    }
}

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn id(name: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(name))
}

fn uid(value: u32) -> Name {
    Name::new("_UID".into(), &value)
}

/// An edge-triggered, active-high input of the I/O APIC that no other device shares. Both
/// sources are events in the machine, not wires that stay up until the guest has looked, so
/// there is no level to hold. The extended descriptor is used because guests believe it: the
/// short ones are taken for ISA interrupts with ISA's own rules.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// The PCI Express root. It has no `_PRT`, because functions have only message-signalled
/// interrupts, and no I/O window, because none has an I/O BAR; the only ports it owns are those
/// of configuration mechanism 1.
fn host_bridge(config: &AcpiConfig) -> Encoded {
    let buses = AddressSpace::new_bus_number(0, u16::from(last_bus(config)));
    let ports = IO::new(0xCF8, 0xCF8, 1, 8);
    let window32 = (config.mmio32.1 > 0).then(|| {
        let (base, size) = config.mmio32;
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            base as u32,
            (base + size - 1) as u32,
            None,
        )
    });
    let window64 = (config.mmio64.1 > 0).then(|| {
        let (base, size) = config.mmio64;
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            base,
            base + size - 1,
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &ports];
    resources.extend(window32.as_ref().map(|window| window as &dyn Aml));
    resources.extend(window64.as_ref().map(|window| window as &dyn Aml));

    Encoded::device(
        "PCI0",
        vec![
            &id("PNP0A08"),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &uid(0),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            &operating_system_capabilities(),
        ],
    )
}

/// `_OSC` of the host bridge (ACPI 6.3, 6.2.11; PCI Firmware Specification 3.2, 4.5.1). The
/// operating system is given control of the PCI Express capability structures. Hot-plug, power
/// management events, error reporting and latency tolerance are refused: no function has them.
fn operating_system_capabilities() -> Encoded {
    const PCIE_CAPABILITY: u8 = 1 << 4;
    const UNKNOWN_UUID: u8 = 1 << 2;
    const UNKNOWN_REVISION: u8 = 1 << 3;
    const MASKED: u8 = 1 << 4;

    let (arg_uuid, arg_revision, arg_words) = (Arg(0), Arg(1), Arg(3));
    let granted = Local(0);
    let status = Path::new("CDW1");
    let control = Path::new("CDW3");
    let pci = Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766");
    Encoded::term(&Method::new(
        "_OSC".into(),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &arg_words, &ZERO),
            &If::new(
                &Equal::new(&arg_uuid, &pci),
                vec![
                    &CreateDWordField::new(&control, &arg_words, &8u8),
                    &If::new(
                        &NotEqual::new(&arg_revision, &ONE),
                        vec![&Or::new(&status, &status, &UNKNOWN_REVISION)],
                    ),
                    &And::new(&granted, &control, &PCIE_CAPABILITY),
                    &If::new(
                        &NotEqual::new(&granted, &control),
                        vec![&Or::new(&status, &status, &MASKED)],
                    ),
                    &Store::new(&control, &granted),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &UNKNOWN_UUID)]),
            &Return::new(&arg_words),
        ],
    ))
}

/// What belongs to the board and to no device: the configuration space (Linux uses it only if a
/// board device claims it) and the ports of the registers that the FADT and the event device name.
fn motherboard(config: &AcpiConfig) -> Encoded {
    let ecam_size = (u32::from(last_bus(config)) + 1) << 20;
    let ecam = Memory32Fixed::new(true, config.ecam_base as u32, ecam_size);
    let port = |port, length| IO::new(port, port, 1, length);
    Encoded::device(
        "MBRD",
        vec![
            &id("PNP0C02"),
            &uid(0),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &ecam,
                    &port(config.sleep_control, 1),
                    &port(config.sleep_status, 1),
                    &port(config.reset_port, 1),
                    &port(config.ged_port, 4),
                ]),
            ),
        ],
    )
}

/// The generic event device (ACPI 6.3, 5.6.9) and what it announces. One read of the event word
/// takes every event that has happened and clears them; an event that comes after it raises the
/// interrupt anew.
fn events(config: &AcpiConfig) -> [Encoded; 2] {
    let word = Path::new("EVTS");
    let taken = Local(0);
    let pressed = And::new(&ZERO, &taken, &EVENT_POWER_BUTTON);
    let source = Encoded::device(
        "GED_",
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &uid(0),
            // The kernel's driver refuses anything but interrupts here.
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&interrupt(config.ged_gsi)]),
            ),
            &OpRegion::new(
                "EREG".into(),
                OpRegionSpace::SystemIO,
                &config.ged_port,
                &4u8,
            ),
            &Field::new(
                "EREG".into(),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 32)],
            ),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Store::new(&taken, &word),
                    &If::new(
                        &pressed,
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &BUTTON_PRESSED)],
                    ),
                ],
            ),
        ],
    );
    let button = Encoded::device("PWRB", vec![&id("PNP0C0C"), &uid(0)]);
    [source, button]
}

/// One device per CPU; its `_UID` is the processor UID of the MADT.
fn cpus(config: &AcpiConfig) -> Encoded {
    let cpus: Vec<Encoded> = (0..config.cpus)
        .map(|index| {
            Encoded::device(
                &format!("C{index:03X}"),
                vec![&Name::new("_HID".into(), &"ACPI0007"), &uid(index)],
            )
        })
        .collect();
    let container = Name::new("_HID".into(), &"ACPI0010");
    let generic = Name::new("_CID".into(), &EISAName::new("PNP0A05"));
    let mut children: Vec<&dyn Aml> = vec![&container, &generic];
    children.extend(cpus.iter().map(|cpu| cpu as &dyn Aml));
    Encoded::device("CPUS", children)
}

/// The 16550.
fn serial(port: u16, gsi: u32) -> Encoded {
    Encoded::device(
        "COM1",
        vec![
            &id("PNP0501"),
            &uid(0),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, 8), &interrupt(gsi)]),
            ),
        ],
    )
}
