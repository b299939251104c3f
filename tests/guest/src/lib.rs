//! What the program that runs scenarios and xtask share: where they run, the lines of their
//! conversation, and the checks of a jailed process as `/proc` shows it.

pub mod jail;
pub mod place;
pub mod protocol;
