//! The host's side of a guest's sockets: the listening socket, and connections that the device
//! process asks for. It names a port and nothing else; the path is the configuration's.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anemone_config::Cid;
use anemone_ipc::device::ToDevice;
use anemone_ipc::{Channel, FdIndex};
use anemone_log::warn_limited;

use crate::error::Error;
use crate::files::{self, Listener};
use crate::spawn::Program;

/// Connections in one go. The guest decides how many are asked for, and each costs this process
/// some 10 microseconds.
const BURST: u32 = 1000;
/// Connections a second after that.
const RATE: u32 = 2000;

/// What a vsock device has on the host.
#[derive(Debug)]
pub struct Dialer {
    cid: Cid,
    path: PathBuf,
    listener: Listener,
    budget: Budget,
}

impl Dialer {
    /// Listens at `path`.
    pub fn open(id: &str, cid: Cid, path: &Path) -> Result<Self, Error> {
        Ok(Self {
            cid,
            path: path.to_owned(),
            listener: files::listen(id, path)?,
            budget: Budget::new(Instant::now()),
        })
    }

    /// Gives the listening socket to a device process that is about to start.
    pub fn pass<'a>(&'a self, program: &mut Program<'a>) {
        program
            .option("--cid", self.cid.get())
            .fd_option("--listen-fd", self.listener.socket.as_fd());
    }

    /// Answers a question of the device process. Connecting does not wait: where a listener does
    /// not keep up, it fails.
    pub fn answer(&mut self, channel: &Channel, id: u64, port: u32) {
        let socket = match self.budget.take(Instant::now()) {
            true => anemone_process::dial(&self.path, port),
            false => Err(std::io::Error::other("too many connections are asked for")),
        };
        if let Err(error) = &socket {
            log::debug!("{}_{port}: {error}", self.path.display());
        }
        let socket = socket.ok();
        let message = ToDevice::Dialed {
            id,
            socket: socket.as_ref().map(|_| FdIndex(0)),
        };
        let fds: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
        // A process that asks faster than it listens is the one that lacks the answer.
        if let Err(error) = channel.send(&message, &fds) {
            warn_limited!("an answer was not taken: {error}");
        }
    }
}

/// So many at once, and so many a second.
#[derive(Debug)]
struct Budget {
    left: u32,
    filled: Instant,
}

impl Budget {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST,
            filled: now,
        }
    }

    /// Takes one, if there is one.
    fn take(&mut self, now: Instant) -> bool {
        let each = Duration::from_secs(1) / RATE;
        let elapsed = now.saturating_duration_since(self.filled);
        let new = elapsed.as_nanos() / each.as_nanos();
        let room = BURST - self.left;
        if new >= u128::from(room) {
            (self.left, self.filled) = (BURST, now);
        } else {
            // Less than the room, so it fits.
            self.left += new as u32;
            self.filled += each * new as u32;
        }
        let any = self.left > 0;
        self.left -= u32::from(any);
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_followed_by_a_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(start);
        let mut taken = |after: Duration| {
            (0..2 * BURST)
                .filter(|_| budget.take(start + after))
                .count() as u32
        };
        assert_eq!(taken(Duration::ZERO), BURST);
        assert_eq!(taken(Duration::from_micros(400)), 0);
        // The first 400 microseconds are not lost.
        assert_eq!(taken(Duration::from_millis(100)), RATE / 10);
        assert_eq!(taken(Duration::from_secs(3600)), BURST);
    }
}
