//! A stream of bytes of which none can be missing, doubled or in another place unseen.

/// The stream, from some place on.
#[derive(Debug, Clone)]
pub struct Pattern(u64);

impl Pattern {
    /// The beginning of one of many streams.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u8
    }

    /// Its next bytes.
    pub fn take(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next()).collect()
    }

    /// Whether these are its next bytes.
    pub fn continues_with(&mut self, bytes: &[u8]) -> bool {
        bytes.iter().all(|byte| *byte == self.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_byte_is_seen() {
        let mut pattern = Pattern::new(3);
        let bytes = pattern.take(1000);
        let mut other = Pattern::new(3);
        assert!(other.continues_with(&bytes[..500]) && other.continues_with(&bytes[500..]));
        assert!(!Pattern::new(3).continues_with(&[&bytes[..10], &bytes[11..]].concat()));
        assert!(!Pattern::new(4).continues_with(&bytes));
    }
}
