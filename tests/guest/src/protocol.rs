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

/// Starts log text that is for the reader of the whole.
pub const FIGURES: &str = "figures: ";

/// How long a guest has waited each time that a process of one of its devices was killed.
#[derive(Debug, Clone, PartialEq)]
pub struct Pauses {
    /// The program that was killed.
    pub program: String,
    /// How often.
    pub kills: usize,
    /// How often requests were in flight.
    pub hits: usize,
    /// Half of the pauses were not longer, in milliseconds.
    pub p50: f64,
    /// 99 of 100 were not longer.
    pub p99: f64,
    /// None was longer.
    pub longest: f64,
}

impl Pauses {
    /// Sums up `all`, of which there is at least one.
    pub fn new(program: &str, hits: usize, mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        let share = |percent: usize| {
            let last = all.len().saturating_sub(1);
            all.get(last * percent / 100).copied().unwrap_or(f64::NAN)
        };
        Self {
            program: program.to_string(),
            kills: all.len(),
            hits,
            p50: share(50),
            p99: share(99),
            longest: share(100),
        }
    }

    /// Reads what the display form has written.
    pub fn parse(text: &str) -> Option<Self> {
        let (kills, rest) = text.split_once(" kills of ")?;
        let (program, rest) = rest.split_once(", ")?;
        let (hits, rest) = rest.split_once(" with requests in flight: the guest has waited ")?;
        let mut times = rest.split(" ms").filter_map(|part| {
            let number = part.rsplit(' ').next()?;
            number.parse::<f64>().ok()
        });
        Some(Self {
            program: program.to_string(),
            kills: kills.parse().ok()?,
            hits: hits.parse().ok()?,
            p50: times.next()?,
            p99: times.next()?,
            longest: times.next()?,
        })
    }
}

impl std::fmt::Display for Pauses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            program,
            kills,
            hits,
            p50,
            p99,
            longest,
        } = self;
        write!(
            f,
            "{kills} kills of {program}, {hits} with requests in flight: the guest has waited \
             {p50:.1} ms (p50), {p99:.1} ms (p99), {longest:.1} ms (longest)"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_survive_the_trip() {
        let all = (1..=200).rev().map(f64::from).collect();
        let pauses = Pauses::new("anemone-blk", 17, all);
        assert_eq!((pauses.kills, pauses.p50), (200, 100.0));
        assert_eq!((pauses.p99, pauses.longest), (198.0, 200.0));
        assert_eq!(Pauses::parse(&pauses.to_string()), Some(pauses));
        assert_eq!(Pauses::parse("20 kills of nothing"), None);
    }

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
