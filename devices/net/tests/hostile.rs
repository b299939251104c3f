//! Guests that put nonsense into the rings, and peers that send it. The process goes on; at most a
//! queue is given up until it is set up again, or the connection to the peer.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anemone_driver::net::command;
use anemone_driver::{Buffer, Descriptor, Options, Supervised, features, flags};
use anemone_ipc::keeper::{FromKeeper, ToKeeper};
use anemone_ipc::{Channel, FdIndex};
use common::{BINARY, Card, LONG, OTHER, OWN, PacketPeer, Random, StreamPeer, frame};
use std::os::fd::AsFd;

const RX: usize = 0;
const TX: usize = 1;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

/// Frames still pass.
fn check(process: &mut Supervised, peer: &mut StreamPeer) {
    let mut card = Card::over(process.connect().unwrap(), !0, 2048);
    let sent = frame(OTHER, OWN, 1, 200);
    card.send(&sent);
    assert_eq!(peer.receive(), sent);
    peer.send(&sent);
    assert_eq!(card.receive().frame, sent);
}

#[test]
fn malformed_chains_come_back_unused() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let next = flags::NEXT;
    let write = flags::WRITE;
    let table_of = |d: &anemone_driver::Device| d.memory.alloc(8192, 4096);
    for mask in [!0, !features::EVENT_IDX] {
        let options = Options {
            queues: 2,
            features: mask,
            memory: 64 << 20,
            ..Options::default()
        };
        let mut device =
            anemone_driver::Device::connect(process.connect().unwrap(), &options).unwrap();
        let at = table_of(&device);
        let end = device.memory.size();
        let sent: &[&[Descriptor]] = &[
            &[desc(at, 100, next, 0)],
            &[desc(at, 100, next, 200)],
            &[desc(end - 10, 100, 0, 0)],
            &[desc(u64::MAX - 10, 100, 0, 0)],
            &[desc(at, 100, write, 0)],
            &[desc(at, 12, next, 1), desc(at, 100, write, 0)],
            &[desc(at, 0, 0, 0)],
            &[desc(at, 12, 0, 0)],
            &[desc(at, 25, 0, 0)],
            &[desc(at, 12 + 70_000, 0, 0)],
            &[desc(at, u32::MAX, next, 1), desc(at, u32::MAX, 0, 0)],
            &[desc(0, 1 << 24, next, 1), desc(0, 1 << 24, 0, 0)],
            &[desc(at, 16, flags::INDIRECT, 0)],
            &[desc(at, 17, flags::INDIRECT, 0)],
            &[desc(1 << 40, 16, flags::INDIRECT, 0)],
        ];
        for table in sent {
            let queue = &mut device.queues[TX];
            for (index, descriptor) in table.iter().enumerate() {
                queue.write_descriptor(index as u16, descriptor);
            }
            queue.offer_raw(0);
            assert!(queue.wait(LONG).unwrap(), "{table:?} is not returned");
            let used = queue.take_used().unwrap();
            assert_eq!((used.head, used.len), (0, 0), "{table:?}");
        }
        let received: &[&[Descriptor]] = &[
            &[desc(at, 2048, 0, 0)],
            &[desc(at, 12, 0, 0)],
            &[desc(at, 2048, next | write, 1), desc(at, 100, 0, 0)],
            &[desc(at, 25, write, 0)],
            &[desc(at, 0, write, 0)],
            &[desc(end, 2048, write, 0)],
            &[desc(at, 2048, next | write, 0)],
        ];
        for table in received {
            let queue = &mut device.queues[RX];
            for (index, descriptor) in table.iter().enumerate() {
                queue.write_descriptor(index as u16, descriptor);
            }
            queue.offer_raw(0);
            peer.send(&frame(OWN, OTHER, 1, 60));
            assert!(queue.wait(LONG).unwrap(), "{table:?} is not returned");
            let used = queue.take_used().unwrap();
            assert_eq!((used.head, used.len), (0, 0), "{table:?}");
        }
        // The frame that waited for a buffer gets the first good one.
        let queue = &mut device.queues[RX];
        let head = queue
            .add(
                &[],
                &[Buffer {
                    addr: at,
                    len: 2048,
                }],
            )
            .unwrap();
        queue.publish();
        queue.force_kick();
        assert!(queue.wait(LONG).unwrap());
        assert_eq!(queue.take_used().unwrap().head, u32::from(head));
        drop(device);
        // What the peer has sent meanwhile is not for the next driver to see.
        let mut card = Card::over(process.connect().unwrap(), !0, 2048);
        while card.receive_within(Duration::from_millis(50)).is_some() {}
        drop(card);
        check(&mut process, &mut peer);
    }
    assert!(process.child().try_wait().unwrap().is_none());
}

#[test]
fn buffers_that_are_too_small_cost_only_the_frame() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let mask = !anemone_driver::net::feature::MRG_RXBUF;
    let mut card = Card::connect(&mut process, mask, 200);
    peer.send(&frame(OWN, OTHER, 1, 1000));
    peer.send(&frame(OWN, OTHER, 2, 188));
    assert_eq!(card.receive().frame, frame(OWN, OTHER, 2, 188));
    let (mut process, peer) = PacketPeer::start(&[]);
    let mut card = Card::connect(&mut process, mask, 200);
    peer.0.send(&frame(OWN, OTHER, 1, 1000)).unwrap();
    peer.0.send(&frame(OWN, OTHER, 2, 188)).unwrap();
    assert_eq!(card.receive().frame, frame(OWN, OTHER, 2, 188));
    // Empty packets and such without a whole header.
    for length in [1, 13] {
        peer.0.send(&vec![0; length]).unwrap();
    }
    peer.0.send(&frame(OWN, OTHER, 3, 100)).unwrap();
    let frames: Vec<_> = (0..3).map(|_| card.receive().frame.len()).collect();
    assert_eq!(frames, [1, 13, 100]);
}

#[test]
fn headers_that_ask_for_too_much_cost_only_the_frame() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let mut card = Card::connect(&mut process, !0, 2048);
    let sent = frame(OTHER, OWN, 1, 100);
    for gso in [1, 2, 3, 4, 5, 0x80, 0xff] {
        let header = [1, gso, 54, 0, 0xff, 0xff, 34, 0, 16, 0, 0xff, 0xff];
        card.tx
            .send(&mut card.device.queues[TX], &header, &sent)
            .unwrap();
    }
    let last = frame(OTHER, OWN, 2, 100);
    card.tx
        .send(
            &mut card.device.queues[TX],
            &[0xff, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9],
            &last,
        )
        .unwrap();
    assert_eq!(peer.receive(), last);
}

#[test]
fn broken_rings_are_reported_and_work_again() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    for queue in [RX, TX] {
        let mut card = Card::over(process.connect().unwrap(), !0, 2048);
        card.device.queues[queue].set_available_index(0x4000);
        card.device.queues[queue].force_kick();
        peer.send(&frame(OWN, OTHER, 1, 100));
        assert!(card.device.queues[queue].wait_error(LONG).unwrap());
        drop(card);
        let mut card = Card::over(process.connect().unwrap(), !0, 2048);
        while card.receive_within(Duration::from_millis(50)).is_some() {}
        drop(card);
        check(&mut process, &mut peer);
    }
}

/// Random descriptors in all entries of both rings, over and over.
#[test]
fn rings_of_nonsense_hurt_nobody_else() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let mut random = Random(0x1234_5678_9abc);
    for round in 0..60u32 {
        let mask = match round % 3 {
            0 => !0,
            1 => !features::EVENT_IDX,
            _ => !features::INDIRECT_DESC,
        };
        let options = Options {
            queues: 2,
            queue_size: 64,
            features: mask,
            memory: 1 << 20,
            ..Options::default()
        };
        let socket = process.connect().unwrap();
        let mut device = anemone_driver::Device::connect(socket, &options).unwrap();
        for _ in 0..8 {
            for queue in &mut device.queues {
                for index in 0..64 {
                    let addr = match random.below(4) {
                        0 => random.below(1 << 20),
                        1 => (1 << 20) - random.below(100),
                        2 => random.below(u64::MAX),
                        _ => 4096 * random.below(256),
                    };
                    let len = [0, 1, 12, 16, 64, 2048, 70_000, u32::MAX][random.below(8) as usize];
                    let descriptor =
                        desc(addr, len, random.below(8) as u16, random.below(66) as u16);
                    queue.write_descriptor(index, &descriptor);
                    queue.set_available(index, random.below(70) as u16);
                }
                let ahead = random.below(80) as u16;
                queue.set_available_index(queue.available_index().wrapping_add(ahead));
                queue.force_kick();
            }
            peer.0.set_nonblocking(true).unwrap();
            let sent = frame(OWN, OTHER, round, 60);
            let _ = peer
                .0
                .write_all(&[&60u32.to_be_bytes()[..], &sent].concat());
            peer.0.set_nonblocking(false).unwrap();
        }
        device.frontend.features().unwrap();
        for queue in [0, 1] {
            device.stop_queue(queue).unwrap();
        }
        assert!(
            process.child().try_wait().unwrap().is_none(),
            "round {round}"
        );
    }
    // Frames of all rounds, whole, and nothing between them.
    let mut card = Card::over(process.connect().unwrap(), !0, 2048);
    while card.receive_within(Duration::from_millis(50)).is_some() {}
    let sent = frame(OTHER, OWN, 1, 200);
    card.send(&sent);
    while peer.receive() != sent {}
    peer.send(&sent);
    assert_eq!(card.receive().frame, sent);
}

#[test]
fn commands_of_nonsense_are_refused() {
    let args = ["--mac", "02:00:00:00:00:01", "--mac-filter"];
    let (mut process, _peer) = StreamPeer::start(&args);
    let options = Options {
        queues: 3,
        ..Options::default()
    };
    let mut device = process.device(&options).unwrap();
    let memory = device.memory.clone();
    let mut random = Random(99);
    for _ in 0..200 {
        let mut bytes: Vec<u8> = (0..1 + random.below(40))
            .map(|_| random.below(256) as u8)
            .collect();
        bytes[0] = 2 + random.below(200) as u8;
        if bytes[0] == 4 {
            bytes[0] = 200;
        }
        assert_eq!(
            command(&memory, &mut device.queues[2], &bytes).unwrap(),
            1,
            "{bytes:?}"
        );
    }
    // No acknowledgement to write, nothing to read, far too much to read.
    let queue = &mut device.queues[2];
    let start = memory.alloc(65536, 64);
    for (readable, writable) in [
        (
            vec![Buffer {
                addr: start,
                len: 4,
            }],
            vec![],
        ),
        (
            vec![],
            vec![Buffer {
                addr: start,
                len: 1,
            }],
        ),
        (
            vec![Buffer {
                addr: start,
                len: 65536,
            }],
            vec![Buffer {
                addr: start,
                len: 1,
            }],
        ),
        (
            vec![Buffer {
                addr: 1 << 50,
                len: 4,
            }],
            vec![Buffer {
                addr: 1 << 50,
                len: 1,
            }],
        ),
    ] {
        queue.add(&readable, &writable).unwrap();
        queue.publish();
        queue.kick();
        assert!(queue.wait(LONG).unwrap());
        assert!(queue.take_used().unwrap().len <= 1);
    }
}

/// A keeper of passt that the test plays, and the process that asks it.
struct Keeper(Channel);

impl Keeper {
    fn start(args: &[&str]) -> (Supervised, Self) {
        let (ours, theirs) = anemone_ipc::pair().unwrap();
        let all = [&["--keeper-fd", "5"][..], args].concat();
        let process = Supervised::start(BINARY, &all, vec![theirs.into_fd()]).unwrap();
        process.ready().unwrap();
        (process, Self(ours))
    }

    /// Waits for a question.
    fn asked(&self) {
        let ToKeeper::Connect = self.0.recv::<ToKeeper>().unwrap().message;
    }

    /// Answers the next question with a connection.
    fn connect(&self) -> StreamPeer {
        self.asked();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(LONG)).unwrap();
        let answer = FromKeeper::Connected { socket: FdIndex(0) };
        self.0.send(&answer, &[theirs.as_fd()]).unwrap();
        StreamPeer(ours)
    }
}

#[test]
fn a_peer_that_makes_no_sense_is_replaced() {
    let (mut process, keeper) = Keeper::start(&[]);
    let mut peer = keeper.connect();
    let mut card = Card::connect(&mut process, !0, 2048);
    for bytes in [
        &[0u8, 0, 0, 0][..],
        &[0, 0, 0, 13],
        &[0, 1, 0, 0],
        &[0xff; 100],
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        // Ends in the middle of a length, of a frame.
        &[0, 0],
        &[0, 0, 0, 60, 1, 2, 3],
        &[],
    ] {
        peer.0.write_all(bytes).unwrap();
        if bytes.len() < 4 || bytes == [0, 0, 0, 60, 1, 2, 3] {
            drop(peer);
        }
        peer = keeper.connect();
        let sent = frame(OTHER, OWN, 5, 300);
        peer.send(&sent);
        assert_eq!(card.receive().frame, sent, "{bytes:?}");
        // Frames that were sent while there was nobody are lost.
        loop {
            card.send(&sent);
            peer.0
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            let mut first = [0; 4];
            if std::io::Read::read_exact(&mut peer.0, &mut first).is_ok() {
                assert_eq!(first, 300u32.to_be_bytes());
                break;
            }
        }
        let mut rest = vec![0; 300];
        peer.0.set_read_timeout(Some(LONG)).unwrap();
        std::io::Read::read_exact(&mut peer.0, &mut rest).unwrap();
        assert_eq!(rest, sent);
    }
}

/// While there is no connection the guest's frames are taken, and its link goes down after a while.
#[test]
fn the_link_goes_down_without_a_peer_and_comes_back() {
    let (mut process, keeper) = Keeper::start(&[]);
    let mut card = Card::connect(&mut process, !0, 2048);
    let status = |card: &mut Card| card.device.frontend.config(6, 2).unwrap()[0];
    assert_eq!(status(&mut card), 1);
    let refuse = || {
        keeper.asked();
        let message = "not now".to_owned();
        keeper
            .0
            .send(&FromKeeper::Unavailable { message }, &[])
            .unwrap();
    };
    while status(&mut card) == 1 {
        refuse();
        card.send(&frame(OTHER, OWN, 1, 100));
    }
    let mut peer = keeper.connect();
    let sent = frame(OTHER, OWN, 2, 100);
    peer.send(&sent);
    assert_eq!(card.receive().frame, sent);
    assert_eq!(status(&mut card), 1);
    // A message that was not asked for, and the keeper's end: the process and its connection stay.
    keeper
        .0
        .send(&FromKeeper::Connected { socket: FdIndex(7) }, &[])
        .unwrap();
    drop(keeper);
    peer.send(&sent);
    assert_eq!(card.receive().frame, sent);
    card.send(&sent);
    while peer.receive() != sent {}
}
