//! What the first program of the nested rig's outer guest and xtask share: the lines of their
//! conversation, and the checks of a jailed process as `/proc` shows it.

pub mod jail;
pub mod protocol;
