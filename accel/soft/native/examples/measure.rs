//! The measurements behind the design: flag capture, and where vector and x87 state lives.
//! `cargo run --release --example measure`; nanoseconds per operation, best of five.

use std::arch::asm;
use std::hint::black_box;
use std::time::Instant;

use anemone_soft_native::{CreateError, Flags, Location, NativeCpu, Word};
use iced_x86::{Decoder, DecoderOptions};

const ROUNDS: u32 = 4_000_000;

fn report(name: &str, mut operation: impl FnMut()) {
    let best = (0..5)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..ROUNDS {
                operation();
            }
            start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS)
        })
        .fold(f64::MAX, f64::min);
    println!("{name:<58} {best:7.2} ns");
}

#[repr(C, align(64))]
struct Area([u8; 4096]);

fn main() -> Result<(), CreateError> {
    let mut a = 1u64;
    report("add alone", || a = black_box(a).wrapping_add(3));
    report("add with flags by seto, lahf (Word::add)", || {
        let (sum, flags) = black_box(a).add(3);
        a = sum;
        black_box(flags);
    });
    report("add with flags by pushfq, pop", || {
        let flags: u64;
        // SAFETY: arithmetic and one balanced push.
        unsafe { asm!("add {0}, 3", "pushfq", "pop {1}", inout(reg) a, out(reg) flags) };
        black_box(flags);
    });
    let mut flags = Flags::NONE;
    report("adc with flags by bt; seto, lahf (Word::adc)", || {
        (a, flags) = black_box(a).adc(3, black_box(flags));
    });
    let mut image = 0x202u64;
    report("adc with flags by push, popfq; pushfq, pop", || {
        // SAFETY: the image has arithmetic flags only; pushes are balanced.
        unsafe {
            asm!("push {1}", "popfq", "adc {0}, 3", "pushfq", "pop {1}", inout(reg) a, inout(reg) image);
        }
        image &= 0xad7;
    });

    let mut cpu = NativeCpu::new(1 << 16)?;
    let forms: [(&str, &[u8]); 11] = [
        ("thunk: vmovdqu ymm0, [rax]", &[0xc5, 0xfe, 0x6f, 0x00]),
        ("thunk: vmovdqu xmm0, [rax]", &[0xc5, 0xfa, 0x6f, 0x00]),
        ("thunk: movaps xmm0, [rax]", &[0x0f, 0x28, 0x00]),
        ("thunk: paddd xmm0, xmm1", &[0x66, 0x0f, 0xfe, 0xc1]),
        ("thunk: paddd xmm0, [rax]", &[0x66, 0x0f, 0xfe, 0x00]),
        ("thunk: vpaddd ymm0, ymm1, ymm2", &[0xc5, 0xf5, 0xfe, 0xc2]),
        (
            "thunk: addsd xmm0, xmm1 (MXCSR resident)",
            &[0xf2, 0x0f, 0x58, 0xc1],
        ),
        (
            "thunk: vfmadd231ps ymm0, ymm1, ymm2 (MXCSR resident)",
            &[0xc4, 0xe2, 0x75, 0xb8, 0xc2],
        ),
        (
            "thunk: andn eax, ecx, edx (with flags)",
            &[0xc4, 0xe2, 0x70, 0xf2, 0xc2],
        ),
        ("thunk: fld1 (x87 resident)", &[0xd9, 0xe8]),
        ("thunk: fadd st0, st0 (x87 resident)", &[0xd8, 0xc0]),
    ];
    for (name, bytes) in forms {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let Ok(thunk) = cpu.thunk(&instruction) else {
            println!("{name}: not on this host");
            continue;
        };
        report(name, || {
            let _ = black_box(cpu.run_buffered(black_box(&thunk), Location::default()));
        });
    }
    drop(cpu);

    let mut area = Box::new(Area([0; 4096]));
    for (name, mask) in [
        (
            "xsave + xrstor of SSE and AVX (state kept in registers)",
            6u32,
        ),
        ("xsave + xrstor of x87 (state kept in memory)", 1),
    ] {
        report(name, || {
            // SAFETY: an aligned area, saved before it is restored; Rust expects its registers changed.
            unsafe {
                asm!("xsave64 [{0}]", "xrstor64 [{0}]", in(reg) &raw mut *area, in("eax") mask, in("edx") 0,
                    options(nostack), clobber_abi("C"));
            }
        });
    }
    black_box(&mut area);
    Ok(())
}
