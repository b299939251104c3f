//! Task switches (SDM volume 3, chapter 7): they exist outside long mode only.

#[cfg(test)]
mod tests;

use anemone_accel_api::Segment;
use anemone_soft_mmu::cr0;

use crate::cpu::{Cpu, Exception, Exec, rflags, seg, vector};
use crate::system::far::Stack;
use crate::system::segment::{Descriptor, is_null, kind, rpl, virtual_8086_segment};

/// DR6.BT: the new task's debug trap flag.
const DR6_BT: u64 = 1 << 15;
/// DR7: breakpoints of the old task only.
const DR7_LOCAL: u64 = 0x155;

/// What leads to another task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    Jump,
    /// A call, an interrupt or an exception: the new task returns to the old one.
    Nested,
    Return,
}

/// Where a TSS has what, by its size. Instruction pointer, flags, general registers, segment
/// registers and LDT follow each other.
#[derive(Debug, Clone, Copy)]
struct Layout {
    word: usize,
    cr3: Option<u64>,
    registers: u64,
    segments: usize,
    debug: Option<u64>,
    least_limit: u32,
}

const WIDE: Layout = Layout {
    word: 4,
    cr3: Some(0x1C),
    registers: 0x20,
    segments: 6,
    debug: Some(0x64),
    least_limit: 0x67,
};

const NARROW: Layout = Layout {
    word: 2,
    cr3: None,
    registers: 0x0E,
    segments: 4,
    debug: None,
    least_limit: 0x2B,
};

impl Layout {
    fn of(kind: u8) -> Self {
        if kind & 8 != 0 { WIDE } else { NARROW }
    }

    /// Offset of the flags, general registers and segment registers, counted from the instruction
    /// pointer, which is number 0.
    fn register(&self, number: usize) -> u64 {
        self.registers + (number * self.word) as u64
    }
}

/// Numbers for [`Layout::register`].
const FLAGS: usize = 1;
const GENERAL: usize = 2;
const SEGMENTS: usize = 10;

/// What a TSS holds.
struct Task {
    rip: u64,
    flags: u64,
    general: [u64; 8],
    segments: [u16; 6],
    ldt: u16,
    cr3: Option<u64>,
    debug: bool,
}

impl Cpu {
    /// Switches to the task of a TSS. Returns its instruction pointer; if something in it is wrong,
    /// that is in [`Cpu::stopped`] then, for it happens in the new task. `next` and `flags` are
    /// what the old task goes on with; `error` is pushed in the new one.
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        cause: Cause,
        next: u64,
        flags: u64,
        error: Option<u32>,
        ext: u32,
    ) -> Exec<u64> {
        let (descriptor, tss) = self.incoming_tss(selector, cause, ext)?;
        let layout = Layout::of(tss.kind);
        let task = self.load_task(&tss, layout)?;
        // What a fault leaves half done here is only what the old task's next save writes again.
        self.save_task(next, flags)?;
        let old = self.tr.selector;
        if cause == Cause::Nested {
            self.store_system(self.system_address(tss.base), old)?;
        }
        if cause != Cause::Return {
            let access = descriptor.address.wrapping_add(5);
            self.update_system(access, |access| access | kind::BUSY)?;
        }
        if cause != Cause::Nested
            && let Some(old) = self.find_descriptor(old)?
        {
            let access = old.address.wrapping_add(5);
            self.update_system(access, |access| access & !kind::BUSY)?;
        }
        if let Some(cr3) = task.cr3 {
            self.write_cr3(cr3)?;
        }
        self.write_cr0(self.cr0 | cr0::TS)?;
        // From here on it is the new task.
        self.tr = tss;
        self.tr.kind |= kind::BUSY;
        self.set_dr7(self.dr[7] & !DR7_LOCAL);
        self.enter_task(&task, layout, cause);
        // What is wrong from here on is left in `stopped`.
        let _ = self.finish_task(&task, error, ext);
        Ok(task.rip)
    }

    /// The descriptor of the TSS to switch to.
    fn incoming_tss(
        &mut self,
        selector: u16,
        cause: Cause,
        ext: u32,
    ) -> Exec<(Descriptor, Segment)> {
        let returns = cause == Cause::Return;
        let which = if returns { vector::TS } else { vector::GP };
        if selector & 4 != 0 {
            return Err(self.refuse(which, selector, ext));
        }
        let descriptor = self.descriptor(selector, which, ext)?;
        let tss = Segment::from_descriptor(selector, descriptor.raw);
        let is_tss = descriptor.is_system() && tss.kind & 5 == 1;
        let busy = tss.kind & kind::BUSY != 0;
        if !is_tss || busy != returns {
            return Err(self.refuse(which, selector, ext));
        }
        if !tss.present {
            return Err(self.refuse(vector::NP, selector, ext));
        }
        if tss.limit < Layout::of(tss.kind).least_limit {
            return Err(self.refuse(vector::TS, selector, ext));
        }
        Ok((descriptor, tss))
    }

    fn load_word(&mut self, linear: u64, size: usize) -> Exec<u64> {
        let linear = self.system_address(linear);
        if size == 2 {
            Ok(self.load_system::<u16>(linear)?.into())
        } else {
            Ok(self.load_system::<u32>(linear)?.into())
        }
    }

    fn store_word(&mut self, linear: u64, value: u64, size: usize) -> Exec {
        let linear = self.system_address(linear);
        if size == 2 {
            self.store_system(linear, value as u16)
        } else {
            self.store_system(linear, value as u32)
        }
    }

    fn load_task(&mut self, tss: &Segment, layout: Layout) -> Exec<Task> {
        let mut word = |number| {
            let linear = tss.base.wrapping_add(layout.register(number));
            self.load_word(linear, layout.word)
        };
        let mut task = Task {
            rip: word(0)?,
            flags: word(FLAGS)?,
            general: [0; 8],
            segments: [0; 6],
            ldt: word(SEGMENTS + layout.segments)? as u16,
            cr3: None,
            debug: false,
        };
        for (number, general) in task.general.iter_mut().enumerate() {
            *general = word(GENERAL + number)?;
        }
        for (number, segment) in task.segments[..layout.segments].iter_mut().enumerate() {
            *segment = word(SEGMENTS + number)? as u16;
        }
        if self.cr0 & cr0::PG != 0
            && let Some(offset) = layout.cr3
        {
            task.cr3 = Some(self.load_word(tss.base.wrapping_add(offset), 4)?);
        }
        if let Some(offset) = layout.debug {
            task.debug = self.load_word(tss.base.wrapping_add(offset), 2)? & 1 != 0;
        }
        Ok(task)
    }

    /// Saves the old task in its TSS.
    fn save_task(&mut self, next: u64, flags: u64) -> Exec {
        let layout = Layout::of(self.tr.kind);
        if self.tr.limit < layout.least_limit {
            return Err(self.refuse(vector::TS, self.tr.selector, 0));
        }
        let mut words = [0; SEGMENTS + 6];
        words[0] = next;
        words[FLAGS] = flags;
        for number in 0..8 {
            words[GENERAL + number] = self.gpr(number);
        }
        for (number, segment) in self.segments.iter().enumerate() {
            words[SEGMENTS + number] = segment.selector.into();
        }
        for (number, word) in words[..SEGMENTS + layout.segments].iter().enumerate() {
            let linear = self.tr.base.wrapping_add(layout.register(number));
            // Of a segment only the selector is written.
            let size = if number < SEGMENTS { layout.word } else { 2 };
            self.store_word(linear, *word, size)?;
        }
        Ok(())
    }

    /// Sets the registers that need no check; the segment registers hold their selectors only.
    fn enter_task(&mut self, task: &Task, layout: Layout, cause: Cause) {
        let nested = if cause == Cause::Nested {
            rflags::NT
        } else {
            0
        };
        let old = if layout.word == 2 {
            self.rflags() & !0xFFFF
        } else {
            0
        };
        self.set_rflags((old | task.flags | nested) & !rflags::RF);
        for (number, value) in task.general.into_iter().enumerate() {
            let old = self.gpr(number);
            let kept = if layout.word == 2 { old & !0xFFFF } else { 0 };
            self.set_gpr(number, kept | value);
        }
        for (segment, selector) in self.segments.iter_mut().zip(task.segments) {
            *segment = Segment {
                selector,
                ..Segment::default()
            };
        }
        self.ldtr = Segment {
            selector: task.ldt,
            ..Segment::default()
        };
        let level = if self.virtual_8086() {
            3
        } else {
            rpl(task.segments[seg::CS])
        };
        self.segments[seg::SS].dpl = level;
        self.set_cpl(level);
        self.update_bases();
    }

    /// Loads LDTR and the segment registers of the new task.
    fn load_task_segments(&mut self, task: &Task, ext: u32) -> Exec {
        if !is_null(task.ldt) {
            let in_gdt = task.ldt & 4 == 0;
            let descriptor = self.descriptor(task.ldt, vector::TS, ext)?;
            let is_ldt = descriptor.is_system() && descriptor.kind() == kind::LDT;
            if !in_gdt || !is_ldt || !descriptor.is_present() {
                return Err(self.refuse(vector::TS, task.ldt, ext));
            }
            self.ldtr = Segment::from_descriptor(task.ldt, descriptor.raw);
        }
        for number in [seg::CS, seg::SS, seg::DS, seg::ES, seg::FS, seg::GS] {
            let selector = task.segments[number];
            let segment = if self.virtual_8086() {
                virtual_8086_segment(selector)
            } else {
                self.task_segment(number, selector, ext)?
            };
            self.set_segment(number, segment);
        }
        Ok(())
    }

    fn task_segment(&mut self, number: usize, selector: u16, ext: u32) -> Exec<Segment> {
        if is_null(selector) {
            if matches!(number, seg::CS | seg::SS) {
                return Err(self.refuse(vector::TS, selector, ext));
            }
            return Ok(self.segments[number]);
        }
        let descriptor = self.descriptor(selector, vector::TS, ext)?;
        let (dpl, level) = (descriptor.dpl(), self.cpl);
        let good = match number {
            seg::CS if descriptor.is_conforming() => dpl <= level,
            seg::CS => descriptor.is_code() && dpl == level,
            seg::SS => descriptor.is_writable() && dpl == level && rpl(selector) == level,
            _ => {
                let reachable = descriptor.is_conforming() || level.max(rpl(selector)) <= dpl;
                descriptor.is_readable() && reachable
            }
        };
        if !good {
            return Err(self.refuse(vector::TS, selector, ext));
        }
        if !descriptor.is_present() {
            let which = if number == seg::SS {
                vector::SS
            } else {
                vector::NP
            };
            return Err(self.refuse(which, selector, ext));
        }
        self.mark_accessed(descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// What happens in the new task: its segment registers are loaded and checked, the error code
    /// of the exception that led to it is pushed, its debug trap comes.
    fn finish_task(&mut self, task: &Task, error: Option<u32>, ext: u32) -> Exec {
        self.load_task_segments(task, ext)?;
        let code = self.segments[seg::CS];
        self.check_target(&code, task.rip, 0)?;
        if let Some(error) = error {
            let size = Layout::of(self.tr.kind).word;
            let mut stack = Stack::current(self, 0);
            stack.push(self, &[error.into()], size)?;
            stack.commit(self);
        }
        if task.debug {
            self.dr[6] |= DR6_BT;
            return Err(self.raise(Exception::plain(vector::DB)));
        }
        Ok(())
    }
}
