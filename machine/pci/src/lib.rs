//! PCI: the host bridge with its two ways to reach configuration space, and the parts every
//! function is made of (configuration header, base address registers, MSI-X).
//!
//! Sources: PCI Local Bus Specification 3.0 (chapter 6), PCI Express Base Specification 3.0
//! (section 7.2.2 for ECAM), PCI Firmware Specification 3.0.
#![forbid(unsafe_code)]

mod bus;
mod config;
mod msix;

pub use bus::{BarRange, PciBus, PciFunction};
pub use config::{BarKind, ConfigSpace, Identity};
pub use msix::Msix;

/// Slots on a bus.
pub const SLOTS: usize = 32;
/// Bytes of configuration space of a function without PCI Express extended capabilities.
pub const CONFIG_SIZE: usize = 256;
/// Base address registers of a function.
pub const BARS: usize = 6;
