//! Control, debug and extended control registers; what acts on caches and TLBs; halting; hypercalls.

#[cfg(test)]
mod tests;

use anemone_soft_mmu::{Invpcid, cr0, cr4, efer, is_canonical};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::block::Handler;
use crate::cpu::{Activity, Cpu, Exception, Exec, reg, seg, vector};
use crate::system::cpuid::{Bit, feature};

/// CR0: all bits that are not reserved (SDM volume 3, 2.5). Writes of the others are ignored below
/// bit 32.
const CR0_DEFINED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// CR4: bits and the features that they need.
const CR4_FEATURES: &[(u64, Bit)] = &[
    (cr4::TSD, feature::TSC),
    (cr4::DE, feature::DE),
    (cr4::PSE, feature::PSE),
    (cr4::PAE, feature::PAE),
    (cr4::MCE, feature::MCE),
    (cr4::PGE, feature::PGE),
    (cr4::OSFXSR, feature::FXSR),
    (cr4::OSXMMEXCPT, feature::SSE),
    (cr4::FSGSBASE, feature::FSGSBASE),
    (cr4::PCIDE, feature::PCID),
    (cr4::OSXSAVE, feature::XSAVE),
    (cr4::SMEP, feature::SMEP),
    (cr4::SMAP, feature::SMAP),
];

/// CR4 bits that decide how addresses are translated for fetches.
const CR4_FETCH: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP;

/// Debug registers (SDM volume 3, 17.2): bits that read as one, bits that can be changed.
const DR6_FIXED: u64 = 0xFFFF_0FF0;
const DR6_WRITABLE: u64 = 0xE00F;
const DR6_BD: u64 = 1 << 13;
const DR7_FIXED: u64 = 1 << 10;
const DR7_WRITABLE: u64 = 0xFFFF_23FF;
const DR7_GD: u64 = 1 << 13;

/// Hypercall results (Linux Documentation/virt/kvm/x86/hypercalls.rst).
const KVM_ENOSYS: u64 = 1000;
const KVM_EPERM: u64 = 1;

impl Cpu {
    /// CR3.
    pub(crate) fn cr3(&self) -> u64 {
        self.mmu.paging().cr3
    }

    /// MOV to CR0, with entering and leaving long mode (SDM volume 3, 9.8.5).
    pub(crate) fn write_cr0(&mut self, value: u64) -> Exec {
        let bad = value >> 32 != 0
            || value & cr0::PG != 0 && value & cr0::PE == 0
            || value & cr0::NW != 0 && value & cr0::CD == 0;
        if bad {
            return Err(self.gp());
        }
        let value = value & CR0_DEFINED | cr0::ET;
        let changed = self.cr0 ^ value;
        let mut efer = self.efer;
        if changed & cr0::PG != 0 {
            let code_is_long = self.segments[seg::CS].long;
            if value & cr0::PG == 0 {
                if self.is_64bit() || self.cr4 & cr4::PCIDE != 0 {
                    return Err(self.gp());
                }
                efer &= !efer::LMA;
            } else if efer & efer::LME != 0 {
                if self.cr4 & cr4::PAE == 0 || code_is_long {
                    return Err(self.gp());
                }
                efer |= efer::LMA;
            }
        }
        if self.mmu.set_control(value, self.cr4, efer).is_err() {
            return Err(self.gp());
        }
        self.cr0 = value;
        self.efer = efer;
        self.update_bases();
        if changed & (cr0::PG | cr0::PE) != 0 {
            self.blocks.new_epoch();
        }
        self.leave_block = true;
        Ok(())
    }

    /// MOV to CR3.
    pub(crate) fn write_cr3(&mut self, value: u64) -> Exec {
        // With PCIDs, bit 63 asks to keep what is cached and is not stored.
        let keep = if self.cr4 & cr4::PCIDE != 0 {
            1 << 63
        } else {
            0
        };
        let reserved = u64::MAX << self.cpuid.physical_bits();
        if self.long_mode() && value & reserved & !keep != 0 || self.mmu.set_cr3(value).is_err() {
            return Err(self.gp());
        }
        self.blocks.new_epoch();
        self.leave_block = true;
        Ok(())
    }

    /// MOV to CR4.
    pub(crate) fn write_cr4(&mut self, value: u64) -> Exec {
        let changed = self.cr4 ^ value;
        let pcide_on = changed & value & cr4::PCIDE != 0;
        let bad = !self.is_offered_cr4(value)
            || self.long_mode() && value & cr4::PAE == 0
            || pcide_on && (!self.long_mode() || self.cr3() & 0xFFF != 0);
        if bad || self.mmu.set_control(self.cr0, value, self.efer).is_err() {
            return Err(self.gp());
        }
        self.cr4 = value;
        self.update_context();
        if changed & CR4_FETCH != 0 {
            self.blocks.new_epoch();
        }
        self.leave_block = true;
        Ok(())
    }

    /// Whether CR4 has no bit that the CPU model lacks.
    pub(crate) fn is_offered_cr4(&self, value: u64) -> bool {
        // The counters that PCE gives to user code do not exist, but the bit does.
        self.cpuid.allows(value & !cr4::PCE, CR4_FEATURES)
    }

    /// MOV to CR8.
    fn write_cr8(&mut self, value: u64) -> Exec {
        self.settle_pv_eoi();
        if self.apic.set_cr8(value).is_err() {
            return Err(self.gp());
        }
        self.apic_written();
        Ok(())
    }

    /// The debug register that an instruction names; DR4 and DR5 are DR6 and DR7 unless CR4.DE is
    /// set.
    fn debug_register(&mut self, register: Register) -> Exec<usize> {
        self.require_cpl0()?;
        let number = register.number();
        match number {
            4 | 5 if self.cr4 & cr4::DE != 0 => return Err(self.ud()),
            0..=7 => {}
            _ => return Err(self.ud()),
        }
        if self.dr[7] & DR7_GD != 0 {
            // The handler may use them.
            self.dr[6] |= DR6_BD;
            self.dr[7] &= !DR7_GD;
            return Err(self.raise(Exception::plain(vector::DB)));
        }
        Ok(if matches!(number, 4 | 5) {
            number + 2
        } else {
            number
        })
    }

    /// Sets DR6 as software sees it.
    pub(crate) fn set_dr6(&mut self, value: u64) {
        self.dr[6] = value & DR6_WRITABLE | DR6_FIXED;
    }

    /// Sets DR7 as software sees it.
    pub(crate) fn set_dr7(&mut self, value: u64) {
        self.dr[7] = value & DR7_WRITABLE | DR7_FIXED;
    }

    /// Whether XCR0 may have this value (SDM volume 1, 13.3).
    pub(crate) fn is_valid_xcr0(&self, value: u64) -> bool {
        value & 1 != 0 && value & 6 != 4 && value & !self.cpuid.xcr0_bits() == 0
    }
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Mov_r32_cr | Code::Mov_r64_cr => read_control,
        Code::Mov_cr_r32 | Code::Mov_cr_r64 => write_control,
        Code::Mov_r32_dr | Code::Mov_r64_dr => read_debug,
        Code::Mov_dr_r32 | Code::Mov_dr_r64 => write_debug,
        _ => match instruction.mnemonic() {
            Mnemonic::Clts => clts,
            Mnemonic::Lmsw => lmsw,
            Mnemonic::Smsw => smsw,
            Mnemonic::Invlpg => invlpg,
            Mnemonic::Invpcid => invpcid,
            Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => invalidate_caches,
            Mnemonic::Hlt => hlt,
            Mnemonic::Xgetbv => xgetbv,
            Mnemonic::Xsetbv => xsetbv,
            Mnemonic::Vmcall | Mnemonic::Vmmcall => hypercall,
            _ => return None,
        },
    })
}

fn read_control(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let value = match instruction.op1_register() {
        Register::CR0 => cpu.cr0,
        Register::CR2 => cpu.cr2,
        Register::CR3 => cpu.cr3(),
        Register::CR4 => cpu.cr4,
        Register::CR8 => {
            cpu.settle_pv_eoi();
            cpu.apic.cr8()
        }
        _ => return Err(cpu.ud()),
    };
    cpu.write_register(instruction.op0_register(), value);
    Ok(())
}

fn write_control(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let value = cpu.read_register(instruction.op1_register());
    match instruction.op0_register() {
        Register::CR0 => cpu.write_cr0(value),
        Register::CR2 => {
            cpu.cr2 = value;
            Ok(())
        }
        Register::CR3 => cpu.write_cr3(value),
        Register::CR4 => cpu.write_cr4(value),
        Register::CR8 => cpu.write_cr8(value),
        _ => Err(cpu.ud()),
    }
}

fn read_debug(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let number = cpu.debug_register(instruction.op1_register())?;
    cpu.write_register(instruction.op0_register(), cpu.dr[number]);
    Ok(())
}

/// Breakpoints are kept, but never trigger: looking for them would cost every access.
fn write_debug(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let number = cpu.debug_register(instruction.op0_register())?;
    let value = cpu.read_register(instruction.op1_register());
    match number {
        6 | 7 if value >> 32 != 0 => return Err(cpu.gp()),
        6 => cpu.set_dr6(value),
        7 => cpu.set_dr7(value),
        _ => cpu.dr[number] = value,
    }
    Ok(())
}

fn clts(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    if cpu.cr0 & cr0::TS != 0 {
        cpu.write_cr0(cpu.cr0 & !cr0::TS)?;
    }
    Ok(())
}

/// LMSW: PE, MP, EM and TS; PE cannot be cleared.
fn lmsw(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let value = cpu.read_operand(instruction, 0)?;
    let changeable = cr0::MP | cr0::EM | cr0::TS;
    let set = value & (changeable | cr0::PE);
    cpu.write_cr0(cpu.cr0 & !changeable | set)
}

/// SMSW: all of CR0 that fits a register, 16 bits in memory.
fn smsw(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    if instruction.op0_kind() == OpKind::Register {
        cpu.write_register(instruction.op0_register(), cpu.cr0);
        return Ok(());
    }
    let linear = cpu.memory_operand(instruction, 2, true)?;
    cpu.store(linear, cpu.cr0 as u16)
}

/// INVLPG. The address is not checked: it names a page, whether that can be accessed or not.
fn invlpg(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let offset = cpu.effective_address(instruction);
    let base = cpu.bases[cpu.memory_segment(instruction)];
    let mut linear = base.wrapping_add(offset);
    if !cpu.is_64bit() {
        linear &= 0xFFFF_FFFF;
    }
    if is_canonical(linear) {
        cpu.mmu.invlpg(linear);
        cpu.blocks.new_epoch();
        cpu.leave_block = true;
    }
    Ok(())
}

fn invpcid(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let kind = cpu.read_register(instruction.op0_register());
    let at = cpu.memory_operand(instruction, 16, false)?;
    let first = cpu.load::<u64>(at)?;
    let linear = cpu.load::<u64>(at.wrapping_add(8))?;
    let pcid = (first & 0xFFF) as u16;
    let usable = cpu.cr4 & cr4::PCIDE != 0 || pcid == 0;
    let what = match kind {
        _ if first >> 12 != 0 => None,
        0 if usable && is_canonical(linear) => Some(Invpcid::Address { pcid, linear }),
        1 if usable => Some(Invpcid::Single(pcid)),
        2 => Some(Invpcid::All),
        3 => Some(Invpcid::AllNonGlobal),
        _ => None,
    };
    let Some(what) = what else {
        return Err(cpu.gp());
    };
    cpu.mmu.invpcid(what);
    cpu.blocks.new_epoch();
    cpu.leave_block = true;
    Ok(())
}

/// Guest memory is always coherent: there is nothing to write back or to drop.
fn invalidate_caches(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_cpl0()
}

fn hlt(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    cpu.activity = Activity::Halted;
    cpu.shadow = false;
    cpu.leave_block = true;
    Ok(())
}

fn xgetbv(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if cpu.gpr(reg::RCX) as u32 != 0 {
        return Err(cpu.gp());
    }
    cpu.set_edx_eax(cpu.xcr0);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let value = cpu.gpr(reg::RAX) & 0xFFFF_FFFF | cpu.gpr(reg::RDX) << 32;
    if cpu.gpr(reg::RCX) as u32 != 0 || !cpu.is_valid_xcr0(value) {
        return Err(cpu.gp());
    }
    cpu.xcr0 = value;
    cpu.leave_block = true;
    Ok(())
}

/// VMCALL and VMMCALL: none of KVM's hypercalls is offered.
fn hypercall(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let error = if cpu.cpl == 0 { KVM_ENOSYS } else { KVM_EPERM };
    let result = error.wrapping_neg();
    let long = cpu.is_64bit();
    cpu.set_gpr(reg::RAX, if long { result } else { result & 0xFFFF_FFFF });
    Ok(())
}
