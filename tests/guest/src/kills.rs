//! Device processes are killed at random moments under a guest that works and verifies what it
//! finds. A further device is one more [`Load`] here, a function `load_NAME` in the guest's init, and a
//! line in the list of scenarios.

use std::env;
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::place::Place;

use crate::vm::{self, Result, Vm};

/// Kills of one device unless the environment variable `ANEMONE_KILLS` says otherwise.
const KILLS: u32 = 20;
/// Seed of the moments.
const SEED: u64 = 0x5EED;
/// Longest pause between a device's return and its next end, in milliseconds.
const LONGEST: u64 = 300;

/// What the guest does with a device, and how its work is looked at from outside.
pub struct Load {
    /// Name of the guest's function, `load_NAME`.
    name: &'static str,
    /// The process that is killed.
    program: &'static str,
    /// Id of its device.
    device: &'static str,
    /// Options that make the device.
    options: fn(&Place) -> Result<Vec<String>>,
    /// Looks at everything that was said.
    check: fn(&str) -> Result<()>,
}

/// Writes to a disk and reads back from it.
pub const BLK: Load = Load {
    name: "blk",
    program: "anemone-blk",
    device: "disk0",
    options: |place| {
        let image = place.scratch("load.img");
        vm::make_disk(place, &image, 8192, 7)?;
        Ok(vec!["--disk".into(), format!("path={image}")])
    },
    check: |_| Ok(()),
};

/// Makes, moves, reads and removes files.
pub const FS: Load = Load {
    name: "fs",
    program: "anemone-fs",
    device: "share",
    options: |place| {
        let folder = place.scratch("load-share");
        std::fs::create_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
        Ok(vec![
            "--fs".into(),
            format!("tag=share,path={folder},id=share"),
        ])
    },
    check: |_| Ok(()),
};

/// Reads random bytes.
pub const RNG: Load = Load {
    name: "rng",
    program: "anemone-rng",
    device: "rng",
    options: |_| Ok(vec!["--rng".into()]),
    check: |_| Ok(()),
};

/// Writes lines with numbers.
pub const CONSOLE: Load = Load {
    name: "console",
    program: "anemone-console",
    device: "console",
    options: |_| Ok(Vec::new()),
    check: every_line_once,
};

/// Kills the device's process over and over while the guest works.
pub fn run(place: &Place, load: &Load) -> Result<()> {
    let kills = match env::var("ANEMONE_KILLS") {
        Ok(text) => text.parse().map_err(|_| format!("ANEMONE_KILLS={text}"))?,
        Err(_) => KILLS,
    };
    let steps = format!("load,poweroff anemone.load={}", load.name);
    let mut options = (load.options)(place)?;
    options.extend(["--restart".into(), "limit=1000000/1".into()]);
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let mut vm = Vm::start(place, &steps, &options)?;
    vm.wait_for("guest: load runs")?;
    let mut random = SEED;
    for kill in 1..=kills {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        thread::sleep(Duration::from_millis((random >> 33) % LONGEST));
        vm.kill(load.program)?;
        let end = Instant::now() + place.patience;
        while pauses(&vm.said(), load.device).len() < kill as usize {
            if Instant::now() > end {
                return Err(format!("kill {kill}: the device has not come back"));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
    vm.type_text("stop\n")?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: load verified", "guest: done"])?;
    let said = vm.said();
    if said.matches("guest: steps").count() != 1 {
        return Err("the guest has booted again".into());
    }
    (load.check)(&said)?;
    let mut pauses = pauses(&said, load.device);
    pauses.sort_by(f64::total_cmp);
    let share = |percent: usize| pauses[(pauses.len() - 1) * percent / 100];
    println!(
        "figures: {kills} kills of {}: the guest has waited {:.1} ms (p50), {:.1} ms (p99), {:.1} ms \
         (longest)",
        load.program,
        share(50),
        share(99),
        share(100)
    );
    Ok(())
}

/// How long the guest has waited for the device each time, in milliseconds.
fn pauses(said: &str, device: &str) -> Vec<f64> {
    let wanted = format!("device `{device}` serves again; the guest has waited ");
    let pause = |line: &str| {
        let (_, rest) = line.split_once(&wanted)?;
        rest.split(' ').next()?.parse().ok()
    };
    said.lines().filter_map(pause).collect()
}

/// The guest's numbered lines are all there, once, in order.
fn every_line_once(said: &str) -> Result<()> {
    let mut expected = 1u64;
    for line in said.lines() {
        let Some(number) = line.strip_prefix("guest: line ") else {
            continue;
        };
        if number.parse() != Ok(expected) {
            return Err(format!("line {number} came where {expected} belongs"));
        }
        expected += 1;
    }
    match expected {
        0..100 => Err(format!("only {expected} lines have come")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_doubled_and_swapped_lines_are_found() {
        let text = |numbers: &mut dyn Iterator<Item = u64>| -> String {
            numbers.map(|n| format!("guest: line {n}\n")).collect()
        };
        assert!(every_line_once(&text(&mut (1..200))).is_ok());
        assert!(every_line_once(&text(&mut (1..50))).is_err());
        assert!(every_line_once(&text(&mut (1..200).filter(|n| *n != 77))).is_err());
        assert!(every_line_once(&text(&mut (1..200).chain([199]))).is_err());
    }

    #[test]
    fn pauses_are_those_of_the_device() {
        let said = "x device `a` serves again; the guest has waited 1.5 ms\n\
                    x device `b` serves again; the guest has waited 9.0 ms\n\
                    x device `a` serves again; the guest has waited 2.0 ms\n";
        assert_eq!(pauses(said, "a"), [1.5, 2.0]);
    }
}
