//! Whole VMs with stock kernels on the software CPU, right on this host.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::place::{Guest, Place, ROOT_DISKS};
use anemone_guest_init::protocol::Pauses;
use anyhow::{Context as _, Result, bail, ensure};

use crate::build::{self, Binaries};
use crate::debian;
use crate::demo::Machine;
use crate::disk::{self, RootDisk};
use crate::initramfs;
use crate::journal::{self, Journal};
use crate::packages::{Flavour, Packages};
use crate::report::{Outcome, Verdict};
use crate::sh;
use crate::table::{self, Table};

use super::{Context, Missing};

/// Scenarios that run side by side.
const AT_ONCE: usize = 2;
/// Longest that a scenario waits for anything.
const PATIENCE: Duration = Duration::from_secs(150);
/// Longest that a whole scenario takes; some wait for several things.
const SCENARIO: Duration = Duration::from_secs(20 * 60);

/// Longest that a kill takes in a scenario in which a device's process is killed over and over.
const KILL: Duration = Duration::from_secs(1);
/// Scenarios with fio in the guest.
const WITH_FIO: &[&str] = &["kill-blk", "kill-fs"];

/// The scenario that is not the runner's, for it has a guest of its own.
const DEBIAN: (&str, &str) = (
    "debian",
    "a whole Debian system: systemd, apt, python3, openssl",
);

/// Names of all scenarios with what they show; the longest first.
pub fn scenarios(runner: &Path) -> Result<Vec<(String, String)>> {
    let (name, about) = DEBIAN;
    let mut all = vec![(name.to_string(), about.to_string())];
    all.extend(journal::scenarios(runner, "soft")?);
    Ok(all)
}

pub fn run(context: &Context, parts: &[String]) -> Result<Vec<Outcome>> {
    let packages = context.packages()?;
    let runner = build::guest_runner()?;
    let names = journal::select(&scenarios(&runner)?, parts)?;
    let setup = Setup::new(context, packages, &names)?;
    let left = Mutex::new(names.iter().cloned().collect::<VecDeque<_>>());
    let mut outcomes: Vec<Outcome> = thread::scope(|scope| {
        let worker = || {
            let mut outcomes = Vec::new();
            loop {
                let next = left
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .pop_front();
                let Some(name) = next else { return outcomes };
                outcomes.push(setup.run(&runner, &name));
            }
        };
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_default())
            .collect()
    });
    ensure!(outcomes.len() == names.len(), "a worker has ended early");
    setup.show_pauses();
    outcomes.sort_by_key(|outcome| names.iter().position(|name| *name == outcome.name));
    Ok(outcomes)
}

/// A folder of the programs that guests run from a shared directory.
fn clients(packages: &Packages) -> Result<PathBuf> {
    let folder = sh::fresh_dir("guest/clients")?;
    for (name, file) in packages.clients()? {
        let to = folder.join(name);
        std::fs::create_dir_all(to.parent().unwrap_or(&folder))?;
        std::fs::copy(&file, &to).with_context(|| file.display().to_string())?;
    }
    Ok(folder)
}

/// What all scenarios share.
struct Setup<'a> {
    packages: &'a Packages,
    product: &'a Binaries,
    place: Place,
    /// How long guests have waited for devices whose processes were killed.
    pauses: Mutex<Vec<Pauses>>,
}

impl<'a> Setup<'a> {
    fn new(context: &'a Context, packages: &'a Packages, names: &[String]) -> Result<Self> {
        let product = context.product()?;
        let mut guests = Vec::new();
        for flavour in Flavour::ALL {
            let kernel = packages
                .kernel_of(flavour)
                .map_err(|e| Missing(format!("kernel {}: {e:#}", flavour.name())))?;
            let guest = initramfs::guest_with(packages, &kernel)?;
            guests.push(Guest {
                name: flavour.name().to_string(),
                kernel: guest.kernel,
                initramfs: guest.initramfs,
            });
        }
        let folder = sh::fresh_dir("vm-soft")?;
        let template = RootDisk::make(packages, &folder.join("template.img"))?;
        let mut fio = None;
        if names.iter().any(|name| WITH_FIO.contains(&name.as_str())) {
            let files = packages.fio().map_err(|e| Missing(format!("fio: {e:#}")))?;
            let image = folder.join("fio.img");
            disk::of_files(packages, &files, &image)?;
            fio = Some(image);
        }
        let daemon = packages.tool("qemu-storage-daemon")?;
        let words = [daemon.get_program()].into_iter().chain(daemon.get_args());
        let anemone = product.path("anemone");
        let place = Place {
            accel: "soft".to_string(),
            programs: anemone.parent().unwrap_or(Path::new("")).to_path_buf(),
            guests,
            disk: folder.clone(),
            template: template.image,
            scratch: folder,
            storage_daemon: words.map(|w| w.to_string_lossy().into_owned()).collect(),
            passt: packages.passt()?,
            clients: clients(packages)?,
            fio,
            user: None,
            patience: PATIENCE,
        };
        Ok(Self {
            packages,
            product,
            place,
            pauses: Mutex::default(),
        })
    }

    fn run(&self, runner: &Path, name: &str) -> Outcome {
        if name == DEBIAN.0 {
            return Outcome::of(name, self.debian());
        }
        let outcome = self.try_run(runner, name);
        outcome.unwrap_or_else(|error| Outcome::of(name, Err(error)))
    }

    /// Prints what the kills of device processes came to, if there were any.
    fn show_pauses(&self) {
        let mut pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        if pauses.is_empty() {
            return;
        }
        let mut table = Table::new(
            "Device processes killed under load, and how long the guest has waited",
            &[
                "program",
                "kills",
                "in flight",
                "p50 ms",
                "p99 ms",
                "longest ms",
            ],
        );
        pauses.sort_by(|a, b| a.program.cmp(&b.program));
        for p in pauses.iter() {
            let times = [p.p50, p.p99, p.longest].map(table::decimal);
            let counts = [p.kills, p.hits].map(Into::into);
            let row = [p.program.as_str().into()].into_iter();
            table.row(row.chain(counts).chain(times).collect());
        }
        println!("{}", table.text());
    }

    fn debian(&self) -> Result<()> {
        if !sh::is_root() {
            return Err(Missing("root, to make a Debian root file system".into()).into());
        }
        let kernel = self.packages.cloud();
        let image = debian::image(self.packages, kernel)?;
        let disk = sh::fresh_dir("vm-soft/debian")?.join("root.img");
        debian::copy(&image, &disk)?;
        let machine = Machine {
            cpus: 2,
            memory: debian::MEMORY,
            guest: &initramfs::on_disk(self.packages, kernel)?,
            disk: &disk,
            cmdline: debian::CMDLINE,
        };
        let mut command = machine.anemone(self.product, "soft");
        let log = sh::build_dir("logs/vm-soft/debian.log");
        debian::check(self.packages, &mut command, &disk, &log)?;
        std::fs::remove_file(&disk)?;
        Ok(())
    }

    fn try_run(&self, runner: &Path, name: &str) -> Result<Outcome> {
        let folder = sh::fresh_dir(&format!("vm-soft/{name}"))?;
        let disk = RootDisk::make(self.packages, &folder.join("root.img"))?;
        let place = Place {
            disk: disk.image.clone(),
            scratch: folder.clone(),
            ..self.place.clone()
        };
        let mut command = Command::new(runner);
        command
            .arg(name)
            .args(place.arguments())
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = sh::spawn(&mut command)?;
        let lines = journal::lines(child.0.stdout.take().context("the runner has no output")?);
        let mut journal = Journal::new(&sh::build_dir("logs/vm-soft"))?;
        let limit = limit(name)?;
        let end = Instant::now() + limit;
        loop {
            match lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(text) if journal.line(&text)? => break,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("not finished after {limit:?}"),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let pauses = journal
            .figures
            .iter()
            .filter_map(|text| Pauses::parse(text));
        self.pauses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(pauses);
        let mut outcome = journal
            .outcomes
            .pop()
            .context("the runner has no verdict")?;
        if ROOT_DISKS.contains(&name) && outcome.verdict == Verdict::Passed {
            outcome = Outcome::of(name, disk.verify(self.packages));
        }
        if outcome.verdict == Verdict::Passed {
            // Images are looked at after failures only.
            std::fs::remove_dir_all(&folder)?;
        }
        Ok(outcome)
    }
}

/// Longest that a scenario takes; that depends on how often it is to kill a process.
fn limit(name: &str) -> Result<Duration> {
    let kills: u32 = match std::env::var("ANEMONE_KILLS") {
        Ok(text) if name.starts_with("kill-") => text.parse().context("ANEMONE_KILLS")?,
        _ => 0,
    };
    Ok(SCENARIO + KILL * kills)
}
