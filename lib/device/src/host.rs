//! The device's way to the front end and to the supervisor.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anemone_ipc::Channel;
use anemone_ipc::device::FromDevice;
use anemone_log::warn_limited;
use anemone_vhost_user::BackendRequestSender;

/// Carries a device's messages to the outside. Clones share one state; nothing here waits.
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
