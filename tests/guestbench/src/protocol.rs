//! Lines that the program writes to its standard output, which in a guest is a serial port.

use std::fmt;

/// Starts every line of ours; others are the kernel's.
pub const PREFIX: &str = "bench: ";

/// What a loop did while it was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Things counted; [`crate::Loop::unit`] says which.
    pub count: u64,
    /// Instructions in user mode; 0 where they are not known exactly.
    pub instructions: u64,
    /// Nanoseconds by the monotonic clock of the system the loop ran on.
    pub wall: u64,
    /// Nanoseconds of CPU time of the program and its children, by the same system.
    pub cpu: u64,
}

/// One line of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// User space has begun.
    Up,
    /// A loop begins; it is warm.
    Start(String),
    /// It has ended.
    End(String, Done),
    /// It cannot run on this CPU; why.
    Skip(String, String),
    /// It has computed something wrong; what.
    Fail(String, String),
    /// No loop is left.
    Finished,
    /// Another's line.
    Other(String),
}

impl Line {
    /// Reads a line, with or without its end.
    pub fn parse(text: &str) -> Self {
        let text = text.trim_end();
        Self::parse_own(text).unwrap_or_else(|| Line::Other(text.to_string()))
    }

    fn parse_own(text: &str) -> Option<Self> {
        let rest = text.strip_prefix(PREFIX)?;
        let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let (name, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        let name = name.to_string();
        Some(match word {
            "up" => Line::Up,
            "start" => Line::Start(name),
            "end" => {
                let mut numbers = tail.split(' ').map(|number| number.parse().ok());
                let mut next = || numbers.next().flatten();
                let done = Done {
                    count: next()?,
                    instructions: next()?,
                    wall: next()?,
                    cpu: next()?,
                };
                Line::End(name, done)
            }
            "skip" => Line::Skip(name, tail.to_string()),
            "fail" => Line::Fail(name, tail.to_string()),
            "finished" => Line::Finished,
            _ => return None,
        })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Up => write!(f, "{PREFIX}up"),
            Line::Start(name) => write!(f, "{PREFIX}start {name}"),
            Line::End(name, done) => write!(
                f,
                "{PREFIX}end {name} {} {} {} {}",
                done.count, done.instructions, done.wall, done.cpu
            ),
            Line::Skip(name, why) => write!(f, "{PREFIX}skip {name} {why}"),
            Line::Fail(name, what) => write!(f, "{PREFIX}fail {name} {what}"),
            Line::Finished => write!(f, "{PREFIX}finished"),
            Line::Other(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_the_trip() {
        let done = Done {
            count: 1,
            instructions: 2,
            wall: 3,
            cpu: 4,
        };
        for line in [
            Line::Up,
            Line::Start("alu".into()),
            Line::End("alu".into(), done),
            Line::Skip("sha256-ni".into(), "the CPU has no SHA extensions".into()),
            Line::Fail("sha256".into(), "a wrong digest".into()),
            Line::Finished,
            Line::Other("[    0.000000] Linux version".into()),
        ] {
            assert_eq!(Line::parse(&format!("{line}\r\n")), line);
        }
    }

    #[test]
    fn an_incomplete_line_is_not_ours() {
        for text in [
            "bench: end alu 1 2 3",
            "bench: end alu 1 2 3 x",
            "bench: eh",
        ] {
            assert_eq!(Line::parse(text), Line::Other(text.into()));
        }
    }
}
