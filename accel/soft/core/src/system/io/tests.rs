//! Ports: permission, widths, strings.

use anemone_soft_mmu::{cr0, efer};

use super::*;
use crate::cpu::vector;
use crate::state::tests::{Guest, TABLES, long_mode};

fn log(guest: &Guest) -> Vec<(u16, usize, Option<u64>)> {
    std::mem::take(&mut guest.ports.0.lock().unwrap())
}

#[test]
fn every_width_and_both_ways_to_name_a_port() {
    let mut guest = Guest::new();
    let rax = 0x1122_3344_5566_7788;
    guest.cpu.set_gpr(reg::RDX, 0xFFFF_03F8);
    for (bytes, access, after) in [
        (&[0xE4, 0x60][..], (0x60, 1, None), rax & !0xFF | 1),
        (&[0x66, 0xED], (0x3F8, 2, None), rax & !0xFFFF | 1),
        (&[0xED], (0x3F8, 4, None), 1),
        (&[0xE6, 0x80], (0x80, 1, Some(0x88)), rax),
        (&[0x66, 0xE7, 0x81], (0x81, 2, Some(0x7788)), rax),
        (&[0xEF], (0x3F8, 4, Some(0x5566_7788)), rax),
    ] {
        guest.cpu.set_gpr(reg::RAX, rax);
        assert_eq!(guest.execute(bytes), Ok(true));
        assert_eq!(log(&guest), [access], "{bytes:02x?}");
        assert_eq!(guest.cpu.gpr(reg::RAX), after, "{bytes:02x?}");
    }
}

#[test]
fn the_bitmap_decides_above_iopl() {
    let mut guest = Guest::new();
    // The bitmap lies at 0x68 of the TSS and covers ports 0 to 23; the last byte is all ones.
    guest.put(0x9060, &[0x68 << 48, 0xFF_0000_1001 | 0xFF << 24]);
    guest.cpu.tr.limit = 0x6B;
    guest.set_cpl(3);
    let read = |guest: &mut Guest, port: u64, bytes: &[u8]| {
        guest.cpu.set_gpr(reg::RDX, port);
        guest.execute(bytes).is_ok()
    };
    let (byte, word, double): (&[u8], &[u8], &[u8]) = (&[0xEC], &[0x66, 0xED], &[0xED]);
    // Bits 0 and 12 are set.
    for (port, width, good) in [
        (0, byte, false),
        (1, byte, true),
        (11, byte, true),
        (11, word, false),
        (13, word, true),
        (8, double, true),
        (9, double, false),
        (20, double, true),
        (21, double, false),
        (24, byte, false),
        (0xFFFF, byte, false),
    ] {
        assert_eq!(
            read(&mut guest, port, width),
            good,
            "port {port}, {width:02x?}"
        );
    }
    log(&guest);
    // A limit that cuts the last byte off.
    guest.cpu.tr.limit = 0x6A;
    assert!(read(&mut guest, 8, byte));
    assert!(!read(&mut guest, 16, byte));
    // IOPL, or no protection, needs no bitmap; a 16-bit TSS has none.
    guest.cpu.tr.kind = 3;
    assert!(!read(&mut guest, 8, byte));
    guest.cpu.set_system_flags(rflags::FIXED | rflags::IOPL);
    assert!(read(&mut guest, 0xFFFF, byte));
    assert_eq!(log(&guest).len(), 2);
}

#[test]
fn strings_count_and_step() {
    let mut guest = Guest::new();
    guest.cpu.set_gpr(reg::RDX, 0x1F0);
    guest.cpu.set_gpr(reg::RDI, 0x20_0000);
    guest.cpu.set_gpr(reg::RCX, 3);
    // REP INSW.
    assert_eq!(guest.execute(&[0xF3, 0x66, 0x6D]), Ok(true));
    assert_eq!(log(&guest), [(0x1F0, 2, None); 3]);
    assert_eq!(guest.get::<8>(0x20_0000), [1, 0, 2, 0, 3, 0, 0, 0]);
    assert_eq!(
        (guest.cpu.gpr(reg::RDI), guest.cpu.gpr(reg::RCX)),
        (0x20_0006, 0)
    );
    // Backwards, with 32-bit addresses: OUTSD.
    guest.put(0x20_0000, &[0x2222_2222_1111_1111]);
    guest.cpu.set_system_flags(rflags::FIXED | rflags::DF);
    guest.cpu.set_gpr(reg::RSI, 0xF_0020_0004);
    guest.cpu.set_gpr(reg::RCX, 0xF_0000_0002);
    assert_eq!(guest.execute(&[0xF3, 0x67, 0x6F]), Ok(true));
    assert_eq!(
        log(&guest),
        [(0x1F0, 4, Some(0x2222_2222)), (0x1F0, 4, Some(0x1111_1111))]
    );
    assert_eq!(
        (guest.cpu.gpr(reg::RSI), guest.cpu.gpr(reg::RCX)),
        (0x1F_FFFC, 0)
    );
    // Once without a prefix, never with a count of zero.
    assert_eq!(guest.execute(&[0x6C]), Ok(true));
    assert_eq!(guest.execute(&[0xF3, 0x6C]), Ok(true));
    assert_eq!(log(&guest).len(), 1);
}

#[test]
fn a_fault_in_a_string_keeps_what_is_done() {
    let mut guest = Guest::new();
    // Nothing at 4 MiB and up.
    guest.put(TABLES + 0x2010, &[0]);
    guest.cpu.set_gpr(reg::RDX, 0x1F0);
    guest.cpu.set_gpr(reg::RDI, 0x40_0000 - 2);
    guest.cpu.set_gpr(reg::RCX, 5);
    let rip = guest.cpu.rip;
    let fault = guest.execute(&[0xF3, 0x6C]).unwrap_err();
    assert_eq!((fault.vector, fault.address), (vector::PF, 0x40_0000));
    assert_eq!(log(&guest).len(), 2, "no value of the port is lost");
    assert_eq!(
        (guest.cpu.gpr(reg::RDI), guest.cpu.gpr(reg::RCX)),
        (0x40_0000, 3)
    );
    assert_eq!(guest.cpu.rip, rip);
}

#[test]
fn a_request_ends_a_string_between_two_elements() {
    let mut guest = Guest::new();
    guest.cpu.signals.raise(crate::ATTENTION_KICK);
    guest.cpu.set_gpr(reg::RDX, 0x1F0);
    guest.cpu.set_gpr(reg::RSI, 0x20_0000);
    guest.cpu.set_gpr(reg::RCX, 5);
    let rip = guest.cpu.rip;
    assert_eq!(guest.execute(&[0xF3, 0x6E]), Ok(false));
    assert_eq!((guest.cpu.gpr(reg::RCX), guest.cpu.rip), (4, rip));
    guest.cpu.signals.take(crate::ATTENTION_KICK);
    assert_eq!(guest.execute(&[0xF3, 0x6E]), Ok(true));
    assert_eq!((guest.cpu.gpr(reg::RCX), guest.cpu.rip), (0, rip + 2));
    assert_eq!(log(&guest).len(), 5);
}

#[test]
fn sixteen_bit_addresses_wrap() {
    let mut guest = Guest::new();
    let (mut regs, mut sregs) = long_mode();
    sregs.cr0 = cr0::ET;
    sregs.efer &= !(efer::LMA | efer::LME);
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *segment = anemone_accel_api::Segment {
            base: 0x1_0000,
            limit: 0xFFFF,
            present: true,
            kind: 3,
            code_or_data: true,
            ..Default::default()
        };
    }
    regs.rdi = 0xABCD_FFFF;
    regs.rcx = 0x1_0002;
    regs.rdx = 0x60;
    guest.cpu.set_registers(&regs, &sregs).unwrap();
    assert_eq!(guest.execute(&[0xF3, 0x6C]), Ok(true));
    assert_eq!(
        (guest.cpu.gpr(reg::RDI), guest.cpu.gpr(reg::RCX)),
        (0xABCD_0001, 0x1_0000)
    );
    assert_eq!(
        (guest.get::<1>(0x1_FFFF), guest.get::<1>(0x1_0000)),
        ([1], [2])
    );
}
