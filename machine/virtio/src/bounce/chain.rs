//! A descriptor chain of the guest, read once and checked (virtio 1.2, 2.7.5).

use super::Broken;
use super::memory::Memory;

/// The chain goes on at `next`.
pub(super) const NEXT: u16 = 1;
/// The device writes the buffer.
pub(super) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(super) const INDIRECT: u16 = 4;

/// Length of a descriptor in memory.
pub(super) const DESCRIPTOR: u64 = 16;
/// Most buffers of a chain. Drivers put more into an indirect table than the ring has entries,
/// though the specification forbids it; back ends stop at about this number.
pub(super) const BUFFERS_MAX: usize = 1024;

/// A descriptor as it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn from_bytes(b: [u8; 16]) -> Self {
        Self {
            address: u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
            length: u32::from_le_bytes([b[8], b[9], b[10], b[11]]),
            flags: u16::from_le_bytes([b[12], b[13]]),
            next: u16::from_le_bytes([b[14], b[15]]),
        }
    }

    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One buffer of a chain. All of it is guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Buffer {
    pub address: u64,
    pub length: u32,
    /// The device writes it.
    pub write: bool,
}

/// A chain.
#[derive(Debug, Default)]
pub(super) struct Chain {
    /// Its first descriptor.
    pub head: u16,
    /// Part of it is in an indirect table.
    pub indirect: bool,
    /// Its buffers in order.
    pub buffers: Vec<Buffer>,
}

/// Where descriptors are taken from: the ring's own table, or an indirect one.
struct Table {
    address: u64,
    entries: u32,
}

impl Chain {
    /// Reads the chain at `head` of a descriptor table of `size` entries.
    pub fn read(
        &mut self,
        ram: &Memory,
        table: u64,
        size: u16,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<(), Broken> {
        self.head = head;
        self.indirect = false;
        self.buffers.clear();
        let mut table = Table {
            address: table,
            entries: size.into(),
        };
        let mut index = u32::from(head);
        // A chain in the ring has no more descriptors than the ring, or it is a loop.
        let mut left = usize::from(size);
        loop {
            if index >= table.entries {
                return Err(Broken(format!(
                    "the guest's chain {head} goes to descriptor {index} of {}",
                    table.entries
                )));
            }
            if left == 0 {
                return Err(Broken(format!(
                    "the guest's chain {head} is a loop or has more than {BUFFERS_MAX} buffers"
                )));
            }
            left -= 1;
            let mut bytes = [0; 16];
            ram.read(table.address + DESCRIPTOR * u64::from(index), &mut bytes)?;
            let d = Descriptor::from_bytes(bytes);
            if d.flags & INDIRECT != 0 {
                let length = u64::from(d.length);
                let sound = indirect_allowed
                    && !self.indirect
                    && d.flags & NEXT == 0
                    && length != 0
                    && length.is_multiple_of(DESCRIPTOR)
                    && ram.contains(d.address, length);
                if !sound {
                    return Err(Broken(format!(
                        "the guest's chain {head} has an indirect table of {length} bytes at {:#x} \
                         (flags {:#x}) that is not possible there",
                        d.address, d.flags
                    )));
                }
                self.indirect = true;
                table = Table {
                    address: d.address,
                    entries: (length / DESCRIPTOR) as u32,
                };
                index = 0;
                left = BUFFERS_MAX.saturating_sub(self.buffers.len());
                continue;
            }
            if !ram.contains(d.address, d.length.into()) && d.length != 0 {
                return Err(Broken(format!(
                    "the guest's chain {head} has a buffer of {} bytes at {:#x}, where no RAM is",
                    d.length, d.address
                )));
            }
            self.buffers.push(Buffer {
                address: d.address,
                length: d.length,
                write: d.flags & WRITE != 0,
            });
            if d.flags & NEXT == 0 {
                return Ok(());
            }
            index = d.next.into();
        }
    }

    /// Sum of the lengths of its buffers.
    pub fn total(&self) -> u64 {
        self.buffers.iter().map(|b| u64::from(b.length)).sum()
    }
}
