//! `xtask footprint`: the size of everything, counted. docs/testing.md says how.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bench::{of_family, ours};
use crate::build::{self, Binaries, Config};
use crate::doctor::Doctor;
use crate::source::{self, Lines};
use crate::table::{Table, publish};
use crate::{elf, sh};

/// Builds a configuration and prints its tables.
pub fn run(config: &Path) -> Result<()> {
    let product = build::build(config, true)?;
    let config = Config::read(config)?;
    let mut tables = vec![binaries(&product, &config)?];
    if Path::new("/dev/kvm").exists() && sh::is_root() {
        for devices in [0, 1, 3] {
            tables.push(running(&product, devices)?);
        }
    } else {
        sh::progress("the tables of running VMs need /dev/kvm and root");
    }
    publish("footprint", &tables)
}

fn binaries(product: &Binaries, config: &Config) -> Result<Table> {
    let mut table = Table::new(
        "Binaries: bytes; crates of the normal dependency graph; lines and unsafe blocks of our \
         own crates in it, without tests; system calls allowed per policy",
        &[
            "binary",
            "stripped",
            "text",
            "shared libs",
            "crates",
            "own lines",
            "unsafe",
            "system calls",
        ],
    );
    let doctor = Doctor::ask(product)?;
    for (name, path) in product.iter() {
        let image = elf::Image::read(&path)?;
        let graph = Graph::of(name, config)?;
        let mut lines = Lines::default();
        for folder in &graph.own {
            lines += source::count(folder)?;
        }
        table.row(vec![
            name.into(),
            fs::metadata(&path)?.len().into(),
            image.text.into(),
            image.needed.len().into(),
            graph.external.into(),
            lines.code.into(),
            lines.unsafe_blocks.into(),
            doctor.system_calls(name).into(),
        ]);
        ensure!(
            image.needed.is_empty(),
            "{name} loads shared libraries: {}",
            image.needed.join(", ")
        );
    }
    Ok(table)
}

/// The crates that a binary is made of.
struct Graph {
    /// Number of crates of other people.
    external: usize,
    /// Folders of our own crates.
    own: Vec<PathBuf>,
}

impl Graph {
    fn of(package: &str, config: &Config) -> Result<Self> {
        let prefix = format!("{package}/");
        let features: Vec<String> = config
            .features()
            .into_iter()
            .filter_map(|f| f.strip_prefix(&prefix).map(str::to_string))
            .collect();
        let output = sh::quiet(
            build::cargo()
                .args([
                    "tree",
                    "--edges",
                    "normal",
                    "--prefix",
                    "none",
                    "--no-dedupe",
                ])
                .args(["--no-default-features", "--package", package])
                .args(["--features", &features.join(",")]),
        )?;
        // NAME vVERSION [(FOLDER)] [(proc-macro)]. Procedural macros run in the compiler only.
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut external = BTreeSet::new();
        let mut own = BTreeSet::new();
        for line in text
            .lines()
            .filter(|l| !l.is_empty() && !l.contains("(proc-macro)"))
        {
            match line.split_once(" (/") {
                Some((_, folder)) => {
                    own.insert(PathBuf::from(format!("/{}", folder.trim_end_matches(')'))));
                }
                None => {
                    external.insert(line.to_string());
                }
            }
        }
        Ok(Self {
            external: external.len(),
            own: own.into_iter().collect(),
        })
    }
}

/// A VM that only halts, process by process.
fn running(product: &Binaries, devices: usize) -> Result<Table> {
    let vmm = ours(product, devices, 0)?;
    let mut table = Table::new(
        &format!("Idle 512 MiB VM, {devices} device processes (KiB, guest memory excluded)"),
        &["process", "threads", "RSS", "PSS", "USS"],
    );
    let child = vmm.spawn()?;
    thread::sleep(Duration::from_secs(1));
    let mut sums = [0u64; 4];
    let family = of_family(child.0.id(), 512)?;
    for (process, used) in &family {
        let threads = fs::read_dir(format!("/proc/{}/task", process.pid))
            .context("a process of the VM has ended")?
            .count() as u64;
        let row = [threads, used.rss, used.pss, used.uss];
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += value;
        }
        let mut cells: Vec<Value> = vec![process.program.clone().into()];
        cells.extend(row.map(Value::from));
        table.row(cells);
    }
    let mut cells: Vec<Value> = vec![format!("{} processes", family.len()).into()];
    cells.extend(sums.map(Value::from));
    table.row(cells);
    Ok(table)
}
