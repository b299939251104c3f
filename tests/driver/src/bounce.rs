//! The VMM's copying side between driver and back end, as `memory=bounce` has it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anemone_accel_api::EventFd;
use anemone_vhost_user::{Frontend, VringAddr};
use anemone_virtio::{Start, StartQueue};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::{Memory, Queue, Result};

/// Longest wait of the copying thread, in milliseconds: so late it hears that it is over.
const NAP: i32 = 5;

/// What stands between the driver and the back end.
#[derive(Debug, Clone, Copy)]
pub struct Bounced {
    /// virtio device type.
    pub device_type: u16,
    /// Length of the region in bytes.
    pub region: u64,
}

impl Bounced {
    /// As a VM has it by default for a device with so many queues.
    pub fn usual(device_type: u16, queues: u16) -> Self {
        Self {
            device_type,
            region: anemone_config::bounce_region(device_type, queues),
        }
    }
}

/// The copying side, with a thread of its own. It outlives back ends.
#[derive(Debug)]
pub(crate) struct Bounce {
    bounce: Arc<Mutex<anemone_virtio::Bounce>>,
    /// The queues as the back end gets them.
    shadow: Start,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Its number for the kernel.
    pub tid: libc::pid_t,
}

impl Bounce {
    /// Between a driver's queues and the back ends to come.
    pub fn new(
        bounced: Bounced,
        features: u64,
        memory: &Memory,
        queues: &[Queue],
    ) -> io::Result<Self> {
        let Bounced {
            device_type,
            region,
        } = bounced;
        let file = File::from(memory.as_fd().try_clone_to_owned()?);
        let area = (
            GuestAddress(0),
            memory.size() as usize,
            Some(FileOffset::new(file, 0)),
        );
        let ram = GuestMemoryMmap::from_ranges_with_files([area]).map_err(io::Error::other)?;
        let own = Memory::new(region)?.as_fd().try_clone_to_owned()?;
        let count = queues.len() as u16;
        let mut bounce = anemone_virtio::Bounce::new(device_type, count, own, region, ram)
            .map_err(io::Error::other)?;
        let event = |fd: BorrowedFd<'_>| {
            let copy = EventFd::duplicate(fd).map_err(io::Error::other)?;
            io::Result::Ok(Arc::new(copy))
        };
        let started = (0..).zip(queues).map(|(index, queue)| {
            let at = queue.addresses();
            Ok(StartQueue {
                index,
                size: queue.size(),
                descriptors: at.descriptor - Memory::USER_BASE,
                available: at.available - Memory::USER_BASE,
                used: at.used - Memory::USER_BASE,
                kick: event(queue.kick_fd())?,
                call: event(queue.call_fd())?,
            })
        });
        let shadow = bounce.start(&Start {
            features,
            queues: started.collect::<io::Result<_>>()?,
        });
        let bounce = Arc::new(Mutex::new(bounce));
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, tid) = channel();
        let thread = {
            let (bounce, stop) = (Arc::clone(&bounce), Arc::clone(&stop));
            thread::spawn(move || {
                // SAFETY: no pointers.
                let _ = tell.send(unsafe { libc::gettid() });
                copy(&bounce, &stop);
            })
        };
        Ok(Self {
            bounce,
            shadow,
            stop,
            thread: Some(thread),
            tid: tid.recv().map_err(io::Error::other)?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, anemone_virtio::Bounce> {
        self.bounce.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the region to the back end, in place of guest memory.
    pub fn set_mem_table(&self, frontend: &mut Frontend) -> Result<()> {
        let bounce = self.lock();
        Ok(frontend.set_mem_table(&bounce.table().table())?)
    }

    /// Another back end takes over, which tracks what is in flight as the one before (`tracked`), or
    /// does not.
    pub fn resume(&self, tracked: bool) -> io::Result<()> {
        self.lock().resume(tracked).map_err(io::Error::other)
    }

    /// Used index of a shadow ring.
    pub fn used_index(&self, index: u16) -> u16 {
        let queue = &self.shadow.queues[usize::from(index)];
        self.lock().table().used_index(queue.used)
    }

    /// Gives the back end a shadow ring's addresses and notifications.
    pub fn set_vring(&self, frontend: &mut Frontend, index: u16) -> Result<()> {
        let queue = &self.shadow.queues[usize::from(index)];
        let address = VringAddr {
            descriptor: queue.descriptors,
            used: queue.used,
            available: queue.available,
            log: None,
        };
        frontend.set_vring_addr(index, &address)?;
        frontend.set_vring_kick(index, queue.kick.as_fd())?;
        frontend.set_vring_call(index, queue.call.as_fd())?;
        Ok(())
    }

    /// Looks at both sides once, whether anybody has kicked or not.
    pub fn wake(&self, index: u16) {
        let queue = &self.shadow.queues[usize::from(index)];
        queue.kick.signal();
        queue.call.signal();
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of it has been printed.
            let _ = thread.join();
        }
    }
}

/// What a device thread does, until it is over or a ring is broken.
fn copy(bounce: &Mutex<anemone_virtio::Bounce>, stop: &AtomicBool) {
    let lock = || bounce.lock().unwrap_or_else(PoisonError::into_inner);
    while !stop.load(Ordering::Relaxed) {
        let (mut entries, timeout) = {
            let bounce = lock();
            (bounce.poll_entries().collect::<Vec<_>>(), bounce.timeout())
        };
        let timeout = if timeout < 0 { NAP } else { timeout.min(NAP) };
        let count = entries.len() as libc::nfds_t;
        // SAFETY: initialised entries, counted. The bounce keeps the descriptors.
        unsafe { libc::poll(entries.as_mut_ptr(), count, timeout) };
        if let Err(broken) = lock().turn(&entries) {
            println!("the device needs a reset: {broken}");
            return;
        }
    }
}
