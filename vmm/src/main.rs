//! `anemone-vmm`: the process that runs the guest's CPUs.
//!
//! It holds the accelerator, guest memory, the board and the front ends of the devices. It opens
//! no file, makes no socket and starts no program: the supervisor sends it everything it needs
//! as descriptors over the control channel, and it enters its jail before it reads the first
//! message.

mod accel;
mod args;
mod build;
mod device;
mod error;
mod jail;
mod memory;
mod pmem;
mod run;
#[cfg(feature = "serial")]
mod serial;
mod threads;

use std::process::ExitCode;

use anemone_accel_api::Verdict;
use anemone_ipc::vmm::{FromVmm, ToVmm};
use anemone_ipc::{CONTROL_FD, Channel};
use anemone_process::inherited_fd;

use crate::accel::Prepared;
use crate::args::{Args, Mode};
use crate::error::Error;
use crate::threads::{Plan, Threads};

fn main() -> ExitCode {
    let args = match Args::parse() {
        Ok(args) => args,
        Err(text) => {
            eprintln!("anemone-vmm: {text}");
            return ExitCode::from(2);
        }
    };
    anemone_log::init("anemone-vmm", args.log_level);
    match args.mode {
        Mode::Print(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Mode::SelfTest(accel) => self_test(&args.jail, &accel),
        Mode::CpuModels => match cpu_models(&args.jail) {
            Ok(text) => {
                print!("{text}");
                ExitCode::SUCCESS
            }
            Err(e) => {
                log::error!("{e}");
                ExitCode::FAILURE
            }
        },
        Mode::Run => match serve(&args.jail, &args.plan) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                log::error!("{e}");
                ExitCode::FAILURE
            }
        },
    }
}

/// Tells whether an accelerator can run a stock kernel on this host: exit status 0, or the reason
/// on standard output and 1.
fn self_test(jail: &jail::Settings, accel: &str) -> ExitCode {
    match accel::self_test(jail, accel) {
        Ok(Verdict::Usable) => ExitCode::SUCCESS,
        Ok(Verdict::Unusable(reason)) => {
            println!("{reason}");
            ExitCode::FAILURE
        }
        Err(e) => {
            println!("{e}");
            ExitCode::FAILURE
        }
    }
}

/// The frozen CPU models: name, description, features, and for each accelerator `NAME=` and what it
/// lacks on this host (`?` where it cannot be asked), separated by tabs; lists by commas.
fn cpu_models(jail: &jail::Settings) -> Result<String, Error> {
    let offered = accel::offered(jail)?;
    let mut text = String::new();
    for model in anemone_cpu::MODELS {
        let features: Vec<_> = model.features().map(|f| f.name).collect();
        text += &format!("{}\t{}\t{}", model.name, model.about, features.join(","));
        for (accel, offered) in &offered {
            let missing = match offered {
                Some(offered) => model.missing(offered).join(","),
                None => "?".to_owned(),
            };
            text += &format!("\t{accel}={missing}");
        }
        text.push('\n');
    }
    Ok(text)
}

/// Builds and runs the one machine this process is for.
fn serve(jail: &jail::Settings, plan: &Plan) -> Result<(), Error> {
    // The threads of software CPUs allocate more than now and then.
    let soft_cpus = match plan.accel.as_str() {
        "soft" => plan.cpus,
        _ => 0,
    };
    match soft_cpus {
        0 => anemone_process::one_heap(),
        _ => anemone_process::several_heaps(),
    }
    let prepared = Prepared::new(soft_cpus)?;
    let channel = Channel::new(inherited_fd(CONTROL_FD)?);
    let landlock = jail::enter(jail)?;
    let mut threads = Threads::start(plan, jail.mode)?;
    jail::restrict_build(jail.mode)?;
    let mut received = channel.recv::<ToVmm>()?;
    let ToVmm::Configure(config) = &received.message else {
        return Err(Error::Protocol("the first message is not a configuration"));
    };
    let config = config.as_ref().clone();
    let machine = match build::build(&config, &mut received, prepared, &mut threads, landlock) {
        Ok(machine) => machine,
        Err(e) => {
            channel.send(
                &FromVmm::Refused {
                    message: e.to_string(),
                },
                &[],
            )?;
            return Ok(());
        }
    };
    channel.send(&FromVmm::Ready(machine.summary.clone()), &[])?;
    match channel.recv::<ToVmm>() {
        Ok(message) if matches!(message.message, ToVmm::Start) => {
            run::run(machine, channel, &mut threads, jail.mode)
        }
        Ok(_) => Err(Error::Protocol("expected the order to start")),
        // A check ends here.
        Err(anemone_ipc::Error::Closed) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
