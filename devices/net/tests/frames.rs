//! Frames between a driver and a peer, in good faith.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::time::{Duration, Instant};

use anemone_driver::net::{command, feature};
use anemone_driver::{Buffer, Options, Supervised, features};
use common::{BINARY, Card, LONG, OTHER, OWN, PLAIN, PacketPeer, Random, StreamPeer, frame};

/// Feature sets: everything, no merged buffers, no event index.
const SETS: [u64; 3] = [!0, !feature::MRG_RXBUF, !features::EVENT_IDX];

#[test]
fn frames_pass_both_ways_over_a_stream() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    for set in SETS {
        let mut card = Card::connect(&mut process, set, 2048);
        for (number, length) in [14, 15, 60, 64, 1000, 1514, 2036].into_iter().enumerate() {
            let sent = frame(OTHER, OWN, number as u32, length);
            card.send(&sent);
            assert_eq!(peer.receive(), sent);
            peer.send(&sent);
            let packet = card.receive();
            assert_eq!(packet.frame, sent);
            assert_eq!(packet.header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        }
    }
    assert_eq!(process.close().unwrap().code(), Some(0));
}

#[test]
fn frames_pass_both_ways_over_packets() {
    let (mut process, peer) = PacketPeer::start(&["--mtu", "9000"]);
    for set in SETS {
        let mut card = Card::connect(&mut process, set, 10_000);
        for (number, length) in [14, 60, 1514, 9014].into_iter().enumerate() {
            let sent = frame(OTHER, OWN, number as u32, length);
            card.send(&sent);
            assert_eq!(peer.receive(), sent);
            peer.0.send(&sent).unwrap();
            assert_eq!(card.receive().frame, sent);
        }
    }
}

#[test]
fn long_frames_are_spread_over_buffers() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let mut card = Card::connect(&mut process, !0, 700);
    let (mut packets, packet_peer) = PacketPeer::start(&["--mtu", "9000"]);
    let mut packet_card = Card::connect(&mut packets, !0, 700);
    for (number, length) in [688, 689, 1388, 1389, 9000].into_iter().enumerate() {
        let sent = frame(OWN, OTHER, number as u32, length);
        let buffers = (length + 12).div_ceil(700);
        peer.send(&sent);
        packet_peer.0.send(&sent).unwrap();
        for card in [&mut card, &mut packet_card] {
            let packet = card.receive();
            assert_eq!((packet.frame, packet.buffers), (sent.clone(), buffers));
            assert_eq!(packet.header[10..], (buffers as u16).to_le_bytes());
        }
    }
    // The longest of all, from and to a stream.
    let sent = frame(OWN, OTHER, 9, 65535);
    peer.send(&sent);
    assert_eq!(card.receive().frame, sent);
    card.tx.add(&mut card.device.queues[1], &PLAIN, &sent);
    card.device.queues[1].publish();
    card.device.queues[1].kick();
    assert_eq!(peer.receive(), sent);
}

/// As long as segmentation offload makes them. Where each buffer takes a whole frame, the region has
/// room for half of the buffers.
#[test]
fn longest_frames_pass_with_a_bounce() {
    for (set, length) in [(!0, 4096), (!feature::MRG_RXBUF, 66_000)] {
        let (mut process, mut peer) = StreamPeer::start(&[]);
        let mut card = Card::bounced(&mut process, set, length);
        for number in 0..200 {
            let sent = frame(OWN, OTHER, number, 65535 - number as usize);
            peer.send(&sent);
            assert!(card.receive().frame == sent, "{number}");
            card.send(&sent);
            assert!(peer.receive() == sent, "{number}");
        }
        for queue in &card.device.queues {
            assert_eq!(queue.strays(), 0);
        }
    }
}

#[test]
fn a_frame_in_many_pieces_is_sent_whole() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let mut card = Card::connect(&mut process, !0, 2048);
    let memory = card.device.memory.clone();
    let sent = frame(OTHER, OWN, 1, 600);
    let bytes = [&PLAIN[..], &sent].concat();
    let start = memory.alloc(4096, 64);
    memory.write(start, &bytes);
    let mut random = Random(77);
    for round in 0..200 {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let left = (bytes.len() - at) as u64;
            let len = if pieces.len() == 39 {
                left
            } else {
                random.below(left.min(40) + 1)
            };
            pieces.push(Buffer {
                addr: start + at as u64,
                len: len as u32,
            });
            at += len as usize;
        }
        let queue = &mut card.device.queues[1];
        match round % 2 {
            0 => queue.add(&pieces, &[]).unwrap(),
            _ => queue.add_indirect(&pieces, &[]).unwrap(),
        };
        queue.publish();
        queue.kick();
        assert_eq!(peer.receive(), sent);
        assert!(queue.wait(LONG).unwrap());
        queue.take_used().unwrap();
    }
}

/// Sends more than the peer's socket holds, which reads slowly: partial writes, full sockets.
#[test]
fn nothing_is_lost_on_a_slow_stream() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let mut card = Card::connect(&mut process, !0, 2048);
    const FRAMES: u32 = 3000;
    let reader = std::thread::spawn(move || {
        for number in 0..FRAMES {
            let length = 14 + (number as usize * 37) % 9000;
            assert_eq!(
                peer.receive(),
                frame(OTHER, OWN, number, length),
                "{number}"
            );
            if number % 200 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        peer
    });
    let mut next = 0;
    while next < FRAMES || card.tx.in_flight() > 0 {
        let queue = &mut card.device.queues[1];
        while next < FRAMES {
            let sent = frame(OTHER, OWN, next, 14 + (next as usize * 37) % 9000);
            if !card.tx.add(queue, &PLAIN, &sent) {
                break;
            }
            next += 1;
        }
        queue.publish();
        queue.kick();
        assert!(queue.wait(LONG).unwrap());
        card.tx.reap(queue);
    }
    let mut peer = reader.join().unwrap();
    // The other direction, without buffers now and then.
    let writer = std::thread::spawn(move || {
        for number in 0..FRAMES {
            peer.send(&frame(
                OWN,
                OTHER,
                number,
                14 + (number as usize * 53) % 3000,
            ));
        }
        peer
    });
    for number in 0..FRAMES {
        let length = 14 + (number as usize * 53) % 3000;
        assert_eq!(
            card.receive().frame,
            frame(OWN, OTHER, number, length),
            "{number}"
        );
    }
    drop(writer.join().unwrap());
}

#[test]
fn queues_go_on_after_they_were_stopped() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let mut card = Card::connect(&mut process, !0, 2048);
    for round in 0..50 {
        // What the device had taken in advance is put back.
        let rx = card.device.stop_queue(0).unwrap();
        let tx = card.device.stop_queue(1).unwrap();
        assert_eq!(u32::from(tx), round);
        let sent = frame(OWN, OTHER, round, 100);
        peer.send(&sent);
        let queue = &mut card.device.queues[1];
        card.tx.reap(queue);
        card.tx.add(queue, &PLAIN, &sent);
        queue.publish();
        queue.kick();
        card.device.start_queue(0, rx).unwrap();
        card.device.start_queue(1, tx).unwrap();
        assert_eq!(card.receive().frame, sent);
        assert_eq!(peer.receive(), sent);
    }
}

/// QEMU enables the rings of a network card before it has told which features are in use.
#[test]
fn rings_can_be_enabled_before_features_are_set() {
    let (mut process, mut peer) = StreamPeer::start(&[]);
    let socket = process.connection.take().unwrap();
    let mut front = anemone_vhost_user::Frontend::new(socket, LONG);
    front.set_owner().unwrap();
    front.features().unwrap();
    let offered = front.protocol_features().unwrap();
    // But not before it has told the protocol's features: the connection ends.
    front.set_vring_enable(0, true).unwrap_err();
    drop(front);
    let mut front = anemone_vhost_user::Frontend::new(process.connect().unwrap(), LONG);
    front.set_owner().unwrap();
    front.features().unwrap();
    front.protocol_features().unwrap();
    front.set_protocol_features(offered & 0x9).unwrap();
    front.set_vring_enable(0, true).unwrap();
    front.set_vring_enable(1, true).unwrap();
    front.features().unwrap();
    drop(front);
    let mut card = Card::connect(&mut process, !0, 2048);
    let sent = frame(OTHER, OWN, 1, 100);
    card.send(&sent);
    assert_eq!(peer.receive(), sent);
}

#[test]
fn configuration_and_features() {
    let args = ["--mac", "02:00:00:00:00:01", "--mtu", "9000"];
    let (mut process, _peer) = StreamPeer::start(&args);
    let mut card = Card::connect(&mut process, !0, 2048);
    let config = card.device.frontend.config(0, 12).unwrap();
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x28, 0x23]);
    let here = feature::MAC | feature::MTU | feature::STATUS | feature::MRG_RXBUF;
    assert_eq!(card.device.features & here, here);
    // A stream has no offloads, and one pair without a filter needs no control queue.
    let absent = feature::CSUM | feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::HOST_TSO4;
    let absent = absent | feature::MQ | feature::CTRL_VQ;
    assert_eq!(card.device.features & absent, 0);
}

#[test]
fn several_queue_pairs_have_ports_of_their_own() {
    let pair = || std::os::unix::net::UnixDatagram::pair().unwrap();
    let ((a, a_far), (b, b_far)) = (pair(), pair());
    let args = ["--socket-fd", "5", "--socket-fd", "6"];
    let mut process = Supervised::start(BINARY, &args, vec![a_far.into(), b_far.into()]).unwrap();
    process.ready().unwrap();
    let options = Options {
        queues: 5,
        memory: 64 << 20,
        ..Options::default()
    };
    let mut device = process.device(&options).unwrap();
    assert_ne!(device.features & feature::MQ, 0);
    assert_eq!(device.frontend.config(8, 2).unwrap(), [2, 0]);
    let memory = device.memory.clone();
    for (count, ack) in [(1u16, 0), (2, 0), (0, 1), (3, 1), (2, 0)] {
        let [low, high] = count.to_le_bytes();
        let answer = command(&memory, &mut device.queues[4], &[4, 0, low, high]).unwrap();
        assert_eq!(answer, ack, "{count} pairs");
    }
    // Commands that were not offered.
    for bytes in [&[0, 0, 1][..], &[9, 9], &[]] {
        if !bytes.is_empty() {
            assert_eq!(command(&memory, &mut device.queues[4], bytes).unwrap(), 1);
        }
    }
    for (pair, peer) in [a, b].iter().enumerate() {
        let mut tx = anemone_driver::net::Sender::new(&memory, 128, 4, 2000);
        let mut rx = anemone_driver::net::Receiver::new(&memory, 128, 8, 2048);
        rx.refill(&mut device.queues[2 * pair]);
        let sent = frame(OTHER, OWN, pair as u32, 500);
        tx.send(&mut device.queues[2 * pair + 1], &PLAIN, &sent)
            .unwrap();
        let mut got = [0; 1000];
        assert_eq!(peer.recv(&mut got).unwrap(), 500);
        assert_eq!(got[..500], sent);
        peer.send(&sent).unwrap();
        assert_eq!(
            rx.receive(&mut device.queues[2 * pair]).unwrap().frame,
            sent
        );
    }
}

#[test]
fn the_filter_lets_pass_what_is_for_the_guest() {
    let args = ["--mac", "02:00:00:00:00:01", "--mac-filter"];
    let broadcast = [0xff; 6];
    let group = [1, 0, 0x5e, 0, 0, 1];
    let (mut stream, mut stream_peer) = StreamPeer::start(&args);
    let (mut packets, packet_peer) = PacketPeer::start(&args);
    for over_stream in [true, false] {
        let process = if over_stream {
            &mut stream
        } else {
            &mut packets
        };
        let socket = process.connection.take().unwrap();
        let options = Options {
            queues: 3,
            memory: 64 << 20,
            ..Options::default()
        };
        let mut device = anemone_driver::Device::connect(socket, &options).unwrap();
        assert_ne!(device.features & feature::CTRL_RX, 0);
        let memory = device.memory.clone();
        let mut rx = anemone_driver::net::Receiver::new(&memory, 128, 64, 2048);
        let mut tx = anemone_driver::net::Sender::new(&memory, 128, 64, 2000);
        rx.refill(&mut device.queues[0]);
        let mut peer_sends = |bytes: &[u8]| match over_stream {
            true => stream_peer.send(bytes),
            false => drop(packet_peer.0.send(bytes).unwrap()),
        };
        let mut number = 0;
        let mut receives = |device: &mut anemone_driver::Device,
                            rx: &mut anemone_driver::net::Receiver,
                            expected: &[([u8; 6], bool)]| {
            for (to, passes) in expected {
                // One that passes in any case shows that the one before it did not.
                number += 1;
                let sent = frame(*to, OTHER, number, 80);
                peer_sends(&sent);
                let last = frame(OWN, OTHER, 1_000_000 + number, 80);
                peer_sends(&last);
                let mut packet = rx.receive(&mut device.queues[0]).unwrap();
                if *passes {
                    assert_eq!(packet.frame, sent);
                    packet = rx.receive(&mut device.queues[0]).unwrap();
                }
                assert_eq!(packet.frame, last, "{to:x?}");
            }
        };
        let all = [
            (OWN, true),
            (OTHER, false),
            (broadcast, true),
            (group, true),
        ];
        receives(&mut device, &mut rx, &all);
        // The driver listens to no group, then to this one, then to all.
        let tell = |device: &mut anemone_driver::Device, bytes: &[u8]| {
            assert_eq!(command(&memory, &mut device.queues[2], bytes).unwrap(), 0);
        };
        tell(&mut device, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        receives(
            &mut device,
            &mut rx,
            &[(OTHER, false), (broadcast, true), (group, false)],
        );
        tell(
            &mut device,
            &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1],
        );
        receives(
            &mut device,
            &mut rx,
            &[(group, true), ([1, 0, 0x5e, 0, 0, 2], false)],
        );
        tell(&mut device, &[0, 1, 1]);
        receives(
            &mut device,
            &mut rx,
            &[([1, 0, 0x5e, 0, 0, 2], true), (OTHER, false)],
        );

        for (from, passes) in [(OTHER, false), (broadcast, false), (OWN, true)] {
            let sent = frame(OTHER, from, 7, 90);
            tx.send(&mut device.queues[1], &PLAIN, &sent).unwrap();
            if passes {
                let got = if over_stream {
                    stream_peer.receive()
                } else {
                    packet_peer.receive()
                };
                assert_eq!(got, sent, "the frames before it have passed");
            }
        }
    }
}

/// So many bytes in so short a time are more than the rate, whatever the machine does meanwhile:
/// only the lower bound of the time is certain, and only that is looked at.
#[test]
fn rates_hold_back_what_comes_too_fast() {
    const RATE: usize = 100_000;
    let rate = RATE.to_string();
    let args = [
        "--tx-rate",
        &rate,
        "--tx-burst",
        "20000",
        "--rx-rate",
        &rate,
        "--rx-burst",
        "20000",
    ];
    let (mut process, mut peer) = StreamPeer::start(&args);
    let mut card = Card::connect(&mut process, !0, 2048);
    const FRAMES: u32 = 60;
    let least =
        Duration::from_secs_f64((FRAMES as usize * 1000 - 20_000 - 2000) as f64 / RATE as f64);
    let start = Instant::now();
    for number in 0..FRAMES {
        card.send(&frame(OTHER, OWN, number, 1000));
        assert_eq!(peer.receive().len(), 1000);
    }
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
    let start = Instant::now();
    for number in 0..FRAMES {
        peer.send(&frame(OWN, OTHER, number, 1000));
        assert_eq!(card.receive().frame, frame(OWN, OTHER, number, 1000));
    }
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
}

#[test]
fn bad_arguments_end_with_status_2() {
    for args in [
        &[][..],
        &["--stream", "/nowhere/socket"],
        &["--stream-fd", "77"],
        &["--stream", "/x", "--keeper-fd", "0"],
        &["--tap-fd", "0"],
        &["--socket-fd", "0", "--mac", "01:00:00:00:00:00"],
        &["--socket-fd", "0", "--mtu", "67"],
        &["--socket-fd", "0", "--mac-filter"],
        &["--socket-fd", "0", "--rx-burst", "1000"],
        &["--socket-fd", "0", "--tx-rate", "0"],
    ] {
        let output = std::process::Command::new(BINARY)
            .args(args)
            .args(["--socket", "/nowhere/s"])
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty());
    }
}
