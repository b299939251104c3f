//! One vhost-user connection to a back end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anemone_accel_api::EventFd;
use anemone_log::warn_limited;
use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, VringAddr, protocol_features as protocol};
use anemone_vhost_user::{
    BackendRequest, BackendRequestReceiver, Error as ProtocolError, Frontend,
};
use thiserror::Error;

use crate::bounce::Bounds;
use crate::ram::GuestRam;
use crate::transport::VirtioPci;
use crate::work::{Start, StartQueue};

/// The protocol features this front end makes use of.
const PROTOCOL: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD;

/// Why a back end can no longer be used.
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

/// What is asked of every back end of a device.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most virtqueues.
    pub queues: u16,
    /// Bytes of device-specific configuration.
    pub config_size: u16,
    /// The configuration is all zeroes with a back end that has none.
    pub config_optional: bool,
    /// Features that are not passed on, whoever offers them.
    pub withheld: u64,
    /// How long it may take to answer.
    pub patience: Duration,
}

/// What a back end offers.
#[derive(Debug, Clone)]
pub struct Connected {
    /// virtio features.
    pub features: u64,
    /// Number of virtqueues.
    pub queues: u16,
    /// Device-specific configuration.
    pub config: Vec<u8>,
}

/// Where the queues of a driver begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Base {
    /// At the first entry: the driver has just set them up.
    First,
    /// Behind what an earlier back end has returned. What it had taken and not returned is
    /// either in the in-flight region, or is taken again.
    Used,
}

/// Memory in which back ends track what they have in flight. It belongs to one start of a driver:
/// back ends come and go with it, and with the driver's reset it goes. This process only keeps it.
#[derive(Debug)]
pub(crate) struct Inflight {
    fd: OwnedFd,
    size: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

/// The conversation over one connection.
pub(crate) struct Session {
    connection: Frontend,
    requests: Option<BackendRequestReceiver>,
    protocol: u64,
    config_size: u16,
    /// Features of the back end.
    features: u64,
    /// What it can offer where it does not see guest memory.
    bounds: Option<Bounds>,
    /// Queues that the back end has.
    running: Vec<u16>,
}

impl Session {
    /// Starts the conversation. What the back end offers is kept within `bounds`, if there are any.
    pub fn open(
        socket: UnixStream,
        limits: &Limits,
        bounds: Option<Bounds>,
    ) -> Result<(Self, Connected), Error> {
        let mut connection = Frontend::new(socket, limits.patience);
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
            let theirs = connection.queue_num()?.try_into().unwrap_or(u16::MAX);
            limits.queues.min(theirs)
        } else {
            limits.queues
        };
        let has_config = limits.config_size > 0 && protocol & protocol::CONFIG != 0;
        if !has_config && limits.config_size > 0 && !limits.config_optional {
            return Err(Error::Lacks("VHOST_USER_PROTOCOL_F_CONFIG"));
        }
        let requests = if protocol & protocol::BACKEND_REQ != 0 {
            let os = |source| Error::Os {
                what: "socketpair",
                source,
            };
            let (ours, theirs) = UnixStream::pair().map_err(os)?;
            connection.set_backend_req_fd(theirs.as_fd())?;
            Some(BackendRequestReceiver::new(ours, limits.patience))
        } else {
            None
        };
        let mut session = Self {
            connection,
            requests,
            protocol,
            config_size: limits.config_size,
            features,
            bounds,
            running: Vec::new(),
        };
        let config = match has_config {
            true => session.config()?,
            false => vec![0; limits.config_size.into()],
        };
        let offered = bounds.map_or(features, |bounds| bounds.features(features));
        let connected = Connected {
            features: offered & !limits.withheld,
            queues,
            config,
        };
        Ok((session, connected))
    }

    /// The back end tracks what is in flight.
    pub fn tracks(&self) -> bool {
        self.protocol & protocol::INFLIGHT_SHMFD != 0
    }

    /// What to poll: the connection, readable when the back end has hung up, and its own requests.
    pub fn watched(&self) -> [RawFd; 2] {
        let requests = self.requests.as_ref().map_or(-1, |r| r.as_fd().as_raw_fd());
        [self.connection.as_fd().as_raw_fd(), requests]
    }

    /// The back end has something to say of its own accord.
    pub fn backend_request(&mut self, device: &VirtioPci) -> Result<(), Error> {
        let Some(receiver) = &mut self.requests else {
            return Ok(());
        };
        match receiver.try_recv() {
            Ok(Some(BackendRequest::ConfigChange)) => self.refresh_config(device),
            Ok(None) => Ok(()),
            // The back end may close this socket; it then has no more to say.
            Err(ProtocolError::Closed) => {
                self.requests = None;
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// Writes what the driver has written, and reads what has become of it.
    pub fn write_config(
        &mut self,
        bytes: &std::collections::BTreeMap<u16, u8>,
        device: &VirtioPci,
    ) -> Result<(), Error> {
        if bytes.is_empty() || self.protocol & protocol::CONFIG == 0 {
            return Ok(());
        }
        for (offset, bytes) in runs(bytes) {
            match self.connection.set_config(offset.into(), &bytes) {
                Err(e @ ProtocolError::Refused(..)) => {
                    warn_limited!("a write to the device's configuration was refused: {e}");
                }
                other => other?,
            }
        }
        self.refresh_config(device)
    }

    fn refresh_config(&mut self, device: &VirtioPci) -> Result<(), Error> {
        if self.config_size > 0 && self.protocol & protocol::CONFIG != 0 {
            device.config_changed(&self.config()?);
        }
        Ok(())
    }

    /// The configuration as the driver sees it.
    fn config(&mut self) -> Result<Vec<u8>, Error> {
        let mut config = self.connection.config(0, self.config_size.into())?;
        if let Some(bounds) = self.bounds {
            bounds.limit(self.features, &mut config);
        }
        Ok(config)
    }

    /// Puts another interrupt behind a queue.
    pub fn set_call(&mut self, index: u16, call: &EventFd) -> Result<(), Error> {
        if self.running.contains(&index) {
            self.connection.set_vring_call(index, call.as_fd())?;
        }
        Ok(())
    }

    /// Gives the back end the driver's queues. Where it tracks what is in flight, `inflight` is
    /// filled by the first back end of a start and handed to those that follow.
    pub fn start(
        &mut self,
        start: &Start,
        ram: &GuestRam,
        base: Base,
        inflight: &mut Option<Inflight>,
    ) -> Result<(), Error> {
        let connection = &mut self.connection;
        let added = self.bounds.map_or(0, |bounds| bounds.added(self.features));
        connection.set_features(start.features & !added | F_PROTOCOL_FEATURES)?;
        connection.set_mem_table(&ram.table())?;
        if self.tracks() {
            self.share_inflight(start, inflight)?;
        }
        for q in &start.queues {
            self.start_queue(q, ram, base)?;
        }
        for q in &start.queues {
            self.connection.set_vring_enable(q.index, true)?;
            // A kick may have come before the back end could listen.
            q.kick.signal();
            if base == Base::Used {
                // The one before may have returned buffers and died before it said so.
                q.call.signal();
            }
        }
        Ok(())
    }

    fn share_inflight(
        &mut self,
        start: &Start,
        inflight: &mut Option<Inflight>,
    ) -> Result<(), Error> {
        let connection = &mut self.connection;
        let region = match inflight {
            Some(region) => region,
            None => {
                let queues = start.queues.iter().map(|q| q.index + 1).max().unwrap_or(1);
                let queue_size = start.queues.iter().map(|q| q.size).max().unwrap_or(1);
                let (fd, size, offset) = match connection.get_inflight_fd(queues, queue_size) {
                    // It has the feature and no memory: then it does without.
                    Err(ProtocolError::Refused(..)) => return Ok(()),
                    other => other?,
                };
                inflight.insert(Inflight {
                    fd,
                    size,
                    offset,
                    queues,
                    queue_size,
                })
            }
        };
        Ok(connection.set_inflight_fd(
            region.fd.as_fd(),
            region.size,
            region.offset,
            region.queues,
            region.queue_size,
        )?)
    }

    fn start_queue(&mut self, q: &StartQueue, ram: &GuestRam, base: Base) -> Result<(), Error> {
        let connection = &mut self.connection;
        let base = match base {
            Base::First => 0,
            Base::Used => ram.used_index(q.used),
        };
        connection.set_vring_num(q.index, q.size)?;
        connection.set_vring_base(q.index, base)?;
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
        Ok(())
    }

    /// Takes all queues back. When it returns the back end touches them no more.
    pub fn stop(&mut self) -> Result<(), Error> {
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
