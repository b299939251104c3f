//! The real `anemone` in front of programs that play its children.

#![expect(clippy::unwrap_used, reason = "what fails here fails a test")]

mod bad_input;
mod common;
mod control;
mod lifecycle;
mod recovery;
mod terminal;
