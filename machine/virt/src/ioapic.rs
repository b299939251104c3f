//! The I/O APIC (Intel 82093AA datasheet), for the machine's few wired interrupts.
//!
//! All of them are edge triggered, so no end-of-interrupt is needed and a pin is just a message
//! to a local APIC.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anemone_accel_api::{MsiMessage, Vm};
use anemone_log::warn_limited;

use crate::map::GSIS;

/// Register select, at offset 0.
const SELECT: u64 = 0x00;
/// Window onto the selected register, at offset 0x10.
const WINDOW: u64 = 0x10;
const REG_ID: u8 = 0;
const REG_VERSION: u8 = 1;
const REG_ARBITRATION: u8 = 2;
const REG_TABLE: u8 = 0x10;
/// Version 0x20 (with the EOI register range absent), and the number of the last pin.
const VERSION: u32 = 0x20 | (GSIS as u32 - 1) << 16;
/// Redirection entry: masked.
const MASKED: u64 = 1 << 16;
/// Redirection entry bits that software sets: vector, delivery mode, destination mode, polarity,
/// trigger, mask, destination. Delivery status and remote IRR are read only.
const WRITABLE: u64 = 0xFF00_0000_0001_AFFF;

#[derive(Debug)]
struct State {
    select: u8,
    id: u32,
    table: [u64; GSIS as usize],
    /// Pins with an edge that came while they were masked.
    waiting: u32,
}

/// The I/O APIC of a machine.
pub struct IoApic {
    vm: Arc<dyn Vm>,
    state: Mutex<State>,
}

impl IoApic {
    /// An I/O APIC after reset: all pins masked.
    pub fn new(vm: Arc<dyn Vm>) -> Self {
        let state = State {
            select: 0,
            id: 0,
            table: [MASKED; GSIS as usize],
            waiting: 0,
        };
        Self {
            vm,
            state: state.into(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A rising edge on a pin. Pins that do not exist are ignored.
    pub fn pulse(&self, pin: u8) {
        let mut state = self.lock();
        let Some(&entry) = state.table.get(usize::from(pin)) else {
            return;
        };
        if entry & MASKED == 0 {
            drop(state);
            self.send(entry);
        } else {
            state.waiting |= 1 << pin;
        }
    }

    /// Sends the message of a redirection entry (82093AA, 3.2.4; SDM volume 3, 11.11).
    fn send(&self, entry: u64) {
        let destination = entry >> 56;
        let logical = entry >> 11 & 1;
        let message = MsiMessage {
            address: 0xFEE0_0000 | destination << 12 | logical << 2,
            data: (entry & 0x7FF) as u32,
        };
        if let Err(e) = self.vm.signal_msi(message) {
            warn_limited!("interrupt {message:x?} of the I/O APIC was refused: {e}");
        }
    }

    /// A read at `offset` into the registers. Only aligned 32-bit accesses mean anything.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match (offset, data.len()) {
            (SELECT, 1 | 4) => state.select.into(),
            (WINDOW, 4) => match state.select {
                REG_ID | REG_ARBITRATION => state.id,
                REG_VERSION => VERSION,
                register => entry_of(register)
                    .and_then(|(pin, shift)| Some((state.table.get(pin)? >> shift) as u32))
                    .unwrap_or(u32::MAX),
            },
            _ => u32::MAX,
        };
        for (byte, value) in data
            .iter_mut()
            .zip(value.to_le_bytes().into_iter().chain([0xFF; 4]))
        {
            *byte = value;
        }
    }

    /// A write at `offset` into the registers.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        match (offset, data) {
            (SELECT, [select, ..]) => state.select = *select,
            (WINDOW, &[a, b, c, d]) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                if state.select == REG_ID {
                    state.id = value & 0x0F00_0000;
                }
                let Some((pin, shift)) = entry_of(state.select) else {
                    return;
                };
                let Some(entry) = state.table.get_mut(pin) else {
                    return;
                };
                let mask = WRITABLE & u64::from(u32::MAX) << shift;
                *entry = *entry & !mask | u64::from(value) << shift & mask;
                let entry = *entry;
                let was_waiting = state.waiting & 1 << pin != 0;
                if entry & MASKED == 0 && was_waiting {
                    state.waiting &= !(1 << pin);
                    drop(state);
                    self.send(entry);
                }
            }
            _ => {}
        }
    }
}

/// Pin and shift of a redirection table register.
fn entry_of(register: u8) -> Option<(usize, u32)> {
    let index = register.checked_sub(REG_TABLE)?;
    Some((usize::from(index / 2), u32::from(index % 2) * 32))
}
