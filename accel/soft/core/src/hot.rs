//! The operations that make up most of 64-bit code, each specialised for its operands.
//!
//! They do what the handlers of [`crate::exec`] do for the same instruction, without looking at
//! the instruction again: operands are register numbers and an address formula in the [`Op`].

use anemone_soft_mmu::{Access, Atomic};
use anemone_soft_native::{Flags, WideWord, Word};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::block::{Op, OpFn, Step, Whole};
use crate::cpu::{Cpu, Exception, Exec, reg, seg};

/// What the hot operations need of a word.
pub(crate) trait Operand: Word + Atomic {
    /// Value of a general register after writing this to it.
    fn merge(self, old: u64) -> u64;
}

impl Operand for u8 {
    #[inline(always)]
    fn merge(self, old: u64) -> u64 {
        old & !0xFF | u64::from(self)
    }
}

impl Operand for u16 {
    #[inline(always)]
    fn merge(self, old: u64) -> u64 {
        old & !0xFFFF | u64::from(self)
    }
}

impl Operand for u32 {
    #[inline(always)]
    fn merge(self, _: u64) -> u64 {
        self.into()
    }
}

impl Operand for u64 {
    #[inline(always)]
    fn merge(self, _: u64) -> u64 {
        self
    }
}

impl Cpu {
    /// Address of an instruction of the block that runs, as an offset in CS.
    #[inline(always)]
    pub(crate) fn at(&self, op: &Op) -> u64 {
        self.gpr(reg::BLOCK).wrapping_add(op.offset.into())
    }

    /// Address of the instruction after it, in 64-bit mode.
    #[inline(always)]
    fn after(&self, op: &Op) -> u64 {
        self.at(op).wrapping_add(op.length.into())
    }

    #[inline(always)]
    fn get<W: Operand>(&self, number: u8) -> W {
        <W as Word>::truncate(self.gpr(number.into()))
    }

    #[inline(always)]
    fn set<W: Operand>(&mut self, number: u8, value: W) {
        let old = self.gpr(number.into());
        self.set_gpr(number.into(), value.merge(old));
    }

    /// Linear address of the memory operand in 64-bit code.
    #[inline(always)]
    pub(crate) fn address(&self, op: &Op) -> u64 {
        self.offset(op)
            .wrapping_add(self.bases[usize::from(op.segment) & 7])
    }

    /// Effective address of the memory operand in 64-bit code.
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        self.gpr(op.base.into())
            .wrapping_add(self.gpr(op.index.into()) << (op.scale & 3))
            .wrapping_add(op.disp as u64)
    }

    /// Pushes a word of 8 bytes in 64-bit mode.
    #[inline(always)]
    fn push64(&mut self, value: u64) -> Exec {
        let top = self.gpr(reg::RSP).wrapping_sub(8);
        match self.store(top, value) {
            Ok(()) => {
                self.set_gpr(reg::RSP, top);
                Ok(())
            }
            Err(_) => Err(self.stack_fault()),
        }
    }

    #[inline(always)]
    fn pop64(&mut self) -> Exec<u64> {
        let top = self.gpr(reg::RSP);
        let value = self.peek64(top)?;
        self.set_gpr(reg::RSP, top.wrapping_add(8));
        Ok(value)
    }

    /// Loads a word of 8 bytes from the stack in 64-bit mode.
    #[inline(always)]
    fn peek64(&mut self, at: u64) -> Exec<u64> {
        match self.load(at) {
            Ok(value) => Ok(value),
            Err(_) => Err(self.stack_fault()),
        }
    }

    /// Read-modify-write without LOCK; returns the old value.
    #[inline(always)]
    pub(crate) fn modify<W: Operand>(&mut self, linear: u64, change: impl Fn(W) -> W) -> Exec<W> {
        match self.mmu.hit(Access::Write, self.context, linear, W::SIZE) {
            Some(host) => {
                // SAFETY: `hit` gives an address with room for the value, of memory that is
                // mapped until this vCPU polls or parks.
                let old = unsafe { W::read(host) };
                // SAFETY: as before.
                unsafe { W::write(host, change(old)) };
                Ok(old)
            }
            // Atomic is more than is asked for, and checks the write before anything changes.
            None => self.update(linear, change),
        }
    }
}

/// Turns a result into how the operation ended.
#[inline(always)]
pub(crate) fn step(result: Exec) -> Step {
    match result {
        Ok(()) => Step::Next,
        Err(_) => Step::Trap,
    }
}

/// Where an operand comes from.
trait Source: 'static {
    fn get<W: Operand>(cpu: &mut Cpu, op: &Op) -> Exec<W>;
}

/// The register [`Op::src`].
struct R;
/// The immediate [`Op::imm`].
struct I;
/// The memory operand.
struct M;

impl Source for R {
    #[inline(always)]
    fn get<W: Operand>(cpu: &mut Cpu, op: &Op) -> Exec<W> {
        Ok(cpu.get(op.src))
    }
}

impl Source for I {
    #[inline(always)]
    fn get<W: Operand>(_: &mut Cpu, op: &Op) -> Exec<W> {
        Ok(<W as Word>::truncate(op.imm))
    }
}

impl Source for M {
    #[inline(always)]
    fn get<W: Operand>(cpu: &mut Cpu, op: &Op) -> Exec<W> {
        cpu.load(cpu.address(op))
    }
}

/// Arithmetic with two operands.
pub(crate) trait Binary: 'static {
    fn apply<W: Word>(a: W, b: W, flags: Flags) -> (W, Flags);
}

macro_rules! binary {
    ($($name:ident: |$a:ident, $b:ident, $f:ident| $e:expr;)*) => {
        $(
            pub(crate) struct $name;
            impl Binary for $name {
                #[inline(always)]
                fn apply<W: Word>($a: W, $b: W, $f: Flags) -> (W, Flags) {
                    $e
                }
            }
        )*
    };
}

binary! {
    Add: |a, b, _f| a.add(b);
    Sub: |a, b, _f| a.sub(b);
    And: |a, b, _f| a.and(b);
    Or: |a, b, _f| a.or(b);
    Xor: |a, b, _f| a.xor(b);
    Adc: |a, b, f| a.adc(b, f);
    Sbb: |a, b, f| a.sbb(b, f);
    Cmp: |a, b, _f| (a, a.cmp(b));
    Test: |a, b, _f| (a, a.test(b));
    Shl: |a, b, f| a.shl(b.zero_extend() as u8, f);
    Shr: |a, b, f| a.shr(b.zero_extend() as u8, f);
    Sar: |a, b, f| a.sar(b.zero_extend() as u8, f);
    Rol: |a, b, f| a.rol(b.zero_extend() as u8, f);
    Ror: |a, b, f| a.ror(b.zero_extend() as u8, f);
    Rcl: |a, b, f| a.rcl(b.zero_extend() as u8, f);
    Rcr: |a, b, f| a.rcr(b.zero_extend() as u8, f);
}

/// Arithmetic with one operand.
pub(crate) trait Unary: 'static {
    fn apply<W: Word>(a: W, flags: Flags) -> (W, Flags);
}

macro_rules! unary {
    ($($name:ident: |$a:ident, $f:ident| $e:expr;)*) => {
        $(
            pub(crate) struct $name;
            impl Unary for $name {
                #[inline(always)]
                fn apply<W: Word>($a: W, $f: Flags) -> (W, Flags) {
                    $e
                }
            }
        )*
    };
}

unary! {
    Inc: |a, f| a.inc(f);
    Dec: |a, f| a.dec(f);
    Neg: |a, _f| a.neg();
    Not: |a, f| (W::truncate(!a.zero_extend()), f);
}

/// `dst = dst op source`.
fn binary_r<W: Operand, B: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(b) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let (value, flags) = B::apply(cpu.get::<W>(op.dst), b, cpu.flags());
    cpu.set(op.dst, value);
    cpu.set_flags(flags);
    Step::Next
}

/// `flags = dst op source`.
fn compare_r<W: Operand, B: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(b) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    cpu.set_flags(B::apply(cpu.get::<W>(op.dst), b, Flags::NONE).1);
    Step::Next
}

/// `[memory] = [memory] op source`.
fn binary_m<W: Operand, B: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(b) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let flags = cpu.flags();
    match cpu.modify(cpu.address(op), |a: W| B::apply(a, b, flags).0) {
        Ok(old) => {
            cpu.set_flags(B::apply(old, b, flags).1);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// `[memory] = [memory] op source` with LOCK.
fn locked_binary<W: Operand, B: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(b) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let flags = cpu.flags();
    match cpu.update(cpu.address(op), |a: W| B::apply(a, b, flags).0) {
        Ok(old) => {
            cpu.set_flags(B::apply(old, b, flags).1);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// INC, DEC, NEG and NOT with LOCK.
fn locked_unary<W: Operand, U: Unary>(cpu: &mut Cpu, op: &Op) -> Step {
    let flags = cpu.flags();
    match cpu.update(cpu.address(op), |a: W| U::apply(a, flags).0) {
        Ok(old) => {
            cpu.set_flags(U::apply(old, flags).1);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// XCHG with memory, which is always locked. The other operand is [`Op::src`].
fn locked_exchange<W: Operand>(cpu: &mut Cpu, op: &Op) -> Step {
    let new = cpu.get::<W>(op.src);
    match cpu.update(cpu.address(op), |_| new) {
        Ok(old) => {
            cpu.set(op.src, old);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// XADD with memory, with or without LOCK.
fn exchange_add<W: Operand>(cpu: &mut Cpu, op: &Op) -> Step {
    let source = cpu.get::<W>(op.src);
    match cpu.update(cpu.address(op), |old: W| old.add(source).0) {
        Ok(old) => {
            cpu.set_flags(old.add(source).1);
            cpu.set(op.src, old);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// CMPXCHG with memory, with or without LOCK.
fn compare_exchange<W: Operand>(cpu: &mut Cpu, op: &Op) -> Step {
    let (new, expected) = (cpu.get::<W>(op.src), cpu.get::<W>(reg::RAX as u8));
    let change = |old: W| if old == expected { new } else { old };
    match cpu.update(cpu.address(op), change) {
        Ok(old) => {
            cpu.set_flags(expected.cmp(old));
            if old != expected {
                cpu.set(reg::RAX as u8, old);
            }
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// CWDE and CDQE: sign-extends the lower half of the accumulator.
fn widen<D: Operand, W: Operand>(cpu: &mut Cpu, _: &Op) -> Step {
    let value = cpu.get::<W>(reg::RAX as u8).sign_extend();
    cpu.set(reg::RAX as u8, <D as Word>::truncate(value));
    Step::Next
}

/// CDQ and CQO: the accumulator's sign to RDX.
fn widen_pair<W: Operand>(cpu: &mut Cpu, _: &Op) -> Step {
    let value = cpu.get::<W>(reg::RAX as u8).sign_extend() as i64 >> 63;
    cpu.set(reg::RDX as u8, <W as Word>::truncate(value as u64));
    Step::Next
}

/// `flags = [memory] op source`.
fn compare_m<W: Operand, B: Binary, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(a) = M::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let Ok(b) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    cpu.set_flags(B::apply(a, b, Flags::NONE).1);
    Step::Next
}

fn unary_r<W: Operand, U: Unary>(cpu: &mut Cpu, op: &Op) -> Step {
    let (value, flags) = U::apply(cpu.get::<W>(op.dst), cpu.flags());
    cpu.set(op.dst, value);
    cpu.set_flags(flags);
    Step::Next
}

fn unary_m<W: Operand, U: Unary>(cpu: &mut Cpu, op: &Op) -> Step {
    let flags = cpu.flags();
    match cpu.modify(cpu.address(op), |a: W| U::apply(a, flags).0) {
        Ok(old) => {
            cpu.set_flags(U::apply(old, flags).1);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// Shift or rotate of a register by CL.
fn shift_cl<W: Operand, B: Binary>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = W::truncate(cpu.gpr(reg::RCX) & 0xFF);
    let (value, flags) = B::apply(cpu.get::<W>(op.dst), count, cpu.flags());
    cpu.set(op.dst, value);
    cpu.set_flags(flags);
    Step::Next
}

fn move_r<W: Operand, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    match S::get::<W>(cpu, op) {
        Ok(value) => {
            cpu.set(op.dst, value);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

fn move_m<W: Operand, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(value) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    step(cpu.store(cpu.address(op), value))
}

/// MOVZX into D from W.
fn zero_extend<D: Operand, W: Operand, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    match S::get::<W>(cpu, op) {
        Ok(value) => {
            cpu.set(op.dst, <D as Word>::truncate(value.zero_extend()));
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

/// MOVSX and MOVSXD.
fn sign_extend<D: Operand, W: Operand, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    match S::get::<W>(cpu, op) {
        Ok(value) => {
            cpu.set(op.dst, <D as Word>::truncate(value.sign_extend()));
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

fn lea<W: Operand>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.set(op.dst, <W as Word>::truncate(cpu.offset(op)));
    Step::Next
}

fn multiply<W: Operand + WideWord, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(b) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let (value, flags) = cpu.get::<W>(op.dst).imul(b);
    cpu.set(op.dst, value);
    cpu.set_flags(flags);
    Step::Next
}

/// IMUL with three operands.
fn multiply_by<W: Operand + WideWord, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(a) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let (value, flags) = a.imul(<W as Word>::truncate(op.imm));
    cpu.set(op.dst, value);
    cpu.set_flags(flags);
    Step::Next
}

fn bit_test<W: Operand + WideWord, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(bit) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let flags = cpu.get::<W>(op.dst).bt(bit, cpu.flags());
    cpu.set_flags(flags);
    Step::Next
}

fn exchange<W: Operand>(cpu: &mut Cpu, op: &Op) -> Step {
    let (a, b) = (cpu.get::<W>(op.dst), cpu.get::<W>(op.src));
    cpu.set(op.dst, b);
    cpu.set(op.src, a);
    Step::Next
}

fn set_condition<const C: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = u8::from(cpu.flags().condition(C));
    cpu.set(op.dst, value);
    Step::Next
}

fn conditional_move<W: Operand, S: Source, const C: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(value) = S::get::<W>(cpu, op) else {
        return Step::Trap;
    };
    let value = if cpu.flags().condition(C) {
        value
    } else {
        cpu.get::<W>(op.dst)
    };
    cpu.set(op.dst, value);
    Step::Next
}

fn push<S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(value) = S::get::<u64>(cpu, op) else {
        return Step::Trap;
    };
    step(cpu.push64(value))
}

fn pop(cpu: &mut Cpu, op: &Op) -> Step {
    match cpu.pop64() {
        Ok(value) => {
            cpu.set(op.dst, value);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

fn leave(cpu: &mut Cpu, _: &Op) -> Step {
    let frame = cpu.gpr(reg::RBP);
    match cpu.peek64(frame) {
        Ok(value) => {
            cpu.set_gpr(reg::RSP, frame.wrapping_add(8));
            cpu.set_gpr(reg::RBP, value);
            Step::Next
        }
        Err(_) => Step::Trap,
    }
}

fn nothing(_: &mut Cpu, _: &Op) -> Step {
    Step::Next
}

/// Conditional jump; not taken, the block goes on.
fn jump_if<const C: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.flags().condition(C) {
        cpu.rip = cpu.gpr(reg::BLOCK).wrapping_add(op.imm);
        Step::Taken
    } else {
        Step::Next
    }
}

fn jump(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.rip = cpu.gpr(reg::BLOCK).wrapping_add(op.imm);
    Step::Taken
}

fn call(cpu: &mut Cpu, op: &Op) -> Step {
    match cpu.push64(cpu.after(op)) {
        Ok(()) => jump(cpu, op),
        Err(_) => Step::Trap,
    }
}

/// Goes to an address that is not known before; it must be canonical.
#[inline(always)]
fn go_to(cpu: &mut Cpu, target: u64) -> Step {
    cpu.rip = target;
    Step::Indirect
}

fn jump_to<S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    match S::get::<u64>(cpu, op) {
        Ok(target) if anemone_soft_mmu::is_canonical(target) => go_to(cpu, target),
        Ok(_) => {
            cpu.gp();
            Step::Trap
        }
        Err(_) => Step::Trap,
    }
}

fn call_to<S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let Ok(target) = S::get::<u64>(cpu, op) else {
        return Step::Trap;
    };
    if !anemone_soft_mmu::is_canonical(target) {
        cpu.gp();
        return Step::Trap;
    }
    match cpu.push64(cpu.after(op)) {
        Ok(()) => go_to(cpu, target),
        Err(_) => Step::Trap,
    }
}

fn ret(cpu: &mut Cpu, op: &Op) -> Step {
    let top = cpu.gpr(reg::RSP);
    match cpu.peek64(top) {
        Ok(target) if anemone_soft_mmu::is_canonical(target) => {
            cpu.set_gpr(reg::RSP, top.wrapping_add(8).wrapping_add(op.imm));
            go_to(cpu, target)
        }
        Ok(_) => {
            cpu.gp();
            Step::Trap
        }
        Err(_) => Step::Trap,
    }
}

/// The end of a block that ends without a jump.
pub(crate) fn end(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.rip = cpu.at(op) & op.imm;
    Step::Fall
}

/// An instruction that a handler carries out.
pub(crate) fn whole(cpu: &mut Cpu, op: &Op) -> Step {
    // SAFETY: the block owns the instruction and lives while one of its operations runs.
    let whole = unsafe { &*(op.imm as *const Whole) };
    let rip = cpu.at(op) & op.disp as u64;
    let next = rip.wrapping_add(op.length.into()) & op.disp as u64;
    cpu.rip = rip;
    cpu.next = next;
    if (whole.handler)(cpu, &whole.instruction).is_err() {
        return Step::Trap;
    }
    cpu.rip = cpu.next;
    if cpu.leave_block {
        Step::Leave
    } else if cpu.next != next {
        Step::Indirect
    } else {
        Step::Next
    }
}

/// An instruction that is not there: #UD.
pub(crate) fn undefined(cpu: &mut Cpu, op: &Op) -> Step {
    // SAFETY: as in `whole`.
    let whole = unsafe { &*(op.imm as *const Whole) };
    cpu.rip = cpu.at(op) & op.disp as u64;
    cpu.report_undefined(&whole.bytes[..usize::from(op.length).min(15)]);
    cpu.ud();
    Step::Trap
}

/// A vector or x87 instruction while CR0.TS or CR0.EM is set: #NM.
pub(crate) fn not_available(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.rip = cpu.at(op) & op.disp as u64;
    cpu.raise(Exception::NM);
    Step::Trap
}

/// Selects by operand size in bytes.
macro_rules! by_size {
    ($size:expr, $f:ident $(, $t:ty)*) => {
        match $size {
            1 => $f::<u8 $(, $t)*>,
            2 => $f::<u16 $(, $t)*>,
            4 => $f::<u32 $(, $t)*>,
            _ => $f::<u64 $(, $t)*>,
        }
    };
}

pub(crate) use by_size;

/// Selects by operand size where there is no byte form.
macro_rules! by_wide_size {
    ($size:expr, $f:ident $(, $t:ty)*) => {
        match $size {
            2 => $f::<u16 $(, $t)*>,
            4 => $f::<u32 $(, $t)*>,
            _ => $f::<u64 $(, $t)*>,
        }
    };
}

pub(crate) use by_wide_size;

macro_rules! by_condition {
    ($c:expr, $f:ident, $($t:ty),*) => {
        match $c & 15 {
            0 => $f::<$($t,)* 0>, 1 => $f::<$($t,)* 1>, 2 => $f::<$($t,)* 2>, 3 => $f::<$($t,)* 3>,
            4 => $f::<$($t,)* 4>, 5 => $f::<$($t,)* 5>, 6 => $f::<$($t,)* 6>, 7 => $f::<$($t,)* 7>,
            8 => $f::<$($t,)* 8>, 9 => $f::<$($t,)* 9>, 10 => $f::<$($t,)* 10>, 11 => $f::<$($t,)* 11>,
            12 => $f::<$($t,)* 12>, 13 => $f::<$($t,)* 13>, 14 => $f::<$($t,)* 14>, _ => $f::<$($t,)* 15>,
        }
    };
}

/// Forms of the operands that the operations know.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Register,
    Memory,
    Immediate,
    Other,
}

fn kind(instruction: &Instruction, operand: u32) -> Kind {
    if operand >= instruction.op_count() {
        return Kind::Other;
    }
    match instruction.op_kind(operand) {
        OpKind::Register => {
            let register = instruction.op_register(operand);
            let high = matches!(
                register,
                Register::AH | Register::CH | Register::DH | Register::BH
            );
            if register.is_gpr() && !high {
                Kind::Register
            } else {
                Kind::Other
            }
        }
        OpKind::Memory => Kind::Memory,
        OpKind::NearBranch64 => Kind::Immediate,
        _ => match instruction.try_immediate(operand) {
            Ok(_) => Kind::Immediate,
            Err(_) => Kind::Other,
        },
    }
}

/// Whether the memory operand, if there is one, is addressed with 64 bits.
fn is_plain_address(instruction: &Instruction) -> bool {
    let wide = |r: Register| r == Register::None || r == Register::RIP || r.is_gpr64();
    let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
    !memory
        || (wide(instruction.memory_base())
            && wide(instruction.memory_index())
            && !(instruction.memory_base() == Register::None
                && instruction.memory_index() == Register::None
                && instruction.memory_displ_size() == 4))
}

/// Puts the memory operand's address into `op`; false if the operations cannot form it.
pub(crate) fn set_address(op: &mut Op, instruction: &Instruction) -> bool {
    if !is_plain_address(instruction) {
        return false;
    }
    let number = |register: Register| match register {
        Register::None => reg::ZERO as u8,
        Register::RIP => reg::BLOCK as u8,
        other => other.number() as u8,
    };
    op.base = number(instruction.memory_base());
    op.index = number(instruction.memory_index());
    op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
    op.disp = instruction.memory_displacement64() as i64;
    op.segment = match instruction.memory_segment() {
        Register::None => seg::DS as u8,
        segment => (segment as usize - Register::ES as usize) as u8,
    };
    true
}

/// The condition code of a Jcc, SETcc or CMOVcc.
pub(crate) fn condition(instruction: &Instruction) -> u8 {
    // iced numbers them o, no, b, ae, … from 1, as the encoding does from 0.
    instruction.condition_code() as u8 - 1
}

/// Chooses the operation for an instruction of 64-bit code and fills in its operands. `None` if
/// there is only the handler.
pub(crate) fn operation(op: &mut Op, instruction: &Instruction) -> Option<OpFn> {
    if !set_address(op, instruction) {
        return None;
    }
    let kinds = [
        kind(instruction, 0),
        kind(instruction, 1),
        kind(instruction, 2),
    ];
    for (operand, place) in [(0, &mut op.dst), (1, &mut op.src)] {
        if kinds[operand as usize] == Kind::Register {
            *place = instruction.op_register(operand).full_register().number() as u8;
        }
    }
    if let Some(last) = (0..3u32)
        .rev()
        .find(|n| kinds[*n as usize] == Kind::Immediate)
        && instruction.op_kind(last) != OpKind::NearBranch64
    {
        op.imm = instruction.immediate(last);
    }
    let size = match kinds[0] {
        Kind::Register => instruction.op_register(0).size(),
        Kind::Memory => instruction.memory_size().size(),
        _ => 8,
    };
    if instruction.has_lock_prefix() || kinds[0] == Kind::Memory {
        let function = atomic(instruction, kinds, size);
        if function.is_some() || instruction.has_lock_prefix() {
            return function;
        }
    }
    general(op, instruction, kinds, size).or_else(|| control(op, instruction, kinds))
}

/// Instructions that read and write memory as one.
fn atomic(instruction: &Instruction, kinds: [Kind; 3], size: usize) -> Option<OpFn> {
    use Kind::{Immediate as Im, Memory as Me, Other as Ot, Register as Re};
    macro_rules! arithmetic {
        ($b:ty) => {
            match kinds {
                [Me, Re, Ot] => by_size!(size, locked_binary, $b, R),
                [Me, Im, Ot] => by_size!(size, locked_binary, $b, I),
                _ => return None,
            }
        };
    }
    let lock = instruction.has_lock_prefix();
    let function: OpFn = match instruction.mnemonic() {
        Mnemonic::Xchg if kinds == [Me, Re, Ot] => by_size!(size, locked_exchange),
        Mnemonic::Xadd if kinds == [Me, Re, Ot] => by_size!(size, exchange_add),
        Mnemonic::Cmpxchg if kinds == [Me, Re, Ot] => by_size!(size, compare_exchange),
        Mnemonic::Add if lock => arithmetic!(Add),
        Mnemonic::Sub if lock => arithmetic!(Sub),
        Mnemonic::And if lock => arithmetic!(And),
        Mnemonic::Or if lock => arithmetic!(Or),
        Mnemonic::Xor if lock => arithmetic!(Xor),
        Mnemonic::Adc if lock => arithmetic!(Adc),
        Mnemonic::Sbb if lock => arithmetic!(Sbb),
        Mnemonic::Inc if lock => by_size!(size, locked_unary, Inc),
        Mnemonic::Dec if lock => by_size!(size, locked_unary, Dec),
        Mnemonic::Neg if lock => by_size!(size, locked_unary, Neg),
        Mnemonic::Not if lock => by_size!(size, locked_unary, Not),
        _ => return None,
    };
    Some(function)
}

fn general(op: &mut Op, instruction: &Instruction, kinds: [Kind; 3], size: usize) -> Option<OpFn> {
    use Kind::{Immediate as Im, Memory as Me, Other as Ot, Register as Re};
    let conditional = instruction.condition_code() != iced_x86::ConditionCode::None;
    macro_rules! arithmetic {
        ($b:ty) => {
            match kinds {
                [Re, Re, Ot] => by_size!(size, binary_r, $b, R),
                [Re, Im, Ot] => by_size!(size, binary_r, $b, I),
                [Re, Me, Ot] => by_size!(size, binary_r, $b, M),
                [Me, Re, Ot] => by_size!(size, binary_m, $b, R),
                [Me, Im, Ot] => by_size!(size, binary_m, $b, I),
                _ => return None,
            }
        };
    }
    macro_rules! comparison {
        ($b:ty) => {
            match kinds {
                [Re, Re, Ot] => by_size!(size, compare_r, $b, R),
                [Re, Im, Ot] => by_size!(size, compare_r, $b, I),
                [Re, Me, Ot] => by_size!(size, compare_r, $b, M),
                [Me, Re, Ot] => by_size!(size, compare_m, $b, R),
                [Me, Im, Ot] => by_size!(size, compare_m, $b, I),
                _ => return None,
            }
        };
    }
    macro_rules! single {
        ($u:ty) => {
            match kinds[0] {
                Re => by_size!(size, unary_r, $u),
                Me => by_size!(size, unary_m, $u),
                _ => return None,
            }
        };
    }
    macro_rules! shift {
        ($b:ty) => {
            match kinds {
                [Re, Im, Ot] => by_size!(size, binary_r, $b, I),
                [Re, Re, Ot] => by_size!(size, shift_cl, $b),
                _ => return None,
            }
        };
    }
    let function: OpFn = match instruction.mnemonic() {
        Mnemonic::Mov => match kinds {
            [Re, Re, Ot] => by_size!(size, move_r, R),
            [Re, Im, Ot] => by_size!(size, move_r, I),
            [Re, Me, Ot] => by_size!(size, move_r, M),
            [Me, Re, Ot] => by_size!(size, move_m, R),
            [Me, Im, Ot] => by_size!(size, move_m, I),
            _ => return None,
        },
        Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => {
            extension(instruction, kinds, size)?
        }
        Mnemonic::Lea => by_wide_size!(size, lea),
        Mnemonic::Add => arithmetic!(Add),
        Mnemonic::Sub => arithmetic!(Sub),
        Mnemonic::And => arithmetic!(And),
        Mnemonic::Or => arithmetic!(Or),
        Mnemonic::Xor => arithmetic!(Xor),
        Mnemonic::Adc => arithmetic!(Adc),
        Mnemonic::Sbb => arithmetic!(Sbb),
        Mnemonic::Cmp => comparison!(Cmp),
        Mnemonic::Test => comparison!(Test),
        Mnemonic::Inc => single!(Inc),
        Mnemonic::Dec => single!(Dec),
        Mnemonic::Neg => single!(Neg),
        Mnemonic::Not => single!(Not),
        Mnemonic::Shl => shift!(Shl),
        Mnemonic::Shr => shift!(Shr),
        Mnemonic::Sar => shift!(Sar),
        Mnemonic::Rol => shift!(Rol),
        Mnemonic::Ror => shift!(Ror),
        Mnemonic::Imul => match kinds {
            [Re, Re, Ot] => by_wide_size!(size, multiply, R),
            [Re, Me, Ot] => by_wide_size!(size, multiply, M),
            [Re, Re, Im] => by_wide_size!(size, multiply_by, R),
            [Re, Me, Im] => by_wide_size!(size, multiply_by, M),
            _ => return None,
        },
        Mnemonic::Bt => match kinds {
            [Re, Re, Ot] => by_wide_size!(size, bit_test, R),
            [Re, Im, Ot] => by_wide_size!(size, bit_test, I),
            _ => return None,
        },
        Mnemonic::Xchg if kinds == [Re, Re, Ot] => by_size!(size, exchange),
        Mnemonic::Push if instruction.stack_pointer_increment() == -8 => match kinds {
            [Re, Ot, Ot] => {
                op.src = op.dst;
                push::<R>
            }
            [Im, Ot, Ot] => push::<I>,
            [Me, Ot, Ot] => push::<M>,
            _ => return None,
        },
        Mnemonic::Pop if kinds[0] == Re && size == 8 => pop,
        Mnemonic::Leave if instruction.stack_pointer_increment() == 0 => {
            if instruction.code() != iced_x86::Code::Leaveq {
                return None;
            }
            leave
        }
        Mnemonic::Cwde => widen::<u32, u16>,
        Mnemonic::Cdqe => widen::<u64, u32>,
        Mnemonic::Cdq => widen_pair::<u32>,
        Mnemonic::Cqo => widen_pair::<u64>,
        Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32 => nothing,
        _ if conditional && kinds == [Re, Ot, Ot] && size == 1 => {
            by_condition!(condition(instruction), set_condition,)
        }
        _ if conditional && kinds[0] == Re && kinds[2] == Ot => {
            let code = condition(instruction);
            match (kinds[1], size) {
                (Re, 2) => by_condition!(code, conditional_move, u16, R),
                (Re, 4) => by_condition!(code, conditional_move, u32, R),
                (Re, 8) => by_condition!(code, conditional_move, u64, R),
                (Me, 2) => by_condition!(code, conditional_move, u16, M),
                (Me, 4) => by_condition!(code, conditional_move, u32, M),
                (Me, 8) => by_condition!(code, conditional_move, u64, M),
                _ => return None,
            }
        }
        _ => return None,
    };
    Some(function)
}

fn extension(instruction: &Instruction, kinds: [Kind; 3], size: usize) -> Option<OpFn> {
    let from = match kinds[1] {
        Kind::Register => instruction.op_register(1).size(),
        Kind::Memory => instruction.memory_size().size(),
        _ => return None,
    };
    let memory = kinds[1] == Kind::Memory;
    macro_rules! extend {
        ($f:ident, $d:ty, $w:ty) => {
            if memory {
                $f::<$d, $w, M>
            } else {
                $f::<$d, $w, R>
            }
        };
    }
    let zero = instruction.mnemonic() == Mnemonic::Movzx;
    let function: OpFn = match (zero, size, from) {
        (true, 2, 1) => extend!(zero_extend, u16, u8),
        (true, 4, 1) => extend!(zero_extend, u32, u8),
        (true, 8, 1) => extend!(zero_extend, u64, u8),
        (true, 4, 2) => extend!(zero_extend, u32, u16),
        (true, 8, 2) => extend!(zero_extend, u64, u16),
        (false, 2, 1) => extend!(sign_extend, u16, u8),
        (false, 4, 1) => extend!(sign_extend, u32, u8),
        (false, 8, 1) => extend!(sign_extend, u64, u8),
        (false, 4, 2) => extend!(sign_extend, u32, u16),
        (false, 8, 2) => extend!(sign_extend, u64, u16),
        (false, 8, 4) => extend!(sign_extend, u64, u32),
        _ => return None,
    };
    Some(function)
}

/// Jumps, calls and returns.
fn control(op: &mut Op, instruction: &Instruction, kinds: [Kind; 3]) -> Option<OpFn> {
    let direct = instruction.op_count() == 1 && instruction.op_kind(0) == OpKind::NearBranch64;
    if direct {
        op.imm = instruction.near_branch64();
    }
    let wide = match kinds[0] {
        Kind::Register => instruction.op_register(0).size() == 8,
        Kind::Memory => instruction.memory_size().size() == 8,
        _ => false,
    };
    let function: OpFn = match instruction.mnemonic() {
        Mnemonic::Jmp if direct => jump,
        Mnemonic::Call if direct => call,
        Mnemonic::Jmp if wide && instruction.is_jmp_near_indirect() => {
            op.src = op.dst;
            if kinds[0] == Kind::Register {
                jump_to::<R>
            } else {
                jump_to::<M>
            }
        }
        Mnemonic::Call if wide && instruction.is_call_near_indirect() => {
            op.src = op.dst;
            if kinds[0] == Kind::Register {
                call_to::<R>
            } else {
                call_to::<M>
            }
        }
        Mnemonic::Ret if instruction.code() == iced_x86::Code::Retnq => {
            op.imm = 0;
            ret
        }
        Mnemonic::Ret if instruction.code() == iced_x86::Code::Retnq_imm16 => ret,
        _ if direct && instruction.is_jcc_short_or_near() => {
            by_condition!(condition(instruction), jump_if,)
        }
        _ => return None,
    };
    Some(function)
}
