//! The process is killed at random moments while flushes are in flight, and another takes its place.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anemone_driver::pmem::{FLUSH, Requests};
use anemone_driver::{Bounced, Kills, Options, Replaceable};
use common::{BINARY, Backing, SIZE};

const KILLS: usize = 200;
/// Parts of the memory that are written and flushed independently of each other, far enough apart
/// that no page cache manages two of them as one.
const PARTS: u64 = 16;
const STEP: u64 = SIZE / PARTS;
const LENGTH: u64 = 4096;

#[test]
fn no_flush_is_acknowledged_that_has_not_happened() {
    flushes(&Options::default());
}

#[test]
fn no_flush_is_acknowledged_that_has_not_happened_with_a_bounce() {
    flushes(&Options {
        bounce: Some(Bounced::usual(27, 1)),
        ..Options::default()
    });
}

fn flushes(options: &Options) {
    let backing = Backing::new();
    let fds = vec![backing.file().try_clone().unwrap().into()];
    let args = ["--file-fd", "5"];
    let mut device = Replaceable::start(BINARY, &args, fds, options).unwrap();
    let memory = device.device.memory.clone();
    let size = device.device.queues[0].size();
    let mut requests = Requests::new(&memory, size, true);
    // The part that each request is about.
    let mut parts: HashMap<u16, u64> = HashMap::new();
    let mut free: Vec<u64> = (0..PARTS).collect();
    let mut flushed = 0;
    let mut kills = Kills::new(options.kills(KILLS), Duration::from_millis(6));
    while !kills.done() || !parts.is_empty() {
        let queue = &mut device.device.queues[0];
        while let (false, Some(part)) = (kills.done(), free.pop()) {
            let data = [kills.random().below(256) as u8; LENGTH as usize];
            backing.file().write_all_at(&data, part * STEP).unwrap();
            let place = requests.submit(&memory, queue, FLUSH).unwrap();
            parts.insert(place, part);
        }
        queue.publish();
        queue.kick();
        kills.strike(&mut device).unwrap();
        let queue = &mut device.device.queues[0];
        queue
            .wait(kills.wait().min(Duration::from_millis(1)))
            .unwrap();
        while let Some(finished) = requests.finish(&memory, queue).unwrap() {
            assert_eq!((finished.result, finished.written), (0, 4));
            let part = parts.remove(&finished.place).unwrap();
            let unwritten = backing.unwritten_in(part * STEP, LENGTH);
            assert_eq!(unwritten, 0, "part {part} is not on the storage");
            free.push(part);
            flushed += 1;
        }
    }
    assert_eq!(device.device.queues[0].strays(), 0, "returned twice");
    assert!(flushed > 0);
    println!("{flushed} flushes");
    kills.report("anemone-pmem");
}
