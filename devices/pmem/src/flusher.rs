//! The thread that waits for the storage, so that the main thread need not.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;

use anemone_device::Mode;

use crate::file::Backing;
use crate::policies;

/// Calling `fdatasync` needs little.
const STACK_SIZE: usize = 64 << 10;

/// Flushes the file, one flush at a time, on a thread with a policy of its own.
pub struct Flusher {
    /// Until the thread has them.
    idle: Option<(Backing, Receiver<()>, Sender<bool>)>,
    orders: Sender<()>,
    /// Whether a flush was a success.
    results: Receiver<bool>,
    /// Readable when there may be a result.
    done: Arc<OwnedFd>,
    sandbox: Mode,
}

impl Flusher {
    /// A flusher that does not run yet.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn new(backing: Backing, sandbox: Mode) -> io::Result<Self> {
        // SAFETY: eventfd takes no pointer.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let (orders, orders_end) = channel();
        let (results_end, results) = channel();
        Ok(Self {
            idle: Some((backing, orders_end, results_end)),
            orders,
            results,
            // SAFETY: the descriptor is new and ours.
            done: Arc::new(unsafe { OwnedFd::from_raw_fd(fd) }),
            sandbox,
        })
    }

    /// Starts the thread, which takes on its policy and waits for orders.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(&mut self) -> io::Result<()> {
        if let Some((backing, orders, results)) = self.idle.take() {
            let (sandbox, done) = (self.sandbox, Arc::clone(&self.done));
            thread::Builder::new()
                .name("flush".to_owned())
                .stack_size(STACK_SIZE)
                .spawn(move || {
                    run(backing, &orders, &results, &done, sandbox);
                    anemone_sandbox::rest();
                })?;
        }
        Ok(())
    }

    /// Begins a flush, which covers all that was written before.
    pub fn begin(&self) {
        // The thread hears orders for as long as there is somebody to give them.
        let _ = self.orders.send(());
    }

    /// Whether the flush that was begun was a success, if it has ended.
    pub fn ended(&self) -> Option<bool> {
        let mut count = [0u8; 8];
        // SAFETY: the buffer is 8 bytes long and outlives the call.
        unsafe { libc::read(self.done.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
        match self.results.try_recv() {
            Ok(success) => Some(success),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(false),
        }
    }

    /// Waits until the flush that was begun has ended: whether it was a success.
    pub fn wait(&self) -> bool {
        self.results.recv().unwrap_or(false)
    }
}

impl AsFd for Flusher {
    /// Readable when a flush may have ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}

fn run(
    mut backing: Backing,
    orders: &Receiver<()>,
    results: &Sender<bool>,
    done: &OwnedFd,
    sandbox: Mode,
) {
    if let Err(error) = anemone_sandbox::restrict(&policies::FLUSH, sandbox) {
        // Requests could not be answered otherwise.
        log::error!("{error}");
        std::process::exit(1);
    }
    while orders.recv().is_ok() {
        let result = backing.flush();
        if let Err(error) = &result {
            anemone_log::warn_limited!("a flush has failed: {error}");
        }
        let _ = results.send(result.is_ok());
        let one = 1u64.to_ne_bytes();
        // SAFETY: the buffer is 8 bytes long and outlives the call.
        unsafe { libc::write(done.as_raw_fd(), one.as_ptr().cast(), 8) };
    }
}
