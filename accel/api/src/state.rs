//! The architectural state of a CPU, independent of the accelerator that runs it.

/// General registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct Regs {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part (Intel SDM volume 3, 3.4.3 and 3.4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Linear address of the first byte.
    pub base: u64,
    /// Offset of the last byte, in bytes whatever the granularity bit says.
    pub limit: u32,
    /// Visible part.
    pub selector: u16,
    /// Type field, 4 bits.
    pub kind: u8,
    /// Present.
    pub present: bool,
    /// Descriptor privilege level.
    pub dpl: u8,
    /// Default operation size (D/B).
    pub big: bool,
    /// Code or data, not system (S).
    pub code_or_data: bool,
    /// 64-bit code (L).
    pub long: bool,
    /// The limit was given in pages (G).
    pub granularity: bool,
    /// Available to software (AVL).
    pub available: bool,
}

impl Segment {
    /// Decodes an 8-byte segment descriptor as a load of `selector` would.
    pub fn from_descriptor(selector: u16, descriptor: u64) -> Self {
        let bit = |n: u32| descriptor >> n & 1 != 0;
        let base = (descriptor >> 16 & 0xFF_FFFF) | (descriptor >> 56 & 0xFF) << 24;
        let raw_limit = (descriptor & 0xFFFF) as u32 | (descriptor >> 32 & 0xF_0000) as u32;
        let granularity = bit(55);
        Self {
            base,
            limit: if granularity {
                raw_limit << 12 | 0xFFF
            } else {
                raw_limit
            },
            selector,
            kind: (descriptor >> 40 & 0xF) as u8,
            present: bit(47),
            dpl: (descriptor >> 45 & 3) as u8,
            big: bit(54),
            code_or_data: bit(44),
            long: bit(53),
            granularity,
            available: bit(52),
        }
    }
}

/// Base and limit of a descriptor table (GDTR, IDTR).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Length in bytes, less one.
    pub limit: u16,
}

/// Segment, control and system registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names are the architecture's")]
pub struct Sregs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
}

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msr {
    /// Register number (ECX).
    pub index: u32,
    /// Value (EDX:EAX).
    pub value: u64,
}

/// The local APIC's 4 KiB register page, first 1 KiB (Intel SDM volume 3, table 11-1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LapicState(pub Box<[u8; 1024]>);

/// Exceptions and interrupts between being raised and being delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VcpuEvents {
    /// Exception vector and error code that is being injected.
    pub exception: Option<(u8, Option<u32>)>,
    /// External interrupt vector that is being injected.
    pub interrupt: Option<u8>,
    /// An NMI is waiting.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// The CPU is in the shadow of `mov ss` or `sti`.
    pub interrupt_shadow: bool,
    /// Vector of a start-up interrupt not yet taken.
    pub sipi_vector: u8,
}

/// Everything the guest can observe of a CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VcpuState {
    /// General registers.
    pub regs: Regs,
    /// System registers.
    pub sregs: Sregs,
    /// Extended control register 0.
    pub xcr0: u64,
    /// x87, SSE and later state in the standard (not compacted) XSAVE format.
    pub xsave: Vec<u8>,
    /// Debug registers 0 to 3, 6 and 7.
    pub debug: [u64; 6],
    /// Model-specific registers.
    pub msrs: Vec<Msr>,
    /// Local APIC.
    pub lapic: LapicState,
    /// Events in flight.
    pub events: VcpuEvents,
    /// Waiting for INIT/SIPI (true) or running or halted (false).
    pub waiting_for_sipi: bool,
    /// Halted until an interrupt.
    pub halted: bool,
}
