//! The configuration space of one function (PCI 3.0, 6.1 and 6.2).

use crate::{BARS, CONFIG_SIZE};

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
/// First byte after the type 0 header.
const HEADER_END: usize = 0x40;
/// Command register: answer memory accesses.
const MEMORY_SPACE: u8 = 1 << 1;
/// Command register bits that software may set: memory space, bus master, and (high byte)
/// interrupt disable.
const COMMAND_WRITABLE: [u8; 2] = [MEMORY_SPACE | 1 << 2, 1 << 2];
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// Width of a memory base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// One register.
    Memory32,
    /// Two registers.
    Memory64,
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    size: u64,
    kind: BarKind,
}

/// Configuration space: the current bytes, and which bits software may change.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bars: [Option<Bar>; BARS],
    /// Offset of the link byte that the next capability fills in.
    last_link: usize,
    /// First byte not used by a capability.
    free: usize,
}

impl ConfigSpace {
    /// A type 0 header without interrupt pin.
    pub fn new(id: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bars: [None; BARS],
            last_link: CAPABILITIES,
            free: HEADER_END,
        };
        space.put(0x00, &id.vendor.to_le_bytes());
        space.put(0x02, &id.device.to_le_bytes());
        space.put(
            0x08,
            &(id.class << 8 | u32::from(id.revision)).to_le_bytes(),
        );
        space.put(0x2C, &id.subsystem_vendor.to_le_bytes());
        space.put(0x2E, &id.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE);
        space
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// Adds a memory base address register. `size` is a power of two of at least 16 bytes,
    /// `address` a multiple of it.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64, address: u64) {
        debug_assert!(size.is_power_of_two() && size >= 16 && address.is_multiple_of(size));
        let flags: u64 = if kind == BarKind::Memory64 { 0b100 } else { 0 };
        let width = if kind == BarKind::Memory64 { 8 } else { 4 };
        let offset = BAR0 + index * 4;
        self.put(offset, &(address | flags).to_le_bytes()[..width]);
        self.writable[offset..offset + width]
            .copy_from_slice(&(!(size - 1)).to_le_bytes()[..width]);
        self.bars[index] = Some(Bar { size, kind });
    }

    /// Appends a capability: `body` follows the id and link bytes, `writable` has one mask byte
    /// per byte of `body`. Returns the offset of the id byte.
    ///
    /// Capabilities are laid out once, by the device model; the caller keeps within the space.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        debug_assert_eq!(body.len(), writable.len());
        let offset = self.free;
        self.bytes[self.last_link] = offset as u8;
        self.bytes[offset] = id;
        self.put(offset + 2, body);
        self.writable[offset + 2..offset + 2 + body.len()].copy_from_slice(writable);
        self.last_link = offset + 1;
        self.free = (offset + 2 + body.len()).next_multiple_of(4);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        offset
    }

    /// Reads; bytes outside read as zero, as in a function without extended configuration space.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset + i).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits; the rest of `data` is ignored.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (i, value) in data.iter().enumerate() {
            if let (Some(byte), Some(mask)) = (
                self.bytes.get_mut(offset + i),
                self.writable.get(offset + i),
            ) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    /// Two bytes at `offset`, which the device model knows to be inside.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// Four bytes at `offset`, which the device model knows to be inside.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// Where a base address register lies now: first address and size, or `None` while memory
    /// decoding is off.
    pub fn bar(&self, index: usize) -> Option<(u64, u64)> {
        let bar = self.bars.get(index).copied().flatten()?;
        if self.bytes[COMMAND] & MEMORY_SPACE == 0 {
            return None;
        }
        let offset = BAR0 + index * 4;
        let low = u64::from(self.dword(offset)) & !0xF;
        let high = match bar.kind {
            BarKind::Memory64 => u64::from(self.dword(offset + 4)) << 32,
            BarKind::Memory32 => 0,
        };
        Some((high | low, bar.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1AF4,
            device: 0x1042,
            revision: 1,
            class: 0x01_8000,
            subsystem_vendor: 0x1AF4,
            subsystem: 0x1042,
        });
        space.add_bar(0, BarKind::Memory64, 0x8000, 0xC000_8000);
        space.add_bar(2, BarKind::Memory32, 0x10, 0xC100_0000);
        space
    }

    #[test]
    fn sizing_and_moving_a_bar() {
        let mut s = space();
        assert_eq!(s.bar(0), None, "decoding starts off");
        s.write(COMMAND, &[0xFF, 0xFF]);
        assert_eq!(s.word(COMMAND), 0x0406);
        assert_eq!(s.bar(0), Some((0xC000_8000, 0x8000)));
        s.write(BAR0, &[0xFF; 8]);
        assert_eq!(
            (s.dword(BAR0), s.dword(BAR0 + 4)),
            (0xFFFF_8004, 0xFFFF_FFFF)
        );
        s.write(BAR0, &0x12_3456_8000u64.to_le_bytes());
        assert_eq!(s.bar(0), Some((0x12_3456_8000, 0x8000)));
        s.write(BAR0 + 8, &[0xFF; 4]);
        assert_eq!(s.dword(BAR0 + 8), 0xFFFF_FFF0);
        assert_eq!((s.bar(1), s.bar(6)), (None, None));
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut s = space();
        assert_eq!(s.word(STATUS) & 0x10, 0);
        let first = s.add_capability(0x09, &[5, 1], &[0, 0xFF]);
        let second = s.add_capability(0x11, &[0; 10], &[0; 10]);
        assert_eq!((first, second), (0x40, 0x44));
        let mut list = [0; 2];
        s.read(CAPABILITIES, &mut list[..1]);
        assert_eq!(usize::from(list[0]), first);
        s.read(first, &mut list);
        assert_eq!(list, [0x09, second as u8]);
        s.read(second, &mut list);
        assert_eq!(list, [0x11, 0]);
        s.write(first, &[0xAA; 4]);
        assert_eq!(s.dword(first), 0xAA05_4409, "only the masked byte changed");
    }

    proptest! {
        #[test]
        fn read_only_bits_never_change(writes in prop::collection::vec(
            (0usize..300, prop::collection::vec(any::<u8>(), 1..9)), 0..40)) {
            let mut s = space();
            let fixed: Vec<u8> = s.bytes.iter().zip(&s.writable).map(|(b, w)| b & !w).collect();
            for (offset, data) in writes {
                s.write(offset, &data);
                let mut back = [0; 8];
                s.read(offset, &mut back[..data.len()]);
            }
            let now: Vec<u8> = s.bytes.iter().zip(&s.writable).map(|(b, w)| b & !w).collect();
            prop_assert_eq!(fixed, now);
        }
    }
}
