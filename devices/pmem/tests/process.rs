//! The real process, driven over its socket by a guest in good faith and by one that is not.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::process::Command;

use anemone_driver::pmem::{FLUSH, Finished, NONE, Requests};
use anemone_driver::{Buffer, Descriptor, Device, Options, Process, Supervised, features, flags};
use common::{BINARY, Backing, LONG, Stopped};

fn check(device: &mut Device) {
    let memory = device.memory.clone();
    let queue = &mut device.queues[0];
    for indirect in [true, false] {
        let mut requests = Requests::new(&memory, queue.size(), indirect);
        for _ in 0..3 {
            let finished = requests.flush(&memory, queue).unwrap();
            assert_eq!((finished.result, finished.written), (0, 4));
        }
    }
}

#[test]
fn an_acknowledged_flush_leaves_nothing_unwritten() {
    let backing = Backing::new();
    let mut process = backing.serve(&[]);
    for mask in [!0, !features::EVENT_IDX, !features::INDIRECT_DESC] {
        let options = Options {
            features: mask,
            ..Options::default()
        };
        let mut device = process.device(&options).unwrap();
        check(&mut device);
        let memory = device.memory.clone();
        let queue = &mut device.queues[0];
        let mut requests = Requests::new(&memory, queue.size(), true);
        for round in 0..20 {
            backing.dirty(round);
            assert_ne!(backing.unwritten(), 0);
            assert_eq!(requests.flush(&memory, queue).unwrap().result, 0);
            assert_eq!(backing.unwritten(), 0, "round {round}");
        }
    }
    assert_eq!(process.terminate().unwrap().code(), Some(0));
}

#[test]
fn what_nobody_can_write_needs_no_flush() {
    let backing = Backing::new();
    let mut process = backing.serve(&["--readonly"]);
    check(&mut process.device(&Options::default()).unwrap());
}

#[test]
fn every_division_into_descriptors_is_served() {
    let backing = Backing::new();
    let mut process = backing.serve(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    let memory = device.memory.clone();
    let base = memory.alloc(64, 64);
    let piece = |at: u64, len: u32| Buffer {
        addr: base + at,
        len,
    };
    let queue = &mut device.queues[0];
    let whole = vec![piece(0, 4)];
    let split = vec![piece(0, 1), piece(1, 0), piece(1, 2), piece(3, 9)];
    let answer = vec![piece(32, 4)];
    let answers = vec![piece(32, 3), piece(35, 0), piece(35, 8)];
    for (request, result) in [
        (&whole, &answer),
        (&split, &answer),
        (&whole, &answers),
        (&split, &answers),
    ] {
        for indirect in [false, true] {
            memory.write(base, &FLUSH.to_le_bytes());
            memory.write(base + 32, &[0xAA; 16]);
            match indirect {
                false => queue.add(request, result),
                true => queue.add_indirect(request, result),
            };
            queue.publish();
            queue.kick();
            assert!(queue.wait(LONG).unwrap());
            assert_eq!(queue.take_used().unwrap().len, 4);
            assert_eq!(memory.read_vec(base + 32, 5), [0, 0, 0, 0, 0xAA]);
        }
    }
}

#[test]
fn requests_that_make_no_sense_fail() {
    let backing = Backing::new();
    let mut process = backing.serve(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    let memory = device.memory.clone();
    let base = memory.alloc(64, 64);
    let piece = |at: u64, len: u32| Buffer {
        addr: base + at,
        len,
    };
    let queue = &mut device.queues[0];
    // Another type; less than a type; nothing to read; no room for all of the result; none at all.
    type Case<'a> = (u32, &'a [Buffer], &'a [Buffer], u32);
    let cases: &[Case<'_>] = &[
        (1, &[piece(0, 4)], &[piece(32, 4)], 4),
        (FLUSH, &[piece(0, 3)], &[piece(32, 4)], 4),
        (FLUSH, &[], &[piece(32, 4)], 4),
        (1, &[piece(0, 4)], &[piece(32, 2)], 2),
        (1, &[piece(0, 4)], &[], 0),
        (FLUSH, &[piece(0, 4)], &[], 0),
    ];
    for (kind, request, result, written) in cases {
        memory.write(base, &kind.to_le_bytes());
        memory.write(base + 32, &NONE.to_le_bytes());
        queue.add(request, result).unwrap();
        queue.publish();
        queue.kick();
        assert!(queue.wait(LONG).unwrap(), "{request:?} {result:?}");
        assert_eq!(queue.take_used().unwrap().len, *written);
        let mut bytes = NONE.to_le_bytes();
        bytes[..*written as usize].fill(0xFF);
        assert_eq!(memory.read_vec(base + 32, 4), bytes);
    }
    check(&mut device);
}

#[test]
fn storage_that_does_not_answer_stops_nothing_but_flushes() {
    let backing = Backing::new();
    let mut process = backing.serve(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    check(&mut device);
    let memory = device.memory.clone();
    let mut requests = Requests::new(&memory, device.queues[0].size(), true);
    let pid = process.child().id();
    let thread = match Stopped::new(pid, "flush") {
        Ok(thread) => Some(thread),
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            println!("only root can hold the storage up: the flushes run meanwhile");
            None
        }
    };
    for _ in 0..device.queues[0].size() {
        requests
            .submit(&memory, &mut device.queues[0], FLUSH)
            .unwrap();
    }
    device.queues[0].publish();
    device.queues[0].kick();
    // The process serves its front end meanwhile.
    for _ in 0..100 {
        device.frontend.features().unwrap();
    }
    let mut finished: Vec<Finished> = Vec::new();
    let first = requests.finish(&memory, &mut device.queues[0]).unwrap();
    assert!(first.is_none() || thread.is_none());
    finished.extend(first);
    drop(thread);
    while finished.len() < usize::from(device.queues[0].size()) {
        assert!(device.queues[0].wait(LONG).unwrap());
        finished.extend(requests.finish(&memory, &mut device.queues[0]).unwrap());
    }
    assert!(finished.iter().all(|f| (f.result, f.written) == (0, 4)));
}

#[test]
fn a_queue_that_is_stopped_has_answered_what_it_took() {
    let backing = Backing::new();
    let mut process = backing.serve(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    let memory = device.memory.clone();
    let mut requests = Requests::new(&memory, device.queues[0].size(), true);
    let mut base = 0;
    for round in 1..=50u16 {
        backing.dirty(round.into());
        for _ in 0..20 {
            requests
                .submit(&memory, &mut device.queues[0], FLUSH)
                .unwrap();
        }
        device.queues[0].publish();
        device.queues[0].force_kick();
        base = device.stop_queue(0).unwrap();
        while let Some(finished) = requests.finish(&memory, &mut device.queues[0]).unwrap() {
            assert_eq!(finished.result, 0);
        }
        assert_eq!(device.queues[0].used_index(), base);
        device.start_queue(0, base).unwrap();
        // The rest is not lost.
        while device.queues[0].used_index() != device.queues[0].available_index() {
            assert!(device.queues[0].wait(LONG).unwrap());
            requests.finish(&memory, &mut device.queues[0]).unwrap();
        }
        while requests
            .finish(&memory, &mut device.queues[0])
            .unwrap()
            .is_some()
        {}
    }
    assert!(base > 0, "no request was ever taken before the stop");
}

/// What a hostile driver puts into its ring.
type Attack = (&'static str, fn(&mut Device));

const ATTACKS: &[Attack] = &[
    ("a chain that is its own next", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 8, flags::NEXT, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a next out of range", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 2, flags::NEXT, 0xffff));
        d.queues[0].offer_raw(0);
    }),
    ("a request past the end of memory", |d| {
        let end = d.memory.size();
        d.queues[0].write_descriptor(0, &desc(end - 2, 4, 0, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a result past the end of memory", |d| {
        let end = d.memory.size();
        d.queues[0].write_descriptor(0, &desc(0x3000, 4, flags::NEXT, 1));
        d.queues[0].write_descriptor(1, &desc(end - 2, 4, flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a result that wraps around", |d| {
        d.queues[0].write_descriptor(0, &desc(0x3000, 4, flags::NEXT, 1));
        d.queues[0].write_descriptor(1, &desc(u64::MAX - 1, 4, flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("buffers of all lengths", |d| {
        d.queues[0].write_descriptor(0, &desc(0, u32::MAX, flags::NEXT, 1));
        d.queues[0].write_descriptor(1, &desc(0, u32::MAX, flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a head out of range", |d| d.queues[0].offer_raw(0xffff)),
    ("an available index far ahead", |d| {
        d.queues[0].set_available_index(0x8000);
        d.queues[0].force_kick();
    }),
    ("an available index behind, with flushes running", |d| {
        let base = d.memory.alloc(8, 8);
        let (request, result) = (
            Buffer { addr: base, len: 4 },
            Buffer {
                addr: base + 4,
                len: 4,
            },
        );
        d.queues[0].add(&[request], &[result]).unwrap();
        d.queues[0].publish();
        d.queues[0].force_kick();
        d.queues[0].set_available_index(0xfff0);
        d.queues[0].force_kick();
    }),
    ("an indirect table that contains itself", |d| {
        let table = d.memory.alloc(16, 16);
        let mut bytes = table.to_le_bytes().to_vec();
        bytes.extend([16, 0, 0, 0, flags::INDIRECT as u8, 0, 0, 0]);
        d.memory.write(table, &bytes);
        d.queues[0].write_descriptor(0, &desc(table, 16, flags::INDIRECT, 0));
        d.queues[0].offer_raw(0);
    }),
    ("one request in all entries", |d| {
        let base = d.memory.alloc(8, 8);
        d.queues[0].write_descriptor(0, &desc(base, 4, flags::NEXT, 1));
        d.queues[0].write_descriptor(1, &desc(base + 4, 4, flags::WRITE, 0));
        for _ in 0..d.queues[0].size() {
            d.queues[0].offer_raw(0);
        }
    }),
    ("a ring that never ends", |d| {
        let base = d.memory.alloc(8, 8);
        d.queues[0].write_descriptor(0, &desc(base, 4, flags::NEXT, 1));
        d.queues[0].write_descriptor(1, &desc(base + 4, 4, flags::WRITE, 0));
        for _ in 0..20_000 {
            d.queues[0].offer_raw(0);
        }
    }),
];

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

#[test]
fn hostile_rings_hurt_nobody_else() {
    let backing = Backing::new();
    let mut process = backing.serve(&[]);
    for mask in [!0, !features::EVENT_IDX] {
        let options = Options {
            features: mask,
            ..Options::default()
        };
        for (name, attack) in ATTACKS {
            let mut device = process.device(&options).unwrap();
            attack(&mut device);
            // The process still answers, and stops the queue when told.
            let answered = device.frontend.features();
            answered.unwrap_or_else(|e| panic!("{name}: {e}"));
            let stopped = device.stop_queue(0);
            stopped.unwrap_or_else(|e| panic!("{name}: {e}"));
            drop(device);
            assert!(process.is_running(), "{name}");
        }
    }
    check(&mut process.device(&Options::default()).unwrap());
}

#[test]
fn a_supervised_process_takes_the_file_as_a_descriptor() {
    let backing = Backing::new();
    let fd = backing.file().try_clone().unwrap().into();
    let mut process = Supervised::start(BINARY, &["--file-fd", "5"], vec![fd]).unwrap();
    process.ready().unwrap();
    check(&mut process.device(&Options::default()).unwrap());
    backing.dirty(7);
    let socket = process.connect().unwrap();
    check(&mut Device::connect(socket, &Options::default()).unwrap());
    assert_eq!(backing.unwritten(), 0);
    assert_eq!(process.close().unwrap().code(), Some(0));
}

#[test]
fn bad_arguments_end_with_status_2() {
    let backing = Backing::new();
    let path = backing.path();
    let path = path.to_str().unwrap();
    let folder = std::env::temp_dir();
    for (args, part) in [
        (&["--socket", "/nowhere/s"][..], "--file"),
        (
            &["--file", path, "--file-fd", "0", "--socket", "/s"],
            "one of --file",
        ),
        (&["--file", "/no/such", "--socket", "/s"], "/no/such"),
        (
            &[
                "--readonly",
                "--file",
                folder.to_str().unwrap(),
                "--socket",
                "/s",
            ],
            "regular file",
        ),
        (&["--file", path, "--socket", "/nowhere/socket"], "/nowhere"),
        (&["--nonsense"], "nonsense"),
    ] {
        let output = Command::new(BINARY).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(part), "{args:?}: {text}");
    }
    let output = Command::new(BINARY).arg("--help").output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("--file PATH"));
}

#[test]
fn a_file_has_one_writer() {
    let backing = Backing::new();
    let mut first = backing.serve(&[]);
    first.connect().unwrap();
    let path = backing.path();
    let mut second = Process::start(BINARY, &["--file", path.to_str().unwrap()]).unwrap();
    assert_eq!(second.wait().unwrap().code(), Some(2));
    assert!(first.is_running());
    drop(first);
    let mut readers = [
        backing.serve(&["--readonly"]),
        backing.serve(&["--readonly"]),
    ];
    for reader in &mut readers {
        reader.connect().unwrap();
    }
    assert!(readers.iter_mut().all(Process::is_running));
}
