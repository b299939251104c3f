//! What benchmarks measure with, and what their clients have in common.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::new_fd;

/// Processor time of all threads of a process, from its scheduler statistics: the ones that have
/// ended are not in it.
///
/// # Errors
/// The process is gone.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let mut nanos = 0u64;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let first = text.split_whitespace().next();
        nanos += first.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}

/// [`cpu_time`] of a process, its children and theirs.
///
/// # Errors
/// The process is gone.
pub fn cpu_time_of_family(pid: u32) -> io::Result<Duration> {
    let mut time = cpu_time(pid)?;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let children = std::fs::read_to_string(task?.path().join("children"))?;
        for child in children.split_whitespace().flat_map(str::parse) {
            time += cpu_time_of_family(child)?;
        }
    }
    Ok(time)
}

/// Which way a load goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// From the guest, as fast as it goes.
    Tx,
    /// To the guest.
    Rx,
    /// One thing at a time, to the peer and back.
    Ping,
}

/// What a client is to measure, and the raw round trip.
#[derive(Debug)]
pub struct Load {
    /// The device's program.
    pub program: String,
    /// Which way.
    pub kind: Kind,
    seconds: f64,
    raw: RoundTrip,
}

impl Load {
    /// Measures the raw round trip, and reads the command line: pairs of an option and its value. `other` takes those that only this
    /// client has, and says whether it knows them.
    ///
    /// # Errors
    /// An option or a value is none.
    pub fn parse(
        mut other: impl FnMut(&str, &str) -> Result<bool, Box<dyn Error>>,
    ) -> Result<Self, Box<dyn Error>> {
        let mut load = Self {
            program: String::new(),
            kind: Kind::Tx,
            seconds: 3.0,
            raw: round_trip(Duration::from_millis(500))?,
        };
        let mut args = std::env::args().skip(1);
        while let Some(name) = args.next() {
            let value = args.next().ok_or(format!("{name} needs a value"))?;
            match (name.as_str(), value.as_str()) {
                ("--program", _) => load.program = value,
                ("--load", "tx") => load.kind = Kind::Tx,
                ("--load", "rx") => load.kind = Kind::Rx,
                ("--load", "ping") => load.kind = Kind::Ping,
                ("--seconds", _) => load.seconds = value.parse()?,
                (name, value) if other(name, value)? => {}
                _ => return Err(format!("cannot use {name} {value}").into()),
            }
        }
        Ok(load)
    }

    /// Measures the process `pid` and prints the client's line: what is counted each second, the
    /// processor time of the process for each `unit` of it and each way, the time of a round trip, and
    /// the raw figures. `run` does the load for so many seconds and counts.
    ///
    /// # Errors
    /// The load fails.
    pub fn measure(
        &self,
        pid: u32,
        unit: f64,
        mut run: impl FnMut(f64) -> Result<u64, Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        run(self.seconds / 10.0)?;
        let cpu = cpu_time(pid)?;
        let start = Instant::now();
        let count = run(self.seconds)?.max(1) as f64;
        let seconds = start.elapsed().as_secs_f64();
        let cpu = cpu_time(pid)?.saturating_sub(cpu).as_nanos() as f64;
        let (ways, round_trip) = match self.kind {
            Kind::Ping => (2.0, 1e9 * seconds / count),
            Kind::Tx | Kind::Rx => (1.0, 0.0),
        };
        println!(
            "{{\"per_second\": {:.0}, \"cpu_ns\": {:.1}, \"round_trip_ns\": {round_trip:.0}, \
             \"raw_round_trip_ns\": {}, \"raw_cpu_ns\": {}}}",
            count / seconds,
            cpu * unit / (ways * count),
            self.raw.time.as_nanos(),
            self.raw.cpu.as_nanos(),
        );
        Ok(())
    }
}

/// The raw eventfd round trip.
#[derive(Debug, Clone, Copy)]
pub struct RoundTrip {
    /// From one answer to the next.
    pub time: Duration,
    /// Processor time of the side that answers.
    pub cpu: Duration,
}

/// Measures for `time` how long it takes to wake another thread by an eventfd and to be woken by it
/// in turn: what no request over a virtqueue can be faster than.
///
/// # Errors
/// No eventfd can be had.
///
/// # Panics
/// The other thread has panicked.
pub fn round_trip(time: Duration) -> io::Result<RoundTrip> {
    let pair = Arc::new((eventfd()?, eventfd()?));
    let stop = Arc::new(AtomicBool::new(false));
    let answering = {
        let (pair, stop) = (Arc::clone(&pair), Arc::clone(&stop));
        thread::spawn(move || {
            while wait(&pair.0) && !stop.load(Ordering::Relaxed) {
                set(&pair.1);
            }
            thread_time()
        })
    };
    let start = Instant::now();
    let mut count = 0u32;
    while start.elapsed() < time {
        set(&pair.0);
        wait(&pair.1);
        count += 1;
    }
    let elapsed = start.elapsed();
    stop.store(true, Ordering::Relaxed);
    set(&pair.0);
    let Ok(cpu) = answering.join() else {
        panic!("the answering thread has failed");
    };
    Ok(RoundTrip {
        time: elapsed / count.max(1),
        cpu: cpu / count.max(1),
    })
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    new_fd(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })
}

fn set(fd: &OwnedFd) {
    // SAFETY: the buffer is 8 bytes long and outlives the call.
    unsafe { libc::write(fd.as_raw_fd(), 1u64.to_ne_bytes().as_ptr().cast(), 8) };
}

fn wait(fd: &OwnedFd) -> bool {
    let mut count = [0u8; 8];
    // SAFETY: the buffer is 8 bytes long and outlives the call.
    unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), 8) == 8 }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills in the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_trip_takes_time() {
        let measured = round_trip(Duration::from_millis(20)).unwrap();
        assert!(measured.time > Duration::ZERO && measured.cpu > Duration::ZERO);
        assert!(cpu_time(std::process::id()).unwrap() > Duration::ZERO);
    }
}
