//! Builds the native function of one instruction.
//!
//! The function has the signature `extern "sysv64" fn(state, memory) -> u32`. It loads the registers
//! that the instruction uses from the state block, runs the guest's own encoding with at most two
//! changes (the memory operand becomes `[register]`, a general operand RSP becomes a free register)
//! and stores what was written. It returns 0, or 1 when the instruction raised #MF or #XM, in which
//! case nothing but the exception flags in MXCSR has changed.

use iced_x86::{
    Code, CodeSize, Encoder, Instruction, InstructionInfoFactory, MemoryOperand as Address,
    Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};

use crate::form::{Form, X87, general_number};
use crate::state::{FLAGS_OFFSET, GPR_OFFSET, VECTOR_OFFSET};
use crate::{Flags, Unsupported};

/// Registers, numbered as in ModRM, that a function must preserve.
const CALLEE_SAVED: [usize; 6] = [3, 5, 12, 13, 14, 15];
const RDX: usize = 2;
const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;

/// The bytes of a thunk and its landmarks, relative to the first byte.
pub(crate) struct Code64 {
    pub bytes: Vec<u8>,
    /// Where the guest's instruction starts.
    pub guest: usize,
    /// Where execution continues if it raised #MF or #XM.
    pub fault: usize,
}

/// The guest's instruction, rewritten, and what it uses.
pub(crate) struct Plan {
    guest: Instruction,
    form: Form,
    read: u16,
    written: u16,
    /// Vector registers read as 128 bits, read as 256 bits, written.
    vector: [u16; 3],
    /// An operand is a YMM register.
    dirties_upper: bool,
    flags_read: Flags,
    flags_written: Flags,
    state: usize,
    memory: usize,
    stack_pointer: Option<usize>,
}

fn gpr(number: usize) -> Register {
    Register::RAX + number as u32
}

fn sized(number: usize, like: Register) -> Register {
    match like.size() {
        1 => [Register::R8L, Register::R9L, Register::R10L, Register::R11L][number - 8],
        2 => Register::AX + number as u32,
        4 => Register::EAX + number as u32,
        _ => gpr(number),
    }
}

fn flags_of(bits: u32) -> Flags {
    let map = [
        (RflagsBits::OF, Flags::OF),
        (RflagsBits::SF, Flags::SF),
        (RflagsBits::ZF, Flags::ZF),
        (RflagsBits::AF, Flags::AF),
        (RflagsBits::CF, Flags::CF),
        (RflagsBits::PF, Flags::PF),
    ];
    map.iter().fold(Flags::NONE, |flags, (bit, flag)| {
        flags.with(*flag, flags.any(*flag) || bits & bit != 0)
    })
}

impl Plan {
    /// Rewrites `instruction`, whose form has been accepted.
    pub fn new(instruction: &Instruction, form: Form) -> Result<Self, Unsupported> {
        let mut guest = *instruction;
        guest.set_ip(0);
        if form.memory.is_some() {
            guest.set_memory_base(Register::None);
            guest.set_memory_index(Register::None);
            guest.set_memory_index_scale(1);
            guest.set_memory_displacement64(0);
            guest.set_memory_displ_size(0);
            guest.set_segment_prefix(Register::None);
        }
        let mut plan = Self {
            guest,
            form,
            read: 0,
            written: 0,
            vector: [0; 3],
            dirties_upper: (0..guest.op_count()).any(|operand| {
                guest.op_kind(operand) == OpKind::Register && guest.op_register(operand).is_ymm()
            }),
            flags_read: flags_of(guest.rflags_read()),
            flags_written: flags_of(guest.rflags_modified()),
            state: RDI,
            memory: RSI,
            stack_pointer: None,
        };
        plan.collect();
        plan.assign()?;
        Ok(plan)
    }

    fn collect(&mut self) {
        let mut factory = InstructionInfoFactory::new();
        for used in factory.info(&self.guest).used_registers() {
            let register = used.register();
            let bit = |number: usize| 1u16 << (number & 15);
            let reads = !matches!(used.access(), OpAccess::Write | OpAccess::CondWrite);
            let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            let whole = used.access() == OpAccess::Write;
            if let Some(number) = general_number(register) {
                // A write that leaves part of the register, or may not happen, needs the old value.
                if reads || !whole || register.size() < 4 {
                    self.read |= bit(number);
                }
                if writes {
                    self.written |= bit(number);
                }
            } else if register.is_vector_register() {
                let number = bit(register.number());
                if reads || !whole || !self.form.vex {
                    self.vector[usize::from(self.form.vex && !register.is_xmm())] |= number;
                }
                if writes {
                    self.vector[2] |= number;
                }
            }
        }
        self.vector[0] &= !self.vector[1];
    }

    fn assign(&mut self) -> Result<(), Unsupported> {
        let mut used = self.read | self.written;
        let stack_bit = 1u16 << RSP;
        if used & stack_bit != 0 {
            // CRC32 can name ESP and AH at once, and AH excludes the REX prefix of R8.
            let high_byte = (0..self.guest.op_count()).any(|operand| {
                use Register as R;
                self.guest.op_kind(operand) == OpKind::Register
                    && matches!(
                        self.guest.op_register(operand),
                        R::AH | R::BH | R::CH | R::DH
                    )
            });
            let candidates: &[usize] = if high_byte {
                &[RDX, 1, 0]
            } else {
                &[8, 9, 10, 11]
            };
            let free = candidates
                .iter()
                .copied()
                .find(|number| used & 1 << number == 0);
            let free = free.ok_or(Unsupported::OtherClass)?;
            for operand in 0..self.guest.op_count() {
                if self.guest.op_kind(operand) == OpKind::Register {
                    let register = self.guest.op_register(operand);
                    // AH to BH number like AX to BX, so only SP's own names are meant here.
                    if general_number(register) == Some(RSP) {
                        self.guest.set_op_register(operand, sized(free, register));
                    }
                }
            }
            self.stack_pointer = Some(free);
            used = (used & !stack_bit) | 1 << free;
        }
        let pick = |candidates: &[usize], used: u16| {
            candidates
                .iter()
                .copied()
                .find(|number| used & 1 << number == 0)
                .ok_or(Unsupported::OtherClass)
        };
        // Not RAX or RCX, which carry the flags at the end.
        self.state = pick(&[RDI, 8, 9, 10, 11, 12], used)?;
        used |= 1 << self.state | 1 << RDI;
        // One of the low eight: high byte registers exclude a REX prefix.
        self.memory = pick(&[RSI, RDX, 1, 0, 3, 5], used)?;
        if self.form.memory.is_some() {
            self.guest.set_memory_base(gpr(self.memory));
        }
        Ok(())
    }

    /// The guest's instruction as it will run: equal for all instructions that share a thunk.
    pub fn key(&self, encoder: &mut Encoder) -> Result<[u8; 16], Unsupported> {
        encoder
            .encode(&self.guest, 0)
            .map_err(|_| Unsupported::Encoding)?;
        let bytes = encoder.take_buffer();
        let mut key = [0; 16];
        key[..bytes.len()].copy_from_slice(&bytes);
        // Two can collide: RSP and its substitute, and VZEROALL and VZEROUPPER of 64-bit code and of
        // other code, where they leave registers 8 to 15 alone.
        key[15] = self.stack_pointer.map_or(0, |number| number as u8);
        let clears = matches!(
            self.guest.mnemonic(),
            Mnemonic::Vzeroall | Mnemonic::Vzeroupper
        );
        if clears && matches!(self.guest.code_size(), CodeSize::Code16 | CodeSize::Code32) {
            key[15] |= 0x80;
        }
        Ok(key)
    }

    /// Emits the function.
    pub fn emit(&self, encoder: &mut Encoder) -> Result<Code64, Unsupported> {
        let mut out = Emitter {
            encoder,
            bytes: Vec::with_capacity(128),
            state: gpr(self.state),
        };
        self.prologue(&mut out)?;
        let guest = out.bytes.len();
        out.instruction(self.guest)?;
        self.store(&mut out)?;
        self.leave(&mut out, 0)?;
        let fault = out.bytes.len();
        if self.form.simd_float || self.form.x87 != X87::No {
            self.leave(&mut out, 1)?;
        }
        Ok(Code64 {
            bytes: out.bytes,
            guest,
            fault,
        })
    }

    fn saved(&self) -> impl DoubleEndedIterator<Item = usize> {
        let used = self.read | self.written | 1 << self.state | 1 << self.memory;
        CALLEE_SAVED
            .into_iter()
            .filter(move |number| used & 1 << number != 0)
    }

    fn prologue(&self, out: &mut Emitter<'_>) -> Result<(), Unsupported> {
        for number in self.saved() {
            out.instruction(Instruction::with1(Code::Push_r64, gpr(number)).map_err(internal)?)?;
        }
        if self.state != RDI {
            out.registers(Code::Mov_r64_rm64, gpr(self.state), Register::RDI)?;
        }
        if self.flags_read != Flags::NONE {
            out.load(Code::Movzx_r32_rm16, Register::EAX, FLAGS_OFFSET)?;
            out.instruction(
                Instruction::with2(Code::Add_AL_imm8, Register::AL, 127).map_err(internal)?,
            )?;
            out.instruction(Instruction::with(Code::Sahf))?;
        }
        // From here to the guest's instruction nothing changes the flags.
        if self.form.memory.is_some() && self.memory != RSI {
            out.registers(Code::Mov_r64_rm64, gpr(self.memory), Register::RSI)?;
        }
        for number in bits(self.vector[0]) {
            let xmm = Register::XMM0 + number as u32;
            let code = if self.form.vex {
                Code::VEX_Vmovdqa_xmm_xmmm128
            } else {
                Code::Movaps_xmm_xmmm128
            };
            out.load(code, xmm, VECTOR_OFFSET + 32 * number)?;
        }
        for number in bits(self.vector[1]) {
            let ymm = Register::YMM0 + number as u32;
            let code = Code::VEX_Vmovdqa_ymm_ymmm256;
            out.load(code, ymm, VECTOR_OFFSET + 32 * number)?;
        }
        for number in bits(self.read) {
            out.load(
                Code::Mov_r64_rm64,
                gpr(self.host(number)),
                GPR_OFFSET + 8 * number,
            )?;
        }
        Ok(())
    }

    fn host(&self, number: usize) -> usize {
        if number == RSP {
            self.stack_pointer.unwrap_or(RSP)
        } else {
            number
        }
    }

    fn store(&self, out: &mut Emitter<'_>) -> Result<(), Unsupported> {
        for number in bits(self.written) {
            out.store(
                Code::Mov_rm64_r64,
                GPR_OFFSET + 8 * number,
                gpr(self.host(number)),
            )?;
        }
        for number in bits(self.vector[2]) {
            let offset = VECTOR_OFFSET + 32 * number;
            if self.form.vex {
                // VEX instructions clear what they do not write.
                let ymm = Register::YMM0 + number as u32;
                out.store(Code::VEX_Vmovdqa_ymmm256_ymm, offset, ymm)?;
            } else {
                let xmm = Register::XMM0 + number as u32;
                out.store(Code::Movaps_xmmm128_xmm, offset, xmm)?;
            }
        }
        if self.flags_written != Flags::NONE {
            out.instruction(Instruction::with1(Code::Seto_rm8, Register::AL).map_err(internal)?)?;
            out.instruction(Instruction::with(Code::Lahf))?;
            let kept = !self.flags_written.to_ax();
            out.instruction(
                Instruction::with2(Code::And_EAX_imm32, Register::EAX, u32::from(!kept))
                    .map_err(internal)?,
            )?;
            out.load(Code::Movzx_r32_rm16, Register::ECX, FLAGS_OFFSET)?;
            out.instruction(
                Instruction::with2(Code::And_rm32_imm32, Register::ECX, u32::from(kept))
                    .map_err(internal)?,
            )?;
            out.registers(Code::Or_r32_rm32, Register::EAX, Register::ECX)?;
            out.store(Code::Mov_rm16_r16, FLAGS_OFFSET, Register::AX)?;
        }
        Ok(())
    }

    fn leave(&self, out: &mut Emitter<'_>, result: u32) -> Result<(), Unsupported> {
        if self.dirties_upper {
            // The host's own SSE code would be slow, on some CPUs a hundred times, while upper halves
            // hold something.
            out.instruction(Instruction::with(Code::VEX_Vzeroupper))?;
        }
        for number in self.saved().rev() {
            out.instruction(Instruction::with1(Code::Pop_r64, gpr(number)).map_err(internal)?)?;
        }
        out.instruction(
            Instruction::with2(Code::Mov_r32_imm32, Register::EAX, result).map_err(internal)?,
        )?;
        out.instruction(Instruction::with(Code::Retnq))
    }
}

/// An instruction of the frame, not of the guest, that cannot be put together: its operands are
/// fixed above, so this is the answer to a form that no plan fits.
fn internal(_: iced_x86::IcedError) -> Unsupported {
    Unsupported::Encoding
}

fn bits(mask: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |number| mask & 1 << number != 0)
}

struct Emitter<'a> {
    encoder: &'a mut Encoder,
    bytes: Vec<u8>,
    state: Register,
}

impl Emitter<'_> {
    fn instruction(&mut self, instruction: Instruction) -> Result<(), Unsupported> {
        self.encoder
            .encode(&instruction, 0)
            .map_err(|_| Unsupported::Encoding)?;
        self.bytes.append(&mut self.encoder.take_buffer());
        Ok(())
    }

    fn address(&self, offset: usize) -> Address {
        Address::with_base_displ(self.state, offset as i64)
    }

    fn load(&mut self, code: Code, register: Register, offset: usize) -> Result<(), Unsupported> {
        let address = self.address(offset);
        self.instruction(Instruction::with2(code, register, address).map_err(internal)?)
    }

    fn store(&mut self, code: Code, offset: usize, register: Register) -> Result<(), Unsupported> {
        let address = self.address(offset);
        self.instruction(Instruction::with2(code, address, register).map_err(internal)?)
    }

    fn registers(&mut self, code: Code, to: Register, from: Register) -> Result<(), Unsupported> {
        self.instruction(Instruction::with2(code, to, from).map_err(internal)?)
    }
}
