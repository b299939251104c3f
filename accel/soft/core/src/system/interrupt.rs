//! Exceptions and interrupts: delivery through the IDT and the real-mode vector table, software
//! interrupts, IRET (SDM volume 3, chapter 6; volume 2, INT n and IRET).

#[cfg(test)]
pub(super) mod tests;

use anemone_accel_api::Segment;
use anemone_soft_mmu::is_canonical;
use anemone_soft_native::{ARITHMETIC_RFLAGS, Flags};
use iced_x86::{Code, Instruction};

use crate::block::Handler;
use crate::cpu::{Activity, Cpu, Exception, Exec, Stopped, reg, rflags, seg, vector};
use crate::system::far::Stack;
use crate::system::segment::{Descriptor, is_null, kind, null_stack, rpl, virtual_8086_segment};
use crate::system::task::Cause;

/// Error codes: the event that could not be delivered was not the program's own (INT n).
const EXT: u32 = 1;
/// Error codes: the index is that of an IDT entry.
const IDT: u32 = 2;

/// What interrupts the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// An instruction raised it, or single-stepping.
    Exception(Exception),
    /// A non-maskable interrupt.
    Nmi,
    /// An interrupt with this vector.
    External(u8),
}

/// A fault while a double fault was to be delivered: the CPU stops until reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shutdown;

/// How exceptions combine (SDM volume 3, table 6-4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    Page,
    Double,
}

fn class(number: u8) -> Class {
    match number {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::Page,
        vector::DF => Class::Double,
        _ => Class::Benign,
    }
}

/// What is to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Arrival {
    vector: u8,
    error: Option<u32>,
    class: Class,
    /// INT n, INT3 or INTO: the gate's privilege level counts.
    software: bool,
    /// [`EXT`] or 0, for exceptions during delivery.
    ext: u32,
    /// A fault: the instruction is executed again after IRET, and RF in the image says so.
    fault: bool,
}

impl Arrival {
    fn exception(exception: Exception) -> Self {
        Self {
            vector: exception.vector,
            error: exception.error,
            class: class(exception.vector),
            software: false,
            ext: EXT,
            // Single steps are traps; after a double fault nothing is executed again.
            fault: !matches!(exception.vector, vector::DB | vector::DF),
        }
    }

    fn interrupt(vector: u8) -> Self {
        Self {
            vector,
            error: None,
            class: Class::Benign,
            software: false,
            ext: EXT,
            fault: false,
        }
    }

    fn software(vector: u8) -> Self {
        Self {
            software: true,
            ext: 0,
            ..Self::interrupt(vector)
        }
    }

    /// Error code that names the IDT entry.
    fn gate_error(&self) -> u32 {
        u32::from(self.vector) << 3 | IDT | self.ext
    }

    /// What is to be delivered after an exception during the delivery of this.
    fn combine(&self, second: Exception) -> Result<Exception, Shutdown> {
        let double = match (self.class, class(second.vector)) {
            (Class::Double, Class::Contributory | Class::Page) => return Err(Shutdown),
            (Class::Contributory, Class::Contributory) => true,
            (Class::Page, Class::Contributory | Class::Page) => true,
            _ => false,
        };
        Ok(if double {
            Exception::with(vector::DF, 0)
        } else {
            second
        })
    }
}

/// Exceptions during delivery after which the run loop looks around.
const CHAIN: u32 = 8;

impl Cpu {
    /// Delivers an event, with RIP as return address; afterwards RIP is the handler's.
    ///
    /// Benign exceptions can follow each other without end, on hardware too. After a few of them
    /// this returns with the next in [`Cpu::stopped`], so that the run loop can look around.
    ///
    /// # Errors
    /// [`Shutdown`]: a triple fault.
    pub(crate) fn deliver(&mut self, event: Event) -> Result<(), Shutdown> {
        self.shadow = false;
        self.activity = Activity::Running;
        let mut arrival = match event {
            Event::Exception(exception) => {
                self.note_address(&exception);
                Arrival::exception(exception)
            }
            Event::Nmi => {
                self.nmi_blocked = true;
                Arrival::interrupt(vector::NMI)
            }
            Event::External(vector) => Arrival::interrupt(vector),
        };
        let mut left = CHAIN;
        loop {
            if let Ok(rip) = self.enter_handler(&arrival, self.rip) {
                self.rip = rip;
                // A new task may begin with an exception of its own.
                if self.stopped.is_none() {
                    return Ok(());
                }
            }
            let next = match self.stopped.take() {
                Some(Stopped::Exception(second)) => {
                    self.note_address(&second);
                    arrival.combine(second)?
                }
                // For the run loop to report.
                other => {
                    self.stopped = other;
                    return Ok(());
                }
            };
            left -= 1;
            if left == 0 {
                self.stopped = Some(Stopped::Exception(next));
                return Ok(());
            }
            arrival = Arrival::exception(next);
        }
    }

    /// CR2 for a page fault.
    fn note_address(&mut self, exception: &Exception) {
        if exception.vector == vector::PF {
            self.cr2 = exception.address;
        }
    }

    /// Enters the handler of an event; returns its address.
    fn enter_handler(&mut self, arrival: &Arrival, rip: u64) -> Exec<u64> {
        if self.long_mode() {
            self.enter_long(arrival, rip)
        } else if self.protected() {
            self.enter_protected(arrival, rip)
        } else {
            self.enter_real(arrival, rip)
        }
    }

    /// The image of the flags that a handler finds on its stack.
    fn pushed_flags(&self, arrival: &Arrival) -> u64 {
        let resume = if arrival.fault { rflags::RF } else { 0 };
        self.rflags() | resume
    }

    /// Sets the flags for a handler.
    fn set_handler_flags(&mut self, mut clear: u64, interrupt_gate: bool) {
        clear |= rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if interrupt_gate {
            clear |= rflags::IF;
        }
        self.set_system_flags(self.system_flags & !clear);
    }

    /// Real-address mode (SDM volume 3, 20.1.4).
    fn enter_real(&mut self, arrival: &Arrival, rip: u64) -> Exec<u64> {
        let index = u64::from(arrival.vector) * 4;
        if index + 3 > u64::from(self.idtr.limit) {
            return Err(self.raise(Exception::with(vector::GP, arrival.gate_error())));
        }
        let entry = self.system_address(self.idtr.base.wrapping_add(index));
        let entry = self.load_system::<u32>(entry)?;
        let code = self.paragraph(seg::CS, (entry >> 16) as u16);
        let target = u64::from(entry & 0xFFFF);
        self.check_target(&code, target, 0)?;
        let frame = [self.rflags(), self.segments[seg::CS].selector.into(), rip];
        let mut stack = Stack::current(self, 0);
        stack.push(self, &frame, 2)?;
        stack.commit(self);
        self.enter_code(code, 0);
        self.set_handler_flags(rflags::AC, true);
        Ok(target)
    }

    /// Checks of a gate that are the same everywhere.
    fn check_gate(&mut self, arrival: &Arrival, gate: Descriptor, known: bool) -> Exec {
        let error = arrival.gate_error();
        let private = arrival.software && gate.dpl() < self.cpl;
        if !known || !gate.is_system() || private {
            return Err(self.raise(Exception::with(vector::GP, error)));
        }
        if !gate.is_present() {
            return Err(self.raise(Exception::with(vector::NP, error)));
        }
        Ok(())
    }

    /// The code segment of a handler.
    fn handler_code(&mut self, selector: u16, long: bool, ext: u32) -> Exec<Descriptor> {
        if is_null(selector) {
            return Err(self.refuse(vector::GP, 0, ext));
        }
        let code = self.descriptor(selector, vector::GP, ext)?;
        let wrong_size = long && (!code.is_long() || code.is_big());
        if !code.is_code() || code.dpl() > self.cpl || wrong_size {
            return Err(self.refuse(vector::GP, selector, ext));
        }
        if !code.is_present() {
            return Err(self.refuse(vector::NP, selector, ext));
        }
        Ok(code)
    }

    /// Long mode (SDM volume 3, 6.14).
    fn enter_long(&mut self, arrival: &Arrival, rip: u64) -> Exec<u64> {
        let ext = arrival.ext;
        let index = u64::from(arrival.vector) * 16;
        if index + 15 > u64::from(self.idtr.limit) {
            return Err(self.raise(Exception::with(vector::GP, arrival.gate_error())));
        }
        let address = self.idtr.base.wrapping_add(index);
        let raw = self.load_system(address)?;
        let upper = self.load_system::<u64>(address.wrapping_add(8))?;
        let gate = Descriptor { address, raw };
        self.check_gate(arrival, gate, gate.kind() & !1 == kind::INTERRUPT_32)?;
        let selector = (raw >> 16) as u16;
        let descriptor = self.handler_code(selector, true, ext)?;
        let inwards = !descriptor.is_conforming() && descriptor.dpl() < self.cpl;
        let level = if inwards { descriptor.dpl() } else { self.cpl };
        let ist = raw >> 32 & 7;
        let mut stack = if ist == 0 && inwards {
            self.inner_flat_stack(level, ext)?
        } else {
            let segment = if inwards {
                null_stack(level.into())
            } else {
                self.segments[seg::SS]
            };
            let pointer = if ist == 0 {
                self.gpr(reg::RSP)
            } else {
                self.tss_field(28 + 8 * ist, 8, ext)?
            };
            Stack::flat(segment, pointer, self.context_at(level), ext)
        };
        stack.pointer &= !15;
        let target = raw & 0xFFFF | raw >> 32 & 0xFFFF_0000 | upper << 32;
        let code = descriptor.segment(selector & !3 | u16::from(level));
        self.check_target(&code, target, ext)?;
        self.mark_accessed(descriptor)?;
        let frame = [
            self.segments[seg::SS].selector.into(),
            self.gpr(reg::RSP),
            self.pushed_flags(arrival),
            self.segments[seg::CS].selector.into(),
            rip,
            arrival.error.unwrap_or(0).into(),
        ];
        let words = if arrival.error.is_some() { 6 } else { 5 };
        stack.push(self, &frame[..words], 8)?;
        stack.commit(self);
        self.enter_code(code, level);
        self.set_handler_flags(0, gate.kind() == kind::INTERRUPT_32);
        Ok(target)
    }

    /// Protected mode outside long mode, virtual-8086 mode (SDM volume 3, 6.12 and 20.3).
    fn enter_protected(&mut self, arrival: &Arrival, rip: u64) -> Exec<u64> {
        let ext = arrival.ext;
        let index = u64::from(arrival.vector) * 8;
        if index + 7 > u64::from(self.idtr.limit) {
            return Err(self.raise(Exception::with(vector::GP, arrival.gate_error())));
        }
        let address = self.system_address(self.idtr.base.wrapping_add(index));
        let raw = self.load_system(address)?;
        let gate = Descriptor { address, raw };
        // Interrupt and trap gates of 16 and 32 bits differ in bit 3, from each other in bit 0.
        let is_handler = gate.kind() & 6 == 6;
        self.check_gate(arrival, gate, is_handler || gate.kind() == kind::TASK)?;
        let selector = (raw >> 16) as u16;
        if !is_handler {
            let flags = self.pushed_flags(arrival);
            return self.switch_task(selector, Cause::Nested, rip, flags, arrival.error, ext);
        }
        let wide = gate.kind() & 8 != 0;
        let size = if wide { 4 } else { 2 };
        let descriptor = self.handler_code(selector, false, ext)?;
        let inwards = !descriptor.is_conforming() && descriptor.dpl() < self.cpl;
        let level = if inwards { descriptor.dpl() } else { self.cpl };
        let from_8086 = self.virtual_8086();
        if from_8086 && level != 0 {
            return Err(self.refuse(vector::GP, selector, ext));
        }
        let mut stack = if inwards {
            self.inner_stack(level, ext)?
        } else {
            Stack::current(self, ext)
        };
        let mask = if wide { 0xFFFF_FFFF } else { 0xFFFF };
        let target = (raw & 0xFFFF | raw >> 32 & 0xFFFF_0000) & mask;
        let code = descriptor.segment(selector & !3 | u16::from(level));
        self.check_target(&code, target, ext)?;
        self.mark_accessed(descriptor)?;
        let old = |number: usize| u64::from(self.segments[number].selector);
        let data = [seg::GS, seg::FS, seg::DS, seg::ES].map(old);
        let outer = [old(seg::SS), self.gpr(reg::RSP)];
        let frame = [self.pushed_flags(arrival), old(seg::CS), rip];
        if from_8086 {
            stack.push(self, &data, size)?;
        }
        if inwards {
            stack.push(self, &outer, size)?;
        }
        stack.push(self, &frame, size)?;
        if let Some(error) = arrival.error {
            stack.push(self, &[error.into()], size)?;
        }
        stack.commit(self);
        self.set_handler_flags(0, gate.kind() & 1 == 0);
        if from_8086 {
            for number in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.segments[number] = Segment::default();
            }
        }
        self.enter_code(code, level);
        Ok(target)
    }

    /// A software interrupt: its return address is the next instruction's.
    fn software_interrupt(&mut self, arrival: Arrival) -> Exec {
        self.next = self.enter_handler(&arrival, self.next)?;
        Ok(())
    }

    /// Words from the top of the stack, of which nothing is popped yet.
    fn frame<const WORDS: usize>(&mut self, size: usize) -> Exec<[u64; WORDS]> {
        let mut words = [0; WORDS];
        let top = self.gpr(reg::RSP);
        let last = top.wrapping_add(8 * WORDS as u64 - 1);
        let simple = self.is_64bit() && size == 8 && !self.checks_alignment();
        if simple && is_canonical(top) && is_canonical(last) {
            for (n, word) in words.iter_mut().enumerate() {
                *word = self.load(top.wrapping_add(8 * n as u64))?;
            }
        } else {
            for (n, word) in words.iter_mut().enumerate() {
                *word = self.peek((n * size) as u64, size)?;
            }
        }
        Ok(words)
    }

    /// RFLAGS after IRET. RF stays clear: there are no instruction breakpoints for it to hold off.
    fn returned_flags(&self, image: u64, size: usize) -> u64 {
        let mut mask = ARITHMETIC_RFLAGS | rflags::TF | rflags::DF | rflags::NT;
        if self.virtual_8086() || self.cpl <= self.iopl() {
            mask |= rflags::IF;
        }
        if self.cpl == 0 {
            mask |= rflags::IOPL | rflags::VIF | rflags::VIP;
        }
        mask |= rflags::AC | rflags::ID;
        if size == 2 {
            mask &= 0xFFFF;
        }
        (self.rflags() & !mask | image & mask) & !rflags::RF
    }

    /// IRET in real-address and virtual-8086 mode.
    fn return_real(&mut self, size: usize) -> Exec {
        if self.virtual_8086() && self.iopl() != 3 {
            return Err(self.gp());
        }
        let [target, selector, image] = self.frame(size)?;
        let code = self.paragraph(seg::CS, selector as u16);
        self.check_target(&code, target, 0)?;
        self.nmi_blocked = false;
        self.discard(3 * size as u64);
        let mut flags = self.returned_flags(image, size);
        // Outside protected mode, these are not IRET's to change.
        let kept = rflags::VIF | rflags::VIP;
        flags = flags & !kept | self.system_flags & kept;
        self.set_rflags(flags);
        self.enter_code(code, self.cpl);
        self.next = target;
        Ok(())
    }

    /// IRET in protected mode.
    fn return_protected(&mut self, size: usize) -> Exec {
        // NMIs are unblocked even if the return faults (SDM volume 3, 25.3).
        self.nmi_blocked = false;
        self.leave_block = true;
        if self.system_flags & rflags::NT != 0 {
            if self.long_mode() {
                return Err(self.gp());
            }
            let back = self.tss_field(0, 2, 0)? as u16;
            let flags = self.rflags() & !rflags::NT;
            self.next = self.switch_task(back, Cause::Return, self.next, flags, None, 0)?;
            return Ok(());
        }
        let (frame, with_stack) = if self.is_64bit() {
            (self.frame(size)?, true)
        } else {
            let [target, selector, image] = self.frame(size)?;
            if image & rflags::VM != 0 && self.cpl == 0 && size == 4 && !self.long_mode() {
                return self.return_to_8086();
            }
            let outwards = rpl(selector as u16) > self.cpl;
            let [pointer, stack] = if outwards {
                [3, 4].map(|n| self.peek(n * size as u64, size))
            } else {
                [Ok(0), Ok(0)]
            };
            ([target, selector, image, pointer?, stack?], outwards)
        };
        let [target, selector, image, pointer, stack] = frame;
        let selector = selector as u16;
        let descriptor = self.return_code(selector)?;
        let code = descriptor.segment(selector);
        let level = rpl(selector);
        let stack = if with_stack {
            Some(self.return_stack(stack as u16, code)?)
        } else {
            None
        };
        self.check_target(&code, target, 0)?;
        self.mark_accessed(descriptor)?;
        let flags = self.returned_flags(image, size);
        let outwards = level != self.cpl;
        match stack {
            Some(stack) => {
                self.enter_code(code, level);
                self.segments[seg::SS] = stack;
                if !code.long {
                    self.update_bases();
                }
                self.set_stack_pointer(pointer);
            }
            None => {
                self.discard(3 * size as u64);
                self.enter_code(code, level);
            }
        }
        if outwards {
            self.drop_inner_segments();
        }
        self.set_flags(Flags::from_rflags(flags));
        self.set_system_flags(flags);
        self.next = target;
        Ok(())
    }

    /// IRET from protected to virtual-8086 mode.
    fn return_to_8086(&mut self) -> Exec {
        let frame: [u64; 9] = self.frame(4)?;
        let [target, code, image, pointer, stack, es, ds, fs, gs] = frame;
        let code = virtual_8086_segment(code as u16);
        self.check_target(&code, target, 0)?;
        self.set_rflags(image & !rflags::RF);
        self.enter_code(code, 3);
        for (number, selector) in [
            (seg::SS, stack),
            (seg::ES, es),
            (seg::DS, ds),
            (seg::FS, fs),
            (seg::GS, gs),
        ] {
            self.segments[number] = virtual_8086_segment(selector as u16);
        }
        self.update_bases();
        self.set_gpr(reg::RSP, pointer);
        self.next = target;
        Ok(())
    }
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Int_imm8 => int,
        Code::Int3 => int3,
        Code::Into => into,
        Code::Int1 => int1,
        Code::Iretw => iret::<2>,
        Code::Iretd => iret::<4>,
        Code::Iretq => iret::<8>,
        Code::Bound_r16_m1616 => bound::<2>,
        Code::Bound_r32_m3232 => bound::<4>,
        _ => return None,
    })
}

fn int(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    if cpu.virtual_8086() && cpu.iopl() != 3 {
        return Err(cpu.gp());
    }
    cpu.software_interrupt(Arrival::software(instruction.immediate8()))
}

fn int3(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.software_interrupt(Arrival::software(vector::BP))
}

fn into(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if !cpu.flags().any(Flags::OF) {
        return Ok(());
    }
    cpu.software_interrupt(Arrival::software(vector::OF))
}

/// INT1: a #DB as from hardware, behind the instruction.
fn int1(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.software_interrupt(Arrival::interrupt(vector::DB))
}

fn iret<const SIZE: usize>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if cpu.real_segments() {
        cpu.return_real(SIZE)
    } else {
        cpu.return_protected(SIZE)
    }
}

fn bound<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let signed = |value: u64| match SIZE {
        2 => i64::from(value as i16),
        _ => i64::from(value as i32),
    };
    let index = signed(cpu.read_register(instruction.op0_register()));
    let linear = cpu.memory_operand(instruction, 2 * SIZE, false)?;
    let lower = signed(cpu.load_sized(linear, SIZE)?);
    let upper = signed(cpu.load_sized(cpu.linear_after(linear, SIZE as u64), SIZE)?);
    if index < lower || index > upper {
        return Err(cpu.raise(Exception::plain(vector::BR)));
    }
    Ok(())
}
