//! The accelerator on Linux KVM.
//!
//! KVM keeps the local APICs; there is no PIC, no PIT and no in-kernel I/O APIC ("split
//! irqchip"). Measured on an idle host, a VM with the full in-kernel interrupt controller costs
//! about 10 ms more to start (each memory slot added after it waits for a grace period) and
//! 13 ms more to tear down, and a machine without wired interrupts has no use for it.

mod convert;
mod cpuid;
mod vcpu;

use std::collections::BTreeMap;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anemone_accel_api::{Error, IoAddress, MemorySlot, MsiMessage, Result, Route, Spawn, Vcpu, Vm};
use anemone_cpu::Leaf;
use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KvmIrqRouting, kvm_clock_data, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// Version of the KVM interface; it has not changed since 2007 and never will.
const API_VERSION: i32 = 12;
/// Where KVM may keep the identity-map page that some Intel hosts need, one page.
const IDENTITY_MAP: u64 = 0xFEFF_C000;
/// Where KVM may keep the task-state segment that some Intel hosts need, three pages.
const TSS: usize = 0xFEFF_D000;

/// What the machine cannot do without, and its name in messages.
const REQUIRED: &[(u32, &str)] = &[
    (kvm_bindings::KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
    (kvm_bindings::KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM"),
    (kvm_bindings::KVM_CAP_SPLIT_IRQCHIP, "KVM_CAP_SPLIT_IRQCHIP"),
    (kvm_bindings::KVM_CAP_IRQFD, "KVM_CAP_IRQFD"),
    (kvm_bindings::KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD"),
    (
        kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH,
        "KVM_CAP_IOEVENTFD_ANY_LENGTH",
    ),
    (kvm_bindings::KVM_CAP_SIGNAL_MSI, "KVM_CAP_SIGNAL_MSI"),
    (
        kvm_bindings::KVM_CAP_IMMEDIATE_EXIT,
        "KVM_CAP_IMMEDIATE_EXIT",
    ),
    (kvm_bindings::KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
    (kvm_bindings::KVM_CAP_XCRS, "KVM_CAP_XCRS"),
    (kvm_bindings::KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    (
        kvm_bindings::KVM_CAP_TSC_DEADLINE_TIMER,
        "KVM_CAP_TSC_DEADLINE_TIMER",
    ),
];

/// A virtual machine on KVM.
pub struct KvmVm {
    kvm: Arc<Kvm>,
    vm: Arc<VmFd>,
    /// Name of the CPU model.
    model: String,
    /// CPUID as the host offers it to guests.
    offered: Mutex<Offered>,
    /// Sizes of the memory slots, which the dirty log needs.
    slots: Mutex<BTreeMap<u32, u64>>,
    /// All routes: KVM takes only the whole table.
    routes: Mutex<BTreeMap<Route, MsiMessage>>,
}

/// What KVM offers guests. The question costs 0.3 ms where the host is itself a virtual machine
/// (every CPUID traps), so a thread asks it while the machine is being built.
enum Offered {
    Asking(Receiver<Result<Vec<Leaf>>>),
    Known(Vec<Leaf>),
}

/// A failure of the KVM call `what`.
fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |e| Error::Os {
        what,
        source: io::Error::from_raw_os_error(e.errno()),
    }
}

/// The data is consistent at every point where a holder could panic, so poison means nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lends a descriptor to an interface that wants an [`EventFd`].
fn borrowed_event(fd: BorrowedFd<'_>) -> ManuallyDrop<EventFd> {
    // SAFETY: the descriptor is open for as long as the borrow lasts, and ManuallyDrop keeps
    // the temporary owner from closing it.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(fd.as_raw_fd()) })
}

impl KvmVm {
    /// Makes an empty virtual machine whose CPUs are of a model. `device` is an open `/dev/kvm`. The
    /// thread `cpuid` asks it what it offers, and ends.
    ///
    /// # Errors
    /// [`Error::Missing`] names the capability that this host's KVM lacks. That it lacks features
    /// of the model shows at the first vCPU, as [`Error::CpuModel`].
    pub fn new(device: OwnedFd, model: &str, spawn: Spawn<'_>) -> Result<Self> {
        // SAFETY: ownership of an open descriptor is handed over.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        if kvm.get_api_version() != API_VERSION {
            return Err(Error::Missing("KVM's API version 12"));
        }
        for (capability, name) in REQUIRED {
            if kvm.check_extension_raw((*capability).into()) <= 0 {
                return Err(Error::Missing(name));
            }
        }
        let kvm = Arc::new(kvm);
        let (tell, answer) = mpsc::channel();
        let asked = kvm.clone();
        // Nobody listens any more if the machine is not going to be.
        let ask = move || drop(tell.send(offered(&asked)));
        spawn("cpuid", Box::new(ask)).map_err(|source| Error::Os {
            what: "starting a thread",
            source,
        })?;
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(IDENTITY_MAP)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(TSS)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        // No pin of KVM's own I/O APIC: nothing here needs an exit at end of interrupt.
        let split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        vm.enable_cap(&split)
            .map_err(failed("KVM_ENABLE_CAP(SPLIT_IRQCHIP)"))?;
        Ok(Self {
            kvm,
            vm: Arc::new(vm),
            model: model.to_owned(),
            offered: Offered::Asking(answer).into(),
            slots: Mutex::default(),
            routes: Mutex::default(),
        })
    }

    /// What CPU `index` of `count` answers to CPUID.
    fn cpuid(&self, index: u32, count: u32) -> Result<CpuId> {
        let mut offered = lock(&self.offered);
        if let Offered::Asking(answer) = &*offered {
            let gone =
                |_| Error::Guest("the thread that asks KVM for its CPUID has ended".to_owned());
            let leaves = answer.recv().map_err(gone)??;
            *offered = Offered::Known(leaves);
        }
        match &*offered {
            Offered::Known(leaves) => cpuid::for_vcpu(&self.model, leaves, index, count),
            Offered::Asking(_) => Err(Error::Missing("an answer about CPUID")),
        }
    }

    /// Hands the whole routing table to KVM.
    fn commit_routes(&self, routes: &BTreeMap<Route, MsiMessage>) -> Result<()> {
        let entries: Vec<kvm_irq_routing_entry> = routes
            .iter()
            .map(|(gsi, message)| {
                let mut entry = kvm_irq_routing_entry {
                    gsi: *gsi,
                    type_: kvm_bindings::KVM_IRQ_ROUTING_MSI,
                    ..Default::default()
                };
                entry.u.msi = kvm_bindings::kvm_irq_routing_msi {
                    address_lo: message.address as u32,
                    address_hi: (message.address >> 32) as u32,
                    data: message.data,
                    ..Default::default()
                };
                entry
            })
            .collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| {
            Error::Guest(format!("{} interrupt routes are too many", entries.len()))
        })?;
        self.vm
            .set_gsi_routing(&table)
            .map_err(failed("KVM_SET_GSI_ROUTING"))
    }
}

/// What KVM offers guests on this host.
fn offered(kvm: &Kvm) -> Result<Vec<Leaf>> {
    let offered = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(cpuid::from_kvm(&offered))
}

/// What KVM offers guests on this host, for questions about CPU models. `device` is an open
/// `/dev/kvm`.
///
/// # Errors
/// KVM does not answer.
pub fn offered_cpuid(device: OwnedFd) -> Result<Vec<Leaf>> {
    // SAFETY: ownership of an open descriptor is handed over.
    offered(&unsafe { Kvm::from_raw_fd(device.into_raw_fd()) })
}

fn io_event_address(address: IoAddress) -> IoEventAddress {
    match address {
        IoAddress::Mmio(a) => IoEventAddress::Mmio(a),
        IoAddress::Port(p) => IoEventAddress::Pio(u64::from(p)),
    }
}

impl Vm for KvmVm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()> {
        let mut flags = 0;
        if slot.read_only {
            flags |= KVM_MEM_READONLY;
        }
        if slot.log_dirty {
            flags |= KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kvm_userspace_memory_region {
            slot: slot.slot,
            flags,
            guest_phys_addr: slot.guest,
            memory_size: slot.size,
            userspace_addr: slot.host as u64,
        };
        // SAFETY: the caller vouches for the host range.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        lock(&self.slots).insert(slot.slot, slot.size);
        Ok(())
    }

    fn unmap_memory(&self, slot: u32) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        // SAFETY: a size of zero deletes the slot; no host memory is involved.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        lock(&self.slots).remove(&slot);
        Ok(())
    }

    fn dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        let size = lock(&self.slots).get(&slot).copied().unwrap_or(0);
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        self.vm
            .get_dirty_log(slot, size)
            .map_err(failed("KVM_GET_DIRTY_LOG"))
    }

    fn create_vcpu(&self, index: u32, count: u32) -> Result<Box<dyn Vcpu>> {
        let fd = self
            .vm
            .create_vcpu(u64::from(index))
            .map_err(failed("KVM_CREATE_VCPU"))?;
        let vcpu = vcpu::KvmVcpu::new(fd, &self.kvm, self.cpuid(index, count)?)?;
        Ok(Box::new(vcpu))
    }

    fn add_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()> {
        let event = borrowed_event(fd);
        let address = io_event_address(address);
        match value {
            // The width of the datamatch type is the width of the access that matches.
            Some(v) => self.vm.register_ioevent(&event, &address, WordMatch(v)),
            None => self.vm.register_ioevent(&event, &address, NoDatamatch),
        }
        .map_err(failed("KVM_IOEVENTFD"))
    }

    fn remove_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()> {
        let event = borrowed_event(fd);
        let address = io_event_address(address);
        match value {
            Some(v) => self.vm.unregister_ioevent(&event, &address, WordMatch(v)),
            None => self.vm.unregister_ioevent(&event, &address, NoDatamatch),
        }
        .map_err(failed("KVM_IOEVENTFD"))
    }

    fn set_msi_route(&self, route: Route, message: Option<MsiMessage>) -> Result<()> {
        let mut routes = lock(&self.routes);
        let before = match message {
            Some(m) => routes.insert(route, m),
            None => routes.remove(&route),
        };
        if before == message {
            Ok(())
        } else {
            self.commit_routes(&routes)
        }
    }

    fn add_irqfd(&self, fd: BorrowedFd<'_>, route: Route) -> Result<()> {
        self.vm
            .register_irqfd(&borrowed_event(fd), route)
            .map_err(failed("KVM_IRQFD"))
    }

    fn remove_irqfd(&self, fd: BorrowedFd<'_>, route: Route) -> Result<()> {
        self.vm
            .unregister_irqfd(&borrowed_event(fd), route)
            .map_err(failed("KVM_IRQFD"))
    }

    fn signal_msi(&self, message: MsiMessage) -> Result<()> {
        let msi = kvm_msi {
            address_lo: message.address as u32,
            address_hi: (message.address >> 32) as u32,
            data: message.data,
            ..Default::default()
        };
        match self.vm.signal_msi(msi) {
            // Positive: delivered. Zero: the guest has it blocked. EPERM: no CPU answers to the
            // destination, which on a bus is nobody's error.
            Ok(_) => Ok(()),
            Err(e) if e.errno() == libc::EPERM => Ok(()),
            Err(e) => Err(failed("KVM_SIGNAL_MSI")(e)),
        }
    }

    fn clock(&self) -> Result<u64> {
        Ok(self.vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock)
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<()> {
        let clock = kvm_clock_data {
            clock: nanoseconds,
            ..Default::default()
        };
        self.vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}

/// A 16-bit value that a doorbell write must carry.
struct WordMatch(u16);

impl From<WordMatch> for u64 {
    fn from(value: WordMatch) -> Self {
        u64::from(value.0)
    }
}

#[cfg(test)]
mod tests;
