//! A virtio device from the guest's side to its back end: registers in `anemone-vmm`, vhost-user
//! to a real `anemone-rng`, queue and interrupt by hand. And back ends that misbehave.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

mod common;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anemone_driver::Process;
use anemone_ipc::FdIndex;
use anemone_ipc::vmm::{Bounce, Device, Event, FromVmm, ToVmm};
use common::{ECAM, MORE_FDS, Vmm, sealed};

const SLOT: u64 = 2;
const BAR: u64 = 0xC020_0000;
const CONFIG: u64 = ECAM + (SLOT << 15);
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the queue and its buffer lie in guest memory.
const DESCRIPTORS: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const BUFFER: u64 = 0x20_3000;
/// The interrupt that the queue's vector sends.
const MESSAGE: (u64, u64) = (0xFEE0_0000, 0x41);

fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_anemone-vmm")).with_file_name(name);
    assert!(
        path.exists(),
        "{} is not built; build the workspace",
        path.display()
    );
    path
}

fn rng(socket: u16) -> Device {
    Device {
        id: "rng".to_owned(),
        device_type: 4,
        slot: SLOT as u8,
        queues: 1,
        queue_size: 256,
        config_size: 0,
        config: None,
        socket: Some(FdIndex(socket)),
        pmem: None,
        bounce: None,
    }
}

/// A machine whose one device is served over `socket`, its memory shared or not.
fn machine(socket: &UnixStream, bounce: bool) -> (Vmm, FromVmm) {
    const REGION: u64 = 264 << 10;
    let region = sealed(REGION);
    let fds = [socket.as_fd(), region.as_fd()];
    Vmm::configure_with(&fds[..1 + usize::from(bounce)], |config| {
        config.devices.push(Device {
            bounce: bounce.then_some(Bounce {
                fd: Some(FdIndex(MORE_FDS + 1)),
                size: REGION,
            }),
            ..rng(MORE_FDS)
        })
    })
}

fn connect(process: &Process) -> UnixStream {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(process.socket()) {
            Ok(socket) => return socket,
            Err(e) => assert!(Instant::now() < end, "{e}"),
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// A running machine and its entropy source.
fn running(bounce: bool) -> (Vmm, Process) {
    let process = Process::start(program("anemone-rng"), &[]).unwrap();
    let socket = connect(&process);
    let (mut vmm, answer) = machine(&socket, bounce);
    assert!(matches!(answer, FromVmm::Ready(_)), "{answer:?}");
    vmm.channel.send(&ToVmm::Start, &[]).unwrap();
    vmm.ask(&format!("write {:#x} 2 6", CONFIG + 4));
    (vmm, process)
}

/// Finds the MSI-X capability and lets vector 1, unmasked or not, send [`MESSAGE`].
fn enable_msix(vmm: &mut Vmm, masked: bool) {
    let mut at = vmm.number(&format!("read {:#x} 1", CONFIG + 0x34));
    while vmm.number(&format!("read {:#x} 1", CONFIG + at)) != 0x11 {
        at = vmm.number(&format!("read {:#x} 1", CONFIG + at + 1));
        assert_ne!(at, 0, "no MSI-X capability");
    }
    let entry = BAR + 0x4000 + 16;
    vmm.ask(&format!("write {entry:#x} 8 {}", MESSAGE.0));
    vmm.ask(&format!("write {:#x} 4 {}", entry + 8, MESSAGE.1));
    vmm.ask(&format!("write {:#x} 4 {}", entry + 12, u64::from(masked)));
    vmm.ask(&format!("write {:#x} 2 0x8000", CONFIG + at + 2));
}

/// What a driver does from reset to DRIVER_OK, with the queue at its fixed place.
fn set_up(vmm: &mut Vmm) {
    let mut register = |offset: u64, width: u64, value: u64| {
        vmm.ask(&format!("write {:#x} {width} {value}", BAR + offset));
    };
    register(20, 1, 1);
    register(20, 1, 3);
    register(8, 4, 1);
    register(12, 4, 1); // VIRTIO_F_VERSION_1 and nothing else
    register(20, 1, 11);
    register(22, 2, 0);
    register(24, 2, 8);
    register(26, 2, 1);
    register(32, 8, DESCRIPTORS);
    register(40, 8, AVAILABLE);
    register(48, 8, USED);
    register(28, 2, 1);
    register(20, 1, 15);
    assert_eq!(vmm.number(&format!("read {:#x} 1", BAR + 20)), 15);
    // One writable buffer of 64 bytes.
    vmm.ask(&format!("write {DESCRIPTORS:#x} 8 {BUFFER:#x}"));
    vmm.ask(&format!("write {:#x} 4 64", DESCRIPTORS + 8));
    vmm.ask(&format!("write {:#x} 4 2", DESCRIPTORS + 12));
}

/// Offers the buffer for the `n`th time and rings.
fn request(vmm: &mut Vmm, n: u64) {
    vmm.ask(&format!(
        "write {:#x} 2 0",
        AVAILABLE + 4 + ((n - 1) % 8) * 2
    ));
    vmm.ask(&format!("write {:#x} 2 {n}", AVAILABLE + 2));
    vmm.ask(&format!("write {:#x} 2 0", BAR + 0x3000));
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} has not come");
        thread::sleep(Duration::from_millis(1));
    }
}

fn wait_used(vmm: &mut Vmm, n: u64) {
    wait("the used buffer", || {
        vmm.number(&format!("read {:#x} 2", USED + 2)) == n
    });
}

/// Whether the queue has interrupted since the last call. More than once is allowed.
fn interrupted(vmm: &mut Vmm) -> bool {
    let answer = vmm.ask("interrupts");
    let expected = format!("{:#x}:{:#x}:", MESSAGE.0, MESSAGE.1);
    assert!(
        answer.is_empty() || answer.starts_with(&expected),
        "{answer}"
    );
    !answer.is_empty()
}

/// Each of these once with a back end that sees guest memory, once with one that does not.
macro_rules! both {
    ($($name:ident),*) => {
        mod shared {
            $(#[test]
            fn $name() {
                super::$name(false);
            })*
        }
        mod bounced {
            $(#[test]
            fn $name() {
                super::$name(true);
            })*
        }
    };
}

both!(
    entropy_arrives_with_its_interrupt,
    interrupt_while_masked_is_pending_and_then_delivered,
    device_is_reset_and_used_again,
    ring_that_is_not_memory_fails_the_device_and_not_the_machine,
    killed_back_ends_are_replaced_and_no_request_is_lost,
    driver_resets_and_starts_a_device_whose_back_end_is_gone,
    use_of_a_device_is_told
);

fn entropy_arrives_with_its_interrupt(bounce: bool) {
    let (mut vmm, _process) = running(bounce);
    enable_msix(&mut vmm, false);
    set_up(&mut vmm);
    request(&mut vmm, 1);
    wait_used(&mut vmm, 1);
    wait("the interrupt", || interrupted(&mut vmm));
    assert_eq!(
        vmm.number(&format!("read {:#x} 4", USED + 8)),
        64,
        "bytes written"
    );
    let first = vmm.ask(&format!("load {BUFFER:#x} 64"));
    assert_ne!(first, "00".repeat(64));
    request(&mut vmm, 2);
    wait_used(&mut vmm, 2);
    assert_ne!(vmm.ask(&format!("load {BUFFER:#x} 64")), first);
}

fn interrupt_while_masked_is_pending_and_then_delivered(bounce: bool) {
    let (mut vmm, _process) = running(bounce);
    enable_msix(&mut vmm, true);
    set_up(&mut vmm);
    request(&mut vmm, 1);
    wait_used(&mut vmm, 1);
    let pending = format!("read {:#x} 8", BAR + 0x5000);
    wait("the pending bit", || vmm.number(&pending) == 0b10);
    assert!(!interrupted(&mut vmm));
    vmm.ask(&format!("write {:#x} 4 0", BAR + 0x4000 + 16 + 12));
    assert_eq!(vmm.number(&pending), 0);
    wait("the interrupt", || interrupted(&mut vmm));
}

fn device_is_reset_and_used_again(bounce: bool) {
    let (mut vmm, _process) = running(bounce);
    for _ in 0..20 {
        set_up(&mut vmm);
        request(&mut vmm, 1);
        wait_used(&mut vmm, 1);
        vmm.ask(&format!("write {:#x} 1 0", BAR + 20));
        wait("the reset", || {
            vmm.number(&format!("read {:#x} 1", BAR + 20)) == 0
        });
        // The rings of the next driver begin anew.
        vmm.ask(&format!("write {:#x} 4 0", AVAILABLE));
        vmm.ask(&format!("write {:#x} 4 0", USED));
    }
}

fn ring_that_is_not_memory_fails_the_device_and_not_the_machine(bounce: bool) {
    let (mut vmm, _process) = running(bounce);
    set_up(&mut vmm);
    vmm.ask(&format!("write {:#x} 1 0", BAR + 20));
    wait("the reset", || {
        vmm.number(&format!("read {:#x} 1", BAR + 20)) == 0
    });
    for (offset, value) in [(20, 1), (20, 3), (8, 1), (12, 1), (20, 11)] {
        vmm.ask(&format!(
            "write {:#x} {} {value}",
            BAR + offset,
            if offset == 20 { 1 } else { 4 }
        ));
    }
    vmm.ask(&format!("write {:#x} 8 0xffffffff0000", BAR + 32));
    vmm.ask(&format!("write {:#x} 2 1", BAR + 28));
    vmm.ask(&format!("write {:#x} 1 15", BAR + 20));
    let status = vmm.number(&format!("read {:#x} 1", BAR + 20));
    assert_ne!(status & 64, 0, "DEVICE_NEEDS_RESET is set");
    vmm.ask(&format!("write {:#x} 1 0", BAR + 20));
    set_up(&mut vmm);
    request(&mut vmm, 1);
    wait_used(&mut vmm, 1);
}

/// Hands over the connection to the next back end.
fn reconnect(vmm: &Vmm, connection: u32, socket: &UnixStream) {
    let message = ToVmm::Reconnect {
        id: "rng".to_owned(),
        connection,
        socket: FdIndex(0),
    };
    vmm.channel.send(&message, &[socket.as_fd()]).unwrap();
}

fn expect_lost(vmm: &Vmm, wanted: u32) -> String {
    match vmm.event() {
        Event::BackendLost {
            id,
            connection,
            reason,
        } => {
            assert_eq!((id.as_str(), connection), ("rng", wanted));
            reason
        }
        other => panic!("{other:?}"),
    }
}

fn expect_back(vmm: &Vmm, connection: u32) {
    let id = "rng".to_owned();
    assert_eq!(vmm.event(), Event::BackendBack { id, connection });
}

fn killed_back_ends_are_replaced_and_no_request_is_lost(bounce: bool) {
    let (mut vmm, mut process) = running(bounce);
    enable_msix(&mut vmm, false);
    set_up(&mut vmm);
    request(&mut vmm, 1);
    wait_used(&mut vmm, 1);
    for round in 1..=5 {
        drop(process);
        let reason = expect_lost(&vmm, round - 1);
        assert!(reason.contains("closed"), "{reason}");
        // The registers answer, and a request waits.
        let requests = 1 + u64::from(round);
        request(&mut vmm, requests);
        assert_eq!(vmm.number(&format!("read {:#x} 1", BAR + 20)), 15);
        assert_eq!(vmm.number(&format!("read {:#x} 2", USED + 2)), requests - 1);
        process = Process::start(program("anemone-rng"), &[]).unwrap();
        interrupted(&mut vmm);
        reconnect(&vmm, round, &connect(&process));
        wait_used(&mut vmm, requests);
        wait("the interrupt", || interrupted(&mut vmm));
        expect_back(&vmm, round);
    }
}

fn driver_resets_and_starts_a_device_whose_back_end_is_gone(bounce: bool) {
    let (mut vmm, process) = running(bounce);
    set_up(&mut vmm);
    drop(process);
    expect_lost(&vmm, 0);
    for _ in 0..2 {
        vmm.ask(&format!("write {:#x} 1 0", BAR + 20));
        wait("the reset", || {
            vmm.number(&format!("read {:#x} 1", BAR + 20)) == 0
        });
        set_up(&mut vmm);
    }
    request(&mut vmm, 1);
    // One that fails at once, and one that works.
    let (socket, other) = UnixStream::pair().unwrap();
    drop(other);
    reconnect(&vmm, 1, &socket);
    expect_lost(&vmm, 1);
    let process = Process::start(program("anemone-rng"), &[]).unwrap();
    reconnect(&vmm, 2, &connect(&process));
    wait_used(&mut vmm, 1);
    expect_back(&vmm, 2);
}

fn use_of_a_device_is_told(bounce: bool) {
    let untouched = |vmm: &Vmm| {
        vmm.channel.send(&ToVmm::Devices, &[]).unwrap();
        match vmm.channel.recv().unwrap().message {
            FromVmm::Devices(mut devices) => {
                assert_eq!((devices.len(), devices[0].id.as_str()), (1, "rng"));
                devices.remove(0).untouched.unwrap_or_default()
            }
            other => panic!("{other:?}"),
        }
    };
    let (mut vmm, _process) = running(bounce);
    assert!(untouched(&vmm).contains("no driver"));
    vmm.ask(&format!("write {:#x} 1 3", BAR + 20));
    assert!(untouched(&vmm).contains("never said that it was ready"));
    // FEATURES_OK without VIRTIO_F_VERSION_1.
    vmm.ask(&format!("write {:#x} 1 11", BAR + 20));
    assert!(untouched(&vmm).contains("did not agree on features"));
    vmm.ask(&format!("write {:#x} 1 0", BAR + 20));
    set_up(&mut vmm);
    assert!(untouched(&vmm).contains("never made a request"));
    request(&mut vmm, 1);
    assert_eq!(untouched(&vmm), "");
    vmm.ask(&format!("write {:#x} 1 0", BAR + 20));
    assert_eq!(untouched(&vmm), "");
}

#[test]
fn back_ends_that_do_not_speak_vhost_user_are_refused() {
    let refusal = |back_end: fn(UnixStream)| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let player = thread::spawn(move || back_end(ours));
        let (mut vmm, answer) = machine(&theirs, false);
        drop(theirs);
        let FromVmm::Refused { message } = answer else {
            panic!("{answer:?}")
        };
        vmm.child.wait().unwrap();
        player.join().unwrap();
        assert!(message.contains("`rng`"), "{message}");
        message
    };
    assert!(refusal(drop).contains("closed"));
    // Rubbish, then a header that announces far too much, then one for another request.
    refusal(|mut socket| {
        let _ = socket.write_all(&[0xA5; 64]);
        let _ = socket.read(&mut [0; 64]);
    });
    refusal(|mut socket| {
        let _ = socket.read(&mut [0; 64]);
        let _ = socket.write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0x7F]);
    });
    refusal(|mut socket| {
        let _ = socket.read(&mut [0; 64]);
        let mut reply = [0; 20];
        reply[..12].copy_from_slice(&[15, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        let _ = socket.write_all(&reply);
    });
    // A legacy device: no VIRTIO_F_VERSION_1.
    let legacy = refusal(|mut socket| {
        let mut request = [0; 24];
        let _ = socket.read(&mut request);
        let mut reply = [0; 20];
        reply[..12].copy_from_slice(&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]);
        let _ = socket.write_all(&reply);
        let _ = socket.read(&mut request);
    });
    assert!(legacy.contains("VERSION_1"), "{legacy}");
}
