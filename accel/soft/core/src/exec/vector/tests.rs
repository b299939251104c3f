//! Whole instructions against the host's CPU: the same instruction with the same registers and
//! the same memory around a page border, on guest pages and on host pages with the same rights.

use anemone_soft_native::{ARITHMETIC_RFLAGS, Form};
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic, OpKind,
};

use crate::cpu::{Cpu, Exception, reg, seg, vector};
use crate::exec::harness::generate::{self, Random};
use crate::exec::harness::native::{Block, Native};
use crate::exec::harness::{DATA, Guest, PAGE, Pages, Second, arithmetic};

mod cost;
mod elements;
mod modes;

/// A guest and a host with the same state, which run the same instructions.
struct Pair {
    guest: Guest,
    host: Native,
    pages: Pages,
    random: Random,
    encoder: Encoder,
    second: Second,
    /// Size of the guest's code; the host's is 64-bit.
    bits: u32,
}

/// Places in saved state where guest and host need not agree: MXCSR_MASK depends on the host's
/// maker.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;

impl Pair {
    fn new(seed: u64) -> Self {
        let guest = Guest::new();
        Self {
            guest,
            host: Native::new().unwrap(),
            pages: Pages::new(2 * PAGE),
            random: Random::new(seed),
            encoder: Encoder::new(64),
            second: Second::Memory,
            bits: 64,
        }
    }

    fn second(&mut self, second: Second) {
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        self.pages.protect(
            PAGE,
            match second {
                Second::Memory | Second::Device => writable,
                Second::ReadOnly => libc::PROT_READ,
                Second::Absent => libc::PROT_NONE,
            },
        );
        self.guest.second(second);
        self.second = second;
    }

    /// Fills the operand pages of both.
    fn fill(&mut self, bytes: &[u8]) {
        self.pages.protect(PAGE, libc::PROT_READ | libc::PROT_WRITE);
        self.pages.write(0, bytes);
        self.guest.set_operands(self.second, bytes);
        self.second(self.second);
    }

    /// Runs on both. `pointers` are general registers that hold an address in the operand pages, as
    /// an offset from their start.
    fn run(&mut self, bytes: &[u8], before: &Block, pointers: &[usize]) -> Result<Outcome, String> {
        let memory = self.guest.operands(self.second);
        let (mut ours, mut theirs) = (before.clone(), before.clone());
        for number in pointers {
            ours.gpr[*number] = before.gpr[*number].wrapping_add(DATA);
            theirs.gpr[*number] = before.gpr[*number].wrapping_add(self.pages.base as u64);
        }
        self.guest.load(&ours);
        let theirs_done = self.host.run(bytes, &mut theirs);
        let ours_done = self.guest.run(bytes);
        if theirs_done != Err(libc::SIGSEGV) {
            for number in pointers {
                theirs.gpr[*number] = theirs.gpr[*number]
                    .wrapping_sub(self.pages.base as u64)
                    .wrapping_add(DATA);
            }
        }
        let expected = match (theirs_done, ours_done) {
            (Ok(()), Ok(())) => {
                self.pages.protect(PAGE, libc::PROT_READ | libc::PROT_WRITE);
                let expected = self.pages.read(0, 2 * PAGE);
                self.second(self.second);
                self.compare_memory(bytes, &expected)?;
                &theirs
            }
            (Err(libc::SIGFPE), Err(fault)) if [vector::MF, vector::XM].contains(&fault.vector) => {
                self.compare_memory(bytes, &memory)?;
                &theirs
            }
            // The host looks for a pending x87 exception before it looks at memory.
            (Err(libc::SIGSEGV | libc::SIGFPE), Err(fault))
                if [vector::PF, vector::GP].contains(&fault.vector) =>
            {
                self.compare_memory(bytes, &memory)?;
                &ours
            }
            // A store that an unmasked x87 exception suppresses does not reach the host's memory.
            (Ok(()), Err(fault))
                if fault.vector == vector::PF && before.area.0[0] & 0x3F != 0x3F =>
            {
                self.compare_memory(bytes, &memory)?;
                &ours
            }
            (theirs, ours) => return Err(format!("host {theirs:?}, guest {ours:?}")),
        };
        compare(&mut self.guest.cpu, expected)?;
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let defined = !arithmetic(instruction.rflags_undefined()) & ARITHMETIC_RFLAGS;
        let flags = self.guest.cpu.flags().to_rflags();
        if (flags ^ expected.rflags) & defined != 0 {
            return Err(format!(
                "flags: guest {flags:#x}, host {:#x}",
                expected.rflags
            ));
        }
        Ok(match ours_done {
            Ok(()) => Outcome::Done,
            Err(fault) => Outcome::Fault(fault),
        })
    }

    fn compare_memory(&self, bytes: &[u8], expected: &[u8]) -> Result<(), String> {
        let mut ours = self.guest.operands(self.second);
        let mut expected = expected.to_vec();
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let base = instruction.memory_base().number();
        let offset = self.guest.cpu.gpr(base).wrapping_sub(DATA);
        let start = offset.wrapping_add(instruction.memory_displacement64()) as usize;
        use Mnemonic as M;
        // The x87 pointers are the guest's here and the stub's there.
        let differs = match (instruction.mnemonic(), instruction.memory_size().size()) {
            (M::Fnstenv | M::Fnsave, 14 | 94) => 6..14,
            (M::Fnstenv | M::Fnsave, _) => 12..28,
            (M::Fxsave | M::Fxsave64 | M::Xsave | M::Xsave64, _)
            | (M::Xsaveopt | M::Xsaveopt64, _) => MXCSR_MASK,
            _ => 0..0,
        };
        for at in differs {
            (ours[start + at], expected[start + at]) = (0, 0);
        }
        match (0..2 * PAGE).find(|at| ours[*at] != expected[*at]) {
            None => Ok(()),
            Some(at) => Err(format!(
                "memory at {at:#x} (operand at {start:#x}): guest {:02x?}, host {:02x?}",
                &ours[at..(at + 16).min(2 * PAGE)],
                &expected[at..(at + 16).min(2 * PAGE)]
            )),
        }
    }

    /// A random instruction of the form whose memory operand does not depend on its other
    /// registers, and which is the same in code of the guest's size.
    fn make(&mut self, code: Code) -> Option<(Instruction, Vec<u8>)> {
        for _ in 0..512 {
            let made = generate::instruction(code, &mut self.random)?;
            let base = made.memory_base();
            let count = made.op_count();
            let is_memory = (0..count).any(|n| made.op_kind(n) == OpKind::Memory);
            let clash = (0..count)
                .filter(|n| made.op_kind(*n) == OpKind::Register)
                .any(|n| made.op_register(n).full_register() == base);
            // RAX, RCX and RDX are often implied.
            if is_memory && (clash || base.number() < 3) {
                continue;
            }
            let encoded = self.encoder.encode(&made, 0).is_ok();
            let bytes = self.encoder.take_buffer();
            if encoded && (self.bits == 64 || is_same(&made, self.bits, &bytes)) {
                return Some((made, bytes));
            }
        }
        None
    }
}

/// Whether the bytes of a 64-bit instruction mean the same in code of another size.
fn is_same(made: &Instruction, bits: u32, bytes: &[u8]) -> bool {
    let other = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
    let operand = |n| {
        made.op_kind(n) == other.op_kind(n)
            && (made.op_kind(n) != OpKind::Register || made.op_register(n) == other.op_register(n))
    };
    other.code() == made.code()
        && other.len() == bytes.len()
        && (0..made.op_count()).all(operand)
        && other.memory_base().full_register() == made.memory_base()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Fault(Exception),
}

fn compare(cpu: &mut Cpu, expected: &Block) -> Result<(), String> {
    for number in 0..16 {
        if cpu.gpr(number) != expected.gpr[number] {
            return Err(format!(
                "register {number}: guest {:#x}, host {:#x}",
                cpu.gpr(number),
                expected.gpr[number]
            ));
        }
    }
    let ours = *cpu.native.xsave_image();
    let theirs = &expected.area.0;
    let registers = (0..8).map(|n| ("ST", 32 + 16 * n..42 + 16 * n));
    let parts = [
        ("x87 control", 0..5),
        ("MXCSR", 24..28),
        ("XMM", 160..416),
        ("YMM", 576..832),
    ];
    for (what, range) in parts.into_iter().chain(registers) {
        if ours[range.clone()] != theirs[range.clone()] {
            return Err(format!(
                "{what}:\n guest {:02x?}\n host  {:02x?}",
                &ours[range.clone()],
                &theirs[range]
            ));
        }
    }
    Ok(())
}

/// Bytes of the memory operand and its alignment.
fn operand(made: &Instruction) -> Option<(usize, usize)> {
    if !(0..made.op_count()).any(|n| made.op_kind(n) == OpKind::Memory) {
        return None;
    }
    if let Ok(form) = Form::of(made) {
        return form
            .memory
            .map(|memory| (memory.size.into(), memory.alignment.into()));
    }
    use Mnemonic as M;
    Some(match made.mnemonic() {
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => (512, 16),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xrstor | M::Xrstor64 => (832, 64),
        _ => (made.memory_size().size(), 1),
    })
}

#[test]
fn every_form_equals_the_host_wherever_its_operand_is() {
    let mut pair = Pair::new(std::process::id().into());
    let codes = compare_forms(&mut pair, 60_000);
    assert!(codes > 600, "{codes}");
}

/// Compatibility mode, where the operations are others.
#[test]
fn every_form_of_32_bit_code_equals_the_host() {
    let mut pair = Pair::new(std::process::id().into());
    set_code(&mut pair.guest, 32);
    pair.bits = 32;
    let codes = compare_forms(&mut pair, 30_000);
    assert!(codes > 500, "{codes}");
}

/// Makes the guest's code 64-bit, 32-bit or 16-bit.
fn set_code(guest: &mut Guest, bits: u32) {
    guest.segment(seg::CS, 0xB, |cs| {
        cs.long = bits == 64;
        cs.big = bits == 32;
    });
}

/// Every form with a thunk or a handler here, in every place around the border of two pages. Returns
/// how many there are.
fn compare_forms(pair: &mut Pair, cases: usize) -> usize {
    let seed = u64::from(std::process::id());
    let codes: Vec<Code> = Code::values()
        .filter(|code| {
            pair.make(*code).is_some_and(|(made, _)| {
                let has = |feature: &_| pair.guest.cpu.cpuid.has(*feature);
                // What these move depends on the number of registers.
                let all = operand(&made).is_some_and(|(size, _)| size >= 512)
                    || matches!(made.mnemonic(), Mnemonic::Vzeroall | Mnemonic::Vzeroupper);
                let comparable = pair.bits == 64 || !all;
                made.cpuid_features().iter().all(has)
                    && comparable
                    && (Form::of(&made).is_ok() || super::handler(&made).is_some())
            })
        })
        .collect();
    let (mut done, mut faults, mut crossed, mut outside) = (0, 0, 0, 0);
    for case in 0..cases {
        let code = codes[case % codes.len()];
        let (made, bytes) = pair.make(code).unwrap();
        let mut before = Block::new();
        generate::state(&mut pair.random, &mut before);
        let second = match pair.random.below(8) {
            0 | 1 => Second::Absent,
            2 => Second::ReadOnly,
            3 => Second::Device,
            _ => Second::Memory,
        };
        pair.second = second;
        let mut memory = vec![0; 2 * PAGE];
        let place = operand(&made);
        let mut start = 0;
        let mut pointers = vec![];
        if let Some((size, alignment)) = place {
            start = match pair.random.below(4) {
                0 => pair.random.below((2 * PAGE - size) as u64) as usize,
                _ => PAGE - size + pair.random.below(size as u64 + 16) as usize,
            };
            // AMD's CPUs do not check the alignment of the operands of SHA instructions.
            let checked = !made.cpuid_features().contains(&CpuidFeature::SHA);
            if !checked || !pair.random.one_in(4) {
                start -= start % alignment;
            }
            start = start.min(2 * PAGE - size);
            for at in (start / 16 * 16..(start + size).min(2 * PAGE - 16)).step_by(16) {
                memory[at..at + 16].copy_from_slice(&pair.random.vector());
            }
            prepare(
                &mut pair.random,
                &made,
                &mut memory[start..start + size],
                &mut before,
            );
            let base = made.memory_base().number();
            before.gpr[base] = (start as u64).wrapping_sub(made.memory_displacement64());
            pointers.push(base);
        }
        pair.fill(&memory);
        let outcome = pair.run(&bytes, &before, &pointers);
        let outcome = outcome.unwrap_or_else(|what| {
            panic!("seed {seed}, case {case}: {code:?} {bytes:02x?} at {start:#x} {place:?}, {second:?}: {what}")
        });
        let crosses = place.is_some_and(|(size, _)| start < PAGE && start + size > PAGE);
        match outcome {
            Outcome::Done => {
                done += 1;
                crossed += usize::from(crosses);
                outside +=
                    usize::from(second == Second::Device && place.is_some() && start >= PAGE);
            }
            Outcome::Fault(fault) => {
                faults += 1;
                if fault.vector == vector::PF {
                    let at = DATA + if crosses { PAGE } else { start } as u64;
                    // The elements of a masked move fault by themselves.
                    let is_masked = super::element::handler(&made).is_some();
                    assert!(
                        fault.address == at || is_masked && fault.address > at,
                        "{code:?} at {start:#x}: {fault:x?}"
                    );
                }
            }
        }
    }
    println!("{done} done, {faults} faults, {crossed} across pages, {outside} on the bus");
    assert!(done > cases / 2 && faults > cases / 12);
    assert!(crossed > cases / 20 && outside > cases / 60);
    codes.len()
}

/// Makes what the instruction is about mostly valid.
fn prepare(random: &mut Random, made: &Instruction, operand: &mut [u8], before: &mut Block) {
    use Mnemonic as M;
    let mostly = !random.one_in(4);
    // The reserved bits of MXCSR. AMD's CPUs have one of them, MM (bit 17), and the guest has not.
    let reserved = |bytes: &mut [u8]| match mostly {
        true => bytes.fill(0),
        false => bytes[0] &= !2,
    };
    match made.mnemonic() {
        M::Ldmxcsr | M::Vldmxcsr => reserved(&mut operand[2..4]),
        M::Fxrstor | M::Fxrstor64 => reserved(&mut operand[26..28]),
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xrstor | M::Xrstor64 => {
            // The host has more components than the guest.
            before.gpr[reg::RAX] &= 7;
            before.gpr[reg::RDX] &= !0xFFFF_FFFF;
            operand[512] &= 7;
            operand[513..520].fill(0);
            reserved(&mut operand[26..28]);
            if mostly {
                operand[520..576].fill(0);
            }
        }
        _ => {}
    }
}

/// A state with x87 as after FNINIT, MXCSR 1F80H and zeros.
fn initial() -> Block {
    let mut block = Block::new();
    block.area.0[..2].copy_from_slice(&[0x7F, 3]);
    block.area.0[24..26].copy_from_slice(&[0x80, 0x1F]);
    block.area.0[512] = 7;
    block
}

fn set_vector(block: &mut Block, number: usize, value: &[u8; 32]) {
    let (low, high) = value.split_at(16);
    block.area.0[160 + 16 * number..][..16].copy_from_slice(low);
    block.area.0[576 + 16 * number..][..16].copy_from_slice(high);
}
