//! The device thread: the front end of one vhost-user connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anemone_log::warn_limited;
use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, VringAddr, protocol_features as protocol};
use anemone_vhost_user::{BackendRequestReceiver, Error as ProtocolError, Frontend, MemoryRegion};
use thiserror::Error;

use crate::transport::VirtioPci;
use crate::work::{Start, WorkQueue};

/// How long a back end may take to answer. It may have to finish disk requests first.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The protocol features this front end makes use of.
const PROTOCOL: u64 = protocol::MQ | protocol::REPLY_ACK | protocol::BACKEND_REQ | protocol::CONFIG;

/// Why a device's back end can no longer be used.
#[derive(Debug, Error)]
pub enum Error {
    /// The conversation failed.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// The back end cannot serve a modern device.
    #[error("the back end does not offer {0}")]
    Lacks(&'static str),
}

/// Guest RAM as back ends map it: regions of descriptors, by guest-physical address.
///
/// The "user addresses" by which vhost-user names places in memory are the guest-physical ones.
/// They serve only to find the region, and so the layout of this process stays its own secret.
#[derive(Debug)]
pub struct GuestRam {
    /// First address, length in bytes, the memory, and where in it the region begins.
    pub regions: Vec<(u64, u64, OwnedFd, u64)>,
}

impl GuestRam {
    /// Whether an area lies wholly in one region.
    pub fn contains(&self, address: u64, length: u64) -> bool {
        self.regions.iter().any(|(start, size, _, _)| {
            address
                .checked_sub(*start)
                .is_some_and(|at| at < *size && size - at >= length)
        })
    }

    fn table(&self) -> Vec<MemoryRegion<'_>> {
        self.regions
            .iter()
            .map(|(start, size, fd, offset)| MemoryRegion {
                guest_addr: *start,
                size: *size,
                user_addr: *start,
                fd: fd.as_fd(),
                offset: *offset,
            })
            .collect()
    }
}

/// What a back end offers, learnt before the guest starts.
#[derive(Debug)]
pub struct Connected {
    /// virtio features.
    pub features: u64,
    /// Number of virtqueues.
    pub queues: u16,
    /// Device-specific configuration.
    pub config: Vec<u8>,
}

/// The conversation with one back end.
pub struct FrontEnd {
    connection: Frontend,
    requests: Option<BackendRequestReceiver>,
    protocol: u64,
    config_size: u16,
    /// Queues that the back end has.
    running: Vec<u16>,
}

impl FrontEnd {
    /// Starts the conversation. The device has at most `max_queues` queues and `config_size` bytes of
    /// configuration.
    ///
    /// # Errors
    /// The back end is gone, silent, or not able to serve a modern device.
    pub fn connect(
        socket: UnixStream,
        max_queues: u16,
        config_size: u16,
    ) -> Result<(Self, Connected), Error> {
        let mut connection = Frontend::new(socket, TIMEOUT);
        connection.set_owner()?;
        let features = connection.features()?;
        if features & crate::feature::VERSION_1 == 0 {
            return Err(Error::Lacks("VIRTIO_F_VERSION_1"));
        }
        if features & F_PROTOCOL_FEATURES == 0 {
            return Err(Error::Lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let protocol = connection.protocol_features()? & PROTOCOL;
        connection.set_protocol_features(protocol)?;
        let queues = if protocol & protocol::MQ != 0 {
            max_queues.min(connection.queue_num()?.try_into().unwrap_or(u16::MAX))
        } else {
            max_queues
        };
        let config = if config_size == 0 {
            Vec::new()
        } else if protocol & protocol::CONFIG == 0 {
            return Err(Error::Lacks("VHOST_USER_PROTOCOL_F_CONFIG"));
        } else {
            connection.config(0, config_size.into())?
        };
        let requests = if protocol & protocol::BACKEND_REQ != 0 {
            let os = |source| Error::Os {
                what: "socketpair",
                source,
            };
            let (ours, theirs) = UnixStream::pair().map_err(os)?;
            connection.set_backend_req_fd(theirs.as_fd())?;
            Some(BackendRequestReceiver::new(ours, TIMEOUT))
        } else {
            None
        };
        let front_end = Self {
            connection,
            requests,
            protocol,
            config_size,
            running: Vec::new(),
        };
        Ok((
            front_end,
            Connected {
                features,
                queues,
                config,
            },
        ))
    }

    /// Serves the registers until the connection fails; returns why.
    pub fn run(mut self, device: &VirtioPci, ram: &GuestRam, work: &WorkQueue) -> Error {
        loop {
            if let Err(e) = self.step(device, ram, work) {
                return e;
            }
        }
    }

    fn step(&mut self, device: &VirtioPci, ram: &GuestRam, work: &WorkQueue) -> Result<(), Error> {
        let entry = |fd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let requests = self.requests.as_ref().map_or(-1, |r| r.as_fd().as_raw_fd());
        let mut poll = [
            entry(work.as_fd().as_raw_fd(), libc::POLLIN),
            // Outside a request the back end has nothing to say: readable means it hung up.
            entry(self.connection.as_fd().as_raw_fd(), libc::POLLIN),
            entry(requests, libc::POLLIN),
        ];
        // SAFETY: three initialised entries; a negative descriptor is skipped.
        if unsafe { libc::poll(poll.as_mut_ptr(), 3, -1) } < 0 {
            let source = io::Error::last_os_error();
            return match source.kind() {
                io::ErrorKind::Interrupted => Ok(()),
                _ => Err(Error::Os {
                    what: "poll",
                    source,
                }),
            };
        }
        if poll[1].revents != 0 {
            return Err(ProtocolError::Closed.into());
        }
        if poll[2].revents != 0 {
            self.backend_request(device)?;
        }
        if poll[0].revents == 0 {
            return Ok(());
        }
        let work = work.take();
        if work.stop {
            self.stop()?;
            device.reset_done();
        }
        if let Some(start) = work.start {
            match self.start(&start, ram) {
                // What the guest has set up does not suit the back end: the driver is told.
                Err(Error::Protocol(e @ ProtocolError::Refused(..))) => {
                    warn_limited!("the driver's set-up was refused: {e}");
                    device.needs_reset();
                }
                other => other?,
            }
        }
        for (index, call) in work.calls {
            if self.running.contains(&index) {
                self.connection.set_vring_call(index, call.as_fd())?;
            }
        }
        if !work.config.is_empty() && self.protocol & protocol::CONFIG != 0 {
            for (offset, bytes) in runs(&work.config) {
                match self.connection.set_config(offset.into(), &bytes) {
                    Err(e @ ProtocolError::Refused(..)) => {
                        warn_limited!("a write to the device's configuration was refused: {e}");
                    }
                    other => other?,
                }
            }
            self.refresh_config(device)?;
        }
        Ok(())
    }

    /// The back end has something to say of its own accord.
    fn backend_request(&mut self, device: &VirtioPci) -> Result<(), Error> {
        let Some(receiver) = &mut self.requests else {
            return Ok(());
        };
        match receiver.try_recv() {
            Ok(Some(anemone_vhost_user::BackendRequest::ConfigChange)) => {
                self.refresh_config(device)
            }
            Ok(None) => Ok(()),
            // The back end may close this socket; it then has no more to say.
            Err(ProtocolError::Closed) => {
                self.requests = None;
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn refresh_config(&mut self, device: &VirtioPci) -> Result<(), Error> {
        if self.config_size > 0 && self.protocol & protocol::CONFIG != 0 {
            device.config_changed(&self.connection.config(0, self.config_size.into())?);
        }
        Ok(())
    }

    fn start(&mut self, start: &Start, ram: &GuestRam) -> Result<(), Error> {
        let connection = &mut self.connection;
        connection.set_features(start.features | F_PROTOCOL_FEATURES)?;
        connection.set_mem_table(&ram.table())?;
        for q in &start.queues {
            connection.set_vring_num(q.index, q.size)?;
            connection.set_vring_base(q.index, 0)?;
            connection.set_vring_addr(
                q.index,
                &VringAddr {
                    descriptor: q.descriptors,
                    used: q.used,
                    available: q.available,
                    log: None,
                },
            )?;
            connection.set_vring_call(q.index, q.call.as_fd())?;
            connection.set_vring_kick(q.index, q.kick.as_fd())?;
            self.running.push(q.index);
        }
        for q in &start.queues {
            connection.set_vring_enable(q.index, true)?;
            // A kick may have come before the back end could listen.
            q.kick.signal();
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), Error> {
        for index in std::mem::take(&mut self.running) {
            self.connection.set_vring_enable(index, false)?;
            self.connection.get_vring_base(index)?;
        }
        Ok(())
    }
}

/// Joins bytes at consecutive offsets.
fn runs(bytes: &std::collections::BTreeMap<u16, u8>) -> Vec<(u16, Vec<u8>)> {
    let mut runs: Vec<(u16, Vec<u8>)> = Vec::new();
    for (&offset, &byte) in bytes {
        match runs.last_mut() {
            Some((start, run)) if usize::from(*start) + run.len() == usize::from(offset) => {
                run.push(byte);
            }
            _ => runs.push((offset, vec![byte])),
        }
    }
    runs
}
