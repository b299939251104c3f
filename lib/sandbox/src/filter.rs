//! Compiled policies, and what they say about a call.

use crate::names;

/// One instruction of a filter.
pub type Instruction = libc::sock_filter;

/// Makes an instruction; for generated code.
pub const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> Instruction {
    Instruction { code, jt, jf, k }
}

/// A policy as `anemone_policy` compiles it.
#[derive(Debug, Clone, Copy)]
pub struct Filter {
    pub(crate) name: &'static str,
    pub(crate) index: u16,
    pub(crate) program: &'static [Instruction],
    pub(crate) gate: &'static [Instruction],
}

impl Filter {
    /// A filter of `program`, which denies by SECCOMP_RET_TRAP with `index` as its data. `gate`
    /// takes its place under [`Mode::Log`](crate::Mode::Log): it allows no more than any filter
    /// of this process and asks the listener about everything else.
    pub const fn new(
        name: &'static str,
        index: u16,
        program: &'static [Instruction],
        gate: &'static [Instruction],
    ) -> Self {
        Self {
            name,
            index,
            program,
            gate,
        }
    }

    /// The policy's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What the program answers for a call, a value of `SECCOMP_RET_…` (linux/seccomp.h).
    pub fn evaluate(&self, call: &Call) -> u32 {
        evaluate(self.program, call)
    }
}

/// A system call as a filter sees it, `struct seccomp_data` (linux/seccomp.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Call {
    /// Number of the system call.
    pub number: u32,
    /// AUDIT_ARCH_… of the table it comes from.
    pub architecture: u32,
    /// Address of the instruction after the call.
    pub instruction_pointer: u64,
    /// The arguments.
    pub arguments: [u64; 6],
}

/// AUDIT_ARCH_X86_64 (linux/audit.h).
pub const ARCH_X86_64: u32 = 0xC000_003E;

impl Call {
    /// A call through the 64-bit table.
    pub fn new(number: u32, arguments: [u64; 6]) -> Self {
        Self {
            number,
            architecture: ARCH_X86_64,
            instruction_pointer: 0,
            arguments,
        }
    }

    /// The name of the system call, `?` where it is not known.
    pub fn name(&self) -> &'static str {
        names::syscall(self.number).unwrap_or("?")
    }

    /// The 32-bit word at an offset of the structure.
    fn word(&self, offset: u32) -> Option<u32> {
        let half = |value: u64| {
            if offset & 4 == 0 {
                value as u32
            } else {
                (value >> 32) as u32
            }
        };
        match offset {
            0 => Some(self.number),
            4 => Some(self.architecture),
            8 | 12 => Some(half(self.instruction_pointer)),
            16..64 if offset.is_multiple_of(4) => {
                Some(half(self.arguments[(offset as usize - 16) / 8]))
            }
            _ => None,
        }
    }
}

/// Runs a program of the instructions that policies compile to. What the kernel would refuse to
/// install (another instruction, a jump out of the program) kills the process, as its default.
pub fn evaluate(program: &[Instruction], call: &Call) -> u32 {
    run(program, call).unwrap_or(libc::SECCOMP_RET_KILL_PROCESS)
}

fn run(program: &[Instruction], call: &Call) -> Option<u32> {
    let mut accumulator = 0;
    let mut rest = program.iter();
    loop {
        let i = rest.next()?;
        let skip = match i.code {
            0x20 => {
                accumulator = call.word(i.k)?;
                0
            }
            0x54 => {
                accumulator &= i.k;
                0
            }
            0x05 => i.k as usize,
            0x15 | 0x25 | 0x35 => {
                let holds = match i.code {
                    0x15 => accumulator == i.k,
                    0x25 => accumulator > i.k,
                    _ => accumulator >= i.k,
                };
                usize::from(if holds { i.jt } else { i.jf })
            }
            0x06 => return Some(i.k),
            _ => return None,
        };
        if skip > 0 {
            rest.nth(skip - 1)?;
        }
    }
}
