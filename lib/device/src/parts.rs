//! The buffers of a chain as memory of this process.

use std::ops::Deref;
use std::{fmt, mem, ptr};

use libc::iovec;
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use crate::walk::{Side, Unusable, walk};

/// Parts of a chain at most: the kernel takes no longer list.
const MAX_PARTS: usize = 1024;

/// A string of bytes in guest memory, in pieces. It must not outlive the guest memory that it was
/// found in; the guest may change the bytes at any time, so they are only ever copied.
#[derive(Default)]
pub struct Parts {
    list: Vec<iovec>,
    /// Parts before this one have been taken.
    first: usize,
}

// SAFETY: the pointers lie in a mapping that is shared with other processes anyway, and are only
// used for copies.
unsafe impl Send for Parts {}

impl fmt::Debug for Parts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in {} parts", self.len(), self.rest().len())
    }
}

impl Parts {
    /// Lists the buffers of a chain: those that the device reads go to `readable`, those that it
    /// writes to `writable`. Neighbours become one part.
    ///
    /// # Errors
    /// The chain carries no request.
    pub fn of_chain(
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<impl Deref<Target = GuestMemoryMmap>>,
        readable: &mut Self,
        writable: &mut Self,
    ) -> Result<(), Unusable> {
        readable.clear();
        writable.clear();
        walk(memory, chain, MAX_PARTS, |side, part| {
            let parts = match side {
                Side::Readable => &mut *readable,
                Side::Writable => &mut *writable,
            };
            parts.push(part.iov_base.cast(), part.iov_len);
        })
    }

    fn push(&mut self, start: *mut u8, len: usize) {
        if let Some(last) = self.list.last_mut()
            && ptr::eq(last.iov_base.cast::<u8>().wrapping_add(last.iov_len), start)
        {
            last.iov_len += len;
        } else if len > 0 {
            self.list.push(iovec {
                iov_base: start.cast(),
                iov_len: len,
            });
        }
    }

    fn clear(&mut self) {
        self.list.clear();
        self.first = 0;
    }

    /// Makes this the same string as another.
    pub fn copy_from(&mut self, other: &Self) {
        self.list.clear();
        self.list.extend_from_slice(other.rest());
        self.first = 0;
    }

    /// Number of bytes left.
    pub fn len(&self) -> usize {
        self.rest().iter().map(|part| part.iov_len).sum()
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.rest().is_empty()
    }

    /// What is left, for a system call that copies.
    pub fn rest(&self) -> &[iovec] {
        &self.list[self.first..]
    }

    /// Ends the string after `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        let mut left = len;
        for index in self.first..self.list.len() {
            let part = &mut self.list[index];
            if part.iov_len >= left {
                part.iov_len = left;
                let end = if left == 0 { index } else { index + 1 };
                self.list.truncate(end);
                return;
            }
            left -= part.iov_len;
        }
    }

    /// Passes over `len` bytes; false if there are not as many.
    pub fn skip(&mut self, len: usize) -> bool {
        self.each(len, |_, _| {})
    }

    /// Takes the next bytes; false, with nothing taken, if there are not as many.
    pub fn read(&mut self, to: &mut [u8]) -> bool {
        let mut to = to;
        self.each(to.len(), |from, len| {
            let (now, rest) = mem::take(&mut to).split_at_mut(len);
            // SAFETY: the part lies in mapped guest memory (`of_chain`), and `now` is `len` bytes
            // of this process's own.
            unsafe { ptr::copy_nonoverlapping(from, now.as_mut_ptr(), len) };
            to = rest;
        })
    }

    /// Fills the next bytes; false, with nothing written, if there are not as many.
    pub fn write(&mut self, from: &[u8]) -> bool {
        let mut from = from;
        self.each(from.len(), |to, len| {
            let (now, rest) = from.split_at(len);
            // SAFETY: as for `read`.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), to, len) };
            from = rest;
        })
    }

    fn each(&mut self, len: usize, mut act: impl FnMut(*mut u8, usize)) -> bool {
        if self.len() < len {
            return false;
        }
        let mut left = len;
        while left > 0 {
            let part = &mut self.list[self.first];
            let now = part.iov_len.min(left);
            act(part.iov_base.cast(), now);
            part.iov_base = part.iov_base.wrapping_byte_add(now);
            part.iov_len -= now;
            if part.iov_len == 0 {
                self.first += 1;
            }
            left -= now;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(buffers: &mut [Vec<u8>]) -> Parts {
        let mut parts = Parts::default();
        for buffer in buffers {
            parts.push(buffer.as_mut_ptr(), buffer.len());
        }
        parts
    }

    #[test]
    fn bytes_are_taken_across_parts() {
        let mut buffers = [b"abc".to_vec(), Vec::new(), b"defg".to_vec(), b"h".to_vec()];
        let mut parts = parts(&mut buffers);
        assert_eq!((parts.len(), parts.rest().len()), (8, 3));
        let mut bytes = [0; 5];
        assert!(parts.read(&mut bytes));
        assert_eq!((&bytes, parts.len()), (b"abcde", 3));
        assert!(!parts.read(&mut [0; 4]), "not as many");
        assert!(parts.skip(1));
        assert!(parts.write(b"XY"));
        assert!(parts.is_empty() && !parts.skip(1) && parts.skip(0));
        assert_eq!(
            (&buffers[2][..], &buffers[3][..]),
            (&b"defX"[..], &b"Y"[..])
        );
    }

    #[test]
    fn a_string_is_cut() {
        for (len, rest) in [(0, 0), (2, 1), (3, 1), (4, 2), (9, 2)] {
            let mut buffers = [b"abc".to_vec(), b"def".to_vec()];
            let mut parts = parts(&mut buffers);
            parts.truncate(len);
            assert_eq!(
                (parts.len(), parts.rest().len()),
                (len.min(6), rest),
                "{len}"
            );
        }
    }

    #[test]
    fn neighbours_are_one() {
        let mut buffer = vec![0u8; 10];
        let start = buffer.as_mut_ptr();
        let mut parts = Parts::default();
        parts.push(start, 4);
        parts.push(start.wrapping_add(4), 6);
        assert_eq!((parts.len(), parts.rest().len()), (10, 1));
    }
}
