//! Processes of Anemone that have been taken over: a build of each that tries what it must not
//! (`tests/compromised`), under a guest that has started all of them. Everything must be refused and
//! reported, nothing outside may have changed, and the guest must not notice.
//!
//! The guest's CPU is the test itself (`accel/none`): it has no driver that would hide a fault.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anemone_compromised::{
    ATTEMPTS, FATAL, FIND, MEMORY_ATTEMPTS, Outcome as Answer, Plan, Report, SERVING,
};
use anemone_guest_init::jail;
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::build::{self, Binaries};
use crate::packages::Packages;
use crate::report::Outcome;
use crate::table::Table;
use crate::{sh, tiny};

use super::{Context, Missing};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// The processes by the names in their reports, and whether they are given guest memory. Between them
/// are all device types and both ways to expose memory.
const DEVICES: &[(&str, bool)] = &[
    ("anemone-balloon[balloon]", false),
    ("anemone-blk[disk0]", true),
    ("anemone-blk[disk1]", false),
    ("anemone-console[console]", false),
    ("anemone-fs[fs0]", true),
    ("anemone-net[net0]", true),
    ("anemone-pmem[pmem0]", true),
    ("anemone-rng[rng]", false),
    ("anemone-vsock[vsock]", true),
];
/// Shares whose policies are others, in the VM on the software CPU. Nobody mounts them.
const SHARES: &[&str] = &["anemone-fs[read]", "anemone-fs[owner]"];
const VMM: &str = "anemone-vmm";
/// The attempts without a jail.
const CONTROL: &str = "no jail";

/// Policies of threads that these VMs have not: they are KVM's.
const ELSEWHERE: &[(&str, &str)] = &[(VMM, "vcpu"), (VMM, "cpuid")];

/// What some hosts have nowhere: the attempt shows nothing there.
const HOST_LACKS: &[i32] = &[libc::ENOENT, libc::ENOSYS, libc::EAFNOSUPPORT, libc::EPERM];

pub fn run(context: &Context, outcomes: &mut Vec<Outcome>) -> Result<()> {
    if !sh::is_root() {
        return Err(Missing("root, to see that the attempts succeed without a jail".into()).into());
    }
    let packages = context.packages()?;
    let product = context.product()?;
    let programs = build::compromised()?;
    outcomes.push(Outcome::of(
        "compromised: the mark is in the test builds",
        marked(&programs),
    ));
    let trial = Trial::new(&programs)?;
    let mut reports = trial.without_a_jail(&programs)?;
    outcomes.push(Outcome::of(
        "compromised: the attempts succeed without a jail",
        real(&reports),
    ));
    let played = trial
        .play(packages, product, &programs)
        .and_then(|()| trial.software_cpu(product, &programs))
        .and_then(|()| trial.question(product, &programs));
    let log = fs::read_to_string(&trial.log).unwrap_or_default();
    reports.extend(log.lines().filter_map(Report::parse));
    println!("{}", table(&reports, &log).text());
    outcomes.push(Outcome::of("compromised: the guest works on", played));
    outcomes.push(Outcome::of(
        "compromised: nothing outside has changed",
        trial.untouched(),
    ));
    outcomes.push(Outcome::of(
        "compromised: every policy was tried",
        policies_tried(&reports),
    ));
    let devices = DEVICES.iter().map(|(role, shared)| (*role, Some(*shared)));
    let others = SHARES.iter().chain([&VMM]).map(|role| (*role, None));
    for (role, shared) in devices.chain(others) {
        let own: Vec<_> = reports.iter().filter(|r| r.role == role).collect();
        outcomes.push(Outcome::of(
            &format!("compromised: {role} is refused everything"),
            refused(&own, shared),
        ));
        outcomes.push(Outcome::of(
            &format!("compromised: {role} is reported"),
            reported(role, &own, &log),
        ));
    }
    Ok(())
}

/// A check that finds nothing in the product must find what it looks for where it is.
fn marked(programs: &Binaries) -> Result<()> {
    for (name, path) in programs.iter().filter(|(name, _)| *name != "anemone-passt") {
        ensure!(build::is_compromised(&path)?, "{name} is a product");
    }
    Ok(())
}

/// A folder with everything of the test.
struct Trial {
    folder: PathBuf,
    canary: PathBuf,
    inode: (u64, u32, u32),
    listener: UnixListener,
    plan: Plan,
    kernel: PathBuf,
    log: PathBuf,
}

/// Content of the file that nobody may reach.
const CANARY: &str = "nobody but the test reads this\n";

impl Trial {
    fn new(programs: &Binaries) -> Result<Self> {
        let folder = sh::fresh_dir("jail/compromised")?;
        let canary = folder.join("canary");
        fs::write(&canary, CANARY)?;
        fs::create_dir(folder.join("sub"))?;
        fs::create_dir(folder.join("share"))?;
        File::create(folder.join("memory.img"))?.set_len(2 << 20)?;
        for disk in ["disk0.img", "disk1.img"] {
            File::create(folder.join(disk))?.set_len(1 << 20)?;
        }
        let socket = format!("anemone-canary-{}", std::process::id());
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&socket)?)?;
        listener.set_nonblocking(true)?;
        let plan = Plan {
            canary: std::ffi::CString::new(canary.clone().into_os_string().into_vec())?,
            socket,
            processes: Vec::new(),
        };
        plan.write(&home(programs)?, 0)?;
        let inode = identity(&canary)?;
        Ok(Self {
            kernel: tiny::kernel()?,
            log: folder.join("errors.log"),
            folder,
            canary,
            inode,
            listener,
            plan,
        })
    }

    /// The control: every attempt by a process outside of any jail.
    fn without_a_jail(&self, programs: &Binaries) -> Result<Vec<Report>> {
        let other = self.folder.join("free");
        fs::create_dir_all(other.join("sub"))?;
        let canary = other.join("canary");
        fs::write(&canary, CANARY)?;
        let name = format!("{}-free", self.plan.socket);
        let _listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
        let mut command = programs.command("anemone-compromised");
        let output = sh::quiet(command.arg(&canary).arg(name))?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(text.lines().filter_map(Report::parse).collect())
    }

    /// Starts all devices, has every process try everything, and then what kills it; has those that
    /// come in the place of device processes try as well, and goes on using devices.
    fn play(&self, packages: &Packages, product: &Binaries, programs: &Binaries) -> Result<()> {
        let socket = self.folder.join("driver");
        let accel = format!("none,socket={}", socket.display());
        let mut command = self.command(product, programs, &accel)?;
        let mut child = sh::spawn(self.all_devices(&mut command, packages)?)?;
        sh::wait_for_path(&socket, PATIENCE)?;
        let mut cpu = Cpu(BufReader::new(UnixStream::connect(&socket)?));
        let devices = cpu.start_devices()?;
        ensure!(
            devices.len() == DEVICES.len(),
            "the guest finds {} devices",
            devices.len()
        );
        cpu.random(&devices, 1)?;
        let processes = jail::family(child.0.id());
        let plan = Plan {
            processes: processes.iter().map(|one| one.pid as i32).collect(),
            ..self.plan.clone()
        };
        plan.write(&home(programs)?, 1)?;
        self.wait(&mut child, "every device has tried", || self.rounds() >= 1)?;
        ensure!(
            jail::family(child.0.id()) == processes,
            "processes have ended: there were {processes:?}"
        );
        cpu.random(&devices, 2)?;
        plan.write(&home(programs)?, 2)?;
        self.wait(&mut child, "every device in their place has tried", || {
            self.rounds() >= 2
        })?;
        cpu.random(&devices, 3)?;
        cpu.all_run(&devices)
    }

    /// The threads that a VM on the software CPU has besides: they try when they start.
    fn software_cpu(&self, product: &Binaries, programs: &Binaries) -> Result<()> {
        let share = self.folder.join("share");
        let mut command = self.command(product, programs, "soft")?;
        for (id, more) in [("read", "readonly"), ("owner", "owner=guest")] {
            let option = format!("path={},tag={id},id={id},{more}", share.display());
            command.args(["--fs", &option]);
        }
        let mut child = sh::spawn(&mut command)?;
        let tried = |policy: &str| {
            let end = format!(
                ": {policy}: {}: ",
                ATTEMPTS.last().map_or("", |last| last.name)
            );
            fs::read_to_string(&self.log).is_ok_and(|log| log.contains(&end))
        };
        self.wait(&mut child, "its threads have tried", || {
            ["vcpu-soft", "irqfd", "run", "read", "owner"]
                .iter()
                .all(|policy| tried(policy))
        })
    }

    /// The VMM that tells what this host can do tries before it answers.
    fn question(&self, product: &Binaries, programs: &Binaries) -> Result<()> {
        let log = File::options().append(true).open(&self.log)?;
        let mut command = product.command("anemone");
        command
            .env("ANEMONE_LIBEXEC", home(programs)?)
            .arg("cpu-models")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let mut child = sh::spawn(&mut command)?;
        let ended = sh::wait_limited(&mut child.0, PATIENCE)?;
        ensure!(
            ended.is_some_and(|status| status.success()),
            "anemone cpu-models: {ended:?}"
        );
        Ok(())
    }

    fn wait(&self, child: &mut sh::Guarded, what: &str, done: impl Fn() -> bool) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while !done() {
            if let Some(status) = child.0.try_wait()? {
                bail!(
                    "anemone ended before {what} ({status}); see {}",
                    self.log.display()
                );
            }
            ensure!(Instant::now() < end, "time ran out before {what}");
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    fn command(&self, product: &Binaries, programs: &Binaries, accel: &str) -> Result<Command> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = product.command("anemone");
        command
            .env("ANEMONE_LIBEXEC", home(programs)?)
            .args(["run", "--accel", accel, "--memory", "64M", "--kernel"])
            .arg(&self.kernel)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        Ok(command)
    }

    fn all_devices<'c>(
        &self,
        command: &'c mut Command,
        packages: &Packages,
    ) -> Result<&'c mut Command> {
        let file = |name: &str| self.folder.join(name).display().to_string();
        let passt = packages.passt()?;
        Ok(command
            .args(["--rng", "--balloon"])
            .args(["--console", &format!("file={}", file("console.log"))])
            .args(["--disk", &format!("path={}", file("disk0.img"))])
            .args([
                "--disk",
                &format!("path={},memory=bounce", file("disk1.img")),
            ])
            .args(["--pmem", &format!("path={}", file("memory.img"))])
            .args(["--fs", &format!("tag=share,path={}", file("share"))])
            .args(["--vsock", &format!("socket={}", file("vsock"))])
            .args(["--net", &format!("user,passt={}", passt.display())]))
    }

    /// How often the device that is behind has tried everything while it served.
    fn rounds(&self) -> usize {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = MEMORY_ATTEMPTS.last().map_or("", |attempt| attempt.name);
        let ends = log.lines().filter(|line| line.contains(last));
        let reports: Vec<_> = ends.filter_map(Report::parse).collect();
        let rounds = |role: &str| {
            let of_role = |r: &&Report| r.role == role && r.policy == SERVING && r.name == last;
            reports.iter().filter(of_role).count()
        };
        let rounds = DEVICES.iter().map(|(role, _)| rounds(role));
        rounds.min().unwrap_or(0)
    }

    /// What the processes could have changed or reached.
    fn untouched(&self) -> Result<()> {
        ensure!(
            fs::read_to_string(&self.canary)? == CANARY && identity(&self.canary)? == self.inode,
            "{} has changed",
            self.canary.display()
        );
        ensure!(
            fs::symlink_metadata(self.folder.join("planted")).is_err(),
            "a file was planted beside the canary"
        );
        let called = self.listener.accept();
        ensure!(
            called.is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock),
            "somebody has connected to the abstract socket"
        );
        let name = SocketAddr::from_abstract_name(format!("{}-planted", self.plan.socket))?;
        UnixListener::bind_addr(&name).context("the planted name in the abstract namespace")?;
        Ok(())
    }
}

fn home(programs: &Binaries) -> Result<PathBuf> {
    let path = programs.path(VMM);
    Ok(path
        .parent()
        .context("programs have a folder")?
        .to_path_buf())
}

/// What tells a file from another in its place: inode, mode and owner.
fn identity(path: &Path) -> Result<(u64, u32, u32)> {
    let status = fs::metadata(path)?;
    Ok((status.ino(), status.mode(), status.uid()))
}

/// The guest: accesses of its CPU, by the lines of `accel/none`.
struct Cpu(BufReader<UnixStream>);

/// PCI configuration space (docs/machine.md).
const ECAM: u64 = 0xFC00_0000;
/// Vendor of virtio devices.
const VIRTIO: u64 = 0x1AF4;
/// Entropy source: device 4 of modern virtio.
const RNG: u64 = 0x1044;
/// Balloon: the first two of its queues belong to no feature.
const BALLOON: u64 = 0x1045;
/// Guest memory: queues of 16 KiB each, and a page with the secret.
const QUEUES: u64 = 0x40_0000;
const SECRET: u64 = 0x20_0000;
/// Doorbells in a device's BAR (docs/machine.md); the first is that of queue 0.
const DOORBELLS: u64 = 0x3000;
/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK (virtio 1.3, 2.1).
const STATUS: [u64; 3] = [1, 3, 11];
const RUNNING: u64 = 15;

/// A device that was started.
struct Started {
    bar: u64,
    device: u64,
    /// Where its first queue lies.
    queue: u64,
}

impl Cpu {
    fn ask(&mut self, request: &str) -> Result<String> {
        writeln!(self.0.get_mut(), "{request}")?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        let value = answer.strip_prefix("ok").map(str::trim);
        Ok(value
            .with_context(|| format!("{request}: {answer}"))?
            .to_string())
    }

    fn read(&mut self, address: u64, width: u64) -> Result<u64> {
        let text = self.ask(&format!("read {address:#x} {width}"))?;
        Ok(u64::from_str_radix(text.trim_start_matches("0x"), 16)?)
    }

    fn write(&mut self, address: u64, width: u64, value: u64) -> Result<()> {
        self.ask(&format!("write {address:#x} {width} {value:#x}"))
            .map(drop)
    }

    /// Puts the secret into memory and starts every virtio device with its queues, as a driver
    /// does that needs no feature (virtio 1.3, 3.1.1 and 4.1.4.3).
    fn start_devices(&mut self) -> Result<Vec<Started>> {
        let secret = anemone_compromised::secret();
        let secret: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        self.ask(&format!("store {SECRET:#x} {secret}"))?;
        let mut started = Vec::new();
        let mut queue = QUEUES;
        for slot in 0..32 {
            let config = ECAM + (slot << 15);
            if self.read(config, 2)? != VIRTIO {
                continue;
            }
            // Memory and bus mastering.
            self.write(config + 4, 2, 6)?;
            let low = self.read(config + 0x10, 4)? & !0xF;
            let bar = low | self.read(config + 0x14, 4)? << 32;
            let device = self.read(config + 2, 2)?;
            started.push(Started { bar, device, queue });
            for status in &STATUS[..2] {
                self.write(bar + 20, 1, *status)?;
            }
            // VIRTIO_F_VERSION_1 alone.
            self.write(bar + 8, 4, 1)?;
            self.write(bar + 12, 4, 1)?;
            self.write(bar + 20, 1, STATUS[2])?;
            let queues = match device {
                BALLOON => 2,
                _ => self.read(bar + 18, 2)?,
            };
            for index in 0..queues {
                self.write(bar + 22, 2, index)?;
                self.write(bar + 24, 2, 8)?;
                for (register, offset) in [(32, 0), (40, 0x1000), (48, 0x2000)] {
                    self.write(bar + register, 8, queue + offset)?;
                }
                self.write(bar + 28, 2, 1)?;
                queue += 0x4000;
            }
            self.write(bar + 20, 1, RUNNING)?;
        }
        Ok(started)
    }

    /// The device's status must be what the driver has made it: it does not ask for a reset.
    fn all_run(&mut self, started: &[Started]) -> Result<()> {
        for Started { bar, device, .. } in started {
            let status = self.read(bar + 20, 1)?;
            ensure!(
                status == RUNNING,
                "device {device:#x} has status {status:#x}"
            );
        }
        Ok(())
    }

    /// Has the entropy source fill a buffer, for the `n`th time.
    fn random(&mut self, started: &[Started], n: u64) -> Result<()> {
        let rng = started.iter().find(|one| one.device == RNG);
        let rng = rng.context("there is no entropy source")?;
        let (table, available, used) = (rng.queue, rng.queue + 0x1000, rng.queue + 0x2000);
        let buffer = rng.queue + 0x3000 + 64 * n;
        self.write(table, 8, buffer)?;
        self.write(table + 8, 4, 64)?;
        // For the device to write.
        self.write(table + 12, 4, 2)?;
        self.write(available + 2, 2, n)?;
        self.write(rng.bar + DOORBELLS, 2, 0)?;
        let end = Instant::now() + PATIENCE;
        while self.read(used + 2, 2)? != n {
            ensure!(Instant::now() < end, "no random bytes");
            thread::sleep(Duration::from_millis(5));
        }
        let bytes = self.ask(&format!("load {buffer:#x} 64"))?;
        ensure!(
            bytes.chars().any(|digit| digit != '0'),
            "64 zeros are not random"
        );
        Ok(())
    }
}

/// Without a jail everything must succeed but what this host has not.
fn real(reports: &[Report]) -> Result<()> {
    let mut lacking = Vec::new();
    for report in reports.iter().filter(|report| report.role == CONTROL) {
        match report.outcome {
            Answer::Done(_) => {}
            Answer::Errno(errno) if HOST_LACKS.contains(&errno) => lacking.push(&report.name),
            other => bail!("{}: {other}", report.name),
        }
    }
    ensure!(
        lacking.len() * 10 < reports.len(),
        "this host has not: {lacking:?}"
    );
    for attempt in ATTEMPTS.iter().chain([FATAL]) {
        ensure!(
            reports.iter().any(|report| report.name == attempt.name),
            "{} was not tried",
            attempt.name
        );
    }
    Ok(())
}

/// All policies of the programs have had a thread that tried.
fn policies_tried(reports: &[Report]) -> Result<()> {
    let folders = DEVICES.iter().map(|(role, _)| {
        let program = role.split('[').next().unwrap_or(role);
        let device = program.trim_start_matches("anemone-");
        (
            program,
            sh::root().join("devices").join(device).join("policy"),
        )
    });
    let mut missing = BTreeSet::new();
    for (program, folder) in folders.chain([(VMM, sh::root().join("vmm/policy"))]) {
        for policy in anemone_policy::load(&folder)? {
            let tried =
                |r: &Report| r.role.split('[').next() == Some(program) && r.policy == policy.name;
            if !reports.iter().any(tried) && !ELSEWHERE.contains(&(program, &policy.name)) {
                missing.insert(format!("{program} {}", policy.name));
            }
        }
    }
    ensure!(missing.is_empty(), "no thread with {missing:?}");
    Ok(())
}

/// Everything that a process has tried was refused, but for the memory that it has been given.
fn refused(own: &[&Report], shared: Option<bool>) -> Result<()> {
    ensure!(!own.is_empty(), "it has tried nothing");
    let mut wrong = Vec::new();
    for report in own {
        let attempt = ATTEMPTS
            .iter()
            .chain(MEMORY_ATTEMPTS)
            .chain([FATAL])
            .find(|attempt| attempt.name == report.name)
            .with_context(|| format!("no attempt is called {}", report.name))?;
        let of_memory = MEMORY_ATTEMPTS
            .iter()
            .any(|other| other.name == report.name);
        let good = match report.outcome {
            Answer::Denied => true,
            Answer::Errno(errno) => attempt.refusals.contains(&errno),
            // It has descriptors, and memory at that.
            Answer::Nothing => !of_memory && report.policy != SERVING,
            Answer::Absent(bytes) => shared == Some(false) && bytes > 0,
            // That it is found shows that the others look.
            Answer::Done(_) => report.name == FIND && shared == Some(true),
        };
        if !good {
            wrong.push(format!(
                "policy {}: {}: {}",
                report.policy, report.name, report.outcome
            ));
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Each denial is also in a report of the jail's.
fn reported(role: &str, own: &[&Report], log: &str) -> Result<()> {
    let denied = own.iter().filter(|r| r.outcome == Answer::Denied).count();
    let start = format!("{role}: denied: process ");
    let lines = log.lines().filter(|line| line.starts_with(&start)).count();
    ensure!(
        denied > 0 && lines >= denied,
        "{denied} denials, {lines} reports"
    );
    ensure!(
        role == VMM || SHARES.contains(&role) || was_killed(role, log),
        "the supervisor does not tell that it was killed by SIGSYS: {}",
        FATAL.name
    );
    Ok(())
}

/// Whether the supervisor says that a device was ended by its filter.
fn was_killed(role: &str, log: &str) -> bool {
    let id = role.split(['[', ']']).nth(1).unwrap_or(role);
    let about = format!("device `{id}`: ");
    log.lines()
        .any(|line| line.contains(&about) && line.contains("was killed by SIGSYS"))
}

/// A row for each attempt, a column for each process, with all answers that its threads have had.
fn table(reports: &[Report], log: &str) -> Table {
    let roles = || {
        let devices = DEVICES.iter().map(|(role, _)| *role);
        [CONTROL].into_iter().chain(devices).chain([VMM])
    };
    let short = |role: &'static str| role.trim_start_matches("anemone-").to_string();
    let columns: Vec<_> = ["attempt".to_string()]
        .into_iter()
        .chain(roles().map(short))
        .collect();
    let columns: Vec<_> = columns.iter().map(String::as_str).collect();
    let mut cells: BTreeMap<(&str, &str), BTreeSet<String>> = BTreeMap::new();
    for report in reports {
        let cell = cells.entry((&report.name, &report.role)).or_default();
        cell.insert(word(report.outcome));
    }
    for (role, _) in DEVICES.iter().filter(|(role, _)| was_killed(role, log)) {
        let cell = cells.entry((FATAL.name, *role)).or_default();
        cell.insert("killed".to_string());
    }
    let mut table = Table::new("Attempts of compromised processes", &columns);
    for attempt in ATTEMPTS.iter().chain(MEMORY_ATTEMPTS).chain([FATAL]) {
        let cell = |role| {
            let words = cells.get(&(attempt.name, role));
            let words: Vec<_> = words.into_iter().flatten().map(String::as_str).collect();
            Value::from(words.join(" "))
        };
        table.row(
            [attempt.name.into()]
                .into_iter()
                .chain(roles().map(cell))
                .collect(),
        );
    }
    table
}

fn word(answer: Answer) -> String {
    match answer {
        Answer::Done(_) => "DONE".into(),
        Answer::Denied => "denied".into(),
        Answer::Nothing => "-".into(),
        Answer::Absent(_) => "absent".into(),
        Answer::Errno(errno) => match errno {
            libc::EPERM => "EPERM".into(),
            libc::ENOENT => "ENOENT".into(),
            libc::ENOMEM => "ENOMEM".into(),
            libc::EACCES => "EACCES".into(),
            libc::EFAULT => "EFAULT".into(),
            libc::EXDEV => "EXDEV".into(),
            libc::ENOSYS => "ENOSYS".into(),
            libc::ELOOP => "ELOOP".into(),
            other => format!("error {other}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLE: &str = "anemone-rng[rng]";

    fn report(policy: &str, name: &str, outcome: Answer) -> Report {
        Report {
            role: ROLE.into(),
            round: 1,
            policy: policy.into(),
            name: name.into(),
            outcome,
        }
    }

    fn verdict(report: &Report, shared: bool) -> Result<(), String> {
        refused(&[report], Some(shared)).map_err(|e| e.to_string())
    }

    #[test]
    fn only_a_refusal_is_one() {
        let try_socket = |outcome| verdict(&report("main", "socket AF_UNIX", outcome), false);
        assert_eq!(try_socket(Answer::Denied), Ok(()));
        assert_eq!(try_socket(Answer::Errno(libc::EPERM)), Ok(()));
        let hole = try_socket(Answer::Done(5)).unwrap_err();
        assert_eq!(hole, "policy main: socket AF_UNIX: done 5");
        // The kernel has looked at the arguments.
        assert!(try_socket(Answer::Errno(libc::EFAULT)).is_err());
        assert!(refused(&[], None).is_err());
    }

    #[test]
    fn who_has_guest_memory_finds_the_secret_and_nobody_else() {
        let find = |outcome, shared| verdict(&report(SERVING, FIND, outcome), shared);
        assert_eq!(find(Answer::Done(4096), true), Ok(()));
        assert!(find(Answer::Absent(4096), true).is_err());
        assert!(find(Answer::Done(4096), false).is_err());
        assert_eq!(find(Answer::Absent(4096), false), Ok(()));
        assert!(find(Answer::Absent(0), false).is_err());
    }

    #[test]
    fn a_device_that_serves_has_memory_to_try() {
        let past = |outcome| verdict(&report(SERVING, MEMORY_ATTEMPTS[1].name, outcome), true);
        assert_eq!(past(Answer::Errno(libc::EFAULT)), Ok(()));
        assert!(past(Answer::Nothing).is_err());
    }

    #[test]
    fn a_denial_without_a_report_is_noticed() {
        let denied = report("main", "execve", Answer::Denied);
        let line = format!("{ROLE}: denied: process 7, thread 7: execve\n");
        let end = "anemone: warn: device `rng`: anemone-rng, pid 7, was killed by SIGSYS: …";
        assert!(reported(ROLE, &[&denied], &(line.clone() + end)).is_ok());
        assert!(reported(ROLE, &[&denied], end).is_err());
        assert!(reported(ROLE, &[&denied], &line).is_err());
        assert!(reported(ROLE, &[], &(line + end)).is_err());
    }

    #[test]
    fn attempts_that_fail_without_a_jail_show_nothing() {
        let all = |outcome| -> Vec<Report> {
            let names = ATTEMPTS.iter().chain([FATAL]).map(|attempt| attempt.name);
            let reports = names.map(|name| Report {
                role: CONTROL.into(),
                ..report("none", name, outcome)
            });
            reports.collect()
        };
        let mut reports = all(Answer::Done(0));
        assert!(real(&reports).is_ok());
        reports[3].outcome = Answer::Errno(libc::ENOENT);
        assert!(real(&reports).is_ok());
        reports[3].outcome = Answer::Errno(libc::EBADF);
        assert!(real(&reports).is_err());
        reports.remove(3);
        assert!(real(&reports).is_err());
        assert!(real(&all(Answer::Errno(libc::ENOENT))).is_err());
    }
}
