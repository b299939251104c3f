//! The accelerator without hardware: a software x86-64 CPU.
//!
//! ```text
//!   vCPU thread ── Vcpu::run ── core: decode, execute ── memory (mmu)
//!        │                         └─ not memory: Doors ── doorbell? eventfd : machine's Bus
//!   one thread "irqfd" ── epoll over the event counters of devices ──┐
//!   any thread ── Vm::signal_msi ────────────────────────────────────┴─ local APICs (apic) ── wake
//! ```
//!
//! The threads and their jails belong to the VMM: it hands in how to start the one thread that
//! this crate needs, and code memory that was made before the jail.

mod doors;
mod irqfd;
mod vcpu;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use anemone_accel_api::{Error, IoAddress, MemorySlot, MsiMessage, Result, Route, Spawn, Vcpu, Vm};
use anemone_cpu::Leaf;
use anemone_soft_apic::{Apics, MAX_CPUS, Platform};
use anemone_soft_core::{ATTENTION_APIC, Clock, CodeRegistry, Config, Cpuid, Shared, Signals};
pub use anemone_soft_core::{CodeBuffer, code_memory, offered};
use anemone_soft_mmu::Memory;

use crate::doors::Doors;
use crate::irqfd::Irqfds;
use crate::vcpu::SoftVcpu;

const NAME: &str = "soft";

/// A virtual machine on software CPUs.
pub struct SoftVm {
    /// Name of the CPU model.
    model: String,
    /// What the engine offers guests on this host.
    offered: Vec<Leaf>,
    shared: Arc<Shared>,
    doors: Arc<Doors>,
    irqfds: Arc<Irqfds>,
    /// Code memory by CPU, until the CPU takes it.
    code: Mutex<Vec<Option<CodeBuffer>>>,
    /// Start and size of each memory slot.
    slots: Mutex<BTreeMap<u32, (u64, u64)>>,
}

/// Wakes CPUs for their local APICs.
struct Waker(Vec<Arc<Signals>>);

impl Platform for Waker {
    fn wake(&self, cpu: u32) {
        if let Some(signals) = self.0.get(cpu as usize) {
            signals.raise(ATTENTION_APIC);
        }
    }

    /// The machine's I/O APIC has edge-triggered pins only, which wait for nothing.
    fn end_of_interrupt(&self, _: u8) {}
}

/// A failure of the system call `what`.
fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Os { what, source }
}

impl SoftVm {
    /// An empty virtual machine of as many CPUs as there is `code` memory ([`code_memory`]), all of
    /// one model. Its thread `irqfd` runs as long as the VM exists.
    ///
    /// # Errors
    /// [`Error::CpuModel`] names the features that the model has and this engine does not offer
    /// on this host. [`Error::Os`] if the thread for interrupts cannot be started.
    pub fn new(model: &str, code: Vec<CodeBuffer>, spawn: Spawn<'_>) -> Result<Self> {
        let count = u32::try_from(code.len()).unwrap_or(u32::MAX);
        if !(1..=MAX_CPUS).contains(&count) {
            return Err(Error::Missing("code memory for 1 to 255 CPUs"));
        }
        let offered = offered();
        let features = cpuid(model, &offered, 0, count)?.apic_features();
        let signals: Vec<_> = (0..count).map(|_| Arc::new(Signals::default())).collect();
        let code_registry = CodeRegistry::new(&signals);
        let shared = Arc::new(Shared {
            memory: Memory::new(code_registry.clone()),
            apics: Apics::new(count, features, Box::new(Waker(signals.clone()))),
            code: code_registry,
            clock: Clock::new(),
            signals,
        });
        let irqfds = Arc::new(Irqfds::new(shared.apics.clone())?);
        let serving = irqfds.clone();
        spawn("irqfd", Box::new(move || serving.serve())).map_err(failed("starting a thread"))?;
        Ok(Self {
            model: model.to_owned(),
            offered,
            shared,
            doors: Arc::default(),
            irqfds,
            code: Mutex::new(code.into_iter().map(Some).collect()),
            slots: Mutex::default(),
        })
    }
}

impl Drop for SoftVm {
    fn drop(&mut self) {
        self.irqfds.stop();
    }
}

/// What CPU `index` of `count` answers to CPUID.
fn cpuid(model: &str, offered: &[Leaf], index: u32, count: u32) -> Result<Cpuid> {
    anemone_cpu::cpuid(model, offered, index, count)
        .map(Cpuid::new)
        .map_err(|e| Error::CpuModel(e.to_string()))
}

/// An error about a memory slot.
fn slot_error(error: anemone_soft_mmu::SlotError) -> Error {
    Error::Guest(error.to_string())
}

impl Vm for SoftVm {
    fn name(&self) -> &'static str {
        NAME
    }

    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()> {
        let (number, range) = (slot.slot, (slot.guest, slot.size));
        // SAFETY: the caller promises what `add_slot` asks for.
        unsafe { self.shared.memory.add_slot(slot) }.map_err(slot_error)?;
        lock(&self.slots).insert(number, range);
        Ok(())
    }

    fn unmap_memory(&self, slot: u32) -> Result<()> {
        self.shared.memory.remove_slot(slot).map_err(slot_error)?;
        if let Some((guest, size)) = lock(&self.slots).remove(&slot) {
            self.shared.code.slot_removed(guest, size);
        }
        Ok(())
    }

    fn dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        self.shared.memory.dirty_log(slot).map_err(slot_error)
    }

    fn create_vcpu(&self, index: u32, count: u32) -> Result<Box<dyn Vcpu>> {
        if count != self.shared.apics.cpus() {
            return Err(Error::Missing("code memory for each CPU"));
        }
        let exists = || Error::Guest(format!("CPU {index} exists already or never will"));
        let cpuid = cpuid(&self.model, &self.offered, index, count)?;
        let mut code = lock(&self.code);
        let code = code.get_mut(index as usize).and_then(Option::take);
        let code = code.ok_or_else(exists)?;
        let apic = self.shared.apics.create(index).ok_or_else(exists)?;
        let config = Config {
            shared: self.shared.clone(),
            index,
            apic,
            cpuid,
            code,
        };
        Ok(Box::new(SoftVcpu::new(config, self.doors.clone())))
    }

    fn add_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()> {
        self.doors.add(fd, address, value)
    }

    fn remove_ioeventfd(
        &self,
        _: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()> {
        self.doors.remove(address, value)
    }

    fn set_msi_route(&self, route: Route, message: Option<MsiMessage>) -> Result<()> {
        self.irqfds.set_route(route, message);
        Ok(())
    }

    fn add_irqfd(&self, fd: BorrowedFd<'_>, route: Route) -> Result<()> {
        self.irqfds.add(fd, route)
    }

    fn remove_irqfd(&self, _: BorrowedFd<'_>, route: Route) -> Result<()> {
        self.irqfds.remove(route)
    }

    fn signal_msi(&self, message: MsiMessage) -> Result<()> {
        // That no CPU answers to the destination is on a bus nobody's error.
        self.shared.apics.signal_msi(message);
        Ok(())
    }

    fn clock(&self) -> Result<u64> {
        Ok(self.shared.clock.nanoseconds())
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<()> {
        self.shared.clock.set_nanoseconds(nanoseconds);
        Ok(())
    }
}

/// The data is consistent at every point where a holder could panic, so poison means nothing.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
