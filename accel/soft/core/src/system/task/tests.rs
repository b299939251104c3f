//! Switches by every way there is, and what may be wrong with the new task.

use anemone_soft_mmu::cr4;

use super::*;
use crate::cpu::reg;
use crate::cpu::vector::{DF, GP, NP, SS, TS, UD};
use crate::state::tests::Guest;
use crate::system::Event;
use crate::system::interrupt::tests::{
    ABSENT, CODE, CODE_16, DATA, GDT, HANDLER, NOWHERE, STACK, TSS, USER_CODE, USER_DATA, gate,
    protected,
};

/// Added to the GDT.
const OLD_TSS: u16 = 0x50;
const NEW_TSS: u16 = 0x58;
const TASK_GATE: u16 = 0x60;
const LDT: u16 = 0x68;
const END: u16 = 0x70;

const NEW: u64 = 0xA000;
const NEW_STACK: u64 = 0x5_0000;

fn tss_descriptor(base: u64, limit: u64, access: u64) -> u64 {
    limit | base << 16 | access << 40
}

/// A guest in the task `OLD_TSS`, with a new task at privilege level 0.
fn guest() -> Guest {
    let mut guest = protected();
    guest.put(
        GDT + u64::from(OLD_TSS),
        &[
            tss_descriptor(TSS, 0x67, 0x8B),
            tss_descriptor(NEW, 0x67, 0x89),
            gate(NEW_TSS, 0, 0x85),
            tss_descriptor(0xB000, 7, 0x82),
        ],
    );
    guest.cpu.gdtr.limit = END - 1;
    guest.cpu.tr = Segment::from_descriptor(OLD_TSS, tss_descriptor(TSS, 0x67, 0x8B));
    guest.set(0x20, &[HANDLER as u32, 0x6]);
    guest.set(
        0x28,
        &[0x10, 0x11, 0x12, 0x13, NEW_STACK as u32, 0x15, 0x16, 0x17],
    );
    let [code, data] = [CODE, DATA].map(u32::from);
    guest.set(0x48, &[data, code, data, data, 0, data, 0]);
    guest
}

impl Guest {
    /// Writes doublewords into the new TSS.
    fn set(&self, at: u64, words: &[u32]) {
        for (word, at) in words.iter().zip((NEW + at..).step_by(4)) {
            assert!(self.memory.write(at, &word.to_le_bytes()));
        }
    }

    /// The access byte of a descriptor.
    fn access(&self, selector: u16) -> u8 {
        u8::from_le_bytes(self.get(GDT + u64::from(selector) + 5))
    }

    fn word(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at))
    }
}

fn jump(selector: u16) -> [u8; 7] {
    [0xEA, 0, 0, 0, 0, selector as u8, 0]
}

fn call(selector: u16) -> [u8; 7] {
    [0x9A, 0, 0, 0, 0, selector as u8, 0]
}

#[test]
fn a_jump_leaves_the_old_task() {
    for target in [NEW_TSS, TASK_GATE] {
        let mut guest = guest();
        for number in 0..8 {
            guest.cpu.set_gpr(number, 0x20 + number as u64);
        }
        guest.cpu.set_dr7(0x3);
        guest.execute(&jump(target)).unwrap();
        assert_eq!(guest.cpu.stopped, None);
        assert_eq!(guest.cpu.rip, HANDLER);
        assert_eq!(guest.cpu.rflags(), 6);
        let registers: [u64; 8] = std::array::from_fn(|n| guest.cpu.gpr(n));
        assert_eq!(
            registers,
            [0x10, 0x11, 0x12, 0x13, NEW_STACK, 0x15, 0x16, 0x17]
        );
        let selectors = guest.cpu.segments.map(|segment| segment.selector);
        assert_eq!(selectors, [DATA, CODE, DATA, DATA, 0, DATA]);
        assert_eq!(guest.cpu.tr.selector, NEW_TSS);
        assert!(guest.cpu.cr0 & cr0::TS != 0);
        assert_eq!(guest.cpu.dr[7], 0x402);
        assert_eq!(
            [OLD_TSS, NEW_TSS].map(|tss| guest.access(tss)),
            [0x89, 0x8B]
        );
        let saved: [u32; 16] = std::array::from_fn(|n| guest.word(TSS + 0x20 + 4 * n as u64));
        let [d, c] = [DATA, CODE].map(u32::from);
        let expected = [
            0x2_0007, 2, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, d, c, d, d, d, d,
        ];
        assert_eq!(saved, expected);
        // The new one is busy now.
        let busy = Exception::with(GP, NEW_TSS.into());
        assert_eq!(guest.execute(&jump(target)), Err(busy));
    }
}

#[test]
fn a_nested_task_returns() {
    let mut guest = guest();
    guest.put(
        crate::system::interrupt::tests::IDT + 8 * 8,
        &[gate(NEW_TSS, 0, 0x85)],
    );
    let double = Exception::with(DF, 0);
    guest.cpu.deliver(Event::Exception(double)).unwrap();
    assert_eq!(
        (guest.cpu.rip, guest.cpu.rflags()),
        (HANDLER, 6 | rflags::NT)
    );
    assert_eq!(guest.word(NEW), OLD_TSS.into());
    assert_eq!(
        [OLD_TSS, NEW_TSS].map(|tss| guest.access(tss)),
        [0x8B, 0x8B]
    );
    // The error code lies on the new stack.
    assert_eq!(guest.cpu.gpr(reg::RSP), NEW_STACK - 4);
    assert_eq!(guest.word(NEW_STACK - 4), 0);
    guest.execute(&[0xCF]).unwrap();
    assert_eq!(
        (guest.cpu.rip, guest.cpu.rflags()),
        (0x2_0000, rflags::FIXED)
    );
    assert_eq!(guest.cpu.tr.selector, OLD_TSS);
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK);
    assert_eq!(
        [OLD_TSS, NEW_TSS].map(|tss| guest.access(tss)),
        [0x8B, 0x89]
    );
    // It goes on behind its IRET, without NT.
    assert_eq!(
        [0x20, 0x24].map(|at| guest.word(NEW + at)),
        [HANDLER as u32 + 1, 6]
    );
    guest.execute(&call(TASK_GATE)).unwrap();
    assert_eq!(guest.cpu.rip, HANDLER + 1);
    // A link to what is no busy task.
    guest.set(0, &[NEW_TSS.into()]);
    guest.put(GDT + u64::from(OLD_TSS), &[tss_descriptor(TSS, 0x67, 0x89)]);
    guest.set(0, &[OLD_TSS.into()]);
    let error = Exception::with(TS, OLD_TSS.into());
    assert_eq!(guest.execute(&[0xCF]), Err(error));
}

#[test]
fn a_new_task_has_its_own_space_level_and_ldt() {
    let mut guest = guest();
    // One 4 MiB page in each of two spaces.
    guest.put(0xC000, &[0x83]);
    guest.put(0xD000, &[0x83]);
    guest.cpu.write_cr4(cr4::PSE).ok().unwrap();
    guest.cpu.write_cr3(0xC000).ok().unwrap();
    guest.cpu.write_cr0(cr0::PE | cr0::PG).ok().unwrap();
    guest.put(0xD000, &[0x87]);
    guest.put(0xB000, &[0x00CF_F300_0000_FFFF]);
    guest.set(0x1C, &[0xD000]);
    let data = u32::from(USER_DATA);
    guest.set(0x48, &[data, USER_CODE.into(), data, 7, 0, 0, LDT.into()]);
    guest.execute(&jump(NEW_TSS)).unwrap();
    assert_eq!(guest.cpu.stopped, None);
    assert_eq!((guest.cpu.cpl, guest.cpu.cr3()), (3, 0xD000));
    assert_eq!(guest.cpu.ldtr.base, 0xB000);
    let data = guest.cpu.segments[seg::DS];
    assert_eq!((data.selector, data.dpl, data.present), (7, 3, true));
    // A virtual-8086 task.
    drop(guest);
    let mut guest = self::guest();
    guest.set(0x20, &[0x100, 0x2_0002]);
    guest.set(0x48, &[1, 0x1000, 3, 4, 5, 6, 0]);
    guest.execute(&jump(NEW_TSS)).unwrap();
    assert_eq!((guest.cpu.cpl, guest.cpu.rip), (3, 0x100));
    assert!(guest.cpu.virtual_8086());
    assert_eq!(
        guest.cpu.bases[..6],
        [0x10, 0x1_0000, 0x30, 0x40, 0x50, 0x60]
    );
}

#[test]
fn a_16_bit_task_keeps_upper_halves() {
    let mut guest = guest();
    guest.put(GDT + u64::from(NEW_TSS), &[tss_descriptor(NEW, 0x2B, 0x81)]);
    let words = [
        0x1234, 6, 0x10, 0x11, 0x12, 0x13, 0x8000, 0x15, 0x16, 0x17, DATA, CODE_16, DATA, DATA, 0,
    ];
    for (n, word) in words.into_iter().enumerate() {
        let at = NEW + 0x0E + 2 * n as u64;
        assert!(guest.memory.write(at, &word.to_le_bytes()));
    }
    guest.cpu.set_gpr(reg::RAX, 0x7777_0000);
    guest.execute(&jump(NEW_TSS)).unwrap();
    assert_eq!(guest.cpu.stopped, None);
    assert_eq!(
        (guest.cpu.rip, guest.cpu.gpr(reg::RAX)),
        (0x1234, 0x7777_0010)
    );
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits16);
    assert!(!guest.cpu.segments[seg::FS].present);
    // And back, into a task of 32 bits.
    guest.cpu.set_rflags(6);
    guest.execute(&[0xEA, 0, 0, OLD_TSS as u8, 0]).unwrap();
    assert_eq!(guest.cpu.rip, 0x2_0007);
    let saved: [u8; 4] = guest.get(NEW + 0x0E);
    assert_eq!(saved, [0x39, 0x12, 6, 0]);
}

#[test]
fn what_is_wrong_with_a_new_task() {
    // In the old task.
    for (descriptor, vector) in [
        (tss_descriptor(NEW, 0x67, 0x09), NP),
        (tss_descriptor(NEW, 0x66, 0x89), TS),
        (tss_descriptor(NEW, 0x67, 0x8B), GP),
        (tss_descriptor(NEW, 0x67, 0x92), GP),
    ] {
        let mut guest = guest();
        guest.put(GDT + u64::from(NEW_TSS), &[descriptor]);
        let error = Exception::with(vector, NEW_TSS.into());
        assert_eq!(
            guest.execute(&jump(TASK_GATE)),
            Err(error),
            "{descriptor:#x}"
        );
        assert_eq!(guest.cpu.tr.selector, OLD_TSS);
        let far = guest.execute(&jump(END));
        assert_eq!(far, Err(Exception::with(GP, END.into())));
    }
    // In the new one.
    for (at, selector, vector, error) in [
        (0x60, DATA, TS, DATA),
        (0x60, LDT | 4, TS, LDT | 4),
        (0x4C, 0, TS, 0),
        (0x4C, DATA, TS, DATA),
        (0x4C, NOWHERE | 0x80, TS, NOWHERE | 0x80),
        (0x50, 0, TS, 0),
        (0x50, CODE, TS, CODE),
        (0x50, USER_DATA, TS, USER_DATA & !3),
        (0x50, ABSENT, SS, ABSENT),
        (0x54, ABSENT, NP, ABSENT),
        (0x54, DATA | 3, TS, DATA),
        (0x5C, OLD_TSS, TS, OLD_TSS),
    ] {
        let mut guest = guest();
        guest.set(at, &[selector.into()]);
        guest.execute(&jump(NEW_TSS)).unwrap();
        let stopped = guest.cpu.stopped.take();
        let expected = Exception::with(vector, error.into());
        assert_eq!(
            stopped,
            Some(crate::cpu::Stopped::Exception(expected)),
            "{at:#x}"
        );
        assert_eq!((guest.cpu.rip, guest.cpu.tr.selector), (HANDLER, NEW_TSS));
    }
    // An address beyond the code segment, and the trap that a task asks for.
    let mut guest = guest();
    guest.set(0x4C, &[CODE_16.into()]);
    guest.execute(&jump(NEW_TSS)).unwrap();
    let expected = crate::cpu::Stopped::Exception(Exception::GP0);
    assert_eq!(guest.cpu.stopped.take(), Some(expected));
    drop(guest);
    let mut guest = self::guest();
    guest.set(0x64, &[1]);
    guest.execute(&jump(NEW_TSS)).unwrap();
    let expected = crate::cpu::Stopped::Exception(Exception::plain(vector::DB));
    assert_eq!(guest.cpu.stopped.take(), Some(expected));
    assert_eq!(guest.cpu.dr[6] & DR6_BT, DR6_BT);
}

/// An exception in a task that another exception led to.
#[test]
fn a_broken_handler_task_raises_its_own_exception() {
    let mut guest = guest();
    let idt = crate::system::interrupt::tests::IDT;
    guest.put(idt + 8 * u64::from(UD), &[gate(NEW_TSS, 0, 0x85)]);
    guest.put(idt + 8 * u64::from(NP), &[gate(CODE, 0x7000, 0x8E)]);
    guest.set(0x54, &[ABSENT.into()]);
    guest.cpu.deliver(Event::Exception(Exception::UD)).unwrap();
    assert_eq!(guest.cpu.stopped, None);
    assert_eq!((guest.cpu.rip, guest.cpu.tr.selector), (0x7000, NEW_TSS));
    assert_eq!(guest.word(guest.cpu.gpr(reg::RSP)), u32::from(ABSENT) | 1);
    assert_eq!(guest.word(guest.cpu.gpr(reg::RSP) + 4), HANDLER as u32);
}
