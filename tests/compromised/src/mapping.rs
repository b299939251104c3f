//! A file in memory that others write to meanwhile.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;

/// The start of a file, mapped as long as the process lives.
#[derive(Debug)]
pub struct Mapping {
    start: usize,
    length: usize,
}

impl Mapping {
    /// Maps so many bytes; nothing where the file is shorter.
    pub fn of_file(file: &File, length: usize) -> Option<Self> {
        if file.metadata().ok()?.len() < length as u64 {
            return None;
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        let start = start as usize;
        (start != usize::MAX).then_some(Self { start, length })
    }

    /// What is there now.
    pub fn copy(&self) -> Vec<u8> {
        let start = self.start as *const u8;
        (0..self.length)
            // SAFETY: inside the mapping, which stays and is only read byte by byte.
            .map(|i| unsafe { start.add(i).read_volatile() })
            .collect()
    }
}
