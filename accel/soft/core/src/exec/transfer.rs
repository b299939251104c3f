//! Moves, exchanges and conversions.

use anemone_soft_mmu::Value;
use anemone_soft_native::{Flags, WideWord};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::integer::{part, size};
use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg};
use crate::hot::{Operand, by_size, by_wide_size, condition};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let size = size(instruction);
    let conditional = instruction.condition_code() != iced_x86::ConditionCode::None;
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti | Mnemonic::Movdiri => by_size!(size, move_value),
        Mnemonic::Movzx => zero_extend,
        Mnemonic::Movsx | Mnemonic::Movsxd => sign_extend,
        Mnemonic::Movbe => by_wide_size!(size, move_reversed),
        Mnemonic::Lea => load_address,
        Mnemonic::Xchg => by_size!(size, exchange),
        Mnemonic::Xadd => by_size!(size, exchange_add),
        // The opcodes of the first 486s are not there: decoders must be asked for them.
        Mnemonic::Cmpxchg => by_size!(size, compare_exchange),
        Mnemonic::Cmpxchg8b => compare_exchange_pair::<u64>,
        Mnemonic::Cmpxchg16b => compare_exchange_pair::<u128>,
        Mnemonic::Bswap => swap_bytes,
        Mnemonic::Xlatb => translate,
        Mnemonic::Cbw => |cpu, _| widen(cpu, Register::AX, Register::AL),
        Mnemonic::Cwde => |cpu, _| widen(cpu, Register::EAX, Register::AX),
        Mnemonic::Cdqe => |cpu, _| widen(cpu, Register::RAX, Register::EAX),
        Mnemonic::Cwd => |cpu, _| widen_pair(cpu, 2),
        Mnemonic::Cdq => |cpu, _| widen_pair(cpu, 4),
        Mnemonic::Cqo => |cpu, _| widen_pair(cpu, 8),
        _ if instruction.is_jcc_short_or_near() => return None,
        _ if conditional && instruction.op_count() == 1 && size == 1 => set_condition,
        _ if conditional && instruction.op_count() == 2 => conditional_move,
        _ => return None,
    };
    Some(handler)
}

fn move_value<W: Operand>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value: W = cpu.source(instruction, 1)?;
    if instruction.op0_kind() == OpKind::Register {
        cpu.write_register(instruction.op0_register(), value.zero_extend());
        return Ok(());
    }
    let linear = cpu.memory_operand(instruction, <W as Value>::SIZE, true)?;
    cpu.store(linear, value)
}

fn zero_extend(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value = cpu.read_operand(instruction, 1)?;
    cpu.write_register(instruction.op0_register(), value);
    Ok(())
}

/// The value of `size` bytes with its sign.
fn signed(value: u64, size: usize) -> u64 {
    let above = 64 - 8 * size as u32;
    ((value << above) as i64 >> above) as u64
}

fn sign_extend(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value = cpu.read_operand(instruction, 1)?;
    let value = signed(value, cpu.operand_size(instruction, 1));
    cpu.write_register(instruction.op0_register(), value);
    Ok(())
}

fn move_reversed<W: Operand + WideWord>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value = cpu.source::<W>(instruction, 1)?.reverse_bytes();
    if instruction.op0_kind() == OpKind::Register {
        cpu.write_register(instruction.op0_register(), value.zero_extend());
        return Ok(());
    }
    let linear = cpu.memory_operand(instruction, <W as Value>::SIZE, true)?;
    cpu.store(linear, value)
}

fn load_address(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let address = cpu.effective_address(instruction);
    cpu.write_register(instruction.op0_register(), address);
    Ok(())
}

/// With memory always locked.
fn exchange<W: Operand>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let source = instruction.op1_register();
    let new = W::truncate(cpu.read_register(source));
    let old = if instruction.op0_kind() == OpKind::Register {
        cpu.modify_first(instruction, |_| new)?
    } else {
        let linear = cpu.memory_operand(instruction, <W as Value>::SIZE, true)?;
        cpu.update(linear, |_| new)?
    };
    cpu.write_register(source, old.zero_extend());
    Ok(())
}

fn exchange_add<W: Operand>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let source = instruction.op1_register();
    let b = W::truncate(cpu.read_register(source));
    let (sum, flags);
    if instruction.op0_kind() == OpKind::Register {
        let destination = instruction.op0_register();
        let a = W::truncate(cpu.read_register(destination));
        (sum, flags) = a.add(b);
        cpu.write_register(source, a.zero_extend());
        cpu.write_register(destination, sum.zero_extend());
    } else {
        let a = cpu.modify_first(instruction, |a: W| a.add(b).0)?;
        (_, flags) = a.add(b);
        cpu.write_register(source, a.zero_extend());
    }
    cpu.set_flags(flags);
    Ok(())
}

fn compare_exchange<W: Operand>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let accumulator = part(Register::RAX, <W as Value>::SIZE);
    let expected = W::truncate(cpu.read_register(accumulator));
    let new: W = cpu.source(instruction, 1)?;
    let old = if instruction.op0_kind() == OpKind::Register {
        let register = instruction.op0_register();
        let old = W::truncate(cpu.read_register(register));
        // Otherwise not even the upper half changes.
        if old == expected {
            cpu.write_register(register, new.zero_extend());
        }
        old
    } else {
        let change = |old: W| if old == expected { new } else { old };
        cpu.modify_first(instruction, change)?
    };
    if old != expected {
        cpu.write_register(accumulator, old.zero_extend());
    }
    cpu.set_flags(expected.cmp(old));
    Ok(())
}

/// A value of two registers: EDX:EAX or RDX:RAX.
trait Double: anemone_soft_mmu::Atomic {
    fn join(low: u64, high: u64) -> Self;
    fn halves(self) -> (u64, u64);
}

impl Double for u64 {
    fn join(low: u64, high: u64) -> Self {
        low & 0xFFFF_FFFF | high << 32
    }

    fn halves(self) -> (u64, u64) {
        (self & 0xFFFF_FFFF, self >> 32)
    }
}

impl Double for u128 {
    fn join(low: u64, high: u64) -> Self {
        u128::from(low) | u128::from(high) << 64
    }

    fn halves(self) -> (u64, u64) {
        (self as u64, (self >> 64) as u64)
    }
}

fn compare_exchange_pair<D: Double>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let segment = cpu.memory_segment(instruction);
    let offset = cpu.effective_address(instruction);
    // Only in 64-bit code, and before anything else about the address.
    if D::SIZE == 16 && cpu.bases[segment].wrapping_add(offset) & 15 != 0 {
        return Err(cpu.gp());
    }
    let linear = cpu.data_address(segment, offset, D::SIZE, true)?;
    let expected = D::join(cpu.gpr(reg::RAX), cpu.gpr(reg::RDX));
    let new = D::join(cpu.gpr(reg::RBX), cpu.gpr(reg::RCX));
    let old = cpu.update(linear, |old| if old == expected { new } else { old })?;
    if old != expected {
        let (low, high) = old.halves();
        cpu.set_gpr(reg::RAX, low);
        cpu.set_gpr(reg::RDX, high);
    }
    cpu.set_flags(cpu.flags().with(Flags::ZF, old == expected));
    Ok(())
}

fn swap_bytes(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let register = instruction.op0_register();
    let value = cpu.read_register(register);
    let value = match instruction.code() {
        Code::Bswap_r64 => value.swap_bytes(),
        Code::Bswap_r32 => (value as u32).swap_bytes().into(),
        // Undefined, and 0 on the CPUs there are.
        _ => 0,
    };
    cpu.write_register(register, value);
    Ok(())
}

/// XLAT: the only address with a byte register in it.
fn translate(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let base = instruction.memory_base();
    let offset = cpu
        .read_register(base)
        .wrapping_add(cpu.gpr(reg::RAX) & 0xFF);
    let offset = match base.size() {
        2 => offset & 0xFFFF,
        4 => offset & 0xFFFF_FFFF,
        _ => offset,
    };
    let segment = cpu.memory_segment(instruction);
    let linear = cpu.data_address(segment, offset, 1, false)?;
    let value = cpu.load::<u8>(linear)?;
    cpu.write_register(Register::AL, value.into());
    Ok(())
}

fn widen(cpu: &mut Cpu, to: Register, from: Register) -> Exec {
    let value = signed(cpu.read_register(from), from.size());
    cpu.write_register(to, value);
    Ok(())
}

/// CWD, CDQ, CQO: the accumulator's sign to DX, EDX or RDX.
fn widen_pair(cpu: &mut Cpu, size: usize) -> Exec {
    let value = signed(cpu.gpr(reg::RAX), size) as i64 >> 63;
    cpu.write_register(part(Register::RDX, size), value as u64);
    Ok(())
}

fn set_condition(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value = cpu.flags().condition(condition(instruction));
    cpu.write_operand(instruction, 0, value.into())
}

/// Reads memory and clears the upper half of a 32-bit destination whatever the condition.
fn conditional_move(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value = cpu.read_operand(instruction, 1)?;
    let register = instruction.op0_register();
    let value = if cpu.flags().condition(condition(instruction)) {
        value
    } else {
        cpu.read_register(register)
    };
    cpu.write_register(register, value);
    Ok(())
}
