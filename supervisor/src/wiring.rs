//! What a VMM is told: the machine and the descriptors it is made of.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anemone_config::{Exposure, Kind, Vm};
use anemone_ipc::FdIndex;
use anemone_ipc::vmm::{Accel, Bounce, Device, Pmem, VmConfig};

use crate::accel::Opened;
use crate::error::{Error, system};
use crate::files::{self, PmemFile};
use crate::sys;

/// The files that the guest boots from.
#[derive(Debug)]
pub struct BootFiles {
    kernel: File,
    initrd: Option<File>,
}

impl BootFiles {
    /// Opens the kernel and the initial RAM file system, and checks that they can fit.
    pub fn open(vm: &Vm) -> Result<Self, Error> {
        let memory = vm.config.memory.size.bytes();
        let kernel = files::open_boot_file("kernel", &vm.kernel, memory)?;
        let initrd = match &vm.config.initrd {
            Some(path) => Some(files::open_boot_file("initrd", path, memory)?),
            None => None,
        };
        Ok(Self { kernel, initrd })
    }

    /// Both files from their beginnings, for a VMM that reads them.
    pub fn rewind(&self) -> Result<(), Error> {
        use std::io::Seek;
        for mut file in [Some(&self.kernel), self.initrd.as_ref()]
            .into_iter()
            .flatten()
        {
            file.rewind().map_err(system("rewind a boot file"))?;
        }
        Ok(())
    }
}

/// The files that are persistent memory.
#[derive(Debug)]
pub struct PmemFiles(Vec<Option<PmemFile>>);

impl PmemFiles {
    /// Opens them, and reserves them for this VM if it is to run.
    pub fn open(vm: &Vm, lock: bool) -> Result<Self, Error> {
        let open = |device: &anemone_config::Device| {
            let Kind::Pmem {
                path,
                size,
                readonly,
            } = &device.kind
            else {
                return Ok(None);
            };
            let size = size.map(|size| size.0);
            let pmem = files::open_pmem(device.id.as_str(), path, size, *readonly)?;
            if lock {
                let owner = format!("pmem `{}`", device.id);
                files::lock_image(&owner, path, &pmem.file, *readonly)?;
            }
            Ok(Some(pmem))
        };
        vm.devices
            .iter()
            .map(open)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// That of a device, by its index in the VM.
    pub fn of(&self, device: usize) -> Option<&PmemFile> {
        self.0.get(device)?.as_ref()
    }
}

/// Everything a VMM is given. What is absent is absent in a `check`.
#[derive(Debug)]
pub struct Wiring<'a> {
    /// The VM.
    pub vm: &'a Vm,
    /// What it boots.
    pub boot: &'a BootFiles,
    /// Its persistent memory.
    pub pmem: &'a PmemFiles,
    /// What runs it.
    pub accel: Option<&'a Opened>,
    /// The vhost-user connection of each device, in their order.
    pub sockets: Option<&'a [UnixStream]>,
    /// The byte stream of the 16550.
    pub serial: Option<&'a UnixStream>,
    /// Where the ACPI tables go.
    pub acpi_dump: Option<&'a OwnedFd>,
}

/// Descriptors that travel with a message.
#[derive(Default)]
struct FdList<'a>(Vec<BorrowedFd<'a>>);

impl<'a> FdList<'a> {
    fn add(&mut self, fd: &'a impl AsFd) -> FdIndex {
        self.0.push(fd.as_fd());
        // A VM has 31 devices at most, so a message never has more than a few dozen descriptors.
        FdIndex((self.0.len() - 1) as u16)
    }
}

impl Wiring<'_> {
    /// Makes a region for each device that has a back end which must not see guest memory.
    fn regions(&self) -> Result<Vec<Option<OwnedFd>>, Error> {
        let make = |device: &anemone_config::Device| {
            let size = device.bounce_region();
            let needed = self.sockets.is_some() && size > 0;
            needed
                .then(|| sys::sealed_memory("bounce", size))
                .transpose()
        };
        let regions = self.vm.devices.iter().map(make);
        let regions: std::io::Result<_> = regions.collect();
        regions.map_err(system("bounce region"))
    }

    /// Makes new guest memory and tells a VMM everything.
    pub fn send(&self, channel: &anemone_ipc::Channel) -> Result<(), Error> {
        let memory = self.vm.config.memory.size.bytes();
        let memory_fd = sys::guest_memory(memory).map_err(system("guest memory"))?;
        let regions = self.regions()?;
        let mut fds = FdList::default();
        let accel = match self.accel {
            Some(Opened::Kvm(device)) => Accel::Kvm {
                device: fds.add(device),
            },
            Some(Opened::Soft) => Accel::Soft,
            Some(Opened::None(socket)) => Accel::None {
                socket: Some(fds.add(socket)),
            },
            None => Accel::None { socket: None },
        };
        let devices = self
            .vm
            .devices
            .iter()
            .enumerate()
            .map(|(index, device)| Device {
                id: device.id.to_string(),
                device_type: device.kind.device_type(),
                slot: device.slot,
                queues: device.queues,
                queue_size: device.kind.queue_size(),
                config_size: device.kind.config_size(),
                socket: self
                    .sockets
                    .and_then(|sockets| sockets.get(index))
                    .map(|socket| fds.add(socket)),
                config: device.kind.config(),
                pmem: self.pmem.of(index).map(|pmem| Pmem {
                    file: fds.add(&pmem.file),
                    size: pmem.size,
                    read_only: pmem.readonly,
                }),
                bounce: (device.memory == Exposure::Bounce).then(|| Bounce {
                    fd: regions[index].as_ref().map(|region| fds.add(region)),
                    size: device.bounce_region(),
                }),
            });
        let devices = devices.collect();
        let config = VmConfig {
            version: anemone_ipc::VERSION,
            machine: self.vm.config.machine.to_string(),
            accel,
            cpus: u32::from(self.vm.config.cpus.count.get()),
            cpu_model: self.vm.config.cpus.model.to_string(),
            memory,
            memory_fd: fds.add(&memory_fd),
            kernel: fds.add(&self.boot.kernel),
            initrd: self.boot.initrd.as_ref().map(|file| fds.add(file)),
            cmdline: self.vm.cmdline.to_string(),
            devices,
            serial: self.serial.map(|socket| fds.add(socket)),
            panic_device: self.vm.panic_slot,
            acpi_dump: self.acpi_dump.map(|file| fds.add(file)),
        };
        channel.send(
            &anemone_ipc::vmm::ToVmm::Configure(Box::new(config)),
            &fds.0,
        )?;
        Ok(())
    }
}
