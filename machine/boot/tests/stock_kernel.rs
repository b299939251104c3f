//! A distribution's kernel, against what another program makes of its payload:
//!
//! ```text
//! ANEMONE_KERNEL=/boot/vmlinuz cargo test --release -p anemone-boot --test stock_kernel -- --ignored --nocapture
//! ```

mod common;

use std::fs::{self, File};
use std::time::Instant;

use common::*;

/// The payload decompressed by the tool of its format, by the fields of the setup header.
fn vmlinux_of(image: &[u8]) -> Vec<u8> {
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| image[at + n])) as usize;
    let start = (usize::from(image[0x1F1]) + 1) * 512 + u32_at(0x248);
    let payload = &image[start..start + u32_at(0x24C)];
    let (tool, trailer): (&[&str], usize) = match payload[0] {
        0x1F => (&["gzip", "-dc"], 0),
        0xFD => (&["xz", "-dc"], 4),
        0x28 => (&["zstd", "-dc", "--long=31"], 4),
        0x02 => (&["lz4", "-dc"], 4),
        other => panic!("payload begins with {other:#x}"),
    };
    filter(tool, &payload[..payload.len() - trailer])
}

#[test]
#[ignore = "needs a kernel: ANEMONE_KERNEL=PATH"]
fn is_loaded_as_its_program_headers_say() {
    let path = std::env::var("ANEMONE_KERNEL").unwrap();
    let guest = Guest::new(512 * MIB);
    let start = Instant::now();
    let entry = guest.boot(&File::open(&path).unwrap(), None, "").unwrap();
    println!("{} in {:?}", entry.description, start.elapsed());

    let kernel = vmlinux_of(&fs::read(&path).unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| kernel[at + n]));
    assert_eq!(entry.regs.rip, u64_at(24));
    let mut bytes = 0;
    for header in 0..usize::from(kernel[56]) {
        let at = 64 + header * 56;
        if kernel[at..at + 4] != [1, 0, 0, 0] {
            continue;
        }
        let [offset, address, size] = [8, 24, 32].map(|field| u64_at(at + field));
        let (offset, size) = (offset as usize, size as usize);
        let found = guest.read(address, size);
        assert!(
            found == kernel[offset..offset + size],
            "segment at {address:#x}"
        );
        println!("{size:9} bytes at {address:#x}");
        bytes += size;
    }
    assert!(bytes > 1 << 20);
    guest.assert_untouched();
}
