//! `bench block`: our vhost-user-blk server beside qemu-storage-daemon's, on the same file in
//! memory, driven by the same client, taking turns.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::build::Binaries;
use crate::packages::Packages;
use crate::table::{Table, decimal, publish};
use crate::{build, packages, sh};

use super::median;

/// Size of the file, filled so that every read finds data.
const FILE_BYTES: usize = 256 << 20;

/// The client's line.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Sample {
    iops: f64,
    iops_per_cpu_second: f64,
}

/// A server that is measured.
enum Server<'a> {
    Ours(&'a Binaries, &'static str),
    Qemu(&'a Packages),
}

impl Server<'_> {
    fn name(&self) -> String {
        match self {
            Server::Ours(_, engine) => format!("anemone-blk, {engine}"),
            Server::Qemu(_) => "qemu-storage-daemon".to_string(),
        }
    }

    fn start(&self, file: &Path, socket: &Path) -> Result<sh::Guarded> {
        let mut command = match self {
            Server::Ours(product, engine) => {
                let mut command = product.command("anemone-blk");
                command.arg("--socket").arg(socket).arg("--image").arg(file);
                command.args(["--io", engine]);
                command
            }
            Server::Qemu(packages) => {
                let mut command = packages.tool("qemu-storage-daemon")?;
                command
                    .arg("--blockdev")
                    .arg(format!("file,node-name=disk,filename={}", file.display()))
                    .arg("--export")
                    .arg(format!(
                        "vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,\
                         addr.path={}",
                        socket.display()
                    ));
                command
            }
        };
        let guarded = sh::spawn(command.stdin(Stdio::null()))?;
        sh::wait_for_path(socket, Duration::from_secs(10))?;
        Ok(guarded)
    }
}

/// Measures each server and depth `runs` times for `seconds` each.
pub fn run(runs: usize, seconds: u32) -> Result<()> {
    let packages = packages::fetch()?;
    let product = build::full()?;
    let client = build::example("anemone-blk", "blk-bench")?;
    let memory = MemoryFile::new()?;
    let servers = [
        Server::Ours(&product, "uring"),
        Server::Ours(&product, "sync"),
        Server::Qemu(&packages),
    ];
    let mut table = Table::new(
        "4 KiB random reads from a file in memory (medians); ratios to qemu-storage-daemon",
        &[
            "depth",
            "server",
            "IOPS",
            "IOPS per CPU s",
            "IOPS ratio",
            "per CPU ratio",
        ],
    );
    for depth in [1, 32] {
        let mut samples: Vec<Vec<Sample>> = servers.iter().map(|_| Vec::new()).collect();
        for round in 1..=runs {
            sh::progress(format_args!("depth {depth}, round {round} of {runs}"));
            for (server, samples) in servers.iter().zip(&mut samples) {
                let load = Load {
                    depth,
                    block: 4096,
                    kind: "randread",
                    exposure: "shared",
                };
                samples.push(measure(server, &client, &memory, load, seconds)?);
            }
        }
        let medians: Vec<(f64, f64)> = samples
            .iter()
            .map(|s| {
                let iops: Vec<_> = s.iter().map(|s| s.iops).collect();
                let per_cpu: Vec<_> = s.iter().map(|s| s.iops_per_cpu_second).collect();
                (median(&iops), median(&per_cpu))
            })
            .collect();
        let reference = medians.last().copied().unwrap_or((1.0, 1.0));
        for (server, (iops, per_cpu)) in servers.iter().zip(&medians) {
            table.row(vec![
                depth.into(),
                server.name().into(),
                (iops.round() as u64).into(),
                (per_cpu.round() as u64).into(),
                decimal(iops / reference.0),
                decimal(per_cpu / reference.1),
            ]);
        }
    }
    let bounce = bounce_table(&servers[0], &client, &memory, runs, seconds)?;
    publish("block", &[table, bounce])
}

/// What it costs when the server does not see guest memory.
fn bounce_table(
    server: &Server<'_>,
    client: &Path,
    memory: &MemoryFile,
    runs: usize,
    seconds: u32,
) -> Result<Table> {
    let mut table = Table::new(
        &format!(
            "64 KiB requests to {} (medians) with memory=shared and memory=bounce; the CPU time of \
             bounce includes the thread that copies",
            server.name()
        ),
        &[
            "depth",
            "requests",
            "shared IOPS",
            "bounce IOPS",
            "bounce to shared",
            "shared CPU us",
            "bounce CPU us",
        ],
    );
    for depth in [1, 32] {
        for kind in ["randread", "randwrite"] {
            let mut samples = [Vec::new(), Vec::new()];
            for round in 1..=runs {
                sh::progress(format_args!(
                    "bounce, {kind}, depth {depth}, round {round} of {runs}"
                ));
                for (exposure, samples) in ["shared", "bounce"].iter().zip(&mut samples) {
                    let load = Load {
                        depth,
                        block: 64 << 10,
                        kind,
                        exposure,
                    };
                    samples.push(measure(server, client, memory, load, seconds)?);
                }
            }
            let [shared, bounce] = samples.map(|samples| {
                let iops: Vec<_> = samples.iter().map(|s| s.iops).collect();
                let cpu: Vec<_> = samples
                    .iter()
                    .map(|s| 1e6 / s.iops_per_cpu_second)
                    .collect();
                (median(&iops), median(&cpu))
            });
            table.row(vec![
                depth.into(),
                kind.into(),
                (shared.0.round() as u64).into(),
                (bounce.0.round() as u64).into(),
                decimal(bounce.0 / shared.0),
                decimal(shared.1),
                decimal(bounce.1),
            ]);
        }
    }
    Ok(table)
}

/// What the client does.
#[derive(Clone, Copy)]
struct Load<'a> {
    depth: u32,
    block: u32,
    kind: &'a str,
    exposure: &'a str,
}

fn measure(
    server: &Server<'_>,
    client: &Path,
    memory: &MemoryFile,
    load: Load<'_>,
    seconds: u32,
) -> Result<Sample> {
    let socket = memory.folder.join("socket");
    sh::fresh(&socket)?;
    let running = server.start(&memory.file(), &socket)?;
    let output = sh::quiet(
        Command::new(client)
            .arg("--socket")
            .arg(&socket)
            .args(["--depth", &load.depth.to_string()])
            .args(["--seconds", &seconds.to_string()])
            .args(["--pid", &running.0.id().to_string()])
            .args(["--block", &load.block.to_string(), "--rw", load.kind])
            .args(["--memory", load.exposure]),
    )?;
    serde_json::from_slice(&output.stdout).context("blk-bench has printed something else")
}

/// A file in `/dev/shm`; removed when dropped.
struct MemoryFile {
    folder: PathBuf,
}

impl MemoryFile {
    fn new() -> Result<Self> {
        let folder = PathBuf::from(format!("/dev/shm/anemone-bench-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let memory = Self { folder };
        fs::write(memory.file(), vec![0xA5; FILE_BYTES])?;
        Ok(memory)
    }

    fn file(&self) -> PathBuf {
        self.folder.join("disk.img")
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}
