//! What a runner of scenarios (`tests/guest`) says: verdicts, and a log file for each scenario.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anemone_guest_init::protocol::{FIGURES, Line};
use anyhow::{Context, Result, bail};

use crate::report::{Outcome, Verdict};
use crate::sh;

/// Verdicts so far, and the scenario that runs.
pub struct Journal {
    logs: PathBuf,
    running: Option<Running>,
    /// Verdicts, in the order in which they came.
    pub outcomes: Vec<Outcome>,
    /// Figures for the reader of the whole.
    pub figures: Vec<String>,
}

struct Running {
    name: String,
    log: File,
    /// Files beside the log.
    kept: BTreeMap<String, File>,
}

impl Journal {
    /// Begins; logs are written to the folder `logs`.
    pub fn new(logs: &Path) -> Result<Self> {
        fs::create_dir_all(logs).with_context(|| logs.display().to_string())?;
        Ok(Self {
            logs: logs.to_path_buf(),
            running: None,
            outcomes: Vec::new(),
            figures: Vec::new(),
        })
    }

    /// The scenario that has begun and has no verdict yet.
    pub fn running(&self) -> Option<&str> {
        self.running.as_ref().map(|running| running.name.as_str())
    }

    /// Takes one line; returns whether it was the last.
    pub fn line(&mut self, text: &str) -> Result<bool> {
        match Line::parse(text) {
            Line::Tick => {}
            Line::End => return Ok(true),
            Line::Begin(name) => {
                let log = File::create(self.logs.join(format!("{name}.log")))?;
                sh::progress(format_args!("  {name} ..."));
                self.running = Some(Running {
                    name,
                    log,
                    kept: BTreeMap::new(),
                });
            }
            Line::Pass(name, millis) => {
                let seconds = millis as f64 / 1e3;
                sh::progress(format_args!("  {name} passed ({seconds:.1} s)"));
                self.finish(&name, Verdict::Passed);
            }
            Line::Fail(name, why) => {
                sh::progress(format_args!("  {name} FAILED: {why}"));
                self.finish(&name, Verdict::Failed(why));
            }
            Line::Log(text) => {
                if let Some(figures) = text.strip_prefix(FIGURES) {
                    sh::progress(format_args!("    {figures}"));
                    self.figures.push(figures.to_string());
                }
                if let Some(running) = &mut self.running {
                    writeln!(running.log, "{text}")?;
                }
            }
            Line::Keep(name, text) => {
                if let Some(running) = &mut self.running {
                    let file = match running.kept.entry(name) {
                        Entry::Occupied(known) => known.into_mut(),
                        Entry::Vacant(new) => {
                            let path = format!("{}-{}.log", running.name, new.key());
                            new.insert(File::create(self.logs.join(path))?)
                        }
                    };
                    writeln!(file, "{text}")?;
                }
            }
        }
        Ok(false)
    }

    fn finish(&mut self, name: &str, verdict: Verdict) {
        self.running = None;
        self.outcomes.push(Outcome::new(name, verdict));
    }
}

/// The lines of `source`, lossily decoded, until its end.
pub fn lines(source: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(source);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    lines
}

/// Names of the scenarios for an accelerator with what they show, as the runner lists them.
pub fn scenarios(runner: &Path, accel: &str) -> Result<Vec<(String, String)>> {
    let listing = sh::quiet(Command::new(runner).args(["--list", accel]))?;
    Ok(String::from_utf8_lossy(&listing.stdout)
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, about)| (name.to_string(), about.to_string()))
        .collect())
}

/// The names of scenarios to run for a `GROUP` or `GROUP:NAME` request.
pub fn select(all: &[(String, String)], wanted: &[String]) -> Result<Vec<String>> {
    for name in wanted {
        if !all.iter().any(|(known, _)| known == name) {
            let known: Vec<_> = all.iter().map(|(n, _)| n.as_str()).collect();
            bail!("no scenario {name}; there are {}", known.join(", "));
        }
    }
    Ok(all
        .iter()
        .map(|(name, _)| name.clone())
        .filter(|name| wanted.is_empty() || wanted.contains(name))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_ends_the_log_of_its_scenario() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::new(dir.path()).unwrap();
        let said = [
            "early",
            "rig: keep f early",
            "rig: begin a",
            "text",
            "rig: keep f one",
            "rig: keep f   two",
            "rig: fail a why",
            "late",
        ];
        for line in said {
            assert!(!journal.line(line).unwrap());
        }
        assert!(journal.running().is_none());
        assert!(journal.line("rig: end").unwrap());
        let failed = Verdict::Failed("why".into());
        assert_eq!(journal.outcomes, [Outcome::new("a", failed)]);
        assert_eq!(fs::read(dir.path().join("a.log")).unwrap(), b"text\n");
        let kept = fs::read(dir.path().join("a-f.log")).unwrap();
        assert_eq!(kept, b"one\n  two\n");
    }

    #[test]
    fn unknown_scenarios_are_named() {
        let all = [("a".to_string(), "about".to_string())];
        assert_eq!(select(&all, &[]).unwrap(), ["a"]);
        let error = select(&all, &["b".to_string()]).unwrap_err().to_string();
        assert!(error.contains("no scenario b; there are a"));
    }
}
