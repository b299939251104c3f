//! Taps, in a network namespace that the test makes for itself. The host's side of a tap is a packet
//! socket on its interface.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anemone_driver::net::{Receiver, Sender, command, feature};
use anemone_driver::{Options, Supervised};
use common::{BINARY, Card, LONG, OTHER, OWN, PLAIN, frame};

/// Set in the namespace.
const INSIDE: &str = "ANEMONE_TEST_IN_NAMESPACE";

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP: i16 = 2;
const IFF_MULTI_QUEUE: i16 = 0x100;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const ETH_P_ALL: u16 = 3;

/// Runs the test again in a namespace of its own, unless this is there already.
fn in_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--map-root-user", "--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("util-linux has unshare");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "in a namespace of its own:\n{text}{errors}"
    );
    assert!(text.contains("1 passed"), "{text}");
    false
}

fn check(result: libc::c_int) -> libc::c_int {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

fn request(name: &str, flags: i16) -> IfReq {
    let mut request = IfReq {
        name: [0; 16],
        flags,
        rest: [0; 22],
    };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    request
}

fn open_tap(name: &str, flags: i16) -> OwnedFd {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let mut request = request(name, flags);
    // SAFETY: a struct ifreq, which the call reads and writes.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) });
    file.into()
}

/// The host's side: a packet socket that gives and takes virtio headers of 10 bytes.
struct Wire(OwnedFd);

impl Wire {
    fn new(name: &str) -> Self {
        // SAFETY: plain numbers and structures that outlive the calls; the socket is new and ours.
        unsafe {
            let protocol = ETH_P_ALL.to_be();
            let fd = check(libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW,
                protocol.into(),
            ));
            let socket = OwnedFd::from_raw_fd(fd);
            let mut up = request(name, (libc::IFF_UP | libc::IFF_RUNNING) as i16);
            check(libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut up));
            let name = std::ffi::CString::new(name).unwrap();
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            assert_ne!(address.sll_ifindex, 0);
            let length = size_of_val(&address) as u32;
            check(libc::bind(fd, (&raw const address).cast(), length));
            let on: libc::c_int = 1;
            let size = size_of_val(&on) as u32;
            const PACKET_VNET_HDR: libc::c_int = 15;
            check(libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                PACKET_VNET_HDR,
                (&raw const on).cast(),
                size,
            ));
            let wait = libc::timeval {
                tv_sec: 0,
                tv_usec: 100_000,
            };
            let size = size_of_val(&wait) as u32;
            let option = libc::SO_RCVTIMEO;
            check(libc::setsockopt(
                fd,
                libc::SOL_SOCKET,
                option,
                (&raw const wait).cast(),
                size,
            ));
            Self(socket)
        }
    }

    fn send(&self, header: [u8; 10], frame: &[u8]) {
        let bytes = [&header[..], frame].concat();
        // SAFETY: the buffer is as long as the length given.
        let n = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
        assert_eq!(n, bytes.len() as isize, "{}", io::Error::last_os_error());
    }

    /// The next frame for which `wanted` holds, with its header.
    fn receive(&self, wanted: impl Fn(&[u8]) -> bool) -> ([u8; 10], Vec<u8>) {
        let end = Instant::now() + LONG;
        let mut bytes = vec![0; 70_000];
        while Instant::now() < end {
            // SAFETY: the buffer is as long as the length given.
            let n = unsafe {
                libc::recv(
                    self.0.as_raw_fd(),
                    bytes.as_mut_ptr().cast(),
                    bytes.len(),
                    0,
                )
            };
            if n > 10 && wanted(&bytes[10..n as usize]) {
                let header = bytes[..10].try_into().unwrap();
                return (header, bytes[10..n as usize].to_vec());
            }
        }
        panic!("no such frame has come");
    }
}

/// A TCP segment over IPv4 with so many bytes of data, its checksum left to the card, and the header
/// that says so.
fn segment(to: [u8; 6], from: [u8; 6], data: usize) -> ([u8; 10], Vec<u8>) {
    let length = (20 + 20 + data) as u16;
    let mut ip = [
        0x45, 0, 0, 0, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    let sum = |bytes: &[u8]| -> u32 {
        bytes
            .chunks(2)
            .map(|c| u32::from(u16::from_be_bytes([c[0], c[1]])))
            .sum()
    };
    let fold = |mut sum: u32| {
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    };
    let checksum = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut tcp = [
        0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ];
    // The sum of the pseudo header, to which the card adds the rest.
    let pseudo = fold(sum(&ip[12..20]) + 6 + u32::from(length - 20));
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
    let mut frame = [&to[..], &from[..], &[8, 0], &ip[..], &tcp[..]].concat();
    frame.extend((0..data).map(|i| (i * 7) as u8));
    let [hdr_low, hdr_high] = 54u16.to_le_bytes();
    let [mss_low, mss_high] = 1000u16.to_le_bytes();
    (
        [1, 1, hdr_low, hdr_high, mss_low, mss_high, 34, 0, 16, 0],
        frame,
    )
}

fn is_tcp(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&6)
}

/// The next frame that the test has sent: the kernel sends some of its own.
fn ours(card: &mut Card, wanted: impl Fn(&[u8]) -> bool) -> anemone_driver::net::Packet {
    loop {
        let packet = card.receive();
        if wanted(&packet.frame) {
            return packet;
        }
    }
}

#[test]
fn frames_and_offloads() {
    if in_namespace("frames_and_offloads") {
        frames_and_offloads_of(Card::connect);
    }
}

#[test]
fn frames_and_offloads_with_a_bounce() {
    if in_namespace("frames_and_offloads_with_a_bounce") {
        frames_and_offloads_of(Card::bounced);
    }
}

fn frames_and_offloads_of(connect: fn(&mut Supervised, u64, u32) -> Card) {
    let tap = open_tap("tap0", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
    let wire = Wire::new("tap0");
    let args = ["--tap-fd", "5"];
    let mut process = Supervised::start(BINARY, &args, vec![tap]).unwrap();
    process.ready().unwrap();
    let mut card = connect(&mut process, !0, 2048);
    let offloads = feature::CSUM | feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::HOST_TSO4;
    assert_eq!(card.device.features & offloads, offloads);
    for (number, length) in [60, 100, 1514].into_iter().enumerate() {
        let sent = frame(OTHER, OWN, number as u32, length);
        card.send(&sent);
        assert_eq!(wire.receive(|f| f[12..14] == [0x88, 0xb5]).1, sent);
        wire.send([0; 10], &sent);
        assert_eq!(ours(&mut card, |f| f[12..14] == [0x88, 0xb5]).frame, sent);
    }
    // Large segments pass as they are, spread over buffers.
    let mut sent = None;
    for data in [20_000, 65_400] {
        let (header, large) = segment(OWN, OTHER, data);
        wire.send(header, &large);
        let packet = ours(&mut card, is_tcp);
        assert!(packet.frame == large);
        assert_eq!(packet.buffers, (large.len() + 12).div_ceil(2048));
        assert_eq!(packet.header[..2], [1, 1]);
        let (header, large) = segment(OTHER, OWN, data);
        let header: [u8; 12] = [&header[..], &[0, 0]].concat().try_into().unwrap();
        card.tx
            .send(&mut card.device.queues[1], &header, &large)
            .unwrap();
        let (seen, bytes) = wire.receive(is_tcp);
        assert!(bytes == large);
        assert_eq!(seen[..2], [1, 1]);
        sent = Some((header, large));
    }
    // A header that makes no sense to the kernel costs the frame.
    let (mut wrong, large) = sent.unwrap();
    wrong[6] = 0xff;
    wrong[7] = 0xff;
    card.tx
        .send(&mut card.device.queues[1], &wrong, &large)
        .unwrap();

    // Without the offloads the kernel makes segments, and computes checksums.
    drop(card);
    let without = !(feature::GUEST_TSO4 | feature::GUEST_CSUM);
    let mut card = connect(&mut process, without, 2048);
    let (header, large) = segment(OWN, OTHER, 20_000);
    wire.send(header, &large);
    let mut data = 0;
    while data < 20_000 {
        let packet = ours(&mut card, is_tcp);
        assert!(packet.frame.len() <= 54 + 1000, "{}", packet.frame.len());
        assert_eq!(packet.header[..2], [0, 0]);
        data += packet.frame.len() - 54;
    }
    assert_eq!(data, 20_000);
    let sent = frame(OTHER, OWN, 77, 100);
    card.send(&sent);
    assert_eq!(wire.receive(|f| f[12..14] == [0x88, 0xb5]).1, sent);
}

#[test]
fn queue_pairs_are_attached_as_the_driver_uses_them() {
    if !in_namespace("queue_pairs_are_attached_as_the_driver_uses_them") {
        return;
    }
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
    let taps = (0..2).map(|_| open_tap("tap0", flags)).collect();
    let wire = Wire::new("tap0");
    let args = ["--tap-fd", "5", "--tap-fd", "6"];
    let mut process = Supervised::start(BINARY, &args, taps).unwrap();
    process.ready().unwrap();
    let options = Options {
        queues: 5,
        memory: 64 << 20,
        ..Options::default()
    };
    let mut device = process.device(&options).unwrap();
    let memory = device.memory.clone();
    let mut rx = [0, 1].map(|_| Receiver::new(&memory, 128, 128, 2048));
    let mut tx = [0, 1].map(|_| Sender::new(&memory, 128, 16, 2000));
    for (pair, rx) in rx.iter_mut().enumerate() {
        rx.refill(&mut device.queues[2 * pair]);
    }
    // With one pair in use everything comes there, whatever flow it belongs to; with two, some
    // comes at each.
    let mut number = 0;
    for pairs in [1u8, 2, 1] {
        let ack = command(&memory, &mut device.queues[4], &[4, 0, pairs, 0]).unwrap();
        assert_eq!(ack, 0);
        let mut seen = [0, 0];
        for flow in 0..64u8 {
            let (_, mut bytes) = segment(OWN, OTHER, 100);
            bytes[29] = flow;
            bytes[34..36].copy_from_slice(&[flow, 7]);
            wire.send([0; 10], &bytes);
            let end = Instant::now() + LONG;
            let mut arrived = false;
            while !arrived {
                assert!(Instant::now() < end, "flow {flow} with {pairs} pairs");
                for pair in 0..2 {
                    let queue = &mut device.queues[2 * pair];
                    queue.wait(Duration::from_millis(1)).unwrap();
                    while let Some(packet) = rx[pair].take(queue).unwrap() {
                        if is_tcp(&packet.frame) && packet.frame[34..36] == [flow, 7] {
                            seen[pair] += 1;
                            arrived = true;
                        }
                    }
                    rx[pair].refill(queue);
                }
            }
        }
        match pairs {
            1 => assert_eq!(seen, [64, 0]),
            _ => assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}"),
        }
        for (pair, tx) in tx.iter_mut().enumerate().take(pairs.into()) {
            number += 1;
            let sent = frame(OTHER, OWN, number, 100);
            tx.send(&mut device.queues[2 * pair + 1], &PLAIN, &sent)
                .unwrap();
            assert_eq!(wire.receive(|f| f[12..14] == [0x88, 0xb5]).1, sent);
        }
    }
    // A front end that serves the control queue itself starts the queues that are used.
    drop(device);
    let socket = process.connect().unwrap();
    let options = Options {
        queues: 2,
        memory: 64 << 20,
        ..Options::default()
    };
    let mut device = anemone_driver::Device::connect(socket, &options).unwrap();
    let memory = device.memory.clone();
    let mut rx = Receiver::new(&memory, 128, 128, 2048);
    rx.refill(&mut device.queues[0]);
    for flow in 0..64u8 {
        let (_, mut bytes) = segment(OWN, OTHER, 100);
        bytes[34..36].copy_from_slice(&[flow, 8]);
        wire.send([0; 10], &bytes);
        loop {
            let packet = rx.receive(&mut device.queues[0]).unwrap();
            if is_tcp(&packet.frame) && packet.frame[34..36] == [flow, 8] {
                break;
            }
        }
    }
}

#[test]
fn taps_that_cannot_be_used_are_refused() {
    if !in_namespace("taps_that_cannot_be_used_are_refused") {
        return;
    }
    for (name, flags, part) in [
        ("tun0", 1 | IFF_NO_PI | IFF_VNET_HDR, "IFF_TAP"),
        ("tap1", IFF_TAP | IFF_NO_PI, "IFF_VNET_HDR"),
    ] {
        let tap = open_tap(name, flags);
        let output = Command::new(BINARY)
            .args(["--tap-fd", "0", "--socket", "/nowhere/s"])
            .stdin(tap)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2));
        assert!(errors.contains(part), "{name}: {errors}");
    }
}
