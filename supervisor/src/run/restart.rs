//! When a device process that has ended is started again.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anemone_config::RestartLimit;

/// The pause before the second of several restarts in a row; it doubles from one to the next.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A process that has served so long before it ended begins a new row.
const STEADY: Duration = Duration::from_millis(100);

/// The restarts of one process.
#[derive(Debug)]
pub struct Restarts {
    limit: RestartLimit,
    /// When it was started again, within the time of the limit.
    recent: VecDeque<Instant>,
    /// Restarts since it last served for some time.
    row: u32,
    serving_since: Option<Instant>,
    /// All of them.
    pub count: u64,
}

impl Restarts {
    /// None so far; the first process serves.
    pub fn new(limit: RestartLimit, now: Instant) -> Self {
        Self {
            limit,
            recent: VecDeque::new(),
            row: 0,
            serving_since: Some(now),
            count: 0,
        }
    }

    /// The process serves the guest.
    pub fn serves(&mut self, now: Instant) {
        self.serving_since = Some(now);
    }

    /// The process has ended: the pause before it is started again, or `None` if that has happened
    /// too often.
    pub fn next(&mut self, now: Instant) -> Option<Duration> {
        let window = Duration::from_secs(self.limit.seconds.into());
        while let Some(first) = self.recent.front()
            && now.saturating_duration_since(*first) >= window
        {
            self.recent.pop_front();
        }
        if self.recent.len() >= self.limit.count as usize {
            return None;
        }
        let since = self.serving_since.take();
        if since.is_some_and(|since| now.saturating_duration_since(since) >= STEADY) {
            self.row = 0;
        }
        let pause = match self.row {
            0 => Duration::ZERO,
            row => FIRST_PAUSE
                .saturating_mul(1 << (row - 1).min(10))
                .min(LONGEST_PAUSE),
        };
        self.recent.push_back(now);
        self.row += 1;
        self.count += 1;
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(count: u32, seconds: u32) -> RestartLimit {
        RestartLimit { count, seconds }
    }

    #[test]
    fn pauses_grow_while_it_never_serves() {
        let start = Instant::now();
        let mut restarts = Restarts::new(limit(100, 60), start);
        let mut now = start + Duration::from_secs(1);
        let pauses: Vec<_> = (0..12)
            .map(|_| {
                let pause = restarts.next(now).unwrap();
                now += pause;
                pause.as_millis()
            })
            .collect();
        assert_eq!(
            pauses,
            [0, 10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000, 1000]
        );
        // Serving for a moment is not enough.
        restarts.serves(now);
        now += Duration::from_millis(50);
        assert_eq!(restarts.next(now), Some(LONGEST_PAUSE));
        restarts.serves(now);
        now += STEADY;
        assert_eq!(restarts.next(now), Some(Duration::ZERO));
        assert_eq!(restarts.count, 14);
    }

    #[test]
    fn the_limit_is_one_of_a_time() {
        let start = Instant::now();
        let mut restarts = Restarts::new(limit(3, 10), start);
        let at = |seconds| start + Duration::from_secs(seconds);
        for second in [1, 2, 3] {
            restarts.serves(at(second - 1));
            assert!(restarts.next(at(second)).is_some());
        }
        assert_eq!(restarts.next(at(4)), None);
        assert_eq!(restarts.next(at(10)), None);
        // The first one is ten seconds ago.
        assert!(restarts.next(at(11)).is_some());
        assert_eq!(restarts.next(at(11)), None);
        assert_eq!(restarts.count, 4);
    }
}
