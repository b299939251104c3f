//! The policy language.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use crate::symbols::{symbol, syscall_name, syscall_number};
use crate::{Error, REPORTER};

/// Where a rule stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file, as it was given.
    pub file: String,
    /// Its line, from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A test of one argument: `argument & mask == value`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Test {
    /// Number of the argument, 0 to 5.
    pub argument: u8,
    /// Whether all 64 bits count, or only the low half.
    pub wide: bool,
    /// The bits that are compared; all-ones (of 64) for a plain comparison.
    pub mask: u64,
    /// What they must be.
    pub value: u64,
}

/// What a rule does with the calls it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The call is carried out.
    Allow,
    /// The call fails with this error number.
    Errno(u16),
}

/// One line of a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Number of the system call.
    pub syscall: u32,
    /// All of these must hold, and one test of each is enough.
    pub conditions: Vec<Vec<Test>>,
    /// What then happens.
    pub action: Action,
    /// Whether only builds with debug assertions have it.
    pub debug: bool,
    /// The rule as written, without its reason.
    pub text: String,
    /// Why it is there.
    pub reason: String,
    /// Where it stands.
    pub place: Place,
}

/// A policy: what one kind of thread may ask of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Name of the file without its extension.
    pub name: String,
    /// The rules in the order of the file, those of included fragments in their places.
    pub rules: Vec<Rule>,
}

impl Policy {
    /// Parses the text of `file`. `include` finds other files by their names: where they are,
    /// and their text. What is included twice counts once.
    pub fn parse(
        name: &str,
        file: &str,
        text: &str,
        include: &dyn Fn(&str) -> Option<(String, String)>,
    ) -> Result<Self, Error> {
        let mut rules = Vec::new();
        let mut included = BTreeSet::from([name.to_owned()]);
        // Lines still to be read; an include puts the lines of its file in front.
        let mut rest: VecDeque<_> = lines(file, text).collect();
        while let Some((place, line)) = rest.pop_front() {
            let (rule, _) = split_reason(&line);
            match rule.split_whitespace().collect::<Vec<_>>()[..] {
                ["include", other] => {
                    if !included.insert(other.to_owned()) {
                        continue;
                    }
                    let Some((file, text)) = include(other) else {
                        let found = format!("include of `{other}`");
                        return Err(syntax(
                            &place,
                            found,
                            "the name of a .policy file in this folder or in lib/policy/common",
                        ));
                    };
                    rest = lines(&file, &text).chain(rest).collect();
                }
                ["include", ..] => return Err(syntax(&place, format!("`{rule}`"), "include NAME")),
                _ => rules.push(parse_rule(&line, place)?),
            }
        }
        let rules = merge(rules)?;
        let policy = Self {
            name: name.to_owned(),
            rules,
        };
        let allowed = policy.allowed();
        match REPORTER.iter().find(|needed| !allowed.contains(*needed)) {
            Some(syscall) => Err(Error::Reporter {
                file: file.to_owned(),
                syscall,
            }),
            None => Ok(policy),
        }
    }

    /// The policy of a released program: without the rules for debug builds.
    #[must_use]
    pub fn released(mut self) -> Self {
        self.rules.retain(|rule| !rule.debug);
        self
    }

    /// The system calls that are allowed, with or without conditions, sorted by name.
    pub fn allowed(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self
            .rules
            .iter()
            .filter(|rule| rule.action == Action::Allow)
            .filter_map(|rule| syscall_name(rule.syscall))
            .collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The rules as text with their reasons, includes resolved, one a line.
    pub fn text(&self) -> String {
        self.rules
            .iter()
            .map(|rule| format!("{}  # {}\n", rule.text, rule.reason))
            .collect()
    }

    /// The rules of each system call, in order.
    pub(crate) fn by_syscall(&self) -> BTreeMap<u32, Vec<&Rule>> {
        let mut map: BTreeMap<u32, Vec<&Rule>> = BTreeMap::new();
        for rule in &self.rules {
            map.entry(rule.syscall).or_default().push(rule);
        }
        map
    }
}

/// The lines that say something, with their places.
fn lines(file: &str, text: &str) -> impl Iterator<Item = (Place, String)> {
    text.lines()
        .enumerate()
        .map(|(i, line)| {
            (
                Place {
                    file: file.to_owned(),
                    line: i + 1,
                },
                line.trim(),
            )
        })
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(place, line)| (place, line.to_owned()))
        .collect::<Vec<_>>()
        .into_iter()
}

fn split_reason(line: &str) -> (&str, &str) {
    let (rule, reason) = line.split_once('#').unwrap_or((line, ""));
    (rule.trim(), reason.trim())
}

fn syntax(place: &Place, found: impl Into<String>, allowed: impl Into<String>) -> Error {
    Error::Syntax {
        place: place.clone(),
        found: found.into(),
        allowed: allowed.into(),
    }
}

fn parse_rule(line: &str, place: Place) -> Result<Rule, Error> {
    let (text, reason) = split_reason(line);
    if reason.is_empty() {
        return Err(syntax(
            &place,
            format!("`{text}` without a reason"),
            "SYSCALL [CONDITION …] # REASON",
        ));
    }
    let mut words = text.split_whitespace();
    let name = words.next().unwrap_or_default();
    let syscall = syscall_number(name).ok_or_else(|| {
        syntax(
            &place,
            format!("`{name}`"),
            "the name of an x86-64 system call, or include NAME",
        )
    })?;
    let mut action = Action::Allow;
    let mut conditions = Vec::new();
    let mut debug = false;
    for word in words {
        if word == "debug" {
            debug = true;
            continue;
        }
        if action != Action::Allow {
            return Err(syntax(
                &place,
                format!("`{word}` after errno="),
                "the reason",
            ));
        }
        if let Some(error) = word.strip_prefix("errno=") {
            let number = parse_value(error, &place)?;
            // Larger numbers are not error numbers (include/linux/err.h).
            match u16::try_from(number) {
                Ok(number @ 1..=4095) => action = Action::Errno(number),
                _ => {
                    return Err(syntax(
                        &place,
                        format!("`{word}`"),
                        "an error number from 1 to 4095",
                    ));
                }
            }
        } else {
            conditions.push(parse_condition(word, &place)?);
        }
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(Rule {
        syscall,
        conditions,
        action,
        debug,
        text,
        reason: reason.to_owned(),
        place,
    })
}

fn parse_condition(word: &str, place: &Place) -> Result<Vec<Test>, Error> {
    let mut tests: Vec<Test> = Vec::new();
    for part in word.split('|') {
        let test = match (part.strip_prefix("arg"), tests.last()) {
            (Some(test), _) => parse_test(test, part, place)?,
            (None, Some(first)) => {
                let value = parse_value(part, place)?;
                check_test(Test { value, ..*first }, part, place)?
            }
            (None, None) => {
                return Err(syntax(
                    place,
                    format!("`{part}`"),
                    "a condition like arg1==VALUE or arg2&MASK==VALUE, or errno=NAME",
                ));
            }
        };
        if tests.contains(&test) {
            return Err(syntax(
                place,
                format!("`{part}` twice in one condition"),
                "each test once",
            ));
        }
        tests.push(test);
    }
    Ok(tests)
}

/// `text` is what follows `arg`, `whole` the test as written.
fn parse_test(text: &str, whole: &str, place: &Place) -> Result<Test, Error> {
    let wrong = || {
        syntax(
            place,
            format!("`{whole}`"),
            "argN==VALUE or argN&MASK==VALUE, N from 0 to 5, argN:64 for all 64 bits",
        )
    };
    let (left, value) = text.split_once("==").ok_or_else(wrong)?;
    let (argument, mask) = match left.split_once('&') {
        Some((argument, mask)) => (argument, parse_value(mask, place)?),
        None => (left, u64::MAX),
    };
    let (argument, wide) = match argument.strip_suffix(":64") {
        Some(argument) => (argument, true),
        None => (argument, false),
    };
    let argument = match argument.as_bytes() {
        [digit @ b'0'..=b'5'] => digit - b'0',
        _ => return Err(wrong()),
    };
    let value = parse_value(value, place)?;
    check_test(
        Test {
            argument,
            wide,
            mask,
            value,
        },
        whole,
        place,
    )
}

/// A test that can never hold is a mistake.
fn check_test(test: Test, text: &str, place: &Place) -> Result<Test, Error> {
    let half = |v: u64| !test.wide && v > u64::from(u32::MAX);
    if half(test.value) || (test.mask != u64::MAX && half(test.mask)) {
        return Err(syntax(
            place,
            format!("`{text}`, longer than 32 bits"),
            "a value of 32 bits, or argN:64",
        ));
    }
    if test.value & !test.mask != 0 {
        return Err(syntax(
            place,
            format!("`{text}`, which cannot hold"),
            "a value within the mask",
        ));
    }
    Ok(test)
}

/// A number, a constant, or several joined with `+`.
fn parse_value(text: &str, place: &Place) -> Result<u64, Error> {
    let wrong = |part: &str| {
        syntax(
            place,
            format!("`{part}`"),
            "a decimal or 0x number, a constant that the policy compiler knows (lib/policy/src/symbols.rs), or several joined with +",
        )
    };
    text.split('+').try_fold(0, |sum, part| {
        let value = match part.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => part.parse().ok().or_else(|| symbol(part).map(u64::from)),
        };
        Ok(sum | value.ok_or_else(|| wrong(part))?)
    })
}

/// Leaves out rules that another file has as well, and refuses those that cannot decide anything.
fn merge(rules: Vec<Rule>) -> Result<Vec<Rule>, Error> {
    let mut kept: Vec<Rule> = Vec::with_capacity(rules.len());
    'rules: for rule in rules {
        for earlier in kept.iter().filter(|r| r.syscall == rule.syscall) {
            let same = (&earlier.conditions, earlier.action) == (&rule.conditions, rule.action);
            if same && earlier.place.file != rule.place.file {
                continue 'rules;
            }
            // Rules of one condition are lists of alternatives: they must not share any.
            let overlap = match (&earlier.conditions[..], &rule.conditions[..]) {
                ([a], [b]) => b.iter().any(|test| a.contains(test)),
                (a, b) => a.is_empty() || b.is_empty() || a == b,
            };
            if overlap {
                return Err(Error::Duplicate {
                    place: rule.place,
                    rule: format!("`{}`", rule.text),
                    earlier: earlier.place.clone(),
                });
            }
        }
        kept.push(rule);
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const REPORT: &str = "write # r\ngetpid # r\ngettid # r\nprctl # r\nrt_sigreturn # r\n";

    fn parse(text: &str) -> Result<Policy, Error> {
        let fragment = |name: &str| match name {
            "part" => Some((
                "common/part.policy".to_owned(),
                "close # in the fragment".to_owned(),
            )),
            "whole" => Some((
                "whole.policy".to_owned(),
                "include whole\ninclude p\ninclude part\nread # x".to_owned(),
            )),
            _ => None,
        };
        Policy::parse("p", "p.policy", &format!("{REPORT}{text}"), &fragment)
    }

    fn message(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn rules_are_read_as_written() {
        let policy = parse(
            "# a comment\n\n  mmap   arg2&PROT_EXEC==0 arg3&MAP_TYPE==MAP_PRIVATE|arg3==0x21  # heap\n\
             ioctl arg1==KVM_RUN|44545 # run\nfutex arg3:64==0x100000000 # wide\n\
             clone3 errno=ENOSYS # fall back\ninclude part # why not\n",
        )
        .unwrap();
        let rules = &policy.rules[5..];
        assert_eq!(
            rules[0].text,
            "mmap arg2&PROT_EXEC==0 arg3&MAP_TYPE==MAP_PRIVATE|arg3==0x21"
        );
        assert_eq!(rules[0].reason, "heap");
        assert_eq!(rules[0].place.line, 8);
        let test = |argument, wide, mask, value| Test {
            argument,
            wide,
            mask,
            value,
        };
        assert_eq!(
            rules[0].conditions,
            [
                vec![test(2, false, 4, 0)],
                vec![test(3, false, 15, 2), test(3, false, u64::MAX, 33)]
            ]
        );
        assert_eq!(
            rules[1].conditions,
            [[
                test(1, false, u64::MAX, 0xAE80),
                test(1, false, u64::MAX, 0xAE01)
            ]]
        );
        assert_eq!(rules[2].conditions, [[test(3, true, u64::MAX, 1 << 32)]]);
        assert_eq!(rules[3].action, Action::Errno(38));
        assert_eq!(rules[4].place.to_string(), "common/part.policy:1");
        assert_eq!(
            policy.allowed(),
            [
                "close",
                "futex",
                "getpid",
                "gettid",
                "ioctl",
                "mmap",
                "prctl",
                "rt_sigreturn",
                "write"
            ]
        );
        assert!(policy.text().contains("clone3 errno=ENOSYS  # fall back\n"));
    }

    #[test]
    fn errors_say_where_what_and_what_is_allowed() {
        for (text, parts) in [
            (
                "open_sesame # x",
                "p.policy:6: found `open_sesame`; allowed: the name of an x86-64",
            ),
            (
                "read",
                "p.policy:6: found `read` without a reason; allowed: SYSCALL",
            ),
            ("read #  ", "without a reason"),
            (
                "ioctl KVM_RUN # x",
                "found `KVM_RUN`; allowed: a condition like",
            ),
            ("ioctl arg1 # x", "found `arg1`; allowed: argN==VALUE"),
            ("ioctl arg6==1 # x", "found `arg6==1`"),
            (
                "ioctl arg1==KVM_WALK # x",
                "found `KVM_WALK`; allowed: a decimal",
            ),
            ("ioctl arg1==0x100000000 # x", "longer than 32 bits"),
            ("mmap arg2&4==8 # x", "which cannot hold"),
            ("ioctl arg1==1|1 # x", "twice in one condition"),
            ("clone3 errno=0 # x", "an error number from 1 to 4095"),
            ("clone3 errno=ENOSYS arg0==1 # x", "`arg0==1` after errno="),
            ("include nothing", "include of `nothing`"),
            ("include a b", "allowed: include NAME"),
        ] {
            assert!(message(text).contains(parts), "{text}: {}", message(text));
        }
        assert_eq!(
            Policy::parse("p", "p.policy", "read # x", &|_| None)
                .unwrap_err()
                .to_string(),
            "p.policy: `write` is not allowed, which the report of a denial needs; see `include base`"
        );
    }

    #[test]
    fn rules_for_debug_builds_are_not_in_a_release() {
        let policy = parse("fcntl arg1==F_GETFD debug # checks\nread # x").unwrap();
        let there = |policy: &Policy| policy.allowed().contains(&"fcntl");
        assert!(there(&policy));
        assert_eq!(policy.rules[5].text, "fcntl arg1==F_GETFD debug");
        let released = policy.released();
        assert!(!there(&released) && released.allowed().contains(&"read"));
    }

    #[test]
    fn includes_nest_and_count_once() {
        let policy = parse("include whole\ninclude part\nbrk # last").unwrap();
        let places: Vec<_> = policy.rules[5..]
            .iter()
            .map(|r| r.place.to_string())
            .collect();
        assert_eq!(
            places,
            ["common/part.policy:1", "whole.policy:4", "p.policy:8"]
        );
    }

    #[test]
    fn duplicates_are_refused() {
        for text in [
            "read # a\nread # b",
            "read # a\nread arg0==1 # b",
            "read arg0==1 # b\nread # a",
            "read arg0==1|2 # b\nread arg0==2 # a",
            "read arg0==1 arg1==2 # b\nread arg0==1 arg1==2 # a",
            "close arg0==1 # a\ninclude part",
        ] {
            let message = message(text);
            assert!(message.contains("is decided by"), "{message}");
            assert!(
                message.contains(":7: ") || message.contains("part.policy:1: "),
                "{message}"
            );
        }
        assert!(parse("read arg0==1 # b\nread arg0==2 # a").is_ok());
        // The same rule in another file is the same rule.
        assert_eq!(parse("close # a\ninclude part").unwrap().rules.len(), 6);
    }

    proptest! {
        #[test]
        fn any_text_is_a_policy_or_an_error(text in "[ -~\n]{0,200}") {
            let _ = parse(&text);
        }

        #[test]
        fn nearly_rules_do_not_panic(
            lines in proptest::collection::vec(
                "(read|mmap|ioctl|include|include part)( (arg[0-6](:64)?(&(0x)?[0-9A-F]{0,17})?(==|=)([0-9A-Z_+]{0,20})(\\|[0-9]{1,3})?|errno=[A-Z0-9]{0,6}))*( # [a-z]*)?",
                0..6,
            )
        ) {
            let _ = parse(&lines.join("\n"));
        }

        /// What is written down from rules is read back as the same rules.
        #[test]
        fn text_round_trips(
            rules in proptest::collection::btree_map(20u32..300, (0u8..6, any::<bool>(), any::<u64>(), any::<u64>()), 0..20)
        ) {
            let mut text = String::new();
            for (number, (argument, wide, mask, value)) in &rules {
                let Some(name) = syscall_name(*number) else { continue };
                if REPORT.contains(&format!("{name} #")) { continue }
                let keep = if *wide { u64::MAX } else { u64::from(u32::MAX) };
                let (mask, width) = (mask & keep, if *wide { ":64" } else { "" });
                text += &format!("{name} arg{argument}{width}&{mask:#x}=={:#x} # r\n", value & mask);
            }
            let once = parse(&text).unwrap();
            let again = Policy::parse("p", "p.policy", &once.text(), &|_| None).unwrap();
            prop_assert_eq!(once, again);
        }
    }
}
