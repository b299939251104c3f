//! Entropy: ours under QEMU, vhost-device-rng under our VMM.

use std::process::Command;

use anyhow::Result;

use super::{Context, Daemon, Ours, Qemu, daemons, folder};

/// What the guest's step `rng` needs and shows.
const STEPS: &str = "uname,rng,poweroff";

/// QEMU is the front end.
pub fn under_qemu(context: &Context) -> Result<()> {
    let socket = folder("rng")?.join("socket");
    let server = Daemon::start(
        Command::new(context.product()?.path("anemone-rng"))
            .arg("--socket")
            .arg(&socket),
        &socket,
    )?;
    Qemu::new(context.packages()?, STEPS)?
        .device(&socket, "vhost-user-rng-pci")
        .run()?;
    server.end()
}

/// The back end is another's.
pub fn foreign(context: &Context) -> Result<()> {
    let program = daemons::program("vhost-device-rng")?;
    let folder = folder("foreign-rng")?;
    // The daemon adds the number of the connection to the path.
    let socket = folder.join("socket0");
    let server = Daemon::start(
        Command::new(program)
            .arg("--socket-path")
            .arg(folder.join("socket")),
        &socket,
    )?;
    Ours::new(context, STEPS)?
        .option("--rng", &format!("socket={}", socket.display()))
        .run()?;
    drop(server);
    Ok(())
}
