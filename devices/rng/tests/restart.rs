//! The process is killed under load and replaced; front ends go away in the middle of what they say;
//! in-flight memory is not what it should be. Much of this is the frame's work and holds for every
//! device.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anemone_driver::{Bounced, Buffer, Device, Kills, Options, Random, Replaceable, features};
use anemone_vhost_user::Frontend;
use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, protocol_features};

const BINARY: &str = env!("CARGO_BIN_EXE_anemone-rng");
const LONG: Duration = Duration::from_secs(20);
const SLOT: u64 = 4096;

fn start() -> Replaceable {
    start_with(&Options::default())
}

fn start_with(options: &Options) -> Replaceable {
    Replaceable::start(BINARY, &[], Vec::new(), options).unwrap()
}

/// Buffers on their way to be filled, each in a slot of its own.
struct Load {
    base: u64,
    free: Vec<u64>,
    lengths: HashMap<u32, (u64, u32)>,
    done: usize,
}

impl Load {
    fn new(device: &Device) -> Self {
        let slots = u64::from(device.queues[0].size());
        Self {
            base: device.memory.alloc(slots * SLOT, 4096),
            free: (0..slots).collect(),
            lengths: HashMap::new(),
            done: 0,
        }
    }

    /// Offers buffers, up to `depth` in flight.
    fn offer(&mut self, device: &mut Device, depth: usize, random: &mut Random) {
        while self.lengths.len() < depth {
            let slot = self.free.pop().unwrap();
            let len = 32 + random.below(SLOT - 31) as u32;
            let addr = self.base + slot * SLOT;
            device.memory.write(addr, &[0; SLOT as usize]);
            let head = device.queues[0].add(&[], &[Buffer { addr, len }]).unwrap();
            self.lengths.insert(head.into(), (slot, len));
        }
        device.queues[0].publish();
        device.queues[0].kick();
    }

    /// Takes what was returned: the whole buffer must have been filled, and nothing else.
    fn take(&mut self, device: &mut Device) {
        while let Some(used) = device.queues[0].take_used() {
            let (slot, len) = self.lengths.remove(&used.head).unwrap();
            assert_eq!(used.len, len);
            let bytes = device
                .memory
                .read_vec(self.base + slot * SLOT, SLOT as usize);
            let (filled, rest) = bytes.split_at(len as usize);
            assert!(
                filled
                    .chunks(32)
                    .all(|part| part.len() < 32 || part != [0; 32])
            );
            assert!(rest.iter().all(|&byte| byte == 0));
            self.free.push(slot);
            self.done += 1;
        }
    }

    /// Waits for all that is in flight.
    fn drain(&mut self, device: &mut Device) {
        while !self.lengths.is_empty() {
            assert!(device.queues[0].wait(LONG).unwrap());
            self.take(device);
        }
        assert_eq!(device.queues[0].strays(), 0);
    }
}

#[test]
fn every_buffer_is_filled_and_returned_once() {
    fills_every_buffer(&Options::default());
}

#[test]
fn every_buffer_is_filled_and_returned_once_with_a_bounce() {
    fills_every_buffer(&Options {
        bounce: Some(Bounced::usual(4, 1)),
        ..Options::default()
    });
}

fn fills_every_buffer(options: &Options) {
    let mut device = start_with(options);
    let mut load = Load::new(&device.device);
    let mut kills = Kills::new(options.kills(200), Duration::from_millis(4));
    while !kills.done() {
        load.offer(&mut device.device, 40, kills.random());
        kills.strike(&mut device).unwrap();
        let wait = kills.wait().min(Duration::from_millis(1));
        device.device.queues[0].wait(wait).unwrap();
        load.take(&mut device.device);
    }
    load.drain(&mut device.device);
    println!("{} buffers", load.done);
    kills.report("anemone-rng");
}

#[test]
fn a_front_end_that_comes_back_misses_nothing() {
    let mut device = start();
    let mut load = Load::new(&device.device);
    let mut random = Random::seeded();
    for _ in 0..200 {
        load.offer(&mut device.device, 60, &mut random);
        let pause = Duration::from_nanos(random.below(300_000));
        let start = Instant::now();
        while start.elapsed() < pause {
            std::hint::spin_loop();
        }
        device.reconnect().unwrap();
        load.take(&mut device.device);
    }
    load.drain(&mut device.device);
}

/// The steps of setting a device up again, the first `count` of them.
fn some_steps(device: &Device, socket: UnixStream, count: usize) {
    let mut front = Frontend::new(socket.try_clone().unwrap(), LONG);
    let wanted = protocol_features::INFLIGHT_SHMFD | protocol_features::REPLY_ACK;
    let queue = &device.queues[0];
    let (fd, size, offset) = device.inflight.as_ref().unwrap();
    type Step<'a> = Box<dyn FnOnce(&mut Frontend) -> anemone_vhost_user::Result<()> + 'a>;
    let steps: Vec<Step<'_>> = vec![
        Box::new(Frontend::set_owner),
        Box::new(|f| f.features().map(drop)),
        Box::new(|f| f.protocol_features().map(drop)),
        Box::new(|f| f.set_protocol_features(wanted)),
        Box::new(|f| {
            f.set_features(features::VERSION_1 | features::EVENT_IDX | F_PROTOCOL_FEATURES)
        }),
        Box::new(|f| f.set_mem_table(&[device.memory.region()])),
        Box::new(|f| f.set_inflight_fd(fd.as_fd(), *size, *offset, 1, queue.size())),
        Box::new(|f| f.set_vring_num(0, queue.size())),
        Box::new(|f| f.set_vring_addr(0, &queue.addresses())),
        Box::new(|f| f.set_vring_base(0, 0)),
        Box::new(|f| f.set_vring_kick(0, queue.kick_fd())),
        Box::new(|f| f.set_vring_call(0, queue.call_fd())),
        Box::new(|f| f.set_vring_enable(0, true)),
        Box::new(|f| f.set_vring_enable(0, false)),
        Box::new(|f| f.get_vring_base(0).map(drop)),
    ];
    for step in steps.into_iter().take(count) {
        step(&mut front).unwrap();
    }
    // Half a message, and the end.
    let header = [32u32, 1, 24].map(u32::to_ne_bytes).concat();
    (&socket).write_all(&header[..count % 12]).unwrap();
}

#[test]
fn setting_up_may_end_at_any_step() {
    let mut device = start();
    let mut load = Load::new(&device.device);
    let mut random = Random::seeded();
    for count in 0..16 {
        for kill in [false, true] {
            load.offer(&mut device.device, 60, &mut random);
            let socket = device.process().connect().unwrap();
            some_steps(&device.device, socket, count);
            if kill {
                // The process that is killed has come as far as that.
                device.replace().unwrap();
            } else {
                device.reconnect().unwrap();
            }
            load.drain(&mut device.device);
        }
    }
}

#[test]
fn hostile_in_flight_memory_ends_nothing() {
    let mut device = start();
    let mut random = Random::seeded();
    for round in 0..300 {
        let mut load = Load::new(&device.device);
        load.offer(&mut device.device, 60, &mut random);
        let (fd, size, _) = device.device.inflight.as_ref().unwrap();
        let memory = File::from(fd.try_clone().unwrap());
        let bytes: Vec<u8> = (0..*size)
            .map(|_| random.below(256) as u8 >> random.below(8))
            .collect();
        memory.write_all_at(&bytes, 0).unwrap();
        // Known, so that the rest is looked at.
        memory.write_all_at(&1u16.to_ne_bytes(), 8).unwrap();
        if round % 10 == 0 {
            memory.write_all_at(&2u16.to_ne_bytes(), 8).unwrap();
            device.reconnect().unwrap_err();
        } else {
            device.reconnect().unwrap();
        }
        // The device is there for a front end that means well.
        let socket = device.process().connect().unwrap();
        device.device = Device::connect(socket, &Options::default()).unwrap();
        let mut load = Load::new(&device.device);
        load.offer(&mut device.device, 20, &mut random);
        load.drain(&mut device.device);
    }
    assert!(device.process().child().try_wait().unwrap().is_none());
}
