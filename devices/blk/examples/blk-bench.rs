//! Load for a vhost-user-blk server, ours or another: keeps reads or writes in flight at random
//! places for some time and prints one line of JSON.
//!
//! ```text
//! blk-bench --socket PATH [--depth N] [--seconds S] [--pid PID] [--block BYTES]
//!           [--rw randread|randwrite] [--inflight on|off] [--memory shared|bounce]
//! {"iops": …, "requests": …, "seconds": …, "cpu_seconds": …, "iops_per_cpu_second": …}
//! ```
//!
//! One thread plays guest and VMM: it kicks only when the server asks for it, and waits for an
//! interrupt only when it has nothing else to do. With `--memory bounce` another thread copies, by
//! the code of the VMM, and the server sees a region in place of guest memory. The CPU time is that
//! of the server with process number PID, all its threads included, and of the copying thread.
//! `--inflight off` keeps the server from tracking what is in flight.

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anemone_driver::blk::{Requests, request, status};
use anemone_driver::{Bounced, Device, Options};

/// The largest queue that every server takes.
const QUEUE_SIZE: u16 = 128;
/// virtio device type of a disk.
const DISK: u16 = 2;

struct Load {
    socket: String,
    depth: usize,
    seconds: f64,
    pid: Option<u32>,
    block: u32,
    kind: u32,
    inflight: bool,
    bounce: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let load = parse()?;
    let options = Options {
        memory: (4 << 20) + 2 * load.depth as u64 * u64::from(load.block),
        queue_size: QUEUE_SIZE,
        inflight: load.inflight,
        bounce: load.bounce.then(|| Bounced::usual(DISK, 1)),
        ..Options::default()
    };
    let mut device = Device::connect(UnixStream::connect(&load.socket)?, &options)?;
    let copying = device.copying_thread();
    let cpu = || -> Result<f64, Box<dyn Error>> {
        let server = load
            .pid
            .map_or(Ok(0.0), |pid| cpu_seconds(&format!("/proc/{pid}/stat")))?;
        let thread = copying.map(|tid| format!("/proc/self/task/{tid}/stat"));
        Ok(server + thread.map_or(Ok(0.0), |path| cpu_seconds(&path))?)
    };
    let capacity = u64::from_le_bytes(device.frontend.config(0, 8)?.as_slice().try_into()?);
    let mut random = Random(0x1234_5678_9abc_def1);
    let blocks = capacity / u64::from(load.block / 512);
    if blocks == 0 {
        return Err("the disk is smaller than a block".into());
    }
    let sector = move || random.next() % blocks * u64::from(load.block / 512);
    let mut bench = Bench {
        requests: Requests::new(&device.memory, QUEUE_SIZE, load.depth, load.block, true),
        device: &mut device,
        load: &load,
        sector: Box::new(sector),
    };
    // A tenth of the time warms up.
    bench.run(load.seconds / 10.0)?;
    let cpu_before = cpu()?;
    let start = Instant::now();
    let requests = bench.run(load.seconds)?;
    let seconds = start.elapsed().as_secs_f64();
    let cpu = cpu()? - cpu_before;
    println!(
        "{{\"iops\": {:.0}, \"requests\": {requests}, \"seconds\": {seconds:.3}, \
         \"cpu_seconds\": {cpu:.2}, \"iops_per_cpu_second\": {:.0}}}",
        requests as f64 / seconds,
        if cpu > 0.0 {
            requests as f64 / cpu
        } else {
            0.0
        },
    );
    device.stop_queue(0)?;
    Ok(())
}

fn parse() -> Result<Load, Box<dyn Error>> {
    let mut load = Load {
        socket: String::new(),
        depth: 1,
        seconds: 3.0,
        pid: None,
        block: 4096,
        kind: request::IN,
        inflight: true,
        bounce: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next().ok_or(format!("{name} needs a value"))?;
        match name.as_str() {
            "--socket" => load.socket = value,
            "--depth" => load.depth = value.parse()?,
            "--seconds" => load.seconds = value.parse()?,
            "--pid" => load.pid = Some(value.parse()?),
            "--block" => load.block = value.parse()?,
            "--rw" if value == "randread" => load.kind = request::IN,
            "--rw" if value == "randwrite" => load.kind = request::OUT,
            "--inflight" if value == "on" || value == "off" => load.inflight = value == "on",
            "--memory" if value == "shared" => load.bounce = false,
            "--memory" if value == "bounce" => load.bounce = true,
            _ => return Err(format!("cannot use {name} {value}").into()),
        }
    }
    if !(1..=usize::from(QUEUE_SIZE)).contains(&load.depth) {
        return Err(format!("--depth is 1 to {QUEUE_SIZE}").into());
    }
    if load.block == 0 || !load.block.is_multiple_of(512) {
        return Err("--block is a multiple of 512".into());
    }
    Ok(load)
}

struct Bench<'a> {
    device: &'a mut Device,
    requests: Requests,
    load: &'a Load,
    /// Where the next request goes.
    sector: Box<dyn FnMut() -> u64>,
}

impl Bench<'_> {
    /// Runs requests for a while; returns how many ended.
    fn run(&mut self, seconds: f64) -> Result<u64, Box<dyn Error>> {
        let start = Instant::now();
        let memory = &self.device.memory;
        let queue = &mut self.device.queues[0];
        let mut ended = 0;
        let mut time_left = true;
        loop {
            let mut room = time_left;
            while room {
                let sector = (self.sector)();
                let Load { kind, block, .. } = *self.load;
                let request = self.requests.submit(memory, queue, kind, sector, block);
                room = request.is_some();
            }
            queue.publish();
            queue.kick();
            if self.requests.in_flight() == 0 {
                return Ok(ended);
            }
            if !queue.wait(Duration::from_secs(10))? {
                return Err("the server does not answer".into());
            }
            while let Some(finished) = self.requests.finish(memory, queue) {
                if finished.status != status::OK {
                    return Err(format!("a request failed with status {}", finished.status).into());
                }
                ended += 1;
            }
            time_left = start.elapsed().as_secs_f64() < seconds;
        }
    }
}

/// User and system time of the process or thread whose `stat` this is; that of a process includes
/// all threads it has had.
fn cpu_seconds(stat: &str) -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string(stat)?;
    // The name before the last parenthesis may contain anything.
    let (_, fields) = stat.rsplit_once(')').ok_or("no name in stat")?;
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<u64>)
        .sum::<Result<_, _>>()?;
    // SAFETY: takes no pointer.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / per_second as f64)
}

/// Marsaglia's xorshift: random enough, and costs the driver nothing.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
