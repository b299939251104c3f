//! SHA-256 (FIPS 180-4), without special instructions and with the SHA extensions. Only whole
//! blocks: what is measured is the compression function.

use std::arch::x86_64::*;

/// Words of the hash value before the first block (FIPS 180-4, section 5.3.3).
pub const INITIAL: [u32; 8] = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
];

/// Round constants (FIPS 180-4, section 4.2.2).
const K: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
];

/// Takes a block into the hash value with ordinary instructions.
pub fn compress(state: &mut [u32; 8], block: &[u8; 64]) {
    let mut w = [0u32; 64];
    for (word, bytes) in w.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for t in 16..64 {
        let (a, b) = (w[t - 15], w[t - 2]);
        let s0 = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
        let s1 = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
        w[t] = w[t - 16]
            .wrapping_add(s0)
            .wrapping_add(w[t - 7])
            .wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (k, w) in K.iter().zip(&w) {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let t1 = h
            .wrapping_add(s1)
            .wrapping_add(choice)
            .wrapping_add(*k)
            .wrapping_add(*w);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let majority = (a & b) ^ (a & c) ^ (b & c);
        let t2 = s0.wrapping_add(majority);
        (h, g, f, e) = (g, f, e, d.wrapping_add(t1));
        (d, c, b, a) = (c, b, a, t1.wrapping_add(t2));
    }
    for (sum, part) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *sum = sum.wrapping_add(part);
    }
}

/// The same with the SHA extensions (SDM volume 2, SHA256RNDS2, SHA256MSG1, SHA256MSG2).
#[target_feature(enable = "sha,ssse3,sse4.1")]
pub fn compress_ni(state: &mut [u32; 8], block: &[u8; 64]) {
    let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
    let [a, b, c, d, e, f, g, h] = state.map(|word| word as i32);
    // The instructions want the hash value as {a, b, e, f} and {c, d, g, h}, highest word first.
    let (abef, cdgh) = (_mm_set_epi32(a, b, e, f), _mm_set_epi32(c, d, g, h));
    let (mut first, mut second) = (abef, cdgh);
    // The last sixteen words of the message schedule, four to a vector.
    let mut w = [_mm_setzero_si128(); 4];
    for t in 0..16 {
        let words = if t < 4 {
            // SAFETY: 16 bytes from `t * 16` on lie in the block, for t is below 4.
            let bytes = unsafe { _mm_loadu_si128(block.as_ptr().add(t * 16).cast()) };
            _mm_shuffle_epi8(bytes, swap)
        } else {
            let [oldest, older, newer, newest] = w;
            let partial = _mm_sha256msg1_epu32(oldest, older);
            let partial = _mm_add_epi32(partial, _mm_alignr_epi8::<4>(newest, newer));
            _mm_sha256msg2_epu32(partial, newest)
        };
        w = [w[1], w[2], w[3], words];
        // SAFETY: four words from `t * 4` on lie in K, for t is below 16.
        let k = unsafe { _mm_loadu_si128(K.as_ptr().add(t * 4).cast()) };
        let sum = _mm_add_epi32(words, k);
        second = _mm_sha256rnds2_epu32(second, first, sum);
        first = _mm_sha256rnds2_epu32(first, second, _mm_shuffle_epi32::<0x0E>(sum));
    }
    let mut low = [0u32; 4];
    let mut high = [0u32; 4];
    // SAFETY: each array has room for a vector.
    unsafe { _mm_storeu_si128(low.as_mut_ptr().cast(), _mm_add_epi32(first, abef)) };
    // SAFETY: as above.
    unsafe { _mm_storeu_si128(high.as_mut_ptr().cast(), _mm_add_epi32(second, cdgh)) };
    *state = [
        low[3], low[2], high[3], high[2], low[1], low[0], high[1], high[0],
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "abc" with its padding, and the digest that FIPS 180-4's example file gives for it.
    fn example() -> ([u8; 64], [u32; 8]) {
        let mut block = [0; 64];
        block[..4].copy_from_slice(b"abc\x80");
        block[63] = 24;
        let digest = [
            0xba7816bf, 0x8f01cfea, 0x414140de, 0x5dae2223, 0xb00361a3, 0x96177a9c, 0xb410ff61,
            0xf20015ad,
        ];
        (block, digest)
    }

    #[test]
    fn both_give_the_standards_digest() {
        let (block, digest) = example();
        let mut state = INITIAL;
        compress(&mut state, &block);
        assert_eq!(state, digest);
        if std::arch::is_x86_feature_detected!("sha") {
            let mut state = INITIAL;
            // SAFETY: the CPU has the extensions.
            unsafe { compress_ni(&mut state, &block) };
            assert_eq!(state, digest);
        }
    }

    #[test]
    fn both_agree_on_several_blocks() {
        if !std::arch::is_x86_feature_detected!("sha") {
            return;
        }
        let (mut plain, mut special) = (INITIAL, INITIAL);
        for i in 0..200u8 {
            let block = std::array::from_fn(|j| i.wrapping_mul(31) ^ j as u8);
            compress(&mut plain, &block);
            // SAFETY: the CPU has the extensions.
            unsafe { compress_ni(&mut special, &block) };
        }
        assert_eq!(plain, special);
    }
}
