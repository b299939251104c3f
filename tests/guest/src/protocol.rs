//! Lines that the outer guest writes to its second serial port. A line without the prefix is log
//! text of the scenario that has begun last.

/// Starts every line that is not log text.
pub const PREFIX: &str = "rig: ";

/// Starts the reason of a failure that is a wait without its end, and no wrong result.
pub const TIME_RAN_OUT: &str = "time ran out";

/// One line of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// The runner is alive. Sent every second.
    Tick,
    /// A scenario begins.
    Begin(String),
    /// It has passed, after so many milliseconds.
    Pass(String, u64),
    /// It has failed; why.
    Fail(String, String),
    /// A line of a file beside the log: the file's name, and the line.
    Keep(String, String),
    /// All scenarios have run.
    End,
    /// Log text.
    Log(String),
}

impl Line {
    /// Reads a line without its end.
    pub fn parse(text: &str) -> Self {
        let log = || Line::Log(text.to_string());
        let Some(rest) = text.strip_prefix(PREFIX) else {
            return log();
        };
        let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let (name, tail) = rest.split_once(' ').unwrap_or((rest, ""));
        match word {
            "tick" => Line::Tick,
            "begin" => Line::Begin(name.to_string()),
            "pass" => match tail.parse() {
                Ok(millis) => Line::Pass(name.to_string(), millis),
                Err(_) => log(),
            },
            "fail" => Line::Fail(name.to_string(), tail.to_string()),
            "keep" => Line::Keep(name.to_string(), tail.to_string()),
            "end" => Line::End,
            _ => log(),
        }
    }
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Line::Tick => write!(f, "{PREFIX}tick"),
            Line::Begin(name) => write!(f, "{PREFIX}begin {name}"),
            Line::Pass(name, millis) => write!(f, "{PREFIX}pass {name} {millis}"),
            Line::Fail(name, why) => write!(f, "{PREFIX}fail {name} {}", why.replace('\n', " | ")),
            Line::Keep(name, text) => write!(f, "{PREFIX}keep {name} {text}"),
            Line::End => write!(f, "{PREFIX}end"),
            Line::Log(text) => f.write_str(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_the_trip() {
        for line in [
            Line::Tick,
            Line::Begin("cpus-4".into()),
            Line::Pass("cpus-4".into(), 12_345),
            Line::Fail("panic".into(), "exit status 3, not 1".into()),
            Line::Keep("doctor".into(), "  threads  2".into()),
            Line::End,
            Line::Log("[    0.000000] Linux version".into()),
        ] {
            assert_eq!(Line::parse(&line.to_string()), line);
        }
    }

    #[test]
    fn a_reason_stays_on_one_line() {
        let text = Line::Fail("x".into(), "one\ntwo".into()).to_string();
        assert_eq!(text, "rig: fail x one | two");
    }

    #[test]
    fn unknown_words_are_log_text() {
        assert!(matches!(Line::parse("rig: pass x soon"), Line::Log(_)));
        assert!(matches!(Line::parse("rig: whatever"), Line::Log(_)));
    }
}
