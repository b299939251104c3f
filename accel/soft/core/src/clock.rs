//! Time: the time-stamp counters and the paravirtual clock of a VM.
//!
//! There is one source, the host's TSC. Nanoseconds are ticks times a scale that is measured once, and the
//! guest is told the same scale ([`Clock::system_time`]), so that no two clocks of a guest drift apart.
//!
//! The host's TSC must count at one rate in every state of its processors and be the same on all
//! of them, which is so on every x86-64 processor of the last ten years.

use std::arch::x86_64::_rdtsc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use anemone_soft_apic::Now;
use anemone_soft_apic::pv::{Scale, SystemTime};

/// How long the rate is measured at least, in nanoseconds. Reading both clocks is uncertain by some
/// 30 ns, so this gives a few millionths.
const MEASURE: u64 = 10_000_000;

/// Two readings of the clocks at one moment.
#[derive(Debug, Clone, Copy)]
struct Moment {
    tsc: u64,
    nanoseconds: u64,
}

impl Moment {
    fn now() -> Self {
        let read = || {
            let before = host_tsc();
            let nanoseconds = read_clock(libc::CLOCK_MONOTONIC);
            let after = host_tsc();
            let width = after.wrapping_sub(before);
            let tsc = before.wrapping_add(width / 2);
            (width, Self { tsc, nanoseconds })
        };
        // The narrowest of a few was not interrupted.
        let mut best = read();
        for _ in 0..7 {
            let next = read();
            if next.0 < best.0 {
                best = next;
            }
        }
        best.1
    }
}

/// What measuring found.
#[derive(Debug, Clone, Copy)]
struct Rate {
    khz: u32,
    scale: Scale,
}

/// The clocks of a VM, shared by its CPUs.
#[derive(Debug)]
pub struct Clock {
    origin: Moment,
    rate: OnceLock<Rate>,
    /// The paravirtual clock at the origin.
    start: AtomicU64,
    /// Changes with `start`.
    generation: AtomicU32,
    /// The offset that the last restored CPU got.
    restored: Mutex<Option<u64>>,
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// TSC and paravirtual clock start at zero now.
    pub fn new() -> Self {
        Self {
            origin: Moment::now(),
            rate: OnceLock::new(),
            start: AtomicU64::new(0),
            generation: AtomicU32::new(1),
            restored: Mutex::new(None),
        }
    }

    /// The TSC's rate. The first call waits until 10 ms after the clock was made.
    fn rate(&self) -> &Rate {
        self.rate.get_or_init(|| {
            let elapsed = |now: &Moment| now.nanoseconds.saturating_sub(self.origin.nanoseconds);
            let mut now = Moment::now();
            while elapsed(&now) < MEASURE {
                std::hint::spin_loop();
                now = Moment::now();
            }
            let ticks = u128::from(now.tsc.wrapping_sub(self.origin.tsc));
            let nanoseconds = u128::from(elapsed(&now));
            let khz = (ticks * 1_000_000 + nanoseconds / 2) / nanoseconds;
            let khz = u32::try_from(khz).unwrap_or(u32::MAX).max(1);
            log::debug!("the TSC runs at {khz} kHz");
            let scale = Scale::from_khz(khz).unwrap_or(Scale {
                mul: 1 << 31,
                shift: 1,
            });
            Rate { khz, scale }
        })
    }

    /// The rate of the TSC.
    pub fn khz(&self) -> u32 {
        self.rate().khz
    }

    /// The TSC of a CPU that has added `offset` to it.
    #[inline(always)]
    pub fn tsc(&self, offset: u64) -> u64 {
        self.ticks().wrapping_add(offset)
    }

    /// Ticks since the origin.
    #[inline(always)]
    fn ticks(&self) -> u64 {
        host_tsc().wrapping_sub(self.origin.tsc)
    }

    /// The time for the local APIC of a CPU that has added `offset` to its TSC.
    pub fn now_with(&self, offset: u64) -> Now {
        let ticks = self.ticks();
        Now {
            bus: self.ticks_to_nanoseconds(ticks),
            tsc: ticks.wrapping_add(offset),
        }
    }

    /// Ticks of the TSC as nanoseconds, rounded down.
    pub fn ticks_to_nanoseconds(&self, ticks: u64) -> u64 {
        self.rate().scale.nanoseconds(ticks)
    }

    /// The fewest ticks that [`ticks_to_nanoseconds`](Self::ticks_to_nanoseconds) finds so long.
    pub fn nanoseconds_to_ticks(&self, nanoseconds: u64) -> u64 {
        let Scale { mul, shift } = self.rate().scale;
        let shifted = (u128::from(nanoseconds) << 32).div_ceil(u128::from(mul));
        let ticks = if shift < 0 {
            shifted << -shift
        } else {
            shifted.div_ceil(1 << shift)
        };
        u64::try_from(ticks).unwrap_or(u64::MAX)
    }

    /// The paravirtual clock.
    pub fn nanoseconds(&self) -> u64 {
        let elapsed = self.ticks_to_nanoseconds(self.ticks());
        elapsed.wrapping_add(self.start.load(Ordering::Relaxed))
    }

    /// Sets the paravirtual clock. CPUs tell their guest when they next run.
    pub fn set_nanoseconds(&self, nanoseconds: u64) {
        let elapsed = self.ticks_to_nanoseconds(self.ticks());
        let start = nanoseconds.wrapping_sub(elapsed);
        self.start.store(start, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// A number that changes when the paravirtual clock is set; never 0.
    #[inline(always)]
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire).max(1)
    }

    /// What a guest is told of the paravirtual clock: the same origin and scale on every CPU, so
    /// that it is one clock.
    pub(crate) fn system_time(&self, offset: u64) -> SystemTime {
        SystemTime {
            tsc: offset,
            nanoseconds: self.start.load(Ordering::Relaxed),
            scale: self.rate().scale,
            stable: true,
            stopped: false,
        }
    }

    /// The offset that makes the TSC of a restored CPU go on from `value`. CPUs that are restored
    /// with nearly the same value get the same offset, since their counters were one when the state
    /// was taken, some time apart.
    pub(crate) fn restored_offset(&self, value: u64) -> u64 {
        let mut last = self.restored.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = value.wrapping_sub(self.ticks());
        let second = u64::from(self.khz()) * 1000;
        let near =
            |other: &u64| offset.wrapping_sub(*other).min(other.wrapping_sub(offset)) < second;
        let chosen = last.filter(near).unwrap_or(offset);
        *last = Some(chosen);
        chosen
    }
}

/// Nanoseconds since 1970.
pub(crate) fn time_of_day() -> u64 {
    read_clock(libc::CLOCK_REALTIME)
}

/// The host's TSC.
#[inline(always)]
fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it, and Linux lets programs read it.
    unsafe { _rdtsc() }
}

fn read_clock(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is writable. The two clocks used here cannot fail.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_computes_what_the_host_says() {
        let clock = Clock::new();
        clock.set_nanoseconds(5_000_000_000);
        let offset = 12_345_u64.wrapping_neg();
        let told = clock.system_time(offset);
        let before = clock.nanoseconds();
        let tsc = clock.tsc(offset);
        let after = clock.nanoseconds();
        let computed = told.nanoseconds + told.scale.nanoseconds(tsc.wrapping_sub(told.tsc));
        assert!(
            (before..=after).contains(&computed),
            "{before} {computed} {after}"
        );
        assert!((5_000_000_000..6_000_000_000).contains(&computed));
    }

    #[test]
    fn the_rate_is_that_of_the_host() {
        let clock = Clock::new();
        let around = || {
            let before = Moment::now().nanoseconds;
            let ours = clock.now_with(0);
            (before, ours, Moment::now().nanoseconds)
        };
        let first = around();
        while Moment::now().nanoseconds - first.2 < 50_000_000 {}
        let last = around();
        let ours = (last.1.bus - first.1.bus) as f64;
        // However long this thread did not run, the truth lies between these.
        let (least, most) = ((last.0 - first.2) as f64, (last.2 - first.0) as f64);
        assert!(
            ours > least * 0.999 && ours < most * 1.001,
            "{least} {ours} {most}"
        );
        let ticks = last.1.tsc - first.1.tsc;
        let back = clock.nanoseconds_to_ticks(last.1.bus - first.1.bus);
        assert!(back.abs_diff(ticks) < 16, "{back} {ticks}");
    }

    #[test]
    fn ticks_are_enough_for_their_time() {
        let clock = Clock::new();
        for nanoseconds in [1, 999, 1_000_000, 3_600_000_000_000, 1 << 60] {
            let ticks = clock.nanoseconds_to_ticks(nanoseconds);
            assert!(clock.ticks_to_nanoseconds(ticks) >= nanoseconds);
            assert!(clock.ticks_to_nanoseconds(ticks - 2) < nanoseconds);
        }
        assert_eq!(clock.nanoseconds_to_ticks(0), 0);
        let half = clock.nanoseconds_to_ticks(u64::MAX / 2);
        assert!(clock.nanoseconds_to_ticks(u64::MAX) >= half);
    }

    #[test]
    fn counters_restored_a_moment_apart_are_one() {
        let clock = Clock::new();
        let first = clock.restored_offset(1 << 40);
        assert_eq!(clock.restored_offset((1 << 40) + 1000), first);
        assert_ne!(clock.restored_offset(1 << 50), first);
    }
}
