//! The jail of every Anemone process.
//!
//! ```ignore
//! anemone_sandbox::include_policies!();                       // at the root of the crate
//! let layers = anemone_sandbox::enter(&ProcessJail { parent_pid, ..Default::default() })?;
//! anemone_sandbox::restrict(&policies::MAIN, Mode::On)?;      // again in threads with a policy of their own
//! ```
//!
//! [`enter`] takes away what a process could reach: it can name no file, socket or process, has
//! no capability, and dies with its parent. [`restrict`] takes away system calls, by a policy of
//! the package's folder `policy` that `anemone_policy` compiles at build time.
//!
//! # What each layer costs
//! Processor time in microseconds, mean of 60 processes, Linux 6.18 on a virtual machine of two
//! cores; the same for root and for an ordinary user:
//!
//! | layer | µs | |
//! |---|---|---|
//! | user, mount, IPC, UTS and cgroup namespace, at once | 75 | separately 29 + 26 + 22 + 3 + 3 |
//! | root on a detached tmpfs | 36 | mounting one and `pivot_root`: 68; an unlinked directory: 65 |
//! | bounding set, 41 calls | 32 | |
//! | Landlock | 27 | |
//! | rlimits | 18 | |
//! | no_new_privs | 17 | |
//! | other capabilities | 3 | |
//! | a filter of 60 calls and 45 ioctl numbers | 60 | a list of comparisons, as seccompiler makes it: 218 |
//! | network namespace | 390 to 570 | left out |
//! | PID namespace, by the process that starts this one | 7 | capabilities kept over exec for [`enter`]: 1 |
//!
//! Together: [`enter`] 152 µs; the policies of a disk 55 (first thread) and 25 (each queue), those
//! of the VMM 67 (first thread) and 24 (each vCPU).
//!
//! A process that begins in a PID namespace of its own is the first there. It is told by the parent
//! that it does not see (`getppid` answers 0), and its user namespace is the one that the other
//! belongs to. As the first it dies of no signal that it sends itself, `abort` included, but of those
//! that the kernel forces on it: a fault, a denied call; and of SIGKILL from outside.
//!
//! A network namespace costs more than all else together, and without it there is no way to a
//! network either: no policy has `socket` or `connect`, and Landlock denies TCP and abstract
//! sockets. The mount namespace still contains the host's mounts, but nothing that names them:
//! the root is a file system outside of it, no descriptor refers to a directory, and the
//! capabilities to change the root again are gone.

mod crash;
mod filter;
mod ids;
mod jail;
mod landlock;
mod layers;
mod monitor;
mod names;
mod report;
mod seccomp;

use std::fmt;
use std::io;
use std::str::FromStr;

pub use filter::{ARCH_X86_64, Call, Filter, Instruction, evaluate, instruction};
pub use ids::id_namespace;
pub use jail::{ProcessJail, Share, close_extra_fds, enter, probe, renounce};
pub use landlock::{Access, Grant, landlock, landlock_version};
pub use layers::{Layer, Layers, ParseLayersError, State};
pub use names::syscall as syscall_name;
pub use seccomp::{rest, restrict};
use thiserror::Error;

/// What happens when a process does what its policy does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// It is reported and dies.
    #[default]
    On,
    /// It is reported and goes on. For development.
    Log,
}

impl FromStr for Mode {
    type Err = ParseModeError;

    fn from_str(text: &str) -> Result<Self, ParseModeError> {
        match text {
            "on" => Ok(Mode::On),
            "log" => Ok(Mode::Log),
            _ => Err(ParseModeError(text.to_owned())),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::On => "on",
            Mode::Log => "log",
        })
    }
}

/// A text is not a mode.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("sandbox mode `{0}` is unknown; allowed: on, log")]
pub struct ParseModeError(String);

/// Why a process cannot be jailed.
#[derive(Debug, Error)]
pub enum Error {
    /// The process that started this one is gone.
    #[error("the parent process {0} is gone")]
    ParentGone(u32),
    /// Credentials belong to threads: a jail for one of several would be none.
    #[error("the process has several threads already; the jail must come first")]
    Threads,
    /// A process that is to act for several users may not.
    #[error("cannot take the ids of other users: {0}")]
    Ids(#[source] io::Error),
    /// The kernel does not filter system calls.
    #[error("cannot install a system call filter: {0}")]
    Seccomp(#[source] io::Error),
    /// The thread that reports denials under [`Mode::Log`] cannot be started.
    #[error("cannot start the thread that reports denials: {0}")]
    Monitor(#[source] io::Error),
}

/// Makes the module `policies` of the filters that the build script has compiled with
/// `anemone_policy::compile`: for each `NAME.policy` a `pub const NAME: Filter`.
#[macro_export]
macro_rules! include_policies {
    () => {
        /// The system call policies of this program, compiled from its folder `policy`.
        pub(crate) mod policies {
            include!(concat!(env!("OUT_DIR"), "/policy.rs"));
        }
    };
}
