//! The board: which register answers at which address.

use std::sync::Arc;

use anemone_accel_api::{Bus, Vm};
use anemone_pci::PciBus;

use crate::ged::{Ged, PowerEvent};
use crate::ioapic::IoApic;
use crate::map;

/// ACPI sleep control: start the transition (SLP_EN), and the sleep type that means off.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_OFF: u8 = 5;

/// What a guest can do to its machine as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It switched itself off through ACPI.
    Shutdown,
    /// It wrote the reset register.
    Reset,
    /// Its kernel panicked and said so.
    Panic,
}

/// Takes what happens on the board to the thread that decides. Called on vCPU threads; must not
/// block.
pub trait Signals: Send + Sync {
    /// Something happened.
    fn signal(&self, outcome: Outcome);
}

/// The board of one machine; all of its vCPUs access it at the same time.
pub struct Board {
    /// The PCI bus, for adding functions.
    pub pci: PciBus,
    ioapic: Arc<IoApic>,
    ged: Ged,
    signals: Arc<dyn Signals>,
    #[cfg(feature = "serial")]
    serial: Option<Arc<crate::Serial>>,
}

impl Board {
    /// A board without PCI functions.
    pub fn new(vm: Arc<dyn Vm>, signals: Arc<dyn Signals>) -> Self {
        let ioapic = Arc::new(IoApic::new(vm));
        Self {
            pci: PciBus::new(),
            ged: Ged::new(ioapic.clone()),
            ioapic,
            signals,
            #[cfg(feature = "serial")]
            serial: None,
        }
    }

    /// Adds the UART. `wake` is called when it has output or room for input.
    #[cfg(feature = "serial")]
    pub fn add_serial(&mut self, wake: Box<dyn Fn() + Send + Sync>) -> Arc<crate::Serial> {
        let serial = Arc::new(crate::Serial::new(self.ioapic.clone(), wake));
        self.serial = Some(serial.clone());
        serial
    }

    /// Reports an event to the guest's ACPI.
    pub fn raise(&self, event: PowerEvent) {
        self.ged.raise(event);
    }

    /// The ports this board decodes: first, count, what.
    pub fn ports(&self) -> Vec<(u16, u16, &'static str)> {
        let mut ports = Vec::new();
        #[cfg(feature = "serial")]
        if self.serial.is_some() {
            ports.push((map::SERIAL, 8, "16550 UART"));
        }
        ports.extend([
            (map::SLEEP_CONTROL, 1, "ACPI sleep control"),
            (map::SLEEP_STATUS, 1, "ACPI sleep status"),
            (map::RESET, 1, "ACPI reset"),
            (map::GED_EVENTS, 4, "generic event device"),
            (map::PCI_CONFIG, 8, "PCI configuration"),
        ]);
        ports
    }

    #[cfg(feature = "serial")]
    fn serial(&self, port: u16) -> Option<(&crate::Serial, u16)> {
        let offset = port.checked_sub(map::SERIAL).filter(|o| *o < 8)?;
        Some((self.serial.as_deref()?, offset))
    }
}

/// Offset of `address` in the range, if the whole access lies in it.
fn within(address: u64, length: usize, base: u64, size: u64) -> Option<u64> {
    let offset = address.checked_sub(base)?;
    (offset < size && size - offset >= length as u64).then_some(offset)
}

impl Bus for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        #[cfg(feature = "serial")]
        if let Some((serial, offset)) = self.serial(port) {
            return serial.read(offset, data);
        }
        match (port, &mut *data) {
            (map::SLEEP_CONTROL | map::SLEEP_STATUS, [byte]) => *byte = 0,
            (map::GED_EVENTS, data) if data.len() == 4 => {
                data.copy_from_slice(&self.ged.take().to_le_bytes());
            }
            (map::PCI_CONFIG..=0xCFF, data) => self.pci.port_read(port - map::PCI_CONFIG, data),
            (_, data) => data.fill(0xFF),
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        #[cfg(feature = "serial")]
        if let Some((serial, offset)) = self.serial(port) {
            return serial.write(offset, data);
        }
        match (port, data) {
            (map::SLEEP_CONTROL, &[value])
                if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_OFF =>
            {
                self.signals.signal(Outcome::Shutdown);
            }
            (map::RESET, &[map::RESET_VALUE]) => self.signals.signal(Outcome::Reset),
            (map::PCI_CONFIG..=0xCFF, data) => self.pci.port_write(port - map::PCI_CONFIG, data),
            // The sleep status register exists to be cleared by writing; it is always clear.
            _ => {}
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let length = data.len();
        if let Some(offset) = within(address, length, map::ECAM_BASE, map::ECAM_SIZE) {
            self.pci.ecam_read(offset, data);
        } else if let Some(offset) = within(address, length, map::IOAPIC_BASE, map::IOAPIC_SIZE) {
            self.ioapic.read(offset, data);
        } else if !self.pci.memory_read(address, data) {
            data.fill(0xFF);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        let length = data.len();
        if let Some(offset) = within(address, length, map::ECAM_BASE, map::ECAM_SIZE) {
            self.pci.ecam_write(offset, data);
        } else if let Some(offset) = within(address, length, map::IOAPIC_BASE, map::IOAPIC_SIZE) {
            self.ioapic.write(offset, data);
        } else {
            self.pci.memory_write(address, data);
        }
    }
}

#[cfg(test)]
mod tests;
