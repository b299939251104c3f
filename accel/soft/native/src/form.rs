//! Which instruction forms the host can carry out for the guest, and what each needs.

use std::sync::LazyLock;

use iced_x86::{
    CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpKind, Register,
};

/// Why a form has no thunk. The interpreter core carries these out itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// Integer, control flow, stack, string or system instruction: not this crate's part beyond
    /// [`crate::Word`].
    #[error("not a vector, x87 or bit-manipulation instruction")]
    OtherClass,
    /// The host lacks a feature that the form needs.
    #[error("the host's CPU lacks {0:?}")]
    MissingFeature(CpuidFeature),
    /// EVEX, XOP, 3DNow! or an encoding that no 64-bit code can hold.
    #[error("an encoding that is not offered to guests")]
    Encoding,
    /// Touches memory element by element, with a fault possible in between: gathers, VMASKMOV,
    /// VPMASKMOV, MASKMOVQ, MASKMOVDQU. The core loops over the elements through its own MMU; the
    /// vector registers are open to it ([`crate::NativeCpu::ymm`]).
    #[error("accesses memory element by element")]
    PerElement,
    /// LDMXCSR, STMXCSR: the core moves the value with [`crate::NativeCpu::set_mxcsr`].
    #[error("moves MXCSR")]
    Mxcsr,
    /// Prefetches, which may be ignored, and SFENCE, LFENCE and MFENCE, which the core executes as
    /// themselves between the guest accesses that it makes.
    #[error("a fence or a prefetch")]
    FenceOrHint,
}

/// The memory operand of a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOperand {
    /// Bytes, at most 108 (FSAVE).
    pub size: u8,
    /// 1, or the alignment (16 or 32) of which a violation raises #GP(0) before any access.
    pub alignment: u8,
    /// Whether the bytes are read.
    pub read: bool,
    /// Whether the bytes are written. See [`crate::Completed::stored`] for the exception.
    pub write: bool,
}

/// The part of the x87 environment that a form touches besides the register stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum X87 {
    /// None: no x87 or MMX register.
    No,
    /// MMX, and x87 control instructions: FIP, FDP and FOP stay.
    Plain,
    /// Arithmetic, load, store: FIP, FDP and FOP are recorded.
    Recording,
    /// FLDCW and FNCLEX: FIP, FDP and FOP stay, but which exceptions are unmasked or pending changes.
    Control,
    /// FNINIT: the pointers become 0.
    Init,
    /// FNSTENV and FNSAVE.
    Store,
    /// FLDENV and FRSTOR.
    Load,
}

/// A form that has a thunk.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Features the guest's CPUID must show; without them the instruction raises #UD.
    pub features: &'static [CpuidFeature],
    /// The memory operand, if there is one.
    pub memory: Option<MemoryOperand>,
    /// Encoded with VEX: besides #UD by CPUID it needs CR4.OSXSAVE and XCR0 bits 1 and 2 unless it
    /// works on general registers only (BMI).
    pub vex: bool,
    /// Reads or writes XMM or YMM registers: needs CR0.EM clear, CR4.OSFXSR set, CR0.TS clear.
    pub vector: bool,
    /// Reads and writes MXCSR, and so may raise #XM.
    pub simd_float: bool,
    pub(crate) x87: X87,
}

impl Form {
    /// Whether it works on the x87 or MMX registers: #NM by CR0.EM and CR0.TS, #MF.
    pub fn uses_x87(&self) -> bool {
        self.x87 != X87::No
    }

    /// Classifies an instruction; the operands matter only in whether one is memory.
    ///
    /// # Errors
    /// The reason why there is no thunk.
    pub fn of(instruction: &Instruction) -> Result<Self, Unsupported> {
        let code = instruction.code();
        let features = code.cpuid_features();
        let vex = match code.encoding() {
            EncodingKind::Legacy => false,
            EncodingKind::VEX => true,
            _ => return Err(Unsupported::Encoding),
        };
        check_class(instruction, features)?;
        for feature in features {
            if !host_has(*feature) {
                return Err(Unsupported::MissingFeature(*feature));
            }
        }
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info_options(instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
        let (mut access, mut is_memory) = (OpAccess::None, false);
        let mut registers = (false, false);
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::Memory => {
                    is_memory = true;
                    access = info.op_access(operand);
                }
                OpKind::Register => {
                    let register = instruction.op_register(operand);
                    registers.0 |= register.is_vector_register();
                    registers.1 |= register.is_mm() || register.is_st();
                }
                _ => {}
            }
        }
        // With a memory source some conversions name no XMM register, but work as if they did.
        let float = features.iter().any(is_simd_float) && rounds(instruction.mnemonic());
        registers.0 |= float;
        let memory = is_memory.then(|| MemoryOperand {
            size: instruction.memory_size().size().min(128) as u8,
            alignment: alignment(instruction, vex, registers.0),
            read: matches!(
                access,
                OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            ),
            write: matches!(
                access,
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            ),
        });
        if memory.is_some_and(|memory| memory.size == 0 || !(memory.read || memory.write)) {
            return Err(Unsupported::OtherClass);
        }
        let vector = registers.0
            || matches!(
                instruction.mnemonic(),
                Mnemonic::Vzeroall | Mnemonic::Vzeroupper
            );
        Ok(Self {
            features,
            memory,
            vex,
            vector,
            simd_float: float,
            x87: x87_part(instruction, registers.1, features),
        })
    }
}

/// Features whose instructions are this crate's part.
const CLASSES: &[CpuidFeature] = &[
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::SSE4A,
    CpuidFeature::AES,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::SHA,
    CpuidFeature::GFNI,
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::FMA,
    CpuidFeature::F16C,
    CpuidFeature::VAES,
    CpuidFeature::VPCLMULQDQ,
    CpuidFeature::AVX_VNNI,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::ADX,
    CpuidFeature::LZCNT,
    CpuidFeature::POPCNT,
    CpuidFeature::MOVBE,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
];

fn is_x87(feature: &CpuidFeature) -> bool {
    matches!(
        feature,
        CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
    )
}

/// Features with instructions that obey MXCSR.
fn is_simd_float(feature: &CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::SSE | F::SSE2 | F::SSE3 | F::SSE4_1 | F::AVX | F::FMA | F::F16C
    )
}

fn check_class(instruction: &Instruction, features: &[CpuidFeature]) -> Result<(), Unsupported> {
    use Mnemonic as M;
    // The decoder counts it among the integer instructions.
    if instruction.mnemonic() == M::Wait {
        return Ok(());
    }
    let ours = features.iter().any(|feature| CLASSES.contains(feature));
    let rest = features
        .iter()
        .all(|feature| CLASSES.contains(feature) || *feature == CpuidFeature::CMOV);
    let code = instruction.code();
    if !ours || !rest || code.is_privileged() || code.is_stack_instruction() {
        return Err(Unsupported::OtherClass);
    }
    let kinds = (0..instruction.op_count()).map(|operand| instruction.op_kind(operand));
    for kind in kinds {
        match kind {
            OpKind::Register
            | OpKind::Memory
            | OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16 => {}
            OpKind::Immediate32 | OpKind::Immediate64 => {}
            _ => return Err(Unsupported::PerElement),
        }
    }
    if instruction.is_vsib() {
        return Err(Unsupported::PerElement);
    }
    match instruction.mnemonic() {
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => {
            Err(Unsupported::PerElement)
        }
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => Err(Unsupported::PerElement),
        M::Ldmxcsr | M::Stmxcsr | M::Vldmxcsr | M::Vstmxcsr => Err(Unsupported::Mxcsr),
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => {
            Err(Unsupported::FenceOrHint)
        }
        M::Sfence | M::Lfence | M::Mfence => Err(Unsupported::FenceOrHint),
        // FWAIT and an instruction as one form: decoders give the two apart. The rest are the
        // 8087's and 80287's own, which later CPUs ignore.
        M::Finit | M::Fclex | M::Fstenv | M::Fsave | M::Fstcw | M::Fstsw => {
            Err(Unsupported::Encoding)
        }
        M::Feni | M::Fdisi | M::Fsetpm | M::Fneni | M::Fndisi | M::Fnsetpm => {
            Err(Unsupported::Encoding)
        }
        _ => Ok(()),
    }
}

/// Whether the host has a feature that [`check_class`] lets through.
fn host_has(feature: CpuidFeature) -> bool {
    match feature {
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::SSE4A => is_x86_feature_detected!("sse4a"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        CpuidFeature::GFNI => is_x86_feature_detected!("gfni"),
        CpuidFeature::AVX => is_x86_feature_detected!("avx"),
        CpuidFeature::AVX2 => is_x86_feature_detected!("avx2"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::VAES => is_x86_feature_detected!("vaes"),
        CpuidFeature::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        CpuidFeature::AVX_VNNI => is_x86_feature_detected!("avxvnni"),
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        // x87, MMX, SSE, SSE2 and CMOV are part of x86-64.
        _ => true,
    }
}

/// SDM volume 2, section 2.4 (exception classes 1, 2, 4) and the legacy SSE equivalents.
fn alignment(instruction: &Instruction, vex: bool, vector: bool) -> u8 {
    use Mnemonic as M;
    let size = instruction.memory_size().size() as u8;
    let explicit = matches!(
        instruction.mnemonic(),
        M::Movaps
            | M::Movapd
            | M::Movdqa
            | M::Movntps
            | M::Movntpd
            | M::Movntdq
            | M::Movntdqa
            | M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    );
    let lax = matches!(
        instruction.mnemonic(),
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpistri
            | M::Pcmpistrm
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpestri64
            | M::Pcmpestrm64
    );
    if explicit || (!vex && vector && size == 16 && !lax) {
        size.max(1)
    } else {
        1
    }
}

/// Whether a vector instruction obeys MXCSR. Those listed move, shuffle or compute on integers; a
/// form missing from the list is merely slower.
fn rounds(mnemonic: Mnemonic) -> bool {
    const INTEGER: &[&str] = &[
        "p",
        "mov",
        "and",
        "or",
        "xor",
        "unpck",
        "shuf",
        "blend",
        "insert",
        "extract",
        "extrq",
        "broadcast",
        "perm",
        "aes",
        "sha",
        "gf2p8",
        "lddqu",
        "zero",
        "test",
        "fisttp",
    ];
    // Names are slow to make, and this is asked for every instruction that is decoded.
    static ROUNDS: LazyLock<Vec<bool>> = LazyLock::new(|| {
        let rounds = |mnemonic: Mnemonic| {
            let name = format!("{mnemonic:?}").to_lowercase();
            let name = name.strip_prefix('v').unwrap_or(&name);
            !INTEGER.iter().any(|prefix| name.starts_with(prefix))
        };
        Mnemonic::values().map(rounds).collect()
    });
    ROUNDS[mnemonic as usize]
}

fn x87_part(instruction: &Instruction, mmx_or_st: bool, features: &[CpuidFeature]) -> X87 {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Fninit => return X87::Init,
        M::Fnstenv | M::Fnsave => return X87::Store,
        M::Fldenv | M::Frstor => return X87::Load,
        M::Fnclex | M::Fldcw => return X87::Control,
        M::Fnstcw | M::Fnstsw | M::Wait | M::Emms => return X87::Plain,
        // With a memory source they touch no MMX register, but some CPUs still leave x87 mode.
        M::Cvtpi2ps | M::Cvtpi2pd => return X87::Plain,
        M::Fisttp => return X87::Recording,
        _ => {}
    }
    if features.iter().any(is_x87) {
        X87::Recording
    } else if mmx_or_st || features.contains(&CpuidFeature::MMX) {
        X87::Plain
    } else {
        X87::No
    }
}

/// Number of the full register that `register` is part of, if it is a general register.
pub(crate) fn general_number(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register().number())
}
