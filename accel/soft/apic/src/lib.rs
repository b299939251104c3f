//! The local APICs of a software machine (Intel SDM volume 3, chapter 11), and the KVM
//! paravirtual structures that go with them ([`pv`]).
//!
//! One [`Apic`] belongs to the thread of its vCPU; all of them hang on one [`Apics`], through
//! which any thread sends interrupts. A sender only sets bits in an inbox of the receiver and
//! wakes it; the receiver's thread moves them into its registers. Nothing here takes a lock.
//!
//! ```text
//!   device threads ---- Apics::signal_msi --+
//!   other vCPUs ------- ICR, self IPI ------+--> inbox of CPU n (atomic bits)
//!                                                   |  Platform::wake(n)
//!                                                   v
//!   thread of vCPU n:   Apic::attention -> Apic::poll -> IRR, Events
//!                       Apic::pending -> Apic::acknowledge -> ISR, vector for the IDT
//!                       write of EOI  -> Platform::end_of_interrupt (level-triggered)
//! ```
//!
//! Time is an argument ([`Now`]), never read here. [`Apic::next_deadline`] says until when a
//! halted vCPU may sleep. Register accesses come as MMIO offsets or MSR numbers; which of the
//! two is live follows from IA32_APIC_BASE ([`Apic::mode`]).
//!
//! Not modelled: the 8259's ExtINT handshake and SMM (such messages are dropped), the
//! corrected-machine-check LVT entry, and writable APIC ids: the id is the CPU's number, and
//! the ID register is read-only, as on processors since Nehalem.
#![forbid(unsafe_code)]

mod apic;
mod icr;
mod mode;
mod page;
pub mod pv;
mod registers;
mod router;
mod timer;
mod vectors;

pub use apic::{Apic, Events, LocalSource};
pub use mode::{BASE_ENABLE, BASE_EXTENDED, BSP, DEFAULT_BASE, Mode};
pub use router::{Apics, DeliveryMode, Destination, MAX_CPUS, Message};
use thiserror::Error;
pub use timer::{Deadline, Now};

/// The access raises a general-protection exception with error code 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("general-protection exception")]
pub struct GeneralProtection;

/// What the APICs need from their surroundings.
pub trait Platform: Send + Sync {
    /// The inbox of CPU `cpu` has become non-empty: its thread must call [`Apic::poll`] soon,
    /// also when it is about to halt. Called on the sender's thread, at most once between two
    /// polls; [`Apic::attention`] is true already.
    fn wake(&self, cpu: u32);

    /// A level-triggered interrupt with this vector has ended (SDM 11.8.5): I/O APICs look
    /// whether its wire is still active. Called on the thread of the vCPU.
    fn end_of_interrupt(&self, vector: u8);
}

/// What the CPU model says about the APICs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// MAXPHYADDR (CPUID 8000_0008H EAX): higher bits of IA32_APIC_BASE are reserved. 36 to 52.
    pub physical_bits: u32,
    /// CPUID 1 ECX bit 21.
    pub x2apic: bool,
    /// CPUID 1 ECX bit 24.
    pub tsc_deadline: bool,
}
