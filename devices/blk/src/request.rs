//! One virtio-blk request (virtio 1.2, 5.2.6): from a descriptor chain to operations on the image
//! and back to a status.
//!
//! A chain is two strings of bytes, the device-readable and the device-writable one. The first 16
//! readable bytes are the header, the last writable byte is the status, whatever descriptors they
//! are spread over; what remains is the data. When a request ends, every writable byte has been
//! written: bytes that an operation leaves out, or that a failed one may not have reached, are
//! zeroed. So the used length is always that of the writable part.

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicBool, Ordering};

use anemone_device::{Side, Unusable, walk};
use libc::iovec;
use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use crate::engine::Op;
use crate::image::{Image, SECTOR_SIZE};

/// Feature bits (virtio 1.2, 5.2.3).
pub mod feature {
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// Writes fail.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// FLUSH requests.
    pub const FLUSH: u64 = 1 << 9;
    /// `topology` is valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `writeback` chooses between write-back and write-through.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `num_queues` is valid.
    pub const MQ: u64 = 1 << 12;
    /// DISCARD requests.
    pub const DISCARD: u64 = 1 << 13;
    /// WRITE_ZEROES requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Length of the GET_ID string.
pub const ID_SIZE: usize = 20;
/// Ranges in one DISCARD or WRITE_ZEROES request.
pub const MAX_RANGES: u32 = 16;
/// Sectors in one such range: 2 GiB.
pub const MAX_RANGE_SECTORS: u32 = 1 << 22;

/// Parts of a request in host memory. The kernel takes no more in one vectored transfer; a chain
/// of the largest queue offered, 256, has fewer unless it is spread over many memory regions.
const MAX_PARTS: usize = 1024;
/// Capacity of the part list that a request keeps for the next one.
const KEPT_PARTS: usize = 32;
const HEADER_SIZE: usize = 16;
const RANGE_SIZE: usize = 16;

/// Zeroes to write where the file system cannot make them.
static ZEROES: [u8; 4096] = [0; 4096];
/// Bytes zeroed by one such write.
const ZERO_STEP: u64 = 64 * ZEROES.len() as u64;

/// The disk as its queues see it.
pub struct Disk {
    /// The open image.
    pub image: Image,
    /// GET_ID string, padded with zeroes.
    pub id: [u8; ID_SIZE],
    /// The `writeback` field of the configuration space.
    pub writeback: AtomicBool,
}

/// A chain that carries no request; it is returned to the driver with nothing written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// A descriptor could not be read, or the chain loops or exceeds 4 GiB.
    #[error("its chain does not end")]
    Endless,
    /// A buffer is not in guest memory.
    #[error("a buffer of {len} bytes at {address:#x} is not in guest memory")]
    Outside {
        /// Guest address of the buffer.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// More than [`MAX_PARTS`] descriptors.
    #[error("it has more than {MAX_PARTS} parts")]
    TooManyParts,
    /// Readable descriptors come first (virtio 1.2, 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
    /// No room for a header or a status.
    #[error(
        "it has {readable} readable and {writable} writable bytes, at least 16 and 1 are needed"
    )]
    Short {
        /// Readable bytes.
        readable: u64,
        /// Writable bytes.
        writable: u64,
    },
}

impl From<Unusable> for Malformed {
    fn from(chain: Unusable) -> Self {
        match chain {
            Unusable::Endless => Self::Endless,
            Unusable::Outside { address, len } => Self::Outside { address, len },
            Unusable::TooMany(_) => Self::TooManyParts,
            Unusable::Order => Self::Order,
        }
    }
}

/// Status byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed.
    IoError = 1,
    /// Not a request of this device.
    Unsupported = 2,
}

/// What a request needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The operation that [`Request::op`] gives.
    Operation,
    /// To be returned to the driver with this status.
    Finished(Status),
}

/// How a range is zeroed, each tried when the one before is not supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroBy {
    PunchHole,
    ZeroRange,
    Writing,
}

/// What is left to do.
#[derive(Debug)]
enum Work {
    /// Read into the rest of the data parts.
    Read { offset: u64 },
    /// Write the rest of the data parts.
    Write { offset: u64 },
    /// Make completed writes durable.
    Sync,
    /// Discard `ranges` of the image, the last one first.
    Discard { ranges: Vec<Range<u64>> },
    /// Zero them.
    Zero { ranges: Vec<Range<u64>>, by: ZeroBy },
}

/// A request. One is used again and again, so that requests are served without allocation.
#[derive(Debug)]
pub struct Request {
    head: u16,
    /// The chain in host memory: readable parts, then writable ones.
    parts: Vec<iovec>,
    /// The parts that hold data to transfer and have not been transferred.
    data: Range<usize>,
    status: *mut u8,
    writable: u32,
    /// Writes are to be durable when the request ends.
    write_through: bool,
    block_device: bool,
    work: Work,
}

impl Request {
    /// A request that has never held anything.
    pub fn new() -> Self {
        Self {
            head: 0,
            parts: Vec::new(),
            data: 0..0,
            status: std::ptr::null_mut(),
            writable: 0,
            write_through: false,
            block_device: false,
            work: Work::Sync,
        }
    }

    /// Index of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Takes up the request in `chain`. `features` are those that the driver has accepted.
    ///
    /// The memory must stay mapped until [`Request::finish`].
    pub fn start(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<impl Deref<Target = GuestMemoryMmap>>,
        features: u64,
        disk: &Disk,
    ) -> Result<Progress, Malformed> {
        self.head = chain.head_index();
        let first_writable = self.collect(memory, chain)?;
        let (readable_parts, writable_parts) = self.parts.split_at(first_writable);
        let (readable, writable) = (total(readable_parts), total(writable_parts));
        let mut readable_data = 0..first_writable;
        let mut header = [0; HEADER_SIZE];
        if writable == 0 || !take(&mut self.parts, &mut readable_data, &mut header) {
            return Err(Malformed::Short { readable, writable });
        }
        // A chain has less than 4 GiB.
        self.writable = u32::try_from(writable).unwrap_or(u32::MAX);
        let mut writable_data = first_writable..self.parts.len();
        let last = &mut self.parts[writable_data.end - 1];
        last.iov_len -= 1;
        self.status = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        if last.iov_len == 0 {
            writable_data.end -= 1;
        }

        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);
        self.block_device = disk.image.is_block_device();
        // Without both features the driver knows of no cache (virtio 1.2, 5.2.6.2).
        self.write_through = features & feature::FLUSH == 0
            || (features & feature::CONFIG_WCE != 0 && !disk.writeback.load(Ordering::Relaxed));
        self.data = writable_data;

        // virtio 1.2, 5.2.6
        const IN: u32 = 0;
        const OUT: u32 = 1;
        const FLUSH: u32 = 4;
        const GET_ID: u32 = 8;
        const DISCARD: u32 = 11;
        const WRITE_ZEROES: u32 = 13;
        if kind == IN {
            return Ok(match transfer_offset(disk, sector, writable - 1) {
                Some(_) if writable == 1 => Progress::Finished(Status::Ok),
                Some(offset) => self.begin(Work::Read { offset }),
                None => {
                    self.zero_data();
                    Progress::Finished(Status::IoError)
                }
            });
        }
        if kind == GET_ID {
            let data = self.data.clone();
            put(&self.parts[data], &disk.id);
        } else {
            self.zero_data();
        }
        self.data = readable_data;
        let readable = readable - HEADER_SIZE as u64;
        Ok(match kind {
            OUT if disk.image.read_only() => Progress::Finished(Status::IoError),
            OUT => match transfer_offset(disk, sector, readable) {
                Some(_) if readable == 0 => Progress::Finished(Status::Ok),
                Some(offset) => self.begin(Work::Write { offset }),
                None => Progress::Finished(Status::IoError),
            },
            FLUSH => self.begin(Work::Sync),
            GET_ID => Progress::Finished(Status::Ok),
            DISCARD if features & feature::DISCARD != 0 => self.start_ranges(disk, readable, false),
            WRITE_ZEROES if features & feature::WRITE_ZEROES != 0 => {
                self.start_ranges(disk, readable, true)
            }
            _ => Progress::Finished(Status::Unsupported),
        })
    }

    /// Lists the chain's buffers in `parts`; returns where the writable ones start.
    fn collect(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<impl Deref<Target = GuestMemoryMmap>>,
    ) -> Result<usize, Malformed> {
        self.parts.clear();
        let mut first_writable = None;
        let parts = &mut self.parts;
        walk(memory, chain, MAX_PARTS, |side, part| {
            if side == Side::Writable {
                first_writable.get_or_insert(parts.len());
            }
            parts.push(part);
        })?;
        Ok(first_writable.unwrap_or(self.parts.len()))
    }

    fn begin(&mut self, work: Work) -> Progress {
        self.work = work;
        Progress::Operation
    }

    /// Starts a DISCARD (`zero` false) or WRITE_ZEROES request with `len` bytes of ranges.
    fn start_ranges(&mut self, disk: &Disk, len: u64, zero: bool) -> Progress {
        const UNMAP: u32 = 1;
        if len == 0
            || !len.is_multiple_of(RANGE_SIZE as u64)
            || len > u64::from(MAX_RANGES) * RANGE_SIZE as u64
        {
            return Progress::Finished(Status::IoError);
        }
        let mut ranges = Vec::new();
        let mut unmap = true;
        let mut unsupported = false;
        let mut valid = true;
        let mut raw = [0; RANGE_SIZE];
        while take(&mut self.parts, &mut self.data, &mut raw) {
            let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = raw;
            let sector = u64::from_le_bytes(sector);
            let sectors = u32::from_le_bytes([c0, c1, c2, c3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            unsupported |= flags & !UNMAP != 0 || (!zero && flags & UNMAP != 0);
            unmap &= flags & UNMAP != 0;
            let bytes = u64::from(sectors) * SECTOR_SIZE;
            match transfer_offset(disk, sector, bytes) {
                Some(offset) if sectors <= MAX_RANGE_SECTORS => {
                    if sectors != 0 {
                        ranges.push(offset..offset + bytes);
                    }
                }
                _ => valid = false,
            }
        }
        if unsupported {
            return Progress::Finished(Status::Unsupported);
        }
        if !valid {
            return Progress::Finished(Status::IoError);
        }
        if ranges.is_empty() {
            return Progress::Finished(Status::Ok);
        }
        ranges.reverse();
        self.work = if !zero {
            Work::Discard { ranges }
        } else {
            // Without the flag on every range the space stays allocated.
            let by = if unmap {
                ZeroBy::PunchHole
            } else {
                ZeroBy::ZeroRange
            };
            Work::Zero { ranges, by }
        };
        Progress::Operation
    }

    /// The operation to carry out now. [`Request::advance`] takes its result.
    pub fn op(&self) -> Op<'_> {
        let buffers = &self.parts[self.data.clone()];
        match &self.work {
            Work::Read { offset } => Op::Read {
                buffers,
                offset: *offset,
            },
            Work::Write { offset } => Op::Write {
                buffers,
                offset: *offset,
                stable: self.write_through,
            },
            Work::Discard { ranges } => match ranges.last() {
                Some(range) if self.block_device => Op::Discard {
                    offset: range.start,
                    len: range.end - range.start,
                },
                Some(range) => allocate(libc::FALLOC_FL_PUNCH_HOLE, range),
                None => Op::Sync,
            },
            Work::Zero { ranges, by } => match (ranges.last(), by) {
                (Some(range), ZeroBy::PunchHole) => allocate(libc::FALLOC_FL_PUNCH_HOLE, range),
                (Some(range), ZeroBy::ZeroRange) => allocate(libc::FALLOC_FL_ZERO_RANGE, range),
                (Some(range), ZeroBy::Writing) => Op::Write {
                    buffers,
                    offset: range.start,
                    stable: false,
                },
                (None, _) => Op::Sync,
            },
            Work::Sync => Op::Sync,
        }
    }

    /// Takes the result of the operation: bytes, 0, or a negated error number.
    pub fn advance(&mut self, result: i32) -> Progress {
        const RETRY: [i32; 2] = [-libc::EINTR, -libc::EAGAIN];
        if RETRY.contains(&result) {
            return Progress::Operation;
        }
        match &mut self.work {
            Work::Read { offset } | Work::Write { offset } => {
                // 0 is the end of an image that has been truncated.
                let Some(transferred) = usize::try_from(result).ok().filter(|n| *n > 0) else {
                    if matches!(self.work, Work::Read { .. }) {
                        self.zero_data();
                    }
                    return Progress::Finished(Status::IoError);
                };
                *offset += transferred as u64;
                consume(&mut self.parts, &mut self.data, transferred);
                if self.data.is_empty() {
                    return Progress::Finished(Status::Ok);
                }
            }
            Work::Sync => {
                return Progress::Finished(if result == 0 {
                    Status::Ok
                } else {
                    Status::IoError
                });
            }
            Work::Discard { ranges } => {
                // A discard is a hint: where it cannot be followed, nothing is wrong.
                if result != 0 && result != -libc::EOPNOTSUPP {
                    return Progress::Finished(Status::IoError);
                }
                ranges.pop();
                if ranges.is_empty() {
                    return Progress::Finished(Status::Ok);
                }
            }
            Work::Zero { .. } => return self.advance_zeroing(result),
        }
        Progress::Operation
    }

    fn advance_zeroing(&mut self, result: i32) -> Progress {
        let Work::Zero { ranges, by } = &mut self.work else {
            return Progress::Finished(Status::IoError);
        };
        match (*by, result) {
            (ZeroBy::Writing, 1..) => {
                if let Some(range) = ranges.last_mut() {
                    range.start = range.end.min(range.start + result as u64);
                    if range.is_empty() {
                        ranges.pop();
                    }
                }
            }
            (ZeroBy::PunchHole | ZeroBy::ZeroRange, 0) => {
                ranges.pop();
            }
            (ZeroBy::PunchHole, error) if is_unsupported(error) => *by = ZeroBy::ZeroRange,
            (ZeroBy::ZeroRange, error) if is_unsupported(error) => *by = ZeroBy::Writing,
            _ => return Progress::Finished(Status::IoError),
        }
        let Some(range) = ranges.last() else {
            if self.write_through {
                return self.begin(Work::Sync);
            }
            return Progress::Finished(Status::Ok);
        };
        if *by == ZeroBy::Writing {
            let mut left = (range.end - range.start).min(ZERO_STEP) as usize;
            self.parts.clear();
            while left > 0 {
                let iov_len = left.min(ZEROES.len());
                self.parts.push(iovec {
                    iov_base: (&raw const ZEROES).cast_mut().cast(),
                    iov_len,
                });
                left -= iov_len;
            }
            self.data = 0..self.parts.len();
        }
        Progress::Operation
    }

    /// Stores the status; returns the used length. The guest's memory is not touched afterwards.
    pub fn finish(&mut self, status: Status) -> u32 {
        // SAFETY: `start` made the pointer from a slice of guest memory, which its caller keeps
        // mapped until now.
        unsafe { self.status.write_volatile(status as u8) };
        self.work = Work::Sync;
        self.data = 0..0;
        if self.parts.capacity() > KEPT_PARTS {
            self.parts = Vec::new();
        }
        self.writable
    }

    fn zero_data(&mut self) {
        put(&self.parts[self.data.clone()], &[]);
    }
}

fn allocate(mode: libc::c_int, range: &Range<u64>) -> Op<'static> {
    Op::Allocate {
        mode: mode | libc::FALLOC_FL_KEEP_SIZE,
        offset: range.start,
        len: range.end - range.start,
    }
}

/// Whether zeroing failed because of the way, not for good. EINVAL: blocks of a block device that
/// the range does not match.
fn is_unsupported(result: i32) -> bool {
    result == -libc::EOPNOTSUPP || result == -libc::EINVAL
}

/// Position of `len` bytes at `sector` if they are whole sectors and inside the image.
fn transfer_offset(disk: &Disk, sector: u64, len: u64) -> Option<u64> {
    let room = disk.image.sectors().checked_sub(sector)?;
    (len.is_multiple_of(SECTOR_SIZE) && len / SECTOR_SIZE <= room).then(|| sector * SECTOR_SIZE)
}

fn total(parts: &[iovec]) -> u64 {
    parts.iter().map(|part| part.iov_len as u64).sum()
}

/// Drops `len` bytes from the front of `parts[range]`, and empty parts after them.
fn consume(parts: &mut [iovec], range: &mut Range<usize>, mut len: usize) {
    while let Some(part) = parts[range.clone()].first_mut() {
        if part.iov_len > len {
            part.iov_base = part.iov_base.wrapping_byte_add(len);
            part.iov_len -= len;
            return;
        }
        len -= part.iov_len;
        range.start += 1;
    }
}

/// Moves bytes from the front of `parts[range]` to `out`; false if there are not enough.
fn take(parts: &mut [iovec], range: &mut Range<usize>, out: &mut [u8]) -> bool {
    let mut filled = 0;
    while filled < out.len() {
        let Some(part) = parts[range.clone()].first() else {
            return false;
        };
        let len = part.iov_len.min(out.len() - filled);
        let base = part.iov_base.cast::<u8>();
        for (i, byte) in out[filled..filled + len].iter_mut().enumerate() {
            // SAFETY: inside the part, a slice of mapped guest memory. Volatile: the guest may
            // change it at any time, so each byte is fetched once.
            *byte = unsafe { base.wrapping_add(i).read_volatile() };
        }
        filled += len;
        consume(parts, range, len);
    }
    true
}

/// Fills the parts with `bytes`, as far as they fit, and zeroes behind them.
fn put(parts: &[iovec], mut bytes: &[u8]) {
    for part in parts {
        let (now, later) = bytes.split_at(part.iov_len.min(bytes.len()));
        bytes = later;
        let base = part.iov_base.cast::<u8>();
        // SAFETY: both ranges are inside the part, a slice of mapped guest memory, and `now` is
        // our own memory.
        unsafe {
            base.copy_from_nonoverlapping(now.as_ptr(), now.len());
            base.wrapping_add(now.len())
                .write_bytes(0, part.iov_len - now.len());
        }
    }
}

#[cfg(test)]
mod tests;
