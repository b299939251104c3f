//! The event word of the ACPI generic event device (ACPI 6.4, 5.6.9).
//!
//! Setting a bit raises the device's interrupt; the guest's AML reads the word, which clears it,
//! and notifies the devices that the bits stand for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::ioapic::IoApic;
use crate::map::GED_GSI;

/// What the event device can report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum PowerEvent {
    /// The power button was pressed.
    Button = 1 << 3,
}

/// The event word.
pub(crate) struct Ged {
    events: AtomicU32,
    ioapic: Arc<IoApic>,
}

impl Ged {
    pub(crate) fn new(ioapic: Arc<IoApic>) -> Self {
        Self {
            events: AtomicU32::new(0),
            ioapic,
        }
    }

    pub(crate) fn raise(&self, event: PowerEvent) {
        self.events.fetch_or(event as u32, Ordering::AcqRel);
        self.ioapic.pulse(GED_GSI);
    }

    /// Reads and clears the word.
    pub(crate) fn take(&self) -> u32 {
        self.events.swap(0, Ordering::AcqRel)
    }
}
