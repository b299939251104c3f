//! `xtask demo`: a stock Debian kernel boots on Anemone, on an ext4 root disk.
//!
//! Where this host's KVM cannot run a stock kernel, the same happens in the nested rig.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::build::{self, Binaries};
use crate::disk::RootDisk;
use crate::doctor::Doctor;
use crate::initramfs::{self, Guest};
use crate::packages::{self, Packages};
use crate::report::Verdict;
use crate::rig::Rig;
use crate::sh;

/// What the guest does when the demonstration is a check.
const STEPS: &str = "uname,disk,rng,irqs,poweroff";
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs the demonstration: with `check` unattended and verified, otherwise with a shell.
pub fn run(check: bool) -> Result<()> {
    let packages = packages::fetch()?;
    let product = build::full()?;
    if let Some(reason) = Doctor::ask(&product)?.kvm_problem() {
        sh::progress(format_args!("KVM of this host: {reason}"));
        sh::progress("using KVM nested in an emulated machine instead");
        let rig = Rig::prepare(&packages, Some(&product))?;
        return if check {
            nested_check(&rig)
        } else {
            rig.interactive()
        };
    }
    let folder = sh::fresh_dir("demo")?;
    let guest = initramfs::guest(&packages)?;
    let disk = RootDisk::make(&packages, &folder.join("root.img"))?;
    if check {
        here_check(&packages, &product, &guest, &disk)
    } else {
        sh::run(&mut command(
            &product,
            &guest,
            &disk,
            "uname,shell,poweroff",
        ))
    }
}

fn command(
    product: &Binaries,
    guest: &Guest,
    disk: &RootDisk,
    steps: &str,
) -> std::process::Command {
    let mut command = product.command("anemone");
    command
        .args([
            "run",
            "--memory",
            "512M",
            "--cpus",
            "2",
            "--console",
            "stdio",
            "--rng",
        ])
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initramfs)
        .arg("--cmdline")
        .arg(format!("console=hvc0 anemone.steps={steps}"))
        .arg("--disk")
        .arg(format!("path={}", disk.image.display()));
    command
}

fn here_check(
    packages: &Packages,
    product: &Binaries,
    guest: &Guest,
    disk: &RootDisk,
) -> Result<()> {
    let done = sh::run_limited(&mut command(product, guest, disk, STEPS), PATIENCE)?;
    print!("{}", done.output);
    ensure!(
        done.code() == Some(0),
        "anemone ended with {:?}",
        done.status
    );
    ensure!(
        done.output.contains("guest: done") && !done.output.contains("guest: FAIL"),
        "the guest did not finish its steps"
    );
    disk.verify(packages)?;
    println!("The guest has read, verified and written its disk, and powered off through ACPI.");
    Ok(())
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
