//! The configuration with every default filled in and every rule checked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::config::{CgroupPlace, Config, Console, Disk, PanicDevice, Pmem, Rng};
use crate::net::{self, Card};
use crate::share::Share;
use crate::short::Switch;
use crate::value::{AccelType, CommandLine, Exposure, Format, Id, SinkType, Size, Within};
use crate::vhost_user::DeviceType;
use crate::vsock::Cid;

/// A configuration that contradicts itself or lacks something.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Invalid {
    /// Nothing to boot.
    #[error("`kernel` is missing: it names the kernel image to boot (bzImage or ELF)")]
    NoKernel,
    /// A disk without an image.
    #[error("`{0}`: needs `path` (its image) or `socket` (a back end that already runs)")]
    NoImage(String),
    /// Persistent memory without a file.
    #[error("`{0}`: needs `path`, the file that is the memory")]
    NoFile(String),
    /// Persistent memory comes in pieces.
    #[error("`{id}`: `size`: found {size}, allowed: a multiple of 2M, at least 2M")]
    PartialSize {
        /// The device.
        id: String,
        /// What was found.
        size: Size,
    },
    /// A share without a name.
    #[error("`{0}`: needs `tag`, the name by which the guest mounts the directory")]
    NoTag(String),
    /// A share without a directory.
    #[error("`{0}`: needs `path` (its directory) or `socket` (a back end that already runs)")]
    NoDirectory(String),
    /// Sockets without a place on the host.
    #[error("`{0}`: needs `socket`, the path at which programs of this host connect to the guest")]
    NoSocket(String),
    /// The name of a socket that the kernel does not take.
    #[error("`{owner}`: `socket`: a path of {length} bytes, at most {most} are possible")]
    LongSocket {
        /// The device.
        owner: String,
        /// Its length.
        length: usize,
        /// What is possible.
        most: usize,
    },
    /// A network card without a network.
    #[error("`{0}`: needs `tap` (a tap of this host) or the type `user` (passt)")]
    NoUplink(String),
    /// The balloon cannot take so much.
    #[error(
        "`{id}`: `size`: found {size}, allowed: a multiple of 4K below the {memory} of the guest's memory"
    )]
    BalloonSize {
        /// The device.
        id: String,
        /// What was found.
        size: Size,
        /// The guest's memory.
        memory: Size,
    },
    /// A path without a character.
    #[error("`{0}`: found an empty path")]
    EmptyPath(String),
    /// Keys of which only one can be given.
    #[error("`{owner}`: only one of {keys} is possible")]
    Conflict {
        /// Option or device.
        owner: String,
        /// The keys in question.
        keys: &'static str,
    },
    /// A device lacks something for which there is no default.
    #[error("`{owner}`: `{key}` is missing")]
    Missing {
        /// The device.
        owner: String,
        /// The key.
        key: &'static str,
    },
    /// A device that cannot be served without guest memory.
    #[error(
        "`{owner}`: needs `memory=shared`: requests to a device of type {kind} name guest memory by its \
         address, and with `bounce` the back end would not find it"
    )]
    NeedsMemory {
        /// The device.
        owner: String,
        /// What it is.
        kind: String,
    },
    /// A virtqueue of a size that no driver could use.
    #[error("`{owner}`: `queue-size`: found {found}, which is not a power of two")]
    QueueSize {
        /// The device.
        owner: String,
        /// What was found.
        found: u16,
    },
    /// Groups are told by where they are.
    #[error("`cgroup`: found `{0}`, allowed: auto, off or an absolute path")]
    RelativeCgroup(String),
    /// A key that has no meaning beside another one.
    #[error("`{owner}`: `{key}` has no meaning {because}")]
    Meaningless {
        /// Option or device.
        owner: String,
        /// The key.
        key: &'static str,
        /// Beside what.
        because: &'static str,
    },
    /// Two devices claim a slot.
    #[error(
        "PCI slot {slot} is claimed by `{first}` and `{second}`; every device has a slot of its own, \
         1 to 31 (by default console 1, rng 2, panic device 3, balloon 4, vsock 5, disks from 8, network cards \
         from 16, fs from 20, pmem from 24 and vhost-user from 28 on)"
    )]
    SlotTaken {
        /// The slot.
        slot: u16,
        /// Who has it.
        first: String,
        /// Who wants it, too.
        second: String,
    },
    /// More devices of a kind than default slots.
    #[error(
        "`{0}`: no default slot is left (disks take 8 to 31, network cards 16 to 31, fs 20 to 31, pmem 24 to 31); \
         name one with `slot`"
    )]
    NoSlot(String),
    /// Two devices have one name.
    #[error("the id `{0}` is used twice; every device has an id of its own")]
    IdTaken(String),
    /// A device that the VM does not have.
    #[error("`restart`: `never` names `{0}`, and no device has that id")]
    UnknownDevice(String),
    /// Two devices want standard input.
    #[error(
        "`console` and `serial` both use standard input and output; send one of them elsewhere \
         (pty, file=PATH, unix=PATH) or set it to `none`"
    )]
    StdioTaken,
}

/// A virtual machine that can be built as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Vm {
    /// The configuration with all defaults written out. Resolving it again changes nothing.
    pub config: Config,
    /// The kernel image.
    pub kernel: PathBuf,
    /// Kernel command line.
    pub cmdline: CommandLine,
    /// virtio devices: the console, the entropy source, the sockets, the disks, the persistent
    /// memory, the network cards.
    pub devices: Vec<Device>,
    /// The 16550, where the machine has one.
    pub serial: Option<SerialPort>,
    /// Slot of the guest-panic device, where the machine has one.
    pub panic_slot: Option<u8>,
}

/// One virtio device.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// Name in messages, unique in the VM.
    pub id: Id,
    /// PCI slot on bus 0, unique in the VM.
    pub slot: u8,
    /// Number of virtqueues.
    pub queues: u16,
    /// Who serves it.
    pub backend: Backend,
    /// How much of guest memory the back end sees.
    pub memory: Exposure,
    /// What it is.
    pub kind: Kind,
}

/// Who serves a device.
#[derive(Debug, Clone, PartialEq)]
pub enum Backend {
    /// A process that the supervisor starts: its own one, or the program given.
    Process(Option<PathBuf>),
    /// A vhost-user back end that listens at this UNIX socket.
    Socket(PathBuf),
}

/// What a device is.
#[derive(Debug, Clone, PartialEq)]
pub enum Kind {
    /// A disk. The path is absent where the back end is a [`Backend::Socket`].
    Disk {
        /// The image.
        path: Option<PathBuf>,
        /// The guest cannot write.
        readonly: bool,
        /// Serial number that the guest sees.
        serial: Option<String>,
    },
    /// The console. The sink is absent where the back end is a [`Backend::Socket`].
    Console {
        /// Where it goes.
        sink: Option<Sink>,
    },
    /// The entropy source.
    Rng {
        /// Most bytes per second.
        rate: Option<Size>,
    },
    /// The memory balloon.
    Balloon {
        /// How much it is to take at first, in bytes.
        size: u64,
        /// The guest may take pages back when it runs out of memory.
        deflate_on_oom: bool,
        /// The guest reports free pages.
        reporting: bool,
        /// Seconds between questions for statistics.
        stats_interval: Option<u16>,
    },
    /// Persistent memory.
    Pmem {
        /// The file.
        path: PathBuf,
        /// How much of it, a multiple of [`PMEM_UNIT`]; all of it if absent.
        size: Option<Size>,
        /// The guest cannot write.
        readonly: bool,
    },
    /// A shared directory.
    Fs(Share),
    /// Sockets between the guest and the host.
    Vsock {
        /// The guest's address.
        cid: Cid,
        /// Where programs of the host connect.
        socket: PathBuf,
    },
    /// A network card.
    Net(Card),
    /// A device of any type, whose back end is a [`Backend::Socket`].
    External {
        /// Its type.
        device_type: DeviceType,
        /// Length of the device-specific configuration in bytes.
        config_size: u16,
        /// Most descriptors of a virtqueue.
        queue_size: u16,
    },
}

/// Persistent memory comes in pieces of this many bytes: what Linux can make memory of
/// (a subsection), and a large page.
pub const PMEM_UNIT: u64 = 2 << 20;

impl Device {
    /// Length in bytes of the region that a bounced back end sees in place of guest memory; 0 for a
    /// shared one.
    pub fn bounce_region(&self) -> u64 {
        match self.memory {
            Exposure::Shared => 0,
            Exposure::Bounce => bounce_region(self.kind.device_type(), self.queues),
        }
    }
}

/// Length in bytes of the bounce region of a device of this type with so many queues. Each queue has its
/// part: its rings, and room for the data of requests. Of that, only what is used takes memory.
pub fn bounce_region(device_type: u16, queues: u16) -> u64 {
    const RINGS: u64 = 8 << 10;
    let queues = u64::from(queues.max(1));
    let data = match device_type {
        // The VMM tells the guest how large requests may be.
        2 => ((64 << 20) / queues).clamp(4 << 20, 16 << 20) & !0xFFF,
        // Every receive buffer has at least a page, of a network packet up to 17.
        1 => 4 << 20,
        3 => 1 << 20,
        19 => 2 << 20,
        // Entropy, lists of pages, flushes.
        4 | 5 | 27 => 256 << 10,
        // Requests to a file system have up to 1 MiB.
        _ => 8 << 20,
    };
    queues * (RINGS + data)
}

impl Kind {
    /// What a device's back end sees of guest memory by default: nothing, where it is slow anyway.
    pub fn default_exposure(&self) -> Exposure {
        match self {
            Self::Console { .. } | Self::Rng { .. } | Self::Balloon { .. } => Exposure::Bounce,
            _ => Exposure::Shared,
        }
    }

    /// virtio device type (virtio 1.2, section 5).
    pub fn device_type(&self) -> u16 {
        match self {
            Self::Net(_) => 1,
            Self::Disk { .. } => 2,
            Self::Console { .. } => 3,
            Self::Rng { .. } => 4,
            Self::Balloon { .. } => 5,
            Self::Fs(_) => 26,
            Self::Pmem { .. } => 27,
            Self::Vsock { .. } => 19,
            Self::External { device_type, .. } => device_type.get(),
        }
    }

    /// Length of the device-specific configuration in bytes: `virtio_blk_config` up to
    /// `write_zeroes_may_unmap` and its padding (virtio 1.2, 5.2.4), `virtio_console_config`
    /// (5.3.4), none (5.4.4), `virtio_vsock_config` (5.10.4), `virtio_net_config` up to `mtu`
    /// (5.1.4). That of a shared directory is [`config`](Self::config). That of persistent memory (5.19.4) is not the back end's: where the memory is, the VMM knows, which has put it there.
    pub fn config_size(&self) -> u16 {
        match self {
            Self::Disk { .. } => 60,
            Self::Console { .. } | Self::Net(_) => 12,
            Self::Rng { .. } | Self::Pmem { .. } | Self::Fs(_) => 0,
            // `num_pages` and `actual` of virtio_balloon_config (5.5.4).
            Self::Balloon { .. } => 8,
            Self::Vsock { .. } => 8,
            Self::External { config_size, .. } => *config_size,
        }
    }

    /// Configuration space that is this program's to say, and not the back end's.
    pub fn config(&self) -> Option<Vec<u8>> {
        match self {
            Self::Fs(share) => Some(share.config()),
            _ => None,
        }
    }

    /// Most descriptors of a virtqueue.
    pub fn queue_size(&self) -> u16 {
        match self {
            Self::External { queue_size, .. } => *queue_size,
            _ => 256,
        }
    }
}

/// The 16550.
#[derive(Debug, Clone, PartialEq)]
pub struct SerialPort {
    /// Name in messages.
    pub id: Id,
    /// Program to use in place of the supervisor's own.
    pub binary: Option<PathBuf>,
    /// Where it goes.
    pub sink: Sink,
}

/// Where the bytes of a console go.
#[derive(Debug, Clone, PartialEq)]
pub enum Sink {
    /// Standard input and output of the supervisor.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// A file that is appended to.
    File(PathBuf),
    /// A UNIX socket to listen at.
    Unix(PathBuf),
}

const CONSOLE_SLOT: u16 = 1;
const RNG_SLOT: u16 = 2;
const PANIC_SLOT: u16 = 3;
const FIRST_DISK_SLOT: u16 = 8;
const FIRST_PMEM_SLOT: u16 = 24;
/// Receive and transmit (virtio 1.2, 5.3.2; without VIRTIO_CONSOLE_F_MULTIPORT).
const CONSOLE_QUEUES: u16 = 2;

impl Config {
    /// Fills in the defaults and checks the whole.
    pub fn resolve(mut self) -> Result<Vm, Invalid> {
        let kernel = self.kernel.clone().ok_or(Invalid::NoKernel)?;
        refuse_empty("kernel", Some(&kernel))?;
        refuse_empty("initrd", self.initrd.as_deref())?;
        refuse_empty("accel.socket", self.accel.socket.as_deref())?;
        if let CgroupPlace::Path(path) = self.cgroup.place()
            && !path.is_absolute()
        {
            return Err(Invalid::RelativeCgroup(path.display().to_string()));
        }
        if self.cgroup.place() == CgroupPlace::Off && self.cgroup.has_limits() {
            return Err(Invalid::Meaningless {
                owner: "cgroup".to_owned(),
                key: "a limit",
                because: "without a control group (`off`)",
            });
        }
        if self.accel.socket.is_some() && self.accel.kind != AccelType::None {
            return Err(Invalid::Meaningless {
                owner: "accel".to_owned(),
                key: "socket",
                because: "for an accelerator other than `none`",
            });
        }
        let mut names = Names::default();
        let mut devices = Vec::new();
        devices.extend(console(self.console.get_or_insert_default(), &mut names)?);
        let serial = self.serial_port(&mut names)?;
        if let Switch::On(rng) = self.rng.get_or_insert(Switch::Off) {
            devices.push(entropy(rng, &mut names)?);
        }
        if let Switch::On(balloon) = self.balloon.get_or_insert(Switch::Off) {
            devices.push(balloon.resolve(self.memory.size.bytes(), &mut names)?);
        }
        if let Some(vsock) = &mut self.vsock {
            devices.push(vsock.resolve(&mut names)?);
        }
        let mut panic_slot = None;
        let panic_device = self
            .panic_device
            .get_or_insert(Switch::On(PanicDevice::default()));
        if let Switch::On(device) = panic_device {
            let id = Id::known("panic-device");
            names.claim_id(&id)?;
            panic_slot = Some(names.take_slot(&id, &mut device.slot, PANIC_SLOT)?);
        }
        for (number, disk) in (0u16..).zip(&mut self.disk) {
            devices.push(block(disk, number, &mut names)?);
        }
        for (number, fs) in (0u16..).zip(&mut self.fs) {
            devices.push(fs.resolve(number, &mut names)?);
        }
        for (number, pmem) in (0u16..).zip(&mut self.pmem) {
            devices.push(persistent_memory(pmem, number, &mut names)?);
        }
        let vm = self.name.as_ref().map_or("", Id::as_str);
        for (number, net) in (0u16..).zip(&mut self.net) {
            devices.push(net::resolve(net, vm, number, &mut names)?);
        }
        for (number, device) in (0u16..).zip(&mut self.vhost_user) {
            devices.push(device.resolve(number, &mut names)?);
        }
        let has_console = devices
            .iter()
            .any(|device| matches!(device.kind, Kind::Console { .. }));
        let on_stdio = devices.iter().any(|device| {
            device.kind
                == Kind::Console {
                    sink: Some(Sink::Stdio),
                }
        });
        if on_stdio && serial.as_ref().is_some_and(|port| port.sink == Sink::Stdio) {
            return Err(Invalid::StdioTaken);
        }
        for id in self.restart.never.iter().flat_map(|ids| &ids.0) {
            if !names.ids.contains(id) {
                return Err(Invalid::UnknownDevice(id.to_string()));
            }
        }
        let cmdline = self
            .cmdline
            .get_or_insert_with(|| default_cmdline(has_console, serial.is_some()))
            .clone();
        Ok(Vm {
            config: self,
            kernel,
            cmdline,
            devices,
            serial,
            panic_slot,
        })
    }

    fn serial_port(&mut self, names: &mut Names) -> Result<Option<SerialPort>, Invalid> {
        let serial = self.serial.get_or_insert_default();
        if serial.kind.is_none() && serial.file.is_none() && serial.unix.is_none() {
            serial.kind = Some(SinkType::None);
        }
        let Some(sink) = sink(
            "serial",
            serial.kind,
            serial.file.as_deref(),
            serial.unix.as_deref(),
        )?
        else {
            return Ok(None);
        };
        refuse_empty("serial.binary", serial.binary.as_deref())?;
        let id = names.take_id(&mut serial.id, "serial")?;
        Ok(Some(SerialPort {
            id,
            binary: serial.binary.clone(),
            sink,
        }))
    }
}

/// Ids and slots in use.
#[derive(Default)]
pub(crate) struct Names {
    ids: Vec<Id>,
    slots: HashMap<u16, Id>,
}

impl Names {
    fn claim_id(&mut self, id: &Id) -> Result<(), Invalid> {
        if self.ids.contains(id) {
            return Err(Invalid::IdTaken(id.to_string()));
        }
        self.ids.push(id.clone());
        Ok(())
    }

    /// Fills in the default id and claims it.
    pub(crate) fn take_id(&mut self, id: &mut Option<Id>, default: &str) -> Result<Id, Invalid> {
        let chosen = id.get_or_insert_with(|| Id::known(default));
        self.claim_id(chosen)?;
        Ok(chosen.clone())
    }

    /// Fills in the default slot and claims it. The result is 1 to 31.
    pub(crate) fn take_slot(
        &mut self,
        id: &Id,
        slot: &mut Option<Within<1, 31>>,
        default: u16,
    ) -> Result<u8, Invalid> {
        let chosen = match *slot {
            Some(chosen) => chosen,
            None => Within::new(default).map_err(|_| Invalid::NoSlot(id.to_string()))?,
        };
        *slot = Some(chosen);
        if let Some(first) = self.slots.insert(chosen.get(), id.clone()) {
            return Err(Invalid::SlotTaken {
                slot: chosen.get(),
                first: first.to_string(),
                second: id.to_string(),
            });
        }
        Ok(chosen.get() as u8)
    }
}

pub(crate) fn refuse_empty(key: &str, path: Option<&Path>) -> Result<(), Invalid> {
    match path {
        Some(path) if path.as_os_str().is_empty() => Err(Invalid::EmptyPath(key.to_owned())),
        _ => Ok(()),
    }
}

pub(crate) fn backend(
    id: &Id,
    binary: Option<&PathBuf>,
    socket: Option<&PathBuf>,
) -> Result<Backend, Invalid> {
    refuse_empty(&format!("{id}: binary"), binary.map(PathBuf::as_path))?;
    refuse_empty(&format!("{id}: socket"), socket.map(PathBuf::as_path))?;
    match (binary, socket) {
        (Some(_), Some(_)) => Err(Invalid::Conflict {
            owner: id.to_string(),
            keys: "`binary` and `socket`",
        }),
        (_, Some(socket)) => Ok(Backend::Socket(socket.clone())),
        (binary, None) => Ok(Backend::Process(binary.cloned())),
    }
}

/// Fills in how much of guest memory a back end sees. One that runs already is not ours, and not in
/// our jail.
pub(crate) fn exposure(key: &mut Option<Exposure>, kind: &Kind, backend: &Backend) -> Exposure {
    *key.get_or_insert_with(|| match backend {
        Backend::Socket(_) => Exposure::Bounce,
        Backend::Process(_) => kind.default_exposure(),
    })
}

/// Where a console goes; `None` for `none`.
fn sink(
    owner: &str,
    kind: Option<SinkType>,
    file: Option<&Path>,
    unix: Option<&Path>,
) -> Result<Option<Sink>, Invalid> {
    refuse_empty(&format!("{owner}.file"), file)?;
    refuse_empty(&format!("{owner}.unix"), unix)?;
    Ok(match (kind, file, unix) {
        (Some(SinkType::Stdio) | None, None, None) => Some(Sink::Stdio),
        (Some(SinkType::Pty), None, None) => Some(Sink::Pty),
        (Some(SinkType::None), None, None) => None,
        (None, Some(file), None) => Some(Sink::File(file.to_owned())),
        (None, None, Some(unix)) => Some(Sink::Unix(unix.to_owned())),
        _ => {
            return Err(Invalid::Conflict {
                owner: owner.to_owned(),
                keys: "`type` (stdio, pty, none), `file` and `unix`",
            });
        }
    })
}

fn console(console: &mut Console, names: &mut Names) -> Result<Option<Device>, Invalid> {
    let target = if console.socket.is_some() {
        if console.kind.is_some() || console.file.is_some() || console.unix.is_some() {
            return Err(Invalid::Conflict {
                owner: "console".to_owned(),
                keys: "`socket` and `type` (stdio, pty, none), `file`, `unix`",
            });
        }
        None
    } else {
        if console.kind.is_none() && console.file.is_none() && console.unix.is_none() {
            console.kind = Some(SinkType::Stdio);
        }
        let target = sink(
            "console",
            console.kind,
            console.file.as_deref(),
            console.unix.as_deref(),
        )?;
        if target.is_none() {
            return Ok(None);
        }
        target
    };
    let id = names.take_id(&mut console.id, "console")?;
    let backend = backend(&id, console.binary.as_ref(), console.socket.as_ref())?;
    let kind = Kind::Console { sink: target };
    Ok(Some(Device {
        slot: names.take_slot(&id, &mut console.slot, CONSOLE_SLOT)?,
        queues: CONSOLE_QUEUES,
        memory: exposure(&mut console.memory, &kind, &backend),
        backend,
        kind,
        id,
    }))
}

fn entropy(rng: &mut Rng, names: &mut Names) -> Result<Device, Invalid> {
    let id = names.take_id(&mut rng.id, "rng")?;
    if rng.rate == Some(Size(0)) {
        return Err(Invalid::Meaningless {
            owner: id.to_string(),
            key: "rate",
            because: "when it is 0; leave it out for no limit",
        });
    }
    if rng.socket.is_some() && rng.rate.is_some() {
        return Err(Invalid::Meaningless {
            owner: id.to_string(),
            key: "rate",
            because: "beside `socket`: the back end has its own settings",
        });
    }
    let backend = backend(&id, rng.binary.as_ref(), rng.socket.as_ref())?;
    let kind = Kind::Rng { rate: rng.rate };
    Ok(Device {
        slot: names.take_slot(&id, &mut rng.slot, RNG_SLOT)?,
        queues: 1,
        memory: exposure(&mut rng.memory, &kind, &backend),
        backend,
        kind,
        id,
    })
}

fn block(disk: &mut Disk, number: u16, names: &mut Names) -> Result<Device, Invalid> {
    let id = names.take_id(&mut disk.id, &format!("disk{number}"))?;
    let backend = backend(&id, disk.binary.as_ref(), disk.socket.as_ref())?;
    if matches!(backend, Backend::Socket(_)) {
        let own: [(&'static str, bool); 4] = [
            ("path", disk.path.is_some()),
            ("format", disk.format.is_some()),
            ("readonly", disk.readonly),
            ("serial", disk.serial.is_some()),
        ];
        if let Some((key, _)) = own.into_iter().find(|(_, given)| *given) {
            return Err(Invalid::Meaningless {
                owner: id.to_string(),
                key,
                because: "beside `socket`: the back end has its own settings",
            });
        }
    } else {
        if disk.path.is_none() {
            return Err(Invalid::NoImage(id.to_string()));
        }
        refuse_empty(&format!("{id}: path"), disk.path.as_deref())?;
        disk.format = Some(Format::Raw);
    }
    let slot = names.take_slot(&id, &mut disk.slot, FIRST_DISK_SLOT.saturating_add(number))?;
    let queues = *disk.queues.get_or_insert(Within::min());
    let kind = Kind::Disk {
        path: disk.path.clone(),
        readonly: disk.readonly,
        serial: disk.serial.as_ref().map(ToString::to_string),
    };
    Ok(Device {
        slot,
        queues: queues.get(),
        memory: exposure(&mut disk.memory, &kind, &backend),
        backend,
        kind,
        id,
    })
}

fn persistent_memory(pmem: &mut Pmem, number: u16, names: &mut Names) -> Result<Device, Invalid> {
    let id = names.take_id(&mut pmem.id, &format!("pmem{number}"))?;
    let backend = backend(&id, pmem.binary.as_ref(), None)?;
    let path = pmem
        .path
        .clone()
        .ok_or_else(|| Invalid::NoFile(id.to_string()))?;
    refuse_empty(&format!("{id}: path"), Some(&path))?;
    if let Some(size) = pmem.size
        && (size.0 == 0 || !size.0.is_multiple_of(PMEM_UNIT))
    {
        return Err(Invalid::PartialSize {
            id: id.to_string(),
            size,
        });
    }
    let slot = FIRST_PMEM_SLOT.saturating_add(number);
    let kind = Kind::Pmem {
        path,
        size: pmem.size,
        readonly: pmem.readonly,
    };
    Ok(Device {
        slot: names.take_slot(&id, &mut pmem.slot, slot)?,
        queues: 1,
        memory: exposure(&mut pmem.memory, &kind, &backend),
        backend,
        kind,
        id,
    })
}

/// Linux writes to all consoles named and gives the last one to init.
fn default_cmdline(console: bool, serial: bool) -> CommandLine {
    CommandLine::known(match (serial, console) {
        (false, false) => "",
        (true, false) => "console=ttyS0",
        (false, true) => "console=hvc0",
        (true, true) => "console=ttyS0 console=hvc0",
    })
}
