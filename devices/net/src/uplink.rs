//! The way to passt: asks its keeper for connections, again and again until there is one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anemone_device::Timer;
use anemone_ipc::keeper::{FromKeeper, ToKeeper};
use anemone_ipc::{Channel, Error};
use anemone_log::warn_limited;

/// Pauses between two questions.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));
/// A connection that lasts so long was a good one.
const GOOD: Duration = Duration::from_secs(1);
/// Without a connection for so long, the link is down.
const DOWN_AFTER: Duration = Duration::from_secs(1);

/// Whether there is a connection, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Connected(Instant),
    Asked(Instant),
    Pausing(Instant),
    /// The keeper is gone.
    Lost,
}

/// The keeper, seen from the device.
#[derive(Debug)]
pub struct Uplink {
    keeper: Channel,
    state: State,
    pause: Duration,
    timer: Timer,
}

impl Uplink {
    /// Takes over a channel to the keeper, of which an earlier process may have left something
    /// unread, and asks for a connection.
    pub fn new(keeper: OwnedFd) -> io::Result<Self> {
        let keeper = Channel::new(keeper);
        keeper.set_nonblocking(true)?;
        let mut uplink = Self {
            keeper,
            state: State::Pausing(Instant::now()),
            pause: PAUSES.0,
            timer: Timer::new()?,
        };
        while uplink.keeper.recv::<FromKeeper>().is_ok() {}
        uplink.ask();
        Ok(uplink)
    }

    /// The channel, readable when the keeper answers.
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        (self.state != State::Lost).then(|| self.keeper.as_fd())
    }

    /// The timer of a pause.
    pub fn timer(&self) -> Option<BorrowedFd<'_>> {
        self.timer.watch()
    }

    /// Whether the guest should see a link.
    pub fn is_up(&self) -> bool {
        match self.state {
            State::Connected(_) => true,
            State::Asked(since) | State::Pausing(since) => since.elapsed() < DOWN_AFTER,
            State::Lost => false,
        }
    }

    /// The connection has failed.
    pub fn failed(&mut self) {
        if let State::Connected(since) = self.state {
            if since.elapsed() > GOOD {
                self.pause = PAUSES.0;
            }
            self.state = State::Asked(Instant::now());
            self.rest();
        }
    }

    /// The timer has run out, perhaps.
    pub fn timer_event(&mut self) {
        if self.timer.expired() && matches!(self.state, State::Pausing(_)) {
            self.ask();
        }
    }

    /// The keeper has answered, perhaps: the new connection.
    pub fn channel_event(&mut self) -> Option<OwnedFd> {
        let since = match self.state {
            State::Asked(since) | State::Pausing(since) => since,
            State::Connected(_) | State::Lost => Instant::now(),
        };
        let mut received = match self.keeper.recv::<FromKeeper>() {
            Ok(received) => received,
            Err(error) if error.is_would_block() => return None,
            Err(error) => {
                log::error!("no connection to passt any more, its keeper is gone: {error}");
                self.state = State::Lost;
                return None;
            }
        };
        if !matches!(self.state, State::Asked(_)) {
            // An answer to somebody else's question; what it holds is closed.
            return None;
        }
        match received.message {
            FromKeeper::Connected { socket } => match received.take(socket) {
                Ok(socket) => {
                    self.state = State::Connected(Instant::now());
                    return Some(socket);
                }
                Err(error) => warn_limited!("the keeper of passt makes no sense: {error}"),
            },
            FromKeeper::Unavailable { message } => {
                warn_limited!("passt cannot be reached: {message}");
            }
        }
        self.state = State::Asked(since);
        self.rest();
        None
    }

    fn ask(&mut self) {
        let since = match self.state {
            State::Asked(since) | State::Pausing(since) => since,
            State::Connected(_) | State::Lost => Instant::now(),
        };
        self.state = State::Asked(since);
        match self.keeper.send(&ToKeeper::Connect, &[]) {
            Ok(()) => {}
            Err(Error::Closed) => self.state = State::Lost,
            Err(error) => {
                warn_limited!("the keeper of passt was not asked: {error}");
                self.rest();
            }
        }
    }

    /// Asks again after a pause, each longer than the one before.
    fn rest(&mut self) {
        if let State::Asked(since) = self.state {
            self.state = State::Pausing(since);
        }
        if let Err(error) = self.timer.set(self.pause) {
            log::error!("the timer does not start: {error}");
        }
        self.pause = (self.pause * 2).min(PAUSES.1);
    }
}
