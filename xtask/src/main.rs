//! Everything around the product: demonstration, tests, benchmarks, builds and figures.
//! `cargo xtask help` lists the commands; docs/testing.md explains the tests.

mod bench;
mod build;
mod cpio;
mod demo;
mod disk;
mod doctor;
mod elf;
mod footprint;
mod initramfs;
mod man;
mod modules;
mod packages;
mod report;
mod rig;
mod sh;
mod source;
mod table;
mod test;
mod tiny;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Demonstration, tests, benchmarks and builds of Anemone.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a stock Debian kernel and get its shell.
    Demo {
        /// No shell: let the guest verify and write its disk, verify what it wrote, and exit.
        #[arg(long)]
        check: bool,
    },
    /// Run tests; the last line counts them.
    Test {
        /// Groups to run, all if none is given; vm-kvm:NAME selects a scenario.
        #[arg(value_name = "GROUP")]
        groups: Vec<String>,
        /// Let this group be skipped if something that it needs is not on this machine.
        #[arg(long, value_name = "GROUP")]
        allow_missing: Vec<String>,
        /// Print the groups and scenarios.
        #[arg(long)]
        list: bool,
    },
    /// Measure, beside other programs.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// Build what a configuration lists, into build/out/NAME.
    Build {
        /// The configuration.
        #[arg(long, value_name = "PATH", default_value = "configs/full.toml")]
        config: PathBuf,
        /// Builds with debug information and checks, into build/out/NAME-debug.
        #[arg(long)]
        debug: bool,
    },
    /// Print sizes of binaries, sources, graphs, policies and running VMs.
    Footprint {
        /// The configuration to look at.
        #[arg(long, value_name = "PATH", default_value = "configs/full.toml")]
        config: PathBuf,
    },
    /// Write manual pages and shell completions to build/man and build/completions.
    Man,
    /// Fetch the Debian packages that tests and demonstration use, without installing them.
    Fetch,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// From exec to the first guest instruction, beside QEMU microvm; $FIRECRACKER and
    /// $CLOUD_HYPERVISOR name more programs to compare with.
    Start {
        /// Measurements of each VMM.
        #[arg(long, default_value_t = 50)]
        runs: usize,
    },
    /// Memory of idle VMs without their guest's, beside the same programs.
    Memory,
    /// 4 KiB random reads, beside qemu-storage-daemon.
    Block {
        /// Measurements of each server and depth.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Length of one measurement.
        #[arg(long, default_value_t = 3)]
        seconds: u32,
    },
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command; returns whether everything it tried has succeeded.
fn dispatch(command: Command) -> Result<bool> {
    let alone = !matches!(command, Command::Man | Command::Test { list: true, .. });
    let _lock = if alone { Some(sh::lock()?) } else { None };
    match command {
        Command::Demo { check } => demo::run(check)?,
        Command::Test { list: true, .. } => test::list()?,
        Command::Test {
            groups,
            allow_missing,
            list: false,
        } => return test::run(&groups, &allow_missing),
        Command::Bench { what } => match what {
            Bench::Start { runs } => bench::start(runs)?,
            Bench::Memory => bench::memory()?,
            Bench::Block { runs, seconds } => bench::block(runs, seconds)?,
        },
        Command::Build { config, debug } => {
            for (_, path) in build::build(&config, !debug)?.iter() {
                println!("{}", path.display());
            }
        }
        Command::Footprint { config } => footprint::run(&config)?,
        Command::Man => man::run()?,
        Command::Fetch => {
            let packages = packages::fetch()?;
            println!(
                "kernel {} and its tools are in build/packages",
                packages.release()
            );
        }
    }
    Ok(true)
}
