//! Messages between the supervisor and a device back end that it started.
//!
//! The back end is configured by its command line, serves the connections it is given one after
//! the other, and ends when the supervisor closes the channel.

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// Supervisor to device process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToDevice {
    /// Serve this vhost-user connection, in place of an earlier one that has ended.
    Connect {
        /// A connected stream socket.
        socket: FdIndex,
    },
    /// The terminal on the console's standard input changed its size.
    WindowSize {
        /// Width in characters.
        columns: u16,
        /// Height in characters.
        rows: u16,
    },
}

/// Device process to supervisor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromDevice {
    /// The process is in its jail and serves.
    Ready,
    /// It cannot serve; it exits after this.
    Failed {
        /// What was wrong, for the user.
        message: String,
    },
    /// The user asked on the console to end the VM (escape key, then `x`).
    QuitRequested,
    /// The user asked on the console for the power button (escape key, then `p`).
    PowerRequested,
}
