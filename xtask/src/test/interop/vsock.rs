//! Sockets: ours under QEMU, vhost-device-vsock under our VMM.

use std::path::Path;
use std::process::Command;
use std::thread;

use anemone_guest_init::sockets;
use anyhow::{Context as _, Result, anyhow, ensure};

use crate::sh;

use super::{Context, Daemon, Ours, Qemu, daemons, folder};

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
    with_host(&path, false, || {
        Qemu::new(context.packages()?, &steps())?
            .device(&socket, "vhost-user-vsock-pci")
            .run()
    })?;
    server.end()
}

/// The back end is another's, with the same convention for its sockets on the host. It does not answer
/// a guest that connects to a port where nobody listens, and does not pass on that one direction of a
/// connection has ended.
fn foreign(context: &Context, memory: &str) -> Result<()> {
    let mut daemon = daemons::command(context, "vhost-device-vsock")?;
    let folder = folder(&format!("foreign-vsock-{memory}"))?;
    let (socket, path) = (folder.join("socket"), folder.join("host.sock"));
    let server = Daemon::start(
        daemon
            .args(["--guest-cid", "42", "--uds-path"])
            .arg(&path)
            .arg("--socket")
            .arg(&socket),
        &socket,
    )?;
    with_host(&path, true, || {
        Ours::new(context, &format!("{} anemone.peer=plain", steps()))?
            .option(
                "--vhost-user",
                &format!("vsock,socket={},memory={memory}", socket.display()),
            )
            .run()
    })?;
    drop(server);
    Ok(())
}

/// It maps guest memory.
pub fn foreign_shared(context: &Context) -> Result<()> {
    foreign(context, "shared")
}

/// It never sees guest memory.
pub fn foreign_bounced(context: &Context) -> Result<()> {
    foreign(context, "bounce")
}

/// Runs a guest between the two programs of the host; `plain` is that of [`sockets::exchange`].
fn with_host(path: &Path, plain: bool, guest: impl FnOnce() -> Result<String>) -> Result<()> {
    let server = sockets::serve(path).context("sockets of the host")?;
    let own = path.to_owned();
    let client = thread::spawn(move || sockets::exchange(&own, BYTES, plain));
    let said = guest()?;
    let dead = |_| anyhow!("a thread died");
    client.join().map_err(dead)?.context("to the guest")?;
    let echoed = server.join().map_err(dead)?.context("from the guest")?;
    ensure!(echoed == BYTES, "{echoed} of {BYTES} bytes");
    ensure!(
        said.contains(&format!("vsock {BYTES} bytes from the host and back")),
        "the guest has not seen all bytes:\n{said}"
    );
    sh::progress(format_args!(
        "    {BYTES} bytes each way over a connection from the host and one from the guest are the same"
    ));
    Ok(())
}
