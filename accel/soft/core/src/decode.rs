//! From bytes to blocks.

use std::cell::Cell;

use anemone_soft_mmu::{PAGE_SIZE, cr0, cr4};
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Register,
};

use crate::block::{Block, Link, ModeKey, Op, Step, Whole};
use crate::cpu::{CodeSize, Cpu, Exception, Exec, reg, seg};
use crate::exec::{self, vector};
use crate::hot;

/// Most instructions in a block.
const LONGEST: usize = 48;

/// Longest instruction (SDM volume 2, 2.3.11).
const INSTRUCTION: usize = 15;

/// Bits of a [`ModeKey`].
mod key {
    pub const BITS_32: u32 = 1 << 0;
    pub const BITS_64: u32 = 1 << 1;
    /// Blocks of one instruction, for trace mode and interrupt shadows.
    pub const SINGLE: u32 = 1 << 2;
    pub const USER: u32 = 1 << 3;
    /// Data accesses are checked for alignment.
    pub const ALIGNED: u32 = 1 << 4;
    /// Real-address or virtual-8086 mode.
    pub const REAL: u32 = 1 << 5;
    pub const EM: u32 = 1 << 6;
    pub const TS: u32 = 1 << 7;
    pub const MP: u32 = 1 << 8;
    pub const OSFXSR: u32 = 1 << 9;
    pub const OSXSAVE: u32 = 1 << 10;
    /// XCR0 has SSE and AVX.
    pub const AVX: u32 = 1 << 11;
}

/// The code at an address, as far as its page goes.
struct Text {
    bytes: Vec<u8>,
    second: Option<u64>,
}

impl Cpu {
    /// Everything that the decoding of an instruction depends on.
    pub(crate) fn mode_key(&self, single: bool) -> ModeKey {
        let mut result = match self.code_size() {
            CodeSize::Bits16 => 0,
            CodeSize::Bits32 => key::BITS_32,
            CodeSize::Bits64 => key::BITS_64,
        };
        let bits = [
            (single, key::SINGLE),
            (self.cpl == 3, key::USER),
            (self.checks_alignment(), key::ALIGNED),
            (self.real_segments(), key::REAL),
            (self.cr0 & cr0::EM != 0, key::EM),
            (self.cr0 & cr0::TS != 0, key::TS),
            (self.cr0 & cr0::MP != 0, key::MP),
            (self.cr4 & cr4::OSFXSR != 0, key::OSFXSR),
            (self.cr4 & cr4::OSXSAVE != 0, key::OSXSAVE),
            (self.xcr0 & 6 == 6, key::AVX),
        ];
        for (set, bit) in bits {
            if set {
                result |= bit;
            }
        }
        result
    }

    /// Finds or makes the block at [`Cpu::rip`].
    pub(crate) fn block(&mut self, mode: ModeKey) -> Exec<std::ptr::NonNull<Block>> {
        let linear = self.code_address()?;
        let fetched = self.fetch(linear)?;
        if fetched.fresh {
            self.blocks.suspect(fetched.physical);
        }
        if let Some(found) = self.blocks.find(fetched.physical, mode) {
            // SAFETY: blocks in the tables are alive.
            let block = unsafe { found.as_ref() };
            if self.still_holds(block, linear)? {
                return Ok(found);
            }
            self.blocks.drop_block(found);
        }
        self.decode(linear, fetched.physical, mode)
    }

    /// Linear address of the next instruction, checked against the code segment.
    fn code_address(&mut self) -> Exec<u64> {
        if self.is_64bit() {
            return Ok(self.rip);
        }
        let code = &self.segments[seg::CS];
        if self.rip > u64::from(code.limit) {
            return Err(self.gp());
        }
        Ok(code.base.wrapping_add(self.rip) & 0xFFFF_FFFF)
    }

    fn fetch(&mut self, linear: u64) -> Exec<anemone_soft_mmu::Fetched> {
        let context = if self.cpl == 3 {
            anemone_soft_mmu::Context::User
        } else {
            anemone_soft_mmu::Context::Supervisor
        };
        match self.mmu.fetch(linear, context) {
            Ok(fetched) => Ok(fetched),
            // On a bus where nobody answers the bytes are all-ones, which is no instruction. A
            // device is not asked: no register is to be read because somebody jumps at it.
            Err(anemone_soft_mmu::Fault::Mmio(mmio)) => {
                anemone_log::warn_limited!(
                    "CPU {}: instruction fetch from {:#x} (linear {linear:#x}), where there is no \
                     memory: #UD",
                    self.index,
                    mmio.physical
                );
                Err(self.ud())
            }
            Err(fault) => Err(self.memory_fault(fault)),
        }
    }

    /// Whether a block found by its address is still what memory holds.
    fn still_holds(&mut self, block: &Block, linear: u64) -> Exec<bool> {
        let mut suspect = block.is_suspect();
        if let Some(second) = block.second {
            let fetched = self.fetch(self.second_page(linear))?;
            if fetched.physical != second {
                return Ok(false);
            }
            suspect |= fetched.fresh;
        }
        if !suspect {
            return Ok(true);
        }
        let mut now = vec![0; block.bytes.len()];
        let first = now
            .len()
            .min((PAGE_SIZE - block.physical % PAGE_SIZE) as usize);
        let (one, two) = now.split_at_mut(first);
        let read = self.mmu.read_physical(block.physical, one)
            && block
                .second
                .is_none_or(|second| self.mmu.read_physical(second, two));
        Ok(read && *now == *block.bytes)
    }

    /// Linear address of the page after that of `linear`.
    fn second_page(&self, linear: u64) -> u64 {
        let next = (linear & !(PAGE_SIZE - 1)).wrapping_add(PAGE_SIZE);
        if self.long_mode() {
            next
        } else {
            next & 0xFFFF_FFFF
        }
    }

    /// Decodes the code at `linear`, which lies at `physical`.
    fn decode(
        &mut self,
        linear: u64,
        physical: u64,
        mode: ModeKey,
    ) -> Exec<std::ptr::NonNull<Block>> {
        if let Some(block) = self.decode_pages(physical, None, mode)? {
            return Ok(block);
        }
        // The first instruction does not end in this page. Translation may report a write to
        // code, so it comes before the lock.
        let second = self.fetch(self.second_page(linear))?.physical;
        match self.decode_pages(physical, Some(second), mode)? {
            Some(block) => Ok(block),
            // Longer than an instruction may be.
            None => Err(self.gp()),
        }
    }

    /// Decodes a block from one page, or an instruction from two, and enters it. `None` if not
    /// even one instruction is complete.
    fn decode_pages(
        &mut self,
        physical: u64,
        second: Option<u64>,
        mode: ModeKey,
    ) -> Exec<Option<std::ptr::NonNull<Block>>> {
        let shared = self.shared.clone();
        // Parked, because the lock's owner may be waiting for this CPU.
        let mut pages = self.mmu.parked(|| shared.code.lock());
        let mut code = Text {
            bytes: Vec::new(),
            second,
        };
        let first_length = (PAGE_SIZE - physical % PAGE_SIZE).min(512) as usize;
        let parts = [(physical, first_length)].into_iter();
        for (at, length) in parts.chain(second.map(|at| (at, INSTRUCTION))) {
            let page = at & !(PAGE_SIZE - 1);
            if !pages.enter(page, self.index) {
                self.mmu.protect_code(page);
            }
            let start = code.bytes.len();
            code.bytes.resize(start + length, 0);
            if !self.mmu.read_physical(at, &mut code.bytes[start..]) {
                return Err(self.internal(format!("code at {at:#x} is not memory any more")));
            }
        }
        let block = self.decode_bytes(&code, physical, mode);
        let entered = block.map(|block| self.blocks.insert(block));
        drop(pages);
        Ok(entered)
    }

    /// Decodes a block; `None` if not even one instruction is complete.
    fn decode_bytes(&mut self, code: &Text, physical: u64, mode: ModeKey) -> Option<Block> {
        let size = self.code_size();
        let bits = match size {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        let limit = if mode & key::SINGLE != 0 || code.second.is_some() {
            1
        } else {
            LONGEST
        };
        let mut decoder = Decoder::with_ip(bits, &code.bytes, 0, DecoderOptions::NONE);
        let mut ops: Vec<Op> = Vec::with_capacity(16);
        let mut wholes = Vec::new();
        let mut links = 0u8;
        let mut end = 0;
        let mut over = false;
        while ops.len() < limit && !over {
            let start = decoder.position();
            let instruction = self.as_known(decoder.decode());
            let invalid = instruction.is_invalid();
            if invalid && decoder.last_error() == DecoderError::NoMoreBytes {
                // In a whole instruction's worth of bytes it is a length error.
                if code.bytes.len() - start < INSTRUCTION || ops.is_empty() {
                    break;
                }
            }
            let length = if invalid {
                // What it would take does not matter: it raises #UD.
                1
            } else {
                instruction.len()
            };
            end = start + length;
            let mut bytes = [0; INSTRUCTION];
            let shown = if invalid {
                (code.bytes.len() - start).min(INSTRUCTION)
            } else {
                length
            };
            bytes[..shown].copy_from_slice(&code.bytes[start..start + shown]);
            let mut op = self.operation(&instruction, &bytes, mode, &mut wholes);
            op.offset = start as u16;
            op.length = if invalid { shown as u8 } else { length as u8 };
            over = invalid || ends_block(&instruction);
            if matches!(
                instruction.flow_control(),
                FlowControl::ConditionalBranch
                    | FlowControl::UnconditionalBranch
                    | FlowControl::Call
            ) {
                op.extra = links;
                links += 1;
            }
            ops.push(op);
        }
        if ops.is_empty() {
            return None;
        }
        // Also after a jump: a handler's conditional jump that is not taken comes here.
        let mut last = Op::new(hot::end);
        last.imm = self.code_mask();
        last.offset = end as u16;
        last.extra = links;
        links += 1;
        ops.push(last);
        let version = self.blocks.version(physical);
        Some(Block {
            physical,
            mode,
            bytes: code.bytes[..end.min(code.bytes.len())].into(),
            ops: ops.into(),
            wholes: wholes.into(),
            second: code.second,
            checked: Cell::new(version.get()),
            version,
            links: (0..links).map(|_| Link::default()).collect(),
        })
    }

    /// TZCNT and LZCNT are BSF and BSR with a prefix that does nothing where they are not offered, and
    /// 64-bit code ignores the prefixes of segments that it does not have.
    pub(crate) fn as_known(&self, mut instruction: Instruction) -> Instruction {
        let has = |feature| self.cpuid.has(feature);
        let code = match instruction.code() {
            Code::Tzcnt_r16_rm16 if !has(CpuidFeature::BMI1) => Code::Bsf_r16_rm16,
            Code::Tzcnt_r32_rm32 if !has(CpuidFeature::BMI1) => Code::Bsf_r32_rm32,
            Code::Tzcnt_r64_rm64 if !has(CpuidFeature::BMI1) => Code::Bsf_r64_rm64,
            Code::Lzcnt_r16_rm16 if !has(CpuidFeature::LZCNT) => Code::Bsr_r16_rm16,
            Code::Lzcnt_r32_rm32 if !has(CpuidFeature::LZCNT) => Code::Bsr_r32_rm32,
            Code::Lzcnt_r64_rm64 if !has(CpuidFeature::LZCNT) => Code::Bsr_r64_rm64,
            code => code,
        };
        instruction.set_code(code);
        let flat = [Register::ES, Register::CS, Register::SS, Register::DS];
        if self.is_64bit() && flat.contains(&instruction.segment_prefix()) {
            instruction.set_segment_prefix(Register::None);
        }
        instruction
    }

    /// The operation of one instruction.
    #[expect(clippy::vec_box, reason = "operations point at the instructions")]
    fn operation(
        &mut self,
        instruction: &Instruction,
        bytes: &[u8; INSTRUCTION],
        mode: ModeKey,
        wholes: &mut Vec<Box<Whole>>,
    ) -> Op {
        let mut op = Op::new(hot::undefined);
        let offered = |f: &iced_x86::CpuidFeature| self.cpuid.has(*f);
        let known = !instruction.is_invalid() && instruction.cpuid_features().iter().all(offered);
        let refused = if known {
            vector::availability(self, instruction)
        } else {
            Some(Exception::UD)
        };
        let fast = mode & key::BITS_64 != 0 && mode & key::ALIGNED == 0;
        if refused.is_none()
            && fast
            && let Some(function) = hot::operation(&mut op, instruction)
        {
            op.run.set(function);
            return op;
        }
        op = Op::new(hot::undefined);
        let handler = exec::handler(instruction);
        let thunk = match refused {
            None => vector::plan(self, instruction),
            Some(_) => None,
        };
        let is_fast = thunk.is_some() && fast && hot::set_address(&mut op, instruction);
        let run = match (refused, &thunk) {
            (Some(Exception::NM), _) => hot::not_available,
            (Some(_), _) => hot::undefined,
            (None, Some(thunk)) if is_fast => vector::operation(&mut op, instruction, thunk, bytes),
            (None, Some(_)) => vector::run_any,
            (None, None) if handler.is_some() => hot::whole,
            (None, None) => hot::undefined,
        };
        op.run.set(run);
        if !is_fast {
            // Here it is the mask of instruction addresses.
            op.disp = self.code_mask() as i64;
        }
        let whole = Box::new(Whole {
            instruction: *instruction,
            handler: handler.unwrap_or(nothing),
            thunk,
            bytes: *bytes,
        });
        op.imm = &raw const *whole as u64;
        wholes.push(whole);
        op
    }
}

/// The handler of an instruction that has none; it is never called.
fn nothing(_: &mut Cpu, _: &Instruction) -> Exec {
    Ok(())
}

/// Whether code after the instruction belongs to another block.
fn ends_block(instruction: &Instruction) -> bool {
    !matches!(
        instruction.flow_control(),
        FlowControl::Next | FlowControl::ConditionalBranch
    )
}

impl Op {
    fn new(run: fn(&mut Cpu, &Op) -> Step) -> Self {
        Self {
            run: Cell::new(run),
            imm: 0,
            disp: 0,
            base: reg::ZERO as u8,
            index: reg::ZERO as u8,
            scale: 0,
            segment: seg::DS as u8,
            dst: 0,
            src: 0,
            length: 0,
            extra: 0,
            offset: 0,
        }
    }
}
