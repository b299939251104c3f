//! Saved state; and a CPU with memory for the tests of other modules.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, OnceLock};

use anemone_accel_api::{
    Bus, DescriptorTable, MemorySlot, MsiMessage, Msr, Regs, Segment, Sregs, VcpuEvents, VcpuState,
};
use anemone_soft_apic::{Apics, Platform};
use anemone_soft_mmu::{Memory, cr0, cr4, efer};
use iced_x86::{Decoder, DecoderOptions};

use crate::clock::Clock;
use crate::code::CodeRegistry;
use crate::cpu::{CodeSize, Config, Cpu, Exception, Shared, Stopped, reg, rflags};
use crate::signals::Signals;
use crate::system::cpuid::{Cpuid, offered};

/// Bytes of guest memory, at 0.
pub const MEMORY: usize = 4 << 20;
/// Page tables that map the first GiB onto itself.
pub const TABLES: u64 = 0x1000;

struct Wake(Vec<Arc<Signals>>);

impl Platform for Wake {
    fn wake(&self, cpu: u32) {
        self.0[cpu as usize].raise(crate::ATTENTION_APIC);
    }
    fn end_of_interrupt(&self, _: u8) {}
}

/// A write here makes the CPU send itself the interrupt whose vector is written.
pub const PORT_INTERRUPT: u16 = 0x98;
/// A write here ends [`Cpu::run`].
pub const PORT_STOP: u16 = 0x99;

/// What ports were accessed: number, bytes, and the value written or `None`. Reads give the
/// number of accesses so far.
#[derive(Default)]
pub struct Ports(
    pub Mutex<Vec<(u16, usize, Option<u64>)>>,
    OnceLock<Arc<Shared>>,
);

impl Bus for Ports {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        let mut log = self.0.lock().unwrap();
        log.push((port, data.len(), None));
        let value = (log.len() as u64).to_le_bytes();
        data.copy_from_slice(&value[..data.len()]);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let mut log = self.0.lock().unwrap();
        log.push((port, data.len(), Some(value)));
        let machine = self.1.get().unwrap();
        match port {
            PORT_INTERRUPT => {
                machine.apics.signal_msi(interrupt_message(value as u8));
            }
            PORT_STOP => machine.signals[0].raise(crate::ATTENTION_KICK),
            _ => {}
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

/// An interrupt for CPU 0.
pub fn interrupt_message(vector: u8) -> MsiMessage {
    MsiMessage {
        address: 0xFEE0_0000,
        data: vector.into(),
    }
}

/// A CPU in 64-bit mode at privilege level 0.
pub struct Guest {
    pub cpu: Cpu,
    pub ports: Box<Ports>,
    pub memory: Arc<Memory>,
    // After the CPU, which points into it.
    _pages: Vec<AtomicU64>,
}

impl Guest {
    /// With this CPU model.
    pub fn with_model(model: &str) -> Self {
        let pages: Vec<_> = (0..(MEMORY + 4096) / 8)
            .map(|_| AtomicU64::new(0))
            .collect();
        let start = pages.as_ptr().cast::<u8>().cast_mut();
        let signals = vec![Arc::new(Signals::default())];
        let code = CodeRegistry::new(&signals);
        let memory = Memory::new(code.clone());
        let slot = MemorySlot {
            slot: 0,
            guest: 0,
            size: MEMORY as u64,
            host: start.wrapping_add(start.align_offset(4096)),
            read_only: false,
            log_dirty: false,
        };
        // SAFETY: the pages are dropped after the CPU and `memory`; atomics may change any time.
        unsafe { memory.add_slot(slot) }.unwrap();
        let features = anemone_soft_apic::Features {
            physical_bits: 48,
            x2apic: true,
            tsc_deadline: true,
        };
        let apics = Apics::new(1, features, Box::new(Wake(signals.clone())));
        let apic = apics.create(0).unwrap();
        let shared = Arc::new(Shared {
            memory: memory.clone(),
            apics,
            code,
            clock: Clock::new(),
            signals,
        });
        let leaves = anemone_cpu::cpuid(model, &offered(), 0, 1).unwrap();
        let cpu = Cpu::new(Config {
            shared,
            index: 0,
            apic,
            cpuid: Cpuid::new(leaves),
            code: crate::code_memory().unwrap(),
        })
        .unwrap();
        let mut guest = Self {
            cpu,
            ports: Box::default(),
            memory,
            _pages: pages,
        };
        let _ = guest.ports.1.set(guest.cpu.shared.clone());
        let bus: *const dyn Bus = &*guest.ports;
        guest.cpu.bus = std::ptr::NonNull::new(bus.cast_mut());
        guest.put(TABLES, &[(TABLES + 0x1000) | 7]);
        guest.put(TABLES + 0x1000, &[(TABLES + 0x2000) | 7]);
        let pages: Vec<u64> = (0..512).map(|n| n << 21 | 0x87).collect();
        guest.put(TABLES + 0x2000, &pages);
        let (regs, sregs) = long_mode();
        guest.cpu.set_registers(&regs, &sregs).unwrap();
        guest
    }

    pub fn new() -> Self {
        Self::with_model("host")
    }

    /// Writes 64-bit words to guest memory.
    pub fn put(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        assert!(self.memory.write(at, &bytes));
    }

    /// Reads guest memory.
    pub fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert!(self.memory.read(at, &mut bytes));
        bytes
    }

    /// Carries out one instruction, at RIP. Returns whether the block would go on.
    pub fn execute(&mut self, bytes: &[u8]) -> Result<bool, Exception> {
        let cpu = &mut self.cpu;
        let bits = match cpu.code_size() {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        let instruction = Decoder::with_ip(bits, bytes, 0, DecoderOptions::NONE).decode();
        assert_eq!(instruction.len(), bytes.len(), "{bytes:02x?}");
        let handler = crate::system::handler(&instruction).unwrap();
        cpu.set_gpr(reg::BLOCK, cpu.rip);
        cpu.next = cpu.rip.wrapping_add(bytes.len() as u64);
        cpu.leave_block = false;
        match handler(cpu, &instruction) {
            Ok(()) => {
                cpu.rip = cpu.next;
                Ok(!cpu.leave_block)
            }
            Err(_) => match cpu.stopped.take() {
                Some(Stopped::Exception(exception)) => Err(exception),
                other => panic!("{bytes:02x?}: {other:?}"),
            },
        }
    }

    /// Puts code into memory, with a handler for one vector, and runs it at RIP until it writes to
    /// [`PORT_STOP`].
    pub fn run(&mut self, at: u64, code: &[u8], vector: u8, handler: &[u8]) {
        const IDT: u64 = 0x8000;
        const GDT: u64 = 0xA000;
        const HANDLER: u64 = 0x21_0000;
        assert!(self.memory.write(at, code));
        assert!(self.memory.write(HANDLER, handler));
        self.put(GDT, &[0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF]);
        let gate = HANDLER & 0xFFFF | 8 << 16 | 0x8E << 40 | (HANDLER >> 16) << 48;
        self.put(IDT + 16 * u64::from(vector), &[gate, 0]);
        self.cpu.gdtr = DescriptorTable {
            base: GDT,
            limit: 23,
        };
        self.cpu.idtr = DescriptorTable {
            base: IDT,
            limit: 0xFFF,
        };
        self.cpu.rip = at;
        assert_eq!(self.cpu.run(&*self.ports), crate::Exit::Kicked);
        let bus: *const dyn Bus = &*self.ports;
        self.cpu.bus = std::ptr::NonNull::new(bus.cast_mut());
    }

    /// Changes the privilege level with that of the stack.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.cpu.segments[crate::cpu::seg::SS].dpl = cpl;
        self.cpu.set_cpl(cpl);
    }
}

fn segment(selector: u16, kind: u8) -> Segment {
    Segment {
        limit: u32::MAX,
        selector,
        kind,
        present: true,
        code_or_data: true,
        granularity: true,
        ..Segment::default()
    }
}

/// 64-bit mode with flat segments.
pub fn long_mode() -> (Regs, Sregs) {
    let data = Segment {
        big: true,
        ..segment(0x10, 3)
    };
    let code = Segment {
        long: true,
        ..segment(0x8, 0xB)
    };
    let tss = Segment {
        base: 0x9000,
        limit: 0x67,
        selector: 0x18,
        kind: 0xB,
        present: true,
        ..Segment::default()
    };
    let sregs = Sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: tss,
        cr0: cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP,
        cr3: TABLES,
        cr4: cr4::PAE,
        efer: efer::LME | efer::LMA,
        apic_base: 0xFEE0_0900,
        ..Sregs::default()
    };
    let regs = Regs {
        rip: 0x20_0000,
        rsp: 0x30_0000,
        rflags: rflags::FIXED,
        ..Regs::default()
    };
    (regs, sregs)
}

/// A state in which as much as possible differs from that after power-up.
fn unusual() -> VcpuState {
    let mut guest = Guest::new();
    let (mut regs, mut sregs) = long_mode();
    regs.rax = 0x1111;
    regs.r15 = 0xFFFF_8000_1234_5678;
    regs.rflags |= rflags::IF | rflags::IOPL | rflags::AC | 0x8D5;
    sregs.fs.base = 0xFFFF_9000_0000_1000;
    sregs.ldt = Segment {
        base: 0x7000,
        kind: 2,
        code_or_data: false,
        ..segment(0x40, 2)
    };
    sregs.gdt = DescriptorTable {
        base: 0xFFFF_FE00_0000_1000,
        limit: 0x7F,
    };
    sregs.idt.limit = 0xFFF;
    sregs.cr0 |= cr0::TS | cr0::AM;
    sregs.cr2 = 0xDEAD_BEEF;
    sregs.cr4 |= cr4::OSXSAVE | cr4::OSFXSR | cr4::SMAP | cr4::PCIDE;
    sregs.cr3 |= 5;
    sregs.cr8 = 6;
    sregs.efer |= efer::SCE | efer::NXE;
    sregs.apic_base = 0xFEE0_0D00;
    guest.cpu.set_registers(&regs, &sregs).unwrap();
    let mut state = guest.cpu.state();
    state.xcr0 = 7;
    for (place, byte) in state.xsave.iter_mut().enumerate() {
        // Registers of all kinds; the header and the control words stay.
        if matches!(place, 32..416 | 576..832) && place % 16 < 10 {
            *byte = place as u8 | 1;
        }
    }
    state.debug = [1, 2, 3, 4, 0xFFFF_0FF1, 0x401];
    let now = state.msrs.iter().position(|m| m.index == 0x10).unwrap();
    state.msrs[now].value = 1 << 40;
    for (index, value) in [
        (0x3B, 77),
        (0x277, 0x0007_0106_0007_0106),
        (0x2FF, 0xC06),
        (0x200, 0x8000_0000),
        (0x201, 0x8000_0800),
        (0x26F, 0x0505_0505_0505_0505),
        (0x4B56_4D00, 0x5000),
        (0x4B56_4D01, 0x5041),
        (0x4B56_4D03, 0x5081),
        (0x4B56_4D04, 0x50C1),
        (0xC000_0081, 0x23_0010_0000_0000),
        (0xC000_0082, 0xFFFF_8000_0000_0000),
        (0xC000_0102, 0x7FFF_0000_0000),
        (0xC000_0103, 3),
        (0x174, 8),
    ] {
        let msr = state.msrs.iter_mut().find(|m| m.index == index);
        msr.unwrap().value = value;
    }
    // The APIC is on, its timer in deadline mode, one interrupt waits and one is in service.
    let mut word = |at: usize, value: u32| {
        state.lapic.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    word(0xF0, 0x1FF);
    word(0x320, 2 << 17 | 0xEC);
    word(0x220, 1 << 1);
    word(0x120, 1 << 2);
    let deadline = state.msrs.iter_mut().find(|m| m.index == 0x6E0).unwrap();
    deadline.value = 1 << 50;
    state.events = VcpuEvents {
        nmi_pending: true,
        nmi_masked: true,
        interrupt_shadow: true,
        ..VcpuEvents::default()
    };
    state.halted = true;
    state
}

/// Takes the TSC out, which goes on.
fn without_tsc(mut state: VcpuState) -> (VcpuState, u64) {
    let at = state.msrs.iter().position(|m| m.index == 0x10).unwrap();
    let Msr { value, .. } = state.msrs.remove(at);
    (state, value)
}

#[test]
fn state_survives_a_fresh_cpu() {
    let given = unusual();
    let mut guest = Guest::new();
    guest.cpu.set_state(&given).unwrap();
    let taken = guest.cpu.state();
    drop(guest);
    let mut guest = Guest::new();
    guest.cpu.set_state(&taken).unwrap();
    let (again, last_tsc) = without_tsc(guest.cpu.state());
    let (taken, middle_tsc) = without_tsc(taken);
    let (given, first_tsc) = without_tsc(given);
    assert_eq!(given, taken);
    assert_eq!(taken, again);
    let second = 1000 * u64::from(guest.cpu.shared.clock.khz());
    assert!(first_tsc < middle_tsc && middle_tsc < last_tsc);
    assert!(last_tsc < first_tsc + 60 * second);
}

#[test]
fn restoring_writes_no_guest_memory() {
    let state = unusual();
    let mut guest = Guest::new();
    guest.put(0x5000, &[0x1234_5678; 32]);
    guest.cpu.set_state(&state).unwrap();
    assert_eq!(guest.get::<8>(0x5000), 0x1234_5678_u64.to_le_bytes());
    assert_eq!(guest.get::<8>(0x5080), 0x1234_5678_u64.to_le_bytes());
    // The clock is another machine's: the guest is told when it runs.
    guest.cpu.offer_pv_eoi();
    assert_ne!(guest.get::<8>(0x5048), 0x1234_5678_u64.to_le_bytes());
}

#[test]
fn components_that_an_image_lacks_are_initial() {
    let mut state = unusual();
    state.xsave[512] = 0;
    let mut guest = Guest::new();
    guest.cpu.set_state(&state).unwrap();
    let image = guest.cpu.state().xsave;
    assert_eq!(image[..2], [0x7F, 0x03]);
    assert!(image[32..416].iter().all(|b| *b == 0));
    assert!(image[576..].iter().all(|b| *b == 0));
    assert_eq!(
        image[24..26],
        state.xsave[24..26],
        "MXCSR is not a part of a component"
    );
}

#[test]
fn impossible_states_are_refused() {
    let refused = |what: &str, change: fn(&mut VcpuState)| {
        let mut state = unusual();
        change(&mut state);
        let mut guest = Guest::new();
        let error = guest.cpu.set_state(&state).unwrap_err();
        assert!(error.contains(what), "{what}: {error}");
    };
    refused("CR4", |s| s.sregs.cr4 |= 1 << 12);
    refused("EFER", |s| s.sregs.efer |= 1 << 12);
    refused("EFER.LMA", |s| s.sregs.efer &= !efer::LMA);
    refused("CR8", |s| s.sregs.cr8 = 16);
    refused("APIC base", |s| s.sregs.apic_base = 1);
    refused("XCR0", |s| s.xcr0 = 5);
    refused("XSAVE", |s| s.xsave.truncate(831));
    refused("MXCSR", |s| s.xsave[27] = 1);
    refused("MSR 0x277", |s| {
        let pat = s.msrs.iter_mut().find(|m| m.index == 0x277);
        pat.unwrap().value = 2;
    });
    refused("MSR 0x12345", |s| {
        s.msrs.push(Msr {
            index: 0x12345,
            value: 0,
        });
    });
}

/// Other threads wait for a CPU that is not parked.
#[test]
fn memory_can_change_around_a_cpu_that_does_not_run() {
    let state = unusual();
    let mut guest = Guest::new();
    guest.cpu.set_state(&state).unwrap();
    guest.cpu.state();
    let memory = guest.memory.clone();
    let (done, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(memory.remove_slot(0).is_ok()));
    let limit = std::time::Duration::from_secs(20);
    assert_eq!(wait.recv_timeout(limit), Ok(true));
}

#[test]
fn a_pending_nmi_message_is_saved() {
    let mut guest = Guest::new();
    let message = MsiMessage {
        data: 0x400,
        ..interrupt_message(0)
    };
    assert_eq!(guest.cpu.shared.apics.signal_msi(message), 1);
    assert!(guest.cpu.state().events.nmi_pending);
}

/// Whatever a guest writes to MSRs and control registers, its state can be restored.
#[test]
fn what_a_guest_can_reach_can_be_restored() {
    let mut random = 0x1234_5678_9ABC_DEF0_u64;
    let mut next = move || {
        // xorshift64
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let ranges = [
        0x0, 0x170, 0x1A0, 0x1D0, 0x200, 0x240, 0x260, 0x2F0, 0x6C0, 0x800, 0x830,
    ];
    let high = [
        0x4B56_4D00,
        0xC000_0080,
        0xC000_0100,
        0xC001_0000,
        0xC001_0110,
        0xC001_1020,
    ];
    let mut taken = Vec::new();
    for _ in 0..20 {
        let mut guest = Guest::new();
        let mut done = 0;
        for _ in 0..2000 {
            let first = match next() as usize % (ranges.len() + high.len()) {
                n if n < ranges.len() => ranges[n],
                n => high[n - ranges.len()],
            };
            let value = next() & (u64::MAX >> (next() % 64)) & (u64::MAX << (next() % 64));
            done += usize::from(
                guest
                    .cpu
                    .write_msr(first + next() as u32 % 64, value)
                    .is_some(),
            );
            let value = value
                | if next() % 2 == 0 {
                    0xE000_0000
                } else {
                    cr4::PAE
                };
            let written = match next() % 8 {
                0 => guest.cpu.write_cr0(value),
                1 => guest.cpu.write_cr4(value),
                _ => Ok(()),
            };
            if written.is_err() {
                guest.cpu.stopped = None;
            }
            guest.cpu.offer_pv_eoi();
            guest.cpu.settle_pv_eoi();
        }
        assert!(done > 50, "{done}");
        taken.push(guest.cpu.state());
    }
    for state in taken {
        let mut guest = Guest::new();
        guest.cpu.set_state(&state).unwrap();
        let (mut again, _) = without_tsc(guest.cpu.state());
        let (mut state, _) = without_tsc(state);
        // Timers have gone on, and may have interrupted.
        for state in [&mut state, &mut again] {
            state.msrs.retain(|m| m.index != 0x6E0);
            state.lapic.0[0x390..0x394].fill(0);
            state.lapic.0[0x200..0x280].fill(0);
        }
        assert_eq!(state, again);
    }
}
