//! A split virtqueue from the driver's side (virtio 1.3, 2.7).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anemone_vhost_user::VringAddr;

use crate::{Memory, new_fd};

/// Descriptor flags.
pub mod flags {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// In both rings' flags without EVENT_IDX: the other side need not be notified.
const NO_NOTIFY: u16 = 1;
/// Room for the descriptors of one indirect table.
const INDIRECT_ENTRIES: usize = 64;

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A descriptor as it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields of struct virtq_desc")]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    /// As it lies in memory.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A chain that the device has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Its first descriptor.
    pub head: u32,
    /// Bytes the device says it has written.
    pub len: u32,
}

/// A virtqueue. [`add`](Queue::add) any number of chains, [`publish`](Queue::publish) them,
/// [`kick`](Queue::kick), [`wait`](Queue::wait) and [`take_used`](Queue::take_used).
#[derive(Debug)]
pub struct Queue {
    memory: Arc<Memory>,
    size: u16,
    event_idx: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    indirect: u64,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
    free: Vec<u16>,
    /// Descriptors of the chain that begins at each head; empty while it is not in use.
    chains: Vec<Vec<u16>>,
    /// Available index with the chains not yet published.
    next_available: u16,
    /// Available index at the last kick.
    kicked: u16,
    next_used: u16,
    /// Chains that were returned and not in flight.
    strays: u64,
}

impl Queue {
    /// Allocates a queue of `size` entries.
    ///
    /// # Errors
    /// The eventfds cannot be had.
    pub fn new(memory: &Arc<Memory>, size: u16, event_idx: bool) -> io::Result<Self> {
        let entries = u64::from(size);
        let queue = Self {
            size,
            event_idx,
            descriptors: memory.alloc(16 * entries, 16),
            available: memory.alloc(6 + 2 * entries, 2),
            used: memory.alloc(6 + 8 * entries, 4),
            indirect: memory.alloc(16 * entries * INDIRECT_ENTRIES as u64, 16),
            kick: eventfd()?,
            call: eventfd()?,
            err: eventfd()?,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
            next_available: 0,
            kicked: 0,
            next_used: 0,
            strays: 0,
            memory: Arc::clone(memory),
        };
        Ok(queue)
    }

    /// Adds a chain of buffers that the device reads, then of buffers it writes; its head, or
    /// `None` if there are not enough descriptors. Nothing is told to the device yet.
    pub fn add(&mut self, readable: &[Buffer], writable: &[Buffer]) -> Option<u16> {
        let count = readable.len() + writable.len();
        if count == 0 || self.free.len() < count {
            return None;
        }
        let mut chain = self.free.split_off(self.free.len() - count);
        chain.reverse();
        for (i, (buffer, write)) in directions(readable, writable).enumerate() {
            let next = chain.get(i + 1).copied();
            let descriptor = Descriptor {
                addr: buffer.addr,
                len: buffer.len,
                flags: write | if next.is_some() { flags::NEXT } else { 0 },
                next: next.unwrap_or(0),
            };
            self.write_descriptor(chain[i], &descriptor);
        }
        Some(self.offer(chain))
    }

    /// Like [`add`](Self::add), with the buffers in an indirect table.
    pub fn add_indirect(&mut self, readable: &[Buffer], writable: &[Buffer]) -> Option<u16> {
        let count = readable.len() + writable.len();
        assert!(count <= INDIRECT_ENTRIES, "no room for {count} descriptors");
        let head = self.free.pop()?;
        let table = self.indirect + 16 * (INDIRECT_ENTRIES * usize::from(head)) as u64;
        for (i, (buffer, write)) in directions(readable, writable).enumerate() {
            let more = i + 1 < count;
            let descriptor = Descriptor {
                addr: buffer.addr,
                len: buffer.len,
                flags: write | if more { flags::NEXT } else { 0 },
                next: if more { i as u16 + 1 } else { 0 },
            };
            self.memory
                .write(table + 16 * i as u64, &descriptor.bytes());
        }
        let pointer = Descriptor {
            addr: table,
            len: 16 * count as u32,
            flags: flags::INDIRECT,
            next: 0,
        };
        self.write_descriptor(head, &pointer);
        Some(self.offer(vec![head]))
    }

    /// Puts a chain into the next entry of the available ring.
    fn offer(&mut self, chain: Vec<u16>) -> u16 {
        let head = chain[0];
        self.chains[usize::from(head)] = chain;
        self.set_available(self.next_available, head);
        self.next_available = self.next_available.wrapping_add(1);
        head
    }

    /// Makes all added chains visible to the device.
    pub fn publish(&mut self) {
        self.set_available_index(self.next_available);
    }

    /// Kicks the device for what was published since the last kick, unless it said that it does
    /// not need that. Returns whether it was kicked.
    pub fn kick(&mut self) -> bool {
        // What is published must be visible before the device's wish is read.
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked, self.next_available);
        self.kicked = new;
        let wanted = if self.event_idx {
            let event = self.load(self.used + 4 + 8 * u64::from(self.size));
            // virtio 1.3, 2.7.10: is the event index among those just passed?
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(self.used) & NO_NOTIFY == 0
        };
        if wanted {
            self.force_kick();
        }
        wanted
    }

    /// Kicks the device in any case.
    pub fn force_kick(&self) {
        signal(&self.kick);
    }

    /// Takes the next returned chain and frees its descriptors.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_index() == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % self.size);
        let mut entry = [0; 8];
        self.memory.read(self.used + 4 + 8 * slot, &mut entry);
        let [a, b, c, d, e, f, g, h] = entry;
        let used = Used {
            head: u32::from_le_bytes([a, b, c, d]),
            len: u32::from_le_bytes([e, f, g, h]),
        };
        self.next_used = self.next_used.wrapping_add(1);
        match self.chains.get_mut(used.head as usize) {
            Some(chain) if !chain.is_empty() => self.free.append(chain),
            _ => self.strays += 1,
        }
        Some(used)
    }

    /// Number of chains that the device has returned although they were not in flight: a second
    /// time, or never offered.
    pub fn strays(&self) -> u64 {
        self.strays
    }

    /// Number of chains in flight.
    pub fn in_flight(&self) -> usize {
        self.chains.iter().filter(|chain| !chain.is_empty()).count()
    }

    /// Waits until the device has returned a chain; false if it has not after `timeout`.
    ///
    /// # Errors
    /// Polling fails.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.used_index() != self.next_used {
                return Ok(true);
            }
            if self.event_idx {
                self.set_used_event(self.next_used);
                fence(Ordering::SeqCst);
                if self.used_index() != self.next_used {
                    return Ok(true);
                }
            }
            if !wait_readable(self.call.as_fd(), deadline)? {
                return Ok(self.used_index() != self.next_used);
            }
            self.take_interrupt();
        }
    }

    /// Whether an interrupt has been raised since the last call.
    pub fn take_interrupt(&self) -> bool {
        take(&self.call)
    }

    /// Whether the device has given the queue up since the last call.
    pub fn take_error(&self) -> bool {
        take(&self.err)
    }

    /// Waits until the device gives the queue up; false if it has not after `timeout`.
    ///
    /// # Errors
    /// Polling fails.
    pub fn wait_error(&self, timeout: Duration) -> io::Result<bool> {
        wait_readable(self.err.as_fd(), Instant::now() + timeout)
    }

    /// Asks for an interrupt when the used index passes `index` (with EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.store(self.available + 4 + 2 * u64::from(self.size), index);
    }

    /// Without EVENT_IDX: whether the device should interrupt at all.
    pub fn set_interrupts(&self, on: bool) {
        self.store(self.available, if on { 0 } else { NO_NOTIFY });
    }

    /// Writes a descriptor, whatever is in it.
    pub fn write_descriptor(&self, index: u16, descriptor: &Descriptor) {
        let addr = self.descriptors + 16 * u64::from(index);
        self.memory.write(addr, &descriptor.bytes());
    }

    /// Writes an entry of the available ring, whatever it points at.
    pub fn set_available(&self, slot: u16, head: u16) {
        let slot = u64::from(slot % self.size);
        self.store(self.available + 4 + 2 * slot, head);
    }

    /// Writes the available index, whatever it is, and goes on from it.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.memory
            .word(self.available + 2)
            .store(index.to_le(), Ordering::Release);
    }

    /// Offers `head` as it is in the next entry of the available ring, publishes and kicks.
    pub fn offer_raw(&mut self, head: u16) {
        self.set_available(self.next_available, head);
        self.set_available_index(self.next_available.wrapping_add(1));
        self.kicked = self.next_available;
        self.force_kick();
    }

    /// The device's used index.
    pub fn used_index(&self) -> u16 {
        let word = self.memory.word(self.used + 2);
        u16::from_le(word.load(Ordering::Acquire))
    }

    /// The available index that the device has been shown.
    pub fn available_index(&self) -> u16 {
        self.next_available
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Where the queue lies, for the front end.
    pub fn addresses(&self) -> VringAddr {
        VringAddr {
            descriptor: Memory::USER_BASE + self.descriptors,
            used: Memory::USER_BASE + self.used,
            available: Memory::USER_BASE + self.available,
            log: None,
        }
    }

    /// The eventfd that kicks the device.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The eventfd that is the queue's interrupt.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// The eventfd by which the device gives the queue up.
    pub fn err_fd(&self) -> BorrowedFd<'_> {
        self.err.as_fd()
    }

    fn load(&self, addr: u64) -> u16 {
        u16::from_le(self.memory.word(addr).load(Ordering::Relaxed))
    }

    fn store(&self, addr: u64, value: u16) {
        let word = self.memory.word(addr);
        word.store(value.to_le(), Ordering::Relaxed);
    }
}

fn directions<'a>(
    readable: &'a [Buffer],
    writable: &'a [Buffer],
) -> impl Iterator<Item = (&'a Buffer, u16)> {
    let readable = readable.iter().map(|buffer| (buffer, 0));
    readable.chain(writable.iter().map(|buffer| (buffer, flags::WRITE)))
}

/// A new non-blocking eventfd.
fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    new_fd(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
}

fn signal(fd: &OwnedFd) {
    // SAFETY: the buffer is 8 bytes long and outlives the call.
    unsafe { libc::write(fd.as_raw_fd(), 1u64.to_ne_bytes().as_ptr().cast(), 8) };
}

fn take(fd: &OwnedFd) -> bool {
    let mut count = [0u8; 8];
    // SAFETY: the buffer is 8 bytes long and outlives the call.
    unsafe { libc::read(fd.as_raw_fd(), count.as_mut_ptr().cast(), 8) == 8 }
}

fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        let mut poll = libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: `poll` is one valid pollfd.
        match unsafe { libc::poll(&raw mut poll, 1, timeout) } {
            0 if left.is_zero() => return Ok(false),
            0 => {}
            1 => return Ok(true),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
