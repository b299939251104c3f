//! From the port to the driver's receive queue.
//!
//! A frame from a tap is read straight into the driver's buffers: chains are taken from the ring in
//! advance, enough for the longest frame, and those that it did not need are kept for the next one.
//! Frames of a stream, and frames that the filter has to see first, are copied.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use anemone_device::{Bucket, RingError, Vring};
use anemone_log::warn_limited;
use virtio_queue::QueueT;

use crate::buffers::{Buffers, Malformed, Pieces, piece_mut};
use crate::filter::Filter;
use crate::net::{ETHERNET_HEADER, HEADER_SIZE, MAX_FRAME, NUM_BUFFERS, PLAIN, feature};
use crate::pair::{FRAMES_PER_TURN, Wait, on_ring};
use crate::port::{self, Port, Stream, StreamError};

/// Features with which a tap hands over frames of up to 64 KiB.
const LARGE: u64 =
    feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_USO4 | feature::GUEST_USO6;

/// The receive queue.
pub struct Rx {
    ring: Option<Vring>,
    chains: Chains,
    bucket: Option<Bucket>,
    filter: Option<Filter>,
    /// Longest frame where the driver does not take large ones.
    max_frame: usize,
    /// Memory of our own for a header and a frame.
    own: Box<[u8]>,
    /// Length of what is in `own` and waits for buffers.
    held: usize,
    list: Pieces,
}

/// Chains that were taken from the ring, and those that go back to the driver.
#[derive(Default)]
struct Chains {
    waiting: VecDeque<Buffers>,
    /// Bytes in `waiting`.
    bytes: usize,
    spare: Vec<Buffers>,
    used: Vec<(u16, u32)>,
    /// No more chains came for a while: go on with those that are there.
    make_do: bool,
}

impl Rx {
    /// A queue that is not started. `mtu` is that of the link.
    pub fn new(mtu: u16, bucket: Option<Bucket>, filter: Option<Filter>) -> Self {
        Self {
            ring: None,
            chains: Chains::default(),
            bucket,
            filter,
            max_frame: (usize::from(mtu) + 18).min(MAX_FRAME),
            own: vec![0; HEADER_SIZE + MAX_FRAME + 1].into(),
            held: 0,
            list: Pieces::default(),
        }
    }

    /// Serves this ring.
    pub fn start(&mut self, ring: Vring) {
        self.ring = Some(ring);
    }

    /// Stops; the index of the next available entry.
    pub fn stop(&mut self) -> u16 {
        let Some(mut ring) = self.ring.take() else {
            return 0;
        };
        // As many as the ring has entries at most.
        ring.put_back(self.chains.waiting.len() as u16);
        self.chains = Chains::default();
        ring.queue.next_avail()
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

    /// Whether there are buffers, but not enough for the longest frame.
    pub fn is_short(&self) -> bool {
        let large = self
            .ring
            .as_ref()
            .is_some_and(|ring| ring.features & LARGE != 0);
        large && !self.chains.waiting.is_empty() && !self.chains.make_do
    }

    /// The driver has not added buffers for a while.
    pub fn make_do(&mut self) {
        self.chains.make_do = true;
    }

    /// Passes frames on. `Err` is one of the port, not of the ring.
    pub fn turn(&mut self, port: &mut Port) -> Result<Wait, StreamError> {
        let Some(mut ring) = self.ring.take() else {
            return Ok(Wait::Nothing);
        };
        let outcome = on_ring(&mut ring, |ring, error| {
            let wait = self.serve(ring, port, error)?;
            self.chains.give_back(ring)?;
            Ok(wait)
        });
        self.ring = Some(ring);
        outcome
    }

    fn serve(
        &mut self,
        ring: &mut Vring,
        port: &mut Port,
        error: &mut Option<StreamError>,
    ) -> Result<Wait, RingError> {
        for _ in 0..FRAMES_PER_TURN {
            if let Some(bucket) = &mut self.bucket
                && bucket.available() == 0
            {
                if let Err(error) = bucket.wait() {
                    log::error!("the timer does not start: {error}");
                }
                return Ok(Wait::Timer);
            }
            let wait = match port {
                Port::Packets { active: false, .. } => return Ok(Wait::Nothing),
                Port::Packets { fd, header, .. } if self.filter.is_none() => {
                    self.read_into_guest(ring, fd.as_fd(), *header)?
                }
                Port::Packets { fd, header, .. } => {
                    self.read_and_copy(ring, fd.as_fd(), *header)?
                }
                Port::Stream(stream) => match self.take_from_stream(ring, stream)? {
                    Ok(wait) => wait,
                    Err(failed) => {
                        *error = Some(failed);
                        return Ok(Wait::Nothing);
                    }
                },
            };
            match wait {
                Wait::More => {}
                // More may have come in since the last look.
                Wait::Buffers if ring.enable_kicks()? => {}
                wait => return Ok(wait),
            }
        }
        Ok(Wait::More)
    }

    /// Reads one frame.
    fn read_into_guest(
        &mut self,
        ring: &mut Vring,
        fd: BorrowedFd<'_>,
        header: bool,
    ) -> Result<Wait, RingError> {
        let merge = ring.features & feature::MRG_RXBUF != 0;
        let large = ring.features & LARGE != 0;
        let enough = HEADER_SIZE + if large { MAX_FRAME } else { self.max_frame };
        let filled = self.chains.fill(ring, enough, merge)?;
        let make_do = !self.chains.waiting.is_empty() && (!large || self.chains.make_do);
        if !filled && !make_do {
            return Ok(Wait::Buffers);
        }
        self.list.0.clear();
        let mut room = 0;
        for chain in &self.chains.waiting {
            if room > 0
                && (!merge || room >= enough || self.list.0.len() + chain.parts.0.len() > 1000)
            {
                break;
            }
            let skip = if room == 0 && !header { HEADER_SIZE } else { 0 };
            chain.add_to(&mut self.list.0, skip);
            room += chain.len;
        }
        // A frame that does not fit shows by ending here.
        self.list.0.push(piece_mut(&mut self.own));
        let count = match port::read(fd, &self.list.0) {
            Ok(Some(0)) => return Ok(closed()),
            Ok(Some(count)) => count,
            Ok(None) => return Ok(Wait::Port),
            Err(error) => return Ok(failed(&error)),
        };
        let total = if header { count } else { count + HEADER_SIZE };
        if !self.accept(total, room) {
            return Ok(Wait::More);
        }
        if !header && let Some(first) = self.chains.waiting.front() {
            first.put(0, &PLAIN);
        }
        self.chains.finish(total);
        Ok(Wait::More)
    }

    /// Counts a frame; whether it can be passed on.
    fn accept(&mut self, total: usize, room: usize) -> bool {
        if let Some(bucket) = &mut self.bucket {
            bucket.spend(total as u64);
        }
        let fits = (HEADER_SIZE + 1..=room).contains(&total);
        if !fits {
            warn_limited!("a frame of {total} bytes does not fit into {room} bytes of buffers");
        }
        fits
    }

    /// Reads one frame, looks at it, and copies it.
    fn read_and_copy(
        &mut self,
        ring: &mut Vring,
        fd: BorrowedFd<'_>,
        header: bool,
    ) -> Result<Wait, RingError> {
        if self.held == 0 {
            let start = if header { 0 } else { HEADER_SIZE };
            self.own[..HEADER_SIZE].copy_from_slice(&PLAIN);
            let count = match port::read(fd, &[piece_mut(&mut self.own[start..])]) {
                Ok(Some(0)) => return Ok(closed()),
                Ok(Some(count)) => count,
                Ok(None) => return Ok(Wait::Port),
                Err(error) => return Ok(failed(&error)),
            };
            let total = start + count;
            let passes = |filter: &Filter| {
                let frame = self.own.get(HEADER_SIZE..total);
                frame.is_some_and(|frame| filter.may_receive(frame))
            };
            if !self.filter.as_ref().is_none_or(passes)
                || !self.accept(total, HEADER_SIZE + MAX_FRAME)
            {
                return Ok(Wait::More);
            }
            self.held = total;
        }
        let (head, frame) = self.own[..self.held].split_at(HEADER_SIZE);
        if !self.chains.deliver(ring, head, frame)? {
            return Ok(Wait::Buffers);
        }
        self.held = 0;
        Ok(Wait::More)
    }

    /// Passes one frame on.
    fn take_from_stream(
        &mut self,
        ring: &mut Vring,
        stream: &mut Stream,
    ) -> Result<Result<Wait, StreamError>, RingError> {
        let frame = match stream.incoming.frame() {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                return Ok(stream.receive().map(|some| match some {
                    true => Wait::More,
                    false => Wait::Port,
                }));
            }
            Err(error) => return Ok(Err(error.into())),
        };
        let length = frame.len();
        let passes = self.filter.as_ref().is_none_or(|f| f.may_receive(frame));
        if passes {
            if !self.chains.deliver(ring, &PLAIN, frame)? {
                return Ok(Ok(Wait::Buffers));
            }
            if let Some(bucket) = &mut self.bucket {
                bucket.spend(length as u64);
            }
        }
        stream.incoming.remove(length);
        Ok(Ok(Wait::More))
    }
}

/// A tap that is down has nothing to read; nor has one that was removed, or a socket whose peer is
/// gone, and they never will have.
fn failed(error: &io::Error) -> Wait {
    warn_limited!("nothing can be received: {error}");
    Wait::Nothing
}

/// The other end of a socket is gone.
fn closed() -> Wait {
    log::warn!("nothing can be received: the peer has closed the socket");
    Wait::Nothing
}

impl Chains {
    /// Takes chains from the ring until `bytes` are there, or one chain where frames are not spread
    /// over several. False if the ring has no more.
    fn fill(&mut self, ring: &mut Vring, bytes: usize, merge: bool) -> Result<bool, RingError> {
        let memory = Arc::clone(&ring.memory);
        let mut malformed_left = ring.queue.size();
        while self.waiting.is_empty() || (merge && self.bytes < bytes) {
            let Some(chain) = ring.pop()? else {
                return Ok(false);
            };
            let mut buffers = self.spare.pop().unwrap_or_default();
            let collected = buffers.collect(&memory, chain, true);
            let least = HEADER_SIZE + ETHERNET_HEADER;
            let checked = collected.and(match buffers.len {
                len if len < least => Err(Malformed::Length(len)),
                _ => Ok(()),
            });
            match checked {
                Ok(()) => {
                    self.bytes += buffers.len;
                    self.waiting.push_back(buffers);
                    self.make_do = false;
                }
                Err(malformed) => {
                    warn_limited!("a receive buffer is returned empty: {malformed}");
                    if self.waiting.is_empty() {
                        ring.push_used(buffers.head, 0)?;
                        self.spare.push(buffers);
                    } else {
                        // Not before those in front of it.
                        buffers.clear();
                        self.waiting.push_back(buffers);
                    }
                    // A driver that adds such buffers without end must not keep the thread.
                    malformed_left -= 1;
                    if malformed_left == 0 {
                        return Ok(false);
                    }
                }
            }
        }
        Ok(true)
    }

    /// Copies a frame into buffers. False if there are not enough now.
    fn deliver(&mut self, ring: &mut Vring, head: &[u8], frame: &[u8]) -> Result<bool, RingError> {
        let merge = ring.features & feature::MRG_RXBUF != 0;
        let total = head.len() + frame.len();
        let filled = self.fill(ring, total, merge)?;
        let Some(first) = self.waiting.front() else {
            return Ok(false);
        };
        if merge && !filled && self.waiting.len() < usize::from(ring.queue.size()) {
            return Ok(false);
        }
        let room = if merge { self.bytes } else { first.len };
        if room < total {
            warn_limited!("a frame of {total} bytes does not fit into {room} bytes of buffers");
            return Ok(true);
        }
        first.put(0, head);
        let mut skip = head.len();
        let mut rest = frame;
        for chain in &self.waiting {
            let (part, after) = rest.split_at(rest.len().min(chain.len - skip));
            chain.put(skip, part);
            (rest, skip) = (after, 0);
            if rest.is_empty() {
                break;
            }
        }
        self.finish(total);
        Ok(true)
    }

    /// A header and a frame, `total` bytes, have been put into the first chains.
    fn finish(&mut self, total: usize) {
        let start = self.used.len();
        let mut left = total;
        let mut first = None;
        while left > 0 {
            let Some(chain) = self.waiting.pop_front() else {
                break;
            };
            let length = left.min(chain.len);
            left -= length;
            self.bytes -= chain.len;
            // At most MAX_FRAME and a header.
            self.used.push((chain.head, length as u32));
            match first {
                None => first = Some(chain),
                Some(_) => self.spare.push(chain),
            }
        }
        if let Some(first) = first {
            let count = (self.used.len() - start) as u16;
            first.put(NUM_BUFFERS, &count.to_le_bytes());
            self.spare.push(first);
        }
        while let Some(empty) = self.waiting.pop_front_if(|chain| chain.len == 0) {
            self.used.push((empty.head, 0));
            self.spare.push(empty);
        }
    }

    /// Returns the frames to the driver.
    fn give_back(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        if !self.used.is_empty() {
            ring.push_used_all(&self.used)?;
            self.used.clear();
        }
        Ok(())
    }
}
