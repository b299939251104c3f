//! A driver that breaks the rules, on both queues.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use anemone_driver::{Descriptor, Process, features, flags};
use common::{BINARY, Guest, LONG, options, pattern};

/// Random descriptors, mostly plausible.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn pick(&mut self, values: &[u64]) -> u64 {
        values[self.below(values.len() as u64) as usize]
    }

    fn descriptor(&mut self, memory: u64) -> Descriptor {
        let addr = [
            self.below(memory),
            memory - 3,
            memory,
            u64::MAX - 7,
            1 << 40,
            0,
        ];
        let len = [0, 1, 16, 48, self.below(5000), 0x10000, u64::from(u32::MAX)];
        let flags = [
            0,
            u64::from(flags::WRITE),
            u64::from(flags::NEXT),
            u64::from(flags::NEXT | flags::WRITE),
            u64::from(flags::INDIRECT),
            self.below(0x10000),
        ];
        let next = [self.below(64), 63, 64, 0xffff];
        Descriptor {
            addr: self.pick(&addr),
            len: self.pick(&len) as u32,
            flags: self.pick(&flags) as u16,
            next: self.pick(&next) as u16,
        }
    }
}

#[test]
fn rings_of_nonsense_do_not_hurt_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let mut process = Process::start(BINARY, &["--unix", path.to_str().unwrap()]).unwrap();
    let mut random = Random(0x0123_4567_89ab_cdef);
    let mut client = None;
    for round in 0..200 {
        let mut options = options();
        if round % 2 == 1 {
            options.features = !features::EVENT_IDX;
        }
        let mut device = process.device(&options).unwrap();
        let client = client.get_or_insert_with(|| {
            let client = UnixStream::connect(&path).unwrap();
            client.set_nonblocking(true).unwrap();
            client
        });
        let memory = device.memory.size();
        for queue in &mut device.queues {
            for index in 0..queue.size() {
                queue.write_descriptor(index, &random.descriptor(memory));
            }
        }
        for _ in 0..20 {
            let queue = &mut device.queues[random.below(2) as usize];
            let head = random.pick(&[round % 64, 0, 5, 63, 64, 0xffff]) as u16;
            queue.offer_raw(head);
            // Something to put into the receive queue, and room for what comes out.
            let _ = client.write(b"some input that goes nowhere useful");
            let _ = client.read(&mut [0; 65536]);
        }
        if random.below(4) == 0 {
            let jump = random.below(0x10000) as u16;
            device.queues[1].set_available_index(jump);
            device.queues[1].force_kick();
        }
        device.frontend.features().unwrap();
        device.frontend.set_vring_enable(0, false).unwrap();
        device.frontend.set_vring_enable(1, false).unwrap();
        device.frontend.get_vring_base(0).unwrap();
        device.frontend.get_vring_base(1).unwrap();
        drop(device);
        assert!(process.is_running(), "round {round}");
    }
    // After all this the console works, for a new client.
    drop(client);
    let mut guest = Guest::new(process.device(&options()).unwrap());
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    client.write_all(b"~end~").unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"~end~") {
        got.extend(guest.read(1));
    }
    guest.write(&[&pattern(100)[..], b"alive"].concat());
    let mut text = Vec::new();
    while !text.ends_with(b"alive") {
        let mut bytes = [0; 1000];
        let n = client.read(&mut bytes).unwrap();
        text.extend(&bytes[..n]);
    }
}
