//! The guest's user-level registers and the cache of thunks that work on them.

use std::arch::asm;
use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Encoder, Instruction};

use crate::code::{CodeBuffer, serialize};
use crate::fault::{self, WINDOW, Window};
use crate::form::{Form, X87};
use crate::state::{
    FCW, FDP, FIP, FOP, FSW, MXCSR, MXCSR_MASK, SCRATCH_SIZE, ST, UserState, XMM, XSAVE_SIZE,
    XSTATE_BV, XsaveArea, YMM_HIGH,
};
use crate::thunk::Plan;
use crate::{Flags, MXCSR_RESET, Unsupported};

/// Why a [`NativeCpu`] cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// XSAVE is what keeps x87 state; every x86-64 CPU since 2011 has it.
    #[error("the host's CPU or kernel does not offer XSAVE")]
    NoXsave,
    /// Guest x87 state lives in the registers of its thread, so there is one per thread.
    #[error("this thread already runs a guest CPU")]
    Occupied,
    /// No code memory, or no signal handler.
    #[error("cannot set up memory for generated code: {0}")]
    Io(#[from] io::Error),
}

/// Why an instruction did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// #MF: an unmasked x87 exception was pending. Nothing has changed.
    #[error("#MF: an x87 exception is pending")]
    Math,
    /// #XM: an unmasked SIMD exception. MXCSR shows which; no other register and no memory changed.
    #[error("#XM: an unmasked SIMD floating-point exception")]
    Simd,
    /// The thunk's code is gone since the cache was flushed: look it up again.
    #[error("the thunk was flushed")]
    Stale,
}

/// How an instruction completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// False when an x87 store met an unmasked exception and left its destination as it was
    /// (SDM volume 1, section 8.5): a caller that copies results back must not. Always true otherwise.
    pub stored: bool,
}

/// Where the guest's instruction is, for the x87 environment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Location {
    /// RIP of the instruction.
    pub rip: u64,
    /// Effective address of the memory operand, if there is one.
    pub data: u64,
    /// The last x87 opcode: [`Location::opcode_of`].
    pub opcode: u16,
}

impl Location {
    /// The x87 opcode in the bytes of an instruction as FOP holds it (SDM volume 1, section 8.1.9):
    /// the low three bits of the first byte, then ModRM. It depends on how memory is addressed, which
    /// a thunk does not know. 0 if this is no x87 instruction.
    pub fn opcode_of(bytes: &[u8]) -> u16 {
        bytes
            .iter()
            .position(|byte| (0xd8..=0xdf).contains(byte))
            .map_or(0, |start| {
                let modrm = bytes.get(start + 1).copied().unwrap_or(0);
                u16::from(bytes[start] & 7) << 8 | u16::from(modrm)
            })
    }
}

/// A native function for one instruction. A copy can be kept with the decoded instruction; it is
/// good until [`NativeCpu::flush`], after which running it answers [`Fault::Stale`] until
/// [`NativeCpu::renew`].
#[derive(Clone, Debug)]
pub struct Thunk {
    entry: Cell<*const u8>,
    generation: Cell<u64>,
    /// [`needs`] bits.
    needs: u8,
    guest: u16,
    fault: u16,
    form: Form,
}

impl Thunk {
    /// What the instruction needs and touches.
    pub fn form(&self) -> &Form {
        &self.form
    }
}

/// What must be so for a thunk to be entered without further ado.
mod needs {
    use crate::form::{Form, X87};

    /// The CPU's MXCSR is the guest's, with all exceptions masked.
    pub const SIMD: u8 = 1 << 0;
    /// The CPU's x87 registers are the guest's, and no exception can be raised.
    pub const X87: u8 = 1 << 1;
    /// Something is to be done afterwards. Never met.
    pub const MORE: u8 = 1 << 2;

    pub fn of(form: &Form) -> u8 {
        let x87 = match form.x87 {
            X87::No => 0,
            X87::Plain => X87,
            _ => X87 | MORE,
        };
        x87 | if form.simd_float { SIMD } else { 0 }
    }
}

/// Bits of FCW that can be changed, and the one that is always set.
const FCW_DEFINED: u16 = 0x1f3f;
const FCW_FIXED: u16 = 0x40;

/// Generations are unique in the process, so a thunk of another cache never passes for an own one.
static GENERATION: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static OCCUPIED: Cell<bool> = const { Cell::new(false) };
}

/// Counts for statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheUsage {
    /// Thunks in the cache.
    pub thunks: usize,
    /// Bytes of code in use.
    pub used: usize,
    /// Bytes of code memory.
    pub size: usize,
    /// Full flushes so far.
    pub flushes: u64,
}

/// User-level state of one guest CPU, on the thread that runs it.
///
/// Vector state is in memory and each thunk moves the registers that its instruction uses; x87 state
/// moves into the host's registers at the first x87 or MMX instruction and stays there, since
/// neither Rust nor libc's common paths use the x87, until [`NativeCpu::sync_x87`] or the drop.
/// Code that does use it (`long double` in C) must not run in between.
pub struct NativeCpu {
    /// General registers and flags.
    pub state: Box<UserState>,
    code: CodeBuffer,
    cache: HashMap<[u8; 16], Thunk>,
    encoder: Encoder,
    generation: u64,
    flushes: u64,
    /// The x87 registers are the guest's.
    resident: bool,
    /// [`needs`] that are met.
    ready: u8,
    fop: u16,
    fip: u64,
    fdp: u64,
    /// The x87 registers belong to a thread.
    not_send: PhantomData<*const ()>,
}

impl NativeCpu {
    /// A CPU in the state after INIT (registers 0, x87 as after FNINIT, MXCSR 1F80H) with `code_size`
    /// bytes for thunks, which take 64 to 200 bytes each.
    ///
    /// # Errors
    /// No XSAVE, a second CPU on this thread, no memory for code.
    pub fn new(code_size: usize) -> Result<Self, CreateError> {
        Self::with_code(CodeBuffer::new(code_size)?)
    }

    /// The same with code memory that exists, for a thread whose jail lets it make none.
    ///
    /// # Errors
    /// No XSAVE, a second CPU on this thread.
    pub fn with_code(code: CodeBuffer) -> Result<Self, CreateError> {
        if !is_x86_feature_detected!("xsave") {
            return Err(CreateError::NoXsave);
        }
        fault::install()?;
        if OCCUPIED.replace(true) {
            return Err(CreateError::Occupied);
        }
        Ok(Self {
            state: UserState::new(),
            code,
            cache: HashMap::new(),
            encoder: Encoder::new(64),
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            flushes: 0,
            resident: false,
            ready: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            not_send: PhantomData,
        })
    }

    /// Finds or builds the thunk of an instruction decoded in any mode. How the memory operand is
    /// addressed does not matter: the caller resolves it.
    ///
    /// When the code memory is full everything is flushed first.
    ///
    /// # Errors
    /// Why the form has none.
    pub fn thunk(&mut self, instruction: &Instruction) -> Result<Thunk, Unsupported> {
        let form = Form::of(instruction)?;
        let plan = Plan::new(instruction, form)?;
        let key = plan.key(&mut self.encoder)?;
        if let Some(thunk) = self.cache.get(&key) {
            return Ok(thunk.clone());
        }
        let code = plan.emit(&mut self.encoder)?;
        let offset = match self.code.append(&code.bytes) {
            Some(offset) => offset,
            None => {
                self.flush();
                self.code
                    .append(&code.bytes)
                    .ok_or(Unsupported::OtherClass)?
            }
        };
        let thunk = Thunk {
            entry: Cell::new(self.code.address(offset)),
            generation: Cell::new(self.generation),
            needs: needs::of(&form),
            guest: code.guest as u16,
            fault: code.fault as u16,
            form,
        };
        self.cache.insert(key, thunk.clone());
        Ok(thunk)
    }

    /// Builds the code of a stale thunk of `instruction` again.
    ///
    /// # Errors
    /// As [`NativeCpu::thunk`]; not if there was a thunk before and `instruction` is the same.
    pub fn renew(&mut self, thunk: &Thunk, instruction: &Instruction) -> Result<(), Unsupported> {
        let new = self.thunk(instruction)?;
        thunk.entry.swap(&new.entry);
        thunk.generation.swap(&new.generation);
        Ok(())
    }

    /// Drops all thunks.
    pub fn flush(&mut self) {
        self.code.clear();
        self.cache.clear();
        self.generation = GENERATION.fetch_add(1, Ordering::Relaxed);
        self.flushes += 1;
        serialize();
    }

    /// How full the cache is.
    pub fn usage(&self) -> CacheUsage {
        let (used, size) = self.code.usage();
        CacheUsage {
            thunks: self.cache.len(),
            used,
            size,
            flushes: self.flushes,
        }
    }

    /// Runs an instruction on a memory operand in place, which is the way for an operand that lies in
    /// one page of guest RAM. Its atomicity and ordering are the host's.
    ///
    /// # Errors
    /// [`Fault`]; the state is as before the instruction.
    ///
    /// # Safety
    /// If [`Form::memory`] names an operand, `memory` must be valid for its size and accesses and
    /// aligned as it says. Otherwise `memory` is not used.
    #[inline]
    pub unsafe fn run(
        &mut self,
        thunk: &Thunk,
        memory: *mut u8,
        at: Location,
    ) -> Result<Completed, Fault> {
        // With all exceptions masked, as nearly always, nothing faults.
        // SAFETY: as promised by the caller.
        if unsafe { self.run_at_once(thunk, memory) } {
            return Ok(Completed { stored: true });
        }
        if thunk.generation.get() != self.generation {
            return Err(Fault::Stale);
        }
        // SAFETY: as promised by the caller.
        unsafe { self.run_special(thunk, memory, at) }
    }

    /// As [`run`](Self::run) for the thunks of vector and general-purpose instructions when nothing
    /// stands in the way. False, and nothing done, if something does: then `run` does it, or tells why
    /// not.
    ///
    /// # Safety
    /// As [`NativeCpu::run`].
    #[inline(always)]
    pub unsafe fn run_at_once(&mut self, thunk: &Thunk, memory: *mut u8) -> bool {
        let ready = thunk.generation.get() == self.generation && thunk.needs & !self.ready == 0;
        if ready {
            // SAFETY: the generation shows that the entry is code of this cache; memory is as promised.
            unsafe { self.call(thunk, memory) };
        }
        ready
    }

    /// Runs an instruction on [`NativeCpu::scratch`] in place of its memory operand: the caller puts
    /// the bytes there if [`MemoryOperand::read`](crate::MemoryOperand::read), and afterwards takes
    /// them from there if `write` and [`Completed::stored`]. A store may be told to fault only before
    /// the run, so the caller checks the guest's right to write first.
    ///
    /// # Errors
    /// As [`NativeCpu::run`].
    #[inline]
    pub fn run_buffered(&mut self, thunk: &Thunk, at: Location) -> Result<Completed, Fault> {
        let scratch = self.state.scratch.0.as_mut_ptr();
        // SAFETY: the scratch memory is 128 bytes at a multiple of 64, more than any operand needs,
        // and generated code is the only one to touch it meanwhile.
        unsafe { self.run(thunk, scratch, at) }
    }

    /// The scratch operand.
    #[inline]
    pub fn scratch(&mut self) -> &mut [u8; SCRATCH_SIZE] {
        &mut self.state.scratch.0
    }

    /// # Safety
    /// The thunk is of the current generation; memory as in [`NativeCpu::run`].
    #[inline(always)]
    unsafe fn call(&mut self, thunk: &Thunk, memory: *mut u8) -> u32 {
        let state: *mut UserState = &mut *self.state;
        // SAFETY: entry is the first byte of a function of this signature, which keeps to the
        // System V calling convention and touches only the state block and the operand.
        unsafe {
            let function: extern "sysv64" fn(*mut UserState, *mut u8) -> u32 =
                std::mem::transmute(thunk.entry.get());
            function(state, memory)
        }
    }

    /// What an instruction needs beyond its thunk: registers of the CPU loaded with the guest's
    /// state, exceptions caught, the x87 environment.
    ///
    /// # Safety
    /// As [`NativeCpu::run`], with the generation checked.
    #[inline(never)]
    unsafe fn run_special(
        &mut self,
        thunk: &Thunk,
        memory: *mut u8,
        at: Location,
    ) -> Result<Completed, Fault> {
        if thunk.form.uses_x87() {
            self.load_x87();
        }
        if thunk.form.simd_float {
            self.load_mxcsr();
        }
        if thunk.needs & !self.ready & !needs::MORE != 0 {
            // SAFETY: as promised by the caller.
            return unsafe { self.run_guarded(thunk, memory, at) };
        }
        if thunk.form.x87 == X87::Store {
            // SAFETY: as promised by the caller.
            unsafe { self.run_store(thunk, memory) };
        } else {
            // SAFETY: as promised by the caller.
            unsafe { self.call(thunk, memory) };
        }
        // SAFETY: as promised by the caller.
        unsafe { self.after(thunk, memory, at) };
        Ok(Completed { stored: true })
    }

    /// Runs a thunk that may raise an exception.
    ///
    /// # Safety
    /// As [`NativeCpu::run_special`], with the CPU's registers loaded.
    unsafe fn run_guarded(
        &mut self,
        thunk: &Thunk,
        memory: *mut u8,
        at: Location,
    ) -> Result<Completed, Fault> {
        if thunk.form.x87 == X87::Store {
            // FNSTENV and FNSAVE do not look at pending exceptions.
            // SAFETY: as promised by the caller.
            unsafe {
                self.run_store(thunk, memory);
                self.after(thunk, memory, at);
            }
            return Ok(Completed { stored: true });
        }
        let entry = thunk.entry.get() as usize;
        WINDOW.set(Window {
            start: entry + usize::from(thunk.guest),
            end: entry + usize::from(thunk.fault),
            exit: entry + usize::from(thunk.fault),
        });
        let unmasked = thunk.form.simd_float && self.ready & needs::SIMD == 0;
        if unmasked {
            write_mxcsr(self.state.mxcsr);
        }
        // SAFETY: as promised by the caller.
        let faulted = unsafe { self.call(thunk, memory) } != 0;
        if unmasked {
            self.state.mxcsr = read_mxcsr();
            write_mxcsr(MXCSR_RESET);
        }
        WINDOW.set(Window {
            start: 0,
            end: 0,
            exit: 0,
        });
        if faulted {
            let pending = thunk.form.uses_x87() && x87_status() & 0x80 != 0;
            return Err(if pending { Fault::Math } else { Fault::Simd });
        }
        let is_store = thunk.form.memory.is_some_and(|operand| operand.write);
        let stored = !(thunk.form.x87 == X87::Recording && is_store && store_suppressed());
        // SAFETY: as promised by the caller.
        unsafe { self.after(thunk, memory, at) };
        Ok(Completed { stored })
    }

    /// FNSTENV and FNSAVE store the address of the thunk, which other guest CPUs must not see even
    /// for a moment: they work on a copy.
    ///
    /// # Safety
    /// As [`NativeCpu::run_special`].
    unsafe fn run_store(&mut self, thunk: &Thunk, memory: *mut u8) {
        let size = operand_size(thunk);
        let mut image = [0; SCRATCH_SIZE];
        // SAFETY: the copy has room for every operand; the thunk is as promised.
        unsafe { self.call(thunk, image.as_mut_ptr()) };
        self.store_pointers(&mut image[..size]);
        // SAFETY: the caller vouches for the operand, of which this is the size.
        unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), memory, size) };
    }

    /// Keeps the x87 environment that the CPU does not keep for us.
    ///
    /// # Safety
    /// As [`NativeCpu::run_special`].
    #[inline(always)]
    unsafe fn after(&mut self, thunk: &Thunk, memory: *mut u8, at: Location) {
        match thunk.form.x87 {
            X87::No | X87::Plain => {}
            X87::Recording => {
                self.fip = at.rip;
                self.fop = at.opcode & 0x7ff;
                if thunk.form.memory.is_some() {
                    self.fdp = at.data;
                }
            }
            X87::Control => self.note_x87_masks(),
            X87::Init => self.initialise_pointers(),
            // FNSAVE initialises the x87 afterwards.
            X87::Store if operand_size(thunk) > 28 => self.initialise_pointers(),
            X87::Store => self.note_x87_masks(),
            X87::Load => {
                let size = operand_size(thunk);
                let mut image = [0; SCRATCH_SIZE];
                // SAFETY: the caller vouches for the operand, of which this is the size.
                unsafe { std::ptr::copy_nonoverlapping(memory, image.as_mut_ptr(), size) };
                self.load_pointers(&image[..size]);
                self.note_x87_masks();
            }
        }
    }

    fn initialise_pointers(&mut self) {
        (self.fip, self.fdp, self.fop) = (0, 0, 0);
        self.note_x87_masks();
    }

    /// To be called when FCW or a pending exception may have changed other than by arithmetic.
    fn note_x87_masks(&mut self) {
        if x87_control() & 0x3f == 0x3f && x87_status() & 0x80 == 0 {
            self.ready |= needs::X87;
        } else {
            self.ready &= !needs::X87;
        }
    }

    /// Puts the guest's MXCSR into the CPU's, if no exception is unmasked.
    fn load_mxcsr(&mut self) {
        if self.ready & needs::SIMD == 0 && self.state.mxcsr & MXCSR_RESET == MXCSR_RESET {
            write_mxcsr(self.state.mxcsr);
            self.ready |= needs::SIMD;
        }
    }

    /// Moves the guest's MXCSR back to memory and gives the host its own: before Rust code that
    /// computes in floating point, which would round as the guest does and leave its flags to the guest.
    /// Costs nothing if no such instruction ran since.
    pub fn sync_mxcsr(&mut self) {
        if self.ready & needs::SIMD != 0 {
            self.state.mxcsr = read_mxcsr();
            write_mxcsr(MXCSR_RESET);
            self.ready &= !needs::SIMD;
        }
    }

    /// [`sync_x87`](Self::sync_x87) and [`sync_mxcsr`](Self::sync_mxcsr): before this thread does
    /// something else.
    pub fn sync(&mut self) {
        self.sync_x87();
        self.sync_mxcsr();
    }

    /// Puts FIP, FDP and FOP into an environment image (SDM volume 1, figures 8-9 and 8-11), possibly
    /// followed by registers. The forms with a 16-bit operand size have 14 and 94 bytes, the others
    /// 28 and 108.
    fn store_pointers(&self, image: &mut [u8]) {
        if matches!(image.len(), 14 | 94) {
            for (offset, value) in [(6, self.fip), (8, 0), (10, self.fdp), (12, 0)] {
                image[offset..offset + 2].copy_from_slice(&(value as u16).to_le_bytes());
            }
        } else {
            let opcode = u64::from(self.fop) << 16;
            for (offset, value) in [(12, self.fip), (16, opcode), (20, self.fdp)] {
                image[offset..offset + 4].copy_from_slice(&(value as u32).to_le_bytes());
            }
            image[24..26].fill(0);
        }
    }

    /// Takes them from such an image.
    fn load_pointers(&mut self, image: &[u8]) {
        let word = |at: usize| u64::from(u16::from_le_bytes([image[at], image[at + 1]]));
        if matches!(image.len(), 14 | 94) {
            (self.fip, self.fdp, self.fop) = (word(6), word(10), 0);
        } else {
            self.fip = word(12) | word(14) << 16;
            self.fdp = word(20) | word(22) << 16;
            self.fop = word(18) as u16 & 0x7ff;
        }
    }

    /// Puts guest x87 state into the host's registers.
    fn load_x87(&mut self) {
        if self.resident {
            return;
        }
        // SAFETY: the area is aligned, in standard format with a zero XCOMP_BV and reserved header,
        // and only the x87 component is asked for, for which no content is invalid.
        unsafe {
            asm!("xrstor64 [{}]", in(reg) &raw const self.state.area, in("eax") 1, in("edx") 0,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nostack));
        }
        self.resident = true;
        self.note_x87_masks();
    }

    /// Moves guest x87 state back to memory and gives the host an initialised x87: before a context
    /// of another kind runs on this thread, and before the state is read or written as a whole.
    /// Costs nothing if no x87 instruction ran since.
    pub fn sync_x87(&mut self) {
        if !self.resident {
            return;
        }
        // SAFETY: the area is aligned and large enough; only the x87 component is written.
        unsafe {
            asm!("xsave64 [{}]", "fninit", in(reg) &raw mut self.state.area, in("eax") 1, in("edx") 0,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nostack));
        }
        let area = &mut self.state.area;
        // The CPU has cleared the bit of x87 state in its initial configuration.
        area.put(XSTATE_BV, 7_u64.to_le_bytes());
        area.put(FOP, self.fop.to_le_bytes());
        area.put(FIP, self.fip.to_le_bytes());
        area.put(FDP, self.fdp.to_le_bytes());
        self.resident = false;
        self.ready &= !needs::X87;
    }

    /// The x87, SSE and AVX state in the standard XSAVE format, XSTATE_BV = 7: the first 512 bytes are
    /// the FXSAVE64 image.
    pub fn xsave_image(&mut self) -> &[u8; XSAVE_SIZE] {
        self.sync_x87();
        let mxcsr = self.mxcsr();
        let UserState { area, vectors, .. } = &mut *self.state;
        area.put(MXCSR, mxcsr.to_le_bytes());
        for (number, vector) in vectors.0.iter().enumerate() {
            let [low, high] = vector.map(u128::to_le_bytes);
            area.put(XMM + 16 * number, low);
            area.put(YMM_HIGH + 16 * number, high);
        }
        &area.0
    }

    /// Replaces the x87, SSE and AVX state by an image in the standard XSAVE format. The header is
    /// not looked at: the caller puts the initial state where XSTATE_BV says so.
    ///
    /// # Errors
    /// MXCSR has reserved bits set (#GP); nothing has changed.
    pub fn load_xsave_image(&mut self, image: &[u8; XSAVE_SIZE]) -> Result<(), ReservedMxcsr> {
        let image = XsaveArea(*image);
        self.set_mxcsr(u32::from_le_bytes(image.get(MXCSR)))?;
        self.sync_x87();
        // The header and what the CPU does not define come from here, never from the image.
        let mut area = XsaveArea::new();
        area.0[FCW..MXCSR].copy_from_slice(&image.0[FCW..MXCSR]);
        area.0[ST..XMM].copy_from_slice(&image.0[ST..XMM]);
        self.fop = u16::from_le_bytes(image.get(FOP)) & 0x7ff;
        self.fip = u64::from_le_bytes(image.get(FIP));
        self.fdp = u64::from_le_bytes(image.get(FDP));
        area.put(FOP, self.fop.to_le_bytes());
        let control = u16::from_le_bytes(area.get(FCW)) & FCW_DEFINED | FCW_FIXED;
        area.put(FCW, control.to_le_bytes());
        // ES, and B as its copy, follow from the others (SDM volume 1, 8.1.3).
        let status = u16::from_le_bytes(area.get(FSW)) & !0x8080;
        let summary = if status & !control & 0x3f != 0 {
            0x8080
        } else {
            0
        };
        area.put(FSW, (status | summary).to_le_bytes());
        self.state.area = area;
        for (number, vector) in self.state.vectors.0.iter_mut().enumerate() {
            let halves = [XMM + 16 * number, YMM_HIGH + 16 * number];
            *vector = halves.map(|at| u128::from_le_bytes(image.get(at)));
        }
        Ok(())
    }

    /// A YMM register as two halves, low first; `register` is taken modulo 16.
    #[inline(always)]
    pub fn vector(&mut self, register: usize) -> &mut [u128; 2] {
        &mut self.state.vectors.0[register & 15]
    }

    /// The low half of a YMM register.
    pub fn xmm(&self, register: usize) -> [u8; 16] {
        self.state.vectors.0[register & 15][0].to_le_bytes()
    }

    /// Writes the low half only, as legacy SSE does.
    pub fn set_xmm(&mut self, register: usize, value: [u8; 16]) {
        self.vector(register)[0] = u128::from_le_bytes(value);
    }

    /// A YMM register.
    pub fn ymm(&self, register: usize) -> [u8; 32] {
        let mut bytes = [0; 32];
        let halves = self.state.vectors.0[register & 15].map(u128::to_le_bytes);
        bytes.copy_from_slice(halves.as_flattened());
        bytes
    }

    /// Writes a whole YMM register, as VEX instructions do (with a zero upper half for VEX.128).
    pub fn set_ymm(&mut self, register: usize, value: [u8; 32]) {
        let (mut low, mut high) = ([0; 16], [0; 16]);
        low.copy_from_slice(&value[..16]);
        high.copy_from_slice(&value[16..]);
        *self.vector(register) = [low, high].map(u128::from_le_bytes);
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        if self.ready & needs::SIMD != 0 {
            read_mxcsr()
        } else {
            self.state.mxcsr
        }
    }

    /// Loads MXCSR, as LDMXCSR does.
    ///
    /// # Errors
    /// Reserved bits are set (#GP).
    pub fn set_mxcsr(&mut self, value: u32) -> Result<(), ReservedMxcsr> {
        if value & !MXCSR_MASK != 0 {
            return Err(ReservedMxcsr(value));
        }
        self.sync_mxcsr();
        self.state.mxcsr = value;
        Ok(())
    }

    /// FCW and FSW.
    pub fn x87_control_status(&mut self) -> (u16, u16) {
        self.sync_x87();
        (
            u16::from_le_bytes(self.state.area.get(FCW)),
            u16::from_le_bytes(self.state.area.get(FSW)),
        )
    }

    /// The arithmetic flags as bits of RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.state.flags.to_rflags()
    }

    /// Takes the arithmetic flags from an RFLAGS image.
    pub fn set_rflags(&mut self, rflags: u64) {
        self.state.flags = Flags::from_rflags(rflags);
    }
}

impl Drop for NativeCpu {
    fn drop(&mut self) {
        self.sync();
        OCCUPIED.set(false);
    }
}

/// An MXCSR value with reserved bits set, which raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MXCSR {0:#x} has reserved bits set; bits 0 to 15 are allowed")]
pub struct ReservedMxcsr(pub u32);

/// Bytes of the memory operand.
fn operand_size(thunk: &Thunk) -> usize {
    thunk.form.memory.map_or(0, |operand| operand.size.into())
}

/// The CPU's MXCSR.
fn read_mxcsr() -> u32 {
    let mut value = 0;
    // SAFETY: writes MXCSR to a local variable.
    unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack, preserves_flags)) };
    value
}

/// Sets it. While it is not [`MXCSR_RESET`], nothing but guest instructions computes in floating
/// point.
fn write_mxcsr(value: u32) {
    // SAFETY: the value has no reserved bit set. Rust code that computed in floating point under it
    // would round otherwise; see `NativeCpu::sync_mxcsr`.
    unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack, preserves_flags)) };
}

/// FSW of the guest, which is resident.
fn x87_status() -> u16 {
    let status: u16;
    // SAFETY: reads the status word; it never waits.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status
}

/// Whether the x87 store that just ran met an unmasked exception other than #P, and so left its
/// destination alone. No exception was pending before, or it would have raised #MF.
fn store_suppressed() -> bool {
    let status = x87_status();
    if status & 0x80 == 0 {
        return false;
    }
    status & !x87_control() & 0x19 != 0
}

/// FCW of the guest, which is resident.
fn x87_control() -> u16 {
    let mut control = 0u16;
    // SAFETY: writes the control word to a local variable; it never waits.
    unsafe { asm!("fnstcw [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
    control
}
