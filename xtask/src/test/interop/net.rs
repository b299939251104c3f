//! Network: ours under QEMU and under DPDK's virtio-user, DPDK's vhost back end under the loop driver.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::pattern::Pattern;
use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::console::Console;
use crate::packages::Packages;
use crate::{build, sh};

use super::{Context, Daemon, Qemu, START, folder, log};

/// Longest wait for a frame.
const PATIENCE: Duration = Duration::from_secs(30);
/// Frames that go to DPDK and back.
const FRAMES: u32 = 2000;

/// Ethernet address of QEMU's card.
const MAC: &str = "02:00:00:00:00:07";

/// passt, anemone-net as its client, and what QEMU needs to have that for a network.
struct Network {
    socket: PathBuf,
    stream: PathBuf,
    program: PathBuf,
    _passt: Daemon,
    _place: TempDir,
}

impl Network {
    fn new(context: &Context, name: &str) -> Result<Self> {
        // passt runs as nobody, who must reach its socket.
        let place = tempfile::tempdir()?;
        fs::set_permissions(place.path(), Permissions::from_mode(0o777))?;
        let stream = place.path().join("passt");
        let passt = Daemon::start(
            Command::new(context.packages()?.passt()?)
                .args(["--foreground", "--quiet", "--socket"])
                .arg(&stream)
                .stderr(log("passt")?),
            &stream,
        )?;
        Ok(Self {
            socket: folder(name)?.join("socket"),
            stream,
            program: context.product()?.path("anemone-net"),
            _passt: passt,
            _place: place,
        })
    }

    /// Starts anemone-net; after another one, once that has ended.
    fn start(&self) -> Result<Daemon> {
        sh::fresh(&self.socket)?;
        let mut command = Command::new(&self.program);
        command.arg("--socket").arg(&self.socket);
        Daemon::start(command.arg("--stream").arg(&self.stream), &self.socket)
    }

    /// QEMU with a card; its guest takes these steps.
    fn qemu(&self, packages: &Packages, steps: &str) -> Result<Qemu> {
        let mut qemu = Qemu::new(packages, steps)?;
        qemu.0
            .arg("-chardev")
            .arg(format!(
                "socket,id=backend,path={},reconnect=1",
                self.socket.display()
            ))
            .args(["-netdev", "vhost-user,id=net,chardev=backend"])
            // Without MSI-X: QEMU 7.2 takes it that KVM routes the interrupts of a vhost-user network
            // card, and dies where there is none.
            .arg("-device")
            .arg(format!("virtio-net-pci,netdev=net,mac={MAC},vectors=0"));
        Ok(qemu)
    }
}

/// QEMU is the front end, passt the network: the guest gets an address and fetches a file.
pub fn under_qemu(context: &Context) -> Result<()> {
    let network = Network::new(context, "net")?;
    let server = network.start()?;
    let (port, _) = serve(content())?;
    let steps = format!("uname,net,poweroff anemone.fetch={port}");
    let output = network.qemu(context.packages()?, &steps)?.run()?;
    server.end()?;
    fetched(&output)
}

/// The guest goes on with its transfers when the card's process is killed in the middle of one. That is
/// tried twice: now and then nothing comes through the card after a kill (docs/testing.md).
pub fn restarts(context: &Context) -> Result<()> {
    transfers_with_kills(context).or_else(|error| {
        sh::progress(format_args!("    once more, for {error:#}"));
        transfers_with_kills(context)
    })
}

fn transfers_with_kills(context: &Context) -> Result<()> {
    const KILLS: u32 = 3;
    let network = Network::new(context, "net-restarts")?;
    let mut server = network.start()?;
    let (port, served) = serve(content())?;
    let steps = format!("uname,net,pull,poweroff anemone.fetch={port}");
    let mut qemu = network.qemu(context.packages()?, &steps)?;
    let mut console = Console::start(&mut qemu.0, &sh::build_dir("logs/interop/net-restarts.log"))?;
    let mut said = console.wait_for("guest: pulling", super::PATIENCE)?;
    fetched(&said)?;
    for kill in 1..=KILLS {
        // The guest has asked for a file, and has not got all of it.
        let end = Instant::now() + PATIENCE;
        while served.load(Ordering::Acquire) < 4 * kill {
            ensure!(Instant::now() < end, "the guest does not fetch any more");
            thread::sleep(Duration::from_millis(1));
        }
        server.kill()?;
        server = network.start()?;
    }
    said += &console.wait_for("guest: done", super::PATIENCE)?;
    let code = console.end(super::PATIENCE)?;
    let asked = served.load(Ordering::Acquire);
    ensure!(
        code == Some(0) && said.contains("guest: pulled 20 times"),
        "{code:?}: {said}"
    );
    server.end()?;
    sh::progress(format_args!(
        "    {KILLS} kills, each in the middle of one of {asked} transfers; each had all its bytes"
    ));
    Ok(())
}

/// What the guest fetches.
fn content() -> Vec<u8> {
    Pattern::new(7).take(512 << 10)
}

/// The guest has what it fetched, byte for byte, and the card that it was given.
fn fetched(said: &str) -> Result<()> {
    let content = content();
    let sum = sh::sha256(&content)?;
    let wanted = format!("guest: fetched {} {sum}", content.len());
    ensure!(
        said.contains(&format!("guest: card {MAC}")) && said.contains(&wanted),
        "{wanted:?} is not what the guest says:\n{said}"
    );
    sh::progress(format_args!(
        "    {} bytes from the host's loopback: SHA-256 is the same",
        content.len()
    ));
    Ok(())
}

/// A server on this host's loopback that answers every request with the same bytes, until xtask
/// ends. Its port, and the number of requests.
fn serve(content: Vec<u8>) -> Result<(u16, Arc<AtomicU32>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let port = listener.local_addr()?.port();
    let served = Arc::new(AtomicU32::new(0));
    let count = served.clone();
    thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            // The request fits into one packet. A client that goes away has its own message.
            let mut request = [0; 4096];
            let _ = client.read(&mut request);
            count.fetch_add(1, Ordering::Release);
            let _ = write!(
                client,
                "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
                content.len()
            );
            let _ = client.write_all(&content);
        }
    });
    Ok((port, served))
}

/// DPDK's virtio-user is the front end, and sends every frame back to where it came from.
pub fn under_dpdk(context: &Context) -> Result<()> {
    let folder = folder("net-dpdk")?;
    let (network, socket) = (folder.join("network"), folder.join("socket"));
    let listener = UnixListener::bind(&network)?;
    let server = Daemon::start(
        Command::new(context.product()?.path("anemone-net"))
            .arg("--socket")
            .arg(&socket)
            .arg("--stream")
            .arg(&network),
        &socket,
    )?;
    let (peer, _) = listener.accept()?;
    let mut testpmd = context.packages()?.testpmd()?;
    testpmd
        .arg(format!("--vdev=net_virtio_user0,path={}", socket.display()))
        .args(FORWARD)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let testpmd = sh::spawn(&mut testpmd)?;
    echo(peer).context("through virtio-user")?;
    drop(testpmd);
    drop(server);
    Ok(())
}

/// testpmd's own options: frames go out where they came in; it ends with its input.
const FORWARD: [&str; 6] = [
    "--",
    "--forward-mode=io",
    "--auto-start",
    "--no-mlockall",
    "--total-num-mbufs=8192",
    "--nb-cores=1",
];

/// Sends frames and waits until each has come back. The first ones may be lost: nobody says when the
/// other side is there.
fn echo(mut peer: UnixStream) -> Result<()> {
    let frame = |number: u32| {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
        bytes.extend(number.to_le_bytes());
        bytes.resize(60 + number as usize % 1400, number as u8);
        bytes
    };
    peer.set_read_timeout(Some(Duration::from_millis(200)))?;
    // Without a front end nobody takes the frames.
    peer.set_write_timeout(Some(PATIENCE))?;
    let end = Instant::now() + PATIENCE;
    let mut prefix = [0; 4];
    loop {
        ensure!(Instant::now() < end, "no frame comes back");
        send(&mut peer, &frame(u32::MAX))?;
        if peer.read_exact(&mut prefix).is_ok() {
            break;
        }
    }
    // What is on its way from before ends with a frame that was not sent before.
    peer.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = vec![0; u32::from_be_bytes(prefix) as usize];
    peer.read_exact(&mut bytes)?;
    let mut receive = |peer: &mut UnixStream| -> Result<Vec<u8>> {
        peer.read_exact(&mut prefix)?;
        let mut bytes = vec![0; u32::from_be_bytes(prefix) as usize];
        peer.read_exact(&mut bytes)?;
        Ok(bytes)
    };
    for number in 0..FRAMES {
        send(&mut peer, &frame(number))?;
        loop {
            let bytes = receive(&mut peer)?;
            if bytes == frame(number) {
                break;
            }
            ensure!(
                bytes == frame(u32::MAX),
                "frame {number} came back as another one"
            );
        }
    }
    Ok(())
}

fn send(peer: &mut UnixStream, frame: &[u8]) -> Result<()> {
    let prefix = (frame.len() as u32).to_be_bytes();
    Ok(peer.write_all(&[&prefix[..], frame].concat())?)
}

/// DPDK's vhost is the back end, and sends every frame back to the loop driver.
pub fn foreign(context: &Context) -> Result<()> {
    let client = build::example("anemone-driver", "net-echo")?;
    let socket = folder("net-vhost")?.join("socket");
    let mut testpmd = context.packages()?.testpmd()?;
    testpmd
        .arg(format!("--vdev=net_vhost0,iface={}", socket.display()))
        .args(FORWARD)
        .stdin(Stdio::piped())
        .stdout(Stdio::null());
    let testpmd = sh::spawn(&mut testpmd)?;
    sh::wait_for_path(&socket, START)?;
    echoed(&client, &socket)?;
    drop(testpmd);
    Ok(())
}

fn echoed(client: &Path, socket: &Path) -> Result<()> {
    let mut command = Command::new(client);
    command.arg(socket).arg(FRAMES.to_string());
    let done = sh::run_limited(&mut command, PATIENCE)?;
    ensure!(done.code() == Some(0), "{}", done.output);
    Ok(())
}
