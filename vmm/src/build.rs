//! From a configuration to a machine that is ready to run.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use anemone_accel_api::{Vcpu, Vm};
use anemone_acpi::AcpiConfig;
use anemone_boot::{BootRequest, RangeKind};
use anemone_ipc::vmm::{Device, Summary, ToVmm, VmConfig};
use anemone_ipc::{Received, VERSION};
use anemone_virt::{Board, map};
use anemone_virtio::{Bounce, Connected, Layout, QUEUE_SIZE, VirtioPci, WorkQueue};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::device::{Running, Starting};
use crate::error::Error;
use crate::pmem::{self, Pmem};
use crate::run::Happenings;
use crate::threads::Threads;
use crate::{accel, memory};

/// Local APIC base register: enabled, and this is the boot processor (SDM volume 3, 11.4.4).
const APIC_BASE: u64 = map::LAPIC_BASE | 1 << 11 | 1 << 8;

/// A machine, complete and not yet running.
pub struct Machine {
    pub board: Arc<Board>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub happenings: Arc<Happenings>,
    pub summary: Summary,
    /// The virtio devices that have a back end.
    pub devices: Vec<Running>,
    #[cfg(feature = "serial")]
    pub serial: Option<crate::serial::Pump>,
    pub pmem: Vec<Pmem>,
    /// The VM's memory slots point into this.
    _ram: GuestMemoryMmap,
}

/// Builds the machine. Everything that can be wrong with a configuration shows here.
pub fn build(
    config: &VmConfig,
    received: &mut Received<ToVmm>,
    prepared: accel::Prepared,
    threads: &mut Threads,
    landlock: u32,
) -> Result<Machine, Error> {
    if config.version != VERSION {
        return Err(Error::Protocol(
            "supervisor and anemone-vmm are of different releases",
        ));
    }
    if config.machine != map::NAME {
        return Err(Error::Config(format!(
            "machine `{}` is unknown; this build has `{}`",
            config.machine,
            map::NAME
        )));
    }
    if !(1..=map::CPUS_MAX).contains(&config.cpus) {
        return Err(Error::Config(format!(
            "{} CPUs: {} machines have 1 to {}",
            config.cpus,
            map::NAME,
            map::CPUS_MAX
        )));
    }
    let happenings = Arc::new(Happenings::new().map_err(Error::os("eventfd"))?);
    let vm = accel::create(config, received, prepared, &happenings, threads)?;
    let memory_fd = received.take(config.memory_fd)?;
    let ram = memory::map_ram(&memory_fd, config.memory)?;
    memory::map_slots(&*vm, &ram)?;
    let pmem = pmem::map(config, received, &*vm)?;
    if !pmem.is_empty() {
        pmem::install(happenings.wake())?;
    }
    let shared = Arc::new(memory::shared_ram(&memory_fd, config.memory, ram.clone())?);

    // The back ends answer while the kernel is being loaded.
    let starting = config
        .devices
        .iter()
        .map(|device| {
            let Some(index) = device.socket else {
                return Ok(None);
            };
            let socket = received.take(index)?.into();
            let bounce = bounce(device, received, &ram)?;
            let (shared, happenings) = (shared.clone(), happenings.clone());
            Starting::begin(device, socket, shared, bounce, happenings, threads).map(Some)
        })
        .collect::<Result<Vec<_>, Error>>()?;

    #[allow(unused_mut, reason = "changed only in builds with a UART")]
    let mut board = Board::new(vm.clone(), happenings.clone());
    #[cfg(feature = "serial")]
    let serial = match config.serial {
        Some(index) => {
            let socket = received.take(index)?.into();
            Some(crate::serial::Pump::new(&mut board, socket)?)
        }
        None => None,
    };
    #[cfg(not(feature = "serial"))]
    if config.serial.is_some() {
        return Err(Error::Config(
            "this build of anemone-vmm has no UART".into(),
        ));
    }
    let board = Arc::new(board);
    let mut pci = vec![(0, "8086:1237".to_owned(), "host bridge".to_owned())];
    if let Some(slot) = config.panic_device {
        add_panic_device(&board, slot, &happenings)?;
        pci.push((slot, "1b36:0011".to_owned(), "guest panic event".to_owned()));
    }

    let kernel = File::from(received.take(config.kernel)?);
    let initrd = config
        .initrd
        .map(|i| received.take(i))
        .transpose()?
        .map(File::from);
    let tables = load_tables(&ram, config)?;
    if let Some(index) = config.acpi_dump {
        let mut dump = File::from(received.take(index)?);
        for (_, range) in &tables.tables {
            dump.write_all(&tables.blob[range.clone()])
                .map_err(Error::os("ACPI dump"))?;
        }
    }
    ram.write_slice(&map::RESET_CODE, GuestAddress(map::RESET_VECTOR))
        .map_err(|e| Error::Config(format!("the reset vector does not fit into memory: {e}")))?;
    let entry = anemone_boot::load(
        &ram,
        &BootRequest {
            kernel: &kernel,
            initrd: initrd.as_ref(),
            cmdline: &config.cmdline,
            memory_map: &memory::memory_map(config.memory),
            rsdp: tables.rsdp,
            low_ram_end: map::split_ram(config.memory).0,
        },
    )?;

    let mut devices = Vec::new();
    for (device, starting) in config.devices.iter().zip(starting) {
        let (connected, work, go) = match starting {
            Some(starting) => {
                let work = starting.work.clone();
                let (connected, go) = starting.finish()?;
                (connected, work, Some(go))
            }
            None => (absent(device), new_work()?, None),
        };
        let mut connected = connected;
        if let Some(config) = &device.config {
            connected.config.clone_from(config);
        }
        if let Some(pmem) = pmem.iter().find(|pmem| pmem.slot == device.slot) {
            connected.config = pmem.config();
        }
        let function = add_device(&board, &vm, device, connected, &shared, work.clone())?;
        let id = format!("1af4:{:04x}", 0x1040 + device.device_type);
        pci.push((device.slot, id, device.id.clone()));
        if let Some(go) = go {
            devices.push(Running {
                id: device.id.clone(),
                work,
                function: function.clone(),
            });
            // A thread that is gone has already told why.
            let _ = go.send(function);
        }
    }
    pci.sort();

    let mut vcpus = (0..config.cpus)
        .map(|index| vm.create_vcpu(index, config.cpus))
        .collect::<Result<Vec<_>, _>>()?;
    let mut sregs = entry.sregs;
    sregs.apic_base = APIC_BASE;
    if let Some(first) = vcpus.first_mut() {
        first.set_registers(&entry.regs, &sregs)?;
    }
    let summary = Summary {
        boot: entry.description,
        memory_map: described_map(config.memory, &pmem),
        ports: board
            .ports()
            .into_iter()
            .map(|(p, n, what)| (p, n, what.to_owned()))
            .collect(),
        pci,
        landlock,
    };
    Ok(Machine {
        board,
        vcpus,
        happenings,
        summary,
        devices,
        #[cfg(feature = "serial")]
        serial,
        pmem,
        _ram: ram,
    })
}

fn new_work() -> Result<Arc<WorkQueue>, Error> {
    Ok(Arc::new(WorkQueue::new().map_err(Error::os("eventfd"))?))
}

/// What stands between guest memory and a back end that must not see it.
fn bounce(
    device: &Device,
    received: &mut Received<ToVmm>,
    ram: &GuestMemoryMmap,
) -> Result<Option<Bounce>, Error> {
    let Some((fd, size)) = device.bounce.as_ref().and_then(|b| Some((b.fd?, b.size))) else {
        return Ok(None);
    };
    let region = received.take(fd)?;
    let length = File::from(
        region
            .try_clone()
            .map_err(Error::os("dup of a bounce region"))?,
    )
    .metadata()
    .map_err(Error::os("fstat of a bounce region"))?
    .len();
    if length < size {
        return Err(Error::Protocol(
            "a bounce region is shorter than configured",
        ));
    }
    Bounce::new(device.device_type, device.queues, region, size, ram.clone())
        .map(Some)
        .map_err(|e| Error::Config(format!("device `{}`: {e}", device.id)))
}

/// What a device offers when nobody serves it, for a check.
fn absent(device: &Device) -> Connected {
    Connected {
        features: 0,
        queues: device.queues,
        config: vec![0; device.config_size.into()],
    }
}

fn add_device(
    board: &Board,
    vm: &Arc<dyn Vm>,
    device: &Device,
    connected: Connected,
    ram: &Arc<anemone_virtio::GuestRam>,
    work: Arc<WorkQueue>,
) -> Result<Arc<VirtioPci>, Error> {
    // One vector per queue and one for configuration changes.
    let limit = map::MSI_ROUTES_PER_SLOT as u16 - 1;
    let given = device.config.as_ref().map_or(0, Vec::len);
    let config_size = given.max(device.config_size.into());
    let fits = device.queue_size.is_power_of_two() && device.queue_size <= QUEUE_SIZE;
    if device.queues == 0 || device.queues > limit || config_size > 256 || !fits {
        return Err(Error::Config(format!(
            "device `{}`: {} queues of {} and {config_size} bytes of configuration; allowed are 1 to \
             {limit}, a power of two up to {QUEUE_SIZE}, and at most 256",
            device.id, device.queues, device.queue_size
        )));
    }
    let layout = Layout {
        id: device.id.clone(),
        device_type: device.device_type,
        bar: map::slot_bar_base(device.slot),
        first_route: map::slot_first_route(device.slot),
        queues: connected.queues,
        queue_size: device.queue_size,
        features: connected.features,
        config: connected.config,
    };
    let function = VirtioPci::new(layout, vm.clone(), ram.clone(), work)
        .map(Arc::new)
        .map_err(Error::os("eventfd"))?;
    insert(board, device.slot, &device.id, function.clone())?;
    Ok(function)
}

fn insert(
    board: &Board,
    slot: u8,
    id: &str,
    function: Arc<dyn anemone_virt::PciFunction>,
) -> Result<(), Error> {
    if board.pci.insert(slot.into(), function) {
        Ok(())
    } else {
        Err(Error::Config(format!(
            "device `{id}`: PCI slot {slot} is taken or not one of 1 to 31"
        )))
    }
}

#[cfg(feature = "panic-device")]
fn add_panic_device(board: &Board, slot: u8, to: &Arc<Happenings>) -> Result<(), Error> {
    let device = anemone_virt::PanicDevice::new(slot, to.clone());
    insert(board, slot, "panic", Arc::new(device))
}

#[cfg(not(feature = "panic-device"))]
fn add_panic_device(_: &Board, _: u8, _: &Arc<Happenings>) -> Result<(), Error> {
    Err(Error::Config(
        "this build of anemone-vmm has no guest-panic device".into(),
    ))
}

/// Writes the ACPI tables to guest memory.
fn load_tables(ram: &GuestMemoryMmap, config: &VmConfig) -> Result<anemone_acpi::Tables, Error> {
    let (low_ram, high) = map::split_ram(config.memory);
    let acpi = AcpiConfig {
        cpus: config.cpus,
        ecam_base: map::ECAM_BASE,
        ecam_buses: map::ECAM_BUSES,
        mmio32: (map::PCI32_BASE, map::PCI32_SIZE),
        mmio64: (map::pci64_base(config.memory), map::PCI64_SIZE),
        low_ram,
        high_ram: (map::HIGH_RAM_BASE, high),
        ged_gsi: map::GED_GSI.into(),
        ged_port: map::GED_EVENTS,
        sleep_control: map::SLEEP_CONTROL,
        sleep_status: map::SLEEP_STATUS,
        reset_port: map::RESET,
        reset_value: map::RESET_VALUE,
        serial: config.serial.map(|_| (map::SERIAL, map::SERIAL_GSI.into())),
        ioapic_address: map::IOAPIC_BASE as u32,
        lapic_address: map::LAPIC_BASE as u32,
    };
    let (address, room) = map::ACPI_TABLES;
    let tables = anemone_acpi::build(&acpi, address);
    let end = tables.address + tables.blob.len() as u64;
    if end > address + room {
        return Err(Error::Config(format!(
            "the ACPI tables need {} bytes; the machine has room for {room}",
            tables.blob.len()
        )));
    }
    ram.write_slice(&tables.blob, GuestAddress(tables.address))
        .map_err(|e| Error::Config(format!("the ACPI tables do not fit into memory: {e}")))?;
    Ok(tables)
}

fn described_map(memory: u64, pmem: &[Pmem]) -> Vec<(u64, u64, String)> {
    let mut ranges: Vec<_> = memory::memory_map(memory)
        .into_iter()
        .map(|r| {
            let what = match r.kind {
                RangeKind::Ram => "RAM",
                RangeKind::Acpi => "RAM with ACPI tables",
                RangeKind::Reserved if r.start == map::ECAM_BASE => "PCI configuration (ECAM)",
                RangeKind::Reserved => "reset vector",
            };
            (r.start, r.size, what.to_owned())
        })
        .collect();
    ranges.extend([
        (
            map::PCI32_BASE,
            map::PCI32_SIZE,
            "PCI memory, 32-bit".to_owned(),
        ),
        (map::IOAPIC_BASE, map::IOAPIC_SIZE, "I/O APIC".to_owned()),
        (map::LAPIC_BASE, 0x1000, "local APIC".to_owned()),
        (
            map::pci64_base(memory),
            map::PCI64_SIZE,
            "PCI memory, 64-bit".to_owned(),
        ),
    ]);
    ranges.extend(pmem.iter().map(|pmem| {
        let what = format!("persistent memory `{}`", pmem.id);
        (pmem.start, pmem.size, what)
    }));
    ranges.sort();
    ranges
}
