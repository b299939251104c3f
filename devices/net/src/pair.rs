//! A queue pair: a receive queue, a transmit queue and their port, served by one thread.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use anemone_device::{Bucket, RingError, Vring};
use anemone_log::warn_limited;

use crate::filter::Filter;
use crate::port::{Port, StreamError};
use crate::rx::Rx;
use crate::tx::Tx;

/// Frames that are passed on in one direction before it is the other's turn.
pub const FRAMES_PER_TURN: usize = 64;
/// How long to wait for more receive buffers than there are.
const PATIENCE_MS: i32 = 10;

/// Why a queue has nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It has.
    More,
    /// The driver has made nothing available; it kicks.
    Buffers,
    /// The port has no frame, or takes none.
    Port,
    /// The rate limit.
    Timer,
    /// It is not started, or its port is of no use.
    Nothing,
    /// The driver has broken the ring.
    Broken,
}

/// Works on a ring and tells the driver. One that it has broken is given up; `Err` is an error of the
/// port, which `work` may leave, too.
pub fn on_ring(
    ring: &mut Vring,
    work: impl FnOnce(&mut Vring, &mut Option<StreamError>) -> Result<Wait, RingError>,
) -> Result<Wait, StreamError> {
    let mut error = None;
    let worked = work(ring, &mut error).and_then(|wait| ring.notify().map(|()| wait));
    let wait = worked.unwrap_or_else(|broken| {
        ring.give_up(&broken);
        Wait::Broken
    });
    match error {
        Some(error) => Err(error),
        None => Ok(wait),
    }
}

/// What the main thread wants of a pair.
#[derive(Debug)]
pub enum Command {
    /// Serve this receive queue.
    StartRx(Vring),
    /// Serve this transmit queue.
    StartTx(Vring),
    /// Stop serving the receive queue.
    StopRx,
    /// Stop serving the transmit queue.
    StopTx,
    /// Another connection of the stream, or none.
    Connection(Option<OwnedFd>),
    /// The queue of the tap has been attached, or will be detached.
    Active(bool),
    /// Another filter.
    Filter(Option<Filter>),
}

/// A queue pair.
pub struct Pair {
    port: Port,
    rx: Rx,
    tx: Tx,
    rx_wait: Wait,
    tx_wait: Wait,
}

impl Pair {
    /// A pair whose queues are not started.
    pub fn new(port: Port, rx: Rx, tx: Tx) -> Self {
        Self {
            port,
            rx,
            tx,
            rx_wait: Wait::More,
            tx_wait: Wait::More,
        }
    }

    /// Does what the main thread wants; for a stop, the index of the next available entry.
    pub fn apply(&mut self, command: Command) -> u16 {
        // Whatever it was, all is looked at again, but a broken ring stays broken until its end.
        let again = |wait: &mut Wait| {
            if *wait != Wait::Broken {
                *wait = Wait::More;
            }
        };
        again(&mut self.rx_wait);
        again(&mut self.tx_wait);
        match command {
            Command::StartRx(ring) => {
                self.rx.start(ring);
                self.rx_wait = Wait::More;
            }
            Command::StartTx(ring) => {
                self.tx.start(ring);
                self.tx_wait = Wait::More;
            }
            Command::StopRx => return self.rx.stop(),
            Command::StopTx => return self.tx.stop(),
            Command::Connection(fd) => {
                if let Port::Stream(stream) = &mut self.port {
                    stream.replace(fd);
                }
            }
            Command::Active(on) => {
                if let Port::Packets { active, .. } = &mut self.port {
                    *active = on;
                }
            }
            Command::Filter(filter) => {
                self.rx.set_filter(filter.clone());
                self.tx.set_filter(filter);
            }
        }
        0
    }

    /// Moves frames until there is nothing to do; true if there is more.
    ///
    /// # Errors
    /// The connection of the stream is of no use any more. It has been given up.
    pub fn turn(&mut self) -> Result<bool, StreamError> {
        let mut result = Ok(());
        if self.tx_wait == Wait::More {
            match self.tx.turn(&mut self.port) {
                Ok(wait) => self.tx_wait = wait,
                Err(error) => result = Err(error),
            }
        }
        if self.rx_wait == Wait::More && result.is_ok() {
            match self.rx.turn(&mut self.port) {
                Ok(wait) => self.rx_wait = wait,
                Err(error) => result = Err(error),
            }
        }
        if let Err(error) = result {
            if let Port::Stream(stream) = &mut self.port {
                stream.replace(None);
            }
            return Err(error);
        }
        Ok(self.rx_wait == Wait::More || self.tx_wait == Wait::More)
    }

    /// Waits until there is something to do, or `wake` is readable; whether it is.
    ///
    /// # Errors
    /// Polling fails.
    pub fn wait(&mut self, wake: BorrowedFd<'_>) -> io::Result<bool> {
        let port = match &self.port {
            Port::Packets {
                fd, active: true, ..
            } => fd.as_raw_fd(),
            Port::Packets { .. } => -1,
            Port::Stream(stream) => stream.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd),
        };
        let kick = |ring: Option<&Vring>| ring.map_or(-1, |ring| ring.kick.as_raw_fd());
        let timer = |bucket: Option<&mut Bucket>| {
            bucket
                .and_then(|b| b.timer().map(|fd| fd.as_raw_fd()))
                .unwrap_or(-1)
        };
        let mut port_events = 0;
        let mut side = |wait, kick, timer, port_event| match wait {
            Wait::Buffers => kick,
            Wait::Timer => timer,
            Wait::Port => {
                port_events |= port_event;
                -1
            }
            _ => -1,
        };
        let rx = side(
            self.rx_wait,
            kick(self.rx.ring()),
            timer(self.rx.bucket()),
            libc::POLLIN,
        );
        let tx = side(
            self.tx_wait,
            kick(self.tx.ring()),
            timer(self.tx.bucket()),
            libc::POLLOUT,
        );
        // A peer that is gone is always ready.
        let watched = if port_events == 0 { -1 } else { port };
        let mut polls = [
            poll(wake.as_raw_fd(), libc::POLLIN),
            poll(rx, libc::POLLIN),
            poll(tx, libc::POLLIN),
            poll(watched, port_events),
        ];
        let timeout = if self.rx_wait == Wait::Buffers && self.rx.is_short() {
            PATIENCE_MS
        } else {
            -1
        };
        // SAFETY: `polls` is an array of pollfd of the length given.
        let n = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
        if n < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::Interrupted => Ok(false),
                _ => Err(error),
            };
        }
        if n == 0 {
            self.rx.make_do();
            self.rx_wait = Wait::More;
        }
        let [wake, rx, tx, port] = polls;
        if rx.revents != 0 {
            self.rx_wait = woken(self.rx_wait, self.rx.ring());
            let _ = self.rx.bucket().map(Bucket::take_timer);
        }
        if tx.revents != 0 {
            self.tx_wait = woken(self.tx_wait, self.tx.ring());
            let _ = self.tx.bucket().map(Bucket::take_timer);
        }
        let gone = libc::POLLHUP | libc::POLLERR;
        if port.revents & (libc::POLLIN | gone) != 0 && self.rx_wait == Wait::Port {
            self.rx_wait = Wait::More;
        }
        if port.revents & (libc::POLLOUT | gone) != 0 && self.tx_wait == Wait::Port {
            self.tx_wait = Wait::More;
        }
        Ok(wake.revents != 0)
    }
}

fn poll(fd: RawFd, events: libc::c_short) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// A kick or a timer has come.
fn woken(wait: Wait, ring: Option<&Vring>) -> Wait {
    match (wait, ring) {
        (Wait::Buffers, Some(ring)) if !ring.clear_kick() => {
            warn_limited!("queue {}: its kick is not an eventfd", ring.index);
            Wait::Broken
        }
        _ => Wait::More,
    }
}
