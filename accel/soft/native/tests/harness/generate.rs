//! Random instructions of a given form and random states.

use iced_x86::{Code, Instruction, OpCodeOperandKind as K, OpKind, Register};

use super::native::Block;

/// xorshift64*: small, and the same everywhere for a seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 33) % limit
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// An integer that is often near a boundary.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            1 << 63,
            u64::MAX,
        ];
        match self.below(4) {
            0 => EDGES[self.below(12) as usize],
            1 => self.next() >> self.below(64),
            _ => self.next(),
        }
    }

    /// 16 bytes that are integers, floats or doubles, often special ones.
    pub fn vector(&mut self) -> [u8; 16] {
        const F32: [u32; 10] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            1,
            0x7f7f_ffff,
            0x4f00_0000,
        ];
        const F64: [u64; 10] = [
            0,
            1 << 63,
            0x3ff0 << 48,
            0x7ff0 << 48,
            0xfff0 << 48,
            0x7ff8 << 48,
            (0x7ff0 << 48) | 1,
            1,
            0x7fef_ffff_ffff_ffff,
            0x41e0 << 48,
        ];
        let mut bytes = [0; 16];
        match self.below(4) {
            0 => {
                for lane in bytes.chunks_mut(4) {
                    let ordinary = ((self.next() as u32) & 0x8fff_ffff) | 0x3800_0000;
                    let value = if self.one_in(2) {
                        F32[self.below(10) as usize]
                    } else {
                        ordinary
                    };
                    lane.copy_from_slice(&value.to_le_bytes());
                }
            }
            1 => {
                for lane in bytes.chunks_mut(8) {
                    let ordinary = (self.next() & !(0x7ff << 52)) | ((self.below(128) + 960) << 52);
                    let value = if self.one_in(2) {
                        F64[self.below(10) as usize]
                    } else {
                        ordinary
                    };
                    lane.copy_from_slice(&value.to_le_bytes());
                }
            }
            _ => {
                for lane in bytes.chunks_mut(8) {
                    lane.copy_from_slice(&self.integer().to_le_bytes());
                }
            }
        }
        bytes
    }

    /// An 80-bit value.
    pub fn extended(&mut self) -> [u8; 10] {
        let (exponent, significand): (u16, u64) = match self.below(8) {
            0 => (0, 0),
            1 => (0x7fff, 1 << 63),
            2 => (0x7fff, self.next() | 1 << 63),
            3 => (0, self.next() >> 1),
            4 => (self.next() as u16 & 0x7fff, self.next()),
            _ => (0x3fff - 40 + self.below(80) as u16, self.next() | 1 << 63),
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&significand.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent | (self.next() as u16 & 0x8000)).to_le_bytes());
        bytes
    }
}

/// A random instruction of the form, with its memory operand at `[base + displacement]`; `None` if
/// the form has operands that this does not make.
pub fn instruction(code: Code, random: &mut Random) -> Option<Instruction> {
    let op_code = code.op_code();
    if !op_code.is_instruction() || !op_code.mode64() {
        return None;
    }
    let mut made = Instruction::default();
    made.set_code(code);
    made.set_code_size(iced_x86::CodeSize::Code64);
    let mut immediates = 0;
    for (operand, kind) in op_code.op_kinds().iter().enumerate() {
        let operand = operand as u32;
        let memory = random.one_in(2);
        let number = random.below(16) as u32;
        let register = match kind {
            K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem if memory => None,
            K::mm_or_mem | K::xmm_or_mem | K::ymm_or_mem if memory => None,
            K::mem => None,
            K::r8_or_mem | K::r8_reg | K::r8_opcode => Some(Register::AL + random.below(20) as u32),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => Some(Register::AX + number),
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                Some(Register::EAX + number)
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                Some(Register::RAX + number)
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => Some(Register::MM0 + number % 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                Some(Register::XMM0 + number)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                Some(Register::YMM0 + number)
            }
            K::st0 => Some(Register::ST0),
            K::sti_opcode => Some(Register::ST0 + number % 8),
            K::al => Some(Register::AL),
            K::cl => Some(Register::CL),
            K::ax => Some(Register::AX),
            K::dx => Some(Register::DX),
            K::eax => Some(Register::EAX),
            K::rax => Some(Register::RAX),
            K::imm8
            | K::imm8_const_1
            | K::imm8sex16
            | K::imm8sex32
            | K::imm8sex64
            | K::imm16
            | K::imm32
            | K::imm32sex64 => {
                let op_kind = match kind {
                    K::imm8 | K::imm8_const_1 if immediates == 0 => OpKind::Immediate8,
                    K::imm8 => OpKind::Immediate8_2nd,
                    K::imm8sex16 => OpKind::Immediate8to16,
                    K::imm8sex32 => OpKind::Immediate8to32,
                    K::imm8sex64 => OpKind::Immediate8to64,
                    K::imm16 => OpKind::Immediate16,
                    K::imm32 => OpKind::Immediate32,
                    _ => OpKind::Immediate32to64,
                };
                made.set_op_kind(operand, op_kind);
                let value = if *kind == K::imm8_const_1 {
                    1
                } else {
                    random.integer()
                };
                match op_kind {
                    OpKind::Immediate8 => made.set_immediate8(value as u8),
                    OpKind::Immediate8_2nd => made.set_immediate8_2nd(value as u8),
                    OpKind::Immediate8to16 => made.set_immediate8to16(i16::from(value as i8)),
                    OpKind::Immediate8to32 => made.set_immediate8to32(i32::from(value as i8)),
                    OpKind::Immediate8to64 => made.set_immediate8to64(i64::from(value as i8)),
                    OpKind::Immediate16 => made.set_immediate16(value as u16),
                    OpKind::Immediate32 => made.set_immediate32(value as u32),
                    _ => made.set_immediate32to64(i64::from(value as i32)),
                }
                immediates += 1;
                continue;
            }
            _ => return None,
        };
        match register {
            Some(register) => {
                made.set_op_kind(operand, OpKind::Register);
                made.set_op_register(operand, register);
            }
            None => {
                let base =
                    [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15][random.below(15) as usize];
                made.set_op_kind(operand, OpKind::Memory);
                made.set_memory_base(Register::RAX + base);
                made.set_memory_displ_size(8);
                made.set_memory_displacement64((random.next() as i8) as i64 as u64);
            }
        }
    }
    Some(made)
}

/// A random, architecturally possible state.
pub fn state(random: &mut Random, block: &mut Block) {
    for register in &mut block.gpr {
        *register = random.integer();
    }
    block.rflags = 0x202 | (random.next() & 0x8d5);
    let area = &mut block.area.0;
    area.fill(0);
    // Mostly all exceptions masked, as programs run.
    let masks = if random.one_in(6) {
        random.next() as u16 & 0x3f
    } else {
        0x3f
    };
    let control = 0x40 | masks | (random.next() as u16 & 0xf00);
    let raised = if random.one_in(3) {
        random.next() as u16 & 0x7f
    } else {
        0
    };
    // A pending exception would hide most instructions behind #MF.
    let raised = if random.one_in(4) {
        raised
    } else {
        raised & (masks | 0x40)
    };
    let summary = if raised & !masks & 0x3f != 0 {
        0x8080
    } else {
        0
    };
    let status =
        raised | summary | (random.next() as u16 & 0x4700) | ((random.below(8) as u16) << 11);
    area[0..2].copy_from_slice(&control.to_le_bytes());
    area[2..4].copy_from_slice(&status.to_le_bytes());
    area[4] = if random.one_in(3) {
        random.next() as u8
    } else {
        0xff
    };
    let masks = if random.one_in(6) {
        random.next() as u32 & 0x1f80
    } else {
        0x1f80
    };
    let mut mxcsr = masks
        | if random.one_in(3) {
            random.next() as u32 & 0x3f
        } else {
            0
        };
    if random.one_in(2) {
        mxcsr |= random.next() as u32 & 0xe040;
    }
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for register in 0..8 {
        area[32 + 16 * register..][..10].copy_from_slice(&random.extended());
    }
    for register in 0..16 {
        area[160 + 16 * register..][..16].copy_from_slice(&random.vector());
        area[576 + 16 * register..][..16].copy_from_slice(&random.vector());
    }
    area[512] = 7;
}
