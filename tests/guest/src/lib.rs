//! What the program that runs scenarios and xtask share: where they run, the lines of their
//! conversation, the checks of a jailed process as `/proc` shows it, and bytes and files to compare.

pub mod af_vsock;
pub mod jail;
pub mod pages;
pub mod pattern;
pub mod place;
pub mod protocol;
pub mod shared;
pub mod sockets;
pub mod streams;
