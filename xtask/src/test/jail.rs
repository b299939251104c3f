//! The jail as the host sees it. With each accelerator, a VM with one device of each kind runs a
//! guest that only halts; `/proc` must show every process jailed, and forbidden system calls that
//! are made *in* those processes must kill them. The second half needs root, for ptrace.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::jail::{self, Process};
use anyhow::{Context as _, Result, bail, ensure};

use crate::build::Binaries;
use crate::report::Outcome;
use crate::{sh, tiny};

use super::inject::{self, Call};
use super::{Context, Missing, compromised};

/// What none of the processes may do.
const FORBIDDEN: &[Call] = &[
    Call {
        name: "openat",
        number: libc::SYS_openat,
        // AT_FDCWD as a signed 32-bit number.
        arguments: [0xFFFF_FF9C, 0, 0],
    },
    Call {
        name: "socket",
        number: libc::SYS_socket,
        arguments: [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0],
    },
    Call {
        name: "execve",
        number: libc::SYS_execve,
        arguments: [0, 0, 0],
    },
    Call {
        name: "mmap",
        number: libc::SYS_mmap,
        arguments: [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as u64],
    },
];

/// What a thread of the software CPU may not do besides: it needs nothing of KVM.
const NOT_FOR_SOFT: Call = Call {
    name: "ioctl",
    number: libc::SYS_ioctl,
    arguments: [u64::MAX, KVM_RUN, 0],
};
/// KVM_RUN (linux/kvm.h).
const KVM_RUN: u64 = 0xAE80;

const VMM: &str = "anemone-vmm";

/// Programs whose processes are looked at and injected into. The supervisor is trusted: it opens
/// what the user names, and is not among them.
const PROGRAMS: &[&str] = &[
    VMM,
    "anemone-balloon",
    "anemone-blk",
    "anemone-console",
    "anemone-fs",
    "anemone-net",
    "anemone-pmem",
    "anemone-rng",
    "anemone-vsock",
];

/// Programs outside of the jail: passt, which jails itself, and what keeps it running.
const OUTSIDE: &[&str] = &["anemone-passt", "passt"];

pub fn run(context: &Context, parts: &[String]) -> Result<Vec<Outcome>> {
    let wanted = |name: &str| parts.is_empty() || parts.iter().any(|part| part == name);
    let known = |part: &String| matches!(part.as_str(), "kvm" | "soft" | "compromised");
    if let Some(part) = parts.iter().find(|part| !known(part)) {
        bail!("{part} is no part of the jail tests; there are kvm, soft and compromised");
    }
    if wanted("kvm") && !PathBuf::from("/dev/kvm").exists() {
        return Err(Missing("/dev/kvm, for a VM that runs; jail:soft needs none".into()).into());
    }
    let product = context.product()?;
    let passt = context.packages()?.passt()?;
    let mut outcomes = Vec::new();
    for accel in ["kvm", "soft"] {
        if wanted(accel) {
            run_with(&Setup::new(product, accel, &passt)?, &mut outcomes);
        }
    }
    if wanted("compromised") {
        compromised::run(context, &mut outcomes)?;
    }
    Ok(outcomes)
}

fn run_with(setup: &Setup<'_>, outcomes: &mut Vec<Outcome>) {
    let accel = setup.accel;
    let name = format!("{accel}: proc");
    outcomes.push(Outcome::of(&name, setup.looks_jailed()));
    if !sh::is_root() {
        let why = Missing("root, to make system calls in another process".into());
        let name = format!("{accel}: denials");
        outcomes.push(Outcome::of(&name, Err(why.into())));
        return;
    }
    let name = format!("{accel}: the supervisor reaches what it needs and no other file");
    outcomes.push(Outcome::of(&name, setup.supervisor_is_narrow()));
    let (name, result) = setup.groups();
    outcomes.push(Outcome::of(&format!("{accel}: {name}"), result));
    let mut denied = |who: &str, program: &str, call: Call, thread: Option<&str>| {
        let name = format!("{accel}: {who} cannot {}", call.name);
        let result = setup.is_denied(program, call, thread);
        outcomes.push(Outcome::of(&name, result));
    };
    // The device processes do not know of accelerators.
    let programs = if accel == "kvm" {
        PROGRAMS
    } else {
        &PROGRAMS[..1]
    };
    for program in programs {
        for call in FORBIDDEN {
            denied(program, program, *call, None);
        }
    }
    for call in FORBIDDEN {
        denied("a vCPU thread", VMM, *call, Some("vcpu"));
    }
    if accel == "soft" {
        denied("a vCPU thread", VMM, NOT_FOR_SOFT, Some("vcpu"));
        for call in FORBIDDEN.iter().chain([&NOT_FOR_SOFT]) {
            denied("the interrupt thread", VMM, *call, Some("irqfd"));
        }
    }
}

struct Setup<'a> {
    product: &'a Binaries,
    accel: &'static str,
    passt: &'a Path,
    kernel: PathBuf,
    disk: PathBuf,
    memory: PathBuf,
    share: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    errors: PathBuf,
}

impl<'a> Setup<'a> {
    fn new(product: &'a Binaries, accel: &'static str, passt: &'a Path) -> Result<Self> {
        let folder = sh::fresh_dir("jail")?;
        let disk = folder.join("disk.img");
        fs::File::create(&disk)?.set_len(1 << 20)?;
        let memory = folder.join("memory.img");
        fs::File::create(&memory)?.set_len(2 << 20)?;
        let share = folder.join("share");
        fs::create_dir(&share)?;
        Ok(Self {
            product,
            accel,
            passt,
            kernel: tiny::kernel()?,
            disk,
            memory,
            share,
            socket: folder.join("vsock"),
            log: folder.join("console.log"),
            errors: folder.join("errors.log"),
        })
    }

    /// A VM in which the end of a process is to be seen.
    fn start(&self) -> Result<Running> {
        self.start_with(&["--restart", "never"], None)
    }

    /// With these options, in this control group.
    fn start_with(&self, options: &[&str], group: Option<&Path>) -> Result<Running> {
        let mut command = self.product.command("anemone");
        command
            .args(["run", "--accel", self.accel, "--memory", "64M"])
            .args(["--rng", "--balloon"])
            .args(options)
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--console")
            .arg(format!("file={}", self.log.display()))
            .arg("--disk")
            .arg(format!("path={}", self.disk.display()))
            .arg("--pmem")
            .arg(format!("path={}", self.memory.display()))
            .arg("--fs")
            .arg(format!("tag=share,path={}", self.share.display()))
            .arg("--vsock")
            .arg(format!("socket={}", self.socket.display()))
            .arg("--net")
            .arg(format!("user,passt={}", self.passt.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&self.errors)?);
        if let Some(group) = group {
            let procs = group.join("cgroup.procs");
            let procs = fs::File::options().write(true).open(procs)?;
            let join = move || (&procs).write_all(b"0");
            // SAFETY: a single system call.
            unsafe { command.pre_exec(join) };
        }
        let mut running = Running {
            child: sh::spawn(&mut command)?,
            processes: Vec::new(),
        };
        // All programs are there, and the supervisor has entered its own jail: it starts the guest then.
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            running.processes = jail::family(running.child.0.id());
            let complete = PROGRAMS
                .iter()
                .all(|program| running.processes.iter().any(|p| p.program == *program));
            if complete && jail::is_filtered(running.child.0.id()) {
                // The VMM's first thread takes on its last policy when the guest runs.
                thread::sleep(Duration::from_millis(100));
                return Ok(running);
            }
            if let Some(status) = running.child.0.try_wait()? {
                bail!("anemone ended ({status}): {}", self.said());
            }
            ensure!(
                Instant::now() < end,
                "the VM is not complete: {:?}",
                running.processes
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    fn looks_jailed(&self) -> Result<()> {
        let running = self.start()?;
        let [disk, memory, share, log, kernel] = [
            &self.disk,
            &self.memory,
            &self.share,
            &self.log,
            &self.kernel,
        ]
        .map(|path| path.to_string_lossy());
        let problems: Vec<_> = running
            .processes
            .iter()
            .filter(|process| !OUTSIDE.contains(&process.program.as_str()))
            .flat_map(|process| {
                let files: &[&str] = match process.program.as_str() {
                    "anemone-blk" => &[&disk],
                    "anemone-fs" => &[&share],
                    // The VMM maps what the other writes back.
                    "anemone-pmem" | VMM => &[&memory],
                    "anemone-console" => &[&log],
                    // It starts the VM again after a reboot.
                    "anemone" => &[&disk, &memory, &share, &log, &kernel],
                    _ => &[],
                };
                jail::problems(process, files)
            })
            .collect();
        ensure!(problems.is_empty(), "{}", problems.join("\n"));
        Ok(())
    }

    /// Each process is in the control group that it should be in, also one that has taken the place of
    /// another, and the groups disappear with the VM. With limits, if this kernel's groups of version 2
    /// have the controllers.
    fn groups(&self) -> (&'static str, Result<()>) {
        const WITHOUT: &str = "control groups";
        let parent = match TestGroup::make() {
            Ok(parent) => parent,
            Err(error) => return (WITHOUT, Err(error)),
        };
        let there = fs::read_to_string(parent.0.join("cgroup.controllers")).unwrap_or_default();
        let has = |name| there.split_whitespace().any(|word| word == name);
        let limits = ["memory", "cpu", "pids"].into_iter().all(has);
        let named = self.in_groups(&parent.0, limits, false);
        let result = named.context("named").and_then(|()| {
            let delegated = self.in_groups(&parent.0, limits, true);
            delegated.context("delegated")
        });
        match limits {
            true => ("control groups with limits", result),
            false => (WITHOUT, result),
        }
    }

    /// The parent is named, or is where the supervisor begins and marked as systemd does.
    fn in_groups(&self, parent: &Path, limits: bool, delegated: bool) -> Result<()> {
        let mut option = match delegated {
            true => "auto".to_owned(),
            false => parent.display().to_string(),
        };
        if limits {
            option += ",memory-max=1G,cpu-max=250,pids-max=500,device-memory-max=64M";
        }
        let options = ["--cgroup", &option, "--name", "test"];
        if delegated {
            sh::set_attribute(parent, c"user.delegate", b"1")?;
        }
        let mut running = self.start_with(&options, delegated.then_some(parent))?;
        let pid = running.child.0.id();
        let group = parent.join(format!("anemone-test-{pid}"));
        let expect = |pid: u32, name: &str| -> Result<()> {
            let listed = fs::read_to_string(group.join(name).join("cgroup.procs"))?;
            let found = listed.lines().any(|line| line == pid.to_string());
            ensure!(found, "process {pid} is not in {name}, only: {listed}");
            Ok(())
        };
        expect(pid, "supervisor")?;
        expect(running.process(VMM)?.pid, "vmm")?;
        expect(running.process("anemone-blk")?.pid, "device-disk0")?;
        let old = running.process("anemone-rng")?.pid;
        expect(old, "device-rng")?;
        if limits {
            for (file, value) in [
                ("memory.max", "1073741824"),
                ("cpu.max", "250000 100000"),
                ("pids.max", "500"),
                ("device-rng/memory.max", "67108864"),
                ("vmm/memory.max", "max"),
            ] {
                let found = fs::read_to_string(group.join(file))?;
                ensure!(found.trim() == value, "{file} is {found}");
            }
        }
        // SAFETY: no pointers; it is a process of this VM.
        unsafe { libc::kill(old.cast_signed(), libc::SIGKILL) };
        let end = Instant::now() + Duration::from_secs(10);
        let new = loop {
            let family = jail::family(pid);
            let rng = family.iter().find(|p| p.program == "anemone-rng");
            match rng.filter(|rng| rng.pid != old) {
                Some(rng) => break rng.pid,
                None => ensure!(Instant::now() < end, "anemone-rng has not come back"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        expect(new, "device-rng")?;
        for _ in 0..2 {
            // SAFETY: no pointers; a child that has not been waited for.
            unsafe { libc::kill(pid.cast_signed(), libc::SIGTERM) };
            thread::sleep(Duration::from_millis(100));
        }
        sh::wait_limited(&mut running.child.0, Duration::from_secs(20))?;
        ensure!(!group.exists(), "{} is left", group.display());
        let control = fs::read_to_string(parent.join("cgroup.subtree_control"))?;
        ensure!(control.trim().is_empty(), "controllers are left: {control}");
        Ok(())
    }

    /// Landlock leaves the supervisor, whose filter allows `openat`, what it needs for a restart.
    fn supervisor_is_narrow(&self) -> Result<()> {
        const FOLDER: i32 = libc::O_RDONLY | libc::O_DIRECTORY;
        let refused = -i64::from(libc::EACCES);
        let disk = self.disk.to_string_lossy();
        let share = self.share.to_string_lossy();
        for (path, flags, allowed) in [
            ("/dev/null", libc::O_RDWR, true),
            (&disk, libc::O_RDWR, true),
            (&share, FOLDER, true),
            ("/", FOLDER, false),
            ("/etc/passwd", libc::O_RDONLY, false),
            ("/proc", FOLDER, false),
            (&self.kernel.to_string_lossy(), libc::O_RDONLY, false),
        ] {
            let running = self.start()?;
            let result = inject::openat(running.child.0.id(), path, flags)?;
            ensure!(
                if allowed {
                    result >= 0
                } else {
                    result == refused
                },
                "opening {path} with {flags:#o} answered {result}"
            );
        }
        Ok(())
    }

    /// Makes the call on a thread whose name begins so, or on the first of the process.
    fn is_denied(&self, program: &str, call: Call, thread: Option<&str>) -> Result<()> {
        let mut running = self.start()?;
        let process = running.process(program)?.clone();
        let thread = match thread {
            Some(name) => running.thread(name)?,
            None => process.pid,
        };
        inject::must_be_denied(process.pid, thread, call)?;
        let status = sh::wait_limited(&mut running.child.0, Duration::from_secs(20))?;
        let said = self.said();
        ensure!(
            status.and_then(|s| s.code()) == Some(1),
            "anemone ended with {status:?}, not exit status 1; it said:\n{said}"
        );
        ensure!(
            said.contains(call.name) && said.contains(program),
            "the report does not name {} and {program}:\n{said}",
            call.name
        );
        ensure!(
            said.contains("was killed by SIGSYS"),
            "it did not die of it:\n{said}"
        );
        Ok(())
    }
}

/// A control group for a test, removed when dropped.
struct TestGroup(PathBuf);

impl TestGroup {
    fn make() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/mounts")?;
        let mount = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&"cgroup2"));
        let Some(mount) = mount else {
            return Err(Missing("a mounted cgroup2 file system".into()).into());
        };
        let path = Path::new(mount[1]).join(format!("anemone-xtask.{}", std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for TestGroup {
    fn drop(&mut self) {
        // What it holds is a failure that has been told.
        let _ = fs::remove_dir(&self.0);
    }
}

struct Running {
    child: sh::Guarded,
    processes: Vec<Process>,
}

impl Drop for Running {
    /// Ends the VM. The device processes die with their parent, but a moment later, and until
    /// then the disk stays locked.
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.0.kill();
        let _ = self.child.0.wait();
        let end = Instant::now() + Duration::from_secs(5);
        let alive = |p: &Process| Path::new(&format!("/proc/{}", p.pid)).exists();
        while self.processes.iter().any(alive) && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Running {
    fn process(&self, program: &str) -> Result<&Process> {
        self.processes
            .iter()
            .find(|p| p.program == program)
            .with_context(|| format!("no process runs {program}"))
    }

    /// A thread of the VMM whose name begins so.
    fn thread(&self, beginning: &str) -> Result<u32> {
        let pid = self.process(VMM)?.pid;
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let path = entry?.path();
            let name = fs::read_to_string(path.join("comm"))?;
            if name.starts_with(beginning) {
                let tid = path.file_name().unwrap_or_default().to_string_lossy();
                return Ok(tid.parse()?);
            }
        }
        bail!("the VMM has no thread {beginning}")
    }
}
