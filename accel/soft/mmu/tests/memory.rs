//! Slots, TLB maintenance, code tracking, the dirty log, atomics, page-crossing accesses.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anemone_accel_api::{Bus, MemorySlot};
use anemone_soft_mmu::{
    ATTENTION_MMU, Access, Context, Fault, Invpcid, Level1, Memory, Mmio, Mmu, Paging, SETS, Set,
    SlotError, cr0, cr4, efer,
};
use common::{FEATURES, Host, Machine, Watch};

const S: Context = Context::Supervisor;
const U: Context = Context::User;

/// Long mode with tables at 0x1000 (PML4), 0x2000, 0x3000, 0x4000 (PT for the first 2 MiB).
fn long_mode(machine: &mut Machine, extra_cr4: u64) {
    machine.poke(0x1000, 0x2007);
    machine.poke(0x2000, 0x3007);
    machine.poke(0x3000, 0x4007);
    machine
        .mmu
        .set_paging(Paging {
            cr0: cr0::PG | cr0::WP | 1,
            cr3: 0x1000,
            cr4: cr4::PAE | cr4::PGE | extra_cr4,
            efer: efer::LMA | efer::NXE,
        })
        .unwrap();
}

fn map(machine: &Machine, linear: u64, entry: u64) {
    machine.poke(0x4000 + (linear >> 12) * 8, entry);
}

#[test]
fn every_width_at_every_offset_of_a_page_border() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, 0);
    // Neighbours in linear memory that are not neighbours in physical memory.
    map(&machine, 0x5000, 0x2_0003);
    map(&machine, 0x6000, 0x1_0003);
    let pattern: Vec<u8> = (1..=32).collect();
    let value: [u8; 32] = pattern.clone().try_into().unwrap();
    for offset in 0..=64u64 {
        let at = 0x5FC0 + offset;
        macro_rules! width {
            ($type:ty, $value:expr, $size:literal) => {
                let value: $type = $value;
                machine.mmu.store(at, value, S).unwrap();
                assert_eq!(machine.mmu.load::<$type>(at, S), Ok(value));
                for i in 0..$size {
                    let byte = machine.mmu.load::<u8>(at + i, S).unwrap();
                    assert_eq!(byte, pattern[i as usize], "byte {i} at {at:#x}");
                    machine.mmu.store(at + i, 0u8, S).unwrap();
                }
            };
        }
        let part = |n: usize| {
            let mut bytes = [0; 16];
            bytes[..n].copy_from_slice(&value[..n]);
            u128::from_le_bytes(bytes)
        };
        width!(u8, part(1) as u8, 1);
        width!(u16, part(2) as u16, 2);
        width!(u32, part(4) as u32, 4);
        width!(u64, part(8) as u64, 8);
        width!(u128, part(16), 16);
        let high = u128::from_le_bytes(value[16..].try_into().unwrap());
        width!([u128; 2], [part(16), high], 32);
    }
}

#[test]
fn a_split_store_writes_nothing_when_its_second_page_faults() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, 0);
    map(&machine, 0x5000, 0x2_0003);
    map(&machine, 0x6000, 0x1_0001);
    let fault = Fault::PageFault {
        address: 0x6000,
        code: 3,
    };
    assert_eq!(machine.mmu.store(0x5FFC, u64::MAX, S), Err(fault));
    assert_eq!(machine.mmu.update::<u64>(0x5FFC, S, |_| 5), Err(fault));
    assert_eq!(machine.peek(0x2_0FF8), 0);
    assert_eq!(machine.peek(0x4000 + 5 * 8) & 0x20, 0x20);
}

#[derive(Default)]
struct Record(Mutex<Vec<(u64, usize, bool)>>);

impl Bus for Record {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0x5A);
        self.0.lock().unwrap().push((address, data.len(), false));
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.0.lock().unwrap().push((address, data.len(), true));
    }
}

#[test]
fn what_is_not_memory_is_left_to_the_bus() {
    let mut machine = Machine::new(0x4000);
    let whole = |physical, size| Mmio {
        physical,
        size,
        length: size,
        rest: 0,
    };
    for _ in 0..2 {
        assert_eq!(
            machine.mmu.load::<u32>(0x9004, S),
            Err(Fault::Mmio(whole(0x9004, 4)))
        );
        assert_eq!(
            machine.mmu.store(0x9004, 1u16, S),
            Err(Fault::Mmio(whole(0x9004, 2)))
        );
        assert!(matches!(machine.mmu.fetch(0x9004, S), Err(Fault::Mmio(_))));
    }
    // Half memory, half bus, unaligned on the bus.
    machine.poke(0x3FF8, 0x0807_0605_0403_0201);
    let Err(Fault::Mmio(mmio)) = machine.mmu.load::<u64>(0x3FFD, S) else {
        panic!()
    };
    assert_eq!((mmio.physical, mmio.length, mmio.rest), (0x3FFD, 3, 0x4000));
    let bus = Record::default();
    assert_eq!(
        machine.mmu.load_mmio::<u64>(&mmio, &bus),
        0x5A5A_5A5A_5A08_0706
    );
    machine.mmu.store_mmio(&mmio, 0u64, &bus);
    assert_eq!(machine.peek(0x3FF8), 0x0005_0403_0201);
    assert_eq!(
        *bus.0.lock().unwrap(),
        [
            (0x4000, 4, false),
            (0x4004, 1, false),
            (0x4000, 4, true),
            (0x4004, 1, true)
        ]
    );
}

#[test]
fn read_only_memory_sends_writes_to_the_bus() {
    let mut machine = Machine::new(0x4000);
    let mut rom = Host::new(0x1000);
    let slot = MemorySlot {
        read_only: true,
        ..rom.slot(1, 0x8000)
    };
    machine.mmu.parked(|| {
        // SAFETY: dropped after the machine's use of it ends.
        unsafe { machine.memory.add_slot(slot).unwrap() }
    });
    assert_eq!(machine.mmu.load::<u64>(0x8000, S), Ok(0));
    assert!(matches!(
        machine.mmu.store(0x8000, 1u64, S),
        Err(Fault::Mmio(_))
    ));
    assert!(matches!(
        machine.mmu.update::<u64>(0x8000, S, |v| v + 1),
        Err(Fault::Mmio(_))
    ));
    assert!(!machine.memory.write(0x8000, &[1]));
    machine.mmu.park();
    machine.memory.remove_slot(1).unwrap();
    // Parked or not, nothing leads to the memory any more.
    assert!(matches!(
        machine.mmu.load::<u64>(0x8000, S),
        Err(Fault::Mmio(_))
    ));
}

#[test]
fn bad_slots_are_refused() {
    let mut host = Host::new(0x4000);
    let good = host.slot(0, 0x10000);
    let memory = Memory::new(Arc::new(Watch::default()));
    let refuse = |slot: MemorySlot, error| {
        // SAFETY: the slot is refused.
        assert_eq!(unsafe { memory.add_slot(slot) }, Err(error));
    };
    refuse(MemorySlot { guest: 1, ..good }, SlotError::Shape(0));
    refuse(MemorySlot { size: 0, ..good }, SlotError::Shape(0));
    refuse(
        MemorySlot {
            guest: !0xFFF,
            ..good
        },
        SlotError::Shape(0),
    );
    refuse(
        MemorySlot {
            size: 0u64.wrapping_sub(4096),
            ..good
        },
        SlotError::Shape(0),
    );
    refuse(
        MemorySlot {
            host: good.host.wrapping_add(8),
            ..good
        },
        SlotError::Shape(0),
    );
    // SAFETY: the memory outlives the slot.
    unsafe { memory.add_slot(good).unwrap() };
    refuse(good, SlotError::Exists(0));
    refuse(
        MemorySlot {
            slot: 1,
            guest: 0x13000,
            ..good
        },
        SlotError::Overlap(1, 0),
    );
    assert_eq!(memory.dirty_log(0), Err(SlotError::NotLogged(0)));
    assert_eq!(memory.remove_slot(9), Err(SlotError::Missing(9)));
}

#[test]
fn translations_stay_until_they_are_invalidated() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, 0);
    let read = |m: &mut Machine, at| m.mmu.load::<u64>(at, S).unwrap();
    machine.poke(0x1_0000, 1);
    machine.poke(0x2_0000, 2);
    for global in [0, 0x100] {
        map(&machine, 0x5000, 0x1_0003 | global);
        machine.mmu.invlpg(0x5000);
        assert_eq!(read(&mut machine, 0x5000), 1);
        map(&machine, 0x5000, 0x2_0003 | global);
        assert_eq!(read(&mut machine, 0x5000), 1, "cached");
        machine.mmu.set_cr3(0x1000).unwrap();
        let expected = if global == 0 { 2 } else { 1 };
        assert_eq!(
            read(&mut machine, 0x5000),
            expected,
            "MOV CR3 keeps global pages only"
        );
        machine.mmu.invpcid(Invpcid::AllNonGlobal);
        assert_eq!(read(&mut machine, 0x5000), expected);
        machine.mmu.invpcid(Invpcid::All);
        assert_eq!(read(&mut machine, 0x5000), 2);
    }
    // A change of CR4.PGE drops global pages.
    map(&machine, 0x5000, 0x1_0103);
    assert_eq!(read(&mut machine, 0x5000), 2);
    let p = machine.mmu.paging();
    machine
        .mmu
        .set_control(p.cr0, p.cr4 ^ cr4::PGE, p.efer)
        .unwrap();
    assert_eq!(read(&mut machine, 0x5000), 1);
}

#[test]
fn pcids_have_translations_of_their_own() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, cr4::PCIDE);
    let keep = 1 << 63;
    machine.poke(0x1_0000, 1);
    machine.poke(0x2_0000, 2);
    let read = |m: &mut Machine| m.mmu.load::<u64>(0x5000, S).unwrap();
    map(&machine, 0x5000, 0x1_0003);
    machine.mmu.set_cr3(0x1001).unwrap();
    assert_eq!(read(&mut machine), 1);
    map(&machine, 0x5000, 0x2_0003);
    machine.mmu.set_cr3(0x1002 | keep).unwrap();
    assert_eq!(machine.mmu.paging().cr3, 0x1002);
    assert_eq!(read(&mut machine), 2);
    machine.mmu.set_cr3(0x1001 | keep).unwrap();
    assert_eq!(read(&mut machine), 1, "PCID 1's is cached still");
    machine.mmu.invpcid(Invpcid::Single(2));
    assert_eq!(read(&mut machine), 1);
    machine.mmu.invpcid(Invpcid::Single(1));
    assert_eq!(read(&mut machine), 2);
    map(&machine, 0x5000, 0x1_0003);
    machine.mmu.set_cr3(0x1001).unwrap();
    assert_eq!(read(&mut machine), 1, "without bit 63 the PCID is flushed");
    // More address spaces than there are numbers in a tag. Old entries are left in place for the
    // moment when the numbers begin again.
    let pages = 0x20..0x30u64;
    for page in pages.clone() {
        map(&machine, page << 12, 0x1_0003);
        assert_eq!(machine.mmu.load::<u64>(page << 12, S), Ok(1));
        map(&machine, page << 12, 0x2_0003);
    }
    for i in 1..4200u64 {
        machine.mmu.set_cr3(0x1000 | (i % 7)).unwrap();
        let page = (0x20 + i).wrapping_sub(4088);
        if pages.contains(&page) {
            assert_eq!(machine.mmu.load::<u64>(page << 12, S), Ok(2), "{i}");
        }
    }
}

#[test]
fn invlpg_drops_all_of_a_large_page() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, 0);
    for (pdpte, pde) in [(0x3007, 0x83), (0x83, 0)] {
        machine.poke(0x2000, pdpte);
        machine.poke(0x3000, pde);
        machine.mmu.flush();
        machine.poke(0x5_0000, 5);
        for page in 0x40..0x60 {
            machine.mmu.load::<u64>(page << 12, S).unwrap();
        }
        // Not present any more.
        machine.poke(0x2000, 0);
        assert_eq!(machine.mmu.load::<u64>(0x5_0000, S), Ok(5));
        machine.mmu.invlpg(0x7_0000);
        for page in 0x40..0x60u64 {
            let found = machine.mmu.load::<u64>(page << 12, S);
            assert_eq!(
                found,
                Err(Fault::PageFault {
                    address: page << 12,
                    code: 0
                })
            );
        }
    }
}

#[test]
fn contexts_do_not_share_rights() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, cr4::SMAP | cr4::SMEP);
    map(&machine, 0x5000, 0x1_0007);
    map(&machine, 0x6000, 0x2_0003);
    let ac = Context::SupervisorAc;
    for _ in 0..2 {
        let fault = |address, code| Err(Fault::PageFault { address, code });
        assert_eq!(machine.mmu.load::<u64>(0x5000, U), Ok(0));
        assert_eq!(machine.mmu.load::<u64>(0x5000, S), fault(0x5000, 1));
        assert_eq!(machine.mmu.load::<u64>(0x5000, ac), Ok(0));
        assert_eq!(machine.mmu.load::<u64>(0x6000, U), fault(0x6000, 5));
        assert_eq!(machine.mmu.load::<u64>(0x6000, S), Ok(0));
        assert_eq!(
            machine.mmu.fetch(0x5000, S).map(|_| 0u64),
            fault(0x5000, 0x11)
        );
        assert!(machine.mmu.fetch(0x5000, U).is_ok());
    }
}

#[test]
fn the_first_write_sets_the_dirty_flag() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, 0);
    map(&machine, 0x5000, 0x1_0003);
    machine.mmu.load::<u8>(0x5000, S).unwrap();
    assert_eq!(machine.peek(0x4028), 0x1_0023);
    machine.mmu.store(0x5000, 1u8, S).unwrap();
    assert_eq!(machine.peek(0x4028), 0x1_0063);
}

#[test]
fn writes_to_code_are_reported_until_the_page_is_released() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, 0);
    // Two linear addresses of one page, both with fast write entries.
    map(&machine, 0x5000, 0x1_0003);
    map(&machine, 0x6000, 0x1_0003);
    machine.mmu.store(0x5000, 1u8, S).unwrap();
    machine.mmu.store(0x6000, 1u8, S).unwrap();
    let reports = |m: &Machine| std::mem::take(&mut *m.watch.0.lock().unwrap());
    for linear in [0x5010, 0x6010] {
        let fetched = machine.mmu.fetch(linear, S).unwrap();
        assert_eq!(fetched.physical, 0x1_0010);
        assert!(machine.mmu.protect_code(fetched.physical));
        machine.mmu.store(linear + 4, 7u32, S).unwrap();
        assert_eq!(reports(&machine), [(Some(0), 0x1_0014, 4)]);
        machine.mmu.store(linear + 4, 8u32, S).unwrap();
        assert_eq!(reports(&machine), [], "the watch had released the page");
    }
    machine.mmu.protect_code(0x1_0000);
    machine.mmu.update::<u16>(0x5020, S, |v| v + 1).unwrap();
    assert_eq!(reports(&machine), [(Some(0), 0x1_0020, 2)]);
    machine.mmu.protect_code(0x1_0000);
    assert!(machine.mmu.write_physical(0xFFFE, &[0; 4]));
    assert_eq!(reports(&machine), [(Some(0), 0x1_0000, 2)]);
    machine.mmu.protect_code(0x1_0000);
    machine.poke(0x1_0000, 0);
    assert_eq!(reports(&machine), [(None, 0x1_0000, 8)]);
    // A page table on a page with code: the walk's own flag is a write.
    map(&machine, 0x7000, 0x3_0003);
    machine.mmu.protect_code(0x4000);
    machine.mmu.load::<u8>(0x7000, S).unwrap();
    assert_eq!(reports(&machine), [(Some(0), 0x4038, 8)]);
    assert!(!machine.mmu.protect_code(0x100_0000), "not memory");
}

/// Ends the vCPU threads also when the test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A vCPU thread that runs `work` between polls until told to stop.
fn vcpu<'s>(
    scope: &'s std::thread::Scope<'s, '_>,
    memory: &Arc<Memory>,
    number: u32,
    stop: &'s AtomicBool,
    mut work: impl FnMut(&mut Mmu) + Send + 's,
) {
    let memory = memory.clone();
    scope.spawn(move || {
        let attention = Arc::new(AtomicU32::new(1 << 31));
        let mut mmu = Mmu::new(memory, number, FEATURES, attention.clone());
        mmu.unpark();
        while !stop.load(Ordering::Relaxed) {
            for _ in 0..50 {
                work(&mut mmu);
            }
            mmu.poll();
        }
        mmu.park();
        assert_eq!(attention.load(Ordering::Relaxed) & !ATTENTION_MMU, 1 << 31);
    });
}

#[test]
fn another_cpus_write_to_code_is_never_missed() {
    let mut machine = Machine::new(0x10_0000);
    let (stop, last) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _end = StopAtEnd(&stop);
        let mut n = 0u64;
        let last = &last;
        vcpu(scope, &machine.memory, 1, &stop, move |mmu| {
            n += 1;
            mmu.store(0x5000, n, S).unwrap();
            last.store(n, Ordering::SeqCst);
        });
        for _ in 0..100 {
            machine.watch.0.lock().unwrap().clear();
            assert!(machine.mmu.protect_code(0x5000));
            let decoded = machine.mmu.load::<u64>(0x5000, S).unwrap();
            // Once a later value is complete, the report of the first one must have come.
            for _ in 0..200_000 {
                if last.load(Ordering::SeqCst) > decoded + 1 {
                    break;
                }
                std::thread::yield_now();
            }
            if last.load(Ordering::SeqCst) > decoded + 1 {
                assert!(!machine.watch.0.lock().unwrap().is_empty());
            }
        }
        machine.mmu.park();
    });
}

#[test]
fn removed_memory_is_not_touched_and_added_memory_is_seen() {
    let mut machine = Machine::new(0x10_0000);
    let stop = AtomicBool::new(false);
    machine.mmu.park();
    std::thread::scope(|scope| {
        let _end = StopAtEnd(&stop);
        for number in [1, 2] {
            vcpu(scope, &machine.memory, number, &stop, |mmu| {
                let _ = mmu.store(0x20_0000, 0x11u8, S);
                let _ = mmu.update::<u64>(0x20_0008, S, |v| v + 1);
                mmu.parked(|| ());
            });
        }
        for _ in 0..300 {
            let mut host = Host::new(0x1000);
            // SAFETY: removed below before it is freed.
            unsafe { machine.memory.add_slot(host.slot(7, 0x20_0000)).unwrap() };
            std::thread::yield_now();
            machine.memory.remove_slot(7).unwrap();
            let after = |host: &mut Host| {
                // SAFETY: the test's own memory.
                unsafe { std::ptr::read_volatile(host.pointer().add(8).cast::<u64>()) }
            };
            // SAFETY: the test's own memory.
            unsafe { std::ptr::write_volatile(host.pointer().add(8).cast::<u64>(), 77) };
            std::thread::yield_now();
            assert_eq!(after(&mut host), 77);
        }
    });
}

#[test]
fn the_dirty_log_has_every_write_once_more() {
    let mut host = Host::new(0x10_0000);
    let slot = MemorySlot {
        log_dirty: true,
        ..host.slot(0, 0)
    };
    let memory = Memory::new(Arc::new(Watch::default()));
    // SAFETY: the memory outlives every user.
    unsafe { memory.add_slot(slot).unwrap() };
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let _end = StopAtEnd(&stop);
        let count = &count;
        vcpu(scope, &memory, 0, &stop, move |mmu| {
            let n = count.load(Ordering::SeqCst) + 1;
            mmu.store(0x4_2000, n, S).unwrap();
            count.store(n, Ordering::SeqCst);
        });
        for _ in 0..500 {
            memory.dirty_log(0).unwrap();
            let before = count.load(Ordering::SeqCst);
            while count.load(Ordering::SeqCst) < before + 2 {
                std::thread::yield_now();
            }
            let log = memory.dirty_log(0).unwrap();
            assert_eq!(log.len(), 4);
            assert_eq!(log[1], 1 << 2);
            assert_eq!(log[0] | log[2] | log[3], 0);
        }
    });
}

#[test]
fn locked_updates_lose_nothing() {
    let machine = Machine::new(0x10_0000);
    let mut own = Mmu::new(machine.memory.clone(), 9, FEATURES, Arc::default());
    let mut machine = machine;
    machine.mmu.park();
    // Aligned, unaligned in a line, across a line, across a page; 16 bytes aligned.
    let places = [0x5000u64, 0x5101, 0x523D, 0x5FFD];
    std::thread::scope(|scope| {
        for number in 0..2 {
            let memory = machine.memory.clone();
            scope.spawn(move || {
                let mut mmu = Mmu::new(memory, number, FEATURES, Arc::default());
                for _ in 0..20_000 {
                    for at in places {
                        mmu.update::<u32>(at, S, |v| v.wrapping_add(1)).unwrap();
                    }
                    mmu.update::<u128>(0x6010, S, |v| v + (1 | 1 << 64))
                        .unwrap();
                    mmu.update::<u8>(0x6001, S, |v| v.wrapping_add(1)).unwrap();
                    mmu.poll();
                }
            });
        }
    });
    for at in places {
        assert_eq!(own.load::<u32>(at, S), Ok(40_000), "{at:#x}");
    }
    assert_eq!(own.load::<u128>(0x6010, S), Ok(40_000 | 40_000 << 64));
    assert_eq!(own.load::<u8>(0x6001, S), Ok(40_000u32 as u8));
    assert_eq!(own.compare_exchange(0x7000, 0u64, 5, S), Ok(0));
    assert_eq!(own.compare_exchange(0x7000, 0u64, 6, S), Ok(5));
    assert_eq!(own.load::<u64>(0x7000, S), Ok(5));
}

#[test]
fn the_layout_for_translated_code_holds() {
    let mut machine = Machine::new(0x10_0000);
    long_mode(&mut machine, 0);
    map(&machine, 0x5000, 0x1_0007);
    machine.mmu.store(0x5008, 1u8, U).unwrap();
    let fetched = machine.mmu.fetch(0x5008, U).unwrap().physical;
    let table = machine.mmu.level1().cast::<u8>();
    let word = |offset: usize| {
        // SAFETY: offsets within the table, which the machine keeps.
        unsafe { table.add(offset).cast::<u64>().read() }
    };
    let set = |access| Level1::array_offset(access, U) + 5 % SETS * size_of::<Set>();
    for access in [Access::Write, Access::Fetch] {
        assert_eq!(word(set(access)), 0x5000 | word(Level1::ID_OFFSET));
    }
    assert_eq!(word(set(Access::Read)), 0, "nothing was read");
    let host = word(set(Access::Write) + 16).wrapping_add(0x5008);
    assert_eq!(host, machine.host.pointer() as u64 + 0x1_0008);
    assert_eq!(word(set(Access::Fetch) + 16).wrapping_add(0x5008), fetched);
    machine.mmu.park();
    assert_eq!(
        word(Level1::ID_OFFSET),
        4095,
        "nothing matches while parked"
    );
}

#[test]
fn paging_off_wraps_at_32_bits() {
    let mut machine = Machine::new(0x4000);
    assert_eq!(
        machine.mmu.translate(0x1_0000_1234, Access::Read, S),
        Ok(0x1234)
    );
    machine.poke(0, 0xAB);
    let Err(Fault::Mmio(mmio)) = machine.mmu.load::<u16>(0xFFFF_FFFF, S) else {
        panic!()
    };
    assert_eq!((mmio.physical, mmio.rest), (0xFFFF_FFFF, 0));
}
