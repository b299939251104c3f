//! `xtask policy`: which rules of the policies a run of the tests uses, and which none needs.

mod trace;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anemone_policy::{Action, Denial, Policy, Rule, load};
use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{build, sh};

pub use trace::Call;

/// A rule whose reason begins so is for what tests cannot bring about.
const RARE: &str = "rare: ";

/// A policy and what was seen of it.
struct Watched {
    program: String,
    policy: Policy,
    /// The compiled filter.
    bytes: Vec<u8>,
    /// For each rule, how often each of its tests held; one number if it has no condition.
    hits: Vec<Vec<u64>>,
}

/// All policies of the tree.
pub struct Policies(Vec<Watched>);

/// What was seen, in a file: program, policy, rule, and how often each of its tests held.
#[derive(Default, Serialize, Deserialize)]
struct Seen(BTreeMap<String, Vec<u64>>);

impl Policies {
    /// Reads the policies of the supervisor, the VMM and every folder of `devices`.
    pub fn load(root: &Path) -> Result<Self> {
        let mut folders = vec![
            ("anemone".to_owned(), root.join("supervisor/policy")),
            ("anemone-vmm".to_owned(), root.join("vmm/policy")),
        ];
        for entry in fs::read_dir(root.join("devices"))? {
            let entry = entry?;
            let policy = entry.path().join("policy");
            if policy.is_dir() {
                let name = entry.file_name().to_string_lossy().into_owned();
                folders.push((format!("anemone-{name}"), policy));
            }
        }
        folders.sort();
        let mut watched = Vec::new();
        for (program, folder) in folders {
            for (index, policy) in load(&folder)?.into_iter().enumerate() {
                watched.push(Watched {
                    program: program.clone(),
                    bytes: filter(&policy, u16::try_from(index)?)?,
                    hits: policy.rules.iter().map(|r| vec![0; tests(r)]).collect(),
                    policy,
                });
            }
        }
        Ok(Self(watched))
    }

    /// Adds what another run has seen.
    fn add(&mut self, seen: &Seen) {
        for policy in &mut self.0 {
            for (rule, hits) in policy.policy.rules.iter().zip(&mut policy.hits) {
                let before = seen.0.get(&key(&policy.program, &policy.policy, rule));
                for (sum, n) in hits.iter_mut().zip(before.into_iter().flatten()) {
                    *sum += n;
                }
            }
        }
    }

    fn seen(&self) -> Seen {
        let rules = self.0.iter().flat_map(|watched| {
            let rules = watched.policy.rules.iter().zip(&watched.hits);
            rules.map(|(rule, hits)| {
                let name = key(&watched.program, &watched.policy, rule);
                (name, hits.clone())
            })
        });
        Seen(rules.collect())
    }

    /// Lines of the policies' files that nothing has used, with what of them was not used.
    fn unused(&self) -> Vec<String> {
        // A line counts once, however many policies include it.
        let mut lines: BTreeMap<(PathBuf, usize), (&Rule, Vec<u64>)> = BTreeMap::new();
        for watched in &self.0 {
            for (rule, hits) in watched.policy.rules.iter().zip(&watched.hits) {
                let place = (PathBuf::from(&rule.place.file), rule.place.line);
                let (_, sum) = lines
                    .entry(place)
                    .or_insert_with(|| (rule, vec![0; hits.len()]));
                for (sum, n) in sum.iter_mut().zip(hits) {
                    *sum += n;
                }
            }
        }
        let mut found = Vec::new();
        for ((file, line), (rule, hits)) in lines {
            if rule.reason.starts_with(RARE) || hits.iter().all(|n| *n > 0) {
                continue;
            }
            let file = file.strip_prefix(sh::root()).unwrap_or(&file).display();
            let unused = hits.iter().filter(|n| **n == 0).count();
            let part = match unused == hits.len() {
                true => String::new(),
                false => format!(" (only {})", unused_tests(rule, &hits)),
            };
            found.push(format!("{file}:{line}: {}{part}", rule.text));
        }
        found
    }

    /// One line per policy: calls allowed, calls used.
    fn table(&self) -> String {
        let mut text = format!(
            "{:<18} {:<12} {:>7} {:>5}\n",
            "program", "policy", "allowed", "used"
        );
        for watched in &self.0 {
            let mut used: Vec<_> = (watched.policy.rules.iter().zip(&watched.hits))
                .filter(|(rule, hits)| rule.action == Action::Allow && hits.iter().any(|n| *n > 0))
                .map(|(rule, _)| rule.syscall)
                .collect();
            used.sort_unstable();
            used.dedup();
            text += &format!(
                "{:<18} {:<12} {:>7} {:>5}\n",
                watched.program,
                watched.policy.name,
                watched.policy.allowed().len(),
                used.len()
            );
        }
        text
    }

    /// The rules of each policy that were not used by its own threads.
    fn details(&self) -> String {
        let mut text = String::new();
        for watched in &self.0 {
            let unused: Vec<_> = (watched.policy.rules.iter().zip(&watched.hits))
                .filter(|(_, hits)| hits.iter().all(|n| *n == 0))
                .map(|(rule, _)| rule.text.as_str())
                .collect();
            text += &format!(
                "{}, {}: {}\n",
                watched.program,
                watched.policy.name,
                unused.join("; ")
            );
        }
        text
    }
}

fn key(program: &str, policy: &Policy, rule: &Rule) -> String {
    format!("{program} {} {}", policy.name, rule.text)
}

/// How many things of a rule can be used separately.
fn tests(rule: &Rule) -> usize {
    rule.conditions.iter().map(Vec::len).sum::<usize>().max(1)
}

/// The words of a rule's conditions that never held.
fn unused_tests(rule: &Rule, hits: &[u64]) -> String {
    let words = rule.text.split_whitespace().skip(1);
    let words = words
        .filter(|word| word.starts_with("arg"))
        .flat_map(|word| word.split('|'));
    let unused = words.zip(hits).filter(|(_, n)| **n == 0);
    unused.map(|(word, _)| word).collect::<Vec<_>>().join(", ")
}

fn filter(policy: &Policy, index: u16) -> Result<Vec<u8>> {
    let program = policy.program(Denial::Trap(index))?;
    // `struct sock_filter` (linux/filter.h).
    Ok(program
        .iter()
        .flat_map(|i| {
            let [a, b] = i.code.to_ne_bytes();
            let [c, d, e, f] = i.k.to_ne_bytes();
            [a, b, i.jt, i.jf, c, d, e, f]
        })
        .collect())
}

impl trace::Observer for Policies {
    fn recognise(&mut self, program: &str, bytes: &[u8]) -> Option<usize> {
        // Two programs may have the same policy.
        let alike = |w: &Watched| w.bytes == bytes;
        self.0
            .iter()
            .position(|w| alike(w) && w.program == program)
            .or_else(|| self.0.iter().position(alike))
    }

    fn call(&mut self, filters: &[usize], call: Call) {
        for watched in filters {
            let Some(watched) = self.0.get_mut(*watched) else {
                continue;
            };
            let rules = watched.policy.rules.iter().zip(&mut watched.hits);
            // The first rule that matches decides.
            for (rule, hits) in rules.filter(|(rule, _)| rule.syscall == call.number) {
                if count(rule, hits, &call) {
                    break;
                }
            }
        }
    }
}

/// Whether a rule matches; counts the tests that held.
fn count(rule: &Rule, hits: &mut [u64], call: &Call) -> bool {
    let mut held = Vec::new();
    let mut first = 0;
    for tests in &rule.conditions {
        let which = tests.iter().position(|test| {
            let argument = call.arguments[usize::from(test.argument)];
            let (argument, mask) = match test.wide {
                true => (argument, test.mask),
                false => (u64::from(argument as u32), test.mask & 0xFFFF_FFFF),
            };
            argument & mask == test.value
        });
        let Some(which) = which else { return false };
        held.push(first + which);
        first += tests.len();
    }
    if held.is_empty() {
        held.push(0);
    }
    for index in held {
        if let Some(n) = hits.get_mut(index) {
            *n += 1;
        }
    }
    true
}

/// Runs a command, or the tests that go through all that the policies are for, and prints the
/// lines that nothing has used. With `keep`, adds to what earlier runs have seen.
pub fn run(keep: Option<&Path>, details: bool, command: &[OsString]) -> Result<bool> {
    let mut policies = Policies::load(&sh::root())?;
    if let Some(path) = keep.filter(|path| path.exists()) {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let seen = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        policies.add(&seen);
    }
    let commands = match command {
        [] => standard(),
        words => vec![words.to_vec()],
    };
    let mut failures = Vec::new();
    for words in &commands {
        let text: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
        sh::progress(format_args!("watching {}", text.join(" ")));
        let status = trace::run(words, &mut policies)?;
        if status != 0 {
            failures.push(format!("{} failed: status {status}", text.join(" ")));
        }
    }
    if let Some(path) = keep {
        let text = serde_json::to_string_pretty(&policies.seen())?;
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    print!("{}", policies.table());
    if details {
        println!("\nNot used by the threads of a policy itself:");
        print!("{}", policies.details());
    }
    let unused = policies.unused();
    for line in &unused {
        println!("unused: {line}");
    }
    println!("{} lines of policies are not used", unused.len());
    ensure!(failures.is_empty(), "{}", failures.join("; "));
    Ok(unused.is_empty())
}

/// What goes through all policies: the tests of the packages that have some, and whole VMs.
fn standard() -> Vec<Vec<OsString>> {
    let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
    let mut unit = vec![build::cargo().get_program().to_owned()];
    unit.extend(words(&["test", "--quiet", "--no-fail-fast"]));
    let mut folders = vec!["supervisor".to_owned(), "vmm".to_owned()];
    let devices = fs::read_dir(sh::root().join("devices"));
    for entry in devices.into_iter().flatten().flatten() {
        folders.push(format!("devices/{}", entry.file_name().to_string_lossy()));
    }
    folders.sort();
    for folder in folders {
        let manifest = sh::root().join(folder).join("Cargo.toml");
        if let Some(name) = package(&manifest) {
            unit.extend(words(&["--package", &name]));
        }
    }
    let mut whole = vec![
        std::env::current_exe()
            .unwrap_or_else(|_| "xtask".into())
            .into(),
    ];
    whole.extend(words(&["test", "badinput", "vm-soft"]));
    vec![unit, whole]
}

/// The name in a manifest.
fn package(manifest: &Path) -> Option<String> {
    let text = fs::read_to_string(manifest).ok()?;
    let table: toml::Table = text.parse().ok()?;
    Some(table.get("package")?.get("name")?.as_str()?.to_owned())
}
