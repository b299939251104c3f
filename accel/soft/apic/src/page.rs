//! The register page as saved state, laid out as KVM_GET_LAPIC does.

use anemone_accel_api::LapicState;

use crate::mode::{self, Mode};
use crate::registers::reg;
use crate::timer::{Now, TimerMode};
use crate::vectors::Vectors;
use crate::{Apic, GeneralProtection};

impl Apic {
    /// The registers as of `now`, inbox included. Registers that software cannot read are zero.
    ///
    /// Beside the page the state has IA32_APIC_BASE ([`base`](Self::base)), IA32_TSC_DEADLINE
    /// ([`tsc_deadline`](Self::tsc_deadline)) and the [`Events`](crate::Events) of a last
    /// [`poll`](Self::poll). The id is in bits 31:24 in x2APIC mode too, and the destination of
    /// the ICR is a register of its own. Errors not yet latched in the ESR are lost.
    pub fn page(&mut self, now: Now) -> LapicState {
        self.merge();
        self.advance(now);
        let mut page = LapicState(Box::new([0; 1024]));
        for register in 0..reg::SELF_IPI {
            let value = match register {
                reg::ID => self.id << 24,
                _ => self.read(register, now).unwrap_or(0),
            };
            let place = register as usize * 16;
            page.0[place..place + 4].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    /// Restores IA32_APIC_BASE. Any mode may follow any other; otherwise as
    /// [`set_base`](Self::set_base). To be called before [`set_page`](Self::set_page).
    ///
    /// # Errors
    /// Reserved bits, or x2APIC mode without enable.
    pub fn restore_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        mode::check(value, &self.apics.features)?;
        self.base = value;
        self.changed();
        Ok(())
    }

    /// Restores what [`page`](Self::page) returned, or KVM. What was on its way is dropped.
    /// The id, the version and bits that software cannot set are not taken from the page.
    pub fn set_page(&mut self, page: &LapicState, now: Now) {
        let value = |register: u32| {
            let place = register as usize * 16;
            u32::from_le_bytes(std::array::from_fn(|i| page.0[place + i]))
        };
        let vectors = |first: u32| {
            let mut set = Vectors::default();
            (0..8).for_each(|i| set.set_word(i, value(first + i)));
            set
        };
        self.init();
        // The divisor before the count that it scales, the enable bit before the LVT entries
        // that it would mask, and the timer's entry before its count.
        for register in [reg::TPR, reg::SVR, reg::DIVIDE] {
            self.write(register, value(register), now);
        }
        for register in reg::LVT..=reg::LVT_END {
            self.write(register, value(register), now);
        }
        let mode = TimerMode::of(self.lvt[0]);
        let counts = (value(reg::INITIAL_COUNT), value(reg::CURRENT_COUNT));
        self.timer.resume(counts.0, counts.1, mode, now);
        if self.mode() != Mode::X2Apic {
            self.ldr = value(reg::LDR) & 0xFF00_0000;
        }
        self.dfr = value(reg::DFR) | 0x0FFF_FFFF;
        self.esr = value(reg::ESR);
        self.icr = u64::from(value(reg::ICR)) | u64::from(value(reg::ICR_HIGH)) << 32;
        self.isr = vectors(reg::ISR);
        self.tmr = vectors(reg::TMR);
        self.irr = vectors(reg::IRR);
        self.changed();
    }
}
