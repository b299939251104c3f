//! The console of our VMM in vhost-device-console, which passes it on to a TCP connection. (QEMU has
//! no vhost-user console that could be a front end of ours.)

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::{Context, Daemon, Ours, START, daemons, folder};

/// The back end is another's.
pub fn foreign(context: &Context) -> Result<()> {
    let mut daemon = daemons::command(context, "vhost-device-console")?;
    let folder = folder("foreign-console")?;
    // The daemon adds the number of the connection to the path.
    let socket = folder.join("socket0");
    // A port that was free a moment ago: the daemon has no way to choose one itself.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port();
    let server = Daemon::start(
        daemon
            .args(["--backend", "network", "--tcp-port", &port.to_string()])
            .arg("--socket-path")
            .arg(folder.join("socket")),
        &socket,
    )?;
    let reader = thread::spawn(move || read_all(port));
    // It says what it does on its console, which is not on this terminal.
    let run = Ours::new(context, "uname,poweroff")?
        .option("--console", "none")
        .option(
            "--vhost-user",
            &format!("console,socket={},queues=4", socket.display()),
        )
        .run_silent();
    drop(server);
    let said = reader.join().unwrap_or_else(|_| Ok(String::new()))?;
    run?;
    ensure!(
        said.contains("guest: kernel ") && said.contains("guest: done"),
        "the console said:\n{said}"
    );
    Ok(())
}

/// What comes over the connection until its end.
fn read_all(port: u16) -> Result<String> {
    let end = Instant::now() + START;
    let mut stream = loop {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused && Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            other => break other.context("the console's TCP port")?,
        }
    };
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(e) if e.kind() != ErrorKind::ConnectionReset => return Err(e.into()),
        _ => {}
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
