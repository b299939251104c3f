//! Cost of memory accesses through the software MMU: nanoseconds each, median of nine runs.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anemone_accel_api::MemorySlot;
use anemone_soft_mmu::{
    CodeWatch, Context, Features, Memory, Mmu, PAGE_SIZE, Paging, SETS, cr0, cr4, efer,
};

struct Ignore;

impl CodeWatch for Ignore {
    fn code_written(&self, memory: &Memory, _: Option<u32>, physical: u64, _: usize) {
        memory.release_code(physical);
    }
}

const SIZE: u64 = 64 << 20;
/// Linear memory begins here; the tables lie below.
const BASE: u64 = 1 << 20;
const S: Context = Context::Supervisor;
const ACCESSES: u64 = 4_000_000;

/// Prints the cost of `ACCESSES` accesses that `work` makes.
fn measure(what: &str, mmu: &mut Mmu, mut work: impl FnMut(&mut Mmu)) {
    work(mmu);
    let before = mmu.statistics();
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let start = Instant::now();
            work(mmu);
            start.elapsed().as_secs_f64() * 1e9 / ACCESSES as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let after = mmu.statistics();
    let each = |n: u64| n as f64 / (9 * ACCESSES) as f64;
    println!(
        "{what:44} {:7.2} ns {:8.1} M/s  misses {:.3}  walks {:.3}",
        times[4],
        1000.0 / times[4],
        each(after.misses - before.misses),
        each(after.walks - before.walks)
    );
}

fn load(mmu: &mut Mmu, at: u64) -> u64 {
    mmu.load::<u64>(at, S).unwrap_or(0)
}

fn store(mmu: &mut Mmu, at: u64, value: u64) {
    let _ = black_box(mmu.store(at, value, S));
}

fn main() {
    let layout = std::alloc::Layout::from_size_align(SIZE as usize, 4096);
    let Ok(layout) = layout else { return };
    let memory = Memory::new(Arc::new(Ignore));
    let slot = MemorySlot {
        slot: 0,
        guest: 0,
        size: SIZE,
        // SAFETY: the size is not zero.
        host: unsafe { std::alloc::alloc_zeroed(layout) },
        read_only: false,
        log_dirty: false,
    };
    // SAFETY: the allocation is never freed.
    if unsafe { memory.add_slot(slot) }.is_err() {
        return;
    }
    let poke = |at: u64, value: u64| memory.write(at, &value.to_le_bytes());
    poke(0x1000, 0x2003);
    poke(0x2000, 0x3003);
    for table in 0..SIZE >> 21 {
        poke(0x3000 + table * 8, 0x4003 + table * 0x1000);
        for page in 0..512 {
            poke(
                0x4000 + table * 0x1000 + page * 8,
                table << 21 | page << 12 | 3,
            );
        }
    }
    let features = Features {
        physical_bits: 40,
        gigabyte_pages: true,
    };
    let mut mmu = Mmu::new(memory, 0, features, Arc::default());
    let paging = Paging {
        cr0: cr0::PG | cr0::WP | 1,
        cr3: 0x1000,
        cr4: cr4::PAE | cr4::PGE,
        efer: efer::LMA | efer::NXE,
    };
    if mmu.set_paging(paging).is_err() {
        return;
    }

    println!("level 1: {SETS} sets of 2");
    measure("load, one page, dependent", &mut mmu, |mmu| {
        let mut at = BASE;
        for _ in 0..ACCESSES {
            // The value is zero; the address depends on it.
            at = BASE + ((at + 8) & 0xFF8) + load(mmu, at);
        }
        black_box(at);
    });
    measure("load, one page, independent", &mut mmu, |mmu| {
        let mut sum = 0;
        for i in 0..ACCESSES {
            sum += load(mmu, BASE + ((i * 8) & 0xFF8));
        }
        black_box(sum);
    });
    measure("store, one page", &mut mmu, |mmu| {
        for i in 0..ACCESSES {
            store(mmu, BASE + ((i * 8) & 0xFF8), 0);
        }
    });
    measure("load and store, copy, no collision", &mut mmu, |mmu| {
        for i in 0..ACCESSES / 2 {
            let value = load(mmu, BASE + ((i * 8) & 0xFF8));
            store(mmu, BASE + 0x5000 + ((i * 8) & 0xFF8), value);
        }
    });
    // Distances at which everything falls into the same set.
    let far = SETS as u64 * PAGE_SIZE;
    for (name, ways) in [
        ("copy", 1),
        ("2 sources", 2),
        ("3 sources", 3),
        ("4 sources", 4),
    ] {
        measure(&format!("colliding: {name}"), &mut mmu, |mmu| {
            for i in 0..ACCESSES / (ways + 1) {
                let at = BASE + ((i * 8) & 0xFF8);
                let value = (0..ways).map(|way| load(mmu, at + (way + 1) * far)).sum();
                store(mmu, at, value);
            }
        });
    }
    for pages in [256, 512, 1024, 2048, 4096, 8192] {
        measure(&format!("load, {pages} pages in turn"), &mut mmu, |mmu| {
            let mut sum = 0;
            for i in 0..ACCESSES {
                sum += load(mmu, BASE + i % pages * PAGE_SIZE);
            }
            black_box(sum);
        });
    }
    measure("load across a page", &mut mmu, |mmu| {
        for _ in 0..ACCESSES {
            black_box(load(mmu, BASE + 0xFFC));
        }
    });
    measure("locked add", &mut mmu, |mmu| {
        for _ in 0..ACCESSES {
            let _ = black_box(mmu.update::<u64>(BASE, S, |v| v + 1));
        }
    });
    let flushes = 200_000;
    let start = Instant::now();
    for _ in 0..flushes {
        let _ = black_box(mmu.set_cr3(0x1000));
    }
    println!(
        "MOV CR3: {:.1} ns",
        start.elapsed().as_secs_f64() * 1e9 / f64::from(flushes)
    );
    let start = Instant::now();
    for _ in 0..flushes {
        mmu.invlpg(black_box(BASE));
    }
    println!(
        "INVLPG: {:.1} ns",
        start.elapsed().as_secs_f64() * 1e9 / f64::from(flushes)
    );
}
