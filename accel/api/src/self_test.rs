//! Can an accelerator run a stock kernel on this host?
//!
//! A `/dev/kvm` may exist and yet only emulate supervisor code, instruction by instruction
//! (software KVM in a nested guest): it is slow beyond use and lacks instructions that every
//! kernel executes. The test guest runs in supervisor mode, 64 bit, with paging: it executes
//! `lock cmpxchg16b` and `xrstor`, then a loop that real hardware finishes in well under a
//! millisecond, and reports through a port.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use crate::{Bus, Error, MemorySlot, Regs, Result, Segment, Sregs, Stop, Vm};

/// What the self-test found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Stock kernels run.
    Usable,
    /// They do not, and why.
    Unusable(String),
}

/// Time the test guest may take. The loop needs about 0.1 ms on hardware, a few milliseconds in
/// a nested VM or on a software CPU, and over 400 ms where KVM emulates each instruction.
const LIMIT: Duration = Duration::from_millis(150);
/// Rounds of the loop, two instructions each.
const ROUNDS: u32 = 100_000;
/// The port and value by which the guest says that it got to the end.
const DONE: (u16, u8) = (0x10, 0x42);
/// Guest memory: page tables, data and code.
const MEMORY: usize = 0x8000;
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const XSAVE_AREA: u64 = 0x4000;
const OPERAND: u64 = 0x5000;
const CODE: usize = 0x6000;

struct DonePort(AtomicBool);

impl Bus for DonePort {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        if port == DONE.0 && data.first() == Some(&DONE.1) {
            self.0.store(true, Ordering::Release);
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

/// The guest's code. RDI points at the operand, RSI at the XSAVE area, ECX is the loop count.
const PROGRAM: &[u8] = &[
    0xF0,
    0x48,
    0x0F,
    0xC7,
    0x0F, // lock cmpxchg16b [rdi]
    0x31,
    0xD2, // xor edx, edx
    0xB8,
    0x03,
    0x00,
    0x00,
    0x00, // mov eax, 3 (x87 and SSE)
    0x0F,
    0xAE,
    0x2E, // xrstor [rsi]
    0xFF,
    0xC9, // dec ecx
    0x75,
    0xFC, // jnz -4
    0xB0,
    DONE.1, // mov al, 0x42
    0xE6,
    DONE.0 as u8, // out 0x10, al
    0x0F,
    0x0B, // ud2: without an IDT, a triple fault
];

/// Runs the test guest on a virtual machine without memory and CPUs.
///
/// # Errors
/// Only where the accelerator fails altogether; one that works but cannot run a kernel is a
/// [`Verdict`].
pub fn self_test(vm: impl Vm) -> Result<Verdict> {
    let mut memory = vec![0u8; MEMORY + 0x1000];
    let aligned = memory.as_ptr().align_offset(0x1000);
    let guest = &mut memory[aligned..aligned + MEMORY];
    // One identity-mapped gigabyte, present and writable.
    guest[PML4..PML4 + 8].copy_from_slice(&(PDPT as u64 | 3).to_le_bytes());
    guest[PDPT..PDPT + 8].copy_from_slice(&0x83u64.to_le_bytes());
    guest[CODE..CODE + PROGRAM.len()].copy_from_slice(PROGRAM);
    // An XSAVE header that restores nothing but the initial state; MXCSR's reset value.
    guest[XSAVE_AREA as usize + 24..XSAVE_AREA as usize + 28]
        .copy_from_slice(&0x1F80u32.to_le_bytes());

    // It must be gone before the memory is.
    let vm = vm;
    let slot = MemorySlot {
        slot: 0,
        guest: 0,
        size: MEMORY as u64,
        host: guest.as_mut_ptr(),
        read_only: false,
        log_dirty: false,
    };
    // SAFETY: `memory` outlives `vm`, and this function no longer touches it.
    unsafe { vm.map_memory(slot)? };
    let done = DonePort(AtomicBool::new(false));
    let mut vcpu = vm.create_vcpu(0, 1)?;
    vcpu.set_registers(&registers(), &system_registers())?;
    let kick = vcpu.kicker();
    let (finished, watch) = mpsc::channel::<()>();
    let stop = std::thread::scope(|scope| {
        scope.spawn(move || {
            if watch.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                kick.kick();
            }
        });
        let stop = vcpu.run(&done);
        drop(finished);
        stop
    });
    let reached_end = done.0.load(Ordering::Acquire);
    Ok(match stop {
        Ok(Stop::TripleFault) if reached_end => Verdict::Usable,
        Ok(Stop::Kicked) => Verdict::Unusable(format!(
            "it emulates supervisor code: a loop of {ROUNDS} rounds did not end within {} ms",
            LIMIT.as_millis()
        )),
        Ok(stop) => Verdict::Unusable(format!("the test guest ended early ({stop:?})")),
        Err(Error::Guest(reason)) => Verdict::Unusable(reason),
        Err(other) => return Err(other),
    })
}

fn registers() -> Regs {
    Regs {
        rip: CODE as u64,
        rflags: 2,
        rdi: OPERAND,
        rsi: XSAVE_AREA,
        rcx: ROUNDS.into(),
        ..Regs::default()
    }
}

/// 64-bit supervisor mode with the tables of [`self_test`].
fn system_registers() -> Sregs {
    let code = Segment::from_descriptor(0x08, 0x00AF_9B00_0000_FFFF);
    let data = Segment::from_descriptor(0x10, 0x00CF_9300_0000_FFFF);
    let task = Segment::from_descriptor(0x18, 0x0000_8B00_0000_0067);
    Sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task,
        cr0: 0x8005_0033,
        cr3: PML4 as u64,
        // PAE, OSFXSR, OSXMMEXCPT, OSXSAVE.
        cr4: 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18,
        // LME, LMA.
        efer: 1 << 8 | 1 << 10,
        apic_base: 0xFEE0_0900,
        ..Sregs::default()
    }
}
