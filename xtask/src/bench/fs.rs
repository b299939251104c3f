//! `bench fs`: `anemone-fs` beside virtiofsd, on the same directory in memory, driven by the same client,
//! taking turns. No guest.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::build::Binaries;
use crate::packages::Packages;
use crate::table::{Table, decimal, publish};
use crate::{build, packages, sh};

use super::client::{Sample, Samples};

/// Size of the file that is read and written.
const FILE_BYTES: usize = 64 << 20;

/// What the client is told, and what that is.
const LOADS: [(&str, &[&str]); 7] = [
    ("128 KiB read, depth 1", &["--load", "read"]),
    (
        "128 KiB read, depth 16",
        &["--load", "read", "--depth", "16"],
    ),
    (
        "4 KiB read, depth 1",
        &["--load", "read", "--block", "4096"],
    ),
    ("128 KiB written, depth 1", &["--load", "write"]),
    (
        "128 KiB written, depth 16",
        &["--load", "write", "--depth", "16"],
    ),
    ("LOOKUP", &["--load", "stat"]),
    ("CREATE, RELEASE, UNLINK, FORGET", &["--load", "create"]),
];

/// A server that is measured.
enum Server<'a> {
    Ours(&'a Binaries),
    Virtiofsd(&'a Packages),
}

impl Server<'_> {
    fn name(&self) -> &'static str {
        match self {
            Server::Ours(_) => "anemone-fs",
            Server::Virtiofsd(_) => "virtiofsd",
        }
    }

    fn start(&self, place: &Place) -> Result<sh::Guarded> {
        let socket = place.socket();
        let mut command = match self {
            Server::Ours(product) => {
                let mut command = product.command("anemone-fs");
                command.args(["--tag", "bench", "--directory"]);
                command.arg(place.share()).arg("--socket").arg(&socket);
                command
            }
            Server::Virtiofsd(packages) => {
                let mut command = packages.tool("virtiofsd")?;
                command.args(["-f", "-o"]);
                command.arg(format!("source={}", place.share().display()));
                command.arg(format!("--socket-path={}", socket.display()));
                command
            }
        };
        sh::fresh(&socket)?;
        let guarded = sh::spawn(command.stdin(Stdio::null()).stderr(Stdio::null()))?;
        sh::wait_for_path(&socket, Duration::from_secs(10))?;
        Ok(guarded)
    }
}

/// Measures each server and load `runs` times for `seconds` each.
pub fn run(runs: usize, seconds: u32) -> Result<()> {
    let packages = packages::fetch()?;
    let product = build::full()?;
    let client = build::example("anemone-fs", "fs-bench")?;
    let place = Place::new()?;
    let servers = [Server::Ours(&product), Server::Virtiofsd(&packages)];
    let mut table = Table::new(
        "requests to a shared directory in memory (medians); CPU time is the server's; ratios to virtiofsd",
        &[
            "load",
            "server",
            "a second",
            "CPU µs each",
            "round trips",
            "ratio",
            "CPU ratio",
        ],
    );
    for (name, load) in LOADS {
        let mut samples = servers.each_ref().map(|_| Vec::new());
        for round in 1..=runs {
            sh::progress(format_args!("{name}, round {round} of {runs}"));
            for (server, samples) in servers.iter().zip(&mut samples) {
                samples.push(measure(server, &client, &place, load, seconds)?);
            }
        }
        let samples = samples.map(Samples::from);
        let reference = &samples[1];
        for (server, samples) in servers.iter().zip(&samples) {
            let ratio = |value: fn(&Sample) -> f64| {
                decimal(samples.median(value) / reference.median(value))
            };
            table.row(vec![
                name.into(),
                server.name().into(),
                (samples.median(|s| s.per_second).round() as u64).into(),
                decimal(samples.median(|s| s.cpu_ns / 1e3)),
                decimal(samples.median(|s| s.round_trip_ns / s.raw_round_trip_ns)),
                ratio(|s| s.per_second),
                ratio(|s| s.cpu_ns),
            ]);
        }
    }
    publish("fs", &[table])
}

fn measure(
    server: &Server<'_>,
    client: &Path,
    place: &Place,
    load: &[&str],
    seconds: u32,
) -> Result<Sample> {
    let running = server.start(place)?;
    let output = sh::quiet(
        Command::new(client)
            .arg("--socket")
            .arg(place.socket())
            .args(["--pid", &running.0.id().to_string()])
            .args(load)
            .args(["--seconds", &seconds.to_string()]),
    )?;
    serde_json::from_slice(&output.stdout).context("fs-bench has printed something else")
}

/// A folder in `/dev/shm`; removed when dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Self> {
        let place = Self(PathBuf::from(format!(
            "/dev/shm/anemone-bench-fs-{}",
            std::process::id()
        )));
        std::fs::create_dir_all(place.share())?;
        std::fs::write(place.share().join("data"), vec![0xA5; FILE_BYTES])?;
        Ok(place)
    }

    fn share(&self) -> PathBuf {
        self.0.join("share")
    }

    fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
