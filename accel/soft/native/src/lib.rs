//! User-level x86-64 instructions of a guest, carried out by the host's own CPU.
//!
//! A software CPU for x86-64 on x86-64 need not describe what `vfmadd231ps` or `fprem` or the flags of
//! `rcr` are: the host knows. Two parts:
//!
//! - [`Word`] and [`WideWord`]: integer primitives on values, inlined, with [`Flags`].
//! - [`NativeCpu`]: for each SSE, AVX, FMA, AES, SHA, BMI, x87 or MMX instruction a small native function
//!   (a [`Thunk`]) made once from the guest's own encoding, working on a block of guest registers.
//!   The caller moves the memory operand through its MMU or passes a pointer to guest RAM.
//!
//! The path of an instruction in an interpreter: decode; [`NativeCpu::thunk`], and keep the answer with
//! the decoded instruction; then on each execution check the guest's CPUID, CR0, CR4 and XCR0 against
//! [`Form`] (once per block is enough), resolve the operand's address, check
//! [`MemoryOperand::alignment`], and [`NativeCpu::run`] on a host pointer, or copy through
//! [`NativeCpu::run_buffered`] where the operand crosses a page or is not RAM.
//!
//! # Where vector state lives
//! In memory, each YMM register in one piece; a thunk loads and stores the registers its instruction
//! uses. Keeping it in the host's registers instead would need a save and restore of everything
//! around each piece of Rust code, which uses SSE: `examples/measure.rs` shows that to cost many times
//! what the two to four moves of a thunk do. For x87 state, which Rust does not use, it is the other
//! way round, and it stays in the host's registers. So does MXCSR, since Rust code between two guest
//! instructions hardly ever computes in floating point: [`NativeCpu::sync_mxcsr`] comes before code that
//! may. A guest that unmasks SIMD exceptions has it loaded around each instruction instead.
//!
//! # What is not exact
//! - FCS and FDS read as 0, as on CPUs that deprecate them (CPUID.7.0:EBX bit 13). FOP, FIP and FDP
//!   are recorded by every x87 instruction that is not a control instruction.
//! - FNSTENV, FNSAVE, FLDENV and FRSTOR use the formats of protected mode; in real-address and
//!   virtual-8086 mode the caller rearranges the pointers (SDM volume 1, figures 8-10 and 8-12).
//! - RDPID, XSAVE, FXSAVE and the like are the core's: [`NativeCpu::xsave_image`] has the bytes.
//!
//! # What a jail must allow
//! `memfd_create`, `ftruncate`, `mmap` with MAP_SHARED and either PROT_READ|PROT_WRITE or
//! PROT_READ|PROT_EXEC, `munmap` and `rt_sigaction` for SIGFPE while CPUs are created; then only
//! `rt_sigreturn`. A thread that runs a CPU must not block SIGFPE. No mapping is writable and executable, and no protection is ever changed.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("this crate runs x86-64 guest code on an x86-64 Linux host");

mod alu;
mod bcd;
mod code;
mod cpu;
mod fault;
mod flags;
mod form;
mod state;
mod thunk;

pub use alu::{DivideError, WideWord, Word};
pub use bcd::{aaa, aad, aam, aas, daa, das};
pub use code::{CodeBuffer, serialize};
pub use cpu::{
    CacheUsage, Completed, CreateError, Fault, Location, NativeCpu, ReservedMxcsr, Thunk,
};
pub use flags::{ARITHMETIC_RFLAGS, Flags};
pub use form::{Form, MemoryOperand, Unsupported};
pub use state::{GPR_COUNT, MXCSR_MASK, MXCSR_RESET, SCRATCH_SIZE, UserState, XSAVE_SIZE};
