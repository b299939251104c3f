//! Load for a virtio-fs server, ours or another, without a guest: plays the driver and prints one line of
//! JSON.
//!
//! ```text
//! fs-bench --socket PATH --pid PID --load read|write|stat|create [--block BYTES] [--depth N] [--seconds S]
//! {"per_second": …, "cpu_ns": …, "round_trip_ns": …, "raw_round_trip_ns": …, "raw_cpu_ns": …}
//! ```
//!
//! `read` and `write` go through the file `data` of the shared directory from its beginning to its end and
//! over again, with `depth` requests of `block` bytes in flight. `stat` asks for the attributes of that file by
//! its name. `create` makes a file, closes it and removes it: four requests that count as one. `cpu_ns`
//! is the processor time of the server, its children included, for each. The raw figures are those of two
//! threads that wake each other by eventfds, measured just before.

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anemone_driver::fs::{Args, Call, Mount, ROOT, Requests, op, read_args, write_call};
use anemone_driver::{Device, Options, bench};

/// The queue of ordinary requests.
const QUEUE: usize = 1;
/// Requests that are made while the file is looked up.
const SHORT: u32 = 4096;
const PATIENCE: Duration = Duration::from_secs(10);
const FILE: &str = "data";

struct Load {
    socket: String,
    pid: u32,
    kind: Kind,
    block: u32,
    depth: usize,
    seconds: f64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Stat,
    Create,
}

fn parse() -> Result<Load, Box<dyn Error>> {
    let mut load = Load {
        socket: String::new(),
        pid: 0,
        kind: Kind::Read,
        block: 128 << 10,
        depth: 1,
        seconds: 3.0,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or(format!("{name} needs a value"))?;
        match (name.as_str(), value.as_str()) {
            ("--socket", _) => load.socket = value,
            ("--pid", _) => load.pid = value.parse()?,
            ("--load", "read") => load.kind = Kind::Read,
            ("--load", "write") => load.kind = Kind::Write,
            ("--load", "stat") => load.kind = Kind::Stat,
            ("--load", "create") => load.kind = Kind::Create,
            ("--block", _) => load.block = value.parse()?,
            ("--depth", _) => load.depth = value.parse()?,
            ("--seconds", _) => load.seconds = value.parse()?,
            _ => return Err(format!("cannot use {name} {value}").into()),
        }
    }
    if load.block == 0 || load.depth == 0 {
        return Err("--block and --depth are 1 at least".into());
    }
    Ok(load)
}

fn main() -> Result<(), Box<dyn Error>> {
    let load = parse()?;
    let raw = bench::round_trip(Duration::from_millis(500))?;
    let options = Options {
        queues: 2,
        memory: (4 << 20) + 2 * load.depth as u64 * u64::from(load.block + 2 * SHORT),
        ..Options::default()
    };
    let mut device = Device::connect(UnixStream::connect(&load.socket)?, &options)?;
    let memory = device.memory.clone();
    let queue = &mut device.queues[QUEUE];
    let failed = |error: i32| format!("{FILE}: error {error}");
    let mut mount = Mount::new(&memory, queue, SHORT)?;
    let file = mount.lookup(ROOT, FILE).map_err(failed)?;
    let handle = mount.open(file.nodeid, libc::O_RDWR).map_err(failed)?;
    let size = file.attr.size - file.attr.size % u64::from(load.block);
    if size == 0 {
        return Err(format!("{FILE} is shorter than a block").into());
    }
    let mut place = 0;
    let mut next = || {
        let at = place;
        place = (place + u64::from(load.block)) % size;
        if load.kind == Kind::Write {
            return write_call(file.nodeid, handle, at, load.block, libc::O_RDWR);
        }
        Call {
            opcode: op::READ,
            nodeid: file.nodeid,
            args: read_args(handle, at, load.block).done(),
            data: 0,
            room: Some(load.block),
        }
    };
    let queue_size = device.queues[QUEUE].size();
    let mut requests = Requests::new(&memory, queue_size, load.depth, load.block);
    let mut run = |seconds: f64| -> Result<u64, Box<dyn Error>> {
        let start = Instant::now();
        let time_left = || start.elapsed().as_secs_f64() < seconds;
        match load.kind {
            Kind::Read | Kind::Write => {
                let queue = &mut device.queues[QUEUE];
                let mut ended = 0;
                let mut more = true;
                loop {
                    while more && requests.submit(&memory, queue, &next()).is_some() {}
                    queue.publish();
                    queue.kick();
                    if requests.in_flight() == 0 {
                        return Ok(ended);
                    }
                    if !queue.wait(PATIENCE)? {
                        return Err("the server does not answer".into());
                    }
                    while let Some((_, reply)) = requests.finish_unread(&memory, queue) {
                        match reply {
                            Some(Ok(_)) => ended += 1,
                            other => return Err(format!("a request failed: {other:?}").into()),
                        }
                    }
                    more = time_left();
                }
            }
            Kind::Stat | Kind::Create => {
                let queue = &mut device.queues[QUEUE];
                let mut mount = Mount::unmounted(&memory, queue, SHORT);
                let mut ended = 0;
                while time_left() {
                    if load.kind == Kind::Stat {
                        mount.lookup(ROOT, FILE).map_err(failed)?;
                    } else {
                        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
                        let (entry, handle) =
                            mount.create(ROOT, "new", flags, 0o644).map_err(failed)?;
                        mount.release(entry.nodeid, handle).map_err(failed)?;
                        mount
                            .call(op::UNLINK, ROOT, Args::new().name("new"), 0)
                            .map_err(failed)?;
                        mount.forget(entry.nodeid, 1);
                    }
                    ended += 1;
                }
                Ok(ended)
            }
        }
    };
    run(load.seconds / 10.0)?;
    let cpu = bench::cpu_time_of_family(load.pid)?;
    let start = Instant::now();
    let count = run(load.seconds)?.max(1) as f64;
    let seconds = start.elapsed().as_secs_f64();
    let cpu = bench::cpu_time_of_family(load.pid)?.saturating_sub(cpu);
    println!(
        "{{\"per_second\": {:.1}, \"cpu_ns\": {:.0}, \"round_trip_ns\": {:.0}, \
         \"raw_round_trip_ns\": {}, \"raw_cpu_ns\": {}}}",
        count / seconds,
        cpu.as_nanos() as f64 / count,
        1e9 * seconds / count,
        raw.time.as_nanos(),
        raw.cpu.as_nanos(),
    );
    Ok(())
}
