//! Everything around the product: demonstration, tests, benchmarks, builds and figures.
//! `cargo xtask help` lists the commands; docs/testing.md explains the tests.

mod bench;
mod build;
mod console;
mod cpio;
mod debian;
mod demo;
mod disk;
mod doctor;
mod elf;
mod footprint;
mod fuzz;
mod initramfs;
mod journal;
mod man;
mod modules;
mod packages;
mod policy;
mod report;
mod rig;
mod sh;
mod source;
mod table;
mod test;
mod tiny;

use std::ffi::OsString;
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
    Demo(demo::Options),
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
    /// Run random guests on the software CPU: none may end the process, stop answering, or touch
    /// memory outside the guest.
    Fuzz {
        /// How long.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Where the seeds of the guests come from; the clock if not given.
        #[arg(long)]
        seed: Option<u64>,
        /// Run one guest again.
        #[arg(long, value_name = "SEED", conflicts_with_all = ["seconds", "seed"])]
        case: Option<u64>,
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
    /// Watch which rules of the jail's policies the tests use, and print those that none needs.
    Policy {
        /// Add up what several runs have seen, in this file.
        #[arg(long, value_name = "PATH")]
        keep: Option<PathBuf>,
        /// Print for each policy the rules that its own threads have not used.
        #[arg(long)]
        details: bool,
        /// A command to watch instead of the tests.
        #[arg(value_name = "COMMAND", last = true)]
        command: Vec<OsString>,
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
    /// Requests to a shared directory, beside virtiofsd.
    Fs {
        /// Measurements of each server and load.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Length of one measurement.
        #[arg(long, default_value_t = 3)]
        seconds: u32,
    },
    /// Frames through anemone-net: packets per second, CPU time per packet, latency.
    Net {
        /// Measurements of each load.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Length of one measurement.
        #[arg(long, default_value_t = 3)]
        seconds: u32,
    },
    /// A stream through anemone-vsock: bytes per second, CPU time, latency.
    Vsock {
        /// Measurements of each load.
        #[arg(long, default_value_t = 5)]
        runs: usize,
        /// Length of one measurement.
        #[arg(long, default_value_t = 3)]
        seconds: u32,
    },
    /// The software CPU: boot and loops in a guest, beside QEMU's TCG and the host.
    Soft {
        /// Measurements of each engine.
        #[arg(long, default_value_t = 3)]
        runs: usize,
        /// About how long each loop runs.
        #[arg(long, default_value_t = 1000)]
        millis: u32,
        /// Only these: boot, and names of loops.
        #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
        only: Vec<String>,
        /// What runs them, in turns.
        #[arg(long, value_delimiter = ',', default_value = "soft,tcg,native")]
        engines: Vec<bench::Engine>,
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
    let alone = !matches!(
        command,
        // What is watched takes the lock.
        Command::Man | Command::Policy { .. } | Command::Test { list: true, .. }
    );
    let _lock = if alone { Some(sh::lock()?) } else { None };
    match command {
        Command::Demo(options) => demo::run(&options)?,
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
            Bench::Fs { runs, seconds } => bench::fs(runs, seconds)?,
            Bench::Net { runs, seconds } => bench::net(runs, seconds)?,
            Bench::Vsock { runs, seconds } => bench::vsock(runs, seconds)?,
            Bench::Soft {
                runs,
                millis,
                only,
                engines,
            } => bench::soft(&bench::Plan {
                runs,
                millis,
                only,
                engines,
            })?,
        },
        Command::Fuzz {
            seconds,
            seed,
            case,
        } => fuzz::run(seconds, seed, case)?,
        Command::Build { config, debug } => {
            for (_, path) in build::build(&config, !debug)?.iter() {
                println!("{}", path.display());
            }
        }
        Command::Footprint { config } => footprint::run(&config)?,
        Command::Policy {
            keep,
            details,
            command,
        } => return policy::run(keep.as_deref(), details, &command),
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
