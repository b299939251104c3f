//! Runs one unmodified instruction on the host with a whole register state before it and takes the
//! whole state after it.

use std::arch::{asm, global_asm};
use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use anemone_soft_native::{CodeBuffer, XSAVE_SIZE};

/// Everything an unprivileged instruction sees in registers.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct Block {
    pub gpr: [u64; 16],
    pub rflags: u64,
    host_rsp: u64,
    target: u64,
    pad: [u64; 5],
    pub area: Area,
}

#[derive(Clone)]
#[repr(C, align(64))]
pub struct Area(pub [u8; XSAVE_SIZE]);

global_asm!(
    "anemone_test_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "wrgsbase rdi",
    "mov gs:[136], rsp",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 gs:[192]",
    "push qword ptr gs:[128]",
    "popfq",
    "mov rax, gs:[0]",
    "mov rcx, gs:[8]",
    "mov rdx, gs:[16]",
    "mov rbx, gs:[24]",
    "mov rsp, gs:[32]",
    "mov rbp, gs:[40]",
    "mov rsi, gs:[48]",
    "mov rdi, gs:[56]",
    "mov r8, gs:[64]",
    "mov r9, gs:[72]",
    "mov r10, gs:[80]",
    "mov r11, gs:[88]",
    "mov r12, gs:[96]",
    "mov r13, gs:[104]",
    "mov r14, gs:[112]",
    "mov r15, gs:[120]",
    "jmp qword ptr gs:[144]",
    "anemone_test_exit:",
    "mov gs:[0], rax",
    "mov gs:[8], rcx",
    "mov gs:[16], rdx",
    "mov gs:[24], rbx",
    "mov gs:[32], rsp",
    "mov gs:[40], rbp",
    "mov gs:[48], rsi",
    "mov gs:[56], rdi",
    "mov gs:[64], r8",
    "mov gs:[72], r9",
    "mov gs:[80], r10",
    "mov gs:[88], r11",
    "mov gs:[96], r12",
    "mov gs:[104], r13",
    "mov gs:[112], r14",
    "mov gs:[120], r15",
    "mov rsp, gs:[136]",
    "pushfq",
    "pop qword ptr gs:[128]",
    "cld",
    "mov eax, 7",
    "xor edx, edx",
    "xsave64 gs:[192]",
    "fninit",
    "push 0x1f80",
    "ldmxcsr [rsp]",
    "pop rax",
    "vzeroupper",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn anemone_test_enter(block: *mut Block);
    fn anemone_test_exit();
}

thread_local! {
    /// Code range of this thread's instruction and the signal that it raised.
    static RANGE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    static SIGNAL: Cell<i32> = const { Cell::new(0) };
    /// Instruction pointer and address that the signal came with.
    static WHERE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
    /// Where a breakpoint leads to that only changes the mode.
    static ENTRY: Cell<Option<Entry>> = const { Cell::new(None) };
    /// CS and SS of this program.
    static SELECTORS: Cell<i64> = const { Cell::new(0) };
}

/// The crate's own handler.
static BEFORE: AtomicUsize = AtomicUsize::new(0);

/// The parts of `REG_CSGSFS` that are CS and SS.
const CS_SS: i64 = 0xFFFF_0000_0000_FFFF_u64 as i64;

/// Code in segments of 16 or 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Offset in CS.
    pub rip: u64,
    pub cs: u16,
    pub ss: u16,
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid context.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as usize;
    let selectors = registers[libc::REG_CSGSFS as usize] & CS_SS;
    let (start, end) = RANGE.get();
    // Only tested code has other segments.
    let elsewhere = SELECTORS.get() != 0 && selectors != SELECTORS.get();
    if elsewhere || (start..end).contains(&rip) {
        let (target, selectors) = match ENTRY.take() {
            Some(Entry { rip, cs, ss }) => {
                SELECTORS.set(selectors);
                (rip as i64, i64::from(cs) | i64::from(ss) << 48)
            }
            None => {
                SIGNAL.set(signal);
                // SAFETY: as above; these signals have an address.
                WHERE.set((rip, unsafe { (*info).si_addr() } as usize));
                let own = match SELECTORS.replace(0) {
                    0 => selectors,
                    own => own,
                };
                (anemone_test_exit as *const () as i64, own)
            }
        };
        registers[libc::REG_RIP as usize] = target;
        let others = registers[libc::REG_CSGSFS as usize] & !CS_SS;
        registers[libc::REG_CSGSFS as usize] = others | selectors;
    } else if signal == libc::SIGFPE {
        // SAFETY: the action before was the crate's, which takes these arguments.
        unsafe {
            let before = BEFORE.load(Ordering::Relaxed);
            let before: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(before);
            before(signal, info, context);
        }
    } else {
        // SAFETY: ends the process where the harness itself is wrong.
        unsafe { libc::abort() };
    }
}

/// How code in a caller's place ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    pub signal: i32,
    /// After a breakpoint, of the instruction that faulted.
    pub rip: usize,
    /// For SIGSEGV by a page fault: the address.
    pub address: usize,
}

/// One thread's place to run instructions in.
pub struct Native {
    code: CodeBuffer,
    stack: Vec<u8>,
}

impl Native {
    /// To be called after a `NativeCpu` exists, whose handler this one passes on to.
    pub fn new() -> Result<Self, String> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: all-zero is a valid action; the handler has the right signature.
            unsafe {
                let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                let mut before = MaybeUninit::<libc::sigaction>::zeroed();
                assert_eq!(
                    libc::sigaction(libc::SIGFPE, &action, before.as_mut_ptr()),
                    0
                );
                BEFORE.store(before.assume_init().sa_sigaction, Ordering::Relaxed);
                for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGTRAP] {
                    assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
                }
            }
        });
        let mut stack = vec![0u8; 1 << 16];
        let alternate = libc::stack_t {
            ss_sp: stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: stack.len(),
        };
        // SAFETY: the stack lives as long as this value, and Drop takes it away.
        let set = unsafe { libc::sigaltstack(&alternate, std::ptr::null_mut()) };
        assert_eq!(set, 0);
        let code = CodeBuffer::new(1 << 18).map_err(|error| error.to_string())?;
        Ok(Self { code, stack })
    }

    /// Runs `instruction`; `Err` has the signal. The state after a signal is that at the signal.
    pub fn run(&mut self, instruction: &[u8], block: &mut Block) -> Result<(), i32> {
        let mut stub = instruction.to_vec();
        stub.extend([0xff, 0x25, 0, 0, 0, 0]);
        stub.extend((anemone_test_exit as *const () as u64).to_le_bytes());
        let offset = match self.code.append(&stub) {
            Some(offset) => offset,
            None => {
                self.code.clear();
                self.code.append(&stub).unwrap_or(0)
            }
        };
        let start = self.code.address(offset) as usize;
        block.target = start as u64;
        RANGE.set((start, start + stub.len()));
        SIGNAL.set(0);
        // SAFETY: the instruction is an unprivileged one without control flow whose memory operand,
        // if any, is the caller's buffer; all registers are restored.
        unsafe {
            asm!("call {}", sym anemone_test_enter, in("rdi") block, clobber_abi("C"));
        }
        RANGE.set((0, 0));
        match SIGNAL.get() {
            0 => Ok(()),
            signal => Err(signal),
        }
    }

    /// Runs code of the caller's that lies at `start` in `range`, which has breakpoints wherever it
    /// does not have code that comes to an end there. With an `entry`, `start` is a breakpoint and
    /// the entry is what is run.
    #[allow(dead_code)] // Only some of the tests that share this file have code in its place.
    pub fn run_in_place(
        &mut self,
        start: usize,
        range: std::ops::Range<usize>,
        entry: Option<Entry>,
        block: &mut Block,
    ) -> Stop {
        ENTRY.set(entry);
        block.target = start as u64;
        RANGE.set((range.start, range.end));
        // SAFETY: the caller's code is unprivileged and its memory operands are the caller's; all
        // registers are restored.
        unsafe {
            asm!("call {}", sym anemone_test_enter, in("rdi") block, clobber_abi("C"));
        }
        RANGE.set((0, 0));
        let (rip, address) = WHERE.get();
        Stop {
            signal: SIGNAL.get(),
            rip,
            address,
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        let none = libc::stack_t {
            ss_sp: std::ptr::null_mut(),
            ss_flags: libc::SS_DISABLE,
            ss_size: self.stack.len(),
        };
        // SAFETY: no handler runs now.
        unsafe { libc::sigaltstack(&none, std::ptr::null_mut()) };
    }
}

impl Block {
    pub fn new() -> Self {
        Self {
            gpr: [0; 16],
            rflags: 2,
            host_rsp: 0,
            target: 0,
            pad: [0; 5],
            area: Area([0; XSAVE_SIZE]),
        }
    }
}
