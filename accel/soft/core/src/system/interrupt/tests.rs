//! Delivery and return outside long mode, exceptions during delivery, call gates, and the way from
//! the start-up message to 64-bit mode. What 64-bit code sees is tested by bare-metal guests.

use anemone_accel_api::{DescriptorTable, Regs, Sregs};
use anemone_soft_mmu::{cr0, efer};

use super::*;
use crate::cpu::vector::{BP, DF, GP, NP, PF, SS, TS, UD};
use crate::state::tests::{Guest, TABLES, long_mode};

pub const GDT: u64 = 0x5000;
pub const IDT: u64 = 0x6000;
pub const TSS: u64 = 0x9000;
pub const HANDLER: u64 = 0x1_2340;
/// Stack of privilege level 0, and of the others.
pub const STACK: u64 = 0x3_0000;
const OUTER_STACK: u64 = 0x4_0000;

pub const CODE: u16 = 0x8;
pub const DATA: u16 = 0x10;
pub const USER_CODE: u16 = 0x1B;
pub const USER_DATA: u16 = 0x23;
pub const CODE_16: u16 = 0x28;
const DATA_16: u16 = 0x30;
const CALL_GATE: u16 = 0x3B;
const CODE_64: u16 = 0x40;
pub const ABSENT: u16 = 0x48;
/// Beyond the table.
pub const NOWHERE: u16 = 0x50;

const EXTERNAL: u32 = 1;

pub fn gate(selector: u16, offset: u64, access: u64) -> u64 {
    offset & 0xFFFF | u64::from(selector) << 16 | access << 40 | offset >> 16 << 48
}

const INTERRUPT_GATE: u64 = 0x8E;
const TRAP_GATE: u64 = 0x8F;

/// A guest in 32-bit protected mode, without paging, at privilege level 0.
pub fn protected() -> Guest {
    let mut guest = Guest::new();
    guest.put(
        GDT,
        &[
            0,
            0x00CF_9B00_0000_FFFF,
            0x00CF_9300_0000_FFFF,
            0x00CF_FB00_0000_FFFF,
            0x00CF_F300_0000_FFFF,
            0x0000_9B00_0000_FFFF,
            0x0000_9300_0000_FFFF,
            // Two parameters.
            gate(CODE, HANDLER, 0xEC) | 2 << 32,
            0x00AF_9B00_0000_FFFF,
            0x00CF_1300_0000_FFFF,
        ],
    );
    // ESP0 and SS0.
    guest.put(TSS, &[STACK << 32, DATA.into()]);
    let (_, long) = long_mode();
    let flat = |selector: u16, raw: u64| Segment::from_descriptor(selector, raw);
    let data = flat(DATA, 0x00CF_9300_0000_FFFF);
    let sregs = Sregs {
        cs: flat(CODE, 0x00CF_9B00_0000_FFFF),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        gdt: DescriptorTable {
            base: GDT,
            limit: NOWHERE - 1,
        },
        idt: DescriptorTable {
            base: IDT,
            limit: 0x7FF,
        },
        cr0: cr0::PE | cr0::ET | cr0::NE,
        cr3: 0,
        cr4: 0,
        efer: 0,
        ..long
    };
    let regs = Regs {
        rip: 0x2_0000,
        rsp: STACK,
        rflags: rflags::FIXED,
        ..Regs::default()
    };
    guest.cpu.set_registers(&regs, &sregs).unwrap();
    guest
}

/// The same at privilege level 3.
fn user() -> Guest {
    let mut guest = protected();
    let code = Segment::from_descriptor(USER_CODE, 0x00CF_FB00_0000_FFFF);
    let data = Segment::from_descriptor(USER_DATA, 0x00CF_F300_0000_FFFF);
    guest.cpu.set_segment(seg::CS, code);
    for number in [seg::SS, seg::DS] {
        guest.cpu.set_segment(number, data);
    }
    guest.cpu.set_cpl(3);
    guest.cpu.set_gpr(reg::RSP, OUTER_STACK);
    guest
}

/// In virtual-8086 mode at 1000H:0100H.
fn virtual_8086() -> Guest {
    let mut guest = user();
    guest
        .cpu
        .set_rflags(rflags::FIXED | rflags::VM | rflags::IF);
    for (number, selector) in [
        (seg::CS, 0x1000),
        (seg::SS, 0x2000),
        (seg::DS, 0x2100),
        (seg::ES, 0x2200),
        (seg::FS, 0x2300),
        (seg::GS, 0x2400),
    ] {
        guest
            .cpu
            .set_segment(number, virtual_8086_segment(selector));
    }
    guest.cpu.rip = 0x100;
    guest.cpu.set_gpr(reg::RSP, 0x800);
    guest
}

impl Guest {
    fn set_gate(&self, vector: u8, gate: u64) {
        self.put(IDT + 8 * u64::from(vector), &[gate]);
    }

    /// The doublewords at the top of the stack.
    fn stack<const N: usize>(&self) -> [u32; N] {
        let top = self.cpu.gpr(reg::RSP);
        std::array::from_fn(|n| u32::from_le_bytes(self.get(top + 4 * n as u64)))
    }

    fn selectors(&self) -> [u16; 6] {
        self.cpu.segments.map(|segment| segment.selector)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        assert!(self.memory.write(at, bytes));
    }
}

fn raise(guest: &mut Guest, exception: Exception) -> Result<(), Shutdown> {
    guest.cpu.deliver(Event::Exception(exception))
}

#[test]
fn an_exception_from_user_code_switches_the_stack() {
    let mut guest = user();
    guest.set_gate(GP, gate(CODE, HANDLER, INTERRUPT_GATE));
    guest.set_gate(BP, gate(CODE, HANDLER, TRAP_GATE | 3 << 5));
    guest
        .cpu
        .set_rflags(rflags::FIXED | rflags::IF | rflags::TF);
    raise(&mut guest, Exception::with(GP, 0x1234)).unwrap();
    assert_eq!(guest.cpu.rip, HANDLER);
    assert_eq!((guest.cpu.cpl, guest.cpu.rflags()), (0, rflags::FIXED));
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK - 24);
    assert_eq!(
        guest.stack(),
        [0x1234, 0x2_0000, 0x1B, 0x1_0302, OUTER_STACK as u32, 0x23]
    );
    let selectors = [DATA, CODE, DATA, USER_DATA, DATA, DATA];
    assert_eq!(guest.selectors(), selectors);
    // Back: data segments that only the handler may use are gone.
    guest.cpu.discard(4);
    guest.cpu.nmi_blocked = true;
    assert_eq!(guest.execute(&[0xCF]), Ok(false));
    assert!(!guest.cpu.nmi_blocked);
    assert_eq!((guest.cpu.rip, guest.cpu.cpl), (0x2_0000, 3));
    assert_eq!(guest.cpu.gpr(reg::RSP), OUTER_STACK);
    assert_eq!(guest.cpu.rflags(), rflags::FIXED | rflags::IF | rflags::TF);
    assert_eq!(
        guest.selectors(),
        [0, USER_CODE, USER_DATA, USER_DATA, 0, 0]
    );
    assert!(!guest.cpu.segments[seg::FS].present);
    // A trap gate leaves IF; INT3 returns behind itself.
    assert_eq!(guest.execute(&[0xCC]), Ok(false));
    assert_eq!(guest.cpu.rflags(), rflags::FIXED | rflags::IF);
    assert_eq!(
        guest.stack(),
        [0x2_0001, 0x1B, 0x302, OUTER_STACK as u32, 0x23]
    );
}

#[test]
fn a_16_bit_gate_pushes_words() {
    let mut guest = protected();
    guest.set_gate(UD, gate(CODE, 0xFFFF_2340, 0x86));
    guest.cpu.set_segment(
        seg::SS,
        Segment::from_descriptor(DATA_16, 0x0000_9300_0000_FFFF),
    );
    guest.cpu.set_gpr(reg::RSP, 0x7777_0004);
    raise(&mut guest, Exception::UD).unwrap();
    assert_eq!(guest.cpu.rip, 0x2340);
    assert_eq!(guest.cpu.gpr(reg::RSP), 0x7777_FFFE);
    assert_eq!(guest.get(0xFFFE), [0, 0]);
    assert_eq!(guest.get(0), [8, 0, 2, 0]);
    // IRET with 16 bits.
    guest.execute(&[0x66, 0xCF]).unwrap();
    assert_eq!(guest.cpu.rip, 0);
    assert_eq!(guest.cpu.gpr(reg::RSP), 0x7777_0004);
}

#[test]
fn virtual_8086_mode_is_left_and_entered_again() {
    let mut guest = virtual_8086();
    guest.set_gate(0x21, gate(CODE, HANDLER, INTERRUPT_GATE));
    guest.cpu.deliver(Event::External(0x21)).unwrap();
    assert!(!guest.cpu.virtual_8086());
    assert_eq!((guest.cpu.rip, guest.cpu.cpl), (HANDLER, 0));
    assert_eq!(guest.selectors(), [0, CODE, DATA, 0, 0, 0]);
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK - 36);
    assert_eq!(
        guest.stack(),
        [
            0x100, 0x1000, 0x2_0202, 0x800, 0x2000, 0x2200, 0x2100, 0x2300, 0x2400
        ]
    );
    guest.execute(&[0xCF]).unwrap();
    assert!(guest.cpu.virtual_8086());
    assert_eq!((guest.cpu.rip, guest.cpu.cpl), (0x100, 3));
    assert_eq!(guest.cpu.gpr(reg::RSP), 0x800);
    let selectors = [0x2200, 0x1000, 0x2000, 0x2100, 0x2300, 0x2400];
    assert_eq!(guest.selectors(), selectors);
    assert_eq!(guest.cpu.bases[seg::GS], 0x2_4000);
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits16);
    // INT n and IRET need IOPL 3, INT3 does not.
    assert_eq!(guest.execute(&[0xCD, 0x21]), Err(Exception::GP0));
    assert_eq!(guest.execute(&[0xCF]), Err(Exception::GP0));
    guest.set_gate(BP, gate(CODE, HANDLER, TRAP_GATE | 3 << 5));
    assert!(guest.execute(&[0xCC]).is_ok());
    assert_eq!(guest.cpu.cpl, 0);
    // Its handlers are at privilege level 0.
    drop(guest);
    let mut guest = virtual_8086();
    guest.set_gate(UD, gate(USER_CODE, HANDLER, TRAP_GATE));
    guest.set_gate(GP, gate(CODE, HANDLER, TRAP_GATE));
    raise(&mut guest, Exception::UD).unwrap();
    assert_eq!(guest.stack(), [u32::from(USER_CODE & !3) | EXTERNAL]);
}

#[test]
fn real_mode_uses_the_vector_table() {
    let mut guest = Guest::new();
    guest.cpu.reset();
    guest.write(4 * 0x10, &[0x34, 0x12, 0x00, 0x05]);
    let code = guest.cpu.paragraph(seg::CS, 0x1000);
    guest.cpu.set_segment(seg::CS, code);
    guest
        .cpu
        .set_rflags(rflags::FIXED | rflags::IF | rflags::AC);
    guest.cpu.rip = 0x100;
    guest.cpu.set_gpr(reg::RSP, 0x800);
    assert_eq!(guest.execute(&[0xCD, 0x10]), Ok(false));
    assert_eq!((guest.cpu.rip, guest.cpu.bases[seg::CS]), (0x1234, 0x5000));
    assert_eq!(guest.cpu.rflags(), rflags::FIXED);
    assert_eq!(guest.get(0x7FA), [2, 1, 0, 0x10, 2, 2]);
    guest.execute(&[0xCF]).unwrap();
    assert_eq!((guest.cpu.rip, guest.cpu.bases[seg::CS]), (0x102, 0x1_0000));
    assert_eq!(guest.cpu.gpr(reg::RSP), 0x800);
    assert_eq!(guest.cpu.rflags(), rflags::FIXED | rflags::IF);
    // A table that is too short for anything.
    guest.cpu.idtr.limit = 4 * 0x10 + 2;
    let error = Exception::with(GP, 0x10 << 3 | super::IDT);
    assert_eq!(guest.execute(&[0xCD, 0x10]), Err(error));
    guest.cpu.idtr.limit = 2;
    assert_eq!(raise(&mut guest, Exception::UD), Err(Shutdown));
}

#[test]
fn what_is_wrong_with_a_gate() {
    let good = gate(CODE, HANDLER, INTERRUPT_GATE);
    let entry = 0x30 << 3 | super::IDT;
    for (entry_value, vector, error) in [
        (0, GP, entry),
        // An LDT.
        (gate(CODE, HANDLER, 0x82), GP, entry),
        // A data segment.
        (gate(CODE, HANDLER, 0x9E), GP, entry),
        (good & !(1 << 47), NP, entry),
        (gate(0, HANDLER, INTERRUPT_GATE), GP, 0),
        (gate(NOWHERE, HANDLER, INTERRUPT_GATE), GP, NOWHERE.into()),
        (gate(DATA, HANDLER, INTERRUPT_GATE), GP, DATA.into()),
        (gate(USER_CODE, HANDLER, INTERRUPT_GATE), GP, 0x18),
        (gate(ABSENT, HANDLER, INTERRUPT_GATE), GP, ABSENT.into()),
        (gate(CODE_16, 0x1_0000, INTERRUPT_GATE), GP, 0),
    ] {
        let mut guest = protected();
        guest.set_gate(0x30, entry_value);
        let result = guest.execute(&[0xCD, 0x30]);
        assert_eq!(
            result,
            Err(Exception::with(vector, error)),
            "{entry_value:#x}"
        );
        assert_eq!(guest.cpu.gpr(reg::RSP), STACK);
        // From outside, the handler of that finds the same with EXT.
        guest.set_gate(vector, good);
        guest.cpu.deliver(Event::External(0x30)).unwrap();
        assert_eq!(guest.stack(), [error | EXTERNAL], "{entry_value:#x}");
    }
    // The gate's privilege level counts for INT n only.
    let mut guest = user();
    guest.set_gate(0x30, good);
    let error = Exception::with(GP, entry);
    assert_eq!(guest.execute(&[0xCD, 0x30]), Err(error));
    guest.cpu.deliver(Event::External(0x30)).unwrap();
    assert_eq!(guest.cpu.cpl, 0);
}

#[test]
fn what_is_wrong_with_the_inner_stack() {
    let entry = gate(CODE, HANDLER, INTERRUPT_GATE);
    for (selector, vector, error) in [
        (0, TS, 0),
        (NOWHERE, TS, NOWHERE),
        (USER_DATA, TS, USER_DATA & !3),
        (DATA | 3, TS, DATA),
        (CODE, TS, CODE),
        (ABSENT, SS, ABSENT),
    ] {
        let mut guest = user();
        guest.set_gate(0x30, entry | 3 << 45);
        guest.put(TSS + 8, &[selector.into()]);
        let result = guest.execute(&[0xCD, 0x30]);
        let expected = Exception::with(vector, error.into());
        assert_eq!(result, Err(expected), "{selector:#x}");
        assert_eq!((guest.cpu.cpl, guest.cpu.gpr(reg::RSP)), (3, OUTER_STACK));
        // Without a stack nothing can be handled.
        guest.set_gate(vector, entry);
        guest.set_gate(DF, entry);
        let result = guest.cpu.deliver(Event::External(0x30));
        assert_eq!(result, Err(Shutdown));
    }
    // Room for less than the frame.
    let mut guest = user();
    guest.set_gate(0x30, entry | 3 << 45);
    guest.put(TSS, &[2 << 32, DATA_16.into()]);
    let result = guest.execute(&[0xCD, 0x30]);
    assert_eq!(result, Err(Exception::with(SS, DATA_16.into())));
    // A TSS that ends in SS0.
    guest.cpu.tr.limit = 8;
    let result = guest.execute(&[0xCD, 0x30]);
    let tr = guest.cpu.tr.selector;
    assert_eq!(result, Err(Exception::with(TS, tr.into())));
}

#[test]
fn exceptions_during_delivery_combine() {
    let page_fault = Exception {
        address: 0xABCD,
        ..Exception::with(PF, 2)
    };
    // The second exception is what the gate of the first leads to: a gate that is absent (#NP).
    for (first, last) in [
        (Exception::UD, NP),
        (Exception::DE, DF),
        (Exception::GP0, DF),
        (Exception::with(TS, 0), DF),
        (page_fault, DF),
        (Exception::plain(vector::DB), NP),
        (Exception::with(vector::AC, 0), NP),
    ] {
        let mut guest = protected();
        guest.set_gate(first.vector, gate(CODE, HANDLER, 0x0E));
        guest.set_gate(last, gate(CODE, HANDLER, INTERRUPT_GATE));
        raise(&mut guest, first).unwrap();
        let error = if last == DF {
            0
        } else {
            u32::from(first.vector) << 3 | super::IDT | EXTERNAL
        };
        assert_eq!(guest.stack(), [error], "{first:?}");
        if first.vector == PF {
            assert_eq!(guest.cpu.cr2, 0xABCD);
        }
        // Not a double fault's gate either.
        drop(guest);
        let mut guest = protected();
        assert_eq!(raise(&mut guest, first), Err(Shutdown));
    }
}

#[test]
fn nmis_wait_for_iret() {
    let mut guest = protected();
    guest.set_gate(vector::NMI, gate(CODE, HANDLER, INTERRUPT_GATE));
    guest.cpu.activity = Activity::Halted;
    guest.cpu.shadow = true;
    guest.cpu.deliver(Event::Nmi).unwrap();
    assert!(guest.cpu.nmi_blocked && !guest.cpu.shadow);
    assert_eq!(guest.cpu.activity, Activity::Running);
    // Even if the return faults.
    guest.cpu.set_gpr(reg::RSP, 0x5_0000);
    assert_eq!(guest.execute(&[0xCF]), Err(Exception::GP0));
    assert!(!guest.cpu.nmi_blocked);
}

#[test]
fn a_call_gate_copies_parameters() {
    let mut guest = user();
    guest.put(OUTER_STACK, &[0x2222_2222_1111_1111]);
    // LCALL CALL_GATE:0 and back with LRET 8.
    let call = [0x9A, 0, 0, 0, 0, CALL_GATE as u8, 0];
    guest.execute(&call).unwrap();
    assert_eq!((guest.cpu.rip, guest.cpu.cpl), (HANDLER, 0));
    assert_eq!(
        guest.stack(),
        [
            0x2_0007,
            0x1B,
            0x1111_1111,
            0x2222_2222,
            OUTER_STACK as u32,
            0x23
        ]
    );
    guest.execute(&[0xCA, 8, 0]).unwrap();
    assert_eq!((guest.cpu.rip, guest.cpu.cpl), (0x2_0007, 3));
    assert_eq!(guest.cpu.gpr(reg::RSP), OUTER_STACK + 8);
    // At the same level nothing is copied, and a jump pushes nothing.
    drop(guest);
    let mut guest = protected();
    guest.execute(&call).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK - 8);
    assert_eq!(guest.stack(), [0x2_0007, 8]);
    let jump = [0xEA, 0, 0, 0, 0, CALL_GATE as u8, 0];
    guest.execute(&jump).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK - 8);
    drop(guest);
    let mut guest = user();
    let error = Exception::with(GP, CODE.into());
    assert_eq!(guest.execute(&jump), Err(error));
}

#[test]
fn far_calls_and_returns_change_the_size_of_code() {
    let mut guest = protected();
    // LCALLW: 16-bit code.
    guest.execute(&[0x66, 0x9A, 0x34, 0x12, 0x28, 0]).unwrap();
    assert_eq!(guest.cpu.rip, 0x1234);
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits16);
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK - 4);
    assert_eq!(guest.get(STACK - 4), [6, 0, 8, 0]);
    // The address had 32 bits.
    guest.execute(&[0xCB]).unwrap();
    assert_eq!(guest.cpu.rip, 6);
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits32);
    // Beyond the limit of 64 KiB.
    let jump = [0xEA, 0, 0, 1, 0, 0x28, 0];
    assert_eq!(guest.execute(&jump), Err(Exception::GP0));
    // Long mode is off: L means nothing, D is clear.
    guest.execute(&[0xEA, 0, 0, 1, 0, 0x40, 0]).unwrap();
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits16);
    assert_eq!(guest.cpu.segments[seg::CS].selector, CODE_64);
}

/// What an AP does: from the start-up message to 64-bit mode.
#[test]
fn a_trampoline_leads_to_64_bit_mode() {
    let mut guest = protected();
    guest.cpu.init();
    guest.cpu.startup(8);
    assert_eq!((guest.cpu.rip, guest.cpu.bases[seg::CS]), (0, 0x8000));
    guest.write(0x8080, &[0x4F, 0, 0x00, 0x50, 0, 0]);
    let run = |guest: &mut Guest, code: &[u8]| {
        assert!(guest.execute(code).is_ok(), "{code:02x?}");
    };
    run(&mut guest, &[0x8C, 0xC8]);
    assert_eq!(guest.cpu.gpr(reg::RAX) as u16, 0x800);
    run(&mut guest, &[0x8E, 0xD8]);
    assert_eq!(guest.cpu.bases[seg::DS], 0x8000);
    run(&mut guest, &[0x66, 0x0F, 0x01, 0x16, 0x80, 0]);
    assert_eq!((guest.cpu.gdtr.base, guest.cpu.gdtr.limit), (GDT, 0x4F));
    guest.cpu.set_gpr(reg::RAX, cr0::PE);
    run(&mut guest, &[0x0F, 0x22, 0xC0]);
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits16);
    run(&mut guest, &[0x66, 0xEA, 0, 1, 2, 0, CODE as u8, 0]);
    assert_eq!(guest.cpu.rip, 0x2_0100);
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits32);
    guest.cpu.set_gpr(reg::RAX, DATA.into());
    run(&mut guest, &[0x8E, 0xD0]);
    assert!(guest.cpu.shadow);
    guest.cpu.set_gpr(reg::RAX, 1 << 5);
    run(&mut guest, &[0x0F, 0x22, 0xE0]);
    guest.cpu.set_gpr(reg::RAX, TABLES);
    run(&mut guest, &[0x0F, 0x22, 0xD8]);
    guest.cpu.set_gpr(reg::RCX, 0xC000_0080);
    guest.cpu.set_gpr(reg::RDX, 0);
    guest.cpu.set_gpr(reg::RAX, efer::LME);
    run(&mut guest, &[0x0F, 0x30]);
    guest.cpu.set_gpr(reg::RAX, cr0::PE | cr0::PG);
    run(&mut guest, &[0x0F, 0x22, 0xC0]);
    // Compatibility mode.
    assert!(guest.cpu.long_mode());
    assert_eq!(guest.cpu.code_size(), crate::cpu::CodeSize::Bits32);
    run(&mut guest, &[0xEA, 0, 2, 2, 0, CODE_64 as u8, 0]);
    assert_eq!(guest.cpu.rip, 0x2_0200);
    assert!(guest.cpu.is_64bit());
    // LRETQ to an address beyond 4 GiB.
    guest.cpu.set_gpr(reg::RSP, STACK);
    guest.put(STACK, &[0xFFFF_8000_0000_0000, CODE_64.into()]);
    run(&mut guest, &[0x48, 0xCB]);
    assert_eq!(guest.cpu.rip, 0xFFFF_8000_0000_0000);
    assert_eq!(guest.cpu.gpr(reg::RSP), STACK + 16);
}
