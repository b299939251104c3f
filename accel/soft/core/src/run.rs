//! The loop that runs blocks.

use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anemone_accel_api::Bus;
use anemone_soft_apic::{Deadline, Now};
use anemone_soft_mmu::ATTENTION_MMU;
use iced_x86::Mnemonic;

use crate::block::{Block, ModeKey, Step};
use crate::cpu::{Activity, Cpu, Exception, Exec, Stopped, reg, rflags, seg, vector};
use crate::signals::{ATTENTION_APIC, ATTENTION_CODE, ATTENTION_KICK};
use crate::system::{Event, Shutdown};

/// Blocks between two looks at the clock.
const CLOCK_INTERVAL: u32 = 256;

/// DR6.BS: single step.
const DR6_BS: u64 = 1 << 14;

/// Why [`Cpu::run`] came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// [`ATTENTION_KICK`] was raised.
    Kicked,
    /// Triple fault.
    TripleFault,
    /// The engine cannot carry on; the message has a register dump.
    Internal(String),
}

/// What comes before the next block.
enum Turn {
    Exit(Exit),
    Run,
    /// One instruction, then look again.
    Single,
    /// An exception is still to be delivered.
    Deliver,
}

impl Cpu {
    /// Runs guest code.
    pub fn run(&mut self, bus: &dyn Bus) -> Exit {
        // SAFETY: only the lifetime changes; the pointer is cleared before `bus` ends.
        let bus =
            unsafe { std::mem::transmute::<NonNull<dyn Bus + '_>, NonNull<dyn Bus>>(bus.into()) };
        self.bus = Some(bus);
        self.mmu.unpark();
        let exit = self.turns();
        self.settle_pv_eoi();
        self.native.sync();
        self.mmu.park();
        self.bus = None;
        exit
    }

    fn turns(&mut self) -> Exit {
        self.apic_changed();
        loop {
            match self.prepare() {
                Turn::Exit(exit) => return exit,
                Turn::Run => self.blocks_until_event(),
                Turn::Single => self.single(),
                Turn::Deliver => {}
            }
            if let Some(exit) = self.deliver_stopped() {
                return exit;
            }
        }
    }

    /// Answers other threads, takes interrupts, sleeps while halted.
    fn prepare(&mut self) -> Turn {
        if self.shadow_at.take() == Some(self.rip) {
            self.shadow = true;
        }
        loop {
            let word = self.signals.word().load(Ordering::Relaxed);
            if word & ATTENTION_MMU != 0 {
                self.mmu.poll();
                self.blocks.new_epoch();
            }
            if word & ATTENTION_CODE != 0 && self.signals.take(ATTENTION_CODE) {
                self.drop_written_code();
            }
            if word & ATTENTION_KICK != 0 && self.signals.take(ATTENTION_KICK) {
                return Turn::Exit(Exit::Kicked);
            }
            if self.blocks.is_full() {
                self.blocks.collect();
            }
            if self.stopped.is_none()
                && let Some(turn) = self.events()
            {
                return turn;
            }
            if self.stopped.is_some() {
                return Turn::Deliver;
            }
            if self.activity == Activity::Running {
                let step = self.shadow || self.system_flags & rflags::TF != 0;
                self.offer_pv_eoi();
                return if step { Turn::Single } else { Turn::Run };
            }
            self.sleep();
        }
    }

    /// Interrupts, INIT and start-up messages; `Some` if the CPU is over.
    fn events(&mut self) -> Option<Turn> {
        self.signals.take(ATTENTION_APIC);
        let look = self.clock_left == 0 || self.activity != Activity::Running;
        if self.apic.attention() || look && self.timer_is_due() {
            let now = self.apic_now();
            self.poll_apic(now);
        }
        if self.activity == Activity::WaitForStartup || self.shadow {
            return None;
        }
        let event = if self.nmi_pending && !self.nmi_blocked {
            self.nmi_pending = false;
            Event::Nmi
        } else if self.system_flags & rflags::IF != 0 && self.apic.pending() {
            self.settle_pv_eoi();
            let vector = self.apic.acknowledge()?;
            log::trace!(target: "soft::exit", "CPU {}: interrupt {vector:#x}", self.index);
            Event::External(vector)
        } else {
            return None;
        };
        match self.deliver(event) {
            Ok(()) => None,
            Err(Shutdown) => Some(Turn::Exit(self.triple_fault())),
        }
    }

    /// Takes what came to the APIC.
    pub(crate) fn poll_apic(&mut self, now: Now) {
        let events = self.apic.poll(now);
        self.apic_changed();
        self.nmi_pending |= events.nmi;
        if events.init {
            log::trace!(target: "soft::exit", "CPU {}: INIT", self.index);
            self.init();
            self.apic.init();
            self.apic_changed();
            self.blocks.new_epoch();
            self.activity = if self.index == 0 {
                Activity::Running
            } else {
                Activity::WaitForStartup
            };
        }
        if let Some(page) = events.startup
            && self.activity == Activity::WaitForStartup
        {
            log::trace!(target: "soft::exit", "CPU {}: start-up at page {page:#x}", self.index);
            self.startup(page);
        }
    }

    /// Whether the APIC's timer has something to do.
    fn timer_is_due(&self) -> bool {
        self.shared.clock.tsc(self.msrs.tsc_offset) >= self.deadline_tsc
    }

    /// Waits for another thread or the timer.
    fn sleep(&mut self) {
        log::trace!(target: "soft::exit", "CPU {}: waits", self.index);
        let limit = if self.activity == Activity::Halted {
            self.apic.next_deadline().map(|deadline| {
                let now = self.shared.clock.now_with(self.msrs.tsc_offset);
                Duration::from_nanos(match deadline {
                    Deadline::Bus(at) => at.saturating_sub(now.bus),
                    Deadline::Tsc(at) => self
                        .shared
                        .clock
                        .ticks_to_nanoseconds(at.saturating_sub(now.tsc)),
                })
            })
        } else {
            None
        };
        // x87 state stays in the registers: nothing but this thread's sleep comes between.
        self.mmu.park();
        if limit != Some(Duration::ZERO) {
            self.signals.sleep(!ATTENTION_MMU, limit);
        }
        self.mmu.unpark();
        self.blocks.new_epoch();
    }

    /// Runs blocks until something wants attention or the state of the machine changes.
    fn blocks_until_event(&mut self) {
        let mode = self.mode_key(false);
        self.leave_block = false;
        let Ok(mut block) = self.next_block(mode) else {
            return;
        };
        loop {
            if self.clock_left == 0 {
                if self.timer_is_due() {
                    return;
                }
                self.clock_left = CLOCK_INTERVAL;
            }
            self.clock_left -= 1;
            if self.signals.word().load(Ordering::Relaxed) != 0 {
                return;
            }
            // SAFETY: a block in use is freed by `collect` only, which `prepare` calls.
            let current: &Block = unsafe { block.as_ref() };
            self.set_gpr(reg::BLOCK, self.rip);
            let mut op = current.ops.as_ptr();
            let step = loop {
                // SAFETY: the last operation of a block never answers Next.
                let this = unsafe { &*op };
                #[cfg(debug_assertions)]
                self.trace(current, this);
                match (this.run.get())(self, this) {
                    // SAFETY: so there is one more.
                    Step::Next => op = unsafe { op.add(1) },
                    other => break other,
                }
            };
            // SAFETY: as above.
            let last = unsafe { &*op };
            block = match step {
                Step::Fall | Step::Taken => {
                    let link = &current.links[usize::from(last.extra)];
                    match link.get(self.blocks.epoch, self.rip) {
                        Some(next) => next,
                        None => {
                            let epoch = self.blocks.epoch;
                            let Ok(next) = self.next_block(mode) else {
                                return;
                            };
                            // SAFETY: as above.
                            let crosses = unsafe { next.as_ref() }.second.is_some();
                            // A block that crosses pages is looked up each time.
                            if epoch == self.blocks.epoch && !crosses {
                                link.set(epoch, self.rip, next);
                            }
                            next
                        }
                    }
                }
                Step::Indirect => {
                    let Ok(next) = self.next_block(mode) else {
                        return;
                    };
                    next
                }
                Step::Next | Step::Leave => return,
                Step::Trap => {
                    self.trapped(last);
                    return;
                }
            };
        }
    }

    /// The block at RIP, entered into the jump cache. `Err` leaves the exception to be delivered
    /// with RIP as it is.
    #[inline(always)]
    fn next_block(&mut self, mode: ModeKey) -> Exec<NonNull<Block>> {
        match self.blocks.cached(self.rip, mode) {
            Some(block) => Ok(block),
            None => self.find_block(mode),
        }
    }

    #[inline(never)]
    fn find_block(&mut self, mode: ModeKey) -> Exec<NonNull<Block>> {
        let block = self.block(mode)?;
        // SAFETY: it was just found or made.
        if unsafe { block.as_ref() }.second.is_none() {
            self.blocks.remember(self.rip, block);
        }
        Ok(block)
    }

    /// Executes one instruction, in trace mode or in an interrupt shadow.
    fn single(&mut self) {
        let traced = self.system_flags & rflags::TF != 0;
        let shadow = std::mem::take(&mut self.shadow);
        self.leave_block = false;
        let Ok(block) = self.block(self.mode_key(true)) else {
            return;
        };
        self.set_gpr(reg::BLOCK, self.rip);
        // SAFETY: a block in use is freed by `collect` only, which `prepare` calls.
        let current: &Block = unsafe { block.as_ref() };
        let (first, end) = (&current.ops[0], &current.ops[1]);
        match (first.run.get())(self, first) {
            Step::Next => {
                (end.run.get())(self, end);
            }
            Step::Trap => return self.trapped(first),
            _ => {}
        }
        // The trap after MOV SS is lost, so that SS and RSP change as one.
        let held_off = self.shadow;
        // STI and MOV SS in a shadow make no new one.
        if shadow {
            self.shadow = false;
        }
        // INT n, SYSCALL and their like clear TF and are not followed by a trap; POPF and IRET may
        // clear it and are (SDM volume 3, 17.3.1.4).
        let returns = current.wholes.first().is_some_and(|whole| {
            matches!(
                whole.instruction.mnemonic(),
                Mnemonic::Popf
                    | Mnemonic::Popfd
                    | Mnemonic::Popfq
                    | Mnemonic::Iret
                    | Mnemonic::Iretd
                    | Mnemonic::Iretq
            )
        });
        let remains = self.system_flags & rflags::TF != 0;
        if traced && !held_off && (remains || returns) {
            self.dr[6] |= DR6_BS;
            self.stopped = Some(Stopped::Exception(Exception::plain(vector::DB)));
        }
    }

    /// Logs an instruction; only debug builds have it, for it costs even when it is off.
    #[cfg(debug_assertions)]
    fn trace(&self, block: &Block, op: &crate::block::Op) {
        let start = usize::from(op.offset);
        let end = (start + usize::from(op.length)).min(block.bytes.len());
        log::trace!(
            target: "soft::instruction",
            "CPU {}: {:#x}: {:02x?}",
            self.index,
            self.at(op),
            &block.bytes[start.min(end)..end]
        );
    }

    /// Puts RIP at the operation that did not complete.
    pub(crate) fn trapped(&mut self, op: &crate::block::Op) {
        self.rip = self.at(op) & self.code_mask();
        // A stack access out of the canonical range raises #SS where others raise #GP.
        if let Some(Stopped::Exception(exception)) = &mut self.stopped
            && *exception == Exception::NON_CANONICAL
        {
            *exception = if usize::from(op.segment) == seg::SS {
                Exception::with(vector::SS, 0)
            } else {
                Exception::GP0
            };
        }
    }

    /// Delivers the exception that the last instruction raised, if it did.
    fn deliver_stopped(&mut self) -> Option<Exit> {
        match self.stopped.take()? {
            Stopped::Exception(exception) => {
                log::trace!(
                    target: "soft::exit",
                    "CPU {}: exception {} {:?} {:#x} at {:#x}",
                    self.index, exception.vector, exception.error, exception.address, self.rip
                );
                match self.deliver(Event::Exception(exception)) {
                    Ok(()) => None,
                    Err(Shutdown) => Some(self.triple_fault()),
                }
            }
            Stopped::Internal(what) => Some(Exit::Internal(format!("{what}\n{}", self.dump()))),
        }
    }

    fn triple_fault(&mut self) -> Exit {
        log::debug!("CPU {}: triple fault\n{}", self.index, self.dump());
        Exit::TripleFault
    }

    /// Takes decoded code out of use that was overwritten.
    #[cold]
    pub(crate) fn drop_written_code(&mut self) {
        for written in self.shared.code.take(self.index) {
            self.blocks.drop_written(written);
        }
    }

    /// Logs an instruction that this CPU does not have.
    #[cold]
    pub(crate) fn report_undefined(&mut self, bytes: &[u8]) {
        anemone_log::warn_limited!(
            "CPU {}: no instruction with the bytes {bytes:02x?} at {:#x} ({:?}, privilege level {}): #UD",
            self.index,
            self.rip,
            self.code_size(),
            self.cpl,
        );
    }
}
