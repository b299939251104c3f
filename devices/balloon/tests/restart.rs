//! The process is killed at random moments while the balloon grows and shrinks, and another takes its
//! place.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::HashMap;
use std::time::Duration;

use anemone_driver::balloon::{PAGE, fill, present, sizes};
use anemone_driver::{Bounced, Buffer, Kills, Options, Replaceable};
use anemone_ipc::device::ToDevice;

const BINARY: &str = env!("CARGO_BIN_EXE_anemone-balloon");
const KILLS: usize = 200;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 3;
/// From here on no ring lies in guest memory.
const FREE: u64 = 8 << 20;
/// Groups of pages that are given up and used again independently of each other.
const GROUPS: u64 = 32;
const GROUP: u64 = (8 << 20) / GROUPS;

/// What becomes of a group of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Used,
    /// Given up; the device has the chain.
    Going,
    Gone,
    /// The deflating chain is with the device.
    Coming,
}

#[test]
fn pages_go_and_come_and_none_is_freed_that_is_used() {
    pages_go_and_come(None);
}

#[test]
fn pages_go_and_come_with_a_bounce() {
    pages_go_and_come(Some(Bounced::usual(5, 4)));
}

fn pages_go_and_come(bounce: Option<Bounced>) {
    let options = Options {
        queues: 4,
        bounce,
        ..Options::default()
    };
    let args = ["--reporting", "--target", "4096"];
    let mut device = Replaceable::start(BINARY, &args, vec![], &options).unwrap();
    let memory = device.device.memory.clone();
    let lists = memory.alloc(GROUPS * PAGE, 4096);
    let statistics = memory.alloc(64, 64);
    fill(&memory, FREE);
    let mut states = [State::Used; GROUPS as usize];
    let mut chains: [HashMap<u32, usize>; 4] = Default::default();
    let mut target = 1;
    let (mut moves, mut told) = (0, 0);
    let statistics = Buffer {
        addr: statistics,
        len: 10,
    };
    device.device.queues[STATS].add(&[statistics], &[]).unwrap();
    let mut kills = Kills::new(options.kills(KILLS), Duration::from_millis(6));
    while !kills.done() || chains.iter().any(|chains| !chains.is_empty()) {
        for (group, state) in states.iter_mut().enumerate() {
            if kills.done() {
                break;
            }
            let start = FREE + group as u64 * GROUP;
            let list = Buffer {
                addr: lists + group as u64 * PAGE,
                len: (GROUP / PAGE * 4) as u32,
            };
            let (index, next) = match *state {
                State::Used if kills.random().below(2) == 0 => (REPORTING, State::Going),
                State::Used => (INFLATE, State::Going),
                State::Gone => (DEFLATE, State::Coming),
                _ => continue,
            };
            let queue = &mut device.device.queues[index];
            let numbers: Vec<u8> = (start / PAGE..(start + GROUP) / PAGE)
                .flat_map(|n| (n as u32).to_le_bytes())
                .collect();
            memory.write(list.addr, &numbers);
            let head = match index {
                REPORTING => queue.add(
                    &[],
                    &[Buffer {
                        addr: start,
                        len: GROUP as u32,
                    }],
                ),
                _ => queue.add(&[list], &[]),
            };
            chains[index].insert(head.unwrap().into(), group);
            *state = next;
        }
        for queue in &mut device.device.queues {
            queue.publish();
            queue.kick();
        }
        // The supervisor changes the size now and then.
        if kills.random().below(8) == 0 && !kills.done() {
            target += 1;
            let size = Some(target * PAGE);
            let message = ToDevice::Balloon { target: size };
            device.process().control.send(&message, &[]).unwrap();
            while u64::from(sizes(&mut device.device).unwrap().0) != target {
                std::thread::yield_now();
            }
            let actual = target as u32 / 2;
            let frontend = &mut device.device.frontend;
            frontend.set_config(4, &actual.to_le_bytes()).unwrap();
        }
        if kills.strike(&mut device).unwrap() {
            let expected = (
                target as u32,
                if target > 1 { target as u32 / 2 } else { 0 },
            );
            assert_eq!(sizes(&mut device.device).unwrap(), expected);
        }
        let wait = kills.wait().min(Duration::from_millis(1));
        device.device.queues[INFLATE].wait(wait).unwrap();
        for (index, chains) in chains.iter_mut().enumerate() {
            while let Some(used) = device.device.queues[index].take_used() {
                if index == STATS {
                    told += 1;
                    let queue = &mut device.device.queues[STATS];
                    queue.add(&[statistics], &[]).unwrap();
                    continue;
                }
                let group = chains.remove(&used.head).unwrap();
                let start = FREE + group as u64 * GROUP;
                moves += 1;
                let next = match states[group] {
                    State::Going => {
                        assert_eq!(memory.read_vec(start, 4), [0; 4], "group {group}");
                        State::Gone
                    }
                    _ => State::Used,
                };
                // What has come back is the guest's: nobody may free it from now on.
                if next == State::Used || index == REPORTING {
                    for page in (start..start + GROUP).step_by(PAGE as usize) {
                        memory.write(page, &[0xB7; PAGE as usize]);
                    }
                    states[group] = State::Used;
                } else {
                    states[group] = next;
                }
            }
        }
        for (group, state) in states.iter().enumerate() {
            if *state == State::Used {
                let start = FREE + group as u64 * GROUP;
                assert_eq!(memory.read_vec(start, 4), [0xB7; 4], "group {group}");
            }
        }
    }
    for queue in &device.device.queues {
        assert_eq!(queue.strays(), 0, "a chain was returned twice");
    }
    let used = states.iter().filter(|s| **s == State::Used).count() as u64;
    assert!(
        states
            .iter()
            .all(|s| matches!(s, State::Used | State::Gone))
    );
    // The first page of each of the others has been looked at, which brought it back.
    let wanted = used * GROUP + (GROUPS - used) * PAGE;
    assert_eq!(present(&memory, FREE).unwrap(), wanted);
    println!("{moves} moves of 64 pages, {told} statistics, {target} sizes");
    assert!(moves > 0 && told > 0 && target > 1);
    kills.report("anemone-balloon");
}
