//! Control transfers to other segments and privilege levels: far jumps, calls and returns, call
//! gates (SDM volume 3, 5.8; volume 2, JMP, CALL, RET), and what they share with interrupts.

use anemone_accel_api::Segment;
use anemone_soft_mmu::{Context, cr4, is_canonical};
use iced_x86::{Code, Instruction, OpKind};

use crate::block::Handler;
use crate::cpu::{Cpu, Exception, Exec, Trap, reg, rflags, seg, vector};
use crate::system::segment::{Descriptor, is_null, kind, null_stack, rpl};
use crate::system::task::Cause;

/// A stack that is written to before it is the CPU's.
pub(crate) struct Stack {
    /// SS.
    pub segment: Segment,
    /// RSP.
    pub pointer: u64,
    /// Which bits of RSP a push changes; all in 64-bit mode, where the segment does not count.
    mask: u64,
    context: Context,
    /// Error code of #SS.
    error: u32,
}

impl Stack {
    /// A stack of 64-bit code.
    pub(crate) fn flat(segment: Segment, pointer: u64, context: Context, error: u32) -> Self {
        Self {
            segment,
            pointer,
            mask: u64::MAX,
            context,
            error,
        }
    }

    /// A stack of other code.
    fn segmented(segment: Segment, pointer: u64, context: Context, error: u32) -> Self {
        Self {
            segment,
            pointer,
            mask: if segment.big { 0xFFFF_FFFF } else { 0xFFFF },
            context,
            error,
        }
    }

    /// The stack as it is.
    pub(crate) fn current(cpu: &Cpu, error: u32) -> Self {
        let (segment, pointer) = (cpu.segments[seg::SS], cpu.gpr(reg::RSP));
        if cpu.is_64bit() {
            Self::flat(segment, pointer, cpu.context, error)
        } else {
            Self::segmented(segment, pointer, cpu.context, error)
        }
    }

    #[cold]
    fn fault(&self, cpu: &mut Cpu) -> Trap {
        cpu.raise(Exception::with(vector::SS, self.error))
    }

    /// Pushes values of 2, 4 or 8 bytes, the first first.
    pub(crate) fn push(&mut self, cpu: &mut Cpu, values: &[u64], size: usize) -> Exec {
        if self.mask == u64::MAX && size == 8 {
            let start = self.pointer.wrapping_sub(8 * values.len() as u64);
            if !is_canonical(start) || !is_canonical(self.pointer.wrapping_sub(1)) {
                return Err(self.fault(cpu));
            }
            self.check_alignment(cpu, start, 8)?;
            for value in values {
                self.pointer = self.pointer.wrapping_sub(8);
                if !cpu.mmu.store_hit(self.pointer, *value, self.context) {
                    cpu.store_slow(self.pointer, *value, self.context)?;
                }
            }
            return Ok(());
        }
        for value in values {
            let top = self.pointer.wrapping_sub(size as u64) & self.mask;
            let linear = self.linear(cpu, top, size)?;
            match size {
                2 => cpu.store_slow(linear, *value as u16, self.context)?,
                4 => cpu.store_slow(linear, *value as u32, self.context)?,
                _ => cpu.store_slow(linear, *value, self.context)?,
            }
            self.pointer = self.pointer & !self.mask | top;
        }
        Ok(())
    }

    /// Linear address for a write of `size` bytes.
    fn linear(&self, cpu: &mut Cpu, offset: u64, size: usize) -> Exec<u64> {
        let last = offset.wrapping_add(size as u64 - 1);
        let (linear, good) = if self.mask == u64::MAX {
            (offset, is_canonical(offset) && is_canonical(last))
        } else {
            let good = within_limit(&self.segment, offset, last);
            (self.segment.base.wrapping_add(offset) & 0xFFFF_FFFF, good)
        };
        if !good {
            return Err(self.fault(cpu));
        }
        self.check_alignment(cpu, linear, size)?;
        Ok(linear)
    }

    fn check_alignment(&self, cpu: &mut Cpu, linear: u64, size: usize) -> Exec {
        let checked = self.context == Context::User && cpu.checks_alignment();
        if checked && linear & (size as u64 - 1) != 0 {
            return Err(cpu.raise(Exception::with(vector::AC, 0)));
        }
        Ok(())
    }

    /// Makes it the CPU's.
    pub(crate) fn commit(self, cpu: &mut Cpu) {
        cpu.segments[seg::SS] = self.segment;
        let pointer = match self.mask {
            0xFFFF_FFFF => self.pointer & self.mask,
            _ => self.pointer,
        };
        cpu.set_gpr(reg::RSP, pointer);
    }
}

/// Whether the bytes from `offset` to `last` lie in a data segment.
fn within_limit(segment: &Segment, offset: u64, last: u64) -> bool {
    let limit = u64::from(segment.limit);
    if segment.kind & 0xC == 4 {
        // Expand-down: above the limit.
        let top = if segment.big { 0xFFFF_FFFF } else { 0xFFFF };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}

impl Cpu {
    /// Who makes explicit accesses at a privilege level.
    pub(crate) fn context_at(&self, level: u8) -> Context {
        if level == 3 {
            Context::User
        } else if self.system_flags & rflags::AC != 0 && self.cr4 & cr4::SMAP != 0 {
            Context::SupervisorAc
        } else {
            Context::Supervisor
        }
    }

    /// The linear address some bytes into an operand.
    pub(crate) fn linear_after(&self, linear: u64, bytes: u64) -> u64 {
        let after = linear.wrapping_add(bytes);
        if self.is_64bit() {
            after
        } else {
            after & 0xFFFF_FFFF
        }
    }

    /// Offset and selector in the memory operand.
    pub(crate) fn far_pointer(&mut self, instruction: &Instruction) -> Exec<(u64, u16)> {
        let size = instruction.memory_size().size();
        let linear = self.memory_operand(instruction, size, false)?;
        let offset = self.load_sized(linear, size - 2)?;
        let selector = self.load(self.linear_after(linear, size as u64 - 2))?;
        Ok((offset, selector))
    }

    /// Goes on in another code segment at a privilege level. The caller sets the instruction
    /// pointer.
    pub(crate) fn enter_code(&mut self, code: Segment, level: u8) {
        let was_64bit = self.is_64bit();
        self.segments[seg::CS] = code;
        if !(was_64bit && code.long) {
            self.update_bases();
        }
        if level != self.cpl {
            self.set_cpl(level);
        }
        self.leave_block = true;
    }

    /// #GP unless `target` is an address of a code segment.
    pub(crate) fn check_target(&mut self, code: &Segment, target: u64, ext: u32) -> Exec {
        let good = if self.long_mode() && code.long {
            is_canonical(target)
        } else {
            target <= u64::from(code.limit)
        };
        if good {
            Ok(())
        } else {
            Err(self.raise(Exception::with(vector::GP, ext)))
        }
    }

    /// In long mode, a code segment cannot be of 64 and of 32 bits.
    fn is_impossible(&self, code: Descriptor) -> bool {
        self.long_mode() && code.is_long() && code.is_big()
    }

    /// A field of the TSS; #TS beyond its limit.
    pub(crate) fn tss_field(&mut self, offset: u64, size: usize, ext: u32) -> Exec<u64> {
        if offset + size as u64 - 1 > u64::from(self.tr.limit) {
            return Err(self.refuse(vector::TS, self.tr.selector, ext));
        }
        let linear = self.system_address(self.tr.base.wrapping_add(offset));
        match size {
            2 => Ok(self.load_system::<u16>(linear)?.into()),
            4 => Ok(self.load_system::<u32>(linear)?.into()),
            _ => self.load_system(linear),
        }
    }

    /// The stack of 64-bit code at an inner privilege level (SDM volume 3, 7.7).
    pub(crate) fn inner_flat_stack(&mut self, level: u8, ext: u32) -> Exec<Stack> {
        let pointer = self.tss_field(4 + 8 * u64::from(level), 8, ext)?;
        let segment = null_stack(level.into());
        Ok(Stack::flat(segment, pointer, self.context_at(level), ext))
    }

    /// The stack of an inner privilege level outside long mode (SDM volume 3, 7.2.1 and 7.6).
    pub(crate) fn inner_stack(&mut self, level: u8, ext: u32) -> Exec<Stack> {
        let wide = self.tr.kind & 8 != 0;
        let size = if wide { 4 } else { 2 };
        // The previous task's link, then pointer and selector of each level; 32-bit fields are
        // padded.
        let at = size + 2 * size * u64::from(level);
        let selector = self.tss_field(at + size, 2, ext)? as u16;
        let pointer = self.tss_field(at, size as usize, ext)?;
        if is_null(selector) {
            return Err(self.refuse(vector::TS, 0, ext));
        }
        let descriptor = self.descriptor(selector, vector::TS, ext)?;
        if rpl(selector) != level || descriptor.dpl() != level || !descriptor.is_writable() {
            return Err(self.refuse(vector::TS, selector, ext));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::SS, selector, ext));
        }
        self.mark_accessed(descriptor)?;
        let error = u32::from(selector & !3) | ext;
        let context = self.context_at(level);
        let segment = descriptor.segment(selector);
        Ok(Stack::segmented(segment, pointer, context, error))
    }

    /// The code segment that a far return or IRET names.
    pub(crate) fn return_code(&mut self, selector: u16) -> Exec<Descriptor> {
        if is_null(selector) {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        let level = rpl(selector);
        let fits = if descriptor.is_conforming() {
            descriptor.dpl() <= level
        } else {
            descriptor.dpl() == level
        };
        let inwards = level < self.cpl;
        if !descriptor.is_code() || inwards || !fits || self.is_impossible(descriptor) {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::NP, selector, 0));
        }
        Ok(descriptor)
    }

    /// The stack segment that a far return or IRET to `code` names; marks it as accessed.
    pub(crate) fn return_stack(&mut self, selector: u16, code: Segment) -> Exec<Segment> {
        let long = self.long_mode() && code.long;
        self.stack_segment(selector, rpl(code.selector), long)
    }

    /// After a return outwards: data segments that the new level may not use become null.
    pub(crate) fn drop_inner_segments(&mut self) {
        for number in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let segment = &mut self.segments[number];
            let conforming = segment.kind & 0xC == 0xC;
            if segment.present && segment.dpl < self.cpl && !conforming {
                segment.selector = 0;
                segment.present = false;
            }
        }
    }

    /// Far jump or call. `size` is that of the operand, in bytes.
    fn far_branch(&mut self, selector: u16, offset: u64, size: usize, call: bool) -> Exec {
        if self.real_segments() {
            let code = self.paragraph(seg::CS, selector);
            self.check_target(&code, offset, 0)?;
            if call {
                self.push_return(size, 0)?;
            }
            self.enter_code(code, self.cpl);
            self.next = offset;
            return Ok(());
        }
        if is_null(selector) {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        if descriptor.is_system() {
            return self.far_branch_system(selector, descriptor, call);
        }
        let (cpl, dpl) = (self.cpl, descriptor.dpl());
        let allowed = if descriptor.is_conforming() {
            dpl <= cpl
        } else {
            dpl == cpl && rpl(selector) <= cpl
        };
        if !descriptor.is_code() || !allowed || self.is_impossible(descriptor) {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::NP, selector, 0));
        }
        let code = descriptor.segment(selector & !3 | u16::from(cpl));
        self.check_target(&code, offset, 0)?;
        self.mark_accessed(descriptor)?;
        if call {
            self.push_return(size, 0)?;
        }
        self.enter_code(code, cpl);
        self.next = offset;
        Ok(())
    }

    /// Pushes CS and the address of the next instruction.
    fn push_return(&mut self, size: usize, error: u32) -> Exec {
        let mut stack = Stack::current(self, error);
        let selector = self.segments[seg::CS].selector;
        stack.push(self, &[selector.into(), self.next], size)?;
        stack.commit(self);
        Ok(())
    }

    /// Far jump or call through a call gate, a task gate or a TSS.
    fn far_branch_system(&mut self, selector: u16, descriptor: Descriptor, call: bool) -> Exec {
        let long = self.long_mode();
        let gate = match descriptor.kind() {
            kind::CALL_32 => true,
            kind::CALL_16 => !long,
            _ => false,
        };
        let task = matches!(descriptor.kind(), kind::TASK | kind::TSS_16 | kind::TSS_32) && !long;
        if !gate && !task {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        if descriptor.dpl() < self.cpl.max(rpl(selector)) {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::NP, selector, 0));
        }
        if task {
            let target = match descriptor.kind() {
                kind::TASK => (descriptor.raw >> 16) as u16,
                _ => selector,
            };
            let cause = if call { Cause::Nested } else { Cause::Jump };
            let flags = self.rflags();
            self.next = self.switch_task(target, cause, self.next, flags, None, 0)?;
            return Ok(());
        }
        self.call_gate(selector, descriptor, call)
    }

    fn call_gate(&mut self, selector: u16, gate: Descriptor, call: bool) -> Exec {
        let long = self.long_mode();
        let mut offset = gate.raw & 0xFFFF | gate.raw >> 32 & 0xFFFF_0000;
        let size = if long {
            offset |= self.upper_half(selector)? << 32;
            8
        } else if gate.kind() == kind::CALL_32 {
            4
        } else {
            offset &= 0xFFFF;
            2
        };
        let target = (gate.raw >> 16) as u16;
        if is_null(target) {
            return Err(self.gp());
        }
        let descriptor = self.descriptor(target, vector::GP, 0)?;
        let (cpl, dpl) = (self.cpl, descriptor.dpl());
        let inwards = !descriptor.is_conforming() && dpl < cpl;
        let wrong_size = long && (!descriptor.is_long() || descriptor.is_big());
        if !descriptor.is_code() || dpl > cpl || inwards && !call || wrong_size {
            return Err(self.refuse(vector::GP, target, 0));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::NP, target, 0));
        }
        let level = if inwards { dpl } else { cpl };
        let code = descriptor.segment(target & !3 | u16::from(level));
        let stack = if inwards {
            let mut stack = if long {
                self.inner_flat_stack(level, 0)?
            } else {
                self.inner_stack(level, 0)?
            };
            self.check_target(&code, offset, 0)?;
            let old = self.segments[seg::SS].selector;
            stack.push(self, &[old.into(), self.gpr(reg::RSP)], size)?;
            let parameters = if long { 0 } else { gate.raw >> 32 & 0x1F };
            for n in (0..parameters).rev() {
                let value = self.peek(n * size as u64, size)?;
                stack.push(self, &[value], size)?;
            }
            Some(stack)
        } else {
            self.check_target(&code, offset, 0)?;
            call.then(|| {
                let mut stack = Stack::current(self, 0);
                if long {
                    stack.mask = u64::MAX;
                }
                stack
            })
        };
        self.mark_accessed(descriptor)?;
        if let Some(mut stack) = stack {
            let selector = self.segments[seg::CS].selector;
            stack.push(self, &[selector.into(), self.next], size)?;
            stack.commit(self);
        }
        self.enter_code(code, level);
        self.next = offset;
        Ok(())
    }

    /// Far return; `release` bytes of parameters lie above the address.
    fn far_return(&mut self, size: usize, release: u64) -> Exec {
        let bytes = size as u64;
        let target = self.peek(0, size)?;
        let selector = self.peek(bytes, size)? as u16;
        if self.real_segments() {
            let code = self.paragraph(seg::CS, selector);
            self.check_target(&code, target, 0)?;
            self.discard(2 * bytes + release);
            self.enter_code(code, self.cpl);
            self.next = target;
            return Ok(());
        }
        let descriptor = self.return_code(selector)?;
        let code = descriptor.segment(selector);
        let level = rpl(selector);
        if level == self.cpl {
            self.check_target(&code, target, 0)?;
            self.mark_accessed(descriptor)?;
            self.discard(2 * bytes + release);
            self.enter_code(code, level);
        } else {
            let pointer = self.peek(2 * bytes + release, size)?;
            let stack = self.peek(3 * bytes + release, size)? as u16;
            let stack = self.return_stack(stack, code)?;
            self.check_target(&code, target, 0)?;
            self.mark_accessed(descriptor)?;
            self.enter_code(code, level);
            self.set_segment(seg::SS, stack);
            self.set_stack_pointer(pointer.wrapping_add(release));
            self.drop_inner_segments();
        }
        self.next = target;
        Ok(())
    }
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Jmp_ptr1616 | Code::Jmp_ptr1632 => branch::<false>,
        Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 => branch::<false>,
        Code::Call_ptr1616 | Code::Call_ptr1632 => branch::<true>,
        Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664 => branch::<true>,
        Code::Retfw | Code::Retfw_imm16 => ret::<2>,
        Code::Retfd | Code::Retfd_imm16 => ret::<4>,
        Code::Retfq | Code::Retfq_imm16 => ret::<8>,
        _ => return None,
    })
}

/// Far JMP and CALL.
fn branch<const CALL: bool>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let selector = instruction.far_branch_selector();
    let (offset, selector, size) = match instruction.op0_kind() {
        OpKind::FarBranch16 => (instruction.far_branch16().into(), selector, 2),
        OpKind::FarBranch32 => (instruction.far_branch32().into(), selector, 4),
        _ => {
            let (offset, selector) = cpu.far_pointer(instruction)?;
            (offset, selector, instruction.memory_size().size() - 2)
        }
    };
    cpu.far_branch(selector, offset, size, CALL)
}

/// Far RET.
fn ret<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let release = if instruction.op_count() == 0 {
        0
    } else {
        instruction.immediate16().into()
    };
    cpu.far_return(SIZE, release)
}
