//! From the descriptors of a chain to pieces of this process's memory.

use std::ops::Deref;

use libc::iovec;
use thiserror::Error;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// Which buffers of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Those that the device reads.
    Readable,
    /// Those that it writes.
    Writable,
}

/// What is wrong with a chain that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Unusable {
    /// A descriptor could not be read, or the chain loops or exceeds 4 GiB.
    #[error("its chain does not end")]
    Endless,
    /// A buffer is not in guest memory.
    #[error("a buffer of {len} bytes at {address:#x} is not in guest memory")]
    Outside {
        /// Guest address of the buffer.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// More descriptors or pieces than the device can do with.
    #[error("it has more than {0} parts")]
    TooMany(usize),
    /// Readable descriptors come first (virtio 1.3, 2.7.4.2).
    #[error("a readable buffer follows a writable one")]
    Order,
}

/// Passes the buffers of `chain` to `take`, in order and in pieces, none of them empty. They are
/// valid as long as `memory` is mapped; the guest may change what is in them at any time.
///
/// # Errors
/// The chain cannot be used: what was passed on is of no use either. `most` limits the number of its
/// descriptors and that of the pieces.
pub fn walk(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<impl Deref<Target = GuestMemoryMmap>>,
    most: usize,
    mut take: impl FnMut(Side, iovec),
) -> Result<(), Unusable> {
    let mut side = Side::Readable;
    let mut pieces = 0;
    let mut ended = false;
    for (count, descriptor) in chain.enumerate() {
        if count == most {
            return Err(Unusable::TooMany(most));
        }
        match (side, descriptor.is_write_only()) {
            (Side::Writable, false) => return Err(Unusable::Order),
            (_, true) => side = Side::Writable,
            (Side::Readable, false) => {}
        }
        let (address, len) = (descriptor.addr(), descriptor.len());
        for slice in memory.get_slices(address, len as usize) {
            let slice = slice.map_err(|_| Unusable::Outside {
                address: address.0,
                len,
            })?;
            if pieces == most {
                return Err(Unusable::TooMany(most));
            }
            pieces += 1;
            let piece = iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            };
            take(side, piece);
        }
        // The iterator stops without a word at a descriptor that it cannot follow.
        ended = !descriptor.has_next();
    }
    match ended {
        true => Ok(()),
        false => Err(Unusable::Endless),
    }
}
