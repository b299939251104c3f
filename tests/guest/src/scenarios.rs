//! What is tried: each scenario is one VM, or none. They run in the outer guest of the nested rig
//! and, with the software CPU, right on the host.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::jail;
use anemone_guest_init::place::Place;

use crate::vm::{self, Result, Vm};
use crate::{all, balloon, groups, iperf, kills, net, probe, share, vsock};

/// A scenario: its name, what it shows, and the function that runs it.
pub struct Scenario {
    /// Name by which it is asked for.
    pub name: &'static str,
    /// One line for the user.
    pub about: &'static str,
    /// The only accelerator that it is for; any, if absent.
    only: Option<&'static str>,
    /// Runs it.
    pub run: fn(&Place) -> Result<()>,
}

impl Scenario {
    const fn new(name: &'static str, about: &'static str, run: fn(&Place) -> Result<()>) -> Self {
        Self {
            name,
            about,
            only: None,
            run,
        }
    }

    /// The same for one accelerator only.
    const fn only(self, accel: &'static str) -> Self {
        Self {
            only: Some(accel),
            ..self
        }
    }

    /// Whether it is for this accelerator.
    pub fn is_for(&self, accel: &str) -> bool {
        self.only.is_none_or(|only| only == accel)
    }
}

/// All scenarios, in the order in which they run. Those for `soft` only need memory or guests
/// that the rig has no room for.
pub const ALL: &[Scenario] = &[
    Scenario::new(
        "rig",
        "KVM works in the outer guest, tried without Anemone",
        |_| probe::run_tiny_guest().map_err(|e| e.to_string()),
    )
    .only("kvm"),
    Scenario::new(
        "bare",
        "bare-metal guests find the CPU that the manuals describe",
        bare,
    )
    .only("kvm"),
    Scenario::new(
        "cpus-1",
        "one vCPU boots to user space and powers off through ACPI",
        cpus_1,
    ),
    Scenario::new("cpus-4", "four vCPUs", cpus_4),
    Scenario::new("memory-2g", "two GiB of memory, all of it used", memory_2g).only("soft"),
    Scenario::new(
        "kernel-amd64",
        "Debian's kernel for all machines",
        kernel_amd64,
    )
    .only("soft"),
    Scenario::new("kernel-rt", "Debian's real-time kernel", kernel_rt).only("soft"),
    Scenario::new(
        "cpu-model-v1",
        "CPU model x86-64-v1-1: its features and no other",
        cpu_model_v1,
    )
    .only("soft"),
    Scenario::new(
        "cpu-model-v2",
        "CPU model x86-64-v2-1: its features and no other",
        cpu_model_v2,
    ),
    Scenario::new(
        "cpu-model-v3",
        "CPU model x86-64-v3-1: its features and no other",
        cpu_model_v3,
    )
    .only("soft"),
    Scenario::new(
        "demo",
        "ext4 root disk on a block device, entropy, no legacy device",
        demo,
    ),
    Scenario::new(
        "reboot-restart",
        "a reboot starts the VM again; the disk is still there",
        reboot_restart,
    ),
    Scenario::new(
        "reboot-stop",
        "a reboot ends the VM if asked for",
        reboot_stop,
    ),
    Scenario::new(
        "panic-stop",
        "a kernel panic ends the VM with status 1 and is named",
        panic_stop,
    ),
    Scenario::new(
        "panic-restart",
        "a kernel panic starts the VM again if asked for",
        panic_restart,
    ),
    Scenario::new(
        "disks-two",
        "one disk copied to another, byte for byte",
        disks_two,
    ),
    Scenario::new(
        "disk-readonly",
        "a write to a read-only disk fails and changes nothing",
        disk_readonly,
    ),
    Scenario::new(
        "balloon",
        "memory that the balloon takes goes back to the host; statistics; deflation on OOM",
        balloon::balloon,
    )
    .only("soft"),
    Scenario::new(
        "free-page-reporting",
        "the memory of a dropped file goes back to the host",
        balloon::free_page_reporting,
    )
    .only("soft"),
    Scenario::new(
        "fs",
        "a directory of the host: programs run in it, a tree is made, renamed, archived and read back",
        share::read_write,
    ),
    Scenario::new(
        "fs-readonly",
        "a directory of the host that the guest cannot change",
        share::read_only,
    )
    .only("soft"),
    Scenario::new(
        "pmem",
        "an ext4 file system in persistent memory, with DAX; code that runs in place",
        persistent_memory,
    )
    .only("soft"),
    Scenario::new(
        "pmem-readonly",
        "writes to read-only persistent memory are dropped",
        persistent_memory_readonly,
    )
    .only("soft"),
    Scenario::new(
        "pmem-truncated",
        "a file of persistent memory that becomes shorter ends the VM with a message",
        persistent_memory_truncated,
    )
    .only("soft"),
    Scenario::new(
        "net",
        "passt: an address, a file from the host's loopback, and one through a forwarded port",
        net::passt,
    ),
    Scenario::new(
        "net-restart",
        "anemone-net is killed during downloads, which go on; passt is killed, and is back",
        net::restart,
    )
    .only("soft"),
    Scenario::new(
        "iperf-passt",
        "iperf3 to and from the host, with connections of both sides",
        iperf::passt,
    )
    .only("soft"),
    Scenario::new(
        "iperf-taps",
        "iperf3 between two guests on taps",
        iperf::taps,
    )
    .only("soft"),
    Scenario::new(
        "vsock",
        "megabytes over sockets of both sides, both ways, half-closed",
        vsock::streams,
    ),
    Scenario::new(
        "all-devices",
        "every device at work at the same time; curl both ways; what doctor says of each process",
        all::shared,
    ),
    Scenario::new(
        "all-devices-bounce",
        "the same while no back end sees guest memory",
        all::bounce,
    )
    .only("soft"),
    Scenario::new("console-pty", "a shell on a pseudo-terminal", console_pty),
    Scenario::new(
        "serial",
        "kernel messages on the 16550 from the first line on",
        serial,
    ),
    Scenario::new(
        "power-button",
        "SIGTERM is the power button, and the guest powers off",
        power_button,
    ),
    Scenario::new(
        "control-groups",
        "processes in control groups with limits, also after a restart",
        groups::limited,
    )
    .only("kvm"),
    Scenario::new(
        "jail",
        "every process of a running VM is in its jail",
        jailed,
    ),
    Scenario::new(
        "device-dies",
        "killed device processes are replaced and the guest goes on; with restart=never the VM ends",
        device_dies,
    ),
    Scenario::new(
        "kill-blk",
        "the disk's process is killed over and over under verified load",
        |place| kills::run(place, &kills::BLK),
    )
    .only("soft"),
    Scenario::new("kill-console", "the same for the console", |place| {
        kills::run(place, &kills::CONSOLE)
    })
    .only("soft"),
    Scenario::new("kill-fs", "the same for a directory of the host", |place| {
        kills::run(place, &kills::FS)
    })
    .only("soft"),
    Scenario::new("kill-rng", "the same for the entropy source", |place| {
        kills::run(place, &kills::RNG)
    })
    .only("soft"),
    Scenario::new("kill-net", "the same for a network card", |place| {
        kills::run(place, &kills::NET)
    })
    .only("soft"),
    Scenario::new("kill-vsock", "the same for sockets", |place| {
        kills::run(place, &kills::VSOCK)
    })
    .only("soft"),
    Scenario::new("kill-balloon", "the same for the balloon", |place| {
        kills::run(place, &kills::BALLOON)
    })
    .only("soft"),
    Scenario::new("kill-pmem", "the same for persistent memory", |place| {
        kills::run(place, &kills::PMEM)
    })
    .only("soft"),
    Scenario::new(
        "supervisor-dies",
        "nothing outlives a killed supervisor",
        supervisor_dies,
    ),
    Scenario::new(
        "foreign-disk",
        "a disk served by qemu-storage-daemon over vhost-user",
        foreign_disk,
    ),
    Scenario::new(
        "bounce-large",
        "the largest requests to a disk with memory=bounce",
        bounce_large,
    )
    .only("soft"),
    Scenario::new(
        "bounce-reporting",
        "free page reporting with memory=bounce",
        balloon::free_page_reporting_bounced,
    )
    .only("soft"),
    Scenario::new(
        "bounce-secret",
        "a hostile back end with memory=bounce never sees guest memory; with memory=shared it does",
        bounce_secret,
    )
    .only("soft"),
];

/// What the guests find goes into the log.
fn bare(place: &Place) -> Result<()> {
    let program = place.programs.join("anemone-bare");
    let status = Command::new(&program)
        .args(["--accel", &place.accel])
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("{}: {e}", program.display()))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{status}; the log names the checks")),
    }
}

fn boots_with_cpus(place: &Place, count: &str) -> Result<()> {
    let mut vm = Vm::start(place, "uname,cpus,memory,irqs,poweroff", &["--cpus", count])?;
    vm.expect_exit(0)?;
    vm.expect_said(&[
        &format!("guest: cpus {count}"),
        "guest: no legacy interrupt",
        "guest: done",
    ])
}

fn cpus_1(place: &Place) -> Result<()> {
    boots_with_cpus(place, "1")
}

fn cpus_4(place: &Place) -> Result<()> {
    boots_with_cpus(place, "4")
}

/// The guest writes a file of 1.5 GiB in memory, which it could not in less, and reads it back.
fn memory_2g(place: &Place) -> Result<()> {
    let mut vm = Vm::start(place, "memory,fill,poweroff", &["--memory", "2G"])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: filled 1536 MiB", "guest: done"])?;
    let said = vm.said();
    let kib: u64 = said
        .lines()
        .find_map(|line| {
            line.strip_prefix("guest: memory ")?
                .split(' ')
                .next()?
                .parse()
                .ok()
        })
        .ok_or("the guest has not told its memory")?;
    // The kernel keeps a few MiB for itself.
    match (1_900 << 10..=2 << 20).contains(&kib) {
        true => Ok(()),
        false => Err(format!("the guest has {kib} KiB of memory")),
    }
}

fn kernel_amd64(place: &Place) -> Result<()> {
    kernel(place, "amd64", "-amd64")
}

fn kernel_rt(place: &Place) -> Result<()> {
    kernel(place, "rt", "-rt-amd64")
}

/// A kernel other than the usual one does everything that a guest has a device for.
fn kernel(place: &Place, name: &str, release: &str) -> Result<()> {
    let guest = place.guest(name).ok_or("there is no such guest")?;
    let image = place.scratch("kernel.img");
    vm::copy_disk(place, &image)?;
    let disk = format!("path={image}");
    let mut vm = Vm::start_guest(
        place,
        guest,
        "uname,cpus,disk,rng,irqs,poweroff",
        &["--cpus", "2", "--memory", "512M", "--disk", &disk, "--rng"],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&[
        "guest: cpus 2",
        "guest: payload verified",
        "guest: disk written",
        "guest: random bytes",
        "guest: no legacy interrupt",
        "guest: done",
    ])?;
    let said = vm.said();
    let running = said.lines().find(|line| line.starts_with("guest: kernel "));
    match running.is_some_and(|line| line.ends_with(release)) {
        true => Ok(()),
        false => Err(format!("the kernel is another one: {running:?}")),
    }
}

/// What Linux shows of features of each level in `/proc/cpuinfo`.
const LEVEL_2: &[&str] = &["sse4_2", "popcnt", "cx16", "lahf_lm", "rdtscp"];
const LEVEL_3: &[&str] = &[
    "avx", "avx2", "bmi1", "bmi2", "fma", "f16c", "abm", "movbe", "xsave", "fsgsbase", "smep",
];
/// What is in no model, though emulated and real processors have it.
const IN_NONE: &[&str] = &["svm", "vmx", "smap", "pcid", "aes", "sha_ni", "avx512f"];

fn cpu_model_v1(place: &Place) -> Result<()> {
    cpu_model(place, "x86-64-v1-1", &[], &[LEVEL_2, LEVEL_3, IN_NONE])
}

fn cpu_model_v2(place: &Place) -> Result<()> {
    cpu_model(place, "x86-64-v2-1", &[LEVEL_2], &[LEVEL_3, IN_NONE])
}

fn cpu_model_v3(place: &Place) -> Result<()> {
    cpu_model(place, "x86-64-v3-1", &[LEVEL_2, LEVEL_3], &[IN_NONE])
}

fn cpu_model(place: &Place, model: &str, has: &[&[&str]], lacks: &[&[&str]]) -> Result<()> {
    let cpus = format!("2,model={model}");
    let mut vm = Vm::start(place, "cpuinfo,poweroff", &["--cpus", &cpus])?;
    vm.expect_exit(0)?;
    let name = format!("guest: cpu Anemone {model} has");
    vm.expect_said(&[&name, "guest: done"])?;
    let said = vm.said();
    let flags = said
        .lines()
        .find(|line| line.contains(&name))
        .unwrap_or_default();
    let shows = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    let everywhere: &[&str] = &["sse2", "nx", "x2apic", "hypervisor"];
    let missing = has.iter().chain([&everywhere]).copied().flatten();
    let wrong: Vec<_> = missing
        .filter(|name| !shows(name))
        .chain(lacks.iter().copied().flatten().filter(|name| shows(name)))
        .collect();
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "the guest's features are not the model's: {wrong:?}"
        )),
    }
}

/// The disk is looked at from outside afterwards.
fn demo(place: &Place) -> Result<()> {
    let disk = place.disk.display();
    vm::give_to_user(place, &place.disk).map_err(|e| format!("{disk}: {e}"))?;
    let mut vm = Vm::start(
        place,
        "uname,disk,rng,irqs,poweroff",
        &["--disk", &format!("path={disk}"), "--rng"],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&[
        "guest: kernel ",
        "guest: payload verified",
        "guest: disk written",
        "guest: random bytes",
        "guest: no legacy interrupt",
        "guest: done",
    ])
}

fn reboot_restart(place: &Place) -> Result<()> {
    let image = place.scratch("boots.img");
    vm::copy_disk(place, &image)?;
    let mut vm = Vm::start(
        place,
        "boots",
        &["--disk", &format!("path={image}"), "--on-reboot", "restart"],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: boot number 1", "guest: boot number 2"])
}

fn reboot_stop(place: &Place) -> Result<()> {
    let mut vm = Vm::start(place, "reboot", &["--on-reboot", "stop"])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: reboot now"])?;
    if vm.said().matches("guest: steps").count() != 1 {
        return Err("the guest has booted again".into());
    }
    Ok(())
}

fn panic_stop(place: &Place) -> Result<()> {
    let mut vm = Vm::start(place, "panic", &["--on-panic", "stop"])?;
    vm.expect_exit(1)?;
    vm.expect_said(&["guest: panic now"])?;
    expect_message(&vm, "panic")
}

/// The supervisor's last word must hold `word`.
fn expect_message(vm: &Vm, word: &str) -> Result<()> {
    let said = vm.said();
    let messages: Vec<_> = said.lines().filter(|l| l.starts_with("error: ")).collect();
    match messages.iter().any(|l| l.to_lowercase().contains(word)) {
        true => Ok(()),
        false => Err(format!("no message names {word}: {messages:?}")),
    }
}

fn panic_restart(place: &Place) -> Result<()> {
    let vm = Vm::start(place, "panic", &["--on-panic", "restart"])?;
    let end = Instant::now() + place.patience;
    while vm.said().matches("guest: steps").count() < 2 {
        if Instant::now() > end {
            return Err("the guest has not booted again".into());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn disks_two(place: &Place) -> Result<()> {
    let (from, to) = (place.scratch("first.img"), place.scratch("second.img"));
    let first = vm::make_disk(place, &from, 16 * 1024, 1)?;
    vm::make_disk(place, &to, 16 * 1024, 2)?;
    let mut vm = Vm::start(
        place,
        "copy,poweroff",
        &[
            "--disk",
            &format!("path={from},id=first"),
            "--disk",
            &format!("path={to},id=second"),
        ],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: copied "])?;
    vm::expect_content(&from, &first)?;
    vm::expect_content(&to, &first)
}

fn disk_readonly(place: &Place) -> Result<()> {
    let image = place.scratch("readonly.img");
    let content = vm::make_disk(place, &image, 2048, 3)?;
    let mut vm = Vm::start(
        place,
        "readonly,poweroff",
        &["--disk", &format!("path={image},readonly")],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: write refused"])?;
    vm::expect_content(&image, &content)
}

fn persistent_memory(place: &Place) -> Result<()> {
    vm::give_to_user(place, &place.disk).map_err(|e| e.to_string())?;
    let pmem = format!("path={}", place.disk.display());
    let mut vm = Vm::start(place, "pmem,poweroff", &["--pmem", &pmem, "--cpus", "2"])?;
    vm.expect_exit(0)?;
    vm.expect_said(&[
        "guest: programs run in place",
        "guest: pmem written",
        "guest: done",
    ])
}

fn persistent_memory_readonly(place: &Place) -> Result<()> {
    let image = place.scratch("readonly.img");
    let content = vm::make_disk(place, &image, 4 << 11, 0x7065_6D65)?;
    let pmem = format!("path={image},readonly");
    let mut vm = Vm::start(place, "pmemro,poweroff", &["--pmem", &pmem])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: pmem unchanged", "guest: done"])?;
    vm::expect_content(&image, &content)
}

fn persistent_memory_truncated(place: &Place) -> Result<()> {
    let image = place.scratch("truncated.img");
    vm::make_disk(place, &image, 8 << 11, 1)?;
    let pmem = format!("path={image},id=gone");
    let mut vm = Vm::start(place, "pmemread", &["--pmem", &pmem])?;
    vm.wait_for("guest: reading")?;
    std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .and_then(|file| file.set_len(2 << 20))
        .map_err(|e| format!("{image}: {e}"))?;
    vm.expect_exit(1)?;
    vm.expect_said(&[
        "device `gone`: its file has no byte 0x",
        "made the file shorter",
    ])
}

fn console_pty(place: &Place) -> Result<()> {
    let mut vm = Vm::start(place, "shell,poweroff", &["--console", "pty"])?;
    vm.open_pty()?;
    vm.wait_for("guest: shell")?;
    // The sum shows that the answer is not the echo of what was typed.
    vm.type_text("echo sum-$((40 + 2))\n")?;
    vm.wait_for("sum-42")?;
    // What the guest writes last may be lost: a pty drops unread bytes when its other end closes.
    vm.type_text("exit\n")?;
    vm.expect_exit(0)
}

fn serial(place: &Place) -> Result<()> {
    let guest = place.guests.first().ok_or("there is no guest")?;
    let mut command = vm::run_command(place, guest, "console=ttyS0 anemone.steps=uname,poweroff");
    command
        .args(["--memory", "256M"])
        .args(["--console", "none", "--serial", "stdio"]);
    let mut vm = Vm::spawn(place, command)?;
    vm.expect_exit(0)?;
    vm.expect_said(&["Linux version", "guest: kernel ", "guest: done"])
}

fn power_button(place: &Place) -> Result<()> {
    let mut vm = Vm::start(place, "button,poweroff", &[])?;
    vm.wait_for("guest: waiting for the power button")?;
    // The guest opens the event device just after it has said so; a press before that is lost
    // on a real machine as well.
    thread::sleep(Duration::from_secs(2));
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: power button pressed", "guest: done"])
}

/// A VM with one device of each kind, and its disk.
fn holding(place: &Place) -> Result<(Vm, String)> {
    let image = place.scratch("held.img");
    vm::make_disk(place, &image, 2048, 4)?;
    let disk = format!("path={image},id=held");
    let vm = Vm::start(place, "hold", &["--disk", &disk, "--rng"])?;
    vm.wait_for("guest: holding")?;
    Ok((vm, image))
}

fn jailed(place: &Place) -> Result<()> {
    let (vm, image) = holding(place)?;
    let guest = place.guests.first().ok_or("there is no guest")?;
    let (kernel, initramfs) = (
        guest.kernel.display().to_string(),
        guest.initramfs.display().to_string(),
    );
    let processes = vm.processes();
    let mut programs: Vec<_> = processes.iter().map(|p| p.program.as_str()).collect();
    programs.sort_unstable();
    let expected = [
        "anemone",
        "anemone-blk",
        "anemone-console",
        "anemone-rng",
        "anemone-vmm",
    ];
    if programs != expected {
        return Err(format!("the processes are {}", programs.join(", ")));
    }
    let problems: Vec<_> = processes
        .iter()
        .flat_map(|p| {
            let files: &[&str] = match p.program.as_str() {
                "anemone-blk" => &[&image],
                // It starts the VM again after a reboot.
                "anemone" => &[&image, &kernel, &initramfs],
                _ => &[],
            };
            jail::problems(p, files)
        })
        .collect();
    if !problems.is_empty() {
        return Err(problems.join("\n"));
    }
    Ok(())
}

fn device_dies(place: &Place) -> Result<()> {
    let image = place.scratch("dies.img");
    vm::copy_disk(place, &image)?;
    let disk = format!("path={image},id=held");
    let mut vm = Vm::start(
        place,
        "pause,disk,rng,poweroff",
        &["--disk", &disk, "--rng"],
    )?;
    vm.wait_for("guest: waits for a line")?;
    for program in ["anemone-blk", "anemone-rng", "anemone-console"] {
        vm.kill(program)?;
    }
    // The guest's own console, disk and entropy source, from here on with other processes.
    vm.type_text("go on\n")?;
    vm.expect_exit(0)?;
    vm.expect_said(&[
        "guest: was told go on",
        "guest: payload verified",
        "guest: disk written",
        "guest: random bytes",
        "guest: done",
    ])?;
    if vm.said().matches("guest: steps").count() != 1 {
        return Err("the guest has booted again".into());
    }
    device_dies_for_good(place, &disk)
}

fn device_dies_for_good(place: &Place, disk: &str) -> Result<()> {
    let options = ["--disk", disk, "--restart", "never"];
    let mut vm = Vm::start(place, "hold", &options)?;
    vm.wait_for("guest: holding")?;
    vm.kill("anemone-blk")?;
    vm.expect_exit(1)?;
    expect_message(&vm, "held")
}

fn supervisor_dies(place: &Place) -> Result<()> {
    let (vm, _) = holding(place)?;
    vm.signal(libc::SIGKILL)?;
    vm::expect_nothing_left()
}

/// The guest makes the largest requests that its disk lets it make, of which one fills the room for them.
fn bounce_large(place: &Place) -> Result<()> {
    const HALF: usize = 32 << 20;
    let image = place.scratch("large.img");
    let content = vm::make_disk(place, &image, 2 * HALF as u64 / 512, 9)?;
    let disk = format!("path={image},memory=bounce");
    let mut vm = Vm::start(
        place,
        "large,poweroff",
        &["--memory", "384M", "--disk", &disk],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: copied in requests of ", "guest: done"])?;
    vm::expect_content(&image, &[&content[..HALF], &content[..HALF]].concat())
}

/// What is in the guest's memory, in its kernel command line, and nowhere near the entropy source.
const SECRET: &str = "anemone-secret-8d1f0c6b";

fn bounce_secret(place: &Place) -> Result<()> {
    let found = spied(place, "bounce")?;
    if found > 0 {
        return Err(format!("the spy has found the secret {found} times"));
    }
    // The same spy finds it where it may look.
    match spied(place, "shared")? {
        0 => Err("nothing is found in shared memory either".into()),
        _ => Ok(()),
    }
}

/// Boots a guest whose entropy source is the spy; how often it has found the secret.
fn spied(place: &Place, memory: &str) -> Result<usize> {
    let socket = place.scratch(&format!("spy-{memory}.sock"));
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let spy = Command::new(program)
        .args(["--spy", &socket, SECRET])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| format!("cannot start the spy: {e}"))?;
    let guest = with_spy(place, &socket, memory);
    // It ends with its connection.
    let output = spy.wait_with_output().map_err(|e| e.to_string())?;
    guest?;
    let report = String::from_utf8_lossy(&output.stdout);
    let counts = report.lines().filter_map(|line| {
        let count = line.strip_prefix("looked at")?.rsplit_once("found ")?.1;
        count.parse::<usize>().ok()
    });
    let (looks, found) = counts.fold((0, 0), |(looks, most), n| (looks + 1, most.max(n)));
    println!("memory={memory}: the spy has looked {looks} times and found {found}");
    let mut after = report
        .lines()
        .skip_while(|line| !line.starts_with("served "));
    if !after.any(|line| line.starts_with("looked at")) {
        return Err(format!("the spy has done nothing: {report}"));
    }
    Ok(found)
}

fn with_spy(place: &Place, socket: &str, memory: &str) -> Result<()> {
    wait_for_path(Path::new(socket))?;
    vm::give_to_user(place, Path::new(socket)).map_err(|e| e.to_string())?;
    let rng = format!("--rng=socket={socket},memory={memory}");
    let steps = format!("uname,rng,poweroff anemone.secret={SECRET}");
    let mut vm = Vm::start(place, &steps, &[&rng])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: random bytes from virtio_rng", "guest: done"])
}

fn wait_for_path(path: &Path) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while !path.exists() {
        if Instant::now() > end {
            return Err(format!("there is no {}", path.display()));
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn foreign_disk(place: &Place) -> Result<()> {
    let (image, socket) = (place.scratch("foreign.img"), place.scratch("qsd.sock"));
    let first = vm::make_disk(place, &image, 4096, 5)?;
    let (program, words) = place
        .storage_daemon
        .split_first()
        .ok_or("there is no qemu-storage-daemon")?;
    let mut server = Command::new(program)
        .args(words)
        .arg("--blockdev")
        .arg(format!("file,node-name=disk,filename={image}"))
        .arg("--export")
        .arg(format!(
            "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={socket}"
        ))
        .stdin(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot start qemu-storage-daemon: {e}"))?;
    let result = copy_from_foreign_disk(place, &socket, &first);
    let _ = server.kill();
    let _ = server.wait();
    result
}

fn copy_from_foreign_disk(place: &Place, socket: &str, first: &[u8]) -> Result<()> {
    let path = Path::new(socket);
    wait_for_path(path)?;
    vm::give_to_user(place, path).map_err(|e| e.to_string())?;
    let image = place.scratch("own.img");
    vm::make_disk(place, &image, 4096, 6)?;
    let mut vm = Vm::start(
        place,
        "copy,poweroff",
        &[
            "--disk",
            &format!("socket={socket},id=foreign"),
            "--disk",
            &format!("path={image},id=own"),
        ],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: copied "])?;
    vm::expect_content(&image, first)
}
