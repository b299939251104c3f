//! A token bucket: so many bytes per second, with bursts.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::Timer;

const SECOND: Duration = Duration::from_secs(1);
/// Longest and shortest sleep before another look at an empty bucket.
const NAPS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

/// Bytes that may pass, and a timer that says when to look again.
#[derive(Debug)]
pub struct Bucket {
    /// Bytes per second.
    rate: u64,
    /// Most tokens that it holds.
    burst: i64,
    /// Below zero after more was taken than there was.
    tokens: i64,
    /// Up to when tokens have been filled in.
    filled: Instant,
    timer: Timer,
}

impl Bucket {
    /// A full bucket of `rate` bytes per second that holds `burst` bytes.
    ///
    /// # Errors
    /// The timer cannot be had.
    pub fn new(rate: NonZeroU64, burst: NonZeroU64) -> io::Result<Self> {
        let burst = i64::try_from(burst.get()).unwrap_or(i64::MAX);
        Ok(Self {
            rate: rate.get(),
            burst,
            tokens: burst,
            filled: Instant::now(),
            timer: Timer::new()?,
        })
    }

    /// How many bytes may pass now.
    pub fn available(&mut self) -> u64 {
        self.fill(Instant::now());
        u64::try_from(self.tokens).unwrap_or(0)
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        let new = u128::from(self.rate) * elapsed.as_nanos() / SECOND.as_nanos();
        if new > 0 {
            let new = i64::try_from(new).unwrap_or(i64::MAX);
            self.tokens = self.tokens.saturating_add(new).min(self.burst);
            self.filled = now;
        }
    }

    /// Takes bytes out. What cannot be divided may exceed what there is; nothing passes then until
    /// that has come in.
    pub fn spend(&mut self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.tokens = self.tokens.saturating_sub(bytes);
    }

    /// Starts the timer: to a time when there is something worth a wake-up.
    ///
    /// # Errors
    /// The timer does not start.
    pub fn wait(&mut self) -> io::Result<()> {
        let (shortest, longest) = NAPS;
        let missing = u128::from(self.tokens.min(0).unsigned_abs());
        let nanos = (missing * SECOND.as_nanos()).div_ceil(u128::from(self.rate));
        let time = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        // A bucket that has just run empty fills for a tenth of what it holds.
        let share = Duration::from_secs_f64(self.burst as f64 / self.rate as f64 / 10.0);
        self.timer.set(time.max(share).clamp(shortest, longest))
    }

    /// The timer, while it runs.
    pub fn timer(&self) -> Option<BorrowedFd<'_>> {
        self.timer.watch()
    }

    /// Whether the timer has run out.
    pub fn take_timer(&mut self) -> bool {
        self.timer.expired()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(rate: u64, burst: u64) -> Bucket {
        Bucket::new(
            NonZeroU64::new(rate).unwrap(),
            NonZeroU64::new(burst).unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn tokens_come_with_time_and_stop_at_the_burst() {
        let mut bucket = bucket(1000, 1000);
        let start = bucket.filled;
        bucket.spend(1000);
        bucket.fill(start + Duration::from_millis(250));
        assert_eq!(bucket.tokens, 250);
        // Less than a token's time is not lost.
        bucket.fill(start + Duration::from_micros(250_600));
        bucket.fill(start + Duration::from_micros(251_200));
        assert_eq!(bucket.tokens, 251);
        bucket.fill(start + Duration::from_secs(3600));
        assert_eq!(bucket.tokens, 1000);
    }

    #[test]
    fn what_was_taken_too_much_comes_in_first() {
        let mut bucket = bucket(1000, 100);
        let start = bucket.filled;
        bucket.spend(1100);
        bucket.fill(start + Duration::from_millis(900));
        assert_eq!(bucket.tokens, -100);
        bucket.fill(start + Duration::from_millis(1050));
        assert_eq!(bucket.tokens, 50);
        bucket.spend(u64::MAX);
        assert!(bucket.wait().is_ok() && bucket.timer().is_some());
    }

    #[test]
    fn extreme_rates_do_not_overflow() {
        let mut bucket = bucket(u64::MAX, u64::MAX);
        bucket.spend(u64::MAX);
        bucket.fill(bucket.filled + Duration::from_secs(1 << 30));
        assert_eq!(bucket.tokens, i64::MAX);
        assert!(bucket.wait().is_ok());
    }
}
