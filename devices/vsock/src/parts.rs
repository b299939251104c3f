//! Pieces of guest memory, as the kernel takes them.

use anemone_device::{Chain, Side, walk};
use anemone_log::warn_limited;
use libc::iovec;
use vm_memory::GuestMemoryMmap;

use crate::packet::HEADER_SIZE;

/// Most pieces of a chain; the kernel takes no more in one call.
const MAX_PARTS: usize = 1024;

/// Adds the pieces of one side of a chain to `parts`; false if it cannot be used. The pointers are
/// good while `memory` is.
pub fn gather(memory: &GuestMemoryMmap, chain: Chain, side: Side, parts: &mut Vec<iovec>) -> bool {
    let walked = walk(memory, chain, MAX_PARTS, |found, part| {
        if found == side {
            parts.push(part);
        }
    });
    if let Err(unusable) = walked {
        warn_limited!("a chain of the driver is of no use: {unusable}");
    }
    walked.is_ok()
}

/// Length of pieces together.
pub fn total(parts: &[iovec]) -> usize {
    parts.iter().map(|part| part.iov_len).sum()
}

/// Splits pieces behind the header, one of them in two if need be; the index of the first behind.
/// `None` if they are shorter than that.
pub fn split_header(parts: &mut Vec<iovec>, start: usize) -> Option<usize> {
    let mut left = HEADER_SIZE;
    for index in start..parts.len() {
        let part = parts[index];
        if part.iov_len > left && left > 0 {
            parts[index].iov_len = left;
            parts.insert(index + 1, behind(part, left));
            return Some(index + 1);
        }
        left -= part.iov_len.min(left);
        if left == 0 {
            return Some(index + 1);
        }
    }
    None
}

fn behind(part: iovec, count: usize) -> iovec {
    iovec {
        // Inside the piece, or at its end.
        iov_base: part.iov_base.cast::<u8>().wrapping_add(count).cast(),
        iov_len: part.iov_len - count,
    }
}

/// Removes `count` bytes from the front.
pub fn skip(parts: &mut Vec<iovec>, mut count: usize) {
    let mut whole = 0;
    for part in parts.iter_mut() {
        if part.iov_len > count {
            *part = behind(*part, count);
            break;
        }
        count -= part.iov_len;
        whole += 1;
    }
    parts.drain(..whole);
}

/// Keeps the first `length` bytes.
pub fn truncate(parts: &mut Vec<iovec>, length: usize) {
    let mut left = length;
    for part in parts.iter_mut() {
        part.iov_len = part.iov_len.min(left);
        left -= part.iov_len;
    }
    parts.retain(|part| part.iov_len > 0);
}

/// Copies pieces to pieces, as much as both have.
///
/// # Safety
/// All must be valid. Others may change what is copied meanwhile.
pub unsafe fn copy(from: &[iovec], to: &[iovec]) {
    let (mut sources, mut targets) = (from.iter().copied(), to.iter().copied());
    let (mut source, mut target) = (sources.next(), targets.next());
    while let (Some(s), Some(t)) = (source, target) {
        let count = s.iov_len.min(t.iov_len);
        // SAFETY: both are valid for so many bytes; guest memory and this process's own do not
        // overlap.
        unsafe { std::ptr::copy_nonoverlapping(s.iov_base.cast::<u8>(), t.iov_base.cast(), count) };
        let rest = |part: iovec, parts: &mut dyn Iterator<Item = iovec>| match part.iov_len - count
        {
            0 => parts.next(),
            _ => Some(behind(part, count)),
        };
        source = rest(s, &mut sources);
        target = rest(t, &mut targets);
    }
}

/// A piece for bytes of this process.
pub fn of(bytes: &mut [u8]) -> iovec {
    iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(bytes: &mut [u8], lengths: &[usize]) -> Vec<iovec> {
        let mut at = 0;
        lengths
            .iter()
            .map(|&length| {
                at += length;
                of(&mut bytes[at - length..at])
            })
            .collect()
    }

    fn lengths(parts: &[iovec]) -> Vec<usize> {
        parts.iter().map(|part| part.iov_len).collect()
    }

    #[test]
    fn headers_are_split_off_wherever_they_end() {
        let mut bytes = [0; 100];
        for (before, after, index) in [
            (vec![44, 20], vec![44, 20], Some(1)),
            (vec![100], vec![44, 56], Some(1)),
            (vec![10, 10, 30, 5], vec![10, 10, 24, 6, 5], Some(3)),
            (vec![44], vec![44], Some(1)),
            (vec![0, 44, 0, 3], vec![0, 44, 0, 3], Some(2)),
            (vec![43], vec![43], None),
            (vec![], vec![], None),
        ] {
            let mut parts = pieces(&mut bytes, &before);
            assert_eq!(split_header(&mut parts, 0), index, "{before:?}");
            assert_eq!(lengths(&parts), after);
        }
    }

    #[test]
    fn pieces_are_cut_and_copied() {
        let mut source: Vec<u8> = (0..50).collect();
        let mut target = vec![0; 50];
        let mut from = pieces(&mut source, &[3, 0, 17, 30]);
        skip(&mut from, 5);
        assert_eq!(lengths(&from), [15, 30]);
        truncate(&mut from, 20);
        assert_eq!(lengths(&from), [15, 5]);
        let to = pieces(&mut target, &[1, 7, 0, 42]);
        // SAFETY: pieces of live vectors.
        unsafe { copy(&from, &to) };
        assert_eq!(target[..20], (5..25).collect::<Vec<u8>>());
        assert_eq!(target[20..], [0; 30]);
        skip(&mut from, 20);
        assert_eq!(total(&from), 0);
    }
}
