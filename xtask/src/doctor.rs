//! What `anemone doctor --json` says, as far as it matters here.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::build::Binaries;
use crate::sh;

/// The report.
#[derive(Debug, Deserialize)]
pub struct Doctor {
    accelerators: Vec<Finding>,
    policies: Vec<Policy>,
}

#[derive(Debug, Deserialize)]
struct Finding {
    name: String,
    ok: bool,
    text: String,
}

#[derive(Debug, Deserialize)]
struct Policy {
    program: String,
    policy: String,
    system_calls: u32,
}

impl Doctor {
    /// Asks.
    pub fn ask(product: &Binaries) -> Result<Self> {
        let mut command = product.command("anemone");
        let done = sh::run_limited(command.args(["doctor", "--json"]), Duration::from_secs(60))?;
        if done.code() != Some(0) {
            bail!("anemone doctor failed: {}", done.output);
        }
        serde_json::from_str(&done.output).context("anemone doctor has printed something else")
    }

    /// Why KVM cannot run a stock kernel here; `None` if it can.
    pub fn kvm_problem(&self) -> Option<&str> {
        match self.accelerators.iter().find(|a| a.name == "kvm") {
            Some(kvm) => (!kvm.ok).then_some(&kvm.text),
            None => Some("this build has no KVM"),
        }
    }

    /// Numbers of allowed system calls of a program's policies, as "main 31, vcpu 20".
    pub fn system_calls(&self, program: &str) -> String {
        let counts: Vec<_> = self
            .policies
            .iter()
            .filter(|p| p.program == program)
            .map(|p| format!("{} {}", p.policy, p.system_calls))
            .collect();
        if counts.is_empty() {
            "not filtered".to_string()
        } else {
            counts.join(", ")
        }
    }
}
