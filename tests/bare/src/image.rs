//! The guests' code, and the results that it leaves in guest memory.
//!
//! `guest/*.s` is one section of this program that is never executed here: it is copied into guest
//! memory. `guest/runtime.s` describes its layout, with the same numbers as the constants below.

use std::arch::global_asm;
use std::ffi::CStr;
use std::slice;

global_asm!(
    include_str!("../guest/runtime.s"),
    include_str!("../guest/real.s"),
    include_str!("../guest/privilege.s"),
    include_str!("../guest/protected.s"),
    include_str!("../guest/exceptions.s"),
    include_str!("../guest/paging.s"),
    include_str!("../guest/interrupts.s"),
    include_str!("../guest/processors.s"),
    include_str!("../guest/code.s"),
    include_str!("../guest/state.s"),
    include_str!("../guest/end.s"),
    options(att_syntax, raw)
);

unsafe extern "C" {
    static bare_image: u8;
    static bare_cases: u8;
    static bare_cases_end: u8;
    static bare_idt64: u8;
    static bare_idt32: u8;
    static bare_gdt: u8;
    static bare_gdt_end: u8;
    static bare_tss: u8;
}

/// Where the image lies in guest memory.
pub const IMAGE: u64 = 0x1000;
/// Where the results lie.
pub const RESULTS: u64 = 0x40000;
/// Bytes of a result.
const RECORD: usize = 24;
/// Results that have room.
const MOST_RESULTS: u32 = 2700;

/// How a case begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit code.
    Long,
    /// 32-bit protected mode without paging.
    Protected,
    /// 16-bit real mode.
    Real,
}

/// A guest of its own.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Name.
    pub name: &'static str,
    /// Address of its first instruction.
    pub entry: u64,
    /// Mode in which that is.
    pub mode: Mode,
    /// Number of CPUs.
    pub cpus: u32,
    /// It ends with a triple fault.
    pub triple_fault: bool,
    /// KVM, or the processor that the nested rig emulates below it, is known to be wrong. The
    /// case's comment says how.
    pub not_on_kvm: bool,
}

/// A table that the guests begin with.
#[derive(Debug, Clone, Copy)]
pub enum Table {
    /// IDT of long mode.
    Idt64,
    /// IDT of protected mode.
    Idt32,
    /// GDT.
    Gdt,
    /// Task-state segment.
    Tss,
}

/// The image.
pub fn bytes() -> &'static [u8] {
    let start = &raw const bare_image;
    // SAFETY: the cases follow the image's code and texts in one section; both are never written.
    unsafe { slice::from_raw_parts(start, (&raw const bare_cases).offset_from_unsigned(start)) }
}

/// Address of a table in guest memory.
pub fn table(table: Table) -> u64 {
    address(match table {
        Table::Idt64 => &raw const bare_idt64,
        Table::Idt32 => &raw const bare_idt32,
        Table::Gdt => &raw const bare_gdt,
        Table::Tss => &raw const bare_tss,
    })
}

/// Length of the GDT.
pub fn gdt_length() -> u64 {
    address(&raw const bare_gdt_end) - table(Table::Gdt)
}

fn address(symbol: *const u8) -> u64 {
    (symbol as u64)
        .wrapping_sub(&raw const bare_image as u64)
        .wrapping_add(IMAGE)
}

/// All cases in the order of the sources.
pub fn cases() -> Vec<Case> {
    let start = &raw const bare_cases;
    // SAFETY: both symbols delimit the table in one section.
    let table = unsafe {
        slice::from_raw_parts(
            start,
            (&raw const bare_cases_end).offset_from_unsigned(start),
        )
    };
    table
        .chunks_exact(12)
        .map(|entry| Case {
            name: text(word(entry, 0)).unwrap_or("?"),
            entry: word(entry, 4).into(),
            mode: match entry[8] {
                0 => Mode::Long,
                1 => Mode::Protected,
                _ => Mode::Real,
            },
            cpus: entry[9].into(),
            triple_fault: entry[10] != 0,
            not_on_kvm: entry[11] != 0,
        })
        .collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32
}

/// A text of the image.
fn text(address: u32) -> Option<&'static str> {
    let offset = u64::from(address).checked_sub(IMAGE)?;
    let bytes = bytes().get(usize::try_from(offset).ok()?..)?;
    CStr::from_bytes_until_nul(bytes).ok()?.to_str().ok()
}

/// What a guest has found, and what it should have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// What it is.
    pub got: String,
    /// What the manuals say it must be.
    pub want: String,
}

/// What a guest has left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Findings {
    /// Its results.
    Found(Vec<Finding>),
    /// The CPU does not offer what the case needs, according to CPUID.
    NotOffered,
}

/// Decodes the results area.
pub fn findings(area: &[u8]) -> Findings {
    let count = word(area, 0).min(MOST_RESULTS) as usize;
    let records = area[32..].chunks_exact(RECORD).take(count);
    let mut found = Vec::with_capacity(count);
    for record in records {
        let show = match word(record, 4) {
            0 => |value| format!("{value:#x}"),
            1 => exception,
            _ => return Findings::NotOffered,
        };
        found.push(Finding {
            name: text(word(record, 0)).unwrap_or("?"),
            got: show(long(record, 8)),
            want: show(long(record, 16)),
        });
    }
    Findings::Found(found)
}

/// Names of exceptions, and whether they have an error code (Intel SDM volume 3, table 6-1).
const EXCEPTIONS: &[(u64, &str, bool)] = &[
    (0, "#DE", false),
    (1, "#DB", false),
    (2, "NMI", false),
    (3, "#BP", false),
    (4, "#OF", false),
    (5, "#BR", false),
    (6, "#UD", false),
    (7, "#NM", false),
    (8, "#DF", true),
    (10, "#TS", true),
    (11, "#NP", true),
    (12, "#SS", true),
    (13, "#GP", true),
    (14, "#PF", true),
    (16, "#MF", false),
    (17, "#AC", true),
    (19, "#XM", false),
];

fn exception(value: u64) -> String {
    let (vector, moved, error) = (value >> 48, (value >> 32) as u16 as i16, value as u32);
    let mut text = match EXCEPTIONS.iter().find(|(number, ..)| *number == vector) {
        Some((_, name, true)) => format!("{name}({error:#x})"),
        Some((_, name, false)) => (*name).to_string(),
        None if vector == 0xFFFF => "none".to_string(),
        None => format!("vector-{vector:#x}"),
    };
    if moved != 0 {
        text.push_str(&format!("{moved:+}"));
    }
    text
}
