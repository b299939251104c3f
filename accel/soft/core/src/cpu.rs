//! The state of one CPU.

use std::ptr::NonNull;
use std::sync::Arc;

use anemone_accel_api::{Bus, DescriptorTable, Segment};
use anemone_soft_apic::{Apic, Apics};
use anemone_soft_mmu::{Context, Features, Memory, Mmu, cr0, cr4, efer};
use anemone_soft_native::{CodeBuffer, Flags, NativeCpu};

use crate::block::Blocks;
use crate::clock::Clock;
use crate::code::CodeRegistry;
use crate::signals::Signals;
use crate::system::cpuid::Cpuid;
use crate::system::msr::Msrs;

/// Numbers of the segment registers in [`Cpu::segments`]: the encoding's (SDM volume 2, 3.1.1.3).
pub(crate) mod seg {
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Numbers of the general registers in [`Cpu::gpr`].
pub(crate) mod reg {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R11: usize = 11;
    /// Always zero: the base or index that an address does not have.
    pub const ZERO: usize = 16;
    /// Offset in CS of the first instruction of the block that runs.
    pub const BLOCK: usize = 17;
}

/// Bits of RFLAGS outside the arithmetic flags (SDM volume 1, 3.4.3).
pub(crate) mod rflags {
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// All that software can change, arithmetic flags among them.
    pub const DEFINED: u64 = 0x3F_7FD5;
}

/// Exception vectors (SDM volume 3, table 6-1).
pub(crate) mod vector {
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const XM: u8 = 19;
}

/// An exception that the current instruction raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exception {
    pub vector: u8,
    /// Error code, for the vectors that have one.
    pub error: Option<u32>,
    /// For #PF: the value for CR2.
    pub address: u64,
}

impl Exception {
    pub const UD: Self = Self::plain(vector::UD);
    pub const NM: Self = Self::plain(vector::NM);
    pub const DE: Self = Self::plain(vector::DE);
    pub const GP0: Self = Self::with(vector::GP, 0);
    /// An access whose address is not canonical: #SS(0) for the stack, else #GP(0). The run loop
    /// decides, which knows the segment.
    pub const NON_CANONICAL: Self = Self {
        address: 1,
        ..Self::GP0
    };

    pub const fn plain(vector: u8) -> Self {
        Self {
            vector,
            error: None,
            address: 0,
        }
    }

    pub const fn with(vector: u8, error: u32) -> Self {
        Self {
            vector,
            error: Some(error),
            address: 0,
        }
    }
}

/// The instruction did not complete. What happened is in [`Cpu::stopped`]; this is empty so that
/// results of hot functions fit into two registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trap(());

/// Result of an instruction or a part of one.
pub(crate) type Exec<T = ()> = Result<T, Trap>;

/// Why an instruction did not complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stopped {
    /// It raised a fault: RIP stays, the exception is delivered.
    Exception(Exception),
    /// It cannot be carried out by this engine: the VM ends with this message and a register dump.
    Internal(String),
}

/// What a CPU does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activity {
    /// Executes instructions.
    Running,
    /// HLT: waits for an interrupt.
    Halted,
    /// Waits for a start-up message after INIT.
    WaitForStartup,
}

/// Size of code and stack, which decides how code is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CodeSize {
    Bits16,
    Bits32,
    /// 64-bit mode: EFER.LMA and CS.L.
    Bits64,
}

/// What the CPUs of a VM share.
pub struct Shared {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// Local APICs.
    pub apics: Arc<Apics>,
    /// Who has decoded which page.
    pub code: Arc<CodeRegistry>,
    /// TSC and paravirtual clock.
    pub clock: Clock,
    /// Attention words, by CPU number.
    pub signals: Vec<Arc<Signals>>,
}

/// What makes a CPU.
pub struct Config {
    /// What it shares with the others.
    pub shared: Arc<Shared>,
    /// Its number, which is its APIC id.
    pub index: u32,
    /// Its local APIC.
    pub apic: Apic,
    /// Its CPUID.
    pub cpuid: Cpuid,
    /// Where its native thunks go, of [`code_memory`].
    pub code: CodeBuffer,
}

/// Why a CPU could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The native part.
    #[error(transparent)]
    Native(#[from] anemone_soft_native::CreateError),
}

/// Bytes of code memory for native thunks.
const THUNK_MEMORY: usize = 1 << 20;

/// Code memory for one CPU. Apart from [`Cpu::new`], so that it can be made before the process
/// enters a jail in which nothing becomes executable any more.
///
/// # Errors
/// Those of `memfd_create`, `ftruncate` and `mmap`.
pub fn code_memory() -> std::io::Result<CodeBuffer> {
    CodeBuffer::new(THUNK_MEMORY)
}

/// One CPU. Belongs to the thread that made it.
pub struct Cpu {
    /// General registers, arithmetic flags, vector and x87 state.
    pub(crate) native: NativeCpu,
    /// Memory.
    pub(crate) mmu: Mmu,
    /// Who makes explicit data accesses now; follows CPL and EFLAGS.AC.
    pub(crate) context: Context,
    /// Offset in CS of the current instruction while one is executed by a handler, otherwise of
    /// the next one.
    pub(crate) rip: u64,
    /// Offset in CS of the instruction after the one that a handler executes. Handlers that jump
    /// change it, cut to the size of code.
    pub(crate) next: u64,
    /// Flags outside the arithmetic ones; bit 1 included. Change it through
    /// [`set_system_flags`](Self::set_system_flags).
    pub(crate) system_flags: u64,
    /// By [`seg`]. Change through [`set_segment`](Self::set_segment).
    pub(crate) segments: [Segment; 6],
    /// Base for addresses, by [`seg`]: in 64-bit mode 0 but for FS and GS. Two more, so that a
    /// masked number needs no check.
    pub(crate) bases: [u64; 8],
    pub(crate) ldtr: Segment,
    pub(crate) tr: Segment,
    pub(crate) gdtr: DescriptorTable,
    pub(crate) idtr: DescriptorTable,
    /// Current privilege level. Change through [`set_cpl`](Self::set_cpl).
    pub(crate) cpl: u8,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    pub(crate) xcr0: u64,
    /// DR0 to DR3, DR6, DR7 at their numbers.
    pub(crate) dr: [u64; 8],
    pub(crate) msrs: Msrs,
    pub(crate) apic: Apic,
    pub(crate) cpuid: Cpuid,
    pub(crate) activity: Activity,
    /// The last instruction was STI or wrote SS: no interrupt before the next one has completed.
    pub(crate) shadow: bool,
    /// STI was executed and the block went on: where it left an interrupt shadow.
    pub(crate) shadow_at: Option<u64>,
    /// NMIs are blocked until IRET.
    pub(crate) nmi_blocked: bool,
    pub(crate) nmi_pending: bool,
    pub(crate) stopped: Option<Stopped>,
    /// Set by a handler after which the block must not go on: changed mode, code or paging.
    pub(crate) leave_block: bool,
    pub(crate) blocks: Blocks,
    pub(crate) shared: Arc<Shared>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) index: u32,
    /// Blocks until the next look at the clock.
    pub(crate) clock_left: u32,
    /// TSC at which the APIC's timer is due, `u64::MAX` if never.
    pub(crate) deadline_tsc: u64,
    /// PAUSE instructions so far.
    pub(crate) pauses: u32,
    /// The machine, during [`run`](Self::run).
    pub(crate) bus: Option<NonNull<dyn Bus>>,
}

impl Cpu {
    /// A CPU in the state after power-up: CPU 0 at the reset vector, the others waiting for a
    /// start-up message.
    ///
    /// # Errors
    /// [`CreateError`].
    pub fn new(config: Config) -> Result<Self, CreateError> {
        let Config {
            shared,
            index,
            apic,
            cpuid,
            code,
        } = config;
        let signals = shared.signals[index as usize].clone();
        let features = Features {
            physical_bits: cpuid.physical_bits(),
            gigabyte_pages: cpuid.gigabyte_pages(),
        };
        let mmu = Mmu::new(
            shared.memory.clone(),
            index,
            features,
            signals.word().clone(),
        );
        let mut cpu = Self {
            native: NativeCpu::with_code(code)?,
            mmu,
            context: Context::Supervisor,
            rip: 0,
            next: 0,
            system_flags: rflags::FIXED,
            segments: [Segment::default(); 6],
            bases: [0; 8],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: DescriptorTable::default(),
            idtr: DescriptorTable::default(),
            cpl: 0,
            cr0: 0,
            cr2: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr: [0; 8],
            msrs: Msrs::default(),
            apic,
            cpuid,
            activity: Activity::Running,
            shadow: false,
            shadow_at: None,
            nmi_blocked: false,
            nmi_pending: false,
            stopped: None,
            leave_block: false,
            blocks: Blocks::default(),
            shared,
            signals,
            index,
            clock_left: 0,
            deadline_tsc: u64::MAX,
            pauses: 0,
            bus: None,
        };
        cpu.reset();
        if index != 0 {
            cpu.activity = Activity::WaitForStartup;
        }
        Ok(cpu)
    }

    /// A general register, all 64 bits.
    #[inline(always)]
    pub(crate) fn gpr(&self, number: usize) -> u64 {
        self.native.state.gpr[number & 31]
    }

    /// Writes all 64 bits of a general register.
    #[inline(always)]
    pub(crate) fn set_gpr(&mut self, number: usize, value: u64) {
        self.native.state.gpr[number & 31] = value;
    }

    /// The arithmetic flags.
    #[inline(always)]
    pub(crate) fn flags(&self) -> Flags {
        self.native.state.flags
    }

    #[inline(always)]
    pub(crate) fn set_flags(&mut self, flags: Flags) {
        self.native.state.flags = flags;
    }

    /// RFLAGS as a whole.
    pub(crate) fn rflags(&self) -> u64 {
        self.system_flags | self.flags().to_rflags()
    }

    /// Sets RFLAGS as a whole; the caller has decided which bits may change.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.set_flags(Flags::from_rflags(value));
        self.set_system_flags(value);
    }

    /// Sets the flags outside the arithmetic ones.
    pub(crate) fn set_system_flags(&mut self, value: u64) {
        let changed = self.system_flags ^ value;
        self.system_flags =
            value & rflags::DEFINED & !anemone_soft_native::ARITHMETIC_RFLAGS | rflags::FIXED;
        // Trace mode and interrupts are looked at between blocks.
        if changed & (rflags::TF | rflags::IF | rflags::VM | rflags::RF) != 0 {
            self.leave_block = true;
        }
        if changed & (rflags::AC | rflags::VM) != 0 {
            self.update_context();
        }
    }

    /// Sets the privilege level.
    pub(crate) fn set_cpl(&mut self, cpl: u8) {
        self.cpl = cpl;
        self.leave_block = true;
        self.update_context();
    }

    /// To be called after a change of CPL, EFLAGS.AC or CR4.SMAP.
    pub(crate) fn update_context(&mut self) {
        self.context = if self.cpl == 3 {
            Context::User
        } else if self.system_flags & rflags::AC != 0 && self.cr4 & cr4::SMAP != 0 {
            Context::SupervisorAc
        } else {
            Context::Supervisor
        };
    }

    /// Long mode is active (64-bit or compatibility mode).
    #[inline(always)]
    pub(crate) fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// 64-bit mode.
    #[inline(always)]
    pub(crate) fn is_64bit(&self) -> bool {
        self.long_mode() && self.segments[seg::CS].long
    }

    pub(crate) fn code_size(&self) -> CodeSize {
        if self.is_64bit() {
            CodeSize::Bits64
        } else if self.segments[seg::CS].big {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }

    /// CR0.PE is set.
    pub(crate) fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Virtual-8086 mode.
    pub(crate) fn virtual_8086(&self) -> bool {
        self.system_flags & rflags::VM != 0
    }

    /// Real-address or virtual-8086 mode: selectors are paragraphs.
    pub(crate) fn real_segments(&self) -> bool {
        !self.protected() || self.virtual_8086()
    }

    /// I/O privilege level.
    pub(crate) fn iopl(&self) -> u8 {
        ((self.system_flags & rflags::IOPL) >> 12) as u8
    }

    /// Sets a segment register with its hidden part. CS decides the mode with EFER.LMA; the
    /// privilege level is set apart from it.
    pub(crate) fn set_segment(&mut self, number: usize, segment: Segment) {
        self.segments[number] = segment;
        self.update_bases();
        self.leave_block = true;
    }

    /// To be called after a change of a segment register or of CR0.PE, EFER.LMA.
    pub(crate) fn update_bases(&mut self) {
        let long = self.is_64bit();
        for (number, base) in self.bases.iter_mut().take(6).enumerate() {
            let flat = long && number < seg::FS;
            *base = if flat { 0 } else { self.segments[number].base };
        }
    }

    /// Mask of addresses (RSP, RIP) by the size of code: 16, 32 or 64 bits.
    pub(crate) fn code_mask(&self) -> u64 {
        match self.code_size() {
            CodeSize::Bits16 => 0xFFFF,
            CodeSize::Bits32 => 0xFFFF_FFFF,
            CodeSize::Bits64 => u64::MAX,
        }
    }

    /// Mask of the stack pointer: 64 bits in 64-bit mode, else by SS.B.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.is_64bit() {
            u64::MAX
        } else if self.segments[seg::SS].big {
            0xFFFF_FFFF
        } else {
            0xFFFF
        }
    }

    /// Raises an exception: `return Err(cpu.raise(Exception::UD))`.
    #[cold]
    pub(crate) fn raise(&mut self, exception: Exception) -> Trap {
        self.stopped = Some(Stopped::Exception(exception));
        Trap(())
    }

    /// #GP with error code 0.
    #[cold]
    pub(crate) fn gp(&mut self) -> Trap {
        self.raise(Exception::GP0)
    }

    /// Turns the trap of a push or pop whose address is not canonical into #SS(0).
    #[cold]
    pub(crate) fn stack_fault(&mut self) -> Trap {
        if let Some(Stopped::Exception(exception)) = &mut self.stopped
            && *exception == Exception::NON_CANONICAL
        {
            *exception = Exception::with(vector::SS, 0);
        }
        Trap(())
    }

    /// #UD.
    #[cold]
    pub(crate) fn ud(&mut self) -> Trap {
        self.raise(Exception::UD)
    }

    /// The engine cannot go on: the VM ends with this message.
    #[cold]
    pub(crate) fn internal(&mut self, what: String) -> Trap {
        self.stopped = Some(Stopped::Internal(what));
        Trap(())
    }

    /// #GP(0) unless at privilege level 0.
    pub(crate) fn require_cpl0(&mut self) -> Exec {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.gp())
        }
    }
}
