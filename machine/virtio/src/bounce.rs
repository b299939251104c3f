//! Bounce mode: a back end that never sees guest RAM.
//!
//! With `memory=shared` a back end maps all of guest RAM. With `memory=bounce` it maps one region
//! that holds nothing but shadow rings and the data of requests in flight, and this process copies:
//!
//! ```text
//!  guest RAM                    this process                     region (a sealed memfd)
//!  rings, buffers ──kick──► chain read once, checked ──copy──► shadow rings, data ──kick──► back end
//!                 ◄─call───  length clamped, copied back ◄────                    ◄─call───
//! ```
//!
//! The front end does not know: it is handed a [`Start`] with addresses in the region and eventfds
//! of this module, and a memory table of one entry. Each queue has its rings and a data area of its
//! own, so that a queue full of waiting receive buffers does not starve another.
//!
//! What a chain looks like stays as the guest has made it, buffer by buffer and direct or indirect;
//! only the addresses differ. A chain waits until there is room for it. One that is larger than its
//! queue's whole data area can never be carried out, and the device then needs a reset; what the driver is
//! told of the device keeps it from making one ([`Bounds`]).
//!
//! The back end may be hostile. Nothing in the region is believed: which chains are in flight, where
//! their buffers are and how long they are is kept here; the used ring's entries are read once
//! and checked; lengths are clamped to what was writable. What the back end says it has written is
//! copied back, from the first writable byte on: a byte that it counts without having written it is
//! whatever the region holds there, which only this back end could have put there. virtio-blk's
//! status, the last writable byte, is copied whatever the length. A reset empties the region.
//!
//! All of this outlives the back end: one that takes over for another finds region, rings and
//! eventfds as they were. If it does not track what is in flight, the shadow rings begin anew with that.

mod bounds;
mod chain;
mod memory;
mod queue;
mod space;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use anemone_accel_api::EventFd;
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

use crate::ram::GuestRam;
use crate::transport::QUEUE_SIZE;
use crate::work::Start;
pub(crate) use bounds::Bounds;
use memory::{BASE, Memory, PAGE, Region};
use queue::{Queue, Rings};

/// Least room for data that a queue can do with.
const DATA_LEAST: u64 = 64 << 10;
/// Milliseconds without an event after which memory of the region is given back.
const QUIET_MS: i32 = 1000;

/// Turns in which a whole queue has passed: it has fewer entries than two turns take.
const TURNS_TO_RESUME: usize = 8;

/// virtio device types that have rules of their own (virtio 1.2, section 5).
const BLOCK: u16 = 2;
const BALLOON: u16 = 5;
const SCSI: u16 = 8;
/// Features of virtio-balloon that decide on its queues (5.5.3).
const BALLOON_F_STATS_VQ: u64 = 1 << 1;
const BALLOON_F_FREE_PAGE_HINT: u64 = 1 << 3;
const BALLOON_F_PAGE_POISON: u64 = 1 << 4;
const BALLOON_F_PAGE_REPORTING: u64 = 1 << 5;

/// Why a bounce region cannot be had.
#[derive(Debug, Error)]
pub enum Error {
    /// The region is too small for the device.
    #[error("a bounce region of {size} bytes; this device needs {least} at least, in whole pages")]
    Region {
        /// Its length in bytes.
        size: u64,
        /// What is needed.
        least: u64,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// Guest or back end has broken a ring, or a request does not fit: only a reset of the device helps.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct Broken(String);

/// How what a queue carries is treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contents {
    /// Contents are copied.
    Data,
    /// The same, and the last writable byte is a status that counts whatever the length.
    Status,
    /// Contents are numbers of pages that the guest gives up. They are copied, and this process
    /// frees the pages when the back end returns the chain.
    PageNumbers,
    /// The buffers are themselves memory that the guest gives up: the back end learns where they
    /// are, no contents are copied, and this process frees them.
    Named,
}

fn contents(device_type: u16, queue: u16, features: u64) -> Contents {
    match device_type {
        BLOCK => Contents::Status,
        BALLOON => {
            // A driver numbers only the queues of features that it has accepted.
            let reporting = 2 + u16::from(features & BALLOON_F_STATS_VQ != 0);
            let reports = features & BALLOON_F_PAGE_REPORTING != 0;
            match queue {
                0 => Contents::PageNumbers,
                _ if queue == reporting && reports => Contents::Named,
                _ => Contents::Data,
            }
        }
        _ => Contents::Data,
    }
}

/// The copying side of one device.
#[derive(Debug)]
pub struct Bounce {
    device_type: u16,
    ram: Memory,
    region: Region,
    /// Kick and call of each shadow queue.
    events: Vec<(Arc<EventFd>, Arc<EventFd>)>,
    queues: Vec<Queue>,
    /// The region holds something.
    filled: bool,
    /// There is no memory to be given back once it is quiet.
    trimmed: bool,
}

impl Bounce {
    /// For a device with at most `queues` queues. `region` is a memfd of `size` bytes, sealed
    /// against resizing and read by nobody else yet; `ram` is guest RAM as this process maps it.
    ///
    /// # Errors
    /// The region is too small, or the host has no descriptors or address space left.
    pub fn new(
        device_type: u16,
        queues: u16,
        region: OwnedFd,
        size: u64,
        ram: GuestMemoryMmap,
    ) -> Result<Self, Error> {
        let least = u64::from(queues.max(1)) * (Rings::length(QUEUE_SIZE) + DATA_LEAST);
        if size < least || !size.is_multiple_of(PAGE) {
            return Err(Error::Region { size, least });
        }
        let event = || EventFd::new().map(Arc::new);
        let events = (0..queues)
            .map(|_| Ok((event()?, event()?)))
            .collect::<io::Result<_>>()
            .map_err(|source| Error::Os {
                what: "eventfd",
                source,
            })?;
        Ok(Self {
            device_type,
            ram: Memory::new(ram),
            region: Region::new(region, size)?,
            events,
            queues: Vec::new(),
            filled: false,
            trimmed: true,
        })
    }

    /// What a device can offer with this before its back end.
    pub(crate) fn bounds(&self) -> Bounds {
        // As if all queues were in use, and with the largest rings.
        let share = self.share(self.events.len());
        Bounds {
            device_type: self.device_type,
            room: share - Rings::length(QUEUE_SIZE),
        }
    }

    /// The part of the region that each of so many queues has.
    fn share(&self, queues: usize) -> u64 {
        (self.region.size / queues.max(1) as u64) & !(PAGE - 1)
    }

    /// The memory table for the back end.
    pub fn table(&self) -> &GuestRam {
        &self.region.table
    }

    /// Takes the place of the back end towards the guest; the back end gets the result. Whatever the
    /// region held is gone.
    pub fn start(&mut self, start: &Start) -> Start {
        self.stop();
        let shadows = start.queues.iter().filter_map(|queue| {
            let events = self.events.get(usize::from(queue.index))?;
            Some((queue, events))
        });
        let share = self.share(shadows.clone().count());
        let queues = shadows.enumerate().map(|(i, (queue, events))| {
            let contents = contents(self.device_type, queue.index, start.features);
            let area = (BASE + i as u64 * share, share);
            let (kick, call) = events;
            kick.take();
            call.take();
            let events = (kick.clone(), call.clone());
            Queue::new(queue, start.features, contents, area, events)
        });
        self.queues = queues.collect();
        self.filled = true;
        Start {
            features: start.features,
            queues: self.queues.iter().map(Queue::start).collect(),
        }
    }

    /// Ends the copying at once, and empties the region: guest RAM is not touched any more.
    pub fn stop(&mut self) {
        self.queues.clear();
        self.trimmed = true;
        if std::mem::take(&mut self.filled) {
            self.region.memory.discard(BASE, self.region.size);
        }
    }

    /// Another back end is about to get the queues that the one before has lost. It finds in the available
    /// rings, from the used index on, all that is in flight: nothing is lost, whether it tracks that or not. If
    /// it does not (`tracked`), the rings begin anew.
    ///
    /// # Errors
    /// As for [`turn`](Self::turn).
    pub fn resume(&mut self, tracked: bool) -> Result<(), Broken> {
        for queue in &mut self.queues {
            queue.due = true;
        }
        // What the one before has returned. Nobody returns anything now, so that this ends.
        for _ in 0..TURNS_TO_RESUME {
            if self.timeout() == 0 {
                self.turn(&[])?;
            }
        }
        let outcome = self
            .queues
            .iter_mut()
            .try_for_each(|queue| queue.offer_again(&self.region.memory, tracked));
        outcome.inspect_err(|_| self.queues.clear())
    }

    /// The guest wants the interrupts of these queues elsewhere.
    pub fn set_calls(&mut self, calls: BTreeMap<u16, Arc<EventFd>>) {
        for (index, call) in calls {
            if let Some(queue) = self.queues.iter_mut().find(|q| q.index == index) {
                queue.call = call;
            }
        }
    }

    /// What to poll for reading: two descriptors of each running queue.
    pub fn poll_entries(&self) -> impl Iterator<Item = libc::pollfd> {
        let entry = |event: &EventFd| libc::pollfd {
            fd: event.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let both = move |q: &Queue| [entry(&q.kick), entry(&q.shadow_call)];
        self.queues.iter().flat_map(both)
    }

    /// How many milliseconds to poll at most; negative for any time.
    pub fn timeout(&self) -> i32 {
        if self.queues.iter().any(|q| q.due) {
            0
        } else if self.trimmed {
            -1
        } else {
            QUIET_MS
        }
    }

    /// Moves what can be moved, a bounded amount. `polled` are the entries of
    /// [`poll_entries`](Self::poll_entries) after the poll.
    ///
    /// # Errors
    /// A ring is broken. All copying has ended then, until the next [`start`](Self::start).
    pub fn turn(&mut self, polled: &[libc::pollfd]) -> Result<(), Broken> {
        let mut moved = false;
        for (queue, polled) in self.queues.iter_mut().zip(polled.chunks_exact(2)) {
            if polled[0].revents != 0 {
                queue.kick.take();
                queue.due = true;
            }
            if polled[1].revents != 0 {
                queue.shadow_call.take();
                queue.due = true;
            }
        }
        for queue in &mut self.queues {
            if !queue.due {
                continue;
            }
            moved = true;
            if let Err(Broken(why)) = queue.turn(&self.ram, &self.region.memory) {
                let index = queue.index;
                // The region stays: the back end's rings are not taken away under it.
                self.queues.clear();
                return Err(Broken(format!("queue {index}: {why}")));
            }
        }
        if moved {
            self.trimmed = !self.queues.iter().any(Queue::wants_trim);
        } else if !self.trimmed {
            self.trimmed = true;
            for queue in &mut self.queues {
                queue.trim(&self.region.memory);
            }
        }
        Ok(())
    }
}
