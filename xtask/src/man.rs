//! `xtask man`: manual pages and shell completions from the command line's own description.

#[cfg(feature = "man")]
use std::fs;

use anyhow::Result;

#[cfg(feature = "man")]
use crate::sh;

/// Writes `build/man/*.1` and `build/completions/*`.
#[cfg(feature = "man")]
pub fn run() -> Result<()> {
    use clap_complete::Shell;

    let man = sh::fresh_dir("man")?;
    let command = anemone::cli::command();
    clap_mangen::generate_to(command.clone(), &man)?;
    let completions = sh::fresh_dir("completions")?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut command.clone(), "anemone", &completions)?;
    }
    for folder in [man, completions] {
        for entry in fs::read_dir(folder)? {
            println!("{}", entry?.path().display());
        }
    }
    Ok(())
}

/// Runs this program again, built with the product's command line in it. Everything else here
/// must not wait for that, nor fail with it.
#[cfg(not(feature = "man"))]
pub fn run() -> Result<()> {
    crate::sh::run(crate::build::cargo().args([
        "run",
        "--quiet",
        "--package",
        "xtask",
        "--features",
        "man",
        "--",
        "man",
    ]))
}
