//! The six arithmetic flags in the form in which the host hands them over cheapest.
//!
//! `seto al; lahf` puts all of them into AX without touching memory or the stack, and
//! `add al, 127; sahf` puts them back, so AX is the representation: OF in bit 0, and SF, ZF, AF, PF
//! and CF in bits 15, 14, 12, 10 and 8. Where CF alone is needed, `bt` is cheaper still. `pushfq` and `popfq` do the same at several times the cost;
//! `examples/measure.rs` shows both.

/// CF, PF, AF, ZF, SF and OF (Intel SDM volume 1, section 3.4.3.1).
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Flags(u16);

/// Bits of RFLAGS that [`Flags`] holds.
pub const ARITHMETIC_RFLAGS: u64 = 0x8d5;

impl Flags {
    /// Overflow.
    pub const OF: Self = Self(1);
    /// Carry.
    pub const CF: Self = Self(1 << 8);
    /// Parity of the low byte of the result.
    pub const PF: Self = Self(1 << 10);
    /// Carry out of bit 3.
    pub const AF: Self = Self(1 << 12);
    /// Zero.
    pub const ZF: Self = Self(1 << 14);
    /// Sign.
    pub const SF: Self = Self(1 << 15);
    /// All six.
    pub const ALL: Self = Self(0xd501);
    /// None of them.
    pub const NONE: Self = Self(0);

    /// The flags that `seto al; lahf` left in AX.
    #[inline(always)]
    pub const fn from_ax(ax: u16) -> Self {
        Self(ax & Self::ALL.0)
    }

    /// What AX must hold for `add al, 127; sahf`.
    #[inline(always)]
    pub const fn to_ax(self) -> u16 {
        self.0
    }

    /// Takes the arithmetic flags out of an RFLAGS image.
    #[inline]
    pub const fn from_rflags(rflags: u64) -> Self {
        Self((((rflags & 0xd5) << 8) | (rflags >> 11 & 1)) as u16)
    }

    /// The flags at their places in RFLAGS; every other bit is 0.
    #[inline]
    pub const fn to_rflags(self) -> u64 {
        (self.0 as u64 >> 8) | ((self.0 as u64 & 1) << 11)
    }

    /// Whether any flag of `flags` is set.
    #[inline(always)]
    pub const fn any(self, flags: Self) -> bool {
        self.0 & flags.0 != 0
    }

    /// Both sets together.
    #[inline(always)]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// `self`, with the flags of `mask` replaced by those of `other`.
    #[inline(always)]
    pub const fn replace(self, mask: Self, other: Self) -> Self {
        Self((self.0 & !mask.0) | (other.0 & mask.0))
    }

    /// `self` with the flags of `mask` set to `on`.
    #[inline(always)]
    pub const fn with(self, mask: Self, on: bool) -> Self {
        if on {
            Self(self.0 | mask.0)
        } else {
            Self(self.0 & !mask.0)
        }
    }

    /// Evaluates the condition code in the low four bits of `code`, as Jcc, SETcc and CMOVcc encode
    /// it (SDM volume 1, appendix B).
    #[inline]
    pub const fn condition(self, code: u8) -> bool {
        let less = self.any(Self::SF) != self.any(Self::OF);
        let holds = match code >> 1 & 7 {
            0 => self.any(Self::OF),
            1 => self.any(Self::CF),
            2 => self.any(Self::ZF),
            3 => self.any(Self(Self::CF.0 | Self::ZF.0)),
            4 => self.any(Self::SF),
            5 => self.any(Self::PF),
            6 => less,
            _ => less || self.any(Self::ZF),
        };
        holds != (code & 1 != 0)
    }
}

impl std::fmt::Debug for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = [
            ("OF", Self::OF),
            ("SF", Self::SF),
            ("ZF", Self::ZF),
            ("AF", Self::AF),
            ("PF", Self::PF),
            ("CF", Self::CF),
        ];
        f.write_str("Flags(")?;
        for (index, (name, _)) in names.iter().filter(|(_, flag)| self.any(*flag)).enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{name}")?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rflags_round_trip() {
        for bits in 0..=0xfffu64 {
            let rflags = bits & ARITHMETIC_RFLAGS;
            assert_eq!(Flags::from_rflags(bits).to_rflags(), rflags);
        }
        assert_eq!(Flags::from_rflags(u64::MAX), Flags::ALL);
    }
}
