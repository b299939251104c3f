//! The real process, driven over its socket by a guest in good faith and by one that is not, and
//! by front ends likewise. Much of this is the frame's work and holds for every device.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use anemone_driver::{
    Buffer, Descriptor, Device, Memory, Options, Process, Queue, Supervised, Used, features, flags,
};
use anemone_vhost_user::{Error, MemoryRegion, Request};

const BINARY: &str = env!("CARGO_BIN_EXE_anemone-rng");
const LONG: Duration = Duration::from_secs(20);

fn start(args: &[&str]) -> Process {
    Process::start(BINARY, args).unwrap()
}

/// Asks for `len` bytes and returns what the device says it wrote, and the memory.
fn ask(memory: &Memory, queue: &mut Queue, addr: u64, len: u32) -> (Used, Vec<u8>) {
    memory.write(addr, &vec![0; len as usize]);
    let head = queue.add(&[], &[Buffer { addr, len }]).unwrap();
    queue.publish();
    queue.kick();
    assert!(queue.wait(LONG).unwrap());
    let used = queue.take_used().unwrap();
    assert_eq!(used.head, u32::from(head));
    (used, memory.read_vec(addr, len as usize))
}

/// The device works: buffers of two requests are filled, differently, and nothing else is.
fn check(device: &mut Device) {
    let memory = device.memory.clone();
    let addr = memory.alloc(3 * 4096, 4096);
    let queue = &mut device.queues[0];
    let (used, first) = ask(&memory, queue, addr + 4096, 64);
    assert_eq!(used.len, 64);
    let (used, second) = ask(&memory, queue, addr + 4096, 64);
    assert_eq!(used.len, 64);
    assert_ne!(first, second);
    assert_ne!(second[32..], [0; 32]);
    assert_eq!(memory.read_vec(addr, 4096), vec![0; 4096]);
    assert_eq!(memory.read_vec(addr + 4096 + 64, 4032), vec![0; 4032]);
}

#[test]
fn buffers_are_filled() {
    let mut process = start(&[]);
    for mask in [!0, !features::EVENT_IDX, !features::INDIRECT_DESC] {
        let options = Options {
            features: mask,
            ..Options::default()
        };
        check(&mut process.device(&options).unwrap());
    }
    assert_eq!(process.terminate().unwrap().code(), Some(0));
}

#[test]
fn every_shape_of_chain_is_served() {
    let mut process = start(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    let memory = device.memory.clone();
    let base = memory.alloc(1 << 17, 4096);
    let buffer = |at: u64, len: u32| Buffer {
        addr: base + at,
        len,
    };
    let queue = &mut device.queues[0];
    let shapes = [
        vec![buffer(0, 1)],
        vec![buffer(0, 1), buffer(100, 257), buffer(1000, 3)],
        vec![buffer(7, 0), buffer(9, 5)],
        vec![buffer(0, 100_000)],
    ];
    for (i, shape) in shapes.iter().enumerate() {
        let wanted: u32 = shape.iter().map(|b| b.len).sum();
        for indirect in [false, true] {
            match indirect {
                false => queue.add(&[], shape),
                true => queue.add_indirect(&[], shape),
            };
            queue.publish();
            queue.kick();
            assert!(queue.wait(LONG).unwrap(), "shape {i}");
            assert_eq!(queue.take_used().unwrap().len, wanted.min(65536));
        }
    }
    // A full queue at once, several times round.
    let size = queue.size();
    for _ in 0..10 {
        for i in 0..size {
            queue.add(&[], &[buffer(u64::from(i) * 16, 16)]).unwrap();
        }
        queue.publish();
        queue.kick();
        for _ in 0..size {
            assert!(queue.wait(LONG).unwrap());
            assert_eq!(queue.take_used().unwrap().len, 16);
        }
    }
}

#[test]
fn a_queue_goes_on_after_it_was_stopped() {
    let mut process = start(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    check(&mut device);
    let base = device.stop_queue(0).unwrap();
    assert_eq!(base, 2);
    let memory = device.memory.clone();
    let addr = memory.alloc(64, 64);
    // Made available while it is stopped: nothing happens, and nothing is lost.
    let queue = &mut device.queues[0];
    queue.add(&[], &[Buffer { addr, len: 8 }]).unwrap();
    queue.publish();
    queue.kick();
    assert!(!queue.wait(Duration::from_millis(20)).unwrap());
    device.start_queue(0, base).unwrap();
    let queue = &mut device.queues[0];
    assert!(queue.wait(LONG).unwrap());
    assert_eq!(queue.take_used().unwrap().len, 8);
    // Another interrupt descriptor for a running queue.
    let (spare, _) = std::os::unix::net::UnixStream::pair().unwrap();
    device.frontend.set_vring_call(0, spare.as_fd()).unwrap();
    let queue = &device.queues[0];
    device.frontend.set_vring_call(0, queue.call_fd()).unwrap();
    check(&mut device);
    device.frontend.reset_device().unwrap();
}

#[test]
fn interrupts_come_when_they_are_wanted() {
    let mut process = start(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    let memory = device.memory.clone();
    let addr = memory.alloc(64, 64);
    let queue = &mut device.queues[0];
    // One when the ring starts: an earlier process may not have come to it.
    assert!(queue.take_interrupt());
    // Then none before the third.
    queue.set_used_event(2);
    for i in 1..=3 {
        queue.add(&[], &[Buffer { addr, len: 8 }]).unwrap();
        queue.publish();
        queue.kick();
        while queue.used_index() < i {
            std::thread::yield_now();
        }
        if i == 3 {
            assert!(queue.wait(LONG).unwrap());
            while !queue.take_interrupt() {
                std::thread::yield_now();
            }
        } else {
            assert!(!queue.take_interrupt());
        }
    }
}

/// What a hostile driver puts into its ring.
type Attack = (&'static str, fn(&mut Device));

const ATTACKS: &[Attack] = &[
    ("a chain that is its own next", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 8, flags::NEXT | flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a loop of two", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 8, flags::NEXT | flags::WRITE, 1));
        d.queues[0].write_descriptor(1, &desc(0x2000, 8, flags::NEXT | flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a next out of range", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 8, flags::NEXT | flags::WRITE, 0xffff));
        d.queues[0].offer_raw(0);
    }),
    ("a buffer past the end of memory", |d| {
        let end = d.memory.size();
        d.queues[0].write_descriptor(0, &desc(end - 4, 8, flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a buffer that wraps around", |d| {
        d.queues[0].write_descriptor(0, &desc(u64::MAX - 4, 64, flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a buffer of no length", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 0, flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a buffer of all lengths", |d| {
        d.queues[0].write_descriptor(0, &desc(0, u32::MAX, flags::NEXT | flags::WRITE, 1));
        d.queues[0].write_descriptor(1, &desc(0, u32::MAX, flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a buffer in the wrong direction", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 64, 0, 0));
        d.queues[0].offer_raw(0);
    }),
    ("unknown flags", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 64, 0xfff8 | flags::WRITE, 0));
        d.queues[0].offer_raw(0);
    }),
    ("a head out of range", |d| {
        d.queues[0].offer_raw(0xffff);
    }),
    ("an available index far ahead", |d| {
        d.queues[0].set_available_index(0x8000);
        d.queues[0].force_kick();
    }),
    ("an available index behind", |d| {
        d.queues[0].set_available_index(0xffff);
        d.queues[0].force_kick();
    }),
    ("an indirect table outside memory", |d| {
        d.queues[0].write_descriptor(0, &desc(1 << 40, 64, flags::INDIRECT, 0));
        d.queues[0].offer_raw(0);
    }),
    ("an indirect table of odd length", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 17, flags::INDIRECT, 0));
        d.queues[0].offer_raw(0);
    }),
    ("an empty indirect table", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 0, flags::INDIRECT, 0));
        d.queues[0].offer_raw(0);
    }),
    ("an indirect table of all lengths", |d| {
        d.queues[0].write_descriptor(0, &desc(0, 0xffff_fff0, flags::INDIRECT, 0));
        d.queues[0].offer_raw(0);
    }),
    ("an indirect table that contains itself", |d| {
        let table = d.memory.alloc(16, 16);
        let mut bytes = table.to_le_bytes().to_vec();
        bytes.extend([16, 0, 0, 0, flags::INDIRECT as u8, 0, 0, 0]);
        d.memory.write(table, &bytes);
        d.queues[0].write_descriptor(0, &desc(table, 16, flags::INDIRECT, 0));
        d.queues[0].offer_raw(0);
    }),
    ("one chain in all entries", |d| {
        d.queues[0].write_descriptor(0, &desc(0x1000, 8, flags::WRITE, 0));
        for _ in 0..d.queues[0].size() {
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
    let mut process = start(&[]);
    for mask in [!0, !features::EVENT_IDX] {
        let options = Options {
            features: mask,
            ..Options::default()
        };
        for (name, attack) in ATTACKS {
            let mut device = process.device(&options).unwrap();
            attack(&mut device);
            // The process still answers, and stops the queue when told.
            device
                .frontend
                .features()
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            device
                .stop_queue(0)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            drop(device);
            assert!(process.is_running(), "{name}");
        }
    }
    check(&mut process.device(&Options::default()).unwrap());
}

#[test]
fn a_broken_ring_is_reported_and_works_again_after_a_restart() {
    let mut process = start(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    device.queues[0].set_available_index(0x4000);
    device.queues[0].force_kick();
    assert!(device.queues[0].wait_error(LONG).unwrap());
    device.stop_queue(0).unwrap();
    device.queues[0].set_available_index(0);
    device.start_queue(0, 0).unwrap();
    check(&mut device);
}

#[test]
fn the_rate_bounds_what_is_given() {
    let mut process = start(&["--rate", "1000"]);
    let mut device = process.device(&Options::default()).unwrap();
    let memory = device.memory.clone();
    let addr = memory.alloc(8192, 64);
    let queue = &mut device.queues[0];
    let (used, _) = ask(&memory, queue, addr, 4096);
    // One second's worth at most, and what came in since the start.
    assert!((1..=1000).contains(&used.len), "{used:?}");
    // The bucket is empty: the next waits for the timer.
    let (used, _) = ask(&memory, queue, addr, 4096);
    assert!((1..=1000).contains(&used.len), "{used:?}");
    assert!(process.is_running());
}

#[test]
fn front_ends_that_make_no_sense_are_refused() {
    let mut process = start(&[]);
    let bytes: &[&[u8]] = &[
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 4096],
        &[1, 0, 0],
        &[5, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0],
    ];
    for junk in bytes {
        let mut socket = process.connect().unwrap();
        socket.write_all(junk).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        // It hangs up without an answer. (Unread bytes turn that into a reset.)
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
        assert_eq!(rest, b"");
    }
    let mut device = process.device(&Options::default()).unwrap();
    check(&mut device);
    let front = &mut device.frontend;
    let refused = |result: Result<(), Error>, request: Request| {
        assert!(
            matches!(result, Err(Error::Refused(r, _)) if r == request),
            "{request}: {result:?}"
        );
    };
    refused(front.set_vring_num(0, 100), Request::SetVringNum);
    refused(front.set_vring_num(1, 128), Request::SetVringNum);
    refused(front.set_vring_enable(7, true), Request::SetVringEnable);
    refused(front.set_features(1 << 60), Request::SetFeatures);
    refused(front.set_config(0, &[1]), Request::SetConfig);
    refused(
        front.set_protocol_features(1 << 63),
        Request::SetProtocolFeatures,
    );
    let file = std::fs::File::open("/dev/null").unwrap();
    let region = MemoryRegion {
        guest_addr: 0,
        size: 4096,
        user_addr: 0,
        fd: file.as_fd(),
        offset: 0,
    };
    refused(front.set_mem_table(&[region]), Request::SetMemTable);
    // After all that the queue still runs on the memory it had.
    check(&mut device);
    // A ring outside memory.
    device.stop_queue(0).unwrap();
    let mut addresses = device.queues[0].addresses();
    addresses.used = Memory::USER_BASE + device.memory.size() - 8;
    let front = &mut device.frontend;
    front.set_vring_addr(0, &addresses).unwrap();
    front.set_vring_kick(0, device.queues[0].kick_fd()).unwrap();
    refused(front.set_vring_enable(0, true), Request::SetVringEnable);
    addresses.used = Memory::USER_BASE - 4096;
    refused(front.set_vring_addr(0, &addresses), Request::SetVringAddr);
    addresses.used = Memory::USER_BASE + 2;
    refused(front.set_vring_addr(0, &addresses), Request::SetVringAddr);
    device.start_queue(0, 2).unwrap_err();
    drop(device);
    check(&mut process.device(&Options::default()).unwrap());
    assert!(process.is_running());
}

#[test]
fn a_kick_that_is_no_eventfd_does_not_spin() {
    let mut process = start(&[]);
    let mut device = process.device(&Options::default()).unwrap();
    let (pipe, other_end) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(other_end);
    device.frontend.set_vring_kick(0, pipe.as_fd()).unwrap();
    device.frontend.features().unwrap();
    let before = cpu_ticks(&mut process);
    std::thread::sleep(Duration::from_millis(300));
    let after = cpu_ticks(&mut process);
    // Spinning would take 30 ticks of 10 ms.
    assert!(after - before < 15, "{before} to {after} ticks");
    drop(device);
    check(&mut process.device(&Options::default()).unwrap());
}

fn cpu_ticks(process: &mut Process) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.child().id())).unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    // utime and stime, counted after the name.
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_supervised_process_lives_as_long_as_its_channel() {
    let mut process = Supervised::start(BINARY, &["--id", "rng0"], vec![]).unwrap();
    process.ready().unwrap();
    let mut device = process.device(&Options::default()).unwrap();
    check(&mut device);
    // A new connection takes the place of the first.
    let socket = process.connect().unwrap();
    let mut second = Device::connect(socket, &Options::default()).unwrap();
    check(&mut second);
    assert!(device.frontend.features().is_err());
    drop(second);
    let socket = process.connect().unwrap();
    check(&mut Device::connect(socket, &Options::default()).unwrap());
    assert_eq!(process.close().unwrap().code(), Some(0));
}

#[test]
fn bad_arguments_end_with_status_2() {
    for args in [
        &["--rate", "0", "--socket", "/nowhere/s"][..],
        &["--rate", "1"],
        &["--socket", "/nowhere/socket"],
        &["--nonsense"],
    ] {
        let output = Command::new(BINARY).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty());
    }
    let output = Command::new(BINARY).arg("--help").output().unwrap();
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("--rate BYTES"));
}

#[test]
fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
    let mut first = start(&[]);
    first.connect().unwrap();
    let path = first.socket();
    let path = path.to_str().unwrap();
    let second = Command::new(BINARY).args(["--socket", path]).output();
    assert_eq!(second.unwrap().status.code(), Some(2));
    first.child().kill().unwrap();
    first.wait().unwrap();
    let mut third = Command::new(BINARY)
        .args(["--socket", path])
        .spawn()
        .unwrap();
    let mut socket = first_connection(path);
    socket.write_all(&[0xff; 12]).unwrap();
    third.kill().unwrap();
    third.wait().unwrap();
}

fn first_connection(path: &str) -> std::os::unix::net::UnixStream {
    loop {
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(socket) => return socket,
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
