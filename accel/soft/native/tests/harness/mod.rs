//! The differential test: every claimed form on random states against the host running the
//! unmodified instruction.

mod alu;
pub mod generate;
pub mod native;

use std::collections::BTreeMap;

use anemone_soft_native::{Fault, Flags, Form, Location, NativeCpu, Unsupported};
use iced_x86::{Code, CpuidFeature, Encoder, Instruction, Mnemonic, OpKind};

use generate::Random;
use native::{Block, Native};

/// What a run did.
#[derive(Default, Debug)]
pub struct Summary {
    pub cases: u64,
    /// Forms with a thunk, and how many of their cases faulted (#MF, #XM).
    pub thunk_forms: usize,
    pub faults: u64,
    /// Integer forms checked against the primitives.
    pub integer_forms: usize,
    /// Forms of 64-bit mode that are neither, by reason.
    pub unclaimed: BTreeMap<String, usize>,
    /// Claimed forms that the generator cannot make.
    pub not_covered: Vec<Code>,
}

/// Flags that the SDM (volume 2, "Flags Affected" of each instruction) leaves undefined.
pub fn undefined_flags(mnemonic: Mnemonic) -> Flags {
    use Mnemonic as M;
    let af = Flags::AF;
    let pf = Flags::PF;
    let arithmetic = Flags::SF.union(Flags::ZF).union(af).union(pf);
    match mnemonic {
        M::And | M::Or | M::Xor | M::Test => af,
        M::Mul | M::Imul => arithmetic,
        M::Div | M::Idiv => Flags::ALL,
        // OF only with a count of 1, which the caller adds; AF after any shift.
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd => af.union(Flags::OF),
        M::Rol | M::Ror | M::Rcl | M::Rcr => Flags::OF,
        M::Bt | M::Bts | M::Btr | M::Btc => af.union(pf).union(Flags::SF).union(Flags::OF),
        M::Bsf | M::Bsr => Flags::ALL.with(Flags::ZF, false),
        M::Lzcnt | M::Tzcnt => af.union(pf).union(Flags::SF).union(Flags::OF),
        M::Andn | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi => af.union(pf),
        M::Bextr => af.union(pf).union(Flags::SF),
        _ => Flags::NONE,
    }
}

/// All forms: those with a thunk, those with a primitive.
pub fn claims(summary: &mut Summary) -> (Vec<Code>, Vec<Code>) {
    let mut random = Random::new(1);
    let (mut thunks, mut integers) = (Vec::new(), Vec::new());
    for code in
        Code::values().filter(|code| code.op_code().is_instruction() && code.op_code().mode64())
    {
        let made = generate::instruction(code, &mut random);
        let mut plain = Instruction::default();
        plain.set_code(code);
        let class = Form::of(made.as_ref().unwrap_or(&plain));
        if alu::claims(code) {
            integers.push(code);
        }
        match class {
            Ok(_) if made.is_none() => summary.not_covered.push(code),
            Ok(_) => thunks.push(code),
            Err(_) if alu::claims(code) => {}
            Err(why) => {
                let why = match why {
                    Unsupported::MissingFeature(_) => "the host lacks the feature".to_owned(),
                    other => other.to_string(),
                };
                *summary.unclaimed.entry(why).or_default() += 1;
            }
        }
    }
    summary.thunk_forms = thunks.len();
    summary.integer_forms = integers.len();
    (thunks, integers)
}

#[repr(C, align(64))]
#[derive(Clone)]
struct Buffer([u8; 256]);

/// Where in a buffer the operand starts: at every offset for forms that allow it.
fn place(form_alignment: u64, random: &mut Random) -> usize {
    let step = form_alignment.max(1);
    (random.below(96 / step) * step) as usize
}

struct Bench {
    native: Native,
    encoder: Encoder,
    random: Random,
    before: Block,
}

impl Bench {
    /// A random instruction of `code`, encoded, that the encoder accepts.
    fn make(&mut self, code: Code) -> Option<(Instruction, Vec<u8>)> {
        for _ in 0..32 {
            let made = generate::instruction(code, &mut self.random)?;
            if self.encoder.encode(&made, 0).is_ok() {
                return Some((made, self.encoder.take_buffer()));
            }
            let _ = self.encoder.take_buffer();
        }
        None
    }

    /// Points the memory operand's base register at `address`.
    fn aim(&mut self, made: &Instruction, address: usize) {
        if (0..made.op_count()).any(|operand| made.op_kind(operand) == OpKind::Memory) {
            let base = made.memory_base().number();
            self.before.gpr[base] = (address as u64).wrapping_sub(made.memory_displacement64());
        }
    }
}

/// Runs `cases` cases. Returns the first difference as text.
pub fn run(seed: u64, cases: u64) -> Result<Summary, String> {
    let mut summary = Summary::default();
    let (thunks, integers) = claims(&mut summary);
    let mut cpu = NativeCpu::new(1 << 20).map_err(|error| error.to_string())?;
    let mut bench = Bench {
        native: Native::new()?,
        encoder: Encoder::new(64),
        random: Random::new(seed),
        before: Block::new(),
    };
    // Three of four cases go to the thunks, of which there are more forms.
    for case in 0..cases {
        let result = if case % 4 != 3 {
            let code = thunks[(case - case / 4) as usize % thunks.len()];
            thunk_case(&mut cpu, &mut bench, code, &mut summary)
        } else {
            let code = integers[(case / 4) as usize % integers.len()];
            alu::case(&mut bench, code)
        };
        result.map_err(|text| format!("seed {seed}, case {case}: {text}"))?;
        summary.cases += 1;
    }
    Ok(summary)
}

fn thunk_case(
    cpu: &mut NativeCpu,
    bench: &mut Bench,
    code: Code,
    summary: &mut Summary,
) -> Result<(), String> {
    let (made, bytes) = bench
        .make(code)
        .ok_or_else(|| format!("{code:?}: no encodable operands"))?;
    let thunk = cpu
        .thunk(&made)
        .map_err(|why| format!("{code:?} {bytes:02x?}: {why}"))?;
    generate::state(&mut bench.random, &mut bench.before);
    let mut expected = Buffer([0; 256]);
    for chunk in expected.0.chunks_mut(16) {
        chunk.copy_from_slice(&bench.random.vector());
    }
    let operand = thunk.form().memory;
    let start = place(
        operand.map_or(1, |operand| u64::from(operand.alignment)),
        &mut bench.random,
    );
    let mut memory = expected.clone();
    bench.aim(&made, expected.0.as_ptr() as usize + start);

    cpu.state.gpr[..16].copy_from_slice(&bench.before.gpr);
    cpu.set_rflags(bench.before.rflags);
    cpu.load_xsave_image(&bench.before.area.0)
        .map_err(|error| error.to_string())?;
    let mut after = bench.before.clone();
    let native = bench.native.run(&bytes, &mut after);

    let range = start..start + operand.map_or(0, |operand| usize::from(operand.size));
    let location = Location::default();
    let outcome = if bench.random.one_in(2) {
        // SAFETY: the operand lies in the buffer and is aligned as the form asks.
        unsafe { cpu.run(&thunk, memory.0.as_mut_ptr().add(start), location) }
    } else {
        let len = range.len();
        if operand.is_some_and(|operand| operand.read) {
            cpu.scratch()[..len].copy_from_slice(&memory.0[range.clone()]);
        } else {
            cpu.scratch().fill(0xa5);
        }
        let outcome = cpu.run_buffered(&thunk, location);
        if operand.is_some_and(|operand| operand.write) && outcome.is_ok_and(|done| done.stored) {
            memory.0[range.clone()].copy_from_slice(&cpu.scratch()[..len]);
        }
        outcome
    };

    let wrong = |what: &str, ours: String, theirs: String| {
        Err(format!(
            "{code:?} {bytes:02x?}: {what}\n  ours {ours}\n  host {theirs}"
        ))
    };
    match (native, outcome) {
        (Ok(()), Ok(_)) => {}
        (Err(libc::SIGFPE), Err(Fault::Math | Fault::Simd)) => summary.faults += 1,
        (native, outcome) => {
            return wrong("outcome", format!("{outcome:?}"), format!("{native:?}"));
        }
    }
    if cpu.state.gpr[..16] != after.gpr {
        return wrong(
            "registers",
            format!("{:x?}", &cpu.state.gpr[..16]),
            format!("{:x?}", after.gpr),
        );
    }
    let defined = Flags::ALL.replace(undefined_flags(code.mnemonic()), Flags::NONE);
    let ours = Flags::NONE.replace(defined, cpu.state.flags);
    let theirs = Flags::NONE.replace(defined, Flags::from_rflags(after.rflags));
    if ours != theirs {
        return wrong("flags", format!("{ours:?}"), format!("{theirs:?}"));
    }
    // The x87 pointers are the guest's here and the stub's there; see the environment test.
    if made.mnemonic() == Mnemonic::Fnstenv || made.mnemonic() == Mnemonic::Fnsave {
        let pointers = if matches!(range.len(), 14 | 94) {
            6..14
        } else {
            12..28
        };
        for at in pointers {
            (memory.0[start + at], expected.0[start + at]) = (0, 0);
        }
    }
    if memory.0 != expected.0 {
        return wrong(
            "memory",
            format!("{:02x?}", &memory.0[range.clone()]),
            format!("{:02x?}", &expected.0[range]),
        );
    }
    let ours = cpu.xsave_image();
    let theirs = &after.area.0;
    for (what, range) in [
        ("x87 control", 0..5),
        ("MXCSR", 24..28),
        ("XMM", 160..416),
        ("YMM", 576..832),
    ] {
        if ours[range.clone()] != theirs[range.clone()] {
            return wrong(
                what,
                format!("{:02x?}", &ours[range.clone()]),
                format!("{:02x?}", &theirs[range]),
            );
        }
    }
    for register in 0..8 {
        let range = 32 + 16 * register..42 + 16 * register;
        if ours[range.clone()] != theirs[range.clone()] {
            return wrong(
                "ST",
                format!("{register} {:02x?}", &ours[range.clone()]),
                format!("{:02x?}", &theirs[range]),
            );
        }
    }
    Ok(())
}

/// Runs each form with a memory operand at an odd address: the host must fault exactly where the form
/// asks for alignment.
pub fn alignment(seed: u64) -> Result<usize, String> {
    let mut summary = Summary::default();
    let (thunks, _) = claims(&mut summary);
    let _cpu = NativeCpu::new(1 << 16).map_err(|error| error.to_string())?;
    let mut bench = Bench {
        native: Native::new()?,
        encoder: Encoder::new(64),
        random: Random::new(seed),
        before: Block::new(),
    };
    let mut checked = 0;
    for code in thunks {
        let Some((made, bytes, operand)) = (0..64).find_map(|_| {
            let (made, bytes) = bench.make(code)?;
            Some((made, bytes, Form::of(&made).ok()?.memory?))
        }) else {
            continue;
        };
        generate::state(&mut bench.random, &mut bench.before);
        // Everything masked and nothing pending, so that only the address can fault.
        bench.before.area.0[0..4].copy_from_slice(&[0x7f, 3, 0, 0]);
        bench.before.area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let mut buffer = Buffer([0; 256]);
        bench.aim(&made, buffer.0.as_mut_ptr() as usize + 1);
        let mut after = bench.before.clone();
        let faulted = bench.native.run(&bytes, &mut after).is_err();
        // The manual says #GP for SHA; AMD's CPUs do not enforce it.
        let lax = code.cpuid_features().contains(&CpuidFeature::SHA);
        if faulted != (operand.alignment > 1) && !lax {
            return Err(format!(
                "{code:?}: alignment {}, host faulted: {faulted}",
                operand.alignment
            ));
        }
        std::hint::black_box(&mut buffer);
        checked += 1;
    }
    Ok(checked)
}
