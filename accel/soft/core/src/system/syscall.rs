//! Fast system calls: SYSCALL, SYSENTER, their returns, SWAPGS (SDM volume 2; AMD APM volume 3).
//!
//! Outside 64-bit mode SYSCALL and SYSRET are AMD's only, in long mode SYSENTER and SYSEXIT are
//! Intel's only; CPUID's vendor decides.

#[cfg(test)]
pub(super) mod tests;

use anemone_soft_mmu::{efer, is_canonical};
use iced_x86::{Code, Instruction};

use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg, rflags, seg};
use crate::system::segment::{flat, is_null};

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Syscall => syscall,
        Code::Sysretd => sysret::<false>,
        Code::Sysretq => sysret::<true>,
        Code::Sysenter => sysenter,
        Code::Sysexitd => sysexit::<false>,
        Code::Sysexitq => sysexit::<true>,
        Code::Swapgs => swapgs,
        _ => return None,
    })
}

impl Cpu {
    /// Sets flat CS and SS, whose selector is the next, at a privilege level.
    fn enter_flat(&mut self, selector: u16, level: u8, long: bool) {
        let requested = u16::from(level);
        let code = flat(selector & !3 | requested, true, level, long);
        let stack = selector.wrapping_add(8) & !3 | requested;
        self.segments[seg::SS] = flat(stack, false, level, false);
        self.enter_code(code, level);
    }

    /// Sets RFLAGS without the bits in `clear`.
    fn clear_flags(&mut self, clear: u64) {
        let flags = self.rflags() & !clear;
        self.set_rflags(flags);
    }

    /// #UD unless SYSCALL and SYSRET are there and switched on.
    fn require_syscall(&mut self) -> Exec {
        if self.efer & efer::SCE == 0 || !self.is_64bit() && self.cpuid.is_intel() {
            return Err(self.ud());
        }
        Ok(())
    }

    /// The selector for SYSENTER and SYSEXIT, with the checks that both make.
    fn sysenter_selector(&mut self) -> Exec<u16> {
        if self.long_mode() && !self.cpuid.is_intel() {
            return Err(self.ud());
        }
        let selector = self.msrs.sysenter_cs as u16;
        if !self.protected() || is_null(selector) {
            return Err(self.gp());
        }
        Ok(selector & !3)
    }
}

fn syscall(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_syscall()?;
    let selector = (cpu.msrs.star >> 32) as u16;
    if !cpu.long_mode() {
        cpu.set_gpr(reg::RCX, cpu.next);
        cpu.clear_flags(rflags::VM | rflags::IF | rflags::RF);
        cpu.enter_flat(selector, 0, false);
        cpu.next = cpu.msrs.star & 0xFFFF_FFFF;
        return Ok(());
    }
    let target = if cpu.is_64bit() {
        cpu.msrs.lstar
    } else {
        cpu.msrs.cstar
    };
    cpu.set_gpr(reg::RCX, cpu.next);
    cpu.set_gpr(reg::R11, cpu.rflags() & !rflags::RF);
    cpu.clear_flags(cpu.msrs.sfmask | rflags::RF);
    cpu.enter_flat(selector, 0, true);
    cpu.next = target;
    Ok(())
}

fn sysret<const LONG: bool>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_syscall()?;
    cpu.require_cpl0()?;
    if !cpu.protected() {
        return Err(cpu.gp());
    }
    let base = (cpu.msrs.star >> 48) as u16;
    let mut target = cpu.gpr(reg::RCX);
    let selector = if LONG {
        // AMD's CPUs fault after the return.
        if cpu.cpuid.is_intel() && !is_canonical(target) {
            return Err(cpu.gp());
        }
        base.wrapping_add(16)
    } else {
        target &= 0xFFFF_FFFF;
        base
    };
    let flags = if cpu.long_mode() {
        let loaded = rflags::DEFINED & !(rflags::RF | rflags::VM);
        cpu.gpr(reg::R11) & loaded
    } else {
        cpu.rflags() | rflags::IF
    };
    cpu.set_rflags(flags);
    cpu.enter_flat(selector, 3, LONG);
    // The stack's selector is the same for both sizes.
    cpu.segments[seg::SS].selector = base.wrapping_add(8) | 3;
    cpu.next = target;
    Ok(())
}

fn sysenter(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let selector = cpu.sysenter_selector()?;
    let long = cpu.long_mode();
    let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
    cpu.clear_flags(rflags::VM | rflags::IF | rflags::RF);
    cpu.enter_flat(selector, 0, long);
    cpu.set_gpr(reg::RSP, cpu.msrs.sysenter_esp & mask);
    cpu.next = cpu.msrs.sysenter_eip & mask;
    Ok(())
}

fn sysexit<const LONG: bool>(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let selector = cpu.sysenter_selector()?;
    cpu.require_cpl0()?;
    let mut stack = cpu.gpr(reg::RCX);
    let mut target = cpu.gpr(reg::RDX);
    if !LONG {
        stack &= 0xFFFF_FFFF;
        target &= 0xFFFF_FFFF;
    } else if !is_canonical(stack) || !is_canonical(target) {
        return Err(cpu.gp());
    }
    let above = if LONG { 32 } else { 16 };
    cpu.enter_flat(selector.wrapping_add(above), 3, LONG);
    cpu.set_gpr(reg::RSP, stack);
    cpu.next = target;
    Ok(())
}

fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if !cpu.is_64bit() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let user = cpu.segments[seg::GS].base;
    cpu.set_base(seg::GS, cpu.msrs.kernel_gs_base);
    cpu.msrs.kernel_gs_base = user;
    Ok(())
}
