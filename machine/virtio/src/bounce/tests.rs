//! A scripted guest on one side (the loop driver's queue), a scripted back end on the other (the
//! queue of rust-vmm over the region, or whatever a hostile one writes into it).

use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd};

use anemone_driver as driver;
use driver::Buffer;
use proptest::prelude::*;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};

use super::chain::{Descriptor, INDIRECT, NEXT, WRITE};
use super::queue::{F_EVENT_IDX, F_INDIRECT_DESC};
use super::*;
use crate::work::StartQueue;

const RAM: u64 = 8 << 20;
const QUEUE: u16 = 16;
const NET: u16 = 1;
const CONSOLE: u16 = 3;
/// What nobody has written.
const UNTOUCHED: u8 = 0xEE;

fn memfd(size: u64) -> File {
    // SAFETY: a NUL-terminated name; the new descriptor is owned by the File at once.
    let file = unsafe {
        let fd = libc::memfd_create(c"region".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

fn map(fd: BorrowedFd<'_>, start: u64, size: u64) -> GuestMemoryMmap {
    let file = File::from(fd.try_clone_to_owned().unwrap());
    let range = (
        GuestAddress(start),
        size as usize,
        Some(FileOffset::new(file, 0)),
    );
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

fn event(fd: BorrowedFd<'_>) -> Arc<EventFd> {
    Arc::new(EventFd::duplicate(fd).unwrap())
}

fn start_queue(index: u16, queue: &driver::Queue) -> StartQueue {
    let addresses = queue.addresses();
    StartQueue {
        index,
        size: QUEUE,
        descriptors: addresses.descriptor - driver::Memory::USER_BASE,
        available: addresses.available - driver::Memory::USER_BASE,
        used: addresses.used - driver::Memory::USER_BASE,
        kick: event(queue.kick_fd()),
        call: event(queue.call_fd()),
    }
}

struct Setup {
    bounce: Bounce,
    memory: Arc<driver::Memory>,
    /// The guest's queue 0, with features.
    guest: driver::Queue,
    features: u64,
    /// What the back end sees.
    region: GuestMemoryMmap,
    shadow: Start,
}

impl Setup {
    fn new(device_type: u16, features: u64, region: u64) -> Self {
        let memory = Arc::new(driver::Memory::new(RAM).unwrap());
        let fd = memfd(region);
        let view = map(fd.as_fd(), BASE, region);
        let ram = map(memory.as_fd(), 0, RAM);
        let bounce = Bounce::new(device_type, 3, fd.into(), region, ram).unwrap();
        let guest = driver::Queue::new(&memory, QUEUE, features & F_EVENT_IDX != 0).unwrap();
        let mut setup = Self {
            bounce,
            memory,
            guest,
            features,
            region: view,
            shadow: Start {
                features,
                queues: Vec::new(),
            },
        };
        setup.start(0);
        setup
    }

    /// Starts the queue under a number.
    fn start(&mut self, index: u16) {
        let start = Start {
            features: self.features,
            queues: vec![start_queue(index, &self.guest)],
        };
        self.shadow = self.bounce.start(&start);
    }

    fn back_end(&self) -> BackEnd {
        self.back_end_of(0)
    }

    /// The back end of the queue that was started at this place.
    fn back_end_of(&self, place: usize) -> BackEnd {
        let q = &self.shadow.queues[place];
        let mut queue = virtio_queue::Queue::new(256).unwrap();
        queue.set_size(q.size);
        queue
            .try_set_desc_table_address(GuestAddress(q.descriptors))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(q.available))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(q.used))
            .unwrap();
        queue.set_event_idx(self.features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        BackEnd {
            region: self.region.clone(),
            queue,
            call: q.call.clone(),
            kick: q.kick.clone(),
        }
    }

    /// A buffer of the guest's, marked as untouched.
    fn buffer(&self, len: u32) -> Buffer {
        let addr = self.memory.alloc(u64::from(len) + 2, 1) + 1;
        self.memory
            .write(addr - 1, &vec![UNTOUCHED; len as usize + 2]);
        Buffer { addr, len }
    }

    fn filled(&self, data: &[u8]) -> Buffer {
        let buffer = self.buffer(data.len() as u32);
        self.memory.write(buffer.addr, data);
        buffer
    }

    /// The bytes of a buffer. Those around it have not been touched.
    fn bytes(&self, buffer: Buffer) -> Vec<u8> {
        let around = self
            .memory
            .read_vec(buffer.addr - 1, buffer.len as usize + 2);
        let end = around.len() - 1;
        assert_eq!((around[0], around[end]), (UNTOUCHED, UNTOUCHED));
        around[1..end].to_vec()
    }

    /// One round of the device thread, which does not wait.
    fn turn(&mut self) -> Result<(), String> {
        let mut entries: Vec<_> = self.bounce.poll_entries().collect();
        // SAFETY: initialised entries, counted.
        unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, 0) };
        self.bounce.turn(&entries).map_err(|e| e.to_string())
    }

    fn publish(&mut self) {
        self.guest.publish();
        self.guest.kick();
    }

    /// Where the chain that was offered first lies for the back end: its descriptors.
    fn shadow_descriptor(&self, index: u16) -> Descriptor {
        let mut bytes = [0; 16];
        let at = self.shadow.queues[0].descriptors + 16 * u64::from(index);
        self.region
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        Descriptor::from_bytes(bytes)
    }

    /// The back end's used ring as a hostile one writes it: entries from the first on, then the index.
    fn forge(&self, entries: &[(u32, u32)], index: u16) {
        let used = self.shadow.queues[0].used;
        for (i, (head, length)) in (0..).zip(entries) {
            let at = used + 4 + 8 * i;
            self.region.write_obj(*head, GuestAddress(at)).unwrap();
            self.region
                .write_obj(*length, GuestAddress(at + 4))
                .unwrap();
        }
        self.region
            .write_obj(index, GuestAddress(used + 2))
            .unwrap();
    }
}

/// A back end as its own process would be.
struct BackEnd {
    region: GuestMemoryMmap,
    queue: virtio_queue::Queue,
    call: Arc<EventFd>,
    kick: Arc<EventFd>,
}

/// What came in a chain: its head, the bytes to read, the buffers to write.
type Request = (u16, Vec<u8>, Vec<(u64, u32)>);

impl BackEnd {
    fn pop(&mut self) -> Option<Request> {
        let chain = self.queue.iter(&self.region).unwrap().next()?;
        let head = chain.head_index();
        let (mut data, mut writable) = (Vec::new(), Vec::new());
        for d in chain {
            assert!(
                self.region.check_range(d.addr(), d.len() as usize),
                "the back end is only given what it has"
            );
            if d.is_write_only() {
                writable.push((d.addr().0, d.len()));
            } else {
                let mut bytes = vec![0; d.len() as usize];
                self.region.read_slice(&mut bytes, d.addr()).unwrap();
                data.extend(bytes);
            }
        }
        Some((head, data, writable))
    }

    /// Answers with as much of `data` as there is room for; the number of bytes.
    fn push(&mut self, request: &Request, data: &[u8]) -> u32 {
        let mut rest = data;
        for &(at, length) in &request.2 {
            let (now, later) = rest.split_at(rest.len().min(length as usize));
            self.region.write_slice(now, GuestAddress(at)).unwrap();
            rest = later;
        }
        let written = (data.len() - rest.len()) as u32;
        self.push_length(request.0, written);
        written
    }

    fn push_length(&mut self, head: u16, length: u32) {
        self.queue.add_used(&self.region, head, length).unwrap();
        if self.queue.needs_notification(&self.region).unwrap() {
            self.call.signal();
        }
    }
}

/// What an echo back end answers: the request backwards, so that the order of buffers shows.
fn answer(request: &[u8]) -> Vec<u8> {
    request.iter().rev().map(|b| b ^ 0x55).collect()
}

fn all_features() -> [u64; 4] {
    [
        0,
        F_EVENT_IDX,
        F_INDIRECT_DESC,
        F_INDIRECT_DESC | F_EVENT_IDX,
    ]
}

#[test]
fn request_and_answer_pass_with_the_notifications_each_side_wants() {
    for features in all_features() {
        let mut s = Setup::new(CONSOLE, features, 1 << 20);
        let mut back_end = s.back_end();
        for round in 0..70u8 {
            let text: Vec<u8> = (0..40).map(|i| i ^ round).collect();
            let request = [s.filled(&text[..7]), s.filled(&text[7..])];
            let reply = [s.buffer(30), s.buffer(30)];
            if features & F_INDIRECT_DESC == 0 {
                s.guest.add(&request, &reply).unwrap();
            } else {
                s.guest.add_indirect(&request, &reply).unwrap();
            }
            // Asks for the interrupt, as a driver that is about to wait.
            s.guest.set_used_event(round.into());
            s.publish();
            s.turn().unwrap();
            assert_eq!(s.bounce.timeout(), -1, "nothing more to do");
            assert!(back_end.kick.take() > 0, "features {features:#x}");
            let request = back_end.pop().unwrap();
            assert_eq!(request.1, text);
            let lengths: Vec<_> = request.2.iter().map(|w| w.1).collect();
            assert_eq!(lengths, [30, 30], "the shape of the chain is the guest's");
            assert!(back_end.pop().is_none());
            back_end.queue.enable_notification(&s.region).unwrap();
            assert_eq!(back_end.push(&request, &answer(&text)), 40);
            s.turn().unwrap();
            assert!(s.guest.take_interrupt());
            assert_eq!(s.guest.take_used().unwrap().len, 40);
            assert!(s.guest.take_used().is_none());
            assert_eq!(
                [s.bytes(reply[0]), s.bytes(reply[1])[..10].to_vec()].concat(),
                answer(&text)
            );
            assert_eq!(
                s.bytes(reply[1])[10..],
                [UNTOUCHED; 20],
                "only what was written"
            );
        }
    }
}

#[test]
fn notifications_nobody_wants_do_not_happen() {
    for features in [0, F_EVENT_IDX] {
        let mut s = Setup::new(CONSOLE, features, 1 << 20);
        let mut back_end = s.back_end();
        back_end.queue.disable_notification(&s.region).unwrap();
        let one = s.filled(b"x");
        s.guest.add(&[one], &[]).unwrap();
        s.publish();
        s.turn().unwrap();
        // With EVENT_IDX the event index is 0 still, which the first chain passes.
        assert_eq!(back_end.kick.take() > 0, features != 0);
        s.guest.set_interrupts(false);
        s.guest.set_used_event(5);
        let request = back_end.pop().unwrap();
        back_end.push(&request, b"");
        s.guest.add(&[one], &[]).unwrap();
        s.publish();
        s.turn().unwrap();
        assert_eq!(back_end.kick.take(), 0);
        assert!(!s.guest.take_interrupt());
        assert_eq!(s.guest.used_index(), 1);
        if features != 0 {
            // The guest was asked to kick again at the index that was reached.
            s.guest.add(&[one], &[]).unwrap();
            s.guest.publish();
            assert!(s.guest.kick());
        }
    }
}

#[test]
fn chains_wait_for_room_and_go_on_in_order() {
    // 8 KiB of rings leave 56 KiB more than the least.
    let region = 3 * (8 << 10) + 3 * (64 << 10);
    let mut s = Setup::new(CONSOLE, F_EVENT_IDX, region);
    let mut back_end = s.back_end();
    let buffers: Vec<_> = (0..QUEUE).map(|_| s.buffer(50_000)).collect();
    for buffer in &buffers {
        s.guest.add(&[], &[*buffer]).unwrap();
    }
    s.publish();
    let mut fill = 0u8;
    while usize::from(fill) < buffers.len() {
        s.turn().unwrap();
        let mut at_once = 0;
        while let Some(request) = back_end.pop() {
            back_end.push(&request, &[fill; 50_000]);
            fill += 1;
            at_once += 1;
        }
        assert!((1..=4).contains(&at_once), "{at_once} fit into the region");
    }
    s.turn().unwrap();
    for (i, buffer) in (0u8..).zip(&buffers) {
        assert_eq!(s.bytes(*buffer), [i; 50_000]);
    }
    assert_eq!(s.bounce.timeout(), -1, "less than what is kept was touched");
    while s.guest.take_used().is_some() {}
    let large = s.buffer(600_000);
    s.guest.add(&[large], &[]).unwrap();
    s.publish();
    let error = s.turn().unwrap_err();
    assert!(
        error.contains("600000 bytes of the bounce region"),
        "{error}"
    );
    assert_eq!(s.bounce.poll_entries().count(), 0);
}

/// A packet in several buffers would be cut off for a driver that sees some of them.
#[test]
fn chains_that_are_returned_together_appear_together() {
    const LENGTH: u32 = 400_000;
    for features in [0, F_EVENT_IDX] {
        let mut s = Setup::new(NET, features, 24 << 20);
        let buffers: Vec<_> = (0..QUEUE).map(|_| s.buffer(LENGTH)).collect();
        for buffer in &buffers {
            s.guest.add(&[], &[*buffer]).unwrap();
        }
        s.publish();
        s.turn().unwrap();
        s.turn().unwrap();
        s.guest.set_used_event(0);
        let mut back_end = s.back_end();
        let requests = std::iter::from_fn(|| back_end.pop());
        let heads: Vec<_> = requests.map(|r| (r.0.into(), LENGTH)).collect();
        assert_eq!(heads.len(), usize::from(QUEUE));
        s.forge(&heads, QUEUE);
        s.shadow.queues[0].call.signal();
        let mut seen = Vec::new();
        while seen.last() != Some(&QUEUE) {
            s.turn().unwrap();
            seen.push(s.guest.used_index());
            assert!(seen.len() < 5, "{seen:?}");
        }
        // More than is copied in one go.
        assert!(
            seen.len() > 1 && seen.iter().all(|n| *n == 0 || *n == QUEUE),
            "{seen:?}"
        );
        assert!(s.guest.take_interrupt());
    }
}

#[test]
fn queue_that_is_full_does_not_starve_another() {
    let mut s = Setup::new(CONSOLE, F_EVENT_IDX, 1 << 20);
    let mut other = driver::Queue::new(&s.memory, QUEUE, true).unwrap();
    // The driver has not enabled the one between them.
    s.shadow = s.bounce.start(&Start {
        features: s.features,
        queues: vec![start_queue(0, &s.guest), start_queue(2, &other)],
    });
    let numbers: Vec<_> = s.shadow.queues.iter().map(|q| q.index).collect();
    assert_eq!(numbers, [0, 2]);
    for _ in 0..QUEUE {
        let buffer = s.buffer(100_000);
        s.guest.add(&[], &[buffer]).unwrap();
    }
    s.publish();
    s.turn().unwrap();
    let mut receive = s.back_end_of(0);
    let waiting = std::iter::from_fn(|| receive.pop()).count();
    assert!(waiting < QUEUE.into(), "{waiting} receive buffers fit");
    let mut transmit = s.back_end_of(1);
    for round in 0..100u8 {
        let data = s.filled(&[round; 2000]);
        other.add(&[data], &[]).unwrap();
        other.publish();
        other.kick();
        s.turn().unwrap();
        let request = transmit.pop().unwrap();
        assert_eq!(request.1, [round; 2000]);
        transmit.push(&request, b"");
        s.turn().unwrap();
        assert!(other.take_used().is_some());
    }
    assert_eq!(s.guest.used_index(), 0);
}

#[test]
fn rings_that_a_guest_has_broken_end_the_copying_and_nothing_else() {
    let normal = |address| Descriptor {
        address,
        length: 16,
        flags: 0,
        next: 0,
    };
    type Script = fn(&mut Setup, &dyn Fn(u64) -> Descriptor);
    let write = |s: &Setup, index, d: Descriptor| {
        let raw = driver::Descriptor {
            addr: d.address,
            len: d.length,
            flags: d.flags,
            next: d.next,
        };
        s.guest.write_descriptor(index, &raw);
    };
    let cases: [(&str, Descriptor, Option<[u8; 16]>); 8] = [
        ("no RAM", normal(RAM - 15), None),
        ("no RAM", normal(u64::MAX - 3), None),
        (
            "is a loop",
            Descriptor {
                flags: NEXT,
                ..normal(4096)
            },
            None,
        ),
        (
            "descriptor 16 of 16",
            Descriptor {
                flags: NEXT,
                next: 16,
                ..normal(4096)
            },
            None,
        ),
        (
            "indirect table of 17",
            Descriptor {
                flags: INDIRECT,
                length: 17,
                ..normal(4096)
            },
            None,
        ),
        (
            "indirect table of 0",
            Descriptor {
                flags: INDIRECT,
                length: 0,
                ..normal(4096)
            },
            None,
        ),
        (
            "flags 0x5",
            Descriptor {
                flags: INDIRECT | NEXT,
                ..normal(4096)
            },
            None,
        ),
        // A table that names itself as a table.
        (
            "indirect table of 16",
            Descriptor {
                flags: INDIRECT,
                ..normal(0x1000)
            },
            Some(
                Descriptor {
                    flags: INDIRECT,
                    ..normal(0x1000)
                }
                .bytes(),
            ),
        ),
    ];
    for (part, descriptor, table) in cases {
        let mut s = Setup::new(CONSOLE, F_INDIRECT_DESC, 1 << 20);
        if let Some(table) = table {
            s.memory.write(0x1000, &table);
        }
        write(&s, 0, descriptor);
        s.guest.offer_raw(0);
        let error = s.turn().unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
        assert_eq!(s.bounce.poll_entries().count(), 0);
        assert_eq!(s.guest.used_index(), 0);
    }
    let scripts: [(&str, Script); 3] = [
        ("available index went from 0 to 17", |s, _| {
            s.guest.set_available_index(17);
            s.guest.force_kick();
        }),
        ("chain 16 goes to descriptor 16", |s, _| {
            s.guest.offer_raw(16)
        }),
        ("more than 1024 buffers", |s, normal| {
            let table = s.memory.alloc(16 * 1100, 16);
            for i in 0..1100u16 {
                let d = Descriptor {
                    flags: NEXT,
                    next: i + 1,
                    length: 1,
                    ..normal(4096)
                };
                s.memory.write(table + 16 * u64::from(i), &d.bytes());
            }
            let raw = driver::Descriptor {
                addr: table,
                len: 16 * 1100,
                flags: INDIRECT,
                next: 0,
            };
            s.guest.write_descriptor(0, &raw);
            s.guest.offer_raw(0);
        }),
    ];
    for (part, script) in scripts {
        let mut s = Setup::new(CONSOLE, F_INDIRECT_DESC, 1 << 20);
        script(&mut s, &normal);
        let error = s.turn().unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
    // Without the feature there are no indirect tables.
    let mut s = Setup::new(CONSOLE, 0, 1 << 20);
    write(
        &s,
        0,
        Descriptor {
            flags: INDIRECT,
            ..normal(4096)
        },
    );
    s.guest.offer_raw(0);
    assert!(s.turn().unwrap_err().contains("indirect"));
}

#[test]
fn back_end_that_lies_about_lengths_reaches_the_buffers_only() {
    let mut s = Setup::new(CONSOLE, 0, 1 << 20);
    let reply = [s.buffer(10), s.buffer(10)];
    let request = s.filled(b"request");
    s.guest.add(&[request], &reply).unwrap();
    s.publish();
    s.turn().unwrap();
    // It scribbles over everything it has, descriptors and rings included.
    let everything = vec![0xAA; 1 << 20];
    s.region
        .write_slice(&everything, GuestAddress(BASE))
        .unwrap();
    s.forge(&[(0, u32::MAX)], 1);
    s.shadow.queues[0].call.signal();
    s.turn().unwrap();
    assert_eq!(s.guest.take_used().unwrap().len, 20, "what was writable");
    assert_eq!(s.bytes(reply[0]), [0xAA; 10]);
    assert_eq!(s.bytes(reply[1]), [0xAA; 10]);
    assert_eq!(s.bytes(request), b"request");
}

#[test]
fn back_end_that_lies_about_chains_is_found_out() {
    for (part, entries, index) in [
        ("returned chain 1,", &[(1, 0)][..], 1),
        ("returned chain 16,", &[(16, 0)], 1),
        ("returned chain 4294967295,", &[(u32::MAX, 0)], 1),
        ("from 0 to 2 with 1 ", &[(0, 0), (0, 0)], 2),
        ("from 0 to 65535 with 1 ", &[], u16::MAX),
    ] {
        let mut s = Setup::new(CONSOLE, 0, 1 << 20);
        let reply = s.buffer(10);
        s.guest.add(&[], &[reply]).unwrap();
        s.publish();
        s.turn().unwrap();
        s.forge(entries, index);
        s.shadow.queues[0].call.signal();
        let error = s.turn().unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
        assert_eq!(s.guest.used_index(), 0);
        assert_eq!(s.bytes(reply), [UNTOUCHED; 10]);
    }
    // Two chains, of which one is returned twice.
    let mut s = Setup::new(CONSOLE, 0, 1 << 20);
    let replies = [s.buffer(10), s.buffer(10)];
    for reply in replies {
        s.guest.add(&[], &[reply]).unwrap();
    }
    s.publish();
    s.turn().unwrap();
    s.forge(&[(0, 1), (0, 1)], 2);
    s.shadow.queues[0].call.signal();
    assert!(s.turn().unwrap_err().contains("returned chain 0,"));
    assert_eq!(s.bytes(replies[1]), [UNTOUCHED; 10]);
}

#[test]
fn status_of_a_disk_arrives_whatever_the_length() {
    for (length, status, expected, read) in [
        (513, 0, 0, true),
        // Without the status itself, as some count.
        (512, 0, 0, true),
        // A failure: nothing was read.
        (1, 2, 2, false),
        (0, 1, 1, false),
        // Success that has read nothing is none.
        (1, 0, 1, false),
        // The status was forgotten.
        (0, 0xEE, 1, false),
    ] {
        let mut s = Setup::new(BLOCK, 0, 1 << 20);
        let mut back_end = s.back_end();
        let header = s.filled(&[0; 16]);
        let (data, end) = (s.buffer(512), s.buffer(1));
        s.guest.add(&[header], &[data, end]).unwrap();
        s.publish();
        s.turn().unwrap();
        let (head, _, writable) = back_end.pop().unwrap();
        let data_at = GuestAddress(writable[0].0);
        s.region.write_slice(&[0x11; 512], data_at).unwrap();
        if status != 0xEE {
            let status_at = GuestAddress(writable[1].0);
            s.region.write_slice(&[status], status_at).unwrap();
        }
        back_end.push_length(head, length);
        s.turn().unwrap();
        let found = s.bytes(end)[0];
        assert_eq!(found, expected, "length {length}, status {status}");
        assert_eq!(s.bytes(data) == [0x11; 512], read);
    }
}

#[test]
fn balloon_pages_are_freed_when_the_back_end_has_agreed() {
    let page = |s: &Setup, number: u64| s.memory.read_vec(number * PAGE, PAGE as usize);
    let fill = |s: &Setup| {
        for number in 500..506 {
            s.memory
                .write(number * PAGE, &[number as u8; PAGE as usize]);
        }
    };
    let free = |s: &Setup, number: u64| page(s, number) == [0; PAGE as usize];
    let mut s = Setup::new(BALLOON, 0, 1 << 20);
    fill(&s);
    // The last two are no pages of this guest.
    let list: Vec<u8> = [503u32, 501, 502, 1 << 20, u32::MAX]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    let list = s.filled(&list);
    s.guest.add(&[list], &[]).unwrap();
    s.publish();
    s.turn().unwrap();
    assert!(!free(&s, 501), "not before the back end knows");
    let mut back_end = s.back_end();
    let request = back_end.pop().unwrap();
    assert_eq!(request.1, s.bytes(list));
    // Another list in the region changes nothing.
    let at = GuestAddress(s.shadow_descriptor(request.0).address);
    s.region.write_obj(505u32, at).unwrap();
    back_end.push(&request, b"");
    s.turn().unwrap();
    let freed: Vec<_> = (500..506).filter(|n| free(&s, *n)).collect();
    assert_eq!(freed, [501, 502, 503]);

    // Deflating frees nothing; a reported page is named to the back end and not copied.
    for (index, expected) in [(1, false), (2, true)] {
        s.features = BALLOON_F_PAGE_REPORTING;
        s.guest = driver::Queue::new(&s.memory, QUEUE, false).unwrap();
        s.start(index);
        fill(&s);
        let reported = Buffer {
            addr: 504 * PAGE,
            len: PAGE as u32,
        };
        s.guest.add(&[], &[reported]).unwrap();
        s.publish();
        s.turn().unwrap();
        let named = s.shadow_descriptor(0);
        assert_eq!(named.address == reported.addr, expected);
        assert_eq!((named.length, named.flags), (PAGE as u32, WRITE));
        s.forge(&[(0, 0)], 1);
        s.shadow.queues[0].call.signal();
        s.turn().unwrap();
        assert_eq!(free(&s, 504), expected);
        assert!(!free(&s, 505));
    }
    let stats = BALLOON_F_PAGE_REPORTING | BALLOON_F_STATS_VQ;
    assert_eq!(contents(BALLOON, 2, stats), Contents::Data);
    assert_eq!(contents(BALLOON, 3, stats), Contents::Named);
}

#[test]
fn another_back_end_goes_on_where_the_first_has_died() {
    let mut s = Setup::new(CONSOLE, F_EVENT_IDX, 1 << 20);
    let mut first = s.back_end();
    let replies: Vec<_> = (0..6).map(|_| s.buffer(8)).collect();
    for reply in &replies {
        s.guest.add(&[], &[*reply]).unwrap();
    }
    s.publish();
    s.turn().unwrap();
    let requests: Vec<_> = (0..4).map(|_| first.pop().unwrap()).collect();
    first.push(&requests[2], b"first");
    let mut second = s.back_end();
    drop(first);
    // What in-flight tracking tells it: it goes on after what was available at the used index.
    second.queue.set_next_avail(1);
    second.queue.set_next_used(1);
    for request in [&requests[0], &requests[1], &requests[3]] {
        second.push(request, b"again");
    }
    second.queue.set_next_avail(4);
    while let Some(request) = second.pop() {
        second.push(&request, b"second");
    }
    s.turn().unwrap();
    let texts: Vec<_> = replies.iter().map(|r| s.bytes(*r)).collect();
    for (text, expected) in texts
        .iter()
        .zip(["again", "again", "first", "again", "second", "second"])
    {
        assert!(text.starts_with(expected.as_bytes()), "{text:?}");
    }
    let mut returned = 0;
    while s.guest.take_used().is_some() {
        returned += 1;
    }
    assert_eq!(returned, 6, "each once");
}

/// Chains are in flight; another back end takes over, and goes on at `base`. What the rings say of that
/// must be the same.
fn all_in_flight_is_found(tracked: bool, base: u16) {
    let mut s = Setup::new(CONSOLE, F_EVENT_IDX, 1 << 20);
    // The indices pass their end on the way.
    let mut back_end = s.back_end();
    let one = s.buffer(8);
    for _ in 0..65_530u32 {
        s.guest.add(&[], &[one]).unwrap();
        s.publish();
        s.turn().unwrap();
        let request = back_end.pop().unwrap();
        back_end.push(&request, b"early");
        s.turn().unwrap();
        s.guest.take_used().unwrap();
    }
    let replies: Vec<_> = (0..12).map(|_| s.buffer(8)).collect();
    for reply in &replies {
        s.guest.add(&[], &[*reply]).unwrap();
    }
    s.publish();
    s.turn().unwrap();
    let taken: Vec<_> = (0..8).map(|_| back_end.pop().unwrap()).collect();
    // Returned in another order, the last of them without a word.
    for at in [5, 2, 7] {
        back_end.push(&taken[at], b"first");
    }
    // It wants no kick just now.
    let used = s.shadow.queues[0].used;
    s.region.write_obj(1u16, GuestAddress(used)).unwrap();
    s.bounce.resume(tracked).unwrap();
    let mut next = s.back_end();
    let word = |at: u64| s.region.read_obj::<u16>(GuestAddress(at)).unwrap();
    assert_eq!((word(used), word(used + 2)), (0, base));
    next.queue.set_next_avail(base);
    next.queue.set_next_used(base);
    let mut order = Vec::new();
    while let Some(request) = next.pop() {
        order.push(request.0);
        next.push(&request, b"second");
    }
    let expected: Vec<u16> = [0, 1, 3, 4, 6]
        .iter()
        .map(|at| taken[*at as usize].0)
        .collect();
    assert_eq!(order[..5], expected, "the oldest first");
    assert_eq!(order.len(), 9);
    s.turn().unwrap();
    for (i, reply) in replies.iter().enumerate() {
        let text: &[u8] = if [2, 5, 7].contains(&i) {
            b"first"
        } else {
            b"second"
        };
        assert_eq!(s.bytes(*reply)[..text.len()], *text, "{i}");
    }
    // And it goes on from there.
    while s.guest.take_used().is_some() {}
    let last = s.buffer(8);
    s.guest.add(&[], &[last]).unwrap();
    s.publish();
    s.turn().unwrap();
    let request = next.pop().expect("the next chain");
    next.push(&request, b"third");
    s.turn().unwrap();
    assert_eq!(s.bytes(last)[..5], *b"third");
}

#[test]
fn back_end_that_tracks_what_is_in_flight_goes_on_at_the_used_index() {
    all_in_flight_is_found(true, 65_533);
}

#[test]
fn back_end_that_tracks_nothing_finds_rings_that_begin_anew() {
    all_in_flight_is_found(false, 0);
}

#[test]
fn reset_ends_all_copying_and_empties_the_region() {
    let mut s = Setup::new(CONSOLE, 0, 1 << 20);
    let mut back_end = s.back_end();
    let (request, reply) = (s.filled(b"secret"), s.buffer(6));
    s.guest.add(&[request], &[reply]).unwrap();
    s.publish();
    s.turn().unwrap();
    let taken = back_end.pop().unwrap();
    s.bounce.stop();
    back_end.push(&taken, b"late");
    s.turn().unwrap();
    assert_eq!(s.bytes(reply), [UNTOUCHED; 6]);
    s.guest = driver::Queue::new(&s.memory, QUEUE, false).unwrap();
    s.start(0);
    let mut all = vec![1; 1 << 20];
    s.region.read_slice(&mut all, GuestAddress(BASE)).unwrap();
    // The late answer came after the region was emptied, into what is empty again now.
    let left = all.windows(6).any(|w| w == b"secret");
    assert!(!left);
    s.region
        .write_slice(&vec![0; 1 << 20], GuestAddress(BASE))
        .unwrap();
    s.guest.add(&[request], &[reply]).unwrap();
    s.publish();
    s.turn().unwrap();
    let mut back_end = s.back_end();
    let taken = back_end.pop().unwrap();
    back_end.push(&taken, b"anew");
    s.turn().unwrap();
    assert_eq!(&s.bytes(reply)[..4], b"anew");
}

#[test]
fn interrupts_go_where_the_guest_wants_them_now() {
    let mut s = Setup::new(CONSOLE, 0, 1 << 20);
    let mut back_end = s.back_end();
    let other = Arc::new(EventFd::new().unwrap());
    s.bounce
        .set_calls(BTreeMap::from([(0, other.clone()), (9, other.clone())]));
    let reply = s.buffer(4);
    s.guest.add(&[], &[reply]).unwrap();
    s.publish();
    s.turn().unwrap();
    let request = back_end.pop().unwrap();
    back_end.push(&request, b"data");
    s.turn().unwrap();
    assert_eq!((other.take(), s.guest.take_interrupt()), (1, false));
}

#[test]
fn memory_of_a_burst_is_given_back_when_it_is_quiet() {
    let mut s = Setup::new(CONSOLE, 0, 4 << 20);
    let mut back_end = s.back_end();
    let buffers: Vec<_> = (0..8).map(|_| s.buffer(200_000)).collect();
    for buffer in &buffers {
        s.guest.add(&[], &[*buffer]).unwrap();
    }
    s.publish();
    s.turn().unwrap();
    let mut requests = Vec::new();
    while let Some(request) = back_end.pop() {
        requests.push(request);
    }
    // One of them stays in flight.
    for request in &requests[1..] {
        back_end.push(request, &[7; 200_000]);
    }
    s.turn().unwrap();
    assert_eq!(s.bounce.timeout(), QUIET_MS);
    let resident = |s: &Setup| {
        use std::os::unix::fs::MetadataExt;
        let fd = s.bounce.table().regions[0].2.try_clone().unwrap();
        File::from(fd).metadata().unwrap().blocks() * 512
    };
    assert!(resident(&s) > 1_200_000);
    s.turn().unwrap();
    assert_eq!(s.bounce.timeout(), -1);
    assert!(resident(&s) < 300_000, "{}", resident(&s));
    back_end.push(&requests[0], &[8; 200_000]);
    s.turn().unwrap();
    assert_eq!(s.bytes(buffers[0]), [8; 200_000]);
    assert_eq!(s.bytes(buffers[7]), [7; 200_000]);
}

/// The largest requests that a driver can make of a disk, in segments that fit badly.
#[test]
fn largest_request_that_a_disk_allows_fits() {
    let regions = [
        (1 << 20, 126),
        (3 << 20, 254),
        (3 << 20, 5),
        (600 << 10, 1000),
    ];
    for ((region, told), odd) in regions.into_iter().flat_map(|r| [(r, 0), (r, 1), (r, 513)]) {
        let mut s = Setup::new(BLOCK, F_INDIRECT_DESC, region);
        // All queues are in use.
        let others = [1, 2].map(|_| driver::Queue::new(&s.memory, QUEUE, false).unwrap());
        s.shadow = s.bounce.start(&Start {
            features: s.features,
            queues: (0..)
                .zip([&s.guest, &others[0], &others[1]])
                .map(|(i, q)| start_queue(i, q))
                .collect(),
        });
        let mut config = [0u8; 60];
        config[12..16].copy_from_slice(&u32::to_le_bytes(told));
        s.bounce.bounds().limit(1 << 2, &mut config);
        let field = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        let (size, segments) = (field(8), field(12));
        assert!(
            size >= 4096 && (1..=told).contains(&segments),
            "{size} {segments}"
        );
        let data = s.memory.alloc(size.into(), 1);
        let (header, status) = (s.buffer(16), s.buffer(1));
        let lengths = (0..segments).map(|n| if n % 2 == 0 { size } else { size - odd });
        let buffers = [(header.addr, 16, 0)]
            .into_iter()
            .chain(lengths.map(|len| (data, len, WRITE)))
            .chain([(status.addr, 1, WRITE)]);
        let count = segments as usize + 2;
        let table = s.memory.alloc(16 * count as u64, 16);
        for (i, (address, length, flags)) in buffers.enumerate() {
            let (flags, next) = match i + 1 < count {
                true => (flags | NEXT, i as u16 + 1),
                false => (flags, 0),
            };
            let descriptor = Descriptor {
                address,
                length,
                flags,
                next,
            };
            s.memory.write(table + 16 * i as u64, &descriptor.bytes());
        }
        s.guest.write_descriptor(
            0,
            &driver::Descriptor {
                addr: table,
                len: 16 * count as u32,
                flags: INDIRECT,
                next: 0,
            },
        );
        s.guest.offer_raw(0);
        s.turn().unwrap();
        let mut back_end = s.back_end();
        let request = back_end.pop().expect("the request");
        assert_eq!(request.2.len(), segments as usize + 1);
        back_end.push_length(request.0, 1);
        s.turn().unwrap();
        assert_eq!(s.guest.used_index(), 1);
    }
}

#[test]
fn region_that_is_too_small_is_refused() {
    let ram = map(memfd(RAM).as_fd(), 0, RAM);
    for size in [0, 1 << 16, (72 << 10) - 1, (72 << 10) + 512] {
        let error = Bounce::new(4, 1, memfd(size).into(), size, ram.clone()).unwrap_err();
        assert!(error.to_string().contains("73728"), "{error}");
    }
    Bounce::new(4, 1, memfd(72 << 10).into(), 72 << 10, ram).unwrap();
}

/// Lengths of readable and writable buffers, and whether they are in a table.
type Shape = (Vec<u32>, Vec<u32>, bool);

fn shapes() -> impl Strategy<Value = Vec<Shape>> {
    let length = prop_oneof![
        Just(0u32),
        1..9u32,
        500..520u32,
        4090..4100u32,
        9000..9001u32
    ];
    let lengths = || prop::collection::vec(length.clone(), 0..5);
    prop::collection::vec((lengths(), lengths(), any::<bool>()), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever chains there are, and in whatever order they come back: the guest gets what it would
    /// get from the same back end without the bounce.
    #[test]
    fn bounced_equals_direct(
        shapes in shapes(),
        features in prop::sample::select(all_features().to_vec()),
        order in prop::collection::vec(any::<prop::sample::Index>(), 8),
        seed in any::<u8>(),
    ) {
        let mut s = Setup::new(CONSOLE, features, 3 * (96 << 10));
        let mut back_end = s.back_end();
        let mut waiting = shapes.into_iter().filter(|(r, w, _)| !r.is_empty() || !w.is_empty()).peekable();
        let mut expected = std::collections::HashMap::new();
        let mut held: Vec<Request> = Vec::new();
        let mut byte = seed;
        let mut order = order.into_iter().cycle();
        loop {
            while let Some((readable, writable, indirect)) = waiting.peek() {
                let mut text = Vec::new();
                let request: Vec<_> = readable.iter().map(|length| {
                    let data: Vec<u8> = (0..*length).map(|_| { byte = byte.wrapping_mul(5).wrapping_add(3); byte }).collect();
                    text.extend_from_slice(&data);
                    s.filled(&data)
                }).collect();
                let reply: Vec<_> = writable.iter().map(|length| s.buffer(*length)).collect();
                let head = if *indirect && features & F_INDIRECT_DESC != 0 {
                    s.guest.add_indirect(&request, &reply)
                } else {
                    s.guest.add(&request, &reply)
                };
                let Some(head) = head else { break };
                expected.insert(head, (answer(&text), reply));
                waiting.next();
            }
            s.publish();
            s.turn().unwrap();
            while let Some(request) = back_end.pop() {
                held.push(request);
            }
            if held.is_empty() {
                prop_assert!(waiting.peek().is_none() && expected.is_empty());
                break;
            }
            // Returns some, at least one, from anywhere.
            for _ in 0..=held.len() / 2 {
                if held.is_empty() { break }
                let at = order.next().map_or(0, |index| index.index(held.len()));
                let request = held.swap_remove(at);
                back_end.push(&request, &answer(&request.1));
            }
            s.turn().unwrap();
            while let Some(used) = s.guest.take_used() {
                let (text, reply) = expected.remove(&(used.head as u16)).unwrap();
                let got: Vec<u8> = reply.iter().flat_map(|b| s.bytes(*b)).collect();
                let written = text.len().min(got.len());
                prop_assert_eq!(used.len as usize, written);
                prop_assert_eq!(&got[..written], &text[..written]);
                prop_assert!(got[written..].iter().all(|b| *b == UNTOUCHED));
            }
        }
    }
}

/// What a hostile side does next.
#[derive(Debug, Clone)]
enum Step {
    /// The guest offers a chain of these lengths, in a table or not.
    Offer(Vec<u32>, bool),
    /// Somebody writes a 16-bit word at an index into the rings.
    Word(prop::sample::Index, u16),
    /// Somebody writes a descriptor.
    Descriptor(u16, u64, u32, u16, u16),
    /// Somebody returns a chain and counts on.
    Return(u32, u32),
    /// The device thread takes its turn.
    Turn,
    /// Another back end takes over, which tracks what is in flight or does not.
    Resume(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let lengths = prop::collection::vec(prop_oneof![0..70u32, 4090..4200u32], 1..5);
    let address = prop_oneof![0..RAM + 5000, Just(u64::MAX - 20), BASE..BASE + 5000];
    let step = prop_oneof![
        4 => (lengths, any::<bool>()).prop_map(|(l, t)| Step::Offer(l, t)),
        1 => (any::<prop::sample::Index>(), any::<u16>()).prop_map(|(i, w)| Step::Word(i, w)),
        1 => (0..QUEUE, address, prop_oneof![0..5000u32, any::<u32>()], 0..8u16, 0..QUEUE + 2)
            .prop_map(|(i, a, l, f, n)| Step::Descriptor(i, a, l, f, n)),
        3 => (0..u32::from(QUEUE) + 1, prop_oneof![0..9000u32, any::<u32>()])
            .prop_map(|(h, l)| Step::Return(h, l)),
        4 => Just(Step::Turn),
        1 => any::<bool>().prop_map(Step::Resume),
    ];
    prop::collection::vec(step, 1..60)
}

/// Bytes of both sides' rings, one part after the other.
fn ring_bytes() -> u64 {
    u64::from(QUEUE) * 26 + 14
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// A back end that writes what it likes into its region, whenever it likes, changes nothing in guest
    /// memory but the buffers that it was given to write, and the used ring.
    #[test]
    fn hostile_back_end_reaches_nothing_else(
        steps in steps(),
        features in prop::sample::select(all_features().to_vec()),
        device_type in prop::sample::select(vec![CONSOLE, BLOCK]),
    ) {
        let mut s = Setup::new(device_type, features, 3 * (96 << 10));
        let q = s.shadow.queues[0].clone();
        // All that the driver allocates later lies below.
        let canary = 4 << 20;
        let pattern: Vec<u8> = (0..65536u32).map(|i| (i * 7) as u8).collect();
        s.memory.write(canary, &pattern);
        let mut readable = Vec::new();
        let mut writable = Vec::new();
        let mut used = 0u16;
        for step in steps {
            match step {
                Step::Offer(lengths, table) => {
                    let half = lengths.len() / 2;
                    let request: Vec<_> = lengths[..half].iter().map(|l| s.filled(&vec![0x77; *l as usize])).collect();
                    let reply: Vec<_> = lengths[half..].iter().map(|l| s.buffer(*l)).collect();
                    if table && features & F_INDIRECT_DESC != 0 {
                        s.guest.add_indirect(&request, &reply);
                    } else {
                        s.guest.add(&request, &reply);
                    }
                    s.publish();
                    readable.extend(request);
                    writable.extend(reply);
                }
                Step::Word(index, word) => {
                    let at = q.descriptors + index.index(ring_bytes() as usize / 2) as u64 * 2;
                    s.region.write_obj(word, GuestAddress(at)).unwrap();
                }
                Step::Descriptor(index, address, length, flags, next) => {
                    let d = Descriptor { address, length, flags, next };
                    let at = GuestAddress(q.descriptors + 16 * u64::from(index));
                    s.region.write_slice(&d.bytes(), at).unwrap();
                }
                Step::Return(head, length) => {
                    let entry = q.used + 4 + 8 * u64::from(used % QUEUE);
                    s.region.write_obj(head, GuestAddress(entry)).unwrap();
                    s.region.write_obj(length, GuestAddress(entry + 4)).unwrap();
                    used = used.wrapping_add(1);
                    s.region.write_obj(used, GuestAddress(q.used + 2)).unwrap();
                    q.call.signal();
                }
                Step::Turn => drop(s.turn()),
                Step::Resume(tracked) => drop(s.bounce.resume(tracked)),
            }
        }
        let _ = s.turn();
        prop_assert!(s.memory.read_vec(canary, pattern.len()) == pattern);
        for buffer in readable {
            prop_assert!(s.bytes(buffer).iter().all(|b| *b == 0x77));
        }
        // Looks at the bytes around them, too.
        for buffer in writable {
            s.bytes(buffer);
        }
    }

    /// A guest that writes what it likes into its own rings breaks its device at worst.
    #[test]
    fn hostile_guest_harms_itself_only(
        steps in steps(),
        features in prop::sample::select(all_features().to_vec()),
        device_type in prop::sample::select(vec![CONSOLE, BLOCK, BALLOON]),
    ) {
        let mut s = Setup::new(device_type, features, 3 * (96 << 10));
        let descriptors = s.guest.addresses().descriptor - driver::Memory::USER_BASE;
        let mut back_end = s.back_end();
        let mut broken = false;
        for step in steps {
            match step {
                Step::Offer(lengths, table) => {
                    let all: Vec<_> = lengths.iter().map(|l| s.buffer(*l)).collect();
                    if table {
                        s.guest.add_indirect(&all, &[]);
                    } else {
                        s.guest.add(&all, &[]);
                    }
                    s.publish();
                }
                Step::Word(index, word) => {
                    let at = descriptors + index.index(ring_bytes() as usize / 2) as u64 * 2;
                    s.memory.write(at, &word.to_le_bytes());
                    s.guest.force_kick();
                }
                Step::Descriptor(index, address, length, flags, next) => {
                    let d = driver::Descriptor { addr: address, len: length, flags, next };
                    s.guest.write_descriptor(index, &d);
                    s.guest.offer_raw(index);
                }
                Step::Return(..) if !broken => {
                    // A well-behaved one: what it is given is always within its region.
                    while let Some(request) = back_end.pop() {
                        let data = answer(&request.1);
                        back_end.push(&request, &data);
                    }
                }
                Step::Turn => broken |= s.turn().is_err(),
                Step::Resume(tracked) => {
                    broken |= s.bounce.resume(tracked).is_err();
                    back_end = s.back_end();
                    let used = GuestAddress(s.shadow.queues[0].used + 2);
                    let base = s.region.read_obj(used).unwrap();
                    back_end.queue.set_next_avail(base);
                    back_end.queue.set_next_used(base);
                }
                Step::Return(..) => {}
            }
            prop_assert_eq!(broken, s.bounce.poll_entries().count() == 0);
        }
    }
}
