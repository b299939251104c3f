//! The front end against a back end we did not write: QEMU's storage daemon.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::fs::File;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, protocol_features};
use anemone_vhost_user::{Error, Frontend, MemoryRegion, Request, VringAddr};

struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(folder: &Path) -> (Daemon, UnixStream) {
    let image = folder.join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let socket = folder.join("socket");
    let child = Command::new("qemu-storage-daemon")
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=disk,filename={}",
            image.display()
        ))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            socket.display()
        ))
        .stdin(Stdio::null())
        .spawn()
        .expect("qemu-storage-daemon is in Debian's package qemu-system-common or qemu-utils");
    let daemon = Daemon(child);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => return (daemon, stream),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn memfd(size: u64) -> File {
    // SAFETY: the name is a C string; the result is a new descriptor or -1, which is checked.
    let fd = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        OwnedFd::from_raw_fd(fd)
    };
    let file = File::from(fd);
    file.set_len(size).unwrap();
    file
}

#[test]
fn front_end_sets_up_a_foreign_back_end() {
    let folder = tempfile::tempdir().unwrap();
    let (_daemon, socket) = start(folder.path());
    let mut front = Frontend::new(socket, Duration::from_secs(20));
    front.set_owner().unwrap();
    let features = front.features().unwrap();
    assert_ne!(features & F_PROTOCOL_FEATURES, 0);
    assert_ne!(features & (1 << 32), 0, "VIRTIO_F_VERSION_1");
    let offered = front.protocol_features().unwrap();
    let wanted = protocol_features::MQ
        | protocol_features::REPLY_ACK
        | protocol_features::CONFIG
        | protocol_features::BACKEND_REQ;
    assert_eq!(offered & wanted, wanted, "{offered:#x}");
    front.set_protocol_features(wanted).unwrap();
    front
        .set_features(features & (F_PROTOCOL_FEATURES | 1 << 32))
        .unwrap();
    assert_eq!(front.queue_num().unwrap(), 2);
    // struct virtio_blk_config: capacity in sectors first, the number of queues at 34.
    let config = front.config(0, 60).unwrap();
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    assert_eq!(config[34..36], 2u16.to_le_bytes());
    let memory = memfd(1 << 20);
    let region = MemoryRegion {
        guest_addr: 0,
        size: 1 << 20,
        user_addr: 0x7000_0000,
        fd: memory.as_fd(),
        offset: 0,
    };
    front.set_mem_table(&[region]).unwrap();
    front.set_vring_num(0, 64).unwrap();
    front.set_vring_base(0, 5).unwrap();
    let addr = VringAddr {
        descriptor: 0x7000_0000,
        available: 0x7000_1000,
        used: 0x7000_2000,
        log: None,
    };
    front.set_vring_addr(0, &addr).unwrap();
    assert_eq!(front.get_vring_base(0).unwrap(), 5);
    assert!(matches!(
        front.reset_device(),
        Err(Error::NotNegotiated(Request::ResetDevice))
    ));
}
