//! Tests of all packages, through cargo-nextest where it is installed, else through cargo itself.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::build;
use crate::report::{Outcome, Verdict};
use crate::sh;

use super::Context;

pub fn run(context: &Context, _: &[String]) -> Result<Vec<Outcome>> {
    let packages = context.packages()?;
    let pauses = sh::fresh_dir("unit")?.join("pauses");
    let runner = Runner {
        nextest: sh::quiet(build::cargo().args(["nextest", "--version"])).is_ok(),
        path: packages.search_path()?,
        kernel: packages.kernel(),
        pauses: pauses.clone(),
    };
    if !runner.nextest {
        sh::progress("cargo-nextest is not installed: using cargo test");
    }
    let mut outcomes = runner.run(&["--workspace"], false)?;
    // Tests that need more than a checkout: a stock kernel, a loop device.
    let mut more = vec!["anemone-boot"];
    if sh::is_root() && Path::new("/dev/loop-control").exists() {
        more.push("anemone-blk");
    } else {
        sh::progress("the test of disks on block devices needs root and the loop driver");
    }
    for package in more {
        outcomes.extend(runner.run(&["--package", package], true)?);
    }
    if let Ok(text) = std::fs::read_to_string(&pauses) {
        let mut lines: Vec<_> = text.lines().collect();
        lines.sort_unstable();
        sh::progress(format_args!("Device processes killed and replaced:"));
        lines
            .iter()
            .for_each(|line| sh::progress(format_args!("  {line}")));
    }
    Ok(outcomes)
}

/// How tests are started.
struct Runner {
    nextest: bool,
    /// Search path with the programs that tests compare with.
    path: OsString,
    kernel: PathBuf,
    /// Where tests say how long the pauses were when a process was replaced.
    pauses: PathBuf,
}

impl Runner {
    /// Runs the tests of some packages: those that need nothing, or those marked as ignored.
    fn run(&self, packages: &[&str], ignored: bool) -> Result<Vec<Outcome>> {
        let mut command = build::cargo();
        if self.nextest {
            command.args(["nextest", "run", "--no-fail-fast", "--color=never"]);
            command.args(["--status-level=fail", "--final-status-level=fail"]);
            command.args(["--show-progress=none"]).args(packages);
            if ignored {
                command.args(["--run-ignored", "only"]);
            }
        } else {
            command
                .args(["test", "--no-fail-fast", "--quiet"])
                .args(packages);
            if ignored {
                command.args(["--", "--ignored"]);
            }
        }
        command
            .env("PATH", &self.path)
            .env("ANEMONE_PAUSES", &self.pauses)
            .env("ANEMONE_KERNEL", &self.kernel);
        let (lines, success) = run_and_show(&mut command)?;
        let (passed, failed) = match self.nextest {
            true => nextest_counts(&lines),
            false => cargo_counts(&lines),
        };
        if passed + failed == 0 {
            bail!("no test has run: see the messages above");
        }
        let mut outcomes = vec![Outcome::new("test", Verdict::Passed); passed];
        for name in &failed_names(&lines, failed) {
            let why = Verdict::Failed("see the output above".into());
            outcomes.push(Outcome::new(name, why));
        }
        if !success && failed == 0 {
            let why = "it failed after the tests, or some were not built".into();
            outcomes.push(Outcome::new("cargo", Verdict::Failed(why)));
        }
        Ok(outcomes)
    }
}

/// Shows a command's output while it runs, and keeps it.
fn run_and_show(command: &mut Command) -> Result<(Vec<String>, bool)> {
    let (reader, writer) = std::io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot start {}", sh::display(command)))?;
    // The command holds the writing ends: without them the reader sees the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut lines = Vec::new();
    for line in BufReader::new(reader).lines() {
        let line = line?;
        eprintln!("{line}");
        lines.push(line);
    }
    Ok((lines, child.wait()?.success()))
}

/// `Summary [   1.2s] 12 tests run: 10 passed (1 slow), 1 failed, 1 timed out, 3 skipped`
fn nextest_counts(lines: &[String]) -> (usize, usize) {
    let Some((_, summary)) = lines
        .iter()
        .rev()
        .find(|line| line.trim_start().starts_with("Summary ["))
        .and_then(|line| line.split_once("run: "))
    else {
        return (0, 0);
    };
    let mut counts = (0, 0);
    for part in summary.split(", ") {
        let Some((number, what)) = part.trim().split_once(' ') else {
            continue;
        };
        let number = number.parse().unwrap_or(0);
        match what.split(' ').next() {
            Some("passed") => counts.0 += number,
            Some("skipped") => {}
            _ => counts.1 += number,
        }
    }
    counts
}

/// `test result: FAILED. 3 passed; 1 failed; 0 ignored; ...`, once per test program.
fn cargo_counts(lines: &[String]) -> (usize, usize) {
    let number = |line: &str, what: &str| -> usize {
        line.split("; ")
            .find_map(|part| part.strip_suffix(what))
            .and_then(|part| part.trim().rsplit(' ').next()?.parse().ok())
            .unwrap_or(0)
    };
    lines
        .iter()
        .filter(|line| line.starts_with("test result: "))
        .fold((0, 0), |(passed, failed), line| {
            (
                passed + number(line, " passed"),
                failed + number(line, " failed"),
            )
        })
}

/// Names of failed tests as far as the output tells them; always `failed` of them.
fn failed_names(lines: &[String], failed: usize) -> Vec<String> {
    let mut names: Vec<String> = lines
        .iter()
        .filter_map(|line| {
            let line = line.trim_start();
            let rest = line
                .strip_prefix("FAIL [")
                .or_else(|| line.strip_prefix("TIMEOUT ["))
                .or_else(|| line.strip_prefix("SIGABRT ["))?;
            Some(rest.split_once("] ")?.1.trim().to_string())
        })
        .collect();
    names.sort();
    names.dedup();
    names.truncate(failed);
    names.resize(failed, "a test".to_string());
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nextest_summary() {
        let lines = [
            "        FAIL [   0.004s] (1/9) anemone-pci tests::x".to_string(),
            "     Summary [   0.3s] 9/12 tests run: 7 passed (1 slow), 1 failed, 1 timed out, 3 skipped"
                .to_string(),
        ];
        assert_eq!(nextest_counts(&lines), (7, 2));
        let names = failed_names(&lines, 2);
        assert_eq!(names.len(), 2);
        assert!(names[0].contains("anemone-pci tests::x"));
    }

    #[test]
    fn cargo_summary() {
        let lines = [
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out".into(),
            "test result: FAILED. 4 passed; 2 failed; 0 ignored".into(),
        ];
        assert_eq!(cargo_counts(&lines), (7, 2));
    }
}
