//! Between the CPU and its local APIC.

use anemone_soft_apic::{Deadline, Now};

use crate::cpu::Cpu;
use crate::signals::ATTENTION_APIC;

/// The bit of the paravirtual end of interrupt.
const PV_EOI: u8 = 1;

impl Cpu {
    /// To be called after anything that may have changed the APIC timer: computes
    /// [`Cpu::deadline_tsc`].
    pub(crate) fn apic_changed(&mut self) {
        self.deadline_tsc = match self.apic.next_deadline() {
            None => u64::MAX,
            Some(Deadline::Tsc(at)) => at,
            Some(Deadline::Bus(at)) => {
                let clock = &self.shared.clock;
                let now = clock.now_with(self.msrs.tsc_offset);
                let left = clock.nanoseconds_to_ticks(at.saturating_sub(now.bus));
                now.tsc.saturating_add(left)
            }
        };
    }

    /// To be called after a write to the APIC: what it sent to itself or unmasked is taken before
    /// the next block.
    pub(crate) fn apic_written(&mut self) {
        self.apic_changed();
        if self.apic.pending() || self.apic.attention() {
            self.signals.raise(ATTENTION_APIC);
            self.leave_block = true;
        }
    }

    /// The time, for an access to the APIC. Ends the interrupt that the guest has ended in memory before: the
    /// timer may expire by this very access, and its interrupt would be held back by one that is over.
    pub(crate) fn apic_now(&mut self) -> Now {
        self.settle_pv_eoi();
        self.shared.clock.now_with(self.msrs.tsc_offset)
    }

    /// Ends the interrupt in service if the guest said so in memory. Before every look at the APIC.
    pub(crate) fn settle_pv_eoi(&mut self) {
        let Some(address) = self.msrs.pv_eoi.offered() else {
            return;
        };
        let mut byte = [PV_EOI];
        // Where there is no memory, nothing was offered: the guest ends the interrupt by the register.
        let there = self.mmu.read_physical(address, &mut byte);
        let still = byte[0] & PV_EOI != 0;
        if there && still {
            self.mmu.write_physical(address, &[byte[0] & !PV_EOI]);
        }
        self.msrs.pv_eoi.settle(&mut self.apic, still);
    }

    /// Before guest code runs: lets the guest end an interrupt by a flag in memory where that is
    /// enough, and tells it the clock if that was set.
    pub(crate) fn offer_pv_eoi(&mut self) {
        if let Some(address) = self.msrs.pv_eoi.offer(&self.apic) {
            let mut byte = [0];
            if self.mmu.read_physical(address, &mut byte) {
                self.mmu.write_physical(address, &[byte[0] | PV_EOI]);
            }
        }
        if self.msrs.clock_generation != self.shared.clock.generation() {
            self.write_system_time();
        }
    }
}
