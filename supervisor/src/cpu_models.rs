//! `anemone cpu-models`: the CPU models and which of them this host can provide.

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
    /// What this host lacks; absent where no accelerator can be asked.
    missing: Option<Vec<String>>,
}

/// Asks a VMM process and prints.
pub fn print(json: bool, log_level: LevelFilter) -> Result<(), Error> {
    let programs = Programs::new();
    let environment = Environment {
        programs: &programs,
        sandbox: Sandbox::On,
        log_level,
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
            missing: Some(field()?).filter(|text| *text != "?").map(list),
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
        let verdict = match &model.missing {
            None => "no accelerator here to ask".to_owned(),
            Some(missing) if missing.is_empty() => "this host can provide it".to_owned(),
            Some(missing) => format!("this host lacks {}", missing.join(", ")),
        };
        text += &format!("{:<12}  {}\n{:14}{verdict}\n", model.name, model.about, "");
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
        let models = parse("a\tfirst\tx,y\t\nb\tsecond\tx,y,z\tz\nc\tthird\tx\t?\nnonsense\n");
        let missing: Vec<_> = models.iter().map(|m| m.missing.clone()).collect();
        assert_eq!(missing, [Some(vec![]), Some(vec!["z".to_owned()]), None]);
        let text = text(&models);
        assert!(
            text.contains("this host lacks z") && text.contains("more: z"),
            "{text}"
        );
    }
}
