//! A descriptor chain as pieces of host memory.

use std::ptr;

use anemone_device::{Chain, Side, Unusable, walk};
use libc::iovec;
use thiserror::Error;
use vm_memory::GuestMemoryMmap;

/// Pieces of a chain. The kernel takes 1024 in one call, and some more may stand before them.
const MAX_PARTS: usize = 1000;

/// A chain that is of no use; it is returned to the driver with nothing written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// Its descriptors are wrong.
    #[error(transparent)]
    Chain(#[from] Unusable),
    /// A buffer to read in the receive queue, or to write in the transmit queue.
    #[error("a buffer has the wrong direction")]
    Direction,
    /// Too short or too long for a packet.
    #[error("{0} bytes are no packet")]
    Length(usize),
}

/// A list of pieces of memory for the kernel.
#[derive(Debug, Default)]
pub struct Pieces(pub Vec<iovec>);

// SAFETY: only addresses. Who follows them makes sure that they are valid, on whatever thread.
unsafe impl Send for Pieces {}

/// The pieces of one chain, in order.
#[derive(Debug, Default)]
pub struct Buffers {
    /// First descriptor of the chain.
    pub head: u16,
    /// The pieces, none of them empty. Guest memory, so it may change at any time.
    pub parts: Pieces,
    /// Sum of their lengths.
    pub len: usize,
}

impl Buffers {
    /// Lists the buffers of `chain`, all of which the device must write (`writable`) or read. They
    /// are valid as long as `memory` is mapped.
    pub fn collect(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: Chain,
        writable: bool,
    ) -> Result<(), Malformed> {
        self.head = chain.head_index();
        self.clear();
        let wanted = match writable {
            true => Side::Writable,
            false => Side::Readable,
        };
        let mut astray = false;
        walk(memory, chain, MAX_PARTS, |side, part| {
            astray |= side != wanted;
            self.len += part.iov_len;
            self.parts.0.push(part);
        })?;
        match astray {
            false => Ok(()),
            true => Err(Malformed::Direction),
        }
    }

    /// Nothing but the head is left.
    pub fn clear(&mut self) {
        self.parts.0.clear();
        self.len = 0;
    }

    /// Copies the first bytes out, and removes them. False if there are not enough.
    pub fn take(&mut self, to: &mut [u8]) -> bool {
        if self.len < to.len() {
            return false;
        }
        let mut filled = 0;
        let mut used_up = 0;
        for part in &mut self.parts.0 {
            let count = part.iov_len.min(to.len() - filled);
            // SAFETY: both ranges have `count` bytes: the piece is in guest memory, which is
            // mapped, and `to` is ours. The guest may write meanwhile; bytes have no invalid
            // values and nobody keeps a reference to them.
            unsafe {
                let to = to[filled..].as_mut_ptr();
                ptr::copy_nonoverlapping(part.iov_base.cast::<u8>(), to, count);
            }
            filled += count;
            part.iov_base = part.iov_base.wrapping_byte_add(count);
            part.iov_len -= count;
            if part.iov_len > 0 {
                break;
            }
            used_up += 1;
        }
        self.parts.0.drain(..used_up);
        self.len -= to.len();
        true
    }

    /// Copies `bytes` to `offset`. The caller has checked that they fit.
    pub fn put(&self, offset: usize, mut bytes: &[u8]) {
        let mut skip = offset;
        for part in &self.parts.0 {
            if bytes.is_empty() {
                break;
            }
            let start = skip.min(part.iov_len);
            skip -= start;
            let count = bytes.len().min(part.iov_len - start);
            // SAFETY: as for `take`, in the other direction.
            unsafe {
                let to = part.iov_base.cast::<u8>().add(start);
                ptr::copy_nonoverlapping(bytes.as_ptr(), to, count);
            }
            bytes = &bytes[count..];
        }
    }

    /// Adds the pieces after the first `skip` bytes to a list.
    pub fn add_to(&self, list: &mut Vec<iovec>, mut skip: usize) {
        for part in &self.parts.0 {
            let start = skip.min(part.iov_len);
            skip -= start;
            if start < part.iov_len {
                list.push(iovec {
                    iov_base: part.iov_base.wrapping_byte_add(start),
                    iov_len: part.iov_len - start,
                });
            }
        }
    }
}

/// A piece of our own memory, to be read.
pub fn piece(bytes: &[u8]) -> iovec {
    iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

/// A piece of our own memory to be filled.
pub fn piece_mut(bytes: &mut [u8]) -> iovec {
    iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffers(memory: &mut [Vec<u8>]) -> Buffers {
        let part = |part: &mut Vec<u8>| iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        };
        let parts = Pieces(memory.iter_mut().map(part).collect());
        let len = memory.iter().map(Vec::len).sum();
        Buffers {
            head: 0,
            parts,
            len,
        }
    }

    #[test]
    fn bytes_cross_the_borders_of_pieces() {
        let mut memory = [vec![1, 2, 3], vec![4], vec![5, 6, 7, 8]];
        let mut b = buffers(&mut memory);
        let mut first = [0; 4];
        assert!(b.take(&mut first));
        assert_eq!((first, b.len, b.parts.0.len()), ([1, 2, 3, 4], 4, 1));
        let mut none = [0; 5];
        assert!(!b.take(&mut none));
        let mut list = Vec::new();
        b.add_to(&mut list, 3);
        assert_eq!((list.len(), list[0].iov_len), (1, 1));
        let mut memory = [vec![0; 3], vec![0; 1], vec![0; 4]];
        let b = buffers(&mut memory);
        b.put(2, &[7, 8, 9, 10]);
        assert_eq!(memory, [vec![0, 0, 7], vec![8], vec![9, 10, 0, 0]]);
        let b = buffers(&mut memory);
        let mut list = Vec::new();
        b.add_to(&mut list, 3);
        assert_eq!(list.iter().map(|p| p.iov_len).collect::<Vec<_>>(), [1, 4]);
    }
}
