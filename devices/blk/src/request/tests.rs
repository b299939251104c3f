//! Requests in any layout of descriptors against a model that knows neither chains nor files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::engine::perform;
use std::os::fd::AsRawFd;

const REGION: u64 = 1 << 20;
const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const INDIRECT: u64 = 0x3000;
/// Buffers start here and grow over the border of the two regions.
const BUFFERS: u64 = REGION - 0x3000;
const QUEUE_SIZE: u16 = 256;
const SECTORS: u64 = 64;
const ID: &[u8; ID_SIZE] = b"a disk of 20 letters";
const ALL: u64 = feature::FLUSH | feature::DISCARD | feature::WRITE_ZEROES;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0), REGION as usize),
        (GuestAddress(REGION), REGION as usize),
    ])
    .unwrap()
}

fn disk(read_only: bool) -> (File, Disk) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&first_content(), 0).unwrap();
    let image = Image::from_fd(file.try_clone().unwrap().into(), read_only).unwrap();
    let disk = Disk {
        image,
        id: *ID,
        writeback: AtomicBool::new(true),
    };
    (file, disk)
}

fn first_content() -> Vec<u8> {
    (0..SECTORS * SECTOR_SIZE)
        .map(|i| (i % 251) as u8 + 1)
        .collect()
}

/// Descriptors as the guest writes them: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

fn write_table(memory: &GuestMemoryMmap, at: u64, table: &[Raw]) {
    for (i, (address, len, flags, next)) in table.iter().enumerate() {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let address = GuestAddress(at + 16 * i as u64);
        memory.write_slice(&bytes, address).unwrap();
    }
}

/// A queue with descriptor 0 available.
fn queue(memory: &GuestMemoryMmap) -> Queue {
    let mut queue = Queue::new(QUEUE_SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), None);
    queue.set_avail_ring_address(Some(AVAIL as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    memory.write_obj(0u16, GuestAddress(AVAIL + 4)).unwrap();
    memory.write_obj(1u16, GuestAddress(AVAIL + 2)).unwrap();
    queue
}

/// Runs the request to its end; returns status and used length.
fn run(memory: &GuestMemoryMmap, disk: &Disk) -> Result<(Status, u32), Malformed> {
    let mut queue = queue(memory);
    let chain = queue.iter(memory).unwrap().next().unwrap();
    let mut request = Request::new();
    let mut progress = request.start(memory, chain, ALL, disk)?;
    let mut steps = 0;
    loop {
        match progress {
            Progress::Finished(status) => return Ok((status, request.finish(status))),
            Progress::Operation => {
                // SAFETY: `memory` outlives the call.
                let result = unsafe { perform(disk.image.as_raw_fd(), &request.op()) };
                progress = request.advance(result);
            }
        }
        steps += 1;
        assert!(steps < 1000, "the request does not end");
    }
}

/// Cuts `len` bytes at the given places, in thousandths.
fn cut(len: usize, places: &[usize]) -> Vec<usize> {
    let mut cuts: Vec<_> = places.iter().map(|p| p * len / 1000).collect();
    cuts.push(len);
    cuts.sort_unstable();
    let mut last = 0;
    cuts.into_iter()
        .map(|cut| {
            let piece = cut - last;
            last = cut;
            piece
        })
        .collect()
}

/// A chain laid out in memory, and where its writable bytes are.
struct Layout {
    writable: Vec<(u64, usize)>,
}

fn lay_out(
    memory: &GuestMemoryMmap,
    readable: &[u8],
    writable: usize,
    cuts: (&[usize], &[usize]),
    indirect: bool,
) -> Layout {
    let mut address = BUFFERS;
    let mut table: Vec<Raw> = Vec::new();
    let mut rest = readable;
    for piece in cut(readable.len(), cuts.0) {
        let (now, later) = rest.split_at(piece);
        memory.write_slice(now, GuestAddress(address)).unwrap();
        table.push((address, piece as u32, NEXT, 0));
        address += piece as u64 + 7;
        rest = later;
    }
    let mut places = Vec::new();
    for piece in cut(writable, cuts.1) {
        let rubbish = vec![0xee; piece];
        memory.write_slice(&rubbish, GuestAddress(address)).unwrap();
        table.push((address, piece as u32, NEXT | WRITE, 0));
        places.push((address, piece));
        address += piece as u64 + 3;
    }
    let last = table.len() - 1;
    for (i, descriptor) in table.iter_mut().enumerate() {
        descriptor.3 = i as u16 + 1;
        if i == last {
            descriptor.2 &= !NEXT;
        }
    }
    if indirect {
        write_table(memory, INDIRECT, &table);
        let len = 16 * table.len() as u32;
        write_table(memory, TABLE, &[(INDIRECT, len, INDIRECT_FLAG, 0)]);
    } else {
        write_table(memory, TABLE, &table);
    }
    Layout { writable: places }
}

fn written(memory: &GuestMemoryMmap, layout: &Layout) -> Vec<u8> {
    let mut all = Vec::new();
    for (address, len) in &layout.writable {
        let mut bytes = vec![0; *len];
        memory
            .read_slice(&mut bytes, GuestAddress(*address))
            .unwrap();
        all.extend(bytes);
    }
    all
}

#[derive(Debug, Clone)]
struct Sample {
    kind: u32,
    sector: u64,
    /// Readable bytes after the header.
    payload: Vec<u8>,
    /// Writable bytes before the status.
    room: usize,
}

/// What a disk does, over an array of bytes: status and the bytes before the status.
fn model(content: &mut [u8], sample: &Sample, read_only: bool) -> (Status, Vec<u8>) {
    let failed = (Status::IoError, vec![0; sample.room]);
    let span = |sector: u64, len: usize| {
        let start = usize::try_from(sector).ok()?.checked_mul(512)?;
        let end = start.checked_add(len)?;
        (len.is_multiple_of(512) && end <= content.len()).then_some(start..end)
    };
    let zeroes = vec![0; sample.room];
    match sample.kind {
        0 => match span(sample.sector, sample.room) {
            Some(range) => (Status::Ok, content[range].to_vec()),
            None => failed,
        },
        1 if read_only => failed,
        1 => match span(sample.sector, sample.payload.len()) {
            Some(range) => {
                content[range].copy_from_slice(&sample.payload);
                (Status::Ok, zeroes)
            }
            None => failed,
        },
        4 => (Status::Ok, zeroes),
        8 => {
            let mut id = ID.to_vec();
            id.resize(sample.room.max(20), 0);
            id.truncate(sample.room);
            (Status::Ok, id)
        }
        11 | 13 => {
            let chunks: Vec<_> = sample.payload.chunks(16).collect();
            if chunks.is_empty() || !sample.payload.len().is_multiple_of(16) || chunks.len() > 16 {
                return failed;
            }
            let parsed: Vec<_> = chunks
                .iter()
                .map(|c| {
                    let sector = u64::from_le_bytes(c[..8].try_into().unwrap());
                    let count = u32::from_le_bytes(c[8..12].try_into().unwrap());
                    let flags = u32::from_le_bytes(c[12..].try_into().unwrap());
                    (sector, count, flags)
                })
                .collect();
            let known = if sample.kind == 13 { 1 } else { 0 };
            if parsed.iter().any(|(_, _, flags)| flags & !known != 0) {
                return (Status::Unsupported, zeroes);
            }
            let spans: Option<Vec<_>> = parsed
                .iter()
                .map(|(sector, count, _)| span(*sector, *count as usize * 512))
                .collect();
            match spans {
                // Holes read as zeroes, so on a file a discard is known to zero.
                Some(spans) => {
                    spans.into_iter().for_each(|span| content[span].fill(0));
                    (Status::Ok, zeroes)
                }
                None => failed,
            }
        }
        _ => (Status::Unsupported, zeroes),
    }
}

fn sectors() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..SECTORS,
        1 => SECTORS - 2..SECTORS + 2,
        1 => any::<u64>(),
        1 => Just(u64::MAX / 512 + 1),
    ]
}

fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![8 => (0..16usize).prop_map(|n| n * 512), 1 => 0..2000usize]
}

fn range() -> impl Strategy<Value = Vec<u8>> {
    let count = prop_oneof![8 => 0..20u32, 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0..2u32, 1 => any::<u32>()];
    (sectors(), count, flags).prop_map(|(sector, count, flags)| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    })
}

fn sample() -> impl Strategy<Value = Sample> {
    let plain = |kind| {
        (sectors(), lengths(), 0..4usize).prop_map(move |(sector, len, other)| {
            let payload = (0..len).map(|i| (i % 241) as u8).collect();
            let (payload, room) = if kind == 1 {
                (payload, other)
            } else {
                (vec![0x77; other], len)
            };
            Sample {
                kind,
                sector,
                payload,
                room,
            }
        })
    };
    let ranges = |kind| {
        (vec(range(), 0..18), 0..3usize, 0..2usize).prop_map(move |(ranges, more, room)| {
            let mut payload = ranges.concat();
            payload.extend(vec![0; more / 2]);
            Sample {
                kind,
                sector: 0,
                payload,
                room,
            }
        })
    };
    let other = (any::<u32>(), 0..64usize).prop_map(|(kind, room)| Sample {
        kind: if kind < 14 { 3 } else { kind },
        sector: 0,
        payload: Vec::new(),
        room,
    });
    prop_oneof![
        4 => plain(0),
        4 => plain(1),
        1 => plain(4),
        1 => plain(8),
        2 => ranges(11),
        2 => ranges(13),
        1 => other,
    ]
}

proptest! {
    // Failures are printed whole; there is no need to keep them in files.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_layout_does_what_the_model_does(
        samples in vec((sample(), vec(0..1001usize, 0..12), vec(0..1001usize, 0..12), any::<bool>()), 1..8),
        read_only in proptest::bool::weighted(0.2),
    ) {
        let memory = memory();
        let (file, disk) = disk(read_only);
        let mut content = first_content();
        for (sample, cuts_readable, cuts_writable, indirect) in samples {
            // A read-only device does not offer these two.
            prop_assume!(!(read_only && matches!(sample.kind, 11 | 13)));
            let mut readable = sample.kind.to_le_bytes().to_vec();
            readable.extend([0; 4]);
            readable.extend(sample.sector.to_le_bytes());
            readable.extend(&sample.payload);
            let layout = lay_out(
                &memory,
                &readable,
                sample.room + 1,
                (&cuts_readable, &cuts_writable),
                indirect,
            );
            let (status, used) = run(&memory, &disk).unwrap();
            let (expected, mut bytes) = model(&mut content, &sample, read_only);
            bytes.push(expected as u8);
            prop_assert_eq!(status, expected);
            prop_assert_eq!(used as usize, sample.room + 1);
            prop_assert_eq!(written(&memory, &layout), bytes);
            let mut stored = vec![0; content.len()];
            file.read_exact_at(&mut stored, 0).unwrap();
            prop_assert!(stored == content, "the image differs from the model");
            prop_assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR_SIZE);
        }
    }

    #[test]
    fn rubbish_in_the_table_is_survived(
        table in vec(
            (
                prop_oneof![0..2 * REGION, any::<u64>(), Just(2 * REGION - 8), Just(INDIRECT)],
                prop_oneof![0..5000u32, any::<u32>(), (0..40u32).prop_map(|n| n * 16)],
                prop_oneof![0..8u16, any::<u16>()],
                prop_oneof![0..20u16, any::<u16>()],
            ),
            1..20,
        ),
        indirect in vec(
            (BUFFERS..BUFFERS + 0x4000, 0..3000u32, 0..8u16, 0..20u16),
            0..20,
        ),
    ) {
        let memory = memory();
        let (file, disk) = disk(false);
        write_table(&memory, INDIRECT, &indirect);
        write_table(&memory, TABLE, &table);
        // Whatever it is taken for, the image keeps its size and the request ends.
        let _ = run(&memory, &disk);
        prop_assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR_SIZE);
    }
}

fn malformed(table: &[Raw]) -> Malformed {
    let memory = memory();
    let (_file, disk) = disk(false);
    write_table(&memory, TABLE, table);
    run(&memory, &disk).unwrap_err()
}

#[test]
fn chains_that_carry_no_request() {
    let header = (BUFFERS, 16, NEXT, 1);
    assert_eq!(
        malformed(&[header, (BUFFERS, 512, NEXT, 1)]),
        Malformed::Endless
    );
    assert_eq!(
        malformed(&[header, (BUFFERS, 1, NEXT, 999)]),
        Malformed::Endless
    );
    assert_eq!(
        malformed(&[header, (2 * REGION - 4, 5, WRITE, 0)]),
        Malformed::Outside {
            address: 2 * REGION - 4,
            len: 5
        }
    );
    assert_eq!(
        malformed(&[header, (BUFFERS, 1, WRITE | NEXT, 2), (BUFFERS, 1, 0, 0)]),
        Malformed::Order
    );
    assert_eq!(
        malformed(&[(BUFFERS, 15, NEXT, 1), (BUFFERS, 1, WRITE, 0)]),
        Malformed::Short {
            readable: 15,
            writable: 1
        }
    );
    assert_eq!(
        malformed(&[(BUFFERS, 16, 0, 0)]),
        Malformed::Short {
            readable: 16,
            writable: 0
        }
    );
    // An indirect table inside an indirect table, and one of no entries.
    let memory = memory();
    let (_file, disk) = disk(false);
    write_table(&memory, INDIRECT, &[(INDIRECT, 16, INDIRECT_FLAG, 0)]);
    for len in [16, 0, 17] {
        write_table(&memory, TABLE, &[(INDIRECT, len, INDIRECT_FLAG, 0)]);
        assert_eq!(run(&memory, &disk).unwrap_err(), Malformed::Endless);
    }
}

#[test]
fn an_indirect_loop_ends_soon() {
    let memory = memory();
    let (_file, disk) = disk(false);
    write_table(&memory, INDIRECT, &[(BUFFERS, 0, NEXT, 0)]);
    write_table(&memory, TABLE, &[(INDIRECT, 16 * 65535, INDIRECT_FLAG, 0)]);
    assert_eq!(run(&memory, &disk).unwrap_err(), Malformed::TooManyParts);
}

/// A request that has been started, for what operations it asks.
fn started(kind: u32, payload: &[u8], features: u64, disk: &Disk) -> (GuestMemoryMmap, Request) {
    let memory = memory();
    let mut readable = kind.to_le_bytes().to_vec();
    readable.extend([0; 12]);
    readable.extend(payload);
    lay_out(&memory, &readable, 1, (&[], &[]), false);
    let mut queue = queue(&memory);
    let chain = queue.iter(&memory).unwrap().next().unwrap();
    let mut request = Request::new();
    let progress = request.start(&memory, chain, features, disk).unwrap();
    assert_eq!(progress, Progress::Operation);
    (memory, request)
}

#[test]
fn writes_are_durable_without_a_cache() {
    let (_file, disk) = disk(false);
    let stable = |features| {
        let (_memory, request) = started(1, &[0; 512], features, &disk);
        match request.op() {
            Op::Write { stable, .. } => stable,
            op => panic!("{op:?}"),
        }
    };
    let both = feature::FLUSH | feature::CONFIG_WCE;
    assert!(stable(0));
    assert!(!stable(feature::FLUSH));
    assert!(!stable(both));
    disk.writeback.store(false, Ordering::Relaxed);
    assert!(!stable(feature::FLUSH));
    assert!(stable(both));
    assert!(stable(feature::CONFIG_WCE));
}

#[test]
fn zeroing_falls_back_to_writing() {
    let (file, disk) = disk(false);
    let sectors = 50u32;
    let mut payload = 3u64.to_le_bytes().to_vec();
    payload.extend(sectors.to_le_bytes());
    payload.extend(1u32.to_le_bytes());
    let features = feature::WRITE_ZEROES;
    let (_memory, mut request) = started(13, &payload, features, &disk);
    let mode = |request: &Request| match request.op() {
        Op::Allocate { mode, offset, len } => {
            assert_eq!((offset, len), (3 * 512, 50 * 512));
            mode & !libc::FALLOC_FL_KEEP_SIZE
        }
        op => panic!("{op:?}"),
    };
    assert_eq!(mode(&request), libc::FALLOC_FL_PUNCH_HOLE);
    assert_eq!(request.advance(-libc::EOPNOTSUPP), Progress::Operation);
    assert_eq!(mode(&request), libc::FALLOC_FL_ZERO_RANGE);
    assert_eq!(request.advance(-libc::EINVAL), Progress::Operation);
    let mut writes = 0;
    loop {
        assert!(matches!(request.op(), Op::Write { stable: false, .. }));
        // SAFETY: the zeroes are static.
        let result = unsafe { perform(disk.image.as_raw_fd(), &request.op()) };
        writes += 1;
        let progress = request.advance(result.min(10_000));
        // Without FLUSH the disk is write-through: the zeroes are made durable at the end.
        if matches!(request.op(), Op::Sync) {
            assert_eq!(progress, Progress::Operation);
            break;
        }
    }
    assert!(writes > 1, "short writes are continued");
    assert_eq!(request.advance(0), Progress::Finished(Status::Ok));
    let mut expected = first_content();
    expected[3 * 512..53 * 512].fill(0);
    let mut stored = vec![0; expected.len()];
    file.read_exact_at(&mut stored, 0).unwrap();
    assert!(stored == expected);
}

#[test]
fn short_transfers_are_continued_and_the_end_of_the_file_is_an_error() {
    let (_file, disk) = disk(false);
    let (_memory, mut request) = started(1, &[5; 1024], feature::FLUSH, &disk);
    assert_eq!(request.advance(-libc::EINTR), Progress::Operation);
    assert_eq!(request.advance(600), Progress::Operation);
    match request.op() {
        Op::Write {
            buffers, offset, ..
        } => {
            assert_eq!(offset, 600);
            assert_eq!(total(buffers), 424);
        }
        op => panic!("{op:?}"),
    }
    assert_eq!(request.advance(0), Progress::Finished(Status::IoError));
}
