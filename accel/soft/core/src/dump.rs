//! The state of a CPU for people.

use std::fmt::Write;

use crate::cpu::{Cpu, seg};

const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8 ", "r9 ", "r10", "r11", "r12",
    "r13", "r14", "r15",
];
const SEGMENTS: [(&str, usize); 6] = [
    ("cs", seg::CS),
    ("ss", seg::SS),
    ("ds", seg::DS),
    ("es", seg::ES),
    ("fs", seg::FS),
    ("gs", seg::GS),
];

impl Cpu {
    /// A register dump.
    pub fn dump(&self) -> String {
        let mut text = format!(
            "CPU {}: rip {:#018x} rflags {:#x} cpl {} {:?}\n",
            self.index,
            self.rip,
            self.rflags(),
            self.cpl,
            self.code_size()
        );
        for (number, name) in GENERAL.iter().enumerate() {
            let end = if number % 4 == 3 { '\n' } else { ' ' };
            let _ = write!(text, "{name} {:016x}{end}", self.gpr(number));
        }
        for (name, number) in SEGMENTS {
            let s = &self.segments[number];
            let _ = writeln!(
                text,
                "{name} {:04x} base {:016x} limit {:08x} type {:x} dpl {} {}",
                s.selector,
                s.base,
                s.limit,
                s.kind,
                s.dpl,
                if s.present { "present" } else { "unusable" }
            );
        }
        let paging = self.mmu.paging();
        let _ = write!(
            text,
            "cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x} xcr0 {:x}\n\
             gdt {:x}+{:x} idt {:x}+{:x} tr {:04x} base {:x}",
            self.cr0,
            self.cr2,
            paging.cr3,
            self.cr4,
            self.efer,
            self.xcr0,
            self.gdtr.base,
            self.gdtr.limit,
            self.idtr.base,
            self.idtr.limit,
            self.tr.selector,
            self.tr.base
        );
        text
    }
}
