//! General-purpose and string instructions against the host's CPU.
//!
//! Guest and host have the same code and the same two pages of data at the same linear addresses, so
//! registers, stack pointers, return addresses and RIP-relative operands need no translation. The
//! host's code is surrounded by breakpoints, so wherever a jump goes to, it ends there. Each
//! instruction is executed in the guest by its handler and as a block, where most have a fast operation.
//!
//! 16-bit and 32-bit code runs in the host's compatibility mode, in segments of an LDT.
//!
//! Longer runs: ANEMONE_CASES is the number of cases, ANEMONE_SEED the seed.

use std::arch::asm;
use std::sync::{Mutex, PoisonError};

use anemone_soft_native::{ARITHMETIC_RFLAGS, Flags};
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic as M, OpCodeOperandKind as K,
    OpKind, Register,
};

use super::harness::generate::Random;
use super::harness::native::{Block, Entry, Native, Stop};
use super::harness::{CODE, CODE_END, DATA, Guest, PAGE, Second, TABLE, arithmetic};
use super::{handler, integer, string};
use crate::block::Step;
use crate::cpu::{Exception, Stopped, reg, rflags, seg, vector};

/// Bytes of data.
const SIZE: usize = 2 * PAGE;

const OF: u64 = 1 << 11;

/// First and last place of an instruction, so far from the edges that a short jump stays within.
const FIRST: u64 = CODE + 0x100;
const LAST: u64 = CODE + 0xFE00;

/// Last offset in segments of 16-bit and 32-bit code.
const LIMIT: u32 = 0xFFFF;

/// The size of code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Bits16,
    Bits32,
    Bits64,
}

impl Mode {
    fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }

    /// Base of a segment. All of code and data is within 64 KiB of it.
    fn base(self, segment: usize) -> u64 {
        if self == Self::Bits64 {
            return 0;
        }
        match segment {
            seg::CS => CODE,
            seg::ES => DATA - 0x8000,
            seg::SS => DATA - 0x7000,
            _ => DATA - 0x9000,
        }
    }

    /// The part of a general register that there is.
    fn mask(self) -> u64 {
        match self {
            Self::Bits64 => u64::MAX,
            _ => 0xFFFF_FFFF,
        }
    }

    fn registers(self) -> usize {
        match self {
            Self::Bits64 => 16,
            _ => 8,
        }
    }

    fn has(self, code: Code) -> bool {
        let op_code = code.op_code();
        op_code.is_instruction()
            && match self {
                Self::Bits16 => op_code.mode16(),
                Self::Bits32 => op_code.mode32(),
                Self::Bits64 => op_code.mode64(),
            }
    }
}

/// The fixed addresses are there once.
static ADDRESSES: Mutex<()> = Mutex::new(());

/// How the guest executes an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Handler,
    Block,
}

/// Code and data at the guest's addresses.
struct Host {
    native: Native,
    mode: Mode,
    code: *mut u8,
    data: *mut u8,
    /// The data again, always writable.
    window: *mut u8,
}

fn map(at: u64, length: usize, protection: i32, flags: i32, file: i32) -> *mut u8 {
    let fixed = if at == 0 {
        0
    } else {
        libc::MAP_FIXED_NOREPLACE
    };
    // SAFETY: a new mapping, which replaces none.
    let mapped = unsafe {
        libc::mmap(
            at as *mut libc::c_void,
            length,
            protection,
            flags | fixed,
            file,
            0,
        )
    };
    assert_ne!(
        mapped,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
    assert!(at == 0 || mapped as u64 == at);
    mapped.cast()
}

/// Entry of the LDT for a segment.
fn selector(segment: usize) -> u16 {
    (segment << 3 | 7) as u16
}

/// A segment of the LDT, as modify_ldt takes it.
#[repr(C)]
struct Descriptor {
    number: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// Whether the host's kernel has LDTs.
fn has_segments() -> bool {
    // SAFETY: asks for no bytes.
    unsafe { libc::syscall(libc::SYS_modify_ldt, 0, std::ptr::null_mut::<u8>(), 0) == 0 }
}

/// Makes the segments for 16-bit or 32-bit code. DS and ES may stay when it is left: 64-bit code does not
/// look at them.
fn make_segments(mode: Mode) {
    const BIG: u32 = 1;
    const CODE: u32 = 2 << 1;
    const USEABLE: u32 = 1 << 6;
    for segment in [seg::ES, seg::CS, seg::SS, seg::DS] {
        let big = if mode == Mode::Bits32 { BIG } else { 0 };
        let code = if segment == seg::CS { CODE } else { 0 };
        let descriptor = Descriptor {
            number: segment as u32,
            base: mode.base(segment) as u32,
            limit: LIMIT,
            flags: big | code | USEABLE,
        };
        let size = size_of::<Descriptor>();
        // SAFETY: the descriptor is of that size and outlives the call.
        let done = unsafe { libc::syscall(libc::SYS_modify_ldt, 1, &raw const descriptor, size) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
    // SAFETY: data segments that were just made, which 64-bit code does not use.
    unsafe {
        asm!("mov ds, {0:x}", "mov es, {1:x}", in(reg) u32::from(selector(seg::DS)),
            in(reg) u32::from(selector(seg::ES)), options(nostack, preserves_flags));
    }
}

impl Host {
    fn new(mode: Mode) -> Self {
        let (read, write) = (libc::PROT_READ, libc::PROT_WRITE);
        let code = map(
            CODE,
            (CODE_END - CODE) as usize,
            read | write | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
        );
        // SAFETY: the name is a C string; the size is that of the file; the descriptor is closed
        // once, after it was mapped.
        let (data, window) = unsafe {
            let file = libc::memfd_create(c"data".as_ptr(), libc::MFD_CLOEXEC);
            assert!(file >= 0);
            assert_eq!(libc::ftruncate(file, SIZE as i64), 0);
            let data = map(DATA, SIZE, read | write, libc::MAP_SHARED, file);
            let window = map(0, SIZE, read | write, libc::MAP_SHARED, file);
            libc::close(file);
            (data, window)
        };
        // SAFETY: the mapping from above.
        unsafe { code.write_bytes(0xCC, (CODE_END - CODE) as usize) };
        if mode != Mode::Bits64 {
            make_segments(mode);
        }
        Self {
            native: Native::new().unwrap(),
            mode,
            code,
            data,
            window,
        }
    }

    /// Runs the code at `at` until it stops.
    fn run(&mut self, at: u64, block: &mut Block) -> Stop {
        let range = CODE as usize..CODE_END as usize;
        let (start, entry) = match self.mode {
            Mode::Bits64 => (at, None),
            mode => (
                CODE,
                Some(Entry {
                    rip: at - mode.base(seg::CS),
                    cs: selector(seg::CS),
                    ss: selector(seg::SS),
                }),
            ),
        };
        self.native
            .run_in_place(start as usize, range, entry, block)
    }

    fn code(&self, at: u64, bytes: &[u8]) {
        let offset = (at - CODE) as usize;
        assert!(offset + bytes.len() <= (CODE_END - CODE) as usize);
        // SAFETY: within the mapping, which no reference covers.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code.add(offset), bytes.len())
        };
    }

    fn second(&self, second: Second) {
        let protection = match second {
            Second::Memory | Second::Device => libc::PROT_READ | libc::PROT_WRITE,
            Second::ReadOnly => libc::PROT_READ,
            Second::Absent => libc::PROT_NONE,
        };
        // SAFETY: an own page, which only the tested instructions touch at this address.
        let done = unsafe { libc::mprotect(self.data.add(PAGE).cast(), PAGE, protection) };
        assert_eq!(done, 0);
    }

    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        // SAFETY: the whole mapping, which no reference covers.
        unsafe { std::ptr::copy_nonoverlapping(self.window, bytes.as_mut_ptr(), SIZE) };
        bytes
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= SIZE);
        // SAFETY: within the mapping, which no reference covers.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.window.add(at), bytes.len()) };
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let parts = [
            (self.code, (CODE_END - CODE) as usize),
            (self.data, SIZE),
            (self.window, SIZE),
        ];
        for (at, length) in parts {
            // SAFETY: an own mapping, used no more.
            unsafe { libc::munmap(at.cast(), length) };
        }
    }
}

/// An instruction with the state before it.
struct Case {
    instruction: Instruction,
    bytes: Vec<u8>,
    gpr: [u64; 16],
    flags: u64,
}

impl Case {
    /// Bits of a general register that are certain. CPUs differ in whether a repetition with
    /// 32-bit addresses clears the upper halves of its registers before the first element is done, and
    /// POPA may have popped some registers before it faults.
    fn compared_bits(&self, number: usize, outcome: Outcome) -> u64 {
        let pops = matches!(self.instruction.mnemonic(), M::Popa | M::Popad);
        if pops && outcome == Outcome::Fault && number != reg::RSP {
            return 0;
        }
        let kinds = [self.instruction.op0_kind(), self.instruction.op1_kind()];
        let narrow = kinds
            .iter()
            .any(|kind| matches!(kind, OpKind::MemorySegESI | OpKind::MemoryESEDI));
        let ran = self.gpr[reg::RCX] as u32 != 0 && outcome == Outcome::Done;
        if narrow && !ran && [reg::RCX, reg::RSI, reg::RDI].contains(&number) {
            0xFFFF_FFFF
        } else {
            u64::MAX
        }
    }
}

struct Bench {
    mode: Mode,
    guest: Guest,
    host: Host,
    random: Random,
    encoder: Encoder,
    second: Second,
    at: u64,
}

impl Bench {
    fn new(mode: Mode, seed: u64) -> Self {
        let mut guest = Guest::new();
        let pages = [CODE..CODE_END, DATA..DATA + SIZE as u64];
        for page in (0..512).filter(|page| !pages.iter().any(|used| used.contains(&(page << 12)))) {
            guest.memory.write((TABLE + 8 * page) as usize, &[0; 8]);
        }
        guest.cpu.mmu.flush();
        if mode != Mode::Bits64 {
            for (segment, kind) in [(seg::ES, 3), (seg::CS, 0xB), (seg::SS, 3), (seg::DS, 3)] {
                guest.segment(segment, kind, |s| {
                    s.base = mode.base(segment);
                    s.limit = LIMIT;
                    s.big = mode == Mode::Bits32;
                });
            }
        }
        Self {
            mode,
            guest,
            host: Host::new(mode),
            random: Random::new(seed),
            encoder: Encoder::new(mode.bits()),
            second: Second::Memory,
            at: FIRST,
        }
    }

    fn second(&mut self, second: Second) {
        self.second = second;
        self.guest.second(second);
        self.host.second(second);
        self.guest.set_operands(second, &self.host.memory());
    }

    /// Writes data of both.
    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.host.write(at, bytes);
        let memory = self.host.memory();
        if self.second == Second::Device {
            self.guest.set_operands(self.second, &memory);
        } else {
            self.guest.memory.write(DATA as usize + at, bytes);
        }
    }

    /// Offset of an operand of `size` bytes in the data, often about the border of the pages.
    fn place(&mut self, size: usize) -> u64 {
        let size = size as u64;
        let border = PAGE as u64;
        match self.random.below(3) {
            0 => border - size + self.random.below(size + 16),
            _ => self.random.below(SIZE as u64 - 64),
        }
    }

    /// A random instruction of the form and a state for it; `None` if there is none of the form.
    fn make(&mut self, code: Code) -> Option<Case> {
        (0..64).find_map(|_| {
            let case = Form::new(self, code)?.fill()?;
            Some(case)
        })
    }

    /// The instruction's offset in CS.
    fn rip(&self) -> u64 {
        self.at - self.mode.base(seg::CS)
    }

    /// Executes the instruction in the guest. Where it went to, or what it raised.
    fn execute(&mut self, how: How, case: &Case) -> Result<u64, Exception> {
        let (at, bits) = (self.rip(), self.mode.bits());
        let cpu = &mut self.guest.cpu;
        for (number, value) in case.gpr.iter().enumerate() {
            cpu.set_gpr(number, *value);
        }
        cpu.set_flags(Flags::from_rflags(case.flags));
        let system = cpu.system_flags & !rflags::DF | case.flags & rflags::DF;
        cpu.set_system_flags(system);
        let next = at + case.bytes.len() as u64;
        if how == How::Block {
            let mut padded = [0x90; 16];
            padded[..case.bytes.len()].copy_from_slice(&case.bytes);
            self.guest.memory.write(self.at as usize, &padded);
        }
        // Strings come back to let interrupts in.
        for _ in 0..100 {
            let cpu = &mut self.guest.cpu;
            cpu.leave_block = false;
            cpu.rip = at;
            cpu.set_gpr(reg::BLOCK, at);
            let step = match how {
                How::Handler => {
                    let mut decoder = Decoder::new(bits, &case.bytes, DecoderOptions::NONE);
                    let instruction = decoder.decode();
                    let instruction = cpu.as_known(instruction);
                    cpu.next = next;
                    match handler(&instruction).unwrap()(cpu, &instruction) {
                        Ok(()) => {
                            cpu.rip = cpu.next;
                            Step::Next
                        }
                        Err(_) => Step::Trap,
                    }
                }
                How::Block => {
                    let block = cpu.block(cpu.mode_key(true)).unwrap();
                    // SAFETY: blocks live until they are collected, in `advance`.
                    let op = unsafe { &block.as_ref().ops[0] };
                    assert_eq!(usize::from(op.length), case.bytes.len());
                    let step = (op.run.get())(cpu, op);
                    if step == Step::Next {
                        cpu.rip = next;
                    }
                    if step == Step::Trap {
                        cpu.trapped(op);
                    }
                    step
                }
            };
            if step == Step::Trap {
                match cpu.stopped.take() {
                    Some(Stopped::Exception(exception)) => return Err(exception),
                    other => panic!("{other:?}"),
                }
            }
            let repeats = case.instruction.has_rep_prefix() || case.instruction.has_repne_prefix();
            if cpu.rip != at || !repeats {
                return Ok(cpu.rip);
            }
        }
        panic!("{:?} does not end", case.instruction.code());
    }

    fn advance(&mut self) {
        self.at += 16;
        if self.at > LAST {
            self.at = FIRST;
            self.guest.cpu.blocks.collect();
        }
    }

    /// Runs a case on both.
    fn run(&mut self, how: How, case: &Case) -> Result<Outcome, String> {
        let mut block = Block::new();
        block.gpr = case.gpr;
        block.rflags = case.flags | 0x202;
        self.host.code(self.at, &case.bytes);
        let stop = self.host.run(self.at, &mut block);
        self.host.code(self.at, &[0xCC; 15]);
        let done = self.execute(how, case);
        let wrong = |done| Err(format!("host {stop:x?}, guest {done:x?}"));
        let outcome = match done {
            Ok(rip) if stop.signal == libc::SIGTRAP && stop.rip as u64 == rip + 1 => Outcome::Done,
            Err(fault) if stop.rip as u64 == self.rip() => {
                let good = match fault.vector {
                    vector::DE => stop.signal == libc::SIGFPE,
                    // Which operand of a comparison of strings is read first is the CPU's choice.
                    vector::PF => {
                        let either = compares_strings(&case.instruction);
                        stop.signal == libc::SIGSEGV
                            && (stop.address as u64 == fault.address
                                || either && stop.address as u64 >> 12 == fault.address >> 12)
                    }
                    // The manual checks the target of a call first, CPUs may push first.
                    vector::GP => {
                        case.instruction.mnemonic() == M::Call
                            || stop.signal == libc::SIGSEGV && stop.address == 0
                    }
                    vector::SS => stop.signal == libc::SIGBUS,
                    _ => false,
                };
                if !good {
                    return wrong(done);
                }
                Outcome::Fault
            }
            _ => return wrong(done),
        };
        let cpu = &self.guest.cpu;
        for number in 0..self.mode.registers() {
            let compared = case.compared_bits(number, outcome) & self.mode.mask();
            if (cpu.gpr(number) ^ block.gpr[number]) & compared != 0 {
                return Err(format!(
                    "register {number}: host {:#x}, guest {:#x} ({stop:x?})",
                    block.gpr[number],
                    cpu.gpr(number)
                ));
            }
        }
        let undefined = match outcome {
            Outcome::Done => undefined(&case.instruction),
            // IDIV and DIV may have changed them.
            Outcome::Fault if stop.signal == libc::SIGFPE => ARITHMETIC_RFLAGS,
            // With a prefix, Intel's CPUs restore those from before the instruction (SDM volume 2,
            // REP), AMD's leave those of the last element.
            Outcome::Fault if compares_strings(&case.instruction) => ARITHMETIC_RFLAGS,
            Outcome::Fault => 0,
        };
        let compared = (ARITHMETIC_RFLAGS | rflags::DF) & !undefined;
        if (cpu.rflags() ^ block.rflags) & compared != 0 {
            return Err(format!(
                "flags: host {:#x}, guest {:#x}",
                block.rflags,
                cpu.rflags()
            ));
        }
        let (theirs, ours) = (self.host.memory(), self.guest.operands(self.second));
        if theirs != ours {
            // What was pushed before the fault is below the stack pointer.
            let pushes = matches!(
                case.instruction.mnemonic(),
                M::Enter | M::Call | M::Pusha | M::Pushad
            );
            if pushes && outcome == Outcome::Fault {
                self.guest.set_operands(self.second, &theirs);
            } else {
                let at = (0..SIZE).find(|n| theirs[*n] != ours[*n]).unwrap();
                let end = (at + 16).min(SIZE);
                return Err(format!(
                    "memory at {:#x}: host {:02x?}, guest {:02x?}",
                    DATA as usize + at,
                    &theirs[at..end],
                    &ours[at..end]
                ));
            }
        }
        Ok(outcome)
    }
}

/// CMPS or SCAS.
fn compares_strings(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
    ) && instruction.is_string_instruction()
}

/// Flags that are undefined after the instruction, as bits of RFLAGS.
fn undefined(instruction: &Instruction) -> u64 {
    let known = arithmetic(instruction.rflags_undefined());
    // The decoder takes a rotation by a multiple of nine, through carry, for none; OF is undefined
    // after any but by one (SDM volume 2, RCL).
    match instruction.mnemonic() {
        M::Rcl | M::Rcr if instruction.immediate8() & 31 > 1 => known | OF,
        _ => known,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Fault,
}

/// A general register of so many bits.
fn general(number: usize, width: u32) -> Register {
    let first = match width {
        16 => Register::AX,
        32 => Register::EAX,
        _ => Register::RAX,
    };
    first + number as u32
}

/// An instruction that is being made.
struct Form<'a> {
    bench: &'a mut Bench,
    code: Code,
    made: Instruction,
    gpr: [u64; 16],
    /// Registers that the address must not be made with, by bit.
    reserved: u32,
    /// Linear address of the memory operand.
    address: u64,
    /// Bits of an address.
    width: u32,
    /// A segment prefix. Ignored in 64-bit code.
    prefix: Option<usize>,
    df: u64,
}

impl<'a> Form<'a> {
    fn new(bench: &'a mut Bench, code: Code) -> Option<Self> {
        if !bench.mode.has(code) {
            return None;
        }
        let mut made = Instruction::default();
        made.set_code(code);
        made.set_code_size(match bench.mode {
            Mode::Bits16 => iced_x86::CodeSize::Code16,
            Mode::Bits32 => iced_x86::CodeSize::Code32,
            Mode::Bits64 => iced_x86::CodeSize::Code64,
        });
        let gpr = std::array::from_fn(|_| bench.random.integer() & bench.mode.mask());
        let wide = !bench.random.one_in(6);
        let width = match bench.mode {
            Mode::Bits64 if wide => 64,
            Mode::Bits16 if wide => 16,
            Mode::Bits32 if !wide => 16,
            _ => 32,
        };
        let among = match bench.mode {
            Mode::Bits64 => [seg::ES, seg::CS, seg::SS, seg::DS],
            _ => [seg::ES, seg::SS, seg::SS, seg::DS],
        };
        let prefix = among[bench.random.below(4) as usize];
        let prefix = bench.random.one_in(6).then_some(prefix);
        Some(Self {
            width,
            prefix,
            bench,
            code,
            made,
            gpr,
            reserved: 0,
            address: 0,
            df: 0,
        })
    }

    fn set(&mut self, number: usize, value: u64) {
        self.gpr[number] = value;
        self.reserved |= 1 << number;
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.bench.random.below(limit)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.bench.random.one_in(n)
    }

    /// A place that a jump may go to, outside the instruction.
    fn target(&mut self) -> u64 {
        let at = self.bench.rip();
        if self.one_in(2) {
            at + 16 + self.below(0x60)
        } else {
            at - 1 - self.below(0x60)
        }
    }

    fn fill(mut self) -> Option<Case> {
        let kinds = self.code.op_code().op_kinds();
        for (n, kind) in kinds.iter().enumerate() {
            self.register(n as u32, *kind);
        }
        self.implied();
        for (n, kind) in kinds.iter().enumerate() {
            self.operand(n as u32, *kind)?;
        }
        self.prefixes();
        self.related()?;
        let bench = self.bench;
        if bench.encoder.encode(&self.made, bench.rip()).is_err() {
            let _ = bench.encoder.take_buffer();
            return None;
        }
        let mut flags = bench.random.next() & ARITHMETIC_RFLAGS;
        if bench.random.one_in(4) {
            flags |= rflags::DF;
        }
        Some(Case {
            instruction: self.made,
            bytes: bench.encoder.take_buffer(),
            gpr: self.gpr,
            flags: flags & !rflags::DF | if flags & rflags::DF != 0 { self.df } else { 0 },
        })
    }

    /// Sets the operand if it is a register.
    fn register(&mut self, n: u32, kind: K) {
        let memory = self.one_in(2);
        let number = self.below(self.bench.mode.registers() as u64) as u32;
        let byte = match self.bench.mode {
            Mode::Bits64 => self.below(20) as u32,
            _ => self.below(8) as u32,
        };
        let register = match kind {
            K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem if memory => return,
            K::r8_or_mem | K::r8_reg | K::r8_opcode => Register::AL + byte,
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => Register::AX + number,
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode => Register::EAX + number,
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode => Register::RAX + number,
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            _ => return,
        };
        self.made.set_op_kind(n, OpKind::Register);
        self.made.set_op_register(n, register);
    }

    /// Whether the operand is a register that was set.
    fn is_register(&self, n: u32) -> bool {
        self.made.op_kind(n) == OpKind::Register && self.made.op_register(n) != Register::None
    }

    fn has_memory(&self) -> bool {
        (0..self.made.op_count()).any(|n| self.made.op_kind(n) == OpKind::Memory)
    }

    /// Gives registers that an instruction implies values that let it do something.
    fn implied(&mut self) {
        let op_code = self.code.op_code();
        if self.code.is_stack_instruction() {
            let place = self.bench.place(8);
            let stack = if self.one_in(32) {
                self.edge()
            } else {
                self.offset(seg::SS, DATA + place)
            };
            let above = self.above_stack();
            self.set(reg::RSP, stack | above);
            if matches!(self.code.mnemonic(), M::Enter | M::Leave) {
                let place = self.bench.place(8);
                let frame = self.offset(seg::SS, DATA + place);
                let above = self.above_stack();
                self.set(reg::RBP, frame | above);
            }
        }
        let count = match self.below(4) {
            0 => self.below(3),
            1 => self.below(3) | 1 << 32,
            2 => self.below(0x1_0002),
            _ => self.bench.random.integer(),
        };
        let random = self.bench.random.integer();
        match self.code.mnemonic() {
            M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
                self.set(reg::RCX, count);
            }
            // A quotient that fits.
            M::Div | M::Idiv if self.one_in(2) => {
                self.set(reg::RDX, if random & 1 != 0 { 0 } else { u64::MAX });
                if op_code.operand_size() == 0 {
                    let al = random >> 8 & 0xFF;
                    self.set(reg::RAX, if random & 2 != 0 { al } else { al | 0xFF00 });
                }
            }
            // Registers whose values are set once the address is known.
            M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b => {
                self.reserved |= 1 << reg::RAX | 1 << reg::RDX;
            }
            _ => {}
        }
        // A bit near a memory operand.
        let bit_string = matches!(self.code.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
        if bit_string && self.is_register(1) && !self.is_register(0) {
            let register = self.made.op1_register();
            let mask = u64::MAX >> (64 - 8 * register.size());
            let near = self.below(0x1_8000).wrapping_sub(0xC000);
            self.set(
                register.full_register().number(),
                random & !mask | near & mask,
            );
        }
        if string::handler(&self.made).is_some() {
            self.string_registers();
        }
    }

    /// What a stack pointer may have beyond the stack's size.
    fn above_stack(&mut self) -> u64 {
        match self.bench.mode {
            Mode::Bits16 => self.bench.random.next() & 0xFFFF_0000,
            _ => 0,
        }
    }

    fn string_registers(&mut self) {
        self.df = rflags::DF;
        let size = self.code.op_code().memory_size().size().max(1);
        let (from, to) = (self.bench.place(size), self.bench.place(size));
        let segment = self.segment(seg::DS);
        let offsets = [
            self.offset(segment, DATA + from),
            self.offset(seg::ES, DATA + to),
        ];
        self.set(reg::RSI, offsets[0]);
        self.set(reg::RDI, offsets[1]);
        let count = match self.below(6) {
            0 => self.below(3000),
            1 => 0,
            _ => self.below(60),
        };
        self.set(reg::RCX, count);
        // Runs of equal elements, so that comparisons go on for a while.
        if self.one_in(2) {
            let byte = self.bench.random.next() as u8;
            let length = self.below(600) as usize;
            for start in [from as usize, to as usize] {
                let run = vec![byte; length.min(SIZE - start)];
                self.bench.write(start, &run);
            }
            if self.one_in(2) {
                self.gpr[reg::RAX] = u64::from_le_bytes([byte; 8]);
            }
            if self.one_in(2) {
                let at = (to + self.below(600)).min(SIZE as u64 - 1) as usize;
                self.bench.write(at, &[!byte]);
            }
        }
    }

    /// Sets the operand if it is no register.
    fn operand(&mut self, n: u32, kind: K) -> Option<()> {
        if self.is_register(n) {
            return Some(());
        }
        let random = self.bench.random.integer();
        let width = self.width;
        let segment = self.segment(seg::DS);
        let made = &mut self.made;
        match kind {
            K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mem => {
                made.set_op_kind(n, OpKind::Memory);
                self.memory()?;
            }
            K::mem_offs => {
                made.set_op_kind(n, OpKind::Memory);
                made.set_memory_displ_size(width / 8);
                let size = made.memory_size().size();
                self.address = DATA + self.bench.place(size);
                let offset = self.offset(segment, self.address);
                self.made.set_memory_displacement64(offset);
            }
            K::seg_rBX_al => {
                made.set_op_kind(n, OpKind::Memory);
                made.set_memory_base(general(reg::RBX, width));
                made.set_memory_index(Register::AL);
                self.address = DATA + self.bench.place(1);
                let mut offset = self.offset(segment, self.address);
                if self.one_in(16) {
                    // Where the sum wraps, though there is no data.
                    offset = self.below(0x100);
                }
                self.point(reg::RBX, offset.wrapping_sub(self.gpr[reg::RAX] & 0xFF));
            }
            K::seg_rSI | K::es_rDI => {
                let (number, kinds) = if kind == K::seg_rSI {
                    use OpKind::{MemorySegESI, MemorySegRSI, MemorySegSI};
                    (reg::RSI, [MemorySegSI, MemorySegESI, MemorySegRSI])
                } else {
                    use OpKind::{MemoryESDI, MemoryESEDI, MemoryESRDI};
                    (reg::RDI, [MemoryESDI, MemoryESEDI, MemoryESRDI])
                };
                made.set_op_kind(n, kinds[width.ilog2() as usize - 4]);
                for number in [number, reg::RCX] {
                    self.reserved &= !(1 << number);
                    let value = self.gpr[number];
                    self.gpr[number] = random & self.bench.mode.mask();
                    self.point(number, value);
                }
            }
            // CPUs differ in 64-bit code: only AMD's have them.
            K::br16_1 | K::br16_2 if self.bench.mode != Mode::Bits64 => {
                made.set_op_kind(n, OpKind::NearBranch16);
                let target = self.target();
                self.made.set_near_branch16(target as u16);
            }
            K::br32_1 | K::br32_4 => {
                made.set_op_kind(n, OpKind::NearBranch32);
                let target = self.target();
                self.made.set_near_branch32(target as u32);
            }
            K::br64_1 | K::br64_4 => {
                made.set_op_kind(n, OpKind::NearBranch64);
                let target = self.target();
                self.made.set_near_branch64(target);
            }
            _ => self.immediate(n, kind, random)?,
        }
        Some(())
    }

    fn immediate(&mut self, n: u32, kind: K, random: u64) -> Option<()> {
        let made = &mut self.made;
        let second = n > 0 && made.op_kind(n - 1) == OpKind::Immediate16;
        match kind {
            K::imm8 if second => {
                made.set_op_kind(n, OpKind::Immediate8_2nd);
                made.set_immediate8_2nd(random as u8);
            }
            K::imm8 | K::imm8_const_1 => {
                made.set_op_kind(n, OpKind::Immediate8);
                made.set_immediate8(if kind == K::imm8 { random as u8 } else { 1 });
            }
            K::imm8sex16 => {
                made.set_op_kind(n, OpKind::Immediate8to16);
                made.set_immediate8to16(i16::from(random as i8));
            }
            K::imm8sex32 => {
                made.set_op_kind(n, OpKind::Immediate8to32);
                made.set_immediate8to32(i32::from(random as i8));
            }
            K::imm8sex64 => {
                made.set_op_kind(n, OpKind::Immediate8to64);
                made.set_immediate8to64(i64::from(random as i8));
            }
            K::imm16 => {
                made.set_op_kind(n, OpKind::Immediate16);
                made.set_immediate16(random as u16);
            }
            K::imm32 => {
                made.set_op_kind(n, OpKind::Immediate32);
                made.set_immediate32(random as u32);
            }
            K::imm32sex64 => {
                made.set_op_kind(n, OpKind::Immediate32to64);
                made.set_immediate32to64(i64::from(random as i32));
            }
            K::imm64 => {
                made.set_op_kind(n, OpKind::Immediate64);
                made.set_immediate64(random);
            }
            _ => return None,
        }
        Some(())
    }

    /// The segment of an operand, unless there is a prefix.
    fn segment(&self, default: usize) -> usize {
        self.prefix.unwrap_or(default)
    }

    /// Offset of a linear address in a segment.
    fn offset(&self, segment: usize, linear: u64) -> u64 {
        linear - self.bench.mode.base(segment)
    }

    /// An offset about the end of a segment or of the canonical addresses.
    fn edge(&mut self) -> u64 {
        match self.bench.mode {
            Mode::Bits64 => 0x7FFF_FFFF_FFF0 + self.below(32),
            _ => u64::from(LIMIT) - 8 + self.below(16),
        }
    }

    /// A register for an address that is free for it.
    fn free(&mut self, among: &[usize]) -> Option<usize> {
        let number = among[self.below(among.len() as u64) as usize];
        (self.reserved >> number & 1 == 0).then_some(number)
    }

    /// The memory operand: every form of address.
    fn memory(&mut self) -> Option<()> {
        let size = self.made.memory_size().size();
        let mut place = self.bench.place(size.max(1));
        // Locked accesses across cache lines are expensive to the whole host.
        let locked = matches!(self.code.mnemonic(), M::Xchg | M::Cmpxchg16b) && !self.one_in(32);
        if locked || self.one_in(4) {
            place -= place % size.max(1) as u64;
        }
        self.address = DATA + place;
        let kind = self.below(8);
        self.made.set_memory_displ_size(self.width / 8);
        if kind == 0 && self.bench.mode == Mode::Bits64 {
            self.made.set_memory_base(match self.width {
                32 => Register::EIP,
                _ => Register::RIP,
            });
            self.made.set_memory_displacement64(self.address);
            return Some(());
        }
        let (mut base, mut index, mut scale) = (None, None, 1);
        if self.width == 16 {
            match kind {
                1 => {}
                2..5 => base = Some(self.free(&[reg::RBX, reg::RBP, reg::RSI, reg::RDI])?),
                _ => {
                    base = Some(self.free(&[reg::RBX, reg::RBP])?);
                    index = Some(self.free(&[reg::RSI, reg::RDI])?);
                }
            }
        } else {
            const ALL: [usize; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
            let among = &ALL[..self.bench.mode.registers()];
            if kind > 2 {
                base = Some(self.free(among)?);
            }
            if matches!(kind, 2..5) {
                let free = self.free(among)?;
                index = (free != reg::RSP && base != Some(free)).then_some(free);
                index?;
                scale = 1 << self.below(4);
            }
        }
        let on_stack = matches!(base, Some(reg::RSP | reg::RBP));
        let segment = self.segment(if on_stack { seg::SS } else { seg::DS });
        let mut offset = self.offset(segment, self.address);
        if base.is_some() && self.one_in(32) {
            offset = self.edge();
            self.address = offset + self.bench.mode.base(segment);
        }
        let mask = u64::MAX >> (64 - self.width);
        let mut displacement = match self.below(3) {
            0 => 0,
            1 => self.bench.random.next() as i8 as u64,
            _ => self.bench.random.next() as i32 as u64,
        };
        if let Some(number) = index {
            self.made.set_memory_index(general(number, self.width));
            self.made.set_memory_index_scale(scale as u32);
            if base.is_none() {
                let times = self.below(offset / scale + 1);
                self.point(number, times);
                displacement = offset - times * scale;
            }
            offset = offset.wrapping_sub(self.gpr[number].wrapping_mul(scale));
        }
        match base {
            Some(number) => {
                self.made.set_memory_base(general(number, self.width));
                self.point(number, offset.wrapping_sub(displacement));
            }
            None if index.is_none() => displacement = offset,
            None => {}
        }
        self.made.set_memory_displacement64(displacement & mask);
        Some(())
    }

    /// Sets a register of the address; what it has beyond the address size does not matter.
    fn point(&mut self, number: usize, value: u64) {
        let mask = u64::MAX >> (64 - self.width);
        let rest = self.gpr[number] & !mask;
        self.gpr[number] = rest | value & mask;
    }

    fn prefixes(&mut self) {
        let op_code = self.code.op_code();
        let in_memory = self.made.op_count() > 0 && self.made.op0_kind() == OpKind::Memory;
        let size = self.made.memory_size().size().max(1) as u64;
        if op_code.can_use_lock_prefix()
            && in_memory
            && self.address.is_multiple_of(size)
            && self.one_in(2)
        {
            self.made.set_has_lock_prefix(true);
        }
        let string =
            (0..self.made.op_count()).any(|n| self.code.op_code().op_kind(n) == K::seg_rSI);
        if let Some(segment) = self.prefix
            && (self.has_memory() || string)
        {
            self.made.set_segment_prefix(Register::ES + segment as u32);
        }
        if string::handler(&self.made).is_some() {
            match self.below(3) {
                0 => self.made.set_has_rep_prefix(true),
                1 => self.made.set_has_repne_prefix(true),
                _ => {}
            }
        }
    }

    /// Values that depend on the operands.
    fn related(&mut self) -> Option<()> {
        let offset = self.address.wrapping_sub(DATA) as usize;
        let in_memory = self.has_memory();
        let readable = offset + 16 <= SIZE;
        if in_memory && readable {
            let mut bytes = [0; 16];
            for part in bytes.chunks_mut(8) {
                part.copy_from_slice(&self.bench.random.integer().to_le_bytes());
            }
            self.bench.write(offset, &bytes);
        }
        let word = |memory: &[u8], at: usize| {
            let bytes = memory.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().unwrap()))
        };
        let target = self.target();
        // The low half, for 16 bits, is before every instruction.
        let beyond = match self.bench.mode {
            Mode::Bits64 => 1 << 50,
            _ => 0x7FFF_0020,
        };
        let target = if self.one_in(12) { beyond } else { target };
        match self.code.mnemonic() {
            M::Cmpxchg if self.one_in(2) => {
                let value = match self.made.op0_kind() {
                    OpKind::Register => {
                        let register = self.made.op0_register();
                        let value = self.gpr[register.full_register().number()];
                        let high = matches!(
                            register,
                            Register::AH | Register::CH | Register::DH | Register::BH
                        );
                        if high { value >> 8 } else { value }
                    }
                    _ => word(&self.bench.host.memory(), offset).unwrap_or(0),
                };
                self.gpr[reg::RAX] = value;
            }
            M::Cmpxchg8b | M::Cmpxchg16b if self.one_in(2) && readable => {
                let memory = self.bench.host.memory();
                let size = self.made.memory_size().size() / 2;
                self.gpr[reg::RAX] = word(&memory, offset)?;
                self.gpr[reg::RDX] = word(&memory, offset + size)?;
            }
            M::Ret => {
                let above = match self.bench.mode {
                    Mode::Bits16 => 0xFFFF_0000,
                    _ => 0,
                };
                let top = (self.gpr[reg::RSP] & !above) + self.bench.mode.base(seg::SS);
                let top = top.wrapping_sub(DATA) as usize;
                if top + 8 <= SIZE {
                    self.bench.write(top, &target.to_le_bytes());
                }
            }
            M::Call | M::Jmp => match self.made.op0_kind() {
                OpKind::Register => {
                    let number = self.made.op0_register().number();
                    // The stack would be in the code.
                    if number == reg::RSP {
                        return None;
                    }
                    self.gpr[number] = target;
                }
                OpKind::Memory if offset + 8 <= SIZE => {
                    self.bench.write(offset, &target.to_le_bytes());
                }
                OpKind::Memory if self.address >> 40 == 0 => return None,
                _ => {}
            },
            _ => {}
        }
        Some(())
    }
}

/// The instructions that are compared: those with a handler here whose result is certain. To 0F 0D
/// with a register Intel's CPUs do nothing and AMD's find it invalid; of a near branch with an operand
/// size of 16 bits in 64-bit code, Intel's ignore the prefix; MOVSXD to 16 bits reads two bytes or four.
fn codes(bench: &mut Bench) -> Vec<Code> {
    let long = bench.mode == Mode::Bits64;
    let certain = |made: &Instruction| {
        !matches!(
            made.mnemonic(),
            M::Rdrand | M::Rdseed | M::Ud0 | M::Ud1 | M::Ud2
        ) && match made.code() {
            Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
            | Code::Movsxd_r16_rm16 => false,
            Code::Retnw | Code::Retnw_imm16 | Code::Call_rm16 | Code::Jmp_rm16 => !long,
            _ => !long || made.op0_kind() != OpKind::NearBranch16,
        }
    };
    Code::values()
        .filter(|code| {
            let Some(case) = bench.make(*code) else {
                return false;
            };
            let made = case.instruction;
            let cpu = &bench.guest.cpu;
            let known = made.cpuid_features().iter().all(|f| cpu.cpuid.has(*f));
            let ours = integer::handler(&made).or_else(|| string::handler(&made));
            known && certain(&made) && ours.is_some()
        })
        .collect()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Every form, by its handler and as a block.
fn compare(mode: Mode, how: How) {
    if mode != Mode::Bits64 && !has_segments() {
        println!("skipped: the host's kernel has no LDTs, and so no segments for {mode:?}");
        return;
    }
    let _addresses = ADDRESSES.lock().unwrap_or_else(PoisonError::into_inner);
    let seed = number("ANEMONE_SEED").unwrap_or(std::process::id().into());
    let cases = number("ANEMONE_CASES").unwrap_or(100_000);
    let mut bench = Bench::new(mode, seed);
    let codes = codes(&mut bench);
    assert!(codes.len() > 400, "{}", codes.len());
    let (mut done, mut faults) = (0u64, 0u64);
    for case in 0..cases {
        if case % 64 == 0 {
            let second = [
                Second::Memory,
                Second::Memory,
                Second::Absent,
                Second::ReadOnly,
                Second::Device,
            ][bench.random.below(5) as usize];
            bench.second(second);
        }
        let code = codes[(case % codes.len() as u64) as usize];
        let made = bench.make(code).unwrap();
        match bench.run(how, &made) {
            Ok(Outcome::Done) => done += 1,
            Ok(Outcome::Fault) => faults += 1,
            Err(what) => panic!(
                "seed {seed}, case {case}: {code:?} {:02x?} at {:#x} in {mode:?} by {how:?}, {:?}: {what}\n{:x?} flags {:#x}",
                made.bytes, bench.at, bench.second, made.gpr, made.flags
            ),
        }
        bench.advance();
    }
    println!("{} forms, {done} done, {faults} faults", codes.len());
    assert!(cases < 10_000 || done > cases / 2 && faults > cases / 50);
}

#[test]
fn every_handler_equals_the_host() {
    compare(Mode::Bits64, How::Handler);
}

#[test]
fn every_block_equals_the_host() {
    compare(Mode::Bits64, How::Block);
}

#[test]
fn thirty_two_bit_code_equals_the_host() {
    compare(Mode::Bits32, How::Block);
}

#[test]
fn sixteen_bit_code_equals_the_host() {
    compare(Mode::Bits16, How::Block);
}

#[test]
fn random_numbers_differ() {
    let mut guest = Guest::new();
    // RDRAND and RDSEED of RAX.
    for bytes in [[0x48, 0x0F, 0xC7, 0xF0], [0x48, 0x0F, 0xC7, 0xF8]] {
        let mut numbers = Vec::new();
        for _ in 0..1000 {
            guest.cpu.set_flags(Flags::ALL);
            guest.run(&bytes).unwrap();
            let flags = guest.cpu.flags();
            if flags == Flags::CF {
                numbers.push(guest.cpu.gpr(reg::RAX));
            } else {
                // There may be none just now.
                assert_eq!((flags, guest.cpu.gpr(reg::RAX)), (Flags::NONE, 0));
            }
        }
        numbers.sort_unstable();
        numbers.dedup();
        assert!(numbers.len() > 10, "{} of {bytes:02x?}", numbers.len());
    }
}

#[test]
fn undefined_instructions_are_undefined() {
    let mut guest = Guest::new();
    for bytes in [&[0x0F, 0x0B][..], &[0x0F, 0xB9, 0xC1], &[0x0F, 0xFF, 0xC1]] {
        assert_eq!(guest.run(bytes), Err(Exception::UD));
    }
}

/// Other threads add to the same word meanwhile.
#[test]
fn locked_instructions_are_atomic() {
    use std::sync::atomic::{AtomicU64, Ordering};
    let mut guest = Guest::new();
    let word = guest.memory.base.wrapping_add(DATA as usize + 8);
    // SAFETY: aligned, in memory that outlives the thread below; only atomics touch it meanwhile.
    let word = unsafe { AtomicU64::from_ptr(word.cast()) };
    const TURNS: u64 = 20_000;
    // LOCK XADD [EDI], RAX.
    let bytes = [0x67, 0xF0, 0x48, 0x0F, 0xC1, 0x07];
    let instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
    let execute = handler(&instruction).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..TURNS {
                word.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..TURNS {
            guest.cpu.set_gpr(reg::RAX, 1 << 32);
            guest.cpu.set_gpr(reg::RDI, DATA + 8);
            execute(&mut guest.cpu, &instruction).unwrap();
        }
    });
    assert_eq!(word.load(Ordering::Relaxed), TURNS << 32 | TURNS);
}
