//! Load for `anemone-net`, without a guest and without a network: plays driver and peer, and prints
//! one line of JSON.
//!
//! ```text
//! net-bench --program PATH --peer stream|packets --load tx|rx|ping [--frame BYTES] [--seconds S]
//! {"per_second": …, "cpu_ns": …, "round_trip_ns": …, "raw_round_trip_ns": …, "raw_cpu_ns": …}
//! ```
//!
//! `tx` and `rx` keep the queue full in one direction; `ping` sends one frame at a time, waits until it has
//! been taken and has come back from the peer. `cpu_ns` is the processor time of the process for each
//! frame, `round_trip_ns` that of a ping. The raw figures are those of two threads that wake each other
//! by eventfds, measured just before.

use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use anemone_driver::bench::{Kind, Load};
use anemone_driver::net::{Receiver, Sender};
use anemone_driver::{Options, Supervised};

const QUEUE_SIZE: u16 = 256;
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes frames and drops them, or sends them, or sends them back, until the process ends.
fn stream_peer(mut socket: UnixStream, kind: Kind, frame: usize) {
    let mut bytes = vec![0u8; 256 << 10];
    let one = [&(frame as u32).to_be_bytes()[..], &vec![0x55; frame]].concat();
    if kind == Kind::Rx {
        let many = one.repeat(bytes.len() / one.len());
        while socket.write_all(&many).is_ok() {}
        return;
    }
    while let Ok(count @ 1..) = socket.read(&mut bytes) {
        if kind == Kind::Ping && socket.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
}

fn packet_peer(socket: &UnixDatagram, kind: Kind, frame: usize) {
    let mut bytes = vec![0x55u8; 2048];
    if kind == Kind::Rx {
        while socket.send(&bytes[..frame]).is_ok() {}
        return;
    }
    while let Ok(count @ 1..) = socket.recv(&mut bytes) {
        if kind == Kind::Ping && socket.send(&bytes[..count]).is_err() {
            return;
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut stream, mut frame) = (true, 64);
    let load = Load::parse(|name, value| {
        match (name, value) {
            ("--peer", "stream") => stream = true,
            ("--peer", "packets") => stream = false,
            ("--frame", _) => frame = value.parse()?,
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if !(14..=1514).contains(&frame) {
        return Err("--frame is 14 to 1514".into());
    }
    let kind = load.kind;
    let (option, theirs): (_, OwnedFd) = if stream {
        let (ours, theirs) = UnixStream::pair()?;
        thread::spawn(move || stream_peer(ours, kind, frame));
        ("--stream-fd", theirs.into())
    } else {
        let (ours, theirs) = UnixDatagram::pair()?;
        thread::spawn(move || packet_peer(&ours, kind, frame));
        ("--socket-fd", theirs.into())
    };
    let mut process = Supervised::start(&load.program, &[option, "5"], vec![theirs])?;
    process.ready()?;
    let options = Options {
        queues: 2,
        queue_size: QUEUE_SIZE,
        ..Options::default()
    };
    let mut device = process.device(&options)?;
    let memory = device.memory.clone();
    let mut rx = Receiver::new(&memory, QUEUE_SIZE, QUEUE_SIZE.into(), 2048);
    let mut tx = Sender::new(&memory, QUEUE_SIZE, QUEUE_SIZE.into(), 1514);
    let pid = process.child().id();
    load.measure(pid, 1.0, |seconds| {
        let start = Instant::now();
        let mut frames = 0;
        while start.elapsed().as_secs_f64() < seconds {
            let [rx_queue, tx_queue, ..] = &mut device.queues[..] else {
                return Err("there are no queues".into());
            };
            match kind {
                Kind::Tx => {
                    while tx.add_stale(tx_queue, frame) {}
                    tx_queue.publish();
                    tx_queue.kick();
                    if !tx_queue.wait(PATIENCE)? {
                        return Err("frames are not taken".into());
                    }
                    frames += tx.reap(tx_queue);
                }
                Kind::Rx => {
                    rx.refill(rx_queue);
                    if !rx_queue.wait(PATIENCE)? {
                        return Err("no frames come".into());
                    }
                    frames += rx.count(rx_queue);
                }
                Kind::Ping => {
                    rx.refill(rx_queue);
                    tx.reap(tx_queue);
                    tx.add_stale(tx_queue, frame);
                    tx_queue.publish();
                    tx_queue.kick();
                    let before = frames;
                    while frames == before {
                        if !rx_queue.wait(PATIENCE)? {
                            return Err("a frame does not come back".into());
                        }
                        frames += rx.count(rx_queue);
                    }
                }
            }
        }
        Ok(frames)
    })
}
