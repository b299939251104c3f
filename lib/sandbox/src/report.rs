//! One line about a denied call, from places where nothing may allocate or lock: a signal
//! handler, and the monitor of other threads that may hold any lock.

use std::fmt::{self, Write as _};

use std::sync::atomic::{AtomicI32, Ordering};

use crate::filter::Call;

/// The id of this process as others know it; 0 while it is not known.
static PROCESS: AtomicI32 = AtomicI32::new(0);

/// Asks for the id of this process, once. In a PID namespace of its own the process is number 1; the
/// host's `/proc` has the number that others know, as long as a path leads there. Allocates nothing.
pub(crate) fn remember_process() {
    if PROCESS.load(Ordering::Relaxed) != 0 {
        return;
    }
    let mut name = [0u8; 16];
    // SAFETY: the call writes at most the length given, without a NUL.
    let length = unsafe {
        let path = c"/proc/self".as_ptr();
        libc::readlink(path, name.as_mut_ptr().cast(), name.len())
    };
    let name = usize::try_from(length).ok().and_then(|n| name.get(..n));
    let pid = name.and_then(|name| str::from_utf8(name).ok()?.parse().ok());
    PROCESS.store(
        pid.unwrap_or(std::process::id().cast_signed()),
        Ordering::Relaxed,
    );
}

/// The id of this process as others know it.
pub(crate) fn process() -> i32 {
    PROCESS.load(Ordering::Relaxed)
}

/// Text of bounded length on the stack; what is too long is cut off.
pub(crate) struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.length..];
        let n = room.len().min(text.len());
        room[..n].copy_from_slice(&text.as_bytes()[..n]);
        self.length += n;
        Ok(())
    }
}

impl Line {
    pub(crate) fn new() -> Self {
        Self {
            bytes: [0; 512],
            length: 0,
        }
    }

    /// Writes the line to standard error in one call.
    pub(crate) fn print(mut self) {
        if self.length == self.bytes.len() {
            self.bytes[self.length - 1] = b'\n';
        }
        // SAFETY: the buffer is initialised up to its length. Nothing can be done about an error.
        unsafe { libc::write(libc::STDERR_FILENO, self.bytes.as_ptr().cast(), self.length) };
    }
}

/// The name of a thread as the kernel has it: at most 15 bytes and a NUL.
pub(crate) struct ThreadName(pub(crate) [u8; 16]);

impl fmt::Display for ThreadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let length = self.0.iter().position(|b| *b == 0).unwrap_or(self.0.len());
        // Only a piece of this process chose it, but it may be cut inside a character.
        f.write_str(std::str::from_utf8(&self.0[..length]).unwrap_or("?"))
    }
}

/// A denied call and who made it.
pub(crate) struct Denied<'a> {
    /// Its number in the PID namespace of the process.
    pub(crate) thread: i32,
    pub(crate) thread_name: ThreadName,
    pub(crate) call: Call,
    pub(crate) policy: &'a str,
    /// Under [`Mode::Log`](crate::Mode::Log), how often the call was let through so far.
    pub(crate) let_through: Option<u32>,
}

impl Denied<'_> {
    /// Writes the line to standard error.
    pub(crate) fn print(&self) {
        let mut line = Line::new();
        let [a, b, c, d, e, f] = self.call.arguments;
        let role = anemone_log::role();
        // Writing to a `Line` cannot fail.
        let _ = write!(
            line,
            "{role}: denied: process {}, thread {} \"{}\": {} ({}) args [{a:#x}, {b:#x}, {c:#x}, \
             {d:#x}, {e:#x}, {f:#x}] at rip {:#x}; not in policy \"{}\"",
            process(),
            self.thread,
            self.thread_name,
            self.call.name(),
            self.call.number,
            self.call.instruction_pointer,
            self.policy,
        );
        let _ = match self.let_through {
            None => line.write_str("\n"),
            Some(count) => writeln!(line, "; let through (call {count} of this kind)"),
        };
        line.print();
    }
}
