//! The process is killed at random moments under verified streams, and another takes its place.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anemone_driver::vsock::{Guest, op, queue, shutdown};
use anemone_driver::{Bounced, Buffer, Kills, Options, Replaceable};
use common::{CID, PATIENCE, read_line};

/// Where a server of the host echoes, and where the guest does.
const HOST_PORT: u32 = 5000;
const GUEST_PORT: u32 = 80;
/// Streams that live through all kills, from each side.
const LONG: usize = 6;
const KILLS: usize = 200;

/// An endless stream of bytes, of which none can be missing, doubled or in another place unseen.
#[derive(Clone)]
struct Pattern(u64);

impl Pattern {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u8
    }

    fn take(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next()).collect()
    }

    fn check(&mut self, bytes: &[u8], what: &str, at: usize) {
        for (index, byte) in bytes.iter().enumerate() {
            assert_eq!(*byte, self.next(), "{what}: byte {}", at + index);
        }
    }
}

/// A device whose process is replaced, its guest, and a folder for the host's sockets.
struct Setup {
    guest: Guest<Replaceable>,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn start(options: &Options) -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let listener = UnixListener::bind(&path).unwrap();
    let mut device = Replaceable::start(
        env!("CARGO_BIN_EXE_anemone-vsock"),
        &["--cid", "52", "--listen-fd", "5"],
        vec![listener.into()],
        options,
    )
    .unwrap();
    device.dial_below(&path);
    Setup {
        guest: Guest::new(device, CID),
        path,
        _folder: folder,
    }
}

impl Setup {
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).unwrap()
    }

    /// Does everybody's work until `done`.
    fn run_until(&mut self, mut done: impl FnMut(&mut Guest<Replaceable>) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(&mut self.guest) {
            assert!(Instant::now() < deadline, "it does not come");
            self.guest.device.serve().unwrap();
            self.guest.poll(Duration::from_millis(5)).unwrap();
        }
    }
}

/// Sends back what comes, slowly at times, until the other side sends no more.
fn echo(mut stream: UnixStream, mut dice: Pattern) {
    let mut buffer = vec![0; 50_000];
    loop {
        let length = 1 + usize::from(dice.next()) * 180;
        let n = stream.read(&mut buffer[..length]).unwrap();
        if n == 0 {
            break;
        }
        if dice.next() < 8 {
            thread::sleep(Duration::from_millis(3));
        }
        stream.write_all(&buffer[..n]).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    // The other side closes first.
    let _ = stream.read(&mut buffer);
}

fn echo_server(listener: UnixListener, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    listener.set_nonblocking(true).unwrap();
    thread::spawn(move || {
        let mut threads = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false).unwrap();
                    let dice = Pattern::new(threads.len() as u64 + 99);
                    threads.push(thread::spawn(move || echo(stream, dice)));
                }
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    })
}

/// Connects to the guest; again if the device ends before it has accepted.
fn connect(path: &Path, again: &AtomicUsize) -> UnixStream {
    loop {
        let mut stream = UnixStream::connect(path).unwrap();
        let mut byte = [0];
        let asked = stream.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes());
        if asked.is_ok() && stream.read(&mut byte).is_ok_and(|n| n == 1) {
            assert_eq!(&byte, b"O");
            assert!(read_line(&mut stream).starts_with("K "));
            return stream;
        }
        again.fetch_add(1, Ordering::Relaxed);
    }
}

/// A client of the host sends a pattern to the guest and compares what comes back; the length.
fn host_client(stream: UnixStream, seed: u64, length: usize, stop: &AtomicBool) -> usize {
    let mut writer = stream.try_clone().unwrap();
    let mut reader = stream;
    let reading = thread::spawn(move || {
        let (mut pattern, mut buffer, mut at) = (Pattern::new(seed), vec![0; 30_000], 0);
        loop {
            let n = reader.read(&mut buffer).unwrap();
            if n == 0 {
                return at;
            }
            pattern.check(&buffer[..n], &format!("client {seed}"), at);
            at += n;
        }
    });
    let (mut pattern, mut dice, mut sent) = (Pattern::new(seed), Pattern::new(!seed), 0);
    while sent < length && !stop.load(Ordering::Relaxed) {
        let bytes = pattern.take((1 + usize::from(dice.next()) * 150).min(length - sent));
        writer.write_all(&bytes).unwrap();
        sent += bytes.len();
    }
    writer.shutdown(Shutdown::Write).unwrap();
    assert_eq!(reading.join().unwrap(), sent, "client {seed}");
    sent
}

/// What the guest does on a stream.
enum Role {
    /// Send back what comes.
    Echo(VecDeque<u8>),
    /// Send a pattern of this length and compare.
    Client {
        out: Pattern,
        back: Pattern,
        left: usize,
        waiting: Vec<u8>,
        received: usize,
        sent: usize,
    },
}

struct Job {
    number: usize,
    role: Role,
    told: bool,
}

impl Job {
    fn client(number: usize, length: usize) -> Self {
        Self {
            number,
            role: Role::Client {
                out: Pattern::new(number as u64),
                back: Pattern::new(number as u64),
                left: length,
                waiting: Vec::new(),
                received: 0,
                sent: 0,
            },
            told: false,
        }
    }

    /// Does what can be done; whether the stream has ended in good order.
    fn step(&mut self, guest: &mut Guest<Replaceable>, stop: bool, dice: &mut Pattern) -> bool {
        let number = self.number;
        let stream = &guest.streams[number];
        if stream.reset {
            assert!(
                self.told && stream.data.is_empty(),
                "stream {number} was reset"
            );
            return true;
        }
        if !stream.open {
            return false;
        }
        // A guest program that reads at times only.
        let came = match dice.next() < 128 {
            true => guest.read(number).unwrap(),
            false => Vec::new(),
        };
        let finished = match &mut self.role {
            Role::Echo(waiting) => {
                waiting.extend(came);
                let written = guest.write(number, waiting.make_contiguous()).unwrap();
                waiting.drain(..written);
                let stream = &guest.streams[number];
                waiting.is_empty() && stream.data.is_empty() && stream.shut & shutdown::SEND != 0
            }
            Role::Client {
                out,
                back,
                left,
                waiting,
                received,
                sent,
            } => {
                back.check(&came, &format!("stream {number}"), *received);
                *received += came.len();
                if waiting.is_empty() && *left > 0 && !stop {
                    let length = (1 + usize::from(dice.next()) * 200).min(*left);
                    *waiting = out.take(length);
                    *left -= length;
                }
                let written = guest.write(number, waiting).unwrap();
                waiting.drain(..written);
                *sent += written;
                let stream = &guest.streams[number];
                if waiting.is_empty() && (*left == 0 || stop) && !self.told {
                    self.told = true;
                    guest.shut_down(number, shutdown::SEND).unwrap();
                    return false;
                }
                let ended = stream.shut & shutdown::SEND != 0 && stream.data.is_empty();
                if ended {
                    assert_eq!(received, sent, "stream {number}");
                }
                ended
            }
        };
        if finished {
            self.told = true;
            let both = shutdown::SEND | shutdown::RCV;
            guest.shut_down(number, both).unwrap();
        }
        finished
    }
}

#[test]
fn no_byte_is_lost_or_doubled_and_no_connection_breaks() {
    streams_go_on(&common::options());
}

#[test]
fn no_byte_is_lost_or_doubled_with_a_bounce() {
    streams_go_on(&Options {
        bounce: Some(Bounced::usual(19, 3)),
        ..common::options()
    });
}

fn streams_go_on(options: &Options) {
    let mut setup = start(options);
    let mut kills = Kills::new(options.kills(KILLS), Duration::from_millis(12));
    setup.guest.listening.insert(GUEST_PORT);
    let stop = Arc::new(AtomicBool::new(false));
    let server = echo_server(setup.listen(HOST_PORT), Arc::clone(&stop));
    let again = Arc::new(AtomicUsize::new(0));
    // Long streams and short ones from the host.
    let clients: Vec<JoinHandle<(usize, usize)>> = (0..LONG + 1)
        .map(|index| {
            let (path, stop, again) = (setup.path.clone(), Arc::clone(&stop), Arc::clone(&again));
            thread::spawn(move || {
                if index < LONG {
                    let stream = connect(&path, &again);
                    return (host_client(stream, index as u64 + 1, usize::MAX, &stop), 1);
                }
                let (mut bytes, mut streams) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    let stream = connect(&path, &again);
                    let seed = 1000 + streams as u64;
                    bytes +=
                        host_client(stream, seed, 7919 * (streams % 12), &AtomicBool::new(false));
                    streams += 1;
                }
                (bytes, streams)
            })
        })
        .collect();
    let mut dice = Pattern::new(4711);
    let mut jobs: Vec<Job> = (0..LONG)
        .map(|_| Job::client(setup.guest.connect(HOST_PORT).unwrap(), usize::MAX))
        .collect();
    let (mut short, mut since_last) = (0, 0);
    let deadline = Instant::now() + 4 * PATIENCE;
    loop {
        let stopping = kills.done();
        stop.store(stopping, Ordering::Relaxed);
        if stopping && jobs.is_empty() && clients.iter().all(JoinHandle::is_finished) {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{} streams do not end",
            jobs.len()
        );
        since_last += 1;
        if !stopping && since_last > 20 && jobs.len() < 4 * LONG {
            since_last = 0;
            short += 1;
            let number = setup.guest.connect(HOST_PORT).unwrap();
            jobs.push(Job::client(number, 5003 * (short % 20)));
        }
        kills.strike(&mut setup.guest.device).unwrap();
        setup.guest.device.serve().unwrap();
        setup
            .guest
            .poll(kills.wait().min(Duration::from_millis(1)))
            .unwrap();
        while let Some(number) = setup.guest.accepted.pop_front() {
            jobs.push(Job {
                number,
                role: Role::Echo(VecDeque::new()),
                told: false,
            });
        }
        let guest = &mut setup.guest;
        jobs.retain_mut(|job| !job.step(guest, stopping, &mut dice));
    }
    let (mut bytes, mut streams) = (0, 0);
    for client in clients {
        let (more, count) = client.join().unwrap();
        bytes += more;
        streams += count;
    }
    server.join().unwrap();
    for queue in &setup.guest.device.device.queues {
        assert_eq!(queue.strays(), 0);
    }
    println!(
        "from the host {streams} streams with {bytes} bytes, {} asked again before they were \
         accepted; from the guest {} streams",
        again.load(Ordering::Relaxed),
        short + LONG
    );
    kills.report("anemone-vsock");
}

#[test]
fn idle_connections_by_the_hundred_outlive_the_process() {
    let mut setup = start(&common::options());
    let listener = setup.listen(HOST_PORT);
    let mut open: Vec<(usize, UnixStream)> = (0..400)
        .map(|_| {
            let number = setup.guest.connect(HOST_PORT).unwrap();
            setup.run_until(|guest| guest.streams[number].open);
            (number, listener.accept().unwrap().0)
        })
        .collect();
    setup.guest.device.replace().unwrap();
    // Those whose host has gone meanwhile are told; the others work.
    let (_, gone) = open.swap_remove(7);
    drop(gone);
    for (number, host) in &mut open {
        let number = *number;
        let byte = [number as u8];
        assert_eq!(setup.guest.write(number, &byte).unwrap(), 1);
        host.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut got = [0];
        host.read_exact(&mut got).unwrap();
        assert_eq!(got, byte);
        host.write_all(&byte).unwrap();
    }
    for (number, _) in &open {
        let number = *number;
        setup.run_until(|guest| !guest.streams[number].data.is_empty());
        assert_eq!(setup.guest.read(number).unwrap(), [number as u8]);
        assert!(!setup.guest.streams[number].reset);
    }
}

#[test]
fn a_planned_restart_keeps_connections_too() {
    let mut setup = start(&common::options());
    let listener = setup.listen(HOST_PORT);
    let number = setup.guest.connect(HOST_PORT).unwrap();
    setup.run_until(|guest| guest.streams[number].open);
    let mut host = listener.accept().unwrap().0;
    host.set_read_timeout(Some(PATIENCE)).unwrap();
    for round in 0..5 {
        assert_eq!(setup.guest.write(number, &[round]).unwrap(), 1);
        host.write_all(&[round]).unwrap();
        setup.guest.device.retire().unwrap();
        let mut byte = [0];
        host.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [round]);
        setup.run_until(|guest| !guest.streams[number].data.is_empty());
        assert_eq!(setup.guest.read(number).unwrap(), [round]);
    }
}

#[test]
fn what_waits_for_a_slow_host_is_there_after_the_kill() {
    let mut setup = start(&common::options());
    let listener = setup.listen(HOST_PORT);
    let number = setup.guest.connect(HOST_PORT).unwrap();
    setup.run_until(|guest| guest.streams[number].open);
    let mut host = listener.accept().unwrap().0;
    let mut pattern = Pattern::new(9);
    let data = pattern.take(2 << 20);
    let mut sent = 0;
    setup.run_until(|guest| {
        sent += guest.write(number, &data[sent..]).unwrap();
        guest.is_quiet() && guest.streams[number].credit() == 0
    });
    // The guest has closed, too: nobody but the device has these bytes.
    let both = shutdown::SEND | shutdown::RCV;
    setup.guest.shut_down(number, both).unwrap();
    let packet = setup.guest.packet(number, op::RST);
    setup.guest.send(&packet).unwrap();
    setup.run_until(Guest::is_quiet);
    setup.guest.device.replace().unwrap();
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert!(got == data[..sent], "{} of {sent} bytes", got.len());
    // Nothing of it is left with the supervisor but the state.
    setup.run_until(|guest| guest.device.kept().unwrap().len() == 1);
}

/// Without what was kept, the guest is told that its connections are gone; a guest that has just
/// started is not.
#[test]
fn a_guest_whose_connections_are_lost_is_told() {
    let mut setup = common::start();
    let event = setup.guest.device.memory.alloc(4, 4);
    setup.guest.device.memory.write(event, &[0xff; 4]);
    let buffer = Buffer {
        addr: event,
        len: 4,
    };
    let queue = &mut setup.guest.device.queues[queue::EVENT];
    queue.add(&[], &[buffer]).unwrap();
    queue.publish();
    queue.kick();
    let (_, client) = setup.host_stream(GUEST_PORT);
    assert_eq!(setup.guest.device.queues[queue::EVENT].used_index(), 0);
    drop(client);
    // The same guest finds a process that knows nothing.
    let mut other = common::start();
    drop(other.guest);
    let socket = other.process.connect().unwrap();
    setup.guest.device.inflight = None;
    setup.guest.device.reconnect(socket).unwrap();
    let queue = &mut setup.guest.device.queues[queue::EVENT];
    assert!(queue.wait(PATIENCE).unwrap());
    assert_eq!(queue.take_used().unwrap().len, 4);
    assert_eq!(setup.guest.device.memory.read_vec(event, 4), [0; 4]);
}
