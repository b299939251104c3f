//! Moves of vector registers in 64-bit code: short cuts of their thunks, which cost more than the
//! move itself.

use anemone_soft_mmu::{Access, Value};
use anemone_soft_native::Form;
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::thunk::slowly;
use crate::block::{Op, OpFn, Step};
use crate::cpu::Cpu;

/// Chooses the operation, if the instruction is such a move. The address is in `op` already.
pub(super) fn operation(op: &mut Op, instruction: &Instruction, form: &Form) -> Option<OpFn> {
    let size = match instruction.mnemonic() {
        mnemonic if is_whole(mnemonic) => {
            if (0..2).any(|n| is_register(instruction, n) && instruction.op_register(n).is_ymm()) {
                32
            } else {
                16
            }
        }
        // Not MOVSD of strings, which has no vector register, and not between two registers, where
        // the upper part stays.
        Mnemonic::Movsd | Mnemonic::Vmovsd | Mnemonic::Movq | Mnemonic::Vmovq => 8,
        Mnemonic::Movss | Mnemonic::Vmovss | Mnemonic::Movd | Mnemonic::Vmovd => 4,
        _ => return None,
    };
    if instruction.op_count() != 2 {
        return None;
    }
    let Some(memory) = form.memory else {
        let both = (0..2).all(|operand| is_register(instruction, operand));
        if size < 16 || !both {
            return None;
        }
        op.dst = instruction.op_register(0).number() as u8;
        op.src = instruction.op_register(1).number() as u8;
        return Some(match (size, form.vex) {
            (16, false) => copy::<16, false>,
            (16, true) => copy::<16, true>,
            _ => copy::<32, true>,
        });
    };
    op.extra = memory.alignment - 1;
    if is_register(instruction, 0) {
        op.dst = instruction.op_register(0).number() as u8;
        return Some(match (size, form.vex) {
            (4, false) => load::<4, false>,
            (4, true) => load::<4, true>,
            (8, false) => load::<8, false>,
            (8, true) => load::<8, true>,
            (16, false) => load::<16, false>,
            (16, true) => load::<16, true>,
            _ => load::<32, true>,
        });
    }
    if !is_register(instruction, 1) {
        return None;
    }
    op.src = instruction.op_register(1).number() as u8;
    Some(match size {
        4 => store::<4>,
        8 => store::<8>,
        16 => store::<16>,
        _ => store::<32>,
    })
}

fn is_register(instruction: &Instruction, operand: u32) -> bool {
    instruction.op_kind(operand) == OpKind::Register
        && instruction.op_register(operand).is_vector_register()
}

/// Whether it moves a whole register.
fn is_whole(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Movaps
            | M::Movapd
            | M::Movups
            | M::Movupd
            | M::Movdqa
            | M::Movdqu
            | M::Lddqu
            | M::Movntps
            | M::Movntpd
            | M::Movntdq
            | M::Movntdqa
            | M::Vmovaps
            | M::Vmovapd
            | M::Vmovups
            | M::Vmovupd
            | M::Vmovdqa
            | M::Vmovdqu
            | M::Vlddqu
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    )
}

/// Between registers. VEX forms clear the part that they do not move.
fn copy<const SIZE: usize, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let [low, high] = *cpu.native.vector(op.src.into());
    let target = cpu.native.vector(op.dst.into());
    target[0] = low;
    if VEX {
        target[1] = if SIZE == 32 { high } else { 0 };
    }
    Step::Next
}

/// The host address of the operand of `SIZE` bytes, if the TLB has it and it is aligned.
#[inline(always)]
fn operand<const SIZE: usize>(cpu: &mut Cpu, op: &Op, access: Access) -> Option<*mut u8> {
    let linear = cpu.address(op);
    if linear & u64::from(op.extra) == 0 {
        cpu.mmu.hit(access, cpu.context, linear, SIZE)
    } else {
        None
    }
}

/// From memory. What is not loaded is cleared, but the upper half without VEX.
fn load<const SIZE: usize, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Step {
    let Some(host) = operand::<SIZE>(cpu, op, Access::Read) else {
        return slowly(cpu, op);
    };
    // SAFETY: the TLB gives an address with room for the operand, of memory that is mapped until
    // this CPU polls or parks.
    let [low, high] = unsafe {
        match SIZE {
            4 => [u32::read(host).into(), 0],
            8 => [u64::read(host).into(), 0],
            16 => [u128::read(host), 0],
            _ => <[u128; 2]>::read(host),
        }
    };
    let target = cpu.native.vector(op.dst.into());
    target[0] = low;
    if VEX {
        target[1] = high;
    }
    Step::Next
}

/// To memory.
fn store<const SIZE: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    let Some(host) = operand::<SIZE>(cpu, op, Access::Write) else {
        return slowly(cpu, op);
    };
    let [low, high] = *cpu.native.vector(op.src.into());
    // SAFETY: as in `load`; the TLB's entries for writing are of writable memory.
    unsafe {
        match SIZE {
            4 => u32::write(host, low as u32),
            8 => u64::write(host, low as u64),
            16 => u128::write(host, low),
            _ => <[u128; 2]>::write(host, [low, high]),
        }
    }
    Step::Next
}
