//! What the registers and the supervisor ask of the device thread. The guest can ask as often as
//! it likes, also while no back end is there; later requests replace earlier ones, so the amount
//! that waits is bounded.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anemone_accel_api::EventFd;

/// One virtqueue as the driver has set it up. Addresses are guest-physical.
#[derive(Debug, Clone)]
pub struct StartQueue {
    /// Number of the queue.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Descriptor area.
    pub descriptors: u64,
    /// Driver area (available ring).
    pub available: u64,
    /// Device area (used ring).
    pub used: u64,
    /// The doorbell.
    pub kick: Arc<EventFd>,
    /// The interrupt.
    pub call: Arc<EventFd>,
}

/// A driver's set-up, latched at DRIVER_OK.
#[derive(Debug, Clone)]
pub struct Start {
    /// Features the driver has accepted.
    pub features: u64,
    /// The queues it has enabled.
    pub queues: Vec<StartQueue>,
}

/// A connection to a back end that takes the place of the one before.
#[derive(Debug)]
pub struct Reconnect {
    /// Number of the connection; the first one of a device is 0.
    pub connection: u32,
    /// Its vhost-user stream socket.
    pub socket: UnixStream,
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub struct Work {
    /// Go on with this back end.
    pub reconnect: Option<Reconnect>,
    /// Stop all queues, then report the reset as done.
    pub stop: bool,
    /// Start the device.
    pub start: Option<Start>,
    /// Queues whose interrupt goes to another vector now.
    pub calls: BTreeMap<u16, Arc<EventFd>>,
    /// Configuration bytes the driver has written, by offset.
    pub config: BTreeMap<u16, u8>,
}

/// The work of one device, and the event that wakes its thread.
#[derive(Debug)]
pub struct WorkQueue {
    work: Mutex<Work>,
    wake: EventFd,
}

impl Work {
    /// Adds what was asked later.
    pub(crate) fn extend(&mut self, later: Self) {
        if later.stop {
            *self = later;
            return;
        }
        if later.start.is_some() {
            self.start = later.start;
        }
        self.calls.extend(later.calls);
        self.config.extend(later.config);
    }
}

impl WorkQueue {
    /// Nothing to do.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            work: Mutex::default(),
            wake: EventFd::new()?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, change: impl FnOnce(&mut Work)) {
        change(&mut self.lock());
        self.wake.signal();
    }

    pub(crate) fn start(&self, start: Start) {
        self.add(|w| w.start = Some(start));
    }

    /// A reset drops everything that the driver has asked before it.
    pub(crate) fn stop(&self) {
        self.add(|w| {
            *w = Work {
                reconnect: w.reconnect.take(),
                stop: true,
                ..Work::default()
            }
        });
    }

    /// Has the device go on with another back end. The caller has made sure that the one before
    /// touches guest memory no more.
    pub fn reconnect(&self, reconnect: Reconnect) {
        self.add(|w| w.reconnect = Some(reconnect));
    }

    pub(crate) fn set_call(&self, index: u16, call: Arc<EventFd>) {
        self.add(|w| drop(w.calls.insert(index, call)));
    }

    pub(crate) fn write_config(&self, offset: u16, data: &[u8]) {
        self.add(|w| w.config.extend((offset..).zip(data.iter().copied())));
    }

    /// Takes all that is to be done.
    pub fn take(&self) -> Work {
        self.wake.take();
        std::mem::take(&mut self.lock())
    }
}

impl AsFd for WorkQueue {
    /// Readable when there is something to do.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
