//! CPUID: what the engine can offer, and what a CPU answers.

#[cfg(test)]
mod tests;

use anemone_cpu::{Leaf, Register};
use anemone_soft_apic::Mode;
use anemone_soft_mmu::cr4;
use anemone_soft_native::XSAVE_SIZE;
use iced_x86::{CpuidFeature, Instruction, Mnemonic};

use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg};

/// A feature bit: leaf (subleaf 0), register, bit.
pub(crate) type Bit = (u32, Register, u32);

/// Feature bits that the core asks for (SDM volume 2, CPUID; Linux
/// Documentation/virt/kvm/x86/cpuid.rst).
pub(crate) mod feature {
    use anemone_cpu::Register::{Eax, Ebx, Ecx, Edx};

    use super::Bit;

    pub const PCID: Bit = (0x1, Ecx, 17);
    pub const XSAVE: Bit = (0x1, Ecx, 26);
    pub const OSXSAVE: Bit = (0x1, Ecx, 27);
    pub const DE: Bit = (0x1, Edx, 2);
    pub const PSE: Bit = (0x1, Edx, 3);
    pub const TSC: Bit = (0x1, Edx, 4);
    pub const PAE: Bit = (0x1, Edx, 6);
    pub const MCE: Bit = (0x1, Edx, 7);
    pub const APIC: Bit = (0x1, Edx, 9);
    pub const PGE: Bit = (0x1, Edx, 13);
    pub const FXSR: Bit = (0x1, Edx, 24);
    pub const SSE: Bit = (0x1, Edx, 25);
    pub const FSGSBASE: Bit = (0x7, Ebx, 0);
    pub const TSC_ADJUST: Bit = (0x7, Ebx, 1);
    pub const BMI1: Bit = (0x7, Ebx, 3);
    pub const SMEP: Bit = (0x7, Ebx, 7);
    pub const SMAP: Bit = (0x7, Ebx, 20);
    pub const RDPID: Bit = (0x7, Ecx, 22);
    pub const LZCNT: Bit = (0x8000_0001, Ecx, 5);
    pub const SYSCALL: Bit = (0x8000_0001, Edx, 11);
    pub const NX: Bit = (0x8000_0001, Edx, 20);
    pub const PDPE1GB: Bit = (0x8000_0001, Edx, 26);
    pub const RDTSCP: Bit = (0x8000_0001, Edx, 27);
    pub const LM: Bit = (0x8000_0001, Edx, 29);
    pub const KVM_CLOCK_OLD: Bit = (0x4000_0001, Eax, 0);
    pub const KVM_CLOCK: Bit = (0x4000_0001, Eax, 3);
    pub const KVM_STEAL_TIME: Bit = (0x4000_0001, Eax, 5);
    pub const KVM_PV_EOI: Bit = (0x4000_0001, Eax, 6);
}

/// Physical address bits where the table says nothing.
const PHYSICAL_BITS: u8 = 36;

/// Bytes of an XSAVE area without components beyond SSE.
const LEGACY_SIZE: u32 = 576;

/// How many features iced knows at most.
const FEATURES: usize = 256;

/// The CPUID table of one CPU.
#[derive(Debug, Clone)]
pub struct Cpuid {
    leaves: Vec<Leaf>,
    /// By the number of iced's feature.
    features: [bool; FEATURES],
}

fn find(leaves: &[Leaf], function: u32, index: u32) -> Option<&Leaf> {
    leaves
        .iter()
        .find(|l| l.function == function && (!l.indexed || l.index == index))
}

fn register(leaf: &Leaf, register: Register) -> u32 {
    match register {
        Register::Eax => leaf.eax,
        Register::Ebx => leaf.ebx,
        Register::Ecx => leaf.ecx,
        Register::Edx => leaf.edx,
    }
}

impl Cpuid {
    /// The table that `leaves` say.
    pub fn new(leaves: Vec<Leaf>) -> Self {
        let mut cpuid = Self {
            leaves,
            features: [false; FEATURES],
        };
        for feature in CpuidFeature::values() {
            let offered = cpuid.decides(feature);
            if let Some(place) = cpuid.features.get_mut(feature as usize) {
                *place = offered;
            }
        }
        cpuid
    }

    /// MAXPHYADDR.
    pub fn physical_bits(&self) -> u8 {
        let leaf = find(&self.leaves, 0x8000_0008, 0);
        let bits = leaf.map_or(PHYSICAL_BITS, |l| l.eax as u8);
        bits.clamp(PHYSICAL_BITS, 52)
    }

    /// Whether there are pages of 1 GiB.
    pub fn gigabyte_pages(&self) -> bool {
        self.offers(feature::PDPE1GB)
    }

    /// What the model says about the local APICs.
    pub fn apic_features(&self) -> anemone_soft_apic::Features {
        anemone_soft_apic::Features {
            physical_bits: self.physical_bits().into(),
            x2apic: self.offers_in(1, 0, Register::Ecx, 21),
            tsc_deadline: self.offers_in(1, 0, Register::Ecx, 24),
        }
    }

    /// Whether instructions of a class of iced's can be executed.
    #[inline]
    pub(crate) fn has(&self, feature: CpuidFeature) -> bool {
        self.features.get(feature as usize).is_some_and(|f| *f)
    }

    /// Whether a bit is set, as the table has it.
    pub(crate) fn offers(&self, (function, which, bit): Bit) -> bool {
        find(&self.leaves, function, 0).is_some_and(|l| register(l, which) >> bit & 1 != 0)
    }

    /// Whether a register has only bits whose features are there; the list says which bits need
    /// which.
    pub(crate) fn allows(&self, value: u64, needs: &[(u64, Bit)]) -> bool {
        let there = needs.iter().filter(|(_, needed)| self.offers(*needed));
        value & !there.fold(0, |all, (bits, _)| all | bits) == 0
    }

    fn offers_in(&self, function: u32, index: u32, which: Register, bit: u32) -> bool {
        find(&self.leaves, function, index).is_some_and(|l| register(l, which) >> bit & 1 != 0)
    }

    /// Whether the vendor is Intel, who numbers some things otherwise.
    pub(crate) fn is_intel(&self) -> bool {
        const GENU: u32 = u32::from_le_bytes(*b"Genu");
        find(&self.leaves, 0, 0).is_some_and(|l| l.ebx == GENU)
    }

    /// The components that XCR0 can enable.
    pub(crate) fn xcr0_bits(&self) -> u64 {
        find(&self.leaves, 0xD, 0).map_or(1, |l| u64::from(l.edx) << 32 | u64::from(l.eax))
    }

    /// Works out [`has`](Self::has).
    fn decides(&self, feature: CpuidFeature) -> bool {
        use CpuidFeature as F;
        use Register::{Eax, Ebx, Ecx, Edx};
        let bit = |function, which, bit| self.offers((function, which, bit));
        match feature {
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 => true,
            F::CPUID | F::MULTIBYTENOP | F::PAUSE | F::RDPMC => true,
            F::X64 => self.offers(feature::LM),
            // Instructions in the space of hints are hints where their feature is missing: ENDBR and
            // RDSSP; what else these have is not implemented and so is not there.
            F::CET_IBT | F::CET_SS | F::CLDEMOTE | F::PREFETCHITI | F::PREFETCHWT1 => true,
            // Long mode has made it a hint, and the prefix of WBNOINVD is ignored by others.
            F::PREFETCHW | F::WBNOINVD => true,
            // VMCALL and VMMCALL: the hypervisor takes both, whatever the vendor. No other
            // instruction of these is implemented.
            F::VMX | F::SVM => {
                self.offers(feature::KVM_CLOCK) || self.offers(feature::KVM_CLOCK_OLD)
            }
            F::FPU | F::FPU287 | F::FPU387 => bit(0x1, Edx, 0),
            F::TSC => self.offers(feature::TSC),
            F::MSR => bit(0x1, Edx, 5),
            F::CX8 => bit(0x1, Edx, 8),
            F::SEP => bit(0x1, Edx, 11),
            F::CMOV => bit(0x1, Edx, 15),
            F::CLFSH => bit(0x1, Edx, 19),
            F::MMX => bit(0x1, Edx, 23),
            F::FXSR => self.offers(feature::FXSR),
            F::SSE => self.offers(feature::SSE),
            F::SSE2 => bit(0x1, Edx, 26),
            F::SSE3 => bit(0x1, Ecx, 0),
            F::PCLMULQDQ => bit(0x1, Ecx, 1),
            F::MONITOR => bit(0x1, Ecx, 3),
            F::SSSE3 => bit(0x1, Ecx, 9),
            F::FMA => bit(0x1, Ecx, 12),
            F::CMPXCHG16B => bit(0x1, Ecx, 13),
            F::SSE4_1 => bit(0x1, Ecx, 19),
            F::SSE4_2 => bit(0x1, Ecx, 20),
            F::MOVBE => bit(0x1, Ecx, 22),
            F::POPCNT => bit(0x1, Ecx, 23),
            F::AES => bit(0x1, Ecx, 25),
            F::XSAVE => self.offers(feature::XSAVE),
            F::AVX => bit(0x1, Ecx, 28),
            F::F16C => bit(0x1, Ecx, 29),
            F::RDRAND => bit(0x1, Ecx, 30),
            F::FSGSBASE => self.offers(feature::FSGSBASE),
            F::BMI1 => self.offers(feature::BMI1),
            F::AVX2 => bit(0x7, Ebx, 5),
            F::BMI2 => bit(0x7, Ebx, 8),
            F::INVPCID => bit(0x7, Ebx, 10),
            F::RDSEED => bit(0x7, Ebx, 18),
            F::ADX => bit(0x7, Ebx, 19),
            F::SMAP => self.offers(feature::SMAP),
            F::CLFLUSHOPT => bit(0x7, Ebx, 23),
            F::CLWB => bit(0x7, Ebx, 24),
            F::SHA => bit(0x7, Ebx, 29),
            F::GFNI => bit(0x7, Ecx, 8),
            F::VAES => bit(0x7, Ecx, 9),
            F::VPCLMULQDQ => bit(0x7, Ecx, 10),
            F::RDPID => self.offers(feature::RDPID),
            F::AVX_VNNI => self.offers_in(0x7, 1, Eax, 4),
            F::XSAVEOPT => self.offers_in(0xD, 1, Eax, 0),
            F::LZCNT => self.offers(feature::LZCNT),
            F::SSE4A => bit(0x8000_0001, Ecx, 6),
            F::SYSCALL => self.offers(feature::SYSCALL),
            F::RDTSCP => self.offers(feature::RDTSCP),
            _ => false,
        }
    }
}

/// What CPUID answers now: EAX, EBX, ECX, EDX.
pub(crate) fn answer(cpu: &Cpu, function: u32, index: u32) -> [u32; 4] {
    let leaves = &cpu.cpuid.leaves;
    let Some(leaf) = find(leaves, function, index) else {
        return beyond(&cpu.cpuid, function, index);
    };
    let (mut ebx, mut ecx, mut edx) = (leaf.ebx, leaf.ecx, leaf.edx);
    match (function, index) {
        (0x1, _) => {
            if cpu.apic.mode() == Mode::Disabled {
                edx &= !(1 << feature::APIC.2);
            }
            ecx &= !(1 << feature::OSXSAVE.2);
            if cpu.cr4 & cr4::OSXSAVE != 0 {
                ecx |= 1 << feature::OSXSAVE.2;
            }
        }
        (0xD, 0) => ebx = xsave_size(cpu.xcr0),
        _ => {}
    }
    [leaf.eax, ebx, ecx, edx]
}

/// Bytes of an XSAVE area with these components: the legacy region and header, or up to the upper
/// halves of YMM.
fn xsave_size(xcr0: u64) -> u32 {
    if xcr0 & 4 != 0 {
        XSAVE_SIZE as u32
    } else {
        LEGACY_SIZE
    }
}

/// The answer for what is not in the table (SDM volume 2, CPUID): Intel's CPUs give beyond the
/// highest basic leaf what that has, others zero.
fn beyond(cpuid: &Cpuid, function: u32, index: u32) -> [u32; 4] {
    let leaves = &cpuid.leaves;
    let values = |l: &Leaf| [l.eax, l.ebx, l.ecx, l.edx];
    // A level of the topology that does not exist still names the CPU.
    if let (0xB | 0x1F, Some(known)) = (function, find(leaves, function, 0)) {
        return [0, 0, index & 0xFF, known.edx];
    }
    let class = function & 0xF000_0000;
    let highest = find(leaves, class, 0).map_or(0, |l| l.eax);
    let is_known_class = matches!(class, 0 | 0x4000_0000 | 0x8000_0000);
    if cpuid.is_intel() && (function > highest || !is_known_class) && class != 0x4000_0000 {
        let basic = find(leaves, 0, 0).map_or(0, |l| l.eax);
        return find(leaves, basic, index).map_or([0; 4], values);
    }
    [0; 4]
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    (instruction.mnemonic() == Mnemonic::Cpuid).then_some(cpuid)
}

fn cpuid(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if cpu.cpl != 0 && cpu.cpuid_faults() {
        return Err(cpu.gp());
    }
    let [eax, ebx, ecx, edx] = answer(cpu, cpu.gpr(reg::RAX) as u32, cpu.gpr(reg::RCX) as u32);
    for (register, value) in [
        (reg::RAX, eax),
        (reg::RBX, ebx),
        (reg::RCX, ecx),
        (reg::RDX, edx),
    ] {
        cpu.set_gpr(register, value.into());
    }
    Ok(())
}

/// Vendor of the CPUs here. Linux then knows that user code cannot read kernel memory by
/// speculation, which it cannot here, and keeps one set of page tables.
const VENDOR: [u32; 3] = [
    u32::from_le_bytes(*b"Auth"),
    u32::from_le_bytes(*b"cAMD"),
    u32::from_le_bytes(*b"enti"),
];
/// Family 15, model 107, stepping 1, as the frozen models have it.
const SIGNATURE: u32 = 0x0006_0FB1;
/// 64-byte lines, for CLFLUSH.
const CLFLUSH_SIZE: u32 = 8 << 8;
/// 48 bits of physical and of linear address, on every host.
const ADDRESS_BITS: u32 = 48 << 8 | 48;
const BRAND: &[u8; 48] =
    b"Anemone software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// "KVMKVMKVM" and the highest leaf of the paravirtual interface.
const KVM_SIGNATURE: [u32; 4] = [0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x0000_004D];
/// Clock by both numbers, no need for I/O delays, stolen time, end of interrupt in memory, clock the
/// same on all CPUs.
const KVM_FEATURES: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 24;

/// The bits of a register: those of the core, and those that the host has.
fn bits(core: &[u32], host: &[(bool, u32)]) -> u32 {
    let host = host.iter().filter(|(has, _)| *has).map(|(_, bit)| bit);
    core.iter().chain(host).fold(0, |all, bit| all | 1 << bit)
}

/// What this engine can provide on this host: what the core implements, user-level instructions that the
/// host's own CPU carries out as far as it has them, and KVM's paravirtual leaves.
pub fn offered() -> Vec<Leaf> {
    macro_rules! host {
        ($($name:tt => $bit:expr),* $(,)?) => {
            &[$((is_x86_feature_detected!($name), $bit)),*]
        };
    }
    let features_1c = bits(
        // CX16, PCID, x2APIC, TSC deadline, XSAVE, hypervisor.
        &[13, 17, 21, 24, 26, 31],
        host!("sse3" => 0, "pclmulqdq" => 1, "ssse3" => 9, "fma" => 12, "sse4.1" => 19,
            "sse4.2" => 20, "movbe" => 22, "popcnt" => 23, "aes" => 25, "avx" => 28, "f16c" => 29,
            "rdrand" => 30),
    );
    let features_1d = bits(
        // x87, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36,
        // CLFLUSH, MMX, FXSR, SSE, SSE2.
        &[
            0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26,
        ],
        &[],
    );
    let features_7b = bits(
        // FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, no FCS and FDS, SMAP, CLFLUSHOPT, CLWB.
        &[0, 1, 7, 9, 10, 13, 20, 23, 24],
        host!("bmi1" => 3, "avx2" => 5, "bmi2" => 8, "rdseed" => 18, "adx" => 19, "sha" => 29),
    );
    let features_7c = bits(
        // RDPID.
        &[22],
        host!("gfni" => 8, "vaes" => 9, "vpclmulqdq" => 10),
    );
    // FSRM.
    let features_7d = bits(&[4], &[]);
    let features_7_1a = bits(&[], host!("avxvnni" => 4));
    // LAHF, PREFETCHW.
    let extended_c = bits(&[0, 8], host!("lzcnt" => 5, "sse4a" => 6));
    // SYSCALL, NX, pages of 1 GiB, RDTSCP, long mode; and what AMD repeats of leaf 1.
    let extended_d = bits(&[11, 20, 26, 27, 29], &[]) | features_1d & 0x0183_F3FF;
    let [b, c, d] = VENDOR;
    let text = |part: usize| {
        let word = |n: usize| {
            let at = part * 16 + n * 4;
            u32::from_le_bytes([BRAND[at], BRAND[at + 1], BRAND[at + 2], BRAND[at + 3]])
        };
        [word(0), word(1), word(2), word(3)]
    };
    let mut leaves = vec![
        leaf(0x0, [0xD, b, c, d]),
        leaf(0x1, [SIGNATURE, CLFLUSH_SIZE, features_1c, features_1d]),
        // ARAT.
        leaf(0x6, [1 << 2, 0, 0, 0]),
        subleaf(0x7, 0, [1, features_7b, features_7c, features_7d]),
        subleaf(0x7, 1, [features_7_1a, 0, 0, 0]),
        leaf(0x4000_0000, KVM_SIGNATURE),
        leaf(0x4000_0001, [KVM_FEATURES, 0, 0, 0]),
        leaf(0x8000_0000, [0x8000_0008, b, c, d]),
        leaf(0x8000_0001, [SIGNATURE, 0, extended_c, extended_d]),
        leaf(0x8000_0002, text(0)),
        leaf(0x8000_0003, text(1)),
        leaf(0x8000_0004, text(2)),
        // Caches as AMD tells them: 32 KiB of data and of code with 8 ways, 512 KiB with 8, 16 MiB
        // with 16; lines of 64 bytes.
        leaf(
            0x8000_0005,
            [
                0,
                0,
                32 << 24 | 8 << 16 | 1 << 8 | 64,
                32 << 24 | 8 << 16 | 1 << 8 | 64,
            ],
        ),
        leaf(
            0x8000_0006,
            [
                0,
                0,
                512 << 16 | 6 << 12 | 1 << 8 | 64,
                32 << 18 | 8 << 12 | 1 << 8 | 64,
            ],
        ),
        // The TSC counts at one rate always.
        leaf(0x8000_0007, [0, 0, 0, 1 << 8]),
        leaf(0x8000_0008, [ADDRESS_BITS, 0, 0, 0]),
    ];
    let avx = is_x86_feature_detected!("avx");
    let (components, size) = if avx {
        (7, XSAVE_SIZE as u32)
    } else {
        (3, LEGACY_SIZE)
    };
    leaves.push(subleaf(0xD, 0, [components, size, size, 0]));
    // XSAVEOPT.
    leaves.push(subleaf(0xD, 1, [1, 0, 0, 0]));
    if avx {
        leaves.push(subleaf(0xD, 2, [size - LEGACY_SIZE, LEGACY_SIZE, 0, 0]));
    }
    leaves
}

fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
    Leaf {
        function,
        eax,
        ebx,
        ecx,
        edx,
        ..Leaf::default()
    }
}

fn subleaf(function: u32, index: u32, values: [u32; 4]) -> Leaf {
    Leaf {
        index,
        indexed: true,
        ..leaf(function, values)
    }
}
