//! What a client asks of a running VM, and the answers. Each is one line of JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Most bytes of a request, with the end of its line.
pub const MAX_REQUEST: usize = 4096;
/// Most bytes of a response that a client takes.
pub const MAX_RESPONSE: u64 = 1 << 20;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the VM is made of, and how it is.
    Status,
    /// Put another process in the place of a device's, in which what is in flight is finished
    /// first. The program at its path is started, which may be a newer one.
    RestartDevice {
        /// Id of the device.
        id: String,
    },
    /// Press the guest's power button.
    PowerButton,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// The device is served by another process.
    Restarted {
        /// Milliseconds for which the guest has waited.
        pause: f64,
    },
    /// It is done.
    Done,
    /// It is not.
    Failed {
        /// Why.
        message: String,
    },
}

/// A running VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Status {
    /// Its name; without one, the process id of its supervisor.
    pub name: String,
    /// Process id of its supervisor.
    pub pid: u32,
    /// `starting`, `running`, `stopping`, or `disconnected`: the guest has reset and waits for an
    /// external back end.
    pub phase: String,
    /// Accelerator: `kvm`, `soft` or `none`.
    pub accel: String,
    /// Its processes: the supervisor, the VMM, the devices in their order, the serial port.
    pub processes: Vec<Process>,
}

/// A process of a VM, or a back end that somebody else has started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Process {
    /// `supervisor`, `vmm`, or the kind of device: `blk`, `console`, …
    pub role: String,
    /// Id of the device, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Process id; none while there is no process, and for external back ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// The socket of an external back end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// `serving`, or `lost`: the guest waits for it.
    pub state: String,
    /// How often another process has taken its place.
    pub restarts: u64,
    /// Milliseconds for which the guest has waited the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_pause: Option<f64>,
    /// What it sees of guest memory: `none`, `shared` (all of it), or `bounce` (a region of its own,
    /// through which the VMM copies).
    pub memory: String,
    /// Why the guest has never used the device, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub untouched: Option<String>,
}
