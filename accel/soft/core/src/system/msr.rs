//! Model-specific registers, and the instructions that read counters.
//!
//! What is here is what a KVM guest finds on a CPU without performance counters, nested
//! virtualisation and speculation controls, so that a kernel that runs under KVM finds nothing
//! missing. Anything else raises #GP, for which kernels are prepared where they ask.

use std::arch::x86_64::_mm_lfence;

use anemone_log::Limiter;
use anemone_soft_apic::pv::{
    self, MSR_PV_EOI, MSR_STEAL_TIME, MSR_SYSTEM_TIME, MSR_WALL_CLOCK, PvEoi, StealTime,
    SystemTime, WallClock,
};
use anemone_soft_mmu::{cr0, cr4, efer, is_canonical};
use iced_x86::{Instruction, Mnemonic};

use crate::block::Handler;
use crate::clock;
use crate::cpu::{Cpu, Exec, reg, seg};
use crate::system::cpuid::{Bit, feature};

/// Numbers (SDM volume 4, chapter 2; AMD APM volume 2, appendix A).
mod number {
    pub const P5_MC_ADDR: u32 = 0x0;
    pub const P5_MC_TYPE: u32 = 0x1;
    pub const TSC: u32 = 0x10;
    pub const WALL_CLOCK_OLD: u32 = 0x11;
    pub const SYSTEM_TIME_OLD: u32 = 0x12;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1B;
    pub const EBL_CR_POWERON: u32 = 0x2A;
    pub const EBC_FREQUENCY_ID: u32 = 0x2C;
    pub const SMI_COUNT: u32 = 0x34;
    pub const TSC_ADJUST: u32 = 0x3B;
    pub const UCODE_WRITE: u32 = 0x79;
    pub const UCODE_REV: u32 = 0x8B;
    pub const P6_PERFCTR0: u32 = 0xC1;
    pub const P6_PERFCTR1: u32 = 0xC2;
    pub const PLATFORM_INFO: u32 = 0xCE;
    pub const MTRR_CAP: u32 = 0xFE;
    pub const TSC_AUX: u32 = 0xC000_0103;
    pub const BBL_CR_CTL3: u32 = 0x11E;
    pub const MISC_FEATURES: u32 = 0x140;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17A;
    pub const P6_EVNTSEL0: u32 = 0x186;
    pub const P6_EVNTSEL1: u32 = 0x187;
    pub const PERF_STATUS: u32 = 0x198;
    pub const PERF_CTL: u32 = 0x199;
    pub const MISC_ENABLE: u32 = 0x1A0;
    pub const DEBUGCTL: u32 = 0x1D9;
    pub const LAST_BRANCH_FROM: u32 = 0x1DB;
    pub const LAST_EXCEPTION_TO: u32 = 0x1DE;
    pub const MTRR_VARIABLE: u32 = 0x200;
    pub const MTRR_VARIABLE_END: u32 = 0x20F;
    pub const MTRR_FIX_64K: u32 = 0x250;
    pub const MTRR_FIX_16K: u32 = 0x258;
    pub const MTRR_FIX_16K_END: u32 = 0x259;
    pub const MTRR_FIX_4K: u32 = 0x268;
    pub const MTRR_FIX_4K_END: u32 = 0x26F;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2FF;
    pub const RAPL_POWER_UNIT: u32 = 0x606;
    pub const PKG_ENERGY_STATUS: u32 = 0x611;
    pub const DRAM_ENERGY_STATUS: u32 = 0x619;
    pub const PP0_ENERGY_STATUS: u32 = 0x639;
    pub const PP1_ENERGY_STATUS: u32 = 0x641;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    pub const X2APIC: u32 = 0x800;
    pub const X2APIC_END: u32 = 0x8FF;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const SFMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const K7_EVNTSEL0: u32 = 0xC001_0000;
    pub const K7_PERFCTR3: u32 = 0xC001_0007;
    pub const SYSCFG: u32 = 0xC001_0010;
    pub const HWCR: u32 = 0xC001_0015;
    pub const K7_CLK_CTL: u32 = 0xC001_001B;
    pub const NB_CFG: u32 = 0xC001_001F;
    pub const PATCH_LOADER: u32 = 0xC001_0020;
    pub const INT_PENDING: u32 = 0xC001_0055;
    pub const MMIO_CONF_BASE: u32 = 0xC001_0058;
    pub const TSEG_ADDRESS: u32 = 0xC001_0112;
    pub const TSEG_MASK: u32 = 0xC001_0113;
    pub const VM_CR: u32 = 0xC001_0114;
    pub const VM_HSAVE_PA: u32 = 0xC001_0117;
    pub const DC_CFG: u32 = 0xC001_1022;
    pub const DE_CFG: u32 = 0xC001_1029;
    pub const BU_CFG2: u32 = 0xC001_102A;
    pub const EX_CFG: u32 = 0xC001_102C;
}
pub(crate) use number::TSC;
use number::*;

/// MTRRs: WC is supported, there are fixed ranges, and eight variable ones.
const MTRR_CAP_VALUE: u64 = 1 << 10 | 1 << 8 | 8;
/// MTRRs on, everything write-back, as firmware would leave it.
const MTRR_DEF_TYPE_FIRMWARE: u64 = 1 << 11 | 6;
/// The memory types after power-up (SDM volume 3, 12.12.4).
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// Fast string operations.
const MISC_ENABLE_RESET: u64 = 1;
/// PLATFORM_INFO: CPUID faulting is supported.
const CPUID_FAULTING: u64 = 1 << 31;
/// DE_CFG: LFENCE serialises, as it does here.
const LFENCE_SERIALISES: u64 = 1 << 1;
/// DEBUGCTL: last-branch records and single-step on branches, which are accepted and do nothing.
const DEBUGCTL_ACCEPTED: u64 = 3;
/// HWCR: bits that may be set without effect: the filters of TLB flushes and of cache flushes.
const HWCR_IGNORED: u64 = 1 << 3 | 1 << 6 | 1 << 8;

/// EFER: bits and the features that they need.
const EFER_FEATURES: &[(u64, Bit)] = &[
    (efer::SCE, feature::SYSCALL),
    (efer::LME | efer::LMA, feature::LM),
    (efer::NXE, feature::NX),
];

/// The values.
#[derive(Debug, Clone)]
pub(crate) struct Msrs {
    /// Guest TSC less the clock's, modulo 2^64.
    pub tsc_offset: u64,
    tsc_adjust: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pat: u64,
    misc_enable: u64,
    misc_features: u64,
    debugctl: u64,
    mcg_status: u64,
    mtrr_def_type: u64,
    /// Base and mask by turns.
    mtrr_variable: [u64; 16],
    /// One of 64 KiB, two of 16 KiB, eight of 4 KiB ranges.
    mtrr_fixed: [u64; 11],
    wall_clock: u64,
    system_time: u64,
    steal_time: u64,
    pub pv_eoi: PvEoi,
    /// The setting of the paravirtual clock that the guest was told; 0 if none.
    pub clock_generation: u32,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            tsc_offset: 0,
            tsc_adjust: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_aux: 0,
            pat: PAT_RESET,
            misc_enable: MISC_ENABLE_RESET,
            misc_features: 0,
            debugctl: 0,
            mcg_status: 0,
            mtrr_def_type: MTRR_DEF_TYPE_FIRMWARE,
            mtrr_variable: [0; 16],
            mtrr_fixed: [0; 11],
            wall_clock: 0,
            system_time: 0,
            steal_time: 0,
            pv_eoi: PvEoi::default(),
            clock_generation: 0,
        }
    }
}

impl Msrs {
    /// INIT: the paravirtual structures are given up, since what starts next may use their memory
    /// for anything.
    pub(crate) fn init(&mut self) {
        self.wall_clock = 0;
        self.system_time = 0;
        self.steal_time = 0;
        self.pv_eoi = PvEoi::default();
    }
}

/// The MSRs that make up saved state, apart from those that have a field of their own there. The
/// TSC comes before TSC_ADJUST.
const SAVED: &[u32] = &[
    TSC,
    TSC_ADJUST,
    TSC_AUX,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
    KERNEL_GS_BASE,
    PAT,
    MISC_ENABLE,
    MISC_FEATURES,
    DEBUGCTL,
    MCG_STATUS,
    MTRR_DEF_TYPE,
    MSR_WALL_CLOCK,
    MSR_SYSTEM_TIME,
    MSR_STEAL_TIME,
    MSR_PV_EOI,
    TSC_DEADLINE,
];

/// All MSRs of saved state.
pub(crate) fn saved() -> impl Iterator<Item = u32> {
    let mtrrs = (MTRR_VARIABLE..=MTRR_VARIABLE_END)
        .chain([MTRR_FIX_64K])
        .chain(MTRR_FIX_16K..=MTRR_FIX_16K_END)
        .chain(MTRR_FIX_4K..=MTRR_FIX_4K_END);
    SAVED.iter().copied().chain(mtrrs)
}

/// Place of a fixed-range MTRR in [`Msrs::mtrr_fixed`].
fn fixed_range(index: u32) -> usize {
    match index {
        MTRR_FIX_64K => 0,
        MTRR_FIX_16K..=MTRR_FIX_16K_END => 1 + (index - MTRR_FIX_16K) as usize,
        _ => 3 + (index - MTRR_FIX_4K) as usize,
    }
}

/// Memory types that MTRRs know: uncacheable, write-combining, write-through, write-protected,
/// write-back.
fn is_mtrr_type(value: u64) -> bool {
    matches!(value & 0xFF, 0 | 1 | 4 | 5 | 6)
}

/// The PAT also knows "uncached".
fn is_pat_type(value: u8) -> bool {
    value == 7 || is_mtrr_type(value.into())
}

impl Cpu {
    /// RDMSR; `None` raises #GP.
    pub(crate) fn read_msr(&mut self, index: u32) -> Option<u64> {
        let m = &self.msrs;
        Some(match index {
            TSC => self.shared.clock.tsc(m.tsc_offset),
            TSC_ADJUST if self.cpuid.offers(feature::TSC_ADJUST) => m.tsc_adjust,
            APIC_BASE => self.apic.base(),
            TSC_DEADLINE => {
                let now = self.apic_now();
                self.apic.tsc_deadline(now).ok()?
            }
            X2APIC..=X2APIC_END => {
                let now = self.apic_now();
                self.apic.read_msr(index, now).ok()?
            }
            EFER => self.efer,
            STAR => m.star,
            LSTAR => m.lstar,
            CSTAR => m.cstar,
            SFMASK => m.sfmask,
            FS_BASE => self.segments[seg::FS].base,
            GS_BASE => self.segments[seg::GS].base,
            KERNEL_GS_BASE => m.kernel_gs_base,
            TSC_AUX if self.has_tsc_aux() => m.tsc_aux,
            SYSENTER_CS => m.sysenter_cs,
            SYSENTER_ESP => m.sysenter_esp,
            SYSENTER_EIP => m.sysenter_eip,
            PAT => m.pat,
            MISC_ENABLE => m.misc_enable,
            MISC_FEATURES => m.misc_features,
            DEBUGCTL => m.debugctl,
            MCG_STATUS => m.mcg_status,
            MTRR_CAP => MTRR_CAP_VALUE,
            MTRR_DEF_TYPE => m.mtrr_def_type,
            MTRR_VARIABLE..=MTRR_VARIABLE_END => m.mtrr_variable[(index - MTRR_VARIABLE) as usize],
            MTRR_FIX_64K | MTRR_FIX_16K..=MTRR_FIX_16K_END | MTRR_FIX_4K..=MTRR_FIX_4K_END => {
                m.mtrr_fixed[fixed_range(index)]
            }
            WALL_CLOCK_OLD if self.cpuid.offers(feature::KVM_CLOCK_OLD) => m.wall_clock,
            SYSTEM_TIME_OLD if self.cpuid.offers(feature::KVM_CLOCK_OLD) => m.system_time,
            MSR_WALL_CLOCK if self.cpuid.offers(feature::KVM_CLOCK) => m.wall_clock,
            MSR_SYSTEM_TIME if self.cpuid.offers(feature::KVM_CLOCK) => m.system_time,
            MSR_STEAL_TIME if self.cpuid.offers(feature::KVM_STEAL_TIME) => m.steal_time,
            MSR_PV_EOI if self.cpuid.offers(feature::KVM_PV_EOI) => m.pv_eoi.msr(),
            // No machine-check bank, no global control register.
            MCG_CAP => 0,
            PLATFORM_INFO => CPUID_FAULTING,
            DE_CFG => LFENCE_SERIALISES,
            // Revisions that no guest takes for one with errata, as KVM answers.
            UCODE_REV if self.cpuid.is_intel() => 1 << 32,
            UCODE_REV => 0x0100_0065,
            EBC_FREQUENCY_ID => 1 << 24,
            PERF_STATUS => 4 << 40 | 1000,
            BBL_CR_CTL3 => 0xBE70_2111,
            K7_CLK_CTL => 0x2000_0000,
            P5_MC_ADDR | P5_MC_TYPE | PLATFORM_ID | EBL_CR_POWERON | SMI_COUNT | UCODE_WRITE
            | PERF_CTL => 0,
            P6_PERFCTR0 | P6_PERFCTR1 | P6_EVNTSEL0 | P6_EVNTSEL1 => 0,
            LAST_BRANCH_FROM..=LAST_EXCEPTION_TO => 0,
            RAPL_POWER_UNIT | PKG_ENERGY_STATUS | DRAM_ENERGY_STATUS | PP0_ENERGY_STATUS
            | PP1_ENERGY_STATUS => 0,
            K7_EVNTSEL0..=K7_PERFCTR3 => 0,
            SYSCFG | HWCR | NB_CFG | INT_PENDING | MMIO_CONF_BASE | TSEG_ADDRESS | TSEG_MASK
            | VM_CR | VM_HSAVE_PA | DC_CFG | BU_CFG2 | EX_CFG => 0,
            _ => return None,
        })
    }

    /// WRMSR; `None` raises #GP and nothing has changed.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        let good = |condition: bool| condition.then_some(());
        match index {
            TSC => {
                let old = self.shared.clock.tsc(self.msrs.tsc_offset);
                self.move_tsc(value.wrapping_sub(old));
            }
            TSC_ADJUST if self.cpuid.offers(feature::TSC_ADJUST) => {
                self.move_tsc(value.wrapping_sub(self.msrs.tsc_adjust));
            }
            APIC_BASE => {
                self.settle_pv_eoi();
                self.apic.set_base(value).ok()?;
                self.apic_written();
            }
            TSC_DEADLINE => {
                let now = self.apic_now();
                self.apic.set_tsc_deadline(value, now).ok()?;
                self.apic_written();
            }
            X2APIC..=X2APIC_END => {
                let now = self.apic_now();
                self.apic.write_msr(index, value, now).ok()?;
                self.apic_written();
            }
            EFER => self.write_efer(value)?,
            STAR => self.msrs.star = value,
            LSTAR => {
                good(is_canonical(value))?;
                self.msrs.lstar = value;
            }
            CSTAR => {
                good(is_canonical(value))?;
                self.msrs.cstar = value;
            }
            SFMASK => self.msrs.sfmask = value,
            FS_BASE | GS_BASE => {
                good(is_canonical(value))?;
                let number = if index == FS_BASE { seg::FS } else { seg::GS };
                self.segments[number].base = value;
                self.update_bases();
            }
            KERNEL_GS_BASE => {
                good(is_canonical(value))?;
                self.msrs.kernel_gs_base = value;
            }
            TSC_AUX if self.has_tsc_aux() => {
                good(value >> 32 == 0)?;
                self.msrs.tsc_aux = value;
            }
            SYSENTER_CS => self.msrs.sysenter_cs = value & 0xFFFF_FFFF,
            SYSENTER_ESP => {
                good(is_canonical(value))?;
                self.msrs.sysenter_esp = value;
            }
            SYSENTER_EIP => {
                good(is_canonical(value))?;
                self.msrs.sysenter_eip = value;
            }
            PAT => {
                good(value.to_le_bytes().into_iter().all(is_pat_type))?;
                self.msrs.pat = value;
            }
            MISC_ENABLE => self.msrs.misc_enable = value,
            MISC_FEATURES => {
                good(value & !1 == 0)?;
                self.msrs.misc_features = value;
            }
            DEBUGCTL => {
                good(value & !DEBUGCTL_ACCEPTED == 0)?;
                self.msrs.debugctl = value;
            }
            MCG_STATUS => self.msrs.mcg_status = value,
            MTRR_DEF_TYPE => {
                good(value & !0xCFF == 0 && is_mtrr_type(value))?;
                self.msrs.mtrr_def_type = value;
            }
            MTRR_VARIABLE..=MTRR_VARIABLE_END => {
                let number = (index - MTRR_VARIABLE) as usize;
                let reserved = u64::MAX << self.cpuid.physical_bits();
                // Even: base and type; odd: mask and the valid bit.
                let low = if number.is_multiple_of(2) {
                    0xF00
                } else {
                    0x7FF
                };
                good(value & (reserved | low) == 0)?;
                good(!number.is_multiple_of(2) || is_mtrr_type(value))?;
                self.msrs.mtrr_variable[number] = value;
            }
            MTRR_FIX_64K | MTRR_FIX_16K..=MTRR_FIX_16K_END | MTRR_FIX_4K..=MTRR_FIX_4K_END => {
                good(
                    value
                        .to_le_bytes()
                        .into_iter()
                        .all(|t| is_mtrr_type(t.into())),
                )?;
                self.msrs.mtrr_fixed[fixed_range(index)] = value;
            }
            WALL_CLOCK_OLD if self.cpuid.offers(feature::KVM_CLOCK_OLD) => {
                self.write_wall_clock(value);
            }
            MSR_WALL_CLOCK if self.cpuid.offers(feature::KVM_CLOCK) => self.write_wall_clock(value),
            SYSTEM_TIME_OLD if self.cpuid.offers(feature::KVM_CLOCK_OLD) => {
                self.msrs.system_time = value;
                self.write_system_time();
            }
            MSR_SYSTEM_TIME if self.cpuid.offers(feature::KVM_CLOCK) => {
                self.msrs.system_time = value;
                self.write_system_time();
            }
            MSR_STEAL_TIME if self.cpuid.offers(feature::KVM_STEAL_TIME) => {
                let address = pv::steal_time_address(value).ok()?;
                self.msrs.steal_time = value;
                if let Some(address) = address {
                    self.write_steal_time(address);
                }
            }
            MSR_PV_EOI if self.cpuid.offers(feature::KVM_PV_EOI) => {
                self.settle_pv_eoi();
                self.msrs.pv_eoi.set_msr(value).ok()?;
            }
            DE_CFG => good(value == LFENCE_SERIALISES)?,
            HWCR => good(value & !HWCR_IGNORED == 0)?,
            // What a guest may write without effect, as under KVM.
            UCODE_WRITE | UCODE_REV | BBL_CR_CTL3 | NB_CFG | PATCH_LOADER | BU_CFG2 | DC_CFG
            | EX_CFG | VM_HSAVE_PA | PERF_CTL | K7_CLK_CTL => {}
            P5_MC_ADDR | P5_MC_TYPE | PLATFORM_ID | EBL_CR_POWERON | EBC_FREQUENCY_ID => {}
            P6_PERFCTR0 | P6_PERFCTR1 | P6_EVNTSEL0 | P6_EVNTSEL1 => {}
            K7_EVNTSEL0..=K7_PERFCTR3 => {}
            SYSCFG | INT_PENDING | MMIO_CONF_BASE => good(value == 0)?,
            _ => return None,
        }
        Some(())
    }

    /// Restores an MSR of saved state. Unlike [`write_msr`](Self::write_msr) it has no effect on
    /// guest memory, which holds already what a write had put there.
    pub(crate) fn restore_msr(&mut self, index: u32, value: u64) -> Option<()> {
        match index {
            TSC => {
                self.msrs.tsc_offset = self.shared.clock.restored_offset(value);
                // The origin of the clock that the guest was told is another VM's.
                self.msrs.clock_generation = 0;
            }
            TSC_ADJUST => self.msrs.tsc_adjust = value,
            WALL_CLOCK_OLD | MSR_WALL_CLOCK => self.msrs.wall_clock = value,
            SYSTEM_TIME_OLD | MSR_SYSTEM_TIME => {
                self.msrs.system_time = value;
                self.msrs.clock_generation = 0;
            }
            MSR_STEAL_TIME => {
                pv::steal_time_address(value).ok()?;
                self.msrs.steal_time = value;
            }
            MSR_PV_EOI => self.msrs.pv_eoi.set_msr(value).ok()?,
            _ => self.write_msr(index, value)?,
        }
        Some(())
    }

    /// CPUID is reserved to privilege level 0 (SDM volume 4, MISC_FEATURES_ENABLES).
    pub(crate) fn cpuid_faults(&self) -> bool {
        self.msrs.misc_features & 1 != 0
    }

    /// Adds to the TSC and to TSC_ADJUST.
    fn move_tsc(&mut self, by: u64) {
        let m = &mut self.msrs;
        m.tsc_offset = m.tsc_offset.wrapping_add(by);
        m.tsc_adjust = m.tsc_adjust.wrapping_add(by);
        self.write_system_time();
        self.apic_written();
    }

    /// RDTSCP or RDPID are there.
    fn has_tsc_aux(&self) -> bool {
        self.cpuid.offers(feature::RDTSCP) || self.cpuid.offers(feature::RDPID)
    }

    /// EFER (SDM volume 3, 2.2.1).
    fn write_efer(&mut self, value: u64) -> Option<()> {
        let changed = self.efer ^ value;
        let bad =
            !self.is_offered_efer(value) || changed & efer::LME != 0 && self.cr0 & cr0::PG != 0;
        if bad {
            return None;
        }
        let value = value & !efer::LMA | self.efer & efer::LMA;
        self.mmu.set_control(self.cr0, self.cr4, value).ok()?;
        self.efer = value;
        self.blocks.new_epoch();
        self.leave_block = true;
        Some(())
    }

    /// Whether EFER has no bit that the CPU model lacks.
    pub(crate) fn is_offered_efer(&self, value: u64) -> bool {
        self.cpuid.allows(value, EFER_FEATURES)
    }

    /// Writes the paravirtual wall clock to guest memory, once.
    fn write_wall_clock(&mut self, address: u64) {
        self.msrs.wall_clock = address;
        if address == 0 {
            return;
        }
        let clock = WallClock::new(clock::time_of_day(), self.shared.clock.nanoseconds());
        let Some(old) = self.read_word(address) else {
            return;
        };
        clock.store(old, |at, bytes| self.write_guest(address, at, bytes));
    }

    /// Tells the guest its paravirtual clock.
    pub(crate) fn write_system_time(&mut self) {
        let clock = &self.shared.clock;
        self.msrs.clock_generation = clock.generation();
        let Some(address) = pv::enabled_address(self.msrs.system_time) else {
            return;
        };
        let time: SystemTime = clock.system_time(self.msrs.tsc_offset);
        let Some(old) = self.read_word(address) else {
            return;
        };
        time.store(old, |at, bytes| self.write_guest(address, at, bytes));
    }

    /// Fills in the stolen time. It is always none: what the host's scheduler took from this CPU's
    /// thread can be known only by a system call, and a guest manages well without.
    fn write_steal_time(&mut self, address: u64) {
        /// Where the version lies.
        const VERSION: u64 = 8;
        let time = StealTime {
            stolen: 0,
            preempted: false,
        };
        let Some(old) = self.read_word(address.wrapping_add(VERSION)) else {
            return;
        };
        time.store(old, |at, bytes| self.write_guest(address, at, bytes));
    }

    /// 32 bits of guest-physical memory, if there is memory.
    fn read_word(&mut self, address: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        let there = self.mmu.read_physical(address, &mut bytes);
        there.then(|| u32::from_le_bytes(bytes))
    }

    /// Writes to guest-physical memory; a place that is not memory takes nothing.
    fn write_guest(&mut self, address: u64, at: usize, bytes: &[u8]) {
        self.mmu
            .write_physical(address.wrapping_add(at as u64), bytes);
    }

    /// #GP(0) if CR4.TSD keeps the TSC from this privilege level.
    fn check_tsc(&mut self) -> Exec {
        if self.cr4 & cr4::TSD != 0 && self.cpl != 0 {
            return Err(self.gp());
        }
        Ok(())
    }

    /// Sets EDX:EAX.
    pub(crate) fn set_edx_eax(&mut self, value: u64) {
        self.set_gpr(reg::RAX, value & 0xFFFF_FFFF);
        self.set_gpr(reg::RDX, value >> 32);
    }
}

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        Mnemonic::Rdtsc => rdtsc,
        Mnemonic::Rdtscp => rdtscp,
        Mnemonic::Rdpid => rdpid,
        Mnemonic::Rdpmc => rdpmc,
        _ => return None,
    })
}

/// Kernels ask for MSRs that are not there and are prepared for it, so this is no warning.
static MSR_LOG: Limiter = Limiter::new();

fn rdmsr(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let index = cpu.gpr(reg::RCX) as u32;
    match cpu.read_msr(index) {
        Some(value) => {
            cpu.set_edx_eax(value);
            Ok(())
        }
        None => {
            if MSR_LOG.allow().is_some() {
                log::debug!("CPU {}: read of MSR {index:#x}: #GP", cpu.index);
            }
            Err(cpu.gp())
        }
    }
}

fn wrmsr(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let index = cpu.gpr(reg::RCX) as u32;
    let value = cpu.gpr(reg::RAX) & 0xFFFF_FFFF | cpu.gpr(reg::RDX) << 32;
    match cpu.write_msr(index, value) {
        Some(()) => Ok(()),
        None => {
            if MSR_LOG.allow().is_some() {
                let cpu = cpu.index;
                log::debug!("CPU {cpu}: write of {value:#x} to MSR {index:#x}: #GP");
            }
            Err(cpu.gp())
        }
    }
}

/// The TSC, read after all that came before.
fn ordered_tsc(cpu: &Cpu) -> u64 {
    // SAFETY: part of SSE2, which every x86-64 CPU has.
    unsafe { _mm_lfence() };
    cpu.shared.clock.tsc(cpu.msrs.tsc_offset)
}

fn rdtsc(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_tsc()?;
    let tsc = ordered_tsc(cpu);
    cpu.set_edx_eax(tsc);
    Ok(())
}

fn rdtscp(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_tsc()?;
    let tsc = ordered_tsc(cpu);
    cpu.set_edx_eax(tsc);
    cpu.set_gpr(reg::RCX, cpu.msrs.tsc_aux);
    Ok(())
}

fn rdpid(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    cpu.write_register(instruction.op0_register(), cpu.msrs.tsc_aux);
    Ok(())
}

/// There are no performance counters, so every number of one is wrong.
fn rdpmc(cpu: &mut Cpu, _: &Instruction) -> Exec {
    Err(cpu.gp())
}
