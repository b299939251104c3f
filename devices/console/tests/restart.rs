//! The process is killed at random moments while bytes go both ways, and another takes its place:
//! every byte arrives once, and the client of the socket stays connected.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anemone_driver::{Bounced, Buffer, Kills, Options, Random, Replaceable, Supervised};
use common::{BINARY, LONG, options};

const RECEIVEQ: usize = 0;
const TRANSMITQ: usize = 1;
const SLOT: u32 = 2048;
const KILLS: usize = 200;

/// Byte number `i` of a stream.
fn byte(i: u64) -> u8 {
    (i ^ (i >> 8) ^ (i >> 16)) as u8
}

fn stream(start: u64, length: u64) -> Vec<u8> {
    (start..start + length).map(byte).collect()
}

fn check(start: u64, bytes: &[u8]) {
    let wrong = (start..).zip(bytes).find(|&(i, &b)| byte(i) != b);
    assert_eq!(wrong, None, "the stream is broken");
}

/// The guest's side: bytes it has said and heard.
struct Guest {
    base: u64,
    free: Vec<u64>,
    slots: [HashMap<u32, u64>; 2],
    said: u64,
    heard: u64,
}

impl Guest {
    fn new(device: &Replaceable) -> Self {
        Self {
            base: device.device.memory.alloc(u64::from(64 * SLOT), 4096),
            free: (0..64).collect(),
            slots: [HashMap::new(), HashMap::new()],
            said: 0,
            heard: 0,
        }
    }

    fn offer(&mut self, device: &mut Replaceable, random: &mut Random, talks: bool) {
        let (memory, queues) = (device.device.memory.clone(), &mut device.device.queues);
        for (index, depth) in [(RECEIVEQ, 8), (TRANSMITQ, 16)] {
            while (index == RECEIVEQ || talks) && self.slots[index].len() < depth {
                let slot = self.free.pop().unwrap();
                let (addr, len) = (
                    self.base + slot * u64::from(SLOT),
                    2 + random.below(1500) as u32,
                );
                let first = random.below(len.into()) as u32;
                let pieces = [(addr, first), (addr + u64::from(first), len - first)]
                    .map(|(addr, len)| Buffer { addr, len });
                let head = if index == TRANSMITQ {
                    memory.write(addr, &stream(self.said, len.into()));
                    self.said += u64::from(len);
                    queues[index].add(&pieces, &[])
                } else {
                    queues[index].add(&[], &pieces)
                };
                self.slots[index].insert(head.unwrap().into(), slot);
            }
            queues[index].publish();
            queues[index].kick();
        }
    }

    fn take(&mut self, device: &mut Replaceable) {
        for index in [RECEIVEQ, TRANSMITQ] {
            while let Some(used) = device.device.queues[index].take_used() {
                let slot = self.slots[index].remove(&used.head).unwrap();
                let addr = self.base + slot * u64::from(SLOT);
                let bytes = device.device.memory.read_vec(addr, used.len as usize);
                check(self.heard, &bytes);
                self.heard += bytes.len() as u64;
                self.free.push(slot);
            }
        }
    }
}

/// The client's side.
struct Client {
    socket: UnixStream,
    said: u64,
    heard: u64,
}

impl Client {
    fn talk(&mut self, random: &mut Random, talks: bool) {
        let mut bytes = vec![0; 1 + random.below(6000) as usize];
        match self.socket.read(&mut bytes) {
            Ok(0) => panic!("the client was disconnected"),
            Ok(n) => {
                check(self.heard, &bytes[..n]);
                self.heard += n as u64;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        if talks {
            let bytes = stream(self.said, 1 + random.below(600));
            match self.socket.write(&bytes) {
                Ok(n) => self.said += n as u64,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    }
}

#[test]
fn every_byte_of_both_directions_arrives_once() {
    both_directions(&options());
}

#[test]
fn every_byte_of_both_directions_arrives_once_with_a_bounce() {
    both_directions(&Options {
        bounce: Some(Bounced::usual(3, 2)),
        ..options()
    });
}

fn both_directions(options: &Options) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let listener = UnixListener::bind(&path).unwrap();
    let socket = UnixStream::connect(&path).unwrap();
    socket.set_nonblocking(true).unwrap();
    let args = ["--unix-fd", "5"];
    let mut device = Replaceable::start(BINARY, &args, vec![listener.into()], options).unwrap();
    let mut guest = Guest::new(&device);
    let mut client = Client {
        socket,
        said: 0,
        heard: 0,
    };
    let mut kills = Kills::new(options.kills(KILLS), Duration::from_millis(4));
    // The client has been accepted when the guest hears it.
    while guest.heard == 0 {
        guest.offer(&mut device, kills.random(), false);
        client.talk(kills.random(), true);
        guest.take(&mut device);
    }
    let mut since = Instant::now();
    while !kills.done() || client.heard < guest.said || guest.heard < client.said {
        let talks = !kills.done();
        guest.offer(&mut device, kills.random(), talks);
        client.talk(kills.random(), talks);
        if kills.strike(&mut device).unwrap() {
            since = Instant::now();
        }
        guest.take(&mut device);
        assert!(since.elapsed() < LONG, "bytes are lost");
    }
    for queue in &device.device.queues {
        assert_eq!(queue.strays(), 0);
    }
    println!("{} bytes out, {} bytes in", client.heard, guest.heard);
    kills.report("anemone-console, UNIX socket");
}

#[test]
fn every_byte_is_appended_to_the_file_once() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let file = OpenOptions::new().create(true).append(true).open(&path);
    let args = ["--file-fd", "5"];
    let fds = vec![file.unwrap().into()];
    let mut device = Replaceable::start(BINARY, &args, fds, &options()).unwrap();
    let mut guest = Guest::new(&device);
    let mut kills = Kills::new(KILLS, Duration::from_millis(4));
    while !kills.done() || !guest.slots[TRANSMITQ].is_empty() {
        let talks = !kills.done();
        guest.offer(&mut device, kills.random(), talks);
        kills.strike(&mut device).unwrap();
        guest.take(&mut device);
    }
    // The last bytes may still be on their way.
    let deadline = Instant::now() + LONG;
    while std::fs::metadata(&path).unwrap().len() < guest.said && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut bytes = Vec::new();
    File::open(&path).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, guest.said);
    check(0, &bytes);
    println!("{} bytes", bytes.len());
    kills.report("anemone-console, file");
}

/// Whoever has the pseudo-terminal open keeps it, and misses nothing.
#[test]
fn every_byte_reaches_the_terminal_once() {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    // SAFETY: posix_openpt takes no pointer; the result is a new descriptor or -1, which is checked.
    // TIOCGPTPEER takes its flags by value and returns a new descriptor or -1.
    let (master, mut terminal) = unsafe {
        let master = libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        assert!(master >= 0);
        let master = OwnedFd::from_raw_fd(master);
        assert_eq!(libc::unlockpt(master.as_raw_fd()), 0);
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
        let peer = libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags);
        assert!(peer >= 0);
        (master, File::from_raw_fd(peer))
    };
    let args = ["--pty-fd", "5"];
    let mut device = Replaceable::start(BINARY, &args, vec![master], &options()).unwrap();
    let mut guest = Guest::new(&device);
    let mut kills = Kills::new(KILLS, Duration::from_millis(4));
    let mut heard = 0;
    let mut since = Instant::now();
    while !kills.done() || heard < guest.said {
        let talks = !kills.done();
        guest.offer(&mut device, kills.random(), talks);
        let mut bytes = [0; 4000];
        match terminal.read(&mut bytes) {
            Ok(n) => {
                check(heard, &bytes[..n]);
                heard += n as u64;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        if kills.strike(&mut device).unwrap() {
            since = Instant::now();
        }
        guest.take(&mut device);
        assert!(since.elapsed() < LONG, "{heard} of {} bytes", guest.said);
    }
    println!("{heard} bytes");
    kills.report("anemone-console, pseudo-terminal");
}

/// The same for the byte stream of a UART, as far as its output goes.
#[test]
fn every_byte_of_a_uart_arrives_once() {
    use anemone_ipc::device::FromDevice;
    use std::collections::BTreeMap;
    use std::os::fd::OwnedFd;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial");
    let listener: OwnedFd = UnixListener::bind(&path).unwrap().into();
    let mut client = Client {
        socket: UnixStream::connect(&path).unwrap(),
        said: 0,
        heard: 0,
    };
    client.socket.set_nonblocking(true).unwrap();
    let (mut uart, theirs) = UnixStream::pair().unwrap();
    uart.set_nonblocking(true).unwrap();
    let theirs: OwnedFd = theirs.into();
    let mut random = Random::seeded();
    let mut kept = BTreeMap::new();
    let mut said = 0;
    // The client has been accepted when the UART hears it.
    client.socket.write_all(b"!").unwrap();
    let mut accepted = false;
    for _ in 0..100 {
        let fds = vec![theirs.try_clone().unwrap(), listener.try_clone().unwrap()];
        let args = ["--stream-fd", "5", "--unix-fd", "6"];
        let mut process = Supervised::start_again(BINARY, &args, fds, &kept).unwrap();
        let end = Instant::now() + Duration::from_micros(3000 + random.below(6000));
        while Instant::now() < end || client.heard == 0 {
            accepted |= uart.read(&mut [0; 8]).is_ok();
            if !accepted {
                continue;
            }
            if let Ok(n) = uart.write(&stream(said, 1 + random.below(900))) {
                said += n as u64;
            }
            client.talk(&mut random, false);
        }
        process.child().kill().unwrap();
        process.wait().unwrap();
        while let Ok(mut received) = process.control.recv::<FromDevice>() {
            match received.message {
                FromDevice::Keep { key, fd } => drop(kept.insert(key, received.take(fd).unwrap())),
                FromDevice::Forget { key } => drop(kept.remove(&key)),
                _ => {}
            }
        }
    }
    let fds = vec![theirs, listener];
    let args = ["--stream-fd", "5", "--unix-fd", "6"];
    let _process = Supervised::start_again(BINARY, &args, fds, &kept).unwrap();
    let deadline = Instant::now() + LONG;
    while client.heard < said {
        client.talk(&mut random, false);
        assert!(
            Instant::now() < deadline,
            "{} of {said} bytes",
            client.heard
        );
    }
    println!("{said} bytes");
}

/// What an earlier process left is nonsense: the console begins anew.
#[test]
fn nonsense_that_was_kept_ends_nothing() {
    use anemone_ipc::device::ToDevice;
    use std::os::fd::AsFd;
    let null = || File::open("/dev/null").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let file = OpenOptions::new().create(true).append(true).open(&path);
    let args = ["--file-fd", "5"];
    let fds = vec![file.unwrap().into()];
    let mut process = Supervised::start_stream(BINARY, &args, fds).unwrap();
    let keys = vec![0, 1, 2, u64::MAX];
    let short = tempfile::tempfile().unwrap();
    let fds = [short, null(), null(), null()];
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    process
        .control
        .send(&ToDevice::Kept { keys }, &fds)
        .unwrap();
    process.connection = Some(process.connect().unwrap());
    let mut guest = common::Guest::new(process.device(&options()).unwrap());
    guest.write(b"hello");
    let deadline = Instant::now() + LONG;
    while std::fs::read(&path).unwrap() != b"hello" {
        assert!(Instant::now() < deadline);
    }
}
