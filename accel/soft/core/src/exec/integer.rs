//! Integer arithmetic, and what the other files of general-purpose instructions share.

use anemone_soft_mmu::Value;
use anemone_soft_native::{DivideError, Flags, WideWord, Word, aaa, aad, aam, aas, daa, das};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{bits, branch, flags, hint, stack, transfer};
use crate::block::Handler;
use crate::cpu::{Cpu, Exception, Exec, Trap, reg};
use crate::hot::{
    Adc, Add, And, Binary, Cmp, Dec, Inc, Neg, Not, Operand, Or, Rcl, Rcr, Rol, Ror, Sar, Sbb, Shl,
    Shr, Sub, Test, Unary, Xor, by_size, by_wide_size,
};

impl Cpu {
    /// Reads an operand that is a general register, memory or an immediate.
    #[inline(always)]
    pub(super) fn source<W: Operand>(&mut self, instruction: &Instruction, n: u32) -> Exec<W> {
        match instruction.op_kind(n) {
            OpKind::Register => Ok(<W as Word>::truncate(
                self.read_register(instruction.op_register(n)),
            )),
            OpKind::Memory => {
                let linear = self.memory_operand(instruction, <W as Value>::SIZE, false)?;
                self.load(linear)
            }
            _ => Ok(<W as Word>::truncate(instruction.immediate(n))),
        }
    }

    /// Replaces the first operand, a general register or memory, by `change` of it and returns the
    /// old value. With LOCK in one piece.
    #[inline(always)]
    pub(super) fn modify_first<W: Operand>(
        &mut self,
        instruction: &Instruction,
        change: impl Fn(W) -> W,
    ) -> Exec<W> {
        if instruction.op0_kind() == OpKind::Register {
            let register = instruction.op0_register();
            let old = <W as Word>::truncate(self.read_register(register));
            self.write_register(register, change(old).zero_extend());
            return Ok(old);
        }
        let linear = self.memory_operand(instruction, <W as Value>::SIZE, true)?;
        self.modify_memory(instruction, linear, change)
    }

    /// As [`modify_first`](Self::modify_first), at a linear address.
    #[inline(always)]
    pub(super) fn modify_memory<W: Operand>(
        &mut self,
        instruction: &Instruction,
        linear: u64,
        change: impl Fn(W) -> W,
    ) -> Exec<W> {
        if instruction.has_lock_prefix() {
            self.update(linear, change)
        } else {
            self.modify(linear, change)
        }
    }

    fn divide_error(&mut self, _: DivideError) -> Trap {
        self.raise(Exception::DE)
    }
}

/// The part of a register that an operand of `size` bytes uses: AL, AX, EAX, RAX for RAX.
pub(super) fn part(full: Register, size: usize) -> Register {
    let number = full.number() as u32;
    match size {
        // RAX, RCX, RDX and RBX only: the others need REX as bytes.
        1 => Register::AL + number,
        2 => Register::AX + number,
        4 => Register::EAX + number,
        _ => Register::RAX + number,
    }
}

/// Size in bytes of the first operand.
pub(super) fn size(instruction: &Instruction) -> usize {
    match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    }
}

/// The function that carries out a general-purpose instruction.
pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    let mut operands = 0..instruction.op_count();
    // MOV of segment and control registers, PUSH of segment registers and the like are not these.
    if operands
        .any(|n| instruction.op_kind(n) == OpKind::Register && !instruction.op_register(n).is_gpr())
    {
        return None;
    }
    arithmetic(instruction)
        .or_else(|| transfer::handler(instruction))
        .or_else(|| bits::handler(instruction))
        .or_else(|| stack::handler(instruction))
        .or_else(|| branch::handler(instruction))
        .or_else(|| flags::handler(instruction))
        .or_else(|| hint::handler(instruction))
}

fn arithmetic(instruction: &Instruction) -> Option<Handler> {
    let size = size(instruction);
    let one = instruction.op_count() == 1;
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Add => by_size!(size, binary, Add),
        Mnemonic::Or => by_size!(size, binary, Or),
        Mnemonic::Adc => by_size!(size, binary, Adc),
        Mnemonic::Sbb => by_size!(size, binary, Sbb),
        Mnemonic::And => by_size!(size, binary, And),
        Mnemonic::Sub => by_size!(size, binary, Sub),
        Mnemonic::Xor => by_size!(size, binary, Xor),
        Mnemonic::Cmp => by_size!(size, compare, Cmp),
        Mnemonic::Test => by_size!(size, compare, Test),
        Mnemonic::Inc => by_size!(size, unary, Inc),
        Mnemonic::Dec => by_size!(size, unary, Dec),
        Mnemonic::Neg => by_size!(size, unary, Neg),
        Mnemonic::Not => by_size!(size, unary, Not),
        Mnemonic::Shl | Mnemonic::Sal => by_size!(size, shift, Shl),
        Mnemonic::Shr => by_size!(size, shift, Shr),
        Mnemonic::Sar => by_size!(size, shift, Sar),
        Mnemonic::Rol => by_size!(size, shift, Rol),
        Mnemonic::Ror => by_size!(size, shift, Ror),
        Mnemonic::Rcl => by_size!(size, shift, Rcl),
        Mnemonic::Rcr => by_size!(size, shift, Rcr),
        Mnemonic::Mul => by_size!(size, multiply_pair, Unsigned),
        Mnemonic::Imul if one => by_size!(size, multiply_pair, Signed),
        Mnemonic::Imul => by_wide_size!(size, multiply),
        Mnemonic::Div => by_size!(size, divide, Unsigned),
        Mnemonic::Idiv => by_size!(size, divide, Signed),
        Mnemonic::Aaa => |cpu, _| ascii_adjust(cpu, aaa),
        Mnemonic::Aas => |cpu, _| ascii_adjust(cpu, aas),
        Mnemonic::Daa => |cpu, _| decimal_adjust(cpu, daa),
        Mnemonic::Das => |cpu, _| decimal_adjust(cpu, das),
        Mnemonic::Aam => ascii_adjust_multiplied,
        Mnemonic::Aad => ascii_adjust_dividend,
        _ => return None,
    };
    Some(handler)
}

fn binary<W: Operand, B: Binary>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let b: W = cpu.source(instruction, 1)?;
    let flags = cpu.flags();
    let old = cpu.modify_first(instruction, |a: W| B::apply(a, b, flags).0)?;
    cpu.set_flags(B::apply(old, b, flags).1);
    Ok(())
}

fn compare<W: Operand, B: Binary>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let a: W = cpu.source(instruction, 0)?;
    let b: W = cpu.source(instruction, 1)?;
    cpu.set_flags(B::apply(a, b, Flags::NONE).1);
    Ok(())
}

fn unary<W: Operand, U: Unary>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let flags = cpu.flags();
    let old = cpu.modify_first(instruction, |a: W| U::apply(a, flags).0)?;
    cpu.set_flags(U::apply(old, flags).1);
    Ok(())
}

/// Shifts and rotations: the count is a byte, whatever the size.
fn shift<W: Operand, B: Binary>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let count = W::truncate(cpu.source::<u8>(instruction, 1)?.into());
    let flags = cpu.flags();
    let old = cpu.modify_first(instruction, |a: W| B::apply(a, count, flags).0)?;
    cpu.set_flags(B::apply(old, count, flags).1);
    Ok(())
}

/// Multiplication and division with one operand and the accumulator pair.
trait Pair {
    fn multiply<W: Word>(a: W, b: W) -> (W, W, Flags);
    fn divide<W: Word>(low: W, high: W, by: W) -> Result<(W, W), DivideError>;
}

struct Unsigned;
struct Signed;

impl Pair for Unsigned {
    fn multiply<W: Word>(a: W, b: W) -> (W, W, Flags) {
        a.mul(b)
    }

    fn divide<W: Word>(low: W, high: W, by: W) -> Result<(W, W), DivideError> {
        low.div(high, by)
    }
}

impl Pair for Signed {
    fn multiply<W: Word>(a: W, b: W) -> (W, W, Flags) {
        a.imul_wide(b)
    }

    fn divide<W: Word>(low: W, high: W, by: W) -> Result<(W, W), DivideError> {
        low.idiv(high, by)
    }
}

/// Low and high half of the accumulator pair: AH:AL, DX:AX, EDX:EAX, RDX:RAX.
fn pair<W: Operand>() -> (Register, Register) {
    let size = <W as Value>::SIZE;
    let high = if size == 1 {
        Register::AH
    } else {
        part(Register::RDX, size)
    };
    (part(Register::RAX, size), high)
}

fn multiply_pair<W: Operand, P: Pair>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let b: W = cpu.source(instruction, 0)?;
    let (low, high) = pair::<W>();
    let (a, c, flags) = P::multiply(W::truncate(cpu.read_register(low)), b);
    cpu.write_register(low, a.zero_extend());
    cpu.write_register(high, c.zero_extend());
    cpu.set_flags(flags);
    Ok(())
}

fn divide<W: Operand, P: Pair>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let by: W = cpu.source(instruction, 0)?;
    let (low, high) = pair::<W>();
    let (a, b) = (cpu.read_register(low), cpu.read_register(high));
    let (quotient, remainder) =
        P::divide(W::truncate(a), W::truncate(b), by).map_err(|e| cpu.divide_error(e))?;
    cpu.write_register(low, quotient.zero_extend());
    cpu.write_register(high, remainder.zero_extend());
    Ok(())
}

/// IMUL with two or three operands.
fn multiply<W: Operand + WideWord>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let last = instruction.op_count() - 1;
    let a: W = cpu.source(instruction, last - 1)?;
    let b: W = cpu.source(instruction, last)?;
    let (value, flags) = a.imul(b);
    cpu.write_register(instruction.op0_register(), value.zero_extend());
    cpu.set_flags(flags);
    Ok(())
}

/// AAA and AAS.
fn ascii_adjust(cpu: &mut Cpu, adjust: fn(u16, Flags) -> (u16, Flags)) -> Exec {
    let (ax, flags) = adjust(cpu.gpr(reg::RAX) as u16, cpu.flags());
    cpu.write_register(Register::AX, ax.into());
    cpu.set_flags(flags);
    Ok(())
}

/// DAA and DAS.
fn decimal_adjust(cpu: &mut Cpu, adjust: fn(u8, Flags) -> (u8, Flags)) -> Exec {
    let (al, flags) = adjust(cpu.gpr(reg::RAX) as u8, cpu.flags());
    cpu.write_register(Register::AL, al.into());
    cpu.set_flags(flags);
    Ok(())
}

/// AAM.
fn ascii_adjust_multiplied(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let (ax, flags) =
        aam(cpu.gpr(reg::RAX) as u8, instruction.immediate8()).map_err(|e| cpu.divide_error(e))?;
    cpu.write_register(Register::AX, ax.into());
    cpu.set_flags(flags);
    Ok(())
}

/// AAD.
fn ascii_adjust_dividend(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let (ax, flags) = aad(cpu.gpr(reg::RAX) as u16, instruction.immediate8());
    cpu.write_register(Register::AX, ax.into());
    cpu.set_flags(flags);
    Ok(())
}
