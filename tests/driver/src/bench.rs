//! What benchmarks measure with.

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
