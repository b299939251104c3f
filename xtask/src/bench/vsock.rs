//! `bench vsock`: a stream through `anemone-vsock` between a driver and a program of the host that the
//! same client plays. No guest.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::table::{Table, decimal, publish};
use crate::{build, sh};

use super::median;

/// The client's line.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Sample {
    per_second: f64,
    cpu_ns: f64,
    round_trip_ns: f64,
    raw_round_trip_ns: f64,
    raw_cpu_ns: f64,
}

/// Measures each load `runs` times for `seconds` each.
pub fn run(runs: usize, seconds: u32) -> Result<()> {
    let product = build::full()?;
    let client = build::example("anemone-vsock", "vsock-bench")?;
    let program = product.path("anemone-vsock");
    let measure = |load: &str| -> Result<Vec<Sample>> {
        (1..=runs)
            .map(|round| {
                sh::progress(format_args!("{load}, round {round} of {runs}"));
                sample(&client, &program, load, seconds)
            })
            .collect()
    };
    let mut flow = Table::new(
        "one stream through anemone-vsock, as fast as it goes (medians); CPU time is its own",
        &["direction", "MiB/s", "CPU ns per KiB", "GiB per CPU s"],
    );
    for (load, name) in [("tx", "from the guest"), ("rx", "to the guest")] {
        let samples = measure(load)?;
        let of = |value: fn(&Sample) -> f64| median(&samples.iter().map(value).collect::<Vec<_>>());
        flow.row(vec![
            name.into(),
            (of(|s| s.per_second / f64::from(1 << 20)).round() as u64).into(),
            decimal(of(|s| s.cpu_ns)),
            decimal(of(|s| 1e9 / s.cpu_ns / f64::from(1 << 20))),
        ]);
    }
    let mut ping = Table::new(
        "64 bytes to the program of the host and back (medians), beside two threads that wake each other \
         by eventfds in the same run",
        &[
            "round trip µs",
            "raw µs",
            "ratio",
            "CPU µs each way",
            "raw CPU µs",
            "added CPU µs",
        ],
    );
    let samples = measure("ping")?;
    let of = |value: fn(&Sample) -> f64| median(&samples.iter().map(value).collect::<Vec<_>>());
    ping.row(vec![
        decimal(of(|s| s.round_trip_ns / 1e3)),
        decimal(of(|s| s.raw_round_trip_ns / 1e3)),
        decimal(of(|s| s.round_trip_ns / s.raw_round_trip_ns)),
        decimal(of(|s| s.cpu_ns / 1e3)),
        decimal(of(|s| s.raw_cpu_ns / 1e3)),
        decimal(of(|s| (s.cpu_ns - s.raw_cpu_ns) / 1e3)),
    ]);
    publish("vsock", &[flow, ping])
}

fn sample(client: &Path, program: &Path, load: &str, seconds: u32) -> Result<Sample> {
    let output = sh::quiet(
        Command::new(client)
            .arg("--program")
            .arg(program)
            .args(["--load", load])
            .args(["--seconds", &seconds.to_string()]),
    )?;
    serde_json::from_slice(&output.stdout).context("vsock-bench has printed something else")
}
