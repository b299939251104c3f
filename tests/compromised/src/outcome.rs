//! What became of an attempt, and the line that tells it.

use std::fmt;

/// What became of an attempt. The greater gives away more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// There was nothing to try it with.
    Nothing,
    /// What was looked for is not in so many bytes.
    Absent(u64),
    /// The filter has denied it.
    Denied,
    /// It was refused with this error.
    Errno(i32),
    /// It has succeeded, with this result.
    Done(u64),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Absent(bytes) => write!(f, "absent {bytes}"),
            Self::Denied => f.write_str("denied"),
            Self::Errno(errno) => write!(f, "errno {errno}"),
            Self::Done(value) => write!(f, "done {value}"),
        }
    }
}

impl Outcome {
    fn parse(text: &str) -> Option<Self> {
        let (word, number) = text.split_once(' ').unwrap_or((text, ""));
        Some(match word {
            "nothing" => Self::Nothing,
            "denied" => Self::Denied,
            "absent" => Self::Absent(number.parse().ok()?),
            "errno" => Self::Errno(number.parse().ok()?),
            "done" => Self::Done(number.parse().ok()?),
            _ => return None,
        })
    }
}

/// The word between role and the rest of a line, which no other line has.
pub const MARK: &str = "compromised-attempt";

/// One attempt of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The process, as in its other lines.
    pub role: String,
    /// Round: 0 for a thread that has just been restricted.
    pub round: u32,
    /// The policy that the thread has just taken, or `serving` for the first thread of a device that
    /// serves.
    pub policy: String,
    /// Name of the attempt.
    pub name: String,
    /// What became of it.
    pub outcome: Outcome,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            role,
            round,
            policy,
            name,
            outcome,
        } = self;
        write!(f, "{role}: {MARK}: {round}: {policy}: {name}: {outcome}")
    }
}

impl Report {
    /// Reads a line of standard error; nothing if it is none of these.
    pub fn parse(line: &str) -> Option<Self> {
        let (role, rest) = line.split_once(": ")?;
        let rest = rest.strip_prefix(MARK)?.strip_prefix(": ")?;
        let (round, rest) = rest.split_once(": ")?;
        let (policy, rest) = rest.split_once(": ")?;
        let (name, outcome) = rest.rsplit_once(": ")?;
        Some(Self {
            role: role.to_owned(),
            round: round.parse().ok()?,
            policy: policy.to_owned(),
            name: name.to_owned(),
            outcome: Outcome::parse(outcome)?,
        })
    }

    /// Writes the line to standard error in one call, which every policy allows.
    pub fn print(&self) {
        let line = format!("{self}\n");
        // SAFETY: the bytes are as many as said. Nothing can be done about an error.
        unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_written() {
        for outcome in [
            Outcome::Nothing,
            Outcome::Absent(4096),
            Outcome::Denied,
            Outcome::Errno(13),
            Outcome::Done(u64::MAX),
        ] {
            let report = Report {
                role: "anemone-blk[disk0]".into(),
                round: 2,
                policy: "queue".into(),
                name: "open a: b".into(),
                outcome,
            };
            assert_eq!(Report::parse(&report.to_string()), Some(report));
        }
        assert_eq!(Report::parse("anemone-blk: denied: process 1"), None);
    }

    #[test]
    fn what_gives_away_more_is_greater() {
        assert!(Outcome::Done(0) > Outcome::Errno(1));
        assert!(Outcome::Errno(1) > Outcome::Denied);
        assert!(Outcome::Denied > Outcome::Nothing);
    }
}
