//! The core of a software x86-64 CPU: it runs guest code by decoding it once into operations and
//! interpreting those.
//!
//! ```text
//!   Cpu::run ── block of operations for (physical address, mode) ── decode ── iced-x86
//!      │            │ fast operations (hot)     │ whole instructions (exec, system)
//!      │            └── native thunks for vector and x87 instructions
//!      ├── attention word: other threads' requests, looked at before every block
//!      └── exceptions and interrupts through the guest's IDT (system::interrupt)
//! ```
//!
//! [`Cpu`] belongs to one thread. What the CPUs of a VM share is in [`Shared`]. The machine around
//! is known only as an [`anemone_accel_api::Bus`].
//!
//! State is precise at the edges of instructions: an operation either completes or leaves registers
//! and memory as they were and raises an exception. Instructions that write several places
//! check them all first.

mod block;
mod clock;
mod code;
mod cpu;
mod decode;
mod dump;
mod exec;
mod hot;
mod memory;
mod run;
mod signals;
mod state;
mod system;

pub use anemone_soft_native::CodeBuffer;
pub use clock::Clock;
pub use code::CodeRegistry;
pub use cpu::{Config, Cpu, CreateError, Shared, code_memory};
pub use run::Exit;
pub use signals::{ATTENTION_APIC, ATTENTION_CODE, ATTENTION_KICK, Signals};
pub use system::cpuid::{Cpuid, offered};
