//! Guests and programs of the host that do not keep the rules.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anemone_driver::vsock::{HOST_CID, Packet, STREAM, op, queue, shutdown};
use anemone_driver::{Buffer, Descriptor, flags};
use common::{CID, MOMENT, PATIENCE, Setup, start};

/// A packet that names no connection.
fn stray(op: u16) -> Packet {
    Packet {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 7,
        dst_port: 8,
        kind: STREAM,
        op,
        ..Packet::default()
    }
}

/// The device still does its work.
fn still_serves(setup: &mut Setup) {
    let (number, mut client) = setup.host_stream(80);
    client.write_all(b"alive?").unwrap();
    assert_eq!(setup.read_exact(number, 6), b"alive?");
    setup.write_all(number, b"yes");
    let mut text = [0; 3];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"yes");
    setup
        .guest
        .shut_down(number, shutdown::RCV | shutdown::SEND)
        .unwrap();
    setup.wait_reset(number);
}

#[test]
fn packets_without_a_connection_are_refused_once_each() {
    let mut setup = start();
    for op in [
        0,
        op::RESPONSE,
        op::SHUTDOWN,
        op::RW,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        8,
        0xffff,
    ] {
        setup.guest.send(&stray(op)).unwrap();
        let answer = setup.guest.receive(PATIENCE).unwrap().unwrap();
        assert_eq!(
            (answer.op, answer.src_port, answer.dst_port, answer.len),
            (op::RST, 8, 7, 0),
            "operation {op}"
        );
    }
    // A refusal is not answered, nor a packet that is not this guest's or not for the host.
    for packet in [
        stray(op::RST),
        Packet {
            src_cid: CID + 1,
            ..stray(op::REQUEST)
        },
        Packet {
            dst_cid: 1,
            ..stray(op::REQUEST)
        },
    ] {
        setup.guest.send(&packet).unwrap();
        assert_eq!(setup.guest.receive(MOMENT / 4).unwrap(), None);
    }
    // Another type of socket is refused in its own type.
    setup
        .guest
        .send(&Packet {
            kind: 9,
            ..stray(op::REQUEST)
        })
        .unwrap();
    let answer = setup.guest.receive(PATIENCE).unwrap().unwrap();
    assert_eq!((answer.op, answer.kind), (op::RST, 9));
    still_serves(&mut setup);
}

#[test]
fn what_does_not_fit_the_state_of_a_connection_ends_it() {
    let mut setup = start();
    let listener = setup.listen(5000);
    type Change = fn(&mut Packet);
    let cases: [(&str, Change); 6] = [
        ("a second request", |p| p.op = op::REQUEST),
        ("a response nobody waits for", |p| p.op = op::RESPONSE),
        ("an unknown operation", |p| p.op = 77),
        ("more data than the packet has", |p| {
            (p.op, p.len, p.data) = (op::RW, 100, vec![1; 99]);
        }),
        ("a length of 4 GiB", |p| {
            (p.op, p.len, p.data) = (op::RW, u32::MAX, vec![1; 10]);
        }),
        ("the operation 0", |p| p.op = 0),
    ];
    for (what, change) in cases {
        let (number, mut server) = setup.guest_stream(&listener, 5000);
        let mut packet = setup.guest.packet(number, op::CREDIT_UPDATE);
        change(&mut packet);
        setup.guest.send(&packet).unwrap();
        setup.wait_reset(number);
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "{what}");
    }
    // Data after the end of data.
    let (number, _server) = setup.guest_stream(&listener, 5000);
    setup.guest.shut_down(number, shutdown::SEND).unwrap();
    let mut packet = setup.guest.packet(number, op::RW);
    (packet.len, packet.data) = (1, vec![1]);
    setup.guest.send(&packet).unwrap();
    setup.wait_reset(number);
    still_serves(&mut setup);
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let mut setup = start();
    let listener = setup.listen(5000);
    let (number, _server) = setup.guest_stream(&listener, 5000);
    for _ in 0..64 {
        let mut packet = setup.guest.packet(number, op::RW);
        (packet.len, packet.data) = (65_536, vec![1; 65_536]);
        setup.guest.send(&packet).unwrap();
        setup.guest.poll(Duration::ZERO).unwrap();
        if setup.guest.streams[number].reset {
            break;
        }
    }
    setup.wait_reset(number);
    still_serves(&mut setup);
}

#[test]
fn a_guest_that_takes_no_packets_gets_no_more_work_done() {
    let mut setup = start();
    // No refusal can be delivered: the receive ring is empty after the first ones.
    let queue = &mut setup.guest.device.queues[queue::TX];
    let header = setup.guest.device.memory.alloc(64, 16);
    setup
        .guest
        .device
        .memory
        .write(header, &stray(op::RW).header());
    let part = Buffer {
        addr: header,
        len: 44,
    };
    let deadline = Instant::now() + PATIENCE;
    let (mut sent, mut stuck) = (0, false);
    while !stuck && Instant::now() < deadline {
        while queue.add(&[part], &[]).is_some() {}
        queue.publish();
        queue.kick();
        stuck = !queue.wait(MOMENT).unwrap();
        while queue.take_used().is_some() {
            sent += 1;
        }
    }
    assert!(stuck, "{sent} packets were taken");
    assert!((2048..8192).contains(&sent), "{sent}");
    // Each of them gets its answer when there is room, and no more.
    let mut answers = 0;
    while setup.guest.receive(MOMENT).unwrap().is_some() {
        answers += 1;
        while setup.guest.device.queues[queue::TX].take_used().is_some() {
            sent += 1;
        }
    }
    while setup.guest.device.queues[queue::TX].take_used().is_some() {
        sent += 1;
    }
    assert_eq!(answers, sent);
    still_serves(&mut setup);
}

#[test]
fn buffers_that_are_none_are_returned() {
    let mut setup = start();
    // Packets without a whole header, out of memory, or where the device is to write.
    let short = setup.guest.device.memory.alloc(64, 16);
    let queue = &mut setup.guest.device.queues[queue::TX];
    for (addr, len, write) in [
        (short, 43, false),
        (1 << 40, 44, false),
        (u64::MAX - 3, 44, false),
        (short, 44, true),
    ] {
        let part = [Buffer { addr, len }];
        let (readable, writable): (&[_], &[_]) = match write {
            true => (&[], &part),
            false => (&part, &[]),
        };
        queue.add(readable, writable).unwrap();
        queue.publish();
        queue.force_kick();
        assert!(queue.wait(PATIENCE).unwrap());
        assert_eq!(queue.take_used().unwrap().len, 0);
    }
    // Receive buffers without room come back empty, too, and the next one is used.
    let mut setup = start();
    let memory = setup.guest.device.memory.clone();
    let small = memory.alloc(64, 16);
    let queue = &mut setup.guest.device.queues[queue::RX];
    for part in [(small, 43), (1 << 41, 5000)] {
        let part = Buffer {
            addr: part.0,
            len: part.1,
        };
        queue.add(&[], &[part]).unwrap();
    }
    queue.publish();
    still_serves(&mut setup);
}

#[test]
fn packets_in_broken_chains_are_none() {
    let mut setup = start();
    // A whole packet, which would have an answer.
    let header = stray(op::RW).header();
    let memory = setup.guest.device.memory.clone();
    let addr = memory.alloc(header.len() as u64, 16);
    memory.write(addr, &header);
    let part = |flags, next| Descriptor {
        addr,
        len: header.len() as u32,
        flags,
        next,
    };
    // The last descriptor leads back to the first, to none, or is to be read after a writable one.
    for second in [part(flags::NEXT, 0), part(flags::NEXT, 9000), part(0, 0)] {
        let astray = if second.flags == 0 { flags::WRITE } else { 0 };
        let queue = &mut setup.guest.device.queues[queue::TX];
        queue.write_descriptor(0, &part(flags::NEXT, 1));
        queue.write_descriptor(1, &part(flags::NEXT | astray, 2));
        queue.write_descriptor(2, &second);
        queue.offer_raw(0);
        assert!(queue.wait(PATIENCE).unwrap());
        assert_eq!(queue.take_used().unwrap().len, 0);
        let answer = setup.guest.receive(MOMENT).unwrap();
        assert!(answer.is_none(), "{answer:?}");
    }
    still_serves(&mut setup);
}

#[test]
fn a_broken_ring_is_given_up() {
    let mut setup = start();
    let queue = &mut setup.guest.device.queues[queue::TX];
    queue.write_descriptor(
        0,
        &Descriptor {
            addr: 0,
            len: 44,
            flags: flags::NEXT,
            next: 0,
        },
    );
    queue.set_available_index(queue.available_index().wrapping_add(10_000));
    queue.force_kick();
    assert!(queue.wait_error(PATIENCE).unwrap());
    assert!(setup.process.is_running());
}

#[test]
fn clients_that_do_not_follow_the_convention_are_cut_off() {
    let mut setup = start();
    for line in [
        &b"GET / HTTP/1.1\n"[..],
        b"CONNECT \n",
        b"CONNECT 4294967296\n",
        b"CONNECT 1 2\n",
        b"\n",
        &[b'x'; 4096],
        &[0; 100],
        b"CONNECT 00000000000000000000000000000000000000000000000000000001\n",
    ] {
        let mut client = setup.client();
        client.write_all(line).unwrap();
        let mut rest = Vec::new();
        // Bytes that were never read make it a reset instead of an end.
        let ended = client.read_to_end(&mut rest);
        assert!(rest.is_empty(), "{ended:?}: {line:?}");
    }
    // Silent ones are cut off when there are too many.
    let mut silent: Vec<_> = (0..80).map(|_| setup.client()).collect();
    still_serves(&mut setup);
    let mut byte = [0];
    assert_eq!(silent[0].read(&mut byte).unwrap(), 0);
    let mut last = silent.pop().unwrap();
    last.set_read_timeout(Some(MOMENT / 4)).unwrap();
    assert!(last.read(&mut byte).is_err(), "the last one waits");
}

/// Bytes that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }

    fn pick(&mut self, values: &[u32]) -> u32 {
        values[self.roll(values.len() as u64) as usize]
    }
}

#[test]
fn random_packets_do_no_harm() {
    const ROUNDS: usize = 20_000;
    let mut setup = start();
    let _listeners: Vec<_> = (0..4).map(|port| setup.listen(port)).collect();
    let mut dice = Dice(0x5eed);
    let mut clients = Vec::new();
    for round in 0..ROUNDS {
        let length = dice.pick(&[0, 0, 1, 44, 4000, 65_536]) as usize;
        let packet = Packet {
            src_cid: if dice.roll(50) == 0 { dice.0 } else { CID },
            dst_cid: if dice.roll(50) == 0 { dice.0 } else { HOST_CID },
            src_port: dice.roll(6) as u32,
            // Some of those that the device gives away are among them.
            dst_port: dice.roll(6) as u32 + if dice.roll(2) == 0 { 1 << 30 } else { 0 },
            len: dice.pick(&[0, length as u32, length as u32, 1, 70_000, u32::MAX]),
            kind: if dice.roll(30) == 0 {
                dice.0 as u16
            } else {
                STREAM
            },
            op: if dice.roll(30) == 0 {
                dice.0 as u16
            } else {
                dice.roll(8) as u16
            },
            flags: dice.roll(5) as u32,
            buf_alloc: dice.pick(&[0, 1, 4096, 65_536, u32::MAX]),
            fwd_cnt: dice.pick(&[0, 1, 5000, 1 << 31, u32::MAX]),
            data: vec![round as u8; length],
        };
        setup.guest.send(&packet).unwrap();
        if round % 64 == 0 {
            let mut client = setup.client();
            client
                .write_all(format!("CONNECT {}\nhello", dice.roll(6)).as_bytes())
                .unwrap();
            clients.push(client);
            if clients.len() > 30 {
                clients.remove(dice.roll(30) as usize);
            }
        }
        // A guest that reads from time to time only.
        if dice.roll(20) == 0 {
            while setup.guest.receive(Duration::ZERO).unwrap().is_some() {}
        }
    }
    while setup.guest.receive(MOMENT).unwrap().is_some() {}
    assert!(setup.process.is_running());
    drop(clients);
    // What is left of it is forgotten with the front end.
    let Setup {
        mut process,
        guest,
        folder,
    } = setup;
    drop(guest);
    let device = process.device(&common::options()).unwrap();
    let guest = anemone_driver::vsock::Guest::new(device, CID);
    still_serves(&mut Setup {
        process,
        guest,
        folder,
    });
}
