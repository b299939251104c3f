//! A set of interrupt vectors.

/// 256 bits, one per vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Vectors(pub(crate) [u64; 4]);

impl Vectors {
    pub(crate) fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    pub(crate) fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    pub(crate) fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }

    /// The highest vector of the set.
    pub(crate) fn highest(&self) -> Option<u8> {
        (0..4u8).rev().find_map(|i| {
            let word = self.0[usize::from(i)];
            (word != 0).then(|| i << 6 | (63 - word.leading_zeros()) as u8)
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// The 32 vectors from `32 * index` on, as the register file shows them (SDM figure 11-20).
    pub(crate) fn word(&self, index: u32) -> u32 {
        (self.0[index as usize / 2] >> (32 * (index & 1))) as u32
    }

    /// Sets what [`word`](Self::word) shows.
    pub(crate) fn set_word(&mut self, index: u32, value: u32) {
        let shift = 32 * (index & 1);
        let word = &mut self.0[index as usize / 2];
        *word = *word & !(0xFFFF_FFFF << shift) | u64::from(value) << shift;
    }
}
