//! Random code: mostly instructions, some of them meant to hurt, and some noise.

use crate::random::Random;

/// System and other awkward instructions. `%` stands for a random byte.
const AWKWARD: &[&[u8]] = &[
    b"\x0F\x01%", // LGDT, LIDT, SGDT, SWAPGS, XGETBV, XSETBV, INVLPG, RDTSCP, ...
    b"\x0F\x00%", // LTR, LLDT, VERR, ...
    b"\x0F\x20%", // MOV from CR
    b"\x0F\x22%", // MOV to CR
    b"\x0F\x21%",
    b"\x0F\x23%",    // MOV to DR
    b"\x0F\x30",     // WRMSR
    b"\x0F\x32",     // RDMSR
    b"\x0F\xA2",     // CPUID
    b"\x0F\x05",     // SYSCALL
    b"\x48\x0F\x07", // SYSRET
    b"\x0F\x34",     // SYSENTER
    b"\x48\x0F\x35", // SYSEXIT
    b"\x48\xCF",     // IRETQ
    b"\xCF",
    b"\xCD%", // INT n
    b"\xCC",
    b"\xF4", // HLT
    b"\xFB",
    b"\xFA",
    b"\x9C",
    b"\x9D",      // POPF
    b"\x8E%",     // MOV Sreg
    b"\x0F\xB2%", // LSS
    b"\x48\xCB",  // RETFQ
    b"\xFF%",     // INC, DEC, CALL, JMP, PUSH, far ones
    b"\xE4%",
    b"\xEE",
    b"\x6C",
    b"\xF3\x6F",     // REP OUTSD
    b"\xF3\xA4",     // REP MOVSB
    b"\xF3\x48\xAB", // REP STOSQ
    b"\xF2\xAE",     // REPNE SCASB
    b"\xF3\xA6",     // REPE CMPSB
    b"\xFD",
    b"\xFC",
    b"\x0F\xAE%",         // FXSAVE, XSAVE, LDMXCSR, fences, ...
    b"\x0F\xC7%",         // CMPXCHG8B, RDRAND, XSAVEC, ...
    b"\xF0\x48\x0F\xC7%", // LOCK CMPXCHG16B
    b"\xF0\x0F\xB1%",
    b"\xF0\x48\x0F\xC1%",
    b"\x66\x0F\x38\x82%", // INVPCID
    b"\xC8%%%",           // ENTER
    b"\xD9%",
    b"\xDD%",
    b"\xDB%",
    b"\xC4\xE2%\x92%%", // gathers
    b"\xC4\xE2%\x8E%",  // VMASKMOV
    b"\x0F\x09",
    b"\x0F\x06",
    b"\xE2%",
    b"\xE3%",
    b"\xEA%%%%%%",
    b"\x9A%%%%%%",
];

/// Values that registers, immediates and displacements like to have.
pub fn value(random: &mut Random) -> u64 {
    match random.below(12) {
        0 => 0,
        1 => 1,
        2 => u64::MAX,
        3 => 1 << random.below(64),
        4 => random.below(0x2_0000),
        5 => random.below(0x2_0000) & !7,
        6 => 0x0000_7FFF_FFFF_FFF8 + random.below(16),
        7 => 0xFFFF_8000_0000_0000 + random.below(0x2_0000),
        8 => 0xFEE0_0000 + random.below(0x400),
        9 => 0xF_0000 + random.below(0x5000),
        10 => random.bits() >> random.below(64),
        _ => random.bits(),
    }
}

/// Numbers of model-specific registers worth a try.
pub fn msr(random: &mut Random) -> u64 {
    let known = [
        0x10,
        0x1B,
        0x3B,
        0x174,
        0x175,
        0x176,
        0x1A0,
        0x200,
        0x250,
        0x277,
        0x2FF,
        0x6E0,
        0x800,
        0x80B,
        0x830,
        0x832,
        0x838,
        0x83F,
        0xC000_0080,
        0xC000_0081,
        0xC000_0082,
        0xC000_0084,
        0xC000_0100,
        0xC000_0101,
        0xC000_0102,
        0xC000_0103,
        0x4B56_4D00,
        0x4B56_4D01,
        0x4B56_4D03,
        0x4B56_4D04,
    ];
    if random.once_in(3) {
        random.bits() & 0xFFFF_FFFF
    } else {
        random.pick(&known)
    }
}

/// Appends an instruction, or something that may be one.
pub fn instruction(random: &mut Random, code: &mut Vec<u8>) {
    let byte = |random: &mut Random| random.bits() as u8;
    match random.below(10) {
        0 => {
            for _ in 0..random.below(8) + 1 {
                code.push(byte(random));
            }
        }
        1 | 2 => {
            for &b in random.pick(AWKWARD) {
                code.push(if b == b'%' { byte(random) } else { b });
            }
        }
        3 => {
            // MOV register, value: keeps addresses plausible.
            code.push(0x48 | byte(random) & 1);
            code.push(0xB8 | byte(random) & 7);
            code.extend(value(random).to_le_bytes());
        }
        4 => {
            // MOV ECX, number of an MSR.
            code.push(0xB9);
            code.extend((msr(random) as u32).to_le_bytes());
        }
        _ => encoded(random, code),
    }
}

/// Prefixes, an opcode of some map, ModRM, SIB, displacement and immediate.
fn encoded(random: &mut Random, code: &mut Vec<u8>) {
    let byte = |random: &mut Random| random.bits() as u8;
    for prefix in [0x66, 0xF2, 0xF3, 0xF0, 0x64, 0x65, 0x67] {
        if random.once_in(12) {
            code.push(prefix);
        }
    }
    match random.below(8) {
        0 => code.extend([0xC5, byte(random) | 0x04, byte(random)]),
        1 => code.extend([
            0xC4,
            0xE1 + random.below(3) as u8,
            byte(random) | 0x78,
            byte(random),
        ]),
        2 | 3 => {
            if random.once_in(2) {
                code.push(0x48);
            }
            code.extend([0x0F, byte(random)]);
        }
        4 => code.extend([0x0F, random.pick(&[0x38, 0x3A]), byte(random)]),
        _ => {
            if random.once_in(2) {
                code.push(0x40 | byte(random) & 15);
            }
            code.push(byte(random));
        }
    }
    code.push(byte(random));
    let tail = value(random).to_le_bytes();
    code.extend(&tail[..random.below(6) as usize]);
}
