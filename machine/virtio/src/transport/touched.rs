//! How far drivers have come with a device, to tell why it was never used.

use std::fmt;

use super::common::{Common, status};

/// The furthest that any driver has come since the machine was made.
#[derive(Debug, Default)]
pub(super) struct Reached {
    /// A driver took the device.
    driver: bool,
    /// FEATURES_OK was asked for and not granted.
    refused: bool,
    /// A driver gave up.
    failed: bool,
    /// Features were agreed on.
    features: bool,
    /// A driver said DRIVER_OK, and had enabled a queue.
    queues: bool,
    /// A driver said DRIVER_OK.
    started: bool,
    /// A driver has made a buffer available.
    pub used: bool,
}

/// Why no driver has used a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Untouched {
    /// The guest has no driver for it: the status was never beyond ACKNOWLEDGE.
    NoDriver,
    /// The driver and the device did not agree on features.
    Features,
    /// The driver gave up (status FAILED).
    GaveUp,
    /// The driver never came to DRIVER_OK.
    NotStarted,
    /// The driver started the device without a queue.
    NoQueue,
    /// The driver never made a buffer available.
    NoRequest,
}

impl Reached {
    /// The driver has written a status, and it is `now` that.
    pub fn status(&mut self, written: u8, now: u8, common: &Common) {
        self.driver |= now & status::DRIVER != 0;
        self.failed |= now & status::FAILED != 0;
        self.features |= now & status::FEATURES_OK != 0;
        self.refused |= written & !now & status::FEATURES_OK != 0;
        if now & status::DRIVER_OK != 0 {
            self.started = true;
            self.queues |= common.queues.iter().any(|queue| queue.enabled);
        }
    }

    /// What kept drivers from it.
    pub fn untouched(&self) -> Option<Untouched> {
        Some(match self {
            Self { used: true, .. } => return None,
            Self { queues: true, .. } => Untouched::NoRequest,
            Self { started: true, .. } => Untouched::NoQueue,
            Self {
                refused: true,
                features: false,
                ..
            } => Untouched::Features,
            Self { failed: true, .. } => Untouched::GaveUp,
            Self { driver: true, .. } => Untouched::NotStarted,
            Self { .. } => Untouched::NoDriver,
        })
    }
}

impl fmt::Display for Untouched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoDriver => "the guest has no driver for it",
            Self::Features => "its driver and the device did not agree on features",
            Self::GaveUp => "its driver gave up on it",
            Self::NotStarted => "its driver never said that it was ready",
            Self::NoQueue => "its driver never made a queue ready",
            Self::NoRequest => "its driver never made a request",
        })
    }
}
