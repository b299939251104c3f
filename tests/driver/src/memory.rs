//! Guest memory in a memfd.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use anemone_vhost_user::MemoryRegion;

use crate::new_fd;

/// Guest memory from guest address 0 on, shared with the back end.
#[derive(Debug)]
pub struct Memory {
    file: File,
    start: *mut u8,
    size: u64,
    /// First byte that [`alloc`](Memory::alloc) has not given away.
    free: AtomicU64,
}

// SAFETY: the mapping belongs to this value until it is dropped, and is only accessed by volatile
// copies and atomics, as memory shared with another process must be anyway.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// What the front end calls guest address 0. Different on purpose.
    pub const USER_BASE: u64 = 0x5000_0000_0000;

    /// Zeroed memory of `size` bytes, whole pages, sealed against resizing.
    ///
    /// # Errors
    /// The memory cannot be had.
    pub fn new(size: u64) -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string.
        let fd = new_fd(unsafe { libc::memfd_create(c"guest-memory".as_ptr(), flags) })?;
        let file = File::from(fd);
        file.set_len(size)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: F_ADD_SEALS takes no pointer.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            file,
            start: start.cast(),
            size,
            free: AtomicU64::new(4096),
        })
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The region as the back end is told about it.
    pub fn region(&self) -> MemoryRegion<'_> {
        MemoryRegion {
            guest_addr: 0,
            size: self.size,
            user_addr: Self::USER_BASE,
            fd: self.as_fd(),
            offset: 0,
        }
    }

    /// A zeroed piece of memory for the caller, never given back.
    ///
    /// # Panics
    /// Memory is used up.
    pub fn alloc(&self, length: u64, align: u64) -> u64 {
        let free = self.free.load(Ordering::Relaxed);
        let start = free.next_multiple_of(align);
        assert!(start + length <= self.size, "guest memory is used up");
        self.free.store(start + length, Ordering::Relaxed);
        start
    }

    /// Copies guest memory.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        let from = self.at(addr, data.len() as u64);
        // SAFETY: `at` has checked the range, and `data` is ours. The back end may write meanwhile;
        // bytes have no invalid values and nobody keeps a reference to them.
        unsafe { ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len()) };
    }

    /// Copies guest memory.
    pub fn read_vec(&self, addr: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.read(addr, &mut data);
        data
    }

    /// Copies into guest memory.
    pub fn write(&self, addr: u64, data: &[u8]) {
        let to = self.at(addr, data.len() as u64);
        // SAFETY: as for `read`.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    /// A 16-bit word of a ring.
    pub(crate) fn word(&self, addr: u64) -> &AtomicU16 {
        let at = self.at(addr, 2);
        assert!(addr.is_multiple_of(2), "{addr:#x} is not aligned");
        // SAFETY: in range, aligned (the mapping is by pages), and shared memory is accessed
        // through an atomic for as long as the mapping lives.
        unsafe { AtomicU16::from_ptr(at.cast()) }
    }

    fn at(&self, addr: u64, length: u64) -> *mut u8 {
        let fits = addr.checked_add(length).is_some_and(|end| end <= self.size);
        assert!(fits, "{length} bytes at {addr:#x} are not in guest memory");
        // SAFETY: inside the mapping.
        unsafe { self.start.add(addr as usize) }
    }
}

impl AsFd for Memory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nothing refers to any more.
        unsafe { libc::munmap(self.start.cast(), self.size as usize) };
    }
}
