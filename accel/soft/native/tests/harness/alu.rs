//! The integer primitives against the host.

use anemone_soft_native::{Flags, WideWord, Word};
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic as M, OpKind, Register};

use super::generate::{self};
use super::native::Block;
use super::{Bench, Buffer, place, undefined_flags};

/// Whether a primitive has this form's semantics.
pub fn claims(code: Code) -> bool {
    use M::*;
    let mnemonic = code.mnemonic();
    let ours = matches!(
        mnemonic,
        Add | Adc
            | Sub
            | Sbb
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Inc
            | Dec
            | Neg
            | Shl
            | Sal
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shld
            | Shrd
            | Mul
            | Imul
            | Div
            | Idiv
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Popcnt
            | Lzcnt
            | Tzcnt
            | Bswap
            | Cmpxchg
            | Xadd
            | Movbe
    );
    // The old opcode of CMPXCHG died with the A step of the 486.
    let dead = matches!(
        code,
        Code::Cmpxchg486_rm8_r8 | Code::Cmpxchg486_rm16_r16 | Code::Cmpxchg486_rm32_r32
    );
    ours && !dead && code.encoding() == EncodingKind::Legacy && code != Code::Bswap_r16
}

fn value(made: &Instruction, operand: u32, before: &Block, memory: &[u8]) -> u64 {
    match made.op_kind(operand) {
        OpKind::Register => register(made.op_register(operand), before),
        OpKind::Memory => {
            let mut bytes = [0; 8];
            let size = made.memory_size().size();
            bytes[..size].copy_from_slice(&memory[..size]);
            u64::from_le_bytes(bytes)
        }
        _ => made.immediate(operand),
    }
}

fn register(register: Register, block: &Block) -> u64 {
    let value = block.gpr[register.full_register().number()];
    match register {
        Register::AH | Register::BH | Register::CH | Register::DH => value >> 8 & 0xff,
        other => value & (u64::MAX >> (64 - 8 * other.size())),
    }
}

/// What the primitives say: values of the operands afterwards, accumulator pair, flags.
struct Outcome {
    first: u64,
    second: Option<u64>,
    /// Low and high half of the accumulator pair, where the instruction writes it.
    pair: Option<(u64, u64)>,
    accumulator: Option<u64>,
    flags: Flags,
}

fn evaluate<W: Word>(
    mnemonic: M,
    values: [u64; 3],
    pair: (u64, u64),
    flags: Flags,
) -> Option<Outcome> {
    let [a, b] = [W::truncate(values[0]), W::truncate(values[1])];
    let count = values[1] as u8;
    let acc = W::truncate(pair.0);
    let plain = |(result, flags): (W, Flags)| Outcome {
        first: result.zero_extend(),
        second: None,
        pair: None,
        accumulator: None,
        flags,
    };
    let wide = |(low, high, flags): (W, W, Flags)| Outcome {
        pair: Some((low.zero_extend(), high.zero_extend())),
        ..plain((a, flags))
    };
    Some(match mnemonic {
        M::Add => plain(a.add(b)),
        M::Adc => plain(a.adc(b, flags)),
        M::Sub => plain(a.sub(b)),
        M::Sbb => plain(a.sbb(b, flags)),
        M::And => plain(a.and(b)),
        M::Or => plain(a.or(b)),
        M::Xor => plain(a.xor(b)),
        M::Cmp => plain((a, a.cmp(b))),
        M::Test => plain((a, a.test(b))),
        M::Inc => plain(a.inc(flags)),
        M::Dec => plain(a.dec(flags)),
        M::Neg => plain(a.neg()),
        M::Shl | M::Sal => plain(a.shl(count, flags)),
        M::Shr => plain(a.shr(count, flags)),
        M::Sar => plain(a.sar(count, flags)),
        M::Rol => plain(a.rol(count, flags)),
        M::Ror => plain(a.ror(count, flags)),
        M::Rcl => plain(a.rcl(count, flags)),
        M::Rcr => plain(a.rcr(count, flags)),
        M::Mul => wide(acc.mul(a)),
        M::Imul => wide(acc.imul_wide(a)),
        M::Div | M::Idiv => {
            let high = W::truncate(pair.1);
            let (quotient, remainder) = if mnemonic == M::Div {
                acc.div(high, a).ok()?
            } else {
                acc.idiv(high, a).ok()?
            };
            wide((quotient, remainder, flags))
        }
        M::Xadd => {
            let (first, second, flags) = a.xadd(b);
            Outcome {
                second: Some(second.zero_extend()),
                ..plain((first, flags))
            }
        }
        M::Cmpxchg => {
            let (first, accumulator, flags) = a.cmpxchg(b, acc);
            Outcome {
                accumulator: Some(accumulator.zero_extend()),
                ..plain((first, flags))
            }
        }
        _ => return None,
    })
}

fn evaluate_wide<W: WideWord>(
    mnemonic: M,
    operands: u32,
    values: [u64; 3],
    pair: (u64, u64),
    flags: Flags,
) -> Option<Outcome> {
    let [a, b, c] = values.map(W::truncate);
    let count = values[2] as u8;
    let (result, flags) = match mnemonic {
        M::Imul if operands == 2 => a.imul(b),
        M::Imul if operands == 3 => b.imul(c),
        M::Shld => a.shld(b, count, flags),
        M::Shrd => a.shrd(b, count, flags),
        M::Bt => (a, a.bt(b, flags)),
        M::Bts => a.bts(b, flags),
        M::Btr => a.btr(b, flags),
        M::Btc => a.btc(b, flags),
        M::Bsf => b.bsf(a, flags),
        M::Bsr => b.bsr(a, flags),
        M::Popcnt => b.popcnt(),
        M::Lzcnt => b.lzcnt(flags),
        M::Tzcnt => b.tzcnt(flags),
        M::Bswap => (a.reverse_bytes(), flags),
        M::Movbe => (b.reverse_bytes(), flags),
        _ => return evaluate::<W>(mnemonic, values, pair, flags),
    };
    Some(Outcome {
        first: result.zero_extend(),
        second: None,
        pair: None,
        accumulator: None,
        flags,
    })
}

/// One case of an integer form.
pub fn case(bench: &mut Bench, code: Code) -> Result<(), String> {
    let (made, bytes) = bench
        .make(code)
        .ok_or_else(|| format!("{code:?}: no encodable operands"))?;
    let mnemonic = made.mnemonic();
    let in_memory = (0..made.op_count()).any(|operand| made.op_kind(operand) == OpKind::Memory);
    let bit_test = matches!(mnemonic, M::Bt | M::Bts | M::Btr | M::Btc);
    if bit_test && in_memory && made.op_kind(1) == OpKind::Register {
        // A bit string in memory: the core moves the address, then uses the same primitive.
        return Ok(());
    }
    generate::state(&mut bench.random, &mut bench.before);
    let mut buffer = Buffer([0; 256]);
    for chunk in buffer.0.chunks_mut(8) {
        chunk.copy_from_slice(&bench.random.integer().to_le_bytes());
    }
    let start = place(1, &mut bench.random);
    bench.aim(&made, buffer.0.as_ptr() as usize + start);
    let size = if made.op_kind(0) == OpKind::Memory {
        made.memory_size().size()
    } else {
        made.op_register(0).size()
    };
    let mut values = [0; 3];
    for operand in 0..made.op_count().min(3) {
        values[operand as usize] = value(&made, operand, &bench.before, &buffer.0[start..]);
    }
    let [rax, _, rdx] = [bench.before.gpr[0], 0, bench.before.gpr[2]];
    let pair = if size == 1 {
        (rax & 0xff, rax >> 8 & 0xff)
    } else {
        (rax, rdx)
    };
    let flags = Flags::from_rflags(bench.before.rflags);
    let outcome = match size {
        1 => evaluate::<u8>(mnemonic, values, pair, flags),
        2 => evaluate_wide::<u16>(mnemonic, made.op_count(), values, pair, flags),
        4 => evaluate_wide::<u32>(mnemonic, made.op_count(), values, pair, flags),
        _ => evaluate_wide::<u64>(mnemonic, made.op_count(), values, pair, flags),
    };
    let mut after = bench.before.clone();
    let native = bench.native.run(&bytes, &mut after);
    let context = || format!("{code:?} {bytes:02x?} values {values:x?} pair {pair:x?} {flags:?}");
    let outcome = match (native, outcome) {
        (Err(libc::SIGFPE), None) => return Ok(()),
        (Ok(()), Some(outcome)) => outcome,
        (native, outcome) => {
            return Err(format!(
                "{}: {native:?}, ours {}",
                context(),
                outcome.is_some()
            ));
        }
    };
    let bits = size as u32 * 8;
    let mask = u64::MAX >> (64 - bits);
    // SHLD and SHRD by more than 16 of 16-bit operands: result and flags undefined.
    let count_mask = if bits == 64 { 63 } else { 31 };
    let count = if matches!(mnemonic, M::Shld | M::Shrd) {
        values[2]
    } else {
        values[1]
    } as u32
        & count_mask;
    if matches!(mnemonic, M::Shld | M::Shrd) && count > bits {
        return Ok(());
    }
    let mut unknown = undefined_flags(mnemonic);
    let shift = matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd
    );
    let rotation = matches!(mnemonic, M::Rol | M::Ror | M::Rcl | M::Rcr);
    if (shift || rotation) && count <= 1 {
        unknown = unknown.with(Flags::OF, false);
        // A masked count of 0 leaves every flag alone.
        unknown = unknown.with(Flags::AF, shift && count == 1);
    } else if matches!(mnemonic, M::Shl | M::Sal | M::Shr) && count >= bits {
        unknown = unknown.union(Flags::CF);
    }
    let defined = Flags::ALL.replace(unknown, Flags::NONE);
    let theirs = Flags::from_rflags(after.rflags);
    if Flags::NONE.replace(defined, theirs) != Flags::NONE.replace(defined, outcome.flags) {
        return Err(format!(
            "{}: flags ours {:?} host {theirs:?}",
            context(),
            outcome.flags
        ));
    }
    let check = |what: &str, ours: u64, host: u64| {
        if ours == host & mask {
            Ok(())
        } else {
            Err(format!("{}: {what} ours {ours:x} host {host:x}", context()))
        }
    };
    if let Some((low, high)) = outcome.pair {
        check("low half", low, after.gpr[0] & mask)?;
        return check(
            "high half",
            high,
            if size == 1 {
                after.gpr[0] >> 8
            } else {
                after.gpr[2]
            },
        );
    }
    // XADD with one register twice, and CMPXCHG on the accumulator, write one after the other.
    let twice = made.op_count() > 1
        && made.op_kind(1) == OpKind::Register
        && made.op_kind(0) == OpKind::Register
        && made.op_register(0) == made.op_register(1);
    if let Some(second) = outcome.second
        && !twice
    {
        check(
            "second operand",
            second,
            value(&made, 1, &after, &buffer.0[start..]),
        )?;
    }
    let on_accumulator =
        made.op_kind(0) == OpKind::Register && made.op_register(0).full_register() == Register::RAX;
    if let Some(accumulator) = outcome.accumulator
        && !on_accumulator
    {
        check("accumulator", accumulator, after.gpr[0])?;
    }
    if on_accumulator && outcome.accumulator.is_some() {
        return Ok(());
    }
    check(
        "result",
        outcome.first,
        value(&made, 0, &after, &buffer.0[start..]),
    )
}
