//! What the differential test cannot see: x87 pointers, the cache, refusals.

use anemone_soft_native::{CreateError, Fault, Location, NativeCpu, Unsupported};
use iced_x86::{Decoder, DecoderOptions, Instruction};

fn decode(bits: u32, bytes: &[u8]) -> Instruction {
    Decoder::new(bits, bytes, DecoderOptions::NONE).decode()
}

#[test]
fn x87_pointers_are_the_guests() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    // fld dword [rbx]; fnstenv [rbx]
    let fld = cpu.thunk(&decode(64, &[0xd9, 0x03])).unwrap();
    let fnstenv = cpu.thunk(&decode(64, &[0xd9, 0x33])).unwrap();
    cpu.scratch()[..4].copy_from_slice(&1.5f32.to_le_bytes());
    cpu.run_buffered(
        &fld,
        Location {
            rip: 0x1122_3344,
            data: 0x5566_7788,
            opcode: Location::opcode_of(&[0xd9, 0x03]),
        },
    )
    .unwrap();
    assert_eq!(fnstenv.form().memory.unwrap().size, 28);
    cpu.run_buffered(
        &fnstenv,
        Location {
            rip: 1,
            data: 2,
            opcode: 3,
        },
    )
    .unwrap();
    let image = cpu.scratch();
    assert_eq!(image[12..16], 0x1122_3344u32.to_le_bytes());
    assert_eq!(image[16..20], [0, 0, 0x03, 0x01]);
    assert_eq!(image[20..24], 0x5566_7788u32.to_le_bytes());
    let saved = cpu.xsave_image();
    assert_eq!(saved[6..8], [0x03, 0x01]);
    assert_eq!(saved[8..16], 0x1122_3344u64.to_le_bytes());
    assert_eq!(saved[16..24], 0x5566_7788u64.to_le_bytes());

    // fldenv [rbx] takes them back, fninit clears them.
    let fldenv = cpu.thunk(&decode(64, &[0xd9, 0x23])).unwrap();
    cpu.scratch()[12..16].copy_from_slice(&77u32.to_le_bytes());
    cpu.run_buffered(&fldenv, Location::default()).unwrap();
    assert_eq!(cpu.xsave_image()[8..16], 77u64.to_le_bytes());
    let fninit = cpu.thunk(&decode(64, &[0xdb, 0xe3])).unwrap();
    cpu.run_buffered(&fninit, Location::default()).unwrap();
    assert_eq!(cpu.xsave_image()[6..24], [0; 18]);
}

#[test]
fn x87_state_survives_leaving_and_returning() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    let fldpi = cpu.thunk(&decode(64, &[0xd9, 0xeb])).unwrap();
    let fstp = cpu.thunk(&decode(64, &[0xdd, 0x1b])).unwrap();
    cpu.run_buffered(&fldpi, Location::default()).unwrap();
    let image = *cpu.xsave_image();
    cpu.run_buffered(&fstp, Location::default()).unwrap();
    assert_eq!(cpu.scratch()[..8], std::f64::consts::PI.to_le_bytes());
    cpu.load_xsave_image(&image).unwrap();
    cpu.scratch().fill(0);
    cpu.run_buffered(&fstp, Location::default()).unwrap();
    assert_eq!(cpu.scratch()[..8], std::f64::consts::PI.to_le_bytes());
}

#[test]
fn addressing_does_not_make_a_new_thunk() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    // paddd xmm1, [rax]; paddd xmm1, [rip+1]; paddd xmm1, fs:[r12+rcx*8+4]; 32-bit [eax]
    for (bits, bytes) in [
        (64, &[0x66, 0x0f, 0xfe, 0x08][..]),
        (64, &[0x66, 0x0f, 0xfe, 0x0d, 1, 0, 0, 0]),
        (64, &[0x64, 0x66, 0x41, 0x0f, 0xfe, 0x4c, 0xcc, 4]),
        (32, &[0x66, 0x0f, 0xfe, 0x08]),
    ] {
        let thunk = cpu.thunk(&decode(bits, bytes)).unwrap();
        assert_eq!(thunk.form().memory.unwrap().alignment, 16);
    }
    assert_eq!(cpu.usage().thunks, 1);
}

#[test]
fn a_full_cache_is_flushed_and_old_thunks_are_refused() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    let instruction = decode(64, &[0x66, 0x0f, 0x70, 0xc1, 0]);
    let first = cpu.thunk(&instruction).unwrap();
    // pshufd xmm0, xmm1, imm8
    for immediate in 1..=255 {
        let thunk = cpu
            .thunk(&decode(64, &[0x66, 0x0f, 0x70, 0xc1, immediate]))
            .unwrap();
        cpu.set_xmm(1, std::array::from_fn(|index| index as u8));
        cpu.run_buffered(&thunk, Location::default()).unwrap();
        for lane in 0..4 {
            assert_eq!(cpu.xmm(0)[4 * lane], 4 * (immediate >> (2 * lane) & 3));
        }
    }
    let usage = cpu.usage();
    assert!(usage.flushes > 0 && usage.used <= usage.size, "{usage:?}");
    assert_eq!(
        cpu.run_buffered(&first, Location::default()),
        Err(Fault::Stale)
    );
    cpu.renew(&first, &instruction).unwrap();
    cpu.run_buffered(&first, Location::default()).unwrap();
    assert_eq!(cpu.xmm(0)[..8], [0, 1, 2, 3, 0, 1, 2, 3]);
}

#[test]
fn refusals_name_the_reason() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    let mut why = |bytes: &[u8]| cpu.thunk(&decode(64, bytes)).unwrap_err();
    // add eax, ecx; vgatherdps; vpmaskmovd; maskmovdqu; ldmxcsr; mfence; vaddps zmm
    assert_eq!(why(&[0x01, 0xc8]), Unsupported::OtherClass);
    assert_eq!(
        why(&[0xc4, 0xe2, 0x69, 0x92, 0x04, 0x08]),
        Unsupported::PerElement
    );
    assert_eq!(
        why(&[0xc4, 0xe2, 0x71, 0x8c, 0x00]),
        Unsupported::PerElement
    );
    assert_eq!(why(&[0x66, 0x0f, 0xf7, 0xc1]), Unsupported::PerElement);
    assert_eq!(why(&[0x0f, 0xae, 0x10]), Unsupported::Mxcsr);
    assert_eq!(why(&[0x0f, 0xae, 0xf0]), Unsupported::FenceOrHint);
    assert_eq!(
        why(&[0x62, 0xf1, 0x74, 0x48, 0x58, 0xc2]),
        Unsupported::Encoding
    );
    assert!(cpu.set_mxcsr(0x1_0000).is_err());
    let mut image = *cpu.xsave_image();
    image[27] = 1;
    assert!(cpu.load_xsave_image(&image).is_err());
}

#[test]
fn one_cpu_per_thread() {
    let cpu = NativeCpu::new(4096).unwrap();
    assert!(matches!(NativeCpu::new(4096), Err(CreateError::Occupied)));
    std::thread::spawn(|| NativeCpu::new(4096).map(drop))
        .join()
        .unwrap()
        .unwrap();
    drop(cpu);
    NativeCpu::new(4096).map(drop).unwrap();
}

#[test]
fn mxcsr_stays_loaded_until_it_is_synced() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    // divsd xmm0, xmm1
    let divsd = cpu.thunk(&decode(64, &[0xf2, 0x0f, 0x5e, 0xc1])).unwrap();
    let host = || {
        let mut value = 0u32;
        // SAFETY: writes MXCSR to a local variable.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value) };
        value
    };
    let mut operand = [0; 16];
    operand[..8].copy_from_slice(&1f64.to_le_bytes());
    // Flush to zero, round up.
    cpu.set_mxcsr(0xdf80).unwrap();
    cpu.set_xmm(0, operand);
    cpu.run_buffered(&divsd, Location::default()).unwrap();
    assert_eq!(cpu.xmm(0)[..8], f64::INFINITY.to_le_bytes());
    // ZE is raised, and still in the CPU's register.
    assert_eq!((cpu.mxcsr(), host()), (0xdf84, 0xdf84));
    cpu.sync_mxcsr();
    assert_eq!((cpu.mxcsr(), host()), (0xdf84, 0x1f80));
    cpu.run_buffered(&divsd, Location::default()).unwrap();
    assert_eq!(cpu.xsave_image()[24..28], 0xdf84u32.to_le_bytes());
    // An unmasked exception is reported, and the host never keeps such a value.
    cpu.set_mxcsr(0x1d80).unwrap();
    assert_eq!(host(), 0x1f80);
    cpu.set_xmm(0, operand);
    let outcome = cpu.run_buffered(&divsd, Location::default());
    assert_eq!(outcome, Err(Fault::Simd));
    assert_eq!((cpu.mxcsr(), host()), (0x1d84, 0x1f80));
    assert_eq!(cpu.xmm(0), operand);
    drop(cpu);
    assert_eq!(host(), 0x1f80);
}

#[test]
fn unmasking_a_pending_x87_exception_raises_it() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    let mut run = |bytes: &[u8], operand: u16| {
        let thunk = cpu.thunk(&decode(64, bytes)).unwrap();
        cpu.scratch()[..2].copy_from_slice(&operand.to_le_bytes());
        cpu.run_buffered(&thunk, Location::default())
    };
    // fld1; fldz; fdivp: masked. fldcw [rbx] unmasks #Z; the next instruction that waits tells.
    for bytes in [&[0xd9, 0xe8], &[0xd9, 0xee], &[0xde, 0xf9]] {
        run(bytes, 0).unwrap();
    }
    run(&[0xd9, 0x2b], 0x37b).unwrap();
    assert_eq!(run(&[0xd9, 0xe8], 0), Err(Fault::Math));
    // fnclex
    run(&[0xdb, 0xe2], 0).unwrap();
    run(&[0xd9, 0xe8], 0).unwrap();
    // With it unmasked, a division is fine and the instruction after it is not.
    run(&[0xd9, 0xee], 0).unwrap();
    run(&[0xde, 0xf9], 0).unwrap();
    assert_eq!(run(&[0xd9, 0xe8], 0), Err(Fault::Math));
}

#[test]
fn clearing_registers_reaches_those_that_the_mode_has() {
    let mut cpu = NativeCpu::new(4096).unwrap();
    // vzeroupper, vzeroall
    for (bytes, low) in [([0xc5, 0xf8, 0x77], 1), ([0xc5, 0xfc, 0x77], 0)] {
        for (bits, cleared) in [(32, 8), (64, 16), (32, 8)] {
            for register in 0..16 {
                cpu.set_ymm(register, [1; 32]);
            }
            let thunk = cpu.thunk(&decode(bits, &bytes)).unwrap();
            cpu.run_buffered(&thunk, Location::default()).unwrap();
            for register in 0..16 {
                let mut expected = [1; 32];
                if register < cleared {
                    expected[16..].fill(0);
                    expected[..16].fill(low);
                }
                assert_eq!(
                    cpu.ymm(register),
                    expected,
                    "{bits} bits, register {register}"
                );
            }
        }
    }
}
