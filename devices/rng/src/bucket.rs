//! A token bucket: so many bytes per second, with a burst of one second's worth.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use anemone_device::Timer;

/// Sleep before another look at an empty bucket.
const NAP: Duration = Duration::from_millis(100);

/// Bytes that may be given away, and a timer that says when to look again.
#[derive(Debug)]
pub struct Bucket {
    rate: u64,
    tokens: u64,
    /// Up to when tokens have been filled in.
    filled: Instant,
    timer: Timer,
}

impl Bucket {
    /// A full bucket of `rate` bytes per second.
    pub fn new(rate: NonZeroU32) -> io::Result<Self> {
        Ok(Self {
            rate: rate.get().into(),
            tokens: rate.get().into(),
            filled: Instant::now(),
            timer: Timer::new()?,
        })
    }

    /// How many bytes may be given away now.
    pub fn available(&mut self) -> u64 {
        self.fill(Instant::now());
        self.tokens
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled);
        // A second is all the bucket holds, so the product stays below 2^62.
        let nanos = elapsed.min(Duration::from_secs(1)).as_nanos() as u64;
        let new = nanos * self.rate / 1_000_000_000;
        if new > 0 {
            self.tokens = (self.tokens + new).min(self.rate);
            self.filled = now;
        }
    }

    /// Takes bytes out.
    pub fn spend(&mut self, bytes: u64) {
        self.tokens = self.tokens.saturating_sub(bytes);
    }

    /// Starts the timer.
    pub fn wait(&mut self) -> io::Result<()> {
        self.timer.set(NAP)
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

    #[test]
    fn tokens_come_with_time_and_stop_at_a_seconds_worth() {
        let mut bucket = Bucket::new(NonZeroU32::new(1000).unwrap()).unwrap();
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
        bucket.spend(5000);
        assert_eq!(bucket.tokens, 0);
    }
}
