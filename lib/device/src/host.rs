//! The device's way to the front end and to the supervisor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anemone_ipc::device::{Balloon, FromDevice};
use anemone_ipc::{Channel, Error, FdIndex};
use anemone_log::warn_limited;
use anemone_vhost_user::BackendRequestSender;

/// Carries a device's messages to the outside. Clones share one state; nothing here waits, except
/// for room in the channel to the supervisor where that is said.
#[derive(Debug, Clone)]
pub struct Host {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    control: Option<Channel>,
    requests: Mutex<Option<BackendRequestSender>>,
    quit: AtomicBool,
}

impl Host {
    pub(crate) fn new(control: Option<Channel>) -> Self {
        Self {
            shared: Arc::new(Shared {
                control,
                requests: Mutex::new(None),
                quit: AtomicBool::new(false),
            }),
        }
    }

    /// Tells the front end that the device configuration has changed. Lost if there is no front end
    /// or it did not ask for such messages: it reads the configuration when it connects.
    pub fn config_changed(&self) {
        let mut requests = self.requests();
        if let Some(sender) = requests.as_mut()
            && let Err(error) = sender.config_changed()
        {
            warn_limited!("a configuration change was not reported: {error}");
        }
    }

    /// The user asked to end the VM. Without a supervisor the process ends; call it on the main
    /// thread then.
    pub fn quit_requested(&self) {
        if self.shared.control.is_some() {
            self.send(&FromDevice::QuitRequested);
        } else {
            self.shared.quit.store(true, Ordering::Relaxed);
        }
    }

    /// The user pressed the power button.
    pub fn power_requested(&self) {
        if self.shared.control.is_some() {
            self.send(&FromDevice::PowerRequested);
        } else {
            log::info!("there is no supervisor to press the power button");
        }
    }

    /// Tells the supervisor the state of the balloon.
    pub fn balloon(&self, state: Balloon) {
        self.send(&FromDevice::Balloon(state));
    }

    /// Has the supervisor keep a copy of `fd` under `key`, in place of what it keeps under that key,
    /// and give it to the process that replaces this one
    /// ([`Device::restore`](crate::Device::restore)). Returns when that is on its way, and so
    /// happens whatever becomes of this process; waits for room in the channel if need be. Without
    /// a supervisor it does nothing.
    ///
    /// # Errors
    /// The supervisor has gone.
    pub fn keep(&self, key: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        let fds = [fd];
        let message = FromDevice::Keep {
            key,
            fd: FdIndex(0),
        };
        self.send_waiting(&message, &fds)
    }

    /// Has the supervisor give up what it keeps under `key`, if anything. Waits like
    /// [`keep`](Self::keep).
    pub fn forget(&self, key: u64) {
        let message = FromDevice::Forget { key };
        if let Err(error) = self.send_waiting(&message, &[]) {
            warn_limited!("{message:?} did not reach the supervisor: {error}");
        }
    }

    /// Has the supervisor connect to the host's UNIX socket for a port of this device; it knows
    /// the path. The answer is [`Device::dialed`](crate::Device::dialed) with the same `id`. Waits
    /// like [`keep`](Self::keep).
    ///
    /// # Errors
    /// The supervisor has gone, or there is none.
    pub fn dial(&self, id: u64, port: u32) -> io::Result<()> {
        if self.shared.control.is_none() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.send_waiting(&FromDevice::Dial { id, port }, &[])
    }

    fn send_waiting(&self, message: &FromDevice, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some(control) = &self.shared.control else {
            return Ok(());
        };
        loop {
            match control.send(message, fds) {
                Ok(()) => return Ok(()),
                Err(error) if error.is_would_block() => {}
                Err(Error::Io(error)) => return Err(error),
                Err(error) => return Err(io::Error::other(error)),
            }
            let mut poll = libc::pollfd {
                fd: control.as_fd().as_raw_fd(),
                events: libc::POLLOUT,
                revents: 0,
            };
            // SAFETY: one valid pollfd. Whatever the result, sending is tried again and says more.
            unsafe { libc::poll(&raw mut poll, 1, -1) };
        }
    }

    pub(crate) fn send(&self, message: &FromDevice) {
        if let Some(control) = &self.shared.control
            && let Err(error) = control.send(message, &[])
        {
            warn_limited!("{message:?} did not reach the supervisor: {error}");
        }
    }

    pub(crate) fn control(&self) -> Option<&Channel> {
        self.shared.control.as_ref()
    }

    pub(crate) fn set_requests(&self, sender: Option<BackendRequestSender>) {
        *self.requests() = sender;
    }

    pub(crate) fn quits(&self) -> bool {
        self.shared.quit.load(Ordering::Relaxed)
    }

    fn requests(&self) -> std::sync::MutexGuard<'_, Option<BackendRequestSender>> {
        // A sender has no state that a panic could leave half changed.
        self.shared
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
