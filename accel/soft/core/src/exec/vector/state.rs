//! Instructions that move vector and x87 state: MXCSR, FXSAVE, XSAVE in standard format.

use std::ops::Range;

use anemone_soft_native::XSAVE_SIZE;
use iced_x86::{Code, Instruction, Mnemonic};

use super::{advance, load_bytes, store_bytes};
use crate::block::Handler;
use crate::cpu::{Cpu, Exec, reg};

type Image = [u8; XSAVE_SIZE];

/// Places in an image (SDM volume 1, table 10-2 and section 13.4).
pub(super) const FSW: usize = 2;
pub(super) const FTW: usize = 4;
pub(super) const FOP: usize = 6;
pub(super) const FIP: usize = 8;
pub(super) const FDP: usize = 16;
const MXCSR: usize = 24;
pub(super) const ST: usize = 32;
const XMM: usize = 160;
const HEADER: usize = 512;
const YMM: usize = 576;

/// FCW after FNINIT.
const INITIAL_FCW: [u8; 2] = 0x37F_u16.to_le_bytes();

/// State components (SDM volume 1, 13.1).
const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    let handler: Handler = match instruction.mnemonic() {
        M::Ldmxcsr | M::Vldmxcsr => load_mxcsr,
        M::Stmxcsr | M::Vstmxcsr => store_mxcsr,
        M::Fxsave | M::Fxsave64 => fxsave,
        M::Fxrstor | M::Fxrstor64 => fxrstor,
        M::Xsave | M::Xsave64 => xsave::<false>,
        M::Xsaveopt | M::Xsaveopt64 => xsave::<true>,
        M::Xrstor | M::Xrstor64 => xrstor,
        // The 8087's and the 80287's, which later CPUs ignore.
        M::Fneni | M::Fndisi | M::Fnsetpm => nothing,
        _ => return None,
    };
    Some(handler)
}

fn nothing(_: &mut Cpu, _: &Instruction) -> Exec {
    Ok(())
}

fn load_mxcsr(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let linear = cpu.memory_operand(instruction, 4, false)?;
    let value = cpu.load(linear)?;
    cpu.native.set_mxcsr(value).map_err(|_| cpu.gp())
}

fn store_mxcsr(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let linear = cpu.memory_operand(instruction, 4, true)?;
    cpu.store(linear, cpu.native.mxcsr())
}

/// Takes a whole image; #GP(0) if its MXCSR has reserved bits set.
pub(super) fn load_image(cpu: &mut Cpu, image: &Image) -> Exec {
    cpu.native.load_xsave_image(image).map_err(|_| cpu.gp())
}

/// The forms with REX.W keep 64 bits of FIP and FDP, the others 32 and a selector, which is 0 here.
fn is_wide(instruction: &Instruction) -> bool {
    matches!(
        instruction.code(),
        Code::Fxsave64_m512byte
            | Code::Fxrstor64_m512byte
            | Code::Xsave64_mem
            | Code::Xsaveopt64_mem
            | Code::Xrstor64_mem
    )
}

/// Clears what FIP and FDP have beyond 32 bits.
fn narrow(image: &mut Image) {
    image[FIP + 4..FIP + 8].fill(0);
    image[FDP + 4..FDP + 8].fill(0);
}

/// Number of XMM and YMM registers that can be reached.
fn registers(cpu: &Cpu) -> usize {
    if cpu.is_64bit() { 16 } else { 8 }
}

/// Linear address of an area of `size` bytes, which must be aligned.
fn area(
    cpu: &mut Cpu,
    instruction: &Instruction,
    size: usize,
    alignment: u64,
    write: bool,
) -> Exec<u64> {
    let linear = cpu.memory_operand(instruction, size, write)?;
    if linear & (alignment - 1) != 0 {
        return Err(cpu.gp());
    }
    Ok(linear)
}

fn fxsave(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let linear = area(cpu, instruction, 512, 16, true)?;
    cpu.probe_write(linear, 512)?;
    let mut image = *cpu.native.xsave_image();
    if !is_wide(instruction) {
        narrow(&mut image);
    }
    let end = XMM + 16 * registers(cpu);
    store_bytes(cpu, linear, &image[..end])
}

fn fxrstor(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let linear = area(cpu, instruction, 512, 16, false)?;
    let mut image = *cpu.native.xsave_image();
    let mut new = [0; 512];
    load_bytes(cpu, linear, &mut new)?;
    let end = XMM + 16 * registers(cpu);
    image[..end].copy_from_slice(&new[..end]);
    if !is_wide(instruction) {
        narrow(&mut image);
    }
    load_image(cpu, &image)
}

/// EDX:EAX and XCR0: the components that the instruction is about.
fn requested(cpu: &Cpu) -> u64 {
    let (low, high) = (cpu.gpr(reg::RAX), cpu.gpr(reg::RDX));
    (low & 0xFFFF_FFFF | high << 32) & cpu.xcr0
}

/// The components that are not in their initial configuration (SDM volume 1, 13.6).
fn in_use(image: &Image, registers: usize) -> u64 {
    let mut result = 0;
    let x87_initial = image[..2] == INITIAL_FCW && all_zero(&image[2..24]);
    if !x87_initial || !all_zero(&image[ST..XMM]) {
        result |= X87;
    }
    if !all_zero(&image[XMM..XMM + 16 * registers]) {
        result |= SSE;
    }
    if !all_zero(&image[YMM..YMM + 16 * registers]) {
        result |= AVX;
    }
    result
}

fn all_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Bytes of the area up to the end of the components.
fn size_of(components: u64) -> usize {
    if components & AVX != 0 {
        XSAVE_SIZE
    } else {
        YMM
    }
}

/// The parts of an image that belong to components; MXCSR, which belongs to two, is not among them.
fn parts(components: u64, registers: usize) -> impl Iterator<Item = Range<usize>> {
    [
        (X87, 0..MXCSR),
        (X87, ST..XMM),
        (SSE, XMM..XMM + 16 * registers),
        (AVX, YMM..YMM + 16 * registers),
    ]
    .into_iter()
    .filter(move |(component, _)| component & components != 0)
    .map(|(_, range)| range)
}

/// XSAVE, and XSAVEOPT, which leaves out components in their initial configuration.
fn xsave<const OPTIMISED: bool>(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let asked = requested(cpu);
    let size = size_of(asked);
    let linear = area(cpu, instruction, size, 64, true)?;
    cpu.probe_write(linear, size)?;
    let header = advance(cpu, linear, HEADER);
    let old: u64 = cpu.load(header)?;
    let mut image = *cpu.native.xsave_image();
    if !is_wide(instruction) {
        narrow(&mut image);
    }
    let registers = registers(cpu);
    let used = in_use(&image, registers) & asked;
    let saved = if OPTIMISED { used } else { asked };
    let mxcsr = (asked & (SSE | AVX) != 0).then_some(MXCSR..ST);
    for range in parts(saved, registers).chain(mxcsr) {
        let at = advance(cpu, linear, range.start);
        store_bytes(cpu, at, &image[range])?;
    }
    cpu.store(header, old & !asked | used)
}

/// XRSTOR of the standard format.
fn xrstor(cpu: &mut Cpu, instruction: &Instruction) -> Exec {
    let asked = requested(cpu);
    let size = size_of(asked);
    let linear = area(cpu, instruction, size, 64, false)?;
    let mut new = [0; XSAVE_SIZE];
    load_bytes(cpu, linear, &mut new[..size])?;
    let mut bits = [0; 8];
    bits.copy_from_slice(&new[HEADER..HEADER + 8]);
    let there = u64::from_le_bytes(bits);
    // XCOMP_BV is zero in the standard format; the compacted one is not offered.
    if there & !cpu.xcr0 != 0 || !all_zero(&new[HEADER + 8..HEADER + 24]) {
        return Err(cpu.gp());
    }
    if !is_wide(instruction) {
        narrow(&mut new);
    }
    let registers = registers(cpu);
    // What is not in the area takes its initial configuration.
    for range in parts(asked & !there, registers) {
        new[range].fill(0);
    }
    if asked & !there & X87 != 0 {
        new[..2].copy_from_slice(&INITIAL_FCW);
    }
    // MXCSR comes from the area in any case.
    let mxcsr = (asked & (SSE | AVX) != 0).then_some(MXCSR..ST);
    let mut image = *cpu.native.xsave_image();
    for range in parts(asked, registers).chain(mxcsr) {
        image[range.clone()].copy_from_slice(&new[range]);
    }
    load_image(cpu, &image)
}
