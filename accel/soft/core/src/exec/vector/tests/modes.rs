//! Addressing, modes, exceptions, and what decoding keeps.

use anemone_soft_mmu::{Paging, cr0, cr4};
use iced_x86::{Decoder, DecoderOptions};

use crate::block::Step;
use crate::cpu::{Exception, reg, seg, vector};

use super::{initial, set_code};
use crate::exec::harness::{CODE, DATA, Guest, PAGE, Second};

/// Bases, indices, RIP-relative and segment bases in 64-bit mode; 32-bit addresses.
#[test]
fn operands_are_where_the_encoding_says() {
    let mut guest = Guest::new();
    let at = |offset: u64| DATA + offset;
    guest.segment(seg::FS, 3, |fs| fs.base = 0x100);
    guest.segment(seg::DS, 3, |ds| ds.base = 0x5000);
    let mut memory = vec![0; 2 * PAGE];
    for (index, bytes) in memory.chunks_mut(16).enumerate() {
        bytes.fill(index as u8);
    }
    guest.set_operands(Second::Memory, &memory);
    guest.cpu.set_gpr(reg::RBX, at(0x20));
    guest.cpu.set_gpr(reg::RCX, 8);
    guest.cpu.set_gpr(12, u64::MAX);
    let here = |cursor: u64, length: u64| (at(0x50) - cursor - length) as u32;
    let relative = here(guest.cursor, 8).to_le_bytes();
    // movups xmm1, [rip + …]
    let mut bytes = vec![0x0F, 0x10, 0x0D];
    bytes.extend(relative);
    let relative = here(guest.cursor, 7).to_le_bytes();
    bytes[3..].copy_from_slice(&relative);
    guest.run(&bytes).unwrap();
    assert_eq!(guest.cpu.native.xmm(1), [5; 16]);
    for (bytes, expected) in [
        // movups xmm1, [rbx + rcx * 8 + 16]
        (&[0x0F, 0x10, 0x4C, 0xCB, 0x10][..], 2 + 4 + 1),
        // movups xmm1, fs:[rbx + rcx * 2]
        (&[0x64, 0x0F, 0x10, 0x0C, 0x4B], 2 + 16 + 1),
        // movups xmm1, [rbx + r12 * 1 + 1]
        (&[0x42, 0x0F, 0x10, 0x4C, 0x23, 1], 2),
        // movups xmm1, [ebx + r12d * 1 + 1]
        (&[0x67, 0x42, 0x0F, 0x10, 0x4C, 0x23, 1], 2),
        // movups xmm1, [rcx * 8 + 60000H], without a base
        (&[0x0F, 0x10, 0x0C, 0xCD, 0, 0, 6, 0], 4),
    ] {
        guest.run(bytes).unwrap();
        assert_eq!(guest.cpu.native.xmm(1), [expected; 16], "{bytes:02x?}");
    }
    // An address that is not canonical.
    guest.cpu.set_gpr(reg::RBX, 1 << 47);
    for bytes in [&[0x0F, 0x10, 0x0B][..], &[0x0F, 0x11, 0x0B], &[0xDD, 0x03]] {
        assert_eq!(guest.run(bytes), Err(Exception::NON_CANONICAL));
    }
}

#[test]
fn other_modes_have_segments_and_eight_registers() {
    let mut guest = Guest::new();
    set_code(&mut guest, 32);
    guest.segment(seg::DS, 3, |ds| {
        ds.base = DATA;
        ds.limit = 0x10F;
    });
    guest.set_operands(Second::Memory, &[0x33; 2 * PAGE]);
    guest.cpu.set_gpr(reg::RBX, 0x100);
    // paddb xmm1, [ebx], and 16 bytes on
    assert_eq!(guest.run(&[0x66, 0x0F, 0xFC, 0x0B]), Ok(()));
    assert_eq!(guest.cpu.native.xmm(1), [0x33; 16]);
    assert_eq!(
        guest.run(&[0x66, 0x0F, 0xFC, 0x4B, 0x10]),
        Err(Exception::GP0)
    );
    // A misaligned operand.
    assert_eq!(
        guest.run(&[0x66, 0x0F, 0xFC, 0x4B, 0xFF]),
        Err(Exception::GP0)
    );
    // movups [bx], xmm1 with a 16-bit address
    guest.cpu.set_gpr(reg::RBX, 0x1_0040);
    guest.cpu.native.set_xmm(1, [0x77; 16]);
    assert_eq!(guest.run(&[0x67, 0x0F, 0x11, 0x0F]), Ok(()));
    assert_eq!(guest.operands(Second::Memory)[0x40..0x50], [0x77; 16]);
    // fxsave [ebx] leaves the places of XMM8 to XMM15 alone, fxrstor the registers.
    guest.segment(seg::DS, 3, |ds| ds.base = DATA);
    guest.cpu.set_gpr(reg::RBX, 0x200);
    guest.cpu.native.set_xmm(8, [0x88; 16]);
    assert_eq!(guest.run(&[0x0F, 0xAE, 0x03]), Ok(()));
    let image = guest.operands(Second::Memory)[0x200..0x400].to_vec();
    assert_eq!(image[160 + 16..160 + 32], [0x77; 16]);
    assert_eq!(image[160 + 128..], [0x33; 512 - 288]);
    guest.cpu.native.set_xmm(1, [0; 16]);
    assert_eq!(guest.run(&[0x0F, 0xAE, 0x0B]), Ok(()));
    assert_eq!(guest.cpu.native.xmm(1), [0x77; 16]);
    assert_eq!(guest.cpu.native.xmm(8), [0x88; 16]);
    // vmaskmovps xmm1, xmm2, [ebx] beyond the limit: only what is selected counts.
    guest.segment(seg::DS, 3, |ds| {
        ds.base = DATA;
        ds.limit = 0x207;
    });
    let mut mask = [0; 16];
    mask[7] = 0x80;
    guest.cpu.native.set_xmm(2, mask);
    let bytes = [0xC4, 0xE2, 0x69, 0x2C, 0x0B];
    assert_eq!(guest.run(&bytes), Ok(()));
    assert_eq!(guest.cpu.native.xmm(1)[8..], [0; 8]);
    mask[11] = 0x80;
    guest.cpu.native.set_xmm(2, mask);
    assert_eq!(guest.run(&bytes), Err(Exception::GP0));
}

/// The x87 environment in real-address mode, where pointers are linear addresses in pieces.
#[test]
fn the_environment_of_real_mode_has_linear_addresses() {
    let mut guest = Guest::new();
    guest.cpu.mmu.set_paging(Paging::default()).unwrap();
    guest.cpu.cr0 = cr0::NE;
    guest.cpu.efer = 0;
    set_code(&mut guest, 16);
    guest.segment(seg::CS, 0xB, |cs| cs.base = CODE);
    guest.code_base = CODE;
    guest.segment(seg::DS, 3, |ds| {
        ds.base = DATA;
        ds.limit = 0xFFFF;
    });
    guest.set_operands(Second::Memory, &[0; 2 * PAGE]);
    guest.cpu.set_gpr(reg::RBX, 0x123);
    let fld = guest.cursor;
    // fld dword [bx + 5]
    guest.run(&[0xD9, 0x47, 0x05]).unwrap();
    guest.cpu.set_gpr(reg::RBX, 0x200);
    let word = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let opcode = 0x147;
    // fnstenv [bx]
    guest.run(&[0xD9, 0x37]).unwrap();
    let short = guest.operands(Second::Memory)[0x200..0x20E].to_vec();
    assert_eq!(word(&short, 6), fld as u16);
    assert_eq!(word(&short, 8), (fld >> 16 << 12) as u16 | opcode);
    assert_eq!(word(&short, 10), 0x128);
    assert_eq!(word(&short, 12), 0x6000);
    // o32 fnstenv [bx], then fninit, o32 fldenv [bx], o16 fnstenv [bx]
    guest.run(&[0x66, 0xD9, 0x37]).unwrap();
    let long = guest.operands(Second::Memory)[0x200..0x21C].to_vec();
    assert_eq!(word(&long, 12), fld as u16);
    assert_eq!(word(&long, 16), (fld >> 16 << 12) as u16 | opcode);
    assert_eq!(word(&long, 20), 0x128);
    assert_eq!(word(&long, 24), 0x6000);
    guest.run(&[0xDB, 0xE3]).unwrap();
    guest.run(&[0x66, 0xD9, 0x27]).unwrap();
    guest.run(&[0xD9, 0x37]).unwrap();
    let again = guest.operands(Second::Memory)[0x200..0x20E].to_vec();
    assert_eq!(again[4..], short[4..]);
}

#[test]
fn control_registers_decide_what_is_there() {
    const UD: Option<Exception> = Some(Exception::UD);
    const NM: Option<Exception> = Some(Exception::NM);
    let mut guest = Guest::new();
    let normal = (guest.cpu.cr0, guest.cpu.cr4, guest.cpu.xcr0);
    let with =
        |cr0_set: u64, cr4_clear: u64, xcr0| (normal.0 | cr0_set, normal.1 & !cr4_clear, xcr0);
    // movaps xmm0, xmm1; vaddps xmm0, xmm0, xmm1; fld1; paddb mm0, mm1; cvtps2pi mm0, [rbx]; andn;
    // fwait; xsave [rbx]; fxsave [rbx]; movnti [rbx], eax; ldmxcsr [rbx]; xgetbv; crc32; emms; fisttp
    let forms: [&[u8]; 15] = [
        &[0x0F, 0x28, 0xC1],
        &[0xC5, 0xF8, 0x58, 0xC1],
        &[0xD9, 0xE8],
        &[0x0F, 0xFC, 0xC1],
        &[0x0F, 0x2D, 0x03],
        &[0xC4, 0xE2, 0x70, 0xF2, 0xC2],
        &[0x9B],
        &[0x0F, 0xAE, 0x23],
        &[0x0F, 0xAE, 0x03],
        &[0x0F, 0xC3, 0x03],
        &[0x0F, 0xAE, 0x13],
        &[0x0F, 0x01, 0xD0],
        &[0xF2, 0x0F, 0x38, 0xF1, 0xC1],
        &[0x0F, 0x77],
        &[0xDF, 0x0B],
    ];
    let none = [None; 15];
    let table = [
        (normal, none),
        (
            with(cr0::TS, 0, 7),
            [
                NM, NM, NM, NM, NM, None, NM, NM, NM, None, NM, None, None, NM, NM,
            ],
        ),
        (
            with(cr0::EM, 0, 7),
            [
                UD, None, NM, UD, UD, None, None, None, NM, None, UD, None, None, UD, NM,
            ],
        ),
        (
            with(0, cr4::OSFXSR, 7),
            [
                UD, None, None, None, UD, None, None, None, None, None, UD, None, None, None, None,
            ],
        ),
        (
            with(0, cr4::OSXSAVE, 7),
            [
                None, UD, None, None, None, None, None, UD, None, None, None, UD, None, None, None,
            ],
        ),
        (
            with(0, 0, 3),
            [
                None, UD, None, None, None, None, None, None, None, None, None, None, None, None,
                None,
            ],
        ),
    ];
    let check = |guest: &Guest, expected: [Option<Exception>; 15], bits| {
        for (bytes, expected) in forms.iter().zip(expected) {
            let made = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
            let found = crate::exec::vector::availability(&guest.cpu, &made);
            assert_eq!(found, expected, "{:?}, {bits} bits", made.code());
        }
    };
    for ((cr0, cr4, xcr0), expected) in table {
        (guest.cpu.cr0, guest.cpu.cr4, guest.cpu.xcr0) = (cr0, cr4, xcr0);
        check(&guest, expected, 64);
    }
    // FWAIT alone asks for MP.
    (guest.cpu.cr0, guest.cpu.cr4, guest.cpu.xcr0) = normal;
    guest.cpu.cr0 = guest.cpu.cr0 & !cr0::MP | cr0::TS;
    let wait = Decoder::new(64, &[0x9B], DecoderOptions::NONE).decode();
    assert_eq!(crate::exec::vector::availability(&guest.cpu, &wait), None);
    // Real-address mode has no VEX.
    guest.cpu.cr0 = cr0::NE;
    let mut expected = none;
    (expected[1], expected[5]) = (UD, UD);
    check(&guest, expected, 32);
}

#[test]
fn exceptions_of_arithmetic_reach_the_guest() {
    let mut guest = Guest::new();
    let mut state = initial();
    state.area.0[24..26].copy_from_slice(&[0x80, 0x1D]);
    let one = 1f64.to_le_bytes();
    state.area.0[160..168].copy_from_slice(&one);
    guest.load(&state);
    // divsd xmm0, xmm1
    let bytes = [0xF2, 0x0F, 0x5E, 0xC1];
    assert_eq!(guest.run(&bytes), Err(Exception::plain(vector::XM)));
    assert_eq!(guest.cpu.native.xmm(0)[..8], one);
    assert_eq!(guest.cpu.native.mxcsr(), 0x1D84);
    guest.cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(guest.run(&bytes), Err(Exception::UD));
    // fld1; fldz; fdivp with #Z unmasked; fwait tells, fnclex ends it.
    state.area.0[0] = 0x7B;
    guest.load(&state);
    for bytes in [[0xD9, 0xE8], [0xD9, 0xEE], [0xDE, 0xF9]] {
        guest.run(&bytes).unwrap();
    }
    assert_eq!(guest.run(&[0x9B]), Err(Exception::plain(vector::MF)));
    assert_eq!(
        guest.run(&[0x0F, 0xF7, 0xDC]),
        Err(Exception::plain(vector::MF))
    );
    guest.run(&[0xDB, 0xE2]).unwrap();
    guest.run(&[0x9B]).unwrap();
    // ldmxcsr [rbx] with a reserved bit
    guest.cpu.set_gpr(reg::RBX, DATA);
    guest.set_operands(Second::Memory, &[0xFF; 2 * PAGE]);
    assert_eq!(guest.run(&[0x0F, 0xAE, 0x13]), Err(Exception::GP0));
    assert_eq!(guest.cpu.native.mxcsr(), 0x1D80);
}

/// Code outlives its thunk: the memory for thunks is small enough to be used up.
#[test]
fn decoded_code_survives_a_flush_of_the_thunks() {
    let mut guest = Guest::new();
    // pshufd xmm0, xmm1, 1BH
    let bytes = [0x66, 0x0F, 0x70, 0xC1, 0x1B];
    let values: [u8; 16] = std::array::from_fn(|index| index as u8);
    let expected = [12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3];
    guest.cpu.native.set_xmm(1, values);
    guest.run(&bytes).unwrap();
    let (rip, cursor) = (guest.cpu.gpr(reg::BLOCK), guest.cursor);
    for _ in 0..2 {
        guest.cpu.native.flush();
        guest.cpu.native.set_xmm(0, [0; 16]);
        guest.cursor = rip;
        // The same block: its bytes are what they were.
        guest.run(&bytes).unwrap();
        assert_eq!(guest.cpu.native.xmm(0), expected);
    }
    guest.cursor = cursor;
}

/// A store by a vector instruction to code that has been decoded.
#[test]
fn vector_stores_change_code() {
    let mut guest = Guest::new();
    let code = guest.cursor;
    // movups [rbx], xmm0; the code there becomes mov eax, 2 from mov eax, 1.
    guest.run(&[0xB8, 1, 0, 0, 0]).unwrap();
    assert_eq!(guest.cpu.gpr(reg::RAX), 1);
    guest.cpu.set_gpr(reg::RBX, code);
    let mut new = [0x90; 16];
    new[..5].copy_from_slice(&[0xB8, 2, 0, 0, 0]);
    guest.cpu.native.set_xmm(0, new);
    guest.run(&[0x0F, 0x11, 0x03]).unwrap();
    let cpu = &mut guest.cpu;
    cpu.rip = code;
    let block = cpu.block(cpu.mode_key(true)).unwrap();
    // SAFETY: blocks live until they are collected.
    let op = unsafe { &block.as_ref().ops[0] };
    cpu.set_gpr(reg::BLOCK, code);
    assert_eq!((op.run.get())(cpu, op), Step::Next);
    assert_eq!(cpu.gpr(reg::RAX), 2);
}
