//! The priority logic against the manual's definitions written out with sets; the clock scale
//! against exact arithmetic.

mod common;

use std::collections::BTreeSet;

use anemone_accel_api::MsiMessage;
use anemone_soft_apic::Now;
use anemone_soft_apic::pv::{Scale, StealTime, SystemTime, WallClock, steal_time_address};
use common::{machine, read, write};
use proptest::prelude::*;

#[derive(Debug, Clone, Copy)]
enum Op {
    Raise(u8),
    Acknowledge,
    End,
    Priority(u8),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (16u8..).prop_map(Op::Raise),
        Just(Op::Acknowledge),
        Just(Op::End),
        any::<u8>().prop_map(Op::Priority),
    ]
}

proptest! {
    #[test]
    fn priorities_are_those_of_the_manual(ops in prop::collection::vec(op(), 1..200)) {
        let (apics, mut each, _) = machine(1);
        let apic = &mut each[0];
        write(apic, 0xF0, 0x1FF);
        let (mut waiting, mut serving) = (BTreeSet::new(), BTreeSet::new());
        let mut tpr = 0;
        for op in ops {
            // SDM 11.8.3.1: the processor priority is the higher of two classes, and what is
            // delivered must be of a class above it.
            let class = |set: &BTreeSet<u8>| set.last().map_or(0, |v| v / 16);
            let ppr_class = class(&serving).max(tpr / 16);
            let next = waiting.last().copied().filter(|v| v / 16 > ppr_class);
            prop_assert_eq!(apic.pending_vector(), next);
            prop_assert_eq!(apic.pending(), next.is_some());
            prop_assert_eq!(apic.ppr() / 16, ppr_class);
            prop_assert_eq!(apic.cr8(), u64::from(tpr / 16));
            match op {
                Op::Raise(vector) => {
                    apics.signal_msi(MsiMessage { address: 0xFEE0_0000, data: vector.into() });
                    prop_assert!(apic.attention());
                    let _ = apic.poll(Now::default());
                    waiting.insert(vector);
                }
                Op::Acknowledge => {
                    prop_assert_eq!(apic.acknowledge(), next);
                    if let Some(vector) = next {
                        waiting.remove(&vector);
                        serving.insert(vector);
                    }
                }
                Op::End => {
                    write(apic, 0xB0, 0);
                    serving.pop_last();
                }
                Op::Priority(value) => {
                    tpr = value;
                    write(apic, 0x80, value.into());
                }
            }
        }
        for vector in 0..=255u8 {
            let place = u64::from(vector / 32) * 16;
            let bit = |word: u32| word >> (vector % 32) & 1 != 0;
            prop_assert_eq!(bit(read(apic, 0x200 + place)), waiting.contains(&vector));
            prop_assert_eq!(bit(read(apic, 0x100 + place)), serving.contains(&vector));
        }
    }

    #[test]
    fn any_access_is_survived(
        accesses in prop::collection::vec((0u64..0x1000, any::<u64>(), any::<u64>()), 1..100),
    ) {
        let (_, mut each, _) = machine(2);
        for (offset, value, bus) in accesses {
            let now = Now { bus, tsc: value };
            let apic = &mut each[0];
            apic.mmio_write(offset & !0xF, &(value as u32).to_le_bytes(), now);
            apic.mmio_read(offset, &mut [0; 8], now);
            let _ = apic.write_msr(0x800 + (offset >> 4) as u32, value, now);
            let _ = apic.set_tsc_deadline(value, now);
            let _ = apic.set_base(value);
            let page = apic.page(now);
            apic.set_page(&page, now);
            let _ = apic.poll(now);
        }
    }

    #[test]
    fn clock_scale_is_exact_to_a_part_in_two_billion(khz in 1u32.., ticks in any::<u64>()) {
        let scale = Scale::from_khz(khz).unwrap();
        prop_assert!(scale.mul >= 1 << 31);
        // At most a day, so that what the guest computes stays below 2^64.
        let ticks = ticks % (u64::from(khz) * 86_400_000).max(1);
        let exact = u128::from(ticks) * 1_000_000 / u128::from(khz);
        let ours = u128::from(scale.nanoseconds(ticks));
        let tolerance = (exact >> 31) + 1_000_000 / u128::from(khz) + 2;
        prop_assert!(ours <= exact && exact - ours <= tolerance, "{ours} {exact} {scale:?}");
    }
}

/// Writes bytes at an offset into a structure.
type Write<'a> = &'a mut dyn FnMut(usize, &[u8]);

#[test]
fn structures_are_laid_out_as_linux_reads_them() {
    let stored = |store: &dyn Fn(Write<'_>), version: usize| {
        let (mut bytes, mut versions) = ([0u8; 64], Vec::new());
        store(&mut |offset, data| {
            bytes[offset..offset + data.len()].copy_from_slice(data);
            versions.push(bytes[version]);
        });
        (bytes, versions)
    };
    let scale = Scale::from_khz(2_000_000).unwrap();
    assert_eq!((scale.mul, scale.shift), (1 << 31, 0));
    assert_eq!(Scale::from_khz(0), None);
    let time = SystemTime {
        tsc: 0x0102,
        nanoseconds: 0x0304,
        scale: Scale {
            mul: 0x8000_0005,
            shift: -2,
        },
        stable: true,
        stopped: false,
    };
    let (bytes, versions) = stored(&|write| time.store(6, write), 0);
    assert_eq!(versions, [7, 7, 8]);
    assert_eq!(bytes[8..18], [2, 1, 0, 0, 0, 0, 0, 0, 4, 3]);
    assert_eq!(bytes[24..32], [5, 0, 0, 0x80, 0xFE, 1, 0, 0]);
    let wall = WallClock::new(5_000_000_007, 2_000_000_000);
    let (bytes, versions) = stored(&|write| wall.store(7, write), 0);
    assert_eq!(versions, [9, 9, 10]);
    assert_eq!(bytes[4..12], [3, 0, 0, 0, 7, 0, 0, 0]);
    let steal = StealTime {
        stolen: 9,
        preempted: true,
    };
    let (bytes, versions) = stored(&|write| steal.store(u32::MAX - 1, write), 8);
    assert_eq!(versions, [0xFF, 0xFF, 0xFF, 0]);
    assert_eq!((bytes[0], bytes[16]), (9, 1));
    assert_eq!(steal_time_address(0x1041), Ok(Some(0x1040)));
    assert!(steal_time_address(0x1003).is_err());
}
