//! Messages between the supervisor and `anemone-vmm`.
//!
//! The conversation: the supervisor sends [`ToVmm::Configure`] once. The VMM answers
//! [`FromVmm::Ready`] when the guest could run, or [`FromVmm::Refused`] and exits. The
//! supervisor then sends [`ToVmm::Start`] (or closes the channel, which ends a `check`). From then on
//! [`FromVmm::Event`] follows; after an event that ends the guest the VMM exits. A back end that is
//! lost does not end it: the supervisor sends a connection to the next one.

use serde::{Deserialize, Serialize};

use crate::FdIndex;

/// Everything a VMM needs to build its machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`crate::VERSION`] of the sender.
    pub version: u32,
    /// Machine version; only `virt-1` exists.
    pub machine: String,
    /// The accelerator and what it needs.
    pub accel: Accel,
    /// Number of virtual CPUs, 1 to 64.
    pub cpus: u32,
    /// Name of the CPU model.
    pub cpu_model: String,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// A memfd of exactly `memory` bytes, sealed against resizing.
    pub memory_fd: FdIndex,
    /// The kernel image.
    pub kernel: FdIndex,
    /// The initial RAM file system.
    pub initrd: Option<FdIndex>,
    /// Kernel command line, without a terminating NUL.
    pub cmdline: String,
    /// virtio devices, each served by a vhost-user back end.
    pub devices: Vec<Device>,
    /// Byte stream socket of the 16550 UART, where the machine has one.
    pub serial: Option<FdIndex>,
    /// Slot of the guest-panic device, where the machine has one.
    pub panic_device: Option<u8>,
    /// Where to write all ACPI tables, one after the other.
    pub acpi_dump: Option<FdIndex>,
}

/// The accelerator of a VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Accel {
    /// Linux KVM through this open `/dev/kvm`.
    Kvm {
        /// `/dev/kvm`.
        device: FdIndex,
    },
    /// The VMM's own CPU.
    Soft,
    /// No CPU: a test drives the machine through this stream socket.
    None {
        /// The driver's socket; absent for a `check`, where nothing runs.
        socket: Option<FdIndex>,
    },
}

/// One virtio device of the machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Name in messages.
    pub id: String,
    /// virtio device type (virtio 1.2 section 5).
    pub device_type: u16,
    /// PCI slot on bus 0, 1 to 31.
    pub slot: u8,
    /// Number of virtqueues the machine offers at most; the back end may have fewer.
    pub queues: u16,
    /// Most descriptors of a virtqueue, a power of two up to 256.
    pub queue_size: u16,
    /// Length of the device-specific configuration in bytes, 0 to 256.
    pub config_size: u16,
    /// Connected vhost-user stream socket; absent for a `check`.
    pub socket: Option<FdIndex>,
    /// Device-specific configuration, where it is not the back end's to say; `config_size` is 0 then.
    pub config: Option<Vec<u8>>,
    /// Persistent memory of the device, where it is one.
    pub pmem: Option<Pmem>,
    /// What the back end sees in place of guest memory; absent if it sees that.
    pub bounce: Option<Bounce>,
}

/// The region through which the VMM copies what passes between the guest and a back end that does not
/// see guest memory.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounce {
    /// A memfd of exactly `size` bytes, sealed against resizing; absent for a `check`.
    pub fd: Option<FdIndex>,
    /// Its length in bytes, whole pages.
    pub size: u64,
}

/// The file behind a persistent memory. The VMM puts it where the machine's rules say, and tells the
/// guest where that is in the device's configuration space.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// The file, open for reading, and for writing unless it is read-only.
    pub file: FdIndex,
    /// How much of it the guest has, a multiple of 2 MiB; it is at least that long.
    pub size: u64,
    /// The guest cannot write.
    pub read_only: bool,
}

/// Supervisor to VMM.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToVmm {
    /// Build the machine.
    Configure(Box<VmConfig>),
    /// Let the guest run.
    Start,
    /// The user pressed the power button.
    PowerButton,
    /// Go on with another back end of a device. The one before can touch guest memory no more.
    Reconnect {
        /// Id of the device.
        id: String,
        /// Number of the connection, higher than those before; the first of a device is 0.
        connection: u32,
        /// Connected vhost-user stream socket.
        socket: FdIndex,
    },
    /// Tell what the guest has made of its devices.
    Devices,
}

/// VMM to supervisor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromVmm {
    /// The machine is built.
    Ready(Summary),
    /// The configuration cannot be built; nothing has run.
    Refused {
        /// What was wrong, for the user.
        message: String,
    },
    /// Something happened to the guest.
    Event(Event),
    /// The answer to [`ToVmm::Devices`]; also sent before an event that ends the guest.
    Devices(Vec<DeviceUse>),
}

/// What the guest has made of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceUse {
    /// Id of the device.
    pub id: String,
    /// Why no driver has ever used it, for the user; absent if one has.
    pub untouched: Option<String>,
}

/// The machine as built, for `anemone check`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// How the kernel is entered, for example "bzImage, LZ4 payload, 64-bit entry".
    pub boot: String,
    /// Guest-physical ranges: first address, length, what.
    pub memory_map: Vec<(u64, u64, String)>,
    /// I/O ports decoded: first, count, what.
    pub ports: Vec<(u16, u16, String)>,
    /// PCI functions: slot, vendor:device, name.
    pub pci: Vec<(u8, String, String)>,
    /// Version of Landlock's interface that the VMM's jail uses; 0 where the host has none.
    pub landlock: u32,
}

/// What can happen to a running guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The guest powered off through ACPI.
    Shutdown,
    /// The guest asked for a reset, or triple-faulted.
    Reset {
        /// "reset register", "triple fault", …
        cause: String,
    },
    /// The guest kernel panicked. The guest goes on: it may still write a crash dump or reset.
    Panic,
    /// A device's back end is gone, does not answer or broke the protocol. The device waits for
    /// [`ToVmm::Reconnect`]; the guest goes on.
    BackendLost {
        /// Id of the device.
        id: String,
        /// Number of the connection that failed.
        connection: u32,
        /// What happened.
        reason: String,
    },
    /// The back end of a [`ToVmm::Reconnect`] serves the guest.
    BackendBack {
        /// Id of the device.
        id: String,
        /// Number of the connection.
        connection: u32,
    },
    /// The back end of a [`ToVmm::Reconnect`] cannot go on where the one before was lost. The
    /// guest's driver is told to reset the device.
    BackendUnfit {
        /// Id of the device.
        id: String,
        /// What does not fit.
        reason: String,
    },
    /// The VMM cannot go on.
    Failed {
        /// What happened.
        message: String,
    },
}
