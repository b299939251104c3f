//! Random page tables: the MMU against a slow reference, and against the host's KVM.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::sync::Arc;

use anemone_accel_api::MemorySlot;
use anemone_soft_mmu::{Access, Context, Fault, Features, Mmu, Paging, cr0, cr4, efer};
use common::{FEATURES, Host, Machine, Random, reference};

const SIZE: usize = 16 * 4096;
const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Fetch];
const CONTEXTS: [Context; 3] = [Context::User, Context::Supervisor, Context::SupervisorAc];

/// An entry that mostly leads somewhere in memory and sometimes is nonsense.
fn entry(random: &mut Random, width: usize) -> u64 {
    let mut entry = random.below(SIZE as u64 / 4096 + 1) << 12;
    entry |= random.next() & 0xF7F;
    for (bit, odds) in [(0, 12), (1, 3), (2, 3)] {
        entry |= u64::from(!random.one_in(odds)) << bit;
    }
    if random.one_in(4) {
        // A large page, most often well aligned.
        entry |= 0x80;
        if !random.one_in(4) {
            entry &= !0x3F_F000;
        }
    }
    if width == 8 {
        entry |= u64::from(random.one_in(8)) << 63;
        if random.one_in(8) {
            entry |= 1 << (32 + random.below(31));
        }
    }
    if random.one_in(64) {
        random.next()
    } else {
        entry
    }
}

fn fill(random: &mut Random, width: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SIZE);
    while bytes.len() < SIZE {
        let value = entry(random, width).to_le_bytes();
        bytes.extend_from_slice(&value[..width]);
    }
    bytes
}

fn paging(random: &mut Random) -> Paging {
    let mut paging = Paging {
        cr0: 1 | u64::from(!random.one_in(16)) << 31 | u64::from(random.one_in(2)) << 16,
        cr3: random.below(SIZE as u64 / 4096) << 12,
        cr4: 0,
        efer: u64::from(random.one_in(2)) * efer::NXE,
    };
    for bits in [cr4::PSE, cr4::PGE, cr4::SMEP, cr4::SMAP] {
        paging.cr4 |= u64::from(random.one_in(2)) * bits;
    }
    match random.below(4) {
        0 => {}
        1 => paging.cr4 |= cr4::PAE,
        _ if paging.cr0 & cr0::PG != 0 => {
            paging.cr4 |= cr4::PAE;
            paging.efer |= efer::LMA;
        }
        _ => {}
    }
    paging
}

fn linear(random: &mut Random, paging: Paging) -> u64 {
    let value = random.next();
    if paging.efer & efer::LMA != 0 {
        ((value << 16) as i64 >> 16) as u64
    } else {
        value & 0xFFFF_FFFF
    }
}

/// The PDPTE registers as the tables define them; `None` where the load of CR3 faults.
fn pdptes(memory: &[u8], features: Features, paging: Paging) -> Option<[u64; 4]> {
    let mut pdptes = [0; 4];
    for (i, pdpte) in pdptes.iter_mut().enumerate() {
        let at = (paging.cr3 & 0xFFFF_FFE0) as usize + 8 * i;
        *pdpte = u64::from_le_bytes(memory[at..at + 8].try_into().unwrap());
        let reserved = !0 << features.physical_bits | 0x1E6;
        if *pdpte & 1 != 0 && *pdpte & reserved != 0 {
            return None;
        }
    }
    Some(pdptes)
}

fn read_all(host: *const u8) -> Vec<u8> {
    // SAFETY: the tests' memory of this size, which no guest is running on.
    unsafe { std::slice::from_raw_parts(host, SIZE).to_vec() }
}

#[test]
fn random_tables_translate_as_the_manual_says() {
    let seed = std::env::var("ANEMONE_SEED").map_or(1, |s| s.parse().unwrap());
    let mut random = Random(seed);
    let (mut good, mut codes) = (0u64, [0u64; 32]);
    for round in 0..1200 {
        let mut machine = Machine::new(SIZE);
        let mut paging = paging(&mut random);
        let width = if paging.cr4 & cr4::PAE == 0 { 4 } else { 8 };
        let mut memory = fill(&mut random, width);
        let pae = paging.cr0 & cr0::PG != 0 && width == 8 && paging.efer & efer::LMA == 0;
        if pae && !random.one_in(8) {
            // Entries that the load accepts.
            for i in 0..4 {
                let at = paging.cr3 as usize + 8 * i;
                let entry = random.below(16) << 12 | u64::from(!random.one_in(8));
                memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
            }
        }
        assert!(machine.memory.write(0, &memory));
        let registers = if pae {
            pdptes(&memory, FEATURES, paging)
        } else {
            Some([0; 4])
        };
        let set = machine.mmu.set_paging(paging);
        assert_eq!(
            set.is_ok(),
            registers.is_some(),
            "seed {seed} round {round}"
        );
        let Some(registers) = registers else { continue };
        for case in 0..150 {
            let what = format!("seed {seed} round {round} case {case}");
            let linear = linear(&mut random, paging);
            let access = ACCESSES[random.below(3) as usize];
            let context = CONTEXTS[random.below(3) as usize];
            // What an earlier case cached is checked elsewhere; some cases leave it in.
            if random.one_in(2) {
                machine.mmu.flush();
            }
            if random.one_in(16) {
                paging.cr0 ^= cr0::WP;
                machine
                    .mmu
                    .set_control(paging.cr0, paging.cr4, paging.efer)
                    .unwrap();
            }
            let expected = reference(
                &mut memory,
                FEATURES,
                paging,
                registers,
                linear,
                access,
                context,
            );
            let found = machine.mmu.translate(linear, access, context);
            match (expected, found) {
                (Ok((physical, _)), Ok(found)) => {
                    assert_eq!(physical, found, "{what} {linear:#x}");
                    good += 1;
                }
                (Err(code), Err(fault)) => {
                    assert_eq!(
                        fault,
                        Fault::PageFault {
                            address: linear,
                            code
                        },
                        "{what}"
                    );
                    codes[code as usize] += 1;
                }
                (e, f) => panic!(
                    "{what}: {linear:#x} {access:?} {context:?} {paging:x?}: reference {e:x?}, here {f:x?}"
                ),
            }
            if random.one_in(8) {
                let mut all = vec![0; SIZE];
                assert!(machine.memory.read(0, &mut all));
                assert!(all == memory, "{what}: accessed and dirty flags differ");
            }
        }
    }
    let kinds: Vec<_> = (0..32).filter(|&c| codes[c] != 0).collect();
    assert!(good > 5_000, "{good} good translations");
    assert_eq!(kinds.len(), 18, "every error code is met: {kinds:?}");
}

#[test]
fn random_tables_and_accesses_stay_inside_memory() {
    let mut random = Random(7);
    for _ in 0..400 {
        let mut machine = Machine::new(SIZE);
        let mut paging = paging(&mut random);
        let width = if paging.cr4 & cr4::PAE == 0 { 4 } else { 8 };
        machine.memory.write(0, &fill(&mut random, width));
        if machine.mmu.set_paging(paging).is_err() {
            paging.cr0 = 1;
            machine.mmu.set_paging(paging).unwrap();
        }
        let bases: Vec<u64> = (0..24).map(|_| linear(&mut random, paging)).collect();
        for _ in 0..2000 {
            let base = bases[random.below(24) as usize];
            let address = if random.one_in(3) { base | 0xFFF } else { base };
            let address = if random.one_in(50) { u64::MAX } else { address };
            let context = CONTEXTS[random.below(3) as usize];
            let value = random.next();
            let mmu = &mut machine.mmu;
            // The stores change the very tables that are walked.
            let _ = match random.below(10) {
                0 => mmu.load::<u8>(address, context).map(drop),
                1 => mmu.load::<u64>(address, context).map(drop),
                2 => mmu.load::<[u128; 2]>(address, context).map(drop),
                3 => mmu.store(address, value as u8, context),
                4 => mmu.store(address, value as u32, context),
                5 => mmu.store(address, [u128::from(value); 2], context),
                6 => mmu.update::<u64>(address, context, |v| v ^ value).map(drop),
                7 => mmu.update::<u128>(address, context, |v| v + 1).map(drop),
                8 => mmu.fetch(address, context).map(|f| {
                    mmu.protect_code(f.physical);
                }),
                _ => {
                    match random.below(3) {
                        0 => mmu.invlpg(address),
                        1 => drop(mmu.set_cr3(value & 0xF000)),
                        _ => mmu.flush(),
                    }
                    Ok(())
                }
            };
        }
        assert!(machine.host.guards_intact());
    }
}

/// KVM_TRANSLATE with 4-level paging: no rights are checked, but presence and reserved bits are,
/// and accessed flags are set. (Emulating KVMs translate nothing but 4-level paging.)
#[test]
fn random_tables_translate_as_in_the_hosts_kvm() {
    let kvm = match kvm_ioctls::Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => {
            let allowed = std::env::var("ANEMONE_ALLOW_MISSING").unwrap_or_default();
            assert!(
                allowed.split(',').any(|name| name == "kvm"),
                "/dev/kvm: {e}; to go on without it set ANEMONE_ALLOW_MISSING=kvm"
            );
            return;
        }
    };
    let cpuid = kvm.get_supported_cpuid(256).unwrap();
    let leaf = |function| cpuid.as_slice().iter().find(|e| e.function == function);
    let bits = leaf(0x8000_0008).map_or(36, |e| (e.eax & 0xFF) as u8);
    let features = Features {
        physical_bits: bits,
        gigabyte_pages: leaf(0x8000_0001).is_some_and(|e| e.edx >> 26 & 1 != 0),
    };
    let vm = kvm.create_vm().unwrap();
    let mut host = Host::new(SIZE);
    let slot: MemorySlot = host.slot(0, 0);
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: SIZE as u64,
        userspace_addr: slot.host as u64,
    };
    // SAFETY: the memory outlives the VM.
    unsafe { vm.set_user_memory_region(region).unwrap() };
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&cpuid).unwrap();
    let reset = vcpu.get_sregs().unwrap();
    let mut random = Random(3);
    let (mut good, mut bad) = (0, 0);
    for round in 0..150 {
        let mut sregs = reset;
        let mut memory = fill(&mut random, 8);
        for at in (0..SIZE).step_by(8) {
            let mut entry = u64::from_le_bytes(memory[at..at + 8].try_into().unwrap());
            if random.one_in(4) {
                entry |= 7;
            }
            // AMD reserves the G bit in the two highest levels.
            entry &= !0x100;
            memory[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        // SAFETY: the guest does not run; the range is the test's own.
        unsafe { std::ptr::copy_nonoverlapping(memory.as_ptr(), slot.host, SIZE) };
        let paging = Paging {
            cr0: 0x8000_0031,
            cr3: random.below(16) << 12,
            cr4: cr4::PAE,
            efer: efer::LMA | 1 << 8 | (u64::from(random.one_in(2)) * efer::NXE),
        };
        (sregs.cr0, sregs.cr3) = (paging.cr0, paging.cr3);
        (sregs.cr4, sregs.efer) = (paging.cr4, paging.efer);
        (sregs.cs.l, sregs.cs.db, sregs.cs.type_) = (1, 0, 11);
        (sregs.cs.s, sregs.cs.present) = (1, 1);
        vcpu.set_sregs(&sregs).unwrap();
        let machine = Machine::new(SIZE);
        machine.memory.write(0, &memory);
        let mut mmu = Mmu::new(machine.memory.clone(), 1, features, Arc::default());
        let mut machine = machine;
        machine.mmu.park();
        mmu.set_paging(paging).unwrap();
        for _ in 0..40 {
            let linear = linear(&mut random, paging);
            let here = mmu.translate(linear, Access::Read, Context::Supervisor);
            let kvm = vcpu.translate_gva(linear).unwrap();
            let what = format!("round {round} linear {linear:#x} {paging:x?} here {here:x?}");
            assert_eq!(here.is_ok(), kvm.valid != 0, "{what}");
            if let Ok(physical) = here {
                assert_eq!(physical, kvm.physical_address, "{what}");
                good += 1;
                let mut own = vec![0; SIZE];
                assert!(machine.memory.read(0, &mut own));
                let theirs = read_all(slot.host);
                assert!(own == theirs, "{what}: accessed flags differ");
            } else {
                bad += 1;
                // What a failed walk leaves behind is not defined: start the tables anew.
                machine.memory.write(0, &read_all(slot.host));
                mmu.flush();
            }
        }
    }
    assert!(good > 300 && bad > 300, "{good} translated, {bad} did not");
}
