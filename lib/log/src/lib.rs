//! The log of every Anemone process: one line on standard error per record, and a limiter for
//! lines that a guest or another untrusted party can cause.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

/// Names a process in its lines.
static ROLE: OnceLock<String> = OnceLock::new();

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let role = ROLE.get().map_or("anemone", String::as_str);
        let mut line = String::with_capacity(128);
        let level = record.level().as_str().to_ascii_lowercase();
        // One write per line, so that lines of several processes do not mix. Writing to a
        // String cannot fail, and there is nowhere to report a broken standard error.
        let _ = writeln!(line, "{role}: {level}: {}", record.args());
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Starts logging for this process. `role` names it in each line, for example
/// `anemone-blk[disk0]`. Later calls only change the level.
pub fn init(role: &str, level: LevelFilter) {
    if ROLE.set(role.to_owned()).is_ok() {
        // A failure means that a test harness has installed its own logger, which serves as well.
        let _ = log::set_logger(&Stderr);
    }
    log::set_max_level(level);
}

/// The role given to [`init`].
pub fn role() -> &'static str {
    ROLE.get().map_or("anemone", String::as_str)
}

/// Lets through a burst of [`Limiter::BURST`] lines, then one window of as many every
/// [`Limiter::WINDOW_MS`], and counts what it held back.
#[derive(Debug)]
pub struct Limiter {
    window: AtomicU64,
    used: AtomicU32,
    held_back: AtomicU32,
}

impl Limiter {
    /// Lines per window.
    pub const BURST: u32 = 10;
    /// Length of a window in milliseconds.
    pub const WINDOW_MS: u64 = 5_000;

    /// A limiter with a full budget.
    pub const fn new() -> Self {
        Self {
            window: AtomicU64::new(0),
            used: AtomicU32::new(0),
            held_back: AtomicU32::new(0),
        }
    }

    /// Whether a line may be written now; `Some(n)` says that `n` were held back since the last.
    pub fn allow(&self) -> Option<u32> {
        static START: OnceLock<Instant> = OnceLock::new();
        let elapsed = START.get_or_init(Instant::now).elapsed().as_millis();
        self.allow_at(u64::try_from(elapsed).unwrap_or(u64::MAX) / Self::WINDOW_MS)
    }

    fn allow_at(&self, window: u64) -> Option<u32> {
        // Two threads may both see a new window; the budget is then a little larger, never smaller.
        if self.window.swap(window, Ordering::Relaxed) != window {
            self.used.store(0, Ordering::Relaxed);
        }
        if self.used.fetch_add(1, Ordering::Relaxed) < Self::BURST {
            Some(self.held_back.swap(0, Ordering::Relaxed))
        } else {
            // Keeps the counter from wrapping round to an open budget.
            self.used.store(Self::BURST, Ordering::Relaxed);
            self.held_back.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new()
    }
}

/// `log::warn!` for lines that an untrusted party can cause: each place in the source has a
/// budget of [`Limiter::BURST`] lines per [`Limiter::WINDOW_MS`].
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => {{
        static LIMITER: $crate::Limiter = $crate::Limiter::new();
        if let Some(held_back) = LIMITER.allow() {
            if held_back > 0 {
                ::log::warn!("{} ({held_back} more like this were held back)", format_args!($($arg)+));
            } else {
                ::log::warn!($($arg)+);
            }
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_then_silence_then_count() {
        let limiter = Limiter::new();
        for _ in 0..Limiter::BURST {
            assert_eq!(limiter.allow_at(1), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(limiter.allow_at(1), None);
        }
        assert_eq!(limiter.allow_at(2), Some(5));
        assert_eq!(limiter.allow_at(2), Some(0));
    }
}
