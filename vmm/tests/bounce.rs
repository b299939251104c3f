//! What a hostile back end finds out about guest memory: everything with `memory=shared`, nothing
//! with `memory=bounce`. The back end is a process of its own, which does an entropy source's work
//! and uses all that it is given to look for a secret.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anemone_driver::spy::identity;
use anemone_ipc::FdIndex;
use anemone_ipc::vmm::{Bounce, Device, Event, FromVmm, ToVmm};
use common::{ECAM, MEMORY, MORE_FDS, Vmm, sealed};

/// virtio device types.
const NET: u16 = 1;
const DISK: u16 = 2;
const RNG: u16 = 4;
const BALLOON: u16 = 5;
const VSOCK: u16 = 19;
const FS: u16 = 26;
const PMEM: u16 = 27;

const SLOT: u64 = 2;
const BAR: u64 = 0xC020_0000;
const PATIENCE: Duration = Duration::from_secs(30);
const REGION: u64 = 512 << 10;
/// Where the queue and its buffer lie in guest memory.
const DESCRIPTORS: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const BUFFER: u64 = 0x20_3000;
const ENTRIES: u64 = 8;
/// Where the secret lies: beside the rings, beside the buffer, in its page, and far from all that.
const SECRETS: [u64; 4] = [DESCRIPTORS + 0x800, BUFFER + 64, 0x30_0000, MEMORY - 32];
/// Requests after which the spy forges its rings.
const POLITE: u64 = 3;

/// Not a constant, so that it is in guest memory only where the test puts it.
fn secret() -> String {
    let bytes = (0..32u32).map(|i| format!("{:02x}", (i * 197 + 0x4D) as u8));
    bytes.collect()
}

/// The hostile back end.
struct Spy {
    child: Child,
    socket: UnixStream,
    lines: Receiver<String>,
    report: Vec<String>,
    _folder: tempfile::TempDir,
}

impl Spy {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program =
            Path::new(env!("CARGO_BIN_EXE_anemone-vmm")).with_file_name("examples/vhost-spy");
        assert!(
            program.exists(),
            "{} is not built; build the workspace with --all-targets",
            program.display()
        );
        let path = folder.path().join("socket");
        let mut child = Command::new(program)
            .arg(&path)
            .arg(secret())
            .arg(POLITE.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let end = Instant::now() + PATIENCE;
        let socket = loop {
            match UnixStream::connect(&path) {
                Ok(socket) => break socket,
                Err(e) => assert!(Instant::now() < end, "{e}"),
            }
            thread::sleep(Duration::from_millis(5));
        };
        Self {
            child,
            socket,
            lines,
            report: Vec::new(),
            _folder: folder,
        }
    }

    /// Waits for a line that begins so, and returns it.
    fn wait(&mut self, start: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.report.push(line.clone());
                    if line.starts_with(start) {
                        return line;
                    }
                }
                Err(_) => panic!("no line {start:?} after\n{}", self.report.join("\n")),
            }
        }
    }

    /// The numbers of secrets that it has found, each time it looked.
    fn found(&self) -> Vec<usize> {
        let looks = self.report.iter().filter(|l| l.starts_with("looked at"));
        looks
            .map(|line| line.rsplit_once("found ").unwrap().1.parse().unwrap())
            .collect()
    }

    /// What it was given descriptors of.
    fn identities(&self) -> Vec<&str> {
        let given = self
            .report
            .iter()
            .filter(|l| l.starts_with("descriptor of"));
        given
            .map(|line| line.split(": ").nth(1).unwrap().split(',').next().unwrap())
            .collect()
    }
}

impl Drop for Spy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running machine with the spy as a device of this type, the secret in its memory.
fn machine(spy: &Spy, device_type: u16, bounce: bool) -> Vmm {
    let region = sealed(REGION);
    let fds = [spy.socket.as_fd(), region.as_fd()];
    let (mut vmm, answer) = Vmm::configure_with(&fds[..1 + usize::from(bounce)], |config| {
        config.devices.push(Device {
            id: "spy".to_owned(),
            device_type,
            slot: SLOT as u8,
            queues: 1,
            queue_size: 256,
            config_size: 0,
            config: None,
            socket: Some(FdIndex(MORE_FDS)),
            pmem: None,
            bounce: bounce.then_some(Bounce {
                fd: Some(FdIndex(MORE_FDS + 1)),
                size: REGION,
            }),
        });
    });
    assert!(matches!(answer, FromVmm::Ready(_)), "{answer:?}");
    vmm.channel.send(&ToVmm::Start, &[]).unwrap();
    vmm.ask(&format!("write {:#x} 2 6", ECAM + (SLOT << 15) + 4));
    for at in SECRETS {
        vmm.ask(&format!("store {at:#x} {}", secret()));
    }
    vmm
}

/// What a driver does from reset to DRIVER_OK.
fn set_up(vmm: &mut Vmm) {
    vmm.ask(&format!("write {AVAILABLE:#x} 4 0"));
    vmm.ask(&format!("write {USED:#x} 4 0"));
    // One writable buffer of 64 bytes.
    vmm.ask(&format!("write {DESCRIPTORS:#x} 8 {BUFFER:#x}"));
    vmm.ask(&format!("write {:#x} 4 64", DESCRIPTORS + 8));
    vmm.ask(&format!("write {:#x} 4 2", DESCRIPTORS + 12));
    let mut register = |offset: u64, width: u64, value: u64| {
        vmm.ask(&format!("write {:#x} {width} {value}", BAR + offset));
    };
    for (offset, width, value) in [
        (20, 1, 1),
        (20, 1, 3),
        (8, 4, 1),
        (12, 4, 1), // VIRTIO_F_VERSION_1 and nothing else
        (20, 1, 11),
        (22, 2, 0),
        (24, 2, ENTRIES),
        (32, 8, DESCRIPTORS),
        (40, 8, AVAILABLE),
        (48, 8, USED),
        (28, 2, 1),
        (20, 1, 15),
    ] {
        register(offset, width, value);
    }
    assert_eq!(status(vmm), 15);
}

fn status(vmm: &mut Vmm) -> u64 {
    vmm.number(&format!("read {:#x} 1", BAR + 20))
}

/// Offers the buffer for the `n`th time.
fn offer(vmm: &mut Vmm, n: u64) {
    vmm.ask(&format!("store {BUFFER:#x} {}", "00".repeat(64)));
    vmm.ask(&format!(
        "write {:#x} 2 0",
        AVAILABLE + 4 + (n - 1) % ENTRIES * 2
    ));
    vmm.ask(&format!("write {:#x} 2 {n}", AVAILABLE + 2));
    vmm.ask(&format!("write {:#x} 2 0", BAR + 0x3000));
}

/// The same, and waits until it is filled.
fn request(vmm: &mut Vmm, n: u64) {
    offer(vmm, n);
    wait("the used buffer", || {
        vmm.number(&format!("read {:#x} 2", USED + 2)) == n
    });
    let data: String = (0..64u8).map(|i| format!("{:02x}", i ^ 0xC3)).collect();
    assert_eq!(vmm.ask(&format!("load {BUFFER:#x} 64")), data);
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} has not come");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Without this the next test would show nothing.
#[test]
fn shared_memory_shows_every_secret() {
    let mut spy = Spy::start();
    let mut vmm = machine(&spy, RNG, false);
    set_up(&mut vmm);
    for n in 1..=POLITE {
        request(&mut vmm, n);
    }
    spy.wait("tried forged rings");
    let guest = identity(vmm.memory.as_fd()).unwrap().0;
    assert!(spy.identities().contains(&guest.as_str()));
    assert!(spy.found().contains(&SECRETS.len()), "{:?}", spy.found());
}

#[test]
fn bounced_back_end_finds_no_secret_whatever_it_tries() {
    finds_no_secret(RNG);
}

/// The copying side has rules of its own for some types: a status, and lists of pages.
#[test]
fn bounced_back_ends_of_other_types_find_no_secret_either() {
    for device_type in [NET, DISK, BALLOON, VSOCK, FS, PMEM] {
        finds_no_secret(device_type);
    }
}

fn finds_no_secret(device_type: u16) {
    let mut spy = Spy::start();
    let mut vmm = machine(&spy, device_type, true);
    set_up(&mut vmm);
    for n in 1..=POLITE {
        request(&mut vmm, n);
    }
    spy.wait("tried forged rings");
    wait("the device's failure", || status(&mut vmm) & 64 != 0);

    // A reset makes the device whole, and the spy asks for more.
    vmm.ask(&format!("write {:#x} 1 0", BAR + 20));
    wait("the reset", || status(&mut vmm) == 0);
    set_up(&mut vmm);
    for n in 1..POLITE {
        request(&mut vmm, n);
    }
    offer(&mut vmm, POLITE);
    let last = "BACKEND_SHMEM_MAP";
    spy.wait(&format!("tried {last}"));
    let Event::BackendLost { reason, .. } = vmm.event() else {
        panic!("another event")
    };
    assert!(reason.contains("was not invited"), "{reason}");

    let guest = identity(vmm.memory.as_fd()).unwrap().0;
    assert!(
        !spy.identities().contains(&guest.as_str()),
        "{:?}",
        spy.report
    );
    let tried: Vec<_> = spy
        .report
        .iter()
        .filter(|l| l.starts_with("tried"))
        .collect();
    assert!(tried.len() >= 6, "{tried:?}");
    assert!(
        tried
            .iter()
            .all(|l| l.contains(": refused") || l.contains("forged")),
        "{tried:?}"
    );
    let regions = format!(": {REGION} bytes");
    let given = spy.report.iter().filter(|l| l.starts_with("region"));
    assert!(given.clone().count() > 0 && given.clone().all(|l| l.ends_with(&regions)));
    let found = spy.found();
    assert!(
        found.len() >= 7 && found.iter().all(|n| *n == 0),
        "{found:?}"
    );
}
