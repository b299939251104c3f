//! The APIC timer (SDM 11.5.4).
//!
//! Its input clock runs at 1 GHz, as under KVM: one tick of the bus clock is a nanosecond.

/// The time at which something happens, on the two clocks that the APIC timer knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// The APIC's input clock: nanoseconds, monotonic, the same for all CPUs.
    pub bus: u64,
    /// The time-stamp counter as this guest CPU reads it, offset included.
    pub tsc: u64,
}

/// When the timer will fire, on the clock that its mode uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deadline {
    /// At this value of [`Now::bus`].
    Bus(u64),
    /// At this value of [`Now::tsc`].
    Tsc(u64),
}

impl Deadline {
    /// Whether the time has come.
    pub fn is_due(self, now: Now) -> bool {
        match self {
            Self::Bus(at) => now.bus >= at,
            Self::Tsc(at) => now.tsc >= at,
        }
    }
}

/// Bits 18:17 of the timer's LVT entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    Reserved,
}

impl TimerMode {
    pub(crate) fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }
}

/// The counter and its reload value.
#[derive(Debug, Clone, Default)]
pub(crate) struct Timer {
    /// Initial-count register.
    initial: u32,
    /// Divide-configuration register: bits 3, 1 and 0.
    divide: u32,
    armed: Option<Deadline>,
}

impl Timer {
    /// Binary logarithm of the divisor (SDM figure 11-10): 2, 4 .. 128, 1.
    fn shift(&self) -> u32 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        (code + 1) & 7
    }

    /// Nanoseconds from the initial count to zero.
    fn period(&self) -> u64 {
        u64::from(self.initial) << self.shift()
    }

    pub(crate) fn initial(&self) -> u32 {
        self.initial
    }

    pub(crate) fn divide(&self) -> u32 {
        self.divide
    }

    pub(crate) fn deadline(&self) -> Option<Deadline> {
        self.armed
    }

    /// The value of IA32_TSC_DEADLINE: zero when not armed.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        match self.armed {
            Some(Deadline::Tsc(at)) => at,
            _ => 0,
        }
    }

    pub(crate) fn set_tsc_deadline(&mut self, at: u64) {
        self.armed = (at != 0).then_some(Deadline::Tsc(at));
    }

    /// A write of the initial count: starts the counter, or stops it with zero.
    pub(crate) fn start(&mut self, initial: u32, mode: TimerMode, now: Now) {
        if mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = initial;
        let runs = initial != 0 && mode != TimerMode::Reserved;
        self.armed = runs.then(|| Deadline::Bus(now.bus.saturating_add(self.period())));
    }

    /// Goes on from a current count of `count`; with 0, a periodic timer begins a new period
    /// and any other has run out. The initial count is set already.
    pub(crate) fn resume(&mut self, initial: u32, count: u32, mode: TimerMode, now: Now) {
        self.start(initial, mode, now);
        if matches!(self.armed, Some(Deadline::Bus(_))) {
            if count != 0 {
                let left = u64::from(count.min(initial)) << self.shift();
                self.armed = Some(Deadline::Bus(now.bus.saturating_add(left)));
            } else if mode == TimerMode::OneShot {
                self.armed = None;
            }
        }
    }

    /// Current-count register. [`poll`](Self::poll) has been called for this time.
    pub(crate) fn current(&self, now: Now) -> u32 {
        match self.armed {
            // A tick that has begun is not over: the count falls at the end of each.
            Some(Deadline::Bus(at)) => {
                let left = at.saturating_sub(now.bus).div_ceil(1 << self.shift());
                u32::try_from(left).unwrap_or(u32::MAX).min(self.initial)
            }
            _ => 0,
        }
    }

    /// A write of the divide configuration: the count goes on from where it is at the new rate.
    pub(crate) fn set_divide(&mut self, value: u32, now: Now) {
        let count = self.current(now);
        self.divide = value & 0b1011;
        if let Some(Deadline::Bus(_)) = self.armed {
            let left = u64::from(count) << self.shift();
            self.armed = Some(Deadline::Bus(now.bus.saturating_add(left)));
        }
    }

    /// A write of the LVT entry. Going into or out of TSC-deadline mode disarms the timer.
    pub(crate) fn change_mode(&mut self, from: TimerMode, to: TimerMode) {
        let deadline = |mode| mode == TimerMode::TscDeadline;
        if deadline(from) != deadline(to) {
            self.initial = 0;
            self.armed = None;
        } else if to == TimerMode::Reserved {
            self.armed = None;
        }
    }

    /// Brings the timer to `now`; true if it fired on the way. However late the call is, it
    /// fires once: a second interrupt of the same vector would merge with the first anyway.
    pub(crate) fn poll(&mut self, mode: TimerMode, now: Now) -> bool {
        let Some(deadline) = self.armed.filter(|d| d.is_due(now)) else {
            return false;
        };
        self.armed = match deadline {
            Deadline::Bus(at) if mode == TimerMode::Periodic => {
                // Armed means that the initial count, and so the period, is not zero.
                let missed = (now.bus - at) / self.period();
                let next = at.saturating_add(self.period().saturating_mul(missed + 1));
                Some(Deadline::Bus(next))
            }
            _ => None,
        };
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(bus: u64) -> Now {
        Now { bus, tsc: 0 }
    }

    #[test]
    fn divisors_are_those_of_the_manual() {
        let divisor = |divide| {
            1u32 << Timer {
                divide,
                ..Timer::default()
            }
            .shift()
        };
        let codes = [
            0b0000, 0b0001, 0b0010, 0b0011, 0b1000, 0b1001, 0b1010, 0b1011,
        ];
        assert_eq!(codes.map(divisor), [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn one_shot_counts_down_and_fires_once() {
        let mut timer = Timer::default();
        timer.start(100, TimerMode::OneShot, at(1000));
        assert_eq!(timer.deadline(), Some(Deadline::Bus(1200)));
        assert_eq!(timer.current(at(1000)), 100);
        assert_eq!(timer.current(at(1001)), 100);
        assert_eq!(timer.current(at(1002)), 99);
        assert!(!timer.poll(TimerMode::OneShot, at(1199)));
        assert!(timer.poll(TimerMode::OneShot, at(1200)));
        assert_eq!((timer.current(at(1201)), timer.initial()), (0, 100));
        assert!(!timer.poll(TimerMode::OneShot, at(9999)));
    }

    #[test]
    fn periodic_keeps_its_phase_when_polled_late() {
        let mut timer = Timer::default();
        timer.set_divide(0b1011, at(0));
        timer.start(10, TimerMode::Periodic, at(0));
        assert!(timer.poll(TimerMode::Periodic, at(37)));
        assert!(!timer.poll(TimerMode::Periodic, at(39)));
        assert_eq!(timer.current(at(39)), 1);
        assert!(timer.poll(TimerMode::Periodic, at(40)));
        assert_eq!(timer.current(at(40)), 10);
    }

    #[test]
    fn divisor_change_keeps_the_count() {
        let mut timer = Timer::default();
        timer.start(100, TimerMode::OneShot, at(0));
        timer.set_divide(0b1011, at(100));
        assert_eq!(timer.current(at(100)), 50);
        assert_eq!(timer.deadline(), Some(Deadline::Bus(150)));
    }

    #[test]
    fn times_at_the_end_of_the_clock_do_not_overflow() {
        let mut timer = Timer::default();
        timer.set_divide(0b1010, at(u64::MAX));
        timer.start(u32::MAX, TimerMode::Periodic, at(u64::MAX - 1));
        assert!(timer.poll(TimerMode::Periodic, at(u64::MAX)));
        assert!(timer.poll(TimerMode::Periodic, at(u64::MAX)));
        timer.set_divide(0, at(u64::MAX));
        timer.current(at(0));
    }
}
