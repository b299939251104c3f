//! Entropy: ours under QEMU, vhost-device-rng under our VMM.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anemone_guest_init::pattern::Pattern;
use anyhow::{Context as _, Result, ensure};

use crate::console::Console;
use crate::sh;

use super::{Context, Daemon, Ours, PATIENCE, Qemu, START, daemons, folder};

/// What the guest's step `rng` needs and shows.
const STEPS: &str = "uname,rng,poweroff";
/// Reads until a line is typed. The kernel keeps up to 128 bytes of earlier reads: the last 64 are of the
/// last daemon.
const LOAD: &str = "uname,rng,load,rng,rng,rng,poweroff anemone.load=rng";
/// Bytes of which a daemon makes its random numbers.
const SOURCE: usize = 8 << 20;

/// QEMU is the front end.
pub fn under_qemu(context: &Context) -> Result<()> {
    let socket = folder("rng")?.join("socket");
    let server = Daemon::start(
        Command::new(context.product()?.path("anemone-rng"))
            .arg("--socket")
            .arg(&socket),
        &socket,
    )?;
    let said = Qemu::new(context.packages()?, STEPS)?
        .device(&socket, "vhost-user-rng-pci")
        .run()?;
    ensure!(random(&said)?.len() == 64, "{said}");
    server.end()
}

/// The back end is another's, and what it takes for random is known here.
pub fn foreign(context: &Context) -> Result<()> {
    let daemon = Foreign::new(folder("foreign-rng")?);
    let server = daemon.start(context, 1)?;
    let said = Ours::new(context, STEPS)?
        .option("--rng", &format!("socket={}", daemon.socket.display()))
        .run()?;
    drop(server);
    daemon.check(&random(&said)?, 1)?;
    sh::progress("    the guest's 64 bytes are the daemon's");
    Ok(())
}

/// The daemon is killed while the guest works with it, and another is there later: sooner, or after any
/// limit of time that there might be.
pub fn foreign_restarts(context: &Context) -> Result<()> {
    const PAUSES: [Duration; 5] = [
        Duration::ZERO,
        Duration::from_millis(200),
        Duration::from_secs(12),
        Duration::ZERO,
        Duration::from_secs(1),
    ];
    /// Between the return of the device and the next kill.
    const WORK: Duration = Duration::from_millis(300);
    let daemon = Foreign::new(folder("foreign-rng-restarts")?);
    let mut server = daemon.start(context, 0)?;
    let mut vm = Ours::new(context, LOAD)?;
    vm.option("--rng", &format!("socket={}", daemon.socket.display()));
    let mut console = Console::start(&mut vm.0, &sh::build_dir("logs/interop/foreign-rng.log"))?;
    let before = console.wait_for("guest: load runs", PATIENCE)?;
    daemon.check(&random(&before)?, 0)?;
    for (pause, number) in PAUSES.iter().zip(1..) {
        thread::sleep(WORK);
        server.kill()?;
        thread::sleep(*pause);
        server = daemon.spawn(context, number)?;
        console.wait_for("device `rng` serves again", PATIENCE)?;
    }
    console.type_line("")?;
    let loaded = console.wait_for("guest: done", PATIENCE)?;
    let code = console.end(PATIENCE)?;
    ensure!(
        code == Some(0) && loaded.contains("guest: load verified"),
        "{code:?}: {loaded}"
    );
    drop(server);
    daemon.check(&random(&loaded)?, PAUSES.len() as u64)?;
    sh::progress(format_args!(
        "    {} kills, without a daemon for up to 12 s; the guest's last 64 bytes are the last daemon's",
        PAUSES.len()
    ));
    Ok(())
}

/// vhost-device-rng with a file for a generator.
struct Foreign {
    folder: PathBuf,
    socket: PathBuf,
}

impl Foreign {
    fn new(folder: PathBuf) -> Self {
        // The daemon adds the number of the connection to the path.
        let socket = folder.join("socket0");
        Self { folder, socket }
    }

    /// The first of several, each with bytes of its own.
    fn start(&self, context: &Context, number: u64) -> Result<Daemon> {
        let daemon = self.spawn(context, number)?;
        sh::wait_for_path(&self.socket, START)?;
        Ok(daemon)
    }

    /// Another one, whose socket is there until the VMM, which is waiting for it, has connected.
    fn spawn(&self, context: &Context, number: u64) -> Result<Daemon> {
        let source = self.folder.join("source");
        fs::write(&source, Pattern::new(number).take(SOURCE))?;
        sh::fresh(&self.socket)?;
        let mut command = daemons::command(context, "vhost-device-rng")?;
        command.arg("--rng-source").arg(&source);
        Daemon::spawn(command.arg("--socket-path").arg(self.folder.join("socket")))
    }

    /// These bytes are those of one daemon. The kernel uses some of them itself, so they can be in up
    /// to three pieces.
    fn check(&self, mut bytes: &[u8], number: u64) -> Result<()> {
        /// A shorter piece could be there by chance.
        const SHORTEST: usize = 5;
        let source = Pattern::new(number).take(SOURCE);
        for _ in 0..3 {
            let Some(start) = bytes.get(..SHORTEST) else {
                break;
            };
            let alike = |at: usize| {
                let pairs = bytes.iter().zip(&source[at..]);
                pairs.take_while(|(one, other)| one == other).count()
            };
            let places = source.windows(SHORTEST).enumerate();
            let pieces = places.filter(|(_, piece)| *piece == start);
            let longest = pieces.map(|(at, _)| alike(at)).max().unwrap_or(0);
            bytes = &bytes[longest..];
        }
        ensure!(
            bytes.is_empty(),
            "the guest has bytes that are not those of daemon {number}: {bytes:02x?}"
        );
        Ok(())
    }
}

/// The bytes that the guest has named last.
fn random(said: &str) -> Result<Vec<u8>> {
    let lines = said.lines().rev();
    let digits = lines
        .filter_map(|line| line.trim().strip_prefix("guest: random bytes "))
        .find(|rest| !rest.starts_with("from"))
        .context("the guest has named no random bytes")?;
    let pairs = digits.as_bytes().chunks(2);
    let bytes: Option<Vec<u8>> = pairs
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect();
    bytes.with_context(|| format!("not hexadecimal: {digits}"))
}
