//! The machine `virt-1`: its address map, its few registers, and the bus that connects them.
//!
//! Everything in [`map`] is the machine's contract with guests. Once released it never changes;
//! a different address is a different machine version.
#![cfg_attr(not(test), forbid(unsafe_code))]

mod board;
mod ged;
mod ioapic;
pub mod map;
#[cfg(feature = "panic-device")]
mod panic_device;
#[cfg(feature = "serial")]
mod serial;

pub use anemone_pci::PciFunction;
pub use board::{Board, Outcome, Signals};
pub use ged::PowerEvent;
pub use ioapic::IoApic;
#[cfg(feature = "panic-device")]
pub use panic_device::PanicDevice;
#[cfg(feature = "serial")]
pub use serial::Serial;
