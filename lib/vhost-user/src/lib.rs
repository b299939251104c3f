//! The vhost-user protocol: messages, the socket that carries them, and both of its ends.
//!
//! The front end is the side that owns the virtqueues' description (a virtual machine monitor),
//! the back end the side that serves them (a device process). [`Frontend`] speaks for the first,
//! [`Backend`] listens for the second. Both treat their peer as hostile: lengths, flags and
//! descriptor counts are checked before anything is used, and every wait has a deadline.
//!
//! "Spec" in this crate means the *Vhost-user Protocol* document that QEMU maintains
//! (docs/interop/vhost-user.rst); section names are quoted from it. Numbers are in host byte order,
//! as both ends run on one machine (Spec, "Message Specification").

mod backend;
mod connection;
mod frontend;
pub mod message;

pub use backend::{Backend, BackendRequestSender, Command, Incoming, ReceivedRegion};
pub use connection::{Connection, Message};
pub use frontend::{BackendRequest, BackendRequestReceiver, Frontend, MemoryRegion};
pub use message::{InflightDescription, Request, VringAddr};

use thiserror::Error;

/// Result of every call that talks to the peer.
pub type Result<T> = std::result::Result<T, Error>;

/// Why talking to the peer failed. After [`Error::Refused`] and [`Error::NotNegotiated`] the
/// connection stays usable; after any other error it is shut down.
#[derive(Debug, Error)]
pub enum Error {
    /// The peer closed the connection between two messages.
    #[error("vhost-user: the peer has closed the connection")]
    Closed,
    /// The deadline passed while waiting for the peer.
    #[error("vhost-user: no answer from the peer in time")]
    Timeout,
    /// The peer broke the protocol, or the caller asked for something it cannot express.
    #[error("vhost-user: {0}")]
    Protocol(String),
    /// The back end answered a request with an error.
    #[error("vhost-user: the back end refused {0} (code {1})")]
    Refused(Request, u64),
    /// The request belongs to a protocol feature that has not been negotiated.
    #[error("vhost-user: {0} needs a protocol feature that has not been negotiated")]
    NotNegotiated(Request),
    /// The socket failed.
    #[error("vhost-user: {0}")]
    Io(#[from] std::io::Error),
}

impl Error {
    pub(crate) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol(what.into())
    }
}
