//! Hints, fences, cache lines, random numbers, and the instructions that are there to be undefined.

use std::arch::asm;
use std::arch::x86_64::{_mm_lfence, _mm_mfence, _mm_sfence};

use anemone_soft_mmu::Access;
use anemone_soft_native::{Flags, serialize};
use iced_x86::{Code, Instruction, Mnemonic};

use crate::block::Handler;
use crate::cpu::{Cpu, Exec};

/// Turns of a spin loop after which the thread gives way.
const PAUSES: u32 = 64;

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Nop | Mnemonic::Reservednop | Mnemonic::Endbr32 | Mnemonic::Endbr64 => nothing,
        // Without shadow stacks the register stays as it is.
        Mnemonic::Rdsspd | Mnemonic::Rdsspq => nothing,
        Mnemonic::Prefetch | Mnemonic::Prefetchw | Mnemonic::Prefetchwt1 => nothing,
        Mnemonic::Prefetchnta | Mnemonic::Prefetcht0 | Mnemonic::Prefetcht1 => nothing,
        Mnemonic::Prefetcht2 | Mnemonic::Prefetchit0 | Mnemonic::Prefetchit1 => nothing,
        Mnemonic::Cldemote => nothing,
        Mnemonic::Pause => pause,
        // Guest accesses are accesses of the host's, so its fences order them.
        Mnemonic::Lfence => |_, _| {
            // SAFETY: part of x86-64.
            unsafe { _mm_lfence() };
            Ok(())
        },
        Mnemonic::Mfence => |_, _| {
            // SAFETY: part of x86-64.
            unsafe { _mm_mfence() };
            Ok(())
        },
        Mnemonic::Sfence => |_, _| {
            // SAFETY: part of x86-64.
            unsafe { _mm_sfence() };
            Ok(())
        },
        Mnemonic::Serialize => |_, _| {
            serialize();
            Ok(())
        },
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => flush_line,
        Mnemonic::Rdrand => random,
        Mnemonic::Rdseed => random,
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => |cpu, _| Err(cpu.ud()),
        _ => return None,
    };
    Some(handler)
}

/// A CPU that spins may be waiting for one whose thread has no processor: now and then it lets
/// that thread have its own.
fn pause(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(PAUSES) {
        cpu.mmu.parked(std::thread::yield_now);
    }
    Ok(())
}

fn nothing(_: &mut Cpu, _: &Instruction) -> Exec {
    Ok(())
}

/// Nothing but the faults of a load: caches are the host's.
fn flush_line(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let linear = cpu.memory_operand(instruction, 1, false)?;
    match cpu.mmu.translate(linear, Access::Read, cpu.context) {
        Ok(_) => Ok(()),
        Err(fault) => Err(cpu.memory_fault(fault)),
    }
}

/// RDRAND and RDSEED: CF tells whether there was a number, and the result is 0 if not.
fn random(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let seed = matches!(
        instruction.code(),
        Code::Rdseed_r16 | Code::Rdseed_r32 | Code::Rdseed_r64
    );
    let value = if seed { host_seed() } else { host_random() };
    cpu.write_register(instruction.op0_register(), value.unwrap_or(0));
    cpu.set_flags(Flags::NONE.with(Flags::CF, value.is_some()));
    Ok(())
}

macro_rules! host_number {
    ($name:ident, $mnemonic:tt) => {
        fn $name() -> Option<u64> {
            if !is_x86_feature_detected!($mnemonic) {
                return None;
            }
            let (value, good): (u64, u8);
            // SAFETY: the host has the instruction; registers only.
            unsafe {
                asm!(concat!($mnemonic, " {0}"), "setc {1}", out(reg) value, out(reg_byte) good,
                    options(nomem, nostack));
            }
            (good != 0).then_some(value)
        }
    };
}

host_number!(host_random, "rdrand");
host_number!(host_seed, "rdseed");
