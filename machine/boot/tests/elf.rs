//! ELF kernels: what is loaded where, what the kernel is told, in which state it begins.

mod common;

use anemone_accel_api::{Segment, Sregs};
use anemone_boot::Error;
use common::*;

fn assert_loaded(guest: &Guest) {
    for load in segments() {
        let found = guest.read(load.address, load.bytes.len());
        assert!(found == load.bytes, "segment at {:#x}", load.address);
    }
    guest.assert_untouched();
}

/// Follows the page tables from CR3 as the MMU does.
fn translate(guest: &Guest, cr3: u64, address: u64) -> u64 {
    let mut table = cr3;
    for level in (1..4).rev() {
        let index = address >> (12 + 9 * level) & 0x1FF;
        let entry = guest.u64(table + index * 8);
        assert_eq!(entry & 3, 3, "present and writable");
        if entry & 0x80 != 0 {
            let offset = (1u64 << (12 + 9 * level)) - 1;
            return (entry & 0x000F_FFFF_FFFF_F000) & !offset | address & offset;
        }
        table = entry & 0x000F_FFFF_FFFF_F000;
    }
    guest.u64(table + (address >> 12 & 0x1FF) * 8) & !0xFFF | address & 0xFFF
}

/// Loading the selectors again would give the same segments: the descriptors are in memory.
fn assert_descriptors(guest: &Guest, sregs: &Sregs) {
    for segment in [sregs.cs, sregs.ds, sregs.es, sregs.ss, sregs.tr] {
        let offset = u64::from(segment.selector & !7);
        assert!(offset + 7 <= sregs.gdt.limit.into());
        let descriptor = guest.u64(sregs.gdt.base + offset);
        assert_eq!(
            Segment::from_descriptor(segment.selector, descriptor),
            segment
        );
        assert!(segment.present);
    }
    assert_eq!((sregs.cs.kind, sregs.ds.kind, sregs.tr.kind), (11, 3, 11));
    assert_eq!(sregs.cs.limit, 0xFFFF_FFFF);
}

#[test]
fn without_a_note_it_is_entered_in_64_bit_mode() {
    let guest = Guest::new(RAM);
    let kernel = elf(KERNEL + 0x100, &segments(), &[]);
    let initrd = content(13, 12_345);
    let entry = guest
        .boot(&file(&kernel), Some(&file(&initrd)), "quiet")
        .unwrap();
    assert_loaded(&guest);
    assert_eq!(entry.description, "ELF, 64-bit entry");

    let (regs, sregs) = (entry.regs, entry.sregs);
    assert_eq!((regs.rip, regs.rflags), (KERNEL + 0x100, 2));
    assert_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001);
    assert_eq!((sregs.cr4, sregs.efer), (0x20, 0x500));
    assert!(sregs.cs.long && !sregs.cs.big);
    assert_eq!((sregs.cs.selector, sregs.ss.selector), (0x10, 0x18));
    assert_descriptors(&guest, &sregs);
    for address in [0, 0x1234, KERNEL + 5, 0xBFFF_FFFF, 0xFEE0_0030, 0xFFFF_FFFF] {
        assert_eq!(translate(&guest, sregs.cr3, address), address);
    }

    let page = regs.rsi;
    assert_eq!(guest.read(page + 0x202, 4), b"HdrS");
    assert_eq!(guest.u16(page + 0x1FE), 0xAA55);
    assert_eq!(guest.read(page + 0x210, 2), [0xFF, 1]);
    assert_eq!(guest.u64(page + 0x70), ACPI);
    assert_eq!(guest.text(guest.u32(page + 0x228).into()), "quiet");
    let address = u64::from(guest.u32(page + 0x218));
    assert_eq!(guest.u32(page + 0x21C), 12_345);
    assert_eq!(address, (RAM - 12_345) / 4096 * 4096);
    assert!(guest.read(address, initrd.len()) == initrd);

    assert_eq!(guest.read(page + 0x1E8, 1), [5]);
    for (index, range) in guest.map.iter().enumerate() {
        let at = page + 0x2D0 + index as u64 * 20;
        assert_eq!(
            (guest.u64(at), guest.u64(at + 8)),
            (range.start, range.size)
        );
    }
    let kinds = [0, 1, 2, 3, 4].map(|n| guest.u32(page + 0x2D0 + n * 20 + 16));
    assert_eq!(kinds, [1, 3, 1, 2, 1]);
}

#[test]
fn with_a_note_it_is_entered_as_pvh_asks() {
    let guest = Guest::new(RAM);
    let start = (KERNEL as u32 + 0x2_0000).to_le_bytes();
    let mut notes = note(b"GNU\0", 3, &[1; 20]);
    notes.extend(note(b"Linux\0", 0x101, &[7; 5]));
    notes.extend(note(b"Xen\0", 6, b"linux\0"));
    notes.extend(note(b"Xen\0", 18, &start));
    // Its ELF entry point is virtual, which does not matter here.
    let kernel = elf(0xFFFF_FFFF_8100_0000, &segments(), &notes);
    let initrd = content(17, 5_000);
    let entry = guest
        .boot(&file(&kernel), Some(&file(&initrd)), "root=/dev/vda")
        .unwrap();
    assert_loaded(&guest);
    assert_eq!(entry.description, "ELF, PVH entry");

    let (regs, sregs) = (entry.regs, entry.sregs);
    assert_eq!((regs.rip, regs.rflags), (KERNEL + 0x2_0000, 2));
    assert_eq!((sregs.cr0 & !0x10, sregs.cr4, sregs.efer), (1, 0, 0));
    assert!(sregs.cs.big && !sregs.cs.long);
    assert_descriptors(&guest, &sregs);

    let info = regs.rbx;
    assert_eq!(guest.u32(info), 0x336E_C578);
    assert_eq!([4, 8, 12].map(|at| guest.u32(info + at)), [1, 0, 1]);
    let modules = guest.u64(info + 16);
    let address = (RAM - 5_000) / 4096 * 4096;
    assert_eq!(
        [0, 8, 16, 24].map(|at| guest.u64(modules + at)),
        [address, 5_000, 0, 0]
    );
    assert!(guest.read(address, initrd.len()) == initrd);
    assert_eq!(guest.text(guest.u64(info + 24)), "root=/dev/vda");
    assert_eq!(guest.u64(info + 32), ACPI);
    assert_eq!(guest.u32(info + 48), 5);
    for (index, range) in guest.map.iter().enumerate() {
        let at = guest.u64(info + 40) + index as u64 * 24;
        assert_eq!(
            (guest.u64(at), guest.u64(at + 8)),
            (range.start, range.size)
        );
        assert_eq!(guest.u32(at + 16), [1, 3, 1, 2, 1][index]);
    }
}

#[test]
fn notes_may_be_wide_and_aligned_to_eight() {
    let guest = Guest::new(RAM);
    // A property note of 8-byte alignment: 12 + 4 bytes, then 5 bytes filled up to 8.
    let mut notes = Vec::new();
    for (size, kind, name, value) in [
        (5u32, 5u32, b"GNU\0", [9, 9, 9, 9, 9, 0, 0, 0]),
        (8, 18, b"Xen\0", (KERNEL + 64).to_le_bytes()),
    ] {
        notes.extend([4, size, kind].iter().flat_map(|word| word.to_le_bytes()));
        notes.extend(name);
        notes.extend(value);
    }
    let mut kernel = elf(KERNEL, &segments(), &notes);
    put(&mut kernel, 64 + 3 * 56 + 48, &8u64.to_le_bytes());
    let entry = guest.kernel(&kernel).unwrap();
    assert_eq!(entry.regs.rip, KERNEL + 64);
}

#[test]
fn what_is_wrong_with_an_elf_file_is_said() {
    let good = elf(KERNEL, &segments(), &[]);
    let program = |index: usize, field: usize| 64 + index * 56 + field;
    let beyond = u64::MAX.to_le_bytes();
    let cases: [(usize, &[u8], &str); 16] = [
        (4, &[1], "it is a 32-bit file"),
        (5, &[2], "it is big-endian"),
        (18, &[183], "for another architecture"),
        (16, &[1], "it is not executable"),
        (56, &[0, 0], "no program headers"),
        (56, &[0xFF, 0xFF], "program header table"),
        (54, &[32], "a size other than 56 bytes"),
        (32, &beyond, "beyond 64 bits"),
        (32, &0x1_0000u64.to_le_bytes(), "beyond the first 64 KiB"),
        (program(0, 8), &beyond, "file offset exceeds 64 bits"),
        (program(0, 24), &beyond, "address exceeds 64 bits"),
        (
            program(0, 40),
            &[1, 0, 0],
            "larger in the file than in memory",
        ),
        (
            program(0, 24),
            &[0, 0, 0, 9],
            "segment of the kernel needs the addresses 0x9000000 to",
        ),
        (
            program(0, 24),
            &[0, 0x10, 0, 0],
            "which the boot data occupies",
        ),
        (
            program(1, 24),
            &[0, 0, 0, 1],
            "which a segment of the kernel occupies",
        ),
        (
            24,
            &beyond,
            "entry point 0xffffffffffffffff lies in no segment",
        ),
    ];
    for (at, bytes, expected) in cases {
        let mut kernel = good.clone();
        put(&mut kernel, at, bytes);
        let error = Guest::new(RAM).kernel(&kernel).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let mut none = good.clone();
    for index in 0..3 {
        put(&mut none, program(index, 0), &[6]);
    }
    let error = Guest::new(RAM).kernel(&none).unwrap_err().to_string();
    assert!(error.contains("no segments to load"), "{error}");
    for length in [5, 63, 100, 5_000, good.len() - 1] {
        let error = Guest::new(RAM).kernel(&good[..length]).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { .. }),
            "{length}: {error}"
        );
    }
    for nothing in [&b"\x7FEL"[..], b"#!/bin/sh\n", &[0; 4096]] {
        let error = Guest::new(RAM).kernel(nothing).unwrap_err();
        assert!(matches!(error, Error::UnknownFormat), "{error}");
    }
}

#[test]
fn segments_stay_out_of_reserved_memory() {
    for address in [ACPI - 0x800, HOLE, HOLE_END - 0x800, RAM - 0x800, 0] {
        let load = Load {
            address,
            bytes: vec![1; 4096],
            memory_size: 4096,
        };
        let guest = Guest::new(RAM);
        let error = guest.kernel(&elf(address, &[load], &[])).unwrap_err();
        assert!(
            matches!(error, Error::NoMemory { .. } | Error::Overlap { .. }),
            "{error}"
        );
        guest.assert_untouched();
    }
}
