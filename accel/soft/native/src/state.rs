//! The user-visible register state of a guest CPU, laid out for generated code.

use std::mem::offset_of;

use crate::Flags;

/// Bytes of scratch memory for one operand.
pub const SCRATCH_SIZE: usize = 128;

/// Bytes of the saved vector and x87 state: the legacy region, the header and the upper YMM halves of
/// the standard XSAVE format (SDM volume 1, section 13.4).
pub const XSAVE_SIZE: usize = 832;

/// Words in [`UserState::gpr`]: a power of two, so that a masked index needs no check.
pub const GPR_COUNT: usize = 32;

/// MXCSR bits that a guest may set. Bit 17, AMD's misaligned-SSE mode, is not offered.
pub const MXCSR_MASK: u32 = 0xffff;

/// MXCSR after reset, and the host's while Rust code runs.
pub const MXCSR_RESET: u32 = 0x1f80;

/// An XSAVE area of the components x87, SSE and AVX.
#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct XsaveArea(pub [u8; XSAVE_SIZE]);

pub(crate) const FCW: usize = 0;
pub(crate) const FSW: usize = 2;
pub(crate) const FOP: usize = 6;
pub(crate) const FIP: usize = 8;
pub(crate) const FDP: usize = 16;
pub(crate) const MXCSR: usize = 24;
pub(crate) const MXCSR_MASK_FIELD: usize = 28;
pub(crate) const ST: usize = 32;
pub(crate) const XMM: usize = 160;
pub(crate) const XSTATE_BV: usize = 512;
pub(crate) const YMM_HIGH: usize = 576;

impl XsaveArea {
    /// x87 as FNINIT leaves it.
    pub fn new() -> Self {
        let mut area = Self([0; XSAVE_SIZE]);
        area.put(FCW, 0x37f_u16.to_le_bytes());
        area.put(MXCSR, MXCSR_RESET.to_le_bytes());
        area.put(MXCSR_MASK_FIELD, MXCSR_MASK.to_le_bytes());
        area.put(XSTATE_BV, 7_u64.to_le_bytes());
        area
    }

    pub fn put<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) {
        self.0[offset..offset + N].copy_from_slice(&bytes);
    }

    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.0[offset..offset + N]);
        bytes
    }
}

/// The block that generated code works on.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct UserState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15; then 16 words that generated code does
    /// not touch, for an engine that wants more operands addressed like registers.
    pub gpr: [u64; GPR_COUNT],
    /// The arithmetic flags.
    pub flags: Flags,
    /// MXCSR, unless the CPU's own register has it.
    pub(crate) mxcsr: u32,
    /// The YMM registers, each in one piece, so that one store and one load move it.
    pub(crate) vectors: Vectors,
    pub(crate) scratch: Scratch,
    /// x87 state, unless the CPU's own registers have it. The other components only pass through.
    pub(crate) area: XsaveArea,
}

#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Scratch(pub [u8; SCRATCH_SIZE]);

#[derive(Clone)]
#[repr(C, align(64))]
pub(crate) struct Vectors(pub [[u128; 2]; 16]);

pub(crate) const GPR_OFFSET: usize = offset_of!(UserState, gpr);
pub(crate) const FLAGS_OFFSET: usize = offset_of!(UserState, flags);
pub(crate) const VECTOR_OFFSET: usize = offset_of!(UserState, vectors);

impl UserState {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            gpr: [0; GPR_COUNT],
            flags: Flags::NONE,
            mxcsr: MXCSR_RESET,
            vectors: Vectors([[0; 2]; 16]),
            scratch: Scratch([0; SCRATCH_SIZE]),
            area: XsaveArea::new(),
        })
    }
}
