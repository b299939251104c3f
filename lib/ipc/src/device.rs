//! Messages between the supervisor and a device back end that it started.
//!
//! The back end is configured by its command line, serves the connections it is given one after
//! the other, and ends when the supervisor closes the channel.
//!
//! A process may end at any moment, and another with the same arguments takes its place. What the
//! new one needs of the old one, files and memory, the old one has had the supervisor
//! [keep](FromDevice::Keep); the new one gets it as [`ToDevice::Kept`], before its first
//! [`ToDevice::Connect`].

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// Supervisor to device process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToDevice {
    /// What an earlier process has had the supervisor keep, before any connection (where there is
    /// none, before the process is started); in several messages if there is much. The descriptor of each key has the key's position.
    Kept {
        /// The keys, none twice.
        keys: Vec<u64>,
    },
    /// Serve this vhost-user connection, in place of an earlier one that has ended.
    Connect {
        /// A connected stream socket.
        socket: FdIndex,
    },
    /// The answer to [`FromDevice::Dial`].
    Dialed {
        /// The question's.
        id: u64,
        /// The connected stream socket; none if nobody listens there, or there were too many
        /// questions.
        socket: Option<FdIndex>,
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
    /// Keep this for the process that replaces this one, in place of what has been kept under the
    /// same key.
    Keep {
        /// The device's name for it.
        key: u64,
        /// A copy of the descriptor.
        fd: FdIndex,
    },
    /// What was kept under this key is not needed any more. There may be nothing.
    Forget {
        /// The device's name for it.
        key: u64,
    },
    /// Connect to the host's UNIX socket for this port, whose path the supervisor knows.
    Dial {
        /// Comes back with the answer.
        id: u64,
        /// A port of the device's address family.
        port: u32,
    },
    /// The user asked on the console to end the VM (escape key, then `x`).
    QuitRequested,
    /// The user asked on the console for the power button (escape key, then `p`).
    PowerRequested,
}
