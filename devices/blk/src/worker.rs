//! The thread of a queue, which lives as long as the process and serves the queue's ring whenever
//! it is started.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anemone_device::{Mode, Vring};

use crate::engine::{DisabledRing, Engine, SyncEngine, UringEngine};
use crate::policies;
use crate::queue::serve;
use crate::request::Disk;

/// Serving a request needs little, and what is never touched costs nothing.
const STACK_SIZE: usize = 128 << 10;

/// How a stop request reaches the thread.
struct Stop {
    /// Looked at between batches.
    requested: AtomicBool,
    /// An eventfd that ends a wait.
    wake: OwnedFd,
}

enum Reply {
    Started(io::Result<()>),
    /// With the index of the next available entry.
    Stopped(u16),
}

/// What a queue has before its first start.
struct Idle {
    index: usize,
    disk: Arc<Disk>,
    stop: Arc<Stop>,
    ring: Option<DisabledRing>,
    sandbox: Mode,
}

struct Thread {
    commands: Sender<Vring>,
    replies: Receiver<Reply>,
    running: bool,
}

/// One queue of the disk.
pub struct Worker {
    stop: Arc<Stop>,
    idle: Option<Idle>,
    thread: Option<Thread>,
}

impl Worker {
    /// Prepares queue number `index`; with `uring`, makes its ring.
    pub fn new(index: usize, disk: Arc<Disk>, uring: bool, sandbox: Mode) -> io::Result<Self> {
        // SAFETY: eventfd takes no pointer.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let stop = Arc::new(Stop {
            requested: AtomicBool::new(false),
            // SAFETY: the descriptor is new and ours.
            wake: unsafe { OwnedFd::from_raw_fd(fd) },
        });
        let ring = if uring {
            Some(DisabledRing::new(&disk.image, stop.wake.as_fd())?)
        } else {
            None
        };
        Ok(Self {
            stop: Arc::clone(&stop),
            idle: Some(Idle {
                index,
                disk,
                stop,
                ring,
                sandbox,
            }),
            thread: None,
        })
    }

    /// The descriptor by which the thread is woken.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.stop.wake.as_fd()
    }

    /// Starts the thread, which takes on its policy and waits for a ring.
    pub fn start_thread(&mut self) -> io::Result<()> {
        if let Some(idle) = self.idle.take() {
            let (commands, commands_end) = channel();
            let (replies_end, replies) = channel();
            thread::Builder::new()
                .name(format!("queue{}", idle.index))
                .stack_size(STACK_SIZE)
                .spawn(move || idle.run(&commands_end, &replies_end))?;
            self.thread = Some(Thread {
                commands,
                replies,
                running: false,
            });
        }
        Ok(())
    }

    /// Hands over a ring and returns when it is being served.
    pub fn start(&mut self, ring: Vring) -> io::Result<()> {
        let gone = || io::Error::other("its thread could not be started");
        let thread = self.thread.as_mut().ok_or_else(gone)?;
        self.stop.requested.store(false, Ordering::Release);
        thread.commands.send(ring).map_err(|_| gone())?;
        match thread.replies.recv() {
            Ok(Reply::Started(result)) => {
                thread.running = result.is_ok();
                result
            }
            _ => Err(gone()),
        }
    }

    /// Finishes what is in flight; returns the index of the next available entry, or `None` if
    /// no ring is being served.
    pub fn stop(&mut self) -> Option<u16> {
        let thread = self.thread.as_mut().filter(|thread| thread.running)?;
        thread.running = false;
        self.stop.requested.store(true, Ordering::Release);
        let mut count = 1u64;
        let fd = self.stop.wake.as_raw_fd();
        // SAFETY: 8 bytes are read from `count`.
        unsafe { libc::write(fd, (&raw const count).cast(), 8) };
        let reply = thread.replies.recv();
        // Cleared here: the thread may have seen the flag before the eventfd was written.
        // SAFETY: at most 8 bytes are stored in `count`.
        unsafe { libc::read(fd, (&raw mut count).cast(), 8) };
        match reply {
            Ok(Reply::Stopped(next_avail)) => Some(next_avail),
            _ => None,
        }
    }
}

impl Idle {
    fn run(mut self, commands: &Receiver<Vring>, replies: &Sender<Reply>) {
        let ring = self.ring.take();
        if let Err(error) = self.serve_rings(ring, commands, replies) {
            // Operations may be in flight into memory that could no longer be kept mapped, and
            // the guest's requests would never be answered.
            log::error!("queue {}: {error}", self.index);
            std::process::exit(1);
        }
        anemone_sandbox::rest();
    }

    fn serve_rings(
        &self,
        ring: Option<DisabledRing>,
        commands: &Receiver<Vring>,
        replies: &Sender<Reply>,
    ) -> Result<(), Box<dyn Error>> {
        anemone_sandbox::restrict(&policies::QUEUE, self.sandbox)?;
        let mut ring = ring;
        let mut engine: Box<dyn Engine> = match &mut ring {
            Some(ring) => Box::new(UringEngine::new(ring, &self.disk.image)?),
            None => Box::new(SyncEngine::new(&self.disk.image, self.stop.wake.as_fd())),
        };
        while let Ok(mut vring) = commands.recv() {
            let attached = engine.attach(vring.kick.as_raw_fd());
            let started = attached.is_ok();
            let _ = replies.send(Reply::Started(attached));
            if !started {
                continue;
            }
            let next_avail = serve(&mut vring, &self.disk, &mut *engine, &self.stop.requested)?;
            engine.detach()?;
            drop(vring);
            let _ = replies.send(Reply::Stopped(next_avail));
        }
        Ok(())
    }
}
