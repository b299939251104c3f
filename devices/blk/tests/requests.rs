//! Requests to the real process, compared with the file and with a model of a disk.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anemone_driver::blk::{Blk, Requests, request, status};
use anemone_driver::{Bounced, Buffer, Descriptor, Device, Error, Options, flags};
use common::{
    F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_MQ, F_RO, F_WRITE_ZEROES, Image, Random, SECTOR, connect,
};

const PATIENCE: Duration = Duration::from_secs(20);

fn blk(device: &mut Device, data_len: u32) -> Blk<'_> {
    Blk::new(&device.memory, &mut device.queues[0], data_len)
}

/// The status that a failed request came back with.
fn failure<T>(result: Result<T, Error>) -> u8 {
    match result {
        Err(Error::Status(status)) => status,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("the request succeeded"),
    }
}

/// A request in parts of any length: the readable bytes, and room for the writable ones with the
/// status. Returns the used length and what was written.
fn exchange(
    device: &mut Device,
    readable: &[&[u8]],
    writable: &[usize],
    indirect: bool,
) -> (u32, Vec<u8>) {
    let memory = &device.memory;
    let place = |len: usize| Buffer {
        addr: memory.alloc(len as u64, 1),
        len: len as u32,
    };
    let inputs: Vec<_> = readable
        .iter()
        .map(|bytes| {
            let buffer = place(bytes.len());
            memory.write(buffer.addr, bytes);
            buffer
        })
        .collect();
    let outputs: Vec<_> = writable
        .iter()
        .map(|len| {
            let buffer = place(*len);
            memory.write(buffer.addr, &vec![0xaa; *len]);
            buffer
        })
        .collect();
    let queue = &mut device.queues[0];
    if indirect {
        queue.add_indirect(&inputs, &outputs).unwrap();
    } else {
        queue.add(&inputs, &outputs).unwrap();
    }
    queue.publish();
    queue.kick();
    assert!(queue.wait(PATIENCE).unwrap(), "no answer");
    let used = queue.take_used().unwrap();
    let written = outputs
        .iter()
        .flat_map(|b| memory.read_vec(b.addr, b.len as usize))
        .collect();
    (used.len, written)
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn ranges(list: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (sector, count, flags) in list {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

fn every_request(io: &str) {
    let image = Image::new(1 << 20);
    let mut process = image.serve(io, &["--serial", "serial-number"]);
    let mut device = connect(&mut process);
    assert_eq!(device.features & F_RO, 0);
    let wanted = F_FLUSH | F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES;
    assert_eq!(device.features & wanted, wanted);
    let mut blk = blk(&mut device, 1 << 16);
    let mut expected = image.bytes();

    assert_eq!(blk.id().unwrap(), b"serial-number");
    assert_eq!(blk.read(3, 7 * SECTOR).unwrap(), &expected[1536..5120]);
    let last = expected.len() / SECTOR - 1;
    assert_eq!(
        blk.read(last as u64, SECTOR).unwrap(),
        &expected[last * SECTOR..]
    );

    let data: Vec<_> = (0..9 * SECTOR).map(|i| (i % 253) as u8).collect();
    blk.write(100, &data).unwrap();
    expected[100 * SECTOR..][..data.len()].copy_from_slice(&data);
    assert!(image.bytes() == expected, "after a write");
    blk.flush().unwrap();

    blk.write_zeroes(8, 33, false).unwrap();
    expected[8 * SECTOR..][..33 * SECTOR].fill(0);
    blk.write_zeroes(64, 32, true).unwrap();
    expected[64 * SECTOR..][..32 * SECTOR].fill(0);
    assert!(image.bytes() == expected, "after zeroing");

    let blocks = image.file.metadata().unwrap().blocks();
    blk.discard(1024, 512).unwrap();
    expected[1024 * SECTOR..][..512 * SECTOR].fill(0);
    assert!(image.bytes() == expected, "after a discard");
    let freed = blocks - image.file.metadata().unwrap().blocks();
    // The file system may need a block to describe the hole.
    assert!(freed >= 504, "{freed} of 512 sectors are given back");

    let end = image.bytes().len() as u64 / 512;
    assert_eq!(failure(blk.read(end, SECTOR)), status::IOERR);
    assert_eq!(failure(blk.read(end - 1, 2 * SECTOR)), status::IOERR);
    assert_eq!(failure(blk.read(u64::MAX, SECTOR)), status::IOERR);
    assert_eq!(failure(blk.read(1 << 55, SECTOR)), status::IOERR);
    assert_eq!(failure(blk.write(end, &[1; SECTOR])), status::IOERR);
    assert_eq!(failure(blk.write(0, &[1; 100])), status::IOERR);
    assert_eq!(failure(blk.discard(end, 1)), status::IOERR);
    assert_eq!(failure(blk.discard(0, u32::MAX)), status::IOERR);
    assert_eq!(failure(blk.write_zeroes(end - 1, 2, true)), status::IOERR);
    assert!(image.bytes() == expected, "after requests that failed");
    assert!(process.terminate().unwrap().success());
}

#[test]
fn every_request_with_uring() {
    every_request("uring");
}

#[test]
fn every_request_with_sync() {
    every_request("sync");
}

#[test]
fn no_layout_is_assumed() {
    let image = Image::new(1 << 16);
    let mut process = image.serve("uring", &[]);
    let mut device = connect(&mut process);
    let mut expected = image.bytes();
    for indirect in [false, true] {
        let read = header(request::IN, 5);
        // The header byte by byte, data in odd pieces, the status with the last of the data.
        let bytes: Vec<_> = read.chunks(1).collect();
        let (len, written) = exchange(&mut device, &bytes, &[1, 510, 514, 0, 512], indirect);
        assert_eq!(len, 1537);
        assert_eq!(written[..1536], expected[5 * SECTOR..8 * SECTOR]);
        assert_eq!(written[1536], status::OK);

        let mut write = header(request::OUT, 9).to_vec();
        write.extend((0..1024u32).map(|i| (i * 7) as u8));
        expected[9 * SECTOR..11 * SECTOR].copy_from_slice(&write[16..]);
        let parts: Vec<_> = write.chunks(101).collect();
        // Room in front of the status is not data of the request: it comes back zeroed.
        let (len, written) = exchange(&mut device, &parts, &[2, 3], indirect);
        assert_eq!((len, written), (5, vec![0, 0, 0, 0, status::OK]));
        assert!(image.bytes() == expected);
    }
    let list = ranges(&[(16, 8, 1), (32, 4, 1), (0, 0, 0)]);
    let zero = header(request::WRITE_ZEROES, 0);
    let (len, written) = exchange(&mut device, &[&zero, &list[..7], &list[7..]], &[1], false);
    assert_eq!((len, written), (1, vec![status::OK]));
    expected[16 * SECTOR..24 * SECTOR].fill(0);
    expected[32 * SECTOR..36 * SECTOR].fill(0);
    assert!(image.bytes() == expected);
}

#[test]
fn what_is_not_understood_is_said_so() {
    let image = Image::new(1 << 16);
    let before = image.bytes();
    let mut process = image.serve("uring", &[]);
    let mut device = connect(&mut process);
    let mut answer = |kind, payload: &[u8], room: usize| {
        let header = header(kind, 0);
        let (len, written) = exchange(&mut device, &[&header, payload], &[room, 1], false);
        assert_eq!(len as usize, room + 1);
        assert!(written[..room].iter().all(|byte| *byte == 0));
        written[room]
    };
    for kind in [2, 3, 5, 10, 14, 16, 0x8000_0000] {
        assert_eq!(answer(kind, &[], 16), status::UNSUPP, "type {kind}");
    }
    let one = |count, flags| ranges(&[(0, count, flags)]);
    assert_eq!(answer(request::DISCARD, &one(8, 1), 0), status::UNSUPP);
    assert_eq!(answer(request::DISCARD, &one(8, 2), 0), status::UNSUPP);
    assert_eq!(answer(request::WRITE_ZEROES, &one(8, 3), 0), status::UNSUPP);
    assert_eq!(answer(request::DISCARD, &[], 0), status::IOERR);
    assert_eq!(answer(request::DISCARD, &one(8, 0)[..15], 0), status::IOERR);
    let many = ranges(&[(0, 1, 0); 17]);
    assert_eq!(answer(request::WRITE_ZEROES, &many, 0), status::IOERR);
    // One bad range keeps the good one before it from being zeroed.
    let mixed = ranges(&[(0, 8, 0), (1 << 40, 8, 0)]);
    assert_eq!(answer(request::WRITE_ZEROES, &mixed, 0), status::IOERR);
    assert!(image.bytes() == before);
}

#[test]
fn features_that_were_not_accepted_are_not_served() {
    let image = Image::new(1 << 16);
    let before = image.bytes();
    let mut process = image.serve("uring", &[]);
    let options = Options {
        features: !(F_DISCARD | F_WRITE_ZEROES),
        ..Options::default()
    };
    let mut device = process.device(&options).unwrap();
    let mut blk = blk(&mut device, 4096);
    assert_eq!(failure(blk.discard(0, 8)), status::UNSUPP);
    assert_eq!(failure(blk.write_zeroes(0, 8, true)), status::UNSUPP);
    assert!(image.bytes() == before);
}

#[test]
fn a_read_only_disk_is_only_read() {
    for io in ["uring", "sync"] {
        let image = Image::new(1 << 16);
        let before = image.bytes();
        let mut process = image.serve(io, &["--readonly"]);
        let mut device = connect(&mut process);
        assert_ne!(device.features & F_RO, 0);
        assert_eq!(
            device.features & (F_DISCARD | F_WRITE_ZEROES | F_CONFIG_WCE),
            0
        );
        let mut blk = blk(&mut device, 4096);
        assert_eq!(blk.read(1, SECTOR).unwrap(), &before[512..1024]);
        assert_eq!(failure(blk.write(1, &[0; SECTOR])), status::IOERR);
        assert_eq!(failure(blk.write_zeroes(1, 1, false)), status::UNSUPP);
        assert_eq!(failure(blk.discard(1, 1)), status::UNSUPP);
        blk.flush().unwrap();
        assert!(image.bytes() == before);
    }
}

#[test]
fn configuration_space() {
    let image = Image::new(3 << 20);
    let mut process = image.serve("uring", &["--queues", "3"]);
    let mut device = connect(&mut process);
    assert_ne!(device.features & F_MQ, 0);
    let config = device.frontend.config(0, 60).unwrap();
    let u16_at = |at: usize| u16::from_le_bytes([config[at], config[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 6144);
    assert_eq!(u32_at(12), 254, "seg_max");
    assert_eq!(u32_at(20), 512, "blk_size");
    assert_eq!(config[24], 3, "blocks of 4096 bytes in the file system");
    assert_eq!(config[32], 1, "writeback");
    assert_eq!(u16_at(34), 3, "num_queues");
    for (at, value) in [(36, 1 << 22), (40, 16), (44, 8), (48, 1 << 22), (52, 16)] {
        assert_eq!(u32_at(at), value, "at {at}");
    }
    assert_eq!(config[56], 1, "write_zeroes_may_unmap");

    // The driver turns the cache off; writes still work, and a new driver starts with it on.
    device.frontend.set_config(32, &[0]).unwrap();
    assert_eq!(device.frontend.config(32, 1).unwrap(), [0]);
    let mut disk = blk(&mut device, 4096);
    disk.write(0, &[7; 1024]).unwrap();
    disk.write_zeroes(1, 1, true).unwrap();
    assert_eq!(image.bytes()[..512], [7; 512]);
    assert_eq!(image.bytes()[512..1024], [0; 512]);
    drop(device);
    let mut device = connect(&mut process);
    assert_eq!(device.frontend.config(32, 1).unwrap(), [1]);
}

/// Requests in flight at random, as many as the queue takes; those in flight never overlap.
fn random_load(io: &str, features: u64, count: u32) {
    const SLICES: u64 = 16;
    const SLICE: u64 = 64;
    let image = Image::new((SLICES * SLICE) as usize * SECTOR);
    let mut model = image.bytes();
    let mut process = image.serve(io, &[]);
    let options = Options {
        features,
        ..Options::default()
    };
    let mut device = process.device(&options).unwrap();
    let memory = device.memory.clone();
    let queue = &mut device.queues[0];
    let depth = SLICES as usize;
    let mut requests = Requests::new(&memory, queue.size(), depth, 32 * 512, true);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    // What each request in flight is expected to read, and the slice of the disk it uses.
    let mut expected = vec![None; depth];
    let mut free: Vec<u64> = (0..SLICES).collect();
    let mut left = count;
    while left > 0 || requests.in_flight() > 0 {
        while left > 0
            && random.below(8) != 0
            && let Some(slice) = free.pop()
        {
            left -= 1;
            let sector = slice * SLICE + random.below(32);
            let count = random.below(32) + 1;
            let bytes = sector as usize * 512..(sector + count) as usize * 512;
            let slot = requests.next_slot().unwrap();
            let data = requests.data(slot);
            let (kind, len, read) = match random.below(8) {
                0..3 => (request::IN, count * 512, Some(model[bytes].to_vec())),
                3..6 => {
                    let fill = random.below(255) as u8 + 1;
                    model[bytes.clone()].fill(fill);
                    memory.write(data, &model[bytes]);
                    (request::OUT, count * 512, None)
                }
                kind @ (6 | 7) => {
                    let unmap = random.below(2) as u32;
                    model[bytes].fill(0);
                    memory.write(
                        data,
                        &ranges(&[(sector, count as u32, unmap * (kind - 6) as u32)]),
                    );
                    match kind {
                        6 => (request::DISCARD, 16, None),
                        _ => (request::WRITE_ZEROES, 16, None),
                    }
                }
                _ => (request::FLUSH, 0, None),
            };
            expected[slot] = Some((slice, read));
            let sent = requests.submit(&memory, queue, kind, sector, len as u32);
            assert_eq!(sent, Some(slot));
        }
        queue.publish();
        queue.kick();
        if requests.in_flight() == 0 {
            continue;
        }
        assert!(queue.wait(PATIENCE).unwrap(), "no answer");
        while let Some(finished) = requests.finish(&memory, queue) {
            assert_eq!(finished.status, status::OK);
            let (slice, read) = expected[finished.slot].take().unwrap();
            if let Some(read) = read {
                assert_eq!(finished.written as usize, read.len() + 1);
                let data = requests.data(finished.slot);
                assert!(memory.read_vec(data, read.len()) == read, "slice {slice}");
            }
            free.push(slice);
        }
    }
    assert!(image.bytes() == model, "the image differs from the model");
}

#[test]
fn random_load_with_uring() {
    random_load("uring", !0, 6000);
}

#[test]
fn random_load_with_sync() {
    random_load("sync", !0, 6000);
}

#[test]
fn random_load_without_event_index_and_without_a_cache() {
    let less = !(anemone_driver::features::EVENT_IDX | F_FLUSH);
    // Each write waits for the host's disk.
    random_load("uring", less, 300);
    random_load("sync", less, 300);
}

/// What the VMM lets a driver ask of a disk with one queue that does not see guest memory.
#[test]
fn largest_requests_pass_with_a_bounce() {
    const SEGMENTS: usize = 254;
    const SEGMENT: usize = 64 << 10;
    for io in ["uring", "sync"] {
        let image = Image::new(SEGMENTS * SEGMENT);
        let mut process = image.serve(io, &[]);
        let options = Options {
            memory: 40 << 20,
            bounce: Some(Bounced::usual(2, 1)),
            ..Options::default()
        };
        let mut device = process.device(&options).unwrap();
        let memory = device.memory.clone();
        // Not on pages, one behind the other.
        let data = memory.alloc((SEGMENTS * SEGMENT) as u64 + 4096, 4096) + 512;
        let (header, end) = (memory.alloc(16, 16), memory.alloc(1, 1));
        let table = memory.alloc(16 * (SEGMENTS as u64 + 2), 16);
        for (kind, written) in [(request::IN, flags::WRITE), (request::OUT, 0)] {
            memory.write(header, &[u64::from(kind).to_le_bytes(), [0; 8]].concat());
            memory.write(end, &[0xee]);
            let segments = (0..SEGMENTS).map(|n| (data + (n * SEGMENT) as u64, SEGMENT, written));
            let all = [(header, 16, 0)]
                .into_iter()
                .chain(segments)
                .chain([(end, 1, flags::WRITE)]);
            for (index, (addr, len, write)) in all.enumerate() {
                let last = index == SEGMENTS + 1;
                let descriptor = Descriptor {
                    addr,
                    len: len as u32,
                    flags: write | if last { 0 } else { flags::NEXT },
                    next: index as u16 + 1,
                };
                memory.write(table + 16 * index as u64, &descriptor.bytes());
            }
            let queue = &mut device.queues[0];
            let pointer = Descriptor {
                addr: table,
                len: 16 * (SEGMENTS as u32 + 2),
                flags: flags::INDIRECT,
                next: 0,
            };
            queue.write_descriptor(0, &pointer);
            queue.offer_raw(0);
            assert!(queue.wait(PATIENCE).unwrap(), "the disk does not answer");
            queue.take_used().unwrap();
            assert_eq!(memory.read_vec(end, 1), [status::OK]);
            let mut bytes = memory.read_vec(data, SEGMENTS * SEGMENT);
            assert!(image.bytes() == bytes, "after request {kind}");
            // What is to be written.
            bytes.rotate_left(12_345);
            memory.write(data, &bytes);
        }
    }
}
