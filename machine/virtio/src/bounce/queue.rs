//! One virtqueue: the guest's rings on one side, the shadow rings on the other.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use anemone_accel_api::EventFd;
use anemone_log::warn_limited;

use super::chain::{Chain, DESCRIPTOR, Descriptor, INDIRECT, NEXT, WRITE};
use super::memory::{Memory, PAGE};
use super::space::Space;
use super::{Broken, Contents};
use crate::work::StartQueue;

/// Ring features (virtio 1.2, section 6).
pub(super) const F_INDIRECT_DESC: u64 = 1 << 28;
pub(super) const F_EVENT_IDX: u64 = 1 << 29;
/// In both rings' flags without EVENT_IDX: do not notify me (2.7.6, 2.7.8).
const NO_NOTIFY: u16 = 1;
/// Chains and bytes moved in one turn, so that other queues and the conversation get theirs.
const CHAINS_PER_TURN: usize = 128;
const BYTES_PER_TURN: u64 = 4 << 20;
/// virtio-blk's status of a request that failed, and of one that did not (5.2.6).
const BLK_IOERR: u8 = 1;
const BLK_OK: u8 = 0;
/// Less than this is not worth giving back while a queue is in use.
const KEEP: u64 = 256 << 10;

/// Where a ring's parts are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rings {
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl Rings {
    /// Bytes of the rings of a queue laid out by [`at`](Self::at).
    pub fn length(size: u16) -> u64 {
        let size = u64::from(size);
        (16 * size + (6 + 2 * size).next_multiple_of(4) + 6 + 8 * size).next_multiple_of(PAGE)
    }

    /// The three parts one after the other.
    pub fn at(start: u64, size: u16) -> Self {
        let entries = u64::from(size);
        let available = start + 16 * entries;
        Self {
            size,
            descriptors: start,
            available,
            used: available + (6 + 2 * entries).next_multiple_of(4),
        }
    }

    fn available_entry(&self, index: u16) -> u64 {
        self.available + 4 + 2 * u64::from(index % self.size)
    }

    fn used_entry(&self, index: u16) -> u64 {
        self.used + 4 + 8 * u64::from(index % self.size)
    }

    /// The driver's wish: an interrupt when the used index passes this.
    fn used_event(&self) -> u64 {
        self.available + 4 + 2 * u64::from(self.size)
    }

    /// The device's wish: a kick when the available index passes this.
    fn available_event(&self) -> u64 {
        self.used + 4 + 8 * u64::from(self.size)
    }
}

/// Whether an index that went from `old` to `new` has passed `event` (virtio 1.2, 2.7.10).
fn passed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A writable buffer of a chain that the back end has.
#[derive(Debug, Clone, Copy)]
struct Target {
    /// In guest RAM.
    guest: u64,
    /// In the region.
    shadow: u64,
    length: u32,
}

/// A chain that the back end has. Only what is in here counts, never what the region says.
#[derive(Debug, Default)]
struct Flight {
    busy: bool,
    /// How many were handed over before it.
    number: u64,
    guest_head: u16,
    /// Descriptors of the shadow ring that it takes.
    descriptors: Vec<u16>,
    /// Its part of the data area.
    place: (u64, u64),
    targets: Vec<Target>,
    /// Bytes that the back end can write.
    writable: u64,
    /// Parts of guest RAM that the guest gives up with it.
    discards: Vec<(u64, u64)>,
}

impl Flight {
    /// Where the last writable byte is, in guest RAM and in the region.
    fn last_byte(&self) -> Option<(u64, u64)> {
        let target = self.targets.iter().rev().find(|t| t.length > 0)?;
        let last = u64::from(target.length) - 1;
        Some((target.guest + last, target.shadow + last))
    }
}

/// How a buffer of this length is aligned in the region: what the guest has put on pages stays on
/// pages, and sectors stay fit for direct I/O.
fn alignment(length: u32) -> u64 {
    match length {
        0..512 => 64,
        512..4096 => 512,
        _ => PAGE,
    }
}

/// The pages that a list of virtio-balloon names (virtio 1.2, 5.5.6): 32-bit numbers of 4 KiB pages.
fn pages(numbers: &[u8], to: &mut Vec<(u64, u64)>) {
    let mut pages: Vec<u64> = numbers
        .chunks_exact(4)
        .map(|n| u64::from(u32::from_le_bytes([n[0], n[1], n[2], n[3]])) * PAGE)
        .collect();
    pages.sort_unstable();
    for page in pages {
        match to.last_mut() {
            Some((start, length)) if *start + *length == page => *length += PAGE,
            Some((start, length)) if (*start..*start + *length).contains(&page) => {}
            _ => to.push((page, PAGE)),
        }
    }
}

/// virtio-blk's status is the last writable byte, wherever the written length ends. A back end that
/// reports success and fewer bytes than there are has left the guest's old data in place: that is
/// an error, not a success. (Some do not count the status itself.)
fn status(ram: &Memory, region: &Memory, flight: &Flight, written: u64) -> Result<(), Broken> {
    let Some((guest, shadow)) = flight.last_byte() else {
        return Ok(());
    };
    let mut status = [0];
    region.read(shadow, &mut status)?;
    if status[0] == BLK_OK && flight.writable > 1 && written + 1 < flight.writable {
        warn_limited!(
            "the back end reports success with {written} of {} bytes written: passed on as an error",
            flight.writable
        );
        status[0] = BLK_IOERR;
    }
    ram.write(guest, &status)
}

/// The pump of one queue.
#[derive(Debug)]
pub(super) struct Queue {
    pub index: u16,
    contents: Contents,
    event_idx: bool,
    indirect: bool,
    guest: Rings,
    pub shadow: Rings,
    pub kick: Arc<EventFd>,
    pub call: Arc<EventFd>,
    pub shadow_kick: Arc<EventFd>,
    pub shadow_call: Arc<EventFd>,
    /// There may be something to do.
    pub due: bool,
    /// Next entry of the guest's available ring to be read, of its used ring to be written, and the
    /// used index when its wish for an interrupt was last looked at.
    guest_available: u16,
    guest_used: u16,
    guest_told: u16,
    /// The same for the shadow rings, where this is the driver.
    shadow_available: u16,
    shadow_used: u16,
    shadow_told: u16,
    /// What the back end has returned up to here becomes visible to the guest at once.
    returned: u16,
    free: Vec<u16>,
    flights: Vec<Flight>,
    in_flight: usize,
    handed_over: u64,
    space: Space,
    /// Read from the guest's ring, waiting for room if `waiting`.
    chain: Chain,
    waiting: bool,
}

impl Queue {
    /// A queue whose shadow rings lie at `area` in the region, its data behind them. The region is
    /// zeroed.
    pub fn new(
        start: &StartQueue,
        features: u64,
        contents: Contents,
        area: (u64, u64),
        events: (Arc<EventFd>, Arc<EventFd>),
    ) -> Self {
        let rings = Rings::length(start.size);
        Self {
            index: start.index,
            contents,
            event_idx: features & F_EVENT_IDX != 0,
            indirect: features & F_INDIRECT_DESC != 0,
            guest: Rings {
                size: start.size,
                descriptors: start.descriptors,
                available: start.available,
                used: start.used,
            },
            shadow: Rings::at(area.0, start.size),
            kick: start.kick.clone(),
            call: start.call.clone(),
            shadow_kick: events.0,
            shadow_call: events.1,
            due: true,
            guest_available: 0,
            guest_used: 0,
            guest_told: 0,
            shadow_available: 0,
            shadow_used: 0,
            shadow_told: 0,
            returned: 0,
            free: (0..start.size).rev().collect(),
            flights: (0..start.size).map(|_| Flight::default()).collect(),
            in_flight: 0,
            handed_over: 0,
            space: Space::new(area.0 + rings, area.1 - rings),
            chain: Chain::default(),
            waiting: false,
        }
    }

    /// The queue as the back end gets it.
    pub fn start(&self) -> StartQueue {
        StartQueue {
            index: self.index,
            size: self.shadow.size,
            descriptors: self.shadow.descriptors,
            available: self.shadow.available,
            used: self.shadow.used,
            kick: self.shadow_kick.clone(),
            call: self.shadow_call.clone(),
        }
    }

    /// Moves what can be moved, within bounds; `due` stays set if there is more.
    pub fn turn(&mut self, ram: &Memory, region: &Memory) -> Result<(), Broken> {
        let (mut chains, mut bytes) = (CHAINS_PER_TURN, BYTES_PER_TURN);
        self.due = true;
        loop {
            let mut moved = 0;
            self.take_back(ram, region, &mut moved, &mut bytes)?;
            self.hand_over(ram, region, &mut moved, &mut bytes)?;
            if moved == 0 && !self.ask_for_notifications(ram, region)? {
                self.due = false;
                return Ok(());
            }
            chains = chains.saturating_sub(moved);
            if chains == 0 || bytes == 0 {
                return Ok(());
            }
        }
    }

    /// With EVENT_IDX both sides notify once and then not again until they are asked to. True if
    /// something came before they could know.
    fn ask_for_notifications(&self, ram: &Memory, region: &Memory) -> Result<bool, Broken> {
        if !self.event_idx {
            return Ok(false);
        }
        ram.store(self.guest.available_event(), self.guest_available)?;
        region.store(self.shadow.used_event(), self.shadow_used)?;
        // The wishes must be visible before the indices are read once more.
        fence(Ordering::SeqCst);
        let came = !self.waiting && ram.load(self.guest.available + 2)? != self.guest_available;
        Ok(came || region.load(self.shadow.used + 2)? != self.shadow_used)
    }

    /// Guest to back end.
    fn hand_over(
        &mut self,
        ram: &Memory,
        region: &Memory,
        moved: &mut usize,
        bytes: &mut u64,
    ) -> Result<(), Broken> {
        let index = ram.load(self.guest.available + 2)?;
        let size = self.guest.size;
        let count = index.wrapping_sub(self.guest_available);
        if count > size {
            return Err(Broken(format!(
                "the guest's available index went from {} to {index}, the ring has {size} entries",
                self.guest_available
            )));
        }
        let before = self.shadow_available;
        while *moved < CHAINS_PER_TURN && *bytes > 0 {
            if !self.waiting {
                if self.guest_available == index {
                    break;
                }
                let head = ram.load(self.guest.available_entry(self.guest_available))?;
                let table = self.guest.descriptors;
                self.chain.read(ram, table, size, head, self.indirect)?;
                self.guest_available = self.guest_available.wrapping_add(1);
                self.waiting = true;
            }
            if !self.submit(ram, region)? {
                break;
            }
            self.waiting = false;
            *moved += 1;
            *bytes = bytes.saturating_sub(self.chain.total());
        }
        if self.shadow_available != before {
            region.store(self.shadow.available + 2, self.shadow_available)?;
            self.kick(region)?;
        }
        Ok(())
    }

    /// Gives the back end the chain that was read; false if there is no room for it yet.
    fn submit(&mut self, ram: &Memory, region: &Memory) -> Result<bool, Broken> {
        let count = self.chain.buffers.len();
        let needed = if self.chain.indirect { 1 } else { count };
        if self.free.len() < needed {
            return Ok(false);
        }
        // Where each part comes to lie, from the beginning of the chain's place.
        let table = if self.chain.indirect {
            DESCRIPTOR * count as u64
        } else {
            0
        };
        let mut length = table;
        let mut align = 64;
        if self.contents != Contents::Named {
            for buffer in &self.chain.buffers {
                let own = alignment(buffer.length);
                align = align.max(own);
                length = length.next_multiple_of(own) + u64::from(buffer.length);
            }
        }
        if length > self.space.size() {
            return Err(Broken(format!(
                "a chain of the guest needs {length} bytes of the bounce region, where its queue \
                 has {}; with `memory=shared` the device takes requests of any size",
                self.space.size()
            )));
        }
        let Some(place) = self.space.take(length, align) else {
            return Ok(false);
        };
        let rest = self.free.len() - needed;
        let head = self.free[self.free.len() - 1];
        let flight = &mut self.flights[usize::from(head)];
        flight.descriptors.clear();
        flight.descriptors.extend(self.free.drain(rest..).rev());
        flight.targets.clear();
        flight.discards.clear();
        flight.writable = 0;
        let mut at = place + table;
        for (i, buffer) in self.chain.buffers.iter().enumerate() {
            let own = alignment(buffer.length);
            let size = u64::from(buffer.length);
            let address = if self.contents == Contents::Named {
                flight.discards.push((buffer.address, size));
                buffer.address
            } else {
                let address = at.next_multiple_of(own);
                at = address + size;
                if buffer.write {
                    flight.targets.push(Target {
                        guest: buffer.address,
                        shadow: address,
                        length: buffer.length,
                    });
                    flight.writable += size;
                } else if self.contents == Contents::PageNumbers {
                    // What the VMM acts on later is this copy, which nobody else can change.
                    let mut numbers = vec![0; buffer.length as usize];
                    ram.read(buffer.address, &mut numbers)?;
                    region.write(address, &numbers)?;
                    pages(&numbers, &mut flight.discards);
                } else {
                    ram.copy(buffer.address, region, address, size)?;
                }
                address
            };
            let last = i + 1 == count;
            let descriptor = Descriptor {
                address,
                length: buffer.length,
                flags: if buffer.write { WRITE } else { 0 } | if last { 0 } else { NEXT },
                next: match (last, self.chain.indirect) {
                    (true, _) => 0,
                    (false, true) => i as u16 + 1,
                    (false, false) => flight.descriptors[i + 1],
                },
            };
            let slot = if self.chain.indirect {
                place + DESCRIPTOR * i as u64
            } else {
                self.shadow.descriptors + DESCRIPTOR * u64::from(flight.descriptors[i])
            };
            region.write(slot, &descriptor.bytes())?;
        }
        if self.chain.indirect {
            let pointer = Descriptor {
                address: place,
                length: table as u32,
                flags: INDIRECT,
                next: 0,
            };
            let slot = self.shadow.descriptors + DESCRIPTOR * u64::from(head);
            region.write(slot, &pointer.bytes())?;
        }
        if self.contents == Contents::Status
            && let Some((_, at)) = flight.last_byte()
        {
            // A back end that forgets the status has failed.
            region.write(at, &[BLK_IOERR])?;
        }
        flight.busy = true;
        flight.number = self.handed_over;
        self.handed_over += 1;
        flight.guest_head = self.chain.head;
        flight.place = (place, length);
        self.in_flight += 1;
        region.store(self.shadow.available_entry(self.shadow_available), head)?;
        self.shadow_available = self.shadow_available.wrapping_add(1);
        Ok(true)
    }

    /// Puts what the back end has not returned where the next one finds it: in the available ring from the
    /// used index on, the oldest first, and then what was not taken. One that tracks what was in flight
    /// takes the first of them from there, and goes on with the others: what was taken is older than
    /// what was not. For one that does not, the rings begin anew, as after a reset: some begin with a used
    /// index of 0 on every connection, whatever the ring says.
    pub fn offer_again(&mut self, region: &Memory, tracked: bool) -> Result<(), Broken> {
        let mut left: Vec<(u64, u16)> = (0..)
            .zip(&self.flights)
            .filter(|(_, f)| f.busy)
            .map(|(head, f)| (f.number, head))
            .collect();
        left.sort_unstable();
        if !tracked {
            self.shadow_used = 0;
            // At most as many as the ring has entries.
            self.shadow_available = left.len() as u16;
            self.shadow_told = self.shadow_available;
            region.store(self.shadow.available + 2, self.shadow_available)?;
        }
        for (index, (_, head)) in (self.shadow_used..=u16::MAX).chain(0..).zip(left) {
            region.store(self.shadow.available_entry(index), head)?;
        }
        self.returned = self.shadow_used;
        self.due = true;
        // Whether the one before wanted kicks is of no concern any more.
        region.store(self.shadow.used, 0)?;
        region.store(self.shadow.used + 2, self.shadow_used)
    }

    /// Kicks the back end for what it was given, unless it does not need that.
    fn kick(&mut self, region: &Memory) -> Result<(), Broken> {
        // The index must be visible before the wish is read.
        fence(Ordering::SeqCst);
        let (old, new) = (self.shadow_told, self.shadow_available);
        self.shadow_told = new;
        let wanted = if self.event_idx {
            passed(region.load(self.shadow.available_event())?, old, new)
        } else {
            region.load(self.shadow.used)? & NO_NOTIFY == 0
        };
        if wanted {
            self.shadow_kick.signal();
        }
        Ok(())
    }

    /// Back end to guest.
    fn take_back(
        &mut self,
        ram: &Memory,
        region: &Memory,
        moved: &mut usize,
        bytes: &mut u64,
    ) -> Result<(), Broken> {
        if self.shadow_used == self.returned {
            let index = region.load(self.shadow.used + 2)?;
            let count = usize::from(index.wrapping_sub(self.shadow_used));
            if count > self.in_flight {
                return Err(Broken(format!(
                    "the back end's used index went from {} to {index} with {} chains in flight",
                    self.shadow_used, self.in_flight
                )));
            }
            self.returned = index;
        }
        while *moved < CHAINS_PER_TURN && *bytes > 0 && self.shadow_used != self.returned {
            let mut entry = [0; 8];
            region.read(self.shadow.used_entry(self.shadow_used), &mut entry)?;
            let [a, b, c, d, e, f, g, h] = entry;
            let head = u32::from_le_bytes([a, b, c, d]);
            let length = u32::from_le_bytes([e, f, g, h]);
            self.shadow_used = self.shadow_used.wrapping_add(1);
            *bytes = bytes.saturating_sub(self.finish(ram, region, head, length)?);
            *moved += 1;
        }
        // The parts of one network packet may lie in several chains: the driver is shown all of them
        // or none (virtio 1.2, 5.1.6.4), however long it takes to copy them.
        if self.shadow_used == self.returned && self.guest_used != self.guest_told {
            ram.store(self.guest.used + 2, self.guest_used)?;
            self.interrupt(ram)?;
        }
        Ok(())
    }

    /// Returns one chain to the guest; the number of bytes that were copied.
    fn finish(
        &mut self,
        ram: &Memory,
        region: &Memory,
        head: u32,
        length: u32,
    ) -> Result<u64, Broken> {
        let flight = usize::try_from(head)
            .ok()
            .and_then(|head| self.flights.get_mut(head))
            .filter(|flight| flight.busy)
            .ok_or_else(|| {
                Broken(format!(
                    "the back end returned chain {head}, which it does not have"
                ))
            })?;
        flight.busy = false;
        self.in_flight -= 1;
        let written = u64::from(length).min(flight.writable);
        let mut left = written;
        for target in &flight.targets {
            let size = left.min(target.length.into());
            region.copy(target.shadow, ram, target.guest, size)?;
            left -= size;
        }
        if self.contents == Contents::Status {
            status(ram, region, flight, written)?;
        }
        for &(address, length) in &flight.discards {
            ram.discard(address, length);
        }
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(flight.guest_head).to_le_bytes());
        entry[4..].copy_from_slice(&(written as u32).to_le_bytes());
        self.free.extend(flight.descriptors.drain(..).rev());
        let (at, size) = flight.place;
        self.space.give(at, size);
        ram.write(self.guest.used_entry(self.guest_used), &entry)?;
        self.guest_used = self.guest_used.wrapping_add(1);
        Ok(written)
    }

    /// Interrupts the guest for what it got back, unless it does not want that.
    fn interrupt(&mut self, ram: &Memory) -> Result<(), Broken> {
        // As for a kick.
        fence(Ordering::SeqCst);
        let (old, new) = (self.guest_told, self.guest_used);
        self.guest_told = new;
        let wanted = if self.event_idx {
            passed(ram.load(self.guest.used_event())?, old, new)
        } else {
            ram.load(self.guest.available)? & NO_NOTIFY == 0
        };
        if wanted {
            self.call.signal();
        }
        Ok(())
    }

    /// Whether [`trim`](Self::trim) would give something back.
    pub fn wants_trim(&self) -> bool {
        self.space.touched() > KEEP
    }

    /// Gives back the memory of the data area that nothing is in. Until then the next chains use
    /// the same pages.
    pub fn trim(&mut self, region: &Memory) {
        for (at, length) in self.space.trim() {
            region.discard(at, length);
        }
    }
}
