//! Device processes are killed at random moments under a guest that works and verifies what it
//! finds. A further device is one more [`Load`] here, a function `load_NAME` in the guest's init, and a
//! line in the list of scenarios.

mod work;

use std::env;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::place::Place;
use anemone_guest_init::protocol::{FIGURES, Pauses};

use crate::sys;
use crate::vm::{Result, Vm};
use work::{Alone, Balloon, Files, Lines, Pmem, Streams};

/// Kills of one device unless the environment variable `ANEMONE_KILLS` says otherwise.
const KILLS: usize = 200;
/// Seed of the moments.
const SEED: u64 = 0x5EED;
/// A process that has served so long, in milliseconds, before it ends is replaced at once; after a
/// shorter time there is a pause (`supervisor/src/run/restart.rs`).
const STEADY: u64 = 100;

/// What the guest does with a device, and what is done with it from outside.
pub struct Load {
    /// Name of the guest's function, `load_NAME`.
    name: &'static str,
    /// The process that is killed.
    program: &'static str,
    /// Id of its device.
    device: &'static str,
    /// Number of the first of its rings on which chains are in flight that the device keeps for later.
    idle_rings: usize,
    /// Begins the host's part.
    begin: fn(&Place) -> Result<Box<dyn Work>>,
}

/// The host's part of a load.
pub trait Work {
    /// Options that make the device, and further words of the guest's kernel command line.
    fn options(&self) -> (Vec<String>, String);

    /// The guest's load has begun.
    fn started(&mut self, _vm: &Vm) -> Result<()> {
        Ok(())
    }

    /// The process was killed, and another one serves the guest.
    fn replaced(&mut self, _vm: &Vm) -> Result<()> {
        Ok(())
    }

    /// There will be no more kills, and the guest's load is about to be ended.
    fn ending(&mut self, _vm: &Vm) -> Result<()> {
        Ok(())
    }

    /// The guest has ended. Looks at everything that was said.
    fn ended(&mut self, said: &str) -> Result<()>;
}

/// Writes to a disk and reads back from it, and fio.
pub const BLK: Load = Load {
    name: "blk",
    program: "anemone-blk",
    device: "disk0",
    idle_rings: usize::MAX,
    begin: |place| Ok(Box::new(Alone::disk(place)?)),
};

/// Makes, moves, reads and removes files, and fio.
pub const FS: Load = Load {
    name: "fs",
    program: "anemone-fs",
    device: "share",
    idle_rings: usize::MAX,
    begin: |place| Ok(Box::new(Files::new(place)?)),
};

/// Reads random bytes.
pub const RNG: Load = Load {
    name: "rng",
    program: "anemone-rng",
    device: "rng",
    idle_rings: usize::MAX,
    begin: |_| Ok(Box::new(Alone::with("--rng"))),
};

/// Writes lines with numbers.
pub const CONSOLE: Load = Load {
    name: "console",
    program: "anemone-console",
    device: "console",
    idle_rings: usize::MAX,
    begin: |_| Ok(Box::new(Lines)),
};

/// TCP streams of both sides, on a tap.
pub const NET: Load = Load {
    name: "net",
    program: "anemone-net",
    device: "net0",
    idle_rings: usize::MAX,
    begin: |place| Ok(Box::new(Streams::net(place)?)),
};

/// Streams of both sides, and short connections.
pub const VSOCK: Load = Load {
    name: "vsock",
    program: "anemone-vsock",
    device: "vsock",
    idle_rings: usize::MAX,
    begin: |place| Ok(Box::new(Streams::vsock(place)?)),
};

/// Memory is filled and read back while the balloon grows and shrinks. The device keeps a buffer for
/// statistics.
pub const BALLOON: Load = Load {
    name: "balloon",
    program: "anemone-balloon",
    device: "balloon",
    idle_rings: 2,
    begin: |place| Ok(Box::new(Balloon::new(place))),
};

/// Numbered pages are written and flushed.
pub const PMEM: Load = Load {
    name: "pmem",
    program: "anemone-pmem",
    device: "pmem0",
    idle_rings: usize::MAX,
    begin: |place| Ok(Box::new(Pmem::new(place)?)),
};

/// Kills the device's process over and over while the guest works.
pub fn run(place: &Place, load: &Load) -> Result<()> {
    let kills = match env::var("ANEMONE_KILLS") {
        Ok(text) => text.parse().map_err(|_| format!("ANEMONE_KILLS={text}"))?,
        Err(_) => KILLS,
    };
    let mut work = (load.begin)(place)?;
    let (mut options, words) = work.options();
    // The devices tell what was in flight.
    let further = ["--restart", "limit=1000000/1", "--log-level", "info"];
    options.extend(further.map(str::to_string));
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let steps = format!("load,poweroff anemone.load={}{words}", load.name);
    let mut vm = Vm::start(place, &steps, &options)?;
    vm.wait_for("guest: load runs")?;
    work.started(&vm)?;
    let serves = format!(
        "device `{}` serves again; the guest has waited ",
        load.device
    );
    let taken = format!("{}[{}]: info: ring ", load.program, load.device);
    let mut from = vm.said().len();
    let (mut random, mut hits, mut pauses) = (SEED, 0, Vec::new());
    while pauses.len() < kills {
        thread::sleep(pause(&mut random));
        let process = vm.process(load.program)?;
        if pauses.len() % 2 == 1 {
            wait_for_work(process.pid);
        }
        sys::kill(process.pid as i32, libc::SIGKILL).map_err(|e| format!("kill: {e}"))?;
        let new = vm
            .wait_for_line(from, &serves)
            .map_err(|e| format!("kill {}: {e}", pauses.len() + 1))?;
        from += new.len();
        if let Some(line) = new.lines().find(|line| line.contains("guest: FAIL")) {
            return Err(format!("after {} kills: {line}", pauses.len()));
        }
        // What the new process says comes before it serves.
        let was_hit = new.lines().filter_map(|line| {
            let ring = line.strip_prefix(&taken)?.split(':').next()?;
            ring.parse::<usize>().ok()
        });
        hits += usize::from(was_hit.into_iter().any(|ring| ring < load.idle_rings));
        pauses.extend(waited(&new, &serves));
        work.replaced(&vm)?;
    }
    work.ending(&vm)?;
    vm.type_text("stop\n")?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: load verified", "guest: done"])?;
    let said = vm.said();
    if said.matches("guest: steps").count() != 1 {
        return Err("the guest has booted again".into());
    }
    work.ended(&said)?;
    println!("{FIGURES}{}", Pauses::new(load.program, hits, pauses));
    let verified = said
        .lines()
        .find(|line| line.contains("guest: load verified"));
    println!("{FIGURES}  {}", verified.unwrap_or_default());
    Ok(())
}

/// The time until the next kill. One in ten comes before the process has served for some time.
fn pause(random: &mut u64) -> Duration {
    let mut below = |bound: u64| {
        *random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) % bound
    };
    let early = below(10) == 0;
    let micros = below(STEADY * 1000);
    Duration::from_micros(if early {
        micros
    } else {
        STEADY * 1000 + micros
    })
}

/// Waits for a moment in which a process begins to run, but not for long: some do little.
fn wait_for_work(pid: u32) {
    let end = Instant::now() + Duration::from_millis(50);
    let before = times_run(pid);
    while times_run(pid) == before && Instant::now() < end {}
}

/// How often the threads of a process have been given a CPU (`schedstat` of proc(5)).
fn times_run(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let count = |task: fs::DirEntry| -> Option<u64> {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(2)?.parse().ok()
    };
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(count)
        .sum()
}

/// How long the guest has waited for the device, in milliseconds.
fn waited(said: &str, serves: &str) -> Option<f64> {
    let line = said.lines().find(|line| line.contains(serves))?;
    let (_, rest) = line.split_once(serves)?;
    rest.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_that_of_the_device() {
        let said = "x device `b` serves again; the guest has waited 9.0 ms\n\
                    x device `a` serves again; the guest has waited 1.5 ms\n";
        let serves = "device `a` serves again; the guest has waited ";
        assert_eq!(waited(said, serves), Some(1.5));
    }

    #[test]
    fn moments_are_random_and_leave_time() {
        let mut random = SEED;
        let all: Vec<_> = (0..1000).map(|_| pause(&mut random)).collect();
        let early = all.iter().filter(|p| p.as_millis() < STEADY.into()).count();
        assert!((50..200).contains(&early), "{early}");
        assert!(all.iter().all(|p| p.as_millis() < 2 * u128::from(STEADY)));
    }
}
