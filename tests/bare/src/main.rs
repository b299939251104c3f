//! Bare-metal guests that show whether a CPU behaves as the manuals say, on any accelerator.
//!
//! Each case is a guest of its own, in assembly language (`guest/*.s`), that compares what it finds
//! with what the manuals say. What it has found is printed, one line for each check, and must be
//! `expected.txt` byte for byte: so all accelerators agree, and no check is left out unseen. A case
//! whose CPU features are not offered here, according to CPUID, prints nothing.

mod image;
mod machine;

use std::fs::OpenOptions;
use std::process::ExitCode;
use std::time::Duration;

use anemone_accel_api::{Vm, spawn};
use anemone_accel_kvm::KvmVm;
use anemone_accel_soft::{SoftVm, code_memory};

use image::{Case, Findings};
use machine::End;

const EXPECTED: &str = include_str!("../expected.txt");
/// Problems of a case that are shown.
const SHOWN: usize = 20;

const USAGE: &str = "\
usage: anemone-bare [--accel kvm|soft] [--cpu-model MODEL] [--only NAME]... [--patience SECONDS]
       anemone-bare --list

Standard output is what the guests have found; standard error, what is wrong with it.";

/// What the command line says.
struct Options {
    accelerator: String,
    model: String,
    only: Vec<String>,
    /// Longest that a case may take. In the rig four CPUs share two emulated ones.
    patience: Duration,
    list: bool,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn options() -> Result<Option<Options>> {
    use lexopt::prelude::*;
    let mut options = Options {
        accelerator: "kvm".to_string(),
        model: "host".to_string(),
        only: Vec::new(),
        patience: Duration::from_secs(40),
        list: false,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("accel") => options.accelerator = parser.value()?.string()?,
            Long("cpu-model") => options.model = parser.value()?.string()?,
            Long("only") => options.only.push(parser.value()?.string()?),
            Long("patience") => {
                options.patience = Duration::from_secs(parser.value()?.parse()?);
            }
            Long("list") => options.list = true,
            Long("help") | Short('h') => return Ok(None),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(options))
}

fn new_vm(options: &Options, cpus: u32) -> Result<Box<dyn Vm>> {
    match options.accelerator.as_str() {
        "kvm" => {
            let device = OpenOptions::new()
                .read(true)
                .write(true)
                .open("/dev/kvm")
                .map_err(|e| format!("/dev/kvm: {e}"))?;
            Ok(Box::new(KvmVm::new(device.into(), &options.model, &spawn)?))
        }
        "soft" => {
            let code: std::io::Result<Vec<_>> = (0..cpus).map(|_| code_memory()).collect();
            Ok(Box::new(SoftVm::new(&options.model, code?, &spawn)?))
        }
        other => Err(format!("no accelerator `{other}`").into()),
    }
}

fn main() -> ExitCode {
    match options().and_then(|options| match options {
        Some(options) if options.list => list(),
        Some(options) => run(&options),
        None => {
            println!("{USAGE}");
            Ok(true)
        }
    }) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn list() -> Result<bool> {
    for case in image::cases() {
        println!("{}", case.name);
    }
    Ok(true)
}

/// Runs the cases; returns whether everything is as it should be.
fn run(options: &Options) -> Result<bool> {
    let cases = image::cases();
    if let Some(name) = options
        .only
        .iter()
        .find(|n| cases.iter().all(|c| c.name != **n))
    {
        return Err(format!("there is no case `{name}`; --list shows them").into());
    }
    let mut wrong = 0;
    let mut checks = 0;
    for case in &cases {
        if !options.only.is_empty() && !options.only.iter().any(|name| name == case.name) {
            continue;
        }
        if case.not_on_kvm && options.accelerator == "kvm" {
            eprintln!("{}: left out on KVM", case.name);
            continue;
        }
        let vm = new_vm(options, case.cpus)?;
        let (end, findings) = machine::run(case, &*vm, options.patience)?;
        match judge(case, &end, findings) {
            Some((lines, problems)) => {
                print!("{lines}");
                checks += lines.lines().count();
                wrong += problems.len();
                for problem in problems.iter().take(SHOWN) {
                    eprintln!("FAIL {}: {problem}", case.name);
                }
                if problems.len() > SHOWN {
                    eprintln!("FAIL {}: {} more", case.name, problems.len() - SHOWN);
                }
            }
            None => eprintln!("{}: not offered by this CPU", case.name),
        }
    }
    eprintln!("{checks} checks, {wrong} wrong");
    Ok(wrong == 0)
}

/// The lines of a case and what is wrong with them; nothing if it could not run.
fn judge(case: &Case, end: &End, findings: Findings) -> Option<(String, Vec<String>)> {
    let Findings::Found(findings) = findings else {
        return None;
    };
    let mut problems = Vec::new();
    let mut lines = String::new();
    for finding in &findings {
        lines += &format!("{} {} {}\n", case.name, finding.name, finding.got);
        if finding.got != finding.want {
            problems.push(format!(
                "{} is {}, not {}",
                finding.name, finding.got, finding.want
            ));
        }
    }
    match end {
        End::Port if !case.triple_fault => {}
        End::TripleFault if case.triple_fault => {
            lines += &format!("{} end triple-fault\n", case.name);
        }
        End::Port => problems.push("no triple fault".to_string()),
        End::TripleFault => problems.push("a triple fault".to_string()),
        End::Error(why) => problems.push(why.clone()),
        End::Stuck(place) => problems.push(format!("stuck at {place}")),
    }
    let prefix = format!("{} ", case.name);
    let expected: String = EXPECTED
        .split_inclusive('\n')
        .filter(|line| line.starts_with(&prefix))
        .collect();
    if problems.is_empty() && lines != expected {
        problems.push(format!(
            "its lines are not those of expected.txt:\n{expected}"
        ));
    }
    Some((lines, problems))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::Finding;

    fn case() -> Case {
        let cases = image::cases();
        *cases.iter().find(|case| case.name == "traps").unwrap()
    }

    /// The lines of `expected.txt` for a case, as findings.
    fn findings(name: &str) -> Vec<Finding> {
        EXPECTED
            .lines()
            .filter_map(|line| {
                let mut words = line.split(' ');
                (words.next() == Some(name)).then(|| {
                    let name = words.next().unwrap();
                    let got = words.next().unwrap().to_string();
                    Finding {
                        name,
                        want: got.clone(),
                        got,
                    }
                })
            })
            .collect()
    }

    fn problems(end: &End, findings: Vec<Finding>) -> Vec<String> {
        judge(&case(), end, Findings::Found(findings)).unwrap().1
    }

    #[test]
    fn every_case_has_lines_and_every_line_a_case() {
        let cases = image::cases();
        for case in &cases {
            let prefix = format!("{} ", case.name);
            assert!(EXPECTED.lines().any(|l| l.starts_with(&prefix)), "{prefix}");
        }
        for line in EXPECTED.lines() {
            let name = line.split(' ').next().unwrap();
            assert_eq!(cases.iter().filter(|c| c.name == name).count(), 1, "{line}");
        }
    }

    #[test]
    fn what_is_expected_is_right() {
        let good = findings("traps");
        assert!(!good.is_empty());
        assert!(problems(&End::Port, good).is_empty());
    }

    #[test]
    fn what_differs_is_wrong() {
        let mut wrong = findings("traps");
        wrong[1].got = "#GP(0x0)".to_string();
        assert_eq!(problems(&End::Port, wrong).len(), 1);
        // A check that is missing, and one that agrees with the guest but not with the file.
        let mut fewer = findings("traps");
        fewer.pop();
        assert_eq!(problems(&End::Port, fewer).len(), 1);
        let mut other = findings("traps");
        other[0].got = "#UD".to_string();
        other[0].want = "#UD".to_string();
        assert_eq!(problems(&End::Port, other).len(), 1);
    }

    #[test]
    fn another_end_is_wrong() {
        for end in [
            End::TripleFault,
            End::Stuck(String::new()),
            End::Error(String::new()),
        ] {
            assert!(!problems(&end, findings("traps")).is_empty());
        }
        assert!(judge(&case(), &End::Port, Findings::NotOffered).is_none());
    }
}
