//! The device thread: it serves the registers, and outlives its back ends.
//!
//! ```text
//!              connection fails, no answer in time, nonsense: Lost
//!   served ───────────────────────────────────────────────────────▶ waiting
//!      ▲                                                               │
//!      └── handshake, memory, queues, kicks: Back ◀── Work::reconnect ─┘
//! ```
//!
//! While it waits, everything that the driver does is kept: a start, vectors, configuration bytes,
//! a reset. The latched start of a driver stays until the driver resets the device, so that the
//! next back end gets the same queues. The guest sees a pause.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use anemone_log::warn_limited;
use anemone_vhost_user::Error as ProtocolError;

use crate::bounce::Bounce;
use crate::ram::GuestRam;
use crate::session::{Base, Connected, Error, Inflight, Limits, Session};
use crate::transport::VirtioPci;
use crate::work::{Reconnect, Start, Work, WorkQueue};

/// What a device thread reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// The back end is gone, hangs or broke the protocol. The device waits for another one.
    Lost {
        /// Number of the connection that failed.
        connection: u32,
        /// What happened.
        reason: String,
    },
    /// Another back end serves in its place.
    Back {
        /// Number of the connection.
        connection: u32,
    },
    /// The back end cannot go on where the one before was lost; the driver is told to start over.
    Unfit {
        /// What does not fit.
        reason: String,
    },
}

/// The front end of a device: the first connection, until [`run`](Self::run) makes it a device.
pub struct FrontEnd {
    limits: Limits,
    session: Session,
    bounce: Option<Bounce>,
}

impl FrontEnd {
    /// Starts the conversation with the first back end, which sees guest memory or, where there is one,
    /// only what `bounce` shows it.
    ///
    /// # Errors
    /// The back end is gone, silent, or not able to serve a modern device.
    pub fn connect(
        socket: UnixStream,
        limits: Limits,
        bounce: Option<Bounce>,
    ) -> Result<(Self, Connected), Error> {
        let bounds = bounce.as_ref().map(Bounce::bounds);
        let (session, connected) = Session::open(socket, &limits, bounds)?;
        let front_end = Self {
            limits,
            session,
            bounce,
        };
        Ok((front_end, connected))
    }

    /// Serves the registers, with one back end after the other, for as long as the process lives.
    /// Returns only if the system does not let it wait.
    pub fn run(
        self,
        device: &VirtioPci,
        ram: &GuestRam,
        work: &WorkQueue,
        tell: &dyn Fn(Notice),
    ) -> io::Error {
        let mut thread = Thread {
            limits: self.limits,
            session: Some(self.session),
            bounce: self.bounce,
            connection: 0,
            hung_up: false,
            started: None,
            inflight: None,
            pending: Work::default(),
            device,
            ram,
            work,
            tell,
        };
        loop {
            if let Err(e) = thread.turn() {
                return e;
            }
        }
    }
}

struct Thread<'a> {
    limits: Limits,
    /// The connection; none while the device waits for a back end.
    session: Option<Session>,
    /// Stands between guest memory and a back end that must not see it.
    bounce: Option<Bounce>,
    /// Number of the connection, or of the one that was lost.
    connection: u32,
    /// The lost back end has closed its connection itself, which is how the death of a process
    /// shows. One that merely does not answer may still write to guest memory.
    hung_up: bool,
    /// The set-up of the driver, from its start to its reset.
    started: Option<Start>,
    /// What back ends have in flight since then.
    inflight: Option<Inflight>,
    /// What the driver has asked for that no back end has carried out.
    pending: Work,
    device: &'a VirtioPci,
    ram: &'a GuestRam,
    work: &'a WorkQueue,
    tell: &'a dyn Fn(Notice),
}

/// What a wait has found.
struct Ready {
    work: bool,
    hung_up: bool,
    request: bool,
    /// What has come of the entries of [`Bounce::poll_entries`].
    bounced: Vec<libc::pollfd>,
}

impl Thread<'_> {
    fn turn(&mut self) -> io::Result<()> {
        let ready = self.wait()?;
        self.pump(&ready.bounced);
        if ready.work {
            let mut work = self.work.take();
            let reconnect = work.reconnect.take();
            self.pending.extend(work);
            if let Some(reconnect) = reconnect {
                let outcome = self.resume(reconnect);
                self.check(outcome);
                return Ok(());
            }
        }
        let outcome = self.serve(&ready);
        self.check(outcome);
        Ok(())
    }

    fn wait(&self) -> io::Result<Ready> {
        let [connection, requests] = self.session.as_ref().map_or([-1, -1], Session::watched);
        let own = [self.work.as_fd().as_raw_fd(), connection, requests];
        let mut poll = Vec::from(own.map(|fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        }));
        let mut timeout = -1;
        if let Some(bounce) = &self.bounce {
            poll.extend(bounce.poll_entries());
            timeout = bounce.timeout();
        }
        // SAFETY: initialised entries, counted; a negative descriptor is skipped.
        if unsafe { libc::poll(poll.as_mut_ptr(), poll.len() as libc::nfds_t, timeout) } < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
            poll.iter_mut().for_each(|entry| entry.revents = 0);
        }
        Ok(Ready {
            work: poll[0].revents != 0,
            // Outside a request the back end has nothing to say over the connection.
            hung_up: poll[1].revents != 0,
            request: poll[2].revents != 0,
            bounced: poll.split_off(own.len()),
        })
    }

    /// Copies between the guest and a back end that does not see its memory.
    fn pump(&mut self, polled: &[libc::pollfd]) {
        if let Some(bounce) = &mut self.bounce
            && let Err(e) = bounce.turn(polled)
        {
            warn_limited!("{}: {e}; the device needs a reset", self.device.id());
            self.device.needs_reset();
        }
    }

    /// The set-up as a back end gets it.
    fn latch(&mut self, start: Start) -> Start {
        match &mut self.bounce {
            Some(bounce) => bounce.start(&start),
            None => start,
        }
    }

    /// In bounce mode interrupts are not the back end's to send.
    fn move_calls(&mut self) {
        if let Some(bounce) = &mut self.bounce
            && self.pending.start.is_none()
        {
            bounce.set_calls(std::mem::take(&mut self.pending.calls));
        }
    }

    /// With a back end that fails, the device waits for the next one.
    fn check(&mut self, outcome: Result<(), Error>) {
        let Err(error) = outcome else { return };
        self.session = None;
        self.hung_up = matches!(error, Error::Protocol(ProtocolError::Closed));
        (self.tell)(Notice::Lost {
            connection: self.connection,
            reason: error.to_string(),
        });
        self.reset_without_back_end();
    }

    /// A reset needs no back end if none can touch the queues any more.
    fn reset_without_back_end(&mut self) {
        if self.pending.stop && self.session.is_none() && self.hung_up {
            self.reset_done();
        }
    }

    fn reset_done(&mut self) {
        self.pending.stop = false;
        self.started = None;
        self.inflight = None;
        if let Some(bounce) = &mut self.bounce {
            bounce.stop();
        }
        self.device.reset_done();
    }

    fn serve(&mut self, ready: &Ready) -> Result<(), Error> {
        let Some(session) = &mut self.session else {
            self.reset_without_back_end();
            self.move_calls();
            return Ok(());
        };
        if ready.hung_up {
            return Err(ProtocolError::Closed.into());
        }
        if ready.request {
            session.backend_request(self.device)?;
        }
        if self.pending.stop {
            session.stop()?;
            self.reset_done();
        }
        if let Some(start) = self.pending.start.take() {
            // From here on it is the device's state, whether this back end lives to see it or not.
            self.started = Some(self.latch(start));
            self.start(Base::First)?;
        }
        self.carry_out()
    }

    /// Gives the queues to the back end.
    fn start(&mut self, base: Base) -> Result<(), Error> {
        let (Some(session), Some(start)) = (&mut self.session, &self.started) else {
            return Ok(());
        };
        let memory = self.bounce.as_ref().map_or(self.ram, Bounce::table);
        match session.start(start, memory, base, &mut self.inflight) {
            // What the guest has set up does not suit the back end: the driver is told.
            Err(Error::Protocol(e @ ProtocolError::Refused(..))) => {
                warn_limited!("the driver's set-up was refused: {e}");
                self.device.needs_reset();
                if base == Base::Used {
                    (self.tell)(Notice::Unfit {
                        reason: e.to_string(),
                    });
                }
                Ok(())
            }
            other => other,
        }
    }

    /// What a device can be asked for while it runs.
    fn carry_out(&mut self) -> Result<(), Error> {
        self.move_calls();
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        for (index, call) in std::mem::take(&mut self.pending.calls) {
            let queues = self.started.iter_mut().flat_map(|s| &mut s.queues);
            for queue in queues.filter(|queue| queue.index == index) {
                queue.call = call.clone();
            }
            session.set_call(index, &call)?;
        }
        // Forgotten only when it is done.
        session.write_config(&self.pending.config, self.device)?;
        self.pending.config.clear();
        Ok(())
    }

    /// Goes on with another back end.
    fn resume(&mut self, reconnect: Reconnect) -> Result<(), Error> {
        self.session = None;
        self.connection = reconnect.connection;
        if self.pending.stop {
            // Nobody is left that could touch the queues.
            self.reset_done();
        }
        let bounds = self.bounce.as_ref().map(Bounce::bounds);
        let (session, connected) = Session::open(reconnect.socket, &self.limits, bounds)?;
        let tracked = session.tracks() && self.inflight.is_some();
        if !tracked {
            // What an earlier one was doing is nothing to go by for a later one.
            self.inflight = None;
        }
        self.session = Some(session);
        if let Some(start) = self.pending.start.take() {
            self.started = Some(self.latch(start));
        } else if let Some(bounce) = &mut self.bounce
            && let Err(e) = bounce.resume(tracked)
        {
            warn_limited!("{}: {e}; the device needs a reset", self.device.id());
            self.device.needs_reset();
        }
        self.move_calls();
        // A vector that changed while nobody listened is set with the queues.
        for (index, call) in std::mem::take(&mut self.pending.calls) {
            let queues = self.started.iter_mut().flat_map(|s| &mut s.queues);
            for queue in queues.filter(|queue| queue.index == index) {
                queue.call = call.clone();
            }
        }
        match self.device.replaced(&connected) {
            Ok(()) => self.start(Base::Used)?,
            Err(reason) => {
                self.started = None;
                self.inflight = None;
                if let Some(bounce) = &mut self.bounce {
                    bounce.stop();
                }
                self.device.needs_reset();
                (self.tell)(Notice::Unfit { reason });
            }
        }
        if self.pending.config.is_empty() {
            self.device.config_changed(&connected.config);
        }
        self.carry_out()?;
        (self.tell)(Notice::Back {
            connection: self.connection,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests;
