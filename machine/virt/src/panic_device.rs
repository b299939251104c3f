//! The guest-panic device (QEMU docs/specs/pvpanic.rst): one byte by which a guest kernel says
//! that it has panicked. Linux drives it with `pvpanic-pci`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anemone_pci::{BarKind, BarRange, ConfigSpace, Identity, PciFunction};

use crate::board::{Outcome, Signals};
use crate::map;

const IDENTITY: Identity = Identity {
    vendor: 0x1B36,
    device: 0x0011,
    revision: 1,
    // System peripheral, other.
    class: 0x08_8000,
    subsystem_vendor: 0x1AF4,
    subsystem: 0x1100,
};
/// The guest has panicked and goes on to reset, or hangs.
const PANICKED: u8 = 1;
/// Smallest BAR that PCI allows.
const BAR_SIZE: u64 = 16;

/// The device.
pub struct PanicDevice {
    config: Mutex<ConfigSpace>,
    signals: Arc<dyn Signals>,
}

impl PanicDevice {
    /// A device for `slot` that reports to `signals`.
    pub fn new(slot: u8, signals: Arc<dyn Signals>) -> Self {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, BarKind::Memory32, BAR_SIZE, map::slot_bar_base(slot));
        Self {
            config: config.into(),
            signals,
        }
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for PanicDevice {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        self.config().write(offset, data);
    }

    fn bars(&self) -> Vec<BarRange> {
        let bar = self.config().bar(0);
        bar.map(|(address, size)| BarRange {
            bar: 0,
            address,
            size,
        })
        .into_iter()
        .collect()
    }

    fn bar_read(&self, _: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (0, Some(first)) = (offset, data.first_mut()) {
            *first = PANICKED;
        }
    }

    fn bar_write(&self, _: usize, offset: u64, data: &[u8]) {
        if offset == 0 && data.first().is_some_and(|events| events & PANICKED != 0) {
            self.signals.signal(Outcome::Panic);
        }
    }
}
