//! What this build contains. The only file with conditional compilation.

use anemone_config::{Exposure, Kind, Vm};
use thiserror::Error;

/// An accelerator or a device of this build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its name, in a build configuration and in messages.
    pub name: &'static str,
    /// What it is.
    pub summary: &'static str,
    /// The program that serves it; accelerators are part of the VMM.
    pub program: &'static str,
    /// Whether a VM has it when the configuration does not mention it.
    pub default: bool,
}

/// The accelerators of this build, in the order in which `--accel auto` tries them.
pub const ACCELERATORS: &[Entry] = &[
    #[cfg(feature = "kvm")]
    Entry {
        name: "kvm",
        summary: "Linux KVM",
        program: VMM,
        default: true,
    },
    #[cfg(feature = "soft")]
    Entry {
        name: "soft",
        summary: "a software CPU, for hosts without a usable KVM",
        program: VMM,
        default: true,
    },
    #[cfg(feature = "none")]
    Entry {
        name: "none",
        summary: "no CPU: a test drives the machine over a socket",
        program: VMM,
        default: false,
    },
];

/// The device back ends of this build.
pub const DEVICES: &[Entry] = &[
    #[cfg(feature = "balloon")]
    Entry {
        name: "balloon",
        summary: "virtio memory balloon",
        program: "anemone-balloon",
        default: false,
    },
    #[cfg(feature = "blk")]
    Entry {
        name: "blk",
        summary: "virtio disk on a raw image file or block device",
        program: "anemone-blk",
        default: false,
    },
    #[cfg(feature = "console")]
    Entry {
        name: "console",
        summary: "virtio console on stdio, pty, file or UNIX socket",
        program: "anemone-console",
        default: true,
    },
    #[cfg(feature = "fs")]
    Entry {
        name: "fs",
        summary: "a directory of the host that the guest mounts",
        program: "anemone-fs",
        default: false,
    },
    #[cfg(feature = "pmem")]
    Entry {
        name: "pmem",
        summary: "virtio persistent memory on a file or block device",
        program: "anemone-pmem",
        default: false,
    },
    #[cfg(feature = "net")]
    Entry {
        name: "net",
        summary: "virtio network card on a tap or on passt",
        program: "anemone-net",
        default: false,
    },
    #[cfg(feature = "rng")]
    Entry {
        name: "rng",
        summary: "virtio entropy source",
        program: "anemone-rng",
        default: false,
    },
    #[cfg(feature = "vsock")]
    Entry {
        name: "vsock",
        summary: "sockets between guest and host, UNIX sockets on the host",
        program: "anemone-vsock",
        default: false,
    },
];

/// The parts of the machine that this build has and another may lack.
pub const MACHINE: &[Entry] = &[
    #[cfg(feature = "serial")]
    Entry {
        name: "serial",
        summary: "16550 serial port; its bytes go through the console's program",
        program: VMM,
        default: false,
    },
    #[cfg(feature = "panic-device")]
    Entry {
        name: "panic-device",
        summary: "reports kernel panics",
        program: VMM,
        default: true,
    },
];

/// The program that runs the machine.
pub const VMM: &str = "anemone-vmm";

/// The configuration asks for something that is not in this build.
#[derive(Debug, PartialEq, Eq, Error)]
#[error("the {kind} `{name}` is not in this build, which has: {present}")]
pub struct NotInBuild {
    kind: &'static str,
    name: String,
    present: String,
}

fn find(kind: &'static str, list: &'static [Entry], name: &str) -> Result<Entry, NotInBuild> {
    list.iter()
        .find(|entry| entry.name == name)
        .copied()
        .ok_or_else(|| NotInBuild {
            kind,
            name: name.to_owned(),
            present: names(list),
        })
}

/// The accelerator of that name.
pub fn accelerator(name: &str) -> Result<Entry, NotInBuild> {
    find("accelerator", ACCELERATORS, name)
}

/// The device of that name.
pub fn device(name: &str) -> Result<Entry, NotInBuild> {
    find("device", DEVICES, name)
}

/// The part of the machine of that name.
pub fn machine_part(name: &str) -> Result<Entry, NotInBuild> {
    find("part of the machine", MACHINE, name)
}

/// Whether the build has what the machine is to be made of.
pub fn check_machine(vm: &Vm) -> Result<(), NotInBuild> {
    if vm.serial.is_some() {
        machine_part("serial")?;
    }
    if vm.panic_slot.is_some() {
        machine_part("panic-device")?;
    }
    Ok(())
}

/// The name under which a build lists the back end of a device.
pub fn name_of(kind: &Kind) -> &'static str {
    match kind {
        Kind::Disk { .. } => "blk",
        Kind::Console { .. } => "console",
        Kind::Balloon { .. } => "balloon",
        Kind::Fs(_) => "fs",
        Kind::Pmem { .. } => "pmem",
        Kind::Rng { .. } => "rng",
        Kind::Vsock { .. } => "vsock",
        Kind::Net(_) => "net",
        Kind::External { .. } => "vhost-user",
    }
}

/// What the back end of that name sees of guest memory by default.
pub fn exposure_of(name: &str) -> Exposure {
    match name {
        "balloon" | "console" | "rng" => Exposure::Bounce,
        _ => Exposure::Shared,
    }
}

/// The names of a list, for messages.
pub fn names(list: &[Entry]) -> String {
    if list.is_empty() {
        return "nothing of the kind".to_owned();
    }
    list.iter()
        .map(|entry| entry.name)
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exposure_is_that_of_the_configuration() {
        for kind in [
            Kind::Disk {
                path: None,
                readonly: false,
                serial: None,
            },
            Kind::Console { sink: None },
            Kind::Rng { rate: None },
            Kind::Pmem {
                path: "".into(),
                size: None,
                readonly: false,
            },
        ] {
            assert_eq!(exposure_of(name_of(&kind)), kind.default_exposure());
        }
    }

    #[test]
    fn absent_entries_are_named_with_what_there_is() {
        let error = device("gpu").unwrap_err().to_string();
        assert!(
            error.starts_with("the device `gpu` is not in this build"),
            "{error}"
        );
        assert!(error.ends_with(&names(DEVICES)), "{error}");
    }
}
