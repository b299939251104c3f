//! Power-up, INIT and start-up (SDM volume 3, 9.1 and table 9-1).

#[cfg(test)]
mod tests;

use anemone_accel_api::{DescriptorTable, Segment};
use anemone_soft_mmu::{Paging, cr0};
use anemone_soft_native::{MXCSR_RESET, XSAVE_SIZE};

use crate::cpu::{Activity, Cpu, reg, rflags, seg};
use crate::system::{cpuid, msr::Msrs};

/// x87 control word after power-up, unlike that after FNINIT.
const FCW_POWER_UP: u16 = 0x40;
/// Where MXCSR lies in an XSAVE image, and the tags of the x87 registers.
const MXCSR: std::ops::Range<usize> = 24..28;
const FTW: usize = 4;

/// The segment of the reset vector.
const RESET_SELECTOR: u16 = 0xF000;
const RESET_BASE: u64 = 0xFFFF_0000;
const RESET_RIP: u64 = 0xFFF0;

/// A segment register after reset.
fn segment(kind: u8, code_or_data: bool) -> Segment {
    Segment {
        limit: 0xFFFF,
        kind,
        present: true,
        code_or_data,
        ..Segment::default()
    }
}

impl Cpu {
    /// The state after power-up. The local APIC is reset apart.
    pub(crate) fn reset(&mut self) {
        self.cr0 = cr0::CD | cr0::NW;
        self.xcr0 = 1;
        self.msrs = Msrs::default();
        let mut image = [0; XSAVE_SIZE];
        image[..2].copy_from_slice(&FCW_POWER_UP.to_le_bytes());
        // All registers hold zero rather than nothing.
        image[FTW] = 0xFF;
        image[MXCSR].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        if self.native.load_xsave_image(&image).is_err() {
            log::error!("CPU {}: MXCSR's reset value is refused", self.index);
        }
        self.init();
        self.activity = Activity::Running;
        // Until it runs, nobody is to wait for it.
        self.mmu.park();
    }

    /// The state after INIT: x87 and vector state, most MSRs and the cache bits of CR0 stay. The
    /// local APIC and what the CPU does then are the caller's.
    pub(crate) fn init(&mut self) {
        for number in 0..16 {
            self.set_gpr(number, 0);
        }
        self.set_gpr(reg::RDX, cpuid::answer(self, 1, 0)[0].into());
        self.set_gpr(reg::ZERO, 0);
        self.cr0 = self.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
        self.cr2 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.msrs.init();
        self.dr[..4].fill(0);
        self.set_dr6(0);
        self.set_dr7(0);
        for number in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            self.segments[number] = segment(3, true);
        }
        self.segments[seg::CS] = Segment {
            selector: RESET_SELECTOR,
            base: RESET_BASE,
            ..segment(0xB, true)
        };
        self.ldtr = segment(2, false);
        self.tr = segment(0xB, false);
        self.gdtr = DescriptorTable {
            base: 0,
            limit: 0xFFFF,
        };
        self.idtr = self.gdtr;
        self.set_rflags(rflags::FIXED);
        self.set_cpl(0);
        self.update_bases();
        let paging = Paging {
            cr0: self.cr0,
            ..Paging::default()
        };
        // Without paging there are no PDPTEs that could be refused.
        if self.mmu.set_paging(paging).is_err() {
            log::error!("CPU {}: paging cannot be switched off", self.index);
        }
        self.mmu.flush();
        self.blocks.new_epoch();
        self.rip = RESET_RIP;
        self.shadow = false;
        self.shadow_at = None;
        self.nmi_blocked = false;
        self.nmi_pending = false;
        self.stopped = None;
        self.leave_block = true;
    }

    /// Start-up message: real-address mode at a page below 1 MiB.
    pub(crate) fn startup(&mut self, page: u8) {
        self.segments[seg::CS] = Segment {
            selector: u16::from(page) << 8,
            base: u64::from(page) << 12,
            ..segment(0xB, true)
        };
        self.update_bases();
        self.rip = 0;
        self.activity = Activity::Running;
        self.leave_block = true;
    }
}
