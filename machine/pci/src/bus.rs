//! Bus 0: the host bridge, its slots, and the routing of memory accesses to functions.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use crate::{BARS, ConfigSpace, Identity, SLOTS};

/// The bridge that UEFI firmware and Linux find at 00:00.0. Stock firmware decides by this id
/// where it looks for everything else; the 440FX id asks for the least.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x8086,
    device: 0x1237,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};
/// CONFIG_ADDRESS: the data port is connected to configuration space.
const ENABLE: u32 = 1 << 31;

/// Where a base address register of a function answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    /// Number of the register.
    pub bar: usize,
    /// First guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub size: u64,
}

/// One PCI function. Methods are called by any vCPU thread, several at a time.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space; `data` is 1, 2 or 4 bytes and does not cross a dword.
    fn config_read(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration space, as [`config_read`](Self::config_read).
    fn config_write(&self, offset: usize, data: &[u8]);

    /// The base address registers that answer now.
    fn bars(&self) -> Vec<BarRange>;

    /// Reads `data.len()` bytes at `offset` into BAR `bar`; the access lies inside the BAR.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Writes, as [`bar_read`](Self::bar_read).
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);
}

/// Bus 0 of the machine, with the host bridge in slot 0.
pub struct PciBus {
    bridge: ConfigSpace,
    slots: [OnceLock<Arc<dyn PciFunction>>; SLOTS],
    /// All ranges that answer, with their slot.
    ranges: RwLock<Vec<(usize, BarRange)>>,
    /// CONFIG_ADDRESS, the latch at port 0xCF8.
    address: AtomicU32,
}

impl PciBus {
    /// A bus with only the bridge.
    pub fn new() -> Self {
        Self {
            bridge: ConfigSpace::new(HOST_BRIDGE),
            slots: [const { OnceLock::new() }; SLOTS],
            ranges: RwLock::default(),
            address: AtomicU32::new(0),
        }
    }

    /// Puts a function into a slot from 1 to 31. `false` if the slot is taken or does not exist.
    pub fn insert(&self, slot: usize, function: Arc<dyn PciFunction>) -> bool {
        slot != 0
            && self
                .slots
                .get(slot)
                .is_some_and(|s| s.set(function).is_ok())
    }

    fn config_read(&self, slot: usize, function: usize, offset: usize, data: &mut [u8]) {
        match (slot, self.slots.get(slot).and_then(OnceLock::get)) {
            (0, _) if function == 0 => self.bridge.read(offset, data),
            (_, Some(f)) if function == 0 => f.config_read(offset, data),
            _ => data.fill(0xFF),
        }
    }

    fn config_write(&self, slot: usize, function: usize, offset: usize, data: &[u8]) {
        let Some(f) = self.slots.get(slot).and_then(OnceLock::get) else {
            return;
        };
        if function != 0 {
            return;
        }
        f.config_write(offset, data);
        // Only the command register and the base address registers move ranges.
        if offset < 0x10 + BARS * 4 && offset + data.len() > 0x04 {
            let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
            ranges.retain(|(s, _)| *s != slot);
            ranges.extend(f.bars().into_iter().map(|range| (slot, range)));
        }
    }

    /// A read of ECAM (PCI Express 3.0, 7.2.2), `offset` from its start. Accesses that cross a
    /// dword are split.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        let (bus, slot, function, register) = ecam_address(offset);
        let mut at = register;
        for part in split_at_dwords(register, data.len()) {
            let piece = &mut data[part];
            if bus == 0 {
                self.config_read(slot, function, at, piece)
            } else {
                piece.fill(0xFF)
            }
            at += piece.len();
        }
    }

    /// A write to ECAM, as [`ecam_read`](Self::ecam_read).
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        let (bus, slot, function, register) = ecam_address(offset);
        if bus != 0 {
            return;
        }
        let mut at = register;
        for part in split_at_dwords(register, data.len()) {
            let piece = &data[part];
            self.config_write(slot, function, at, piece);
            at += piece.len();
        }
    }

    /// A read of the eight ports from 0xCF8 (PCI 3.0, 3.2.2.3.2), `offset` from the first.
    pub fn port_read(&self, offset: u16, data: &mut [u8]) {
        let latch = self.address.load(Ordering::Relaxed);
        match offset {
            0 if data.len() == 4 => data.copy_from_slice(&latch.to_le_bytes()),
            4..8 if latch & ENABLE != 0 && usize::from(offset) + data.len() <= 8 => {
                let (bus, slot, function, register) = latch_address(latch, offset);
                if bus == 0 {
                    self.config_read(slot, function, register, data);
                } else {
                    data.fill(0xFF);
                }
            }
            _ => data.fill(0xFF),
        }
    }

    /// A write to the eight ports from 0xCF8.
    pub fn port_write(&self, offset: u16, data: &[u8]) {
        let latch = self.address.load(Ordering::Relaxed);
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(value)) => self
                .address
                .store(u32::from_le_bytes(value), Ordering::Relaxed),
            (4..8, _) if latch & ENABLE != 0 && usize::from(offset) + data.len() <= 8 => {
                let (bus, slot, function, register) = latch_address(latch, offset);
                if bus == 0 {
                    self.config_write(slot, function, register, data);
                }
            }
            _ => {}
        }
    }

    /// The function and place inside one of its BARs that an access of `length` bytes hits.
    fn find(&self, address: u64, length: usize) -> Option<(&Arc<dyn PciFunction>, BarRange)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (slot, range) = ranges.iter().copied().find(|(_, r)| {
            address
                .checked_sub(r.address)
                .is_some_and(|offset| offset < r.size && r.size - offset >= length as u64)
        })?;
        Some((self.slots[slot].get()?, range))
    }

    /// A read of guest-physical memory space. `false` if no function answers.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((function, range)) = self.find(address, data.len()) else {
            return false;
        };
        function.bar_read(range.bar, address - range.address, data);
        true
    }

    /// A write to guest-physical memory space. `false` if no function answers.
    pub fn memory_write(&self, address: u64, data: &[u8]) -> bool {
        let Some((function, range)) = self.find(address, data.len()) else {
            return false;
        };
        function.bar_write(range.bar, address - range.address, data);
        true
    }
}

impl Default for PciBus {
    fn default() -> Self {
        Self::new()
    }
}

/// Bus, slot, function and register of an ECAM offset.
fn ecam_address(offset: u64) -> (u64, usize, usize, usize) {
    let field = |shift: u32, bits: u64| (offset >> shift & bits) as usize;
    (offset >> 20, field(15, 31), field(12, 7), field(0, 0xFFF))
}

/// Bus, slot, function and register of the latch and a data port.
fn latch_address(latch: u32, port: u16) -> (u32, usize, usize, usize) {
    let field = |shift: u32, bits: u32| (latch >> shift & bits) as usize;
    (
        latch >> 16 & 0xFF,
        field(11, 31),
        field(8, 7),
        field(0, 0xFC) + usize::from(port & 3),
    )
}

/// The parts of `0..length` that lie in one dword each, for an access that starts at `offset`.
fn split_at_dwords(offset: usize, length: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let start = done;
        done = length.min(start + 4 - (offset + start) % 4);
        (start < length).then_some(start..done)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// A function with one BAR that logs the accesses to it.
    struct Probe {
        config: Mutex<ConfigSpace>,
        log: Mutex<Vec<(u64, usize)>>,
    }

    impl PciFunction for Probe {
        fn config_read(&self, offset: usize, data: &mut [u8]) {
            self.config.lock().unwrap().read(offset, data);
        }
        fn config_write(&self, offset: usize, data: &[u8]) {
            self.config.lock().unwrap().write(offset, data);
        }
        fn bars(&self) -> Vec<BarRange> {
            let bar = self.config.lock().unwrap().bar(0);
            bar.map(|(address, size)| BarRange {
                bar: 0,
                address,
                size,
            })
            .into_iter()
            .collect()
        }
        fn bar_read(&self, _: usize, offset: u64, data: &mut [u8]) {
            self.log.lock().unwrap().push((offset, data.len()));
            data.fill(0x11);
        }
        fn bar_write(&self, _: usize, offset: u64, data: &[u8]) {
            self.log.lock().unwrap().push((offset, data.len()));
        }
    }

    fn bus() -> (PciBus, Arc<Probe>) {
        let bus = PciBus::new();
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1AF4,
            device: 0x1044,
            ..HOST_BRIDGE
        });
        config.add_bar(0, crate::BarKind::Memory64, 0x1000, 0xC000_0000);
        let probe = Arc::new(Probe {
            config: config.into(),
            log: Mutex::default(),
        });
        assert!(bus.insert(5, probe.clone()));
        assert!(!bus.insert(5, probe.clone()) && !bus.insert(0, probe.clone()));
        assert!(!bus.insert(SLOTS, probe.clone()));
        (bus, probe)
    }

    fn ecam(slot: u64, register: u64) -> u64 {
        slot << 15 | register
    }

    #[test]
    fn both_mechanisms_reach_the_same_registers() {
        let (bus, _) = bus();
        let mut data = [0; 4];
        bus.ecam_read(ecam(0, 0), &mut data);
        assert_eq!(data, [0x86, 0x80, 0x37, 0x12]);
        bus.port_write(0, &(ENABLE | 5 << 11).to_le_bytes());
        bus.port_read(4, &mut data);
        assert_eq!(data, [0xF4, 0x1A, 0x44, 0x10]);
        bus.port_read(6, &mut data[..2]);
        assert_eq!(data[..2], [0x44, 0x10]);
        bus.ecam_read(ecam(6, 0), &mut data);
        assert_eq!(data, [0xFF; 4], "empty slot");
        bus.ecam_read(ecam(5, 0) | 1 << 12, &mut data);
        assert_eq!(data, [0xFF; 4], "second function");
        bus.ecam_read(ecam(5, 0) | 1 << 20, &mut data);
        assert_eq!(data, [0xFF; 4], "other bus");
        bus.port_write(0, &(5u32 << 11).to_le_bytes());
        bus.port_read(4, &mut data);
        assert_eq!(data, [0xFF; 4], "latch disabled");
        let mut eight = [0; 8];
        bus.ecam_read(ecam(5, 0), &mut eight);
        assert_eq!(eight, [0xF4, 0x1A, 0x44, 0x10, 0, 0, 0, 0]);
        bus.ecam_read(ecam(5, 0x100), &mut data);
        assert_eq!(data, [0; 4], "no extended capabilities");
    }

    #[test]
    fn memory_follows_the_bar() {
        let (bus, probe) = bus();
        let mut data = [0; 4];
        assert!(!bus.memory_read(0xC000_0010, &mut data), "decoding is off");
        bus.ecam_write(ecam(5, 4), &[2, 0]);
        assert!(bus.memory_read(0xC000_0010, &mut data));
        assert!(!bus.memory_read(0xC000_0FFE, &mut data), "beyond the end");
        assert!(!bus.memory_write(0xBFFF_FFFF, &data));
        bus.ecam_write(ecam(5, 0x10), &0x9_0000_0000u64.to_le_bytes());
        assert!(!bus.memory_write(0xC000_0010, &data));
        assert!(bus.memory_write(0x9_0000_0020, &data));
        assert_eq!(*probe.log.lock().unwrap(), [(0x10, 4), (0x20, 4)]);
        bus.ecam_write(ecam(5, 4), &[0]);
        assert!(!bus.memory_write(0x9_0000_0020, &data));
    }

    #[test]
    fn accesses_split_at_dwords() {
        let parts = |offset, length| split_at_dwords(offset, length).collect::<Vec<_>>();
        assert_eq!(parts(0, 8), [0..4, 4..8]);
        assert_eq!(parts(3, 4), [0..1, 1..4]);
        assert_eq!(parts(7, 5), [0..1, 1..5]);
    }
}
