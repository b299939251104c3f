//! Memory for generated code, never writable and executable through one mapping.
//!
//! An anonymous file is mapped twice: once to write, once to read and execute. Both mappings exist
//! before a jail is entered or are allowed by its policy: `memfd_create`, `ftruncate`, `mmap`
//! shared with PROT_READ|PROT_WRITE and shared with PROT_READ|PROT_EXEC, `munmap`, `close`. Neither
//! ever changes its protection.

use std::arch::asm;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// One mapping, unmapped when dropped.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, and the value is its only owner.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(fd: &OwnedFd, len: usize, protection: libc::c_int) -> io::Result<Self> {
        // SAFETY: a fresh shared mapping at an address that the kernel chooses.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(base.cast())
            .map(|base| Self { base, len })
            .ok_or_else(|| io::Error::other("mmap returned address 0"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A bounded buffer of generated code, filled from the start.
pub struct CodeBuffer {
    writable: Mapping,
    executable: Mapping,
    used: usize,
}

impl CodeBuffer {
    /// Maps `len` bytes twice; `len` is rounded up to whole pages.
    ///
    /// # Errors
    /// Those of `memfd_create`, `ftruncate` and `mmap`.
    pub fn new(len: usize) -> io::Result<Self> {
        let len = len.max(1).next_multiple_of(4096);
        // SAFETY: the name is a terminated string.
        let fd = unsafe { libc::memfd_create(c"anemone-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let size = libc::off_t::try_from(len).map_err(io::Error::other)?;
        // SAFETY: plain system call on an own descriptor.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            writable: Mapping::new(&fd, len, libc::PROT_READ | libc::PROT_WRITE)?,
            executable: Mapping::new(&fd, len, libc::PROT_READ | libc::PROT_EXEC)?,
            used: 0,
        })
    }

    /// Bytes in use and bytes in all.
    pub fn usage(&self) -> (usize, usize) {
        (self.used, self.writable.len)
    }

    /// Adds code at the next multiple of 16 and returns its offset, or `None` if it does not fit.
    pub fn append(&mut self, code: &[u8]) -> Option<u32> {
        let start = self.used.next_multiple_of(16);
        let end = start
            .checked_add(code.len())
            .filter(|end| *end <= self.writable.len)?;
        let offset = u32::try_from(start).ok()?;
        // SAFETY: start..end lies in the writable mapping, which nothing else refers to.
        unsafe {
            let target = self.writable.base.as_ptr().add(start);
            std::ptr::copy_nonoverlapping(code.as_ptr(), target, code.len());
        }
        self.used = end;
        serialize();
        Some(offset)
    }

    /// Forgets all code. Offsets handed out before must not be entered any more.
    pub fn clear(&mut self) {
        self.used = 0;
    }

    /// Where the code at `offset` is executed.
    pub fn address(&self, offset: u32) -> *const u8 {
        self.executable.base.as_ptr().wrapping_add(offset as usize)
    }
}

/// Makes this CPU drop instructions that it fetched before the bytes were written through another
/// address (SDM volume 3, section 8.1.3); IRET is the serialising instruction (section 8.3) that
/// neither a hypervisor intercepts nor an old CPU lacks.
pub fn serialize() {
    // SAFETY: returns to the next line with all registers but one unchanged; the stack pointer is
    // moved below the red zone before anything is pushed.
    unsafe {
        asm!(
            "mov {saved}, rsp",
            "sub rsp, 128",
            "and rsp, -16",
            "mov {segment:e}, ss",
            "push {segment}",
            "push {saved}",
            "pushfq",
            "mov {segment:e}, cs",
            "push {segment}",
            "lea {segment}, [rip + 2f]",
            "push {segment}",
            "iretq",
            "2:",
            saved = out(reg) _,
            segment = out(reg) _,
        );
    }
}
