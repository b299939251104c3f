//! Integer primitives: the host's own instruction, inlined, with its flags.
//!
//! Each function is the instruction of its name on values: the interpreter fetches operands and
//! stores results through its own memory path. Where the manual leaves a flag undefined, the host's
//! value or the one before is returned. Instructions that keep some flags take the flags before and return all six.

use std::arch::asm;

use crate::Flags;

/// A division that raises #DE: the divisor is 0 or the quotient does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("#DE: the divisor is 0 or the quotient does not fit its register")]
pub struct DivideError;

/// An operand of 8, 16, 32 or 64 bits.
pub trait Word: Copy + Eq + std::fmt::Debug + 'static {
    /// Width in bits.
    const BITS: u32;

    /// The low bits of `value`.
    fn truncate(value: u64) -> Self;
    /// Zero-extended.
    fn zero_extend(self) -> u64;
    /// Sign-extended.
    fn sign_extend(self) -> u64;

    /// ADD.
    fn add(self, other: Self) -> (Self, Flags);
    /// ADC: adds CF of `flags` too.
    fn adc(self, other: Self, flags: Flags) -> (Self, Flags);
    /// SUB.
    fn sub(self, other: Self) -> (Self, Flags);
    /// SBB: subtracts CF of `flags` too.
    fn sbb(self, other: Self, flags: Flags) -> (Self, Flags);
    /// AND.
    fn and(self, other: Self) -> (Self, Flags);
    /// OR.
    fn or(self, other: Self) -> (Self, Flags);
    /// XOR.
    fn xor(self, other: Self) -> (Self, Flags);
    /// CMP.
    fn cmp(self, other: Self) -> Flags;
    /// TEST.
    fn test(self, other: Self) -> Flags;
    /// INC; CF stays.
    fn inc(self, flags: Flags) -> (Self, Flags);
    /// DEC; CF stays.
    fn dec(self, flags: Flags) -> (Self, Flags);
    /// NEG.
    fn neg(self) -> (Self, Flags);
    /// SHL, also known as SAL. The count is masked as the CPU does; a masked count of 0 keeps `flags`.
    fn shl(self, count: u8, flags: Flags) -> (Self, Flags);
    /// SHR.
    fn shr(self, count: u8, flags: Flags) -> (Self, Flags);
    /// SAR.
    fn sar(self, count: u8, flags: Flags) -> (Self, Flags);
    /// ROL.
    fn rol(self, count: u8, flags: Flags) -> (Self, Flags);
    /// ROR.
    fn ror(self, count: u8, flags: Flags) -> (Self, Flags);
    /// RCL.
    fn rcl(self, count: u8, flags: Flags) -> (Self, Flags);
    /// RCR.
    fn rcr(self, count: u8, flags: Flags) -> (Self, Flags);
    /// MUL with one operand: low half, high half.
    fn mul(self, other: Self) -> (Self, Self, Flags);
    /// IMUL with one operand: low half, high half.
    fn imul_wide(self, other: Self) -> (Self, Self, Flags);
    /// DIV of `high:self`: quotient and remainder. The flags, which the manual leaves undefined,
    /// are kept by the caller.
    fn div(self, high: Self, divisor: Self) -> Result<(Self, Self), DivideError>;
    /// IDIV of `high:self`: quotient and remainder.
    fn idiv(self, high: Self, divisor: Self) -> Result<(Self, Self), DivideError>;

    /// XADD: the new destination and the new source.
    #[inline(always)]
    fn xadd(self, source: Self) -> (Self, Self, Flags) {
        let (sum, flags) = self.add(source);
        (sum, self, flags)
    }

    /// CMPXCHG without atomicity: the new destination (which hardware writes in both cases), the new
    /// accumulator, the flags of the comparison.
    #[inline(always)]
    fn cmpxchg(self, source: Self, accumulator: Self) -> (Self, Self, Flags) {
        let flags = accumulator.cmp(self);
        if self == accumulator {
            (source, accumulator, flags)
        } else {
            (self, self, flags)
        }
    }
}

/// An operand of 16, 32 or 64 bits, for the instructions that have no byte form.
pub trait WideWord: Word {
    /// IMUL with two or three operands.
    fn imul(self, other: Self) -> (Self, Flags);
    /// SHLD: bits come in from the top of `other`.
    fn shld(self, other: Self, count: u8, flags: Flags) -> (Self, Flags);
    /// SHRD: bits come in from the bottom of `other`.
    fn shrd(self, other: Self, count: u8, flags: Flags) -> (Self, Flags);
    /// BT with a register destination: the bit number is taken modulo the width.
    fn bt(self, bit: Self, flags: Flags) -> Flags;
    /// BTS with a register destination.
    fn bts(self, bit: Self, flags: Flags) -> (Self, Flags);
    /// BTR with a register destination.
    fn btr(self, bit: Self, flags: Flags) -> (Self, Flags);
    /// BTC with a register destination.
    fn btc(self, bit: Self, flags: Flags) -> (Self, Flags);
    /// BSF. A source of 0 keeps `old`; a 32-bit form then also keeps the upper half of the
    /// register on some CPUs, which is the caller's choice.
    fn bsf(self, old: Self, flags: Flags) -> (Self, Flags);
    /// BSR, as [`WideWord::bsf`].
    fn bsr(self, old: Self, flags: Flags) -> (Self, Flags);
    /// POPCNT.
    fn popcnt(self) -> (Self, Flags);
    /// LZCNT; computed without the host's instruction, which an old host would take for BSR.
    fn lzcnt(self, flags: Flags) -> (Self, Flags);
    /// TZCNT, as [`WideWord::lzcnt`].
    fn tzcnt(self, flags: Flags) -> (Self, Flags);
    /// The bytes in reverse order: BSWAP and MOVBE. (BSWAP of a 16-bit register is undefined.)
    fn reverse_bytes(self) -> Self;
}

/// `result, flags = op(a, b)` for an instruction that reads no flags.
macro_rules! binary {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self, other: Self) -> (Self, Flags) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}, {1", $m, "}"),
                    "seto al",
                    "lahf",
                    inout($class) self,
                    in($class) other,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, Flags::from_ax(ax))
        }
    };
}

/// Flags only.
macro_rules! compare {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, other: Self) -> Flags {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}, {1", $m, "}"),
                    "seto al",
                    "lahf",
                    in($class) self,
                    in($class) other,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            Flags::from_ax(ax)
        }
    };
}

/// An instruction with one operand that reads no flags.
macro_rules! unary {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self) -> (Self, Flags) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}"),
                    "seto al",
                    "lahf",
                    inout($class) self,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, Flags::from_ax(ax))
        }
    };
}

/// INC and DEC: like [`binary`], with CF kept.
macro_rules! step {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self, flags: Flags) -> (Self, Flags) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}"),
                    "seto al",
                    "lahf",
                    inout($class) self,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, Flags::from_ax(ax).replace(Flags::CF, flags))
        }
    };
}

/// ADC and SBB: of the flags only CF is read, and BT brings it in faster than SAHF.
macro_rules! binary_with_carry {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self, other: Self, flags: Flags) -> (Self, Flags) {
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    "bt {flags:e}, 8",
                    concat!($mnemonic, " {0", $m, "}, {1", $m, "}"),
                    "seto al",
                    "lahf",
                    inout($class) self,
                    in($class) other,
                    flags = in(reg) u32::from(flags.to_ax()),
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, Flags::from_ax(ax))
        }
    };
}

/// BTS, BTR and BTC: CF is the only flag defined; the others are kept.
macro_rules! bit {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self, other: Self, flags: Flags) -> (Self, Flags) {
            let carry: u8;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}, {1", $m, "}"),
                    "setc {carry}",
                    inout($class) self,
                    in($class) other,
                    carry = out(reg_byte) carry,
                    options(pure, nomem, nostack),
                );
            }
            (self, flags.with(Flags::CF, carry != 0))
        }
    };
}

/// The bits of a shift count that the CPU looks at.
const fn count_mask(bits: u32) -> u8 {
    if bits == 64 { 63 } else { 31 }
}

/// SHL, SHR and SAR by CL: a count other than 0 writes all flags.
macro_rules! shift {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self, count: u8, flags: Flags) -> (Self, Flags) {
            if count & count_mask(Self::BITS) == 0 {
                return (self, flags);
            }
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}, cl"),
                    "seto al",
                    "lahf",
                    inout($class) self,
                    in("cl") count,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, Flags::from_ax(ax))
        }
    };
}

/// Rotations by CL: a count other than 0 writes CF and OF; RCL and RCR read CF.
macro_rules! rotate {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self, count: u8, flags: Flags) -> (Self, Flags) {
            if count & count_mask(Self::BITS) == 0 {
                return (self, flags);
            }
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    "bt {flags:e}, 8",
                    concat!($mnemonic, " {0", $m, "}, cl"),
                    "seto al",
                    "lahf",
                    inout($class) self,
                    in("cl") count,
                    flags = in(reg) u32::from(flags.to_ax()),
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, flags.replace(Flags::CF.union(Flags::OF), Flags::from_ax(ax)))
        }
    };
}

/// SHLD and SHRD.
macro_rules! double_shift {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(mut self, other: Self, count: u8, flags: Flags) -> (Self, Flags) {
            if count & count_mask(Self::BITS) == 0 {
                return (self, flags);
            }
            let ax: u16;
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}, {1", $m, "}, cl"),
                    "seto al",
                    "lahf",
                    inout($class) self,
                    in($class) other,
                    in("cl") count,
                    out("ax") ax,
                    options(pure, nomem, nostack),
                );
            }
            (self, Flags::from_ax(ax))
        }
    };
}

/// BSF and BSR: the destination is an operand of its own; ZF is the only flag defined.
macro_rules! scan {
    ($name:ident, $mnemonic:literal, $t:ty, $class:ident, $m:literal) => {
        #[inline(always)]
        fn $name(self, mut old: Self, flags: Flags) -> (Self, Flags) {
            // SAFETY: arithmetic on registers only.
            unsafe {
                asm!(
                    concat!($mnemonic, " {0", $m, "}, {1", $m, "}"),
                    inout($class) old,
                    in($class) self,
                    options(pure, nomem, nostack),
                );
            }
            (old, flags.with(Flags::ZF, self == 0))
        }
    };
}

/// MUL and IMUL with one operand, 16 to 64 bits: the accumulator pair is fixed, so the flags are
/// collected after the low half has left AX.
macro_rules! multiply {
    ($name:ident, $mnemonic:literal, $m:literal) => {
        #[inline(always)]
        fn $name(self, other: Self) -> (Self, Self, Flags) {
            let (low, high, ax): (Self, Self, u64);
            // SAFETY: arithmetic on registers only; every register written is declared.
            unsafe {
                asm!(
                    concat!($mnemonic, " {other", $m, "}"),
                    "mov {low:r}, rax",
                    "seto al",
                    "lahf",
                    other = in(reg) other,
                    low = lateout(reg) low,
                    inout("rax") u64::from(self) => ax,
                    lateout("rdx") high,
                    options(pure, nomem, nostack),
                );
            }
            (low, high, Flags::from_ax(ax as u16))
        }
    };
}

macro_rules! word {
    ($t:ty, $signed:ty, $class:ident, $m:literal) => {
        const BITS: u32 = <$t>::BITS;

        #[inline(always)]
        fn truncate(value: u64) -> Self {
            value as $t
        }

        #[inline(always)]
        fn zero_extend(self) -> u64 {
            u64::from(self)
        }

        #[inline(always)]
        fn sign_extend(self) -> u64 {
            self as $signed as i64 as u64
        }

        binary!(add, "add", $t, $class, $m);
        binary!(sub, "sub", $t, $class, $m);
        binary!(and, "and", $t, $class, $m);
        binary!(or, "or", $t, $class, $m);
        binary!(xor, "xor", $t, $class, $m);
        compare!(cmp, "cmp", $t, $class, $m);
        compare!(test, "test", $t, $class, $m);
        unary!(neg, "neg", $t, $class, $m);
        step!(inc, "inc", $t, $class, $m);
        step!(dec, "dec", $t, $class, $m);
        binary_with_carry!(adc, "adc", $t, $class, $m);
        binary_with_carry!(sbb, "sbb", $t, $class, $m);
        shift!(shl, "shl", $t, $class, $m);
        shift!(shr, "shr", $t, $class, $m);
        shift!(sar, "sar", $t, $class, $m);
        rotate!(rol, "rol", $t, $class, $m);
        rotate!(ror, "ror", $t, $class, $m);
        rotate!(rcl, "rcl", $t, $class, $m);
        rotate!(rcr, "rcr", $t, $class, $m);
    };
}

/// Division by way of a type twice as wide, in which nothing overflows.
macro_rules! divide {
    ($t:ty, $signed:ty, $wide:ty, $wide_signed:ty) => {
        #[inline]
        fn div(self, high: Self, divisor: Self) -> Result<(Self, Self), DivideError> {
            // The quotient fits exactly when the high half is below the divisor.
            if high >= divisor {
                return Err(DivideError);
            }
            let dividend = (high as $wide) << Self::BITS | self as $wide;
            Ok((
                (dividend / divisor as $wide) as $t,
                (dividend % divisor as $wide) as $t,
            ))
        }

        #[inline]
        fn idiv(self, high: Self, divisor: Self) -> Result<(Self, Self), DivideError> {
            let dividend = ((high as $wide) << Self::BITS | self as $wide) as $wide_signed;
            let divisor = divisor as $signed as $wide_signed;
            // The most negative dividend divided by -1 overflows even the wide type.
            let quotient = dividend.checked_div(divisor).ok_or(DivideError)?;
            let narrow = <$signed>::try_from(quotient).map_err(|_| DivideError)?;
            Ok((narrow as $t, (dividend % divisor) as $t))
        }
    };
}

impl Word for u8 {
    word!(u8, i8, reg_byte, "");
    divide!(u8, i8, u16, i16);

    #[inline(always)]
    fn mul(self, other: Self) -> (Self, Self, Flags) {
        let (product, ax): (u16, u16);
        // SAFETY: arithmetic on registers only.
        unsafe {
            asm!(
                "mul {other}",
                "mov {product:x}, ax",
                "seto al",
                "lahf",
                other = in(reg_byte) other,
                product = lateout(reg) product,
                inout("ax") u16::from(self) => ax,
                options(pure, nomem, nostack),
            );
        }
        (product as u8, (product >> 8) as u8, Flags::from_ax(ax))
    }

    #[inline(always)]
    fn imul_wide(self, other: Self) -> (Self, Self, Flags) {
        let (product, ax): (u16, u16);
        // SAFETY: arithmetic on registers only.
        unsafe {
            asm!(
                "imul {other}",
                "mov {product:x}, ax",
                "seto al",
                "lahf",
                other = in(reg_byte) other,
                product = lateout(reg) product,
                inout("ax") u16::from(self) => ax,
                options(pure, nomem, nostack),
            );
        }
        (product as u8, (product >> 8) as u8, Flags::from_ax(ax))
    }
}

macro_rules! wide_word {
    ($t:ty, $signed:ty, $wide:ty, $wide_signed:ty, $m:literal) => {
        impl Word for $t {
            word!($t, $signed, reg, $m);
            divide!($t, $signed, $wide, $wide_signed);
            multiply!(mul, "mul", $m);
            multiply!(imul_wide, "imul", $m);
        }

        impl WideWord for $t {
            binary!(imul, "imul", $t, reg, $m);
            double_shift!(shld, "shld", $t, reg, $m);
            double_shift!(shrd, "shrd", $t, reg, $m);
            bit!(bts, "bts", $t, reg, $m);
            bit!(btr, "btr", $t, reg, $m);
            bit!(btc, "btc", $t, reg, $m);
            scan!(bsf, "bsf", $t, reg, $m);
            scan!(bsr, "bsr", $t, reg, $m);

            #[inline(always)]
            fn bt(self, bit: Self, flags: Flags) -> Flags {
                flags.with(Flags::CF, self >> (bit as u32 % Self::BITS) & 1 != 0)
            }

            #[inline(always)]
            fn popcnt(self) -> (Self, Flags) {
                (
                    self.count_ones() as $t,
                    Flags::NONE.with(Flags::ZF, self == 0),
                )
            }

            #[inline(always)]
            fn lzcnt(self, flags: Flags) -> (Self, Flags) {
                let count = self.leading_zeros();
                let flags = flags
                    .with(Flags::CF, count == Self::BITS)
                    .with(Flags::ZF, count == 0);
                (count as $t, flags)
            }

            #[inline(always)]
            fn tzcnt(self, flags: Flags) -> (Self, Flags) {
                let count = self.trailing_zeros();
                let flags = flags
                    .with(Flags::CF, count == Self::BITS)
                    .with(Flags::ZF, count == 0);
                (count as $t, flags)
            }

            #[inline(always)]
            fn reverse_bytes(self) -> Self {
                self.swap_bytes()
            }
        }
    };
}

wide_word!(u16, i16, u32, i32, ":x");
wide_word!(u32, i32, u64, i64, ":e");
wide_word!(u64, i64, u128, i128, ":r");
