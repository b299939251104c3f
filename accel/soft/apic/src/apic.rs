//! One local APIC: its interrupts.

use std::sync::Arc;

use crate::mode::{self, BASE_ENABLE, BSP, DEFAULT_BASE, Mode};
use crate::registers::{
    ESR_RECEIVE_ILLEGAL, LVT_COUNT, LVT_ERROR, LVT_MASKED, LVT_TIMER, SVR_ENABLE, SVR_SUPPRESS_EOI,
    SVR_VECTOR,
};
use crate::router::{
    Address, Apics, DeliveryMode, EVENT_ILLEGAL, EVENT_INIT, EVENT_NMI, EVENT_STARTUP,
    FIRST_VECTOR, Port,
};
use crate::timer::{Deadline, Now, Timer, TimerMode};
use crate::vectors::Vectors;
use crate::{GeneralProtection, LocalSource::Pmi};

/// What [`Apic::poll`] found that is not an interrupt with a vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub struct Events {
    /// A non-maskable interrupt.
    pub nmi: bool,
    /// An INIT: the core resets itself, calls [`Apic::init`] and waits for a start-up message.
    /// It comes before `startup`. The bootstrap processor does not wait (SDM 10.4.2).
    pub init: bool,
    /// A start-up message with its page number. Means something only to a CPU that waits for one.
    pub startup: Option<u8>,
}

/// Sources of interrupts inside the CPU or wired to it (SDM 11.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalSource {
    /// Thermal sensor.
    Thermal = 1,
    /// Performance-monitoring counter overflow. Delivery masks the entry.
    Pmi = 2,
    /// Pin LINT0.
    Lint0 = 3,
    /// Pin LINT1, by convention NMI.
    Lint1 = 4,
}

/// The local APIC of one CPU. Belongs to that CPU's thread.
pub struct Apic {
    pub(crate) apics: Arc<Apics>,
    pub(crate) id: u32,
    /// IA32_APIC_BASE.
    pub(crate) base: u64,
    pub(crate) tpr: u8,
    pub(crate) ldr: u32,
    pub(crate) dfr: u32,
    pub(crate) svr: u32,
    /// Error status as software last latched it.
    pub(crate) esr: u32,
    /// Errors since.
    pub(crate) errors: u32,
    pub(crate) lvt: [u32; LVT_COUNT],
    /// In xAPIC mode the destination is in bits 63:56.
    pub(crate) icr: u64,
    pub(crate) irr: Vectors,
    pub(crate) isr: Vectors,
    pub(crate) tmr: Vectors,
    pub(crate) timer: Timer,
    /// An interrupt is to be delivered. Kept so that the check before every block of
    /// instructions is a load.
    ready: bool,
}

impl Apic {
    pub(crate) fn new(apics: Arc<Apics>, id: u32) -> Self {
        let mut apic = Self {
            apics,
            id,
            base: 0,
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            esr: 0,
            errors: 0,
            lvt: [0; LVT_COUNT],
            icr: 0,
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            timer: Timer::default(),
            ready: false,
        };
        apic.reset();
        let _ = apic.port().inbox.take_events();
        apic
    }

    pub(crate) fn port(&self) -> &Port {
        self.apics.port(self.id)
    }

    /// The state after power-up (SDM 11.4.7.1): xAPIC mode at the default address. CPU 0 is the
    /// bootstrap processor.
    pub fn reset(&mut self) {
        let bsp = if self.id == 0 { BSP } else { 0 };
        self.base = DEFAULT_BASE | BASE_ENABLE | bsp;
        self.init();
    }

    /// The state after INIT (SDM 11.4.7.3): as after power-up, but IA32_APIC_BASE stays. Drops
    /// interrupts that were on their way; events that came after the INIT stay.
    pub fn init(&mut self) {
        self.tpr = 0;
        self.ldr = 0;
        self.dfr = u32::MAX;
        self.svr = SVR_VECTOR;
        self.esr = 0;
        self.errors = 0;
        self.lvt = [LVT_MASKED; LVT_COUNT];
        self.icr = 0;
        self.irr = Vectors::default();
        self.isr = Vectors::default();
        self.tmr = Vectors::default();
        self.timer = Timer::default();
        self.port().inbox.take_vectors();
        self.changed();
    }

    /// IA32_APIC_BASE (MSR 0x1B).
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE (SDM 11.4.4, 11.12.5).
    ///
    /// # Errors
    /// Reserved bits, and the changes of mode that figure 11-27 does not have.
    pub fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        mode::check(value, &self.apics.features)?;
        let (from, to) = (self.mode(), Mode::of(value));
        mode::check_transition(from, to)?;
        self.base = value;
        match to {
            // An APIC that is switched on again is as after power-up.
            Mode::Disabled if from != to => self.init(),
            // The destination has another format; the manual does not promise to keep it.
            Mode::X2Apic if from != to => self.icr &= 0xFFFF_FFFF,
            _ => {}
        }
        self.changed();
        Ok(())
    }

    /// How software reaches the registers now.
    pub fn mode(&self) -> Mode {
        Mode::of(self.base)
    }

    /// The guest-physical page that holds the registers; `None` unless in xAPIC mode.
    pub fn mmio_page(&self) -> Option<u64> {
        (self.mode() == Mode::XApic).then_some(self.base & !0xFFF)
    }

    /// Whether [`poll`](Self::poll) has something to do besides the timer. A relaxed load.
    #[inline]
    pub fn attention(&self) -> bool {
        self.port().inbox.attention()
    }

    /// Takes what other threads sent and brings the timer to `now`. To be called when
    /// [`attention`](Self::attention) is true or the [deadline](Self::next_deadline) is due, and
    /// before the CPU halts.
    pub fn poll(&mut self, now: Now) -> Events {
        let mut events = Events::default();
        if self.attention() {
            let inbox = &self.port().inbox;
            inbox.open();
            let word = inbox.take_events();
            events = Events {
                nmi: word & EVENT_NMI != 0,
                init: word & EVENT_INIT != 0,
                startup: (word & EVENT_STARTUP != 0).then_some((word >> 8) as u8),
            };
            if word & EVENT_ILLEGAL != 0 {
                self.error(ESR_RECEIVE_ILLEGAL);
            }
            self.merge();
        }
        self.advance(now);
        events
    }

    /// Moves the vectors of the inbox into IRR and TMR.
    pub(crate) fn merge(&mut self) {
        let (edge, level) = self.port().inbox.take_vectors();
        if edge.is_empty() && level.is_empty() {
            return;
        }
        for i in 0..4 {
            self.irr.0[i] |= edge.0[i] | level.0[i];
            // Where both came, level: an EOI too many does no harm, one too few stops a device.
            self.tmr.0[i] = self.tmr.0[i] & !edge.0[i] | level.0[i];
        }
        self.refresh();
    }

    /// Brings the timer to `now`.
    pub(crate) fn advance(&mut self, now: Now) {
        let mode = TimerMode::of(self.lvt[LVT_TIMER]);
        if self.timer.poll(mode, now) {
            self.deliver_local(LVT_TIMER);
        }
    }

    /// When to [`poll`](Self::poll) for the timer at the latest; `None` if it will not interrupt.
    pub fn next_deadline(&self) -> Option<Deadline> {
        let masked = self.lvt[LVT_TIMER] & LVT_MASKED != 0;
        self.timer.deadline().filter(|_| !masked)
    }

    /// Whether [`acknowledge`](Self::acknowledge) would return an interrupt.
    #[inline]
    pub fn pending(&self) -> bool {
        self.ready
    }

    /// The interrupt that is to be delivered next, if any (SDM 11.8.4).
    pub fn pending_vector(&self) -> Option<u8> {
        let vector = self.irr.highest()?;
        (vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Takes the next interrupt into service: the core delivers it through the IDT.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending_vector()?;
        self.irr.clear(vector);
        self.isr.set(vector);
        self.refresh();
        Some(vector)
    }

    /// Processor priority (SDM 11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xF0;
        if self.tpr & 0xF0 >= in_service {
            self.tpr
        } else {
            in_service
        }
    }

    /// CR8: bits 7:4 of the task priority (SDM 11.8.6).
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// Writes CR8.
    ///
    /// # Errors
    /// Bits above 3 are reserved.
    pub fn set_cr8(&mut self, value: u64) -> Result<(), GeneralProtection> {
        match u8::try_from(value) {
            Ok(class @ 0..=15) => {
                self.set_tpr(class << 4);
                Ok(())
            }
            _ => Err(GeneralProtection),
        }
    }

    pub(crate) fn set_tpr(&mut self, tpr: u8) {
        if tpr != self.tpr {
            self.tpr = tpr;
            self.changed();
        }
    }

    /// Ends the interrupt of highest priority in service, as a write of EOI does (SDM 11.8.5).
    pub fn end_of_interrupt(&mut self) {
        let Some(vector) = self.isr.highest() else {
            return;
        };
        self.isr.clear(vector);
        self.refresh();
        if self.tmr.contains(vector) && self.svr & SVR_SUPPRESS_EOI == 0 {
            self.apics.platform.end_of_interrupt(vector);
        }
    }

    /// Whether the interrupt in service needs nothing of this APIC at its end but the end
    /// itself: edge-triggered, and no other waits. See [`crate::pv::PvEoi`].
    pub(crate) fn eoi_is_plain(&self) -> bool {
        self.irr.is_empty() && self.isr.highest().is_some_and(|v| !self.tmr.contains(v))
    }

    /// Signals a local interrupt source, which acts as its LVT entry says (SDM 11.5.1).
    pub fn raise(&mut self, source: LocalSource) {
        self.deliver_local(source as usize);
        if source == Pmi {
            self.lvt[source as usize] |= LVT_MASKED;
        }
    }

    pub(crate) fn deliver_local(&mut self, entry: usize) {
        let lvt = self.lvt[entry];
        if lvt & LVT_MASKED != 0 {
            return;
        }
        // These two have no delivery mode.
        let mode = if matches!(entry, LVT_TIMER | LVT_ERROR) {
            DeliveryMode::Fixed
        } else {
            DeliveryMode::from_bits(lvt >> 8)
        };
        match mode {
            DeliveryMode::Fixed if lvt as u8 >= FIRST_VECTOR => {
                let level = entry == LocalSource::Lint0 as usize && lvt >> 15 & 1 != 0;
                self.accept(lvt as u8, level);
            }
            DeliveryMode::Fixed if entry == LVT_ERROR => self.errors |= ESR_RECEIVE_ILLEGAL,
            DeliveryMode::Fixed => self.error(ESR_RECEIVE_ILLEGAL),
            DeliveryMode::Nmi | DeliveryMode::Init => {
                // No wake: this is the owner's thread.
                self.port().inbox.post_event(mode, 0);
            }
            _ => {}
        }
    }

    /// Records errors for the ESR and reports them (SDM 11.5.3).
    pub(crate) fn error(&mut self, bits: u32) {
        self.errors |= bits;
        self.deliver_local(LVT_ERROR);
    }

    /// Accepts an interrupt on the owner's thread.
    pub(crate) fn accept(&mut self, vector: u8, level: bool) {
        self.irr.set(vector);
        if level {
            self.tmr.set(vector);
        } else {
            self.tmr.clear(vector);
        }
        self.refresh();
    }

    pub(crate) fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    /// To be called after a change of what decides over delivery.
    pub(crate) fn refresh(&mut self) {
        self.ready = self.pending_vector().is_some();
    }

    /// To be called after a change of what senders look at; implies [`refresh`](Self::refresh).
    pub(crate) fn changed(&mut self) {
        self.refresh();
        self.port().publish(Address {
            mode: self.mode(),
            software_enabled: self.software_enabled(),
            logical: (self.ldr >> 24) as u8,
            clustered: self.dfr >> 28 == 0,
            priority: self.tpr >> 4,
        });
    }
}

impl Drop for Apic {
    fn drop(&mut self) {
        self.apics.release(self.id);
    }
}
