//! Shared directories: ours under QEMU; virtiofsd under our VMM, both that of Debian's QEMU, written in C,
//! and the Rust one of the Cargo registry.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anemone_guest_init::shared;
use anyhow::{Context as _, Result, ensure};

use crate::packages::Packages;
use crate::sh;

use super::{Context, Daemon, Ours, Qemu, daemons, folder, log};

/// What the guest's step `fs` needs and does.
const STEPS: &str = "uname,fs,poweroff";

/// QEMU is the front end, with a request queue for each of its CPUs.
pub fn under_qemu(context: &Context) -> Result<()> {
    let packages = context.packages()?;
    let (directory, socket) = make("fs")?;
    let server = Daemon::start(
        Command::new(context.product()?.path("anemone-fs"))
            .args(["--tag", "share", "--queues", "2", "--directory"])
            .arg(&directory)
            .arg("--socket")
            .arg(&socket),
        &socket,
    )?;
    let said = Qemu::new(packages, STEPS)?
        .device(&socket, "vhost-user-fs-pci,tag=share,num-request-queues=2")
        .run()?;
    server.end()?;
    check(packages, &directory, &said)
}

/// The daemon of Debian's QEMU, which has no configuration space: the tag is ours to say.
fn debian(context: &Context, memory: &str) -> Result<()> {
    let packages = context.packages()?;
    let (directory, socket) = make(&format!("foreign-fs-debian-{memory}"))?;
    let server = Daemon::start(
        packages
            .tool("virtiofsd")?
            .arg(format!("--socket-path={}", socket.display()))
            .stderr(log("virtiofsd-debian")?)
            .arg("-o")
            .arg(format!("source={}", directory.display())),
        &socket,
    )?;
    let said = Ours::new(context, STEPS)?
        .option(
            "--fs",
            &format!("tag=share,socket={},memory={memory}", socket.display()),
        )
        .run()?;
    drop(server);
    check(packages, &directory, &said)
}

/// Debian's daemon maps guest memory.
pub fn debian_shared(context: &Context) -> Result<()> {
    debian(context, "shared")
}

/// Debian's daemon never sees guest memory.
pub fn debian_bounced(context: &Context) -> Result<()> {
    debian(context, "bounce")
}

/// The daemon of the registry, which has a tag of its own.
fn registry(context: &Context, memory: &str) -> Result<()> {
    let mut daemon = daemons::command(context, "virtiofsd")?;
    let (directory, socket) = make(&format!("foreign-fs-{memory}"))?;
    let server = Daemon::start(
        daemon
            .args(["--tag", "share", "--log-level", "warn", "--shared-dir"])
            .arg(&directory)
            .arg("--socket-path")
            .arg(&socket),
        &socket,
    )?;
    let said = Ours::new(context, STEPS)?
        .option(
            "--vhost-user",
            &format!("type=fs,socket={},memory={memory}", socket.display()),
        )
        .run()?;
    drop(server);
    check(context.packages()?, &directory, &said)
}

/// The registry's daemon maps guest memory.
pub fn registry_shared(context: &Context) -> Result<()> {
    registry(context, "shared")
}

/// The registry's daemon never sees guest memory.
pub fn registry_bounced(context: &Context) -> Result<()> {
    registry(context, "bounce")
}

/// A directory with what the guest expects, and a socket beside it.
fn make(name: &str) -> Result<(PathBuf, PathBuf)> {
    let folder = folder(name)?;
    let directory = folder.join("shared");
    fs::create_dir(&directory)?;
    shared::fill(&directory).map_err(anyhow::Error::msg)?;
    Ok((directory, folder.join("socket")))
}

/// The guest has found what was there and has left what it was to leave.
fn check(packages: &Packages, directory: &Path, said: &str) -> Result<()> {
    ensure!(said.contains("guest: share written"), "{said}");
    shared::written(directory).map_err(anyhow::Error::msg)?;
    let program = directory.join("tree/moved/busybox");
    let copied = fs::read(&program).with_context(|| program.display().to_string())?;
    ensure!(
        copied == fs::read(packages.busybox())?,
        "the program that the guest has copied is another one"
    );
    sh::progress(
        "    2 MiB from the host, 103 entries of a tree and a program of the guest: digests, bytes, \
         links and modes are the same on both sides",
    );
    Ok(())
}
