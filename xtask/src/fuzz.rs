//! `xtask fuzz`: random guests on the software CPU, for as long as one likes.

use std::process::Command;

use anyhow::Result;

use crate::{build, sh};

/// Builds the fuzzer and runs it for `seconds`, or one guest of it again.
pub fn run(seconds: u64, seed: Option<u64>, case: Option<u64>) -> Result<()> {
    let mut command = Command::new(build::program("anemone-fuzz")?);
    match case {
        Some(case) => command.arg("--case").arg(case.to_string()),
        None => command.arg("--seconds").arg(seconds.to_string()),
    };
    if let Some(seed) = seed {
        command.arg("--seed").arg(seed.to_string());
    }
    sh::run(&mut command)
}
