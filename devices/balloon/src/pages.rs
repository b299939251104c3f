//! Which memory goes back to the host, and how.
//!
//! What a driver gives up it names in one of two ways: by numbers of 4 KiB pages (inflation) or as the
//! buffers of a chain (free page reporting). Here both become ranges of guest-physical addresses,
//! and of those the whole pages that lie in memory this process has mapped are freed: the memfd gets
//! holes, which read as zero everywhere it is mapped. Nothing else is touched.
//!
//! A back end that serves the device through a bounce region finds none of the guest's pages in its
//! memory table, and frees nothing; the front end, which knows what the guest has named, does it when
//! the chain comes back.

use std::io;

use anemone_log::warn_limited;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use crate::saved::PAGE;

/// Page numbers of one chain that are looked at: a GiB of memory. Linux sends 256. Pages beyond them
/// keep their contents, and the guest need not know.
pub const MOST_NUMBERS: usize = 1 << 18;

/// First address and length of the ranges that these pages form, in the order of addresses.
pub fn ranges(numbers: &mut [u32]) -> Vec<(u64, u64)> {
    numbers.sort_unstable();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for &number in numbers.iter() {
        let page = u64::from(number) * PAGE;
        match ranges.last_mut() {
            Some((start, length)) if *start + *length == page => *length += PAGE,
            Some((start, length)) if page < *start + *length => {}
            _ => ranges.push((page, PAGE)),
        }
    }
    ranges
}

/// Frees the whole pages of a range that lie in guest memory; returns how many bytes.
pub fn free(memory: &GuestMemoryMmap, start: u64, length: u64) -> u64 {
    let Some(end) = start.checked_add(length) else {
        return 0;
    };
    let mut freed = 0;
    for region in memory.iter() {
        // Regions begin and end at pages (lib/device/src/memory.rs).
        let first = region.start_addr().0;
        let from = start.max(first).next_multiple_of(PAGE);
        let to = end.min(first + region.len()) / PAGE * PAGE;
        if from >= to {
            continue;
        }
        let (offset, length) = (from - first, to - from);
        let freed_here = region
            .get_host_address(MemoryRegionAddress(offset))
            .map_err(io::Error::other)
            .and_then(|host| remove(host, length));
        match freed_here {
            Ok(()) => freed += length,
            Err(error) => warn_limited!("{length} bytes at {from:#x} cannot be freed: {error}"),
        }
    }
    freed
}

/// Frees pages of a shared mapping and of the file behind it.
fn remove(host: *mut u8, length: u64) -> io::Result<()> {
    // SAFETY: the callers name whole pages of guest memory, which is mapped, and which nobody here
    // refers to: it is accessed by volatile copies and changes all the time.
    let rc = unsafe { libc::madvise(host.cast(), length as usize, libc::MADV_REMOVE) };
    match rc {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::FromRawFd;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    #[test]
    fn pages_become_ranges() {
        let page = |n: u64| n * PAGE;
        assert_eq!(ranges(&mut []), []);
        assert_eq!(
            ranges(&mut [7, 3, 4, 4, 5, 0, u32::MAX]),
            [
                (0, PAGE),
                (page(3), 3 * PAGE),
                (page(7), PAGE),
                (page(u32::MAX.into()), PAGE)
            ]
        );
    }

    #[test]
    fn whole_pages_of_guest_memory_are_freed_and_nothing_else() {
        // SAFETY: the name is a C string, and the new descriptor is owned at once.
        let file = unsafe {
            std::fs::File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC))
        };
        file.set_len(16 * PAGE).unwrap();
        let part = |offset| Some(FileOffset::new(file.try_clone().unwrap(), offset));
        let low = (GuestAddress(0), 8 * PAGE as usize, part(0));
        let high = (GuestAddress(1 << 32), 8 * PAGE as usize, part(8 * PAGE));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([low, high]).unwrap();
        let fill = || {
            let bytes = vec![0xAA; 8 * PAGE as usize];
            memory.write_slice(&bytes, GuestAddress(0)).unwrap();
            memory.write_slice(&bytes, GuestAddress(1 << 32)).unwrap();
            16
        };
        // Pages of the file that are there: those that have been written and not been freed.
        let present = || file.metadata().unwrap().blocks() * 512 / PAGE;
        for (start, length, pages) in [
            (0, PAGE, 1),
            (2 * PAGE, 3 * PAGE, 3),
            (1, PAGE, 0),
            (1, 2 * PAGE, 1),
            (PAGE, PAGE - 1, 0),
            (7 * PAGE, 1 << 32, 8), // the last page of one, and of the other all but the last
            (8 * PAGE, PAGE, 0),    // between the regions
            ((1 << 32) - PAGE, PAGE, 0), // before the second
            ((1 << 32) + 8 * PAGE, u64::MAX - (1 << 40), 0),
            (u64::MAX - 10, 20, 0),
            (0, 0, 0),
            (0, u64::MAX, 16),
        ] {
            assert_eq!(fill(), present());
            let what = format!("{length:#x} bytes at {start:#x}");
            assert_eq!(free(&memory, start, length), pages * PAGE, "{what}");
            assert_eq!(present(), 16 - pages, "{what}");
        }
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    }
}
