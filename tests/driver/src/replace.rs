//! Killing a device's process and putting another in its place.

use std::borrow::{Borrow, BorrowMut};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anemone_ipc::device::{FromDevice, ToDevice};
use anemone_ipc::{FdIndex, MAX_FDS};

use crate::{Device, Error, Options, Queue, Result, Supervised};

/// A device whose process can be replaced, as supervisor and monitor together do it: guest memory,
/// rings and in-flight memory stay, and what the process had the supervisor keep.
#[derive(Debug)]
pub struct Replaceable {
    binary: OsString,
    args: Vec<String>,
    fds: Vec<OwnedFd>,
    process: Supervised,
    kept: BTreeMap<u64, OwnedFd>,
    /// Where the sockets are that the process may ask for.
    dial: Option<PathBuf>,
    /// The device as the front end has it.
    pub device: Device,
}

impl Replaceable {
    /// Starts `binary args…` as [`Supervised::start`] does, copies of `fds` at the numbers from 5 on
    /// in every process, and sets the device up.
    ///
    /// # Errors
    /// The process does not start, or a request fails.
    pub fn start(
        binary: impl AsRef<OsStr>,
        args: &[&str],
        fds: Vec<OwnedFd>,
        options: &Options,
    ) -> Result<Self> {
        let mut process = Supervised::start(&binary, args, copies(&fds)?)?;
        let mut kept = BTreeMap::new();
        let device = process.device(options)?;
        collect(&process, &mut kept, None, true)?;
        Ok(Self {
            binary: binary.as_ref().to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            fds,
            process,
            kept,
            dial: None,
            device,
        })
    }

    /// Connects the process from now on to the sockets below `path` that it asks for by their
    /// ports, whenever it is [served](Self::serve).
    pub fn dial_below(&mut self, path: &Path) {
        self.dial = Some(path.to_owned());
    }

    /// Does what the process has asked of its supervisor.
    ///
    /// # Errors
    /// It sends something that is not a message of a device.
    pub fn serve(&mut self) -> Result<()> {
        self.process.control.set_nonblocking(true)?;
        let dial = self.dial.as_deref();
        let collected = collect(&self.process, &mut self.kept, dial, false);
        self.process.control.set_nonblocking(false)?;
        collected
    }

    /// Kills the process (SIGKILL), waits until it has gone and starts another in its place, which
    /// is told nothing but what every new process is told: it has the device when this returns, if
    /// [`reconnect`](Device::reconnect) has come through, too.
    ///
    /// # Errors
    /// The new process does not do its part.
    pub fn replace(&mut self) -> Result<()> {
        let socket = self.replace_process()?;
        self.device.reconnect(socket)
    }

    /// The first half of [`replace`](Self::replace): the new process has a connection, and the front
    /// end's end of it is returned.
    ///
    /// # Errors
    /// The process does not start.
    pub fn replace_process(&mut self) -> Result<UnixStream> {
        self.process.child().kill()?;
        self.start_next()
    }

    /// Like [`replace`](Self::replace), but the process is told to end, as for a new version of the
    /// program, and must end well.
    ///
    /// # Errors
    /// It does not, or the new process does not do its part.
    pub fn retire(&mut self) -> Result<()> {
        let control = self.process.control.as_fd().as_raw_fd();
        // SAFETY: no pointers. The process reads the end of the channel; what it says can be heard.
        unsafe { libc::shutdown(control, libc::SHUT_WR) };
        let status = self.process.wait()?;
        if !status.success() {
            return Err(Error::Ended(status));
        }
        let socket = self.start_next()?;
        self.device.reconnect(socket)
    }

    /// Starts a process in the place of one that is about to be gone.
    fn start_next(&mut self) -> Result<UnixStream> {
        self.process.wait()?;
        // What it sent before it died counts.
        collect(&self.process, &mut self.kept, None, false)?;
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        self.process = Supervised::start_stream(&self.binary, &args, copies(&self.fds)?)?;
        let kept: Vec<_> = self.kept.iter().collect();
        for part in kept.chunks(MAX_FDS) {
            let keys = part.iter().map(|(key, _)| **key).collect();
            let fds: Vec<_> = part.iter().map(|(_, fd)| fd.as_fd()).collect();
            self.process.control.send(&ToDevice::Kept { keys }, &fds)?;
        }
        self.process.connect()
    }

    /// Disconnects and connects again; the process stays.
    ///
    /// # Errors
    /// A request fails.
    pub fn reconnect(&mut self) -> Result<()> {
        let socket = self.process.connect()?;
        self.device.reconnect(socket)
    }

    /// The process of this moment.
    pub fn process(&mut self) -> &mut Supervised {
        &mut self.process
    }

    /// What the process has had kept so far, by key. Complete only while there is no process, or
    /// when it has nothing to do.
    ///
    /// # Errors
    /// It sends something that is not a message of a device.
    pub fn kept(&mut self) -> Result<&BTreeMap<u64, OwnedFd>> {
        self.serve()?;
        Ok(&self.kept)
    }
}

impl Borrow<Device> for Replaceable {
    fn borrow(&self) -> &Device {
        &self.device
    }
}

impl BorrowMut<Device> for Replaceable {
    fn borrow_mut(&mut self) -> &mut Device {
        &mut self.device
    }
}

fn copies(fds: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    fds.iter().map(OwnedFd::try_clone).collect()
}

/// Takes what the process says; until it says that it is ready, or all there is.
fn collect(
    process: &Supervised,
    kept: &mut BTreeMap<u64, OwnedFd>,
    dial: Option<&Path>,
    until_ready: bool,
) -> Result<()> {
    loop {
        let mut received = match process.control.recv::<FromDevice>() {
            Ok(received) => received,
            Err(anemone_ipc::Error::Closed) if !until_ready => return Ok(()),
            Err(error) if error.is_would_block() => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        match received.message {
            FromDevice::Ready { .. } if until_ready => return Ok(()),
            FromDevice::Keep { key, fd } => {
                let fd: FdIndex = fd;
                kept.insert(key, received.take(fd)?);
            }
            FromDevice::Forget { key } => drop(kept.remove(&key)),
            FromDevice::Dial { id, port } => {
                let socket = dial.and_then(|path| anemone_process::dial(path, port).ok());
                let answer = ToDevice::Dialed {
                    id,
                    socket: socket.as_ref().map(|_| FdIndex(0)),
                };
                let fds: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
                match process.control.send(&answer, &fds) {
                    Ok(()) | Err(anemone_ipc::Error::Closed) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            FromDevice::Failed { .. } => return Err(Error::Timeout("it has failed")),
            FromDevice::Ready { .. }
            | FromDevice::Balloon(_)
            | FromDevice::QuitRequested
            | FromDevice::PowerRequested => {}
        }
    }
}

/// After so long without a chain returned, something is lost.
const STUCK: Duration = Duration::from_secs(10);

/// Kills at random moments, and how long each pause was.
#[derive(Debug)]
pub struct Kills {
    random: Random,
    left: usize,
    longest: Duration,
    at: Instant,
    pauses: Vec<Duration>,
    /// Chains that were not returned when the process was killed.
    in_flight: usize,
    /// When the used indices were last seen to change, and what they were.
    progress: (Instant, Vec<u16>),
}

impl Kills {
    /// So many kills, or `$ANEMONE_KILLS`, the time from one to the next random up to `longest`. The
    /// seed is `$ANEMONE_SEED` or the clock, and printed.
    ///
    /// # Panics
    /// One of the variables is not a number.
    pub fn new(count: usize, longest: Duration) -> Self {
        let count = number("ANEMONE_KILLS").map_or(count, |kills| kills as usize);
        let mut kills = Self {
            random: Random::seeded(),
            left: count,
            longest,
            at: Instant::now(),
            pauses: Vec::new(),
            in_flight: 0,
            progress: (Instant::now(), Vec::new()),
        };
        kills.next();
        kills
    }

    fn next(&mut self) {
        // Half of them soon after the device is back, where least has settled.
        let longest = match self.random.below(2) {
            0 => self.longest / 10,
            _ => self.longest,
        };
        let pause = self.random.below(longest.as_nanos() as u64 + 1);
        self.at = Instant::now() + Duration::from_nanos(pause);
    }

    /// Whether all have been done.
    pub fn done(&self) -> bool {
        self.left == 0
    }

    /// How long to wait for something else until the next.
    pub fn wait(&self) -> Duration {
        match self.left {
            0 => Duration::from_millis(100),
            _ => self.at.saturating_duration_since(Instant::now()),
        }
    }

    /// Kills and replaces the process if the moment has come; whether it had. The last
    /// millisecond before it is waited for here, for the sake of the moment.
    ///
    /// # Errors
    /// As for [`Replaceable::replace`], or the device has returned nothing for a long time.
    pub fn strike(&mut self, device: &mut Replaceable) -> Result<bool> {
        let used: Vec<u16> = device.device.queues.iter().map(Queue::used_index).collect();
        if used != self.progress.1 {
            self.progress = (Instant::now(), used);
        } else if self.progress.0.elapsed() > STUCK {
            return Err(Error::Timeout("no chain is returned"));
        }
        if self.left == 0 || self.wait() > Duration::from_millis(1) {
            return Ok(false);
        }
        while Instant::now() < self.at {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        self.in_flight += device
            .device
            .queues
            .iter()
            .map(Queue::in_flight)
            .sum::<usize>();
        device.replace()?;
        self.pauses.push(start.elapsed());
        self.left -= 1;
        self.next();
        Ok(true)
    }

    /// The source of randomness, for the load.
    pub fn random(&mut self) -> &mut Random {
        &mut self.random
    }

    /// Prints how long the pauses were, from the kill until the new process had all rings; also
    /// appends the line to the file `$ANEMONE_PAUSES`, as test runners show nothing of a test that
    /// passes.
    ///
    /// # Panics
    /// The file cannot be written.
    #[allow(clippy::expect_used, reason = "a mistake of the user")]
    pub fn report(&mut self, what: &str) {
        self.pauses.sort_unstable();
        let Some(last) = self.pauses.len().checked_sub(1) else {
            return;
        };
        let at = |percent: usize| self.pauses[last * percent / 100].as_secs_f64() * 1e3;
        let line = format!(
            "{what}: {} kills, {:.1} chains in flight at each; pause p50 {:.1} ms, p99 {:.1} ms, \
             longest {:.1} ms\n",
            self.pauses.len(),
            self.in_flight as f64 / self.pauses.len() as f64,
            at(50),
            at(99),
            at(100)
        );
        print!("{line}");
        if let Some(path) = std::env::var_os("ANEMONE_PAUSES") {
            let file = File::options().create(true).append(true).open(path);
            let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
            written.expect("ANEMONE_PAUSES");
        }
    }
}

/// An environment variable that is a number.
#[allow(clippy::expect_used, reason = "a mistake of the user")]
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().expect(variable))
}

/// Random numbers (xorshift64*), the same ones for the same seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From `$ANEMONE_SEED` or the clock; prints the seed.
    ///
    /// # Panics
    /// `$ANEMONE_SEED` is not a number.
    pub fn seeded() -> Self {
        let seed = number("ANEMONE_SEED").unwrap_or_else(|| {
            let time = SystemTime::now().duration_since(UNIX_EPOCH);
            time.map_or(1, |time| time.as_nanos() as u64)
        });
        println!("ANEMONE_SEED={seed}");
        Self(seed | 1)
    }

    /// A number less than `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % bound
    }
}
