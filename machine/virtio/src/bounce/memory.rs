//! The two memories: guest RAM, and the region that the back end sees. Both can change under every
//! read, so each value is read once, into memory of this process, and only then looked at.

use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    VolatileSlice,
};

use super::{Broken, Error};
use crate::ram::GuestRam;

/// Granularity of what is mapped and given back.
pub(super) const PAGE: u64 = 4096;
/// Where the region lies for the back end: where no guest has RAM, and beyond the last page that a
/// balloon can name by 32 bits. What a guest gives up is never a part of the region.
pub(super) const BASE: u64 = 1 << 46;
const _: () = assert!(BASE >= PAGE << 32);

/// Memory by guest-physical address; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Memory(GuestMemoryMmap);

fn broken(error: GuestMemoryError) -> Broken {
    Broken(format!("memory that the ring names is not there: {error}"))
}

impl Memory {
    pub fn new(memory: GuestMemoryMmap) -> Self {
        Self(memory)
    }

    /// Whether all of an area is memory.
    pub fn contains(&self, address: u64, length: u64) -> bool {
        usize::try_from(length).is_ok_and(|length| {
            GuestMemoryBackend::check_range(&self.0, GuestAddress(address), length)
        })
    }

    /// A 16-bit word of a ring; what was written before it is visible afterwards.
    pub fn load(&self, address: u64) -> Result<u16, Broken> {
        let word = self.0.load::<u16>(GuestAddress(address), Ordering::Acquire);
        word.map(u16::from_le).map_err(broken)
    }

    /// Sets a 16-bit word of a ring, after all that was written before.
    pub fn store(&self, address: u64, value: u16) -> Result<(), Broken> {
        let address = GuestAddress(address);
        self.0
            .store(value.to_le(), address, Ordering::Release)
            .map_err(broken)
    }

    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Broken> {
        self.0
            .read_slice(data, GuestAddress(address))
            .map_err(broken)
    }

    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), Broken> {
        self.0
            .write_slice(data, GuestAddress(address))
            .map_err(broken)
    }

    /// Copies to another memory.
    pub fn copy(&self, from: u64, to: &Self, at: u64, length: u64) -> Result<(), Broken> {
        let mut at = at;
        for source in self.slices(from, length) {
            let source = source?;
            let mut offset = 0;
            for target in to.slices(at, source.len() as u64) {
                let target = target?;
                let rest = source.offset(offset).map_err(|e| Broken(e.to_string()))?;
                rest.copy_to_volatile_slice(target);
                offset += target.len();
            }
            at += source.len() as u64;
        }
        Ok(())
    }

    fn slices(
        &self,
        address: u64,
        length: u64,
    ) -> impl Iterator<Item = Result<VolatileSlice<'_>, Broken>> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let slices = GuestMemoryBackend::get_slices(&self.0, GuestAddress(address), length);
        slices.map(|slice| slice.map_err(broken))
    }

    /// Gives whole pages back to the host; they read as zeroes then.
    pub fn discard(&self, address: u64, length: u64) {
        let start = address.next_multiple_of(PAGE);
        let end = (address + length) & !(PAGE - 1);
        if start >= end {
            return;
        }
        for slice in self.slices(start, end - start).flatten() {
            let guard = slice.ptr_guard_mut();
            // SAFETY: the range lies in a shared mapping that `self` keeps, and nothing refers to
            // it but through volatile accesses, for which zeroes are as good as anything.
            let failed = unsafe {
                libc::madvise(guard.as_ptr().cast(), guard.len(), libc::MADV_REMOVE) != 0
            };
            if failed {
                let error = std::io::Error::last_os_error();
                anemone_log::warn_limited!("memory cannot be given back: {error}");
            }
        }
    }
}

/// The region that the back end sees in place of guest RAM.
#[derive(Debug)]
pub(super) struct Region {
    pub memory: Memory,
    /// Length in bytes, whole pages.
    pub size: u64,
    /// The region as the back end maps it.
    pub table: GuestRam,
}

impl Region {
    /// Maps a memfd, all of it.
    pub fn new(fd: OwnedFd, size: u64) -> Result<Self, Error> {
        let os = |what| move |source| Error::Os { what, source };
        let copy = fd.try_clone().map_err(os("dup of the bounce region"))?;
        let file = FileOffset::new(copy.into(), 0);
        let length = usize::try_from(size).map_err(|_| Error::Region { size, least: PAGE })?;
        let area = (GuestAddress(BASE), length, Some(file));
        let memory = GuestMemoryMmap::from_ranges_with_files([area]).map_err(|e| Error::Os {
            what: "mapping the bounce region",
            source: std::io::Error::other(e),
        })?;
        Ok(Self {
            memory: Memory::new(memory.clone()),
            size,
            table: GuestRam {
                regions: vec![(BASE, size, fd, 0)],
                mapped: memory,
            },
        })
    }
}
