//! From the driver's transmit queue to the port.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anemone_device::{Bucket, RingError, Vring};
use anemone_log::warn_limited;
use libc::iovec;
use virtio_queue::QueueT;

use crate::buffers::{Buffers, Malformed, Pieces, piece};
use crate::filter::Filter;
use crate::net::{ETHERNET_HEADER, HEADER_SIZE, MAX_FRAME, check_header};
use crate::pair::{FRAMES_PER_TURN, Wait, on_ring};
use crate::port::{self, Port, Stream, StreamError};
use crate::stream::{MAX_LENGTH, PREFIX};

/// Pieces of memory in one call; the kernel takes 1024.
const MAX_PIECES: usize = 1024;

/// The transmit queue.
pub struct Tx {
    ring: Option<Vring>,
    bucket: Option<Bucket>,
    filter: Option<Filter>,
    /// Frames that have been taken from the ring; the first `count` are in use.
    frames: Vec<Frame>,
    count: usize,
    list: Pieces,
}

/// A frame that the driver sends. What was checked is a copy, for the driver could change the
/// original after the check.
#[derive(Default)]
struct Frame {
    /// Header of the packet, for a tap; length of the frame in the last bytes, for a stream.
    header: [u8; HEADER_SIZE],
    ethernet: [u8; ETHERNET_HEADER],
    rest: Buffers,
}

impl Frame {
    fn len(&self) -> usize {
        ETHERNET_HEADER + self.rest.len
    }

    /// Lists the frame with the last `prefix` bytes of its header.
    fn add_to(&self, list: &mut Vec<iovec>, prefix: usize) {
        if prefix > 0 {
            list.push(piece(&self.header[HEADER_SIZE - prefix..]));
        }
        list.push(piece(&self.ethernet));
        self.rest.add_to(list, 0);
    }
}

impl Tx {
    /// A queue that is not started.
    pub fn new(bucket: Option<Bucket>, filter: Option<Filter>) -> Self {
        Self {
            ring: None,
            bucket,
            filter,
            frames: Vec::new(),
            count: 0,
            list: Pieces::default(),
        }
    }

    /// Serves this ring.
    pub fn start(&mut self, ring: Vring) {
        self.ring = Some(ring);
    }

    /// Stops; the index of the next available entry.
    pub fn stop(&mut self) -> u16 {
        self.ring.take().map_or(0, |ring| ring.queue.next_avail())
    }

    /// Uses another filter.
    pub fn set_filter(&mut self, filter: Option<Filter>) {
        self.filter = filter;
    }

    /// The ring, for its kick.
    pub fn ring(&self) -> Option<&Vring> {
        self.ring.as_ref()
    }

    /// The rate limit's timer.
    pub fn bucket(&mut self) -> Option<&mut Bucket> {
        self.bucket.as_mut()
    }

    /// Passes frames on. `Err` is one of the port, not of the ring.
    pub fn turn(&mut self, port: &mut Port) -> Result<Wait, StreamError> {
        let Some(mut ring) = self.ring.take() else {
            return Ok(Wait::Nothing);
        };
        let outcome = on_ring(&mut ring, |ring, error| self.serve(ring, port, error));
        self.ring = Some(ring);
        outcome
    }

    fn serve(
        &mut self,
        ring: &mut Vring,
        port: &mut Port,
        error: &mut Option<StreamError>,
    ) -> Result<Wait, RingError> {
        if let Port::Stream(stream) = port {
            match stream.send_rest() {
                Ok(true) => {}
                Ok(false) => return Ok(Wait::Port),
                Err(failed) => {
                    *error = Some(failed.into());
                    return Ok(Wait::Nothing);
                }
            }
        }
        let wait = self.collect(ring)?;
        let sent = match port {
            Port::Packets { active: false, .. } => Ok(None),
            Port::Packets { fd, header, .. } => {
                let prefix = if *header { HEADER_SIZE } else { 0 };
                Ok(self.send_packets(fd.as_fd(), prefix))
            }
            Port::Stream(stream) => self.send_stream(stream),
        };
        let sent = sent.unwrap_or_else(|failed| {
            *error = Some(failed.into());
            None
        });
        // Where nobody takes frames they are lost, as on a cable that is not plugged in.
        let done = sent.unwrap_or(self.count);
        let returned: Vec<_> = self.frames[..done]
            .iter()
            .map(|f| (f.rest.head, 0))
            .collect();
        ring.push_used_all(&returned)?;
        if let Some(bucket) = &mut self.bucket {
            let bytes: usize = self.frames[..done].iter().map(Frame::len).sum();
            bucket.spend(bytes as u64);
        }
        if done < self.count {
            // At most FRAMES_PER_TURN.
            ring.put_back((self.count - done) as u16);
            return Ok(Wait::Port);
        }
        match wait {
            Wait::Buffers if ring.enable_kicks()? => Ok(Wait::More),
            wait => Ok(wait),
        }
    }

    /// Takes frames from the ring; why there are no more.
    fn collect(&mut self, ring: &mut Vring) -> Result<Wait, RingError> {
        let memory = Arc::clone(&ring.memory);
        self.count = 0;
        let mut allowed = match &mut self.bucket {
            Some(bucket) => bucket.available(),
            None => u64::MAX,
        };
        let mut pieces = 0;
        for _ in 0..FRAMES_PER_TURN {
            if allowed == 0 {
                if let Some(Err(error)) = self.bucket.as_mut().map(Bucket::wait) {
                    log::error!("the timer does not start: {error}");
                }
                return Ok(Wait::Timer);
            }
            let Some(chain) = ring.pop()? else {
                return Ok(Wait::Buffers);
            };
            if self.frames.len() == self.count {
                self.frames.push(Frame::default());
            }
            let frame = &mut self.frames[self.count];
            let collected = frame.rest.collect(&memory, chain, false);
            let checked = collected.and_then(|()| {
                let length = frame.rest.len;
                let enough = frame.rest.take(&mut frame.header)
                    && frame.rest.take(&mut frame.ethernet)
                    && frame.len() <= MAX_FRAME;
                enough.then_some(()).ok_or(Malformed::Length(length))
            });
            let passes = match checked {
                Ok(()) => match check_header(frame.header, ring.features) {
                    Some(header) => {
                        frame.header = header;
                        let filter = self.filter.as_ref();
                        filter.is_none_or(|filter| filter.may_send(&frame.ethernet))
                    }
                    None => {
                        warn_limited!("a frame asks for an offload that was not negotiated");
                        false
                    }
                },
                Err(malformed) => {
                    warn_limited!("a frame is returned unsent: {malformed}");
                    false
                }
            };
            if !passes {
                // What was taken before it is still in front of it.
                if self.count == 0 {
                    ring.push_used(frame.rest.head, 0)?;
                    continue;
                }
                ring.put_back(1);
                return Ok(Wait::More);
            }
            pieces += 2 + frame.rest.parts.0.len();
            if pieces > MAX_PIECES {
                // The first one always fits.
                ring.put_back(1);
                return Ok(Wait::More);
            }
            allowed = allowed.saturating_sub(frame.len() as u64);
            self.count += 1;
        }
        Ok(Wait::More)
    }

    /// Sends the frames one by one; how many, if not all.
    fn send_packets(&mut self, fd: BorrowedFd<'_>, prefix: usize) -> Option<usize> {
        for (number, frame) in self.frames[..self.count].iter().enumerate() {
            self.list.0.clear();
            frame.add_to(&mut self.list.0, prefix);
            match port::write(fd, &self.list.0) {
                Ok(Some(_)) => {}
                Ok(None) => return Some(number),
                // A header that makes no sense, a tap that is down: the frame is lost.
                Err(error) => warn_limited!("a frame was not sent: {error}"),
            }
        }
        None
    }

    /// Sends the frames at once; how many, if not all. Of the last one a part may have been sent,
    /// and the rest is kept.
    fn send_stream(&mut self, stream: &mut Stream) -> io::Result<Option<usize>> {
        let Some(fd) = &stream.fd else {
            return Ok(None);
        };
        self.list.0.clear();
        let mut too_long = false;
        for frame in &mut self.frames[..self.count] {
            let length = frame.len();
            too_long |= length > MAX_LENGTH;
            let prefix = (length as u32).to_be_bytes();
            frame.header[HEADER_SIZE - PREFIX..].copy_from_slice(&prefix);
        }
        let frames = &self.frames[..self.count];
        let fits = |frame: &Frame| frame.len() <= MAX_LENGTH;
        if too_long {
            warn_limited!("a frame of more than {MAX_LENGTH} bytes was not sent");
        }
        for frame in frames.iter().filter(|frame| fits(frame)) {
            frame.add_to(&mut self.list.0, PREFIX);
        }
        if self.list.0.is_empty() {
            return Ok(None);
        }
        let Some(mut left) = port::write(fd.as_fd(), &self.list.0)? else {
            return Ok(Some(0));
        };
        for (number, frame) in frames.iter().enumerate() {
            let length = if fits(frame) { PREFIX + frame.len() } else { 0 };
            if left >= length {
                left -= length;
                continue;
            }
            if left == 0 {
                return Ok(Some(number));
            }
            self.list.0.clear();
            frame.add_to(&mut self.list.0, PREFIX);
            keep_rest(&self.list.0, left, &mut stream.unsent);
            return Ok(Some(number + 1));
        }
        Ok(None)
    }
}

/// Copies what comes after the first `skip` bytes.
fn keep_rest(pieces: &[iovec], mut skip: usize, to: &mut Vec<u8>) {
    for piece in pieces {
        let start = skip.min(piece.iov_len);
        skip -= start;
        let at = to.len();
        let count = piece.iov_len - start;
        to.resize(at + count, 0);
        // SAFETY: the piece lies in guest memory, which is mapped, or in a frame of ours; the copy
        // ends where the vector was made to end.
        unsafe {
            let from = piece.iov_base.cast::<u8>().add(start);
            std::ptr::copy_nonoverlapping(from, to[at..].as_mut_ptr(), count);
        }
    }
}
