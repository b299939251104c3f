//! The supervisor: reads the configuration, opens files and sockets, starts the VMM and the
//! device processes, and ends them.
//!
//! It never maps guest memory and never reads a byte that the guest wrote. What its children send
//! is typed and bounded ([`anemone_ipc`]), and text in it is made printable before it is shown.
//!
//! The package is a library so that manual pages and completions can be made from
//! [`cli::command`]; the program is [`main`].

mod accel;
mod acpi_dump;
mod cgroup;
mod check;
pub mod cli;
mod clone;
mod control;
mod cpu_models;
mod devices;
mod doctor;
mod error;
mod files;
mod inspect;
mod jail;
mod net;
mod programs;
mod reach;
mod registry;
mod run;
mod sink;
mod spawn;
mod sys;
mod tap;
mod terminal;
mod vmm;
mod wiring;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use error::Error;

/// The program: parses the command line, does what it says, and reports.
///
/// Exit status: 0 if the guest shut down (or the command succeeded), 1 if the VM failed, 2 if
/// the configuration or the command line is wrong.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    anemone_log::init("anemone", cli.log_level);
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}

fn dispatch(cli: Cli) -> Result<(), Error> {
    let log_level = cli.log_level;
    match cli.command {
        Command::Run { vm, dump_acpi } => run::run(vm.resolve()?, log_level, dump_acpi.as_deref()),
        Command::Check {
            vm,
            json,
            dump_acpi,
        } => check::check(vm.resolve()?, log_level, dump_acpi.as_deref(), json),
        Command::Devices { json } => devices::print(json),
        Command::CpuModels { json } => cpu_models::print(json, log_level),
        Command::Status { vm, json } => control::client::print_status(vm.as_deref(), json),
        Command::RestartDevice { vm, id } => control::client::restart_device(&vm, &id),
        Command::Balloon { vm, size, json } => {
            control::client::balloon(&vm, size.map(|size| size.0), json)
        }
        Command::PowerButton { vm } => control::client::power_button(&vm),
        Command::Doctor {
            json,
            policies,
            vm: Some(vm),
        } => doctor::print_vm(&vm, json, policies),
        Command::Doctor {
            json,
            policies,
            vm: None,
        } => doctor::print(json, policies, log_level),
    }
}
