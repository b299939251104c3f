//! Guest memory as the front end shares it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anemone_vhost_user::ReceivedRegion;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// Granularity of everything that is mapped.
const PAGE: u64 = 4096;

/// Guest memory, mapped, and the front end's addresses for it.
#[derive(Debug)]
pub(crate) struct Memory {
    /// By guest address.
    pub guest: Arc<GuestMemoryMmap>,
    /// User address, length and guest address of each region.
    user: Vec<(u64, u64, u64)>,
}

impl Memory {
    /// Checks and maps a memory table.
    ///
    /// # Errors
    /// What is wrong with it, for the log.
    pub fn map(table: Vec<ReceivedRegion>) -> Result<Self, String> {
        let mut user = Vec::with_capacity(table.len());
        let mut regions = Vec::with_capacity(table.len());
        for region in table {
            let ReceivedRegion {
                guest_addr,
                size,
                user_addr,
                offset,
                fd,
            } = region;
            let what = format!("memory region of {size:#x} bytes at {guest_addr:#x}");
            if (guest_addr | size | offset) % PAGE != 0 || size == 0 {
                return Err(format!("{what}, file offset {offset:#x}: not whole pages"));
            }
            if user_addr.checked_add(size).is_none() {
                return Err(format!("{what}: wraps around the address space"));
            }
            let overlaps = |&(start, length, _): &(u64, u64, u64)| {
                user_addr < start + length && start < user_addr + size
            };
            if user.iter().any(overlaps) {
                return Err(format!("{what}: overlaps another in user addresses"));
            }
            user.push((user_addr, size, guest_addr));
            regions.push(map_region(guest_addr, size, offset, fd).map_err(|e| what + &e)?);
        }
        regions.sort_by_key(GuestMemoryRegion::start_addr);
        let guest = GuestMemoryMmap::from_regions(regions).map_err(|e| e.to_string())?;
        Ok(Self {
            guest: Arc::new(guest),
            user,
        })
    }

    /// The guest address behind one of the front end's.
    pub fn guest_addr(&self, user_addr: u64) -> Option<u64> {
        self.user.iter().find_map(|&(start, length, guest)| {
            let offset = user_addr.checked_sub(start)?;
            (offset < length).then_some(guest + offset)
        })
    }
}

fn map_region(guest: u64, size: u64, offset: u64, fd: OwnedFd) -> Result<GuestRegionMmap, String> {
    let file = File::from(fd);
    // Touching a page past the end of the file would kill the process.
    let length = file.metadata().map_err(|e| format!(": {e}"))?.len();
    if offset.checked_add(size).is_none_or(|end| end > length) {
        return Err(format!(
            ": its file ends at {length:#x}, the region begins at {offset:#x} in it"
        ));
    }
    let size = usize::try_from(size).map_err(|e| format!(": {e}"))?;
    let mapping = MmapRegionBuilder::new(size)
        .with_file_offset(FileOffset::new(file, offset))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(|e| format!(": cannot be mapped: {e}"))?;
    GuestRegionMmap::new(mapping, GuestAddress(guest))
        .ok_or_else(|| ": wraps around the address space".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::Bytes;

    fn region(guest: u64, size: u64, user: u64, offset: u64) -> ReceivedRegion {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE).unwrap();
        file.write_all(b"start").unwrap();
        ReceivedRegion {
            guest_addr: guest,
            size,
            user_addr: user,
            offset,
            fd: file.into(),
        }
    }

    #[test]
    fn regions_are_mapped_where_the_table_says() {
        let high = region(1 << 32, 2 * PAGE, 0x10_0000, 2 * PAGE);
        let low = region(0, PAGE, 0x20_0000, 0);
        let memory = Memory::map(vec![high, low]).unwrap();
        let mut text = [0; 5];
        memory.guest.read_slice(&mut text, GuestAddress(0)).unwrap();
        assert_eq!(&text, b"start");
        assert_eq!(memory.guest_addr(0x10_0000), Some(1 << 32));
        assert_eq!(memory.guest_addr(0x10_1fff), Some((1 << 32) + 0x1fff));
        assert_eq!(memory.guest_addr(0x10_2000), None);
        assert_eq!(memory.guest_addr(0x20_0fff), Some(0xfff));
        assert_eq!(memory.guest_addr(0), None);
    }

    #[test]
    fn impossible_tables_are_refused() {
        for (table, part) in [
            (vec![region(0, PAGE + 1, 0, 0)], "whole pages"),
            (vec![region(1, PAGE, 0, 0)], "whole pages"),
            (vec![region(0, PAGE, 0, 512)], "whole pages"),
            (vec![region(0, 0, 0, 0)], "whole pages"),
            (vec![region(0, 5 * PAGE, 0, 0)], "file ends"),
            (vec![region(0, PAGE, 0, 4 * PAGE)], "file ends"),
            (vec![region(0, PAGE, 0, !0xfff)], "file ends"),
            (vec![region(0, PAGE, !0xfff, 0)], "wraps"),
            (vec![region(!0xfff, PAGE, 0, 0)], "wraps"),
            (
                vec![region(0, 2 * PAGE, 0, 0), region(PAGE, PAGE, 1 << 30, 0)],
                "intersect",
            ),
            (
                vec![region(0, 2 * PAGE, 0, 0), region(1 << 30, PAGE, PAGE, 0)],
                "overlaps",
            ),
        ] {
            let error = Memory::map(table).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
        let directory = std::fs::File::open("/").unwrap();
        let mut not_a_file = region(0, PAGE, 0, 0);
        not_a_file.fd = directory.into();
        assert!(Memory::map(vec![not_a_file]).is_err());
    }
}
