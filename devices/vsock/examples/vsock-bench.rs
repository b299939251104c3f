//! Load for `anemone-vsock`, without a guest: plays the driver and a program of the host, and prints
//! one line of JSON.
//!
//! ```text
//! vsock-bench --program PATH --load tx|rx|ping [--seconds S]
//! {"per_second": …, "cpu_ns": …, "round_trip_ns": …, "raw_round_trip_ns": …, "raw_cpu_ns": …}
//! ```
//!
//! `tx` and `rx` send as fast as it goes from the guest and to the guest: `per_second` is bytes, `cpu_ns`
//! the processor time of the process for each KiB. `ping` sends 64 bytes, which the program of the host
//! sends back: `per_second` is round trips, `cpu_ns` the processor time for each way. The raw figures are
//! those of two threads that wake each other by eventfds, measured just before.

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use anemone_driver::bench::{Kind, Load};
use anemone_driver::vsock::Guest;
use anemone_driver::{Options, Supervised};

const PORT: u32 = 5;
const PING: usize = 64;
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes bytes and drops them, or sends them, or sends them back, until the process ends.
fn peer(mut socket: UnixStream, kind: Kind) {
    let mut bytes = vec![0x55u8; 256 << 10];
    match kind {
        Kind::Rx => while socket.write_all(&bytes).is_ok() {},
        _ => {
            while let Ok(count @ 1..) = socket.read(&mut bytes) {
                if kind == Kind::Ping && socket.write_all(&bytes[..count]).is_err() {
                    return;
                }
            }
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let load = Load::parse(|_, _| Ok(false))?;
    let kind = load.kind;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("v");
    let listener = UnixListener::bind(&path)?;
    let args = ["--cid", "3", "--listen-fd", "5"];
    let mut process = Supervised::start(&load.program, &args, vec![listener.into()])?;
    process.ready()?;
    let options = Options {
        queues: 3,
        ..Options::default()
    };
    let mut guest = Guest::new(process.device(&options)?, 3);
    guest.listening.insert(PORT);
    let mut host = UnixStream::connect(&path)?;
    writeln!(host, "CONNECT {PORT}")?;
    if !guest.poll_until(|guest| !guest.accepted.is_empty())? {
        return Err("no connection".into());
    }
    let number = guest.accepted.pop_front().ok_or("no connection")?;
    let mut byte = [0];
    while byte != *b"\n" {
        host.read_exact(&mut byte)?;
    }
    thread::spawn(move || peer(host, kind));
    let data = vec![0x55u8; 64 << 10];
    let pid = process.child().id();
    let unit = match kind {
        Kind::Ping => 1.0,
        Kind::Tx | Kind::Rx => 1024.0,
    };
    load.measure(pid, unit, |seconds| {
        let start = Instant::now();
        let mut count = 0;
        while start.elapsed().as_secs_f64() < seconds {
            match kind {
                Kind::Tx => {
                    let written = guest.write(number, &data)?;
                    count += written as u64;
                    if written == 0 {
                        guest.poll(Duration::from_millis(1))?;
                    }
                }
                Kind::Rx => {
                    if !guest.poll(PATIENCE)? {
                        return Err("no bytes come".into());
                    }
                    count += guest.read(number)?.len() as u64;
                }
                Kind::Ping => {
                    if guest.write(number, &data[..PING])? != PING {
                        return Err("there is no room for a ping".into());
                    }
                    let mut came = 0;
                    while came < PING {
                        if !guest.poll(PATIENCE)? {
                            return Err("a ping does not come back".into());
                        }
                        came += guest.read(number)?.len();
                    }
                    count += 1;
                }
            }
        }
        Ok(count)
    })
}
