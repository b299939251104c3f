//! A random guest: memory with structures that are nearly right, and registers.

use anemone_accel_api::{DescriptorTable, Regs, Segment, Sregs};

use crate::code;
use crate::random::Random;

/// Bytes of RAM at address 0.
pub const RAM: usize = 256 << 10;
/// Read-only memory.
pub const ROM: (u64, usize) = (0xF_0000, 16 << 10);
/// More RAM beyond 4 GiB.
pub const HIGH: (u64, usize) = (1 << 32, 16 << 10);

const GDT: usize = 0x1000;
const IDT: usize = 0x2000;
const TSS: usize = 0x3000;
/// Paging structures: PML4, PDPT, PD, PT.
const TABLES: [usize; 4] = [0x4000, 0x5000, 0x6000, 0x7000];
const CODE: usize = 0x1_0000;
const CODE_SIZE: usize = 0x4000;
/// Page number for start-up messages: the code.
pub const STARTUP_PAGE: u32 = (CODE >> 12) as u32;
const STACK: u64 = 0x3_0000;

/// Modes that a guest starts in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Real,
    Protected16,
    Protected32,
    Paged32,
    Pae,
    Compatibility,
    Long,
}

fn put(memory: &mut [u8], at: usize, value: u64) {
    memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Fills the memory of a guest and gives the registers it starts with.
///
/// `cr4` are the bits of CR4 beyond the oldest that the CPU model has.
pub fn make(random: &mut Random, memory: &mut [u8], cr4: u64) -> (Regs, Sregs) {
    memory.fill(0);
    let mode = match random.below(10) {
        0 => Mode::Real,
        1 => Mode::Protected16,
        2 => Mode::Protected32,
        3 => Mode::Paged32,
        4 => Mode::Pae,
        5 => Mode::Compatibility,
        _ => Mode::Long,
    };
    let mut text = Vec::new();
    while text.len() < CODE_SIZE - 64 {
        code::instruction(random, &mut text);
    }
    // Back to the start: JMP rel32.
    text.push(0xE9);
    let back = -(text.len() as i32 + 4);
    text.extend(back.to_le_bytes());
    text.truncate(CODE_SIZE);
    memory[CODE..CODE + text.len()].copy_from_slice(&text);
    descriptors(random, memory, mode);
    paging(random, memory, mode);
    (general(random, mode), system(random, mode, cr4))
}

fn descriptors(random: &mut Random, memory: &mut [u8], mode: Mode) {
    let wide = |dpl: u64, code: bool, bits: u64| {
        let kind = if code { 0xB } else { 3 };
        0xFFFF | (0x90 | kind | dpl << 5) << 40 | 0xF << 48 | bits << 52
    };
    // Selectors 08 to 30: code and data at level 0, then 3, then 16-bit and 64-bit code.
    let table = [
        0,
        wide(0, true, if mode == Mode::Long { 0xA } else { 0xC }),
        wide(0, false, 0xC),
        wide(3, true, if mode == Mode::Long { 0xA } else { 0xC }),
        wide(3, false, 0xC),
        wide(0, true, 0x8),
        wide(0, true, 0xA),
        0x67 | (TSS as u64) << 16 | 0x89 << 40,
        0,
    ];
    for (n, descriptor) in table.into_iter().enumerate() {
        let value = if random.once_in(20) {
            descriptor ^ 1 << random.below(64)
        } else {
            descriptor
        };
        put(memory, GDT + 8 * n, value);
    }
    for n in 0..32 {
        put(memory, GDT + 0x48 + 8 * n, random.bits());
    }
    let long = matches!(mode, Mode::Long | Mode::Compatibility);
    for n in 0..256 {
        let target = (CODE as u64) + random.below(CODE_SIZE as u64);
        let dpl = if random.once_in(4) { 3 } else { 0 };
        let kind = random.pick(&[0xE, 0xE, 0xE, 0xF, 6, 5]);
        let ist = if random.once_in(8) {
            random.below(8)
        } else {
            0
        };
        let selector = if long { 0x30 } else { 0x08 };
        let low = target & 0xFFFF
            | selector << 16
            | ist << 32
            | (0x80 | dpl << 5 | kind) << 40
            | (target >> 16 & 0xFFFF) << 48;
        if long {
            put(memory, IDT + 16 * n, low);
            put(memory, IDT + 16 * n + 8, 0);
        } else if n < 128 {
            put(memory, IDT + 8 * n, low);
        }
    }
    for n in 0..13 {
        put(memory, TSS + 4 + 8 * n, STACK - 0x800 * n as u64);
    }
    put(memory, TSS + 0x60, 0x68 << 48);
}

fn paging(random: &mut Random, memory: &mut [u8], mode: Mode) {
    let pages = RAM as u64 / 0x1000;
    let mut entry = |plain: u64| -> u64 {
        match random.below(24) {
            0 => random.bits(),
            1 => plain ^ 1 << random.below(12),
            2 => plain | 1 << 63,
            3 => plain | 1 << (40 + random.below(12)),
            4 => plain & 0xFFF | (ROM.0 + (random.below(4) << 12)),
            5 => plain & 0xFFF | (HIGH.0 + (random.below(4) << 12)),
            6 => plain & 0xFFF | 0xFEE0_0000,
            7 => plain & 0xFFF | ((1 << 30) + (random.below(16) << 12)),
            8 => plain & 0xFFF | random.below(pages) << 12,
            _ => plain,
        }
    };
    if mode == Mode::Paged32 {
        for n in 0..1024 {
            let pde = if n == 0 {
                TABLES[1] as u64 | 7
            } else {
                entry((n << 22) | 0x87)
            };
            let pte = entry((n % pages) << 12 | 7);
            let at = 4 * n as usize;
            memory[TABLES[0] + at..][..4].copy_from_slice(&(pde as u32).to_le_bytes());
            memory[TABLES[1] + at..][..4].copy_from_slice(&(pte as u32).to_le_bytes());
        }
        return;
    }
    for n in 0..512u64 {
        let at = 8 * n as usize;
        let (top, second, third) = if n == 0 {
            (
                TABLES[1] as u64 | 7,
                TABLES[2] as u64 | 7,
                TABLES[3] as u64 | 7,
            )
        } else {
            (
                entry(TABLES[1] as u64 | 7),
                entry(n << 30 | 0x87),
                entry(n << 21 | 0x87),
            )
        };
        put(memory, TABLES[0] + at, top);
        put(memory, TABLES[1] + at, second);
        put(memory, TABLES[2] + at, third);
        put(memory, TABLES[3] + at, entry((n % pages) << 12 | 7));
    }
    if mode == Mode::Pae {
        for n in 0..4 {
            put(memory, TABLES[1] + 8 * n, TABLES[2] as u64 | 1);
        }
    }
    // The code itself stays where it is, mostly.
    for page in (CODE / 0x1000)..((CODE + CODE_SIZE) / 0x1000) {
        put(memory, TABLES[3] + 8 * page, (page as u64) << 12 | 7);
    }
}

fn general(random: &mut Random, mode: Mode) -> Regs {
    let mut value = || code::value(random);
    let mut regs = Regs {
        rax: value(),
        rbx: value(),
        rcx: value(),
        rdx: value(),
        rsi: value(),
        rdi: value(),
        rbp: value(),
        r8: value(),
        r9: value(),
        r10: value(),
        r11: value(),
        r12: value(),
        r13: value(),
        r14: value(),
        r15: value(),
        rsp: STACK,
        rip: CODE as u64,
        rflags: 2,
    };
    if random.once_in(2) {
        regs.rflags |= random.bits() & 0x0024_7ED5;
    }
    if mode == Mode::Real {
        regs.rip = 0;
        regs.rsp = 0xFFF0;
    }
    regs
}

fn system(random: &mut Random, mode: Mode, cr4: u64) -> Sregs {
    let flat = |selector: u16, kind: u8| Segment {
        base: 0,
        limit: 0xFFFF_FFFF,
        selector,
        kind,
        present: true,
        dpl: (selector & 3) as u8,
        big: !matches!(mode, Mode::Long | Mode::Protected16) || kind == 3,
        code_or_data: true,
        long: mode == Mode::Long && kind == 0xB,
        granularity: true,
        available: false,
    };
    let user = mode != Mode::Real && random.once_in(4);
    let (code, data) = if user { (0x1B, 0x23) } else { (0x08, 0x10) };
    let mut sregs = Sregs {
        cs: flat(code, 0xB),
        ds: flat(data, 3),
        es: flat(data, 3),
        fs: flat(data, 3),
        gs: flat(data, 3),
        ss: flat(data, 3),
        tr: Segment {
            base: TSS as u64,
            limit: 0x67,
            selector: 0x38,
            kind: 0xB,
            present: true,
            ..Segment::default()
        },
        gdt: DescriptorTable {
            base: GDT as u64,
            limit: 0x147,
        },
        idt: DescriptorTable {
            base: IDT as u64,
            limit: 0xFFF,
        },
        cr0: 0x11 | random.bits() & 0x5_002E,
        cr3: TABLES[0] as u64,
        cr4: 0x600 | random.bits() & (cr4 | 0xDC),
        apic_base: 0xFEE0_0900,
        ..Sregs::default()
    };
    if random.once_in(2) {
        // XSAVE and AVX are worth having, and nothing to be in their way.
        sregs.cr4 |= cr4 & 1 << 18;
        sregs.cr0 &= !0xC;
    }
    match mode {
        Mode::Real => {
            sregs.cr0 &= !1;
            for segment in [
                &mut sregs.cs,
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
                &mut sregs.ss,
            ] {
                *segment = Segment {
                    base: CODE as u64,
                    limit: 0xFFFF,
                    selector: (CODE >> 4) as u16,
                    kind: 3,
                    present: true,
                    code_or_data: true,
                    ..Segment::default()
                };
            }
            sregs.idt = DescriptorTable {
                base: 0,
                limit: 0x3FF,
            };
        }
        Mode::Protected16 | Mode::Protected32 => {}
        Mode::Paged32 => sregs.cr0 |= 1 << 31,
        Mode::Pae => {
            sregs.cr0 |= 1 << 31;
            sregs.cr4 |= 1 << 5;
            sregs.cr3 = TABLES[1] as u64;
        }
        Mode::Compatibility | Mode::Long => {
            sregs.cr0 |= 1 << 31;
            sregs.cr4 |= 1 << 5;
            sregs.efer = 0xD01;
        }
    }
    sregs
}
