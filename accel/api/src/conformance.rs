//! Tiny guests in real mode that show whether an accelerator does what the traits say. Each
//! accelerator's tests call these functions; they use no instruction that an emulating KVM lacks.
//!
//! A function is given how to make an empty virtual machine of one CPU. It panics where the
//! accelerator is wrong.
#![allow(clippy::unwrap_used, reason = "this is the code of tests")]

use std::os::fd::AsFd;
use std::sync::Mutex;
use std::time::Duration;

use crate::{
    Bus, EventFd, IoAddress, MemorySlot, MsiMessage, Regs, Sregs, Stop, Vcpu, VcpuKick, Vm,
};

/// Makes a virtual machine.
pub type Make<'a> = &'a dyn Fn() -> Box<dyn Vm>;

#[derive(Debug, PartialEq, Eq)]
enum Access {
    PortRead(u16, usize),
    PortWrite(u16, Vec<u8>),
    MmioRead(u64, usize),
    MmioWrite(u64, Vec<u8>),
}

/// Records accesses; reads give 0x5A in every byte.
struct Recorder {
    accesses: Mutex<Vec<Access>>,
    kick: Box<dyn VcpuKick>,
}

impl Recorder {
    fn push(&self, access: Access) {
        self.accesses.lock().unwrap().push(access);
    }
}

impl Bus for Recorder {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0x5A);
        self.push(Access::PortRead(port, data.len()));
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        if port == END_PORT {
            return self.kick.kick();
        }
        self.push(Access::PortWrite(port, data.to_vec()));
    }
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0x5A);
        self.push(Access::MmioRead(address, data.len()));
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.push(Access::MmioWrite(address, data.to_vec()));
    }
}

const LOAD_ADDRESS: usize = 0x1000;
const MEMORY: usize = 0x4000;

/// A guest in real mode with its memory.
struct Guest {
    vcpu: Box<dyn Vcpu>,
    vm: Box<dyn Vm>,
    memory: Vec<u8>,
    start: usize,
}

impl Guest {
    fn new(make: Make<'_>, code: &[u8]) -> Self {
        let mut memory = vec![0u8; MEMORY + 0x1000];
        let start = memory.as_ptr().align_offset(0x1000);
        memory[start + LOAD_ADDRESS..][..code.len()].copy_from_slice(code);
        let vm = make();
        let slot = MemorySlot {
            slot: 0,
            guest: 0,
            size: MEMORY as u64,
            host: memory[start..].as_mut_ptr(),
            read_only: false,
            log_dirty: true,
        };
        // SAFETY: the vector lives as long as the VM and is not reallocated.
        unsafe { vm.map_memory(slot).unwrap() };
        let mut vcpu = vm.create_vcpu(0, 1).unwrap();
        let mut sregs: Sregs = vcpu.state().unwrap().sregs;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        let regs = Regs {
            rip: LOAD_ADDRESS as u64,
            rflags: 2,
            rsp: 0x800,
            ..Regs::default()
        };
        vcpu.set_registers(&regs, &sregs).unwrap();
        Self {
            vcpu,
            vm,
            memory,
            start,
        }
    }

    /// Runs to the end and returns what reached the bus.
    fn run(&mut self) -> Vec<Access> {
        let bus = Recorder {
            accesses: Mutex::default(),
            kick: self.vcpu.kicker(),
        };
        assert_eq!(self.vcpu.run(&bus).unwrap(), Stop::Kicked);
        bus.accesses.into_inner().unwrap()
    }

    fn byte(&self, address: usize) -> u8 {
        // SAFETY: in bounds; volatile because the guest writes it behind the compiler's back.
        unsafe { std::ptr::read_volatile(&self.memory[self.start + address]) }
    }
}

/// Tells [`Recorder`] to end the run: out 0xFE, al; jmp $. (A triple fault would be shorter, but
/// KVM's emulator ignores the limit of the real-mode vector table.)
const END: &[u8] = &[0xE6, END_PORT as u8, 0xEB, 0xFE];
const END_PORT: u16 = 0xFE;

fn with_end(code: &[u8]) -> Vec<u8> {
    [code, END].concat()
}

/// Accesses reach the bus in order, with their widths; writes to memory are in the dirty log.
pub fn port_and_memory_accesses_reach_the_bus(make: Make<'_>) {
    let code = with_end(&[
        0xB0, 0x41, 0xBA, 0xF8, 0x03, 0xEE, // mov al,'A'; mov dx,0x3f8; out dx,al
        0xED, // in ax,dx
        0xA3, 0x00, 0x20, // mov [0x2000],ax
        0x66, 0xB8, 0x78, 0x56, 0x34, 0x12, // mov eax,0x12345678
        0x66, 0xA3, 0x00, 0x50, // mov [0x5000],eax (no memory there)
        0xA0, 0x04, 0x50, // mov al,[0x5004]
        0xA2, 0x02, 0x20, // mov [0x2002],al
        0xBE, 0x00, 0x20, 0xB9, 0x02, 0x00, 0xF3, 0x6E, // mov si,0x2000; mov cx,2; rep outsb
    ]);
    let mut guest = Guest::new(make, &code);
    assert_eq!(
        guest.run(),
        [
            Access::PortWrite(0x3F8, vec![0x41]),
            Access::PortRead(0x3F8, 2),
            Access::MmioWrite(0x5000, vec![0x78, 0x56, 0x34, 0x12]),
            Access::MmioRead(0x5004, 1),
            Access::PortWrite(0x3F8, vec![0x5A]),
            Access::PortWrite(0x3F8, vec![0x5A]),
        ]
    );
    assert_eq!(
        [guest.byte(0x2000), guest.byte(0x2001), guest.byte(0x2002)],
        [0x5A; 3]
    );
    let dirty = guest.vm.dirty_log(0).unwrap();
    assert_eq!(
        dirty[0] & 0b1100,
        0b0100,
        "page 2 was written, page 3 was not"
    );
}

/// Doorbells count what they match, and the bus gets the rest.
pub fn doorbell_only_counts(make: Make<'_>) {
    let code = with_end(&[
        0xB8, 0x07, 0x00, 0xA3, 0x00, 0x50, // mov ax,7; mov [0x5000],ax
        0xB8, 0x08, 0x00, 0xA3, 0x00, 0x50, // mov ax,8; mov [0x5000],ax
        0xA3, 0x10, 0x50, // mov [0x5010],ax
    ]);
    let mut guest = Guest::new(make, &code);
    let (seven, any) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let (at_7, at_any) = (IoAddress::Mmio(0x5000), IoAddress::Mmio(0x5010));
    guest
        .vm
        .add_ioeventfd(seven.as_fd(), at_7, Some(7))
        .unwrap();
    guest.vm.add_ioeventfd(any.as_fd(), at_any, None).unwrap();
    assert_eq!(guest.run(), [Access::MmioWrite(0x5000, vec![8, 0])]);
    assert_eq!((seven.take(), any.take()), (1, 1));
    guest
        .vm
        .remove_ioeventfd(seven.as_fd(), at_7, Some(7))
        .unwrap();
    guest
        .vm
        .remove_ioeventfd(any.as_fd(), at_any, None)
        .unwrap();
}

/// A kick before and during a run.
pub fn kick_ends_an_endless_loop_even_when_it_comes_first(make: Make<'_>) {
    let mut guest = Guest::new(make, &[0xEB, 0xFE]); // jmp $
    let kick = guest.vcpu.kicker();
    kick.kick();
    assert_eq!(guest.run(), []);
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        kick.kick();
    });
    assert_eq!(guest.run(), []);
    later.join().unwrap();
}

/// State set is the state read.
pub fn state_survives_a_round_trip_to_another_vm(make: Make<'_>) {
    let mut guest = Guest::new(make, &with_end(&[0xB8, 0x34, 0x12, 0xEE]));
    guest.run();
    let mut state = guest.vcpu.state().unwrap();
    state.regs.r13 = 0x0123_4567_89AB_CDEF;
    state.sregs.cr2 = 0xDEAD_0000;
    state.debug[0] = 0x1000;
    let mut other = Guest::new(make, &[0xF4]);
    other.vcpu.set_state(&state).unwrap();
    let back = other.vcpu.state().unwrap();
    assert_eq!((back.regs, back.sregs), (state.regs, state.sregs));
    assert_eq!((back.xcr0, back.debug), (state.xcr0, state.debug));
    assert_eq!((back.xsave, back.lapic), (state.xsave, state.lapic));
}

/// Event counters raise interrupts, also one that was counted before.
pub fn event_on_a_route_reaches_the_local_apic(make: Make<'_>) {
    // The guest waits with interrupts on; vector 0x40's handler is the end.
    let mut guest = Guest::new(
        make,
        &[
            0xFB, // sti
            0xF4, // hlt
            0xEB, 0xFD, // jmp to the hlt
        ],
    );
    let vector = 0x40;
    let handler: u16 = 0x1800;
    guest.memory[guest.start + vector * 4..][..2].copy_from_slice(&handler.to_le_bytes());
    let end = with_end(&[0xB0, 0x01, 0xE6, 0x80]); // out 0x80, 1
    guest.memory[guest.start + usize::from(handler)..][..end.len()].copy_from_slice(&end);
    let mut state = guest.vcpu.state().unwrap();
    state.lapic.0[0xF1] |= 1; // spurious-interrupt register: APIC software enable
    guest.vcpu.set_state(&state).unwrap();

    let line = EventFd::new().unwrap();
    let message = MsiMessage {
        address: 0xFEE0_0000,
        data: vector as u32,
    };
    guest.vm.set_msi_route(30, Some(message)).unwrap();
    // An event that is counted before the route is connected must not be lost.
    line.signal();
    guest.vm.add_irqfd(line.as_fd(), 30).unwrap();
    assert_eq!(guest.run(), [Access::PortWrite(0x80, vec![1])]);
    guest.vm.remove_irqfd(line.as_fd(), 30).unwrap();
    guest.vm.set_msi_route(30, None).unwrap();
    guest.vm.signal_msi(message).unwrap();
    let nobody = MsiMessage {
        address: 0xFEE0_7000,
        ..message
    };
    guest.vm.signal_msi(nobody).unwrap();
}
