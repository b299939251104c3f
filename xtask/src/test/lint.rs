//! Formatting, lints, and that every build configuration compiles.

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::build::{self, Config};
use crate::report::Outcome;
use crate::sh;

use super::Context;

pub fn run(_: &Context, _: &[String]) -> Result<Vec<Outcome>> {
    let mut outcomes = vec![
        Outcome::of(
            "fmt",
            sh::run(build::cargo().args(["fmt", "--all", "--check"])),
        ),
        Outcome::of(
            "clippy",
            sh::run(build::cargo().args([
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ])),
        ),
        Outcome::of(
            "clippy of compromised builds",
            sh::run(build::cargo().args([
                "clippy",
                "--quiet",
                "--package=anemone-device",
                "--package=anemone-sandbox",
                "--features=anemone-device/compromised",
                "--",
                "-D",
                "warnings",
            ])),
        ),
        Outcome::of(
            "shell",
            sh::run(
                Command::new("bash")
                    .arg("-n")
                    .arg(sh::root().join(".ci/run")),
            ),
        ),
    ];
    let mut paths: Vec<_> = fs::read_dir(sh::root().join("configs"))?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<std::io::Result<_>>()?;
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        outcomes.push(Outcome::of(
            &format!("configuration {name}"),
            compiles(&path),
        ));
    }
    Ok(outcomes)
}

fn compiles(path: &std::path::Path) -> Result<()> {
    let config = Config::read(path)?;
    let mut command = build::cargo();
    command.args(["clippy", "--quiet", "--no-default-features"]);
    for package in config.packages() {
        command.arg("--package").arg(package);
    }
    command.arg("--features").arg(config.features().join(","));
    sh::run(command.args(["--", "-D", "warnings"]))
}
