//! The system bus between the local APICs: who is meant by a message, and the inboxes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use anemone_accel_api::MsiMessage;

use crate::vectors::Vectors;
use crate::{Apic, Features, Mode, Platform};

/// Most CPUs of a VM: an 8-bit destination has one value for "all" and 255 for CPUs.
pub const MAX_CPUS: u32 = 255;

/// Vectors below are reserved for exceptions and cannot be interrupts (SDM 11.5.2).
pub(crate) const FIRST_VECTOR: u8 = 16;

/// What a message does at its destination (SDM 11.6.1, ICR bits 10:8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryMode {
    /// Interrupt with a vector, to every CPU addressed.
    Fixed,
    /// Interrupt with a vector, to the one CPU addressed whose task priority is lowest.
    LowestPriority,
    /// System-management interrupt: dropped, there is no SMM.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// Back to the state after reset, then wait for a start-up message.
    Init,
    /// Start in real mode at `vector << 12`.
    StartUp,
    /// Interrupt of an 8259: dropped, there is none.
    ExtInt,
    /// Not defined: dropped.
    Reserved,
}

impl DeliveryMode {
    /// Decodes the three bits of ICR, LVT entry or MSI data.
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }

    /// Whether it makes an interrupt with a vector.
    pub(crate) fn has_vector(self) -> bool {
        matches!(self, Self::Fixed | Self::LowestPriority)
    }
}

/// The CPUs that a message addresses (SDM 11.6.2 and 11.12.9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Every CPU.
    All,
    /// Every CPU but this one.
    AllBut(u32),
    /// The CPU with this id. All-ones in the sender's width means every CPU.
    Physical {
        /// APIC id.
        id: u32,
        /// The sender addresses with 32 bits (x2APIC) rather than 8.
        wide: bool,
    },
    /// The CPUs whose logical id matches. All-ones in the sender's width means every CPU.
    Logical {
        /// Message destination address.
        address: u32,
        /// The sender addresses with 32 bits (x2APIC) rather than 8.
        wide: bool,
    },
}

/// A message on the system bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Who is meant.
    pub destination: Destination,
    /// What it does.
    pub mode: DeliveryMode,
    /// Interrupt vector, or page number of a start-up message.
    pub vector: u8,
    /// Level-triggered: its EOI goes to the I/O APICs.
    pub level: bool,
}

impl Message {
    /// Decodes a message-signalled interrupt (SDM 11.11). `None` if the address does not lie
    /// in 0xFEEx_xxxx, the only range that means an interrupt.
    ///
    /// Bit 14 of the data (assert) is not looked at, nor does KVM: an interrupt controller that
    /// wants no interrupt sends no message.
    pub fn from_msi(msi: MsiMessage) -> Option<Self> {
        if msi.address >> 20 != 0xFEE {
            return None;
        }
        let id = (msi.address >> 12 & 0xFF) as u32;
        let redirect = msi.address >> 3 & 1 != 0;
        let logical = msi.address >> 2 & 1 != 0;
        let mode = DeliveryMode::from_bits(msi.data >> 8);
        Some(Self {
            destination: if logical {
                Destination::Logical {
                    address: id,
                    wide: false,
                }
            } else {
                Destination::Physical { id, wide: false }
            },
            mode: if redirect && logical && mode == DeliveryMode::Fixed {
                DeliveryMode::LowestPriority
            } else {
                mode
            },
            vector: msi.data as u8,
            level: msi.data >> 15 & 1 != 0,
        })
    }
}

/// What senders must know of an APIC, packed into one word so that it is always consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) mode: Mode,
    /// SVR bit 8.
    pub(crate) software_enabled: bool,
    /// Logical id of xAPIC mode: bits 31:24 of the LDR.
    pub(crate) logical: u8,
    /// DFR selects the cluster model rather than the flat one.
    pub(crate) clustered: bool,
    /// Bits 7:4 of the task priority.
    pub(crate) priority: u8,
}

impl Address {
    fn pack(self) -> u32 {
        let mode = match self.mode {
            Mode::Disabled => 0,
            Mode::XApic => 1,
            Mode::X2Apic => 2,
        };
        mode | u32::from(self.software_enabled) << 2
            | u32::from(self.clustered) << 3
            | u32::from(self.priority) << 4
            | u32::from(self.logical) << 8
    }

    fn unpack(word: u32) -> Self {
        Self {
            mode: match word & 3 {
                0 => Mode::Disabled,
                1 => Mode::XApic,
                _ => Mode::X2Apic,
            },
            software_enabled: word >> 2 & 1 != 0,
            clustered: word >> 3 & 1 != 0,
            priority: (word >> 4 & 0xF) as u8,
            logical: (word >> 8) as u8,
        }
    }

    /// Whether a logical destination that is not a broadcast means CPU `id`.
    fn matches(self, id: u32, address: u32) -> bool {
        match self.mode {
            Mode::Disabled => false,
            Mode::X2Apic => {
                let own = logical_x2apic_id(id);
                own >> 16 == address >> 16 && own & address & 0xFFFF != 0
            }
            Mode::XApic => {
                let (own, Ok(address)) = (self.logical, u8::try_from(address)) else {
                    return false;
                };
                if self.clustered {
                    own >> 4 == address >> 4 && own & address & 0xF != 0
                } else {
                    own & address != 0
                }
            }
        }
    }
}

/// The LDR of x2APIC mode (SDM 11.12.10.2): cluster in the upper half, one bit in the lower.
pub(crate) fn logical_x2apic_id(id: u32) -> u32 {
    id >> 4 << 16 | 1 << (id & 15)
}

/// Event bits of an inbox; the page of the start-up message is in bits 15:8.
pub(crate) const EVENT_NMI: u32 = 1;
pub(crate) const EVENT_INIT: u32 = 1 << 1;
pub(crate) const EVENT_STARTUP: u32 = 1 << 2;
pub(crate) const EVENT_ILLEGAL: u32 = 1 << 3;

/// What other threads leave for a CPU.
#[derive(Default)]
#[repr(align(128))]
pub(crate) struct Inbox {
    /// Something was left since the owner last looked.
    ///
    /// Senders set it after leaving something, the owner clears it before taking. All of that
    /// is sequentially consistent, so either the owner takes what a sender left, or the sender
    /// sees false and wakes the owner again.
    attention: AtomicBool,
    events: AtomicU32,
    edge: [AtomicU64; 4],
    level: [AtomicU64; 4],
}

impl Inbox {
    pub(crate) fn attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }

    /// True if the owner has to be woken.
    fn notify(&self) -> bool {
        // The load first: it keeps the line shared while a CPU is slow to look.
        !self.attention.load(Ordering::SeqCst) && !self.attention.swap(true, Ordering::SeqCst)
    }

    /// Leaves an event. True if the owner has to be woken.
    pub(crate) fn post_event(&self, mode: DeliveryMode, vector: u8) -> bool {
        match mode {
            DeliveryMode::Nmi => {
                self.events.fetch_or(EVENT_NMI, Ordering::SeqCst);
            }
            // INIT undoes a start-up message that has not been seen yet.
            DeliveryMode::Init => self.update_events(|e| e & 0xFF & !EVENT_STARTUP | EVENT_INIT),
            // Of several start-up messages the first one ends the wait, the others are ignored.
            DeliveryMode::StartUp => self.update_events(|e| {
                if e & EVENT_STARTUP != 0 {
                    e
                } else {
                    e | EVENT_STARTUP | u32::from(vector) << 8
                }
            }),
            _ => return false,
        }
        self.notify()
    }

    fn update_events(&self, f: impl Fn(u32) -> u32) {
        let mut old = self.events.load(Ordering::SeqCst);
        while let Err(now) =
            self.events
                .compare_exchange_weak(old, f(old), Ordering::SeqCst, Ordering::SeqCst)
        {
            old = now;
        }
    }

    /// Leaves an interrupt. True if the owner has to be woken.
    fn post_vector(&self, vector: u8, level: bool) -> bool {
        if vector < FIRST_VECTOR {
            self.events.fetch_or(EVENT_ILLEGAL, Ordering::SeqCst);
        } else {
            let words = if level { &self.level } else { &self.edge };
            words[usize::from(vector >> 6)].fetch_or(1 << (vector & 63), Ordering::SeqCst);
        }
        self.notify()
    }

    /// Begins a look into the inbox: what is left from now on notifies again.
    pub(crate) fn open(&self) {
        self.attention.store(false, Ordering::SeqCst);
    }

    pub(crate) fn take_events(&self) -> u32 {
        self.events.swap(0, Ordering::SeqCst)
    }

    /// Takes edge- and level-triggered vectors.
    pub(crate) fn take_vectors(&self) -> (Vectors, Vectors) {
        let take = |words: &[AtomicU64; 4]| {
            Vectors(std::array::from_fn(|i| {
                // Most words are empty, and a read does not take the line from the senders.
                // A bit missed by it comes with a new notification.
                if words[i].load(Ordering::SeqCst) == 0 {
                    0
                } else {
                    words[i].swap(0, Ordering::SeqCst)
                }
            }))
        };
        (take(&self.edge), take(&self.level))
    }
}

/// The part of an APIC that all threads see.
#[derive(Default)]
pub(crate) struct Port {
    pub(crate) inbox: Inbox,
    /// [`Address`], on a cache line of its own: it seldom changes while the inbox always does.
    address: Line<AtomicU32>,
    taken: AtomicBool,
}

#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

impl Port {
    fn address(&self) -> Address {
        Address::unpack(self.address.0.load(Ordering::Acquire))
    }

    pub(crate) fn publish(&self, address: Address) {
        let word = address.pack();
        // The owner is the only writer, so comparing first is sound and spares the line.
        if self.address.0.load(Ordering::Relaxed) != word {
            self.address.0.store(word, Ordering::Release);
        }
    }
}

/// All local APICs of a VM, seen from outside. Shared by every thread.
pub struct Apics {
    ports: Box<[Port]>,
    pub(crate) platform: Box<dyn Platform>,
    pub(crate) features: Features,
}

impl Apics {
    /// The APICs of a VM of at most `cpus` CPUs (1 to [`MAX_CPUS`]; more are cut off). Until a
    /// CPU's [`Apic`] exists, messages to it are dropped.
    pub fn new(cpus: u32, features: Features, platform: Box<dyn Platform>) -> Arc<Self> {
        Arc::new(Self {
            ports: (0..cpus.min(MAX_CPUS)).map(|_| Port::default()).collect(),
            platform,
            features,
        })
    }

    /// Number of CPUs, those without an [`Apic`] included.
    pub fn cpus(&self) -> u32 {
        self.ports.len() as u32
    }

    /// Makes the APIC of CPU `cpu`, in its state after reset. `None` if there is no such CPU or
    /// its APIC exists. Dropping it makes room for a new one.
    pub fn create(self: &Arc<Self>, cpu: u32) -> Option<Apic> {
        let port = self.ports.get(cpu as usize)?;
        if port.taken.swap(true, Ordering::AcqRel) {
            return None;
        }
        Some(Apic::new(self.clone(), cpu))
    }

    /// The port of an existing CPU.
    pub(crate) fn port(&self, cpu: u32) -> &Port {
        &self.ports[cpu as usize]
    }

    /// Makes room for a new [`Apic`] of this CPU.
    pub(crate) fn release(&self, cpu: u32) {
        let port = self.port(cpu);
        port.address.0.store(0, Ordering::Release);
        port.taken.store(false, Ordering::Release);
    }

    /// Sends a message-signalled interrupt. Returns how many CPUs took it; none do if they are
    /// disabled, if there are none, or if the address is not one of interrupts.
    pub fn signal_msi(&self, msi: MsiMessage) -> u32 {
        Message::from_msi(msi).map_or(0, |m| self.send(&m))
    }

    /// Sends any message. Returns how many CPUs took it.
    pub fn send(&self, message: &Message) -> u32 {
        self.send_from(None, message).0
    }

    /// Makes CPU `cpu` poll soon although nothing was sent: for timers kept by another thread.
    pub fn nudge(&self, cpu: u32) {
        if self
            .ports
            .get(cpu as usize)
            .is_some_and(|p| p.inbox.notify())
        {
            self.platform.wake(cpu);
        }
    }

    /// Sends a message of CPU `from`, which handles its own copy itself. Returns how many other
    /// CPUs took it and whether there is a copy for the sender.
    pub(crate) fn send_from(&self, from: Option<u32>, message: &Message) -> (u32, bool) {
        let (mut taken, mut to_self) = (0, false);
        let mut one = |cpu: u32| {
            if from == Some(cpu) {
                to_self = true;
            } else {
                taken += 1;
                self.post(cpu, message);
            }
        };
        if message.mode == DeliveryMode::LowestPriority {
            if let Some(cpu) = self.arbitrate(message) {
                one(cpu);
            }
        } else {
            self.targets(message, |cpu, _| one(cpu));
        }
        (taken, to_self)
    }

    fn post(&self, cpu: u32, message: &Message) {
        let inbox = &self.port(cpu).inbox;
        let wake = if message.mode.has_vector() {
            inbox.post_vector(message.vector, message.level)
        } else {
            inbox.post_event(message.mode, message.vector)
        };
        if wake {
            self.platform.wake(cpu);
        }
    }

    /// The one addressed CPU that takes a lowest-priority message (SDM 11.6.2.4). Among equals
    /// the vector decides, so that different interrupts spread and each stays where its data is
    /// cached.
    fn arbitrate(&self, message: &Message) -> Option<u32> {
        let mut lowest = u8::MAX;
        let mut candidates = Vectors::default();
        let mut count = 0;
        self.targets(message, |cpu, address| {
            if address.priority < lowest {
                lowest = address.priority;
                candidates = Vectors::default();
                count = 0;
            }
            if address.priority == lowest {
                // At most MAX_CPUS of them, so a CPU number fits.
                candidates.set(cpu as u8);
                count += 1;
            }
        });
        let skip = u32::from(message.vector).checked_rem(count)?;
        (0..self.cpus())
            .filter(|cpu| candidates.contains(*cpu as u8))
            .nth(skip as usize)
    }

    /// Calls `f` for every CPU that takes the message.
    fn targets(&self, message: &Message, mut f: impl FnMut(u32, Address)) {
        // Only enabled APICs take interrupts, but all that are on the bus take the rest.
        let takes = |a: Address| {
            a.mode != Mode::Disabled && (a.software_enabled || !message.mode.has_vector())
        };
        let mut visit = |cpu: u32| {
            let address = self.ports.get(cpu as usize).map(Port::address);
            if let Some(address) = address.filter(|a| takes(*a)) {
                f(cpu, address);
            }
        };
        let everyone = |wide: bool| if wide { u32::MAX } else { 0xFF };
        match message.destination {
            Destination::All => (0..self.cpus()).for_each(visit),
            Destination::AllBut(not) => (0..self.cpus()).filter(|c| *c != not).for_each(visit),
            Destination::Physical { id: a, wide } | Destination::Logical { address: a, wide }
                if a == everyone(wide) =>
            {
                (0..self.cpus()).for_each(visit);
            }
            Destination::Physical { id, .. } => visit(id),
            // Senders in x2APIC mode have receivers in x2APIC mode, whose logical ids follow
            // from their numbers.
            Destination::Logical {
                address,
                wide: true,
            } => {
                let cluster = address >> 16;
                for bit in (0..16).filter(|bit| address >> bit & 1 != 0) {
                    visit(cluster << 4 | bit);
                }
            }
            Destination::Logical { address, .. } => {
                for (cpu, port) in (0..).zip(&self.ports) {
                    let to = port.address();
                    if takes(to) && to.matches(cpu, address) {
                        f(cpu, to);
                    }
                }
            }
        }
    }
}
