//! The nested rig: a guest of QEMU with an emulated AMD processor whose KVM runs stock kernels,
//! in which `tests/guest` starts VMs. See docs/testing.md.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use anemone_guest_init::place::ROOT_DISKS;
use anemone_guest_init::protocol::TIME_RAN_OUT;
use anyhow::{Context, Result};

use crate::build::{self, Binaries};
use crate::disk::RootDisk;
use crate::initramfs;
use crate::journal::{self, Journal};
use crate::packages::Packages;
use crate::report::{Outcome, Verdict};
use crate::sh;

/// Silence after which the outer guest counts as hung. It sends a line every second.
const SILENCE: Duration = Duration::from_secs(60);

/// The program of the scenario `bare`.
const BARE: &str = "anemone-bare";

/// An outer guest, ready to boot.
pub struct Rig<'a> {
    packages: &'a Packages,
    initramfs: PathBuf,
    folder: PathBuf,
}

impl<'a> Rig<'a> {
    /// Puts the product (unless only the rig itself is wanted) and the inner guest into an
    /// initramfs.
    pub fn prepare(packages: &'a Packages, product: Option<&Binaries>) -> Result<Self> {
        let runner = build::guest_runner()?;
        let guest = initramfs::guest(packages)?;
        let folder = sh::fresh_dir("rig")?;
        let template = RootDisk::make(packages, &folder.join("template.img"))?;
        let mut files = vec![
            ("guest/kernel".to_string(), guest.kernel),
            ("guest/initramfs".to_string(), guest.initramfs),
            ("guest/root.img".to_string(), template.image),
            (format!("bin/{BARE}"), build::program(BARE)?),
        ];
        for (name, path) in packages.with_libraries("qemu-storage-daemon")? {
            files.push((format!("qsd/{name}"), path));
        }
        for (name, path) in packages.clients()? {
            files.push((format!("clients/{name}"), path));
        }
        files.extend(packages.passt_with_libraries()?);
        for (name, path) in product.iter().flat_map(|p| p.iter()) {
            files.push((format!("bin/{name}"), path));
        }
        let initramfs = folder.join("outer.cpio");
        initramfs::outer(&initramfs, packages, &runner, &files)?;
        Ok(Self {
            packages,
            initramfs,
            folder,
        })
    }

    /// Runs scenarios, in one outer boot if none hangs. What ran out of time is tried once more in a
    /// new outer boot: guests hang on the emulated processor of QEMU 7.2 now and then, inner ones as
    /// outer ones. Wrong results are final. Logs of what failed stay in `build/logs/rig`.
    pub fn run(&self, names: &[String]) -> Result<Vec<Outcome>> {
        let mut outcomes = self.run_once(names)?;
        let late = |o: &Outcome| matches!(&o.verdict, Verdict::Failed(why) if why.starts_with(TIME_RAN_OUT));
        let again: Vec<_> = outcomes
            .iter()
            .filter(|o| late(o))
            .map(|o| o.name.clone())
            .collect();
        if again.is_empty() {
            return Ok(outcomes);
        }
        sh::progress(format_args!(
            "{} ran out of time: once more",
            again.join(", ")
        ));
        let logs = sh::build_dir("logs/rig");
        for name in &again {
            let log = |suffix| logs.join(format!("{name}{suffix}.log"));
            std::fs::rename(log(""), log("-first")).context("keeping the log of a scenario")?;
        }
        for second in self.run_once(&again)? {
            if let Some(first) = outcomes.iter_mut().find(|o| o.name == second.name) {
                *first = second;
            }
        }
        Ok(outcomes)
    }

    fn run_once(&self, names: &[String]) -> Result<Vec<Outcome>> {
        let logs = sh::build_dir("logs/rig");
        let mut outcomes = Vec::new();
        let mut left = names.to_vec();
        let mut boots_without_result = 0;
        while !left.is_empty() {
            let mut boot = Boot::start(self, &left, &logs)?;
            let hung = boot.follow()?;
            let finished: BTreeSet<String> = boot
                .journal
                .outcomes
                .iter()
                .map(|o| o.name.clone())
                .collect();
            left.retain(|name| !finished.contains(name));
            boots_without_result = if finished.is_empty() {
                boots_without_result + 1
            } else {
                0
            };
            outcomes.append(&mut boot.journal.outcomes);
            if left.is_empty() {
                break;
            }
            if boots_without_result == 2 {
                for name in left.drain(..) {
                    let why = format!("the outer guest hung twice; see {}", logs.display());
                    outcomes.push(Outcome::new(&name, Verdict::Failed(why)));
                }
                break;
            }
            sh::progress(format_args!(
                "{}; starting it again for {}",
                hung.unwrap_or_else(|| "the outer guest ended early".into()),
                left.join(", ")
            ));
        }
        Ok(outcomes)
    }

    /// Runs the demonstration's guest with its console on this terminal.
    pub fn interactive(&self) -> Result<()> {
        let disk = RootDisk::make(self.packages, &self.folder.join("root.img"))?;
        let mut command = self.qemu(&[disk], "rig.interactive quiet")?;
        let console = self.folder.join("outer.log");
        command
            .arg("-chardev")
            .arg("stdio,id=terminal,signal=off")
            .args(["-serial", "chardev:terminal"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()));
        sh::progress("two kernels boot, one in the other: about 10 s");
        sh::run(&mut command)
    }

    fn qemu(&self, disks: &[RootDisk], cmdline: &str) -> Result<Command> {
        let console = if cmdline.contains("rig.interactive") {
            "ttyS1"
        } else {
            "ttyS0"
        };
        let mut command = self.packages.qemu()?;
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "max,+svm"])
            .args(["-M", "q35", "-smp", "2", "-m", "2048"])
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none"])
            .arg("-kernel")
            .arg(self.packages.kernel())
            .arg("-initrd")
            .arg(&self.initramfs)
            .arg("-append")
            .arg(format!("console={console} panic=-1 {cmdline}"));
        for disk in disks {
            let image = disk.image.display();
            command
                .arg("-drive")
                .arg(format!("if=virtio,format=raw,file={image}"));
        }
        Ok(command)
    }
}

/// One boot of the outer guest.
struct Boot<'a> {
    rig: &'a Rig<'a>,
    qemu: sh::Guarded,
    lines: Receiver<String>,
    /// In the order of [`ROOT_DISKS`].
    disks: Vec<RootDisk>,
    journal: Journal,
}

impl<'a> Boot<'a> {
    fn start(rig: &'a Rig<'a>, names: &[String], logs: &Path) -> Result<Self> {
        let journal = Journal::new(logs)?;
        let disks = ROOT_DISKS
            .iter()
            .map(|name| RootDisk::make(rig.packages, &rig.folder.join(format!("{name}.img"))))
            .collect::<Result<Vec<_>>>()?;
        let cmdline = format!("rig.run={}", names.join(","));
        let mut command = rig.qemu(&disks, &cmdline)?;
        command
            .arg("-serial")
            .arg(format!("file:{}", logs.join("outer-console.log").display()))
            .args(["-chardev", "stdio,id=lines,signal=off"])
            .args(["-serial", "chardev:lines"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(logs.join("qemu.log"))?);
        let mut qemu = sh::spawn(&mut command)?;
        let output = qemu.0.stdout.take().context("QEMU has no output")?;
        sh::progress(format_args!(
            "outer guest boots for {} scenarios",
            names.len()
        ));
        Ok(Self {
            rig,
            qemu,
            lines: journal::lines(output),
            disks,
            journal,
        })
    }

    /// Reads what the outer guest says until it ends. Returns why it was ended from outside, if
    /// it was.
    fn follow(&mut self) -> Result<Option<String>> {
        loop {
            match self.lines.recv_timeout(SILENCE) {
                Ok(text) => {
                    if self.journal.line(&text)? {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    sh::kill_group(&self.qemu.0);
                    return Ok(Some(format!(
                        "the outer guest has been silent for {SILENCE:?} {}",
                        self.place()
                    )));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Ok(Some(format!("the outer guest ended {}", self.place())));
                }
            }
        }
        if sh::wait_limited(&mut self.qemu.0, SILENCE)?.is_none() {
            // Every verdict is there; only the power-off hangs.
            sh::kill_group(&self.qemu.0);
        }
        self.verify_disks();
        Ok(None)
    }

    fn place(&self) -> String {
        match self.journal.running() {
            Some(name) => format!("in scenario {name}"),
            None => "while it booted".to_string(),
        }
    }

    /// The host's part of scenarios with a root disk.
    fn verify_disks(&mut self) {
        for (name, disk) in ROOT_DISKS.iter().zip(&self.disks) {
            for outcome in &mut self.journal.outcomes {
                if outcome.name == *name
                    && outcome.verdict == Verdict::Passed
                    && let Err(error) = disk.verify(self.rig.packages)
                {
                    outcome.verdict = Verdict::Failed(format!("{error:#}"));
                }
            }
        }
    }
}
