//! KVM's paravirtual structures in guest memory: clocks, stolen time, and the end of interrupt
//! without a register access (Linux Documentation/virt/kvm/x86/msr.rst).
//!
//! Pure computation: the caller reads the clocks and writes guest memory. Structures that other
//! CPUs may read meanwhile are written through a closure, piece by piece: each write must be
//! visible to the guest's CPUs before the next one is made (plain stores in program order on
//! x86, volatile or atomic so that the compiler keeps that order).

use crate::{Apic, GeneralProtection};

/// MSR with the address of [`WallClock`]; a write fills it in once.
pub const MSR_WALL_CLOCK: u32 = 0x4B56_4D00;
/// MSR with the address of this CPU's [`SystemTime`] and an enable bit, [`enabled_address`].
pub const MSR_SYSTEM_TIME: u32 = 0x4B56_4D01;
/// MSR with the address of this CPU's [`StealTime`], [`steal_time_address`].
pub const MSR_STEAL_TIME: u32 = 0x4B56_4D03;
/// MSR of [`PvEoi`].
pub const MSR_PV_EOI: u32 = 0x4B56_4D04;

/// The address in [`MSR_SYSTEM_TIME`] if its enable bit (bit 0) is set.
pub fn enabled_address(msr: u64) -> Option<u64> {
    (msr & 1 != 0).then_some(msr & !1)
}

/// The address in [`MSR_STEAL_TIME`] if its enable bit (bit 0) is set.
///
/// # Errors
/// Bits 5:1 are reserved.
pub fn steal_time_address(msr: u64) -> Result<Option<u64>, GeneralProtection> {
    if msr & 0x3E != 0 {
        return Err(GeneralProtection);
    }
    Ok(enabled_address(msr))
}

/// Version numbers of the update after `old`: odd while it goes on, even when it is done.
fn versions(old: u32) -> (u32, u32) {
    let during = old.wrapping_add(1) | 1;
    (during, during.wrapping_add(1))
}

/// How TSC ticks become nanoseconds: shifted left by `shift` (right if negative), times `mul`,
/// divided by 2^32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scale {
    /// Fraction of 2^32, its top bit set.
    pub mul: u32,
    /// -31 to 31.
    pub shift: i8,
}

impl Scale {
    /// The scale for a TSC of this many kHz, `None` for zero.
    pub fn from_khz(khz: u32) -> Option<Self> {
        if khz == 0 {
            return None;
        }
        // One tick is 10^6 / khz ns. Bring that into 0.5 .. 1 for the most precise fraction.
        let (mut numerator, mut denominator) = (1_000_000u64, u64::from(khz));
        let mut shift = 0i8;
        while numerator >= denominator {
            denominator <<= 1;
            shift += 1;
        }
        while numerator << 1 < denominator {
            numerator <<= 1;
            shift -= 1;
        }
        // Below 2^32, since the fraction is below 1.
        let mul = ((u128::from(numerator) << 32) / u128::from(denominator)) as u32;
        Some(Self { mul, shift })
    }

    /// What a guest computes for an interval of TSC ticks: nanoseconds, modulo 2^64.
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 {
            ticks >> -self.shift
        } else {
            ticks << self.shift
        };
        ((u128::from(shifted) * u128::from(self.mul)) >> 32) as u64
    }
}

/// `struct pvclock_vcpu_time_info`, 32 bytes: the clock was `nanoseconds` when the TSC was `tsc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemTime {
    /// Guest TSC at the reference point.
    pub tsc: u64,
    /// The VM's clock at the reference point.
    pub nanoseconds: u64,
    /// The guest TSC's rate.
    pub scale: Scale,
    /// All CPUs' clocks are one: the guest may skip its own monotonicity check
    /// (PVCLOCK_TSC_STABLE_BIT).
    pub stable: bool,
    /// The guest was stopped by its host meanwhile; its watchdogs may look away
    /// (PVCLOCK_GUEST_STOPPED).
    pub stopped: bool,
}

impl SystemTime {
    /// Size of the structure.
    pub const SIZE: usize = 32;

    /// Writes the structure over one whose first word, the version, is `old`. The closure gets
    /// offsets into the structure.
    pub fn store(&self, old: u32, mut write: impl FnMut(usize, &[u8])) {
        let (during, done) = versions(old);
        let mut body = [0; Self::SIZE - 8];
        body[..8].copy_from_slice(&self.tsc.to_le_bytes());
        body[8..16].copy_from_slice(&self.nanoseconds.to_le_bytes());
        body[16..20].copy_from_slice(&self.scale.mul.to_le_bytes());
        body[20] = self.scale.shift.to_le_bytes()[0];
        body[21] = u8::from(self.stable) | u8::from(self.stopped) << 1;
        write(0, &during.to_le_bytes());
        write(8, &body);
        write(0, &done.to_le_bytes());
    }
}

/// `struct pvclock_wall_clock`, 12 bytes: the time of day when the VM's clock was zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WallClock {
    /// Since 1970, modulo 2^32.
    pub seconds: u32,
    /// Below 10^9.
    pub nanoseconds: u32,
}

impl WallClock {
    /// Computes it from the time of day in nanoseconds since 1970 and the VM's clock, both now.
    pub fn new(time_of_day: u64, clock: u64) -> Self {
        let boot = time_of_day.saturating_sub(clock);
        Self {
            seconds: (boot / 1_000_000_000) as u32,
            nanoseconds: (boot % 1_000_000_000) as u32,
        }
    }

    /// Writes the structure over one whose first word, the version, is `old`.
    pub fn store(&self, old: u32, mut write: impl FnMut(usize, &[u8])) {
        let (during, done) = versions(old);
        let mut body = [0; 8];
        body[..4].copy_from_slice(&self.seconds.to_le_bytes());
        body[4..].copy_from_slice(&self.nanoseconds.to_le_bytes());
        write(0, &during.to_le_bytes());
        write(4, &body);
        write(0, &done.to_le_bytes());
    }
}

/// `struct kvm_steal_time`, 64 bytes, of which the guest reads the first 17.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StealTime {
    /// Nanoseconds for which the CPU could have run and its thread did not.
    pub stolen: u64,
    /// The thread is not running now.
    pub preempted: bool,
}

impl StealTime {
    /// Writes the structure over one whose version, at offset 8, is `old`.
    pub fn store(&self, old: u32, mut write: impl FnMut(usize, &[u8])) {
        let (during, done) = versions(old);
        write(8, &during.to_le_bytes());
        write(0, &self.stolen.to_le_bytes());
        write(16, &[u8::from(self.preempted)]);
        write(8, &done.to_le_bytes());
    }
}

/// End of interrupt through a flag in guest memory.
///
/// When an edge-triggered interrupt is in service and nothing else waits, its end has no
/// consequence but itself. The host then sets bit 0 of a guest word; the guest ends the
/// interrupt by clearing the bit instead of writing EOI. The host must look at the bit before it
/// next looks at the APIC:
///
/// ```text
///   offered() -> Some(address): test and clear bit 0 there -> settle(apic, bit)
///   Apic::poll, Apic::acknowledge ...
///   before guest code: offer(apic) -> Some(address): set bit 0 there
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PvEoi {
    msr: u64,
    offered: bool,
}

impl PvEoi {
    /// The value of [`MSR_PV_EOI`].
    pub fn msr(&self) -> u64 {
        self.msr
    }

    /// Writes [`MSR_PV_EOI`]: address and enable bit. An offer must be settled before.
    ///
    /// # Errors
    /// Bit 1 is reserved.
    pub fn set_msr(&mut self, value: u64) -> Result<(), GeneralProtection> {
        if value & 2 != 0 {
            return Err(GeneralProtection);
        }
        *self = Self {
            msr: value,
            offered: false,
        };
        Ok(())
    }

    /// Where to set bit 0 now, if the interrupt in service can end this way.
    pub fn offer(&mut self, apic: &Apic) -> Option<u64> {
        let address = enabled_address(self.msr)?;
        if self.offered || !apic.eoi_is_plain() {
            return None;
        }
        self.offered = true;
        Some(address)
    }

    /// Where an offer is outstanding.
    pub fn offered(&self) -> Option<u64> {
        enabled_address(self.msr).filter(|_| self.offered)
    }

    /// Withdraws the offer: `bit` is what was in guest memory; if the guest cleared it, the
    /// interrupt ends.
    pub fn settle(&mut self, apic: &mut Apic, bit: bool) {
        if std::mem::take(&mut self.offered) && !bit {
            apic.end_of_interrupt();
        }
    }
}
