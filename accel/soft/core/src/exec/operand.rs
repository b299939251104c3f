//! Operands of whole instructions: registers, addresses, memory, the stack.

use anemone_soft_mmu::{cr0, is_canonical};
use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::{Cpu, Exception, Exec, reg, rflags, seg, vector};

impl Cpu {
    /// Reads a general register, zero-extended.
    pub(crate) fn read_register(&self, register: Register) -> u64 {
        if matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        ) {
            return self.gpr(register as usize - Register::AH as usize) >> 8 & 0xFF;
        }
        let value = self.gpr(register.full_register().number());
        match register.size() {
            1 => value & 0xFF,
            2 => value & 0xFFFF,
            4 => value & 0xFFFF_FFFF,
            _ => value,
        }
    }

    /// Writes a general register: 32 bits clear the upper half, 8 and 16 bits leave the rest.
    pub(crate) fn write_register(&mut self, register: Register, value: u64) {
        if matches!(
            register,
            Register::AH | Register::CH | Register::DH | Register::BH
        ) {
            let number = register as usize - Register::AH as usize;
            let old = self.gpr(number) & !0xFF00;
            return self.set_gpr(number, old | (value & 0xFF) << 8);
        }
        let number = register.full_register().number();
        let old = self.gpr(number);
        self.set_gpr(
            number,
            match register.size() {
                1 => old & !0xFF | value & 0xFF,
                2 => old & !0xFFFF | value & 0xFFFF,
                4 => value & 0xFFFF_FFFF,
                _ => value,
            },
        );
    }

    /// Number of the segment register of the memory operand.
    pub(crate) fn memory_segment(&self, instruction: &Instruction) -> usize {
        instruction.memory_segment() as usize - Register::ES as usize
    }

    /// Offset of the memory operand in its segment, cut to the address size (SDM volume 1, 3.7.5).
    pub(crate) fn effective_address(&self, instruction: &Instruction) -> u64 {
        let displacement = instruction.memory_displacement64();
        let base = instruction.memory_base();
        // Instructions are decoded at their offset in the block.
        if base == Register::RIP {
            return self.gpr(reg::BLOCK).wrapping_add(displacement);
        }
        if base == Register::EIP {
            return self.gpr(reg::BLOCK).wrapping_add(displacement) & 0xFFFF_FFFF;
        }
        let index = instruction.memory_index();
        let mut address = displacement;
        let mut size = instruction.memory_displ_size() as usize;
        if base != Register::None {
            address = address.wrapping_add(self.read_register(base));
            size = base.size();
        }
        if index.is_gpr() {
            let scale = u64::from(instruction.memory_index_scale());
            address = address.wrapping_add(self.read_register(index).wrapping_mul(scale));
            size = index.size();
        }
        match size {
            2 => address & 0xFFFF,
            4 => address & 0xFFFF_FFFF,
            _ => address,
        }
    }

    /// Linear address of the memory operand, checked for an access of `size` bytes.
    pub(crate) fn memory_operand(
        &mut self,
        instruction: &Instruction,
        size: usize,
        write: bool,
    ) -> Exec<u64> {
        let segment = self.memory_segment(instruction);
        let offset = self.effective_address(instruction);
        self.data_address(segment, offset, size, write)
    }

    /// Linear address of an explicit data access: segmentation, canonical form of stack
    /// addresses, alignment. `size` at least 1.
    pub(crate) fn data_address(
        &mut self,
        segment: usize,
        offset: u64,
        size: usize,
        write: bool,
    ) -> Exec<u64> {
        let linear = self.linear(segment, offset, size, write)?;
        if segment == seg::SS && self.is_64bit() {
            let last = linear.wrapping_add(size as u64 - 1);
            if !is_canonical(linear) || !is_canonical(last) {
                return Err(self.raise(Exception::with(vector::SS, 0)));
            }
        }
        if self.checks_alignment()
            && size <= 8
            && size.is_power_of_two()
            && linear & (size as u64 - 1) != 0
        {
            return Err(self.raise(Exception::with(vector::AC, 0)));
        }
        Ok(linear)
    }

    /// Misaligned data accesses raise #AC: CPL 3 with CR0.AM and EFLAGS.AC.
    pub(crate) fn checks_alignment(&self) -> bool {
        self.cpl == 3 && self.system_flags & rflags::AC != 0 && self.cr0 & cr0::AM != 0
    }

    /// Loads 1, 2, 4 or 8 bytes, zero-extended.
    pub(crate) fn load_sized(&mut self, linear: u64, size: usize) -> Exec<u64> {
        Ok(match size {
            1 => self.load::<u8>(linear)?.into(),
            2 => self.load::<u16>(linear)?.into(),
            4 => self.load::<u32>(linear)?.into(),
            _ => self.load::<u64>(linear)?,
        })
    }

    /// Stores the low 1, 2, 4 or 8 bytes.
    pub(crate) fn store_sized(&mut self, linear: u64, value: u64, size: usize) -> Exec {
        match size {
            1 => self.store(linear, value as u8),
            2 => self.store(linear, value as u16),
            4 => self.store(linear, value as u32),
            _ => self.store(linear, value),
        }
    }

    /// Size in bytes of an operand that is a general register or memory.
    pub(crate) fn operand_size(&self, instruction: &Instruction, operand: u32) -> usize {
        match instruction.op_kind(operand) {
            OpKind::Register => instruction.op_register(operand).size(),
            _ => instruction.memory_size().size(),
        }
    }

    /// Reads an operand that is a general register, memory or an immediate; immediates are
    /// sign-extended as the instruction has it.
    pub(crate) fn read_operand(&mut self, instruction: &Instruction, operand: u32) -> Exec<u64> {
        match instruction.op_kind(operand) {
            OpKind::Register => Ok(self.read_register(instruction.op_register(operand))),
            OpKind::Memory => {
                let size = instruction.memory_size().size();
                let linear = self.memory_operand(instruction, size, false)?;
                self.load_sized(linear, size)
            }
            _ => Ok(instruction.immediate(operand)),
        }
    }

    /// Writes an operand that is a general register or memory.
    pub(crate) fn write_operand(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        value: u64,
    ) -> Exec {
        if instruction.op_kind(operand) == OpKind::Register {
            self.write_register(instruction.op_register(operand), value);
            return Ok(());
        }
        let size = instruction.memory_size().size();
        let linear = self.memory_operand(instruction, size, true)?;
        self.store_sized(linear, value, size)
    }

    /// The stack pointer, cut to the stack's size.
    pub(crate) fn stack_pointer(&self) -> u64 {
        self.gpr(reg::RSP) & self.stack_mask()
    }

    /// Sets the stack pointer; bits beyond the stack's size stay, unless that is 32 bits, which
    /// clears the upper half.
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        let mask = self.stack_mask();
        let value = match mask {
            0xFFFF => self.gpr(reg::RSP) & !mask | value & mask,
            _ => value & mask,
        };
        self.set_gpr(reg::RSP, value);
    }

    /// Pushes 2, 4 or 8 bytes.
    pub(crate) fn push(&mut self, value: u64, size: usize) -> Exec {
        let top = self.stack_pointer().wrapping_sub(size as u64) & self.stack_mask();
        let linear = self.data_address(seg::SS, top, size, true)?;
        self.store_sized(linear, value, size)?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// The value at the top of the stack plus `above` bytes; nothing is popped yet.
    pub(crate) fn peek(&mut self, above: u64, size: usize) -> Exec<u64> {
        let at = self.stack_pointer().wrapping_add(above) & self.stack_mask();
        let linear = self.data_address(seg::SS, at, size, false)?;
        self.load_sized(linear, size)
    }

    /// Pops 2, 4 or 8 bytes.
    pub(crate) fn pop(&mut self, size: usize) -> Exec<u64> {
        let value = self.peek(0, size)?;
        self.discard(size as u64);
        Ok(value)
    }

    /// Adds to the stack pointer.
    pub(crate) fn discard(&mut self, bytes: u64) {
        self.set_stack_pointer(self.stack_pointer().wrapping_add(bytes));
    }

    /// Where a direct near branch goes, cut to its operand size.
    pub(crate) fn branch_target(&self, instruction: &Instruction) -> u64 {
        let target = instruction.near_branch_target();
        let target = self.gpr(reg::BLOCK).wrapping_add(target);
        match instruction.op0_kind() {
            OpKind::NearBranch16 => target & 0xFFFF,
            OpKind::NearBranch32 => target & 0xFFFF_FFFF,
            _ => target,
        }
    }

    /// Sets the next instruction to `target` in the current code segment, which must be
    /// canonical or within the limit.
    pub(crate) fn jump_near(&mut self, target: u64) -> Exec {
        self.check_code_address(target)?;
        self.next = target;
        Ok(())
    }

    /// #GP(0) if `target` is not an address of the current code segment.
    pub(crate) fn check_code_address(&mut self, target: u64) -> Exec {
        let good = if self.is_64bit() {
            is_canonical(target)
        } else {
            target <= u64::from(self.segments[seg::CS].limit)
        };
        if good { Ok(()) } else { Err(self.gp()) }
    }
}
