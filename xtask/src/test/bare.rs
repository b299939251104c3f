//! Bare-metal guests on the software CPU (`tests/bare`).

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::build;
use crate::report::{Outcome, Verdict};
use crate::sh;

use super::Context;

pub fn run(_: &Context, parts: &[String]) -> Result<Vec<Outcome>> {
    let program = build::program("anemone-bare")?;
    let listing = sh::quiet(Command::new(&program).arg("--list"))?;
    let listing = String::from_utf8_lossy(&listing.stdout).into_owned();
    if let Some(name) = parts
        .iter()
        .find(|part| !listing.lines().any(|l| l == **part))
    {
        bail!(
            "no case {name}; there are {}",
            listing.trim().replace('\n', ", ")
        );
    }
    let mut command = Command::new(&program);
    command.args(["--accel", "soft"]).stdin(Stdio::null());
    for part in parts {
        command.args(["--only", part]);
    }
    let output = command
        .output()
        .with_context(|| program.display().to_string())?;
    std::fs::create_dir_all(sh::build_dir("logs"))?;
    std::fs::write(sh::build_dir("logs/bare.txt"), &output.stdout)?;
    // A problem of a case is a line `FAIL NAME: WHAT`.
    let said = String::from_utf8_lossy(&output.stderr);
    let problems: Vec<(&str, &str)> = said
        .lines()
        .filter_map(|line| line.strip_prefix("FAIL ")?.split_once(": "))
        .collect();
    let mut outcomes: Vec<_> = listing
        .lines()
        .filter(|name| parts.is_empty() || parts.iter().any(|part| part == name))
        .map(|name| {
            let own: Vec<_> = problems
                .iter()
                .filter(|(case, _)| *case == name)
                .map(|(_, what)| *what)
                .collect();
            Outcome::new(
                name,
                match own.is_empty() {
                    true => Verdict::Passed,
                    false => Verdict::Failed(own.join("; ")),
                },
            )
        })
        .collect();
    if !output.status.success() && problems.is_empty() {
        let why = format!("{}: {}", output.status, said.trim());
        outcomes.push(Outcome::new("anemone-bare", Verdict::Failed(why)));
    }
    Ok(outcomes)
}
