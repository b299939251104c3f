//! Back ends by script: they end, hang, talk nonsense or have changed, at every step of the
//! conversation, in front of a driver that works on its registers meanwhile.

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, protocol_features as protocol};
use anemone_vhost_user::{Backend, Command, InflightDescription};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bounce::Bounds;
use crate::transport::tests::{Driver, FEATURES};

/// Longest wait of a test for what must come.
const LIMIT: Duration = Duration::from_secs(30);
/// Patience of the front end: longer than any answer takes here.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same where an answer never comes.
const IMPATIENT: Duration = Duration::from_millis(50);
/// Where the driver's one queue has its used ring.
const USED: u64 = 0x3000;
const DEVICE: u64 = 0x2000;
const NEEDS_RESET: u8 = 64;

/// How a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Close,
    Hang,
    Nonsense,
}

#[derive(Debug, Clone)]
struct Script {
    features: u64,
    queues: u64,
    config: [u8; 16],
    /// It tracks what is in flight.
    tracks: bool,
    /// Instead of answering the request of this number, from 0.
    end: Option<(usize, End)>,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            features: FEATURES,
            queues: 2,
            config: [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0],
            tracks: true,
            end: None,
        }
    }
}

fn inflight_memory(size: u64) -> OwnedFd {
    // SAFETY: a name with NUL; the result is checked and owned at once; the seals take no pointer.
    unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let fd = libc::memfd_create(c"test".as_ptr(), flags);
        assert!(fd >= 0);
        let file = File::from_raw_fd(fd);
        file.set_len(size).unwrap();
        assert_eq!(libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK), 0);
        file.into()
    }
}

fn inode(fd: OwnedFd) -> u64 {
    File::from(fd).metadata().unwrap().ino()
}

/// Plays a back end until the connection ends; returns what it was asked.
fn play(socket: UnixStream, script: &Script) -> Vec<String> {
    let mut log = Vec::new();
    let mut raw = socket.try_clone().unwrap();
    let mut backend = Backend::new(socket, PATIENCE);
    loop {
        let mut poll = libc::pollfd {
            fd: backend.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one initialised entry.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        let incoming = match backend.try_recv() {
            Ok(Some(incoming)) => incoming,
            Ok(None) => continue,
            Err(_) => return log,
        };
        match script.end {
            Some((number, End::Close)) if number == log.len() => return log,
            Some((number, End::Hang)) if number == log.len() => {
                while backend.try_recv().is_ok() {
                    thread::sleep(Duration::from_millis(1));
                }
                return log;
            }
            Some((number, End::Nonsense)) if number == log.len() => {
                let _ = std::io::Write::write_all(&mut raw, &[0xA5; 64]);
                // Until the front end has had enough of it.
                while backend.try_recv().is_ok() {
                    thread::sleep(Duration::from_millis(1));
                }
                return log;
            }
            _ => {}
        }
        let code = incoming.code;
        let mut ack = incoming.need_reply;
        let text = match incoming.command {
            Command::GetFeatures => {
                ack = false;
                backend
                    .reply_u64(code, script.features | F_PROTOCOL_FEATURES)
                    .unwrap();
                "features".to_owned()
            }
            Command::GetProtocolFeatures => {
                ack = false;
                let mut offered =
                    protocol::MQ | protocol::REPLY_ACK | protocol::CONFIG | protocol::BACKEND_REQ;
                if script.tracks {
                    offered |= protocol::INFLIGHT_SHMFD;
                }
                backend.reply_u64(code, offered).unwrap();
                "protocol".to_owned()
            }
            Command::GetQueueNum => {
                ack = false;
                backend.reply_u64(code, script.queues).unwrap();
                "queues".to_owned()
            }
            Command::GetConfig { offset, size } => {
                ack = false;
                let config = &script.config[offset as usize..(offset + size) as usize];
                backend.reply_config(offset, Some(config)).unwrap();
                "config".to_owned()
            }
            Command::GetVringBase { index } => {
                ack = false;
                backend.reply_vring_base(index, 0).unwrap();
                format!("stop {index}")
            }
            Command::GetInflightFd(asked) => {
                ack = false;
                let description = InflightDescription {
                    size: 4096,
                    ..asked
                };
                let fd = inflight_memory(4096);
                backend
                    .reply_inflight(Some((&description, fd.as_fd())))
                    .unwrap();
                "make in-flight memory".to_owned()
            }
            Command::SetInflightFd { description, fd } => {
                assert_eq!(description.size, 4096);
                format!("in flight {}", inode(fd))
            }
            Command::SetFeatures(features) => format!("accept {features:#x}"),
            Command::SetVringBase { index, base } => format!("base {index} {base}"),
            Command::SetVringEnable { index, enable } => format!("enable {index} {enable}"),
            Command::SetVringCall { index, fd } => {
                let event = anemone_accel_api::EventFd::from(fd.unwrap());
                event.signal();
                format!("call {index}")
            }
            Command::SetConfig { offset, data } => format!("write {offset} {data:?}"),
            Command::SetVringKick { index, .. } => format!("kick {index}"),
            Command::SetMemTable(regions) => format!("memory {}", regions.len()),
            other => format!("{other:?}").chars().take(12).collect(),
        };
        log.push(text);
        if ack {
            // The front end may have gone in the meantime.
            let _ = backend.reply_u64(code, 0);
        }
    }
}

/// A device with its thread, which lives until the process ends.
struct Lab {
    driver: Arc<Driver>,
    notices: Receiver<Notice>,
    connection: u32,
    backend: Option<JoinHandle<Vec<String>>>,
}

fn spawn(script: &Script) -> (UnixStream, JoinHandle<Vec<String>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let script = script.clone();
    (ours, thread::spawn(move || play(theirs, &script)))
}

fn limits(config_size: u16, patience: Duration) -> Limits {
    Limits {
        queues: 2,
        config_size,
        config_optional: false,
        withheld: 0,
        patience,
    }
}

impl Lab {
    fn new(script: &Script, patience: Duration) -> Self {
        let driver = Arc::new(Driver::new());
        let (socket, backend) = spawn(script);
        let limits = limits(8, patience);
        let (front_end, _) = FrontEnd::connect(socket, limits, None).unwrap();
        let (tell, notices) = channel();
        let device = driver.clone();
        thread::spawn(move || {
            let tell = |notice| {
                // A test that is over does not listen.
                let _ = tell.send(notice);
            };
            front_end.run(&device.device, &device.ram, &device.work, &tell)
        });
        Self {
            driver,
            notices,
            connection: 0,
            backend: Some(backend),
        }
    }

    /// With a driver that has started one queue, of which seven entries were returned.
    fn started(patience: Duration) -> Self {
        let mut lab = Self::new(&Script::default(), patience);
        lab.set_up(FEATURES);
        let index = GuestAddress(USED + 2);
        lab.driver.ram.mapped.write_obj(7u16, index).unwrap();
        // Whether the first one has come to start the queue or not, the second one has, and the
        // third one takes over.
        lab.replace();
        lab.replace();
        lab
    }

    fn set_up(&self, features: u64) {
        self.driver.negotiate(features);
        self.driver.set_up_queue(0, 0x1000);
        self.driver.write::<1>(20, 15);
    }

    fn notice(&self) -> Notice {
        self.notices.recv_timeout(LIMIT).expect("a notice")
    }

    fn expect_lost(&self) -> String {
        match self.notice() {
            Notice::Lost { connection, reason } => {
                assert_eq!(connection, self.connection);
                reason
            }
            other => panic!("{other:?}"),
        }
    }

    fn expect_back(&self) {
        let connection = self.connection;
        assert_eq!(self.notice(), Notice::Back { connection });
    }

    /// What the back end was asked, once its connection has ended.
    fn asked(&mut self) -> Vec<String> {
        self.backend.take().unwrap().join().unwrap()
    }

    fn reconnect(&mut self, script: &Script) {
        let (socket, backend) = spawn(script);
        self.connection += 1;
        self.backend = Some(backend);
        self.driver.work.reconnect(Reconnect {
            connection: self.connection,
            socket,
        });
    }

    /// Ends the connection from the front end's side, as another `Reconnect` does, and returns what
    /// was asked over it.
    fn replace(&mut self) -> Vec<String> {
        let old = self.backend.take().unwrap();
        self.reconnect(&Script::default());
        let asked = old.join().unwrap();
        self.expect_back();
        asked
    }

    fn wait(&self, what: &str, done: impl Fn(&Driver) -> bool) {
        let end = Instant::now() + LIMIT;
        while !done(&self.driver) {
            assert!(Instant::now() < end, "{what} has not come");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn ends_at(number: usize, end: End) -> Script {
    Script {
        end: Some((number, end)),
        ..Script::default()
    }
}

/// Requests of a conversation from its begin to a queue that runs.
fn whole_conversation() -> Vec<String> {
    let mut lab = Lab::started(PATIENCE);
    lab.replace()
}

#[test]
fn the_next_back_end_gets_everything() {
    let mut lab = Lab::started(PATIENCE);
    lab.reconnect(&Script::default());
    lab.expect_back();
    let asked = lab.replace();
    let position = |text: &str| {
        let found = asked.iter().position(|line| line.starts_with(text));
        found.unwrap_or_else(|| panic!("{text} is not among {asked:?}"))
    };
    // 30 is VHOST_USER_F_PROTOCOL_FEATURES, which is never the guest's.
    let accepted = format!("accept {:#x}", FEATURES | 1 << 30);
    let order = [
        "features",
        &accepted,
        "memory 1",
        "in flight",
        "base 0 7",
        "call 0",
        "kick 0",
        "enable 0 true",
    ]
    .map(position);
    assert!(order.is_sorted(), "{asked:?}");
    assert!(!asked.contains(&"make in-flight memory".to_owned()));
}

#[test]
fn a_bounced_disk_says_how_large_its_requests_may_be() {
    const SIZE_MAX: u64 = 1 << 1;
    let mut script = Script {
        features: FEATURES | 1 << 2 | 1 << 35,
        ..Script::default()
    };
    script.config[12] = 10;
    let (socket, backend) = spawn(&script);
    let bounds = Bounds {
        device_type: 2,
        room: 1 << 20,
    };
    let limits = limits(16, PATIENCE);
    let (mut session, connected) = Session::open(socket, &limits, Some(bounds)).unwrap();
    assert_eq!(connected.config[..8], [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(connected.config[8..], [0, 0x90, 1, 0, 10, 0, 0, 0]);
    let offered = FEATURES | 1 << 2 | F_PROTOCOL_FEATURES;
    assert_eq!(connected.features, offered | SIZE_MAX);
    // The limit is between the driver and this process.
    let driver = Driver::new();
    let start = Start {
        features: connected.features,
        queues: Vec::new(),
    };
    session
        .start(&start, &driver.ram, Base::First, &mut None)
        .unwrap();
    drop(session);
    let asked = backend.join().unwrap();
    assert!(asked.contains(&format!("accept {offered:#x}")), "{asked:?}");
}

#[test]
fn a_back_end_may_be_lost_at_every_step() {
    let steps = whole_conversation().len();
    assert!(steps > 15, "{steps} requests");
    for end in [End::Close, End::Nonsense, End::Hang] {
        let patience = match end {
            End::Hang => IMPATIENT,
            End::Close | End::Nonsense => PATIENCE,
        };
        let mut lab = Lab::started(patience);
        for number in 0..steps {
            lab.reconnect(&ends_at(number, end));
            lab.expect_lost();
            assert_eq!(lab.asked().len(), number, "{end:?}");
            // The registers answer all the same.
            assert_eq!(lab.driver.status(), 15);
        }
        lab.reconnect(&Script::default());
        lab.expect_back();
        let asked = lab.replace();
        assert!(asked.contains(&"base 0 7".to_owned()), "{asked:?}");
        assert_eq!(lab.driver.status(), 15, "the driver has noticed nothing");
    }
}

#[test]
fn the_first_back_end_may_be_lost_at_every_step_of_the_start() {
    let asked = whole_conversation();
    let open = asked.iter().position(|line| line.starts_with("accept"));
    // The first one makes the in-flight memory, too.
    for number in open.unwrap()..=asked.len() {
        let mut lab = Lab::new(&ends_at(number, End::Close), PATIENCE);
        lab.set_up(FEATURES);
        lab.expect_lost();
        lab.reconnect(&Script::default());
        lab.expect_back();
        let asked = lab.replace();
        assert!(asked.contains(&"enable 0 true".to_owned()), "{asked:?}");
    }
}

#[test]
fn resets_and_starts_without_a_back_end() {
    let mut lab = Lab::started(PATIENCE);
    lab.reconnect(&ends_at(0, End::Close));
    lab.expect_lost();
    for _ in 0..3 {
        lab.driver.write::<1>(20, 0);
        lab.wait("the reset", |driver| driver.status() == 0);
        lab.set_up(FEATURES);
    }
    lab.reconnect(&Script::default());
    lab.expect_back();
    let asked = lab.replace();
    // A new start: what was in flight before the reset is forgotten.
    assert!(asked.contains(&"make in-flight memory".to_owned()));
}

#[test]
fn a_reset_waits_for_the_end_of_a_back_end_that_hangs() {
    let mut lab = Lab::started(IMPATIENT);
    lab.reconnect(&ends_at(3, End::Hang));
    let reason = lab.expect_lost();
    assert!(reason.contains("no answer"), "{reason}");
    lab.driver.write::<1>(20, 0);
    // It might still write to guest memory. What is asked meanwhile is not heard.
    lab.driver.write::<1>(20, 1);
    assert_eq!(lab.driver.status(), 15);
    lab.reconnect(&Script::default());
    lab.expect_back();
    lab.wait("the reset", |driver| driver.status() == 0);
    let asked = lab.replace();
    assert!(!asked.iter().any(|line| line.starts_with("base")));
}

#[test]
fn in_flight_memory_stays_until_the_driver_resets() {
    let mut lab = Lab::started(PATIENCE);
    let memory = |asked: Vec<String>| {
        let line = asked.into_iter().find(|line| line.starts_with("in flight"));
        line.expect("in-flight memory")
    };
    lab.wait("the start", |driver| driver.status() == 15);
    let first = memory(lab.replace());
    assert_eq!(memory(lab.replace()), first);
    lab.driver.write::<1>(20, 0);
    lab.wait("the reset", |driver| driver.status() == 0);
    lab.set_up(FEATURES);
    lab.replace();
    assert_ne!(memory(lab.replace()), first);
}

#[test]
fn in_flight_memory_is_not_believed_after_a_back_end_that_does_not_keep_it() {
    let mut lab = Lab::started(PATIENCE);
    let made = "make in-flight memory".to_owned();
    lab.wait("the start", |driver| driver.status() == 15);
    assert!(!lab.replace().contains(&made));
    let old = lab.backend.take().unwrap();
    lab.reconnect(&Script {
        tracks: false,
        ..Script::default()
    });
    old.join().unwrap();
    lab.expect_back();
    let asked = lab.replace();
    assert!(
        !asked.iter().any(|line| line.contains("flight")),
        "{asked:?}"
    );
    assert!(lab.replace().contains(&made));
}

#[test]
fn a_back_end_with_fewer_features_asks_for_a_reset() {
    let fewer = FEATURES & !(1 << 9);
    let mut lab = Lab::started(PATIENCE);
    lab.reconnect(&Script {
        features: fewer,
        ..Script::default()
    });
    match lab.notice() {
        Notice::Unfit { reason } => assert!(reason.contains("0x200"), "{reason}"),
        other => panic!("{other:?}"),
    }
    lab.expect_back();
    assert_ne!(lab.driver.status() & NEEDS_RESET, 0);
    // The driver starts over with what there is now.
    lab.driver.write::<1>(20, 0);
    lab.wait("the reset", |driver| driver.status() == 0);
    assert_eq!(lab.driver.read::<4>(4) as u32, fewer as u32);
    lab.set_up(fewer);
    assert_eq!(lab.driver.status(), 15);
    lab.reconnect(&Script {
        features: fewer,
        ..Script::default()
    });
    lab.expect_back();
    assert!(lab.replace().contains(&"enable 0 true".to_owned()));
}

#[test]
fn a_back_end_with_too_few_queues_asks_for_a_reset() {
    let mut lab = Lab::new(&Script::default(), PATIENCE);
    lab.driver.negotiate(FEATURES);
    lab.driver.set_up_queue(1, 0x1000);
    lab.driver.write::<1>(20, 15);
    let one = Script {
        queues: 1,
        ..Script::default()
    };
    lab.reconnect(&one);
    match lab.notice() {
        Notice::Unfit { reason } => assert!(reason.contains("queue 1"), "{reason}"),
        other => panic!("{other:?}"),
    }
    lab.expect_back();
    lab.driver.write::<1>(20, 0);
    lab.wait("the reset", |driver| driver.status() == 0);
    assert_eq!(lab.driver.read::<2>(18), 1, "number of queues");
}

#[test]
fn configuration_is_read_again_and_written_late() {
    let mut lab = Lab::started(PATIENCE);
    lab.reconnect(&ends_at(0, End::Close));
    lab.expect_lost();
    let generation = lab.driver.read::<1>(21);
    lab.reconnect(&Script {
        config: [9; 16],
        ..Script::default()
    });
    lab.expect_back();
    assert_eq!(lab.driver.read::<8>(DEVICE), 0x0909_0909_0909_0909);
    assert_ne!(lab.driver.read::<1>(21), generation);
    // A write while nobody listens, and another vector.
    lab.reconnect(&ends_at(0, End::Close));
    lab.expect_lost();
    lab.driver.write::<1>(DEVICE + 3, 0x55);
    lab.driver.write::<2>(22, 0);
    lab.driver.write::<2>(26, 2);
    lab.reconnect(&Script::default());
    lab.expect_back();
    let asked = lab.replace();
    assert!(asked.contains(&"write 3 [85]".to_owned()), "{asked:?}");
}

#[test]
fn back_ends_that_cannot_serve_are_lost_again() {
    let mut lab = Lab::started(PATIENCE);
    lab.reconnect(&Script {
        features: 0,
        ..Script::default()
    });
    let reason = lab.expect_lost();
    assert!(reason.contains("VERSION_1"), "{reason}");
    lab.reconnect(&Script::default());
    lab.expect_back();
}
