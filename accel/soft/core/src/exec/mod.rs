//! Instructions carried out as a whole: complete in every mode, with any operand. The fast
//! operations of [`crate::hot`] are short cuts of some of them.

mod bits;
mod branch;
mod flags;
#[cfg(test)]
mod harness;
mod hint;
mod integer;
mod operand;
mod stack;
mod string;
#[cfg(test)]
mod tests;
mod transfer;
pub(crate) mod vector;

use iced_x86::Instruction;

use crate::block::Handler;
use crate::system;

/// The function that carries out an instruction; `None` if this CPU does not have it.
pub(crate) fn handler(instruction: &Instruction) -> Option<Handler> {
    integer::handler(instruction)
        .or_else(|| string::handler(instruction))
        .or_else(|| system::handler(instruction))
        .or_else(|| vector::handler(instruction))
}
