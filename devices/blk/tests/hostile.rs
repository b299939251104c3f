//! Guests that put nonsense into the rings. The process goes on; at most the queue is given up
//! until it is set up again.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::time::Duration;

use anemone_driver::blk::Blk;
use anemone_driver::{Descriptor, Device, Options, Process, flags};
use common::{Image, Random, SECTOR, connect};

const PATIENCE: Duration = Duration::from_secs(20);
const SIZE: usize = 1 << 20;

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        addr,
        len,
        flags,
        next,
    }
}

/// Whether a new driver can read the first sector.
fn assert_serves(process: &mut Process) {
    let mut device = connect(process);
    let memory = device.memory.clone();
    let mut blk = Blk::new(&memory, &mut device.queues[0], 4096);
    assert_eq!(
        blk.read(0, SECTOR).unwrap(),
        common::content(SIZE)[..SECTOR]
    );
}

/// Offers chains that start at descriptor 0, each a table of descriptors, and waits for each to
/// come back unread.
fn offer(device: &mut Device, table: &[Descriptor]) {
    let queue = &mut device.queues[0];
    for (index, descriptor) in table.iter().enumerate() {
        queue.write_descriptor(index as u16, descriptor);
    }
    queue.offer_raw(0);
    assert!(queue.wait(PATIENCE).unwrap(), "{table:?} is not returned");
    let used = queue.take_used().unwrap();
    assert_eq!((used.head, used.len), (0, 0), "{table:?}");
}

#[test]
fn malformed_chains_come_back_unread() {
    for io in ["uring", "sync"] {
        let image = Image::new(SIZE);
        let mut process = image.serve(io, &[]);
        let mut device = connect(&mut process);
        let memory = device.memory.clone();
        let buffer = memory.alloc(8192, 16);
        let end = memory.size();
        let next = flags::NEXT;
        let write = flags::WRITE;
        let indirect = flags::INDIRECT;
        let header = descriptor(buffer, 16, next, 1);
        let status = descriptor(buffer + 100, 1, write, 0);
        let chains: &[&[Descriptor]] = &[
            // Loops.
            &[descriptor(buffer, 16, next, 0)],
            &[header, descriptor(buffer, 512, next | write, 1)],
            &[header, descriptor(buffer, 0, next, 0)],
            // Out of range: indices, addresses, lengths.
            &[descriptor(buffer, 16, next, 128)],
            &[descriptor(buffer, 16, next, 0xffff)],
            &[header, descriptor(end - 8, 16, next | write, 2), status],
            &[header, descriptor(end, 512, next | write, 2), status],
            &[descriptor(u64::MAX - 7, 16, next, 1), status],
            &[
                header,
                descriptor(buffer, u32::MAX, next | write, 2),
                status,
            ],
            // No header, no status, nothing at all.
            &[status],
            &[descriptor(buffer, 16, 0, 0)],
            &[descriptor(buffer, 15, next, 1), status],
            &[descriptor(buffer, 0, 0, 0)],
            &[descriptor(buffer, 0, write, 0)],
            // Wrong direction.
            &[descriptor(buffer, 16, next | write, 1), status],
            &[
                descriptor(buffer, 1, next | write, 1),
                descriptor(buffer, 16, 0, 0),
            ],
            // Indirect tables: out of range, empty, not whole, inside another, looping.
            &[descriptor(end, 32, indirect, 0)],
            &[descriptor(buffer, 0, indirect, 0)],
            &[descriptor(buffer, 17, indirect, 0)],
            &[descriptor(buffer, 0xffff_fff0, indirect, 0)],
        ];
        for chain in chains {
            offer(&mut device, chain);
        }
        // A table whose only entry is itself, and one that runs in a circle.
        let entry = |addr: u64, len: u32, flags: u16, next: u16| {
            let mut bytes = addr.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            bytes
        };
        memory.write(buffer, &entry(buffer, 16, indirect, 0));
        offer(&mut device, &[descriptor(buffer, 16, indirect, 0)]);
        memory.write(buffer, &entry(buffer, 0, next, 0));
        offer(&mut device, &[descriptor(buffer, 4096, indirect, 0)]);
        // The same queue still serves.
        let mut blk = Blk::new(&memory, &mut device.queues[0], 4096);
        assert_eq!(blk.read(0, SECTOR).unwrap(), image.bytes()[..SECTOR]);
        assert!(image.bytes() == common::content(SIZE));
    }
}

#[test]
fn a_broken_ring_is_given_up_until_it_is_set_up_again() {
    for io in ["uring", "sync"] {
        let image = Image::new(SIZE);
        let mut process = image.serve(io, &[]);
        // An index that is not a descriptor; more available than the ring has entries.
        for broken in 0..2 {
            let mut device = connect(&mut process);
            let queue = &mut device.queues[0];
            if broken == 0 {
                queue.offer_raw(4000);
            } else {
                queue.set_available_index(1000);
                queue.force_kick();
            }
            assert!(queue.wait_error(PATIENCE).unwrap(), "not given up");
            queue.force_kick();
            device.stop_queue(0).unwrap();
            drop(device);
            assert_serves(&mut process);
        }
    }
}

#[test]
fn the_same_head_many_times_over() {
    for io in ["uring", "sync"] {
        let image = Image::new(SIZE);
        let mut process = image.serve(io, &[]);
        let mut device = connect(&mut process);
        let memory = device.memory.clone();
        let buffer = memory.alloc(8192, 16);
        let queue = &mut device.queues[0];
        queue.write_descriptor(0, &descriptor(buffer, 16, flags::NEXT, 1));
        queue.write_descriptor(
            1,
            &descriptor(buffer + 16, 4096, flags::NEXT | flags::WRITE, 2),
        );
        queue.write_descriptor(2, &descriptor(buffer + 5000, 1, flags::WRITE, 0));
        for slot in 0..128 {
            queue.set_available(slot, 0);
        }
        for round in 1..100u16 {
            queue.set_available_index(round * 128);
            queue.force_kick();
            for _ in 0..128 {
                assert!(queue.wait(PATIENCE).unwrap(), "no answer");
                assert_eq!(queue.take_used().unwrap().len, 4097);
            }
        }
        drop(device);
        assert_serves(&mut process);
    }
}

#[test]
fn rings_full_of_rubbish() {
    for io in ["uring", "sync"] {
        let image = Image::new(SIZE);
        // Read-only: rubbish may well be a valid write.
        let mut process = image.serve(io, &["--readonly"]);
        let mut random = Random(4711);
        for _ in 0..60 {
            let options = Options {
                memory: 1 << 20,
                queue_size: 16,
                ..Options::default()
            };
            let mut device = process.device(&options).unwrap();
            let memory = device.memory.clone();
            let buffer = memory.alloc(1 << 16, 16);
            let queue = &mut device.queues[0];
            for _ in 0..20 {
                for index in 0..16 {
                    let addr = match random.below(8) {
                        0 => random.below(u64::MAX),
                        1 => memory.size() - random.below(64),
                        _ => buffer + random.below(1 << 16),
                    };
                    let len = match random.below(4) {
                        0 => random.below(1 << 32) as u32,
                        1 => 16 * random.below(8) as u32,
                        _ => random.below(2000) as u32,
                    };
                    let next = random.below(17) as u16;
                    let flags = random.below(8) as u16;
                    queue.write_descriptor(index, &descriptor(addr, len, flags, next));
                    queue.set_available(index, random.below(16) as u16);
                }
                let index = queue
                    .available_index()
                    .wrapping_add(random.below(17) as u16);
                queue.set_available_index(index);
                queue.force_kick();
            }
            device.stop_queue(0).unwrap();
        }
        assert_serves(&mut process);
        assert!(image.bytes() == common::content(SIZE));
        assert!(process.terminate().unwrap().success());
    }
}
