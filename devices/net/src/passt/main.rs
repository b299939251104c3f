//! `anemone-passt`: keeps passt running for a network device, and hands out connections to it.
//!
//! passt needs sockets and namespaces of its own, which no jailed process can make, so this program
//! is started before the supervisor enters its jail. It takes nothing from the guest or the network:
//! it starts passt, starts it again when it ends, and answers each question of the network device
//! with a new connection. passt jails itself, and gains no privileges from here: as root it runs as
//! the user nobody from the beginning.

mod passt;

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anemone_device::lexopt::{Arg, Error as ArgError, Parser, ValueExt};
use anemone_device::parse_fd;
use anemone_ipc::device::FromDevice;
use anemone_ipc::keeper::{FromKeeper, ToKeeper};
use anemone_ipc::{Channel, FdIndex};
use log::LevelFilter;

use passt::{Forwarding, Passt, Settings};

/// Exit status for wrong arguments.
const EXIT_USAGE: u8 = 2;
/// Pauses before passt is started again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// After running so long, the next pause is the shortest again.
const GOOD: Duration = Duration::from_secs(10);

const HELP: &str = "\
anemone-passt: keeps passt running for a network device; started by anemone

  --passt PATH          the program
  --control-fd N        channel to the parent process; this one ends with it
  --net-fd N            socket of the network device
  --id NAME             name of the device in log lines
  --log-level LEVEL     off, error, warn (the default), info, debug or trace
  --mtu BYTES           largest IP packet, for the guest
  --tcp SPEC            forwarded ports, in the form of passt's option --tcp-ports
  --udp SPEC            the same for UDP
  --host-loopback       the guest reaches services on this host's loopback at its gateway's address
";

struct Options {
    control: OwnedFd,
    net: OwnedFd,
    id: String,
    log_level: LevelFilter,
    settings: Settings,
}

fn parse() -> Result<Option<Options>, ArgError> {
    let (mut control, mut net, mut program) = (None, None, None);
    let mut id = "net".to_owned();
    let mut log_level = LevelFilter::Warn;
    let mut forwarding = Forwarding::default();
    let mut parser = Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("help") => return Ok(None),
            Arg::Long("passt") => program = Some(PathBuf::from(parser.value()?)),
            Arg::Long("control-fd") => control = Some(parser.value()?.parse_with(parse_fd)?),
            Arg::Long("net-fd") => net = Some(parser.value()?.parse_with(parse_fd)?),
            Arg::Long("id") => id = parser.value()?.string()?,
            Arg::Long("log-level") => log_level = parser.value()?.parse_with(level)?,
            Arg::Long("mtu") => forwarding.mtu = Some(parser.value()?.parse()?),
            Arg::Long("tcp") => forwarding.tcp.push(parser.value()?.string()?),
            Arg::Long("udp") => forwarding.udp.push(parser.value()?.string()?),
            Arg::Long("host-loopback") => forwarding.host_loopback = true,
            other => return Err(other.unexpected()),
        }
    }
    let missing = |name: &str| ArgError::from(format!("{name} is needed"));
    Ok(Some(Options {
        control: control.ok_or_else(|| missing("--control-fd"))?,
        net: net.ok_or_else(|| missing("--net-fd"))?,
        id,
        log_level,
        settings: Settings {
            program: program.ok_or_else(|| missing("--passt"))?,
            forwarding,
        },
    }))
}

fn level(text: &str) -> Result<LevelFilter, &'static str> {
    text.parse()
        .map_err(|_| "not one of off, error, warn, info, debug, trace")
}

fn main() -> ExitCode {
    let options = match parse() {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("anemone-passt: {error}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    anemone_log::init(&format!("anemone-passt[{}]", options.id), options.log_level);
    let control = Channel::new(options.control);
    let net = Channel::new(options.net);
    let result = start(&options.settings).and_then(|passt| {
        control.send(&FromDevice::Ready { landlock: 0 }, &[])?;
        net.set_nonblocking(true)?;
        Keeper {
            settings: &options.settings,
            control: &control,
            net,
            passt: Some(passt),
            started: Instant::now(),
            pause: PAUSES.0,
            again: None,
        }
        .run()
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            let message = error.to_string();
            // If the parent is gone too, nobody is left to tell.
            let _ = control.send(&FromDevice::Failed { message }, &[]);
            ExitCode::FAILURE
        }
    }
}

fn start(settings: &Settings) -> Result<Passt, Box<dyn Error>> {
    become_nobody().map_err(|e| format!("cannot become the user nobody: {e}"))?;
    anemone_sandbox::renounce()?;
    Ok(Passt::start(settings)?)
}

/// User and group that have nothing; Debian's `nobody` and `nogroup`.
const NOBODY: libc::uid_t = 65534;

/// root becomes the user nobody; everybody else stays what they are.
fn become_nobody() -> io::Result<()> {
    // SAFETY: the only pointer is that of an empty list.
    let done = unsafe {
        libc::geteuid() != 0
            || (libc::setgroups(0, std::ptr::null()) == 0
                && libc::setresgid(NOBODY, NOBODY, NOBODY) == 0
                && libc::setresuid(NOBODY, NOBODY, NOBODY) == 0)
    };
    match done {
        true => Ok(()),
        false => Err(io::Error::last_os_error()),
    }
}

struct Keeper<'a> {
    settings: &'a Settings,
    control: &'a Channel,
    net: Channel,
    passt: Option<Passt>,
    /// When passt was last started.
    started: Instant,
    pause: Duration,
    /// When it is to be started again.
    again: Option<Instant>,
}

impl Keeper<'_> {
    /// Runs until the parent closes its end of the channel.
    fn run(mut self) -> Result<(), Box<dyn Error>> {
        let mut net_is_open = true;
        loop {
            let entry = |fd: i32| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            };
            let net = if net_is_open {
                self.net.as_fd().as_raw_fd()
            } else {
                -1
            };
            let child = self.passt.as_ref().map_or(-1, |p| p.pidfd().as_raw_fd());
            let mut polls = [
                entry(self.control.as_fd().as_raw_fd()),
                entry(net),
                entry(child),
            ];
            let left = self
                .again
                .map(|at| at.saturating_duration_since(Instant::now()));
            let timeout = left.map_or(-1, |time| time.as_millis() as libc::c_int + 1);
            // SAFETY: `polls` is an array of pollfd of the length given.
            let n = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
            if n < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return Err(io::Error::last_os_error().into());
            }
            let [control, net, child] = polls.map(|poll| poll.revents != 0);
            if control {
                // The parent says nothing, so this is its end.
                return Ok(());
            }
            if child {
                self.ended();
            }
            if self.again.is_some_and(|at| at <= Instant::now()) {
                self.start_again();
            }
            if net {
                net_is_open = self.answer();
            }
        }
    }

    /// passt has ended.
    fn ended(&mut self) {
        if let Some(passt) = self.passt.take() {
            log::warn!(
                "{}; starting it again in {:?}",
                passt.obituary(),
                self.pause
            );
        }
        if self.started.elapsed() > GOOD {
            self.pause = PAUSES.0;
        }
        self.again = Some(Instant::now() + self.pause);
        self.pause = (self.pause * 2).min(PAUSES.1);
    }

    fn start_again(&mut self) {
        self.again = None;
        self.started = Instant::now();
        match Passt::start(self.settings) {
            Ok(passt) => self.passt = Some(passt),
            Err(error) => {
                log::warn!("{error}; trying again in {:?}", self.pause);
                self.again = Some(Instant::now() + self.pause);
                self.pause = (self.pause * 2).min(PAUSES.1);
            }
        }
    }

    /// Answers a question of the network device; false if none can come any more.
    fn answer(&mut self) -> bool {
        match self.net.recv::<ToKeeper>() {
            Ok(received) => match received.message {
                ToKeeper::Connect => {}
            },
            Err(error) if error.is_would_block() => return true,
            Err(error) => {
                log::debug!("the network device is gone: {error}");
                return false;
            }
        }
        let connected = match &self.passt {
            Some(passt) => passt.connect().map_err(|e| e.to_string()),
            None => Err("it is being started".to_owned()),
        };
        let sent = match connected {
            Ok(socket) => {
                let answer = FromKeeper::Connected { socket: FdIndex(0) };
                self.net.send(&answer, &[socket.as_fd()])
            }
            Err(message) => self.net.send(&FromKeeper::Unavailable { message }, &[]),
        };
        if let Err(error) = sent {
            anemone_log::warn_limited!("the network device was not answered: {error}");
        }
        true
    }
}
