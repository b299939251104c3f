//! `bench net`: `anemone-net` between a driver and a peer that the same client plays. No guest, no
//! network, no privilege.

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
    let client = build::example("anemone-net", "net-bench")?;
    let program = product.path("anemone-net");
    let measure = |peer: &str, load: &str, frame: u32| -> Result<Vec<Sample>> {
        (1..=runs)
            .map(|round| {
                sh::progress(format_args!(
                    "{peer}, {load}, {frame} bytes, round {round} of {runs}"
                ));
                sample(&client, &program, peer, load, frame, seconds)
            })
            .collect()
    };
    let mut flood = Table::new(
        "frames through anemone-net, queue always full (medians); CPU time is its own",
        &[
            "peer",
            "direction",
            "bytes",
            "frames/s",
            "frames per CPU s",
            "CPU ns per frame",
            "in raw round trips",
        ],
    );
    let mut ping = Table::new(
        "one 64-byte frame at a time, to the peer and back (medians), beside two threads that wake each \
         other by eventfds in the same run",
        &[
            "peer",
            "round trip µs",
            "raw µs",
            "ratio",
            "CPU µs per frame",
            "raw CPU µs",
            "added CPU µs",
        ],
    );
    for peer in ["stream", "packets"] {
        for (load, name) in [("tx", "from the guest"), ("rx", "to the guest")] {
            for frame in [64, 1500] {
                let samples = measure(peer, load, frame)?;
                let of = |value: fn(&Sample) -> f64| {
                    median(&samples.iter().map(value).collect::<Vec<_>>())
                };
                flood.row(vec![
                    peer.into(),
                    name.into(),
                    frame.into(),
                    (of(|s| s.per_second).round() as u64).into(),
                    (of(|s| 1e9 / s.cpu_ns).round() as u64).into(),
                    (of(|s| s.cpu_ns).round() as u64).into(),
                    decimal(of(|s| s.cpu_ns / s.raw_round_trip_ns)),
                ]);
            }
        }
        let samples = measure(peer, "ping", 64)?;
        let of = |value: fn(&Sample) -> f64| median(&samples.iter().map(value).collect::<Vec<_>>());
        ping.row(vec![
            peer.into(),
            decimal(of(|s| s.round_trip_ns / 1e3)),
            decimal(of(|s| s.raw_round_trip_ns / 1e3)),
            decimal(of(|s| s.round_trip_ns / s.raw_round_trip_ns)),
            decimal(of(|s| s.cpu_ns / 1e3)),
            decimal(of(|s| s.raw_cpu_ns / 1e3)),
            decimal(of(|s| (s.cpu_ns - s.raw_cpu_ns) / 1e3)),
        ]);
    }
    publish("net", &[flood, ping])
}

fn sample(
    client: &Path,
    program: &Path,
    peer: &str,
    load: &str,
    frame: u32,
    seconds: u32,
) -> Result<Sample> {
    let output = sh::quiet(
        Command::new(client)
            .arg("--program")
            .arg(program)
            .args(["--peer", peer, "--load", load])
            .args(["--frame", &frame.to_string()])
            .args(["--seconds", &seconds.to_string()]),
    )?;
    serde_json::from_slice(&output.stdout).context("net-bench has printed something else")
}
