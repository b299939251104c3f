//! Which accelerator runs the guest, and opening it.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anemone_config::{AccelType, Sandbox, Vm};
use log::LevelFilter;
use thiserror::Error as ThisError;

use crate::cgroup::Groups;
use crate::clone::Namespaces;
use crate::error::{Error, printable, system};
use crate::files;
use crate::programs::Programs;
use crate::registry;
use crate::spawn::{Program, Stdio};
use crate::sys::{self, Exit, Signals};

/// Number at which the self-test finds `/dev/kvm`.
const DEVICE_FD: i32 = 4;
/// Time the whole self-test may take, start of the process included. It bounds itself more tightly.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Longest answer in bytes, less than a pipe holds.
const ANSWER_SIZE: usize = 32 << 10;
const KVM: &str = "/dev/kvm";

/// No accelerator can run this VM.
#[derive(Debug, ThisError)]
pub enum Unavailable {
    /// `/dev/kvm` cannot be opened.
    #[error("accelerator `kvm`: {0}")]
    Kvm(String),
    /// `auto` found nothing.
    #[error(
        "no accelerator of this build can run a stock kernel on this host:{reasons}\n\
         `--accel NAME` uses one without the self-test"
    )]
    Nothing {
        /// One line per accelerator tried.
        reasons: String,
    },
    /// `none` without its driver.
    #[error(
        "accelerator `none`: needs `socket=PATH`, where the program that drives the machine connects"
    )]
    NoDriver,
    /// The wait for the driver was ended.
    #[error("accelerator `none`: ended by {0} before a driver connected")]
    Interrupted(String),
}

/// An accelerator that is ready to be given to a VMM.
#[derive(Debug)]
pub enum Opened {
    /// `/dev/kvm`.
    Kvm(OwnedFd),
    /// The VMM's own CPU, which needs nothing.
    Soft,
    /// The connection of the driver.
    None(UnixStream),
}

impl Opened {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kvm(_) => "kvm",
            Self::Soft => "soft",
            Self::None(_) => "none",
        }
    }
}

/// What starting the self-test needs.
#[derive(Debug, Clone, Copy)]
pub struct Environment<'a> {
    /// Where the VMM is.
    pub programs: &'a Programs,
    /// Mode of its jail.
    pub sandbox: Sandbox,
    /// Its log level.
    pub log_level: LevelFilter,
    /// Control groups of the VM's processes.
    pub groups: Option<&'a Groups>,
}

/// Opens the accelerator that the configuration asks for. With `none` this waits for the driver.
pub fn open(vm: &Vm, environment: Environment<'_>, signals: &Signals) -> Result<Opened, Error> {
    let accel = &vm.config.accel;
    match accel.kind {
        AccelType::Auto => choose(environment),
        AccelType::Kvm => {
            registry::accelerator("kvm")?;
            Ok(open_kvm().map(Opened::Kvm).map_err(Unavailable::Kvm)?)
        }
        AccelType::Soft => {
            registry::accelerator("soft")?;
            Ok(Opened::Soft)
        }
        AccelType::None => {
            registry::accelerator("none")?;
            let path = accel.socket.as_deref().ok_or(Unavailable::NoDriver)?;
            accept(path, signals).map(Opened::None)
        }
    }
}

/// The first accelerator of the build that can run a stock kernel. If it is not the best of them, one
/// line says which it is and why.
fn choose(environment: Environment<'_>) -> Result<Opened, Error> {
    let mut reasons = Vec::new();
    for entry in registry::ACCELERATORS.iter().filter(|entry| entry.default) {
        match try_out(entry.name, environment)? {
            Ok(opened) => {
                if !reasons.is_empty() {
                    let why = reasons.join("; ");
                    log::warn!("the accelerator is `{}`, because {why}", entry.name);
                }
                return Ok(opened);
            }
            Err(reason) => reasons.push(format!("{}: {reason}", entry.name)),
        }
    }
    if reasons.is_empty() {
        let names = registry::names(registry::ACCELERATORS);
        reasons.push(format!("it has only: {names}"));
    }
    let reasons = reasons.iter().map(|reason| format!("\n  {reason}"));
    Err(Unavailable::Nothing {
        reasons: reasons.collect(),
    }
    .into())
}

/// Opens an accelerator and lets it run a guest; the inner error says why it cannot.
pub fn try_out(name: &str, environment: Environment<'_>) -> Result<Result<Opened, String>, Error> {
    let opened = match name {
        "kvm" => open_kvm().map(Opened::Kvm),
        _ => Ok(Opened::Soft),
    };
    let opened = match opened {
        Ok(opened) => opened,
        Err(reason) => return Ok(Err(reason)),
    };
    Ok(match self_test(name, &opened, environment)? {
        None => Ok(opened),
        Some(reason) => Err(reason),
    })
}

/// Opens `/dev/kvm`, or says how to get it.
pub fn open_kvm() -> Result<OwnedFd, String> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(KVM)
        .map(OwnedFd::from)
        .map_err(|error| {
            // A group helps only where the group may read and write.
            let owner = fs::metadata(KVM)
                .ok()
                .filter(|metadata| metadata.mode() & 0o060 == 0o060)
                .map(|metadata| metadata.gid());
            advice(&error, owner, sys::effective_user())
        })
}

/// What to do about a `/dev/kvm` that belongs to `group` and does not open.
fn advice(error: &io::Error, group: Option<u32>, user: u32) -> String {
    let name = |file: &str, id: u32| {
        let text = fs::read_to_string(file).unwrap_or_default();
        name_of(&text, id).unwrap_or_else(|| id.to_string())
    };
    match (error.kind(), group) {
        (io::ErrorKind::NotFound, _) => format!(
            "{KVM} does not exist. Enable virtualisation in the host's firmware (in a VM: nested \
             virtualisation in the outer one) and load the module: modprobe kvm_intel, or \
             modprobe kvm_amd"
        ),
        (io::ErrorKind::PermissionDenied, Some(group)) => {
            let group = name("/etc/group", group);
            let user = name("/etc/passwd", user);
            format!(
                "you may not open {KVM}, which belongs to the group `{group}`. Join it and log in \
                 again: sudo usermod --append --groups {group} {user}"
            )
        }
        (io::ErrorKind::PermissionDenied, None) => format!(
            "you may not open {KVM}, and no group may. Ask the administrator to give it to a \
             group, for example: chgrp kvm {KVM} && chmod 660 {KVM}"
        ),
        _ => format!("{KVM}: {error}"),
    }
}

/// The name that belongs to a number in /etc/passwd or /etc/group (passwd(5), group(5): name,
/// password, number, …). Read by hand: the C library would load plug-ins for it.
fn name_of(text: &str, id: u32) -> Option<String> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    })
}

/// Lets a jailed VMM process find out whether an accelerator can run a stock kernel; `Some` says why
/// not.
fn self_test(
    name: &str,
    opened: &Opened,
    environment: Environment<'_>,
) -> Result<Option<String>, Error> {
    let device = match opened {
        Opened::Kvm(device) => Some(device),
        Opened::Soft | Opened::None(_) => None,
    };
    let (exit, text) = ask_vmm(&["--self-test", name], device, environment)?;
    Ok(match exit {
        Some(Exit::Status(0)) => None,
        Some(exit) if text.is_empty() => Some(format!("the self-test {exit}")),
        Some(_) => Some(printable(&text)),
        None => Some(format!(
            "the self-test did not end within {} seconds",
            ANSWER_LIMIT.as_secs()
        )),
    })
}

/// The frozen CPU models as `anemone-vmm --cpu-models` prints them.
pub fn cpu_models(environment: Environment<'_>) -> Result<String, Error> {
    let device = open_kvm().ok();
    match ask_vmm(&["--cpu-models"], device.as_ref(), environment)? {
        (Some(Exit::Status(0)), text) => Ok(text),
        (exit, _) => Err(Error::Failed(match exit {
            Some(exit) => format!("anemone-vmm --cpu-models {exit}"),
            None => "anemone-vmm --cpu-models does not end".to_owned(),
        })),
    }
}

/// Runs a VMM process that answers a question on its standard output; how it ended (`None` if it
/// did not in time) and what it said.
fn ask_vmm(
    question: &[&str],
    device: Option<&OwnedFd>,
    environment: Environment<'_>,
) -> Result<(Option<Exit>, String), Error> {
    let path = environment.programs.find(registry::VMM, None)?;
    let (mut reader, writer) = io::pipe().map_err(system("pipe"))?;
    let mut program = Program::new(&path);
    for word in question {
        program.arg(word);
    }
    program
        .namespaces(Namespaces::New)
        .option("--parent-pid", std::process::id())
        .option("--sandbox", environment.sandbox)
        .option(
            "--log-level",
            environment.log_level.as_str().to_ascii_lowercase(),
        )
        .stdio(Stdio::Output(writer.as_fd()));
    if let Some(device) = device {
        program.fd(DEVICE_FD, device.as_fd());
    }
    let mut process = program.start()?;
    drop(program);
    drop(writer);
    let exit = process.wait(ANSWER_LIMIT);
    let mut text = vec![0; ANSWER_SIZE];
    let length = match exit {
        // The writer is gone, so this does not wait.
        Some(_) => reader.read(&mut text).unwrap_or(0),
        None => 0,
    };
    text.truncate(length);
    Ok((exit, String::from_utf8_lossy(&text).into_owned()))
}

/// Waits for the driver of the machine.
fn accept(path: &Path, signals: &Signals) -> Result<UnixStream, Error> {
    let listener = files::listen("accelerator `none`", path)?;
    loop {
        let mut ready = [
            sys::readable(listener.socket.as_fd()),
            sys::readable(signals.as_fd()),
        ];
        sys::poll(&mut ready, None).map_err(system("poll"))?;
        if ready[1].revents != 0
            && let Some(signal) = signals.take()
            && signal != libc::SIGWINCH
        {
            return Err(Unavailable::Interrupted(sys::signal_name(signal)).into());
        }
        if ready[0].revents != 0 {
            let (stream, _) = listener.socket.accept().map_err(system("accept"))?;
            return Ok(stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_the_group_and_the_command() {
        let group = "root:x:0:\nkvm:x:106:someone\n";
        assert_eq!(name_of(group, 106).as_deref(), Some("kvm"));
        assert_eq!(name_of(group, 6), None);
        assert_eq!(name_of("nonsense\n::\n", 6), None);
        let denied = io::Error::from(io::ErrorKind::PermissionDenied);
        let text = advice(&denied, Some(0), 0);
        assert!(text.contains("group `root`"), "{text}");
        assert!(
            text.ends_with("sudo usermod --append --groups root root"),
            "{text}"
        );
        assert!(advice(&denied, None, 0).contains("chmod 660"));
        let missing = io::Error::from(io::ErrorKind::NotFound);
        assert!(advice(&missing, None, 0).contains("modprobe"));
    }
}
