//! Gives back memory that only the start of the process and the set-up of a device needed.

use std::ptr;

// Set by the linker: the first byte of the image, and the first after its code.
unsafe extern "C" {
    static __executable_start: u8;
    static etext: u8;
}

/// Unmaps the code and the constants of the process. The kernel maps again what is touched, from
/// its page cache; most never is: it belongs to the start (relocation, arguments, the jail) or to
/// what does not happen (unwinding, formatting of numbers), and was mapped because it lies near
/// what is used. No effect on failure.
pub fn unmap_code() {
    let start = ptr::addr_of!(__executable_start);
    let length = (ptr::addr_of!(etext) as usize).saturating_sub(start as usize);
    // SAFETY: the linker places headers, constants and code in this range, in mappings of the
    // executable that are never writable, so what is dropped is a copy of the file.
    unsafe { libc::madvise(start.cast_mut().cast(), length, libc::MADV_DONTNEED) };
}
