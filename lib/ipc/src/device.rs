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
    /// The balloon is to be so large. With or without a size, its process answers
    /// [`FromDevice::Balloon`] when the guest has told its statistics, or at once if it cannot be
    /// asked.
    Balloon {
        /// In bytes; absent if it is only asked about.
        target: Option<u64>,
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
    Ready {
        /// Version of Landlock's interface that its jail uses; 0 where the host has none.
        landlock: u32,
    },
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
    /// The state of the balloon: asked for by [`ToDevice::Balloon`], or told regularly.
    Balloon(Balloon),
    /// The user asked on the console to end the VM (escape key, then `x`).
    QuitRequested,
    /// The user asked on the console for the power button (escape key, then `p`).
    PowerRequested,
}

/// The state of a balloon. All but the target is what the guest says, who may say anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// How large it is to be, in bytes.
    pub target: u64,
    /// How large it is, in bytes.
    pub actual: u64,
    /// Statistics of the guest, at most [`Balloon::STATISTICS`]: tag and value (virtio 1.3,
    /// 5.5.6.3). None before a driver has told any.
    pub statistics: Vec<(u16, u64)>,
}

impl Balloon {
    /// Most statistics that are passed on: the tags that exist, and room for some more.
    pub const STATISTICS: usize = 16;

    /// Name of a statistic and whether it is in bytes; no name for tags that do not exist.
    pub fn statistic(tag: u16) -> Option<(&'static str, bool)> {
        Some(match tag {
            0 => ("swapped in", true),
            1 => ("swapped out", true),
            2 => ("major faults", false),
            3 => ("minor faults", false),
            4 => ("free memory", true),
            5 => ("total memory", true),
            6 => ("available memory", true),
            7 => ("disk caches", true),
            8 => ("huge pages allocated", false),
            9 => ("huge page allocations failed", false),
            _ => return None,
        })
    }
}
