//! Messages between `anemone-passt`, which keeps passt running, and the network device that uses
//! it.

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// Network device to keeper.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToKeeper {
    /// A new connection to passt is wanted, in place of all earlier ones.
    Connect,
}

/// Keeper to network device: the answer to [`ToKeeper::Connect`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromKeeper {
    /// A connection that nobody has used.
    Connected {
        /// A connected stream socket.
        socket: FdIndex,
    },
    /// There is none now; ask again later.
    Unavailable {
        /// Why, for the log.
        message: String,
    },
}
