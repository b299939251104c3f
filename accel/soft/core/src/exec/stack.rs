//! Pushes, pops and stack frames.

use anemone_soft_mmu::Value;
use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::integer::part;
use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg, seg};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Push => push,
        Mnemonic::Pop => pop,
        _ => match instruction.code() {
            Code::Pushaw => push_all::<u16>,
            Code::Pushad => push_all::<u32>,
            Code::Popaw => pop_all::<u16>,
            Code::Popad => pop_all::<u32>,
            Code::Enterw_imm16_imm8 => enter::<2>,
            Code::Enterd_imm16_imm8 => enter::<4>,
            Code::Enterq_imm16_imm8 => enter::<8>,
            Code::Leavew => leave::<2>,
            Code::Leaved => leave::<4>,
            Code::Leaveq => leave::<8>,
            _ => return None,
        },
    };
    Some(handler)
}

fn push(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value = cpu.read_operand(instruction, 0)?;
    cpu.push(value, -instruction.stack_pointer_increment() as usize)
}

fn pop(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let size = instruction.stack_pointer_increment() as usize;
    let value = cpu.peek(0, size)?;
    let before = cpu.gpr(reg::RSP);
    // An address with RSP is that after the increment (SDM volume 2, POP).
    cpu.discard(size as u64);
    let done = cpu.write_operand(instruction, 0, value);
    if done.is_err() {
        cpu.set_gpr(reg::RSP, before);
    }
    done
}

/// PUSHA and PUSHAD: AX, CX, DX, BX, SP as it was, BP, SI, DI.
fn push_all<V: Value>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let size = V::SIZE as u64;
    let (top, mask) = (cpu.stack_pointer(), cpu.stack_mask());
    let mut places = [0; 8];
    for (place, number) in places.iter_mut().zip(1..) {
        let offset = top.wrapping_sub(size * number) & mask;
        *place = cpu.data_address(seg::SS, offset, V::SIZE, true)?;
        cpu.probe_write(*place, V::SIZE)?;
    }
    for (number, place) in places.into_iter().enumerate() {
        cpu.store_sized(place, cpu.gpr(number), V::SIZE)?;
    }
    cpu.set_stack_pointer(top.wrapping_sub(size * 8));
    Ok(())
}

/// POPA and POPAD: SP is left out.
fn pop_all<V: Value>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let size = V::SIZE as u64;
    let mut values = [0; 8];
    for (value, number) in values.iter_mut().zip(0..) {
        *value = cpu.peek(size * number, V::SIZE)?;
    }
    for (number, value) in values.into_iter().rev().enumerate() {
        if number != reg::RSP {
            cpu.write_register(part(Register::RAX + number as u32, V::SIZE), value);
        }
    }
    cpu.discard(size * 8);
    Ok(())
}

fn enter<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let before = [reg::RSP, reg::RBP].map(|number| cpu.gpr(number));
    let done = make_frame(cpu, instruction, SIZE);
    if done.is_err() {
        // What lies below the stack pointer is nobody's.
        cpu.set_gpr(reg::RSP, before[0]);
        cpu.set_gpr(reg::RBP, before[1]);
    }
    done
}

fn make_frame(cpu: &mut Cpu, instruction: &Instruction, size: usize) -> Exec {
    let room = u64::from(instruction.immediate16());
    let level = instruction.immediate8_2nd() % 32;
    let mask = cpu.stack_mask();
    let old = cpu.gpr(reg::RBP);
    cpu.push(old, size)?;
    // All of ESP, though the stack may use 16 bits of it.
    let frame = cpu.gpr(reg::RSP);
    // The frame pointers of the procedures around, then that of this one.
    for number in 1..u64::from(level) {
        let offset = old.wrapping_sub(size as u64 * number) & mask;
        let linear = cpu.data_address(seg::SS, offset, size, false)?;
        let pointer = cpu.load_sized(linear, size)?;
        cpu.push(pointer, size)?;
    }
    if level > 0 {
        cpu.push(frame, size)?;
    }
    let top = cpu.stack_pointer().wrapping_sub(room) & mask;
    // A write at the new top must be possible.
    let linear = cpu.data_address(seg::SS, top, size, true)?;
    cpu.probe_write(linear, size)?;
    cpu.set_stack_pointer(top);
    cpu.write_register(part(Register::RBP, size), frame);
    Ok(())
}

fn leave<const SIZE: usize>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let frame = cpu.gpr(reg::RBP) & cpu.stack_mask();
    let linear = cpu.data_address(seg::SS, frame, SIZE, false)?;
    let value = cpu.load_sized(linear, SIZE)?;
    cpu.set_stack_pointer(frame.wrapping_add(SIZE as u64));
    cpu.write_register(part(Register::RBP, SIZE), value);
    Ok(())
}
