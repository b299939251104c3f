//! Interprocessor interrupts (SDM 11.6 and 11.12.9 to 11.12.11).

use crate::Apic;
use crate::mode::Mode;
use crate::registers::ESR_SEND_ILLEGAL;
use crate::router::{DeliveryMode, Destination, FIRST_VECTOR, Message};

impl Apic {
    /// Sends what the interrupt command register describes.
    ///
    /// Trigger mode and level mean something for INIT only, where they tell the de-assertion
    /// from the assertion; since the Pentium 4 all other messages are edge-triggered.
    pub(crate) fn send_icr(&mut self) {
        let low = self.icr as u32;
        let mode = DeliveryMode::from_bits(low >> 8);
        let vector = low as u8;
        let deassert = low >> 14 & 1 == 0 && low >> 15 & 1 != 0;
        if mode == DeliveryMode::Init && deassert {
            // It resets arbitration ids, which a system bus does not have.
            return;
        }
        if mode.has_vector() && vector < FIRST_VECTOR {
            return self.error(ESR_SEND_ILLEGAL);
        }
        let wide = self.mode() == Mode::X2Apic;
        let address = (self.icr >> if wide { 32 } else { 56 }) as u32;
        let destination = match low >> 18 & 3 {
            0 if low >> 11 & 1 != 0 => Destination::Logical { address, wide },
            0 => Destination::Physical { id: address, wide },
            1 => Destination::Physical {
                id: self.id,
                wide: true,
            },
            2 => Destination::All,
            _ => Destination::AllBut(self.id),
        };
        let message = Message {
            destination,
            mode,
            vector,
            level: false,
        };
        if self.apics.send_from(Some(self.id), &message).1 {
            if mode.has_vector() {
                self.accept(vector, false);
            } else {
                // No wake: this is the owner's thread.
                self.port().inbox.post_event(mode, vector);
            }
        }
    }

    /// The self-IPI register of x2APIC mode: a fixed, edge-triggered interrupt.
    pub(crate) fn send_self_ipi(&mut self, vector: u8) {
        if vector < FIRST_VECTOR {
            self.error(ESR_SEND_ILLEGAL);
        } else if self.software_enabled() {
            self.accept(vector, false);
        }
    }
}
