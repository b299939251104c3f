//! Packets into the guest's buffers.

use std::ops::Range;
use std::sync::Arc;

use anemone_device::{RingError, Side, Vring};
use anemone_log::warn_limited;
use libc::iovec;
use virtio_queue::QueueT;

use super::{Connections, Outgoing};
use crate::packet::{HEADER_SIZE, Header};
use crate::parts;
use crate::state::{BATCH, phase, receiving};
use crate::sys;

/// Most data in a packet, and for one connection before others have their turn.
const MOST: usize = 64 << 10;
/// Buffers looked at for one call, so that useless ones do not keep the main loop.
const LOOKS: usize = 4 * BATCH;

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Something was done, and there may be more.
    Done,
    /// There is nothing to deliver.
    Idle,
    /// The guest has no buffer for it.
    Starved,
}

/// A buffer of the guest.
struct Target {
    head: u16,
    header: Range<usize>,
    payload: Range<usize>,
    room: usize,
}

/// Buffers of the guest, taken for one packet or several. Kept for its memory only.
#[derive(Default)]
pub struct Buffers {
    parts: Vec<iovec>,
    targets: Vec<Target>,
}

impl Buffers {
    /// Takes buffers from the ring until they have `room` bytes beside their headers, as many as
    /// there are, up to [`BATCH`].
    fn take(&mut self, ring: &mut Vring, room: usize) -> Result<(), RingError> {
        self.parts.clear();
        self.targets.clear();
        let mut found = 0;
        for _ in 0..LOOKS {
            if self.targets.len() == BATCH || (found >= room && !self.targets.is_empty()) {
                break;
            }
            let Some(chain) = ring.pop()? else {
                break;
            };
            let head = chain.head_index();
            let Some(mut target) = self.target(ring, chain) else {
                ring.push_used(head, 0)?;
                continue;
            };
            if room > 0 && target.room == 0 {
                warn_limited!("a buffer of the driver has no room for data");
                ring.push_used(head, 0)?;
                continue;
            }
            target.room = target.room.min(MOST).min(room - found.min(room));
            found += target.room;
            let mut left = target.room;
            for part in &mut self.parts[target.payload.clone()] {
                part.iov_len = part.iov_len.min(left);
                left -= part.iov_len;
            }
            self.targets.push(target);
        }
        Ok(())
    }

    /// A chain as a place for a packet; `None` if it is none.
    fn target(&mut self, ring: &Vring, chain: anemone_device::Chain) -> Option<Target> {
        let head = chain.head_index();
        let start = self.parts.len();
        let sound = parts::gather(&ring.memory, chain, Side::Writable, &mut self.parts);
        let payload = parts::split_header(&mut self.parts, start);
        let (true, Some(payload)) = (sound, payload) else {
            warn_limited!("a buffer of the driver has no room for a packet's header");
            self.parts.truncate(start);
            return None;
        };
        let end = self.parts.len();
        Some(Target {
            head,
            header: start..payload,
            payload: payload..end,
            room: parts::total(&self.parts[payload..]),
        })
    }

    fn write_header(&self, target: &Target, header: &Header) {
        let mut bytes = header.bytes();
        // SAFETY: pieces of guest memory, which the ring keeps mapped, and of an array.
        unsafe { parts::copy(&[parts::of(&mut bytes)], &self.parts[target.header.clone()]) };
    }
}

impl Connections {
    /// Gives the guest the next packet, or data of one connection as far as buffers go.
    pub fn deliver(
        &mut self,
        ring: &mut Vring,
        buffers: &mut Buffers,
    ) -> Result<Delivery, RingError> {
        // The pieces point into it.
        let _memory = Arc::clone(&ring.memory);
        if let Some(packet) = self.next_packet() {
            return self.deliver_packet(ring, buffers, &packet);
        }
        let Some(number) = self.next_data() else {
            return Ok(Delivery::Idle);
        };
        let Some(length) = self.readable(number, MOST) else {
            return Ok(Delivery::Done);
        };
        buffers.take(ring, length)?;
        if buffers.targets.is_empty() {
            self.first_again(number);
            return Ok(Delivery::Starved);
        }
        let received = self.receive(number, ring, buffers)?;
        if received < length {
            // There was less room, or a piece of the stream ended early.
            self.may_have_more(number);
        }
        self.offer_data(number);
        Ok(Delivery::Done)
    }

    fn deliver_packet(
        &mut self,
        ring: &mut Vring,
        buffers: &mut Buffers,
        packet: &Outgoing,
    ) -> Result<Delivery, RingError> {
        buffers.take(ring, 0)?;
        let Some(target) = buffers.targets.first() else {
            return Ok(Delivery::Starved);
        };
        let mark = self.state.receive();
        mark.used.set(ring.queue.next_used().into());
        match packet.wish {
            None => mark.what.set(receiving::RESET),
            Some((number, bits)) => {
                mark.slot.set(number.into());
                mark.generation.set(self.slot(number).generation.get());
                mark.bits.set(bits);
                mark.what.set(receiving::CONTROL);
            }
        }
        buffers.write_header(target, &packet.header);
        ring.push_used(target.head, HEADER_SIZE as u32)?;
        self.sent(packet);
        self.state.receive().what.set(receiving::NOTHING);
        Ok(Delivery::Done)
    }

    /// Reads from a socket into guest buffers and gives those to the guest; how many bytes.
    fn receive(
        &mut self,
        number: u16,
        ring: &mut Vring,
        buffers: &mut Buffers,
    ) -> Result<usize, RingError> {
        let Some(fd) = self.fd(number) else {
            return Ok(0);
        };
        let (mark, slot) = (self.state.receive(), self.state.slot(number));
        let count = buffers.targets.len();
        for (index, target) in buffers.targets.iter().enumerate() {
            mark.heads[index].set(target.head.into());
            mark.rooms[index].set(target.room as u32);
            mark.prepare(index, &mut buffers.parts[target.payload.clone()]);
        }
        mark.count.set(count as u32);
        mark.slot.set(number.into());
        mark.generation.set(slot.generation.get());
        mark.base.set(slot.to_guest.get());
        mark.used.set(ring.queue.next_used().into());
        mark.what.set(receiving::DATA);
        // SAFETY: the pieces lie in guest memory, which the caller keeps mapped.
        let result = unsafe { sys::receive(fd, mark.messages(), count) };
        let total = mark.total();
        slot.to_guest.set(mark.base.get().wrapping_add(total));
        let mut done = [(0, 0); BATCH];
        for (index, target) in buffers.targets.iter().enumerate() {
            done[index] = self.fill(buffers, target, number, index);
        }
        ring.push_used_all(&done[..count])?;
        self.state.receive().what.set(receiving::NOTHING);
        if let Err(error) = result
            && error.kind() != std::io::ErrorKind::WouldBlock
        {
            log::debug!("a socket of the host has failed: {error}");
            self.host_takes_no_more(number);
            self.host_sends_no_more(number);
        }
        Ok(total as usize)
    }

    /// Makes what buffer `index` of the mark holds a packet; the chain and its length.
    fn fill(&self, buffers: &Buffers, target: &Target, number: u16, index: usize) -> (u16, u32) {
        match self.state.receive().moved(index) {
            0 => (target.head, 0),
            length => {
                buffers.write_header(target, &self.data_header(number, length));
                (target.head, HEADER_SIZE as u32 + length)
            }
        }
    }

    /// Finishes what an earlier process has left in guest buffers, before anything else happens on
    /// the ring.
    pub fn resume(&mut self, ring: &mut Vring, buffers: &mut Buffers) -> Result<(), RingError> {
        let _memory = Arc::clone(&ring.memory);
        let mark = self.state.receive();
        let (what, number) = (mark.what.get(), mark.slot.get() as u16);
        let done = ring.queue.next_used().wrapping_sub(mark.used.get() as u16);
        let slot = self.state.slot(number);
        let same = slot.generation.get() == mark.generation.get();
        match what {
            receiving::RESET if done > 0 => self.state.pop_reset(),
            receiving::CONTROL if done > 0 && same => slot.flags.remove(mark.bits.get()),
            receiving::DATA if same && slot.phase.get() == phase::OPEN => {
                for index in usize::from(done)..mark.count() {
                    if self.state.receive().moved(index) == 0 {
                        break;
                    }
                    if !self.resume_buffer(ring, buffers, number, index)? {
                        warn_limited!("a guest buffer of the earlier process is lost");
                        self.close(number, true);
                        break;
                    }
                }
                ring.notify()?;
            }
            _ => {}
        }
        self.state.receive().what.set(receiving::NOTHING);
        Ok(())
    }

    /// Gives the guest a buffer that an earlier process has filled; false if the ring has another.
    fn resume_buffer(
        &self,
        ring: &mut Vring,
        buffers: &mut Buffers,
        number: u16,
        index: usize,
    ) -> Result<bool, RingError> {
        buffers.parts.clear();
        let Some(chain) = ring.pop()? else {
            return Ok(false);
        };
        let head = chain.head_index();
        let expected = self.state.receive().heads[index].get();
        let known = ring.popped_again() && u32::from(head) == expected;
        match buffers.target(ring, chain).filter(|_| known) {
            Some(target) => {
                let (head, length) = self.fill(buffers, &target, number, index);
                ring.push_used(head, length)?;
                Ok(true)
            }
            None => {
                ring.push_used(head, 0)?;
                Ok(false)
            }
        }
    }
}
