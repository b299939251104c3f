//! What the program that measures a CPU from inside a guest and `cargo xtask bench soft` share:
//! the names of the loops, and the lines of their conversation.

pub mod protocol;

/// A loop that can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loop {
    /// Name on the command line and in tables.
    pub name: &'static str,
    /// What is counted, as it follows a figure in a table.
    pub unit: &'static str,
    /// Single things counted in one such unit.
    pub scale: u32,
}

/// All loops, in the order in which they run.
pub const LOOPS: &[Loop] = &[
    new("alu", "M instructions/s", 1_000_000),
    new("load-store", "M instructions/s", 1_000_000),
    new("call-return", "M instructions/s", 1_000_000),
    new("memcpy-rep", "MB/s", 1_000_000),
    new("memcpy-sse", "MB/s", 1_000_000),
    new("memcpy-avx2", "MB/s", 1_000_000),
    new("sha256", "MB/s", 1_000_000),
    new("sha256-ni", "MB/s", 1_000_000),
    new("matrix-avx2", "M flop/s", 1_000_000),
    new("syscall", "k calls/s", 1_000),
    new("fork", "k forks/s", 1_000),
    new("fault", "k faults/s", 1_000),
];

const fn new(name: &'static str, unit: &'static str, scale: u32) -> Loop {
    Loop { name, unit, scale }
}
