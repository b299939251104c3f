//! Near jumps, calls and returns.

use anemone_soft_native::Flags;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg};
use crate::hot::condition;

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let handler: Handler = match instruction.mnemonic() {
        _ if instruction.is_jcc_short_or_near() => jump_if,
        _ if instruction.is_jmp_short_or_near() => jump,
        _ if instruction.is_jmp_near_indirect() => jump,
        _ if instruction.is_call_near() || instruction.is_call_near_indirect() => call,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => repeat,
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => jump_if_count_is_zero,
        _ => match instruction.code() {
            Code::Retnw | Code::Retnw_imm16 => ret::<2>,
            Code::Retnd | Code::Retnd_imm16 => ret::<4>,
            Code::Retnq | Code::Retnq_imm16 => ret::<8>,
            _ => return None,
        },
    };
    Some(handler)
}

/// Where a direct or indirect branch goes.
fn target(cpu: &mut Cpu, instruction: &Instruction) -> Exec<u64> {
    match instruction.op0_kind() {
        OpKind::Register | OpKind::Memory => cpu.read_operand(instruction, 0),
        _ => Ok(cpu.branch_target(instruction)),
    }
}

fn jump(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let target = target(cpu, instruction)?;
    cpu.jump_near(target)
}

fn jump_if(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    if cpu.flags().condition(condition(instruction)) {
        cpu.jump_near(cpu.branch_target(instruction))?;
    }
    Ok(())
}

fn call(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let target = target(cpu, instruction)?;
    cpu.check_code_address(target)?;
    let size = -instruction.stack_pointer_increment();
    cpu.push(cpu.next, size as usize)?;
    cpu.next = target;
    Ok(())
}

fn ret<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let target = cpu.peek(0, SIZE)?;
    cpu.jump_near(target)?;
    let above = match instruction.op_count() {
        0 => 0,
        _ => u64::from(instruction.immediate16()),
    };
    cpu.discard(SIZE as u64 + above);
    Ok(())
}

/// Mask of the counter, CX, ECX or RCX, which the address size selects.
fn counter_mask(instruction: &Instruction) -> u64 {
    use Code::*;
    match instruction.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX => 0xFFFF,
        Loopne_rel8_16_CX | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 0xFFFF,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX => u64::MAX,
        Loopne_rel8_16_RCX | Loopne_rel8_64_RCX | Jrcxz_rel8_16 | Jrcxz_rel8_64 => u64::MAX,
        _ => 0xFFFF_FFFF,
    }
}

/// LOOP, LOOPE and LOOPNE.
fn repeat(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let mask = counter_mask(instruction);
    let old = cpu.gpr(reg::RCX);
    let count = old.wrapping_sub(1) & mask;
    let zero = cpu.flags().any(Flags::ZF);
    let goes_on = match instruction.mnemonic() {
        Mnemonic::Loope => zero,
        Mnemonic::Loopne => !zero,
        _ => true,
    };
    if count != 0 && goes_on {
        cpu.jump_near(cpu.branch_target(instruction))?;
    }
    let kept = if mask == 0xFFFF { old & !mask } else { 0 };
    cpu.set_gpr(reg::RCX, kept | count);
    Ok(())
}

fn jump_if_count_is_zero(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    if cpu.gpr(reg::RCX) & counter_mask(instruction) == 0 {
        cpu.jump_near(cpu.branch_target(instruction))?;
    }
    Ok(())
}
