//! `anemone cpu-models`: the CPU models and which of them this host can provide.

use std::collections::BTreeMap;

use anemone_config::{CpuModel, Sandbox};
use log::LevelFilter;
use serde::Serialize;

use crate::accel::{self, Environment};
use crate::error::{Error, printable};
use crate::programs::Programs;

/// What `--json` prints of each model.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct Report {
    name: String,
    about: String,
    features: Vec<String>,
    /// What each accelerator lacks on this host; `null` where it cannot be asked.
    missing: BTreeMap<String, Option<Vec<String>>>,
}

/// Asks a VMM process and prints.
pub fn print(json: bool, log_level: LevelFilter) -> Result<(), Error> {
    let programs = Programs::new();
    let environment = Environment {
        programs: &programs,
        sandbox: Sandbox::On,
        log_level,
        groups: None,
    };
    let models = parse(&accel::cpu_models(environment)?);
    if json {
        println!(
            "{}",
            serde_json::to_string_pretty(&models).map_err(|e| Error::Failed(e.to_string()))?
        );
    } else {
        print!("{}", text(&models));
    }
    Ok(())
}

/// Reads the lines of `anemone-vmm --cpu-models`.
fn parse(answer: &str) -> Vec<Report> {
    let list = |text: &str| {
        text.split(',')
            .filter(|name| !name.is_empty())
            .map(printable)
            .collect::<Vec<_>>()
    };
    let line = |line: &str| {
        let mut fields = line.split('\t');
        let mut field = || fields.next();
        Some(Report {
            name: printable(field()?),
            about: printable(field()?),
            features: list(field()?),
            missing: fields
                .filter_map(|field| field.split_once('='))
                .map(|(accel, text)| {
                    let missing = Some(text).filter(|text| *text != "?").map(list);
                    (printable(accel), missing)
                })
                .collect(),
        })
    };
    answer.lines().filter_map(line).collect()
}

fn text(models: &[Report]) -> String {
    let mut text = format!(
        "{:<12}  the host's CPU as far as the accelerator passes it on (default; not frozen)\n",
        CpuModel::default().to_string()
    );
    let mut known: Vec<&String> = Vec::new();
    for model in models {
        text += &format!("{:<12}  {}\n", model.name, model.about);
        for (accel, missing) in &model.missing {
            let verdict = match missing {
                None => "cannot be asked here".to_owned(),
                Some(missing) if missing.is_empty() => "can provide it on this host".to_owned(),
                Some(missing) => format!("lacks {} on this host", missing.join(", ")),
            };
            text += &format!("{:14}{accel}: {verdict}\n", "");
        }
        // Each level has the features of those before.
        let new: Vec<_> = model
            .features
            .iter()
            .filter(|f| !known.contains(f))
            .collect();
        let plus = if known.is_empty() { "" } else { "more: " };
        let names: Vec<&str> = new.iter().map(|f| f.as_str()).collect();
        text += &format!("{:14}{plus}{}\n", "", names.join(" "));
        known.extend(new);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration_and_tables_name_the_same_models() {
        assert_eq!(CpuModel::WORDS, anemone_cpu::names());
    }

    #[test]
    fn answers_are_read() {
        let models = parse(
            "a\tfirst\tx,y\tkvm=\tsoft=\nb\tsecond\tx,y,z\tkvm=?\tsoft=z\nc\tthird\tx\nnonsense\n",
        );
        let missing = |model: usize, accel: &str| models[model].missing[accel].clone();
        assert_eq!(models.len(), 3);
        assert_eq!(missing(0, "kvm"), Some(vec![]));
        assert_eq!(missing(0, "soft"), Some(vec![]));
        assert_eq!(missing(1, "kvm"), None);
        assert_eq!(missing(1, "soft"), Some(vec!["z".to_owned()]));
        assert!(models[2].missing.is_empty());
        let text = text(&models);
        for part in [
            "soft: can provide it",
            "kvm: cannot be asked",
            "soft: lacks z on this host",
            "more: z",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
