//! The memory balloon device (virtio 1.3, 5.5).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anemone_device::{BalloonState, Chain, Device, Host, RingError, Timer, Vring, Watch};
use anemone_log::warn_limited;
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::saved::{PAGE, Saved};
use crate::{pages, statistics};

/// Features (virtio 1.3, 5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
/// Where the driver's field begins in the configuration space.
const ACTUAL: usize = 4;
/// Chains served in one go, so that a busy guest does not keep the main loop.
const CHAINS_PER_TURN: usize = 32;

/// The token of the timer; that of a kick is the number of its queue.
const TIMER: u64 = u64::MAX;
/// Under which the supervisor keeps the sizes.
const SIZES: u64 = 0;

/// What the device is told on its command line.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Size at first, in bytes.
    pub target: u64,
    /// The guest may deflate the balloon itself when it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest reports free pages.
    pub reporting: bool,
    /// Time from one question for statistics to the next.
    pub interval: Option<Duration>,
}

/// What a queue carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

struct Queue {
    ring: Vring,
    role: Role,
    /// The driver has broken the ring.
    broken: bool,
    /// The driver's statistics buffer. The device keeps it until it wants new ones.
    held: Option<u16>,
}

/// The device. Which pages are in the balloon is for the guest alone to know: each of them can be
/// freed twice without harm, and a page that the guest uses again comes back as zeroes.
pub struct Balloon {
    saved: Saved,
    /// The supervisor has the file of the sizes. Not before one of them changes: what an earlier
    /// process has had kept comes only after the start, and must not be replaced before.
    kept: bool,
    features: u64,
    queues: Vec<Option<Queue>>,
    statistics: Vec<(u16, u64)>,
    /// The supervisor waits for the state, with the next statistics in it.
    asked: bool,
    interval: Option<(Duration, Timer)>,
    host: Option<Host>,
}

impl Balloon {
    /// An empty balloon.
    ///
    /// # Errors
    /// There is no memory or no descriptor left.
    pub fn new(settings: &Settings) -> io::Result<Self> {
        let flag = |on, feature| if on { feature } else { 0 };
        let interval = match settings.interval {
            Some(interval) => {
                let mut timer = Timer::new()?;
                timer.set(interval)?;
                Some((interval, timer))
            }
            None => None,
        };
        let count = 3 + usize::from(settings.reporting);
        Ok(Self {
            saved: Saved::new(in_pages(settings.target))?,
            kept: false,
            features: F_STATS_VQ
                | flag(settings.deflate_on_oom, F_DEFLATE_ON_OOM)
                | flag(settings.reporting, F_REPORTING),
            queues: (0..count).map(|_| None).collect(),
            statistics: Vec::new(),
            asked: false,
            interval,
            host: None,
        })
    }

    fn serve(&mut self, index: usize) {
        let Some(queue) = self.queues.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        match queue.serve() {
            Ok(Some(statistics)) => {
                self.statistics = statistics;
                if self.asked {
                    self.answer();
                }
            }
            Ok(None) => {}
            Err(error) => queue.give_up(&error),
        }
    }

    fn keep(&mut self) {
        if let (false, Some(host)) = (self.kept, &self.host) {
            match host.keep(SIZES, self.saved.as_fd()) {
                Ok(()) => self.kept = true,
                Err(error) => warn_limited!("the size of the balloon is not kept: {error}"),
            }
        }
    }

    /// Has the driver fill its statistics buffer again. The supervisor gets what is known already if
    /// there is none.
    fn ask(&mut self) {
        self.asked = true;
        let mut queues = self.queues.iter_mut().flatten();
        let Some(queue) = queues.find(|queue| queue.held.is_some() && !queue.broken) else {
            return self.answer();
        };
        if let Err(error) = queue.return_held() {
            queue.give_up(&error);
            self.answer();
        }
    }

    fn answer(&mut self) {
        self.asked = false;
        if let Some(host) = &self.host {
            host.balloon(BalloonState {
                target: self.saved.target(),
                actual: self.saved.actual(),
                statistics: self.statistics.clone(),
            });
        }
    }
}

/// Whole pages of so many bytes.
fn in_pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE).unwrap_or(u32::MAX)
}

/// What queue number `index` carries for a driver that has accepted these features: those of features
/// that it has not accepted do not count (virtio 1.3, 5.5.2, as drivers read it).
fn role(index: usize, features: u64) -> Option<Role> {
    let roles = [
        (Role::Inflate, true),
        (Role::Deflate, true),
        (Role::Statistics, features & F_STATS_VQ != 0),
        (Role::Reporting, features & F_REPORTING != 0),
    ];
    let mut present = roles.into_iter().filter(|(_, present)| *present);
    present.nth(index).map(|(role, _)| role)
}

impl Device for Balloon {
    fn features(&self) -> u64 {
        self.features
    }

    fn queue_count(&self) -> usize {
        self.queues.len()
    }

    fn config(&self) -> Vec<u8> {
        self.saved.bytes().to_vec()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let mut bytes = self.saved.bytes();
        // The target is not the driver's to set.
        for (at, &byte) in (offset..).zip(data).filter(|(at, _)| *at >= ACTUAL) {
            if let Some(to) = bytes.get_mut(at) {
                *to = byte;
            }
        }
        let [.., a, b, c, d] = bytes;
        self.saved.set_actual(u32::from_le_bytes([a, b, c, d]));
        self.keep();
    }

    fn start_queue(&mut self, ring: Vring) -> io::Result<()> {
        let role = role(ring.index, ring.features).ok_or_else(|| {
            io::Error::other("it belongs to no feature that the driver has accepted")
        })?;
        if let Some(place) = self.queues.get_mut(ring.index) {
            *place = Some(Queue {
                ring,
                role,
                broken: false,
                held: None,
            });
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> u16 {
        let Some(mut queue) = self.queues.get_mut(index).and_then(Option::take) else {
            return 0;
        };
        // The buffer is the driver's again when the queue goes on.
        if queue.held.is_some() && !queue.ring.is_tracked() {
            queue.ring.put_back(1);
        }
        virtio_queue::QueueT::next_avail(&queue.ring.queue)
    }

    fn reset(&mut self) {
        // The next driver finds an empty balloon.
        if self.saved.actual() != 0 {
            self.saved.set_actual(0);
        }
        // Nobody is there to fill a buffer.
        if self.asked {
            self.answer();
        }
    }

    fn event_fds(&self) -> Vec<Watch<'_>> {
        let timer = self.interval.as_ref().and_then(|(_, timer)| timer.watch());
        let queues = self.queues.iter().flatten().filter(|queue| !queue.broken);
        queues
            .map(|queue| (queue.ring.kick.as_fd(), queue.ring.index as u64))
            .chain(timer.map(|fd| (fd, TIMER)))
            .collect()
    }

    fn handle_event(&mut self, token: u64) {
        if token != TIMER {
            return self.serve(token as usize);
        }
        if let Some((interval, timer)) = &mut self.interval
            && timer.expired()
        {
            if let Err(error) = timer.set(*interval) {
                log::error!("the timer does not start: {error}");
            }
            self.ask();
        }
    }

    fn attach(&mut self, host: &Host) {
        self.host = Some(host.clone());
    }

    fn restore(&mut self, key: u64, fd: OwnedFd) {
        let adopted = match key {
            SIZES => self.saved.adopt(fd),
            _ => Err(io::Error::other("nothing is kept under this key")),
        };
        match adopted {
            Ok(()) => self.kept = true,
            Err(error) => log::warn!("what was kept under {key}: {error}"),
        }
    }

    fn balloon(&mut self, target: Option<u64>) {
        if let Some(pages) = target.map(in_pages)
            && u64::from(pages) * PAGE != self.saved.target()
        {
            self.saved.set_target(pages);
            self.keep();
            if let Some(host) = &self.host {
                host.config_changed();
            }
        }
        self.ask();
    }
}

impl Queue {
    fn give_up(&mut self, error: &RingError) {
        self.ring.give_up(error);
        self.broken = true;
    }

    /// Takes what the driver has made available; the statistics, if there are new ones.
    fn serve(&mut self) -> Result<Option<Vec<(u16, u64)>>, RingError> {
        if !self.ring.clear_kick() {
            self.broken = true;
            return Ok(None);
        }
        let memory = Arc::clone(&self.ring.memory);
        let mut statistics = None;
        for _ in 0..CHAINS_PER_TURN {
            let Some(chain) = self.ring.pop()? else {
                self.ring.notify()?;
                if self.ring.enable_kicks()? {
                    continue;
                }
                return Ok(statistics);
            };
            let head = chain.head_index();
            match self.role {
                Role::Inflate => inflate(&memory, chain),
                Role::Reporting => report(&memory, chain),
                // A page that the guest uses again is there when it is touched.
                Role::Deflate => {}
                Role::Statistics => {
                    let bytes = read(&memory, chain, statistics::MOST_BYTES);
                    statistics = Some(statistics::parse(&bytes));
                    // There should be only one buffer; of several the last one is kept.
                    if let Some(other) = self.held.replace(head) {
                        self.ring.push_used(other, 0)?;
                    }
                    continue;
                }
            }
            self.ring.push_used(head, 0)?;
        }
        self.ring.notify()?;
        self.ring.kick_again();
        Ok(statistics)
    }

    fn return_held(&mut self) -> Result<(), RingError> {
        if let Some(head) = self.held.take() {
            self.ring.push_used(head, 0)?;
            self.ring.notify()?;
        }
        Ok(())
    }
}

/// Frees the pages whose numbers the driver sends.
fn inflate(memory: &GuestMemoryMmap, chain: Chain) {
    let bytes = read(memory, chain, 4 * pages::MOST_NUMBERS);
    let mut numbers: Vec<u32> = bytes
        .chunks_exact(4)
        .map(|n| u32::from_le_bytes([n[0], n[1], n[2], n[3]]))
        .collect();
    for (start, length) in pages::ranges(&mut numbers) {
        pages::free(memory, start, length);
    }
}

/// Frees the memory that the driver reports as free: the buffers themselves.
fn report(memory: &GuestMemoryMmap, chain: Chain) {
    for buffer in chain.writable() {
        pages::free(memory, buffer.addr().0, buffer.len().into());
    }
}

/// Up to `most` bytes of the driver's buffers.
fn read(memory: &GuestMemoryMmap, chain: Chain, most: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for buffer in chain.readable() {
        let start = bytes.len();
        let length = (buffer.len() as usize).min(most - start);
        bytes.resize(start + length, 0);
        if let Err(error) = memory.read_slice(&mut bytes[start..], buffer.addr()) {
            warn_limited!("a buffer of the driver is not in guest memory: {error}");
            bytes.truncate(start);
            break;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_numbered_by_what_the_driver_has_accepted() {
        let all = F_STATS_VQ | F_REPORTING;
        assert_eq!(role(0, 0), Some(Role::Inflate));
        assert_eq!(role(1, 0), Some(Role::Deflate));
        assert_eq!(role(2, all), Some(Role::Statistics));
        assert_eq!(role(3, all), Some(Role::Reporting));
        assert_eq!(role(2, F_REPORTING), Some(Role::Reporting));
        assert_eq!(role(3, F_REPORTING), None);
        assert_eq!(role(2, 0), None);
        assert_eq!(role(3, F_STATS_VQ), None);
    }
}
