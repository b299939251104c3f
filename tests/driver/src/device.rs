//! A device as a monitor sets it up.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anemone_vhost_user::message::{F_PROTOCOL_FEATURES, protocol_features};
use anemone_vhost_user::{BackendRequestReceiver, Frontend};

use crate::bounce::{Bounce, Bounced};
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
    /// Whether the back end is given memory to track in what it has in flight, if it can.
    pub inflight: bool,
    /// The back end does not see guest memory.
    pub bounce: Option<Bounced>,
}

impl Options {
    /// How often the process is to be killed, where `many` times are enough for a back end that sees
    /// guest memory: most of what is looked for does not depend on that.
    pub fn kills(&self, many: usize) -> usize {
        match self.bounce {
            None => many,
            Some(_) => many / 4,
        }
    }
}

impl Default for Options {
    /// 16 MiB of memory that the back end sees, one queue of 128 entries, all features, waits of 20 s,
    /// in-flight memory.
    fn default() -> Self {
        Self {
            memory: 16 << 20,
            queues: 1,
            queue_size: 128,
            features: !0,
            timeout: Duration::from_secs(20),
            inflight: true,
            bounce: None,
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
    /// Memory in which the back end tracks what is in flight: file, length, offset.
    pub inflight: Option<(OwnedFd, u64, u64)>,
    bounce: Option<Bounce>,
    queue_size: u16,
    timeout: Duration,
}

impl Device {
    /// Negotiates, shares memory and starts the queues.
    ///
    /// # Errors
    /// A request fails.
    pub fn connect(socket: UnixStream, options: &Options) -> Result<Self> {
        let mut device = Self {
            frontend: Frontend::new(socket, options.timeout),
            memory: Arc::new(Memory::new(options.memory)?),
            queues: Vec::new(),
            features: options.features,
            requests: None,
            inflight: None,
            bounce: None,
            queue_size: options.queue_size,
            timeout: options.timeout,
        };
        let offered = device.negotiate()?;
        for _ in 0..options.queues {
            let event_idx = device.features & features::EVENT_IDX != 0;
            let queue = Queue::new(&device.memory, options.queue_size, event_idx)?;
            device.queues.push(queue);
        }
        if let Some(bounced) = options.bounce {
            let features = device.features & !F_PROTOCOL_FEATURES;
            let bounce = Bounce::new(bounced, features, &device.memory, &device.queues)?;
            device.bounce = Some(bounce);
        }
        device.set_mem_table()?;
        if options.inflight && offered & protocol_features::INFLIGHT_SHMFD != 0 {
            let memory = device
                .frontend
                .get_inflight_fd(options.queues, options.queue_size)?;
            device.inflight = Some(memory);
            device.set_inflight(options.queues)?;
        }
        for index in 0..options.queues {
            device.start_queue(index, 0)?;
        }
        Ok(device)
    }

    /// The thread that copies for a back end that does not see guest memory.
    pub fn copying_thread(&self) -> Option<libc::pid_t> {
        self.bounce.as_ref().map(|bounce| bounce.tid)
    }

    /// Sets the device up again over another connection, as a monitor does it when the back end
    /// has gone and another is there: with the same features, memory and rings, and whatever is in
    /// flight. The back end has to find out by itself where in the rings it was.
    ///
    /// # Errors
    /// A request fails.
    pub fn reconnect(&mut self, socket: UnixStream) -> Result<()> {
        self.frontend = Frontend::new(socket, self.timeout);
        self.negotiate()?;
        if let Some(bounce) = &self.bounce {
            bounce.resume(self.inflight.is_some())?;
        }
        self.set_mem_table()?;
        self.set_inflight(self.queues.len() as u16)?;
        for index in 0..self.queues.len() as u16 {
            let base = match &self.bounce {
                Some(bounce) => bounce.used_index(index),
                None => self.queues[usize::from(index)].used_index(),
            };
            self.start_queue(index, base)?;
            if let Some(bounce) = &self.bounce {
                bounce.wake(index);
            }
        }
        Ok(())
    }

    /// Features and what belongs to them; the protocol features offered.
    fn negotiate(&mut self) -> Result<u64> {
        let frontend = &mut self.frontend;
        frontend.set_owner()?;
        self.features = frontend.features()? & (self.features | F_PROTOCOL_FEATURES);
        let wanted = protocol_features::MQ
            | protocol_features::REPLY_ACK
            | protocol_features::CONFIG
            | protocol_features::BACKEND_REQ
            | protocol_features::INFLIGHT_SHMFD
            | protocol_features::RESET_DEVICE;
        let offered = frontend.protocol_features()? & wanted;
        frontend.set_protocol_features(offered)?;
        frontend.set_features(self.features)?;
        self.requests = None;
        if offered & protocol_features::BACKEND_REQ != 0 {
            let (ours, theirs) = UnixStream::pair()?;
            frontend.set_backend_req_fd(theirs.as_fd())?;
            self.requests = Some(BackendRequestReceiver::new(ours, self.timeout));
        }
        Ok(offered)
    }

    fn set_mem_table(&mut self) -> Result<()> {
        match &self.bounce {
            Some(bounce) => bounce.set_mem_table(&mut self.frontend),
            None => Ok(self.frontend.set_mem_table(&[self.memory.region()])?),
        }
    }

    fn set_inflight(&mut self, queues: u16) -> Result<()> {
        if let Some((fd, size, offset)) = &self.inflight {
            self.frontend
                .set_inflight_fd(fd.as_fd(), *size, *offset, queues, self.queue_size)?;
        }
        Ok(())
    }

    /// Describes a queue to the back end and enables it; it goes on from the available index `base`.
    ///
    /// # Errors
    /// A request fails.
    pub fn start_queue(&mut self, index: u16, base: u16) -> Result<()> {
        let queue = &self.queues[usize::from(index)];
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.size())?;
        frontend.set_vring_base(index, base)?;
        match &self.bounce {
            Some(bounce) => bounce.set_vring(frontend, index)?,
            None => {
                frontend.set_vring_addr(index, &queue.addresses())?;
                frontend.set_vring_kick(index, queue.kick_fd())?;
                frontend.set_vring_call(index, queue.call_fd())?;
            }
        }
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
