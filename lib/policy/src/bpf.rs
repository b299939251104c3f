//! From rules to a classic BPF program over `struct seccomp_data` (linux/seccomp.h).

use crate::Error;
use crate::parse::{Action, Policy, Rule, Test};

/// One instruction of classic BPF, `struct sock_filter` (linux/filter.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip if a comparison holds.
    pub jt: u8,
    /// Instructions to skip if it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// What happens to calls that a policy does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// SIGSYS; the number travels in `si_errno` and says which policy it was.
    Trap(u16),
    /// The call waits for the answer of the listener.
    Notify,
}

// linux/bpf_common.h: class | size | mode, class | operation | operand.
const LOAD_WORD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data`; the halves of an argument are little-endian.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// AUDIT_ARCH_X86_64 (linux/audit.h).
const X86_64: u32 = 0xC000_003E;

// linux/seccomp.h.
const RET_KILL_PROCESS: u32 = 0x8000_0000;
const RET_TRAP: u32 = 0x0003_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_NOTIFY: u32 = 0x7FC0_0000;
const RET_ALLOW: u32 = 0x7FFF_0000;

/// The kernel's limit (BPF_MAXINSNS).
const LONGEST: usize = 4096;

impl Denial {
    fn value(self) -> u32 {
        match self {
            Denial::Trap(number) => RET_TRAP | u32::from(number),
            Denial::Notify => RET_NOTIFY,
        }
    }
}

impl Action {
    fn value(self) -> u32 {
        match self {
            Action::Allow => RET_ALLOW,
            Action::Errno(number) => RET_ERRNO | u32::from(number),
        }
    }
}

impl Policy {
    /// The program of this policy.
    ///
    /// It checks the architecture (anything but x86-64 kills the process), finds the system call
    /// by binary search over the ranges of numbers that are treated alike, and there tests
    /// arguments in the order of the rules. Calls of the x32 table have numbers that no policy
    /// allows.
    pub fn program(&self, denial: Denial) -> Result<Vec<Instruction>, Error> {
        let mut code = Backwards::default();
        let root = code.search(&ranges(self, denial), denial.value());
        code.goto(root);
        let dispatch = code.push(LOAD_WORD, 0, 0, NUMBER);
        let kill = code.push(RETURN, 0, 0, RET_KILL_PROCESS);
        code.branch(JUMP_EQUAL, X86_64, dispatch, kill);
        code.push(LOAD_WORD, 0, 0, ARCHITECTURE);
        let mut program = code.reversed;
        program.reverse();
        if program.len() > LONGEST {
            return Err(Error::TooLong {
                name: self.name.clone(),
                length: program.len(),
            });
        }
        Ok(program)
    }
}

/// What a program does with a range of system call numbers.
#[derive(Debug, Clone, PartialEq)]
enum Treatment<'a> {
    /// Return this value.
    Always(u32),
    /// Look at the arguments.
    Rules(Vec<&'a Rule>),
}

/// All system call numbers, as ranges that are treated alike: the first number of each.
fn ranges(policy: &Policy, denial: Denial) -> Vec<(u32, Treatment<'_>)> {
    let denied = Treatment::Always(denial.value());
    let mut ranges = Vec::new();
    let mut next = 0;
    for (number, rules) in policy.by_syscall() {
        if number > next {
            ranges.push((next, denied.clone()));
        }
        let treatment = match rules[..] {
            [rule] if rule.conditions.is_empty() => Treatment::Always(rule.action.value()),
            _ => Treatment::Rules(rules),
        };
        ranges.push((number, treatment));
        next = number + 1;
    }
    ranges.push((next, denied));
    ranges.dedup_by(|later, earlier| {
        matches!(earlier.1, Treatment::Always(_)) && later.1 == earlier.1
    });
    ranges
}

/// A program under construction, last instruction first: a jump goes only forwards, so that the
/// distance to its target is known when it is written.
#[derive(Default)]
struct Backwards {
    reversed: Vec<Instruction>,
}

/// An instruction already written, counted from the end of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Label(usize);

impl Backwards {
    fn push(&mut self, code: u16, jt: u8, jf: u8, k: u32) -> Label {
        self.reversed.push(Instruction { code, jt, jf, k });
        self.here()
    }

    /// The instruction written last, which is where execution goes from the next one written.
    fn here(&self) -> Label {
        Label(self.reversed.len().saturating_sub(1))
    }

    /// How many instructions lie between the next one written and `label`.
    fn distance(&self, label: Label) -> usize {
        self.reversed.len() - 1 - label.0
    }

    /// Makes execution go on at `label` from whatever is written next.
    fn goto(&mut self, label: Label) {
        let distance = self.distance(label);
        if distance > 0 {
            // A program is far shorter than 2^32.
            self.push(JUMP, 0, 0, distance as u32);
        }
    }

    /// `label`, or a long jump to it where a comparison could not reach it.
    fn reachable(&mut self, label: Label) -> Label {
        // One less than the 255 of a comparison, for the other target's long jump.
        if self.distance(label) >= 255 {
            self.goto(label);
            return self.here();
        }
        label
    }

    /// A comparison of the accumulator with `k`.
    fn branch(&mut self, code: u16, k: u32, holds: Label, fails: Label) -> Label {
        let holds = self.reachable(holds);
        let fails = self.reachable(fails);
        // Both are at most 255 away now.
        self.push(
            code,
            self.distance(holds) as u8,
            self.distance(fails) as u8,
            k,
        )
    }

    /// A return of `value`, an earlier one if it is within reach of the jumps here.
    fn ret(&mut self, value: u32) -> Label {
        let wanted = Instruction {
            code: RETURN,
            jt: 0,
            jf: 0,
            k: value,
        };
        let reach = self.reversed.len().saturating_sub(128);
        match self.reversed.iter().skip(reach).rposition(|i| *i == wanted) {
            Some(i) => Label(reach + i),
            None => self.push(RETURN, 0, 0, value),
        }
    }

    /// Finds the range of the number in the accumulator.
    fn search(&mut self, ranges: &[(u32, Treatment<'_>)], denied: u32) -> Label {
        if let [(_, treatment)] = ranges {
            return match treatment {
                Treatment::Always(value) => self.ret(*value),
                Treatment::Rules(rules) => self.rules(rules, denied),
            };
        }
        let (low, high) = ranges.split_at(ranges.len() / 2);
        let at_least = self.search(high, denied);
        let below = self.search(low, denied);
        self.branch(JUMP_AT_LEAST, high[0].0, at_least, below)
    }

    /// The rules of one system call: the first that matches decides.
    fn rules(&mut self, rules: &[&Rule], denied: u32) -> Label {
        let mut otherwise = self.ret(denied);
        for rule in rules.iter().rev() {
            let mut then = self.ret(rule.action.value());
            for condition in rule.conditions.iter().rev() {
                then = self.condition(condition, then, otherwise);
            }
            otherwise = then;
        }
        otherwise
    }

    /// Goes on at `then` if one of the tests holds.
    fn condition(&mut self, tests: &[Test], mut then: Label, otherwise: Label) -> Label {
        let mut fails = otherwise;
        // Tests of the same bits share one load.
        let runs = tests
            .chunk_by(|a, b| !a.wide && !b.wide && (a.argument, a.mask) == (b.argument, b.mask));
        for run in runs.rev() {
            let next = fails;
            for test in run.iter().rev() {
                // Kept, so that many tests share one long jump.
                then = self.reachable(then);
                fails = self.branch(JUMP_EQUAL, test.value as u32, then, fails);
            }
            let Some(&test) = run.first() else { continue };
            fails = self.load(test.argument, 0, test.mask as u32);
            // An upper half that is masked out decides nothing.
            if test.wide && test.mask >> 32 != 0 {
                self.branch(JUMP_EQUAL, (test.value >> 32) as u32, fails, next);
                fails = self.load(test.argument, 4, (test.mask >> 32) as u32);
            }
        }
        fails
    }

    /// Loads half an argument, masked, for the instruction written last.
    fn load(&mut self, argument: u8, half: u32, mask: u32) -> Label {
        if mask != u32::MAX {
            self.push(AND, 0, 0, mask);
        }
        self.push(LOAD_WORD, 0, 0, ARGUMENTS + 8 * u32::from(argument) + half)
    }
}
