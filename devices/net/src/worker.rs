//! The thread of a queue pair. It starts when the process is in its jail, takes on a policy of its
//! own, and lives as long as the process.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anemone_device::Mode;
use anemone_log::warn_limited;

use crate::pair::{Command, Pair};
use crate::policies;

/// Moving frames needs little, and what is never touched costs nothing.
const STACK_SIZE: usize = 128 << 10;

/// An eventfd, non-blocking.
#[derive(Debug)]
pub struct Event(OwnedFd);

impl Event {
    /// One that is not readable.
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes no pointer.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Makes it readable.
    pub fn set(&self) {
        let count = 1u64;
        // SAFETY: 8 bytes are read from `count`.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const count).cast(), 8) };
    }

    /// Makes it unreadable; whether it was readable.
    pub fn take(&self) -> bool {
        let mut count = 0u64;
        // SAFETY: at most 8 bytes are stored in `count`.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) == 8 }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How commands reach the thread, and how its news reach the main thread.
#[derive(Debug)]
pub struct Link {
    /// A command is waiting; looked at between turns.
    waiting: AtomicBool,
    /// Ends a wait.
    wake: Event,
    /// The connection of the stream has failed.
    pub lost: Event,
}

/// A queue pair, its thread once it has one.
pub struct Worker {
    index: usize,
    link: Arc<Link>,
    sandbox: Mode,
    idle: Option<Pair>,
    thread: Option<(Sender<Command>, Receiver<u16>)>,
}

impl Worker {
    /// Pair number `index`, without a thread.
    pub fn new(index: usize, pair: Pair, sandbox: Mode) -> io::Result<Self> {
        Ok(Self {
            index,
            link: Arc::new(Link {
                waiting: AtomicBool::new(false),
                wake: Event::new()?,
                lost: Event::new()?,
            }),
            sandbox,
            idle: Some(pair),
            thread: None,
        })
    }

    /// Readable when the connection of the stream has failed.
    pub fn lost(&self) -> &Event {
        &self.link.lost
    }

    /// Starts the thread, which takes on its policy and waits for commands.
    pub fn start_thread(&mut self) -> io::Result<()> {
        if let Some(pair) = self.idle.take() {
            self.thread = Some(self.start(pair)?);
        }
        Ok(())
    }

    /// Has a command carried out; for a stop, the index of the next available entry.
    ///
    /// # Errors
    /// There is no thread.
    pub fn run(&mut self, command: Command) -> io::Result<u16> {
        let gone = || io::Error::other("its thread is gone");
        let (commands, replies) = self.thread.as_ref().ok_or_else(gone)?;
        commands.send(command).map_err(|_| gone())?;
        self.link.waiting.store(true, Ordering::Release);
        self.link.wake.set();
        replies.recv().map_err(|_| gone())
    }

    fn start(&self, mut pair: Pair) -> io::Result<(Sender<Command>, Receiver<u16>)> {
        let (commands, commands_end) = channel();
        let (replies_end, replies) = channel();
        let (index, sandbox, link) = (self.index, self.sandbox, Arc::clone(&self.link));
        thread::Builder::new()
            .name(format!("pair{index}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let served = serve(&mut pair, sandbox, &link, &commands_end, &replies_end);
                if let Err(error) = served {
                    // Without the thread the guest's queues would stand still for ever.
                    log::error!("queue pair {index}: {error}");
                    std::process::exit(1);
                }
                anemone_sandbox::rest();
            })?;
        Ok((commands, replies))
    }
}

fn serve(
    pair: &mut Pair,
    sandbox: Mode,
    link: &Link,
    commands: &Receiver<Command>,
    replies: &Sender<u16>,
) -> Result<(), Box<dyn Error>> {
    anemone_sandbox::restrict(&policies::QUEUE, sandbox)?;
    loop {
        if link.waiting.swap(false, Ordering::Acquire) {
            while let Ok(command) = commands.try_recv() {
                if replies.send(pair.apply(command)).is_err() {
                    return Ok(());
                }
            }
        }
        match pair.turn() {
            Ok(true) => continue,
            Ok(false) => {}
            Err(error) => {
                warn_limited!("the connection has failed: {error}");
                link.lost.set();
                continue;
            }
        }
        if pair.wait(link.wake.as_fd())? {
            link.wake.take();
        }
    }
}
