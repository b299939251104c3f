//! The register file: MMIO in xAPIC mode, MSRs in x2APIC mode (SDM tables 11-1 and 11-6).

use crate::mode::Mode;
use crate::router::logical_x2apic_id;
use crate::timer::{Now, TimerMode};
use crate::{Apic, GeneralProtection};

/// Number of a register: MMIO offset divided by 16, or MSR number less 0x800.
pub(crate) mod reg {
    pub(crate) const ID: u32 = 0x02;
    pub(crate) const VERSION: u32 = 0x03;
    pub(crate) const TPR: u32 = 0x08;
    pub(crate) const APR: u32 = 0x09;
    pub(crate) const PPR: u32 = 0x0A;
    pub(crate) const EOI: u32 = 0x0B;
    pub(crate) const RRD: u32 = 0x0C;
    pub(crate) const LDR: u32 = 0x0D;
    pub(crate) const DFR: u32 = 0x0E;
    pub(crate) const SVR: u32 = 0x0F;
    pub(crate) const ISR: u32 = 0x10;
    pub(crate) const ISR_END: u32 = 0x17;
    pub(crate) const TMR: u32 = 0x18;
    pub(crate) const TMR_END: u32 = 0x1F;
    pub(crate) const IRR: u32 = 0x20;
    pub(crate) const IRR_END: u32 = 0x27;
    pub(crate) const ESR: u32 = 0x28;
    pub(crate) const ICR: u32 = 0x30;
    pub(crate) const ICR_HIGH: u32 = 0x31;
    pub(crate) const LVT: u32 = 0x32;
    pub(crate) const LVT_END: u32 = 0x37;
    pub(crate) const INITIAL_COUNT: u32 = 0x38;
    pub(crate) const CURRENT_COUNT: u32 = 0x39;
    pub(crate) const DIVIDE: u32 = 0x3E;
    pub(crate) const SELF_IPI: u32 = 0x3F;
}

/// First MSR of x2APIC mode.
const MSR_FIRST: u32 = 0x800;

/// Entries of the local vector table, in register order: timer, thermal sensor, performance
/// counters, LINT0, LINT1, error.
pub(crate) const LVT_COUNT: usize = 6;
pub(crate) const LVT_TIMER: usize = 0;
pub(crate) const LVT_ERROR: usize = 5;
pub(crate) const LVT_MASKED: u32 = 1 << 16;
/// Bits of each entry that software may set.
const LVT_WRITABLE: [u32; LVT_COUNT] = [
    0x7_00FF, // vector, mask, mode
    0x1_07FF, // vector, delivery mode, mask
    0x1_07FF, 0x1_A7FF, // and polarity and trigger mode
    0x1_A7FF, 0x1_00FF,
];
/// Delivery status and remote IRR: read-only, so a value that was read may be written back.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;
/// Bit 18: the TSC-deadline mode, where the CPU has it.
const LVT_TSC_DEADLINE: u32 = 1 << 18;

pub(crate) const SVR_VECTOR: u32 = 0xFF;
pub(crate) const SVR_ENABLE: u32 = 1 << 8;
pub(crate) const SVR_SUPPRESS_EOI: u32 = 1 << 12;
/// Vector, enable, focus checking (without effect).
const SVR_WRITABLE: u32 = 0x3FF;

pub(crate) const ESR_SEND_ILLEGAL: u32 = 1 << 5;
pub(crate) const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Version 0x14, highest LVT entry 5.
const VERSION: u32 = 0x0005_0014;
/// The version register announces SVR bit 12.
const VERSION_SUPPRESS_EOI: u32 = 1 << 24;

/// Shorthand, trigger, level, destination mode, delivery mode, vector.
const ICR_WRITABLE: u32 = 0x000C_CFFF;
/// Delivery status: nothing ever waits, so it reads 0; writes of it are ignored.
const ICR_STATUS: u32 = 1 << 12;

impl Apic {
    /// Reads `data` (1 to 8 bytes) at `offset` into the register page. Software must use
    /// aligned 32-bit accesses (SDM 11.4.1.2); others get the bytes that lie there. Not in
    /// xAPIC mode: all-ones.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8], now: Now) {
        if self.mode() != Mode::XApic {
            return data.fill(0xFF);
        }
        let value = match self.read(register(offset), now) {
            Some(value) => value,
            None => {
                self.error(ESR_ILLEGAL_REGISTER);
                0
            }
        };
        let bytes = value.to_le_bytes();
        for (place, byte) in data.iter_mut().enumerate() {
            let place = place.saturating_add((offset & 0xF) as usize);
            *byte = bytes.get(place).copied().unwrap_or(0);
        }
    }

    /// Writes at `offset` into the register page. Accesses other than aligned 32-bit ones, to
    /// read-only registers or not in xAPIC mode are dropped.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8], now: Now) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        if offset & 0xF != 0 || self.mode() != Mode::XApic {
            return;
        }
        let (register, value) = (register(offset), u32::from_le_bytes(bytes));
        match register {
            reg::ICR_HIGH => {
                self.icr = self.icr & 0xFFFF_FFFF | u64::from(value & 0xFF00_0000) << 32;
            }
            reg::ICR => {
                self.icr = self.icr & !0xFFFF_FFFF | u64::from(value & ICR_WRITABLE);
                self.send_icr();
            }
            reg::EOI => self.end_of_interrupt(),
            reg::LDR => {
                self.ldr = value & 0xFF00_0000;
                self.changed();
            }
            reg::DFR => {
                self.dfr = value | 0x0FFF_FFFF;
                self.changed();
            }
            reg::ESR => self.latch_errors(),
            _ => match self.writable(register) {
                Some(_) => self.write(register, value, now),
                None if self.read(register, now).is_none() => self.error(ESR_ILLEGAL_REGISTER),
                None => {}
            },
        }
    }

    /// RDMSR of 0x800 to 0x8FF.
    ///
    /// # Errors
    /// Not in x2APIC mode; reserved or write-only register.
    pub fn read_msr(&mut self, msr: u32, now: Now) -> Result<u64, GeneralProtection> {
        let register = self.msr_register(msr)?;
        match register {
            reg::ICR => Ok(self.icr),
            reg::APR | reg::EOI | reg::RRD | reg::DFR | reg::ICR_HIGH => Err(GeneralProtection),
            _ => self
                .read(register, now)
                .map(u64::from)
                .ok_or(GeneralProtection),
        }
    }

    /// WRMSR of 0x800 to 0x8FF.
    ///
    /// # Errors
    /// Not in x2APIC mode; reserved or read-only register; reserved bits set.
    pub fn write_msr(&mut self, msr: u32, value: u64, now: Now) -> Result<(), GeneralProtection> {
        let register = self.msr_register(msr)?;
        if register == reg::ICR {
            let reserved = !(ICR_WRITABLE | ICR_STATUS);
            if value as u32 & reserved != 0 {
                return Err(GeneralProtection);
            }
            self.icr = value & !u64::from(ICR_STATUS);
            self.send_icr();
            return Ok(());
        }
        let value = u32::try_from(value).map_err(|_| GeneralProtection)?;
        let allowed = match register {
            reg::EOI | reg::ESR => 0,
            reg::SELF_IPI => 0xFF,
            reg::LVT..=reg::LVT_END => {
                self.writable(register).ok_or(GeneralProtection)? | LVT_READ_ONLY
            }
            _ => self.writable(register).ok_or(GeneralProtection)?,
        };
        if value & !allowed != 0 {
            return Err(GeneralProtection);
        }
        match register {
            reg::EOI => self.end_of_interrupt(),
            reg::ESR => self.latch_errors(),
            reg::SELF_IPI => self.send_self_ipi(value as u8),
            _ => self.write(register, value, now),
        }
        Ok(())
    }

    /// RDMSR of IA32_TSC_DEADLINE (0x6E0): zero unless armed in TSC-deadline mode (SDM 11.5.4.1).
    ///
    /// # Errors
    /// The CPU model does not have it.
    pub fn tsc_deadline(&mut self, now: Now) -> Result<u64, GeneralProtection> {
        self.check_tsc_deadline()?;
        self.advance(now);
        Ok(self.timer.tsc_deadline())
    }

    /// WRMSR of IA32_TSC_DEADLINE: arms the timer, or disarms it with zero. Ignored in other
    /// modes of the timer.
    ///
    /// # Errors
    /// The CPU model does not have it.
    pub fn set_tsc_deadline(&mut self, value: u64, now: Now) -> Result<(), GeneralProtection> {
        self.check_tsc_deadline()?;
        self.advance(now);
        if TimerMode::of(self.lvt[LVT_TIMER]) == TimerMode::TscDeadline {
            self.timer.set_tsc_deadline(value);
            self.advance(now);
        }
        Ok(())
    }

    fn check_tsc_deadline(&self) -> Result<(), GeneralProtection> {
        if self.apics.features.tsc_deadline {
            Ok(())
        } else {
            Err(GeneralProtection)
        }
    }

    fn msr_register(&self, msr: u32) -> Result<u32, GeneralProtection> {
        let register = msr.wrapping_sub(MSR_FIRST);
        if self.mode() == Mode::X2Apic && register < 0x100 {
            Ok(register)
        } else {
            Err(GeneralProtection)
        }
    }

    /// A register's value; `None` if there is no such register.
    pub(crate) fn read(&mut self, register: u32, now: Now) -> Option<u32> {
        Some(match register {
            reg::ID if self.mode() == Mode::X2Apic => self.id,
            reg::ID => self.id << 24,
            reg::VERSION if self.apics.features.x2apic => VERSION | VERSION_SUPPRESS_EOI,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr.into(),
            reg::PPR => self.ppr().into(),
            reg::APR | reg::RRD | reg::EOI => 0,
            reg::LDR if self.mode() == Mode::X2Apic => logical_x2apic_id(self.id),
            reg::LDR => self.ldr,
            reg::DFR => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..=reg::ISR_END => self.isr.word(register - reg::ISR),
            reg::TMR..=reg::TMR_END => {
                self.merge();
                self.tmr.word(register - reg::TMR)
            }
            reg::IRR..=reg::IRR_END => {
                self.merge();
                self.advance(now);
                self.irr.word(register - reg::IRR)
            }
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR_HIGH => (self.icr >> 32) as u32,
            reg::LVT..=reg::LVT_END => self.lvt[(register - reg::LVT) as usize],
            reg::INITIAL_COUNT => self.timer.initial(),
            reg::CURRENT_COUNT => {
                self.advance(now);
                self.timer.current(now)
            }
            reg::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    /// The bits that software may set in a register that is plainly stored; `None` for others.
    fn writable(&self, register: u32) -> Option<u32> {
        Some(match register {
            reg::TPR => 0xFF,
            reg::SVR if self.apics.features.x2apic => SVR_WRITABLE | SVR_SUPPRESS_EOI,
            reg::SVR => SVR_WRITABLE,
            reg::LVT if !self.apics.features.tsc_deadline => LVT_WRITABLE[0] & !LVT_TSC_DEADLINE,
            reg::LVT..=reg::LVT_END => LVT_WRITABLE[(register - reg::LVT) as usize],
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => 0b1011,
            _ => return None,
        })
    }

    /// Stores into a register that [`writable`](Self::writable) knows.
    pub(crate) fn write(&mut self, register: u32, value: u32, now: Now) {
        let value = value & self.writable(register).unwrap_or(0);
        // What happened before this write happens by the settings before it.
        self.advance(now);
        let mode = TimerMode::of(self.lvt[LVT_TIMER]);
        match register {
            reg::TPR => self.set_tpr(value as u8),
            reg::SVR => {
                self.svr = value;
                if !self.software_enabled() {
                    // SDM 11.4.7.2: all entries are masked and stay so.
                    self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
                }
                self.changed();
            }
            reg::LVT..=reg::LVT_END => {
                let masked = if self.software_enabled() {
                    0
                } else {
                    LVT_MASKED
                };
                self.lvt[(register - reg::LVT) as usize] = value | masked;
                self.timer
                    .change_mode(mode, TimerMode::of(self.lvt[LVT_TIMER]));
            }
            reg::INITIAL_COUNT => self.timer.start(value, mode, now),
            reg::DIVIDE => self.timer.set_divide(value, now),
            _ => {}
        }
    }

    /// A write of the ESR shows the errors since the last one (SDM 11.5.3).
    fn latch_errors(&mut self) {
        self.esr = std::mem::take(&mut self.errors);
    }
}

/// The register at an offset; offsets outside the page are reserved registers.
fn register(offset: u64) -> u32 {
    u32::try_from(offset >> 4).unwrap_or(u32::MAX)
}
