//! The decimal adjustments of 16-bit and 32-bit code, which have no encoding in 64-bit mode: plain
//! code after the operation sections of the SDM, volume 2.

use crate::{DivideError, Flags, Word};

/// SF, ZF and PF of a byte.
fn result_flags(value: u8) -> Flags {
    value
        .test(value)
        .replace(Flags::CF.union(Flags::AF).union(Flags::OF), Flags::NONE)
}

/// DAA: the new AL. OF, which is undefined, is cleared.
pub fn daa(al: u8, flags: Flags) -> (u8, Flags) {
    let low = al & 15 > 9 || flags.any(Flags::AF);
    let high = al > 0x99 || flags.any(Flags::CF);
    let adjusted = al
        .wrapping_add(if low { 6 } else { 0 })
        .wrapping_add(if high { 0x60 } else { 0 });
    (
        adjusted,
        result_flags(adjusted)
            .with(Flags::AF, low)
            .with(Flags::CF, high),
    )
}

/// DAS: the new AL. OF, which is undefined, is cleared.
pub fn das(al: u8, flags: Flags) -> (u8, Flags) {
    let low = al & 15 > 9 || flags.any(Flags::AF);
    let high = al > 0x99 || flags.any(Flags::CF);
    let adjusted = al
        .wrapping_sub(if low { 6 } else { 0 })
        .wrapping_sub(if high { 0x60 } else { 0 });
    // The borrow of the low adjustment is a carry too.
    let carry = high || (low && al < 6);
    (
        adjusted,
        result_flags(adjusted)
            .with(Flags::AF, low)
            .with(Flags::CF, carry),
    )
}

/// AAA: the new AX. Only AF and CF are defined; the others are kept.
pub fn aaa(ax: u16, flags: Flags) -> (u16, Flags) {
    let adjust = ax & 15 > 9 || flags.any(Flags::AF);
    let ax = if adjust { ax.wrapping_add(0x106) } else { ax };
    (ax & 0xff0f, flags.with(Flags::AF.union(Flags::CF), adjust))
}

/// AAS: the new AX. Only AF and CF are defined; the others are kept.
pub fn aas(ax: u16, flags: Flags) -> (u16, Flags) {
    let adjust = ax & 15 > 9 || flags.any(Flags::AF);
    let ax = if adjust {
        ax.wrapping_sub(6).wrapping_sub(0x100)
    } else {
        ax
    };
    (ax & 0xff0f, flags.with(Flags::AF.union(Flags::CF), adjust))
}

/// AAM: the new AX from AL and the base in the immediate byte. OF, AF and CF, which are undefined,
/// are cleared.
///
/// # Errors
/// A base of 0 raises #DE.
pub fn aam(al: u8, base: u8) -> Result<(u16, Flags), DivideError> {
    let tens = al.checked_div(base).ok_or(DivideError)?;
    let ones = al % base;
    Ok((u16::from(tens) << 8 | u16::from(ones), result_flags(ones)))
}

/// AAD: the new AX. OF, AF and CF, which are undefined, are cleared.
pub fn aad(ax: u16, base: u8) -> (u16, Flags) {
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(base));
    (u16::from(al), result_flags(al))
}
