//! The virtio-pci function: its capabilities, its common configuration, and its doorbells.

mod common;
mod touched;

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anemone_accel_api::{EventFd, IoAddress, Vm};
use anemone_log::warn_limited;
use anemone_pci::{BarKind, BarRange, ConfigSpace, Identity, Msix, PciFunction};

use crate::feature;
use crate::ram::GuestRam;
use crate::session::Connected;
use crate::work::{Start, StartQueue, WorkQueue};
pub use common::QUEUE_SIZE;
use common::{Common, Queue, status};
use touched::Reached;
pub use touched::Untouched;

/// virtio's PCI vendor, and what is added to the device type.
const VENDOR: u16 = 0x1AF4;
const DEVICE_BASE: u16 = 0x1040;

/// The one BAR: its number and size, and the structures in it.
const BAR: usize = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
/// Length of each structure's window.
const WINDOW: u64 = 0x1000;
/// Bytes between the doorbells of two queues.
const NOTIFY_STEP: u32 = 4;

/// Vendor-specific capability, and its types (virtio 1.2, 4.1.4).
const CAP_VENDOR: u8 = 0x09;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// Where a device sits and what it is.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Name in messages.
    pub id: String,
    /// virtio device type.
    pub device_type: u16,
    /// Where the BAR lies after power-on, a multiple of 32 KiB.
    pub bar: u64,
    /// First of the MSI-X routes.
    pub first_route: u32,
    /// Number of virtqueues, at most 127.
    pub queues: u16,
    /// Most descriptors of a queue, a power of two up to [`QUEUE_SIZE`].
    pub queue_size: u16,
    /// Features the back end offers.
    pub features: u64,
    /// Device-specific configuration.
    pub config: Vec<u8>,
}

struct Registers {
    pci: ConfigSpace,
    msix: Msix,
    common: Common,
    device: Vec<u8>,
    /// Offset of the PCI configuration access capability.
    window_cap: usize,
    /// The back end has the queues, or is about to get or give them back.
    active: bool,
    /// Waiting for the device thread to report a reset as done.
    resetting: bool,
    /// BAR address at which the doorbells are registered with the accelerator.
    doorbells_at: Option<u64>,
    /// How far any driver has come with the device.
    reached: Reached,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    id: String,
    vm: Arc<dyn Vm>,
    ram: Arc<GuestRam>,
    kicks: Vec<Arc<EventFd>>,
    /// The interrupt of queues that have none.
    no_call: Arc<EventFd>,
    work: Arc<WorkQueue>,
    registers: Mutex<Registers>,
}

impl VirtioPci {
    /// Makes the function. Work for the back end goes to `work`.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(
        layout: Layout,
        vm: Arc<dyn Vm>,
        ram: Arc<GuestRam>,
        work: Arc<WorkQueue>,
    ) -> io::Result<Self> {
        let mut pci = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + layout.device_type,
            revision: 1,
            class: class_of(layout.device_type),
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE + layout.device_type,
        });
        pci.add_bar(BAR, BarKind::Memory64, BAR_SIZE, layout.bar);
        let device_length = layout.config.len() as u32;
        add_virtio_capability(&mut pci, CAP_COMMON, COMMON, common::LENGTH as u32, &[]);
        add_virtio_capability(&mut pci, CAP_ISR, ISR, 1, &[]);
        if device_length > 0 {
            add_virtio_capability(&mut pci, CAP_DEVICE, DEVICE, device_length, &[]);
        }
        let doorbells = u32::from(layout.queues) * NOTIFY_STEP;
        let step = NOTIFY_STEP.to_le_bytes();
        add_virtio_capability(&mut pci, CAP_NOTIFY, NOTIFY, doorbells, &step);
        let window_cap = add_virtio_capability(&mut pci, CAP_PCI, 0, 0, &[0; 4]);
        let msix = Msix::new(
            vm.clone(),
            &mut pci,
            layout.queues + 1,
            BAR as u8,
            MSIX_TABLE as u32,
            MSIX_PENDING as u32,
            layout.first_route,
        )?;
        let kicks = (0..layout.queues)
            .map(|_| EventFd::new().map(Arc::new))
            .collect::<io::Result<_>>()?;
        let offered = layout.features & feature::OFFERED | feature::VERSION_1;
        Ok(Self {
            id: layout.id,
            vm,
            ram,
            kicks,
            no_call: Arc::new(EventFd::new()?),
            work,
            registers: Mutex::new(Registers {
                pci,
                common: Common::new(offered, layout.queues, layout.queue_size, msix.count()),
                msix,
                device: layout.config,
                window_cap,
                active: false,
                resetting: false,
                doorbells_at: None,
                reached: Reached::default(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Name in messages.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The device thread has stopped all queues.
    pub fn reset_done(&self) {
        let mut r = self.lock();
        if r.resetting {
            r.resetting = false;
            r.active = false;
            r.common.reset();
            r.msix.clear_pending();
        }
    }

    /// The device has new configuration. Tells the driver unless nothing differs.
    pub fn config_changed(&self, config: &[u8]) {
        let mut r = self.lock();
        let length = r.device.len().min(config.len());
        if r.device[..length] == config[..length] {
            return;
        }
        r.device[..length].copy_from_slice(&config[..length]);
        r.common.generation = r.common.generation.wrapping_add(1);
        Self::interrupt_config(&r);
    }

    /// Another back end is there, in place of one that was lost.
    ///
    /// # Errors
    /// It lacks what the driver uses: only a reset helps.
    pub(crate) fn replaced(&self, connected: &Connected) -> Result<(), String> {
        let offered = connected.features & feature::OFFERED | feature::VERSION_1;
        let queues = connected.queues.min(self.kicks.len() as u16);
        self.lock().common.replace(offered, queues)
    }

    /// The device cannot go on until the driver resets it.
    pub fn needs_reset(&self) {
        self.lock().fail();
    }

    fn interrupt_config(r: &Registers) {
        if r.common.status & status::DRIVER_OK != 0
            && let Some(event) = r.msix.event(r.common.config_vector)
        {
            event.signal();
        }
    }

    /// Whether a driver has taken the device, and which features it has accepted.
    pub fn driver(&self) -> (u8, u64) {
        let r = self.lock();
        (r.common.status, r.common.accepted)
    }

    /// Why no driver has ever used the device; `None` if one has.
    pub fn untouched(&self) -> Option<Untouched> {
        let mut guard = self.lock();
        let r = &mut *guard;
        self.note_use(r);
        r.reached.untouched()
    }

    /// Remembers whether the driver has made something available, before its rings are forgotten.
    fn note_use(&self, r: &mut Registers) {
        let used = |q: &Queue| q.enabled && self.ram.available_index(q.available) != 0;
        r.reached.used |= r.active && r.common.queues.iter().any(used);
    }

    /// The interrupt of a queue.
    fn call(&self, r: &Registers, queue: &Queue) -> Arc<EventFd> {
        r.msix.event(queue.vector).unwrap_or(&self.no_call).clone()
    }

    /// Registers the doorbells with the accelerator where the BAR is now, or takes them back.
    fn update_doorbells(&self, r: &mut Registers) {
        let wanted = if r.active && !r.resetting {
            r.pci.bar(BAR).map(|b| b.0)
        } else {
            None
        };
        if wanted == r.doorbells_at {
            return;
        }
        let enabled: Vec<bool> = r.common.queues.iter().map(|q| q.enabled).collect();
        let doorbells = || {
            let step = u64::from(NOTIFY_STEP);
            let all = self.kicks.iter().zip(&enabled).enumerate();
            all.filter(|(_, (_, on))| **on)
                .map(move |(i, (kick, _))| (NOTIFY + i as u64 * step, kick))
        };
        if let Some(base) = r.doorbells_at.take() {
            for (offset, kick) in doorbells() {
                let address = IoAddress::Mmio(base + offset);
                if let Err(e) = self.vm.remove_ioeventfd(kick.as_fd(), address, None) {
                    warn_limited!("{}: doorbell at {address:x?}: {e}", self.id);
                }
            }
        }
        let Some(base) = wanted else { return };
        r.doorbells_at = wanted;
        for (offset, kick) in doorbells() {
            let address = IoAddress::Mmio(base + offset);
            // The access still works without: it then arrives in `bar_write`.
            if let Err(e) = self.vm.add_ioeventfd(kick.as_fd(), address, None) {
                warn_limited!("{}: doorbell at {address:x?}: {e}", self.id);
            }
        }
    }

    /// Acts on a write to the device status.
    fn status_written(&self, r: &mut Registers, value: u8) {
        if r.resetting {
            return;
        }
        if value == 0 {
            self.note_use(r);
            if r.active {
                r.resetting = true;
                self.update_doorbells(r);
                self.work.stop();
            } else {
                r.common.reset();
                r.msix.clear_pending();
            }
            return;
        }
        let before = r.common.status;
        r.common.set_status(value);
        let now = r.common.status;
        r.reached.status(value, now, &r.common);
        if before & status::DRIVER_OK == 0 && now & status::DRIVER_OK != 0 {
            match self.latch(r) {
                Ok(start) => {
                    r.active = true;
                    self.update_doorbells(r);
                    self.work.start(start);
                }
                Err(why) => {
                    warn_limited!("{}: the driver's set-up is unusable: {why}", self.id);
                    r.fail();
                }
            }
        }
    }

    /// Checks what the driver has set up, and takes a copy that it can no longer change.
    fn latch(&self, r: &Registers) -> Result<Start, String> {
        let mut queues = Vec::new();
        for (index, q) in r
            .common
            .queues
            .iter()
            .enumerate()
            .filter(|(_, q)| q.enabled)
        {
            let size = u64::from(q.size);
            // Virtio 1.2, 2.7: 16 bytes a descriptor; 2 an entry, 8 an element, 6 for the rest.
            for (name, address, align, length) in [
                ("descriptor area", q.descriptors, 16, size * 16),
                ("driver area", q.available, 2, size * 2 + 6),
                ("device area", q.used, 4, size * 8 + 6),
            ] {
                if address % align != 0 || !self.ram.contains(address, length) {
                    return Err(format!(
                        "queue {index}: {name} at {address:#x} is not {length} bytes of RAM \
                         aligned to {align}"
                    ));
                }
            }
            queues.push(StartQueue {
                index: index as u16,
                size: q.size,
                descriptors: q.descriptors,
                available: q.available,
                used: q.used,
                kick: self.kicks[index].clone(),
                call: self.call(r, q),
            });
        }
        Ok(Start {
            features: r.common.accepted,
            queues,
        })
    }

    fn common_write(&self, r: &mut Registers, offset: usize, data: &[u8]) {
        for field in r.common.fields_written(offset, data) {
            match field {
                common::Field::Status(value) => self.status_written(r, value),
                common::Field::QueueVector(index) if r.active && !r.resetting => {
                    let queue = &r.common.queues[usize::from(index)];
                    if queue.enabled {
                        self.work.set_call(index, self.call(r, queue));
                    }
                }
                common::Field::QueueVector(_) => {}
            }
        }
    }

    /// What the PCI configuration access capability points at: offset and length in the BAR.
    fn window(r: &Registers) -> Option<(u64, usize)> {
        let mut fields = [0; 16];
        r.pci.read(r.window_cap, &mut fields);
        let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|n| fields[i + n]));
        let (bar, offset, length) = (fields[4], u64::from(word(8)), word(12) as usize);
        let fits = offset.is_multiple_of(length.max(1) as u64) && offset + 4 <= BAR_SIZE;
        (bar == 0 && matches!(length, 1 | 2 | 4) && fits).then_some((offset, length))
    }

    fn read(&self, r: &Registers, offset: u64, data: &mut [u8]) {
        let at = (offset % WINDOW) as usize;
        data.fill(0);
        match offset - offset % WINDOW {
            COMMON => copy_range(&r.common.bytes(), at, data),
            DEVICE => copy_range(&r.device, at, data),
            MSIX_TABLE => r.msix.table_read(at, data),
            MSIX_PENDING => r.msix.pending_read(at, data),
            // The ISR status only serves INTx, which this machine does not have.
            _ => {}
        }
    }

    fn write(&self, r: &mut Registers, offset: u64, data: &[u8]) {
        let at = (offset % WINDOW) as usize;
        match offset - offset % WINDOW {
            COMMON => self.common_write(r, at, data),
            DEVICE => {
                let end = r.device.len().min(at + data.len());
                if at < end {
                    let data = &data[..end - at];
                    r.device[at..end].copy_from_slice(data);
                    // A driver may write configuration before DRIVER_OK; the back end is there.
                    self.work.write_config(at as u16, data);
                }
            }
            NOTIFY if r.active && at.is_multiple_of(NOTIFY_STEP as usize) => {
                if let Some(kick) = self.kicks.get(at / NOTIFY_STEP as usize) {
                    kick.signal();
                }
            }
            MSIX_TABLE => r.msix.table_write(at, data),
            _ => {}
        }
    }
}

impl Registers {
    fn fail(&mut self) {
        self.common.status |= status::NEEDS_RESET;
        VirtioPci::interrupt_config(self);
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let r = self.lock();
        r.pci.read(offset, data);
        if let Some(at) = offset.checked_sub(r.window_cap + 16).filter(|at| *at < 4)
            && let Some((target, length)) = Self::window(&r)
        {
            let mut bytes = [0; 4];
            self.read(&r, target, &mut bytes[..length]);
            copy_range(&bytes, at, data);
        }
    }

    fn config_write(&self, offset: usize, data: &[u8]) {
        let mut guard = self.lock();
        let r = &mut *guard;
        r.pci.write(offset, data);
        r.msix.config_written(&r.pci);
        self.update_doorbells(r);
        if offset == r.window_cap + 16
            && let Some((target, length)) = Self::window(r)
            && data.len() >= length
        {
            self.write(r, target, &data[..length]);
        }
    }

    fn bars(&self) -> Vec<BarRange> {
        let bar = self.lock().pci.bar(BAR);
        bar.map(|(address, size)| BarRange {
            bar: BAR,
            address,
            size,
        })
        .into_iter()
        .collect()
    }

    fn bar_read(&self, _: usize, offset: u64, data: &mut [u8]) {
        self.read(&self.lock(), offset, data);
    }

    fn bar_write(&self, _: usize, offset: u64, data: &[u8]) {
        self.write(&mut self.lock(), offset, data);
    }
}

/// Copies `from[at..]` over `to` as far as both go.
fn copy_range(from: &[u8], at: usize, to: &mut [u8]) {
    for (to, from) in to.iter_mut().zip(from.iter().skip(at)) {
        *to = *from;
    }
}

/// Adds a virtio capability (virtio 1.2, 4.1.4); `extra` follows its common part. Returns its
/// offset.
fn add_virtio_capability(
    pci: &mut ConfigSpace,
    kind: u8,
    offset: u64,
    length: u32,
    extra: &[u8],
) -> usize {
    let mut body = vec![16 + extra.len() as u8, kind, BAR as u8, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(extra);
    let mut writable = vec![0; body.len()];
    if kind == CAP_PCI {
        // BAR, offset and length are the driver's to set.
        writable[2] = 0xFF;
        writable[6..14].fill(0xFF);
    }
    pci.add_capability(CAP_VENDOR, &body, &writable)
}

/// PCI class of a virtio device type.
fn class_of(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_0000,
        2 | 26 => 0x01_8000,
        3 => 0x07_8000,
        _ => 0xFF_0000,
    }
}

#[cfg(test)]
pub(crate) mod tests;
