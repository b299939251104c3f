//! The table, and that it promises only what is there.

use std::collections::HashSet;

use iced_x86::{Decoder, DecoderOptions};

use super::*;
use crate::exec;
use crate::state::tests::Guest;

#[test]
fn every_frozen_model_can_be_had() {
    let offered = offered();
    for model in anemone_cpu::MODELS {
        assert_eq!(
            model.missing(&offered),
            Vec::<&str>::new(),
            "{}",
            model.name
        );
    }
}

#[test]
fn a_model_has_no_more_than_its_features() {
    let table = |model| Cpuid::new(anemone_cpu::cpuid(model, &offered(), 1, 2).unwrap());
    let v1 = table("x86-64-v1-1");
    let v3 = table("x86-64-v3-1");
    assert!(v1.has(CpuidFeature::SSE2) && v1.has(CpuidFeature::CX8));
    assert!(!v1.has(CpuidFeature::SSE3) && !v1.has(CpuidFeature::AVX));
    assert!(v3.has(CpuidFeature::AVX2) && v3.has(CpuidFeature::FSGSBASE));
    assert!(!v3.has(CpuidFeature::SHA) && !v3.has(CpuidFeature::SMAP));
    assert_eq!(v3.physical_bits(), 48);
    assert!(!v3.gigabyte_pages());
    assert_eq!(v3.xcr0_bits(), 7);
    // A feature that is nowhere decided is not there.
    assert!(!v3.has(CpuidFeature::AVX512F) && !v3.has(CpuidFeature::INTEL8086_ONLY));
}

#[test]
fn leaves_that_are_not_there() {
    let with = |vendor: &[u8; 4]| {
        let mut leaves = anemone_cpu::cpuid("x86-64-v3-1", &offered(), 1, 2).unwrap();
        leaves[0].ebx = u32::from_le_bytes(*vendor);
        Cpuid::new(leaves)
    };
    let (intel, amd) = (with(b"Genu"), with(b"Auth"));
    let highest = [7, 832, 832, 0];
    assert_eq!(beyond(&intel, 0x1234, 0), highest);
    assert_eq!(beyond(&intel, 0xC000_0000, 0), highest);
    assert_eq!(beyond(&intel, 0x8000_0100, 0), highest);
    assert_eq!(beyond(&amd, 0x1234, 0), [0; 4]);
    for table in [&intel, &amd] {
        assert_eq!(beyond(table, 0x5, 0), [0; 4]);
        assert_eq!(beyond(table, 0x4000_0100, 0), [0; 4]);
        assert_eq!(beyond(table, 0xB, 7), [0, 0, 7, 1]);
        assert_eq!(beyond(table, 0xD, 9), [0; 4]);
    }
}

/// Every form of every instruction that can be decoded, one encoding of each, for a size of code.
fn forms(bits: u32) -> Vec<Instruction> {
    let legacy_maps: [&[u8]; 4] = [&[], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]];
    let mut starts: Vec<Vec<u8>> = Vec::new();
    for prefix in [&[][..], &[0x66], &[0xF2], &[0xF3], &[0x67]] {
        for rex in [&[][..], &[0x48]] {
            if bits == 64 || rex.is_empty() {
                let head = [prefix, rex].concat();
                starts.extend(legacy_maps.map(|map| [&head, map].concat()));
            }
        }
    }
    for map in 1..=3 {
        for rest in 0..8 {
            // W and L and the prefix, with register 0 as the additional operand.
            for w in [0, 0x80] {
                starts.push(vec![0xC4, 0xE0 | map, w | 0x78 | rest]);
            }
        }
    }
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for start in starts {
        for opcode in 0..=0xFF {
            for modrm in 0..=0xFF {
                // With memory at a register, and every register form.
                if !matches!(modrm & 0xC7, 0x00..=0x01 | 0x04) && modrm < 0xC0 {
                    continue;
                }
                let mut bytes = start.clone();
                bytes.extend([opcode, modrm]);
                bytes.resize(16, 0);
                let instruction = Decoder::with_ip(bits, &bytes, 0, DecoderOptions::NONE).decode();
                let memory = (0..instruction.op_count())
                    .any(|n| instruction.op_kind(n) == iced_x86::OpKind::Memory);
                if !instruction.is_invalid() && seen.insert((instruction.code(), memory)) {
                    found.push(instruction);
                }
            }
        }
    }
    found
}

/// A guest may use whatever CPUID tells it of.
#[test]
fn every_instruction_that_is_offered_is_there() {
    let mut guest = Guest::new();
    let mut missing = Vec::new();
    for bits in [16, 32, 64] {
        let forms = forms(bits);
        assert!(forms.len() > 1500, "{}", forms.len());
        for instruction in forms {
            let cpu = &mut guest.cpu;
            let features = instruction.cpuid_features();
            let offered = features.iter().all(|f| cpu.cpuid.has(*f));
            if !offered || is_not_there(&instruction) {
                continue;
            }
            let done = exec::handler(&instruction).is_some()
                || exec::vector::plan(cpu, &instruction).is_some();
            if !done {
                missing.push(format!(
                    "{bits}-bit code: {:?} {features:?}",
                    instruction.code()
                ));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Instructions of a feature that [`Cpuid::has`] admits for the sake of others.
fn is_not_there(instruction: &Instruction) -> bool {
    let features = instruction.cpuid_features();
    let any = |wanted: &[CpuidFeature]| features.iter().any(|f| wanted.contains(f));
    use CpuidFeature as F;
    match instruction.mnemonic() {
        // They are there to raise #UD.
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => true,
        Mnemonic::Vmcall | Mnemonic::Vmmcall => false,
        Mnemonic::Endbr32 | Mnemonic::Endbr64 | Mnemonic::Rdsspd | Mnemonic::Rdsspq => false,
        _ => any(&[F::VMX, F::SVM, F::CET_SS]),
    }
}
