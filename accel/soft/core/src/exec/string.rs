//! String instructions.
//!
//! Upwards in memory, a repetition goes by pieces that lie in one page on both sides: where the
//! first-level TLB answers for all of a piece, the host's own string instruction does it on host
//! pointers, with the same element size, so overlapping operands behave as they should. Everything else is
//! done element by element, which also fills the TLB and finds the faults.
//!
//! Registers are right after each piece, so a fault in the middle needs nothing to be undone, and
//! after [`BUDGET`] the instruction ends as if it were over, with RIP still at it, so that
//! interrupts get in.

#[cfg(test)]
mod tests;

use std::arch::asm;
use std::sync::atomic::Ordering;

use anemone_soft_mmu::{Access, PAGE_SIZE, Value};
use anemone_soft_native::{Flags, Word};
use iced_x86::{Code, Instruction, OpKind};

use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg, rflags, seg};
use crate::hot::Operand;

/// Bytes after which a repetition lets interrupts in.
const BUDGET: u64 = 1 << 16;

/// What an element that is done by itself counts as, in bytes.
const SINGLE: u64 = 16;

pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    let handler: Handler = match instruction.code() {
        Code::Movsb_m8_m8 => copy::<u8>,
        Code::Movsw_m16_m16 => copy::<u16>,
        Code::Movsd_m32_m32 => copy::<u32>,
        Code::Movsq_m64_m64 => copy::<u64>,
        Code::Stosb_m8_AL => fill::<u8>,
        Code::Stosw_m16_AX => fill::<u16>,
        Code::Stosd_m32_EAX => fill::<u32>,
        Code::Stosq_m64_RAX => fill::<u64>,
        Code::Lodsb_AL_m8 => load::<u8>,
        Code::Lodsw_AX_m16 => load::<u16>,
        Code::Lodsd_EAX_m32 => load::<u32>,
        Code::Lodsq_RAX_m64 => load::<u64>,
        Code::Cmpsb_m8_m8 => compare::<u8>,
        Code::Cmpsw_m16_m16 => compare::<u16>,
        Code::Cmpsd_m32_m32 => compare::<u32>,
        Code::Cmpsq_m64_m64 => compare::<u64>,
        Code::Scasb_AL_m8 => scan::<u8>,
        Code::Scasw_AX_m16 => scan::<u16>,
        Code::Scasd_EAX_m32 => scan::<u32>,
        Code::Scasq_RAX_m64 => scan::<u64>,
        _ => return None,
    };
    Some(handler)
}

/// The host's string instructions with the prefix for repetition. Pointers need to be good for
/// `count` elements; other threads may change what they point at.
trait Element: Operand {
    /// # Safety
    /// `from` is readable, `to` writable for `count` elements that no Rust reference covers.
    unsafe fn copy(from: *const u8, to: *mut u8, count: u64);

    /// # Safety
    /// `to` is writable for `count` elements that no Rust reference covers.
    unsafe fn fill(to: *mut u8, value: Self, count: u64);

    /// Compares up to `count` elements, at least one, while `EQUAL` says how they compare. Returns
    /// how many are left and the flags of the last comparison.
    ///
    /// # Safety
    /// `a` and `b` are readable for `count` elements.
    unsafe fn compare<const EQUAL: bool>(a: *const u8, b: *const u8, count: u64) -> (u64, Flags);

    /// As [`compare`](Self::compare), with one value.
    ///
    /// # Safety
    /// `at` is readable for `count` elements.
    unsafe fn scan<const EQUAL: bool>(value: Self, at: *const u8, count: u64) -> (u64, Flags);
}

macro_rules! element {
    ($t:ty, $suffix:literal) => {
        impl Element for $t {
            unsafe fn copy(from: *const u8, to: *mut u8, count: u64) {
                // SAFETY: the caller answers for the pointers; DF is clear in Rust code.
                unsafe {
                    asm!(concat!("rep movs", $suffix), inout("rsi") from => _,
                        inout("rdi") to => _, inout("rcx") count => _,
                        options(nostack, preserves_flags));
                }
            }

            unsafe fn fill(to: *mut u8, value: Self, count: u64) {
                // SAFETY: the caller answers for the pointer; DF is clear in Rust code.
                unsafe {
                    asm!(concat!("rep stos", $suffix), in("rax") u64::from(value),
                        inout("rdi") to => _, inout("rcx") count => _,
                        options(nostack, preserves_flags));
                }
            }

            unsafe fn compare<const EQUAL: bool>(
                a: *const u8,
                b: *const u8,
                count: u64,
            ) -> (u64, Flags) {
                let (left, ax): (u64, u16);
                // SAFETY: the caller answers for the pointers; DF is clear in Rust code.
                unsafe {
                    if EQUAL {
                        asm!(concat!("repe cmps", $suffix), "seto al", "lahf",
                            inout("rsi") a => _, inout("rdi") b => _,
                            inout("rcx") count => left, out("ax") ax, options(nostack));
                    } else {
                        asm!(concat!("repne cmps", $suffix), "seto al", "lahf",
                            inout("rsi") a => _, inout("rdi") b => _,
                            inout("rcx") count => left, out("ax") ax, options(nostack));
                    }
                }
                (left, Flags::from_ax(ax))
            }

            unsafe fn scan<const EQUAL: bool>(
                value: Self,
                at: *const u8,
                count: u64,
            ) -> (u64, Flags) {
                let (left, ax): (u64, u64);
                // SAFETY: the caller answers for the pointer; DF is clear in Rust code.
                unsafe {
                    if EQUAL {
                        asm!(concat!("repe scas", $suffix), "seto al", "lahf",
                            inout("rdi") at => _, inout("rcx") count => left,
                            inout("rax") u64::from(value) => ax, options(nostack));
                    } else {
                        asm!(concat!("repne scas", $suffix), "seto al", "lahf",
                            inout("rdi") at => _, inout("rcx") count => left,
                            inout("rax") u64::from(value) => ax, options(nostack));
                    }
                }
                (left, Flags::from_ax(ax as u16))
            }
        }
    };
}

element!(u8, "b");
element!(u16, "w");
element!(u32, "d");
element!(u64, "q");

/// What a step of a repetition did.
struct Done {
    /// Elements.
    count: u64,
    /// Bytes, for the budget.
    cost: u64,
    /// The condition of REPE or REPNE ended it.
    over: bool,
}

impl Done {
    fn one() -> Self {
        Self {
            count: 1,
            cost: SINGLE,
            over: false,
        }
    }
}

/// One string instruction.
struct String {
    /// Mask of offsets and of the counter.
    mask: u64,
    /// To the next element.
    distance: u64,
    /// Segment of the source at RSI.
    segment: usize,
    /// With a prefix for repetition.
    repeated: bool,
    /// Goes on while elements are equal; otherwise while they differ.
    equal: bool,
}

impl String {
    fn new(cpu: &Cpu, instruction: &Instruction, size: usize) -> Self {
        let is = |kind| (0..instruction.op_count()).any(|n| instruction.op_kind(n) == kind);
        let mask = if is(OpKind::MemorySegSI) || is(OpKind::MemoryESDI) {
            0xFFFF
        } else if is(OpKind::MemorySegESI) || is(OpKind::MemoryESEDI) {
            0xFFFF_FFFF
        } else {
            u64::MAX
        };
        let down = cpu.system_flags & rflags::DF != 0;
        let has_source =
            is(OpKind::MemorySegSI) || is(OpKind::MemorySegESI) || is(OpKind::MemorySegRSI);
        Self {
            mask,
            distance: if down {
                (size as u64).wrapping_neg()
            } else {
                size as u64
            },
            segment: if has_source {
                cpu.memory_segment(instruction)
            } else {
                seg::DS
            },
            repeated: instruction.has_rep_prefix() || instruction.has_repne_prefix(),
            equal: !instruction.has_repne_prefix(),
        }
    }

    fn forward(&self) -> bool {
        (self.distance as i64) > 0
    }

    /// Adds to RCX, RSI or RDI: 16 bits leave the rest, 32 bits clear it.
    fn add(&self, cpu: &mut Cpu, register: usize, value: u64) {
        let old = cpu.gpr(register);
        let kept = if self.mask == 0xFFFF {
            old & !self.mask
        } else {
            0
        };
        cpu.set_gpr(register, kept | old.wrapping_add(value) & self.mask);
    }

    /// Linear address of the element at RSI or RDI.
    fn element(
        &self,
        cpu: &mut Cpu,
        segment: usize,
        register: usize,
        size: usize,
        write: bool,
    ) -> Exec<u64> {
        let offset = cpu.gpr(register) & self.mask;
        cpu.data_address(segment, offset, size, write)
    }

    /// Elements from the one at `linear`, which is checked, to the end of its page, of its
    /// segment or of what the address size can express, at most `count`.
    fn reach(&self, cpu: &Cpu, segment: usize, register: usize, linear: u64, size: usize) -> u64 {
        let offset = cpu.gpr(register) & self.mask;
        let mut bytes =
            (PAGE_SIZE - linear % PAGE_SIZE).min((self.mask - offset).saturating_add(1));
        if !cpu.is_64bit() {
            let segment = &cpu.segments[segment];
            let expands_down = segment.kind & 8 == 0 && segment.kind & 4 != 0;
            let above = u64::from(segment.limit).saturating_sub(offset) + 1;
            bytes = bytes.min(if expands_down { 0 } else { above });
        }
        bytes / size as u64
    }

    /// Repeats `step`, which is given the number of elements that it may do, with `registers`
    /// moving on.
    fn repeat(
        &self,
        cpu: &mut Cpu,
        registers: &[usize],
        mut step: impl FnMut(&mut Cpu, u64) -> Exec<Done>,
    ) -> Exec {
        if !self.repeated {
            step(cpu, 1)?;
            for register in registers {
                self.add(cpu, *register, self.distance);
            }
            return Ok(());
        }
        let single = cpu.system_flags & rflags::TF != 0;
        let flags = cpu.flags();
        let mut budget = BUDGET;
        loop {
            let count = cpu.gpr(reg::RCX) & self.mask;
            if count == 0 {
                return Ok(());
            }
            let done = match step(cpu, if single { 1 } else { count }) {
                Ok(done) => done,
                Err(trap) => {
                    // Comparisons then leave the flags from before (SDM volume 2, REP).
                    cpu.set_flags(flags);
                    return Err(trap);
                }
            };
            for register in registers {
                self.add(cpu, *register, self.distance.wrapping_mul(done.count));
            }
            self.add(cpu, reg::RCX, done.count.wrapping_neg());
            if done.over || done.count == count {
                return Ok(());
            }
            budget = budget.saturating_sub(done.cost);
            let asked = cpu.signals.word().load(Ordering::Relaxed) != 0;
            if single || asked || budget == 0 {
                cpu.next = cpu.rip;
                cpu.leave_block = true;
                cpu.clock_left = 0;
                return Ok(());
            }
        }
    }
}

fn copy<E: Element>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let size = <E as Value>::SIZE;
    let string = String::new(cpu, instruction, size);
    string.repeat(cpu, &[reg::RSI, reg::RDI], |cpu, count| {
        let from = string.element(cpu, string.segment, reg::RSI, size, false)?;
        let to = string.element(cpu, seg::ES, reg::RDI, size, true)?;
        if string.forward() && count > 1 {
            let count = count
                .min(string.reach(cpu, string.segment, reg::RSI, from, size))
                .min(string.reach(cpu, seg::ES, reg::RDI, to, size));
            let bytes = count * size as u64;
            if count > 0
                && let Some(from) = cpu.mmu.hit(Access::Read, cpu.context, from, bytes as usize)
                && let Some(to) = cpu.mmu.hit(Access::Write, cpu.context, to, bytes as usize)
            {
                // SAFETY: `hit` answers for that many bytes until this CPU polls.
                unsafe { E::copy(from, to, count) };
                return Ok(Done {
                    count,
                    cost: bytes,
                    over: false,
                });
            }
        }
        let value: E = cpu.load(from)?;
        cpu.store(to, value)?;
        Ok(Done::one())
    })
}

fn fill<E: Element>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let size = <E as Value>::SIZE;
    let string = String::new(cpu, instruction, size);
    let value = <E as Word>::truncate(cpu.gpr(reg::RAX));
    string.repeat(cpu, &[reg::RDI], |cpu, count| {
        let to = string.element(cpu, seg::ES, reg::RDI, size, true)?;
        if string.forward() && count > 1 {
            let count = count.min(string.reach(cpu, seg::ES, reg::RDI, to, size));
            let bytes = count * size as u64;
            if count > 0
                && let Some(to) = cpu.mmu.hit(Access::Write, cpu.context, to, bytes as usize)
            {
                // SAFETY: `hit` answers for that many bytes until this CPU polls.
                unsafe { E::fill(to, value, count) };
                return Ok(Done {
                    count,
                    cost: bytes,
                    over: false,
                });
            }
        }
        cpu.store(to, value)?;
        Ok(Done::one())
    })
}

fn load<E: Element>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let size = <E as Value>::SIZE;
    let string = String::new(cpu, instruction, size);
    let register = instruction.op0_register();
    string.repeat(cpu, &[reg::RSI], |cpu, _| {
        let from = string.element(cpu, string.segment, reg::RSI, size, false)?;
        let value: E = cpu.load(from)?;
        cpu.write_register(register, value.zero_extend());
        Ok(Done::one())
    })
}

/// The end of a comparison of several elements.
fn compared(
    cpu: &mut Cpu,
    count: u64,
    size: usize,
    equal: bool,
    (left, flags): (u64, Flags),
) -> Done {
    cpu.set_flags(flags);
    let count = count - left;
    Done {
        count,
        cost: count * size as u64,
        over: flags.any(Flags::ZF) != equal,
    }
}

fn compare<E: Element>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let size = <E as Value>::SIZE;
    let string = String::new(cpu, instruction, size);
    string.repeat(cpu, &[reg::RSI, reg::RDI], |cpu, count| {
        let a = string.element(cpu, string.segment, reg::RSI, size, false)?;
        let b = string.element(cpu, seg::ES, reg::RDI, size, false)?;
        if string.forward() && count > 1 {
            let count = count
                .min(string.reach(cpu, string.segment, reg::RSI, a, size))
                .min(string.reach(cpu, seg::ES, reg::RDI, b, size));
            let bytes = count as usize * size;
            if count > 0
                && let Some(a) = cpu.mmu.hit(Access::Read, cpu.context, a, bytes)
                && let Some(b) = cpu.mmu.hit(Access::Read, cpu.context, b, bytes)
            {
                // SAFETY: `hit` answers for that many bytes until this CPU polls.
                let result = unsafe {
                    if string.equal {
                        E::compare::<true>(a, b, count)
                    } else {
                        E::compare::<false>(a, b, count)
                    }
                };
                return Ok(compared(cpu, count, size, string.equal, result));
            }
        }
        // The operand at RDI first, as hardware: it decides which page fault is seen.
        let b: E = cpu.load(b)?;
        let a: E = cpu.load(a)?;
        let flags = a.cmp(b);
        cpu.set_flags(flags);
        Ok(Done {
            over: flags.any(Flags::ZF) != string.equal,
            ..Done::one()
        })
    })
}

fn scan<E: Element>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let size = <E as Value>::SIZE;
    let string = String::new(cpu, instruction, size);
    let value = <E as Word>::truncate(cpu.gpr(reg::RAX));
    string.repeat(cpu, &[reg::RDI], |cpu, count| {
        let at = string.element(cpu, seg::ES, reg::RDI, size, false)?;
        if string.forward() && count > 1 {
            let count = count.min(string.reach(cpu, seg::ES, reg::RDI, at, size));
            let bytes = count as usize * size;
            if count > 0
                && let Some(at) = cpu.mmu.hit(Access::Read, cpu.context, at, bytes)
            {
                // SAFETY: `hit` answers for that many bytes until this CPU polls.
                let result = unsafe {
                    if string.equal {
                        E::scan::<true>(value, at, count)
                    } else {
                        E::scan::<false>(value, at, count)
                    }
                };
                return Ok(compared(cpu, count, size, string.equal, result));
            }
        }
        let flags = value.cmp(cpu.load(at)?);
        cpu.set_flags(flags);
        Ok(Done {
            over: flags.any(Flags::ZF) != string.equal,
            ..Done::one()
        })
    })
}
