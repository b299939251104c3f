//! QEMU boots a stock kernel from our vhost-user-blk server; our VMM on qemu-storage-daemon's
//! export is the scenario `foreign-disk` of the nested rig and of the software CPU.

use std::process::Command;

use anyhow::Result;

use crate::disk::RootDisk;

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
