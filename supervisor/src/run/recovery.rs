//! Back ends that are lost while the VM runs, and their way back.
//!
//! A process of this program is started again, with the same arguments and descriptors and what the
//! one before has had kept; a program that somebody else has started is connected to again, for as
//! long as it takes. The VMM gets the new connection and goes on with it.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anemone_ipc::FdIndex;
use anemone_ipc::vmm::ToVmm;
use anemone_log::warn_limited;

use super::backend::{Backend, Running};
use super::{Phase, Session, Turn};
use crate::control::server::Waits;
use crate::error::{Error, system};
use crate::sys;
use crate::vmm::ending;

/// Time in which a process that has closed its connections ends, if it is on its way.
const ENDING: Duration = Duration::from_millis(500);

/// Why a process is of no use any more.
#[derive(Debug, Clone, Copy)]
pub(super) enum Why<'a> {
    /// It has ended, or closed its control channel.
    Ended,
    /// It has said so itself, or what it has said is nonsense.
    Said(&'a str),
    /// The VMM has seen this of it. How it ended, if it did, says more.
    Seen(&'a str),
}

impl Session<'_> {
    /// The process of a device is of no use any more.
    pub(super) fn backend_down(&mut self, index: usize, why: Why<'_>) -> Result<Turn, Error> {
        let restart = &self.host.vm.config.restart;
        let applies = restart.applies_to(&self.backends[index].id);
        if !self.has_run || !applies {
            return Err(self.backend_failure(index, why));
        }
        let now = Instant::now();
        let starting = matches!(self.phase, Phase::Starting { .. });
        let backend = &mut self.backends[index];
        backend.lost(now);
        let id = backend.id.clone();
        let Some(child) = backend.child_mut() else {
            return Ok(Turn::Continue);
        };
        let (name, exit) = child.stop();
        if child.planned.take().is_some() {
            log::info!("device `{id}`: {name}, has ended as planned; another takes its place");
            child.restarts.count += 1;
            child.due = Some(now);
            return Ok(match starting {
                true => Turn::Restart,
                false => Turn::Continue,
            });
        }
        let what = match (why, exit) {
            (Why::Said(reason), _) | (Why::Seen(reason), None) => format!("{name}: {reason}"),
            (Why::Ended | Why::Seen(_), Some(exit)) => format!("{name}, {exit}"),
            (Why::Ended, None) => format!("{name}, closed its control channel"),
        };
        let Some(pause) = child.restarts.next(now) else {
            let limit = self.host.vm.config.restart.limit;
            return Err(self.named(
                index,
                &format!(
                    "{what}; that is more than {} restarts within {} seconds, the limit",
                    limit.count, limit.seconds
                ),
            ));
        };
        child.due = Some(now + pause);
        if pause.is_zero() {
            warn_limited!("device `{id}`: {what}; it is started again");
        } else {
            let pause = pause.as_millis();
            warn_limited!("device `{id}`: {what}; it is started again in {pause} ms");
        }
        // The VMM that is being built has the connection to the process that is gone.
        Ok(if starting {
            Turn::Restart
        } else {
            Turn::Continue
        })
    }

    /// The VMM has lost a connection.
    pub(super) fn back_end_lost(
        &mut self,
        index: usize,
        connection: u32,
        reason: &str,
    ) -> Result<Turn, Error> {
        let now = Instant::now();
        let backend = &mut self.backends[index];
        if connection != backend.connection {
            // There is another one since.
            return Ok(Turn::Continue);
        }
        backend.lost(now);
        match &mut backend.service {
            // It has been asked to end, and is about to.
            Running::Child(child) if child.planned.is_some() => Ok(Turn::Continue),
            Running::Child(child) if child.process.is_some() => {
                self.backend_down(index, Why::Seen(reason))
            }
            Running::Child(_) => Ok(Turn::Continue),
            Running::Elsewhere(external) => {
                warn_limited!(
                    "device `{}`: the back end at {} is lost: {reason}; connecting again",
                    backend.id,
                    external.path().display()
                );
                external.later(now);
                Ok(Turn::Continue)
            }
        }
    }

    /// The VMM has a back end again.
    pub(super) fn back_end_back(&mut self, index: usize, connection: u32) {
        let backend = &mut self.backends[index];
        if connection == backend.connection && backend.lost_at.is_some() {
            let pause = backend.back(Instant::now()).as_secs_f64() * 1000.0;
            let id = &backend.id;
            match &backend.service {
                // The limit of restarts is one for these lines, too.
                Running::Child(_) => {
                    log::warn!("device `{id}` serves again; the guest has waited {pause:.1} ms");
                }
                Running::Elsewhere(_) => {
                    warn_limited!("device `{id}` serves again; the guest has waited {pause:.1} ms");
                }
            }
            self.answer_waiting(Waits::Restart(index));
        }
    }

    /// Starts what is due, and connects again.
    pub(super) fn bring_back(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        for index in 0..self.backends.len() {
            if self.backends[index].due().is_none_or(|due| due > now) {
                continue;
            }
            match &mut self.backends[index].service {
                Running::Child(child) if child.planned.is_some() => {
                    // It has not ended; its end is seen next.
                    if let Some(process) = &mut child.process {
                        process.kill();
                    }
                }
                Running::Child(_) => self.start_again(index)?,
                Running::Elsewhere(_) => self.connect_again(index, now)?,
            }
        }
        let due = |backend: &Backend| matches!(&backend.service, Running::Elsewhere(e) if e.due.is_some());
        if self.phase == Phase::Disconnected && !self.backends.iter().any(due) {
            self.begin_again()?;
        }
        Ok(())
    }

    fn start_again(&mut self, index: usize) -> Result<(), Error> {
        let environment = self.host.environment;
        let backend = &mut self.backends[index];
        let id = backend.id.clone();
        let Some(child) = backend.child_mut() else {
            return Ok(());
        };
        if let Err(error) = child.start(&id, environment, None) {
            // As if it had ended at once.
            self.backend_down(index, Why::Said(&error.to_string()))?;
            return Ok(());
        }
        if child.is_stream() {
            // The stream has no state: it goes on as soon as the process reads it.
            backend.back(Instant::now());
            self.answer_waiting(Waits::Restart(index));
            return Ok(());
        }
        if let Some(connection) = child.next.take() {
            return child.connect(connection);
        }
        let (ours, theirs) = UnixStream::pair().map_err(system("socketpair"))?;
        child.connect(theirs)?;
        self.reconnect(index, ours)
    }

    fn connect_again(&mut self, index: usize, now: Instant) -> Result<(), Error> {
        let backend = &mut self.backends[index];
        let Running::Elsewhere(external) = &mut backend.service else {
            return Ok(());
        };
        match external.connect(now) {
            Ok(stream) if self.phase == Phase::Disconnected => {
                self.connections[index] = stream;
                Ok(())
            }
            Ok(stream) => self.reconnect(index, stream),
            Err(error) => {
                let path = external.path().display();
                warn_limited!("device `{}`: {path}: {error}; trying again", backend.id);
                Ok(())
            }
        }
    }

    /// Gives the VMM a new connection.
    fn reconnect(&mut self, index: usize, stream: UnixStream) -> Result<(), Error> {
        let backend = &mut self.backends[index];
        backend.connection += 1;
        let message = ToVmm::Reconnect {
            id: backend.id.clone(),
            connection: backend.connection,
            socket: FdIndex(0),
        };
        match self.vmm.channel.send(&message, &[stream.as_fd()]) {
            // How it has ended, its last messages say.
            Ok(()) | Err(anemone_ipc::Error::Closed) => {
                self.connections[index] = stream;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// New connections of all back ends for a new VMM, which starts as soon as all are there.
    pub(super) fn reconnect_all(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        self.phase = Phase::Disconnected;
        for (backend, connection) in self.backends.iter_mut().zip(&mut self.connections) {
            backend.connection = 0;
            match &mut backend.service {
                // A byte stream has no state: the next VMM goes on with the same one.
                Running::Child(child) if child.is_stream() => {}
                Running::Child(child) => {
                    let (ours, theirs) = UnixStream::pair().map_err(system("socketpair"))?;
                    *connection = ours;
                    child.connect(theirs)?;
                }
                Running::Elsewhere(external) => match external.connect(now) {
                    Ok(stream) => *connection = stream,
                    Err(error) => warn_limited!(
                        "device `{}`: {}: {error}; the guest starts when its back end is there",
                        backend.id,
                        external.path().display()
                    ),
                },
            }
        }
        self.bring_back()
    }

    /// A VMM that is being built refuses a device whose process has just ended. The process is
    /// started again, and then another VMM.
    pub(super) fn refused_for_a_lost_back_end(&mut self) -> Result<Turn, Error> {
        if !self.has_run {
            return Ok(Turn::Continue);
        }
        let mut ends: Vec<_> = self
            .backends
            .iter()
            .filter_map(|backend| backend.child()?.process.as_ref())
            .map(|process| sys::readable(process.as_fd()))
            .collect();
        sys::poll(&mut ends, Some(ENDING)).map_err(system("poll"))?;
        let mut turn = Turn::Continue;
        for index in 0..self.backends.len() {
            let process = self.backends[index].child_mut();
            let process = process.and_then(|child| child.process.as_mut());
            if process.is_some_and(|process| process.exit().is_some()) {
                turn = self.backend_down(index, Why::Ended)?;
            }
        }
        Ok(turn)
    }

    /// The error for a process that is of no use any more.
    fn backend_failure(&mut self, index: usize, why: Why<'_>) -> Error {
        let child = self.backends[index].child_mut();
        let text = match (child.and_then(|child| child.process.as_mut()), why) {
            (Some(process), Why::Ended) => ending(process),
            (Some(process), Why::Said(reason)) => format!("{}: {reason}", process.name()),
            (Some(process), Why::Seen(reason)) => match process.wait(ENDING) {
                Some(exit) => format!("{}, {exit}", process.name()),
                None => format!("{}: {reason}", process.name()),
            },
            (None, _) => "its process is gone".to_owned(),
        };
        self.named(index, &text)
    }

    fn named(&self, index: usize, text: &str) -> Error {
        Error::Failed(format!("device `{}`: {text}", self.backends[index].id))
    }
}
