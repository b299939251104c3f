//! `anemone doctor`: what this host offers, and what the processes of a VM may do on it.

use std::fs;

use anemone_config::Sandbox;
use anemone_sandbox::{Layer, State};
use log::LevelFilter;
use serde::Serialize;

use crate::accel::{self, Environment};
use crate::cgroup;
use crate::control;
use crate::error::Error;
use crate::inspect;
use crate::programs::Programs;
use crate::registry;
use crate::sys;

include!(concat!(env!("OUT_DIR"), "/policies.rs"));

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    kernel: String,
    accelerators: Vec<Finding>,
    jail: Vec<Finding>,
    landlock_abi: u32,
    host: Vec<Finding>,
    programs: Vec<Finding>,
    policies: Vec<PolicyReport>,
}

/// One thing looked at.
#[derive(Serialize)]
struct Finding {
    name: String,
    ok: bool,
    text: String,
}

#[derive(Serialize)]
struct PolicyReport {
    program: &'static str,
    policy: &'static str,
    system_calls: usize,
}

/// Prints the findings. Nothing found wrong is an error: a VM may well run without.
pub fn print(json: bool, policies: bool, log_level: LevelFilter) -> Result<(), Error> {
    if policies {
        for (program, policy, count, text) in POLICIES {
            println!("# {program}, {policy}: {count} system calls\n{text}");
        }
        return Ok(());
    }
    let report = Report::make(log_level);
    let text = if json {
        serde_json::to_string_pretty(&report).map_err(|e| Error::Failed(e.to_string()))? + "\n"
    } else {
        report.text()
    };
    print!("{text}");
    Ok(())
}

/// Prints what the processes of a running VM may touch.
pub fn print_vm(vm: &str, json: bool, reasons: bool) -> Result<(), Error> {
    let report = inspect::Report::of(&control::client::status(vm)?)?;
    let text = if json {
        serde_json::to_string_pretty(&report).map_err(|e| Error::Failed(e.to_string()))? + "\n"
    } else {
        report.text(reasons)
    };
    print!("{text}");
    Ok(())
}

impl Finding {
    fn new(name: impl Into<String>, result: Result<String, String>) -> Self {
        let ok = result.is_ok();
        let (Ok(text) | Err(text)) = result;
        Self {
            name: name.into(),
            ok,
            text,
        }
    }
}

impl Report {
    fn make(log_level: LevelFilter) -> Self {
        let programs = Programs::new();
        let (jail, landlock_abi) = jail();
        Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map(|text| text.trim().to_owned())
                .unwrap_or_else(|error| error.to_string()),
            accelerators: accelerators(&programs, log_level),
            jail,
            landlock_abi,
            host: host(),
            programs: found(&programs),
            policies: POLICIES
                .iter()
                .map(|&(program, policy, system_calls, _)| PolicyReport {
                    program,
                    policy,
                    system_calls,
                })
                .collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("Linux {}\n", self.kernel);
        for (title, findings) in [
            ("Accelerators", &self.accelerators),
            ("Jail of every process", &self.jail),
            ("Host", &self.host),
            ("Programs", &self.programs),
        ] {
            text += &format!("\n{title}\n");
            for finding in findings {
                let mark = if finding.ok { "ok" } else { "--" };
                text += &format!("  {mark}  {:<20}  {}\n", finding.name, finding.text);
            }
        }
        text += "\nSystem calls allowed (anemone doctor --policies lists them with reasons)\n";
        for policy in &self.policies {
            text += &format!(
                "      {:<20}  {:<8} {:>3}\n",
                policy.program, policy.policy, policy.system_calls
            );
        }
        text
    }
}

fn accelerators(programs: &Programs, log_level: LevelFilter) -> Vec<Finding> {
    let environment = Environment {
        programs,
        sandbox: Sandbox::On,
        log_level,
        groups: None,
    };
    let test = |entry: &registry::Entry| {
        if !entry.default {
            return Ok("always there".to_owned());
        }
        match accel::try_out(entry.name, environment) {
            Ok(Ok(_)) => Ok("runs stock kernels".to_owned()),
            Ok(Err(reason)) => Err(format!("cannot run stock kernels: {reason}")),
            Err(error) => Err(format!("cannot be tested: {error}")),
        }
    };
    registry::ACCELERATORS
        .iter()
        .map(|entry| Finding::new(entry.name, test(entry)))
        .collect()
}

fn jail() -> (Vec<Finding>, u32) {
    let layers = match anemone_sandbox::probe() {
        Ok(layers) => layers,
        Err(error) => return (vec![Finding::new("all layers", Err(error.to_string()))], 0),
    };
    let finding = |layer: Layer| {
        let result = match layers.state(layer) {
            State::Active if layer == Layer::Landlock => {
                Ok(format!("active, ABI {}", layers.landlock_abi()))
            }
            State::Active => Ok("active".to_owned()),
            State::Refused(number) => Err(format!(
                "refused: {}",
                std::io::Error::from_raw_os_error(number)
            )),
            State::NotAsked => Err("not asked for".to_owned()),
        };
        Finding::new(layer.name(), result)
    };
    let findings = Layer::ALL.into_iter().map(finding).collect();
    (findings, layers.landlock_abi())
}

fn host() -> Vec<Finding> {
    let io_uring = sys::probe_io_uring()
        .map(|()| "usable".to_owned())
        .map_err(|error| format!("{error}; disks use pread and pwrite instead"));
    let limit = |resource, unit: &str| {
        let text = |value: Option<u64>| value.map_or("unlimited".to_owned(), |n| n.to_string());
        sys::limit(resource)
            .map(|(soft, hard)| format!("{} (hard limit {}) {unit}", text(soft), text(hard)))
            .map_err(|error| error.to_string())
    };
    vec![
        Finding::new("io_uring", io_uring),
        Finding::new("control group", control_group()),
        Finding::new("open files", limit(libc::RLIMIT_NOFILE, "descriptors")),
        Finding::new("locked memory", limit(libc::RLIMIT_MEMLOCK, "bytes")),
        Finding::new("processes", limit(libc::RLIMIT_NPROC, "per user")),
    ]
}

/// Whether VMs started from here get control groups.
fn control_group() -> Result<String, String> {
    let group = cgroup::delegated().map_err(|why| format!("none for VMs: {why}"))?;
    let there = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
    Ok(format!(
        "{}, controllers: {}",
        group.display(),
        there.trim()
    ))
}

fn found(programs: &Programs) -> Vec<Finding> {
    let mut names = vec![registry::VMM];
    names.extend(registry::DEVICES.iter().map(|entry| entry.program));
    let finding = |name: &str| {
        let path = programs.find(name, None);
        let text = path
            .map(|path| path.display().to_string())
            .map_err(|error| error.to_string());
        Finding::new(name, text)
    };
    names.into_iter().map(finding).collect()
}
