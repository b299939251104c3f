//! virtio over PCI, with every device behind a vhost-user connection.
//!
//! [`VirtioPci`] is what the guest sees: a modern virtio-pci function (virtio 1.2, section 4.1).
//! It answers every access at once from its own registers. What the guest has set up is handed,
//! when the driver says DRIVER_OK, as one latched [`Start`] to the device's own thread, which
//! talks to the back end process; nothing the guest writes later reaches that conversation.
//!
//! ```text
//!  vCPU threads                    device thread                     back end process
//!  VirtioPci (registers) --Work--> FrontEnd (vhost-user messages) --> rings, eventfds
//!        ^------------- reset_done, config_changed, needs_reset --'
//! ```
//!
//! A slow or dead back end therefore delays only its own device: a driver that resets it reads
//! the old status until the device thread is done, as the specification allows. A back end that is
//! lost is replaced under a running guest ([`FrontEnd`]).

mod bounce;
mod front_end;
mod ram;
mod session;
mod transport;
mod work;

pub use bounce::{Bounce, Error as BounceError};
pub use front_end::{FrontEnd, Notice};
pub use ram::GuestRam;
pub use session::{Connected, Error, Limits};
pub use transport::{Layout, QUEUE_SIZE, Untouched, VirtioPci};
pub use work::{Reconnect, Start, StartQueue, Work, WorkQueue};

/// Feature bits of virtio 1.2, section 6.
mod feature {
    /// The device complies with virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Device-specific bits, and the ring features that the transport passes on unseen:
    /// INDIRECT_DESC, EVENT_IDX, VERSION_1 and IN_ORDER. What needs the transport's help
    /// (packed rings, ring reset, notification data, access platform) is not offered.
    pub const OFFERED: u64 =
        0x00FF_FFFF | 1 << 28 | 1 << 29 | VERSION_1 | 1 << 35 | 0xFFFC_0000_0000_0000;
}
