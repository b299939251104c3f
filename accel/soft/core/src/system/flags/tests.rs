//! Who may change which flag.

use anemone_soft_mmu::cr4;

use super::*;
use crate::cpu::{Exception, reg};
use crate::state::tests::{Guest, interrupt_message};

const GP: Exception = Exception::GP0;
const CLI: &[u8] = &[0xFA];
const STI: &[u8] = &[0xFB];
const POPFQ: &[u8] = &[0x9D];
const POPFW: &[u8] = &[0x66, 0x9D];
const PUSHFQ: &[u8] = &[0x9C];
const STACK: u64 = 0x30_0000;

/// What POPF makes of `value` with the flags `before`, at a privilege level.
fn popped(guest: &mut Guest, cpl: u8, before: u64, value: u64, pop: &[u8]) -> (u64, bool) {
    guest.set_cpl(cpl);
    guest.cpu.set_rflags(before);
    guest.put(STACK, &[value]);
    guest.cpu.set_gpr(reg::RSP, STACK);
    let goes_on = guest.execute(pop).unwrap();
    (guest.cpu.rflags(), goes_on)
}

#[test]
fn popf_changes_what_the_privilege_level_allows() {
    use rflags::{AC, DF, FIXED, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM};
    let mut guest = Guest::new();
    let all = u64::MAX;
    let user = 0x8D5 | AC | DF | FIXED | ID | NT | TF;
    for (cpl, before, value, pop, after) in [
        (0, FIXED, all, POPFQ, user | IF | IOPL),
        (0, all & rflags::DEFINED & !VM, 0, POPFQ, FIXED | VIF | VIP),
        (0, FIXED | AC | RF, all, POPFW, user | IF | IOPL | RF),
        (3, FIXED, all, POPFQ, user),
        (3, FIXED | IF, 0, POPFQ, FIXED | IF),
        (3, FIXED | IOPL | IF, 0, POPFQ, FIXED | IOPL),
        (3, FIXED | 1 << 12 | IF, 0, POPFQ, FIXED | 1 << 12 | IF),
        (1, FIXED | 1 << 12, all, POPFQ, user | 1 << 12 | IF),
    ] {
        // ID and AC are beyond 16 bits.
        let after = if pop == POPFW { after & !ID } else { after };
        let (flags, _) = popped(&mut guest, cpl, before, value, pop);
        assert_eq!(
            flags, after,
            "CPL {cpl}, {before:#x}, {value:#x}: {flags:#x}, {after:#x}"
        );
    }
}

#[test]
fn popf_leaves_the_block_only_for_a_reason() {
    use rflags::{AC, FIXED, IF, TF};
    let mut guest = Guest::new();
    assert!(popped(&mut guest, 0, FIXED, FIXED | IF | 0x8D5, POPFQ).1);
    assert!(popped(&mut guest, 0, FIXED | IF, FIXED, POPFQ).1);
    assert!(!popped(&mut guest, 0, FIXED, FIXED | TF, POPFQ).1);
    // The mode of a block has alignment checks.
    assert!(!popped(&mut guest, 3, FIXED, FIXED | AC, POPFQ).1);
    let now = guest.cpu.shared.clock.now_with(0);
    guest
        .cpu
        .apic
        .mmio_write(0xF0, &0x1FF_u32.to_le_bytes(), now);
    let sent = guest.cpu.shared.apics.signal_msi(interrupt_message(0x41));
    assert_eq!(sent, 1);
    guest.cpu.poll_apic(now);
    assert!(
        !popped(&mut guest, 0, FIXED, FIXED | IF, POPFQ).1,
        "an interrupt waits"
    );
    guest.cpu.set_rflags(FIXED);
    assert_eq!(guest.execute(STI), Ok(false));
}

#[test]
fn pushf_hides_rf() {
    let mut guest = Guest::new();
    guest.cpu.set_gpr(reg::RSP, STACK);
    guest
        .cpu
        .set_rflags(rflags::FIXED | rflags::RF | rflags::ID | rflags::IF | 1);
    guest.execute(PUSHFQ).unwrap();
    let image = u64::from_le_bytes(guest.get(STACK - 8));
    assert_eq!(image, rflags::FIXED | rflags::ID | rflags::IF | 1);
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK - 8);
}

#[test]
fn a_fault_of_popf_changes_nothing() {
    let mut guest = Guest::new();
    let before = guest.cpu.rflags();
    guest.cpu.set_gpr(reg::RSP, 1 << 40);
    assert_eq!(
        guest.execute(POPFQ).unwrap_err().vector,
        crate::cpu::vector::PF
    );
    assert_eq!(
        (guest.cpu.rflags(), guest.cpu.gpr(reg::RSP)),
        (before, 1 << 40)
    );
}

#[test]
fn interrupts_are_switched_by_those_who_may() {
    let mut guest = Guest::new();
    let is_on = |guest: &Guest| guest.cpu.system_flags & rflags::IF != 0;
    assert_eq!(guest.execute(STI), Ok(true));
    assert!(is_on(&guest));
    assert_eq!(guest.cpu.shadow_at, Some(guest.cpu.rip));
    guest.cpu.shadow_at = None;
    assert_eq!(guest.execute(STI), Ok(true));
    assert_eq!(guest.cpu.shadow_at, None, "they were on already");
    guest.set_cpl(3);
    assert_eq!(guest.execute(CLI), Err(GP));
    assert!(is_on(&guest));
    guest
        .cpu
        .set_system_flags(rflags::FIXED | rflags::IF | rflags::IOPL);
    assert_eq!(guest.execute(CLI), Ok(true));
    assert!(!is_on(&guest));
}

#[test]
fn smap_is_lifted_and_put_back() {
    use anemone_soft_mmu::Context;
    let mut guest = Guest::new();
    guest.cpu.set_gpr(reg::RAX, cr4::PAE | cr4::SMAP);
    guest.execute(&[0x0F, 0x22, 0xE0]).unwrap();
    assert_eq!(guest.execute(&[0x0F, 0x01, 0xCB]), Ok(true), "STAC");
    assert_eq!(guest.cpu.context, Context::SupervisorAc);
    assert_eq!(guest.execute(&[0x0F, 0x01, 0xCA]), Ok(true), "CLAC");
    assert_eq!(guest.cpu.context, Context::Supervisor);
    guest.set_cpl(3);
    assert_eq!(guest.execute(&[0x0F, 0x01, 0xCB]), Err(Exception::UD));
}

/// Virtual-8086 code needs IOPL 3 even to see the flags.
#[test]
fn virtual_8086_code_needs_iopl_3() {
    let mut guest = Guest::new();
    let (mut regs, mut sregs) = crate::state::tests::long_mode();
    sregs.cr0 = anemone_soft_mmu::cr0::PE;
    sregs.efer = 0;
    sregs.cs.long = false;
    regs.rsp = 0x8000;
    regs.rip = 0;
    for segment in [&mut sregs.cs, &mut sregs.ss] {
        segment.big = false;
        segment.dpl = 3;
    }
    regs.rflags = rflags::FIXED | rflags::VM;
    guest.cpu.set_registers(&regs, &sregs).unwrap();
    assert_eq!(guest.cpu.cpl, 3);
    for instruction in [CLI, STI, &[0x9C], &[0x9D]] {
        assert_eq!(guest.execute(instruction), Err(GP));
    }
    regs.rflags |= rflags::IOPL;
    guest.cpu.set_registers(&regs, &sregs).unwrap();
    for instruction in [STI, &[0x9C], CLI, &[0x9D]] {
        assert!(guest.execute(instruction).is_ok());
    }
    assert_eq!(guest.cpu.rflags(), regs.rflags | rflags::IF);
}
