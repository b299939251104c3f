//! QEMU boots a stock kernel from our vhost-user-blk server; our VMM on qemu-storage-daemon's
//! export is the scenario `foreign-disk` of the nested rig and of the software CPU.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::disk::RootDisk;
use crate::sh;

use super::qtest::{DATA, Machine, SLOTS};
use super::{Context, Daemon, Qemu, folder};

/// With the engine that is the default.
pub fn two_queues(context: &Context) -> Result<()> {
    qemu_boots(context, 2, &[])
}

/// With ordinary system calls.
pub fn sync(context: &Context) -> Result<()> {
    qemu_boots(context, 1, &["--io", "sync"])
}

fn qemu_boots(context: &Context, queues: u32, arguments: &[&str]) -> Result<()> {
    let packages = context.packages()?;
    let folder = folder("blk")?;
    let disk = RootDisk::make(packages, &folder.join("root.img"))?;
    let socket = folder.join("socket");
    let server = Daemon::start(
        Command::new(context.product()?.path("anemone-blk"))
            .arg("--socket")
            .arg(&socket)
            .arg("--image")
            .arg(&disk.image)
            .args(["--queues", &queues.to_string()])
            .args(arguments),
        &socket,
    )?;
    let model = format!("vhost-user-blk-pci,num-queues={queues}");
    Qemu::new(packages, "uname,disk,poweroff")?
        .device(&socket, &model)
        .run()?;
    server.end()?;
    disk.verify(packages)
}

/// QEMU keeps the in-flight memory and gives it to each new process, while writes are in flight.
pub fn restarts(context: &Context) -> Result<()> {
    const KILLS: u32 = 8;
    const BLOCKS: u64 = 256;
    /// QEMU looks for the socket once a second.
    const PATIENCE: Duration = Duration::from_secs(20);
    let folder = folder("blk-restarts")?;
    let (path, socket) = (folder.join("disk.img"), folder.join("socket"));
    let image = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&path)?;
    image.set_len(BLOCKS * DATA)?;
    let program = context.product()?.path("anemone-blk");
    let start = || -> Result<Daemon> {
        // The socket of the process before would be taken for that of the new one.
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let mut command = Command::new(&program);
        command.arg("--socket").arg(&socket);
        Daemon::start(command.arg("--image").arg(&path), &socket)
    };
    let content = |version: u64| -> Vec<u8> {
        let words = (0..DATA / 8).map(|i| version << 32 | i);
        words.flat_map(u64::to_le_bytes).collect()
    };
    let mut server = start()?;
    let mut machine = Machine::start(context.packages()?, &folder, &socket)?;
    let mut free: Vec<u16> = (0..SLOTS).collect();
    let mut in_flight: HashMap<u16, (u64, u64)> = HashMap::new();
    let mut versions = vec![0; BLOCKS as usize];
    let (mut version, mut kills, mut interrupted) = (0, 0, 0);
    while kills < KILLS || !in_flight.is_empty() {
        while kills < KILLS
            && let Some(slot) = free.pop()
        {
            version += 1;
            let block = version * 7 % BLOCKS;
            ensure!(
                in_flight.values().all(|&(other, _)| other != block),
                "the first of many writes is not returned"
            );
            machine.write(slot, block * DATA / 512, &content(version))?;
            in_flight.insert(slot, (block, version));
        }
        // Some rounds between two kills; the moment in a round depends on the machine.
        if kills < KILLS && version > u64::from(kills + 1) * 500 {
            server.kill()?;
            interrupted += in_flight.len();
            server = start()?;
            kills += 1;
        }
        let slot = machine.returned(PATIENCE)?;
        let slot = slot.context("a write is never returned")?;
        let (block, version) = in_flight
            .remove(&slot)
            .context("a write is returned twice")?;
        versions[block as usize] = version;
        free.push(slot);
    }
    drop(machine);
    server.end()?;
    ensure!(interrupted > 0, "nothing was in flight at any kill");
    for (block, version) in (0..).zip(versions) {
        let mut bytes = vec![0; DATA as usize];
        image.read_exact_at(&mut bytes, block * DATA)?;
        let expected = match version {
            0 => vec![0; DATA as usize],
            version => content(version),
        };
        ensure!(
            bytes == expected,
            "block {block} is not what was written last"
        );
    }
    sh::progress(format_args!(
        "    {kills} kills, {version} writes, {interrupted} of them in flight at a kill"
    ));
    Ok(())
}
