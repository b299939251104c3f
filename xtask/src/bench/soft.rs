//! `bench soft`: our software CPU beside QEMU's (TCG) and the host's own: the boot of a stock
//! kernel, and loops of `tests/guestbench` in the guest.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_bench::protocol::{Done, Line};
use anemone_guest_bench::{LOOPS, Loop};
use anemone_guest_init::jail;
use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::build::{self, Binaries};
use crate::packages::{self, Packages};
use crate::table::{Table, decimal, publish};
use crate::{initramfs, sh};

use super::median;
use super::start::cpu_millis;

const MEMORY_MIB: u32 = 512;
/// Silence of a guest after which it counts as hung.
const SILENCE: Duration = Duration::from_secs(120);
/// What stands for the boot in `--only`.
const BOOT: &str = "boot";
/// Most seconds to user space.
const BOOT_GOAL: f64 = 15.0;

/// What runs the loops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// `anemone run --accel soft`.
    Soft,
    /// QEMU with `-accel tcg -cpu max -M q35`.
    Tcg,
    /// The host's own CPU.
    Native,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Engine::Soft => "anemone soft",
            Engine::Tcg => "QEMU TCG",
            Engine::Native => "native",
        }
    }
}

/// What is measured.
#[derive(Debug)]
pub struct Plan {
    /// Measurements of each engine.
    pub runs: usize,
    /// Length of a loop.
    pub millis: u32,
    /// Names of loops, and `boot`; all if empty.
    pub only: Vec<String>,
    /// Engines that take turns.
    pub engines: Vec<Engine>,
}

/// The programs of all engines.
struct Programs {
    packages: Packages,
    product: Option<Binaries>,
    bench: PathBuf,
    initramfs: PathBuf,
}

/// A goal of a loop.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Goal {
    /// So many units a second.
    Rate(f64),
    /// More than TCG.
    Faster,
}

/// Measurements of one loop on one engine.
#[derive(Debug, Default)]
struct Samples {
    /// Single things counted per second of CPU time.
    rate: Vec<f64>,
    /// The same by the clock of the system that ran the loop.
    own_rate: Vec<f64>,
    /// Million instructions per second of CPU time.
    mips: Vec<f64>,
}

/// Everything measured on one engine.
#[derive(Debug, Default)]
struct Results {
    boot_wall: Vec<f64>,
    boot_cpu: Vec<f64>,
    loops: HashMap<String, Samples>,
}

/// A line of a guest, and what the clocks showed when it came.
struct Event {
    line: Line,
    at: Instant,
    cpu_millis: f64,
}

/// Measures all engines, taking turns.
pub fn run(plan: &Plan) -> Result<()> {
    for name in &plan.only {
        ensure!(
            name == BOOT || LOOPS.iter().any(|l| l.name == name),
            "nothing is called \"{name}\"; there are {BOOT}, {}",
            LOOPS.iter().map(|l| l.name).collect::<Vec<_>>().join(", ")
        );
    }
    let wanted = |name: &str| plan.only.is_empty() || plan.only.iter().any(|n| n == name);
    let loops: Vec<&Loop> = LOOPS.iter().filter(|l| wanted(l.name)).collect();
    let packages = packages::fetch()?;
    let bench = build::program("anemone-guest-bench")?;
    let programs = Programs {
        initramfs: initramfs::bench(&packages, &bench)?,
        product: match plan.engines.contains(&Engine::Soft) {
            true => Some(build::full()?),
            false => None,
        },
        packages,
        bench,
    };
    let mut results: BTreeMap<&str, Results> = BTreeMap::new();
    for round in 1..=plan.runs {
        for &engine in &plan.engines {
            sh::progress(format_args!(
                "{}, round {round} of {}",
                engine.name(),
                plan.runs
            ));
            let command = programs.command(engine, plan.millis, &loops)?;
            measure(command, results.entry(engine.name()).or_default())?;
        }
    }
    let of = |engine: Engine| results.get(engine.name());
    let mut tables = Vec::new();
    if wanted(BOOT) {
        tables.push(boot_table(of(Engine::Soft), of(Engine::Tcg)));
    }
    if !loops.is_empty() {
        let all = [Engine::Soft, Engine::Tcg, Engine::Native].map(of);
        tables.push(loop_table(&loops, all, plan.runs));
    }
    publish("soft", &tables)
}

impl Programs {
    fn command(&self, engine: Engine, millis: u32, loops: &[&Loop]) -> Result<Command> {
        let names: Vec<&str> = loops.iter().map(|l| l.name).collect();
        let names = names.join(",");
        // A serial port, because both VMMs have the same kind and the kernel needs no module.
        let kernel_line =
            format!("console=ttyS0 quiet panic=-1 BENCH_MILLIS={millis} BENCH_LOOPS={names}");
        let command = match engine {
            Engine::Soft => {
                let Some(product) = &self.product else {
                    bail!("the product has not been built");
                };
                let mut command = product.command("anemone");
                command
                    .args(["run", "--accel", "soft", "--cpus", "1", "--memory"])
                    .arg(format!("{MEMORY_MIB}M"))
                    .args(["--console", "none", "--serial", "stdio"])
                    .arg("--kernel")
                    .arg(self.packages.kernel())
                    .arg("--initrd")
                    .arg(&self.initramfs)
                    .arg("--cmdline")
                    .arg(kernel_line);
                command
            }
            Engine::Tcg => {
                let mut command = self.packages.qemu()?;
                command
                    .args(["-accel", "tcg", "-cpu", "max", "-M", "q35", "-smp", "1"])
                    .arg("-m")
                    .arg(MEMORY_MIB.to_string())
                    .args(["-nodefaults", "-no-user-config", "-no-reboot"])
                    .args(["-display", "none", "-serial", "stdio"])
                    .arg("-kernel")
                    .arg(self.packages.kernel())
                    .arg("-initrd")
                    .arg(&self.initramfs)
                    .arg("-append")
                    .arg(kernel_line);
                command
            }
            Engine::Native => {
                let mut command = Command::new(&self.bench);
                command.arg(millis.to_string()).arg(names);
                command
            }
        };
        Ok(command)
    }
}

/// Follows a guest, or the same program on the host, until no loop is left.
fn measure(mut command: Command, results: &mut Results) -> Result<()> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    let began = Instant::now();
    let mut child = sh::spawn(&mut command)?;
    let events = follow(child.0.id(), child.0.stdout.take());
    // Whether a guest has come up: the CPU time of its VMM is read from outside. Without one, the
    // program tells its own.
    let mut guest = false;
    let mut start: Option<Event> = None;
    let mut log = String::new();
    loop {
        let event = match events.recv_timeout(SILENCE) {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => bail!("the guest hangs; it said\n{log}"),
            Err(RecvTimeoutError::Disconnected) => {
                let status = child.0.wait()?;
                bail!("ended early ({status}); the guest said\n{log}");
            }
        };
        match &event.line {
            Line::Up => {
                guest = true;
                let wall = event.at.duration_since(began).as_secs_f64();
                results.boot_wall.push(wall);
                results.boot_cpu.push(event.cpu_millis / 1e3);
            }
            Line::Start(_) => start = Some(event),
            Line::End(name, done) => {
                let cpu = match (guest, start.take()) {
                    (true, Some(start)) => (event.cpu_millis - start.cpu_millis) / 1e3,
                    (true, None) => bail!("{name} ended without a start"),
                    (false, _) => done.cpu as f64 / 1e9,
                };
                results
                    .loops
                    .entry(name.clone())
                    .or_default()
                    .add(done, cpu);
            }
            Line::Skip(name, why) => sh::progress(format_args!("without {name}: {why}")),
            Line::Fail(name, what) => bail!("{name}: {what}"),
            Line::Finished => return Ok(()),
            Line::Other(text) => {
                log.push_str(text);
                log.push('\n');
            }
        }
    }
}

/// Reads lines on a thread of its own, so that the clocks are read as each one comes.
fn follow(pid: u32, output: Option<ChildStdout>) -> Receiver<Event> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let lines = output.map(BufReader::new).into_iter().flat_map(lossy_lines);
        for text in lines {
            let at = Instant::now();
            let cpu_millis = jail::family(pid)
                .iter()
                .filter_map(|process| cpu_millis(process.pid))
                .sum();
            let line = Line::parse(&text);
            let event = Event {
                line,
                at,
                cpu_millis,
            };
            if sender.send(event).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Lines until the end or an error; a firmware's may be no text.
fn lossy_lines(reader: impl BufRead) -> impl Iterator<Item = String> {
    reader
        .split(b'\n')
        .map_while(Result::ok)
        .map(|line| String::from_utf8_lossy(&line).into_owned())
}

impl Samples {
    fn add(&mut self, done: &Done, cpu_seconds: f64) {
        self.rate.push(done.count as f64 / cpu_seconds);
        self.own_rate
            .push(done.count as f64 / (done.wall as f64 / 1e9));
        if done.instructions > 0 {
            self.mips.push(done.instructions as f64 / cpu_seconds / 1e6);
        }
    }
}

fn boot_table(soft: Option<&Results>, tcg: Option<&Results>) -> Table {
    let mut table = Table::new(
        "Seconds from exec to the first byte of the guest's user space (medians)",
        &["VMM", "seconds", "CPU s", "of TCG", "CPU of TCG", "goal"],
    );
    let medians = |results: &Results| (median(&results.boot_wall), median(&results.boot_cpu));
    let reference = tcg.map(medians);
    for (engine, results) in [(Engine::Soft, soft), (Engine::Tcg, tcg)] {
        let Some((wall, cpu)) = results.map(medians) else {
            continue;
        };
        let goal = match engine {
            Engine::Soft => verdict(&format!("at most {BOOT_GOAL} s"), wall <= BOOT_GOAL),
            _ => Value::Null,
        };
        table.row(vec![
            engine.name().into(),
            decimal(wall),
            decimal(cpu),
            number(reference.map(|r| wall / r.0)),
            number(reference.map(|r| cpu / r.1)),
            goal,
        ]);
    }
    table
}

/// Columns of our engine, TCG and the host, of which each may be missing.
fn loop_table(loops: &[&Loop], all: [Option<&Results>; 3], runs: usize) -> Table {
    let mut table = Table::new(
        &format!(
            "In the guest, per second of the VMM's CPU time (medians of {runs}); of TCG: more than \
             1 is faster"
        ),
        &[
            "loop",
            "unit",
            "soft",
            "TCG",
            "native",
            "of TCG",
            "guest clock",
            "native/soft",
            "soft MIPS",
            "TCG MIPS",
            "goal",
        ],
    );
    for l in loops {
        let samples = all.map(|results| results.and_then(|r| r.loops.get(l.name)));
        let [soft, tcg, native] = samples.map(|s| middle(s, |s| &s.rate));
        let [soft_own, tcg_own, _] = samples.map(|s| middle(s, |s| &s.own_rate));
        let [soft_mips, tcg_mips, _] = samples.map(|s| middle(s, |s| &s.mips));
        let unit = |rate: Option<f64>| number(rate.map(|r| r / f64::from(l.scale)));
        let goal = match (goal(l.name), soft, ratio(soft, tcg)) {
            (Some(Goal::Rate(least)), Some(soft), _) => {
                let least_shown = least / f64::from(l.scale);
                verdict(&format!("at least {least_shown}"), soft >= least)
            }
            (Some(Goal::Faster), _, Some(ratio)) => verdict("faster than TCG", ratio > 1.0),
            _ => Value::Null,
        };
        table.row(vec![
            l.name.into(),
            l.unit.into(),
            unit(soft),
            unit(tcg),
            unit(native),
            number(ratio(soft, tcg)),
            number(ratio(soft_own, tcg_own)),
            number(ratio(native, soft)),
            number(soft_mips),
            number(tcg_mips),
            goal,
        ]);
    }
    table
}

/// What issue and design ask of a loop.
fn goal(name: &str) -> Option<Goal> {
    match name {
        "alu" => Some(Goal::Rate(100e6)),
        "memcpy-sse" | "memcpy-avx2" | "matrix-avx2" => Some(Goal::Faster),
        _ => None,
    }
}

fn verdict(goal: &str, met: bool) -> Value {
    format!("{goal}: {}", if met { "met" } else { "missed" }).into()
}

fn middle(samples: Option<&Samples>, values: impl Fn(&Samples) -> &Vec<f64>) -> Option<f64> {
    samples
        .map(values)
        .filter(|v| !v.is_empty())
        .map(|v| median(v))
}

fn ratio(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    Some(a? / b?)
}

fn number(value: Option<f64>) -> Value {
    value.map_or(Value::Null, decimal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(rate: u64) -> Results {
        let mut results = Results::default();
        let done = Done {
            count: rate,
            instructions: rate,
            wall: 2_000_000_000,
            cpu: 0,
        };
        let samples = results.loops.entry("alu".into()).or_default();
        samples.add(&done, 1.0);
        results
    }

    #[test]
    fn rates_are_per_cpu_second_and_goals_are_judged() {
        let (soft, tcg) = (results(90_000_000), results(30_000_000));
        let text = loop_table(&[&LOOPS[0]], [Some(&soft), Some(&tcg), None], 1).text();
        let row: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        let row = row.join(" ");
        assert_eq!(
            row,
            "alu M instructions/s 90.00 30.00 3.00 3.00 90.00 30.00 at least 100: missed"
        );
    }

    #[test]
    fn every_goal_is_of_a_loop_that_exists() {
        let with_goal = LOOPS.iter().filter(|l| goal(l.name).is_some()).count();
        assert_eq!(with_goal, 4);
    }
}
