//! Queues: several at once, stopped and started under load, one front end after the other.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::time::Duration;

use anemone_driver::blk::{Blk, Requests, request, status};
use anemone_driver::{Options, Queue};
use common::{Image, Random, SECTOR, connect};

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn queues_work_at_the_same_time() {
    const QUEUES: usize = 4;
    for io in ["uring", "sync"] {
        let image = Image::new(QUEUES << 18);
        let mut process = image.serve(io, &["--queues", "4"]);
        let options = Options {
            queues: QUEUES as u16,
            ..Options::default()
        };
        let mut device = process.device(&options).unwrap();
        let memory = device.memory.clone();
        // Memory is handed out by one thread only.
        let pairs: Vec<_> = std::mem::take(&mut device.queues)
            .into_iter()
            .map(|queue| {
                let requests = Requests::new(&memory, queue.size(), 32, 4096, false);
                (queue, requests)
            })
            .collect();
        std::thread::scope(|scope| {
            for (index, (mut queue, mut requests)) in pairs.into_iter().enumerate() {
                let memory = &memory;
                scope.spawn(move || {
                    let fill = index as u8 + 1;
                    let first = (index << 9) as u64;
                    for round in 0..40 {
                        let mut block = 0;
                        while block < 64 || requests.in_flight() > 0 {
                            while block < 64
                                && let Some(slot) = requests.next_slot()
                            {
                                memory.write(requests.data(slot), &[fill ^ round; 4096]);
                                let sector = first + block * 8;
                                requests
                                    .submit(memory, &mut queue, request::OUT, sector, 4096)
                                    .unwrap();
                                block += 1;
                            }
                            queue.publish();
                            queue.kick();
                            assert!(queue.wait(PATIENCE).unwrap(), "no answer");
                            while let Some(done) = requests.finish(memory, &mut queue) {
                                assert_eq!(done.status, status::OK);
                            }
                        }
                    }
                });
            }
        });
        let bytes = image.bytes();
        for (index, part) in bytes.chunks(1 << 18).enumerate() {
            let fill = (index as u8 + 1) ^ 39;
            assert!(part.iter().all(|byte| *byte == fill), "queue {index}");
        }
    }
}

/// Takes what has come back until nothing is in flight.
fn drain(memory: &anemone_driver::Memory, queue: &mut Queue, requests: &mut Requests) -> usize {
    let mut count = 0;
    while let Some(done) = requests.finish(memory, queue) {
        assert_eq!(done.status, status::OK);
        count += 1;
    }
    count
}

#[test]
fn a_stopped_queue_has_nothing_in_flight_and_goes_on_where_it_was() {
    for io in ["uring", "sync"] {
        let image = Image::new(4 << 20);
        let mut process = image.serve(io, &[]);
        let mut device = connect(&mut process);
        let memory = device.memory.clone();
        let mut requests = Requests::new(&memory, 128, 64, 4096, true);
        let mut random = Random(77);
        let mut finished = 0;
        let mut submitted = 0;
        for _ in 0..50 {
            let queue = &mut device.queues[0];
            for _ in 0..random.below(64) {
                let sector = random.below(1000) * 8;
                let kind = [request::IN, request::OUT][random.below(2) as usize];
                let sent = requests.submit(&memory, queue, kind, sector, 4096);
                submitted += usize::from(sent.is_some());
            }
            queue.publish();
            queue.kick();
            let base = device.stop_queue(0).unwrap();
            let queue = &mut device.queues[0];
            // All that the device has taken has come back; the rest it has not looked at.
            assert_eq!(queue.used_index(), base);
            finished += drain(&memory, queue, &mut requests);
            assert_eq!(finished, usize::from(base));
            device.start_queue(0, base).unwrap();
        }
        let queue = &mut device.queues[0];
        while requests.in_flight() > 0 {
            assert!(queue.wait(PATIENCE).unwrap(), "no answer");
            finished += drain(&memory, queue, &mut requests);
        }
        assert_eq!(finished, submitted);
    }
}

#[test]
fn front_ends_come_and_go() {
    for io in ["uring", "sync"] {
        let image = Image::new(1 << 20);
        let mut process = image.serve(io, &[]);
        for round in 1..20u8 {
            let mut device = connect(&mut process);
            let memory = device.memory.clone();
            let mut blk = Blk::new(&memory, &mut device.queues[0], 4096);
            blk.write(8, &[round; 4096]).unwrap();
            assert_eq!(blk.read(8, SECTOR).unwrap(), [round; SECTOR]);
            // Gone in the middle of a request.
            let queue = &mut device.queues[0];
            let mut requests = Requests::new(&memory, 128, 16, 65536, false);
            while requests
                .submit(&memory, queue, request::OUT, 100, 65536)
                .is_some()
            {}
            queue.publish();
            queue.kick();
            drop(device);
        }
        assert_eq!(image.bytes()[8 * SECTOR..16 * SECTOR], [19; 4096]);
        assert!(process.is_running());
        assert!(process.terminate().unwrap().success());
    }
}

#[test]
fn an_interrupt_may_move_while_the_queue_runs() {
    for io in ["uring", "sync"] {
        let image = Image::new(1 << 20);
        let mut process = image.serve(io, &[]);
        let mut device = connect(&mut process);
        let memory = device.memory.clone();
        let other = Queue::new(&memory, 128, true).unwrap();
        let mut requests = Requests::new(&memory, 128, 1, 512, false);
        let mut run = |queue: &mut Queue| {
            queue.set_used_event(queue.used_index());
            requests
                .submit(&memory, queue, request::IN, 0, 512)
                .unwrap();
            queue.publish();
            queue.kick();
        };
        run(&mut device.queues[0]);
        assert!(device.queues[0].wait(PATIENCE).unwrap());
        device.queues[0].take_used().unwrap();
        device.queues[0].take_interrupt();
        // As QEMU does when the guest masks the vector.
        device.frontend.set_vring_call(0, other.call_fd()).unwrap();
        while other.take_interrupt() {}
        let mut requests = Requests::new(&memory, 128, 1, 512, false);
        let queue = &mut device.queues[0];
        queue.set_used_event(queue.used_index());
        requests
            .submit(&memory, queue, request::IN, 0, 512)
            .unwrap();
        queue.publish();
        queue.kick();
        let deadline = std::time::Instant::now() + PATIENCE;
        while !other.take_interrupt() {
            assert!(std::time::Instant::now() < deadline, "no interrupt");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!queue.take_interrupt(), "the old one is not used any more");
        assert_eq!(drain(&memory, queue, &mut requests), 1);
    }
}
