//! Streams in both directions, in good faith.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::thread;

use anemone_driver::vsock::{Guest, op, shutdown};
use common::{MOMENT, pattern, start};

#[test]
fn the_guest_connects_to_the_host() {
    let mut setup = start();
    let listener = setup.listen(1234);
    let (number, mut server) = setup.guest_stream(&listener, 1234);
    setup.write_all(number, b"question");
    let mut text = [0; 8];
    server.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"question");
    server.write_all(b"answer").unwrap();
    assert_eq!(setup.read_exact(number, 6), b"answer");
}

#[test]
fn the_host_connects_to_the_guest() {
    let mut setup = start();
    let (number, mut client) = setup.host_stream(80);
    setup.write_all(number, b"welcome");
    let mut text = [0; 7];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"welcome");
    client.write_all(b"thanks").unwrap();
    assert_eq!(setup.read_exact(number, 6), b"thanks");
}

#[test]
fn what_follows_the_line_at_once_belongs_to_the_stream() {
    let mut setup = start();
    let mut client = setup.client();
    client.write_all(b"CONN").unwrap();
    thread::sleep(MOMENT / 4);
    client.write_all(b"ECT 7\nfirst bytes").unwrap();
    setup.guest.listening.insert(7);
    let came = setup.guest.poll_until(|guest| !guest.accepted.is_empty());
    assert!(came.unwrap());
    let number = setup.guest.accepted.pop_front().unwrap();
    assert_eq!(setup.read_exact(number, 11), b"first bytes");
    assert!(common::read_line(&mut client).starts_with("OK "));
}

#[test]
fn nobody_listening_is_a_refusal_in_both_directions() {
    let mut setup = start();
    let number = setup.guest.connect(99).unwrap();
    setup.wait_reset(number);
    // A socket file that nobody listens at any more.
    drop(setup.listen(98));
    let number = setup.guest.connect(98).unwrap();
    setup.wait_reset(number);
    let mut client = setup.client();
    client.write_all(b"CONNECT 5\n").unwrap();
    let mut rest = Vec::new();
    let reader = thread::spawn(move || client.read_to_end(&mut rest).map(|_| rest));
    let ended = setup.guest.poll_until(|_| reader.is_finished());
    assert!(ended.unwrap(), "the client still waits");
    assert!(reader.join().unwrap().unwrap_or_default().is_empty());
}

/// Sends `length` bytes each way at once and compares them.
fn exchange(setup: &mut common::Setup, listener: &UnixListener, port: u32, length: usize) {
    let (number, mut server) = setup.guest_stream(listener, port);
    let (to_guest, to_host) = (pattern(1, length), pattern(2, length));
    let mut writer = server.try_clone().unwrap();
    let sent = to_guest.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let reading = thread::spawn(move || {
        let mut bytes = Vec::new();
        server.read_to_end(&mut bytes).unwrap();
        bytes
    });
    let (mut got, mut rest, mut told) = (Vec::new(), &to_host[..], false);
    let done = setup.guest.poll_until(|guest| {
        got.extend(guest.read(number).unwrap());
        loop {
            let written = guest.write(number, rest).unwrap();
            if written == 0 {
                break;
            }
            rest = &rest[written..];
        }
        if rest.is_empty() && !told {
            guest.shut_down(number, shutdown::SEND).unwrap();
            told = true;
        }
        guest.streams[number].shut & shutdown::SEND != 0 && told && got.len() >= length
    });
    assert!(
        done.unwrap(),
        "{} bytes came, {} left",
        got.len(),
        rest.len()
    );
    assert!(got == to_guest, "the guest got other bytes");
    assert!(
        reading.join().unwrap() == to_host,
        "the host got other bytes"
    );
    writing.join().unwrap();
    setup
        .guest
        .shut_down(number, shutdown::SEND | shutdown::RCV)
        .unwrap();
    setup.wait_reset(number);
}

#[test]
fn megabytes_flow_both_ways_and_each_half_closes() {
    let mut setup = start();
    let listener = setup.listen(5000);
    exchange(&mut setup, &listener, 5000, 8 << 20);
}

#[test]
fn a_small_buffer_of_a_later_connection_is_enough() {
    let mut setup = start();
    let listener = setup.listen(5000);
    let many: Vec<_> = (0..70)
        .map(|_| setup.guest_stream(&listener, 5000))
        .collect();
    exchange(&mut setup, &listener, 5000, 1 << 20);
    for (index, (number, mut server)) in many.into_iter().enumerate() {
        setup.write_all(number, &[index as u8]);
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], index as u8);
    }
}

#[test]
fn a_peer_that_does_not_read_holds_nobody_up() {
    let mut setup = start();
    let listener = setup.listen(5000);
    // Fill all that will take bytes, towards several hosts that do not read.
    let mut deaf: Vec<_> = (0..8)
        .map(|_| {
            let (number, server) = setup.guest_stream(&listener, 5000);
            (number, server, 0)
        })
        .collect();
    for (number, _, sent) in &mut deaf {
        let data = pattern(*number as u64, 4 << 20);
        loop {
            let written = setup.guest.write(*number, &data[*sent..]).unwrap();
            *sent += written;
            let stuck = written == 0 && !setup.guest.poll(MOMENT / 4).unwrap();
            if stuck && setup.guest.is_quiet() && setup.guest.streams[*number].credit() == 0 {
                break;
            }
        }
        assert!(*sent >= 256 << 10, "only {sent} bytes of credit");
    }
    // The other way round: the guest does not read.
    let (mute, mut flood) = setup.guest_stream(&listener, 5000);
    flood.set_nonblocking(true).unwrap();
    while flood.write(&[7; 65536]).is_ok() {}
    exchange(&mut setup, &listener, 5000, 2 << 20);
    assert!(!setup.guest.streams[mute].reset);
    // And nothing of it was lost.
    for (number, mut server, sent) in deaf {
        let expected = pattern(number as u64, 4 << 20);
        let mut got = vec![0; sent];
        server.read_exact(&mut got).unwrap();
        assert!(got == expected[..sent], "stream {number}");
    }
}

#[test]
fn a_closed_socket_of_the_host_is_a_shutdown_after_its_last_bytes() {
    let mut setup = start();
    let (number, mut client) = setup.host_stream(80);
    let data = pattern(3, 100_000);
    client.write_all(&data).unwrap();
    drop(client);
    assert_eq!(setup.read_exact(number, data.len()), data);
    setup.wait_shut(number, shutdown::SEND | shutdown::RCV);
    assert!(!setup.guest.streams[number].reset);
    let packet = setup.guest.packet(number, op::RST);
    setup.guest.send(&packet).unwrap();
}

#[test]
fn what_the_guest_wrote_before_it_closed_arrives() {
    let mut setup = start();
    let (number, mut client) = setup.host_stream(80);
    let data = pattern(4, 600_000);
    let mut sent = 0;
    // More than the socket takes: a part waits in the device.
    loop {
        let written = setup.guest.write(number, &data[sent..]).unwrap();
        sent += written;
        if written == 0 && !setup.guest.poll(MOMENT / 4).unwrap() {
            break;
        }
    }
    setup
        .guest
        .shut_down(number, shutdown::SEND | shutdown::RCV)
        .unwrap();
    // The guest does not wait for the answer.
    let packet = setup.guest.packet(number, op::RST);
    setup.guest.send(&packet).unwrap();
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert!(got == data[..sent], "{} of {sent} bytes", got.len());
}

#[test]
fn a_guest_that_stops_receiving_ends_the_writing_of_the_host() {
    let mut setup = start();
    let (number, mut client) = setup.host_stream(80);
    setup.guest.shut_down(number, shutdown::RCV).unwrap();
    let refused = setup.guest.poll_until(|_| client.write_all(b"?").is_err());
    assert!(refused.unwrap(), "the host can still write");
    setup.write_all(number, b"but this still comes");
    let mut text = [0; 20];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"but this still comes");
}

#[test]
fn connections_end_with_the_front_end_and_the_next_one_starts_afresh() {
    let mut setup = start();
    let (_, mut client) = setup.host_stream(80);
    let common::Setup {
        mut process,
        guest,
        folder,
    } = setup;
    drop(guest);
    let mut rest = Vec::new();
    client.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    let device = process.device(&common::options()).unwrap();
    let mut setup = common::Setup {
        guest: Guest::new(device, common::CID),
        process,
        folder,
    };
    let (number, mut client) = setup.host_stream(80);
    client.write_all(b"again").unwrap();
    assert_eq!(setup.read_exact(number, 5), b"again");
}

#[test]
fn two_thousand_connections_at_once_and_no_more() {
    let mut setup = start();
    let listener = setup.listen(5000);
    let mut open = Vec::new();
    for _ in 0..2048 {
        open.push(setup.guest_stream(&listener, 5000));
    }
    let number = setup.guest.connect(5000).unwrap();
    setup.wait_reset(number);
    for (index, (number, server)) in open.iter_mut().enumerate().step_by(97) {
        setup.write_all(*number, &[index as u8]);
        let mut byte = [0];
        server.read_exact(&mut byte).unwrap();
        assert_eq!(byte[0], index as u8);
    }
    // One that the host has left makes room.
    drop(open.swap_remove(5));
    let (number, _) = open.swap_remove(5);
    setup
        .guest
        .shut_down(number, shutdown::SEND | shutdown::RCV)
        .unwrap();
    setup.wait_reset(number);
    let (number, mut server) = setup.guest_stream(&listener, 5000);
    setup.write_all(number, b"x");
    server.read_exact(&mut [0]).unwrap();
}
