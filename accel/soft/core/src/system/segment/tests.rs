//! Loads of segment registers and tables outside 64-bit mode, where vendors differ, and what
//! leaves no trace in a guest. The rest is tested by bare-metal guests.

use anemone_soft_mmu::cr0;

use super::*;
use crate::cpu::{reg, rflags};
use crate::state::tests::Guest;
use crate::system::interrupt::tests::{CODE, DATA, GDT, NOWHERE, STACK, USER_DATA, protected};
use crate::system::syscall::tests::set_vendor;

const AT: u64 = 0x7000;

/// An instruction with the operand \[0x7000\] in 32-bit code.
fn on_memory(opcode: &[u8], extension: u8) -> Vec<u8> {
    let mut bytes = opcode.to_vec();
    bytes.push(5 | extension << 3);
    bytes.extend((AT as u32).to_le_bytes());
    bytes
}

#[test]
fn far_pointers_load_segment_and_register() {
    let mut guest = protected();
    guest.put(AT, &[u64::from(USER_DATA) << 32 | 0xFFFF_1234]);
    guest.cpu.set_gpr(reg::RCX, u64::MAX);
    // LES ECX and, with 16 bits, LFS CX.
    guest.execute(&on_memory(&[0xC4], 1)).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RCX), 0xFFFF_1234);
    assert_eq!(guest.cpu.segments[seg::ES].selector, USER_DATA);
    guest.put(AT, &[u64::from(DATA) << 16 | 0x5678]);
    guest.execute(&on_memory(&[0x66, 0x0F, 0xB4], 1)).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RCX), 0xFFFF_5678);
    assert_eq!(guest.cpu.segments[seg::FS].selector, DATA);
    // Neither changes if the selector is refused.
    guest.put(AT, &[u64::from(NOWHERE) << 32]);
    let error = Exception::with(vector::GP, NOWHERE.into());
    assert_eq!(guest.execute(&on_memory(&[0xC4], 1)), Err(error));
    assert_eq!(guest.cpu.gpr(reg::RCX), 0xFFFF_5678);
    assert_eq!(guest.cpu.segments[seg::ES].selector, USER_DATA);
}

#[test]
fn a_load_marks_the_descriptor_in_memory() {
    let mut guest = protected();
    guest.put(GDT + u64::from(DATA), &[0x00CF_9200_0000_FFFF]);
    guest.cpu.set_gpr(reg::RAX, DATA.into());
    // MOV ES, AX.
    guest.execute(&[0x8E, 0xC0]).unwrap();
    assert_eq!(guest.get(GDT + u64::from(DATA) + 5), [0x93]);
    assert_eq!(guest.cpu.segments[seg::ES].kind, 3);
    assert!(!guest.cpu.shadow);
    // LAR marks nothing, nor does a load that is refused.
    guest.put(GDT + u64::from(CODE), &[0x00CF_9800_0000_FFFF]);
    guest.cpu.set_gpr(reg::RAX, CODE.into());
    guest.execute(&[0x0F, 0x02, 0xC8]).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RCX), 0xCF_9800);
    let error = Exception::with(vector::GP, CODE.into());
    assert_eq!(guest.execute(&[0x8E, 0xC0]), Err(error));
    assert_eq!(guest.get(GDT + u64::from(CODE) + 5), [0x98]);
}

#[test]
fn a_load_of_the_stack_segment_holds_interrupts_off() {
    let mut guest = protected();
    guest.put(STACK, &[DATA.into()]);
    // POP SS.
    guest.execute(&[0x17]).unwrap();
    assert!(guest.cpu.shadow);
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK + 4);
    // A null selector is for 64-bit mode.
    guest.put(STACK + 4, &[0]);
    assert_eq!(guest.execute(&[0x17]), Err(Exception::GP0));
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK + 4);
    // LSS holds nothing off.
    guest.cpu.shadow = false;
    guest.put(AT, &[u64::from(DATA) << 32]);
    guest.execute(&on_memory(&[0x0F, 0xB2], 4)).unwrap();
    assert!(!guest.cpu.shadow);
    assert_eq!(guest.cpu.gpr(reg::RSP), 0);
}

#[test]
fn a_pushed_selector_has_16_or_32_bits() {
    for (vendor, upper) in [(b"Genu", 0xFFFF), (b"Auth", 0)] {
        let mut guest = protected();
        set_vendor(&mut guest, vendor);
        guest.put(STACK - 8, &[u64::MAX]);
        // PUSH DS.
        guest.execute(&[0x1E]).unwrap();
        assert_eq!(guest.cpu.gpr(reg::RSP), STACK - 4);
        let pushed: [u8; 4] = guest.get(STACK - 4);
        assert_eq!(u32::from_le_bytes(pushed), upper << 16 | u32::from(DATA));
    }
}

#[test]
fn a_null_selector_clears_the_base_on_intel() {
    for (vendor, base) in [(b"Genu", 0), (b"Auth", 0x1234)] {
        let mut guest = Guest::new();
        set_vendor(&mut guest, vendor);
        guest.cpu.set_base(seg::FS, 0x1234);
        guest.cpu.set_gpr(reg::RAX, 3);
        // MOV FS, AX.
        guest.execute(&[0x8E, 0xE0]).unwrap();
        assert_eq!(guest.cpu.bases[seg::FS], base);
        assert_eq!(guest.cpu.segments[seg::FS].selector, 3);
        assert!(!guest.cpu.segments[seg::FS].present);
    }
}

#[test]
fn tables_have_a_base_of_24_32_or_64_bits() {
    let mut guest = protected();
    guest.put(AT, &[0xAABB_CCDD_1234_5678]);
    guest.execute(&on_memory(&[0x0F, 0x01], 2)).unwrap();
    assert_eq!(
        guest.cpu.gdtr.base,
        0xAABB_CCDD_1234_5678 >> 16 & 0xFFFF_FFFF
    );
    assert_eq!(guest.cpu.gdtr.limit, 0x5678);
    guest.execute(&on_memory(&[0x66, 0x0F, 0x01], 3)).unwrap();
    assert_eq!(guest.cpu.idtr.base, 0xDD_1234);
    // Stored, it is whole in any case.
    guest.execute(&on_memory(&[0x66, 0x0F, 0x01], 0)).unwrap();
    assert_eq!(guest.get(AT), 0xAABB_CCDD_1234_5678_u64.to_le_bytes());
    drop(guest);
    let mut guest = Guest::new();
    guest.put(AT, &[0x0000_8000_0000_0000 << 16, 0]);
    let load = [0x0F, 0x01, 0x14, 0x25, 0, 0x70, 0, 0];
    assert_eq!(guest.execute(&load), Err(Exception::GP0));
    guest.put(AT, &[0x7FFF_FFFF_F000 << 16 | 0xFF, 0]);
    guest.execute(&load).unwrap();
    assert_eq!(guest.cpu.gdtr.base, 0x7FFF_FFFF_F000);
}

#[test]
fn arpl_raises_the_requested_level() {
    let mut guest = protected();
    guest.cpu.set_gpr(reg::RAX, 0x7777_0011);
    guest.cpu.set_gpr(reg::RCX, 2);
    // ARPL AX, CX.
    for zf in [true, false] {
        guest.execute(&[0x63, 0xC8]).unwrap();
        assert_eq!(guest.cpu.gpr(reg::RAX), 0x7777_0012);
        assert_eq!(guest.cpu.flags().any(Flags::ZF), zf);
    }
    guest.put(AT, &[0x5550]);
    guest.execute(&on_memory(&[0x63], 1)).unwrap();
    assert_eq!(guest.get(AT), [0x52, 0x55]);
}

#[test]
fn protected_mode_instructions_are_unknown_elsewhere() {
    let mut guest = protected();
    let codes: [&[u8]; 8] = [
        &[0x63, 0xC8],
        &[0x0F, 0x02, 0xC8],
        &[0x0F, 0x03, 0xC8],
        &[0x0F, 0x00, 0xC0],
        &[0x0F, 0x00, 0xC8],
        &[0x0F, 0x00, 0xD0],
        &[0x0F, 0x00, 0xD8],
        &[0x0F, 0x00, 0xE0],
    ];
    let at_level_0 = guest.cpu.system_flags;
    for real in [true, false] {
        if real {
            guest.cpu.cr0 &= !cr0::PE;
        } else {
            guest.cpu.cr0 |= cr0::PE;
            guest.cpu.set_system_flags(at_level_0 | rflags::VM);
        }
        for code in codes {
            assert_eq!(guest.execute(code), Err(Exception::UD), "{code:02x?}");
        }
    }
}

#[test]
fn real_mode_keeps_limits() {
    let mut guest = protected();
    guest.cpu.cr0 &= !cr0::PE;
    guest.cpu.set_gpr(reg::RAX, 0x1234);
    guest.execute(&[0x8E, 0xD8]).unwrap();
    let segment = guest.cpu.segments[seg::DS];
    assert_eq!((segment.base, segment.limit), (0x1_2340, u32::MAX));
    // A segment that was null is usable again.
    guest.cpu.segments[seg::ES] = Segment::default();
    guest.execute(&[0x8E, 0xC0]).unwrap();
    assert!(guest.cpu.segments[seg::ES].present);
}

#[test]
fn bases_of_fs_and_gs_need_cr4() {
    let mut guest = Guest::new();
    guest.cpu.set_gpr(reg::RAX, 0xFFFF_8000_1234_5678);
    // WRFSBASE RAX.
    let write = [0xF3, 0x48, 0x0F, 0xAE, 0xD0];
    assert_eq!(guest.execute(&write), Err(Exception::UD));
    guest.cpu.cr4 |= cr4::FSGSBASE;
    // The block goes on.
    assert_eq!(guest.execute(&write), Ok(true));
    assert_eq!(guest.cpu.bases[seg::FS], 0xFFFF_8000_1234_5678);
    // WRGSBASE EAX, RDFSBASE ECX, RDGSBASE RCX.
    guest.execute(&[0xF3, 0x0F, 0xAE, 0xD8]).unwrap();
    guest.execute(&[0xF3, 0x0F, 0xAE, 0xC1]).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RCX), 0x1234_5678);
    guest.execute(&[0xF3, 0x48, 0x0F, 0xAE, 0xC9]).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RCX), 0x1234_5678);
    guest.cpu.set_gpr(reg::RAX, 1 << 47);
    assert_eq!(guest.execute(&write), Err(Exception::GP0));
}
