//! What instructions cost.

use crate::block::Step;
use crate::cpu::reg;

use super::initial;
use crate::exec::harness::{CODE, DATA, Guest, PAGE, Second};

/// Nanoseconds per instruction: `cargo test --release -p anemone-soft-core -- --ignored --nocapture cost`.
#[test]
#[ignore = "a measurement"]
fn cost_of_instructions() {
    const COPIES: usize = 32;
    let mut guest = Guest::new();
    guest.cpu.set_gpr(reg::RBX, DATA);
    for (name, bytes) in [
        ("nop", &[0x90][..]),
        ("add eax, ecx", &[0x01, 0xc8]),
        ("mov rax, [rbx]", &[0x48, 0x8b, 0x03]),
        ("paddd xmm0, xmm1", &[0x66, 0x0f, 0xfe, 0xc1]),
        ("movaps xmm0, [rbx]", &[0x0f, 0x28, 0x03]),
        ("movups [rbx], xmm0", &[0x0f, 0x11, 0x03]),
        ("movaps xmm0, xmm1", &[0x0f, 0x28, 0xc1]),
        ("pxor xmm0, xmm0", &[0x66, 0x0f, 0xef, 0xc0]),
        ("paddd xmm0, [rbx]", &[0x66, 0x0f, 0xfe, 0x03]),
        ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("mulps xmm0, [rbx]", &[0x0f, 0x59, 0x03]),
        ("cvtsi2sd xmm0, rax", &[0xf2, 0x48, 0x0f, 0x2a, 0xc0]),
        ("ucomisd xmm0, xmm1", &[0x66, 0x0f, 0x2e, 0xc1]),
        ("pmovmskb eax, xmm0", &[0x66, 0x0f, 0xd7, 0xc0]),
        ("vpaddd ymm0, ymm1, ymm2", &[0xc5, 0xf5, 0xfe, 0xc2]),
        ("vpaddd xmm0, xmm1, xmm2", &[0xc5, 0xf1, 0xfe, 0xc2]),
        ("vmovdqu ymm0, [rbx]", &[0xc5, 0xfe, 0x6f, 0x03]),
        ("vmovdqu [rbx], ymm0", &[0xc5, 0xfe, 0x7f, 0x03]),
        (
            "vfmadd231pd ymm0, ymm1, [rbx]",
            &[0xc4, 0xe2, 0xf5, 0xb8, 0x03],
        ),
        ("andn eax, ecx, edx", &[0xc4, 0xe2, 0x70, 0xf2, 0xc2]),
        ("popcnt eax, ecx", &[0xf3, 0x0f, 0xb8, 0xc1]),
        ("movd mm0, eax", &[0x0f, 0x6e, 0xc0]),
        (
            "fld qword [rbx]; fstp qword [rbx]",
            &[0xdd, 0x03, 0xdd, 0x1b],
        ),
        (
            "fld1; fadd st0, st0; fstp st0",
            &[0xd9, 0xe8, 0xd8, 0xc0, 0xdd, 0xd8],
        ),
        ("fnstcw [rbx]; fldcw [rbx]", &[0xd9, 0x3b, 0xd9, 0x2b]),
        (
            "vpgatherdd xmm0, [rbx+xmm1*4], xmm2",
            &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x8b],
        ),
        ("fxsave64 [rbx]", &[0x48, 0x0f, 0xae, 0x03]),
        ("fxrstor64 [rbx]", &[0x48, 0x0f, 0xae, 0x0b]),
    ] {
        guest.load(&initial());
        guest.cpu.set_gpr(reg::RBX, DATA);
        guest.set_operands(Second::Memory, &[0; 2 * PAGE]);
        let code: Vec<u8> = bytes.repeat(COPIES);
        guest.cpu.blocks.collect();
        guest.memory.write(CODE as usize, &code);
        guest
            .memory
            .write(CODE as usize + code.len(), &[0xEB, 0xFE]);
        let cpu = &mut guest.cpu;
        cpu.rip = CODE;
        let block = cpu.block(cpu.mode_key(false)).unwrap();
        // SAFETY: blocks live until they are collected.
        let ops = unsafe { &block.as_ref().ops };
        let count = ops.len().min(COPIES * 3) - 2;
        cpu.leave_block = false;
        cpu.set_gpr(reg::BLOCK, CODE);
        let best = (0..7)
            .map(|_| {
                let start = std::time::Instant::now();
                for _ in 0..20_000 {
                    for op in &ops[..count] {
                        assert_eq!((op.run.get())(cpu, op), Step::Next);
                    }
                }
                start.elapsed().as_secs_f64() * 1e9 / (20_000 * count) as f64
            })
            .fold(f64::MAX, f64::min);
        println!("{name:<40} {best:6.2} ns, {count} in the block");
    }
}
