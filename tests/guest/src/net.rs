//! Scenarios with a network card.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anemone_guest_init::place::Place;

use crate::vm::{Result, Vm};

/// Longest wait for a byte from the guest.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server on this host's loopback that answers every request with the same bytes.
pub struct Server {
    /// Where it listens.
    pub port: u16,
}

impl Server {
    /// Serves until the runner ends.
    pub fn start(content: Arc<Vec<u8>>) -> Result<Self> {
        let fail = |e| format!("server: {e}");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(fail)?;
        let port = listener.local_addr().map_err(fail)?.port();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let content = Arc::clone(&content);
                // A client that goes away early has its own message.
                thread::spawn(move || drop(answer(client, &content)));
            }
        });
        Ok(Self { port })
    }
}

/// Sends the content; for a path with `slow` in it over two seconds.
fn answer(mut client: TcpStream, content: &[u8]) -> std::io::Result<()> {
    let mut slow = false;
    let mut lines = BufReader::new(client.try_clone()?).lines();
    while let Some(line) = lines.next().transpose()? {
        if line.is_empty() {
            break;
        }
        slow |= line.starts_with("GET /slow");
    }
    let length = content.len();
    write!(
        client,
        "HTTP/1.0 200 OK\r\nContent-Length: {length}\r\n\r\n"
    )?;
    for part in content.chunks(length.div_ceil(20)) {
        client.write_all(part)?;
        if slow {
            thread::sleep(Duration::from_millis(100));
        }
    }
    Ok(())
}

/// The body of what a server at this port of the loopback answers.
fn fetch(port: u16, path: &str) -> std::io::Result<Vec<u8>> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let end = end.ok_or_else(|| std::io::Error::other("an answer without a header"))?;
    Ok(answer.split_off(end + 4))
}

/// A port of the loopback that is free at the moment.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let address = listener.and_then(|listener| listener.local_addr());
    address
        .map(|a| a.port())
        .map_err(|e| format!("a free port: {e}"))
}

/// Makes a tap whose other side this host is, with an address.
pub fn make_tap(place: &Place, tap: &str, address: &str) -> Result<()> {
    for words in [
        format!("tunctl -t {tap}"),
        format!("ip address add {address} dev {tap}"),
        format!("ip link set {tap} up"),
    ] {
        busybox(place, &words)?;
    }
    Ok(())
}

fn busybox(place: &Place, words: &str) -> Result<()> {
    let output = Command::new(place.clients.join("bin/busybox"))
        .args(words.split(' '))
        .output()
        .map_err(|e| format!("busybox: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{words}: {}",
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// Bytes that do not repeat.
pub fn payload(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// A card on passt: DHCP, a download through the gateway, a download through a forwarded port.
pub fn passt(place: &Place) -> Result<()> {
    const LENGTH: usize = 2_000_000;
    let content = Arc::new(payload(LENGTH));
    let server = Server::start(Arc::clone(&content))?;
    let port = free_port()?;
    let net = format!(
        "user,host-loopback,forward=tcp:{port}-80,mac=02:00:00:12:34:56,mac-filter,passt={}",
        place.passt.display()
    );
    let steps = format!("net,serve,button,poweroff anemone.fetch={}", server.port);
    let mut vm = Vm::start(place, &steps, &["--net", &net])?;
    vm.wait_for("guest: serving")?;
    let fetched = fetch(port, "/fetched").map_err(|e| format!("forwarded port: {e}"))?;
    if fetched != *content {
        return Err(format!(
            "{} bytes came back, not the {LENGTH} sent",
            fetched.len()
        ));
    }
    vm.wait_for("guest: waiting for the power button")?;
    thread::sleep(Duration::from_secs(2));
    vm.signal(libc::SIGTERM)?;
    vm.expect_exit(0)?;
    vm.expect_said(&[
        "guest: card 02:00:00:12:34:56 mtu 1500",
        "guest: address ",
        &format!("guest: fetched {LENGTH} "),
        "guest: done",
    ])
}

/// The card's process is killed during downloads, and then passt during one.
pub fn restart(place: &Place) -> Result<()> {
    const KILLS: usize = 12;
    let content = Arc::new(payload(1_000_000));
    let server = Server::start(Arc::clone(&content))?;
    let net = format!("user,host-loopback,passt={}", place.passt.display());
    let steps = format!("net,pull,retry,poweroff anemone.fetch={}", server.port);
    let restart = ["--net", &net, "--restart", "limit=1000/60"];
    let mut vm = Vm::start(place, &steps, &restart)?;
    vm.wait_for("guest: pulling")?;
    for _ in 0..KILLS {
        vm.kill("anemone-net")?;
        thread::sleep(Duration::from_millis(150));
        if vm.said().contains("guest: pulled") {
            return Err("the downloads were over before the last kill".into());
        }
    }
    vm.wait_for("guest: pulled 20 times")?;
    vm.wait_for("guest: retrying")?;
    thread::sleep(Duration::from_millis(500));
    // It runs under the name of the build for this CPU.
    let processes = vm.processes();
    let passt = processes.iter().find(|p| p.program.starts_with("passt"));
    let passt = passt.ok_or("passt does not run")?;
    crate::sys::kill(passt.pid as i32, libc::SIGKILL).map_err(|e| format!("kill: {e}"))?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: went through with try ", "guest: done"])?;
    if vm.said().contains("guest: went through with try 1\n") {
        return Err("the connection has survived the death of passt".into());
    }
    Ok(())
}
