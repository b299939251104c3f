//! Single bits, bit counts, double shifts, CRC.

use anemone_soft_mmu::Value;
use anemone_soft_native::{Flags, WideWord};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::integer::size;
use crate::block::Handler;
use crate::cpu::{Cpu, Exec};
use crate::hot::{Operand, by_size, by_wide_size};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    let size = size(instruction);
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Bt => by_wide_size!(size, bit_test),
        Mnemonic::Bts => by_wide_size!(size, bit_change, Set),
        Mnemonic::Btr => by_wide_size!(size, bit_change, Reset),
        Mnemonic::Btc => by_wide_size!(size, bit_change, Complement),
        Mnemonic::Bsf => by_wide_size!(size, scan, Forward),
        Mnemonic::Bsr => by_wide_size!(size, scan, Reverse),
        Mnemonic::Popcnt => by_wide_size!(size, count, Ones),
        Mnemonic::Lzcnt => by_wide_size!(size, count, Leading),
        Mnemonic::Tzcnt => by_wide_size!(size, count, Trailing),
        Mnemonic::Shld => by_wide_size!(size, double_shift, Left),
        Mnemonic::Shrd => by_wide_size!(size, double_shift, Right),
        Mnemonic::Crc32 => match instruction.op1_kind() {
            OpKind::Register => by_size!(instruction.op1_register().size(), crc32),
            _ => by_size!(size_of_source(instruction), crc32),
        },
        _ => return None,
    };
    Some(handler)
}

fn size_of_source(instruction: &Instruction) -> usize {
    instruction.memory_size().size()
}

/// Mask of the offsets that the memory operand's address size can express.
fn address_mask(instruction: &Instruction) -> u64 {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let size = if base != Register::None {
        base.size()
    } else if index != Register::None {
        index.size()
    } else {
        instruction.memory_displ_size() as usize
    };
    match size {
        2 => 0xFFFF,
        4 => 0xFFFF_FFFF,
        _ => u64::MAX,
    }
}

/// Where a bit is.
enum Place {
    Register,
    Memory(u64),
}

impl Cpu {
    /// The bit that BT and the like name, and where the word is that has it. A number in a
    /// register reaches beyond a memory operand, on both sides (SDM volume 2, 3.1.1.9).
    fn bit_place<W: Operand>(
        &mut self,
        instruction: &Instruction,
        write: bool,
    ) -> Exec<(Place, W)> {
        let bit: W = self.source(instruction, 1)?;
        if instruction.op0_kind() == OpKind::Register {
            return Ok((Place::Register, bit));
        }
        let mut offset = self.effective_address(instruction);
        if instruction.op1_kind() == OpKind::Register {
            let words = bit.sign_extend() as i64 >> W::BITS.trailing_zeros();
            offset = offset.wrapping_add(words.wrapping_mul(<W as Value>::SIZE as i64) as u64)
                & address_mask(instruction);
        }
        let segment = self.memory_segment(instruction);
        let linear = self.data_address(segment, offset, <W as Value>::SIZE, write)?;
        Ok((Place::Memory(linear), bit))
    }
}

fn bit_test<W: Operand + WideWord>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let (place, bit) = cpu.bit_place::<W>(instruction, false)?;
    let value = match place {
        Place::Register => W::truncate(cpu.read_register(instruction.op0_register())),
        Place::Memory(linear) => cpu.load(linear)?,
    };
    cpu.set_flags(value.bt(bit, cpu.flags()));
    Ok(())
}

/// What happens to the bit.
trait Change {
    fn apply<W: WideWord>(value: W, bit: W) -> W;
}

/// BTS.
struct Set;
/// BTR.
struct Reset;
/// BTC.
struct Complement;

impl Change for Set {
    fn apply<W: WideWord>(value: W, bit: W) -> W {
        value.bts(bit, Flags::NONE).0
    }
}

impl Change for Reset {
    fn apply<W: WideWord>(value: W, bit: W) -> W {
        value.btr(bit, Flags::NONE).0
    }
}

impl Change for Complement {
    fn apply<W: WideWord>(value: W, bit: W) -> W {
        value.btc(bit, Flags::NONE).0
    }
}

fn bit_change<W: Operand + WideWord, C: Change>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let (place, bit) = cpu.bit_place::<W>(instruction, true)?;
    let change = |value: W| C::apply(value, bit);
    let old = match place {
        Place::Register => cpu.modify_first(instruction, change)?,
        Place::Memory(linear) => cpu.modify_memory(instruction, linear, change)?,
    };
    cpu.set_flags(old.bt(bit, cpu.flags()));
    Ok(())
}

trait Scan {
    fn apply<W: WideWord>(value: W, old: W, flags: Flags) -> (W, Flags);
}

/// BSF.
struct Forward;
/// BSR.
struct Reverse;

impl Scan for Forward {
    fn apply<W: WideWord>(value: W, old: W, flags: Flags) -> (W, Flags) {
        value.bsf(old, flags)
    }
}

impl Scan for Reverse {
    fn apply<W: WideWord>(value: W, old: W, flags: Flags) -> (W, Flags) {
        value.bsr(old, flags)
    }
}

/// A source of 0 leaves the destination alone, all 64 bits of it.
fn scan<W: Operand + WideWord, S: Scan>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value: W = cpu.source(instruction, 1)?;
    let register = instruction.op0_register();
    let old = W::truncate(cpu.read_register(register));
    let (result, flags) = S::apply(value, old, cpu.flags());
    if value.zero_extend() != 0 {
        cpu.write_register(register, result.zero_extend());
    }
    cpu.set_flags(flags);
    Ok(())
}

trait Count {
    fn apply<W: WideWord>(value: W, flags: Flags) -> (W, Flags);
}

/// POPCNT.
struct Ones;
/// LZCNT.
struct Leading;
/// TZCNT.
struct Trailing;

impl Count for Ones {
    fn apply<W: WideWord>(value: W, _: Flags) -> (W, Flags) {
        value.popcnt()
    }
}

impl Count for Leading {
    fn apply<W: WideWord>(value: W, flags: Flags) -> (W, Flags) {
        value.lzcnt(flags)
    }
}

impl Count for Trailing {
    fn apply<W: WideWord>(value: W, flags: Flags) -> (W, Flags) {
        value.tzcnt(flags)
    }
}

fn count<W: Operand + WideWord, C: Count>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let value: W = cpu.source(instruction, 1)?;
    let (result, flags) = C::apply(value, cpu.flags());
    cpu.write_register(instruction.op0_register(), result.zero_extend());
    cpu.set_flags(flags);
    Ok(())
}

trait Direction {
    fn apply<W: WideWord>(a: W, b: W, count: u8, flags: Flags) -> (W, Flags);
}

/// SHLD.
struct Left;
/// SHRD.
struct Right;

impl Direction for Left {
    fn apply<W: WideWord>(a: W, b: W, count: u8, flags: Flags) -> (W, Flags) {
        a.shld(b, count, flags)
    }
}

impl Direction for Right {
    fn apply<W: WideWord>(a: W, b: W, count: u8, flags: Flags) -> (W, Flags) {
        a.shrd(b, count, flags)
    }
}

fn double_shift<W: Operand + WideWord, D: Direction>(
    cpu: &mut Cpu,
    instruction: &Instruction,
) -> Exec {
    let b: W = cpu.source(instruction, 1)?;
    let count: u8 = cpu.source(instruction, 2)?;
    let flags = cpu.flags();
    let old = cpu.modify_first(instruction, |a: W| D::apply(a, b, count, flags).0)?;
    cpu.set_flags(D::apply(old, b, count, flags).1);
    Ok(())
}

/// The polynomial 11EDC6F41H, bits reversed (SDM volume 2, CRC32).
const CRC32C: u32 = 0x82F6_3B78;

fn crc32<W: Operand>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let data = cpu.source::<W>(instruction, 1)?.zero_extend();
    let register = instruction.op0_register();
    let mut crc = cpu.read_register(register) as u32;
    for byte in &data.to_le_bytes()[..<W as Value>::SIZE] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { CRC32C } else { 0 };
        }
    }
    cpu.write_register(register, crc.into());
    Ok(())
}
