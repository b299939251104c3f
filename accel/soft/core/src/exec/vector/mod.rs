//! Vector, x87, MMX and bit-manipulation instructions.
//!
//! Nearly all are carried out by the host's CPU ([`thunk`]). What touches memory element by
//! element ([`element`]) or moves state as a whole ([`state`]) is written out here.

mod element;
mod moves;
mod state;
mod thunk;

#[cfg(test)]
mod tests;

use anemone_soft_mmu::{Value, cr0, cr4};
use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::block::Handler;
use crate::cpu::{Cpu, Exception, Exec};

pub(crate) use thunk::{operation, plan, run_any};

/// The handler of an instruction that has no thunk.
pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    // Other encodings share the mnemonics, but not the operands.
    match instruction.code().encoding() {
        EncodingKind::Legacy | EncodingKind::VEX => {
            element::handler(instruction).or_else(|| state::handler(instruction))
        }
        _ => None,
    }
}

/// What an instruction is, as far as control registers decide whether it may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Always may.
    Other,
    Wait,
    X87,
    Mmx,
    /// Legacy SSE.
    Sse,
    Fxsave,
    /// XGETBV and XSETBV.
    Xcr,
    Xsave,
    /// VEX on vector registers.
    Avx,
    /// VEX on general registers.
    VexGeneral,
}

impl Class {
    fn of(instruction: &Instruction) -> Self {
        use CpuidFeature as F;
        use Mnemonic as M;
        let features = instruction.cpuid_features();
        let any = |wanted: &[F]| features.iter().any(|feature| wanted.contains(feature));
        if instruction.code().encoding() == EncodingKind::VEX {
            return if any(&[F::BMI1, F::BMI2]) {
                Self::VexGeneral
            } else {
                Self::Avx
            };
        }
        match instruction.mnemonic() {
            M::Wait => return Self::Wait,
            M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => return Self::Fxsave,
            M::Xgetbv | M::Xsetbv => return Self::Xcr,
            M::Emms => return Self::Mmx,
            M::Fisttp => return Self::X87,
            // These use an MMX register, but follow the rules of SSE.
            M::Cvtps2pi | M::Cvttps2pi | M::Cvtpd2pi | M::Cvttpd2pi => return Self::Sse,
            M::Ldmxcsr | M::Stmxcsr => return Self::Sse,
            _ => {}
        }
        if any(&[F::FPU, F::FPU287, F::FPU387]) {
            return Self::X87;
        }
        if any(&[F::XSAVE, F::XSAVEOPT, F::XSAVEC, F::XSAVES]) {
            return Self::Xsave;
        }
        let mut class = Self::Other;
        for operand in 0..instruction.op_count() {
            if instruction.op_kind(operand) == OpKind::Register {
                let register = instruction.op_register(operand);
                if register.is_vector_register() {
                    return Self::Sse;
                }
                if register.is_mm() {
                    class = Self::Mmx;
                }
            }
        }
        class
    }
}

/// The exception that an instruction raises because of CR0, CR4, XCR0 or the mode (SDM volume 2,
/// 2.4; volume 3, 2.5 and table 13-1).
pub(crate) fn availability(cpu: &Cpu, instruction: &Instruction) -> Option<Exception> {
    let class = Class::of(instruction);
    let (em, ts) = (cpu.cr0 & cr0::EM != 0, cpu.cr0 & cr0::TS != 0);
    let osfxsr = cpu.cr4 & cr4::OSFXSR != 0;
    let osxsave = cpu.cr4 & cr4::OSXSAVE != 0;
    let undefined = match class {
        Class::Other | Class::Wait | Class::X87 | Class::Fxsave => false,
        Class::Mmx => em,
        Class::Sse => em || !osfxsr,
        Class::Xcr | Class::Xsave => !osxsave,
        Class::Avx => cpu.real_segments() || !osxsave || cpu.xcr0 & 6 != 6,
        Class::VexGeneral => cpu.real_segments(),
    };
    let not_available = match class {
        Class::Other | Class::Xcr | Class::VexGeneral => false,
        Class::Wait => ts && cpu.cr0 & cr0::MP != 0,
        Class::X87 | Class::Fxsave => em || ts,
        Class::Mmx | Class::Sse | Class::Xsave | Class::Avx => ts,
    };
    if undefined {
        Some(Exception::UD)
    } else {
        not_available.then_some(Exception::NM)
    }
}

/// The address `at` bytes after `linear`.
fn advance(cpu: &Cpu, linear: u64, at: usize) -> u64 {
    let address = linear.wrapping_add(at as u64);
    if cpu.long_mode() {
        address
    } else {
        address & 0xFFFF_FFFF
    }
}

/// Bytes of the access at the start of `left` bytes.
fn piece(left: usize) -> usize {
    match left {
        16.. => 16,
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// Loads an operand of any size.
fn load_bytes(cpu: &mut Cpu, linear: u64, into: &mut [u8]) -> Exec {
    let mut at = 0;
    while at < into.len() {
        let here = advance(cpu, linear, at);
        let size = piece(into.len() - at);
        let bytes = match size {
            16 => cpu.load::<u128>(here)?.to_bytes(),
            8 => cpu.load::<u64>(here)?.to_bytes(),
            4 => cpu.load::<u32>(here)?.to_bytes(),
            2 => cpu.load::<u16>(here)?.to_bytes(),
            _ => cpu.load::<u8>(here)?.to_bytes(),
        };
        into[at..at + size].copy_from_slice(&bytes[..size]);
        at += size;
    }
    Ok(())
}

/// Stores an operand of any size. The caller has probed it, so that it happens as a whole.
fn store_bytes(cpu: &mut Cpu, linear: u64, from: &[u8]) -> Exec {
    let mut at = 0;
    while at < from.len() {
        let here = advance(cpu, linear, at);
        let size = piece(from.len() - at);
        let mut bytes = [0; 32];
        bytes[..size].copy_from_slice(&from[at..at + size]);
        match size {
            16 => cpu.store(here, u128::from_bytes(&bytes))?,
            8 => cpu.store(here, u64::from_bytes(&bytes))?,
            4 => cpu.store(here, u32::from_bytes(&bytes))?,
            2 => cpu.store(here, u16::from_bytes(&bytes))?,
            _ => cpu.store(here, u8::from_bytes(&bytes))?,
        }
        at += size;
    }
    Ok(())
}
