//! The frozen models.

use crate::Error;
use crate::features::*;
use crate::leaf::{Leaf, find};
use crate::topology::ALWAYS;

/// A frozen model.
#[derive(Debug)]
pub struct Model {
    /// Name with its version.
    pub name: &'static str,
    /// One line about it.
    pub about: &'static str,
    /// Groups of features: each level has those of the levels below.
    groups: &'static [&'static [Feature]],
    /// Brand string, at most 47 bytes.
    brand: &'static str,
}

/// The psABI's baseline, and what Linux and firmware expect of every 64-bit processor.
const V1: &[Feature] = &[
    FPU, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFLUSH,
    MMX, FXSR, SSE, SSE2, SYSCALL, NX, LM,
];
/// What makes a virtual machine fast and well timed; KVM provides all of it on any processor.
const VIRTUAL: &[Feature] = &[
    X2APIC,
    TSC_DEADLINE,
    HYPERVISOR,
    ARAT,
    KVM_CLOCK,
    KVM_STEAL_TIME,
    KVM_PV_EOI,
    KVM_CLOCK_STABLE,
];
/// psABI level 2; RDTSCP came with it.
const V2: &[Feature] = &[SSE3, SSSE3, CX16, SSE4_1, SSE4_2, POPCNT, LAHF, RDTSCP];
/// psABI level 3; FSGSBASE and SMEP came with it.
const V3: &[Feature] = &[
    FMA, MOVBE, XSAVE, AVX, F16C, BMI1, AVX2, BMI2, ABM, FSGSBASE, SMEP,
];

/// All frozen models, simplest first.
pub const MODELS: &[Model] = &[
    Model {
        name: "x86-64-v1-1",
        about: "the x86-64 baseline: SSE2",
        groups: &[V1, VIRTUAL],
        brand: "Anemone x86-64-v1-1",
    },
    Model {
        name: "x86-64-v2-1",
        about: "x86-64-v2: SSE4.2, POPCNT (Nehalem 2008, Bulldozer 2011, and later)",
        groups: &[V1, VIRTUAL, V2],
        brand: "Anemone x86-64-v2-1",
    },
    Model {
        name: "x86-64-v3-1",
        about: "x86-64-v3: AVX2, FMA, BMI2 (Haswell 2013, Excavator 2015, and later)",
        groups: &[V1, VIRTUAL, V2, V3],
        brand: "Anemone x86-64-v3-1",
    },
];

/// Family 15, model 107, stepping 1: a number that no guest takes for a processor with errata to
/// work around.
const SIGNATURE: u32 = 0x0006_0FB1;
/// CLFLUSH works on 64 bytes (in units of 8).
const CLFLUSH_SIZE: u32 = 8 << 8;
/// Physical address bits where the host says nothing; linear address bits.
const PHYSICAL_BITS: u32 = 40;
const LINEAR_BITS: u32 = 48 << 8;
/// x87 and SSE, and AVX, in XCR0; where AVX lies in the XSAVE area, and its length.
const XCR0_BASE: u32 = 0b011;
const XCR0_AVX: u32 = 0b100;
const AVX_AREA: (u32, u32) = (576, 256);
/// Paravirtual interface: the highest leaf, and "KVMKVMKVM".
const KVM_LEAVES: [u32; 4] = [0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x0000_004D];

impl Model {
    pub(crate) fn find(name: &str) -> Result<&'static Self, Error> {
        let found = MODELS.iter().find(|m| m.name == name);
        found.ok_or_else(|| Error::Unknown(name.to_owned()))
    }

    /// The features, those of lower levels first.
    pub fn features(&self) -> impl Iterator<Item = &'static Feature> {
        self.groups.iter().copied().flatten()
    }

    /// The features that `offered` lacks.
    pub fn missing(&self, offered: &[Leaf]) -> Vec<&'static str> {
        self.features()
            .filter(|f| !ALWAYS.contains(f) && !f.is_in(offered))
            .map(|f| f.name)
            .collect()
    }

    /// The table, without topology.
    pub(crate) fn leaves(&self, offered: &[Leaf]) -> Vec<Leaf> {
        let host = |function| find(offered, function, 0).copied().unwrap_or_default();
        let vendor = host(0);
        let extended_vendor = [0x8000_0008, vendor.ebx, vendor.ecx, vendor.edx];
        let physical = match host(0x8000_0008).eax & 0xFF {
            0 => PHYSICAL_BITS,
            bits => bits,
        };
        let has_xsave = self.features().any(|f| *f == XSAVE);
        let highest = if has_xsave { 0xD } else { 0xB };
        let mut leaves = vec![
            Leaf::new(0x0, [highest, vendor.ebx, vendor.ecx, vendor.edx]),
            Leaf::new(0x1, [SIGNATURE, CLFLUSH_SIZE, 0, 0]),
            // Caches: 32 KiB of data and of code, 512 KiB, and 16 MiB for the package.
            cache(0, 1 | 1 << 5, 8, 64),
            cache(1, 2 | 1 << 5, 8, 64),
            cache(2, 3 | 2 << 5, 8, 1024),
            cache(3, 3 | 3 << 5, 16, 16_384),
            Leaf::sub(0x4, 4, [0; 4]),
            Leaf::new(0x6, [0; 4]),
            Leaf::sub(0x7, 0, [0; 4]),
            Leaf::new(0x4000_0000, KVM_LEAVES),
            Leaf::new(0x4000_0001, [0; 4]),
            Leaf::new(0x8000_0000, extended_vendor),
            Leaf::new(0x8000_0001, [SIGNATURE, 0, 0, 0]),
        ];
        leaves.extend(self.brand_leaves());
        leaves.push(Leaf::new(0x8000_0008, [physical | LINEAR_BITS, 0, 0, 0]));
        if has_xsave {
            let (offset, size) = AVX_AREA;
            let (all, end) = (XCR0_BASE | XCR0_AVX, offset + size);
            leaves.push(Leaf::sub(0xD, 0, [all, end, end, 0]));
            leaves.push(Leaf::sub(0xD, 1, [0; 4]));
            leaves.push(Leaf::sub(0xD, 2, [size, offset, 0, 0]));
        }
        self.features().for_each(|f| f.set(&mut leaves));
        leaves
    }

    /// Leaves 0x80000002 to 4: the brand string, padded with NUL.
    fn brand_leaves(&self) -> impl Iterator<Item = Leaf> {
        let mut text = [0; 48];
        text[..self.brand.len()].copy_from_slice(self.brand.as_bytes());
        (0..3).map(move |i| {
            let word = |n: usize| {
                let at = i * 16 + n * 4;
                u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]])
            };
            Leaf::new(0x8000_0002 + i as u32, [word(0), word(1), word(2), word(3)])
        })
    }
}

/// Leaf 4 for one cache: `kind` is the type and the level in their bits; lines are 64 bytes.
fn cache(index: u32, kind: u32, ways: u32, sets: u32) -> Leaf {
    const SELF_INITIALISING: u32 = 1 << 8;
    Leaf::sub(
        0x4,
        index,
        [kind | SELF_INITIALISING, (ways - 1) << 22 | 63, sets - 1, 0],
    )
}
