//! Single machine instructions on memory that other threads and the guest change at any time.
//!
//! Guest memory is shared with vCPU threads and device processes, at any alignment. Rust has no
//! type for that, so every access is one instruction of the host. That also gives the guest the
//! host's memory model: loads and stores of up to eight bytes are as atomic and as ordered here
//! as in the guest's own program (SDM volume 3, 9.1.1 and 9.2).

use std::arch::asm;
use std::arch::x86_64::__m128i;

mod sealed {
    pub trait Sealed {}
    impl Sealed for u8 {}
    impl Sealed for u16 {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
    impl Sealed for u128 {}
    impl Sealed for [u128; 2] {}
}

/// A value that one guest access moves: 1, 2, 4, 8, 16 or 32 bytes, little-endian.
pub trait Value: Copy + sealed::Sealed {
    /// Size in bytes.
    const SIZE: usize;

    /// Loads at any alignment.
    ///
    /// # Safety
    /// `host` must point at [`SIZE`](Self::SIZE) mapped, readable bytes.
    unsafe fn read(host: *const u8) -> Self;

    /// Stores at any alignment.
    ///
    /// # Safety
    /// `host` must point at [`SIZE`](Self::SIZE) mapped, writable bytes that no Rust reference covers.
    unsafe fn write(host: *mut u8, value: Self);

    /// The bytes, lowest address first; those after [`SIZE`](Self::SIZE) are zero.
    fn to_bytes(self) -> [u8; 32];

    /// Takes the first [`SIZE`](Self::SIZE) bytes.
    fn from_bytes(bytes: &[u8; 32]) -> Self;
}

macro_rules! integer {
    ($type:ty, $class:ident, $operand:literal, $width:literal, $accumulator:tt) => {
        impl Value for $type {
            const SIZE: usize = size_of::<$type>();

            #[inline(always)]
            unsafe fn read(host: *const u8) -> Self {
                let value;
                // SAFETY: one load; the caller answers for the address.
                unsafe {
                    asm!(concat!("mov ", $operand, ", ", $width, " ptr [{1}]"),
                        out($class) value, in(reg) host,
                        options(nostack, preserves_flags, readonly));
                }
                value
            }

            #[inline(always)]
            unsafe fn write(host: *mut u8, value: Self) {
                // SAFETY: one store; the caller answers for the address.
                unsafe {
                    asm!(concat!("mov ", $width, " ptr [{1}], ", $operand),
                        in($class) value, in(reg) host, options(nostack, preserves_flags));
                }
            }

            fn to_bytes(self) -> [u8; 32] {
                let mut bytes = [0; 32];
                bytes[..Self::SIZE].copy_from_slice(&self.to_le_bytes());
                bytes
            }

            fn from_bytes(bytes: &[u8; 32]) -> Self {
                let mut own = [0; size_of::<$type>()];
                own.copy_from_slice(&bytes[..Self::SIZE]);
                Self::from_le_bytes(own)
            }
        }

        impl Atomic for $type {
            #[inline(always)]
            unsafe fn compare_exchange(host: *mut u8, expected: Self, new: Self) -> Self {
                let found;
                // SAFETY: one locked instruction; the caller answers for the address.
                unsafe {
                    asm!(concat!("lock cmpxchg ", $width, " ptr [{1}], ", $operand),
                        in($class) new, in(reg) host,
                        inout($accumulator) expected => found, options(nostack));
                }
                found
            }
        }
    };
}

/// A value that a locked instruction can change: 1, 2, 4, 8 or 16 bytes.
pub trait Atomic: Value + PartialEq {
    /// LOCK CMPXCHG (16 bytes: CMPXCHG16B): stores `new` if memory equals `expected`, and
    /// returns what memory held.
    ///
    /// # Safety
    /// As for [`Value::write`]; 16 bytes must be aligned, and less must not cross a cache line.
    unsafe fn compare_exchange(host: *mut u8, expected: Self, new: Self) -> Self;

    /// Whether [`compare_exchange`](Self::compare_exchange) may be used at this address.
    #[inline(always)]
    fn is_lockable(host: *mut u8) -> bool {
        (host as usize & (CACHE_LINE - 1)) + Self::SIZE <= CACHE_LINE
    }
}

/// A locked instruction across this border stops the whole host, and hosts may forbid it.
const CACHE_LINE: usize = 64;

integer!(u8, reg_byte, "{0}", "byte", "al");
integer!(u16, reg, "{0:x}", "word", "ax");
integer!(u32, reg, "{0:e}", "dword", "eax");
integer!(u64, reg, "{0}", "qword", "rax");

impl Value for u128 {
    const SIZE: usize = 16;

    #[inline(always)]
    unsafe fn read(host: *const u8) -> Self {
        let value: __m128i;
        // SAFETY: one load; the caller answers for the address. Sixteen plain bytes either way.
        unsafe {
            asm!("movups {0}, [{1}]", out(xmm_reg) value, in(reg) host,
                options(nostack, preserves_flags, readonly));
            std::mem::transmute(value)
        }
    }

    #[inline(always)]
    unsafe fn write(host: *mut u8, value: Self) {
        // SAFETY: one store; the caller answers for the address. Sixteen plain bytes either way.
        unsafe {
            let value: __m128i = std::mem::transmute(value);
            asm!("movups [{1}], {0}", in(xmm_reg) value, in(reg) host,
                options(nostack, preserves_flags));
        }
    }

    fn to_bytes(self) -> [u8; 32] {
        [self, 0].to_bytes()
    }

    fn from_bytes(bytes: &[u8; 32]) -> Self {
        <[u128; 2]>::from_bytes(bytes)[0]
    }
}

impl Atomic for u128 {
    unsafe fn compare_exchange(host: *mut u8, expected: Self, new: Self) -> Self {
        let (low, high): (u64, u64);
        // SAFETY: one locked instruction; the caller answers for the address. RBX, which the
        // compiler keeps to itself, is put back.
        unsafe {
            asm!("xchg rbx, rsi", "lock cmpxchg16b [rdi]", "mov rbx, rsi",
                inout("rsi") new as u64 => _, in("rcx") (new >> 64) as u64, in("rdi") host,
                inout("rax") expected as u64 => low, inout("rdx") (expected >> 64) as u64 => high,
                options(nostack));
        }
        u128::from(low) | u128::from(high) << 64
    }

    fn is_lockable(host: *mut u8) -> bool {
        host as usize & 15 == 0 && std::is_x86_feature_detected!("cmpxchg16b")
    }
}

impl Value for [u128; 2] {
    const SIZE: usize = 32;

    #[inline(always)]
    unsafe fn read(host: *const u8) -> Self {
        // SAFETY: the caller's 32 bytes, in two halves as early AVX machines do it.
        unsafe { [u128::read(host), u128::read(host.add(16))] }
    }

    #[inline(always)]
    unsafe fn write(host: *mut u8, value: Self) {
        // SAFETY: as above.
        unsafe {
            u128::write(host, value[0]);
            u128::write(host.add(16), value[1]);
        }
    }

    fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self[0].to_le_bytes());
        bytes[16..].copy_from_slice(&self[1].to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; 32]) -> Self {
        let mut halves = [[0; 16]; 2];
        halves[0].copy_from_slice(&bytes[..16]);
        halves[1].copy_from_slice(&bytes[16..]);
        halves.map(u128::from_le_bytes)
    }
}

/// Copies out of guest memory byte by byte.
///
/// # Safety
/// `host` must point at `into.len()` mapped, readable bytes.
pub(crate) unsafe fn read_bytes(host: *const u8, into: &mut [u8]) {
    for (i, byte) in into.iter_mut().enumerate() {
        // SAFETY: in the caller's range.
        *byte = unsafe { u8::read(host.add(i)) };
    }
}

/// Copies into guest memory byte by byte.
///
/// # Safety
/// `host` must point at `from.len()` mapped, writable bytes that no Rust reference covers.
pub(crate) unsafe fn write_bytes(host: *mut u8, from: &[u8]) {
    for (i, byte) in from.iter().enumerate() {
        // SAFETY: in the caller's range.
        unsafe { u8::write(host.add(i), *byte) };
    }
}
