//! What a machine needs from an accelerator, and what an accelerator needs from a machine.
//!
//! An accelerator runs guest code. The machine above it knows only the traits of this crate:
//! [`Vm`] (memory slots, event descriptors, message-signalled interrupts, dirty tracking) and
//! [`Vcpu`] (state and running). Below, the accelerator knows the machine only as a [`Bus`] that
//! takes the accesses no memory slot answers.
//!
//! ```text
//!   Vm::map_memory*  ->  Vm::create_vcpu*  ->  Vcpu::set_state  ->  Vcpu::run  <->  Bus
//!                                                                     |  returns Stop
//!                                              VcpuKick::kick --------+  (from any thread)
//! ```
//!
//! Memory slots should be mapped before vCPUs are created: under KVM that order is measurably
//! cheaper. There is no interrupt controller with wires here. A machine that has an I/O APIC
//! models it above this interface and sends [`MsiMessage`]s, which is what the I/O APIC does on the system bus.

#[cfg(feature = "conformance")]
pub mod conformance;
mod event;
mod self_test;
mod state;

use std::io;
use std::os::fd::BorrowedFd;
use std::thread;

pub use event::EventFd;
pub use self_test::{Verdict, self_test};
pub use state::{DescriptorTable, LapicState, Msr, Regs, Segment, Sregs, VcpuEvents, VcpuState};
use thiserror::Error;

/// Why an accelerator could not do what it was asked.
#[derive(Debug, Error)]
pub enum Error {
    /// A system call of the accelerator failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried, for example "KVM_CREATE_VCPU".
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The host's accelerator lacks something the machine cannot do without.
    #[error("this host's accelerator lacks {0}")]
    Missing(&'static str),
    /// The CPU model cannot be had here.
    #[error("{0}")]
    CpuModel(String),
    /// The operation has no meaning for this accelerator.
    #[error("the accelerator `{accel}` does not support {what}")]
    Unsupported {
        /// Name of the accelerator.
        accel: &'static str,
        /// What was asked.
        what: &'static str,
    },
    /// The guest did something that the accelerator cannot carry out.
    #[error("{0}")]
    Guest(String),
}

/// Result of an accelerator operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A range of guest-physical memory backed by memory of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// Number of the slot, unique in the VM.
    pub slot: u32,
    /// First guest-physical address, page aligned.
    pub guest: u64,
    /// Length in bytes, a multiple of the page size.
    pub size: u64,
    /// First byte in this process.
    pub host: *mut u8,
    /// Guest writes go to the [`Bus`] instead.
    pub read_only: bool,
    /// Record writes for [`Vm::dirty_log`].
    pub log_dirty: bool,
}

// SAFETY: the pointer is only an address here; who dereferences it answers for the aliasing.
unsafe impl Send for MemorySlot {}

/// Where a doorbell lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddress {
    /// Guest-physical address.
    Mmio(u64),
    /// I/O port.
    Port(u16),
}

/// A message-signalled interrupt (Intel SDM volume 3, 11.11): what a write of `data` to
/// `address` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MsiMessage {
    /// Destination and mode, `0xFEE0_0000` and up.
    pub address: u64,
    /// Vector, delivery mode and trigger mode.
    pub data: u32,
}

/// Number of an interrupt route. Routes are made by [`Vm::set_msi_route`] and used by
/// [`Vm::add_irqfd`].
pub type Route = u32;

/// What a thread of an accelerator does.
pub type Work = Box<dyn FnOnce() + Send>;

/// Lets a thread of an accelerator do its work, by the thread's name. Who makes an accelerator
/// may have started the thread before, with a system-call policy of its own.
pub type Spawn<'a> = &'a dyn Fn(&str, Work) -> io::Result<()>;

/// A [`Spawn`] that starts a thread.
///
/// # Errors
/// There is none to be had.
pub fn spawn(name: &str, work: Work) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.to_owned());
    thread.spawn(work).map(drop)
}

/// A virtual machine of one accelerator. All methods may be called from any thread.
pub trait Vm: Send + Sync {
    /// Short name: `kvm`, `soft`, `none`.
    fn name(&self) -> &'static str;

    /// Makes a range of guest-physical memory.
    ///
    /// # Safety
    /// `slot.host` must point at `slot.size` bytes that stay mapped until the slot is unmapped
    /// or the VM is dropped, and that this process accesses only in ways that tolerate
    /// concurrent change by the guest.
    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()>;

    /// Removes a slot.
    fn unmap_memory(&self, slot: u32) -> Result<()>;

    /// The pages of a slot written since the last call, one bit per 4 KiB page, lowest address
    /// in bit 0 of the first word.
    fn dirty_log(&self, slot: u32) -> Result<Vec<u64>>;

    /// Makes vCPU number `index` of `count`; its APIC id is `index`. vCPU 0 starts at the state it
    /// is given, the others wait for a start-up interrupt.
    fn create_vcpu(&self, index: u32, count: u32) -> Result<Box<dyn Vcpu>>;

    /// From now on a guest write to `address` of any width (or, for `Some(n)`, a 16-bit write of
    /// the value `n`) only adds 1 to the event counter `fd`.
    fn add_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()>;

    /// Undoes [`add_ioeventfd`](Self::add_ioeventfd) with the same arguments.
    fn remove_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()>;

    /// Defines what an interrupt on `route` sends; `None` removes the route.
    fn set_msi_route(&self, route: Route, message: Option<MsiMessage>) -> Result<()>;

    /// From now on the event counter `fd` becoming non-zero raises `route` and clears the
    /// counter. A counter that is non-zero already raises it at once.
    fn add_irqfd(&self, fd: BorrowedFd<'_>, route: Route) -> Result<()>;

    /// Undoes [`add_irqfd`](Self::add_irqfd). Events already counted stay in the counter.
    fn remove_irqfd(&self, fd: BorrowedFd<'_>, route: Route) -> Result<()>;

    /// Sends an interrupt now.
    fn signal_msi(&self, message: MsiMessage) -> Result<()>;

    /// The VM's paravirtual clock in nanoseconds.
    fn clock(&self) -> Result<u64>;

    /// Sets the paravirtual clock.
    fn set_clock(&self, nanoseconds: u64) -> Result<()>;
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// [`VcpuKick::kick`] was called, or a signal arrived. Run again unless there is a reason
    /// not to.
    Kicked,
    /// The CPU shut down: a triple fault.
    TripleFault,
    /// The vCPU cannot go on, ever: the driver of `none` hung up.
    Ended,
}

/// One virtual CPU. It belongs to the thread that runs it.
pub trait Vcpu: Send {
    /// Runs guest code until a [`Stop`]. Accesses that no memory slot and no ioeventfd answers
    /// go to `bus` on the calling thread.
    ///
    /// Must be called on one thread only. An error is final.
    fn run(&mut self, bus: &dyn Bus) -> Result<Stop>;

    /// A handle that makes [`run`](Self::run) return soon, even if it is called after the kick.
    /// Must be taken on the thread that will run the vCPU.
    fn kicker(&mut self) -> Box<dyn VcpuKick>;

    /// Everything the guest can observe of this CPU.
    fn state(&self) -> Result<VcpuState>;

    /// Sets the general and system registers, for the start of a guest.
    fn set_registers(&mut self, regs: &Regs, sregs: &Sregs) -> Result<()>;

    /// Restores what [`state`](Self::state) returned.
    fn set_state(&mut self, state: &VcpuState) -> Result<()>;
}

/// Interrupts [`Vcpu::run`] from another thread.
pub trait VcpuKick: Send + Sync {
    /// Makes the vCPU's `run` return [`Stop::Kicked`].
    fn kick(&self);
}

/// The machine as the CPU sees it: everything that is not memory.
///
/// `data` is 1, 2, 4 or 8 bytes (ports: 1, 2 or 4), little-endian. A read that nothing claims
/// gives all-ones; a write that nothing claims is dropped. Neither may block for long: it stalls
/// the vCPU.
pub trait Bus: Send + Sync {
    /// Reads from an I/O port.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// Writes to an I/O port.
    fn port_write(&self, port: u16, data: &[u8]);
    /// Reads from guest-physical memory space.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Writes to guest-physical memory space.
    fn mmio_write(&self, address: u64, data: &[u8]);
}
