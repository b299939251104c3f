//! Behaviour of the registers as the manual describes it.

mod common;

use std::sync::atomic::Ordering;

use anemone_accel_api::MsiMessage;
use anemone_soft_apic::pv::PvEoi;
use anemone_soft_apic::{
    Apic, BASE_ENABLE, BASE_EXTENDED, BSP, DEFAULT_BASE, Deadline, GeneralProtection, LocalSource,
    Mode, Now,
};
use common::{enter_x2apic, machine, read, write};

const SVR: u64 = 0xF0;
const ESR: u64 = 0x280;
const LVT_TIMER: u64 = 0x320;

fn enabled(cpus: u32) -> (std::sync::Arc<anemone_soft_apic::Apics>, Vec<Apic>) {
    let (apics, mut each, _) = machine(cpus);
    each.iter_mut().for_each(|apic| write(apic, SVR, 0x1FF));
    (apics, each)
}

fn at(bus: u64, tsc: u64) -> Now {
    Now { bus, tsc }
}

fn msi(destination: u64, vector: u32) -> MsiMessage {
    MsiMessage {
        address: 0xFEE0_0000 | destination << 12,
        data: vector,
    }
}

#[test]
fn reset_values_are_those_of_the_manual() {
    let (_, mut each, _) = machine(4);
    let apic = &mut each[3];
    assert_eq!(apic.base(), DEFAULT_BASE | BASE_ENABLE);
    assert_eq!(apic.mmio_page(), Some(DEFAULT_BASE));
    assert_eq!(read(apic, 0x20), 3 << 24);
    assert_eq!(read(apic, SVR), 0xFF);
    assert_eq!(read(apic, 0xE0), u32::MAX);
    for lvt in (LVT_TIMER..=0x370).step_by(16) {
        assert_eq!(read(apic, lvt), 0x1_0000);
    }
    assert_eq!(each[0].base(), DEFAULT_BASE | BASE_ENABLE | BSP);
}

#[test]
fn mode_changes_follow_the_state_diagram() {
    let modes = [0, BASE_ENABLE, BASE_ENABLE | BASE_EXTENDED, BASE_EXTENDED];
    // Rows: from disabled, xAPIC, x2APIC; columns: to each of `modes`.
    let allowed = [
        [true, true, false, false],
        [true, true, true, false],
        [true, false, true, false],
    ];
    for (from, row) in allowed.iter().enumerate() {
        for (to, ok) in row.iter().enumerate() {
            let (_, mut each, _) = machine(1);
            each[0].restore_base(DEFAULT_BASE | modes[from]).unwrap();
            let result = each[0].set_base(DEFAULT_BASE | modes[to]);
            assert_eq!(result.is_ok(), *ok, "from {from} to {to}");
        }
    }
    let (_, mut each, _) = machine(1);
    for reserved in [1, 1 << 9, 1 << 46, 1 << 63] {
        let value = each[0].base() | reserved;
        assert_eq!(each[0].set_base(value), Err(GeneralProtection));
    }
}

#[test]
fn each_mode_has_its_own_door() {
    let (_, mut each, _) = machine(2);
    let apic = &mut each[1];
    let now = Now::default();
    assert_eq!(apic.read_msr(0x802, now), Err(GeneralProtection));
    write(apic, 0xD0, 0x0100_0000);
    enter_x2apic(apic);
    assert_eq!((apic.mode(), apic.mmio_page()), (Mode::X2Apic, None));
    assert_eq!(read(apic, 0x20), u32::MAX);
    assert_eq!(apic.read_msr(0x802, now), Ok(1));
    assert_eq!(apic.read_msr(0x80D, now), Ok(2));
    for (msr, value) in [
        (0x802, 0),       // ID: read-only
        (0x80D, 0),       // LDR: read-only
        (0x80E, 0),       // DFR: not there
        (0x831, 0),       // ICR's upper half: not there
        (0x839, 0),       // current count: read-only
        (0x80B, 1),       // EOI: only zero
        (0x828, 1),       // ESR: only zero
        (0x808, 0x100),   // TPR: reserved bits
        (0x83F, 0x100),   // self IPI: reserved bits
        (0x830, 1 << 20), // ICR: reserved bits
        (0x80F, 1 << 32), // upper halves are reserved
        (0x8FF, 0),       // reserved register
        (0x900, 0),       // not of the APIC
    ] {
        let result = apic.write_msr(msr, value, now);
        assert_eq!(result, Err(GeneralProtection), "{msr:#x}");
    }
    for msr in [0x80B, 0x83F, 0x80E, 0x809, 0x831, 0x8FF] {
        assert_eq!(apic.read_msr(msr, now), Err(GeneralProtection), "{msr:#x}");
    }
    // Switched off and on again it is as after power-up, without the mode's logical id.
    apic.set_base(DEFAULT_BASE).unwrap();
    assert_eq!((apic.mode(), apic.mmio_page()), (Mode::Disabled, None));
    apic.set_base(DEFAULT_BASE | BASE_ENABLE).unwrap();
    assert_eq!(read(apic, 0xD0), 0);
}

#[test]
fn odd_accesses_change_nothing() {
    let (_, mut each) = enabled(1);
    let apic = &mut each[0];
    let now = Now::default();
    write(apic, 0x80, 0x20);
    apic.mmio_write(0x80, &[0x30], now);
    apic.mmio_write(0x80, &[0x30; 8], now);
    apic.mmio_write(0x84, &[0x30; 4], now);
    apic.mmio_write(u64::MAX - 15, &[0x30; 4], now);
    assert_eq!(read(apic, 0x80), 0x20);
    let mut wide = [0xAA; 8];
    apic.mmio_read(0xF1, &mut wide, now);
    assert_eq!(wide, [1, 0, 0, 0, 0, 0, 0, 0]);
    apic.mmio_read(u64::MAX, &mut wide, now);
    assert_eq!(wide, [0; 8]);
}

#[test]
fn illegal_registers_and_vectors_are_errors() {
    let (apics, mut each) = enabled(2);
    let apic = &mut each[0];
    write(apic, 0x370, 0xFE);
    read(apic, 0x3F0);
    assert_eq!(apic.acknowledge(), Some(0xFE));
    apic.end_of_interrupt();
    write(apic, 0x300, 0x0004_400F); // to self, vector 15
    assert_eq!(apic.acknowledge(), Some(0xFE));
    apic.end_of_interrupt();
    assert_eq!(apics.signal_msi(msi(0, 3)), 1);
    let _ = apic.poll(Now::default());
    assert_eq!(apic.acknowledge(), Some(0xFE));
    assert_eq!(read(apic, ESR), 0, "not yet latched");
    write(apic, ESR, 0);
    assert_eq!(read(apic, ESR), 0xE0);
    write(apic, ESR, 0);
    assert_eq!(read(apic, ESR), 0);
}

#[test]
fn level_triggered_ends_are_broadcast() {
    let (apics, mut each, record) = machine(1);
    let apic = &mut each[0];
    write(apic, SVR, 0x1FF);
    for (vector, data) in [(0x51, 0x8051), (0x52, 0x52)] {
        apics.signal_msi(msi(0, data));
        let _ = apic.poll(Now::default());
        assert_eq!(apic.acknowledge(), Some(vector));
        write(apic, 0xB0, 0);
    }
    assert_eq!(*record.ended.lock().unwrap(), [0x51]);
    write(apic, SVR, 0x11FF);
    apics.signal_msi(msi(0, 0x8053));
    let _ = apic.poll(Now::default());
    assert_eq!(apic.acknowledge(), Some(0x53));
    write(apic, 0xB0, 0);
    assert_eq!(*record.ended.lock().unwrap(), [0x51], "suppressed");
}

#[test]
fn senders_wake_once_until_the_owner_looks() {
    let (apics, mut each, record) = machine(1);
    write(&mut each[0], SVR, 0x1FF);
    let wakes = || record.wakes.load(Ordering::Relaxed);
    assert!(!each[0].attention());
    apics.signal_msi(msi(0, 0x40));
    apics.signal_msi(msi(0, 0x41));
    assert_eq!(wakes(), 1);
    assert!(each[0].attention() && !each[0].pending());
    let _ = each[0].poll(Now::default());
    assert!(!each[0].attention() && each[0].pending());
    apics.nudge(0);
    assert_eq!(wakes(), 2);
    apics.nudge(7);
}

#[test]
fn software_disabled_apic_takes_nmi_only() {
    let (apics, mut each, _) = machine(1);
    assert_eq!(apics.signal_msi(msi(0, 0x40)), 0);
    assert_eq!(apics.signal_msi(msi(0, 0x400)), 1);
    let events = each[0].poll(Now::default());
    assert!(events.nmi && !events.init);
    write(&mut each[0], LVT_TIMER, 0x30);
    assert_eq!(read(&mut each[0], LVT_TIMER), 0x1_0030, "masked by force");
    each[0].set_base(DEFAULT_BASE).unwrap();
    assert_eq!(apics.signal_msi(msi(0, 0x400)), 0);
    assert!(apics.create(0).is_none());
    drop(each);
    assert_eq!(apics.signal_msi(msi(0, 0x400)), 0);
    assert!(apics.create(0).is_some());
}

#[test]
fn init_and_startup_arrive_in_order() {
    let (_, mut each) = enabled(3);
    let (bsp, rest) = each.split_at_mut(1);
    let mut ipi = |value: u32| write(&mut bsp[0], 0x300, value);
    ipi(0x000C_4607); // start-up for a CPU that was never reset
    ipi(0x000C_4500); // INIT
    ipi(0x000C_8500); // INIT de-assert
    ipi(0x000C_4612); // start-up at 0x12000
    ipi(0x000C_4634); // one more
    for apic in rest {
        let events = apic.poll(Now::default());
        assert_eq!((events.init, events.startup), (true, Some(0x12)));
        apic.init();
        assert_eq!(read(apic, SVR), 0xFF);
        assert_eq!(apic.poll(Now::default()), Default::default());
    }
    assert_eq!(each[0].poll(Now::default()), Default::default());
}

#[test]
fn lowest_priority_goes_to_the_least_busy() {
    let (apics, mut each) = enabled(4);
    let redirected = |vector| MsiMessage {
        address: 0xFEE0_F00C,
        data: vector,
    };
    for (cpu, apic) in (0..).zip(&mut each) {
        write(apic, 0xD0, 1 << (24 + cpu));
        apic.set_cr8(if cpu == 2 { 1 } else { 3 }).unwrap();
    }
    for vector in 0x40..0x50 {
        assert_eq!(apics.signal_msi(redirected(vector)), 1);
    }
    let _ = each[2].poll(Now::default());
    assert_eq!(read(&mut each[2], 0x220), 0xFFFF);
    each[2].set_cr8(3).unwrap();
    for vector in 0x50..0x60 {
        assert_eq!(apics.signal_msi(redirected(vector)), 1);
    }
    for apic in &mut each {
        let _ = apic.poll(Now::default());
        let taken = read(apic, 0x220) >> 16;
        assert_eq!(taken.count_ones(), 4, "spread evenly");
    }
}

#[test]
fn local_sources_follow_their_entries() {
    let (_, mut each) = enabled(1);
    let apic = &mut each[0];
    write(apic, 0x340, 0x400); // performance counter: NMI
    write(apic, 0x350, 0x8055); // LINT0: fixed, level
    write(apic, 0x360, 0x400); // LINT1: NMI
    write(apic, 0x330, 0x1_0066); // thermal: masked
    apic.raise(LocalSource::Thermal);
    assert!(!apic.pending());
    apic.raise(LocalSource::Lint1);
    assert!(apic.poll(Now::default()).nmi);
    apic.raise(LocalSource::Pmi);
    assert!(apic.poll(Now::default()).nmi);
    assert_eq!(read(apic, 0x340), 0x1_0400, "masked by delivery");
    apic.raise(LocalSource::Pmi);
    assert!(!apic.poll(Now::default()).nmi);
    apic.raise(LocalSource::Lint0);
    assert_eq!(apic.acknowledge(), Some(0x55));
}

#[test]
fn timer_modes_interrupt_when_due() {
    let (_, mut each) = enabled(1);
    let apic = &mut each[0];
    let put = |apic: &mut Apic, offset, value: u32, now| {
        apic.mmio_write(offset, &value.to_le_bytes(), now);
    };
    let take = |apic: &mut Apic| {
        let vector = apic.acknowledge();
        apic.end_of_interrupt();
        vector
    };
    put(apic, 0x3E0, 0b1011, at(0, 0));
    put(apic, LVT_TIMER, 0x30, at(0, 0));
    put(apic, 0x380, 500, at(100, 0));
    assert_eq!(apic.next_deadline(), Some(Deadline::Bus(600)));
    let _ = apic.poll(at(599, 0));
    assert!(!apic.pending());
    let _ = apic.poll(at(600, 0));
    assert_eq!((take(apic), apic.next_deadline()), (Some(0x30), None));

    put(apic, LVT_TIMER, 0x2_0031, at(1000, 0));
    put(apic, 0x380, 500, at(1000, 0));
    let _ = apic.poll(at(1500, 0));
    assert_eq!(take(apic), Some(0x31));
    assert_eq!(apic.next_deadline(), Some(Deadline::Bus(2000)));
    put(apic, LVT_TIMER, 0x3_0031, at(1600, 0));
    assert_eq!(apic.next_deadline(), None, "masked");
    let _ = apic.poll(at(2100, 0));
    put(apic, LVT_TIMER, 0x2_0031, at(2200, 0));
    assert!(!apic.pending(), "what expired while masked is lost");
    assert_eq!(apic.next_deadline(), Some(Deadline::Bus(2500)));

    assert_eq!(apic.set_tsc_deadline(9, at(2200, 0)), Ok(()));
    assert_eq!(apic.tsc_deadline(at(2200, 0)), Ok(0), "another mode");
    put(apic, LVT_TIMER, 0x4_0032, at(2200, 0));
    assert_eq!(apic.next_deadline(), None, "disarmed by the change of mode");
    put(apic, 0x380, 500, at(2200, 0));
    assert_eq!(read(apic, 0x380), 0, "ignored in this mode");
    apic.set_tsc_deadline(7000, at(2200, 6000)).unwrap();
    assert_eq!(apic.tsc_deadline(at(2200, 6000)), Ok(7000));
    assert_eq!(apic.next_deadline(), Some(Deadline::Tsc(7000)));
    let _ = apic.poll(at(9000, 7000));
    assert_eq!(take(apic), Some(0x32));
    assert_eq!(apic.tsc_deadline(at(9000, 7000)), Ok(0));
    apic.set_tsc_deadline(1, at(9000, 8000)).unwrap();
    assert_eq!(take(apic), Some(0x32), "in the past: at once");
}

#[test]
fn state_survives_a_round_trip() {
    for x2apic in [false, true] {
        let (apics, mut each) = enabled(2);
        let apic = &mut each[1];
        write(apic, 0xD0, 0x0200_0000);
        write(apic, LVT_TIMER, 0x2_00EC);
        write(apic, 0x3E0, 3);
        write(apic, 0x80, 0x20);
        if x2apic {
            enter_x2apic(apic);
        }
        let now = at(1_000_000, 0);
        let timer = |apic: &mut Apic| apic.next_deadline();
        if x2apic {
            apic.write_msr(0x838, 1000, now).unwrap();
            apic.write_msr(0x830, 0x1234_5678_0000_40F3, now).unwrap();
        } else {
            apic.mmio_write(0x380, &1000u32.to_le_bytes(), now);
        }
        apics.signal_msi(msi(1, 0x8044));
        let _ = apic.poll(now);
        apic.acknowledge().unwrap();
        apics.signal_msi(msi(1, 0x45)); // still in the inbox
        let later = at(1_008_000, 0);
        let saved = apic.page(later);
        let (_, mut others) = enabled(2);
        let other = &mut others[1];
        other.restore_base(apic.base()).unwrap();
        other.set_page(&saved, later);
        assert_eq!(other.page(later), saved);
        assert_eq!(timer(other), timer(apic));
        assert_eq!(other.pending_vector(), apic.pending_vector());
    }
}

#[test]
fn paravirtual_end_of_interrupt_only_where_nothing_else_follows() {
    let (apics, mut each, record) = machine(1);
    let apic = &mut each[0];
    write(apic, SVR, 0x1FF);
    let mut pv = PvEoi::default();
    assert_eq!(pv.set_msr(0x5003), Err(GeneralProtection));
    pv.set_msr(0x5001).unwrap();
    assert_eq!(pv.offer(apic), None, "nothing in service");
    let interrupt = |apic: &mut Apic, data| {
        apics.signal_msi(msi(0, data));
        let _ = apic.poll(Now::default());
        apic.acknowledge().unwrap()
    };
    interrupt(apic, 0x40);
    assert_eq!(pv.offer(apic), Some(0x5000));
    assert_eq!((pv.offer(apic), pv.offered()), (None, Some(0x5000)));
    pv.settle(apic, true);
    assert_eq!(apic.ppr(), 0x40, "the guest has not ended it");
    assert_eq!(pv.offer(apic), Some(0x5000));
    pv.settle(apic, false);
    assert_eq!((apic.ppr(), pv.offered()), (0, None));
    interrupt(apic, 0x8041);
    assert_eq!(pv.offer(apic), None, "level-triggered");
    apic.end_of_interrupt();
    assert_eq!(*record.ended.lock().unwrap(), [0x41]);
}

#[test]
fn clusters_of_x2apic_mode_are_kept_apart() {
    let (apics, mut each) = enabled(255);
    each.iter_mut().for_each(enter_x2apic);
    let taken = |each: &mut Vec<Apic>| -> Vec<usize> {
        let take = |apic: &mut Apic| {
            let _ = apic.poll(Now::default());
            let vector = apic.acknowledge();
            apic.end_of_interrupt();
            vector.is_some()
        };
        let all = each.iter_mut().enumerate();
        all.filter_map(|(cpu, apic)| take(apic).then_some(cpu))
            .collect()
    };
    // An 8-bit logical destination reaches the first cluster only.
    let logical = MsiMessage {
        address: 0xFEE0_5004,
        data: 0x40,
    };
    assert_eq!(apics.signal_msi(logical), 2);
    assert_eq!(taken(&mut each), [0, 2]);
    let send = |each: &mut Vec<Apic>, icr| each[254].write_msr(0x830, icr, Now::default());
    send(&mut each, 0x000F_C001_0000_0840).unwrap();
    assert_eq!(taken(&mut each), [240, 254], "CPU 255 does not exist");
    send(&mut each, 0x0000_00FE_0000_0040).unwrap();
    assert_eq!(taken(&mut each), [254]);
    send(&mut each, 0x0000_00FF_0000_0040).unwrap();
    assert_eq!(taken(&mut each), [0; 0], "no broadcast from 32 bits");
    send(&mut each, 0xFFFF_FFFF_0000_0040).unwrap();
    assert_eq!(taken(&mut each).len(), 255);
    send(&mut each, 0xFFFF_FFFF_000C_0040).unwrap();
    assert_eq!(taken(&mut each).len(), 254);
}
