//! Instructions that the host's CPU carries out, through [`anemone_soft_native`].
//!
//! The thunk works on guest memory in place where the TLB answers for the operand, and on a copy
//! where it does not: on a miss, across pages, outside memory.

use anemone_soft_mmu::{Access, cr4};
use anemone_soft_native::{Completed, Fault, Location, SCRATCH_SIZE, Thunk};
use iced_x86::{Instruction, Mnemonic};

use super::{load_bytes, moves, state, store_bytes};
use crate::block::{Op, OpFn, Step, Whole};
use crate::cpu::{Cpu, Exception, Exec, seg, vector};
use crate::hot::step;

/// Finds the thunk of an instruction, if its form has one.
pub(crate) fn plan(cpu: &mut Cpu, instruction: &Instruction) -> Option<Thunk> {
    cpu.native.thunk(instruction).ok()
}

/// Chooses the operation for an instruction of 64-bit code, without checks of alignment, whose
/// address is already in `op`. `op.imm` is to be the address of its [`Whole`], which has the thunk.
pub(crate) fn operation(
    op: &mut Op,
    instruction: &Instruction,
    thunk: &Thunk,
    bytes: &[u8],
) -> OpFn {
    let form = thunk.form();
    if form.uses_x87() {
        [op.dst, op.src] = Location::opcode_of(bytes).to_be_bytes();
        op.extra = form.memory.map_or(0, |operand| operand.alignment - 1);
        return x87;
    }
    if let Some(function) = moves::operation(op, instruction, form) {
        return function;
    }
    match form.memory {
        None => in_registers,
        Some(operand) => {
            op.extra = operand.size;
            op.dst = operand.alignment - 1;
            if operand.write {
                in_memory::<{ Access::Write as u8 }>
            } else {
                in_memory::<{ Access::Read as u8 }>
            }
        }
    }
}

#[inline(always)]
fn whole(op: &Op) -> &Whole {
    // SAFETY: the block owns the instruction and lives while one of its operations runs.
    unsafe { &*(op.imm as *const Whole) }
}

/// The thunk of an operation that [`operation`] has chosen.
#[inline(always)]
fn thunk(op: &Op) -> &Thunk {
    let thunk = whole(op).thunk.as_ref();
    // SAFETY: such operations are chosen for instructions with a thunk only.
    unsafe { thunk.unwrap_unchecked() }
}

fn in_registers(cpu: &mut Cpu, op: &Op) -> Step {
    // SAFETY: there is no memory operand.
    if unsafe { cpu.native.run_at_once(thunk(op), std::ptr::null_mut()) } {
        return Step::Next;
    }
    slowly(cpu, op)
}

fn in_memory<const ACCESS: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    let access = if ACCESS == Access::Write as u8 {
        Access::Write
    } else {
        Access::Read
    };
    let linear = cpu.address(op);
    if linear & u64::from(op.dst) == 0
        && let Some(host) = cpu.mmu.hit(access, cpu.context, linear, op.extra.into())
        // SAFETY: the TLB gives an address with room for the operand, of memory that is mapped
        // until this CPU polls or parks; alignment has been checked.
        && unsafe { cpu.native.run_at_once(thunk(op), host) }
    {
        return Step::Next;
    }
    slowly(cpu, op)
}

fn x87(cpu: &mut Cpu, op: &Op) -> Step {
    let thunk = thunk(op);
    let host = match thunk.form().memory {
        None => Some(std::ptr::null_mut()),
        Some(operand) => {
            let access = if operand.write {
                Access::Write
            } else {
                Access::Read
            };
            let linear = cpu.address(op);
            // Conversions from XMM to MMX registers ask for alignment.
            if linear & u64::from(op.extra) == 0 {
                cpu.mmu
                    .hit(access, cpu.context, linear, operand.size.into())
            } else {
                None
            }
        }
    };
    let at = location(cpu, op);
    match host {
        // SAFETY: as in `in_memory`.
        Some(host) if unsafe { cpu.native.run(thunk, host, at) }.is_ok() => Step::Next,
        _ => slowly(cpu, op),
    }
}

/// Where an x87 instruction of 64-bit code is.
fn location(cpu: &Cpu, op: &Op) -> Location {
    Location {
        rip: cpu.at(op),
        data: cpu.offset(op),
        opcode: u16::from_be_bytes([op.dst, op.src]),
    }
}

/// What the short ways above do not do. An instruction that they tried has changed nothing.
#[cold]
pub(super) fn slowly(cpu: &mut Cpu, op: &Op) -> Step {
    let at = if thunk(op).form().uses_x87() {
        location(cpu, op)
    } else {
        Location::default()
    };
    step(execute(cpu, op, cpu.address(op), at))
}

/// The operation for any mode: `op.disp` is the mask of instruction addresses.
pub(crate) fn run_any(cpu: &mut Cpu, op: &Op) -> Step {
    step(anywhere(cpu, op))
}

fn anywhere(cpu: &mut Cpu, op: &Op) -> Exec {
    let whole = whole(op);
    let instruction = &whole.instruction;
    let mut at = Location {
        rip: cpu.at(op) & op.disp as u64,
        data: 0,
        opcode: Location::opcode_of(&whole.bytes),
    };
    // With real segments the environment holds linear addresses.
    let real = cpu.real_segments();
    if real {
        at.rip = at.rip.wrapping_add(cpu.segments[seg::CS].base);
    }
    let mut linear = 0;
    if let Some(operand) = thunk(op).form().memory {
        let size = usize::from(operand.size);
        linear = cpu.memory_operand(instruction, size, operand.write)?;
        at.data = if real {
            linear
        } else {
            cpu.effective_address(instruction)
        };
    }
    execute(cpu, op, linear, at)
}

/// Carries out an instruction whose operand is at `linear`, through a copy of the operand.
fn execute(cpu: &mut Cpu, op: &Op, linear: u64, at: Location) -> Exec {
    let (instruction, thunk) = (&whole(op).instruction, thunk(op));
    let Some(operand) = thunk.form().memory else {
        return run(cpu, instruction, thunk, &mut [0; SCRATCH_SIZE], at).map(drop);
    };
    if linear & u64::from(operand.alignment - 1) != 0 {
        return Err(cpu.gp());
    }
    let size = usize::from(operand.size);
    let mut bytes = [0; SCRATCH_SIZE];
    if operand.write {
        cpu.probe_write(linear, size)?;
    }
    if operand.read {
        load_bytes(cpu, linear, &mut bytes[..size])?;
    }
    if cpu.real_segments() && is_environment(instruction) {
        // The host's formats are those of protected mode.
        let pointers = if operand.read {
            Pointers::from_environment(&bytes[..size])
        } else {
            Pointers::of(cpu)
        };
        run(cpu, instruction, thunk, &mut bytes, at)?;
        if operand.read {
            return pointers.enter(cpu);
        }
        pointers.to_environment(&mut bytes[..size]);
        return store_bytes(cpu, linear, &bytes[..size]);
    }
    let done = run(cpu, instruction, thunk, &mut bytes, at)?;
    if operand.write && done.stored {
        store_bytes(cpu, linear, &bytes[..size])?;
    }
    Ok(())
}

/// Runs a thunk on a copy of its operand.
fn run(
    cpu: &mut Cpu,
    instruction: &Instruction,
    thunk: &Thunk,
    bytes: &mut [u8; SCRATCH_SIZE],
    at: Location,
) -> Exec<Completed> {
    loop {
        *cpu.native.scratch() = *bytes;
        match cpu.native.run_buffered(thunk, at) {
            Ok(done) => {
                *bytes = *cpu.native.scratch();
                return Ok(done);
            }
            Err(Fault::Math) => return Err(cpu.raise(Exception::plain(vector::MF))),
            Err(Fault::Simd) if cpu.cr4 & cr4::OSXMMEXCPT != 0 => {
                return Err(cpu.raise(Exception::plain(vector::XM)));
            }
            Err(Fault::Simd) => return Err(cpu.ud()),
            Err(Fault::Stale) => {
                if let Err(error) = cpu.native.renew(thunk, instruction) {
                    return Err(cpu.internal(format!("{:?}: {error}", instruction.code())));
                }
            }
        }
    }
}

fn is_environment(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Fnstenv | Mnemonic::Fnsave | Mnemonic::Fldenv | Mnemonic::Frstor
    )
}

/// The x87 pointers of the last instruction.
struct Pointers {
    opcode: u16,
    instruction: u32,
    data: u32,
}

impl Pointers {
    fn of(cpu: &mut Cpu) -> Self {
        let image = cpu.native.xsave_image();
        Self {
            opcode: word(image, state::FOP),
            instruction: double_word(image, state::FIP),
            data: double_word(image, state::FDP),
        }
    }

    fn enter(&self, cpu: &mut Cpu) -> Exec {
        let mut image = *cpu.native.xsave_image();
        image[state::FOP..state::FOP + 2].copy_from_slice(&self.opcode.to_le_bytes());
        for (at, value) in [(state::FIP, self.instruction), (state::FDP, self.data)] {
            image[at..at + 8].copy_from_slice(&u64::from(value).to_le_bytes());
        }
        state::load_image(cpu, &image)
    }

    /// Takes them out of an environment of real-address mode (SDM volume 1, figures 8-10, 8-12).
    fn from_environment(image: &[u8]) -> Self {
        let high = |value: u32| value >> 12 << 16;
        if is_short(image) {
            let (ip, dp) = (word(image, 8), word(image, 12));
            return Self {
                opcode: ip & 0x7FF,
                instruction: u32::from(word(image, 6)) | high(ip.into()),
                data: u32::from(word(image, 10)) | high(dp.into()),
            };
        }
        let (ip, dp) = (double_word(image, 16), double_word(image, 24));
        Self {
            opcode: ip as u16 & 0x7FF,
            instruction: u32::from(word(image, 12)) | high(ip & 0x0FFF_FFFF),
            data: u32::from(word(image, 20)) | high(dp & 0x0FFF_FFFF),
        }
    }

    fn to_environment(&self, image: &mut [u8]) {
        let ip = self.instruction >> 16 << 12 | u32::from(self.opcode);
        let dp = self.data >> 16 << 12;
        let (step, fields) = if is_short(image) {
            (2, [self.instruction, ip, self.data, dp])
        } else {
            (4, [self.instruction & 0xFFFF, ip, self.data & 0xFFFF, dp])
        };
        // After the control, status and tag words.
        for (index, value) in fields.into_iter().enumerate() {
            let at = step * (3 + index);
            image[at..at + step].copy_from_slice(&value.to_le_bytes()[..step]);
        }
    }
}

/// Whether the environment at the start of an image is that of 16-bit operand size.
fn is_short(image: &[u8]) -> bool {
    matches!(image.len(), 14 | 94)
}

fn word(image: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}

fn double_word(image: &[u8], at: usize) -> u32 {
    u32::from(word(image, at)) | u32::from(word(image, at + 2)) << 16
}
