//! MSI-X (PCI 3.0, 6.8.2): the table, the pending bits, and their connection to the accelerator.
//!
//! Every vector has an event counter that a device back end writes to. While a vector may
//! interrupt, the accelerator itself turns the counter into a message. While it is masked the
//! counter keeps the event: it is the pending bit, and connecting it again delivers.

use std::sync::Arc;

use anemone_accel_api::{EventFd, MsiMessage, Route, Vm};
use anemone_log::warn_limited;

use crate::ConfigSpace;

/// Capability id.
const ID: u8 = 0x11;
/// Message control: MSI-X enable.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: this vector masked.
const VECTOR_MASK: u32 = 1;
/// Bytes per table entry.
const ENTRY: usize = 16;

#[derive(Debug)]
struct Vector {
    message: MsiMessage,
    control: u32,
    route: Route,
    event: Arc<EventFd>,
    connected: bool,
}

/// The MSI-X state of one function.
pub struct Msix {
    vm: Arc<dyn Vm>,
    vectors: Vec<Vector>,
    capability: usize,
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// Adds the capability to `config`: `count` vectors (1 to 2048), table and pending bits in
    /// BAR `bar` at the given offsets (multiples of 8). Vector `i` uses interrupt route
    /// `first_route + i`.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(
        vm: Arc<dyn Vm>,
        config: &mut ConfigSpace,
        count: u16,
        bar: u8,
        table: u32,
        pending: u32,
        first_route: Route,
    ) -> std::io::Result<Self> {
        let mut body = Vec::with_capacity(10);
        body.extend((count - 1).to_le_bytes());
        body.extend((table | u32::from(bar)).to_le_bytes());
        body.extend((pending | u32::from(bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&(ENABLE | FUNCTION_MASK).to_le_bytes());
        let capability = config.add_capability(ID, &body, &writable);
        let vectors = (0..u32::from(count))
            .map(|i| {
                Ok(Vector {
                    message: MsiMessage::default(),
                    control: VECTOR_MASK,
                    route: first_route + i,
                    event: Arc::new(EventFd::new()?),
                    connected: false,
                })
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self {
            vm,
            vectors,
            capability,
            enabled: false,
            masked: false,
        })
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// The event counter that raises vector `index`.
    pub fn event(&self, index: u16) -> Option<&Arc<EventFd>> {
        self.vectors.get(usize::from(index)).map(|v| &v.event)
    }

    /// Takes over the message control register after a write to configuration space.
    pub fn config_written(&mut self, config: &ConfigSpace) {
        let control = config.word(self.capability + 2);
        let (enabled, masked) = (control & ENABLE != 0, control & FUNCTION_MASK != 0);
        if (enabled, masked) != (self.enabled, self.masked) {
            (self.enabled, self.masked) = (enabled, masked);
            (0..self.vectors.len()).for_each(|i| self.update(i));
        }
    }

    /// Connects or disconnects one vector as its masks say.
    fn update(&mut self, index: usize) {
        let v = &mut self.vectors[index];
        let wanted = self.enabled && !self.masked && v.control & VECTOR_MASK == 0;
        let result = if wanted {
            let routed = self.vm.set_msi_route(v.route, Some(v.message));
            if v.connected {
                routed
            } else {
                routed.and_then(|()| {
                    v.connected = true;
                    self.vm
                        .add_irqfd(std::os::fd::AsFd::as_fd(&*v.event), v.route)
                })
            }
        } else if v.connected {
            v.connected = false;
            self.vm
                .remove_irqfd(std::os::fd::AsFd::as_fd(&*v.event), v.route)
        } else {
            Ok(())
        };
        if let Err(e) = result {
            warn_limited!("MSI-X vector {index} cannot be connected: {e}");
        }
    }

    /// Reads the table at byte `offset`.
    pub fn table_read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset + i;
            *byte = self
                .vectors
                .get(at / ENTRY)
                .map_or(0, |v| entry_bytes(v)[at % ENTRY]);
        }
    }

    /// Writes the table at byte `offset`. Accesses other than aligned 4 and 8 byte ones are
    /// undefined by the specification; they are carried out byte by byte.
    pub fn table_write(&mut self, offset: usize, data: &[u8]) {
        let first = offset / ENTRY;
        let last = (offset + data.len().max(1) - 1) / ENTRY;
        for index in first..=last {
            let Some(v) = self.vectors.get_mut(index) else {
                return;
            };
            let mut bytes = entry_bytes(v);
            for (i, value) in data.iter().enumerate() {
                let at = offset + i;
                if at / ENTRY == index {
                    bytes[at % ENTRY] = *value;
                }
            }
            let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
            // Address bits 1:0 are reserved and read as zero.
            v.message = MsiMessage {
                address: word(0) & !3,
                data: word(8) as u32,
            };
            v.control = (word(8) >> 32) as u32 & VECTOR_MASK;
            self.update(index);
        }
    }

    /// Reads the pending bits at byte `offset`.
    pub fn pending_read(&self, offset: usize, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (0..8).fold(0, |bits, bit| {
                let pending = self
                    .vectors
                    .get((offset + i) * 8 + bit)
                    .is_some_and(|v| !v.connected && v.event.is_set());
                bits | u8::from(pending) << bit
            });
        }
    }

    /// Forgets events that were raised and not delivered, when the device is reset.
    pub fn clear_pending(&self) {
        for v in self.vectors.iter().filter(|v| !v.connected) {
            v.event.take();
        }
    }
}

fn entry_bytes(v: &Vector) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    bytes[..8].copy_from_slice(&v.message.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&v.message.data.to_le_bytes());
    bytes[12..].copy_from_slice(&v.control.to_le_bytes());
    bytes
}
