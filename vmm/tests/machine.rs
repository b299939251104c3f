//! The real `anemone-vmm` process, in its jail, driven through the accelerator `none`: what a
//! guest's CPU would see of `virt-1`, and what happens when it writes nonsense.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::io::{BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use anemone_ipc::vmm::{Device, Event, FromVmm, ToVmm, VmConfig};
use anemone_ipc::{CONTROL_FD, FdIndex, pair};
use common::{ECAM, PANIC_SLOT, Vmm};

#[test]
fn guest_sees_the_machine_of_the_summary() {
    let (mut vmm, summary) = Vmm::start();
    for (slot, id, _) in &summary.pci {
        let found = vmm.number(&format!("read {:#x} 4", ECAM + (u64::from(*slot) << 15)));
        assert_eq!(format!("{:04x}:{:04x}", found & 0xFFFF, found >> 16), *id);
    }
    for slot in (1..32u8).filter(|s| summary.pci.iter().all(|(taken, _, _)| taken != s)) {
        assert_eq!(
            vmm.number(&format!("read {:#x} 4", ECAM + (u64::from(slot) << 15))),
            0xFFFF_FFFF
        );
    }
    // The same through the ports that firmware uses.
    vmm.ask("out 0xcf8 4 0x80000000");
    assert_eq!(vmm.number("in 0xcfc 4"), 0x1237_8086);
    let rsdp = (0xE_0000u64..0x10_0000)
        .step_by(16)
        .find(|at| vmm.ask(&format!("load {at:#x} 8")) == "5253442050545220");
    assert!(rsdp.is_some(), "no ACPI root pointer in the BIOS area");
    assert!(summary.boot.contains("ELF"), "{}", summary.boot);
}

#[test]
fn power_and_panic_reach_the_supervisor() {
    let (mut vmm, _) = Vmm::start();
    vmm.channel.send(&ToVmm::PowerButton, &[]).unwrap();
    // Unmask pin 9 of the I/O APIC: vector 0x31.
    vmm.ask("write 0xfec00000 4 0x22");
    vmm.ask("write 0xfec00010 4 0x31");
    while vmm.ask("interrupts") != "0xfee00000:0x31:1" {}
    assert_eq!(vmm.number("in 0x608 4"), 8);

    let config = ECAM + (u64::from(PANIC_SLOT) << 15);
    vmm.ask(&format!("write {:#x} 2 2", config + 4));
    let bar = vmm.number(&format!("read {:#x} 4", config + 0x10));
    assert_eq!(vmm.number(&format!("read {bar:#x} 1")), 1);
    vmm.ask(&format!("write {bar:#x} 1 1"));
    assert_eq!(vmm.event(), Event::Panic);
    vmm.ask(&format!("write {bar:#x} 1 1"));
    writeln!(vmm.driver.get_mut(), "out 0x600 1 0x34").unwrap();
    assert_eq!(vmm.event(), Event::Shutdown, "the panic is told once");
    assert!(vmm.child.wait().unwrap().success());
}

#[test]
fn reset_register_and_vanished_driver_end_the_machine() {
    let (mut vmm, _) = Vmm::start();
    writeln!(vmm.driver.get_mut(), "out 0x602 1 1").unwrap();
    assert_eq!(
        vmm.event(),
        Event::Reset {
            cause: "reset register".to_owned()
        }
    );
    let (mut vmm, _) = Vmm::start();
    vmm.driver = BufReader::new(UnixStream::pair().unwrap().0);
    assert_eq!(vmm.event(), Event::Shutdown);
    let (mut vmm, _) = Vmm::start();
    vmm.channel = pair().unwrap().0;
    assert!(
        vmm.child.wait().unwrap().success(),
        "nobody is left to serve"
    );
}

#[test]
fn uart_is_connected_both_ways() {
    use std::io::Read;
    let (mut vmm, _) = Vmm::start();
    for byte in b"hello" {
        vmm.ask(&format!("out 0x3f8 1 {byte}"));
    }
    let mut text = [0; 5];
    vmm.serial.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    // More than the receive queue holds: the rest follows as the guest reads.
    let input: Vec<u8> = (0..200).collect();
    vmm.serial.write_all(&input).unwrap();
    let mut got = Vec::new();
    while got.len() < input.len() {
        if vmm.number("in 0x3fd 1") & 1 != 0 {
            got.push(vmm.number("in 0x3f8 1") as u8);
        }
    }
    assert_eq!(got, input);
}

#[test]
fn configurations_that_cannot_be_built_are_refused() {
    let refusal = |change: fn(&mut VmConfig)| match Vmm::configure(change) {
        (mut vmm, FromVmm::Refused { message }) => {
            vmm.child.wait().unwrap();
            message
        }
        (_, other) => panic!("{other:?}"),
    };
    assert!(refusal(|c| c.cpus = 0).contains("1 to 64"));
    assert!(refusal(|c| c.cpus = 65).contains("1 to 64"));
    assert!(refusal(|c| c.memory = 16 << 20).contains("32 MiB"));
    assert!(refusal(|c| c.machine = "pc".to_owned()).contains("virt-1"));
    assert!(refusal(|c| c.panic_device = Some(32)).contains("slot 32"));
    assert!(refusal(|c| c.kernel = FdIndex(9)).contains("descriptor 9"));
    assert!(
        refusal(|c| c.kernel = FdIndex(3)).len() > 10,
        "a socket is no kernel"
    );
    assert!(refusal(|c| c.cmdline = "x".repeat(5000)).contains("command line"));
}

/// A small generator of repeatable nonsense (xorshift).
struct Nonsense(u64);

impl Nonsense {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn nonsense_from_the_guest_harms_nothing() {
    // A disk whose back end never answers: its registers work all the same.
    let (mut vmm, answer) = Vmm::configure(|config| {
        config.devices.push(Device {
            id: "disk0".to_owned(),
            device_type: 2,
            slot: 8,
            queues: 4,
            queue_size: 256,
            config_size: 60,
            config: None,
            socket: None,
            pmem: None,
            bounce: None,
        });
    });
    assert!(matches!(answer, FromVmm::Ready(_)), "{answer:?}");
    vmm.channel.send(&ToVmm::Start, &[]).unwrap();
    let disk = 0xC080_0000;
    vmm.ask(&format!("write {:#x} 2 6", ECAM + (8 << 15) + 4));
    assert_eq!(
        vmm.number(&format!("read {:#x} 2", disk + 18)),
        4,
        "queues of the disk"
    );
    let mut random = Nonsense(0x0123_4567_89AB_CDEF);
    let places = [
        disk,
        disk + 0x2000,
        disk + 0x3000,
        disk + 0x4000,
        disk + 0x5000,
        ECAM + (8 << 15),
        ECAM,
        ECAM + (3 << 15),
        0xFEC0_0000,
        0xC030_0000,
        0xC000_0000,
        0xFFFF_0000,
    ];
    for round in 0..20_000 {
        let (r, value) = (random.next(), random.next());
        let width = 1 << (r % 4);
        if round % 3 == 0 {
            // Everywhere but the registers that end the machine.
            let port = match (r >> 8) as u16 {
                0x600..=0x602 => 0xCF8,
                port => port,
            };
            vmm.ask(&format!("out {port} {} {}", width.min(4), value));
            vmm.ask(&format!("in {port} {}", width.min(4)));
        } else {
            let at = places[(r >> 8) as usize % places.len()] + (r >> 16) % 0x1200;
            vmm.ask(&format!("write {at:#x} {width} {value}"));
            vmm.ask(&format!("read {at:#x} {width}"));
        }
    }
    assert!(vmm.child.try_wait().unwrap().is_none(), "still there");
    let bridge = vmm.number(&format!("read {ECAM:#x} 4"));
    assert_eq!(bridge, 0x1237_8086);
}

#[test]
fn process_dies_with_its_parent_pid_check() {
    let (ours, theirs) = pair().unwrap();
    let theirs: OwnedFd = theirs.into_fd();
    let raw = theirs.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_anemone-vmm"));
    // Not our pid: the process must notice that its parent is not who it should be.
    command.args(["--parent-pid", "1"]).stderr(Stdio::null());
    // SAFETY: dup2 is async-signal-safe; the descriptor is open in the child.
    unsafe {
        command.pre_exec(move || match libc::dup2(raw, CONTROL_FD) {
            CONTROL_FD => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut child = command.spawn().unwrap();
    drop(theirs);
    assert!(!child.wait().unwrap().success());
    assert!(ours.recv::<FromVmm>().is_err());
}
