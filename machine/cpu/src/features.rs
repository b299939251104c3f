//! Names of CPUID feature bits, as /proc/cpuinfo spells them.

use crate::leaf::{Leaf, Register, find};

/// One feature bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// Name.
    pub name: &'static str,
    pub(crate) function: u32,
    pub(crate) register: Register,
    pub(crate) bit: u32,
}

impl Feature {
    /// Whether the bit is set.
    pub fn is_in(&self, leaves: &[Leaf]) -> bool {
        find(leaves, self.function, 0).is_some_and(|l| l.get(self.register) >> self.bit & 1 != 0)
    }

    /// Sets the bit, in a leaf that exists.
    pub(crate) fn set(&self, leaves: &mut [Leaf]) {
        if let Some(leaf) = leaves
            .iter_mut()
            .find(|l| l.function == self.function && l.index == 0)
        {
            *leaf.get_mut(self.register) |= 1 << self.bit;
        }
    }
}

macro_rules! features {
    ($($constant:ident = $name:literal, $function:literal, $register:ident, $bit:literal;)*) => {
        $(
            pub(crate) const $constant: Feature =
                Feature { name: $name, function: $function, register: Register::$register, bit: $bit };
        )*
    };
}

features! {
    FPU = "fpu", 0x1, Edx, 0;
    DE = "de", 0x1, Edx, 2;
    PSE = "pse", 0x1, Edx, 3;
    TSC = "tsc", 0x1, Edx, 4;
    MSR = "msr", 0x1, Edx, 5;
    PAE = "pae", 0x1, Edx, 6;
    MCE = "mce", 0x1, Edx, 7;
    CX8 = "cx8", 0x1, Edx, 8;
    APIC = "apic", 0x1, Edx, 9;
    SEP = "sep", 0x1, Edx, 11;
    MTRR = "mtrr", 0x1, Edx, 12;
    PGE = "pge", 0x1, Edx, 13;
    MCA = "mca", 0x1, Edx, 14;
    CMOV = "cmov", 0x1, Edx, 15;
    PAT = "pat", 0x1, Edx, 16;
    PSE36 = "pse36", 0x1, Edx, 17;
    CLFLUSH = "clflush", 0x1, Edx, 19;
    MMX = "mmx", 0x1, Edx, 23;
    FXSR = "fxsr", 0x1, Edx, 24;
    SSE = "sse", 0x1, Edx, 25;
    SSE2 = "sse2", 0x1, Edx, 26;
    SSE3 = "sse3", 0x1, Ecx, 0;
    SSSE3 = "ssse3", 0x1, Ecx, 9;
    FMA = "fma", 0x1, Ecx, 12;
    CX16 = "cx16", 0x1, Ecx, 13;
    SSE4_1 = "sse4_1", 0x1, Ecx, 19;
    SSE4_2 = "sse4_2", 0x1, Ecx, 20;
    X2APIC = "x2apic", 0x1, Ecx, 21;
    MOVBE = "movbe", 0x1, Ecx, 22;
    POPCNT = "popcnt", 0x1, Ecx, 23;
    TSC_DEADLINE = "tsc_deadline_timer", 0x1, Ecx, 24;
    XSAVE = "xsave", 0x1, Ecx, 26;
    AVX = "avx", 0x1, Ecx, 28;
    F16C = "f16c", 0x1, Ecx, 29;
    HYPERVISOR = "hypervisor", 0x1, Ecx, 31;
    ARAT = "arat", 0x6, Eax, 2;
    FSGSBASE = "fsgsbase", 0x7, Ebx, 0;
    BMI1 = "bmi1", 0x7, Ebx, 3;
    AVX2 = "avx2", 0x7, Ebx, 5;
    SMEP = "smep", 0x7, Ebx, 7;
    BMI2 = "bmi2", 0x7, Ebx, 8;
    LAHF = "lahf_lm", 0x8000_0001, Ecx, 0;
    ABM = "abm", 0x8000_0001, Ecx, 5;
    SYSCALL = "syscall", 0x8000_0001, Edx, 11;
    NX = "nx", 0x8000_0001, Edx, 20;
    RDTSCP = "rdtscp", 0x8000_0001, Edx, 27;
    LM = "lm", 0x8000_0001, Edx, 29;
    KVM_CLOCK = "kvmclock", 0x4000_0001, Eax, 3;
    KVM_STEAL_TIME = "kvm-steal-time", 0x4000_0001, Eax, 5;
    KVM_PV_EOI = "kvm-pv-eoi", 0x4000_0001, Eax, 6;
    KVM_CLOCK_STABLE = "kvmclock-stable", 0x4000_0001, Eax, 24;
}
