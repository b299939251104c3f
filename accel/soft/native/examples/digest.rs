//! What random instructions do on this CPU, as digests of the state after them. Run with the same
//! arguments on the host and in a guest that the software CPU runs, the output must be the same.
//!
//! `digest [SEED [CASES [FROM TO]]]`: a line for every 5,000 cases, and for each one from FROM to TO.
//! It can be a guest's only program: as process 1 it powers the guest off.

#[path = "../tests/harness/mod.rs"]
#[allow(dead_code)]
mod harness;

use anemone_soft_native::{Flags, Form, NativeCpu};
use harness::generate::{self, Random};
use harness::native::{Block, Native};
use iced_x86::{
    Code, CpuidFeature, Encoder, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind,
};

/// Features whose instructions depend on nothing but registers and their operands, beside those
/// that have thunks.
const PLAIN: [CpuidFeature; 10] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CX8,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::CMOV,
    CpuidFeature::FXSR,
    CpuidFeature::MULTIBYTENOP,
];

fn is_chosen(code: Code) -> bool {
    use Mnemonic as M;
    let Some(made) = generate::instruction(code, &mut Random::new(1)) else {
        return false;
    };
    if Form::of(&made).is_ok() {
        return true;
    }
    let plain = code.cpuid_features().iter().all(|f| PLAIN.contains(f));
    let masked = matches!(
        code.mnemonic(),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
    );
    let other = code.is_privileged()
        || code.is_stack_instruction()
        || code.flow_control() != FlowControl::Next
        || !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    // These show addresses or the system's tables, load segments, reach far from their operand, or
    // leave string instructions going backwards.
    let excluded = matches!(
        code.mnemonic(),
        M::Lea
            | M::Bt
            | M::Bts
            | M::Btr
            | M::Btc
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Sgdt
            | M::Sidt
            | M::Xlatb
            | M::Std
            | M::Fxrstor
            | M::Fxrstor64
    );
    (plain || masked) && !other && !excluded
}

/// An instruction whose address does not depend on its other operands.
fn make(code: Code, random: &mut Random, encoder: &mut Encoder) -> Option<(Instruction, Vec<u8>)> {
    for _ in 0..64 {
        let made = generate::instruction(code, random)?;
        let base = made.memory_base();
        let clash = (0..made.op_count())
            .filter(|n| made.op_kind(*n) == OpKind::Register)
            .any(|n| made.op_register(n).full_register() == base);
        // RAX to RBX are often implied.
        if is_memory(&made) && (clash || base.number() < 4) {
            continue;
        }
        if encoder.encode(&made, 0).is_ok() {
            return Some((made, encoder.take_buffer()));
        }
        let _ = encoder.take_buffer();
    }
    None
}

fn is_memory(made: &Instruction) -> bool {
    (0..made.op_count()).any(|n| made.op_kind(n) == OpKind::Memory)
}

fn fold(digest: &mut u64, bytes: &[u8]) {
    for byte in bytes {
        *digest = (*digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
}

/// Bytes that an operand in the middle may touch.
#[repr(C, align(64))]
struct Buffer([u8; 1024]);

struct Digester {
    native: Native,
    encoder: Encoder,
}

impl Digester {
    fn case(&mut self, code: Code, mut random: Random) -> Option<(Vec<u8>, u64)> {
        use Mnemonic as M;
        let (made, bytes) = make(code, &mut random, &mut self.encoder)?;
        let mut block = Block::new();
        generate::state(&mut random, &mut block);
        let mut memory = Buffer([0; 1024]);
        for chunk in memory.0.chunks_mut(16) {
            chunk.copy_from_slice(&random.vector());
        }
        let misaligned = if random.one_in(3) {
            random.below(16)
        } else {
            0
        };
        let start = 256 + 16 * random.below(8) as usize + misaligned as usize;
        let buffer = memory.0.as_mut_ptr();
        let base = is_memory(&made).then(|| made.memory_base().number());
        if let Some(base) = base {
            let address = buffer as u64 + start as u64;
            block.gpr[base] = address.wrapping_sub(made.memory_displacement64());
        }
        let outcome = self.native.run(&bytes, &mut block);
        let mut digest = 0;
        fold(&mut digest, format!("{outcome:?}").as_bytes());
        for (number, value) in block.gpr.iter().enumerate() {
            if base != Some(number) {
                fold(&mut digest, &value.to_le_bytes());
            }
        }
        let count_decides = matches!(
            made.mnemonic(),
            M::Shl
                | M::Sal
                | M::Shr
                | M::Sar
                | M::Shld
                | M::Shrd
                | M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
        );
        // After a fault a processor may have changed what the instruction leaves undefined.
        if outcome.is_ok() && !count_decides && made.mnemonic() != M::Cmpxchg {
            let undefined = harness::undefined_flags(made.mnemonic());
            let flags = Flags::from_rflags(block.rflags).replace(undefined, Flags::NONE);
            fold(&mut digest, &flags.to_rflags().to_le_bytes());
        }
        // Instruction pointers, and what depends on the maker.
        let hidden = match (made.mnemonic(), made.memory_size().size()) {
            (M::Fnstenv | M::Fnsave, 14 | 94) => 6..14,
            (M::Fnstenv | M::Fnsave, _) => 12..28,
            (M::Fxsave | M::Fxsave64, _) => 28..32,
            _ => 0..0,
        };
        for at in 0..memory.0.len() {
            if !(start + hidden.start..start + hidden.end).contains(&at) {
                // SAFETY: within the buffer, which foreign code may have written.
                fold(&mut digest, &[unsafe { buffer.add(at).read_volatile() }]);
            }
        }
        let area = &block.area.0;
        let stack = (0..8).map(|n| 32 + 16 * n..42 + 16 * n);
        for range in [0..5, 24..28, 160..416, 576..832].into_iter().chain(stack) {
            fold(&mut digest, &area[range]);
        }
        Some((bytes, digest))
    }
}

fn main() -> Result<(), String> {
    let mut arguments = std::env::args()
        .skip(1)
        .filter_map(|text| text.parse().ok());
    let seed: u64 = arguments.next().unwrap_or(1);
    let cases: u64 = arguments.next().unwrap_or(200_000);
    let shown = arguments.next().unwrap_or(0)..arguments.next().unwrap_or(0);
    // Its handler of SIGFPE comes first.
    let _cpu = NativeCpu::new(4096).map_err(|error| error.to_string())?;
    let mut digester = Digester {
        native: Native::new()?,
        encoder: Encoder::new(64),
    };
    let codes: Vec<Code> = Code::values().filter(|code| is_chosen(*code)).collect();
    println!("digest: {} forms", codes.len());
    let mut total = 0;
    for case in 0..cases {
        let code = codes[case as usize % codes.len()];
        let random = Random::new(seed << 32 | case);
        let (bytes, digest) = digester
            .case(code, random)
            .ok_or_else(|| format!("{code:?}: no encodable operands"))?;
        fold(&mut total, &digest.to_le_bytes());
        if shown.contains(&case) {
            println!("digest: case {case} {code:?} {bytes:02x?} {digest:016x}");
        }
        if case % 5_000 == 4_999 {
            println!("digest: {} cases {total:016x}", case + 1);
        }
    }
    println!("digest: end {total:016x}");
    if std::process::id() == 1 {
        // SAFETY: a plain system call, in a guest of its own.
        unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF) };
    }
    Ok(())
}
