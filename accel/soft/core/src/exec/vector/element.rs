//! Instructions that touch memory element by element, under a mask: gathers and masked moves.
//! Elements that are masked off are not accessed, so they cannot fault.

use anemone_soft_mmu::Access;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::state;
use crate::block::Handler;
use crate::cpu::{Cpu, Exception, Exec, reg, vector};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    let is_store = instruction.op0_kind() == OpKind::Memory;
    let handler: Handler = match instruction.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd => gather::<4, 4>,
        M::Vgatherdpd | M::Vpgatherdq => gather::<4, 8>,
        M::Vgatherqps | M::Vpgatherqd => gather::<8, 4>,
        M::Vgatherqpd | M::Vpgatherqq => gather::<8, 8>,
        M::Vmaskmovps | M::Vpmaskmovd if is_store => masked_store::<4>,
        M::Vmaskmovpd | M::Vpmaskmovq if is_store => masked_store::<8>,
        M::Vmaskmovps | M::Vpmaskmovd => masked_load::<4>,
        M::Vmaskmovpd | M::Vpmaskmovq => masked_load::<8>,
        M::Maskmovdqu | M::Vmaskmovdqu => maskmovdqu,
        M::Maskmovq => maskmovq,
        _ => return None,
    };
    Some(handler)
}

/// Whether the mask selects element `index` of `size` bytes: by its sign.
fn selects(mask: &[u8], index: usize, size: usize) -> bool {
    mask[(index + 1) * size - 1] & 0x80 != 0
}

fn load_element(cpu: &mut Cpu, linear: u64, into: &mut [u8]) -> Exec {
    let size = into.len();
    let value = cpu.load_sized(linear, size)?;
    into.copy_from_slice(&value.to_le_bytes()[..size]);
    Ok(())
}

/// VGATHER, VPGATHER with indices of `INDEX` bytes and elements of `DATA` bytes. What was gathered
/// before a fault stays, and the mask tells what is left (SDM volume 2, VGATHERDPS).
fn gather<const INDEX: usize, const DATA: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let (target, mask_register) = (instruction.op0_register(), instruction.op2_register());
    let index_register = instruction.memory_index();
    let count = (target.size() / DATA).min(index_register.size() / INDEX);
    let indices = cpu.native.ymm(index_register.number());
    let mut mask = cpu.native.ymm(mask_register.number());
    let mut values = cpu.native.ymm(target.number());
    let segment = cpu.memory_segment(instruction);
    let scale = u64::from(instruction.memory_index_scale());
    let base = instruction.memory_base();
    let (start, wide) = match base {
        Register::None => (0, instruction.memory_displ_size() == 8),
        _ => (cpu.read_register(base), base.size() == 8),
    };
    let start = start.wrapping_add(instruction.memory_displacement64());
    // The sign fills the element, also of those that a fault leaves to do.
    for element in 0..count {
        let fill = if selects(&mask, element, DATA) {
            0xFF
        } else {
            0
        };
        mask[element * DATA..(element + 1) * DATA].fill(fill);
    }
    mask[count * DATA..].fill(0);
    let mut result = Ok(());
    for element in 0..count {
        let at = element * DATA;
        if selects(&mask, element, DATA) {
            let mut index = [0; 8];
            index[..INDEX].copy_from_slice(&indices[element * INDEX..(element + 1) * INDEX]);
            let mut index = u64::from_le_bytes(index);
            if INDEX == 4 {
                index = index as i32 as u64;
            }
            let mut offset = start.wrapping_add(index.wrapping_mul(scale));
            if !wide {
                offset &= 0xFFFF_FFFF;
            }
            result = match cpu.data_address(segment, offset, DATA, false) {
                Ok(linear) => load_element(cpu, linear, &mut values[at..at + DATA]),
                Err(trap) => Err(trap),
            };
            if result.is_err() {
                break;
            }
        }
        mask[at..at + DATA].fill(0);
    }
    if result.is_ok() {
        values[count * DATA..].fill(0);
    }
    cpu.native.set_ymm(target.number(), values);
    cpu.native.set_ymm(mask_register.number(), mask);
    result
}

/// VMASKMOV, VPMASKMOV from memory.
fn masked_load<const DATA: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let target = instruction.op0_register();
    let mask = cpu.native.ymm(instruction.op1_register().number());
    let segment = cpu.memory_segment(instruction);
    let offset = cpu.effective_address(instruction);
    let mut values = [0; 32];
    for element in 0..target.size() / DATA {
        let at = element * DATA;
        if selects(&mask, element, DATA) {
            let offset = offset.wrapping_add(at as u64);
            let linear = cpu.data_address(segment, offset, DATA, false)?;
            load_element(cpu, linear, &mut values[at..at + DATA])?;
        }
    }
    cpu.native.set_ymm(target.number(), values);
    Ok(())
}

/// VMASKMOV, VPMASKMOV to memory.
fn masked_store<const DATA: usize>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let source = instruction.op2_register();
    let mask = cpu.native.ymm(instruction.op1_register().number());
    let values = cpu.native.ymm(source.number());
    let segment = cpu.memory_segment(instruction);
    let offset = cpu.effective_address(instruction);
    let length = source.size();
    store_selected::<DATA>(cpu, segment, offset, &values[..length], &mask[..length])
}

/// Stores the selected elements: all of them, or none if one faults.
fn store_selected<const DATA: usize>(
    cpu: &mut Cpu,
    segment: usize,
    offset: u64,
    values: &[u8],
    mask: &[u8],
) -> Exec {
    let mut linear = [0; 32];
    for element in (0..values.len() / DATA).filter(|element| selects(mask, *element, DATA)) {
        let offset = offset.wrapping_add((element * DATA) as u64);
        let address = cpu.data_address(segment, offset, DATA, true)?;
        let ready = cpu.mmu.hit(Access::Write, cpu.context, address, DATA);
        if ready.is_none() {
            cpu.probe_write(address, DATA)?;
        }
        linear[element] = address;
    }
    for element in (0..values.len() / DATA).filter(|element| selects(mask, *element, DATA)) {
        let mut value = [0; 8];
        value[..DATA].copy_from_slice(&values[element * DATA..(element + 1) * DATA]);
        cpu.store_sized(linear[element], u64::from_le_bytes(value), DATA)?;
    }
    Ok(())
}

/// The implied address of MASKMOVQ and MASKMOVDQU: DS:(R/E)DI, or another segment.
fn store_bytes_selected(
    cpu: &mut Cpu,
    instruction: &Instruction,
    values: &[u8],
    mask: &[u8],
) -> Exec {
    let offset = cpu.gpr(reg::RDI);
    let offset = match instruction.op0_kind() {
        OpKind::MemorySegDI => offset & 0xFFFF,
        OpKind::MemorySegEDI => offset & 0xFFFF_FFFF,
        _ => offset,
    };
    let segment = cpu.memory_segment(instruction);
    store_selected::<1>(cpu, segment, offset, values, mask)
}

fn maskmovdqu(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let values = cpu.native.xmm(instruction.op1_register().number());
    let mask = cpu.native.xmm(instruction.op2_register().number());
    store_bytes_selected(cpu, instruction, &values, &mask)
}

/// MASKMOVQ, which as every MMX instruction reports a pending x87 exception first and makes all x87
/// registers valid, with register 0 on top.
fn maskmovq(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    /// FSW.ES, an unmasked exception is pending.
    const PENDING: u8 = 0x80;
    /// FSW.TOP in the high byte.
    const TOP: u8 = 0x38;
    let mut image = *cpu.native.xsave_image();
    if image[state::FSW] & PENDING != 0 {
        return Err(cpu.raise(Exception::plain(vector::MF)));
    }
    let top = usize::from(image[state::FSW + 1] & TOP) >> 3;
    let register = |register: Register| {
        // MMX registers have fixed places; the image begins at the top of the stack.
        let at = state::ST + 16 * ((register.number() + 8 - top) & 7);
        let mut value = [0; 8];
        value.copy_from_slice(&image[at..at + 8]);
        value
    };
    let values = register(instruction.op1_register());
    let mask = register(instruction.op2_register());
    store_bytes_selected(cpu, instruction, &values, &mask)?;
    let registers = &mut image[state::ST..state::ST + 128];
    registers.rotate_right(16 * top);
    image[state::FSW + 1] &= !TOP;
    image[state::FTW] = 0xFF;
    state::load_image(cpu, &image)
}
