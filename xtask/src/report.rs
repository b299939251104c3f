//! Verdicts of tests, and their sum.

use std::fmt;

/// What became of one test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It has shown what it is for.
    Passed,
    /// It has not; why.
    Failed(String),
}

/// One test and its verdict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Name within its group.
    pub name: String,
    /// What became of it.
    pub verdict: Verdict,
}

impl Outcome {
    /// A verdict with its name.
    pub fn new(name: &str, verdict: Verdict) -> Self {
        Self {
            name: name.to_string(),
            verdict,
        }
    }

    /// The outcome of a test that is a function.
    pub fn of(name: &str, result: anyhow::Result<()>) -> Self {
        let verdict = match result {
            Ok(()) => Verdict::Passed,
            Err(error) => Verdict::Failed(format!("{error:#}")),
        };
        Self::new(name, verdict)
    }
}

/// The sum over all groups.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Tests that have passed.
    pub passed: usize,
    /// Tests that have failed, among them groups that could not run.
    pub failed: usize,
}

impl Counts {
    /// Adds outcomes.
    pub fn add(&mut self, outcomes: &[Outcome]) {
        for outcome in outcomes {
            match outcome.verdict {
                Verdict::Passed => self.passed += 1,
                Verdict::Failed(_) => self.failed += 1,
            }
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_counts_both_kinds() {
        let mut counts = Counts::default();
        counts.add(&[
            Outcome::of("good", Ok(())),
            Outcome::of("bad", Err(anyhow::anyhow!("why"))),
            Outcome::of("fine", Ok(())),
        ]);
        assert_eq!(counts.to_string(), "2 passed, 1 failed");
    }
}
