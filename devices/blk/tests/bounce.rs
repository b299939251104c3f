//! A disk behind a bounce, as `memory=bounce` sets it up: the process sees a region in place of guest
//! memory, and is killed again and again while requests are in flight.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anemone_accel_api::EventFd;
use anemone_driver::blk::{Requests, request, status};
use anemone_driver::{Memory, Process, Queue};
use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, protocol_features};
use anemone_vhost_user::{Frontend, MemoryRegion, VringAddr};
use anemone_virtio::{Bounce, Start, StartQueue};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const PATIENCE: Duration = Duration::from_secs(20);
/// virtio device type of a disk.
const DISK: u16 = 2;
const ENTRIES: u16 = 64;
const DEPTH: usize = 16;
/// Longer requests than a page, so that copies meet other parts of the region.
const LENGTH: u32 = 20 << 10;
const SLOTS: u64 = 256;
const KILLS: usize = 25;
/// The data area has room for fewer requests than there are, so that some wait.
const REGION: u64 = (8 << 10) + (160 << 10);

fn memfd(size: u64) -> OwnedFd {
    // SAFETY: a NUL-terminated name; the new descriptor is owned by the File at once.
    let file = unsafe {
        let fd = libc::memfd_create(c"bounce".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file.into()
}

/// What stays while disk processes come and go.
struct Machine {
    memory: Arc<Memory>,
    queue: Queue,
    bounce: Arc<Mutex<Bounce>>,
    stop: Arc<AtomicBool>,
    features: u64,
    start: Start,
    inflight: Option<(OwnedFd, u64, u64)>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Machine {
    fn new(features: u64) -> Self {
        let memory = Arc::new(Memory::new(8 << 20).unwrap());
        let file = File::from(memory.as_fd().try_clone_to_owned().unwrap());
        let ram = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(0),
            memory.size() as usize,
            Some(FileOffset::new(file, 0)),
        )])
        .unwrap();
        let mut bounce = Bounce::new(DISK, 1, memfd(REGION), REGION, ram).unwrap();
        let queue = Queue::new(&memory, ENTRIES, features & 1 << 29 != 0).unwrap();
        let guest = queue.addresses();
        let event = |fd: BorrowedFd<'_>| Arc::new(EventFd::duplicate(fd).unwrap());
        let start = bounce.start(&Start {
            features,
            queues: vec![StartQueue {
                index: 0,
                size: ENTRIES,
                descriptors: guest.descriptor - Memory::USER_BASE,
                available: guest.available - Memory::USER_BASE,
                used: guest.used - Memory::USER_BASE,
                kick: event(queue.kick_fd()),
                call: event(queue.call_fd()),
            }],
        });
        let bounce = Arc::new(Mutex::new(bounce));
        let stop = Arc::new(AtomicBool::new(false));
        let pump = (bounce.clone(), stop.clone());
        thread::spawn(move || {
            while !pump.1.load(Ordering::Relaxed) {
                let mut entries: Vec<_> = pump.0.lock().unwrap().poll_entries().collect();
                let count = entries.len() as libc::nfds_t;
                // SAFETY: initialised entries, counted. The bounce keeps the descriptors.
                unsafe { libc::poll(entries.as_mut_ptr(), count, 5) };
                pump.0.lock().unwrap().turn(&entries).unwrap();
            }
        });
        Self {
            memory,
            queue,
            bounce,
            stop,
            features,
            start,
            inflight: None,
        }
    }

    /// Gives the queue to a process: the first one, or one that takes over.
    fn give(&mut self, process: &mut Process) -> Frontend {
        let mut front_end = connect(process);
        front_end
            .set_features(self.features | F_PROTOCOL_FEATURES)
            .unwrap();
        let mut bounce = self.bounce.lock().unwrap();
        bounce.resume().unwrap();
        let table = bounce.table();
        let regions: Vec<_> = table
            .regions
            .iter()
            .map(|(start, size, fd, offset)| MemoryRegion {
                guest_addr: *start,
                size: *size,
                user_addr: *start,
                fd: fd.as_fd(),
                offset: *offset,
            })
            .collect();
        front_end.set_mem_table(&regions).unwrap();
        let inflight = self
            .inflight
            .get_or_insert_with(|| front_end.get_inflight_fd(1, ENTRIES).unwrap());
        front_end
            .set_inflight_fd(inflight.0.as_fd(), inflight.1, inflight.2, 1, ENTRIES)
            .unwrap();
        let q = &self.start.queues[0];
        let base = table.mapped.read_obj(GuestAddress(q.used + 2)).unwrap();
        front_end.set_vring_num(0, q.size).unwrap();
        front_end.set_vring_base(0, base).unwrap();
        let address = VringAddr {
            descriptor: q.descriptors,
            used: q.used,
            available: q.available,
            log: None,
        };
        front_end.set_vring_addr(0, &address).unwrap();
        front_end.set_vring_call(0, q.call.as_fd()).unwrap();
        front_end.set_vring_kick(0, q.kick.as_fd()).unwrap();
        front_end.set_vring_enable(0, true).unwrap();
        q.kick.signal();
        q.call.signal();
        front_end
    }
}

fn connect(process: &mut Process) -> Frontend {
    let socket: UnixStream = process.connect().unwrap();
    let mut front_end = Frontend::new(socket, PATIENCE);
    front_end.set_owner().unwrap();
    let wanted = protocol_features::REPLY_ACK | protocol_features::INFLIGHT_SHMFD;
    let offered = front_end.protocol_features().unwrap() & wanted;
    assert_eq!(offered, wanted);
    front_end.set_protocol_features(offered).unwrap();
    front_end
}

fn content(seed: u64) -> Vec<u8> {
    (0..LENGTH)
        .map(|i| (u64::from(i) * 31 + seed * 7 + (seed >> 8)) as u8)
        .collect()
}

#[test]
fn every_acknowledged_write_is_there_after_many_kills() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    File::create(&image)
        .unwrap()
        .set_len(SLOTS * u64::from(LENGTH))
        .unwrap();
    let image = image.to_str().unwrap().to_owned();
    let start = || Process::start(env!("CARGO_BIN_EXE_anemone-blk"), &["--image", &image]).unwrap();
    let mut process = start();
    let features = connect(&mut process).features().unwrap();
    let mut machine = Machine::new(features & (1 << 28 | 1 << 29 | 1 << 32));
    let mut front_end = machine.give(&mut process);
    let memory = machine.memory.clone();
    let mut requests = Requests::new(&memory, ENTRIES, DEPTH, LENGTH, true);
    // What each place holds, and what each request in flight does: place, seed of a write.
    let mut written: BTreeMap<u64, u64> = BTreeMap::new();
    let mut doing: [Option<(u64, Option<u64>)>; DEPTH] = [None; DEPTH];
    let (mut kills, mut checked, mut number) = (0, 0, 0u64);
    let mut next_kill = 40;
    while kills < KILLS || requests.in_flight() > 0 {
        while let Some(slot) = requests.next_slot().filter(|_| kills < KILLS) {
            number += 1;
            let place = number * 37 % SLOTS;
            // Requests to one place do not overtake each other in this test.
            if doing.iter().flatten().any(|d| d.0 == place) {
                continue;
            }
            let write = number % 3 != 0 || !written.contains_key(&place);
            if write {
                memory.write(requests.data(slot), &content(number));
            }
            let kind = if write { request::OUT } else { request::IN };
            let sector = place * u64::from(LENGTH / 512);
            let queue = &mut machine.queue;
            let taken = requests.submit(&memory, queue, kind, sector, LENGTH);
            assert_eq!(taken, Some(slot));
            doing[slot] = Some((place, write.then_some(number)));
        }
        machine.queue.publish();
        machine.queue.kick();
        if number >= next_kill && kills < KILLS {
            kills += 1;
            next_kill = number + 20 + number * 13 % 40;
            process.child().kill().unwrap();
            process.wait().unwrap();
            drop(front_end);
            process = start();
            front_end = machine.give(&mut process);
        }
        let end = Instant::now() + PATIENCE;
        assert!(
            machine.queue.wait(end - Instant::now()).unwrap(),
            "kill {kills}"
        );
        while let Some(done) = requests.finish(&memory, &mut machine.queue) {
            assert_eq!(done.status, status::OK);
            match doing[done.slot].take().unwrap() {
                (place, Some(seed)) => drop(written.insert(place, seed)),
                (place, None) => {
                    let data = memory.read_vec(requests.data(done.slot), LENGTH as usize);
                    assert!(data == content(written[&place]), "place {place}");
                    checked += 1;
                }
            }
        }
    }
    assert!(checked > 100, "{checked} reads");
    drop(front_end);
    let bytes = std::fs::read(&image).unwrap();
    for (place, seed) in written {
        let at = (place * u64::from(LENGTH)) as usize;
        assert!(
            bytes[at..at + LENGTH as usize] == content(seed),
            "place {place}"
        );
    }
}
