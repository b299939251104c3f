//! `anemone devices`: what this build contains.

use anemone_config::{CpuModel, Machine};
use serde::Serialize;

use crate::error::Error;
use crate::programs::Programs;
use crate::registry::{self, Entry};

/// The I/O ports that `virt-1` decodes. A machine version never changes, so neither do they.
const PORTS: &[(u16, u16, &str)] = &[
    (0x600, 0x600, "sleep control"),
    (0x601, 0x601, "sleep status"),
    (0x602, 0x602, "reset"),
    (0x608, 0x60B, "event word"),
    (0xCF8, 0xCFF, "PCI configuration"),
    (0x3F8, 0x3FF, "16550, only with `serial`"),
];

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    version: &'static str,
    accelerators: Vec<Part>,
    devices: Vec<Part>,
    machine_parts: Vec<Part>,
    machines: Vec<MachineReport>,
    cpu_models: &'static [&'static str],
}

#[derive(Serialize)]
struct MachineReport {
    name: &'static str,
    ports: Vec<PortReport>,
}

#[derive(Serialize)]
struct PortReport {
    first: u16,
    last: u16,
    what: &'static str,
}

/// An accelerator or device.
#[derive(Serialize)]
struct Part {
    name: &'static str,
    summary: &'static str,
    program: &'static str,
    /// Where the program is, if it is installed.
    path: Option<String>,
    /// Whether a VM has it by default.
    default: bool,
    /// What the process of a device sees of guest memory by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<String>,
}

/// Prints the content of the build.
pub fn print(json: bool) -> Result<(), Error> {
    let programs = Programs::new();
    let part = |entry: &Entry| Part {
        name: entry.name,
        summary: entry.summary,
        program: entry.program,
        path: programs
            .find(entry.program, None)
            .ok()
            .map(|path| path.display().to_string()),
        default: entry.default,
        memory: None,
    };
    let device = |entry: &Entry| Part {
        memory: Some(registry::exposure_of(entry.name).to_string()),
        ..part(entry)
    };
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        accelerators: registry::ACCELERATORS.iter().map(part).collect(),
        devices: registry::DEVICES.iter().map(device).collect(),
        machine_parts: registry::MACHINE.iter().map(part).collect(),
        machines: Machine::WORDS
            .iter()
            .map(|name| MachineReport {
                name,
                ports: PORTS
                    .iter()
                    .map(|&(first, last, what)| PortReport { first, last, what })
                    .collect(),
            })
            .collect(),
        cpu_models: CpuModel::WORDS,
    };
    let text = if json {
        serde_json::to_string_pretty(&report).map_err(|e| Error::Failed(e.to_string()))? + "\n"
    } else {
        report.text()
    };
    print!("{text}");
    Ok(())
}

impl Report {
    fn text(&self) -> String {
        let mut text = format!("anemone {}\n", self.version);
        for (title, parts) in [
            ("Accelerators", &self.accelerators),
            ("Devices", &self.devices),
            ("Parts of the machine", &self.machine_parts),
        ] {
            text += &format!("\n{title} (* what a VM has by default)\n");
            if parts.is_empty() {
                text += "    none\n";
            }
            for part in parts {
                let mark = if part.default { '*' } else { ' ' };
                let (name, summary) = (part.name, part.summary);
                text += &format!("  {mark} {name:<13}{summary}");
                if let Some(memory) = &part.memory {
                    text += &format!("; memory={memory}");
                }
                text += "\n";
                if part.path.is_none() {
                    text += &format!("                 {} is not installed\n", part.program);
                }
            }
        }
        for machine in &self.machines {
            text += &format!("\nMachine {}, its I/O ports\n", machine.name);
            for port in &machine.ports {
                text += &format!(
                    "  {:#05x} to {:#05x}  {}\n",
                    port.first, port.last, port.what
                );
            }
        }
        text += &format!("\nCPU models: {}\n", self.cpu_models.join(", "));
        text
    }
}
