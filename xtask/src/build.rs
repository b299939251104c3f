//! Building the product from a build configuration: what is not listed is not compiled.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::sh;

/// Target of `.cargo/config.toml`, which decides where cargo puts what it builds.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const ACCELERATORS: &[&str] = &["kvm", "soft", "none"];
const DEVICES: &[&str] = &[
    "balloon", "blk", "console", "fs", "net", "pmem", "rng", "vsock",
];
const MACHINE: &[&str] = &["serial", "panic-device"];

/// A file of `configs/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Accelerators of supervisor and VMM.
    pub accelerators: Vec<String>,
    /// Device processes; each is a package of its own.
    pub devices: Vec<String>,
    /// Optional parts of the machine.
    pub machine: Vec<String>,
}

impl Config {
    /// Reads a file and checks every word in it.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let config: Self = toml::from_str(&text).with_context(|| path.display().to_string())?;
        for (key, words, allowed) in [
            ("accelerators", &config.accelerators, ACCELERATORS),
            ("devices", &config.devices, DEVICES),
            ("machine", &config.machine, MACHINE),
        ] {
            for word in words {
                ensure!(
                    allowed.contains(&word.as_str()),
                    "{}: {key}: unknown \"{word}\"; there are {}",
                    path.display(),
                    allowed.join(", ")
                );
            }
        }
        Ok(config)
    }

    /// Packages with a binary of their own.
    pub fn packages(&self) -> Vec<String> {
        let devices = self.devices.iter().map(|d| format!("anemone-{d}"));
        ["anemone".to_string(), "anemone-vmm".to_string()]
            .into_iter()
            .chain(devices)
            .collect()
    }

    /// Their binaries: each has one of its own name, and that of the network card another.
    fn binaries(&self) -> Vec<String> {
        let mut names = self.packages();
        if self.devices.iter().any(|device| device == "net") {
            names.push("anemone-passt".to_string());
        }
        names
    }

    /// Features of those packages, in cargo's `package/feature` form.
    pub fn features(&self) -> Vec<String> {
        let both = self.accelerators.iter().flat_map(|accelerator| {
            ["anemone", "anemone-vmm"].map(|package| format!("{package}/{accelerator}"))
        });
        let devices = self.devices.iter().map(|d| format!("anemone/{d}"));
        let machine = self
            .machine
            .iter()
            .flat_map(|part| ["anemone", "anemone-vmm"].map(|package| format!("{package}/{part}")));
        both.chain(devices).chain(machine).collect()
    }
}

/// The binaries of one build, side by side in a folder.
#[derive(Debug, Clone)]
pub struct Binaries {
    folder: PathBuf,
    names: Vec<String>,
}

impl Binaries {
    /// Path of one binary.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Names and paths.
    pub fn iter(&self) -> impl Iterator<Item = (&str, PathBuf)> {
        self.names
            .iter()
            .map(|name| (name.as_str(), self.path(name)))
    }

    /// A command that runs one of them.
    pub fn command(&self, name: &str) -> Command {
        Command::new(self.path(name))
    }
}

/// Builds what a configuration lists and copies it to `build/out/NAME`.
pub fn build(path: &Path, release: bool) -> Result<Binaries> {
    let config = Config::read(path)?;
    let name = path.file_stem().context("the configuration has no name")?;
    let name = name.to_string_lossy();
    let profile = if release { "release" } else { "debug" };
    sh::progress(format_args!("building configuration {name} ({profile})"));
    let packages = config.packages();
    let mut command = cargo();
    command.args(["build", "--no-default-features", "--bins"]);
    if release {
        command.arg("--release");
    }
    for package in &packages {
        command.args(["--package", package]);
    }
    command.arg("--features").arg(config.features().join(","));
    sh::run(&mut command)?;

    let folder = sh::build_dir("out").join(match release {
        true => name.to_string(),
        false => format!("{name}-debug"),
    });
    sh::fresh(&folder)?;
    fs::create_dir_all(&folder)?;
    let names = config.binaries();
    for name in &names {
        let built = target_dir().join(profile).join(name);
        fs::copy(&built, folder.join(name)).with_context(|| built.display().to_string())?;
    }
    let product = Binaries { folder, names };
    for (name, path) in product.iter() {
        ensure!(
            !is_compromised(&path)?,
            "{name} contains what only a test build may: see tests/compromised"
        );
    }
    Ok(product)
}

/// Device processes and a VMM that try what they must not, for a test: what `unit` has built, with
/// the feature `compromised`.
pub fn compromised() -> Result<Binaries> {
    sh::progress("building compromised device processes (debug)");
    let mut names: Vec<String> = DEVICES.iter().map(|d| format!("anemone-{d}")).collect();
    names.extend(["anemone-vmm", "anemone-compromised"].map(String::from));
    // The selection of `unit`, so that it and this share what has nothing to do with the feature.
    sh::run(cargo().args([
        "build",
        "--quiet",
        "--workspace",
        "--exclude=xtask",
        "--bins",
        "--features=anemone-device/compromised",
    ]))?;
    // The keeper of passt is outside of any jail, and reads nothing that is not the host's.
    names.push("anemone-passt".to_string());
    let folder = sh::fresh_dir("out/compromised")?;
    for name in &names {
        let built = target_dir().join("debug").join(name);
        fs::copy(&built, folder.join(name)).with_context(|| built.display().to_string())?;
    }
    Ok(Binaries { folder, names })
}

/// Whether a program makes the attempts of a compromised one: it then has the word for its reports.
pub fn is_compromised(program: &Path) -> Result<bool> {
    let code = fs::read(program).with_context(|| program.display().to_string())?;
    let mark = anemone_compromised::MARK.as_bytes();
    let (first, rest) = mark.split_first().context("the mark is empty")?;
    let mut left = &code[..];
    while let Some(at) = left.iter().position(|byte| byte == first) {
        left = &left[at + 1..];
        if left.starts_with(rest) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The build that tests, demonstration and benchmarks run: everything, as released.
pub fn full() -> Result<Binaries> {
    build(&sh::root().join("configs/full.toml"), true)
}

/// First program of the rig's outer guest.
pub fn guest_runner() -> Result<PathBuf> {
    program("anemone-guest-init")
}

/// Programs for the inside of guests: connections to the host and back, and loads of devices.
pub fn guest_programs() -> Result<[PathBuf; 2]> {
    let runner = guest_runner()?;
    Ok(["anemone-guest-vsock", "anemone-guest-load"].map(|name| runner.with_file_name(name)))
}

/// The program of a package that is not part of any build configuration and has its name.
pub fn program(package: &str) -> Result<PathBuf> {
    sh::run(cargo().args(["build", "--release", "--quiet", "--package", package]))?;
    Ok(target_dir().join("release").join(package))
}

/// An example of a package, which is not part of any build configuration.
pub fn example(package: &str, name: &str) -> Result<PathBuf> {
    sh::run(cargo().args([
        "build",
        "--release",
        "--quiet",
        "--package",
        package,
        "--example",
        name,
    ]))?;
    Ok(target_dir().join("release/examples").join(name))
}

/// The cargo that runs this program, at the root of the checkout.
pub fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(sh::root());
    command
}

fn target_dir() -> PathBuf {
    let base = match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => sh::root().join(dir),
        None => sh::root().join("target"),
    };
    base.join(TARGET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_configuration_of_the_tree_is_valid() {
        for entry in fs::read_dir(sh::root().join("configs")).unwrap() {
            Config::read(&entry.unwrap().path()).unwrap();
        }
    }

    #[test]
    fn only_what_is_listed_becomes_a_package_or_feature() {
        let config = Config::read(&sh::root().join("configs/micro.toml")).unwrap();
        assert_eq!(
            config.packages(),
            ["anemone", "anemone-vmm", "anemone-blk", "anemone-console"]
        );
        assert_eq!(
            config.features(),
            [
                "anemone/kvm",
                "anemone-vmm/kvm",
                "anemone/blk",
                "anemone/console"
            ]
        );
    }

    #[test]
    fn the_mark_of_a_test_build_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let mark = anemone_compromised::MARK;
        for (text, marked) in [
            (String::new(), false),
            (mark[1..].to_string(), false),
            (mark[..5].to_string(), false),
            (format!("\0c{mark}\0"), true),
        ] {
            fs::write(&path, &text).unwrap();
            assert_eq!(is_compromised(&path).unwrap(), marked, "{text:?}");
        }
    }

    #[test]
    fn unknown_words_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.toml");
        fs::write(
            &path,
            "accelerators = []\ndevices = [\"floppy\"]\nmachine = []",
        )
        .unwrap();
        let error = Config::read(&path).unwrap_err().to_string();
        assert!(
            error.contains("floppy")
                && error.contains("balloon, blk, console, fs, net, pmem, rng, vsock")
        );
        fs::write(
            &path,
            "accelerators = []\ndevices = []\nmachine = []\nmore = 1",
        )
        .unwrap();
        assert!(Config::read(&path).is_err());
    }
}
