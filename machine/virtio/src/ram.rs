//! Guest RAM as the devices use it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use anemone_vhost_user::MemoryRegion;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest RAM: as back ends map it, and as this process reads the queues' indices.
///
/// The "user addresses" by which vhost-user names places in memory are the guest-physical ones.
/// They serve only to find the region, and so the layout of this process stays its own secret.
#[derive(Debug)]
pub struct GuestRam {
    /// First address, length in bytes, the memory, and where in it the region begins.
    pub regions: Vec<(u64, u64, OwnedFd, u64)>,
    /// The same memory, mapped.
    pub mapped: GuestMemoryMmap,
}

impl GuestRam {
    /// Whether an area lies wholly in one region.
    pub fn contains(&self, address: u64, length: u64) -> bool {
        self.regions.iter().any(|(start, size, _, _)| {
            address
                .checked_sub(*start)
                .is_some_and(|at| at < *size && size - at >= length)
        })
    }

    /// The memory table for a back end.
    pub fn table(&self) -> Vec<MemoryRegion<'_>> {
        self.regions
            .iter()
            .map(|(start, size, fd, offset)| MemoryRegion {
                guest_addr: *start,
                size: *size,
                user_addr: *start,
                fd: fd.as_fd(),
                offset: *offset,
            })
            .collect()
    }

    /// `idx` of the used ring at `ring` (virtio 1.3, 2.7.8).
    pub fn used_index(&self, ring: u64) -> u16 {
        self.index(ring)
    }

    /// `idx` of the available ring at `ring` (virtio 1.3, 2.7.6).
    pub(crate) fn available_index(&self, ring: u64) -> u16 {
        self.index(ring)
    }

    /// Both rings have their index behind 16 bits of flags. Zero outside RAM, where no ring of a
    /// started queue lies.
    fn index(&self, ring: u64) -> u16 {
        let at = GuestAddress(ring.wrapping_add(2));
        u16::from_le(self.mapped.load(at, Ordering::Acquire).unwrap_or(0))
    }
}
