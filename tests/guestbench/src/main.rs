//! Measures a CPU from inside: runs loops for about as long as asked each, and tells on standard
//! output when each begins and ends and what it did. Runs in the guests of `cargo xtask bench
//! soft`, and in the same way on the host.
//!
//! `anemone-guest-bench MILLISECONDS NAME,NAME,…`

mod loops;
mod sha256;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anemone_guest_bench::LOOPS;
use anemone_guest_bench::protocol::{Done, Line};

use loops::Work;

/// Rest after each line, in which the host looks at clocks.
const PAUSE: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (millis, names) = (arguments.next(), arguments.next().unwrap_or_default());
    let Some(millis) = millis.and_then(|text| text.parse().ok()) else {
        eprintln!("usage: anemone-guest-bench MILLISECONDS NAME,NAME,...");
        return ExitCode::FAILURE;
    };
    let wanted = |name| names.split(',').any(|n| n == name);
    let result = LOOPS
        .iter()
        .filter(|l| wanted(l.name))
        .try_for_each(|l| measure(l.name, Duration::from_millis(millis)))
        .and_then(|()| tell(&Line::Finished));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn measure(name: &str, target: Duration) -> io::Result<()> {
    let mut work = match loops::prepare(name) {
        Ok(work) => work,
        Err(why) => return tell(&Line::Skip(name.into(), why.into())),
    };
    match calibrate(&mut work, target) {
        Ok(turns) => {
            tell(&Line::Start(name.into()))?;
            let (wall, cpu) = (Instant::now(), cpu_time());
            let result = (work.run)(turns);
            let done = Done {
                count: turns * work.count,
                instructions: turns * work.instructions,
                wall: wall.elapsed().as_nanos() as u64,
                cpu: (cpu_time() - cpu).as_nanos() as u64,
            };
            match result {
                Ok(()) => tell(&Line::End(name.into(), done)),
                Err(what) => tell(&Line::Fail(name.into(), what)),
            }
        }
        Err(what) => tell(&Line::Fail(name.into(), what)),
    }
}

/// Turns that take about as long as `target`, at least one. Finding out warms everything up.
fn calibrate(work: &mut Work, target: Duration) -> Result<u64, String> {
    let mut turns = 1;
    loop {
        let start = Instant::now();
        (work.run)(turns)?;
        let elapsed = start.elapsed();
        if elapsed * 5 >= target {
            let scaled = turns as f64 * target.as_secs_f64() / elapsed.as_secs_f64();
            return Ok((scaled as u64).max(1));
        }
        turns *= 2;
    }
}

/// CPU time of this process and of its children that have ended.
fn cpu_time() -> Duration {
    [libc::RUSAGE_SELF, libc::RUSAGE_CHILDREN]
        .into_iter()
        .map(|who| {
            // SAFETY: all-zero is a valid value of the struct.
            let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
            // SAFETY: the pointer is to a live struct that the call fills. It cannot fail with
            // these arguments.
            unsafe { libc::getrusage(who, &raw mut usage) };
            duration(usage.ru_utime) + duration(usage.ru_stime)
        })
        .sum()
}

fn duration(time: libc::timeval) -> Duration {
    Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
}

/// Writes a line, waits until a serial port has sent it, and rests.
fn tell(line: &Line) -> io::Result<()> {
    writeln!(io::stdout(), "{line}")?;
    // SAFETY: no pointers. A pipe has nothing to drain, and says so with an error.
    unsafe { libc::tcdrain(libc::STDOUT_FILENO) };
    std::thread::sleep(PAUSE);
    Ok(())
}
