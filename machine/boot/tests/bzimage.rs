//! bzImage kernels, decompressed here or by themselves.

mod common;

use anemone_boot::{Error, RangeKind};
use common::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

fn assert_loaded(guest: &Guest) {
    for load in segments() {
        let found = guest.read(load.address, load.bytes.len());
        assert!(found == load.bytes, "segment at {:#x}", load.address);
        let rest = (load.memory_size - load.bytes.len() as u64) as usize;
        let rest = guest.read(load.address + load.bytes.len() as u64, rest);
        assert!(rest.iter().all(|byte| *byte == 0));
    }
    guest.assert_untouched();
}

#[test]
fn every_compression_gives_the_same_kernel() {
    let mut kernel = vmlinux();
    // Relocations follow the ELF file; they must not be taken for anything.
    kernel.extend(content(23, 30_000));
    for format in FORMATS {
        let image = bzimage(&payload(format, &kernel));
        let guest = Guest::new(RAM);
        let entry = guest
            .kernel(&image)
            .unwrap_or_else(|e| panic!("{format}: {e}"));
        assert_eq!(
            entry.description,
            format!("bzImage 6.1.0-test, {format} payload, 64-bit entry")
        );
        assert_eq!(entry.regs.rip, KERNEL + 0x100);
        assert_loaded(&guest);
    }
}

#[test]
fn a_large_payload_spans_blocks() {
    // More than one 8 MiB block of LZ4, and more than the buffers of the others.
    let load = Load {
        address: KERNEL,
        bytes: content(29, 3_001).repeat(3_200),
        memory_size: 10 * MIB,
    };
    let kernel = elf(KERNEL, std::slice::from_ref(&load), &[]);
    for format in FORMATS {
        let mut image = bzimage(&payload(format, &kernel));
        put(&mut image, 0x260, &(11 * MIB as u32).to_le_bytes());
        let guest = Guest::new(RAM);
        guest
            .kernel(&image)
            .unwrap_or_else(|e| panic!("{format}: {e}"));
        let found = guest.read(KERNEL, load.bytes.len());
        assert!(found == load.bytes, "{format}");
    }
}

#[test]
fn the_zero_page_carries_the_setup_header() {
    let guest = Guest::new(RAM);
    let image = bzimage(&payload("LZ4", &vmlinux()));
    let initrd = content(31, 70_000);
    let entry = guest
        .boot(&file(&image), Some(&file(&initrd)), "a b")
        .unwrap();
    let page = entry.regs.rsi;
    // What the loader fills in, and otherwise the file's own bytes up to the header's end.
    let mut expected = image[0x1F1..0x26C].to_vec();
    let address = (RAM - 70_000) as u32 / 4096 * 4096;
    let cmdline = guest.u32(page + 0x228);
    for (at, bytes) in [
        (0x210, &[0xFF][..]),
        (0x211, &[0x01]),
        (0x218, &address.to_le_bytes()),
        (0x21C, &70_000u32.to_le_bytes()),
        (0x228, &cmdline.to_le_bytes()),
    ] {
        put(&mut expected, at - 0x1F1, bytes);
    }
    assert_eq!(guest.read(page + 0x1F1, expected.len()), expected);
    assert_eq!(guest.text(cmdline.into()), "a b");
    let after = guest.read(page + 0x26C, 0x2D0 - 0x26C);
    assert!(after.iter().all(|byte| *byte == 0));
    let before = guest.read(page + 0x78, 0x1E8 - 0x78);
    assert!(
        before.iter().all(|byte| *byte == 0),
        "no extended addresses"
    );
    assert!(guest.read(address.into(), initrd.len()) == initrd);
}

#[test]
fn an_unknown_payload_is_left_to_the_kernel() {
    for payload in [&b"BZh91AY&SY and more of it"[..], b"", b"?"] {
        let image = bzimage(payload);
        let guest = Guest::new(RAM);
        let entry = guest.kernel(&image).unwrap();
        assert_eq!(
            entry.description,
            "bzImage 6.1.0-test, own decompressor, 64-bit entry"
        );
        assert_eq!(entry.regs.rip, KERNEL + 0x200);
        assert!(guest.read(KERNEL, image.len() - 2048) == image[2048..]);
        assert_eq!(
            guest.u32(entry.regs.rsi + 0x202),
            u32::from_le_bytes(*b"HdrS")
        );
        guest.assert_untouched();
    }
}

#[test]
fn what_is_wrong_with_a_setup_header_is_said() {
    let good = bzimage(&payload("LZ4", &vmlinux()));
    let cases: [(usize, &[u8], &str); 13] = [
        (0x1FE, &[0], "neither an ELF file nor a bzImage"),
        (0x202, b"h", "neither an ELF file nor a bzImage"),
        (0x206, &[0x0B, 2], "protocol 2.11, which is too old: 2.12"),
        (0x211, &[0], "it is a zImage"),
        (0x236, &[0], "32-bit kernel"),
        (
            0x1F1,
            &[255, 0, 0, 255, 255, 255, 255],
            "cut off: its protected-mode code",
        ),
        (0x1F4, &[0xFF; 4], "cut off: its protected-mode code"),
        (0x248, &[0xFF; 4], "cut off: its compressed payload"),
        (0x24C, &[0xFF; 4], "cut off: its compressed payload"),
        (0x258, &[0xFF; 8], "its address exceeds 64 bits"),
        (
            0x258,
            &(60 * MIB).to_le_bytes(),
            "the kernel needs the addresses 0x3c00000 to",
        ),
        (
            0x260,
            &[0, 0x10, 0, 0],
            "decompresses to more than the memory",
        ),
        (
            0x258,
            &[0, 0, 2],
            "lies outside the memory that the setup header asks for",
        ),
    ];
    for (at, bytes, expected) in cases {
        let mut kernel = good.clone();
        put(&mut kernel, at, bytes);
        let error = Guest::new(RAM).kernel(&kernel).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    for length in [0x210, 0x264, 0x600, 0x900, good.len() - 100] {
        let error = Guest::new(RAM).kernel(&good[..length]).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { .. }),
            "{length}: {error}"
        );
    }
    let error = Guest::new(RAM).kernel(&good[..0x200]).unwrap_err();
    assert!(matches!(error, Error::UnknownFormat), "{error}");
}

#[test]
fn a_damaged_payload_is_an_error() {
    for format in FORMATS {
        let whole = payload(format, &vmlinux());
        // The stream ends in the middle although the file does not.
        let mut cut = whole[..whole.len() / 2].to_vec();
        cut.extend_from_slice(&(vmlinux().len() as u32).to_le_bytes());
        // Not an ELF file.
        let other = payload(format, &content(37, 100_000));
        for (payload, expected) in [(cut, "payload is"), (other, "not an ELF file")] {
            let error = Guest::new(RAM).kernel(&bzimage(&payload)).unwrap_err();
            let text = error.to_string();
            assert!(text.contains(expected), "{format}: {text}");
        }
    }
}

#[test]
fn an_initramfs_lies_where_the_kernel_takes_it() {
    let image = file(&bzimage(&payload("LZ4", &vmlinux())));
    let place = |guest: &Guest, size: usize| {
        let entry = guest.boot(&image, Some(&file(&vec![7; size])), "")?;
        let address = u64::from(guest.u32(entry.regs.rsi + 0x218));
        assert!(guest.read(address, size).iter().all(|byte| *byte == 7));
        assert_eq!(address % 4096, 0);
        Ok::<u64, Error>(address)
    };
    // The largest that fits above the kernel, then below it, then not at all.
    let above = (RAM - KERNEL - KERNEL_MEMORY) as usize;
    assert_eq!(
        place(&Guest::new(RAM), above).unwrap(),
        KERNEL + KERNEL_MEMORY
    );
    let small = Guest::new(KERNEL + KERNEL_MEMORY + 4096);
    assert_eq!(place(&small, 4096).unwrap(), KERNEL + KERNEL_MEMORY);
    assert_eq!(place(&small, 4097).unwrap(), KERNEL - 8192);
    let below = (KERNEL - MIB) as usize;
    assert_eq!(place(&small, below).unwrap(), MIB);
    let error = place(&small, below + 1).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "the initramfs has {} bytes, but the largest free piece of guest memory below {:#x} \
             has {below}",
            below + 1,
            small.low_ram_end
        )
    );
    let error = Guest::new(RAM)
        .boot(&image, Some(&file(&[])), "")
        .unwrap_err();
    assert_eq!(error.to_string(), "the initramfs is empty");
}

#[test]
fn an_initramfs_stays_below_the_kernels_limit() {
    let mut image = bzimage(&payload("LZ4", &vmlinux()));
    put(&mut image, 0x22C, &(40 * MIB as u32 - 1).to_le_bytes());
    let guest = Guest::new(RAM);
    let entry = guest
        .boot(&file(&image), Some(&file(&[1; 100])), "")
        .unwrap();
    let address = guest.u32(entry.regs.rsi + 0x218);
    assert_eq!(u64::from(address), 40 * MIB - 4096);
}

#[test]
fn memory_above_4_gib_is_announced_but_not_used() {
    let mut guest = Guest::new(RAM);
    let high = 1 << 32;
    let ranges = [
        (GuestAddress(0), RAM as usize),
        (GuestAddress(high), RAM as usize),
    ];
    guest.memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    guest.map.push(range(high, high + RAM, RangeKind::Ram));
    let image = file(&bzimage(&payload("LZ4", &vmlinux())));
    let entry = guest.boot(&image, Some(&file(&[1; 100])), "").unwrap();
    let page = entry.regs.rsi;
    assert_eq!(u64::from(guest.u32(page + 0x218)), RAM - 4096);
    assert_eq!(guest.read(page + 0x1E8, 1), [6]);
    assert_eq!(guest.u64(page + 0x2D0 + 5 * 20), high);
}

#[test]
fn the_command_line_has_the_kernels_limit() {
    let mut image = bzimage(&payload("LZ4", &vmlinux()));
    put(&mut image, 0x238, &10u32.to_le_bytes());
    let image = file(&image);
    let guest = Guest::new(RAM);
    let entry = guest.boot(&image, None, "0123456789").unwrap();
    let text = guest.text(guest.u32(entry.regs.rsi + 0x228).into());
    assert_eq!(text, "0123456789");
    let error = guest.boot(&image, None, "0123456789a").unwrap_err();
    assert_eq!(
        error.to_string(),
        "the kernel command line has 11 bytes; this kernel takes at most 10"
    );
    let error = guest.boot(&image, None, "a\0b").unwrap_err();
    assert!(matches!(error, Error::CmdlineNul(1)));
    // A kernel that promises more than there is room for.
    let mut image = bzimage(&payload("LZ4", &vmlinux()));
    put(&mut image, 0x238, &u32::MAX.to_le_bytes());
    let long = "x".repeat(65_535);
    guest.boot(&file(&image), None, &long).unwrap();
    let error = guest.boot(&file(&image), None, &(long + "x")).unwrap_err();
    assert!(matches!(error, Error::CmdlineTooLong { limit: 65_535, .. }));
}

#[test]
fn a_memory_map_must_be_one() {
    let image = bzimage(&payload("LZ4", &vmlinux()));
    let ram = RangeKind::Ram;
    for (map, expected) in [
        (vec![range(0, 2 * RAM, ram)], "no memory behind it"),
        (vec![range(MIB, RAM, ram), range(0, MIB, ram)], "not after"),
        (vec![range(0, MIB, ram), range(4096, RAM, ram)], "not after"),
        (vec![range(0, 0, ram)], "it is empty"),
        (vec![range(0, 4096, ram)], "the boot data needs"),
        (vec![range(u64::MAX, u64::MAX, ram)], "it is empty"),
        (
            (0..129)
                .map(|n| range(n * 4096, (n + 1) * 4096, ram))
                .collect(),
            "128",
        ),
    ] {
        let mut guest = Guest::new(RAM);
        guest.map = map;
        let error = guest.kernel(&image).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    // Ranges that touch are one piece of memory.
    let mut guest = Guest::new(RAM);
    guest.map = vec![range(0, KERNEL + MIB, ram), range(KERNEL + MIB, RAM, ram)];
    guest.kernel(&image).unwrap();
}

#[test]
fn only_files_are_read() {
    let directory = std::fs::File::open(std::env::temp_dir()).unwrap();
    let guest = Guest::new(RAM);
    let error = guest.boot(&directory, None, "").unwrap_err();
    assert_eq!(error.to_string(), "the kernel is not a regular file");
    let error = guest.kernel(&[]).unwrap_err();
    assert_eq!(error.to_string(), "the kernel is empty");
}
