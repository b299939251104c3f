//! What an operating system sees: modes, segments, control transfers between privilege levels,
//! exceptions and interrupts, control and model-specific registers, CPUID.

mod apic;
mod control;
pub(crate) mod cpuid;
mod far;
mod flags;
mod interrupt;
mod io;
pub(crate) mod msr;
mod reset;
mod segment;
mod syscall;
mod task;

use iced_x86::Instruction;

pub(crate) use interrupt::{Event, Shutdown};

use crate::block::Handler;

/// The function that carries out a system instruction.
pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    segment::handler(instruction)
        .or_else(|| far::handler(instruction))
        .or_else(|| interrupt::handler(instruction))
        .or_else(|| syscall::handler(instruction))
        .or_else(|| control::handler(instruction))
        .or_else(|| flags::handler(instruction))
        .or_else(|| io::handler(instruction))
        .or_else(|| msr::handler(instruction))
        .or_else(|| cpuid::handler(instruction))
}
