//! The function driven through its registers, as a driver would, with the device thread played
//! by the test.

use std::os::fd::BorrowedFd;

use anemone_accel_api::{Error, MemorySlot, MsiMessage, Result, Route, Vcpu};

use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::GuestRam;

/// Remembers what is connected.
#[derive(Default)]
struct Accelerator {
    doorbells: Mutex<Vec<u64>>,
    irqfds: Mutex<Vec<Route>>,
    routes: Mutex<Vec<(Route, Option<MsiMessage>)>>,
}

const NOT_NEEDED: Error = Error::Unsupported {
    accel: "test",
    what: "this",
};

fn mmio(address: IoAddress) -> u64 {
    match address {
        IoAddress::Mmio(a) => a,
        IoAddress::Port(p) => panic!("doorbell at port {p:#x}"),
    }
}

impl Vm for Accelerator {
    fn name(&self) -> &'static str {
        "test"
    }
    unsafe fn map_memory(&self, _: MemorySlot) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn unmap_memory(&self, _: u32) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn dirty_log(&self, _: u32) -> Result<Vec<u64>> {
        Err(NOT_NEEDED)
    }
    fn create_vcpu(&self, _: u32, _: u32) -> Result<Box<dyn Vcpu>> {
        Err(NOT_NEEDED)
    }
    fn add_ioeventfd(&self, _: BorrowedFd<'_>, address: IoAddress, _: Option<u16>) -> Result<()> {
        self.doorbells.lock().unwrap().push(mmio(address));
        Ok(())
    }
    fn remove_ioeventfd(
        &self,
        _: BorrowedFd<'_>,
        address: IoAddress,
        _: Option<u16>,
    ) -> Result<()> {
        let mut doorbells = self.doorbells.lock().unwrap();
        let at = doorbells.iter().position(|a| *a == mmio(address)).unwrap();
        doorbells.remove(at);
        Ok(())
    }
    fn set_msi_route(&self, route: Route, message: Option<MsiMessage>) -> Result<()> {
        self.routes.lock().unwrap().push((route, message));
        Ok(())
    }
    fn add_irqfd(&self, _: BorrowedFd<'_>, route: Route) -> Result<()> {
        self.irqfds.lock().unwrap().push(route);
        Ok(())
    }
    fn remove_irqfd(&self, _: BorrowedFd<'_>, route: Route) -> Result<()> {
        self.irqfds.lock().unwrap().retain(|r| *r != route);
        Ok(())
    }
    fn signal_msi(&self, _: MsiMessage) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn clock(&self) -> Result<u64> {
        Err(NOT_NEEDED)
    }
    fn set_clock(&self, _: u64) -> Result<()> {
        Err(NOT_NEEDED)
    }
}

const BAR_AT: u64 = 0xC010_0000;
pub(crate) const FEATURES: u64 = feature::VERSION_1 | 1 << 29 | 1 << 9;

pub(crate) struct Driver {
    pub(crate) device: VirtioPci,
    accel: Arc<Accelerator>,
    pub(crate) work: Arc<WorkQueue>,
    pub(crate) ram: Arc<GuestRam>,
}

impl Driver {
    pub(crate) fn new() -> Self {
        let accel = Arc::<Accelerator>::default();
        let work = Arc::new(WorkQueue::new().unwrap());
        let memory = EventFd::new()
            .unwrap()
            .as_fd()
            .try_clone_to_owned()
            .unwrap();
        let ram = GuestRam {
            regions: vec![(0, 0x10_0000, memory, 0)],
            mapped: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap(),
        };
        let layout = Layout {
            id: "test".to_owned(),
            device_type: 2,
            bar: BAR_AT,
            first_route: 40,
            queues: 2,
            queue_size: 256,
            // Packed rings and vhost-user's own bit must not reach the guest.
            features: FEATURES | 1 << 34 | 1 << 30,
            config: vec![1, 2, 3, 4, 5, 6, 7, 8],
        };
        let ram = Arc::new(ram);
        let device = VirtioPci::new(layout, accel.clone(), ram.clone(), work.clone()).unwrap();
        device.config_write(4, &[6, 0]);
        Self {
            device,
            accel,
            work,
            ram,
        }
    }

    pub(crate) fn read<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; N];
        self.device.bar_read(0, offset, &mut data);
        data.iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    pub(crate) fn write<const N: usize>(&self, offset: u64, value: u64) {
        self.device.bar_write(0, offset, &value.to_le_bytes()[..N]);
    }

    pub(crate) fn status(&self) -> u8 {
        self.read::<1>(20) as u8
    }

    pub(crate) fn negotiate(&self, features: u64) {
        self.write::<1>(20, 1);
        self.write::<1>(20, 3);
        for half in 0..2 {
            self.write::<4>(8, half);
            self.write::<4>(12, features >> (32 * half));
        }
        self.write::<1>(20, 11);
    }

    pub(crate) fn set_up_queue(&self, index: u64, at: u64) {
        self.write::<2>(22, index);
        self.write::<2>(24, 64);
        self.write::<2>(26, index + 1);
        // Linux writes addresses in halves.
        for (field, address) in [
            (32, at),
            (40, at.wrapping_add(0x1000)),
            (48, at.wrapping_add(0x2000)),
        ] {
            self.write::<4>(field, address);
            self.write::<4>(field + 4, address >> 32);
        }
        self.write::<2>(28, 1);
    }

    fn start(&self) -> Start {
        self.negotiate(FEATURES);
        self.set_up_queue(0, 0x1000);
        self.write::<1>(20, 15);
        self.work.take().start.expect("handed over")
    }
}

#[test]
fn capabilities_describe_the_bar() {
    let d = Driver::new();
    let mut config = [0; 256];
    for offset in (0..256).step_by(4) {
        d.device
            .config_read(offset, &mut config[offset..offset + 4]);
    }
    assert_eq!(config[..4], [0xF4, 0x1A, 0x42, 0x10]);
    assert_eq!(
        (config[8], config[0x2E]),
        (1, 0x42),
        "revision and subsystem of a modern device"
    );
    let (mut found, mut at) = (Vec::new(), usize::from(config[0x34]));
    while at != 0 {
        found.push((
            config[at],
            if config[at] == CAP_VENDOR {
                config[at + 3]
            } else {
                0
            },
        ));
        at = usize::from(config[at + 1]);
    }
    found.sort_unstable();
    assert_eq!(found, [(9, 1), (9, 2), (9, 3), (9, 4), (9, 5), (0x11, 0)]);
}

#[test]
fn only_what_the_transport_can_do_is_offered() {
    let d = Driver::new();
    let low = d.read::<4>(4);
    d.write::<4>(0, 1);
    assert_eq!(d.read::<4>(4) << 32 | low, FEATURES);
    d.write::<4>(0, 2);
    assert_eq!(d.read::<4>(4), 0);
    d.negotiate(FEATURES | 1 << 34);
    assert_eq!(d.status(), 3, "FEATURES_OK is refused");
    d.write::<1>(20, 0);
    d.negotiate(FEATURES & !feature::VERSION_1);
    assert_eq!(d.status(), 3, "a legacy driver is refused");
    d.write::<1>(20, 7);
    assert_eq!(d.status() & 4, 0, "DRIVER_OK needs FEATURES_OK");
}

#[test]
fn set_up_is_latched_at_driver_ok() {
    let d = Driver::new();
    let start = d.start();
    assert_eq!(start.features, FEATURES);
    assert_eq!(start.queues.len(), 1, "the second queue is not enabled");
    let q = &start.queues[0];
    assert_eq!(
        (q.size, q.descriptors, q.available, q.used),
        (64, 0x1000, 0x2000, 0x3000)
    );
    d.write::<8>(32, 0x8000);
    d.write::<2>(24, 8);
    d.write::<4>(12, 0);
    assert_eq!(
        (d.read::<8>(32), d.read::<2>(24)),
        (0x1000, 64),
        "an enabled queue is fixed"
    );
    assert!(d.work.take().start.is_none());
    assert_eq!(d.device.driver(), (15, FEATURES));
}

#[test]
fn doorbells_follow_the_bar_and_the_reset() {
    let d = Driver::new();
    d.write::<2>(NOTIFY, 0);
    assert!(!d.device.kicks[0].is_set(), "no doorbell before DRIVER_OK");
    d.start();
    assert_eq!(*d.accel.doorbells.lock().unwrap(), [BAR_AT + NOTIFY]);
    d.device
        .config_write(0x10, &0x9_0000_0000u64.to_le_bytes()[..4]);
    d.device.config_write(0x14, &[9, 0, 0, 0]);
    assert_eq!(*d.accel.doorbells.lock().unwrap(), [0x9_0000_0000 + NOTIFY]);
    d.write::<2>(NOTIFY, 0);
    assert!(
        d.device.kicks[0].is_set(),
        "an access that the accelerator did not catch"
    );
    d.write::<1>(20, 0);
    assert!(d.accel.doorbells.lock().unwrap().is_empty());
    assert_ne!(d.status(), 0, "the reset waits for the back end");
    assert!(d.work.take().stop);
    d.device.reset_done();
    assert_eq!((d.status(), d.read::<8>(32)), (0, 0));
    d.start();
}

#[test]
fn unusable_rings_fail_the_device_only() {
    for (at, size) in [
        (0xF_F800u64, 64),
        (0x1001, 64),
        (u64::MAX - 0xFFF, 64),
        (0x1000, 0),
    ] {
        let d = Driver::new();
        d.negotiate(FEATURES);
        d.set_up_queue(0, at);
        d.write::<2>(24, size);
        d.write::<1>(20, 15);
        let failed = d.status() & status::NEEDS_RESET != 0;
        assert_eq!(failed, at != 0x1000, "{at:#x}");
        assert_eq!(d.work.take().start.is_some(), !failed);
        d.write::<1>(20, 0);
        if failed {
            assert_eq!(
                d.status(),
                0,
                "a reset needs no back end that was never started"
            );
        }
    }
}

#[test]
fn vectors_connect_when_unmasked_and_keep_what_came_while_masked() {
    let d = Driver::new();
    let table = |vector: u64| MSIX_TABLE + vector * 16;
    d.write::<8>(table(1), 0xFEE0_1000);
    d.write::<4>(table(1) + 8, 0x41);
    d.write::<4>(table(1) + 12, 0);
    assert!(d.accel.irqfds.lock().unwrap().is_empty(), "MSI-X is off");
    let start = d.start();
    start.queues[0].call.signal();
    assert_eq!(d.read::<8>(MSIX_PENDING), 0b10);
    let capability = (0..64)
        .map(|i| i * 4)
        .find(|at| {
            let mut id = [0; 1];
            d.device.config_read(*at, &mut id);
            *at >= 0x40 && id[0] == 0x11
        })
        .unwrap();
    d.device.config_write(capability + 2, &[0, 0x80]);
    assert_eq!(*d.accel.irqfds.lock().unwrap(), [41]);
    let message = MsiMessage {
        address: 0xFEE0_1000,
        data: 0x41,
    };
    assert_eq!(*d.accel.routes.lock().unwrap(), [(41, Some(message))]);
    assert_eq!(d.read::<8>(MSIX_PENDING), 0);
    d.write::<4>(table(1) + 12, 1);
    assert!(d.accel.irqfds.lock().unwrap().is_empty());
    d.write::<2>(22, 0);
    d.write::<2>(26, 2);
    assert!(
        d.work.take().calls.contains_key(&0),
        "the queue's interrupt moved"
    );
    d.write::<2>(26, 3);
    assert_eq!(d.read::<2>(26), 0xFFFF, "there is no such vector");
}

#[test]
fn configuration_goes_both_ways() {
    let d = Driver::new();
    d.start();
    assert_eq!(d.read::<8>(DEVICE), 0x0807_0605_0403_0201);
    assert_eq!(d.read::<8>(DEVICE + 6), 0x0807);
    d.write::<1>(DEVICE + 2, 0xAA);
    d.write::<8>(DEVICE + 6, u64::MAX);
    let config = d.work.take().config;
    assert_eq!(
        config.into_iter().collect::<Vec<_>>(),
        [(2, 0xAA), (6, 0xFF), (7, 0xFF)]
    );
    let generation = d.read::<1>(21);
    d.write::<2>(16, 0);
    d.device.config_changed(&[9; 8]);
    assert_ne!(d.read::<1>(21), generation);
    assert_eq!(d.read::<1>(DEVICE + 7), 9);
    let r = d.device.lock();
    assert!(r.msix.event(0).unwrap().is_set());
}

#[test]
fn configuration_access_capability_reaches_the_bar() {
    let d = Driver::new();
    let cap = d.device.lock().window_cap;
    d.device
        .config_write(cap + 8, &(DEVICE as u32).to_le_bytes());
    d.device.config_write(cap + 12, &2u32.to_le_bytes());
    let mut data = [0; 4];
    d.device.config_read(cap + 16, &mut data);
    assert_eq!(data[..2], [1, 2]);
    d.device.config_write(cap + 8, &20u32.to_le_bytes());
    d.device.config_write(cap + 12, &1u32.to_le_bytes());
    d.device.config_write(cap + 16, &[1]);
    assert_eq!(d.status(), 1);
    d.device.config_write(cap + 8, &u32::MAX.to_le_bytes());
    d.device.config_write(cap + 16, &[1, 2, 3, 4]);
    d.device.config_read(cap + 16, &mut data);
}

#[test]
fn no_access_of_any_width_anywhere_panics() {
    let d = Driver::new();
    for offset in 0..BAR_SIZE - 8 {
        for width in [1, 2, 4, 8] {
            let mut data = [0xFF; 8];
            d.device.bar_read(0, offset, &mut data[..width]);
            d.device.bar_write(0, offset, &[0xA5; 8][..width]);
        }
    }
    for offset in 0..256 {
        d.device.config_write(offset, &[0xFF]);
    }
}
