//! The same registers, messages and guest programs on the kernel's local APICs and on ours.

mod common;

use std::sync::Arc;

use anemone_accel_api::{LapicState, MsiMessage};

use anemone_soft_apic::pv::{MSR_SYSTEM_TIME, Scale};
use anemone_soft_apic::{Apic, Apics, BASE_ENABLE, BASE_EXTENDED, BSP, DEFAULT_BASE, Mode, Now};
use common::{machine, read, write};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_enable_cap, kvm_lapic_state, kvm_msi,
    kvm_msr_entry, kvm_regs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

const CPUS: u32 = 4;
const MEMORY: usize = 0x10000;
/// Where a guest program starts, and where it logs reads (ES:DI) and exceptions (ES:SI).
const PROGRAM: usize = 0x1000;
const READS: usize = 0xC000;
const VECTORS: usize = 0xE000;
const HANDLERS: usize = 0x800;
const END_PORT: u16 = 0xFE;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
    /// A vector that may be an interrupt and that is not one of [`redirected`](Self::redirected).
    fn vector(&mut self) -> u64 {
        0x10 + self.below(0xE0)
    }
    /// Vectors for lowest-priority messages, whose receiver the architecture leaves open.
    fn redirected(&mut self) -> u64 {
        0xF0 + self.below(16)
    }
}

/// A virtual machine of KVM.
struct Reference {
    cpus: Vec<VcpuFd>,
    vm: VmFd,
    memory: Vec<u8>,
    start: usize,
}

/// `None` where the absence of KVM was declared acceptable.
fn reference() -> Option<Reference> {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => {
            let allowed = std::env::var("ANEMONE_ALLOW_MISSING").unwrap_or_default();
            assert!(
                allowed.split(',').any(|name| name == "kvm"),
                "/dev/kvm: {e}; to go on without it set ANEMONE_ALLOW_MISSING=kvm"
            );
            return None;
        }
    };
    Some(Reference::new(&kvm).expect("a small virtual machine can be made"))
}

impl Reference {
    fn new(kvm: &Kvm) -> Result<Self, kvm_ioctls::Error> {
        let vm = kvm.create_vm()?;
        vm.set_identity_map_address(0xFEFF_C000)?;
        vm.set_tss_address(0xFEFF_D000)?;
        vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        })?;
        let mut memory = vec![0u8; MEMORY + 0x1000];
        let start = memory.as_ptr().align_offset(0x1000);
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory[start..].as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the vector outlives the VM, is not reallocated, and is not touched while a
        // vCPU runs.
        unsafe { vm.set_user_memory_region(region)? };
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        for entry in cpuid.as_mut_slice() {
            if entry.function == 1 {
                entry.ecx |= 1 << 21 | 1 << 24; // x2APIC, TSC deadline
            }
        }
        let mut cpus = Vec::new();
        for cpu in 0..CPUS {
            let vcpu = vm.create_vcpu(cpu.into())?;
            vcpu.set_cpuid2(&cpuid)?;
            cpus.push(vcpu);
        }
        Ok(Self {
            cpus,
            vm,
            memory,
            start,
        })
    }

    fn set_msr(&self, cpu: usize, index: u32, data: u64) {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).expect("one fits");
        let done = self.cpus[cpu].set_msrs(&msrs);
        assert_eq!(done.expect("KVM_SET_MSRS"), 1, "MSR {index:#x}");
    }

    fn set(&self, cpu: usize, base: u64, page: &LapicState) {
        self.set_msr(cpu, 0x1B, base);
        let regs = page.0.map(|byte| byte as i8);
        self.cpus[cpu]
            .set_lapic(&kvm_lapic_state { regs })
            .expect("KVM_SET_LAPIC");
    }

    fn page(&self, cpu: usize) -> LapicState {
        let state = self.cpus[cpu].get_lapic().expect("KVM_GET_LAPIC");
        LapicState(Box::new(state.regs.map(|byte| byte as u8)))
    }

    fn signal(&self, message: MsiMessage) {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            data: message.data,
            ..Default::default()
        };
        if let Err(e) = self.vm.signal_msi(msi) {
            // EPERM: there is nobody who takes it.
            assert_eq!(e.errno(), 1, "KVM_SIGNAL_MSI: {e}");
        }
    }

    /// Runs CPU 0 on a real-mode program whose data segment is the APIC's register page.
    /// Interrupts stay off: a KVM that emulates was seen to deliver them against priority.
    fn run(&mut self, code: &[u8]) {
        let memory = &mut self.memory[self.start..];
        memory[PROGRAM..][..code.len()].copy_from_slice(code);
        assert!(PROGRAM + code.len() < READS);
        let mut place = HANDLERS;
        for vector in 0..=255u8 {
            memory[usize::from(vector) * 4..][..4].copy_from_slice(&(place as u32).to_le_bytes());
            // mov byte es:[si], vector; inc si
            let mut handler = vec![0x26, 0xC6, 0x04, vector, 0x46];
            if vector == 13 {
                // Step over the instruction: push bp; mov bp,sp; add word [bp+2],2; pop bp
                handler.extend([0x55, 0x8B, 0xEC, 0x83, 0x46, 0x02, 0x02, 0x5D]);
            }
            handler.push(0xCF); // iret
            memory[place..][..handler.len()].copy_from_slice(&handler);
            place += handler.len();
        }
        let vcpu = &mut self.cpus[0];
        let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            segment.base = 0;
            segment.selector = 0;
        }
        sregs.ds.base = DEFAULT_BASE;
        vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
        let regs = kvm_regs {
            rip: PROGRAM as u64,
            rsp: 0x400 + 0x300,
            rsi: VECTORS as u64,
            rdi: READS as u64,
            rflags: 2,
            ..Default::default()
        };
        vcpu.set_regs(&regs).expect("KVM_SET_REGS");
        loop {
            match vcpu.run().expect("KVM_RUN") {
                VcpuExit::IoOut(END_PORT, _) => break,
                VcpuExit::Intr => {}
                other => panic!("the guest ended with {other:?}"),
            }
        }
    }

    /// What the last program logged: values read, and vectors of exceptions.
    fn log(&self) -> (Vec<u32>, Vec<u8>) {
        let regs = self.cpus[0].get_regs().expect("KVM_GET_REGS");
        let memory = &self.memory[self.start..];
        let reads = memory[READS..regs.rdi as usize].chunks_exact(4);
        (
            reads
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect(),
            memory[VECTORS..regs.rsi as usize].to_vec(),
        )
    }
}

/// One step of a guest program. Registers are MSR numbers less 0x800.
#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u32, u64),
    Read(u32),
}

/// Real-mode machine code of a step.
fn assemble(step: Step, mode: Mode, code: &mut Vec<u8>) {
    let load = |code: &mut Vec<u8>, opcode: u8, value: u32| {
        code.extend([0x66, opcode]); // mov e*x, imm32
        code.extend(value.to_le_bytes());
    };
    let store = |code: &mut Vec<u8>, modrm: u8| {
        code.extend([0x26, 0x66, 0x89, modrm, 0x83, 0xC7, 0x04]); // mov es:[di],e*x; add di,4
    };
    match (step, mode) {
        (Step::Write(register, value), Mode::X2Apic) => {
            load(code, 0xB9, 0x800 + register);
            load(code, 0xB8, value as u32);
            load(code, 0xBA, (value >> 32) as u32);
            code.extend([0x0F, 0x30]); // wrmsr
        }
        (Step::Read(register), Mode::X2Apic) => {
            load(code, 0xB9, 0x800 + register);
            load(code, 0xB8, 0);
            load(code, 0xBA, 0);
            code.extend([0x0F, 0x32]); // rdmsr
            store(code, 0x05);
            store(code, 0x15);
        }
        (Step::Write(register, value), _) => {
            load(code, 0xB8, value as u32);
            code.extend([0x66, 0xA3]); // mov [offset],eax
            code.extend((register as u16 * 16).to_le_bytes());
        }
        (Step::Read(register), _) => {
            code.extend([0x66, 0xA1]); // mov eax,[offset]
            code.extend((register as u16 * 16).to_le_bytes());
            store(code, 0x05);
        }
    }
}

/// Does a step on our APIC as a CPU would.
fn perform(step: Step, apic: &mut Apic, reads: &mut Vec<u32>, vectors: &mut Vec<u8>) {
    let now = Now::default();
    match (step, apic.mode()) {
        (Step::Write(register, value), Mode::X2Apic) => {
            if apic.write_msr(0x800 + register, value, now).is_err() {
                vectors.push(13);
            }
        }
        (Step::Read(register), Mode::X2Apic) => {
            let value = apic.read_msr(0x800 + register, now).unwrap_or_else(|_| {
                vectors.push(13);
                0
            });
            reads.extend([value as u32, (value >> 32) as u32]);
        }
        (Step::Write(register, value), _) => {
            write(apic, u64::from(register) * 16, value as u32);
        }
        (Step::Read(register), _) => reads.push(read(apic, u64::from(register) * 16)),
    }
}

/// A random step, restricted to what the manual defines and the two can agree on: no current
/// count (time differs), no illegal vectors (KVM has no error status), no interrupt to the
/// sender by lowest priority (KVM ignores task priorities).
fn random_step(random: &mut Random, mode: Mode) -> Step {
    const READABLE: &[u32] = &[
        0x02, 0x03, 0x08, 0x0A, 0x0D, 0x0F, 0x10, 0x13, 0x17, 0x18, 0x1C, 0x1F, 0x20, 0x24, 0x27,
        0x28, 0x30, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38, 0x3E,
    ];
    let masked = if random.one_in(2) { 1 << 16 } else { 0 };
    let vector = random.vector();
    // Odd vectors are level-triggered in `prepare`.
    let even = vector & !1;
    let x2apic = mode == Mode::X2Apic;
    match random.below(20) {
        0..=2 => Step::Read(random.pick(READABLE)),
        3 => Step::Read(0x0A),
        4..=7 => Step::Write(0x0B, 0),
        8 => Step::Write(0x08, random.below(256)),
        9 => {
            let enable = if random.one_in(5) { 0 } else { 0x100 };
            let suppress = if random.one_in(4) { 0x1000 } else { 0 };
            Step::Write(0x0F, 0xFF | enable | suppress)
        }
        10 => Step::Write(0x32, vector | masked | random.below(3) << 17),
        11 => Step::Write(0x33 + random.below(2) as u32, vector | masked),
        12 => Step::Write(
            0x35 + random.below(2) as u32,
            vector | masked | random.pick(&[0, 0x400, 0x2000, 0x8000]),
        ),
        13 => Step::Write(0x37, vector | masked),
        14 => Step::Write(0x38, 0xF000_0000 | random.next() >> 36),
        15 => Step::Write(0x3E, random.next() & 0b1011),
        16 if x2apic && random.one_in(2) => Step::Write(0x3F, even),
        16 | 17 => {
            let destination = match random.below(6) {
                0 => 0xFFFF_FFFF,
                1 => 0xFF,
                2 => random.below(256),
                3 => random.next() >> 32,
                _ => random.below(CPUS.into()),
            };
            let low = match random.below(8) {
                0 => random.redirected() | 0xC_0100, // lowest priority, all but self
                1 => 0xC_0400 | 0x4000,              // NMI, all but self
                2 => even | 0x4000 | random.below(4) << 18,
                3..=5 => even | 0x4800,
                _ => even | 0x4000,
            };
            if x2apic {
                Step::Write(0x30, destination << 32 | low)
            } else if random.one_in(2) {
                Step::Write(0x31, destination << 24 & 0xFF00_0000)
            } else {
                Step::Write(0x30, low)
            }
        }
        18 if !x2apic => {
            if random.one_in(2) {
                Step::Write(0x0D, random.next() & 0xFF00_0000)
            } else {
                Step::Write(0x0E, random.pick(&[0x0FFF_FFFF, 0xFFFF_FFFF]))
            }
        }
        // What x2APIC mode refuses.
        18 => random.pick(&[
            Step::Write(0x02, 0),
            Step::Write(0x03, 0),
            Step::Write(0x0A, 0),
            Step::Write(0x0D, 0),
            Step::Write(0x0E, 0),
            Step::Write(0x10, 0),
            Step::Write(0x28, 1),
            Step::Write(0x31, 0),
            Step::Write(0x39, 0),
            Step::Write(0x3F, 0x100),
            Step::Read(0x0B),
            Step::Read(0x0E),
            Step::Read(0x3F),
            Step::Read(0xFF),
        ]),
        _ => Step::Write(0x28, 0),
    }
}

/// Registers of a page, without what only lowest-priority messages set, the current count, and
/// the processor priority of a CPU that does not run, which KVM computes when it is next needed.
fn comparable(page: &LapicState) -> Vec<(usize, u32)> {
    let comparable = (0..0x40).filter(|register| !matches!(register, 0x0A | 0x39));
    comparable
        .map(|register| {
            let place = register * 16;
            let mut value = u32::from_le_bytes(std::array::from_fn(|i| page.0[place + i]));
            if matches!(register, 0x1F | 0x27) {
                value &= 0xFFFF;
            }
            (place, value)
        })
        .collect()
}

/// Vectors above 0xF0 that are in a page's IRR.
fn redirected(page: &LapicState) -> u16 {
    u16::from_le_bytes([page.0[0x272], page.0[0x273]])
}

/// A random start for both, and messages from outside, those of lowest priority if `redirect`.
fn prepare(
    random: &mut Random,
    reference: &Reference,
    redirect: bool,
) -> (Arc<Apics>, Vec<Apic>, Mode) {
    let (apics, mut each, _) = machine(CPUS);
    let x2apic = random.one_in(2);
    let clustered = random.one_in(3);
    // KVM may choose a disabled APIC for a lowest-priority message, which then is lost.
    let all_enabled = redirect && random.one_in(2);
    for (cpu, apic) in each.iter_mut().enumerate() {
        let disabled = !all_enabled && random.one_in(4);
        write(apic, 0xF0, if disabled { 0xFF } else { 0x1FF });
        let logical = match random.below(4) {
            0 => random.below(256),
            1 if clustered => random.below(3) << 4 | 1 << random.below(4),
            _ => 1 << (random.below(8)),
        };
        write(apic, 0xD0, (logical as u32) << 24);
        if clustered {
            write(apic, 0xE0, 0x0FFF_FFFF);
        }
        let mut base = DEFAULT_BASE | BASE_ENABLE;
        if cpu == 0 {
            base |= BSP;
        }
        if x2apic {
            base |= BASE_EXTENDED;
        }
        apic.restore_base(base).expect("valid");
        let mut page = apic.page(Now::default());
        for _ in 0..random.below(4) {
            let vector = random.vector();
            // In service or waiting, and perhaps level-triggered.
            for first in [random.pick(&[0x100, 0x200]), random.pick(&[0x100, 0x180])] {
                page.0[first + vector as usize / 32 * 16 + vector as usize / 8 % 4] |=
                    1 << (vector % 8);
            }
        }
        apic.set_page(&page, Now::default());
        reference.set(cpu, base, &page);
    }
    for _ in 0..random.below(12) {
        let destination = match random.below(4) {
            0 => 0xFF,
            1 => random.below(256),
            2 => 1 << random.below(8),
            _ => random.below(CPUS.into()),
        };
        let logical = random.below(2) << 2;
        let (hint, data) = match random.below(5) {
            0 if all_enabled => (0, random.redirected() | 0x100),
            1 if all_enabled && logical != 0 => (8, random.redirected()),
            _ => (0, random.vector()),
        };
        let message = MsiMessage {
            address: 0xFEE0_0000 | destination << 12 | logical | hint,
            // A vector that came both edge- and level-triggered is level-triggered here, but what
            // came last under KVM.
            data: (data | (data & 1) << 15 | random.below(2) << 14) as u32,
        };
        apics.signal_msi(message);
        reference.signal(message);
    }
    (apics, each, if x2apic { Mode::X2Apic } else { Mode::XApic })
}

fn assert_same(seed: u64, what: &[Step], reference: &Reference, each: &mut [Apic]) {
    let mut union = (0, 0);
    for (cpu, apic) in each.iter_mut().enumerate() {
        let (theirs, ours) = (reference.page(cpu), apic.page(Now::default()));
        assert_eq!(
            comparable(&ours),
            comparable(&theirs),
            "ours, KVM's; seed {seed}, CPU {cpu}, {what:x?}"
        );
        union.0 |= redirected(&ours);
        union.1 |= redirected(&theirs);
    }
    // KVM loses such a message when it chooses a CPU that does not exist.
    let only_theirs = union.1 & !union.0;
    assert_eq!(only_theirs, 0, "lowest priority; seed {seed}, {what:x?}");
}

#[test]
fn messages_reach_the_same_cpus_as_under_kvm() {
    let Some(reference) = reference() else { return };
    for seed in 0..4000 {
        let mut random = Random(seed);
        let (_apics, mut each, _) = prepare(&mut random, &reference, true);
        assert_same(seed, &[], &reference, &mut each);
    }
}

#[test]
fn guest_programs_see_the_same_registers_as_under_kvm() {
    let Some(mut reference) = reference() else {
        return;
    };
    for seed in 0..1000 {
        let mut random = Random(1 << 32 | seed);
        let (_apics, mut each, mode) = prepare(&mut random, &reference, false);
        let steps: Vec<Step> = (0..150).map(|_| random_step(&mut random, mode)).collect();
        let mut code = Vec::new();
        for step in &steps {
            assemble(*step, mode, &mut code);
        }
        code.extend([0xE6, END_PORT as u8, 0xEB, 0xFE]);
        reference.run(&code);
        let (mut reads, mut vectors) = (Vec::new(), Vec::new());
        for step in &steps {
            perform(*step, &mut each[0], &mut reads, &mut vectors);
        }
        let theirs = reference.log();
        assert_eq!(vectors, theirs.1, "ours, KVM's; seed {seed}, {steps:x?}");
        assert_eq!(reads, theirs.0, "ours, KVM's; seed {seed}, {steps:x?}");
        assert_same(seed, &steps, &reference, &mut each);
    }
}

#[test]
fn clock_scale_is_that_of_kvm() {
    let Some(mut reference) = reference() else {
        return;
    };
    const CLOCK: usize = 0x9000;
    reference.set_msr(0, MSR_SYSTEM_TIME, CLOCK as u64 | 1);
    reference.run(&[0xE6, END_PORT as u8, 0xEB, 0xFE]);
    let clock = &reference.memory[reference.start + CLOCK..][..32];
    let mul = u32::from_le_bytes([clock[24], clock[25], clock[26], clock[27]]);
    let khz = reference.cpus[0].get_tsc_khz().expect("KVM_GET_TSC_KHZ");
    let scale = Scale::from_khz(khz).expect("not zero");
    assert_eq!(
        (scale.mul, scale.shift),
        (mul, clock[28] as i8),
        "{khz} kHz"
    );
}
