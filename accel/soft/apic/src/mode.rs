//! IA32_APIC_BASE and the modes it selects (SDM 11.4.3, 11.4.4 and 11.12.5).

use crate::{Features, GeneralProtection};

/// Address of the register page after reset.
pub const DEFAULT_BASE: u64 = 0xFEE0_0000;
/// IA32_APIC_BASE bit 8: the bootstrap processor.
pub const BSP: u64 = 1 << 8;
/// IA32_APIC_BASE bit 10: x2APIC mode.
pub const BASE_EXTENDED: u64 = 1 << 10;
/// IA32_APIC_BASE bit 11: the APIC is there at all.
pub const BASE_ENABLE: u64 = 1 << 11;

/// How software reaches the registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Not at all; the CPU behaves as one without an APIC, and CPUID 1 EDX bit 9 must read 0.
    Disabled,
    /// As a page of memory.
    XApic,
    /// As MSRs 0x800 to 0x8FF.
    X2Apic,
}

impl Mode {
    /// The mode that a valid IA32_APIC_BASE selects.
    pub(crate) fn of(base: u64) -> Self {
        match (base & BASE_ENABLE != 0, base & BASE_EXTENDED != 0) {
            (true, true) => Self::X2Apic,
            (true, false) => Self::XApic,
            (false, _) => Self::Disabled,
        }
    }
}

/// Checks a value for IA32_APIC_BASE on its own: reserved bits, and x2APIC mode without enable.
pub(crate) fn check(value: u64, features: &Features) -> Result<(), GeneralProtection> {
    let address = (1u64 << features.physical_bits.min(52)) - 0x1000;
    let mut allowed = address | BSP | BASE_ENABLE;
    if features.x2apic {
        allowed |= BASE_EXTENDED;
    }
    let extended_alone = value & (BASE_ENABLE | BASE_EXTENDED) == BASE_EXTENDED;
    if value & !allowed != 0 || extended_alone {
        return Err(GeneralProtection);
    }
    Ok(())
}

/// Checks a change of mode against SDM figure 11-27: x2APIC mode is entered from xAPIC mode
/// only and left through the disabled state only.
pub(crate) fn check_transition(from: Mode, to: Mode) -> Result<(), GeneralProtection> {
    match (from, to) {
        (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic) => Err(GeneralProtection),
        _ => Ok(()),
    }
}
