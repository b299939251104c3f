//! The accelerator without a CPU: a program on the other end of a socket makes the accesses.
//!
//! It serves tests, fuzzing and measurements of the machine itself. One line is one request, one
//! line the answer, `ok …` or `error …`. Numbers are decimal or `0x…`; memory is hexadecimal.
//!
//! | request | answer |
//! |---|---|
//! | `in PORT WIDTH` | `ok VALUE` |
//! | `out PORT WIDTH VALUE` | `ok` |
//! | `read ADDRESS WIDTH` | `ok VALUE`, from RAM or the bus |
//! | `write ADDRESS WIDTH VALUE` | `ok` |
//! | `load ADDRESS LENGTH` | `ok HEX`, RAM only, at most 64 KiB |
//! | `store ADDRESS HEX` | `ok`, RAM only |
//! | `interrupts` | `ok` and `ADDRESS:DATA:COUNT` for each message raised since the last time |
//!
//! WIDTH is 1, 2, 4 or 8 bytes (ports: not 8). Doorbells registered by the machine are rung by
//! writes to them, as under any accelerator. The VM ends when the driver closes the socket.

mod command;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anemone_accel_api::{
    Bus, Error, EventFd, IoAddress, MemorySlot, MsiMessage, Regs, Result, Route, Sregs, Stop, Vcpu,
    VcpuKick, VcpuState, Vm,
};
use command::Command;

const NAME: &str = "none";

/// An operation that has no meaning without a CPU.
fn unsupported(what: &'static str) -> Error {
    Error::Unsupported { accel: NAME, what }
}

#[derive(Default)]
struct State {
    slots: Vec<MemorySlot>,
    doorbells: Vec<(IoAddress, Option<u16>, EventFd)>,
    routes: BTreeMap<Route, MsiMessage>,
    irqfds: BTreeMap<Route, EventFd>,
    /// Messages sent since the driver last asked, with their number.
    sent: BTreeMap<(u64, u32), u64>,
}

/// A virtual machine without a CPU.
pub struct NoneVm {
    state: Arc<Shared>,
    /// The driver's socket, until vCPU 0 takes it.
    driver: Mutex<Option<UnixStream>>,
    started: Instant,
}

struct Shared(Mutex<State>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NoneVm {
    /// A machine driven through `driver`; without one it can be built but does not run.
    pub fn new(driver: Option<UnixStream>) -> Self {
        Self {
            state: Arc::new(Shared(Mutex::default())),
            driver: driver.into(),
            started: Instant::now(),
        }
    }
}

impl Vm for NoneVm {
    fn name(&self) -> &'static str {
        NAME
    }

    unsafe fn map_memory(&self, slot: MemorySlot) -> Result<()> {
        self.state.lock().slots.push(slot);
        Ok(())
    }

    fn unmap_memory(&self, slot: u32) -> Result<()> {
        self.state.lock().slots.retain(|s| s.slot != slot);
        Ok(())
    }

    fn dirty_log(&self, _: u32) -> Result<Vec<u64>> {
        Err(unsupported("dirty tracking"))
    }

    fn create_vcpu(&self, index: u32, _: u32) -> Result<Box<dyn Vcpu>> {
        let driver = match index {
            0 => self
                .driver
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
            _ => None,
        };
        let kick = EventFd::new().map_err(|source| Error::Os {
            what: "eventfd",
            source,
        })?;
        Ok(Box::new(NoneVcpu {
            state: self.state.clone(),
            driver: driver.map(BufReader::new),
            kick: Arc::new(kick),
        }))
    }

    fn add_ioeventfd(
        &self,
        fd: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()> {
        let event = EventFd::duplicate(fd)?;
        self.state.lock().doorbells.push((address, value, event));
        Ok(())
    }

    fn remove_ioeventfd(
        &self,
        _: BorrowedFd<'_>,
        address: IoAddress,
        value: Option<u16>,
    ) -> Result<()> {
        self.state
            .lock()
            .doorbells
            .retain(|(a, v, _)| (*a, *v) != (address, value));
        Ok(())
    }

    fn set_msi_route(&self, route: Route, message: Option<MsiMessage>) -> Result<()> {
        let mut state = self.state.lock();
        match message {
            Some(m) => drop(state.routes.insert(route, m)),
            None => drop(state.routes.remove(&route)),
        }
        Ok(())
    }

    fn add_irqfd(&self, fd: BorrowedFd<'_>, route: Route) -> Result<()> {
        let event = EventFd::duplicate(fd)?;
        self.state.lock().irqfds.insert(route, event);
        Ok(())
    }

    fn remove_irqfd(&self, _: BorrowedFd<'_>, route: Route) -> Result<()> {
        self.state.lock().irqfds.remove(&route);
        Ok(())
    }

    fn signal_msi(&self, message: MsiMessage) -> Result<()> {
        *self
            .state
            .lock()
            .sent
            .entry((message.address, message.data))
            .or_default() += 1;
        Ok(())
    }

    fn clock(&self) -> Result<u64> {
        Ok(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn set_clock(&self, _: u64) -> Result<()> {
        Err(unsupported("setting the clock"))
    }
}

struct NoneVcpu {
    state: Arc<Shared>,
    driver: Option<BufReader<UnixStream>>,
    kick: Arc<EventFd>,
}

struct NoneKick(Arc<EventFd>);

impl VcpuKick for NoneKick {
    fn kick(&self) {
        self.0.signal();
    }
}

impl NoneVcpu {
    /// Waits for a kick or, if there is a driver, for its next bytes. `true` means kicked.
    fn wait(&self) -> bool {
        let driver = self.driver.as_ref().map_or(-1, |d| d.get_ref().as_raw_fd());
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut poll = [entry(self.kick.as_fd().as_raw_fd()), entry(driver)];
        // SAFETY: two initialised entries; a negative descriptor is skipped.
        unsafe { libc::poll(poll.as_mut_ptr(), 2, -1) };
        self.kick.take() > 0
    }
}

impl Vcpu for NoneVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Stop> {
        loop {
            let buffered = self.driver.as_ref().is_some_and(|d| !d.buffer().is_empty());
            if !buffered && self.wait() {
                return Ok(Stop::Kicked);
            }
            let Some(driver) = &mut self.driver else {
                continue;
            };
            let mut line = Vec::new();
            // A line holds at most a `store` of 64 KiB.
            let read = std::io::Read::take(&mut *driver, MAX_LINE).read_until(b'\n', &mut line);
            match read {
                Ok(0) => return Ok(Stop::Ended),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Ok(Stop::Ended),
            }
            let text = String::from_utf8_lossy(&line);
            let answer = match text
                .parse()
                .and_then(|command| self.state.execute(command, bus))
            {
                Ok(values) if values.is_empty() => "ok\n".to_owned(),
                Ok(values) => format!("ok {values}\n"),
                Err(why) => format!("error {why}\n"),
            };
            if let Some(driver) = &mut self.driver
                && driver.get_mut().write_all(answer.as_bytes()).is_err()
            {
                return Ok(Stop::Ended);
            }
        }
    }

    fn kicker(&mut self) -> Box<dyn VcpuKick> {
        Box::new(NoneKick(self.kick.clone()))
    }

    fn state(&self) -> Result<VcpuState> {
        Err(unsupported("CPU state"))
    }

    fn set_registers(&mut self, _: &Regs, _: &Sregs) -> Result<()> {
        // There is no CPU to start anywhere; a machine may be built all the same.
        Ok(())
    }

    fn set_state(&mut self, _: &VcpuState) -> Result<()> {
        Err(unsupported("CPU state"))
    }
}

/// Longest request in bytes.
const MAX_LINE: u64 = 3 * 64 * 1024;

impl Shared {
    /// Carries out a request; the answer follows the `ok`.
    fn execute(&self, command: Command, bus: &dyn Bus) -> std::result::Result<String, String> {
        let number = |data: &[u8]| {
            let value = data
                .iter()
                .rev()
                .fold(0u64, |v, byte| v << 8 | u64::from(*byte));
            format!("{value:#x}")
        };
        match command {
            Command::In { port, width } => {
                let mut data = vec![0; width];
                bus.port_read(port, &mut data);
                Ok(number(&data))
            }
            Command::Out { port, data } => {
                if !self.ring(IoAddress::Port(port), &data) {
                    bus.port_write(port, &data);
                }
                Ok(String::new())
            }
            Command::Read { address, width } => {
                let mut data = vec![0; width];
                if !self.ram(address, width, false, |ram| copy_out(ram, &mut data)) {
                    bus.mmio_read(address, &mut data);
                }
                Ok(number(&data))
            }
            Command::Write { address, data } => {
                let is_ram = self.ram(address, data.len(), true, |ram| copy_in(ram, &data));
                if !is_ram && !self.ring(IoAddress::Mmio(address), &data) {
                    bus.mmio_write(address, &data);
                }
                Ok(String::new())
            }
            Command::Load { address, length } => {
                let mut data = vec![0; length];
                if !self.ram(address, length, false, |ram| copy_out(ram, &mut data)) {
                    return Err(format!("{address:#x}: not {length} bytes of RAM"));
                }
                Ok(data.iter().map(|byte| format!("{byte:02x}")).collect())
            }
            Command::Store { address, data } => {
                if !self.ram(address, data.len(), true, |ram| copy_in(ram, &data)) {
                    return Err(format!("{address:#x}: not {} bytes of RAM", data.len()));
                }
                Ok(String::new())
            }
            Command::Interrupts => {
                let mut state = self.lock();
                let mut sent = std::mem::take(&mut state.sent);
                for (route, event) in &state.irqfds {
                    let count = event.take();
                    if let (Some(m), 1..) = (state.routes.get(route), count) {
                        *sent.entry((m.address, m.data)).or_default() += count;
                    }
                }
                let list = sent.iter().map(|((a, d), n)| format!("{a:#x}:{d:#x}:{n}"));
                Ok(list.collect::<Vec<_>>().join(" "))
            }
        }
    }

    /// Rings the doorbell at this place, if there is one.
    fn ring(&self, place: IoAddress, data: &[u8]) -> bool {
        let matches = |value: &Option<u16>| match value {
            Some(v) => data == v.to_le_bytes(),
            None => true,
        };
        let state = self.lock();
        let bell = state
            .doorbells
            .iter()
            .find(|(at, value, _)| *at == place && matches(value));
        bell.inspect(|(_, _, event)| event.signal()).is_some()
    }

    /// Gives `access` the host address of guest RAM; `false` if the range is not RAM, or not RAM
    /// that can be written where it is to be.
    fn ram(&self, address: u64, length: usize, write: bool, access: impl FnOnce(*mut u8)) -> bool {
        let state = self.lock();
        let slot = state.slots.iter().find_map(|s| {
            let at = address.checked_sub(s.guest)?;
            if write && s.read_only {
                return None;
            }
            (at < s.size && s.size - at >= length as u64).then_some((s.host, at as usize))
        });
        // The lock is held meanwhile: the slot cannot be unmapped.
        slot.is_some_and(|(host, at)| {
            // SAFETY: the offset lies inside the slot, which `map_memory`'s caller vouches for.
            access(unsafe { host.add(at) });
            true
        })
    }
}

fn copy_out(ram: *mut u8, data: &mut [u8]) {
    // SAFETY: `ram` has room for `data` (checked by the caller); the memory is shared with device
    // processes, so it is read as raw bytes, never borrowed.
    unsafe { std::ptr::copy_nonoverlapping(ram, data.as_mut_ptr(), data.len()) };
}

fn copy_in(ram: *mut u8, data: &[u8]) {
    // SAFETY: as in `copy_out`.
    unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), ram, data.len()) };
}

#[cfg(test)]
mod tests;
