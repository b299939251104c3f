//! Ports.

#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg, rflags, seg};

/// Offset of the 16-bit offset of the I/O permission bitmap in a 32-bit or 64-bit TSS (SDM volume
/// 3, 7.2.1 and 7.7).
const BITMAP_BASE: u64 = 102;

impl Cpu {
    /// #GP(0) unless `size` ports from `port` may be accessed (SDM volume 1, 19.5).
    fn check_port(&mut self, port: u16, size: usize) -> Exec {
        if !self.protected() || self.cpl <= self.iopl() && !self.virtual_8086() {
            return Ok(());
        }
        // A 16-bit TSS has no bitmap.
        let limit = u64::from(self.tr.limit);
        let has_bitmap = self.tr.present && self.tr.kind & 8 != 0;
        if !has_bitmap || limit < BITMAP_BASE + 1 {
            return Err(self.gp());
        }
        let base = self.system_address(self.tr.base.wrapping_add(BITMAP_BASE));
        let at = u64::from(self.load_system::<u16>(base)?) + u64::from(port / 8);
        // Two bytes are read always, so that a bitmap ends with one byte more.
        if at + 1 > limit {
            return Err(self.gp());
        }
        let linear = self.system_address(self.tr.base.wrapping_add(at));
        let bits = self.load_system::<u16>(linear)? >> (port % 8);
        if bits & ((1 << size) - 1) != 0 {
            return Err(self.gp());
        }
        Ok(())
    }

    /// Reads 1, 2 or 4 bytes from a port.
    fn port_read(&mut self, port: u16, size: usize) -> u32 {
        let mut data = [0xFF; 4];
        self.with_bus(|bus| bus.port_read(port, &mut data[..size]));
        u32::from_le_bytes(data) & (u32::MAX >> (32 - 8 * size))
    }

    fn port_write(&mut self, port: u16, value: u32, size: usize) {
        let data = value.to_le_bytes();
        self.with_bus(|bus| bus.port_write(port, &data[..size]));
    }

    /// The port that operand `number` names: an immediate or DX.
    fn port(&self, instruction: &Instruction, number: u32) -> u16 {
        if instruction.op_kind(number) == OpKind::Register {
            self.gpr(reg::RDX) as u16
        } else {
            instruction.immediate8().into()
        }
    }

    /// Mask of RCX, RSI and RDI by the address size.
    fn adjust(&mut self, register: usize, by: u64, mask: u64) {
        let old = self.gpr(register);
        let new = old.wrapping_add(by) & mask;
        // 16-bit registers leave the rest, 32-bit ones clear it.
        let keep = if mask == 0xFFFF { old & !mask } else { 0 };
        self.set_gpr(register, keep | new);
    }

    /// Carries out a string instruction: `step` moves one element, with the address mask, and
    /// `step` is given the distance to the next. Another thread's request ends it between two
    /// elements, to be gone on with after.
    fn repeat(
        &mut self,
        instruction: &Instruction,
        mask: u64,
        size: usize,
        mut step: impl FnMut(&mut Self, u64) -> Exec,
    ) -> Exec {
        let distance = if self.system_flags & rflags::DF != 0 {
            (size as u64).wrapping_neg()
        } else {
            size as u64
        };
        if !instruction.has_rep_prefix() && !instruction.has_repne_prefix() {
            return step(self, distance);
        }
        while self.gpr(reg::RCX) & mask != 0 {
            step(self, distance)?;
            self.adjust(reg::RCX, u64::MAX, mask);
            let asked = self.signals.word().load(Ordering::Relaxed) != 0;
            let stepped = self.system_flags & rflags::TF != 0;
            if (asked || stepped) && self.gpr(reg::RCX) & mask != 0 {
                self.next = self.rip;
                self.leave_block = true;
                break;
            }
        }
        Ok(())
    }
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::In => input,
        Mnemonic::Out => output,
        Mnemonic::Insb => input_string::<1>,
        Mnemonic::Insw => input_string::<2>,
        Mnemonic::Insd => input_string::<4>,
        Mnemonic::Outsb => output_string::<1>,
        Mnemonic::Outsw => output_string::<2>,
        Mnemonic::Outsd => output_string::<4>,
        _ => return None,
    })
}

fn input(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let register = instruction.op0_register();
    let port = cpu.port(instruction, 1);
    cpu.check_port(port, register.size())?;
    let value = cpu.port_read(port, register.size());
    cpu.write_register(register, value.into());
    Ok(())
}

fn output(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let register: Register = instruction.op1_register();
    let port = cpu.port(instruction, 0);
    cpu.check_port(port, register.size())?;
    let value = cpu.read_register(register) as u32;
    cpu.port_write(port, value, register.size());
    Ok(())
}

fn input_string<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let mask = match instruction.op0_kind() {
        OpKind::MemoryESDI => 0xFFFF,
        OpKind::MemoryESEDI => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    let port = cpu.gpr(reg::RDX) as u16;
    cpu.check_port(port, SIZE)?;
    cpu.repeat(instruction, mask, SIZE, |cpu, distance| {
        let offset = cpu.gpr(reg::RDI) & mask;
        // Before the port, whose value must not be lost.
        let linear = cpu.data_address(seg::ES, offset, SIZE, true)?;
        cpu.probe_write(linear, SIZE)?;
        let value = cpu.port_read(port, SIZE);
        cpu.store_sized(linear, value.into(), SIZE)?;
        cpu.adjust(reg::RDI, distance, mask);
        Ok(())
    })
}

fn output_string<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let mask = match instruction.op1_kind() {
        OpKind::MemorySegSI => 0xFFFF,
        OpKind::MemorySegESI => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    let segment = cpu.memory_segment(instruction);
    let port = cpu.gpr(reg::RDX) as u16;
    cpu.check_port(port, SIZE)?;
    cpu.repeat(instruction, mask, SIZE, |cpu, distance| {
        let offset = cpu.gpr(reg::RSI) & mask;
        let linear = cpu.data_address(segment, offset, SIZE, false)?;
        let value = cpu.load_sized(linear, SIZE)?;
        cpu.port_write(port, value as u32, SIZE);
        cpu.adjust(reg::RSI, distance, mask);
        Ok(())
    })
}
