//! Sockets: ours under QEMU.

use std::path::Path;
use std::process::Command;
use std::thread;

use anemone_guest_init::sockets;
use anyhow::{Context as _, Result, anyhow, ensure};

use super::{Context, Daemon, Qemu, folder};

/// Bytes in each of the four directions.
const BYTES: u64 = 4 << 20;

/// What the guest's step `vsock` does.
fn steps() -> String {
    format!("uname,vsock,poweroff anemone.vsock={BYTES}")
}

/// QEMU is the front end.
pub fn under_qemu(context: &Context) -> Result<()> {
    let folder = folder("vsock")?;
    let (socket, path) = (folder.join("socket"), folder.join("host.sock"));
    let server = Daemon::start(
        Command::new(context.product()?.path("anemone-vsock"))
            .args(["--cid", "42", "--listen"])
            .arg(&path)
            .arg("--socket")
            .arg(&socket),
        &socket,
    )?;
    with_host(&path, || {
        Qemu::new(context.packages()?, &steps())?
            .device(&socket, "vhost-user-vsock-pci")
            .run()
    })?;
    server.end()
}

/// Runs a guest between the two programs of the host.
fn with_host(path: &Path, guest: impl FnOnce() -> Result<String>) -> Result<()> {
    let server = sockets::serve(path).context("sockets of the host")?;
    let own = path.to_owned();
    let client = thread::spawn(move || sockets::exchange(&own, BYTES));
    let said = guest()?;
    let dead = |_| anyhow!("a thread died");
    client.join().map_err(dead)?.context("to the guest")?;
    let echoed = server.join().map_err(dead)?.context("from the guest")?;
    ensure!(echoed == BYTES, "{echoed} of {BYTES} bytes");
    ensure!(
        said.contains(&format!("vsock {BYTES} bytes from the host and back")),
        "the guest has not seen all bytes:\n{said}"
    );
    Ok(())
}
