//! A device as a monitor sets it up.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, protocol_features};
use anemone_vhost_user::{BackendRequestReceiver, Frontend};

use crate::{Memory, Queue, Result};

/// virtio feature bits of the transport (virtio 1.3, 6).
pub mod features {
    /// Chains may be indirect tables.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// A device of virtio 1.
    pub const VERSION_1: u64 = 1 << 32;
}

/// How to set a device up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of queues to start.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
    /// Features to accept, as far as the device offers them.
    pub features: u64,
    /// Longest wait for an answer.
    pub timeout: Duration,
}

impl Default for Options {
    /// 16 MiB of memory, one queue of 128 entries, all features, waits of 20 s.
    fn default() -> Self {
        Self {
            memory: 16 << 20,
            queues: 1,
            queue_size: 128,
            features: !0,
            timeout: Duration::from_secs(20),
        }
    }
}

/// A device that is set up, its queues running.
#[derive(Debug)]
pub struct Device {
    /// The connection.
    pub frontend: Frontend,
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// The queues.
    pub queues: Vec<Queue>,
    /// Features in use.
    pub features: u64,
    /// The device's own requests, if it can have any.
    pub requests: Option<BackendRequestReceiver>,
}

impl Device {
    /// Negotiates, shares memory and starts the queues.
    ///
    /// # Errors
    /// A request fails.
    pub fn connect(socket: UnixStream, options: &Options) -> Result<Self> {
        let mut frontend = Frontend::new(socket, options.timeout);
        frontend.set_owner()?;
        let features = frontend.features()? & (options.features | F_PROTOCOL_FEATURES);
        let wanted = protocol_features::MQ
            | protocol_features::REPLY_ACK
            | protocol_features::CONFIG
            | protocol_features::BACKEND_REQ
            | protocol_features::RESET_DEVICE;
        let offered = frontend.protocol_features()? & wanted;
        frontend.set_protocol_features(offered)?;
        frontend.set_features(features)?;
        let mut requests = None;
        if offered & protocol_features::BACKEND_REQ != 0 {
            let (ours, theirs) = UnixStream::pair()?;
            frontend.set_backend_req_fd(theirs.as_fd())?;
            requests = Some(BackendRequestReceiver::new(ours, options.timeout));
        }
        let memory = Arc::new(Memory::new(options.memory)?);
        frontend.set_mem_table(&[memory.region()])?;
        let mut device = Self {
            frontend,
            memory,
            queues: Vec::new(),
            features,
            requests,
        };
        for index in 0..options.queues {
            let event_idx = features & features::EVENT_IDX != 0;
            let queue = Queue::new(&device.memory, options.queue_size, event_idx)?;
            device.queues.push(queue);
            device.start_queue(index, 0)?;
        }
        Ok(device)
    }

    /// Describes a queue to the back end and enables it; it goes on from the available index `base`.
    ///
    /// # Errors
    /// A request fails.
    pub fn start_queue(&mut self, index: u16, base: u16) -> Result<()> {
        let queue = &self.queues[usize::from(index)];
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.size())?;
        frontend.set_vring_addr(index, &queue.addresses())?;
        frontend.set_vring_base(index, base)?;
        frontend.set_vring_kick(index, queue.kick_fd())?;
        frontend.set_vring_call(index, queue.call_fd())?;
        frontend.set_vring_err(index, queue.err_fd())?;
        frontend.set_vring_enable(index, true)?;
        Ok(())
    }

    /// Stops a queue; the available index at which it stopped.
    ///
    /// # Errors
    /// A request fails.
    pub fn stop_queue(&mut self, index: u16) -> Result<u16> {
        self.frontend.set_vring_enable(index, false)?;
        Ok(self.frontend.get_vring_base(index)?)
    }
}
