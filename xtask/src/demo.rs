//! `xtask demo`: a stock Debian kernel boots on Anemone, on an ext4 root disk; with `--debian` a
//! whole Debian system does.
//!
//! Where this host's KVM cannot run a stock kernel the software CPU does. The nested rig, in which
//! KVM works everywhere, is reached by `--nested`.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::build::{self, Binaries};
use crate::debian;
use crate::disk::RootDisk;
use crate::doctor::Doctor;
use crate::initramfs::{self, Guest};
use crate::packages::{self, Flavour, Packages};
use crate::report::Verdict;
use crate::rig::Rig;
use crate::sh;

/// What the guest does when the demonstration is a check. QEMU's machine has the legacy devices
/// that `irqs` looks for.
const STEPS: &str = "uname,disk,rng,irqs,poweroff";
const STEPS_QEMU: &str = "uname,disk,rng,poweroff";
const PATIENCE: Duration = Duration::from_secs(600);

/// What is demonstrated, and where.
#[derive(Debug, Args)]
pub struct Options {
    /// No shell: let the guest do its work unattended, verify what it did, and exit.
    #[arg(long)]
    check: bool,
    /// A whole Debian system instead of a shell: systemd, apt, python3, openssl.
    #[arg(long)]
    debian: bool,
    /// Debian's kernel to boot.
    #[arg(long, value_enum, value_name = "FLAVOUR", default_value = "cloud")]
    kernel: Flavour,
    /// Virtual CPUs.
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// Memory of the guest: 512M, with --debian 1G.
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
    /// The program that runs the guest; qemu is there to compare with.
    #[arg(long, value_enum, value_name = "PROGRAM", default_value = "anemone")]
    with: With,
    /// Run Anemone with KVM inside an emulated machine that has it.
    #[arg(long, conflicts_with_all = ["debian", "kernel", "cpus", "memory", "with"])]
    nested: bool,
}

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum With {
    Anemone,
    Qemu,
}

/// Runs the demonstration.
pub fn run(options: &Options) -> Result<()> {
    let packages = packages::fetch()?;
    if options.nested {
        sh::progress("KVM nested in an emulated machine");
        let rig = Rig::prepare(&packages, Some(&build::full()?))?;
        return if options.check {
            nested_check(&rig)
        } else {
            rig.interactive()
        };
    }
    let kernel = packages.kernel_of(options.kernel)?;
    let folder = sh::fresh_dir("demo")?;
    if options.debian {
        let image = debian::image(&packages, &kernel)?;
        let disk = folder.join("root.img");
        debian::copy(&image, &disk)?;
        let guest = initramfs::on_disk(&packages, &kernel)?;
        let mut command = options.command(&packages, &guest, &disk, debian::CMDLINE)?;
        if !options.check {
            sh::progress("log in as root; there is no password");
            return sh::run(&mut command);
        }
        let log = sh::build_dir("logs/demo/debian.log");
        debian::check(&packages, &mut command, &disk, &log)?;
        println!("Debian has booted to a login prompt, has worked, and has powered off.");
        return Ok(());
    }
    let guest = initramfs::guest_with(&packages, &kernel)?;
    let disk = RootDisk::make(&packages, &folder.join("root.img"))?;
    let command = |steps| {
        let cmdline = format!("console=hvc0 anemone.steps={steps}");
        options.command(&packages, &guest, &disk.image, &cmdline)
    };
    if !options.check {
        return sh::run(&mut command("uname,shell,poweroff")?);
    }
    let start = Instant::now();
    let steps = match options.with {
        With::Anemone => STEPS,
        With::Qemu => STEPS_QEMU,
    };
    let done = sh::run_limited(&mut command(steps)?, PATIENCE)?;
    print!("{}", done.output);
    ensure!(
        done.code() == Some(0),
        "the VM ended with {:?}",
        done.status
    );
    ensure!(
        done.output.contains("guest: done") && !done.output.contains("guest: FAIL"),
        "the guest did not finish its steps"
    );
    disk.verify_for(&packages, &kernel.release)?;
    println!("The guest has read, verified and written its disk, and powered off through ACPI.");
    sh::progress(format_args!(
        "from start to end: {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    Ok(())
}

impl Options {
    /// The command that runs a guest with its console on standard input and output.
    fn command(
        &self,
        packages: &Packages,
        guest: &Guest,
        disk: &Path,
        cmdline: &str,
    ) -> Result<Command> {
        let machine = Machine {
            cpus: self.cpus,
            memory: match (&self.memory, self.debian) {
                (Some(size), _) => size,
                (None, true) => debian::MEMORY,
                (None, false) => "512M",
            },
            guest,
            disk,
            cmdline,
        };
        if self.with == With::Qemu {
            sh::progress("QEMU, accelerator tcg");
            return machine.qemu(packages);
        }
        let product = build::full()?;
        let accel = match Doctor::ask(&product)?.kvm_problem() {
            None => {
                sh::progress("accelerator kvm: KVM of this host runs stock kernels");
                "kvm"
            }
            Some(problem) => {
                sh::progress(format_args!(
                    "accelerator soft, for KVM of this host cannot be used: {problem}"
                ));
                "soft"
            }
        };
        Ok(machine.anemone(&product, accel))
    }
}

/// A guest with a root disk, its console on standard input and output.
#[derive(Debug)]
pub struct Machine<'a> {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Size of memory, with its unit.
    pub memory: &'a str,
    /// Kernel and initramfs.
    pub guest: &'a Guest,
    /// Image of the root disk.
    pub disk: &'a Path,
    /// Kernel command line.
    pub cmdline: &'a str,
}

impl Machine<'_> {
    /// Run by our VMM.
    pub fn anemone(&self, product: &Binaries, accel: &str) -> Command {
        let mut command = product.command("anemone");
        command
            .args(["run", "--accel", accel, "--console", "stdio", "--rng"])
            .args(["--cpus", &self.cpus.to_string(), "--memory", self.memory])
            .arg("--kernel")
            .arg(&self.guest.kernel)
            .arg("--initrd")
            .arg(&self.guest.initramfs)
            .args(["--cmdline", self.cmdline, "--disk"])
            .arg(format!("path={}", self.disk.display()));
        command
    }

    /// Run by QEMU, the devices on virtio as well.
    fn qemu(&self, packages: &Packages) -> Result<Command> {
        let mut command = packages.qemu()?;
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "q35"])
            .args(["-smp", &self.cpus.to_string(), "-m", self.memory])
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-chardev", "stdio,id=console,signal=off"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", "virtconsole,chardev=console"])
            .args(["-device", "virtio-rng-pci"])
            .arg("-kernel")
            .arg(&self.guest.kernel)
            .arg("-initrd")
            .arg(&self.guest.initramfs)
            .args(["-append", self.cmdline, "-drive"])
            .arg(format!("if=virtio,format=raw,file={}", self.disk.display()));
        Ok(command)
    }
}

fn nested_check(rig: &Rig<'_>) -> Result<()> {
    let outcomes = rig.run(&["demo".to_string()])?;
    for outcome in &outcomes {
        if let Verdict::Failed(why) = &outcome.verdict {
            bail!("{}: {why}; see build/logs/rig", outcome.name);
        }
    }
    print!(
        "{}",
        std::fs::read_to_string(sh::build_dir("logs/rig/demo.log"))?
    );
    println!("The guest has read, verified and written its disk, and powered off through ACPI.");
    Ok(())
}
