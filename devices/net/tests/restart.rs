//! The process is killed at random moments under load, and another takes its place. Frames may be
//! lost or come twice; none is damaged, and they go on passing both ways.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anemone_driver::net::{Receiver, Sender};
use anemone_driver::{Bounced, Kills, Options, Replaceable};
use anemone_ipc::keeper::{FromKeeper, ToKeeper};
use anemone_ipc::{Channel, FdIndex};
use common::{BINARY, LONG, OTHER, OWN, PLAIN, frame};

const KILLS: usize = 200;
const QUEUE: u16 = 128;

/// Whether a frame is one that was sent, whole.
fn verify(bytes: &[u8]) {
    let number: [u8; 4] = bytes[14..18].try_into().unwrap();
    let to = bytes[..6].try_into().unwrap();
    let from = bytes[6..12].try_into().unwrap();
    let sent = frame(to, from, u32::from_le_bytes(number), bytes.len());
    assert!(bytes == sent, "a frame of {} bytes is damaged", bytes.len());
}

fn length(number: u32) -> usize {
    20 + (number as usize * 97) % 3000
}

/// What the peer has received.
#[derive(Default)]
struct Counts {
    frames: AtomicU64,
    connections: AtomicU64,
}

/// One connection of the peer: sends frames and verifies those that come, until its end.
fn serve(socket: UnixStream, counts: &Counts) {
    counts.connections.fetch_add(1, Ordering::Relaxed);
    thread::scope(|scope| {
        let mut writer = socket.try_clone().unwrap();
        scope.spawn(move || {
            for number in 0u32.. {
                let sent = frame(OWN, OTHER, number, length(number));
                let prefix = (sent.len() as u32).to_be_bytes();
                if writer.write_all(&[&prefix[..], &sent].concat()).is_err() {
                    return;
                }
            }
        });
        let mut reader = socket;
        let mut prefix = [0; 4];
        let mut bytes = Vec::new();
        while reader.read_exact(&mut prefix).is_ok() {
            let length = u32::from_be_bytes(prefix) as usize;
            assert!(
                (20..3020).contains(&length),
                "the stream is out of step: {length}"
            );
            bytes.resize(length, 0);
            if reader.read_exact(&mut bytes).is_err() {
                break;
            }
            verify(&bytes);
            counts.frames.fetch_add(1, Ordering::Relaxed);
        }
        // The writer may wait for room.
        let _ = reader.shutdown(std::net::Shutdown::Both);
    });
}

/// Answers every question with a new connection.
fn keep(keeper: &Channel, counts: &Arc<Counts>) {
    let mut threads = Vec::new();
    while let Ok(received) = keeper.recv::<ToKeeper>() {
        let ToKeeper::Connect = received.message;
        let (ours, theirs) = UnixStream::pair().unwrap();
        let counts = Arc::clone(counts);
        threads.push(thread::spawn(move || serve(ours, &counts)));
        let answer = FromKeeper::Connected { socket: FdIndex(0) };
        if keeper.send(&answer, &[theirs.as_fd()]).is_err() {
            break;
        }
    }
    for thread in threads {
        thread.join().unwrap();
    }
}

/// Moves frames both ways until the last kill has been survived: frames still pass after it.
fn load(device: &mut Replaceable, counts: &Counts, kills: usize, what: &str) {
    let memory = device.device.memory.clone();
    let mut rx = Receiver::new(&memory, QUEUE, QUEUE.into(), 2048);
    let mut tx = Sender::new(&memory, QUEUE, 64, 4096);
    let mut kills = Kills::new(kills, Duration::from_millis(5));
    let (mut received, mut number) = (0u64, 0u32);
    let mut goals = None;
    let mut end = Instant::now();
    loop {
        let queues = &mut device.device.queues;
        rx.refill(&mut queues[0]);
        while let Some(packet) = rx.take(&mut queues[0]).unwrap() {
            verify(&packet.frame);
            received += 1;
        }
        tx.reap(&mut queues[1]);
        while tx.add(
            &mut queues[1],
            &PLAIN,
            &frame(OTHER, OWN, number, length(number)),
        ) {
            number += 1;
        }
        queues[1].publish();
        queues[1].kick();
        kills.strike(device).unwrap();
        let sent = counts.frames.load(Ordering::Relaxed);
        match goals {
            None if kills.done() => {
                goals = Some((received + 100, sent + 100));
                end = Instant::now() + LONG;
            }
            None => {}
            Some((rx, tx)) if received >= rx && sent >= tx => break,
            Some(_) => assert!(Instant::now() < end, "frames do not pass any more"),
        }
    }
    kills.report(what);
    let connections = counts.connections.load(Ordering::Relaxed);
    println!("{received} frames received, {number} sent, {connections} connections");
}

fn options(bounce: Option<Bounced>) -> Options {
    Options {
        queues: 2,
        queue_size: QUEUE,
        bounce,
        ..Options::default()
    }
}

fn stream_stays_in_step(options: &Options) {
    let (keeper, far) = anemone_ipc::pair().unwrap();
    let counts = Arc::new(Counts::default());
    let thread = {
        let counts = Arc::clone(&counts);
        thread::spawn(move || keep(&keeper, &counts))
    };
    let args = ["--keeper-fd", "5"];
    let mut device = Replaceable::start(BINARY, &args, vec![far.into_fd()], options).unwrap();
    let kills = options.kills(KILLS);
    load(&mut device, &counts, kills, "net, stream");
    assert!(counts.connections.load(Ordering::Relaxed) > kills as u64 / 2);
    drop(device);
    thread.join().unwrap();
}

#[test]
fn a_stream_is_never_out_of_step() {
    stream_stays_in_step(&options(None));
}

#[test]
fn a_stream_is_never_out_of_step_with_a_bounce() {
    stream_stays_in_step(&options(Some(Bounced::usual(1, 2))));
}

#[test]
fn packets_stay_whole() {
    keeps_packets_whole(&options(None));
}

#[test]
fn packets_stay_whole_with_a_bounce() {
    keeps_packets_whole(&options(Some(Bounced::usual(1, 2))));
}

fn keeps_packets_whole(options: &Options) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    ours.set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let counts = Arc::new(Counts::default());
    let stop = Arc::new(AtomicU64::new(0));
    let threads = [false, true].map(|writes| {
        let (socket, counts, stop) = (
            ours.try_clone().unwrap(),
            Arc::clone(&counts),
            Arc::clone(&stop),
        );
        thread::spawn(move || {
            let mut bytes = vec![0; 8192];
            let mut number = 0u32;
            while stop.load(Ordering::Relaxed) == 0 {
                if writes {
                    number += 1;
                    let _ = socket.send(&frame(OWN, OTHER, number, length(number)));
                } else if let Ok(length) = socket.recv(&mut bytes) {
                    verify(&bytes[..length]);
                    counts.frames.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    });
    let args = ["--socket-fd", "5", "--mtu", "4000"];
    let mut device = Replaceable::start(BINARY, &args, vec![theirs.into()], options).unwrap();
    load(&mut device, &counts, options.kills(KILLS), "net, packets");
    stop.store(1, Ordering::Relaxed);
    for thread in threads {
        thread.join().unwrap();
    }
}
