//! Persistent memory: files that the guest has as memory.
//!
//! Nothing keeps others from making such a file shorter, and its storage can fail. The process then
//! gets SIGBUS where it, or the guest on a software CPU, touches what is missing. There is nothing to
//! go on with; but the user is to read what has happened. So the handler notes where it was, wakes
//! the main loop, which reports it and ends the process, and never returns.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

use anemone_accel_api::{MemorySlot, Vm};
use anemone_ipc::Received;
use anemone_ipc::vmm::{Event, ToVmm, VmConfig};
use anemone_virt::map;

use crate::error::Error;

/// Memory slots of RAM come first; a device's has the number of its PCI slot, from here on.
const FIRST_MEMORY_SLOT: u32 = 32;
/// PCI slots, and so devices.
const SLOTS: usize = 32;

/// A persistent memory, mapped until the process ends.
#[derive(Debug)]
pub struct Pmem {
    /// Name of the device.
    pub id: String,
    /// PCI slot of the device.
    pub slot: u8,
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
}

impl Pmem {
    /// Configuration space of the device: `struct virtio_pmem_config` (virtio 1.3, 5.19.4).
    pub fn config(&self) -> Vec<u8> {
        [self.start.to_le_bytes(), self.size.to_le_bytes()].concat()
    }
}

/// Maps the persistent memories of a machine and gives them to the accelerator.
pub fn map(
    config: &VmConfig,
    received: &mut Received<ToVmm>,
    vm: &dyn Vm,
) -> Result<Vec<Pmem>, Error> {
    let devices: Vec<_> = config
        .devices
        .iter()
        .filter_map(|device| Some((device, device.pmem.as_ref()?)))
        .collect();
    let sizes: Vec<_> = devices
        .iter()
        .map(|(d, pmem)| (d.slot, pmem.size))
        .collect();
    let bits = address_bits(vm.name());
    let places = map::place_pmem(config.memory, &sizes, bits).ok_or_else(|| {
        Error::Config(format!(
            "persistent memory does not fit: it starts at {:#x}, and the CPU has {bits} address bits",
            map::pmem_base(config.memory)
        ))
    })?;
    let mut mapped = Vec::new();
    for ((device, pmem), start) in devices.into_iter().zip(places) {
        let wrong = |why: &str| Error::Config(format!("device `{}`: {why}", device.id));
        if device.config_size != 0 {
            return Err(wrong("its configuration is not the back end's"));
        }
        if pmem.size == 0 || !pmem.size.is_multiple_of(map::PMEM_UNIT) {
            return Err(wrong("persistent memory comes in multiples of 2 MiB"));
        }
        let mut file = File::from(received.take(pmem.file)?);
        let length = file
            .seek(SeekFrom::End(0))
            .map_err(Error::os("size of persistent memory"))?;
        if length < pmem.size {
            return Err(wrong("its file is shorter than the memory"));
        }
        let host = map_file(file.as_fd(), pmem.size, pmem.read_only)
            .map_err(Error::os("mapping persistent memory"))?;
        let slot = MemorySlot {
            slot: FIRST_MEMORY_SLOT + u32::from(device.slot),
            guest: start,
            size: pmem.size,
            host,
            read_only: pmem.read_only,
            log_dirty: false,
        };
        // SAFETY: the mapping stays until the process ends, and nothing but the accelerator, on
        // behalf of the guest, accesses it.
        unsafe { vm.map_memory(slot)? };
        watch(device.slot, host.expose_provenance(), pmem.size as usize);
        mapped.push(Pmem {
            id: device.id.clone(),
            slot: device.slot,
            start,
            size: pmem.size,
        });
    }
    Ok(mapped)
}

fn map_file(file: BorrowedFd<'_>, size: u64, read_only: bool) -> io::Result<*mut u8> {
    let length = usize::try_from(size).map_err(io::Error::other)?;
    let protection = match read_only {
        true => libc::PROT_READ,
        false => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: a new mapping at an address of the kernel's choice.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            protection,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(start.cast())
}

/// Physical address bits of the guest's CPU: the host's, but for the software CPU.
fn address_bits(accel: &str) -> u32 {
    if accel != "kvm" {
        return 48;
    }
    // AMD64 manual volume 3, E.4.7: bits 7 to 0 of EAX.
    match std::arch::x86_64::__cpuid(0x8000_0000).eax {
        0x8000_0008.. => std::arch::x86_64::__cpuid(0x8000_0008).eax & 0xFF,
        _ => 36,
    }
}

/// What the handler knows: start and length of the memory of each slot, and what to write to.
static STARTS: [AtomicUsize; SLOTS] = [const { AtomicUsize::new(0) }; SLOTS];
static LENGTHS: [AtomicUsize; SLOTS] = [const { AtomicUsize::new(0) }; SLOTS];
static WAKE: AtomicI32 = AtomicI32::new(-1);
/// What it has seen first: slot in the highest byte, offset in the others; 0 for nothing. No
/// address space has room for memory in which an offset is longer.
static LOST: AtomicU64 = AtomicU64::new(0);

fn watch(slot: u8, start: usize, length: usize) {
    if let Some(i) = Some(usize::from(slot)).filter(|i| *i < SLOTS) {
        STARTS[i].store(start, Ordering::Release);
        LENGTHS[i].store(length, Ordering::Release);
    }
}

/// From now on the event counter `wake` tells of memory that is missing; see [`lost`]. Before a jail
/// forbids `rt_sigaction`. The counter has to exist until the process ends.
pub fn install(wake: BorrowedFd<'_>) -> Result<(), Error> {
    WAKE.store(wake.as_raw_fd(), Ordering::Release);
    // SAFETY: all-zero is a valid sigaction; the handler has the signature that SA_SIGINFO asks for
    // and makes async-signal-safe calls only.
    let rc = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut())
    };
    match rc {
        0 => Ok(()),
        _ => Err(Error::os("sigaction")(io::Error::last_os_error())),
    }
}

/// What the user is told if memory was found missing.
pub fn lost(devices: &[Pmem]) -> Option<Event> {
    let lost = LOST.load(Ordering::Acquire);
    let device = devices
        .iter()
        .find(|device| u64::from(device.slot) == lost >> 56)?;
    let offset = lost & ((1 << 56) - 1);
    Some(Event::Failed {
        message: format!(
            "device `{}`: its file has no byte {offset:#x} any more, which is one of the {} bytes \
             of persistent memory: somebody has made the file shorter, or its storage has failed",
            device.id, device.size
        ),
    })
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes valid information; for SIGBUS it holds an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let found = (1..SLOTS).find(|&i| {
        let offset = address.wrapping_sub(STARTS[i].load(Ordering::Acquire));
        offset < LENGTHS[i].load(Ordering::Acquire)
    });
    let Some(slot) = found else {
        // The instruction runs again, and the process dies as it would have without this handler.
        // SAFETY: integers only.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        return;
    };
    let offset = address.wrapping_sub(STARTS[slot].load(Ordering::Acquire));
    // Several threads may come here. The first one is believed.
    let lost = (slot as u64) << 56 | offset as u64;
    let _ = LOST.compare_exchange(0, lost, Ordering::AcqRel, Ordering::Acquire);
    let one = 1u64.to_ne_bytes();
    let day = libc::timespec {
        tv_sec: 86_400,
        tv_nsec: 0,
    };
    loop {
        // SAFETY: both buffers outlive the calls; the counter exists until the process ends.
        unsafe {
            libc::write(WAKE.load(Ordering::Acquire), one.as_ptr().cast(), 8);
            libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &raw const day, ptr::null_mut());
        }
    }
}
