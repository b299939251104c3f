//! Random guests for the software CPU: random code, page tables, descriptors and registers.
//!
//! Whatever they do, the process must not die, a CPU must answer a kick, and nothing outside
//! guest memory may change: guest memory lies between guards, and read-only memory is compared.
//! Guests run in child processes, so that a crash costs one and is reported with its seed.

mod code;
mod guest;
mod machine;
mod random;

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use machine::AnyVm;
use random::Random;

const HELP: &str = "\
Usage: anemone-fuzz [--cases N | --seconds N] [--seed N]
       anemone-fuzz --case SEED

Runs random guests on the software CPU.

  --cases N    guests to run (default 1000)
  --seconds N  run guests for so long
  --seed N     where the seeds of the guests come from (default: the clock)
  --case SEED  run one guest in this process and tell what becomes of it
";

/// Guests per child process.
const BATCH: u64 = 500;

/// A machine on the software CPU.
fn vm(model: &str, cpus: u32) -> Result<AnyVm, String> {
    let code = (0..cpus)
        .map(|_| anemone_accel_soft::code_memory())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| e.to_string())?;
    anemone_accel_soft::SoftVm::new(model, code, &anemone_accel_api::spawn)
        .map(|vm| Arc::new(vm) as AnyVm)
        .map_err(|e| e.to_string())
}

struct Options {
    cases: u64,
    limit: Option<Duration>,
    seed: u64,
    case: Option<u64>,
    worker: Option<u64>,
}

fn options() -> Result<Option<Options>, lexopt::Error> {
    use lexopt::prelude::*;
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let mut options = Options {
        cases: 1000,
        limit: None,
        seed: clock.map_or(1, |d| d.as_nanos() as u64),
        case: None,
        worker: None,
    };
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("cases") => options.cases = parser.value()?.parse()?,
            Long("seconds") => {
                options.limit = Some(Duration::from_secs(parser.value()?.parse()?));
                options.cases = u64::MAX;
            }
            Long("seed") => options.seed = parser.value()?.parse()?,
            Long("case") => options.case = Some(parser.value()?.parse()?),
            Long("worker") => options.worker = Some(parser.value()?.parse()?),
            Long("help") | Short('h') => return Ok(None),
            other => return Err(other.unexpected()),
        }
    }
    Ok(Some(options))
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("error: {error}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    if let Some(seed) = options.case {
        return match machine::run(seed, true) {
            Ok(outcome) => {
                println!("{outcome:?}");
                ExitCode::SUCCESS
            }
            Err(why) => {
                eprintln!("error: {why}");
                ExitCode::FAILURE
            }
        };
    }
    if let Some(seed) = options.worker {
        worker(seed);
        return ExitCode::SUCCESS;
    }
    parent(&options)
}

/// Runs a batch; one line before each guest and one after it.
fn worker(seed: u64) {
    let mut seeds = Random::new(seed);
    let mut out = std::io::stdout().lock();
    for _ in 0..BATCH {
        let seed = seeds.bits();
        // A parent that is gone ends this process through the broken pipe.
        let said = writeln!(out, "run {seed}").and_then(|()| out.flush());
        let answer = match machine::run(seed, false) {
            Ok(o) => format!("ok {} {} {} {}", o.shutdowns, o.errors, o.kicked, o.bus),
            Err(why) => format!("bad {why}"),
        };
        if said.and_then(|()| writeln!(out, "{answer}")).is_err() {
            return;
        }
    }
}

#[derive(Default)]
struct Totals {
    guests: u64,
    counts: [u64; 4],
    bad: Vec<String>,
}

fn parent(options: &Options) -> ExitCode {
    let start = Instant::now();
    let mut told = start;
    let mut totals = Totals::default();
    let mut seeds = Random::new(options.seed);
    println!("seed {}", options.seed);
    let over = |totals: &Totals| {
        totals.guests >= options.cases || options.limit.is_some_and(|l| start.elapsed() > l)
    };
    while !over(&totals) {
        if let Err(error) = batch(seeds.bits(), &mut totals, &over) {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            println!(
                "{} guests in {} s, {} bad",
                totals.guests,
                start.elapsed().as_secs(),
                totals.bad.len()
            );
        }
    }
    let [shutdowns, errors, kicked, bus] = totals.counts;
    println!(
        "{} guests in {} s: {kicked} CPUs ran on, {shutdowns} triple faults, {errors} ended by the \
         engine, {bus} bus accesses; {} bad",
        totals.guests,
        start.elapsed().as_secs(),
        totals.bad.len()
    );
    if totals.bad.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Runs a child and adds up what it says.
fn batch(seed: u64, totals: &mut Totals, over: &impl Fn(&Totals) -> bool) -> std::io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--worker")
        .arg(seed.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let (mut running, mut ended) = (None, false);
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line?;
            match line.split_once(' ') {
                _ if ended => {}
                Some(("run", seed)) => running = Some(seed.to_owned()),
                Some(("ok", counts)) => {
                    running = None;
                    totals.guests += 1;
                    for (sum, n) in totals.counts.iter_mut().zip(counts.split(' ')) {
                        *sum += n.parse::<u64>().unwrap_or(0);
                    }
                }
                Some(("bad", why)) => {
                    totals.guests += 1;
                    report(totals, running.take(), why);
                }
                _ => {}
            }
            if over(totals) && running.is_none() && !ended {
                child.kill()?;
                ended = true;
            }
        }
    }
    let status = child.wait()?;
    // A child that was ended here may have begun another guest meanwhile.
    if running.is_some() && !ended {
        totals.guests += 1;
        report(totals, running, &status.to_string());
    }
    Ok(())
}

fn report(totals: &mut Totals, seed: Option<String>, why: &str) {
    let seed = seed.unwrap_or_default();
    println!("BAD: {why}; again with: anemone-fuzz --case {seed}");
    totals.bad.push(seed);
}
