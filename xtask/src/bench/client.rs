//! Clients that play the driver and the peer of a device's process: how they are run, and what they print.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::table::decimal;
use crate::{build, sh};

use super::median;

/// The client's line.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct Sample {
    pub per_second: f64,
    pub cpu_ns: f64,
    pub round_trip_ns: f64,
    pub raw_round_trip_ns: f64,
    pub raw_cpu_ns: f64,
}

/// A client and the program that it measures.
#[derive(Debug)]
pub struct Client {
    client: PathBuf,
    program: PathBuf,
    runs: usize,
    seconds: String,
}

impl Client {
    /// The example `name` of the package `package`, whose program is called like it. Each load is
    /// measured `runs` times for `seconds` each.
    pub fn build(package: &str, name: &str, runs: usize, seconds: u32) -> Result<Self> {
        Ok(Self {
            program: build::full()?.path(package),
            client: build::example(package, name)?,
            runs,
            seconds: seconds.to_string(),
        })
    }

    /// Measures the load that these arguments describe.
    pub fn measure(&self, load: &[&str]) -> Result<Samples> {
        let samples = (1..=self.runs).map(|round| {
            let what = load.join(" ");
            sh::progress(format_args!("{what}, round {round} of {}", self.runs));
            let output = sh::quiet(
                Command::new(&self.client)
                    .arg("--program")
                    .arg(&self.program)
                    .args(load)
                    .args(["--seconds", &self.seconds]),
            )?;
            serde_json::from_slice(&output.stdout).context("the client has printed something else")
        });
        Ok(Samples(samples.collect::<Result<_>>()?))
    }
}

/// What the runs of a load have come to.
#[derive(Debug)]
pub struct Samples(Vec<Sample>);

impl From<Vec<Sample>> for Samples {
    fn from(samples: Vec<Sample>) -> Self {
        Self(samples)
    }
}

impl Samples {
    /// The middle of a value.
    pub fn median(&self, value: fn(&Sample) -> f64) -> f64 {
        median(&self.0.iter().map(value).collect::<Vec<_>>())
    }

    /// The cells of a ping: round trip, raw one, ratio, CPU time, raw one, and what is added.
    pub fn ping(&self) -> Vec<Value> {
        let values: [fn(&Sample) -> f64; 6] = [
            |s| s.round_trip_ns / 1e3,
            |s| s.raw_round_trip_ns / 1e3,
            |s| s.round_trip_ns / s.raw_round_trip_ns,
            |s| s.cpu_ns / 1e3,
            |s| s.raw_cpu_ns / 1e3,
            |s| (s.cpu_ns - s.raw_cpu_ns) / 1e3,
        ];
        values.map(|value| decimal(self.median(value))).into()
    }
}
