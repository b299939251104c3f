//! The configuration as written: the TOML file, and what the command line adds to it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::balloon::Balloon;
use crate::net::Net;
use crate::share::Fs;
use crate::short::{self, Short, Switch};
use crate::value::{
    AccelType, CommandLine, CpuModel, DiskSerial, Exposure, Format, Id, Ids, Machine, MemorySize,
    OnPanic, OnReboot, RestartLimit, RestartPolicy, Sandbox, SinkType, Size, Within,
};
use crate::vhost_user::VhostUser;
use crate::vsock::Vsock;

/// Why a configuration file could not be read.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The file could not be opened or is not text.
    #[error("configuration {}: {source}{}", path.display(), detached_value(path))]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The text is not a configuration.
    #[error("{}:{line}: {message}\n    {text}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// What was found and what is allowed.
        message: String,
        /// The line itself.
        text: String,
    },
}

/// A virtual machine, as its user describes it. Everything but the kernel has a default.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Name of the VM in messages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Id>,
    /// The machine and its version.
    pub machine: Machine,
    /// What runs the guest's code.
    #[serde(deserialize_with = "short::table")]
    pub accel: Accel,
    /// Virtual CPUs.
    #[serde(deserialize_with = "short::table")]
    pub cpus: Cpus,
    /// Guest memory.
    #[serde(deserialize_with = "short::table")]
    pub memory: Memory,
    /// Kernel image: bzImage or ELF.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; by default it names the consoles that the machine has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<CommandLine>,
    /// Disks, in the order of their default slots.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "short::tables"
    )]
    pub disk: Vec<Disk>,
    /// Network cards, in the order of their default slots.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "short::tables"
    )]
    pub net: Vec<Net>,
    /// The virtio console; by default it is on standard input and output.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "short::optional_table"
    )]
    pub console: Option<Console>,
    /// The 16550 serial port; by default there is none.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "short::optional_table"
    )]
    pub serial: Option<Serial>,
    /// The virtio entropy source; by default there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rng: Option<Switch<Rng>>,
    /// The memory balloon; by default there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Switch<Balloon>>,
    /// Shared directories, in the order of default slots.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "short::tables"
    )]
    pub fs: Vec<Fs>,
    /// Persistent memory, in the order of default slots.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "short::tables"
    )]
    pub pmem: Vec<Pmem>,
    /// Sockets between the guest and the host; by default there are none.
    #[serde(
        skip_serializing_if = "Option::is_none",
        deserialize_with = "short::optional_table"
    )]
    pub vsock: Option<Vsock>,
    /// Devices whose back ends somebody else has started.
    #[serde(
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "short::tables"
    )]
    pub vhost_user: Vec<VhostUser>,
    /// The device by which a guest reports that its kernel panicked; by default there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub panic_device: Option<Switch<PanicDevice>>,
    /// What happens when the guest resets.
    pub on_reboot: OnReboot,
    /// What happens when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// What happens when a device process ends while the VM runs.
    #[serde(deserialize_with = "short::table")]
    pub restart: Restart,
    /// What a process does that its jail forbids.
    pub sandbox: Sandbox,
    /// The control group of the VM, and its limits.
    #[serde(deserialize_with = "short::table")]
    pub cgroup: Cgroup,
}

/// The control group of the VM, and its limits.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Cgroup {
    /// `auto`, `off`, or the group in which that of the VM is made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Most memory of all processes together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<Size>,
    /// Most processor time of all processes together, in percent of one CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_max: Option<Within<1, 6400>>,
    /// Most threads of all processes together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids_max: Option<Within<1, 65535>>,
    /// Most memory of each device process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_memory_max: Option<Size>,
}

/// Where the group of the VM is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupPlace<'a> {
    /// Nowhere.
    Off,
    /// In that of the supervisor, if it has been delegated.
    Auto,
    /// In this one.
    Path(&'a Path),
}

impl Cgroup {
    /// Where the group is to be made.
    pub fn place(&self) -> CgroupPlace<'_> {
        match self.path.as_deref() {
            None => CgroupPlace::Auto,
            Some(path) if path == Path::new("auto") => CgroupPlace::Auto,
            Some(path) if path == Path::new("off") => CgroupPlace::Off,
            Some(path) => CgroupPlace::Path(path),
        }
    }

    /// Whether anything is limited.
    pub fn has_limits(&self) -> bool {
        let sizes = self.memory_max.or(self.device_memory_max).is_some();
        sizes || self.cpu_max.is_some() || self.pids_max.is_some()
    }
}

/// What happens when a device process ends while the VM runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Restart {
    /// Whether it is started again.
    pub policy: RestartPolicy,
    /// How often, for each process. One that ends more often ends the VM.
    pub limit: RestartLimit,
    /// Devices whose processes are never started again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub never: Option<Ids>,
}

impl Restart {
    /// Whether the process of this device is started again.
    pub fn applies_to(&self, id: &str) -> bool {
        let excepted = self.never.iter().flat_map(|ids| &ids.0);
        self.policy == RestartPolicy::Always
            && excepted.into_iter().all(|other| other.as_str() != id)
    }
}

/// What runs the guest's code.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Accel {
    /// Which accelerator.
    #[serde(rename = "type")]
    pub kind: AccelType,
    /// For `none`: the UNIX socket at which the driver of the machine connects.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// Virtual CPUs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Cpus {
    /// How many.
    pub count: Within<1, 64>,
    /// What the guest sees as its CPU.
    pub model: CpuModel,
}

impl Default for Cpus {
    fn default() -> Self {
        Self {
            count: Within::min(),
            model: CpuModel::default(),
        }
    }
}

/// Guest memory.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Memory {
    /// How much.
    pub size: MemorySize,
}

/// A virtio disk: an image of this host, or a vhost-user-blk back end that already runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Disk {
    /// The image: a regular file or a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Format of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The guest cannot write; several VMs may share the image.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
    /// Name in messages, by default `disk` and the number of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 8 and the number of the disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// Number of virtqueues, by default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<Within<1, 64>>,
    /// Serial number that the guest sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<DiskSerial>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Program to use in place of `anemone-blk`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// UNIX socket of a vhost-user-blk back end that already runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// The virtio console.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Console {
    /// Where it goes, for the places that need no path.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<SinkType>,
    /// File to which output is appended; there is no input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// UNIX socket at which one client at a time may connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix: Option<PathBuf>,
    /// Name in messages, by default `console`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Program to use in place of `anemone-console`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// UNIX socket of a vhost-user-console back end that already runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// The 16550 serial port at I/O port 0x3F8.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Serial {
    /// Where it goes, for the places that need no path.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<SinkType>,
    /// File to which output is appended; there is no input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// UNIX socket at which one client at a time may connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unix: Option<PathBuf>,
    /// Name in messages, by default `serial`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// Program to use in place of `anemone-console`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
}

/// The virtio entropy source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Rng {
    /// Most bytes per second that the guest gets; by default there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Size>,
    /// Name in messages, by default `rng`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Program to use in place of `anemone-rng`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// UNIX socket of a vhost-user-rng back end that already runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

/// Persistent memory: a file of this host that the guest maps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Pmem {
    /// The file: a regular file or a block device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// How much of it the guest has, from its beginning; by default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// The guest cannot write; several VMs may share the file.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
    /// Name in messages, by default `pmem` and the number of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 24 and the number of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Program to use in place of `anemone-pmem`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
}

/// The device by which a guest reports that its kernel panicked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PanicDevice {
    /// PCI slot, by default 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
}

impl Short for Accel {
    const MAIN_KEY: Option<&'static str> = Some("type");
}
impl Short for Cpus {
    const MAIN_KEY: Option<&'static str> = Some("count");
}
impl Short for Memory {
    const MAIN_KEY: Option<&'static str> = Some("size");
}
impl Short for Cgroup {
    const MAIN_KEY: Option<&'static str> = Some("path");
}

impl Short for Restart {
    const MAIN_KEY: Option<&'static str> = Some("policy");
}
impl Short for Disk {
    const MAIN_KEY: Option<&'static str> = Some("path");
}
impl Short for Console {
    const MAIN_KEY: Option<&'static str> = Some("type");
}
impl Short for Serial {
    const MAIN_KEY: Option<&'static str> = Some("type");
}
impl Short for Rng {
    const MAIN_KEY: Option<&'static str> = None;
}
impl Short for Pmem {
    const MAIN_KEY: Option<&'static str> = Some("path");
}
impl Short for PanicDevice {
    const MAIN_KEY: Option<&'static str> = None;
}

/// Says what a name that is no file's probably was meant as.
fn detached_value(path: &Path) -> &'static str {
    match path.to_str() {
        Some(name) if name.contains('=') && !path.exists() => {
            "; an option that needs no value takes it behind `=`, as in --rng=rate=1000"
        }
        _ => "",
    }
}

impl Config {
    /// Reads a TOML file. Relative paths in it start at the folder of the file.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let text = fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        let mut config = Self::from_toml(&text, path)?;
        if let Some(folder) = path.parent() {
            config.rebase(folder);
        }
        Ok(config)
    }

    /// Reads TOML text; `path` is only for messages.
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, Error> {
        toml::from_str(text).map_err(|error| {
            // An error without a place concerns the file as a whole.
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let before = &text.as_bytes()[..start];
            let line = before.iter().filter(|byte| **byte == b'\n').count();
            Error::Content {
                path: path.to_owned(),
                line: line + 1,
                message: error.message().to_owned(),
                text: text.lines().nth(line).unwrap_or_default().trim().to_owned(),
            }
        })
    }

    /// The configuration as a TOML file.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }

    /// Makes relative paths start at `folder`.
    pub fn rebase(&mut self, folder: &Path) {
        let mut paths: Vec<&mut Option<PathBuf>> =
            vec![&mut self.kernel, &mut self.initrd, &mut self.accel.socket];
        for disk in &mut self.disk {
            paths.extend([&mut disk.path, &mut disk.binary, &mut disk.socket]);
        }
        for fs in &mut self.fs {
            paths.extend([&mut fs.path, &mut fs.binary, &mut fs.socket]);
        }
        for pmem in &mut self.pmem {
            paths.extend([&mut pmem.path, &mut pmem.binary]);
        }
        paths.extend(self.vhost_user.iter_mut().map(|device| &mut device.socket));
        for net in &mut self.net {
            paths.extend([&mut net.passt, &mut net.binary]);
        }
        if let Some(console) = &mut self.console {
            paths.extend([
                &mut console.file,
                &mut console.unix,
                &mut console.binary,
                &mut console.socket,
            ]);
        }
        if let Some(serial) = &mut self.serial {
            paths.extend([&mut serial.file, &mut serial.unix, &mut serial.binary]);
        }
        if let Some(Switch::On(rng)) = &mut self.rng {
            paths.extend([&mut rng.binary, &mut rng.socket]);
        }
        if let Some(Switch::On(balloon)) = &mut self.balloon {
            paths.push(&mut balloon.binary);
        }
        if let Some(vsock) = &mut self.vsock {
            paths.extend([&mut vsock.socket, &mut vsock.binary]);
        }
        for path in paths.into_iter().flatten() {
            // An empty path stays what it is, so that it can be refused by its name.
            if !path.as_os_str().is_empty() {
                *path = folder.join(&path);
            }
        }
    }
}
