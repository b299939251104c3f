//! Instructions on the flags outside arithmetic.

#[cfg(test)]
mod tests;

use iced_x86::{Code, Instruction, Mnemonic};

use crate::block::Handler;
use crate::cpu::{Cpu, Exec, rflags};

impl Cpu {
    /// #GP(0) unless IF may be changed here: privilege level at most IOPL, and in virtual-8086 mode
    /// IOPL 3.
    fn require_iopl(&mut self) -> Exec {
        if self.protected() && self.cpl > self.iopl() {
            return Err(self.gp());
        }
        Ok(())
    }

    /// Sets RFLAGS as POPF does. The block goes on unless interrupts may come now, single steps
    /// begin or end, or alignment checks do.
    fn pop_flags(&mut self, value: u64, size: usize) {
        let mut mask = rflags::DEFINED & !(rflags::VM | rflags::VIF | rflags::VIP);
        if self.cpl != 0 || self.virtual_8086() {
            mask &= !rflags::IOPL;
            if self.cpl > self.iopl() {
                mask &= !rflags::IF;
            }
        }
        let mut cleared = rflags::RF;
        if size == 2 {
            mask &= 0xFFFF;
            cleared = 0;
        }
        let old = self.rflags();
        let new = (old & !mask | value & mask) & !cleared;
        let leave = self.leave_block;
        self.set_rflags(new);
        let changed = old ^ new;
        let alignment = changed & rflags::AC != 0 && self.cpl == 3;
        self.leave_block = leave
            || changed & (rflags::TF | rflags::RF) != 0
            || alignment
            || changed & new & rflags::IF != 0 && self.apic.pending();
    }
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Clac => clac,
        Mnemonic::Stac => stac,
        _ => match instruction.code() {
            Code::Pushfw => push_flags::<2>,
            Code::Pushfd => push_flags::<4>,
            Code::Pushfq => push_flags::<8>,
            Code::Popfw => pop_flags::<2>,
            Code::Popfd => pop_flags::<4>,
            Code::Popfq => pop_flags::<8>,
            _ => return None,
        },
    })
}

/// Nothing that runs in a block depends on IF, so the block goes on.
fn cli(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_iopl()?;
    cpu.system_flags &= !rflags::IF;
    Ok(())
}

/// The block goes on unless an interrupt waits: one that comes later ends it by itself.
fn sti(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_iopl()?;
    if cpu.system_flags & rflags::IF == 0 {
        cpu.system_flags |= rflags::IF;
        cpu.shadow_at = Some(cpu.next);
        if cpu.apic.pending() {
            cpu.leave_block = true;
        }
    }
    Ok(())
}

fn clac(cpu: &mut Cpu, _: &Instruction) -> Exec {
    set_access(cpu, false)
}

fn stac(cpu: &mut Cpu, _: &Instruction) -> Exec {
    set_access(cpu, true)
}

fn set_access(cpu: &mut Cpu, on: bool) -> Exec {
    if cpu.cpl != 0 {
        return Err(cpu.ud());
    }
    if on {
        cpu.system_flags |= rflags::AC;
    } else {
        cpu.system_flags &= !rflags::AC;
    }
    cpu.update_context();
    Ok(())
}

/// #GP(0) where virtual-8086 code may not see the flags.
fn require_visible(cpu: &mut Cpu) -> Exec {
    if cpu.virtual_8086() && cpu.iopl() != 3 {
        return Err(cpu.gp());
    }
    Ok(())
}

fn push_flags<const SIZE: usize>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    require_visible(cpu)?;
    let image = cpu.rflags() & !(rflags::VM | rflags::RF);
    cpu.push(image, SIZE)
}

fn pop_flags<const SIZE: usize>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    require_visible(cpu)?;
    let image = cpu.pop(SIZE)?;
    cpu.pop_flags(image, SIZE);
    Ok(())
}
