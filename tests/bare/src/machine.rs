//! A virtual machine for one case.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{ptr, thread};

use anemone_accel_api::{
    Bus, DescriptorTable, MemorySlot, Regs, Segment, Sregs, Stop, Vcpu, VcpuKick, Vm,
};

use crate::image::{self, Case, Findings, Mode, Table};

/// Bytes of guest memory.
const MEMORY: usize = 16 << 20;
/// Alignment in this process: a page that the guest sees as large may be one here.
const ALIGNMENT: usize = 2 << 20;
// Numbers of guest/runtime.s.
const END_PORT: u16 = 0xF4;
const STACK: u64 = 0x52000;
const STACK_REAL: u64 = 0x1000;
const PML4: u64 = 0x60000;
const CODE64: u16 = 0x08;
const DATA: u16 = 0x10;
const CODE32: u16 = 0x18;
const TSS: u16 = 0x48;
const LOCAL_APIC: u64 = 0xFEE0_0000;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const FOR_USER: u64 = 4;
const WRITE_THROUGH: u64 = 8;
const CACHE_DISABLE: u64 = 0x10;
const LARGE: u64 = 0x80;

/// CR0 of long mode: PG, WP, NE, ET, MP, PE.
const CR0_LONG: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1;
/// CR0 without paging.
const CR0_PROTECTED: u64 = 1 << 5 | 1 << 4 | 1 << 1 | 1;
/// CR0 after a reset without the caches' bits.
const CR0_REAL: u64 = 1 << 4;
/// CR4 of long mode: OSXMMEXCPT, OSFXSR, PAE.
const CR4_LONG: u64 = 1 << 10 | 1 << 9 | 1 << 5;
/// EFER of long mode: NXE, LMA, LME, SCE.
const EFER_LONG: u64 = 1 << 11 | 1 << 10 | 1 << 8 | 1;

/// How a guest has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It said so.
    Port,
    /// A triple fault.
    TripleFault,
    /// The accelerator gave up.
    Error(String),
    /// Not in time; where its CPUs were.
    Stuck(String),
}

/// Guest memory.
struct Memory {
    start: *mut u8,
}

impl Memory {
    fn layout() -> Layout {
        Layout::from_size_align(MEMORY, ALIGNMENT).expect("both are constants that fit")
    }

    fn new() -> Self {
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(Self::layout()) };
        if start.is_null() {
            handle_alloc_error(Self::layout());
        }
        Self { start }
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let at = usize::try_from(address).unwrap_or(MEMORY);
        assert!(at + bytes.len() <= MEMORY, "{address:#x} is outside");
        // SAFETY: in bounds; no vCPU runs yet.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
    }

    fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let at = usize::try_from(address).unwrap_or(MEMORY);
        assert!(at + length <= MEMORY, "{address:#x} is outside");
        // SAFETY: in bounds; no vCPU runs any more.
        unsafe { std::slice::from_raw_parts(self.start.add(at), length) }.to_vec()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and the VM that used it is gone.
        unsafe { dealloc(self.start, Self::layout()) };
    }
}

/// Page tables of the layout that guest/runtime.s describes, and their addresses.
fn page_tables() -> Vec<(u64, u64)> {
    let [pdpt, pd_low, pt_low, pd_user, pt_user, pd_apic, pt_test] =
        [1, 2, 3, 4, 5, 6, 7].map(|n| PML4 + n * 0x1000);
    let table = PRESENT | WRITE | FOR_USER;
    let mut entries = vec![
        (PML4, pdpt | table),
        (pdpt, pd_low | table),
        (pdpt + 8, pd_user | table),
        (pdpt + 24, pd_apic | table),
        (pd_low, pt_low | table),
        (pd_user, pt_user | table),
        (pd_user + 256 * 8, pt_test | table),
        (
            pd_apic + (LOCAL_APIC >> 21 & 0x1FF) * 8,
            LOCAL_APIC | LARGE | CACHE_DISABLE | WRITE_THROUGH | WRITE | PRESENT,
        ),
    ];
    for page in 0..512 {
        entries.push((pt_low + page * 8, page << 12 | WRITE | PRESENT));
        entries.push((pt_user + page * 8, page << 12 | FOR_USER | WRITE | PRESENT));
    }
    for page in 1..MEMORY as u64 >> 21 {
        entries.push((pd_low + page * 8, page << 21 | LARGE | WRITE | PRESENT));
    }
    entries
}

/// Registers with which CPU 0 begins.
fn registers(case: &Case, before: &Sregs) -> (Regs, Sregs) {
    let regs = Regs {
        rip: case.entry,
        rsp: if case.mode == Mode::Real {
            STACK_REAL
        } else {
            STACK
        },
        rflags: 2,
        ..Regs::default()
    };
    let idt = |table, limit| DescriptorTable {
        base: image::table(table),
        limit,
    };
    let mut sregs = *before;
    let data = Segment::from_descriptor(DATA, 0x00CF_9300_0000_FFFF);
    let none = Segment::from_descriptor(0, 0);
    let task = |kind| Segment {
        base: image::table(Table::Tss),
        limit: 0xFF,
        selector: TSS,
        kind,
        present: true,
        ..Segment::default()
    };
    sregs.ldt = none;
    sregs.gdt = DescriptorTable {
        base: image::table(Table::Gdt),
        limit: (image::gdt_length() - 1) as u16,
    };
    match case.mode {
        Mode::Long | Mode::Protected => {
            for segment in [
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
                &mut sregs.ss,
            ] {
                *segment = data;
            }
        }
        Mode::Real => {
            let segment = Segment::from_descriptor(0, 0x0000_9300_0000_FFFF);
            for register in [
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
                &mut sregs.ss,
            ] {
                *register = segment;
            }
            sregs.cs = Segment {
                kind: 0xB,
                ..segment
            };
        }
    }
    match case.mode {
        Mode::Long => {
            sregs.cs = Segment::from_descriptor(CODE64, 0x00AF_9B00_0000_FFFF);
            sregs.tr = task(0xB);
            sregs.idt = idt(Table::Idt64, 0xFFF);
            sregs.cr0 = CR0_LONG;
            sregs.cr3 = PML4;
            sregs.cr4 = CR4_LONG;
            sregs.efer = EFER_LONG;
        }
        Mode::Protected => {
            sregs.cs = Segment::from_descriptor(CODE32, 0x00CF_9B00_0000_FFFF);
            sregs.tr = task(0xB);
            sregs.idt = idt(Table::Idt32, 0x7FF);
            sregs.cr0 = CR0_PROTECTED;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
        Mode::Real => {
            sregs.idt = DescriptorTable {
                base: 0,
                limit: 0x3FF,
            };
            sregs.cr0 = CR0_REAL;
            sregs.cr4 = 0;
            sregs.efer = 0;
        }
    }
    (regs, sregs)
}

/// Sets the registers with which CPU 0 begins.
fn begin(case: &Case, vcpu: &mut dyn Vcpu) -> anemone_accel_api::Result<()> {
    let (regs, sregs) = registers(case, &vcpu.state()?.sregs);
    vcpu.set_registers(&regs, &sregs)
}

/// What the threads of a VM share.
#[derive(Default)]
struct Shared {
    progress: Mutex<Progress>,
    ended: Condvar,
}

#[derive(Default)]
struct Progress {
    end: Option<End>,
    kicks: Vec<Box<dyn VcpuKick>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the guest, unless it has ended.
    fn end(&self, end: End) {
        let mut progress = self.lock();
        progress.end.get_or_insert(end);
        for kick in &progress.kicks {
            kick.kick();
        }
        self.ended.notify_all();
    }

    /// Waits for the end. A guest that has not ended in time is stuck.
    fn wait(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut progress = self.lock();
        while progress.end.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(progress);
                return self.end(End::Stuck(String::new()));
            }
            progress = match self.ended.wait_timeout(progress, left) {
                Ok((progress, _)) => progress,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Runs a vCPU until the guest's end; CPU 0 is the one that is given a case to begin with.
    /// Returns where it was.
    fn run(&self, mut vcpu: Box<dyn Vcpu>, case: Option<&Case>) -> String {
        if let Some(Err(error)) = case.map(|case| begin(case, &mut *vcpu)) {
            self.end(End::Error(error.to_string()));
        }
        let kick = vcpu.kicker();
        self.lock().kicks.push(kick);
        while self.lock().end.is_none() {
            match vcpu.run(self) {
                Ok(Stop::Kicked) => {}
                Ok(Stop::TripleFault) => self.end(End::TripleFault),
                Ok(Stop::Ended) => self.end(End::Error("the vCPU has ended".to_string())),
                Err(error) => self.end(End::Error(error.to_string())),
            }
        }
        match vcpu.state() {
            Ok(state) => format!(
                "cs:rip {:#x}:{:#x} rflags {:#x} rsp {:#x} cr0 {:#x}{}",
                state.sregs.cs.selector,
                state.regs.rip,
                state.regs.rflags,
                state.regs.rsp,
                state.sregs.cr0,
                match (state.waiting_for_sipi, state.halted) {
                    (true, _) => " waiting for SIPI",
                    (false, true) => " halted",
                    (false, false) => "",
                }
            ),
            Err(error) => error.to_string(),
        }
    }
}

impl Bus for Shared {
    /// Every byte of a port is the low byte of its number.
    fn port_read(&self, port: u16, data: &mut [u8]) {
        for (byte, offset) in data.iter_mut().zip(0..) {
            *byte = port.wrapping_add(offset) as u8;
        }
    }

    fn port_write(&self, port: u16, _: &[u8]) {
        if port == END_PORT {
            self.end(End::Port);
        }
    }

    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

/// Runs a case on a new virtual machine.
pub fn run(
    case: &Case,
    vm: &dyn Vm,
    patience: Duration,
) -> anemone_accel_api::Result<(End, Findings)> {
    let memory = Memory::new();
    memory.put(image::IMAGE, image::bytes());
    for (address, entry) in page_tables() {
        memory.put(address, &entry.to_le_bytes());
    }
    let slot = MemorySlot {
        slot: 0,
        guest: 0,
        size: MEMORY as u64,
        host: memory.start,
        read_only: false,
        log_dirty: false,
    };
    // SAFETY: unmapped below, before the memory is freed; accessed here only while no vCPU runs.
    unsafe { vm.map_memory(slot)? };
    let end = run_cpus(case, vm, patience);
    vm.unmap_memory(slot.slot)?;
    let area = memory.get(image::RESULTS, 0x10000);
    Ok((end?, image::findings(&area)))
}

fn run_cpus(case: &Case, vm: &dyn Vm, patience: Duration) -> anemone_accel_api::Result<End> {
    let mut vcpus = Vec::new();
    for index in 0..case.cpus {
        vcpus.push(vm.create_vcpu(index, case.cpus)?);
    }
    let shared = Shared::default();
    let places = thread::scope(|scope| {
        let threads: Vec<_> = vcpus
            .into_iter()
            .enumerate()
            .map(|(index, vcpu)| {
                let (shared, first) = (&shared, (index == 0).then_some(case));
                scope.spawn(move || shared.run(vcpu, first))
            })
            .collect();
        shared.wait(patience);
        let places = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| "panicked".to_string()));
        places.collect::<Vec<_>>().join("; ")
    });
    Ok(match shared.lock().end.take() {
        Some(End::Stuck(_)) | None => End::Stuck(places),
        Some(End::Error(error)) => End::Error(format!("{error}; {places}")),
        Some(end) => end,
    })
}
