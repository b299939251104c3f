//! Files that were damaged at random: an error or a kernel that begins in memory, nothing else.

mod common;

use std::sync::LazyLock;

use common::*;
use proptest::prelude::*;
use proptest::sample::Index;

static ELF: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let start = (KERNEL as u32).to_le_bytes();
    elf(KERNEL, &segments(), &note(b"Xen\0", 18, &start))
});

static VMLINUX: LazyLock<Vec<u8>> = LazyLock::new(vmlinux);

static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let images = FORMATS.map(|format| bzimage(&payload(format, &VMLINUX)));
    images
        .into_iter()
        .chain([bzimage(&[b'?'; 5_000])])
        .collect()
});

/// Values that are at the edge of something more often than random ones.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        prop::sample::select(vec![
            0,
            1,
            4095,
            4096,
            KERNEL,
            RAM,
            1 << 31,
            1 << 32,
            1 << 63
        ]),
        (0..64u32).prop_map(|shift| u64::MAX >> shift),
        (0..64u32).prop_map(|shift| u64::MAX << shift),
    ]
}

/// Writes of 1, 2, 4 or 8 bytes, and perhaps a new length.
type Damage = (Vec<(Index, u64, u32)>, Option<Index>);

fn damage() -> impl Strategy<Value = Damage> {
    let write = (any::<Index>(), value(), 0..4u32);
    (
        prop::collection::vec(write, 1..6),
        prop::option::weighted(0.2, any::<Index>()),
    )
}

/// Damages `bytes`, the writes within `region` of it.
fn damaged(bytes: &[u8], region: std::ops::Range<usize>, damage: &Damage) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for (index, value, width) in &damage.0 {
        let at = region.start + index.index(region.len());
        let width = (1usize << width).min(bytes.len() - at);
        put(&mut bytes, at, &value.to_le_bytes()[..width]);
    }
    if let Some(length) = damage.1 {
        bytes.truncate(length.index(bytes.len()));
    }
    bytes
}

fn check(kernel: &[u8]) {
    let guest = Guest::new(RAM);
    let result = guest.boot(&file(kernel), Some(&file(&[1; 5_000])), "x");
    guest.assert_untouched();
    match result {
        Ok(entry) => assert!((0x2_0000..RAM).contains(&entry.regs.rip)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn elf_headers(damage in damage()) {
        check(&damaged(&ELF, 0..64 + 4 * 56, &damage));
    }

    #[test]
    fn elf_notes(damage in damage()) {
        check(&damaged(&ELF, ELF.len() - 24..ELF.len(), &damage));
    }

    #[test]
    fn setup_headers(image in any::<Index>(), damage in damage()) {
        let image = image.get(&IMAGES);
        check(&damaged(image, 0x1F0..0x270, &damage));
    }

    #[test]
    fn payloads(image in any::<Index>(), damage in damage()) {
        let image = image.get(&IMAGES);
        check(&damaged(image, 0xB00..image.len(), &damage));
    }

    #[test]
    fn payload_headers(image in any::<Index>(), damage in damage()) {
        let image = image.get(&IMAGES);
        check(&damaged(image, 0xB00..0xB40, &damage));
    }

    #[test]
    fn kernels_inside_payloads(damage in damage()) {
        let kernel = damaged(&VMLINUX, 0..64 + 4 * 56, &damage);
        // Not compressed, but in the format: a block of literals only.
        check(&bzimage(&lz4_stored(&kernel)));
    }
}

/// An LZ4 legacy frame of one block without any matches.
fn lz4_stored(bytes: &[u8]) -> Vec<u8> {
    let mut block = vec![];
    if bytes.len() < 15 {
        block.push((bytes.len() as u8) << 4);
    } else {
        block.push(0xF0);
        let mut rest = bytes.len() - 15;
        while rest >= 255 {
            block.push(255);
            rest -= 255;
        }
        block.push(rest as u8);
    }
    block.extend_from_slice(bytes);
    let mut frame = 0x184C_2102u32.to_le_bytes().to_vec();
    frame.extend_from_slice(&(block.len() as u32).to_le_bytes());
    frame.extend(block);
    frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    frame
}
