//! Doorbells, and the bus that looks at them first.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::{PoisonError, RwLock};

use anemone_accel_api::{Bus, Error, EventFd, IoAddress, Result};

/// The doorbells of a VM, by address and the value that they answer to.
#[derive(Default)]
pub(crate) struct Doors(RwLock<HashMap<(IoAddress, Option<u16>), EventFd>>);

impl Doors {
    pub(crate) fn add(
        &self,
        fd: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()> {
        let event = EventFd::duplicate(fd)?;
        let mut doors = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match doors.insert((address, value), event) {
            None => Ok(()),
            Some(_) => Err(Error::Guest(format!("{address:?} had a doorbell already"))),
        }
    }

    pub(crate) fn remove(&self, address: IoAddress, value: Option<u16>) -> Result<()> {
        let mut doors = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match doors.remove(&(address, value)) {
            Some(_) => Ok(()),
            None => Err(Error::Guest(format!("{address:?} has no such doorbell"))),
        }
    }

    /// Rings the doorbell that a write hits, if there is one.
    fn ring(&self, address: IoAddress, data: &[u8]) -> bool {
        let doors = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if doors.is_empty() {
            return false;
        }
        let value = data.try_into().ok().map(u16::from_le_bytes);
        let exact = value.and_then(|v| doors.get(&(address, Some(v))));
        let door = exact.or_else(|| doors.get(&(address, None)));
        door.inspect(|event| event.signal()).is_some()
    }
}

/// The machine with doorbells in front of it, as CPU `cpu` sees it.
pub(crate) struct Outside<'a> {
    pub(crate) cpu: u32,
    pub(crate) doors: &'a Doors,
    pub(crate) bus: &'a dyn Bus,
}

impl Outside<'_> {
    /// Shows an access in the log.
    fn trace(&self, what: &str, address: u64, data: &[u8]) {
        log::trace!(target: "soft::exit", "CPU {}: {what} {address:#x} {data:02x?}", self.cpu);
    }
}

impl Bus for Outside<'_> {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.bus.port_read(port, data);
        self.trace("port read", port.into(), data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.trace("port write", port.into(), data);
        if !self.doors.ring(IoAddress::Port(port), data) {
            self.bus.port_write(port, data);
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.bus.mmio_read(address, data);
        self.trace("read", address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.trace("write", address, data);
        if !self.doors.ring(IoAddress::Mmio(address), data) {
            self.bus.mmio_write(address, data);
        }
    }
}
