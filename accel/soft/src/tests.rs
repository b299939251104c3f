//! The accelerator as a machine sees it. What instructions do is tested in the core.

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anemone_accel_api::{
    Bus, EventFd, MemorySlot, MsiMessage, Regs, Stop, Vcpu, VcpuKick, Verdict, Vm, conformance,
    self_test,
};

use crate::{SoftVm, code_memory};

fn vm(model: &str, cpus: usize) -> anemone_accel_api::Result<SoftVm> {
    let code = (0..cpus).map(|_| code_memory().unwrap()).collect();
    SoftVm::new(model, code, &anemone_accel_api::spawn)
}

fn make() -> Box<dyn Vm> {
    Box::new(vm(anemone_cpu::HOST, 1).unwrap())
}

#[test]
fn port_and_memory_accesses_reach_the_bus() {
    conformance::port_and_memory_accesses_reach_the_bus(&make);
}

#[test]
fn doorbell_only_counts() {
    conformance::doorbell_only_counts(&make);
}

#[test]
fn kick_ends_an_endless_loop_even_when_it_comes_first() {
    conformance::kick_ends_an_endless_loop_even_when_it_comes_first(&make);
}

#[test]
fn state_survives_a_round_trip_to_another_vm() {
    conformance::state_survives_a_round_trip_to_another_vm(&make);
}

#[test]
fn event_on_a_route_reaches_the_local_apic() {
    conformance::event_on_a_route_reaches_the_local_apic(&make);
}

#[test]
fn runs_stock_kernels() {
    let verdict = self_test(vm(anemone_cpu::HOST, 1).unwrap()).unwrap();
    assert_eq!(verdict, Verdict::Usable);
}

#[test]
fn models_are_what_the_engine_offers() {
    let offered = crate::offered();
    for model in anemone_cpu::MODELS {
        let missing = model.missing(&offered);
        match vm(model.name, 2) {
            Ok(_) => assert!(missing.is_empty(), "{missing:?}"),
            Err(e) => {
                let text = e.to_string();
                assert!(missing.iter().all(|name| text.contains(name)), "{text}");
                assert!(!missing.is_empty(), "{text}");
            }
        }
    }
    let error = vm("no-such-model", 1).err().unwrap().to_string();
    assert!(error.contains("no-such-model"), "{error}");
}

#[test]
fn there_are_as_many_cpus_as_were_announced() {
    let vm = vm(anemone_cpu::HOST, 2).unwrap();
    assert!(vm.create_vcpu(0, 1).is_err());
    let _first = vm.create_vcpu(0, 2).unwrap();
    assert!(vm.create_vcpu(0, 2).is_err());
    assert!(vm.create_vcpu(2, 2).is_err());
    let _second = vm.create_vcpu(1, 2).unwrap();
}

#[test]
fn a_vcpu_stays_on_its_thread() {
    let vm = vm(anemone_cpu::HOST, 1).unwrap();
    let vcpu = vm.create_vcpu(0, 1).unwrap();
    vcpu.state().unwrap();
    let elsewhere = thread::spawn(move || vcpu.state().map(drop));
    let error = elsewhere.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("another thread"), "{error}");
}

#[test]
fn a_counter_that_is_removed_keeps_its_events() {
    let vm = make();
    let message = MsiMessage {
        address: 0xFEE0_0000,
        data: 0x40,
    };
    let counter = EventFd::new().unwrap();
    vm.set_msi_route(7, Some(message)).unwrap();
    vm.add_irqfd(counter.as_fd(), 7).unwrap();
    assert!(vm.add_irqfd(counter.as_fd(), 7).is_err(), "twice");
    vm.remove_irqfd(counter.as_fd(), 7).unwrap();
    assert!(vm.remove_irqfd(counter.as_fd(), 7).is_err(), "twice");
    counter.signal();
    assert_eq!(counter.take(), 1);
}

/// Tells a test of port writes; a write to port 0xFE kicks the CPU.
struct Ports {
    seen: Mutex<Sender<(u16, u8)>>,
    kick: Box<dyn VcpuKick>,
}

impl Bus for Ports {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        if port == 0xFE {
            return self.kick.kick();
        }
        self.seen.lock().unwrap().send((port, data[0])).unwrap();
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

impl Ports {
    fn new(vcpu: &mut dyn Vcpu) -> (Self, Receiver<(u16, u8)>) {
        let (seen, receiver) = channel();
        let ports = Self {
            seen: Mutex::new(seen),
            kick: vcpu.kicker(),
        };
        (ports, receiver)
    }
}

/// Guest memory of some pages at address 0 as slot 0.
struct Memory(Vec<u8>, usize);

impl Memory {
    /// With code at 0x1000 and at 0x2000.
    fn new(first: &[u8], second: &[u8]) -> Self {
        let mut bytes = vec![0; 0x5000];
        let start = bytes.as_ptr().align_offset(0x1000);
        bytes[start + 0x1000..][..first.len()].copy_from_slice(first);
        bytes[start + 0x2000..][..second.len()].copy_from_slice(second);
        Self(bytes, start)
    }

    fn map(&mut self, vm: &dyn Vm) {
        let slot = MemorySlot {
            slot: 0,
            guest: 0,
            size: 0x4000,
            host: self.0[self.1..].as_mut_ptr(),
            read_only: false,
            log_dirty: false,
        };
        // SAFETY: the tests drop the VM or unmap the slot before the memory, and leave it alone.
        unsafe { vm.map_memory(slot).unwrap() };
    }
}

/// Puts a CPU at 0x1000 in real mode, with the local APIC's page in DS.
fn start(vcpu: &mut dyn Vcpu) {
    let mut sregs = vcpu.state().unwrap().sregs;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.ds.base = 0xFEE0_0000;
    let regs = Regs {
        rip: 0x1000,
        rflags: 2,
        ..Regs::default()
    };
    vcpu.set_registers(&regs, &sregs).unwrap();
}

/// out 0x80, N; out 0xFE, al; jmp $
const fn report(n: u8) -> [u8; 8] {
    [0xB0, n, 0xE6, 0x80, 0xE6, 0xFE, 0xEB, 0xFE]
}

#[test]
fn code_in_a_slot_that_was_replaced_is_forgotten() {
    let (mut old, mut new) = (Memory::new(&report(1), &[]), Memory::new(&report(2), &[]));
    let vm = make();
    let mut vcpu = vm.create_vcpu(0, 1).unwrap();
    let (ports, seen) = Ports::new(&mut *vcpu);
    old.map(&*vm);
    start(&mut *vcpu);
    assert_eq!(vcpu.run(&ports).unwrap(), Stop::Kicked);
    vm.unmap_memory(0).unwrap();
    assert!(vm.unmap_memory(0).is_err(), "twice");
    new.map(&*vm);
    // Self-modifying: the page is watched again although it was decoded under another slot.
    start(&mut *vcpu);
    assert_eq!(vcpu.run(&ports).unwrap(), Stop::Kicked);
    drop(ports);
    assert_eq!(seen.iter().collect::<Vec<_>>(), [(0x80, 1), (0x80, 2)]);
}

#[test]
fn the_second_cpu_starts_when_the_first_says_so() {
    let first = [
        // mov dword [0x310], 0x01000000: to APIC id 1
        &[0x66, 0xC7, 0x06, 0x10, 0x03, 0x00, 0x00, 0x00, 0x01][..],
        // mov dword [0x300], 0x00004500: INIT
        &[0x66, 0xC7, 0x06, 0x00, 0x03, 0x00, 0x45, 0x00, 0x00],
        // mov dword [0x300], 0x00004602: start at page 2
        &[0x66, 0xC7, 0x06, 0x00, 0x03, 0x02, 0x46, 0x00, 0x00],
        &report(1),
    ];
    let mut memory = Memory::new(&first.concat(), &report(2));
    let vm = vm(anemone_cpu::HOST, 2).unwrap();
    memory.map(&vm);
    let run = |index: u32| {
        let mut vcpu = vm.create_vcpu(index, 2).unwrap();
        move || {
            let (ports, seen) = Ports::new(&mut *vcpu);
            if index == 0 {
                start(&mut *vcpu);
            }
            assert_eq!(vcpu.run(&ports).unwrap(), Stop::Kicked);
            drop(ports);
            seen.iter().collect::<Vec<_>>()
        }
    };
    let (zero, one) = (run(0), run(1));
    let one = thread::spawn(one);
    let zero = thread::spawn(zero);
    assert_eq!(zero.join().unwrap(), [(0x80, 1)]);
    assert_eq!(one.join().unwrap(), [(0x80, 2)]);
}
