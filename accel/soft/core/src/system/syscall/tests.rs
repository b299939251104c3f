//! What the vendors' CPUs do differently, and the state after each instruction.

use anemone_soft_mmu::cr4;

use super::*;
use crate::cpu::{CodeSize, Exception};
use crate::state::tests::Guest;
use crate::system::cpuid::{Cpuid, offered};
use crate::system::interrupt::tests::protected;

const SYSCALL: &[u8] = &[0x0F, 0x05];
const SYSRET: &[u8] = &[0x0F, 0x07];
const SYSRETQ: &[u8] = &[0x48, 0x0F, 0x07];
const SYSENTER: &[u8] = &[0x0F, 0x34];
const SYSEXIT: &[u8] = &[0x0F, 0x35];
const SYSEXITQ: &[u8] = &[0x48, 0x0F, 0x35];
const SWAPGS: &[u8] = &[0x0F, 0x01, 0xF8];

const KERNEL: u64 = 0xFFFF_8000_0000_1000;
const USER: u64 = 0x7000_0000_1000;

/// Makes the CPU one of this vendor, by the first letters of its name, that never clears bases.
pub fn set_vendor(guest: &mut Guest, vendor: &[u8; 4]) {
    let mut leaves = anemone_cpu::cpuid("host", &offered(), 0, 1).unwrap();
    for leaf in &mut leaves {
        match leaf.function {
            0 => leaf.ebx = u32::from_le_bytes(*vendor),
            0x8000_0021 => leaf.eax &= !(1 << 6),
            _ => {}
        }
    }
    guest.cpu.cpuid = Cpuid::new(leaves);
}

/// 64-bit mode, level 0, with everything set up for system calls.
fn guest(vendor: &[u8; 4]) -> Guest {
    let mut guest = Guest::new();
    set_vendor(&mut guest, vendor);
    guest.cpu.efer |= efer::SCE;
    guest.cpu.msrs.star = 0x0023_0008 << 32 | 0x5000;
    guest.cpu.msrs.lstar = KERNEL;
    guest.cpu.msrs.cstar = KERNEL + 0x1000;
    guest.cpu.msrs.sfmask = rflags::IF | rflags::DF;
    guest.cpu.msrs.sysenter_cs = 0x8;
    guest.cpu.msrs.sysenter_esp = KERNEL + 0x2000;
    guest.cpu.msrs.sysenter_eip = KERNEL + 0x3000;
    guest
}

fn selectors(guest: &Guest) -> (u16, u16) {
    let s = &guest.cpu.segments;
    (s[seg::CS].selector, s[seg::SS].selector)
}

#[test]
fn a_system_call_and_back() {
    for vendor in [b"Genu", b"Auth"] {
        let mut guest = guest(vendor);
        guest.cpu.set_gpr(reg::RCX, USER);
        let flags = rflags::FIXED | rflags::IF | rflags::DF | 0x8D5;
        let more = rflags::VM | rflags::RF;
        guest.cpu.set_gpr(reg::R11, flags | more);
        guest.execute(SYSRETQ).unwrap();
        assert_eq!((guest.cpu.rip, guest.cpu.cpl), (USER, 3));
        assert_eq!(selectors(&guest), (0x33, 0x2B));
        assert_eq!(guest.cpu.rflags(), flags);
        let stack = guest.cpu.segments[seg::SS];
        assert_eq!((stack.dpl, stack.present, stack.big), (3, true, true));
        guest.execute(SYSCALL).unwrap();
        assert_eq!((guest.cpu.rip, guest.cpu.cpl), (KERNEL, 0));
        assert_eq!(selectors(&guest), (0x8, 0x10));
        assert_eq!(guest.cpu.gpr(reg::RCX), USER + 2);
        assert_eq!(guest.cpu.gpr(reg::R11), flags);
        assert_eq!(guest.cpu.rflags(), rflags::FIXED | 0x8D5);
        assert!(guest.cpu.is_64bit());
        // An address that is not canonical faults here or there.
        guest.cpu.set_gpr(reg::RCX, 1 << 47);
        let result = guest.execute(SYSRETQ);
        if vendor == b"Genu" {
            assert_eq!(result, Err(Exception::GP0));
            assert_eq!(guest.cpu.cpl, 0);
        } else {
            assert_eq!((guest.cpu.rip, guest.cpu.cpl), (1 << 47, 3));
        }
    }
}

#[test]
fn compatibility_mode_has_one_way_for_each_vendor() {
    for vendor in [b"Genu", b"Auth"] {
        let mut guest = guest(vendor);
        guest.cpu.set_gpr(reg::RCX, USER | 0x8000_0000);
        guest.cpu.set_gpr(reg::R11, rflags::IF);
        guest.execute(SYSRET).unwrap();
        assert_eq!(guest.cpu.rip, 0x8000_1000);
        assert_eq!(guest.cpu.code_size(), CodeSize::Bits32);
        assert_eq!(selectors(&guest), (0x23, 0x2B));
        let called = guest.execute(SYSCALL);
        if vendor == b"Genu" {
            assert_eq!(called, Err(Exception::UD));
            guest.execute(SYSENTER).unwrap();
            assert_eq!(guest.cpu.rip, KERNEL + 0x3000);
            assert_eq!(guest.cpu.gpr(reg::RSP), KERNEL + 0x2000);
            guest.cpu.set_gpr(reg::RCX, 0x1_1111_1111);
            guest.cpu.set_gpr(reg::RDX, 0x1_2222_2222);
            guest.execute(SYSEXIT).unwrap();
            assert_eq!(guest.cpu.gpr(reg::RSP), 0x1111_1111);
            assert_eq!(guest.cpu.rip, 0x2222_2222);
            assert_eq!(selectors(&guest), (0x1B, 0x23));
            assert_eq!(guest.cpu.code_size(), CodeSize::Bits32);
            assert_eq!(guest.execute(SYSEXIT), Err(Exception::GP0));
        } else {
            assert_eq!(guest.cpu.rip, KERNEL + 0x1000);
            assert_eq!(guest.cpu.gpr(reg::RCX), 0x8000_1002);
            assert_eq!(guest.cpu.gpr(reg::R11), rflags::IF | rflags::FIXED);
            assert_eq!(guest.execute(SYSENTER), Err(Exception::UD));
            assert_eq!(guest.execute(SYSEXITQ), Err(Exception::UD));
        }
        if guest.cpu.cpl == 0 {
            assert!(guest.cpu.is_64bit());
            assert_eq!(selectors(&guest), (0x8, 0x10));
        }
    }
}

#[test]
fn sysexit_to_64_bit_code() {
    let mut guest = guest(b"Genu");
    guest.cpu.set_gpr(reg::RCX, USER + 0x1000);
    guest.cpu.set_gpr(reg::RDX, 1 << 47);
    assert_eq!(guest.execute(SYSEXITQ), Err(Exception::GP0));
    guest.cpu.set_gpr(reg::RDX, USER);
    guest.cpu.msrs.sysenter_cs = 3;
    assert_eq!(guest.execute(SYSEXITQ), Err(Exception::GP0));
    guest.cpu.msrs.sysenter_cs = 0xB;
    guest.execute(SYSEXITQ).unwrap();
    assert_eq!((guest.cpu.rip, guest.cpu.cpl), (USER, 3));
    assert_eq!(guest.cpu.gpr(reg::RSP), USER + 0x1000);
    assert_eq!(selectors(&guest), (0x2B, 0x33));
    assert!(guest.cpu.is_64bit());
}

#[test]
fn outside_long_mode() {
    for vendor in [b"Genu", b"Auth"] {
        let mut guest = protected();
        set_vendor(&mut guest, vendor);
        assert_eq!(guest.execute(SYSCALL), Err(Exception::UD));
        guest.cpu.efer |= efer::SCE;
        guest.cpu.msrs.star = 0x0018_0008 << 32 | 0x5000;
        guest.cpu.msrs.sysenter_cs = 0x8;
        guest.cpu.msrs.sysenter_esp = KERNEL + 0x2000;
        guest.cpu.msrs.sysenter_eip = KERNEL + 0x3000;
        guest.cpu.set_rflags(rflags::FIXED | rflags::IF);
        let rip = guest.cpu.rip;
        let called = guest.execute(SYSCALL);
        if vendor == b"Genu" {
            assert_eq!(called, Err(Exception::UD));
        } else {
            assert_eq!((guest.cpu.rip, guest.cpu.rflags()), (0x5000, rflags::FIXED));
            assert_eq!(guest.cpu.gpr(reg::RCX), rip + 2);
            assert_eq!(guest.cpu.code_size(), CodeSize::Bits32);
            guest.execute(SYSRET).unwrap();
            assert_eq!((guest.cpu.rip, guest.cpu.cpl), (rip + 2, 3));
            assert_eq!(guest.cpu.rflags(), rflags::FIXED | rflags::IF);
            assert_eq!(selectors(&guest), (0x1B, 0x23));
        }
        guest.execute(SYSENTER).unwrap();
        assert_eq!((guest.cpu.rip, guest.cpu.cpl), (0x4000, 0));
        assert_eq!(guest.cpu.gpr(reg::RSP), 0x3000);
        assert_eq!(guest.cpu.rflags(), rflags::FIXED);
        guest.cpu.cr0 = 0;
        assert_eq!(guest.execute(SYSENTER), Err(Exception::GP0));
        if vendor == b"Auth" {
            assert_eq!(guest.execute(SYSRET), Err(Exception::GP0));
        }
    }
}

#[test]
fn swapgs_changes_only_the_base() {
    let mut guest = guest(b"Auth");
    guest.cpu.set_base(seg::GS, USER);
    guest.cpu.msrs.kernel_gs_base = KERNEL;
    assert_eq!(guest.execute(SWAPGS), Ok(true));
    assert_eq!(guest.cpu.bases[seg::GS], KERNEL);
    assert_eq!(guest.cpu.segments[seg::GS].base, KERNEL);
    assert_eq!(guest.cpu.msrs.kernel_gs_base, USER);
    guest.set_cpl(3);
    guest.cpu.cr4 |= cr4::FSGSBASE;
    assert_eq!(guest.execute(SWAPGS), Err(Exception::GP0));
    for code in [SYSRET, SYSRETQ] {
        assert_eq!(guest.execute(code), Err(Exception::GP0));
    }
    guest.cpu.efer &= !efer::SCE;
    for code in [SYSCALL, SYSRET, SYSRETQ] {
        assert_eq!(guest.execute(code), Err(Exception::UD));
    }
}
