//! `anemone check`: the machine that a configuration makes, without running it.

use std::env;
use std::fmt::Write as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anemone_config::{AccelType, Backend, Config, Device, Exposure, Kind, Vm};
use anemone_ipc::vmm::{FromVmm, Summary};
use log::LevelFilter;
use serde::Serialize;

use crate::accel::{Environment, Opened};
use crate::acpi_dump;
use crate::error::{Error, printable, system};
use crate::files;
use crate::net;
use crate::programs::Programs;
use crate::registry;
use crate::sys;
use crate::vmm::Vmm;
use crate::wiring::{BootFiles, PmemFiles, Wiring};

/// Time the VMM may take to build the machine.
const LIMIT: Duration = Duration::from_secs(60);

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    config: &'a Config,
    machine: Option<&'a Summary>,
}

/// Validates the configuration and prints the machine.
pub fn check(
    mut vm: Vm,
    log_level: LevelFilter,
    dump_to: Option<&Path>,
    json: bool,
) -> Result<(), Error> {
    sys::close_on_exec_from(3).map_err(system("close_range"))?;
    let boot = BootFiles::open(&vm)?;
    check_devices(&vm)?;
    let pmem = PmemFiles::open(&vm, false)?;
    // `soft` needs nothing of the host. For other accelerators the one that runs nothing builds the
    // machine; without it, only a run can tell what the machine looks like.
    let accel = match vm.config.accel.kind {
        AccelType::Soft => {
            registry::accelerator("soft")?;
            Some(Opened::Soft)
        }
        _ => None,
    };
    let machine = match (&accel, registry::accelerator("none")) {
        (Some(_), _) | (None, Ok(_)) => Some(build(
            &vm,
            &boot,
            &pmem,
            accel.as_ref(),
            log_level,
            dump_to,
        )?),
        (None, Err(absent)) => {
            log::warn!("{absent}: the machine itself is not shown");
            None
        }
    };
    // The file may be read from anywhere.
    vm.config
        .rebase(&env::current_dir().map_err(system("current folder"))?);
    let text = if json {
        let report = Report {
            config: &vm.config,
            machine: machine.as_ref(),
        };
        serde_json::to_string_pretty(&report).map_err(|e| Error::Failed(e.to_string()))? + "\n"
    } else {
        let mut text = vm
            .config
            .to_toml()
            .map_err(|e| Error::Failed(e.to_string()))?;
        if let Some(machine) = &machine {
            text.push_str(&comments(machine));
        }
        text.push_str(&exposures(&vm.devices));
        text
    };
    print!("{text}");
    Ok(())
}

/// What `run` would find wrong with the devices, locks aside.
fn check_devices(vm: &Vm) -> Result<(), Error> {
    for device in &vm.devices {
        if matches!(device.backend, Backend::Process(None)) {
            registry::device(registry::name_of(&device.kind))?;
        }
        if let Kind::Disk {
            path: Some(path),
            readonly,
            ..
        } = &device.kind
        {
            files::open_image(device.id.as_str(), path, *readonly)?;
        }
        if let Kind::Fs(share) = &device.kind
            && let Some(path) = &share.path
        {
            files::open_share(device.id.as_str(), path, share)?;
        }
        if let Kind::Vsock { socket, .. } = &device.kind {
            files::can_listen(device.id.as_str(), socket)?;
        }
        if let Kind::Net(card) = &device.kind {
            net::check(device.id.as_str(), card, &Programs::new())?;
        }
    }
    if vm.serial.as_ref().is_some_and(|port| port.binary.is_none()) {
        registry::device("console")?;
    }
    Ok(())
}

/// Lets a VMM build the machine, and ends it.
fn build(
    vm: &Vm,
    boot: &BootFiles,
    pmem: &PmemFiles,
    accel: Option<&Opened>,
    log_level: LevelFilter,
    dump_to: Option<&Path>,
) -> Result<Summary, Error> {
    let programs = Programs::new();
    let path = programs.find(registry::VMM, None)?;
    let mut vmm = Vmm::start(
        &path,
        Environment {
            programs: &programs,
            sandbox: vm.config.sandbox,
            log_level,
            groups: None,
        },
        accel,
        vm.config.cpus.count.get(),
        &[],
    )?;
    let dump = match dump_to {
        Some(_) => Some(sys::memfd("acpi-tables", 0).map_err(system("memfd_create"))?),
        None => None,
    };
    let (serial, _far_end) = UnixStream::pair().map_err(system("socketpair"))?;
    Wiring {
        vm,
        boot,
        pmem,
        accel,
        sockets: None,
        serial: vm.serial.as_ref().map(|_| &serial),
        acpi_dump: dump.as_ref(),
    }
    .send(&vmm.channel)?;
    let deadline = Instant::now() + LIMIT;
    let summary = loop {
        match vmm.channel.recv::<FromVmm>() {
            Ok(received) => match received.message {
                FromVmm::Ready(summary) => break summary,
                FromVmm::Refused { message } => return Err(Error::Refused(printable(&message))),
                other @ (FromVmm::Event(_) | FromVmm::Devices(_)) => {
                    return Err(Error::Failed(printable(&format!("unexpected: {other:?}"))));
                }
            },
            Err(error) if error.is_would_block() => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    let name = vmm.process.name();
                    return Err(Error::Failed(format!("{name}, did not build the machine")));
                }
                let mut ready = [sys::readable(vmm.channel.as_fd())];
                sys::poll(&mut ready, Some(left)).map_err(system("poll"))?;
            }
            Err(anemone_ipc::Error::Closed) => return Err(vmm.failure()),
            Err(error) => return Err(error.into()),
        }
    };
    if let (Some(folder), Some(dump)) = (dump_to, dump) {
        acpi_dump::write(dump, folder)?;
    }
    Ok(summary)
}

/// The machine as comments, so that the whole is a configuration file.
fn comments(machine: &Summary) -> String {
    let mut text = format!("\n# Boot: {}\n#\n# Memory map\n", printable(&machine.boot));
    // Writing to a string cannot fail.
    for (start, length, what) in &machine.memory_map {
        let last = start.saturating_add(length.saturating_sub(1));
        let what = printable(what);
        let _ = writeln!(text, "#   {start:#014x} to {last:#014x}  {what}");
    }
    text.push_str("#\n# I/O ports\n");
    for (first, count, what) in &machine.ports {
        let last = first.saturating_add(count.saturating_sub(1));
        let what = printable(what);
        let _ = writeln!(text, "#   {first:#06x} to {last:#06x}  {what}");
    }
    text.push_str("#\n# PCI bus 0\n");
    for (slot, ids, name) in &machine.pci {
        let (ids, name) = (printable(ids), printable(name));
        let _ = writeln!(text, "#   slot {slot:2}  {ids}  {name}");
    }
    text
}

/// What each back end sees of guest memory.
fn exposures(devices: &[Device]) -> String {
    let mut text = "#\n# Guest memory that the back ends see\n".to_owned();
    for device in devices {
        let what = match device.memory {
            Exposure::Shared => "all of it (shared)".to_owned(),
            Exposure::Bounce => format!(
                "none (bounce): requests are copied through a region of {} KiB",
                device.bounce_region() >> 10
            ),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "#   {:<10} {what}", device.id.as_str());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_shown_in_comments_only() {
        let machine = Summary {
            boot: "ELF\ninjected = true".to_owned(),
            memory_map: vec![
                (0, 0x10_0000, "RAM".to_owned()),
                (u64::MAX, 2, "end".to_owned()),
            ],
            ports: vec![(0x600, 3, "power".to_owned())],
            pci: vec![(8, "1af4:1042".to_owned(), "disk0".to_owned())],
            landlock: 0,
        };
        let text = comments(&machine);
        assert!(
            text.lines()
                .all(|line| line.is_empty() || line.starts_with('#')),
            "{text}"
        );
        assert!(
            text.contains("0x000000000000 to 0x0000000fffff  RAM"),
            "{text}"
        );
        assert!(text.contains("0x0600 to 0x0602  power"), "{text}");
        assert!(text.contains("slot  8  1af4:1042  disk0"), "{text}");
    }

    #[test]
    fn exposure_of_each_device_is_shown() {
        let config = "kernel = \"k\"\ndisk = [\"a.img\"]";
        let config = Config::from_toml(config, Path::new("test")).unwrap();
        let text = exposures(&config.resolve().unwrap().devices);
        assert!(
            text.contains(
                "#   console    none (bounce): requests are copied through a region of 2064 KiB\n"
            ),
            "{text}"
        );
        assert!(
            text.contains("#   disk0      all of it (shared)\n"),
            "{text}"
        );
    }
}
