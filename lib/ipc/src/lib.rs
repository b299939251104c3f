//! The typed, versioned messages between the supervisor and the processes it starts, and the
//! channel that carries them.
//!
//! A [`Channel`] is one end of a `SOCK_SEQPACKET` socket pair. One packet is one message: JSON
//! text with named fields, and the descriptors it refers to as `SCM_RIGHTS`. Messages name
//! descriptors by [`FdIndex`], their position in that list; nothing is ever named by path. The
//! receiver treats its peer as hostile: a packet that is too long, carries the wrong number of
//! descriptors or does not parse is an error, never a panic, and all descriptors received are
//! closed on exec.
//!
//! There are two protocols, one per privilege: [`vmm`] towards the process that runs the guest
//! and [`device`] towards a device back end.

mod channel;
pub mod device;
pub mod keeper;
pub mod vmm;

pub use channel::{Channel, Error, MAX_FDS, Received, pair};
use serde::{Deserialize, Serialize};

/// Version of both protocols. Supervisor and children come from one release, so a difference
/// means a mixed installation and is refused at the first message.
pub const VERSION: u32 = 1;

/// Descriptor number at which every child process finds its control [`Channel`].
pub const CONTROL_FD: i32 = 3;

/// Position of a descriptor in the list that travels with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FdIndex(pub u16);
