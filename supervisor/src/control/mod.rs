//! The control socket of a running VM: what others may ask it, and how they find it.
//!
//! Every running VM listens at `FOLDER/NAME-PID.sock`, or `FOLDER/PID.sock` if it has no name. A
//! client sends one request as a line of JSON and gets one line back, as often as it likes
//! ([`protocol`]). The folder belongs to the user and is open to nobody else, and the VM looks at
//! who has connected all the same: its own user or root.

pub mod client;
mod folder;
pub mod protocol;
pub mod server;
