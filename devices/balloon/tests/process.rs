//! The real process, driven over its socket by a guest in good faith and by one that is not.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::process::Command;
use std::time::Duration;

use anemone_driver::balloon::{PAGE, feature, fill, present, send_pages, sizes, take};
use anemone_driver::{
    Buffer, Descriptor, Device, Memory, Options, Process, Queue, Supervised, features, flags,
};
use anemone_ipc::device::{Balloon, FromDevice, ToDevice};

const BINARY: &str = env!("CARGO_BIN_EXE_anemone-balloon");
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;
/// From here on no ring lies in guest memory.
const FREE: u64 = 8 << 20;

fn options(queues: u16) -> Options {
    Options {
        queues,
        ..Options::default()
    }
}

fn start(args: &[&str]) -> Process {
    Process::start(BINARY, args).unwrap()
}

fn numbers(start: u64, count: u64) -> Vec<u32> {
    (start / PAGE..start / PAGE + count)
        .map(|n| n as u32)
        .collect()
}

/// The device works: a page that is inflated goes, and comes back as zeroes.
fn check(device: &mut Device) {
    let memory = device.memory.clone();
    let list = memory.alloc(64, 64);
    fill(&memory, FREE);
    let before = present(&memory, FREE).unwrap();
    for queue in [INFLATE, DEFLATE] {
        let pages = numbers(FREE, 1);
        send_pages(&memory, &mut device.queues[queue], list, &pages).unwrap();
        assert_eq!(present(&memory, FREE).unwrap(), before - PAGE);
    }
    assert_eq!(memory.read_vec(FREE, 8), [0; 8]);
    assert_eq!(memory.read_vec(FREE + PAGE, 8), [0xB7; 8]);
}

#[test]
fn inflated_memory_goes_back_to_the_host() {
    let mut process = start(&["--target", "4194304"]);
    for mask in [!0, !features::EVENT_IDX, !features::INDIRECT_DESC] {
        let options = Options {
            features: mask,
            ..options(3)
        };
        let mut device = process.device(&options).unwrap();
        assert_eq!(sizes(&mut device).unwrap().0, 1024);
        check(&mut device);
        let memory = device.memory.clone();
        let list = memory.alloc(4096, 64);
        fill(&memory, FREE);
        let before = present(&memory, FREE).unwrap();
        // As Linux does: 256 pages at a time, here in an order of their own.
        for round in 0..4 {
            let mut pages = numbers(FREE + round * 256 * PAGE, 256);
            pages.sort_unstable_by_key(|n| n.wrapping_mul(0x9E37_79B9));
            send_pages(&memory, &mut device.queues[INFLATE], list, &pages).unwrap();
        }
        assert_eq!(present(&memory, FREE).unwrap(), before - (4 << 20));
        assert_eq!(memory.read_vec(FREE + (4 << 20), 4), [0xB7; 4]);
        device
            .frontend
            .set_config(4, &1024u32.to_le_bytes())
            .unwrap();
        assert_eq!(sizes(&mut device).unwrap(), (1024, 1024));
        // The target is not the driver's.
        device.frontend.set_config(0, &[0xFF; 8]).unwrap();
        assert_eq!(sizes(&mut device).unwrap(), (1024, u32::MAX));
    }
    assert_eq!(process.terminate().unwrap().code(), Some(0));
}

#[test]
fn reported_memory_goes_back_to_the_host() {
    let mut process = start(&["--reporting", "--deflate-on-oom"]);
    for stats in [true, false] {
        let options = Options {
            features: if stats { !0 } else { !feature::STATS_VQ },
            ..options(if stats { 4 } else { 3 })
        };
        let mut device = process.device(&options).unwrap();
        assert_ne!(device.features & feature::REPORTING, 0);
        assert_ne!(device.features & feature::DEFLATE_ON_OOM, 0);
        let memory = device.memory.clone();
        fill(&memory, FREE);
        let before = present(&memory, FREE).unwrap();
        let buffer = |at: u64, len: u64| Buffer {
            addr: FREE + at * PAGE,
            len: (len * PAGE) as u32,
        };
        let queue = &mut device.queues[if stats { REPORTING } else { STATS }];
        // What the device only reads is not reported.
        let buffers = [buffer(0, 512), buffer(1024, 1)];
        queue.add_indirect(&[buffer(512, 1)], &buffers).unwrap();
        queue.publish();
        queue.kick();
        take(queue).unwrap();
        assert_eq!(present(&memory, FREE).unwrap(), before - 513 * PAGE);
        assert_eq!(memory.read_vec(FREE, 4), [0; 4]);
        assert_eq!(memory.read_vec(FREE + 512 * PAGE, 4), [0xB7; 4]);
    }
}

#[test]
fn features_are_offered_as_asked_for() {
    let offered = |args: &[&str]| {
        let mut process = start(args);
        let mut device = process.device(&options(2)).unwrap();
        let all = feature::STATS_VQ | feature::DEFLATE_ON_OOM | feature::REPORTING;
        device.frontend.features().unwrap() & all
    };
    assert_eq!(offered(&[]), feature::STATS_VQ);
    assert_eq!(
        offered(&["--deflate-on-oom"]),
        feature::STATS_VQ | feature::DEFLATE_ON_OOM
    );
    assert_eq!(
        offered(&["--reporting"]),
        feature::STATS_VQ | feature::REPORTING
    );
}

/// Puts statistics into the buffer and makes it available.
fn tell(memory: &Memory, queue: &mut Queue, addr: u64, statistics: &[(u16, u64)]) {
    let mut bytes = Vec::new();
    for (tag, value) in statistics {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    memory.write(addr, &bytes);
    let len = bytes.len() as u32;
    queue.add(&[Buffer { addr, len }], &[]).unwrap();
    queue.publish();
    queue.kick();
}

fn state(process: &Supervised) -> Balloon {
    match process.control.recv::<FromDevice>().unwrap().message {
        FromDevice::Balloon(state) => state,
        other => panic!("{other:?}"),
    }
}

fn ask(process: &Supervised, target: Option<u64>) {
    let message = ToDevice::Balloon { target };
    process.control.send(&message, &[]).unwrap();
}

#[test]
fn the_supervisor_sets_the_size_and_hears_the_statistics() {
    let mut process = Supervised::start(BINARY, &["--target", "8192"], vec![]).unwrap();
    process.ready().unwrap();
    // Nobody to ask yet.
    ask(&process, None);
    let none = Balloon {
        target: 8192,
        ..Balloon::default()
    };
    assert_eq!(state(&process), none);
    let mut device = process.device(&options(3)).unwrap();
    let memory = device.memory.clone();
    let addr = memory.alloc(512, 64);
    let queue = &mut device.queues[STATS];
    // The first statistics come of the driver's own accord, and the device keeps the buffer.
    tell(&memory, queue, addr, &[(4, 1000), (5, 2000)]);
    assert!(!queue.wait(Duration::from_millis(50)).unwrap());
    ask(&process, Some(16 * PAGE));
    take(queue).unwrap();
    tell(&memory, queue, addr, &[(4, 900), (77, 3), (5, 2000)]);
    let message = process.control.recv::<FromDevice>().unwrap().message;
    assert!(matches!(message, FromDevice::Keep { key: 0, .. }));
    let told = Balloon {
        target: 16 * PAGE,
        actual: 0,
        statistics: vec![(4, 900), (5, 2000)],
    };
    assert_eq!(state(&process), told);
    assert_eq!(sizes(&mut device).unwrap(), (16, 0));
    // A target past the largest is the largest.
    ask(&process, Some(u64::MAX));
    take(&mut device.queues[STATS]).unwrap();
    device.frontend.set_config(4, &5u32.to_le_bytes()).unwrap();
    drop(device);
    let last = state(&process);
    assert_eq!(last.target, u64::from(u32::MAX) * PAGE);
    assert_eq!(last.actual, 0, "there is no guest any more");
    assert_eq!(process.close().unwrap().code(), Some(0));
}

#[test]
fn statistics_are_asked_for_regularly() {
    let mut process = Supervised::start(BINARY, &["--stats-interval", "1"], vec![]).unwrap();
    process.ready().unwrap();
    let mut device = process.device(&options(3)).unwrap();
    let memory = device.memory.clone();
    let addr = memory.alloc(512, 64);
    for round in 0..3 {
        let queue = &mut device.queues[STATS];
        tell(&memory, queue, addr, &[(4, round)]);
        take(queue).unwrap();
    }
    tell(&memory, &mut device.queues[STATS], addr, &[(4, 3)]);
    // A question that comes before the buffer is answered at once, with what is known.
    while state(&process).statistics != [(4, 3)] {}
}

#[test]
fn the_statistics_buffer_is_not_lost_when_the_queue_stops() {
    let mut process = Supervised::start(BINARY, &[], vec![]).unwrap();
    process.ready().unwrap();
    let mut device = process.device(&options(3)).unwrap();
    let memory = device.memory.clone();
    let addr = memory.alloc(512, 64);
    tell(&memory, &mut device.queues[STATS], addr, &[(4, 0)]);
    for round in 1..5 {
        let base = device.stop_queue(2).unwrap();
        device.start_queue(2, base).unwrap();
        // The device gives the buffer back when it has it; before that it answers with what it knows.
        loop {
            ask(&process, None);
            if device.queues[STATS]
                .wait(Duration::from_millis(20))
                .unwrap()
            {
                break;
            }
            state(&process);
        }
        take(&mut device.queues[STATS]).unwrap();
        tell(&memory, &mut device.queues[STATS], addr, &[(4, round)]);
        assert_eq!(state(&process).statistics, [(4, round)]);
    }
}

/// What a hostile driver puts into its rings.
type Attack = (&'static str, fn(&mut Device));

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

const ATTACKS: &[Attack] = &[
    ("pages outside memory, and one page many times", |d| {
        let list = d.memory.alloc(4096, 64);
        let end = (d.memory.size() / PAGE) as u32;
        let mut pages = vec![end, end + 1, u32::MAX, u32::MAX - 1, 1 << 20];
        pages.extend([(FREE / PAGE) as u32; 500]);
        let memory = d.memory.clone();
        fill(&memory, FREE);
        let before = present(&memory, FREE).unwrap();
        send_pages(&memory, &mut d.queues[INFLATE], list, &pages).unwrap();
        assert_eq!(present(&memory, FREE).unwrap(), before - PAGE);
    }),
    ("half a number", |d| {
        let memory = d.memory.clone();
        let list = memory.alloc(64, 64);
        memory.write(list, &[0xFF; 7]);
        d.queues[INFLATE]
            .add(&[Buffer { addr: list, len: 7 }], &[])
            .unwrap();
        d.queues[INFLATE].publish();
        d.queues[INFLATE].kick();
        take(&mut d.queues[INFLATE]).unwrap();
    }),
    ("all of memory as a list, in every descriptor", |d| {
        let (last, length) = (d.queues[INFLATE].size() - 1, d.memory.size() as u32 / 2);
        for i in 0..=last {
            let next = if i < last { flags::NEXT } else { 0 };
            d.queues[INFLATE].write_descriptor(i, &desc(FREE, length, next, i + 1));
        }
        for _ in 0..d.queues[INFLATE].size() {
            d.queues[INFLATE].offer_raw(0);
        }
    }),
    ("the device's own rings", |d| {
        let list = d.memory.alloc(4096, 64);
        let memory = d.memory.clone();
        let bytes: Vec<u8> = (0..16u32).flat_map(u32::to_le_bytes).collect();
        memory.write(list, &bytes);
        d.queues[INFLATE]
            .add(
                &[Buffer {
                    addr: list,
                    len: 64,
                }],
                &[],
            )
            .unwrap();
        d.queues[INFLATE].publish();
        d.queues[INFLATE].force_kick();
    }),
    (
        "reports past the end, of no length, and of everything",
        |d| {
            let end = d.memory.size();
            let write = flags::WRITE | flags::NEXT;
            let queue = &mut d.queues[REPORTING];
            queue.write_descriptor(0, &desc(end - PAGE, 2 << 20, write, 1));
            queue.write_descriptor(1, &desc(u64::MAX - 4095, 8192, write, 2));
            queue.write_descriptor(2, &desc(FREE, 0, write, 3));
            queue.write_descriptor(3, &desc(0, u32::MAX, flags::WRITE, 0));
            queue.offer_raw(0);
        },
    ),
    ("many statistics buffers", |d| {
        let addr = d.memory.alloc(64, 64);
        let queue = &mut d.queues[STATS];
        for _ in 0..queue.size() {
            queue.add(&[Buffer { addr, len: 20 }], &[]).unwrap();
        }
        queue.publish();
        queue.kick();
        // All but the last come back.
        for _ in 1..queue.size() {
            take(queue).unwrap();
        }
    }),
    ("statistics of all lengths, and written ones", |d| {
        let end = d.memory.size() as u32;
        let queue = &mut d.queues[STATS];
        queue.write_descriptor(0, &desc(0, end, flags::NEXT, 1));
        queue.write_descriptor(1, &desc(0, u32::MAX, flags::NEXT, 2));
        queue.write_descriptor(2, &desc(0, 100, flags::WRITE, 0));
        queue.offer_raw(0);
    }),
    ("a chain that is its own next", |d| {
        for queue in &mut d.queues {
            queue.write_descriptor(0, &desc(0x1000, 8, flags::NEXT, 0));
            queue.offer_raw(0);
        }
    }),
    ("heads and indices out of range", |d| {
        d.queues[DEFLATE].offer_raw(0xffff);
        d.queues[REPORTING].set_available_index(0x8000);
        d.queues[REPORTING].force_kick();
        d.queues[STATS].set_available_index(0xffff);
        d.queues[STATS].force_kick();
    }),
];

#[test]
fn hostile_rings_hurt_nobody_else() {
    let mut process = start(&["--reporting"]);
    for mask in [!0, !features::EVENT_IDX] {
        let options = Options {
            features: mask,
            ..options(4)
        };
        for (name, attack) in ATTACKS {
            let mut device = process.device(&options).unwrap();
            attack(&mut device);
            // The process still answers, and stops the queues when told.
            let answered = device.frontend.features();
            answered.unwrap_or_else(|e| panic!("{name}: {e}"));
            for queue in 0..4 {
                let stopped = device.stop_queue(queue);
                stopped.unwrap_or_else(|e| panic!("{name}: {e}"));
            }
            drop(device);
            assert!(process.is_running(), "{name}");
        }
    }
    check(&mut process.device(&options(4)).unwrap());
}

#[test]
fn a_queue_of_no_feature_is_refused() {
    let mut process = start(&[]);
    let options = Options {
        features: !feature::STATS_VQ,
        ..options(3)
    };
    assert!(process.device(&options).is_err());
    check(&mut process.device(&self::options(3)).unwrap());
}

#[test]
fn bad_arguments_end_with_status_2() {
    for (args, part) in [
        (&["--target", "4097", "--socket", "/s"][..], "4096"),
        (&["--target", "much", "--socket", "/s"], "4096"),
        (&["--target", "70368744177664", "--socket", "/s"], "16 TiB"),
        (&["--stats-interval", "0", "--socket", "/s"], "0"),
        (&["--socket", "/nowhere/socket"], "/nowhere"),
    ] {
        let output = Command::new(BINARY).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(part), "{args:?}: {text}");
    }
    let output = Command::new(BINARY).arg("--help").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("--target BYTES"));
}
