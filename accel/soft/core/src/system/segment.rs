//! Segment registers and descriptor tables: descriptors, loads of segment registers, the
//! instructions that look at descriptors (SDM volume 3, chapter 3 and 5.4 to 5.10).

#[cfg(test)]
mod tests;

use anemone_accel_api::{DescriptorTable, Segment};
use anemone_soft_mmu::{Context, Fault, cr4, is_canonical};
use anemone_soft_native::Flags;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::block::Handler;
use crate::cpu::{Cpu, Exception, Exec, Trap, seg, vector};
use crate::system::cpuid;

/// What LAR shows of the upper half of a descriptor. Bits 19:16 are undefined by the manual;
/// hardware shows the limit's.
const ACCESS_RIGHTS: u32 = 0x00FF_FF00;

/// Types of system descriptors (SDM volume 3, table 3-2).
pub(crate) mod kind {
    pub const TSS_16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const CALL_16: u8 = 4;
    pub const TASK: u8 = 5;
    /// Available; also 64-bit.
    pub const TSS_32: u8 = 9;
    /// Also 64-bit.
    pub const CALL_32: u8 = 12;
    /// Also 64-bit.
    pub const INTERRUPT_32: u8 = 14;
    /// In the type of a TSS: busy.
    pub const BUSY: u8 = 2;
}

/// A descriptor and where it is; of a 16-byte one the first half.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Descriptor {
    pub address: u64,
    pub raw: u64,
}

impl Descriptor {
    pub(crate) fn kind(self) -> u8 {
        (self.raw >> 40) as u8 & 0xF
    }

    pub(crate) fn dpl(self) -> u8 {
        (self.raw >> 45) as u8 & 3
    }

    pub(crate) fn is_present(self) -> bool {
        self.raw & 1 << 47 != 0
    }

    pub(crate) fn is_system(self) -> bool {
        self.raw & 1 << 44 == 0
    }

    pub(crate) fn is_code(self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }

    pub(crate) fn is_conforming(self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    pub(crate) fn is_writable(self) -> bool {
        !self.is_system() && self.kind() & 0xA == 2
    }

    pub(crate) fn is_readable(self) -> bool {
        !self.is_system() && (self.kind() & 8 == 0 || self.kind() & 2 != 0)
    }

    /// 64-bit code, where long mode is active.
    pub(crate) fn is_long(self) -> bool {
        self.raw & 1 << 53 != 0
    }

    pub(crate) fn is_big(self) -> bool {
        self.raw & 1 << 54 != 0
    }

    /// The segment register after a load.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let mut segment = Segment::from_descriptor(selector, self.raw);
        segment.kind |= 1;
        segment
    }
}

/// Whether a selector is null: names entry 0 of the GDT.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xFFFC == 0
}

/// Requested privilege level of a selector.
pub(crate) fn rpl(selector: u16) -> u8 {
    selector as u8 & 3
}

/// SS in 64-bit mode with a null selector, which is usable there.
pub(crate) fn null_stack(selector: u16) -> Segment {
    Segment {
        selector,
        // The stack's level is that of the CPU.
        dpl: rpl(selector),
        big: true,
        ..Segment::default()
    }
}

/// Code or data over all addresses, as SYSCALL and its relatives set it.
pub(crate) fn flat(selector: u16, code: bool, dpl: u8, long: bool) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        kind: if code { 0xB } else { 3 },
        present: true,
        dpl,
        big: !long,
        code_or_data: true,
        long,
        granularity: true,
        available: false,
    }
}

impl Cpu {
    /// Raises an exception with a selector as error code.
    #[cold]
    pub(crate) fn refuse(&mut self, vector: u8, selector: u16, ext: u32) -> Trap {
        self.raise(Exception::with(vector, u32::from(selector & !3) | ext))
    }

    /// A linear address in a system structure.
    pub(crate) fn system_address(&self, linear: u64) -> u64 {
        if self.long_mode() {
            linear
        } else {
            linear & 0xFFFF_FFFF
        }
    }

    /// Where `length` bytes of the descriptor that `selector` names are, if its table has them.
    fn descriptor_address(&self, selector: u16, length: u64) -> Option<u64> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.present {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            return None;
        };
        let offset = u64::from(selector & !7);
        (offset + length - 1 <= limit).then(|| self.system_address(base.wrapping_add(offset)))
    }

    /// The descriptor that `selector` names; `None` beyond the table.
    pub(crate) fn find_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let raw = self.load_system(address)?;
        Ok(Some(Descriptor { address, raw }))
    }

    /// The descriptor that `selector` names; beyond the table, the exception with the selector.
    pub(crate) fn descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Exec<Descriptor> {
        match self.find_descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => Err(self.refuse(vector, selector, ext)),
        }
    }

    /// The second half of a 16-byte descriptor in the GDT or LDT; #GP beyond the table or if it
    /// has a type of its own.
    pub(crate) fn upper_half(&mut self, selector: u16) -> Exec<u64> {
        let upper = match self.descriptor_address(selector, 16) {
            Some(address) => self.load_system::<u64>(address.wrapping_add(8))?,
            None => return Err(self.refuse(vector::GP, selector, 0)),
        };
        if upper >> 40 & 0x1F != 0 {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        Ok(upper)
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    #[inline]
    pub(crate) fn mark_accessed(&mut self, descriptor: Descriptor) -> Exec {
        if descriptor.raw & 1 << 40 != 0 {
            return Ok(());
        }
        self.update_system(descriptor.address.wrapping_add(5), |access| access | 1)
    }

    /// Changes a byte of a system structure with a locked supervisor access.
    pub(crate) fn update_system(&mut self, linear: u64, change: impl Fn(u8) -> u8) -> Exec {
        let linear = self.system_address(linear);
        match self.mmu.update(linear, Context::Supervisor, &change) {
            Ok(_) => {
                self.after_slow_write();
                Ok(())
            }
            // A table in ROM: the write goes where writes to ROM go.
            Err(Fault::Mmio(_)) => {
                let old = self.load_system(linear)?;
                self.store_system(linear, change(old))
            }
            Err(fault) => Err(self.memory_fault(fault)),
        }
    }

    /// A segment register after a load in real-address or virtual-8086 mode.
    pub(crate) fn paragraph(&self, number: usize, selector: u16) -> Segment {
        let base = u64::from(selector) << 4;
        if self.virtual_8086() {
            return virtual_8086_segment(selector);
        }
        // Limit and attributes stay: "unreal" mode.
        Segment {
            selector,
            base,
            present: true,
            ..self.segments[number]
        }
    }

    /// A data segment register (any but CS) as a load of `selector` makes it, with all checks; the
    /// register is not changed yet.
    pub(crate) fn checked_segment(&mut self, number: usize, selector: u16) -> Exec<Segment> {
        if self.real_segments() {
            return Ok(self.paragraph(number, selector));
        }
        if number == seg::SS {
            return self.stack_segment(selector, self.cpl, self.is_64bit());
        }
        if is_null(selector) {
            let base = if self.null_clears_base() {
                0
            } else {
                self.segments[number].base
            };
            return Ok(Segment {
                selector,
                base,
                ..Segment::default()
            });
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        let outside = rpl(selector).max(self.cpl) > descriptor.dpl();
        if !descriptor.is_readable() || outside && !descriptor.is_conforming() {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::NP, selector, 0));
        }
        self.mark_accessed(descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// The segment for SS of code at privilege level `level`, which is 64-bit code if `long`;
    /// marks it as accessed.
    pub(crate) fn stack_segment(&mut self, selector: u16, level: u8, long: bool) -> Exec<Segment> {
        if is_null(selector) {
            if long && level != 3 && rpl(selector) == level {
                return Ok(null_stack(selector));
            }
            return Err(self.gp());
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        if rpl(selector) != level || descriptor.dpl() != level || !descriptor.is_writable() {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::SS, selector, 0));
        }
        self.mark_accessed(descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Whether a null selector clears the base that FS and GS have in 64-bit mode: on Intel, and on
    /// AMD where CPUID says so (APM volume 3, Fn8000_0021_EAX).
    fn null_clears_base(&self) -> bool {
        let clears: cpuid::Bit = (0x8000_0021, anemone_cpu::Register::Eax, 6);
        self.cpuid.is_intel() || self.cpuid.offers(clears)
    }

    /// #UD in real-address and virtual-8086 mode.
    fn require_protected(&mut self) -> Exec {
        if self.real_segments() {
            return Err(self.ud());
        }
        Ok(())
    }

    fn set_zf(&mut self, on: bool) {
        let flags = self.flags().with(Flags::ZF, on);
        self.set_flags(flags);
    }

    /// The descriptor that LAR, LSL, VERR and VERW look at: `None` if it cannot be seen from here.
    fn visible_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        let level = rpl(selector).max(self.cpl);
        let found = self.find_descriptor(selector)?;
        Ok(found.filter(|d| d.is_conforming() || level <= d.dpl()))
    }

    /// The descriptor of LDT or TSS with its base, for LLDT and LTR.
    fn system_segment(&mut self, selector: u16, kinds: &[u8]) -> Exec<(Descriptor, Segment)> {
        if selector & 4 != 0 {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        let descriptor = self.descriptor(selector, vector::GP, 0)?;
        if !descriptor.is_system() || !kinds.contains(&descriptor.kind()) {
            return Err(self.refuse(vector::GP, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.refuse(vector::NP, selector, 0));
        }
        let mut segment = Segment::from_descriptor(selector, descriptor.raw);
        if self.long_mode() {
            segment.base |= self.upper_half(selector)? << 32;
            if !is_canonical(segment.base) {
                return Err(self.refuse(vector::GP, selector, 0));
            }
        }
        Ok((descriptor, segment))
    }

    /// Base of FS or GS for all of 64 bits. Nothing decoded depends on it.
    pub(crate) fn set_base(&mut self, number: usize, base: u64) {
        self.segments[number].base = base;
        self.bases[number] = base;
    }
}

/// A segment register in virtual-8086 mode.
pub(crate) fn virtual_8086_segment(selector: u16) -> Segment {
    Segment {
        base: u64::from(selector) << 4,
        limit: 0xFFFF,
        selector,
        kind: 3,
        present: true,
        dpl: 3,
        code_or_data: true,
        ..Segment::default()
    }
}

/// Number of a segment register that is an operand.
fn number_of(instruction: &Instruction, operand: u32) -> usize {
    (instruction.op_register(operand) as usize).wrapping_sub(Register::ES as usize)
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => load_far,
        Mnemonic::Lar => lar,
        Mnemonic::Lsl => lsl,
        Mnemonic::Verr => verify::<false>,
        Mnemonic::Verw => verify::<true>,
        Mnemonic::Arpl => arpl,
        Mnemonic::Lldt => lldt,
        Mnemonic::Ltr => ltr,
        Mnemonic::Sldt => sldt,
        Mnemonic::Str => str_,
        Mnemonic::Lgdt | Mnemonic::Lidt => load_table,
        Mnemonic::Sgdt | Mnemonic::Sidt => store_table,
        Mnemonic::Rdfsbase => read_base::<{ seg::FS }>,
        Mnemonic::Rdgsbase => read_base::<{ seg::GS }>,
        Mnemonic::Wrfsbase => write_base::<{ seg::FS }>,
        Mnemonic::Wrgsbase => write_base::<{ seg::GS }>,
        _ => match instruction.code() {
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => load,
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => store,
            Code::Pushw_ES
            | Code::Pushw_CS
            | Code::Pushw_SS
            | Code::Pushw_DS
            | Code::Pushw_FS
            | Code::Pushw_GS => push::<2>,
            Code::Pushd_ES
            | Code::Pushd_CS
            | Code::Pushd_SS
            | Code::Pushd_DS
            | Code::Pushd_FS
            | Code::Pushd_GS => push::<4>,
            Code::Pushq_FS | Code::Pushq_GS => push::<8>,
            Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS | Code::Popw_GS => {
                pop::<2>
            }
            Code::Popd_ES | Code::Popd_SS | Code::Popd_DS | Code::Popd_FS | Code::Popd_GS => {
                pop::<4>
            }
            Code::Popq_FS | Code::Popq_GS => pop::<8>,
            _ => return None,
        },
    })
}

/// After a load of SS by MOV or POP no interrupt comes before the next instruction, which loads
/// the stack pointer.
fn set_loaded(cpu: &mut Cpu, number: usize, segment: Segment) {
    cpu.set_segment(number, segment);
    if number == seg::SS {
        cpu.shadow = true;
    }
}

/// MOV to a segment register.
fn load(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let number = number_of(instruction, 0);
    if number == seg::CS || number > seg::GS {
        return Err(cpu.ud());
    }
    let selector = cpu.read_operand(instruction, 1)? as u16;
    let segment = cpu.checked_segment(number, selector)?;
    set_loaded(cpu, number, segment);
    Ok(())
}

/// MOV from a segment register.
fn store(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let number = number_of(instruction, 1);
    if number > seg::GS {
        return Err(cpu.ud());
    }
    let selector = cpu.segments[number].selector;
    cpu.write_operand(instruction, 0, selector.into())
}

fn push<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let selector = cpu.segments[number_of(instruction, 0)].selector;
    if SIZE == 4 && cpu.cpuid.is_intel() {
        // Intel's CPUs leave the upper half of the slot as it is (SDM volume 2, PUSH).
        let top = cpu.stack_pointer().wrapping_sub(4) & cpu.stack_mask();
        let linear = cpu.data_address(seg::SS, top, 2, true)?;
        cpu.store(linear, selector)?;
        cpu.set_stack_pointer(top);
        return Ok(());
    }
    cpu.push(selector.into(), SIZE)
}

fn pop<const SIZE: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let number = number_of(instruction, 0);
    let selector = cpu.peek(0, SIZE)? as u16;
    let segment = cpu.checked_segment(number, selector)?;
    // The old stack's size counts.
    cpu.discard(SIZE as u64);
    set_loaded(cpu, number, segment);
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS.
fn load_far(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let number = match instruction.mnemonic() {
        Mnemonic::Lds => seg::DS,
        Mnemonic::Les => seg::ES,
        Mnemonic::Lfs => seg::FS,
        Mnemonic::Lgs => seg::GS,
        _ => seg::SS,
    };
    let (offset, selector) = cpu.far_pointer(instruction)?;
    let segment = cpu.checked_segment(number, selector)?;
    cpu.set_segment(number, segment);
    cpu.write_register(instruction.op0_register(), offset);
    Ok(())
}

fn lar(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    let selector = cpu.read_operand(instruction, 1)? as u16;
    let long = cpu.long_mode();
    let seen = cpu.visible_descriptor(selector)?.filter(|d| {
        !d.is_system()
            || match d.kind() {
                kind::TSS_16 | 3 | kind::CALL_16 | kind::TASK => !long,
                kind::LDT | kind::TSS_32 | 11 | kind::CALL_32 => true,
                _ => false,
            }
    });
    if let Some(descriptor) = seen {
        let rights = (descriptor.raw >> 32) as u32 & ACCESS_RIGHTS;
        cpu.write_register(instruction.op0_register(), rights.into());
    }
    cpu.set_zf(seen.is_some());
    Ok(())
}

fn lsl(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    let selector = cpu.read_operand(instruction, 1)? as u16;
    let long = cpu.long_mode();
    let seen = cpu.visible_descriptor(selector)?.filter(|d| {
        !d.is_system()
            || match d.kind() {
                kind::TSS_16 | 3 => !long,
                kind::LDT | kind::TSS_32 | 11 => true,
                _ => false,
            }
    });
    if let Some(descriptor) = seen {
        let limit = Segment::from_descriptor(selector, descriptor.raw).limit;
        cpu.write_register(instruction.op0_register(), limit.into());
    }
    cpu.set_zf(seen.is_some());
    Ok(())
}

/// VERR and VERW.
fn verify<const WRITE: bool>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    let selector = cpu.read_operand(instruction, 0)? as u16;
    let seen = cpu.visible_descriptor(selector)?;
    let good = seen.is_some_and(|d| {
        if WRITE {
            d.is_writable()
        } else {
            d.is_readable()
        }
    });
    cpu.set_zf(good);
    Ok(())
}

fn arpl(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    let wanted = cpu.read_operand(instruction, 1)? & 3;
    // The destination is written in any case as far as faults go.
    let is_memory = instruction.op0_kind() != OpKind::Register;
    let linear = if is_memory {
        let linear = cpu.memory_operand(instruction, 2, true)?;
        cpu.probe_write(linear, 2)?;
        Some(linear)
    } else {
        None
    };
    let old = match linear {
        Some(linear) => cpu.load::<u16>(linear)?.into(),
        None => cpu.read_register(instruction.op0_register()),
    };
    let raise = old & 3 < wanted;
    if raise {
        let new = old & !3 | wanted;
        match linear {
            Some(linear) => cpu.store(linear, new as u16)?,
            None => cpu.write_register(instruction.op0_register(), new),
        }
    }
    cpu.set_zf(raise);
    Ok(())
}

fn lldt(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.read_operand(instruction, 0)? as u16;
    if is_null(selector) {
        cpu.ldtr = Segment {
            selector,
            ..Segment::default()
        };
        return Ok(());
    }
    cpu.ldtr = cpu.system_segment(selector, &[kind::LDT])?.1;
    Ok(())
}

fn ltr(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    cpu.require_cpl0()?;
    let selector = cpu.read_operand(instruction, 0)? as u16;
    if is_null(selector) {
        return Err(cpu.gp());
    }
    let kinds: &[u8] = if cpu.long_mode() {
        &[kind::TSS_32]
    } else {
        &[kind::TSS_16, kind::TSS_32]
    };
    let (descriptor, mut segment) = cpu.system_segment(selector, kinds)?;
    cpu.update_system(descriptor.address.wrapping_add(5), |access| {
        access | kind::BUSY
    })?;
    segment.kind |= kind::BUSY;
    cpu.tr = segment;
    Ok(())
}

fn sldt(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    cpu.write_operand(instruction, 0, cpu.ldtr.selector.into())
}

fn str_(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_protected()?;
    cpu.write_operand(instruction, 0, cpu.tr.selector.into())
}

/// Bytes of the base in the memory operand of LGDT and its relatives.
fn base_size(instruction: &Instruction) -> usize {
    match instruction.code() {
        Code::Lgdt_m1664 | Code::Lidt_m1664 | Code::Sgdt_m1664 | Code::Sidt_m1664 => 8,
        _ => 4,
    }
}

/// LGDT and LIDT.
fn load_table(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let size = base_size(instruction);
    let linear = cpu.memory_operand(instruction, 2 + size, false)?;
    let limit = cpu.load(linear)?;
    let mut base = cpu.load_sized(cpu.linear_after(linear, 2), size)?;
    if matches!(
        instruction.code(),
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16
    ) {
        base &= 0xFF_FFFF;
    }
    if size == 8 && !is_canonical(base) {
        return Err(cpu.gp());
    }
    let table = DescriptorTable { base, limit };
    if instruction.mnemonic() == Mnemonic::Lgdt {
        cpu.gdtr = table;
    } else {
        cpu.idtr = table;
    }
    Ok(())
}

/// SGDT and SIDT.
fn store_table(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let table = if instruction.mnemonic() == Mnemonic::Sgdt {
        cpu.gdtr
    } else {
        cpu.idtr
    };
    let size = base_size(instruction);
    let linear = cpu.memory_operand(instruction, 2 + size, true)?;
    cpu.probe_write(linear, 2 + size)?;
    cpu.store(linear, table.limit)?;
    cpu.store_sized(cpu.linear_after(linear, 2), table.base, size)
}

/// #UD unless the guest has allowed the instructions on FS and GS bases.
fn require_fsgsbase(cpu: &mut Cpu) -> Exec {
    if cpu.cr4 & cr4::FSGSBASE == 0 || !cpu.is_64bit() {
        return Err(cpu.ud());
    }
    Ok(())
}

fn read_base<const NUMBER: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    require_fsgsbase(cpu)?;
    let base = cpu.segments[NUMBER].base;
    cpu.write_register(instruction.op0_register(), base);
    Ok(())
}

fn write_base<const NUMBER: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    require_fsgsbase(cpu)?;
    let base = cpu.read_register(instruction.op0_register());
    if !is_canonical(base) {
        return Err(cpu.gp());
    }
    cpu.set_base(NUMBER, base);
    Ok(())
}
