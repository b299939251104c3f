//! ACPI tables as `anemone check --dump-acpi` writes them, through the reference implementation:
//! `iasl` takes each apart, and its compiler must accept the result without a warning.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::packages::Packages;
use crate::report::Outcome;
use crate::{sh, tiny};

use super::Context;

/// Machines whose tables differ.
const MACHINES: &[(&str, &[&str])] = &[
    ("plain", &[]),
    ("cpus-64", &["--cpus", "64"]),
    ("memory-4G", &["--memory", "4G", "--cpus", "3"]),
    (
        "serial",
        &["--serial", "file=/dev/null", "--console", "none"],
    ),
    ("no-panic-device", &["--panic-device", "off", "--rng"]),
];

pub fn run(context: &Context, _: &[String]) -> Result<Vec<Outcome>> {
    let packages = context.packages()?;
    let product = context.product()?;
    let kernel = tiny::kernel()?;
    let mut outcomes = Vec::new();
    for (name, arguments) in MACHINES {
        let folder = sh::fresh_dir(&format!("iasl/{name}"))?;
        let mut command = product.command("anemone");
        command
            .args(["check", "--accel", "none", "--kernel"])
            .arg(&kernel)
            .arg("--dump-acpi")
            .arg(&folder)
            .args(*arguments);
        let dumped = sh::run_limited(&mut command, Duration::from_secs(30)).and_then(|done| {
            ensure!(
                done.code() == Some(0),
                "anemone check failed:\n{}",
                done.output
            );
            tables(&folder)
        });
        match dumped {
            Err(error) => outcomes.push(Outcome::of(name, Err(error))),
            Ok(tables) => outcomes.extend(tables.iter().map(|table| {
                let file = table.file_stem().unwrap_or_default().to_string_lossy();
                Outcome::of(&format!("{name} {file}"), accepted(packages, table))
            })),
        }
    }
    Ok(outcomes)
}

fn tables(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder)?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<std::io::Result<_>>()?;
    found.sort();
    for wanted in ["DSDT", "FADT|FACP", "MADT|APIC", "MCFG", "XSDT"] {
        let there = found.iter().any(|path| {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .to_uppercase();
            wanted.split('|').any(|w| name.starts_with(w))
        });
        if !there {
            bail!("no table {wanted} in {}", folder.display());
        }
    }
    // The root pointer is not a table: it has no header that iasl could read.
    found.retain(|path| !path.to_string_lossy().to_uppercase().contains("RSDP"));
    Ok(found)
}

/// Takes a table apart and compiles the result.
fn accepted(packages: &Packages, table: &Path) -> Result<()> {
    let source = table.with_extension("dsl");
    let apart = sh::quiet(packages.tool("iasl")?.arg("-d").arg(table))?;
    let said = String::from_utf8_lossy(&apart.stderr).into_owned()
        + &String::from_utf8_lossy(&apart.stdout);
    for word in ["Warning", "Error", "Invalid", "checksum"] {
        ensure!(!said.contains(word), "iasl -d: {said}");
    }
    ensure!(source.exists(), "iasl -d has written nothing: {said}");

    let again = table.with_extension("again");
    let compiled = sh::quiet(packages.tool("iasl")?.arg("-p").arg(&again).arg(&source))
        .context("iasl does not compile what it took apart")?;
    let said = String::from_utf8_lossy(&compiled.stdout);
    // A data table has no code and hence no such line; its compiler fails on an error.
    if let Some(line) = said.lines().find(|line| line.contains("Errors")) {
        ensure!(
            line.contains(" 0 Errors") && line.contains(" 0 Warnings"),
            "iasl: {line}\n{said}"
        );
    }
    Ok(())
}
