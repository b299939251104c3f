//! The process is killed at random moments under verified load, and another takes its place.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::HashMap;
use std::time::Duration;

use anemone_driver::blk::{Requests, request, status};
use anemone_driver::{Bounced, Kills, Options, Random, Replaceable};
use common::{BINARY, Image, SECTOR};

const BLOCK: usize = 4096;
const BLOCKS: usize = 256;
const QUEUES: u16 = 2;
const DEPTH: usize = 24;
const KILLS: usize = 200;

/// What a block contains after its write number `version`; 0 is zeroes.
fn block(number: usize, version: u32) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK];
    }
    let seed = (number as u64) << 32 | u64::from(version);
    (0..BLOCK as u64 / 8)
        .flat_map(|i| {
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .wrapping_add(i)
                .to_le_bytes()
        })
        .collect()
}

/// A request on its way.
struct Job {
    kind: u32,
    number: usize,
    version: u32,
}

struct Load {
    /// Version of each block as far as the device has acknowledged it.
    versions: Vec<u32>,
    busy: Vec<bool>,
    last_version: u32,
    done: usize,
}

impl Load {
    fn next(&mut self, random: &mut Random) -> Job {
        let number = loop {
            let number = random.below(BLOCKS as u64) as usize;
            if !self.busy[number] {
                break number;
            }
        };
        self.last_version += 1;
        let (kind, version) = match random.below(20) {
            0 => (request::FLUSH, 0),
            1 => (request::WRITE_ZEROES, 0),
            2..8 => (request::IN, 0),
            _ => (request::OUT, self.last_version),
        };
        self.busy[number] = kind != request::FLUSH;
        Job {
            kind,
            number,
            version,
        }
    }

    fn finish(&mut self, job: &Job, data: &[u8]) {
        match job.kind {
            request::OUT | request::WRITE_ZEROES => self.versions[job.number] = job.version,
            request::IN => {
                let wanted = block(job.number, self.versions[job.number]);
                assert!(data == wanted, "block {} reads wrong", job.number);
            }
            _ => {}
        }
        if job.kind != request::FLUSH {
            self.busy[job.number] = false;
        }
        self.done += 1;
    }
}

fn survives(io: &str, bounce: Option<Bounced>) {
    let image = Image::new(BLOCK * BLOCKS);
    image.file.set_len(0).unwrap();
    image.file.set_len((BLOCK * BLOCKS) as u64).unwrap();
    let options = Options {
        queues: QUEUES,
        bounce,
        ..Options::default()
    };
    let args = ["--image-fd", "5", "--io", io, "--queues", "2"];
    let fds = vec![image.file.try_clone().unwrap().into()];
    let mut device = Replaceable::start(BINARY, &args, fds, &options).unwrap();
    let memory = device.device.memory.clone();
    let mut requests: Vec<_> = (0..QUEUES)
        .map(|_| Requests::new(&memory, options.queue_size, DEPTH, BLOCK as u32, true))
        .collect();
    let mut jobs: Vec<HashMap<usize, Job>> = (0..QUEUES).map(|_| HashMap::new()).collect();
    let mut load = Load {
        versions: vec![0; BLOCKS],
        busy: vec![false; BLOCKS],
        last_version: 0,
        done: 0,
    };
    let mut kills = Kills::new(options.kills(KILLS), Duration::from_millis(6));
    while !kills.done() || jobs.iter().any(|jobs| !jobs.is_empty()) {
        for (queue, (requests, jobs)) in
            (device.device.queues.iter_mut()).zip(requests.iter_mut().zip(&mut jobs))
        {
            while let (false, Some(slot)) = (kills.done(), requests.next_slot()) {
                let job = load.next(kills.random());
                let data = match job.kind {
                    request::OUT => block(job.number, job.version),
                    request::WRITE_ZEROES => {
                        let sector = (job.number * BLOCK / SECTOR) as u64;
                        let count = (BLOCK / SECTOR) as u32;
                        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat()
                    }
                    request::IN => vec![0xee; BLOCK],
                    _ => Vec::new(),
                };
                memory.write(requests.data(slot), &data);
                let sector = (job.number * BLOCK / SECTOR) as u64;
                let submitted =
                    requests.submit(&memory, queue, job.kind, sector, data.len() as u32);
                assert_eq!(submitted, Some(slot));
                jobs.insert(slot, job);
            }
            queue.publish();
            queue.kick();
        }
        kills.strike(&mut device).unwrap();
        let wait = kills.wait().min(Duration::from_millis(1));
        device.device.queues[0].wait(wait).unwrap();
        for (queue, (requests, jobs)) in
            (device.device.queues.iter_mut()).zip(requests.iter_mut().zip(&mut jobs))
        {
            while let Some(finished) = requests.finish(&memory, queue) {
                assert_eq!(finished.status, status::OK);
                let job = jobs.remove(&finished.slot).unwrap();
                load.finish(&job, &memory.read_vec(requests.data(finished.slot), BLOCK));
            }
        }
    }
    for queue in &device.device.queues {
        assert_eq!(queue.strays(), 0, "a request was returned twice");
    }
    let bytes = image.bytes();
    for (number, bytes) in bytes.chunks(BLOCK).enumerate() {
        assert!(
            bytes == block(number, load.versions[number]),
            "block {number} is not what was written last"
        );
    }
    println!("{} requests", load.done);
    kills.report(&format!("anemone-blk --io {io}"));
}

#[test]
fn no_write_is_lost_or_repeated_with_io_uring() {
    survives("uring", None);
}

/// The region has room for fewer requests than there are, so that some wait.
#[test]
fn no_write_is_lost_or_repeated_with_a_bounce() {
    let bounce = Bounced {
        device_type: 2,
        region: u64::from(QUEUES) * (72 << 10),
    };
    survives("uring", Some(bounce));
}

#[test]
fn no_write_is_lost_or_repeated_without_io_uring() {
    survives("sync", None);
}

/// A driver that has chosen write-through relies on it without a flush.
#[test]
fn the_choice_of_write_through_survives() {
    const WRITEBACK: u32 = 32;
    let image = Image::new(BLOCK);
    let args = ["--image-fd", "5"];
    let fds = vec![image.file.try_clone().unwrap().into()];
    let mut device = Replaceable::start(BINARY, &args, fds, &Options::default()).unwrap();
    for value in [0, 1, 0] {
        let frontend = &mut device.device.frontend;
        frontend.set_config(WRITEBACK, &[value]).unwrap();
        for _ in 0..2 {
            device.replace().unwrap();
            let frontend = &mut device.device.frontend;
            assert_eq!(frontend.config(WRITEBACK, 1).unwrap(), [value]);
        }
    }
}
