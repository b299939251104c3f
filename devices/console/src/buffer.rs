//! A bounded queue of bytes.

use std::collections::VecDeque;

/// Bytes on their way, never more than [`Buffer::CAPACITY`].
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: VecDeque<u8>,
}

impl Buffer {
    /// Most bytes it holds.
    pub const CAPACITY: usize = 4096;

    /// How many more it takes.
    pub fn room(&self) -> usize {
        Self::CAPACITY.saturating_sub(self.bytes.len())
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Adds bytes at the end; those it has no room for are lost.
    pub fn push(&mut self, bytes: &[u8]) {
        let length = bytes.len().min(self.room());
        self.bytes.extend(&bytes[..length]);
    }

    /// The first bytes, as many as lie in one piece; empty only if there are none.
    pub fn front(&self) -> &[u8] {
        self.bytes.as_slices().0
    }

    /// Removes bytes from the start.
    pub fn consume(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_the_bound_holds() {
        let mut buffer = Buffer::default();
        let (mut next_in, mut next_out) = (0u32, 0u32);
        for step in 1..2000usize {
            let bytes: Vec<u8> = (0..step % 97).map(|i| (next_in + i as u32) as u8).collect();
            next_in += bytes.len().min(buffer.room()) as u32;
            buffer.push(&bytes);
            let taken = buffer.front().len().min(step % 89);
            for (i, byte) in buffer.front()[..taken].iter().enumerate() {
                assert_eq!(*byte, (next_out + i as u32) as u8);
            }
            buffer.consume(taken);
            next_out += taken as u32;
            assert!(buffer.room() <= Buffer::CAPACITY);
        }
        buffer.push(&[0; 2 * Buffer::CAPACITY]);
        assert_eq!(buffer.room(), 0);
        buffer.consume(usize::MAX);
        assert!(buffer.is_empty() && buffer.front().is_empty());
    }
}
