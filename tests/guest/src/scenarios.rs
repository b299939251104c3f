//! What is tried in the outer guest: each scenario is one VM, or none.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::jail;

use crate::probe;
use crate::vm::{self, Result, Vm};

/// A scenario: its name, what it shows, and the function that runs it.
pub struct Scenario {
    /// Name on the outer kernel's command line.
    pub name: &'static str,
    /// One line for the user.
    pub about: &'static str,
    /// Runs it.
    pub run: fn() -> Result<()>,
}

/// All scenarios, in the order in which they run.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "rig",
        about: "KVM works in the outer guest, tried without Anemone",
        run: || probe::run_tiny_guest().map_err(|e| e.to_string()),
    },
    Scenario {
        name: "cpus-1",
        about: "one vCPU boots to user space and powers off through ACPI",
        run: cpus_1,
    },
    Scenario {
        name: "cpus-4",
        about: "four vCPUs, started by root",
        run: cpus_4,
    },
    Scenario {
        name: "cpu-model",
        about: "a frozen CPU model: the guest sees its features and no other",
        run: cpu_model,
    },
    Scenario {
        name: "demo",
        about: "ext4 root disk on a block device, entropy, no legacy device",
        run: demo,
    },
    Scenario {
        name: "reboot-restart",
        about: "a reboot starts the VM again; the disk is still there",
        run: reboot_restart,
    },
    Scenario {
        name: "reboot-stop",
        about: "a reboot ends the VM if asked for",
        run: reboot_stop,
    },
    Scenario {
        name: "panic-stop",
        about: "a kernel panic ends the VM with status 1 and is named",
        run: panic_stop,
    },
    Scenario {
        name: "panic-restart",
        about: "a kernel panic starts the VM again if asked for",
        run: panic_restart,
    },
    Scenario {
        name: "disks-two",
        about: "one disk copied to another, byte for byte",
        run: disks_two,
    },
    Scenario {
        name: "disk-readonly",
        about: "a write to a read-only disk fails and changes nothing",
        run: disk_readonly,
    },
    Scenario {
        name: "console-pty",
        about: "a shell on a pseudo-terminal",
        run: console_pty,
    },
    Scenario {
        name: "serial",
        about: "kernel messages on the 16550 from the first line on",
        run: serial,
    },
    Scenario {
        name: "power-button",
        about: "SIGTERM is the power button, and the guest powers off",
        run: power_button,
    },
    Scenario {
        name: "jail",
        about: "every process of a running VM is in its jail",
        run: jailed,
    },
    Scenario {
        name: "device-dies",
        about: "the VM ends with a message that names a killed device process",
        run: device_dies,
    },
    Scenario {
        name: "supervisor-dies",
        about: "nothing outlives a killed supervisor",
        run: supervisor_dies,
    },
    Scenario {
        name: "foreign-disk",
        about: "a disk served by qemu-storage-daemon over vhost-user",
        run: foreign_disk,
    },
];

fn boots_with_cpus(user: u32, count: &str) -> Result<()> {
    let mut vm = Vm::start_as(user, "uname,cpus,memory,irqs,poweroff", &["--cpus", count])?;
    vm.expect_exit(0)?;
    vm.expect_said(&[
        &format!("guest: cpus {count}"),
        "guest: no legacy interrupt",
        "guest: done",
    ])
}

fn cpus_1() -> Result<()> {
    boots_with_cpus(vm::USER, "1")
}

fn cpus_4() -> Result<()> {
    boots_with_cpus(0, "4")
}

fn cpu_model() -> Result<()> {
    let mut vm = Vm::start("cpuinfo,poweroff", &["--cpus", "2,model=x86-64-v2-1"])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: cpu Anemone x86-64-v2-1 has", "guest: done"])?;
    let said = vm.said();
    let flags = said
        .lines()
        .find(|line| line.contains("x86-64-v2-1 has"))
        .unwrap_or_default();
    let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    let wanted = [
        "sse4_2",
        "popcnt",
        "cx16",
        "lahf_lm",
        "rdtscp",
        "x2apic",
        "hypervisor",
    ];
    // The emulated processor of the outer guest has these.
    let unwanted = ["avx", "avx2", "bmi1", "fma", "smep", "svm"];
    let wrong: Vec<_> = wanted
        .iter()
        .filter(|name| !has(name))
        .chain(unwanted.iter().filter(|name| has(name)))
        .collect();
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(format!(
            "the guest's features are not the model's: {wrong:?}"
        )),
    }
}

/// The host looks at the disk afterwards; here it is the outer guest's own disk.
fn demo() -> Result<()> {
    vm::give_to_user(Path::new("/dev/vda")).map_err(|e| format!("/dev/vda: {e}"))?;
    let mut vm = Vm::start(
        "uname,disk,rng,irqs,poweroff",
        &["--disk", "path=/dev/vda", "--rng"],
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

fn reboot_restart() -> Result<()> {
    vm::copy_disk("/guest/root.img", "/tmp/boots.img")?;
    let mut vm = Vm::start(
        "boots",
        &["--disk", "path=/tmp/boots.img", "--on-reboot", "restart"],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: boot number 1", "guest: boot number 2"])
}

fn reboot_stop() -> Result<()> {
    let mut vm = Vm::start("reboot", &["--on-reboot", "stop"])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: reboot now"])?;
    if vm.said().matches("guest: steps").count() != 1 {
        return Err("the guest has booted again".into());
    }
    Ok(())
}

fn panic_stop() -> Result<()> {
    let mut vm = Vm::start("panic", &["--on-panic", "stop"])?;
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

fn panic_restart() -> Result<()> {
    let vm = Vm::start("panic", &["--on-panic", "restart"])?;
    let end = Instant::now() + vm::PATIENCE;
    while vm.said().matches("guest: steps").count() < 2 {
        if Instant::now() > end {
            return Err("the guest has not booted again".into());
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

fn disks_two() -> Result<()> {
    let first = vm::make_disk("/tmp/first.img", 16 * 1024, 1)?;
    vm::make_disk("/tmp/second.img", 16 * 1024, 2)?;
    let mut vm = Vm::start(
        "copy,poweroff",
        &[
            "--disk",
            "path=/tmp/first.img,id=first",
            "--disk",
            "path=/tmp/second.img,id=second",
        ],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: copied "])?;
    vm::expect_content("/tmp/first.img", &first)?;
    vm::expect_content("/tmp/second.img", &first)
}

fn disk_readonly() -> Result<()> {
    let content = vm::make_disk("/tmp/readonly.img", 2048, 3)?;
    let mut vm = Vm::start(
        "readonly,poweroff",
        &["--disk", "path=/tmp/readonly.img,readonly"],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: write refused"])?;
    vm::expect_content("/tmp/readonly.img", &content)
}

fn console_pty() -> Result<()> {
    let mut vm = Vm::start("shell,poweroff", &["--console", "pty"])?;
    vm.open_pty()?;
    vm.wait_for("guest: shell")?;
    // The sum shows that the answer is not the echo of what was typed.
    vm.type_text("echo sum-$((40 + 2))\n")?;
    vm.wait_for("sum-42")?;
    // What the guest writes last may be lost: a pty drops unread bytes when its other end closes.
    vm.type_text("exit\n")?;
    vm.expect_exit(0)
}

fn serial() -> Result<()> {
    let mut command = vm::run_command(vm::USER, "console=ttyS0 anemone.steps=uname,poweroff");
    command.args(["--console", "none", "--serial", "stdio"]);
    let mut vm = Vm::spawn(command)?;
    vm.expect_exit(0)?;
    vm.expect_said(&["Linux version", "guest: kernel ", "guest: done"])
}

fn power_button() -> Result<()> {
    let mut vm = Vm::start("button,poweroff", &[])?;
    vm.wait_for("guest: waiting for the power button")?;
    // The guest opens the event device just after it has said so; a press before that is lost
    // on a real machine as well.
    thread::sleep(Duration::from_secs(2));
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: power button pressed", "guest: done"])
}

/// Arguments of a VM with one device of each kind.
const ALL_DEVICES: &[&str] = &["--disk", "path=/tmp/held.img,id=held", "--rng"];

fn holding() -> Result<Vm> {
    vm::make_disk("/tmp/held.img", 2048, 4)?;
    let vm = Vm::start("hold", ALL_DEVICES)?;
    vm.wait_for("guest: holding")?;
    Ok(vm)
}

fn jailed() -> Result<()> {
    let vm = holding()?;
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
                "anemone-blk" => &["/tmp/held.img"],
                // It starts the VM again after a reboot.
                "anemone" => &["/tmp/held.img", "/guest/kernel", "/guest/initramfs"],
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

fn device_dies() -> Result<()> {
    let mut vm = holding()?;
    let disk = vm.process("anemone-blk")?;
    crate::sys::kill(disk.pid as i32, libc::SIGKILL).map_err(|e| e.to_string())?;
    vm.expect_exit(1)?;
    expect_message(&vm, "held")
}

fn supervisor_dies() -> Result<()> {
    let vm = holding()?;
    vm.signal(libc::SIGKILL)?;
    vm::expect_nothing_left()
}

fn foreign_disk() -> Result<()> {
    let first = vm::make_disk("/tmp/foreign.img", 4096, 5)?;
    vm::make_disk("/tmp/own.img", 4096, 6)?;
    let mut server = Command::new("/qsd/lib64/ld-linux-x86-64.so.2")
        .args(["--library-path", "/qsd/lib", "/qsd/bin/qemu-storage-daemon"])
        .args(["--blockdev", "file,node-name=disk,filename=/tmp/foreign.img"])
        .args([
            "--export",
            "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path=/tmp/qsd.sock",
        ])
        .stdin(Stdio::null())
        .spawn()
        .map_err(|e| format!("cannot start qemu-storage-daemon: {e}"))?;
    let result = copy_from_foreign_disk(&first);
    let _ = server.kill();
    let _ = server.wait();
    result
}

fn copy_from_foreign_disk(first: &[u8]) -> Result<()> {
    let socket = Path::new("/tmp/qsd.sock");
    let end = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        if Instant::now() > end {
            return Err("qemu-storage-daemon has made no socket".into());
        }
        thread::sleep(Duration::from_millis(50));
    }
    vm::give_to_user(socket).map_err(|e| e.to_string())?;
    let mut vm = Vm::start(
        "copy,poweroff",
        &[
            "--disk",
            "socket=/tmp/qsd.sock,id=foreign",
            "--disk",
            "path=/tmp/own.img,id=own",
        ],
    )?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: copied "])?;
    vm::expect_content("/tmp/own.img", first)
}
