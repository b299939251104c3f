//! The virtio file system device (virtio 1.3, 5.11): a queue for urgent requests, which are short and served
//! on the main thread, and queues for all others, each with a thread of its own.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use anemone_device::{Device, Host, Mode, ProcessJail, RingError, Share, Vring, Watch};
use anemone_log::warn_limited;
use virtio_queue::QueueT;

use crate::fs::FileSystem;
use crate::request::Request;
use crate::state::{MAX_HANDLES, MAX_QUEUE_SIZE};
use crate::table::DIRECTORIES;
use crate::worker::{Pool, Worker};

/// Number of the queue for urgent requests: forgetting, mainly.
const URGENT: usize = 0;
/// Urgent requests served in one go.
const PER_TURN: usize = 64;
/// Bytes of the tag in the configuration space.
pub const TAG_SIZE: usize = 36;

/// What acting for the guest's users takes (linux/capability.h): CHOWN, DAC_OVERRIDE, FOWNER, FSETID,
/// SETGID, SETUID, SETFCAP.
const ACTING: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;

/// A virtio-fs device.
pub struct FsDevice {
    fs: Arc<FileSystem>,
    tag: [u8; TAG_SIZE],
    namespace: Option<OwnedFd>,
    sandbox: Mode,
    urgent: Option<Vring>,
    /// The driver has broken the urgent queue.
    broken: bool,
    request: Request,
    /// Number of queues beside the urgent one.
    queues: usize,
    /// Their threads, once those have started.
    workers: Vec<Worker>,
}

impl FsDevice {
    /// A device with this many queues beside the urgent one. `namespace` is the user namespace to
    /// enter.
    pub fn new(
        fs: FileSystem,
        tag: [u8; TAG_SIZE],
        queues: usize,
        namespace: Option<OwnedFd>,
        sandbox: Mode,
    ) -> Self {
        Self {
            fs: Arc::new(fs),
            tag,
            namespace,
            sandbox,
            urgent: None,
            broken: false,
            request: Request::default(),
            queues,
            workers: Vec::with_capacity(queues),
        }
    }

    fn serve_urgent(&mut self, ring: &mut Vring) -> Result<(), RingError> {
        for _ in 0..PER_TURN {
            let Some(chain) = ring.pop()? else {
                if ring.enable_kicks()? {
                    continue;
                }
                return ring.notify();
            };
            let head = chain.head_index();
            let again = ring.popped_again();
            let started = self.request.start(&ring.memory, chain, URGENT, again);
            let written = match started {
                Ok(()) => self.fs.serve_urgent(&mut self.request),
                Err(why) => {
                    warn_limited!("urgent queue: a request is returned unread: {why}");
                    0
                }
            };
            ring.push_used(head, written)?;
        }
        ring.kick_again();
        ring.notify()
    }
}

impl Device for FsDevice {
    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> usize {
        1 + self.queues
    }

    /// `struct virtio_fs_config` without `notify_buf_size` (virtio 1.3, 5.11.4).
    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        config.extend_from_slice(&(self.queues as u32).to_le_bytes());
        config
    }

    fn widen(&self, jail: &mut ProcessJail) {
        let settings = self.fs.settings();
        jail.open_files += (MAX_HANDLES + DIRECTORIES) as u64;
        jail.share = Some(Share {
            directory: self.fs.root().as_raw_fd(),
            writable: !settings.read_only,
            namespace: self.namespace.as_ref().map(AsRawFd::as_raw_fd),
        });
        if settings.act {
            jail.capabilities = ACTING;
        }
    }

    fn start_threads(&mut self) -> io::Result<()> {
        let pool = Pool::start(&self.fs, self.sandbox)?;
        for index in 1..=self.queues {
            let worker = Worker::new(index, &self.fs, &pool, self.sandbox)?;
            self.workers.push(worker);
        }
        Ok(())
    }

    fn attach(&mut self, host: &Host) {
        self.namespace = None;
        self.fs.attach(host);
    }

    fn restore(&mut self, key: u64, fd: OwnedFd) {
        self.fs.restore(key, fd);
    }

    fn start_queue(&mut self, ring: Vring) -> io::Result<()> {
        let size = usize::from(ring.queue.size());
        if size > MAX_QUEUE_SIZE {
            let message = format!("{size} entries, at most {MAX_QUEUE_SIZE} are possible");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        self.fs.begin();
        if ring.index == URGENT {
            self.urgent = Some(ring);
            self.broken = false;
            return Ok(());
        }
        match self.workers.get_mut(ring.index - 1) {
            Some(worker) => worker.start(ring),
            None => Err(io::Error::other("it has no thread")),
        }
    }

    fn stop_queue(&mut self, index: usize) -> u16 {
        if index == URGENT {
            let ring = self.urgent.take();
            return ring.map_or(0, |ring| ring.queue.next_avail());
        }
        let worker = self.workers.get_mut(index - 1);
        worker.map_or(0, Worker::stop)
    }

    /// The guest that had the file system mounted is no more.
    fn reset(&mut self) {
        self.fs.unmount();
    }

    fn event_fds(&self) -> Vec<Watch<'_>> {
        match &self.urgent {
            Some(ring) if !self.broken => vec![(ring.kick.as_fd(), 0)],
            _ => Vec::new(),
        }
    }

    fn handle_event(&mut self, _token: u64) {
        let Some(mut ring) = self.urgent.take() else {
            return;
        };
        if !ring.clear_kick() {
            warn_limited!("urgent queue: its kick is not an eventfd");
            self.broken = true;
        } else if let Err(error) = self.serve_urgent(&mut ring) {
            ring.give_up(&error);
            self.broken = true;
        }
        self.urgent = Some(ring);
    }
}
