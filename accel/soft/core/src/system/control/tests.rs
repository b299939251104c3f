//! Control, debug and model-specific registers, flags, ports, paravirtual structures.

use anemone_soft_apic::pv;
use anemone_soft_mmu::{cr0, cr4, efer};

use super::*;
use crate::state::tests::{Guest, interrupt_message, long_mode};

/// MOV CRn, RAX (0x22) or MOV RAX, CRn (0x20).
fn move_cr(opcode: u8, number: u8) -> Vec<u8> {
    let rex = (number >= 8).then_some(0x44);
    let bytes = [0x0F, opcode, 0xC0 | (number & 7) << 3];
    rex.into_iter().chain(bytes).collect()
}

fn from_cr(number: u8) -> Vec<u8> {
    move_cr(0x20, number)
}

const RDMSR: &[u8] = &[0x0F, 0x32];
const WRMSR: &[u8] = &[0x0F, 0x30];
const GP: Exception = Exception::GP0;

fn write_cr(guest: &mut Guest, number: u8, value: u64) -> Result<bool, Exception> {
    guest.cpu.set_gpr(reg::RAX, value);
    let before = (
        guest.cpu.cr0,
        guest.cpu.cr3(),
        guest.cpu.cr4,
        guest.cpu.efer,
    );
    let result = guest.execute(&move_cr(0x22, number));
    if result.is_err() {
        let after = (
            guest.cpu.cr0,
            guest.cpu.cr3(),
            guest.cpu.cr4,
            guest.cpu.efer,
        );
        assert_eq!(before, after);
    }
    result
}

fn write_msr(guest: &mut Guest, index: u32, value: u64) -> Result<bool, Exception> {
    guest.cpu.set_gpr(reg::RCX, index.into());
    guest
        .cpu
        .set_gpr(reg::RAX, value & 0xFFFF_FFFF | 0xFFFF << 32);
    guest.cpu.set_gpr(reg::RDX, value >> 32 | 0xFFFF << 32);
    guest.execute(WRMSR)
}

fn read_msr(guest: &mut Guest, index: u32) -> Result<u64, Exception> {
    guest.cpu.set_gpr(reg::RCX, index.into());
    guest.execute(RDMSR)?;
    Ok(guest.cpu.gpr(reg::RDX) << 32 | guest.cpu.gpr(reg::RAX))
}

#[test]
fn control_registers_refuse_what_cannot_be() {
    let mut guest = Guest::new();
    let (_, sregs) = long_mode();
    let pg = sregs.cr0;
    for (number, value) in [
        (0, pg & !cr0::PE),
        (0, pg | cr0::NW),
        (0, pg | 1 << 32),
        // In 64-bit mode paging stays on.
        (0, pg & !cr0::PG),
        (3, sregs.cr3 | 1 << 63),
        (3, sregs.cr3 | 1 << 48),
        (4, 0),
        (4, cr4::PAE | 1 << 12),
        (4, cr4::PAE | cr4::VME),
        (4, cr4::PAE | 1 << 32),
        (8, 16),
    ] {
        assert_eq!(
            write_cr(&mut guest, number, value),
            Err(GP),
            "CR{number} {value:#x}"
        );
    }
    // PCIDs begin with PCID 0, and then bit 63 may be set.
    assert!(write_cr(&mut guest, 3, sregs.cr3 | 1).is_ok());
    assert_eq!(write_cr(&mut guest, 4, cr4::PAE | cr4::PCIDE), Err(GP));
    assert!(write_cr(&mut guest, 3, sregs.cr3).is_ok());
    assert_eq!(write_cr(&mut guest, 4, cr4::PAE | cr4::PCIDE), Ok(false));
    assert!(write_cr(&mut guest, 3, sregs.cr3 | 7 | 1 << 63).is_ok());
    assert_eq!(guest.execute(&from_cr(3)), Ok(true));
    assert_eq!(guest.cpu.gpr(reg::RAX), sregs.cr3 | 7);
    // ET is always set, reserved bits are not.
    assert!(write_cr(&mut guest, 0, pg & !cr0::ET | 1 << 10).is_ok());
    assert_eq!(guest.cpu.cr0, pg);
    guest.set_cpl(3);
    for number in [0, 2, 3, 4, 8] {
        assert_eq!(guest.execute(&from_cr(number)), Err(GP));
        assert_eq!(guest.execute(&move_cr(0x22, number)), Err(GP));
    }
}

#[test]
fn a_model_without_a_feature_has_no_bit_for_it() {
    let mut guest = Guest::with_model("x86-64-v2-1");
    for bit in [
        cr4::SMAP,
        cr4::SMEP,
        cr4::OSXSAVE,
        cr4::FSGSBASE,
        cr4::PCIDE,
    ] {
        assert_eq!(write_cr(&mut guest, 4, cr4::PAE | bit), Err(GP), "{bit:#x}");
    }
    assert_eq!(
        write_cr(&mut guest, 4, cr4::PAE | cr4::PGE | cr4::OSFXSR),
        Ok(false)
    );
    assert_eq!(read_msr(&mut guest, 0x3B), Err(GP), "TSC_ADJUST");
    assert!(read_msr(&mut guest, 0xC000_0103).is_ok(), "TSC_AUX");
    drop(guest);
    let mut guest = Guest::with_model("x86-64-v1-1");
    assert_eq!(read_msr(&mut guest, 0xC000_0103), Err(GP));
}

/// As a start-up of an application processor does it: protected mode, PAE, LME, paging; and back.
#[test]
fn long_mode_is_entered_and_left() {
    let mut guest = Guest::new();
    let (regs, mut sregs) = long_mode();
    sregs.cr0 = cr0::PE | cr0::ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    sregs.cs.long = false;
    sregs.cs.big = true;
    guest.cpu.set_registers(&regs, &sregs).unwrap();
    assert!(write_msr(&mut guest, 0xC000_0080, efer::LME).is_ok());
    // Without PAE it cannot be.
    let on = sregs.cr0 | cr0::PG;
    assert_eq!(write_cr(&mut guest, 0, on), Err(GP));
    assert!(write_cr(&mut guest, 4, cr4::PAE).is_ok());
    let epoch = guest.cpu.blocks.epoch;
    assert_eq!(write_cr(&mut guest, 0, on), Ok(false));
    assert!(guest.cpu.blocks.epoch > epoch);
    assert_eq!(guest.cpu.efer, efer::LME | efer::LMA);
    assert!(guest.cpu.long_mode() && !guest.cpu.is_64bit());
    assert_eq!(guest.cpu.mmu.paging().efer, guest.cpu.efer);
    // Long mode pins these.
    assert_eq!(write_cr(&mut guest, 4, 0), Err(GP));
    assert_eq!(write_msr(&mut guest, 0xC000_0080, 0), Err(GP));
    assert!(write_msr(&mut guest, 0xC000_0080, efer::LME | efer::NXE).is_ok());
    assert_eq!(
        guest.cpu.efer,
        efer::LME | efer::LMA | efer::NXE,
        "LMA is read-only"
    );
    // From compatibility mode paging can be switched off again.
    assert_eq!(write_cr(&mut guest, 0, sregs.cr0), Ok(false));
    assert_eq!(guest.cpu.efer, efer::LME | efer::NXE);
    assert!(!guest.cpu.long_mode());
    // LMSW sets PE but does not clear it; CLTS clears TS.
    guest.cpu.set_gpr(reg::RAX, 0xE);
    assert_eq!(guest.execute(&[0x0F, 0x01, 0xF0]), Ok(false));
    assert_eq!(guest.cpu.cr0 & 0xF, 0xF);
    assert!(guest.execute(&[0x0F, 0x06]).is_ok());
    assert_eq!(guest.cpu.cr0 & 0xF, 7);
    assert!(guest.execute(&[0x0F, 0x01, 0xE0]).is_ok(), "SMSW EAX");
    assert_eq!(guest.cpu.gpr(reg::RAX), guest.cpu.cr0);
}

#[test]
fn paging_follows_the_control_registers() {
    let mut guest = Guest::new();
    // A read-only page at 2 MiB.
    guest.put(crate::state::tests::TABLES + 0x2008, &[0x20_0000 | 0x85]);
    let store = |guest: &mut Guest| guest.cpu.store::<u8>(0x20_0000, 1).is_ok();
    assert!(!store(&mut guest));
    let value = guest.cpu.cr0 & !cr0::WP;
    write_cr(&mut guest, 0, value).unwrap();
    assert!(store(&mut guest));
    guest.put(crate::state::tests::TABLES + 0x2008, &[0]);
    assert!(store(&mut guest), "still in the TLB");
    guest.cpu.set_gpr(reg::RAX, 0x20_0FFF);
    assert_eq!(
        guest.execute(&[0x0F, 0x01, 0x38]),
        Ok(false),
        "INVLPG [RAX]"
    );
    assert!(!store(&mut guest));
}

#[test]
fn invpcid_checks_its_operands() {
    let mut guest = Guest::new();
    // INVPCID RAX, [RBX].
    let mut invalidate = |kind: u64, descriptor: [u64; 2]| {
        guest.put(0x6000, &descriptor);
        guest.cpu.set_gpr(reg::RAX, kind);
        guest.cpu.set_gpr(reg::RBX, 0x6000);
        guest.execute(&[0x66, 0x0F, 0x38, 0x82, 0x03])
    };
    for good in [
        (0, [0, 0x1000]),
        (1, [0, 0]),
        (2, [0xFFF, 0]),
        (3, [0, 1 << 63]),
    ] {
        assert_eq!(invalidate(good.0, good.1), Ok(false), "{good:x?}");
    }
    for bad in [
        (0, [0, 1 << 63]),
        (0, [1, 0]),
        (1, [1, 0]),
        (2, [0x1000, 0]),
        (4, [0, 0]),
        (1 << 32, [0, 0]),
    ] {
        assert_eq!(invalidate(bad.0, bad.1), Err(GP), "{bad:x?}");
    }
}

#[test]
fn msrs_refuse_reserved_bits() {
    let mut guest = Guest::new();
    for (index, value) in [
        (0xC000_0080, 1 << 1),
        (0xC000_0080, 1 << 12),
        (0xC000_0082, 1 << 47),
        (0xC000_0100, 1 << 63),
        (0xC000_0102, 1 << 63),
        (0xC000_0103, 1 << 32),
        (0x175, 1 << 47),
        (0x277, 2),
        (0x2FF, 2),
        (0x2FF, 1 << 12),
        (0x200, 1 << 48),
        (0x200, 7),
        (0x201, 1),
        (0x26F, 3),
        (0x1B, 1),
        (0x808, 0),
        (0x4B56_4D04, 2),
        (0x4B56_4D03, 2),
        (0x4B56_4D02, 0),
        (0xFE, 0),
        (0x48, 0),
        (0x1234, 0),
    ] {
        assert_eq!(
            write_msr(&mut guest, index, value),
            Err(GP),
            "{index:#x} {value:#x}"
        );
    }
    for (index, value) in [
        (0xC000_0081, u64::MAX),
        (0xC000_0082, u64::MAX << 47),
        (0xC000_0101, 0x7FFF_FFFF_F000),
        (0x277, 0x0007_0406_0007_0406),
        (0x20F, 0xFFFF_0000_0800),
        (0x259, 0x0601_0406_0501_0000),
        (0x1A0, 0x85_0089),
    ] {
        assert_eq!(write_msr(&mut guest, index, value), Ok(true), "{index:#x}");
        assert_eq!(read_msr(&mut guest, index), Ok(value), "{index:#x}");
    }
    for index in [0x1234, 0x48, 0xC001_0131, 0x802, 0x4B56_4D05] {
        assert_eq!(read_msr(&mut guest, index), Err(GP), "{index:#x}");
    }
    guest.set_cpl(3);
    assert_eq!(read_msr(&mut guest, 0x277), Err(GP));
    assert_eq!(write_msr(&mut guest, 0x277, 0), Err(GP));
}

/// Every MSR that Linux 6.1 reads or writes without being prepared for a fault.
#[test]
fn what_a_kernel_takes_for_granted_is_there() {
    let mut guest = Guest::new();
    for index in [
        0x10,
        0x1B,
        0x8B,
        0xFE,
        0x174,
        0x175,
        0x176,
        0x179,
        0x17A,
        0x1A0,
        0x1D9,
        0x200,
        0x20F,
        0x250,
        0x258,
        0x259,
        0x268,
        0x26F,
        0x277,
        0x2FF,
        0x6E0,
        0x4B56_4D00,
        0x4B56_4D01,
        0x4B56_4D03,
        0x4B56_4D04,
        0xC000_0080,
        0xC000_0081,
        0xC000_0082,
        0xC000_0083,
        0xC000_0084,
        0xC000_0100,
        0xC000_0101,
        0xC000_0102,
        0xC000_0103,
        0xC001_0010,
        0xC001_0015,
        0xC001_0055,
        0xC001_0112,
        0xC001_0113,
        0xC001_1029,
    ] {
        assert!(read_msr(&mut guest, index).is_ok(), "{index:#x}");
    }
    assert!(write_msr(&mut guest, 0x8B, 0).is_ok());
    assert!(write_msr(&mut guest, 0xC001_0015, 1 << 6).is_ok());
}

#[test]
fn bases_of_segments_are_msrs() {
    let mut guest = Guest::new();
    write_msr(&mut guest, 0xC000_0100, 0x1234_5000).unwrap();
    write_msr(&mut guest, 0xC000_0101, 0x5678_9000).unwrap();
    assert_eq!(guest.cpu.bases[seg::FS], 0x1234_5000);
    assert_eq!(guest.cpu.bases[seg::GS], 0x5678_9000);
}

#[test]
fn the_tsc_can_be_set() {
    let mut guest = Guest::new();
    assert!(read_msr(&mut guest, 0x10).unwrap() < 1 << 45);
    write_msr(&mut guest, 0x10, 1 << 60).unwrap();
    let tsc = read_msr(&mut guest, 0x10).unwrap();
    assert!((1 << 60..(1 << 60) + (1 << 45)).contains(&tsc));
    guest.execute(&[0x0F, 0x31]).unwrap();
    let rdtsc = guest.cpu.gpr(reg::RDX) << 32 | guest.cpu.gpr(reg::RAX);
    assert!(rdtsc > tsc);
    let adjusted = read_msr(&mut guest, 0x3B).unwrap();
    assert!(adjusted > 1 << 59);
    write_msr(&mut guest, 0x3B, 0).unwrap();
    assert!(read_msr(&mut guest, 0x10).unwrap() < 1 << 45);
    // RDTSCP and RDPID tell the auxiliary value; CR4.TSD keeps all from user code.
    write_msr(&mut guest, 0xC000_0103, 5).unwrap();
    guest.execute(&[0x0F, 0x01, 0xF9]).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RCX), 5);
    guest.execute(&[0xF3, 0x0F, 0xC7, 0xF8]).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RAX), 5);
    write_cr(&mut guest, 4, cr4::PAE | cr4::TSD).unwrap();
    assert!(guest.execute(&[0x0F, 0x31]).is_ok());
    guest.set_cpl(3);
    assert_eq!(guest.execute(&[0x0F, 0x31]), Err(GP));
    assert_eq!(guest.execute(&[0x0F, 0x01, 0xF9]), Err(GP));
    assert_eq!(guest.execute(&[0x0F, 0x33]), Err(GP), "RDPMC");
}

/// The fields of a pvclock structure: version, TSC, nanoseconds, scale, flags.
fn system_time(guest: &Guest, at: u64) -> (u32, u64, u64, pv::Scale, u8) {
    let bytes = guest.get::<32>(at);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let scale = pv::Scale {
        mul: word(24) as u32,
        shift: bytes[28] as i8,
    };
    (word(0) as u32, word(8), word(16), scale, bytes[29])
}

#[test]
fn the_paravirtual_clock_is_told() {
    let mut guest = Guest::new();
    write_msr(&mut guest, 0x4B56_4D01, 0x6001).unwrap();
    let now = |guest: &mut Guest| {
        let (version, tsc, nanoseconds, scale, flags) = system_time(guest, 0x6000);
        assert_eq!((version % 2, flags), (0, 1));
        let ticks = read_msr(guest, 0x10).unwrap().wrapping_sub(tsc);
        nanoseconds.wrapping_add(scale.nanoseconds(ticks))
    };
    let close = |a: u64, b: u64| a.abs_diff(b) < 5_000_000_000;
    assert!(close(now(&mut guest), guest.cpu.shared.clock.nanoseconds()));
    // A TSC that jumps does not move the clock.
    write_msr(&mut guest, 0x10, 1 << 50).unwrap();
    assert!(close(now(&mut guest), guest.cpu.shared.clock.nanoseconds()));
    // A clock that is set is told before the guest runs.
    guest.cpu.shared.clock.set_nanoseconds(1 << 55);
    assert!(!close(now(&mut guest), 1 << 55));
    guest.cpu.offer_pv_eoi();
    assert!(close(now(&mut guest), 1 << 55));
    // Wall clock plus clock is the time of day.
    write_msr(&mut guest, 0x4B56_4D00, 0x7000).unwrap();
    let bytes = guest.get::<12>(0x7000);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let boot = u64::from(word(4)) * 1_000_000_000 + u64::from(word(8));
    assert!(word(0) % 2 == 0 && word(8) < 1_000_000_000);
    assert!(close(boot + now(&mut guest), crate::clock::time_of_day()));
    // Addresses without memory take nothing.
    for index in [0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D03, 0x4B56_4D04] {
        assert!(write_msr(&mut guest, index, u64::MAX << 6 | 1).is_ok());
    }
}

fn interrupt(guest: &mut Guest, vector: u8) {
    let message = interrupt_message(vector);
    assert_eq!(guest.cpu.shared.apics.signal_msi(message), 1);
    let now = guest.cpu.shared.clock.now_with(0);
    guest.cpu.poll_apic(now);
}

/// What starts next may use the memory for anything.
#[test]
fn init_gives_up_paravirtual_structures() {
    let mut guest = Guest::new();
    for index in [0x4B56_4D01, 0x4B56_4D03, 0x4B56_4D04] {
        write_msr(&mut guest, index, 0x6001).unwrap();
    }
    guest.cpu.init();
    for index in [0x4B56_4D01, 0x4B56_4D03, 0x4B56_4D04] {
        assert_eq!(guest.cpu.read_msr(index), Some(0));
    }
    guest.put(0x6000, &[0x1234; 4]);
    guest.cpu.shared.clock.set_nanoseconds(1);
    guest.cpu.offer_pv_eoi();
    assert_eq!(guest.get::<8>(0x6000), 0x1234_u64.to_le_bytes());
}

/// Switches the APIC to x2APIC mode and on.
fn enable_apic(guest: &mut Guest) {
    write_msr(guest, 0x1B, 0xFEE0_0D00).unwrap();
    write_msr(guest, 0x80F, 0x1FF).unwrap();
}

#[test]
fn an_interrupt_ends_by_a_flag_in_memory() {
    let mut guest = Guest::new();
    enable_apic(&mut guest);
    write_msr(&mut guest, 0x4B56_4D04, 0x6001).unwrap();
    let in_service = |guest: &mut Guest| read_msr(guest, 0x812).unwrap() as u32;
    guest.cpu.offer_pv_eoi();
    assert_eq!(guest.get::<1>(0x6000), [0], "no interrupt is in service");
    for ends in [true, false] {
        interrupt(&mut guest, 0x41);
        assert_eq!(guest.cpu.apic.acknowledge(), Some(0x41));
        guest.cpu.offer_pv_eoi();
        assert_eq!(guest.get::<1>(0x6000), [1]);
        if ends {
            guest.put(0x6000, &[0]);
            assert_eq!(in_service(&mut guest), 0);
        } else {
            assert_eq!(in_service(&mut guest), 2);
            assert_eq!(guest.get::<1>(0x6000), [0], "withdrawn");
            write_msr(&mut guest, 0x80B, 0).unwrap();
            assert_eq!(in_service(&mut guest), 0);
        }
    }
    // Two wait: the end of the first must be seen.
    interrupt(&mut guest, 0x41);
    interrupt(&mut guest, 0x31);
    guest.cpu.apic.acknowledge().unwrap();
    guest.cpu.offer_pv_eoi();
    assert_eq!(guest.get::<1>(0x6000), [0]);
}

/// A guest whose host is busy sets its timer to a time that has passed meanwhile.
#[test]
fn a_timer_that_is_due_at_once_interrupts_after_an_end_by_a_flag_in_memory() {
    let ways: [fn(&mut Guest); 2] = [
        |guest| assert!(write_msr(guest, 0x6E0, 1).is_ok()),
        |guest| {
            let soon = guest.cpu.shared.clock.tsc(0) + 1_000_000;
            assert!(write_msr(guest, 0x6E0, soon).is_ok());
            interrupt(guest, 0x41);
            assert_eq!(guest.cpu.apic.acknowledge(), Some(0x41));
            guest.cpu.offer_pv_eoi();
            guest.put(0x6000, &[0]);
            while read_msr(guest, 0x6E0) != Ok(0) {}
        },
    ];
    for set_timer in ways {
        let mut guest = Guest::new();
        enable_apic(&mut guest);
        write_msr(&mut guest, 0x832, 0x4_0041).unwrap();
        write_msr(&mut guest, 0x4B56_4D04, 0x6001).unwrap();
        interrupt(&mut guest, 0x41);
        assert_eq!(guest.cpu.apic.acknowledge(), Some(0x41));
        guest.cpu.offer_pv_eoi();
        guest.put(0x6000, &[0]);
        set_timer(&mut guest);
        assert_eq!(guest.cpu.apic.next_deadline(), None);
        assert!(guest.cpu.apic.pending());
    }
}

#[test]
fn what_a_cpu_sends_itself_ends_the_block() {
    let mut guest = Guest::new();
    enable_apic(&mut guest);
    assert_eq!(write_msr(&mut guest, 0x80B, 0), Ok(true), "EOI");
    assert_eq!(write_msr(&mut guest, 0x83F, 0x51), Ok(false), "self-IPI");
    assert!(guest.cpu.signals.take(crate::ATTENTION_APIC));
    // A priority that hides it, and back.
    assert_eq!(write_cr(&mut guest, 8, 5), Ok(true));
    assert!(!guest.cpu.apic.pending());
    assert_eq!(write_cr(&mut guest, 8, 4), Ok(false));
    assert!(guest.cpu.apic.pending());
    assert_eq!(guest.execute(&from_cr(8)), Ok(true));
    assert_eq!(guest.cpu.gpr(reg::RAX), 4);
}

#[test]
fn the_deadline_is_on_the_tsc_of_the_cpu() {
    let mut guest = Guest::new();
    enable_apic(&mut guest);
    assert_eq!(guest.cpu.deadline_tsc, u64::MAX);
    write_msr(&mut guest, 0x832, 2 << 17 | 0xEC).unwrap();
    assert_eq!(write_msr(&mut guest, 0x6E0, 1 << 62), Ok(true));
    assert_eq!(guest.cpu.deadline_tsc, 1 << 62);
    // A TSC that is set beyond it: due at once.
    write_msr(&mut guest, 0x10, (1 << 62) + 1).unwrap();
    assert!(guest.cpu.shared.clock.tsc(guest.cpu.msrs.tsc_offset) > guest.cpu.deadline_tsc);
    // One-shot: a count of 10^9 ns at divisor 1, as TSC ticks.
    write_msr(&mut guest, 0x832, 0xEC).unwrap();
    write_msr(&mut guest, 0x83E, 0xB).unwrap();
    let before = read_msr(&mut guest, 0x10).unwrap();
    write_msr(&mut guest, 0x838, 1_000_000_000).unwrap();
    let second = 1000 * u64::from(guest.cpu.shared.clock.khz());
    let left = guest.cpu.deadline_tsc - before;
    assert!((second..second * 60).contains(&left), "{left} {second}");
}

#[test]
fn cpuid_follows_the_machine() {
    let mut guest = Guest::new();
    let ask = |guest: &mut Guest, function: u64, index: u64| {
        guest.cpu.set_gpr(reg::RAX, function);
        guest.cpu.set_gpr(reg::RCX, index);
        guest.execute(&[0x0F, 0xA2]).unwrap();
        [reg::RAX, reg::RBX, reg::RCX, reg::RDX].map(|r| guest.cpu.gpr(r))
    };
    assert_eq!(ask(&mut guest, 1, 0)[2] >> 27 & 1, 0);
    write_cr(&mut guest, 4, cr4::PAE | cr4::OSXSAVE).unwrap();
    assert_eq!(ask(&mut guest, 1, 0)[2] >> 27 & 1, 1);
    assert_eq!(ask(&mut guest, 1, 0)[3] >> 9 & 1, 1);
    write_msr(&mut guest, 0x1B, 0xFEE0_0100).unwrap();
    assert_eq!(ask(&mut guest, 1, 0)[3] >> 9 & 1, 0);
    assert_eq!(ask(&mut guest, 0xD, 0)[1], 576);
    guest.cpu.set_gpr(reg::RCX, 0);
    guest.cpu.set_gpr(reg::RDX, 0);
    for (value, good) in [
        (7, true),
        (5, false),
        (6, false),
        (15, false),
        (1, true),
        (3, true),
    ] {
        guest.cpu.set_gpr(reg::RAX, value);
        assert_eq!(
            guest.execute(&[0x0F, 0x01, 0xD1]).is_ok(),
            good,
            "XCR0 {value}"
        );
    }
    guest.cpu.set_gpr(reg::RAX, 7);
    guest.execute(&[0x0F, 0x01, 0xD1]).unwrap();
    assert_eq!(ask(&mut guest, 0xD, 0)[1], 832);
    guest.cpu.set_gpr(reg::RCX, 0);
    guest.execute(&[0x0F, 0x01, 0xD0]).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RAX), 7);
    // CPUID faulting.
    write_msr(&mut guest, 0x140, 1).unwrap();
    ask(&mut guest, 0, 0);
    guest.set_cpl(3);
    assert_eq!(guest.execute(&[0x0F, 0xA2]), Err(GP));
}

#[test]
fn debug_registers() {
    let mut guest = Guest::new();
    // MOV DRn, RAX and MOV RBX, DRn.
    let write = |guest: &mut Guest, number: u8, value: u64| {
        guest.cpu.set_gpr(reg::RAX, value);
        guest.execute(&[0x0F, 0x23, 0xC0 | number << 3])
    };
    let read = |guest: &mut Guest, number: u8| {
        guest.execute(&[0x0F, 0x21, 0xC3 | number << 3])?;
        Ok::<_, Exception>(guest.cpu.gpr(reg::RBX))
    };
    write(&mut guest, 2, 0x1234_5678_9ABC).unwrap();
    assert_eq!(read(&mut guest, 2), Ok(0x1234_5678_9ABC));
    write(&mut guest, 6, 0xFFFF_FFFF).unwrap();
    assert_eq!(
        read(&mut guest, 6),
        Ok(0xFFFF_EFFF & (DR6_FIXED | DR6_WRITABLE))
    );
    write(&mut guest, 4, 0).unwrap();
    assert_eq!(read(&mut guest, 4), Ok(0xFFFF_0FF0));
    write(&mut guest, 7, 0xFFFF_DFFF).unwrap();
    assert_eq!(read(&mut guest, 5), Ok(0xFFFF_07FF));
    assert_eq!(write(&mut guest, 7, 1 << 32), Err(GP));
    write_cr(&mut guest, 4, cr4::PAE | cr4::DE).unwrap();
    assert_eq!(read(&mut guest, 4), Err(Exception::UD));
    // General detect: any access raises #DB once.
    write(&mut guest, 7, DR7_GD).unwrap();
    assert_eq!(read(&mut guest, 0), Err(Exception::plain(vector::DB)));
    assert_eq!(read(&mut guest, 6), Ok(DR6_FIXED | DR6_BD));
    guest.set_cpl(3);
    assert_eq!(read(&mut guest, 0), Err(GP));
}

#[test]
fn hypercalls_are_not_there() {
    let mut guest = Guest::new();
    for call in [[0x0F, 0x01, 0xC1], [0x0F, 0x01, 0xD9]] {
        guest.set_cpl(0);
        guest.execute(&call).unwrap();
        assert_eq!(guest.cpu.gpr(reg::RAX) as i64, -1000);
        guest.set_cpl(3);
        guest.execute(&call).unwrap();
        assert_eq!(guest.cpu.gpr(reg::RAX) as i64, -1);
    }
}

#[test]
fn hlt_waits() {
    let mut guest = Guest::new();
    guest.set_cpl(3);
    assert_eq!(guest.execute(&[0xF4]), Err(GP));
    guest.set_cpl(0);
    assert_eq!(guest.execute(&[0xF4]), Ok(false));
    assert_eq!(guest.cpu.activity, Activity::Halted);
}

/// OUT PORT_STOP, AL.
const STOP: [u8; 2] = [0xE6, 0x99];

#[test]
fn an_interrupt_waits_for_the_instruction_after_sti() {
    let mut guest = Guest::new();
    enable_apic(&mut guest);
    interrupt(&mut guest, 0x41);
    // STI, INC RBX twice, and on and on; the handler stops.
    let code = [0xFB, 0x48, 0xFF, 0xC3, 0x48, 0xFF, 0xC3, 0xEB, 0xFE];
    guest.run(0x20_0000, &code, 0x41, &[&STOP[..], &[0xEB, 0xFE]].concat());
    assert_eq!(guest.cpu.gpr(reg::RBX), 1);
}

/// If it came before HLT, the CPU would sleep with nothing left to wake it.
#[test]
fn an_interrupt_between_sti_and_hlt_wakes_from_hlt() {
    let mut guest = Guest::new();
    enable_apic(&mut guest);
    // OUT PORT_INTERRUPT, AL; STI at the end of a page, so of a block; HLT. The handler notes where it came
    // from: MOV RCX, [RSP].
    guest.cpu.set_gpr(reg::RAX, 0x41);
    let code = [0xE6, 0x98, 0xFB, 0xF4, 0xEB, 0xFE];
    let handler = [&[0x48, 0x8B, 0x0C, 0x24], &STOP[..], &[0xEB, 0xFE]].concat();
    guest.run(0x20_1000 - 3, &code, 0x41, &handler);
    assert_eq!(guest.cpu.gpr(reg::RCX), 0x20_1001);
}

#[test]
fn the_timer_wakes_and_its_interrupt_ends_in_memory() {
    let mut guest = Guest::new();
    enable_apic(&mut guest);
    write_msr(&mut guest, 0x4B56_4D04, 0x6001).unwrap();
    write_msr(&mut guest, 0x832, 2 << 17 | 0xEC).unwrap();
    let soon = u64::from(guest.cpu.shared.clock.khz());
    let now = read_msr(&mut guest, 0x10).unwrap();
    write_msr(&mut guest, 0x6E0, now + soon).unwrap();
    // STI, HLT, stop; the handler: BTR DWORD [0x6000], 0; SETC BL; IRETQ.
    let code = [&[0xFB, 0xF4], &STOP[..], &[0xEB, 0xFE]].concat();
    let handler = [
        0x0F, 0xBA, 0x34, 0x25, 0x00, 0x60, 0x00, 0x00, 0x00, 0x0F, 0x92, 0xC3, 0x48, 0xCF,
    ];
    guest.run(0x20_0000, &code, 0xEC, &handler);
    assert_eq!(guest.cpu.gpr(reg::RBX) & 1, 1, "the end was offered");
    assert_eq!(read_msr(&mut guest, 0x817), Ok(0), "and taken");
    assert!(read_msr(&mut guest, 0x10).unwrap() >= now + soon);
}

/// The one-shot timer while code runs, with an APIC in memory.
#[test]
fn the_timer_interrupts_a_loop() {
    let mut guest = Guest::new();
    let now = guest.cpu.shared.clock.now_with(0);
    for (register, value) in [
        (0xF0, 0x1FF_u32),
        (0x320, 0xEC),
        (0x3E0, 0xB),
        (0x380, 1_000_000),
    ] {
        guest
            .cpu
            .apic
            .mmio_write(register, &value.to_le_bytes(), now);
    }
    guest.run(
        0x20_0000,
        &[0xFB, 0xEB, 0xFE],
        0xEC,
        &[&STOP[..], &[0xEB, 0xFE]].concat(),
    );
    assert!(guest.cpu.shared.clock.now_with(0).bus >= now.bus + 1_000_000);
}
