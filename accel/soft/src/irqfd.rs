//! Interrupts from event counters: one thread waits for all of them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use anemone_accel_api::{Error, EventFd, MsiMessage, Result, Route};
use anemone_soft_apic::Apics;

use crate::{failed, lock};

/// Counters looked at in one turn of the thread.
const BATCH: usize = 64;
/// What epoll says of [`Irqfds::stop`]; routes are 32 bits.
const STOP: u64 = u64::MAX;

#[derive(Default)]
struct Tables {
    routes: HashMap<Route, MsiMessage>,
    counters: HashMap<Route, EventFd>,
}

/// The event counters of a VM, and what each of them sends.
pub(crate) struct Irqfds {
    apics: Arc<Apics>,
    epoll: OwnedFd,
    stop: EventFd,
    tables: Mutex<Tables>,
}

impl Irqfds {
    pub(crate) fn new(apics: Arc<Apics>) -> Result<Self> {
        // SAFETY: a system call on integers.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(failed("epoll_create1")(io::Error::last_os_error()));
        }
        // SAFETY: the call succeeded; nothing else owns the new descriptor.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let irqfds = Self {
            apics,
            epoll,
            stop: EventFd::new().map_err(failed("eventfd"))?,
            tables: Mutex::default(),
        };
        irqfds.watch(libc::EPOLL_CTL_ADD, irqfds.stop.as_fd(), STOP)?;
        Ok(irqfds)
    }

    /// Begins or ends to wait for a counter. It is reported as long as it is not zero.
    fn watch(&self, operation: libc::c_int, fd: BorrowedFd<'_>, data: u64) -> Result<()> {
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: data,
        };
        let epoll = self.epoll.as_raw_fd();
        // SAFETY: both descriptors are open, and `event` is initialised.
        match unsafe { libc::epoll_ctl(epoll, operation, fd.as_raw_fd(), &raw mut event) } {
            0 => Ok(()),
            _ => Err(failed("epoll_ctl")(io::Error::last_os_error())),
        }
    }

    pub(crate) fn set_route(&self, route: Route, message: Option<MsiMessage>) {
        let routes = &mut lock(&self.tables).routes;
        match message {
            Some(message) => routes.insert(route, message),
            None => routes.remove(&route),
        };
    }

    pub(crate) fn add(&self, fd: BorrowedFd<'_>, route: Route) -> Result<()> {
        let counter = EventFd::duplicate(fd)?;
        let counters = &mut lock(&self.tables).counters;
        if counters.contains_key(&route) {
            return Err(Error::Guest(format!("route {route} has a counter already")));
        }
        self.watch(libc::EPOLL_CTL_ADD, counter.as_fd(), route.into())?;
        counters.insert(route, counter);
        Ok(())
    }

    pub(crate) fn remove(&self, route: Route) -> Result<()> {
        let counters = &mut lock(&self.tables).counters;
        match counters.remove(&route) {
            Some(counter) => self.watch(libc::EPOLL_CTL_DEL, counter.as_fd(), 0),
            None => Err(Error::Guest(format!("route {route} has no counter"))),
        }
    }

    /// Sends what a counter stands for, if it has counted.
    fn raise(&self, route: Route) {
        let tables = lock(&self.tables);
        // It may have been removed since it was reported; its events stay in it then.
        let counted = tables.counters.get(&route).is_some_and(|c| c.take() > 0);
        let message = tables.routes.get(&route).copied();
        drop(tables);
        if let (true, Some(message)) = (counted, message) {
            log::trace!(target: "soft::exit", "route {route}: {message:x?}");
            self.apics.signal_msi(message);
        }
    }

    /// Sends interrupts until [`stop`](Self::stop).
    pub(crate) fn serve(&self) {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        loop {
            // SAFETY: there is room for `BATCH` events.
            let count = unsafe {
                let epoll = self.epoll.as_raw_fd();
                libc::epoll_wait(epoll, events.as_mut_ptr(), BATCH as libc::c_int, -1)
            };
            // Only a signal can interrupt the call; there is no other error here.
            for event in events.iter().take(usize::try_from(count).unwrap_or(0)) {
                let data = event.u64;
                match Route::try_from(data) {
                    Ok(route) => self.raise(route),
                    Err(_) => return,
                }
            }
        }
    }

    /// Ends [`serve`](Self::serve).
    pub(crate) fn stop(&self) {
        self.stop.signal();
    }
}
