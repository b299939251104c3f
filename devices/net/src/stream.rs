//! Frames in a byte stream, each after its length in 4 bytes, big-endian. QEMU's `-netdev stream`
//! and passt speak it.

use std::ops::Range;

use thiserror::Error;

use crate::net::ETHERNET_HEADER;

/// Bytes before each frame.
pub const PREFIX: usize = 4;
/// Longest frame; passt takes no longer ones.
pub const MAX_LENGTH: usize = 65535;
/// Room for several of the longest frames.
const CAPACITY: usize = 4 * (PREFIX + MAX_LENGTH);

/// The peer has sent a length that no frame has: the stream makes no sense from here on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a frame of {0} bytes, possible are {ETHERNET_HEADER} to {MAX_LENGTH}")]
pub struct BadLength(u32);

/// What has been received and not been passed on.
#[derive(Debug)]
pub struct Incoming {
    buffer: Box<[u8]>,
    filled: Range<usize>,
}

impl Incoming {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            buffer: vec![0; CAPACITY].into(),
            filled: 0..0,
        }
    }

    /// Room for bytes from the peer: at least enough for the rest of the next frame, once complete
    /// frames have been taken.
    pub fn room(&mut self) -> &mut [u8] {
        if self.filled.start == self.filled.end {
            self.filled = 0..0;
        } else if CAPACITY - self.filled.end < PREFIX + MAX_LENGTH {
            self.buffer.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        &mut self.buffer[self.filled.end..]
    }

    /// So many bytes have been put into the room.
    pub fn add(&mut self, count: usize) {
        self.filled.end = (self.filled.end + count).min(CAPACITY);
    }

    /// The next frame, if all of it is there.
    pub fn frame(&self) -> Result<Option<&[u8]>, BadLength> {
        let bytes = &self.buffer[self.filled.clone()];
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix);
        match usize::try_from(length) {
            Ok(length @ ETHERNET_HEADER..=MAX_LENGTH) => Ok(rest.get(..length)),
            _ => Err(BadLength(length)),
        }
    }

    /// Removes a frame of this length.
    pub fn remove(&mut self, length: usize) {
        self.filled.start = (self.filled.start + PREFIX + length).min(self.filled.end);
    }

    /// Forgets everything: the next byte is the first of a new stream.
    pub fn clear(&mut self) {
        self.filled = 0..0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encode(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames {
            bytes.extend((frame.len() as u32).to_be_bytes());
            bytes.extend(frame);
        }
        bytes
    }

    /// Feeds bytes in pieces of these lengths, over and over, and takes the frames out.
    fn decode(mut bytes: &[u8], pieces: &[usize]) -> Result<Vec<Vec<u8>>, BadLength> {
        let mut incoming = Incoming::new();
        let mut frames = Vec::new();
        for piece in pieces.iter().cycle() {
            let room = incoming.room();
            let count = bytes.len().min(*piece).min(room.len());
            room[..count].copy_from_slice(&bytes[..count]);
            incoming.add(count);
            bytes = &bytes[count..];
            while let Some(frame) = incoming.frame()? {
                let length = frame.len();
                frames.push(frame.to_vec());
                incoming.remove(length);
            }
            if bytes.is_empty() {
                break;
            }
        }
        Ok(frames)
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_frames(
            lengths in prop::collection::vec(prop_oneof![14usize..1600, 60_000usize..=65535], 1..12),
            pieces in prop::collection::vec(1usize..200_000, 1..6),
        ) {
            let frames: Vec<Vec<u8>> =
                lengths.iter().enumerate().map(|(i, n)| vec![i as u8; *n]).collect();
            prop_assert_eq!(decode(&encode(&frames), &pieces), Ok(frames));
        }

        #[test]
        fn no_bytes_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            pieces in prop::collection::vec(1usize..50, 1..6),
        ) {
            let _ = decode(&bytes, &pieces);
        }
    }

    #[test]
    fn impossible_lengths_end_the_stream() {
        for length in [0, 13, 65536, u32::MAX] {
            let mut bytes = encode(&[vec![1; 14]]);
            bytes.extend(length.to_be_bytes());
            assert_eq!(decode(&bytes, &[1000]), Err(BadLength(length)));
        }
    }
}
