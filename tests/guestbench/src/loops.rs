//! The loops. Those whose instructions are counted are written in assembly, and a test counts
//! them one by one.

use std::arch::asm;
use std::arch::x86_64::*;
use std::hint::black_box;
use std::io;
use std::is_x86_feature_detected as has;

use crate::sha256;

/// Something to be repeated.
pub struct Work {
    /// Does it so many times; an error says what came out wrong.
    pub run: Box<dyn FnMut(u64) -> Result<(), String>>,
    /// Things counted in one turn.
    pub count: u64,
    /// User-mode instructions of one turn, 0 if not known exactly.
    pub instructions: u64,
}

impl Work {
    fn new(count: u64, run: impl FnMut(u64) -> Result<(), String> + 'static) -> Self {
        Self {
            run: Box::new(run),
            count,
            instructions: 0,
        }
    }

    /// A loop that counts its instructions.
    fn counted(instructions: u64, mut run: impl FnMut(u64) + 'static) -> Self {
        let run = move |turns| {
            run(turns);
            Ok(())
        };
        Self {
            instructions,
            ..Self::new(instructions, run)
        }
    }
}

/// Makes a loop ready, or says why this CPU cannot run it.
pub fn prepare(name: &str) -> Result<Work, &'static str> {
    Ok(match name {
        "alu" => Work::counted(ALU, alu),
        "load-store" => {
            let mut memory = vec![1u64; BUFFER / 8];
            Work::counted(LOAD_STORE, move |turns| load_store(&mut memory, turns))
        }
        "call-return" => Work::counted(CALL_RETURN, call_return),
        "memcpy-rep" => copying(0, |to, from, turns| {
            for _ in 0..turns {
                copy_rep(to, from);
            }
        }),
        "memcpy-sse" => copying(COPY_SSE, copy_sse),
        "memcpy-avx2" => {
            need(has!("avx2"), "the CPU has no AVX2")?;
            copying(COPY_AVX2, |to, from, turns| {
                // SAFETY: the CPU has AVX2, as has been seen above.
                unsafe { copy_avx2(to, from, turns) }
            })
        }
        "sha256" => hashing(sha256::compress),
        "sha256-ni" => {
            let there = has!("sha") && has!("ssse3") && has!("sse4.1");
            need(there, "the CPU has no SHA extensions")?;
            hashing(|state, block| {
                // SAFETY: the CPU has what the function needs, as has been seen above.
                unsafe { sha256::compress_ni(state, block) }
            })
        }
        "matrix-avx2" => {
            need(has!("avx2") && has!("fma"), "the CPU has no AVX2 or no FMA")?;
            matrix()
        }
        "syscall" => Work::new(1, |turns| {
            for _ in 0..turns {
                // SAFETY: takes nothing and always succeeds.
                unsafe { libc::getppid() };
            }
            Ok(())
        }),
        "fork" => Work::new(1, |turns| {
            (0..turns).try_for_each(|_| fork().map_err(|e| format!("fork: {e}")))
        }),
        "fault" => Work::new((REGION / PAGE) as u64, |turns| {
            (0..turns).try_for_each(|_| fault().map_err(|e| format!("mmap: {e}")))
        }),
        _ => return Err("there is no such loop"),
    })
}

fn need(there: bool, otherwise: &'static str) -> Result<(), &'static str> {
    if there { Ok(()) } else { Err(otherwise) }
}

/// Instructions of one turn of [`alu`].
const ALU: u64 = 20;

/// Arithmetic in registers, few dependencies, three branches that are always predicted.
fn alu(turns: u64) {
    // SAFETY: only registers that are named change.
    unsafe {
        asm!(
            "2:",
            "add rax, rcx",
            "xor rdx, rax",
            "lea rsi, [rax + rdx*4 + 7]",
            "shr r8, 1",
            "test r11, r11",
            "jz 4f",
            "sub rdi, rsi",
            "add ecx, 0x1234567",
            "xor r9, rdi",
            "rol r10, 5",
            "lea rax, [rax + rcx]",
            "cmp r11, 0",
            "jne 3f",
            "3:",
            "or r8, rdx",
            "and r9, rax",
            "add r10d, edi",
            "mov rsi, rdx",
            "sub rax, 1",
            "dec r11",
            "jnz 2b",
            "4:",
            inout("r11") turns => _,
            inout("rax") 1u64 => _,
            inout("rcx") 2u64 => _,
            inout("rdx") 3u64 => _,
            inout("rdi") 4u64 => _,
            inout("r8") 5u64 => _,
            inout("r9") 6u64 => _,
            inout("r10") 7u64 => _,
            out("rsi") _,
            options(nomem, nostack),
        );
    }
}

/// Bytes that [`load_store`] works in.
const BUFFER: usize = 16 << 10;

/// Instructions of one turn of [`load_store`].
const LOAD_STORE: u64 = 14;

/// Loads and stores of all sizes and one instruction that does both, in 16 KiB.
fn load_store(memory: &mut [u64], turns: u64) {
    assert_eq!(size_of_val(memory), BUFFER);
    // SAFETY: the index stays below the size of the memory, is a multiple of 64, and no access
    // reaches beyond 64 bytes from there.
    unsafe {
        asm!(
            "2:",
            "mov rax, [{memory} + {index}]",
            "mov rcx, [{memory} + {index} + 8]",
            "add rax, rcx",
            "mov [{memory} + {index} + 16], rax",
            "mov edx, [{memory} + {index} + 24]",
            "movzx r8d, byte ptr [{memory} + {index} + 29]",
            "add [{memory} + {index} + 32], rdx",
            "mov [{memory} + {index} + 40], r8w",
            "xor rcx, [{memory} + {index} + 48]",
            "mov [{memory} + {index} + 56], ecx",
            "add {index}, 64",
            "and {index}, 16383",
            "dec {turns}",
            "jnz 2b",
            memory = in(reg) memory.as_mut_ptr(),
            index = inout(reg) 0u64 => _,
            turns = inout(reg) turns => _,
            out("rax") _,
            out("rcx") _,
            out("rdx") _,
            out("r8") _,
            options(nostack),
        );
    }
}

/// Instructions of one turn of [`call_return`].
const CALL_RETURN: u64 = 10;

/// Three calls a turn, two deep.
fn call_return(turns: u64) {
    // SAFETY: every call returns, and the stack below is free since `nostack` is not promised.
    unsafe {
        asm!(
            "2:",
            "call 3f",
            "call 4f",
            "dec {turns}",
            "jnz 2b",
            "jmp 5f",
            "3:",
            "call 4f",
            "ret",
            "4:",
            "inc {sum}",
            "ret",
            "5:",
            turns = inout(reg) turns => _,
            sum = inout(reg) 0u64 => _,
        );
    }
}

/// Bytes copied in one turn.
const COPY: usize = 64 << 10;
/// Turns of the copying loops' inner loops.
const COPY_TURNS: u64 = COPY as u64 / 128;
/// Instructions of one turn of [`copy_sse`].
const COPY_SSE: u64 = COPY_TURNS * 20 + 5;
/// Instructions of one turn of [`copy_avx2`].
const COPY_AVX2: u64 = COPY_TURNS * 12 + 5;

#[repr(align(64))]
struct Block([u8; COPY]);

/// A loop that copies a block, and looks at the copy when it is done.
fn copying(instructions: u64, copy: impl Fn(&mut Block, &Block, u64) + 'static) -> Work {
    let from = Box::new(Block(std::array::from_fn(|i| (i % 251) as u8)));
    let mut to = Box::new(Block([0; COPY]));
    let run = move |turns| {
        to.0 = [0; COPY];
        copy(&mut to, &from, turns);
        check(to.0 == from.0, "the copy differs")
    };
    Work {
        instructions,
        ..Work::new(COPY as u64, run)
    }
}

fn copy_rep(to: &mut Block, from: &Block) {
    // SAFETY: both blocks have as many bytes as are copied.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") COPY => _,
            inout("rsi") from.0.as_ptr() => _,
            inout("rdi") to.0.as_mut_ptr() => _,
            options(nostack, preserves_flags),
        );
    }
}

fn copy_sse(to: &mut Block, from: &Block, turns: u64) {
    // SAFETY: the inner loop ends after as many bytes as both blocks have.
    unsafe {
        asm!(
            "2:",
            "mov rsi, {from}",
            "mov rdi, {to}",
            "mov ecx, {inner}",
            "3:",
            "movups xmm0, [rsi]",
            "movups xmm1, [rsi + 16]",
            "movups xmm2, [rsi + 32]",
            "movups xmm3, [rsi + 48]",
            "movups xmm4, [rsi + 64]",
            "movups xmm5, [rsi + 80]",
            "movups xmm6, [rsi + 96]",
            "movups xmm7, [rsi + 112]",
            "movups [rdi], xmm0",
            "movups [rdi + 16], xmm1",
            "movups [rdi + 32], xmm2",
            "movups [rdi + 48], xmm3",
            "movups [rdi + 64], xmm4",
            "movups [rdi + 80], xmm5",
            "movups [rdi + 96], xmm6",
            "movups [rdi + 112], xmm7",
            "add rsi, 128",
            "add rdi, 128",
            "dec rcx",
            "jnz 3b",
            "dec {turns}",
            "jnz 2b",
            inner = const COPY_TURNS,
            from = in(reg) from.0.as_ptr(),
            to = in(reg) to.0.as_mut_ptr(),
            turns = inout(reg) turns => _,
            out("rsi") _, out("rdi") _, out("rcx") _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            options(nostack),
        );
    }
}

#[target_feature(enable = "avx2")]
fn copy_avx2(to: &mut Block, from: &Block, turns: u64) {
    // SAFETY: the inner loop ends after as many bytes as both blocks have.
    unsafe {
        asm!(
            "2:",
            "mov rsi, {from}",
            "mov rdi, {to}",
            "mov ecx, {inner}",
            "3:",
            "vmovdqu ymm0, [rsi]",
            "vmovdqu ymm1, [rsi + 32]",
            "vmovdqu ymm2, [rsi + 64]",
            "vmovdqu ymm3, [rsi + 96]",
            "vmovdqu [rdi], ymm0",
            "vmovdqu [rdi + 32], ymm1",
            "vmovdqu [rdi + 64], ymm2",
            "vmovdqu [rdi + 96], ymm3",
            "add rsi, 128",
            "add rdi, 128",
            "dec rcx",
            "jnz 3b",
            "dec {turns}",
            "jnz 2b",
            inner = const COPY_TURNS,
            from = in(reg) from.0.as_ptr(),
            to = in(reg) to.0.as_mut_ptr(),
            turns = inout(reg) turns => _,
            out("rsi") _, out("rdi") _, out("rcx") _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            options(nostack),
        );
    }
}

/// Blocks hashed in one turn.
const BLOCKS: usize = 256;

/// A loop that hashes, and compares each digest with what the plain function gives at first.
fn hashing(compress: impl Fn(&mut [u32; 8], &[u8; 64]) + 'static) -> Work {
    let message: Vec<[u8; 64]> = (0..BLOCKS)
        .map(|i| std::array::from_fn(|j| (i * 7 + j * 13) as u8))
        .collect();
    let mut expected = sha256::INITIAL;
    for block in &message {
        sha256::compress(&mut expected, block);
    }
    Work::new((BLOCKS * 64) as u64, move |turns| {
        for _ in 0..turns {
            let mut state = sha256::INITIAL;
            for block in &message {
                compress(&mut state, black_box(block));
            }
            check(state == expected, "a wrong digest")?;
        }
        Ok(())
    })
}

/// Rows and columns.
const N: usize = 64;

#[repr(align(32))]
#[derive(Clone, PartialEq)]
struct Matrix([[f64; N]; N]);

/// The product of two matrices of small whole numbers, which has no rounding.
fn matrix() -> Work {
    let a = Matrix(std::array::from_fn(|i| {
        std::array::from_fn(|j| ((i * 3 + j) % 17) as f64)
    }));
    let b = Matrix(std::array::from_fn(|i| {
        std::array::from_fn(|j| ((i + j * 5) % 13) as f64)
    }));
    let expected = Matrix(std::array::from_fn(|i| {
        std::array::from_fn(|j| (0..N).map(|k| a.0[i][k] * b.0[k][j]).sum())
    }));
    let mut c = Matrix([[0.0; N]; N]);
    let operations = 2 * N * N * N;
    Work::new(operations as u64, move |turns| {
        for _ in 0..turns {
            // SAFETY: `prepare` has seen that the CPU has AVX2 and FMA.
            unsafe { multiply(&mut c, black_box(&a), black_box(&b)) };
        }
        check(c == expected, "a wrong product")
    })
}

#[target_feature(enable = "avx2,fma")]
fn multiply(c: &mut Matrix, a: &Matrix, b: &Matrix) {
    for (c, a) in c.0.iter_mut().zip(&a.0) {
        for (place, c) in c.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let mut sums = [_mm256_setzero_pd(); 4];
            for (a, b) in a.iter().zip(&b.0) {
                let a = _mm256_set1_pd(*a);
                let b = b[place * 16..][..16].as_ptr();
                for (i, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: `b` points to 16 numbers, and `i` is below 4.
                    let b = unsafe { _mm256_loadu_pd(b.add(i * 4)) };
                    *sum = _mm256_fmadd_pd(a, b, *sum);
                }
            }
            for (i, sum) in sums.iter().enumerate() {
                // SAFETY: `c` has 16 numbers, and `i` is below 4.
                unsafe { _mm256_storeu_pd(c.as_mut_ptr().add(i * 4), *sum) };
            }
        }
    }
}

/// A child that ends at once.
fn fork() -> io::Result<()> {
    // SAFETY: this program has one thread, and the child makes one system call only.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    if child < 0 || unsafe { libc::waitpid(child, &raw mut status, 0) } != child {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const PAGE: usize = 4096;
/// Bytes mapped in one turn: less than a huge page.
const REGION: usize = 1 << 20;

/// Maps memory, writes to each page for the first time, and gives it back.
fn fault() -> io::Result<()> {
    // SAFETY: a new mapping at an address that the kernel chooses.
    let region = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            REGION,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if region == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // Neighbours may have grown together to the size of a huge page. A kernel without those says
    // no, which is as good.
    // SAFETY: the mapping is ours.
    unsafe { libc::madvise(region, REGION, libc::MADV_NOHUGEPAGE) };
    for page in (0..REGION).step_by(PAGE) {
        // SAFETY: an address within the mapping, which can be written.
        unsafe { region.cast::<u8>().add(page).write_volatile(1) };
    }
    // SAFETY: the mapping is ours and nothing refers to it any more.
    unsafe { libc::munmap(region, REGION) };
    Ok(())
}

fn check(right: bool, otherwise: &str) -> Result<(), String> {
    if right { Ok(()) } else { Err(otherwise.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anemone_guest_bench::LOOPS;

    /// Instructions that a child executes, counted by single steps.
    fn steps(run: impl FnOnce()) -> u64 {
        // SAFETY: the child only computes, without memory from an allocator, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: plain system calls.
            unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
                libc::raise(libc::SIGSTOP);
                run();
                libc::_exit(0);
            }
        }
        assert!(child > 0);
        let mut count = 0;
        let mut status = 0;
        loop {
            // SAFETY: the pointer is to a live integer.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            if !libc::WIFSTOPPED(status) {
                break;
            }
            count += 1;
            // SAFETY: the child is ours and stopped.
            let rc = unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) };
            assert_eq!(rc, 0, "{}", io::Error::last_os_error());
        }
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
        count
    }

    fn turn(mut run: impl FnMut(u64)) -> u64 {
        steps(|| run(2)) - steps(|| run(1))
    }

    #[test]
    fn instructions_are_counted_exactly() {
        let from = Block([1; COPY]);
        let mut to = Block([0; COPY]);
        let mut memory = vec![1; BUFFER / 8];
        assert_eq!(turn(alu), ALU);
        assert_eq!(turn(|turns| load_store(&mut memory, turns)), LOAD_STORE);
        assert_eq!(turn(call_return), CALL_RETURN);
        assert_eq!(turn(|turns| copy_sse(&mut to, &from, turns)), COPY_SSE);
        if has!("avx2") {
            // SAFETY: the CPU has AVX2.
            let avx2 = turn(|turns| unsafe { copy_avx2(&mut to, &from, turns) });
            assert_eq!(avx2, COPY_AVX2);
        }
    }

    #[test]
    fn every_loop_runs_and_finds_its_result_right() {
        for l in LOOPS {
            match prepare(l.name) {
                Ok(mut work) => (work.run)(2).unwrap(),
                Err(why) => assert!(why.starts_with("the CPU has no"), "{}: {why}", l.name),
            }
        }
    }

    #[test]
    fn a_wrong_copy_is_found() {
        let mut work = copying(0, |to, from, _| {
            to.0.copy_from_slice(&from.0);
            to.0[COPY - 1] ^= 1;
        });
        assert!((work.run)(1).is_err());
    }

    #[test]
    fn a_wrong_digest_is_found() {
        let mut work = hashing(|state, _| state[0] ^= 1);
        assert!((work.run)(1).is_err());
    }
}
