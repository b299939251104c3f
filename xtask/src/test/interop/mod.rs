//! Other programs on the other side of our protocols: QEMU as front end of our back ends, and
//! foreign back ends under our VMM. One file for each type of device.

mod blk;
mod console;
mod daemons;
mod fs;
mod net;
mod qtest;
mod rng;
mod vsock;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::initramfs::{self, Guest};
use crate::packages::Packages;
use crate::report::Outcome;
use crate::sh::{self, Guarded};

use super::Context;

/// A stock kernel boots in 3 to 5 s under emulation.
const PATIENCE: Duration = Duration::from_secs(90);
/// Time a daemon has to make its socket.
const START: Duration = Duration::from_secs(10);

/// A name and what it shows.
type Test = (&'static str, fn(&Context) -> Result<()>);

const TESTS: &[Test] = &[
    ("qemu boots from anemone-blk, two queues", blk::two_queues),
    ("qemu boots from anemone-blk without io_uring", blk::sync),
    (
        "qemu goes on when anemone-blk is killed and started again",
        blk::restarts,
    ),
    (
        "qemu has a network card of anemone-net on passt",
        net::under_qemu,
    ),
    (
        "qemu goes on when anemone-net is killed and started again",
        net::restarts,
    ),
    ("dpdk's virtio-user on anemone-net", net::under_dpdk),
    ("dpdk's vhost under the loop driver", net::foreign),
    ("qemu has random numbers of anemone-rng", rng::under_qemu),
    ("qemu has sockets of anemone-vsock", vsock::under_qemu),
    ("qemu mounts a directory of anemone-fs", fs::under_qemu),
    ("vhost-device-rng under our VMM", rng::foreign),
    (
        "our VMM goes on when vhost-device-rng is killed and started again",
        rng::foreign_restarts,
    ),
    (
        "vhost-device-vsock under our VMM, memory=shared",
        vsock::foreign_shared,
    ),
    (
        "vhost-device-vsock under our VMM, memory=bounce",
        vsock::foreign_bounced,
    ),
    (
        "Debian's virtiofsd under our VMM, memory=shared",
        fs::debian_shared,
    ),
    (
        "Debian's virtiofsd under our VMM, memory=bounce",
        fs::debian_bounced,
    ),
    (
        "the registry's virtiofsd under our VMM, memory=shared",
        fs::registry_shared,
    ),
    (
        "the registry's virtiofsd under our VMM, memory=bounce",
        fs::registry_bounced,
    ),
    ("vhost-device-console under our VMM", console::foreign),
];

/// Runs all tests, or those whose names contain one of `parts`.
pub fn run(context: &Context, parts: &[String]) -> Result<Vec<Outcome>> {
    let chosen = |name: &str| parts.is_empty() || parts.iter().any(|part| name.contains(part));
    let tests: Vec<_> = TESTS.iter().filter(|(name, _)| chosen(name)).collect();
    if tests.is_empty() {
        let names: Vec<_> = TESTS.iter().map(|(name, _)| *name).collect();
        bail!("no such test; there are: {}", names.join("; "));
    }
    let outcomes = tests.iter().map(|(name, test)| {
        sh::progress(format_args!("  {name} ..."));
        Outcome::of(name, test(context))
    });
    Ok(outcomes.collect())
}

/// A back end of ours or of others that listens at a socket.
struct Daemon {
    name: String,
    process: Guarded,
}

impl Daemon {
    /// Starts it and waits until its socket is there.
    fn start(command: &mut Command, socket: &Path) -> Result<Self> {
        let daemon = Self::spawn(command)?;
        sh::wait_for_path(socket, START)?;
        Ok(daemon)
    }

    /// Starts it.
    fn spawn(command: &mut Command) -> Result<Self> {
        Ok(Self {
            name: sh::display(command),
            process: sh::spawn(command.stdin(Stdio::null()))?,
        })
    }

    /// Ends it at once, as a crash does.
    fn kill(mut self) -> Result<()> {
        self.process.0.kill()?;
        self.process.0.wait()?;
        Ok(())
    }

    /// One of ours must outlive its client, and end well by SIGTERM, with everything written.
    fn end(mut self) -> Result<()> {
        let name = &self.name;
        ensure!(
            self.process.0.try_wait()?.is_none(),
            "{name} ended with its client"
        );
        // SAFETY: no pointers; the process is our child and has not been waited for.
        unsafe { libc::kill(self.process.0.id() as i32, libc::SIGTERM) };
        let ended = sh::wait_limited(&mut self.process.0, START)?;
        ensure!(
            ended.is_some_and(|status| status.success()),
            "{name} did not end on SIGTERM: {ended:?}"
        );
        Ok(())
    }
}

/// QEMU with a stock kernel, its memory shared with back ends, and no device of its own.
struct Qemu(Command);

impl Qemu {
    /// The guest takes these steps (`tests/guest/inner/init.sh`).
    fn new(packages: &Packages, steps: &str) -> Result<Self> {
        let guest = initramfs::guest(packages)?;
        let mut qemu = packages.qemu()?;
        qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "256"])
            .args([
                "-object",
                "memory-backend-memfd,id=memory,size=256M,share=on",
            ])
            .args(["-M", "q35,memory-backend=memory"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&guest.kernel)
            .arg("-initrd")
            .arg(&guest.initramfs)
            .arg("-append")
            .arg(format!("console=ttyS0 anemone.steps={steps}"));
        Ok(Self(qemu))
    }

    /// Adds a vhost-user device, `model` with its properties, whose back end listens at `socket`.
    fn device(&mut self, socket: &Path, model: &str) -> &mut Self {
        self.0
            .arg("-chardev")
            .arg(format!("socket,id=backend,path={}", socket.display()))
            .arg("-device")
            .arg(format!("{model},chardev=backend"));
        self
    }

    /// Runs the guest to its end; returns what it said.
    fn run(&mut self) -> Result<String> {
        finish(&mut self.0)
    }
}

/// Our VMM on the software CPU with a stock kernel and a console.
struct Ours(Command);

impl Ours {
    /// The guest takes these steps.
    fn new(context: &Context, steps: &str) -> Result<Self> {
        let Guest {
            kernel, initramfs, ..
        } = initramfs::guest(context.packages()?)?;
        let mut command = Command::new(context.product()?.path("anemone"));
        command
            .args(["run", "--accel", "soft", "--memory", "256M"])
            .arg("--kernel")
            .arg(kernel)
            .arg("--initrd")
            .arg(initramfs)
            .arg("--cmdline")
            .arg(format!("console=hvc0 anemone.steps={steps}"));
        Ok(Self(command))
    }

    /// Adds an option of `anemone run`.
    fn option(&mut self, name: &str, value: &str) -> &mut Self {
        self.0.arg(format!("{name}={value}"));
        self
    }

    /// Runs the guest to its end; returns what it said.
    fn run(&mut self) -> Result<String> {
        finish(&mut self.0)
    }

    /// Runs a guest that says nothing here to its end.
    fn run_silent(&mut self) -> Result<()> {
        let done = sh::run_limited(&mut self.0, PATIENCE)?;
        ensure!(done.code() == Some(0), "{:?}: {}", done.code(), done.output);
        Ok(())
    }
}

/// Runs a VM whose guest takes steps; each must succeed.
fn finish(vm: &mut Command) -> Result<String> {
    let done = sh::run_limited(vm, PATIENCE)?;
    let output = done.output.clone();
    ensure!(
        done.code() == Some(0) && output.contains("guest: done") && !output.contains("guest: FAIL"),
        "the guest did not finish ({}):\n{output}",
        match done.code() {
            Some(code) => format!("exit code {code}"),
            None => format!("no end in {PATIENCE:?}"),
        }
    );
    Ok(output)
}

/// Adds to the log of a daemon that is not ours, which says more than a terminal should show.
fn log(name: &str) -> Result<File> {
    let folder = sh::build_dir("logs/interop");
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let path = folder.join(format!("{name}.log"));
    File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| path.display().to_string())
}

/// A new folder for the sockets and files of one test.
fn folder(name: &str) -> Result<PathBuf> {
    sh::fresh_dir(&format!("interop/{name}"))
}
