//! System-call policies: from a text file with a reason on each line to a BPF program, at build
//! time.
//!
//! A build script calls [`compile`] on the folder of its package's policies; the package then
//! writes `anemone_sandbox::include_policies!();` and finds one `Filter` per file. Nothing of
//! this crate is part of a program that runs.
//!
//! # The language
//! One rule per line; a line that starts with `#` is a comment. What no line names is denied.
//! ```text
//! # SYSCALL [CONDITION …] [debug] [errno=NAME]  # REASON
//! write                                       # answers to the front end
//! ioctl arg1==KVM_RUN|KVM_GET_REGS            # run the guest, and show its registers when it fails
//! mmap arg2&PROT_EXEC==0                      # heap and thread stacks, never code
//! clone3 errno=ENOSYS                         # its flags are out of a filter's sight: fall back to clone
//! include base
//! ```
//! - A condition is one test or several separated by `|`, of which one must hold. Conditions
//!   separated by white space must all hold. Several lines for one system call are alternatives,
//!   tried in the order of the file.
//! - A test is `argN==VALUE` or `argN&MASK==VALUE`, N from 0 to 5; a bare value after `|` repeats
//!   the left side. It looks at the low 32 bits, which is what the kernel itself looks at where
//!   the parameter is an `int`, an `unsigned int` or a set of flags; `argN:64` takes all of it.
//! - A value is a number (decimal, or hexadecimal with `0x`) or a constant of the kernel's
//!   headers; flags are joined with `+`. [`symbols`] lists the constants.
//! - The word `debug` after the conditions limits a rule to builds of cargo's profile `dev`.
//! - A reason that begins with `rare: ` is for what the tests cannot bring about; `cargo xtask
//!   policy` reports all other rules that they do not use.
//! - `errno=NAME` makes the call fail with that error instead of allowing it, silently.
//! - `include NAME` takes the lines of `NAME.policy` in the same folder, or in the folder `common`
//!   of this crate. Filters stack, and a thread inherits what the thread that starts it has: so
//!   the policy of a process's first thread includes those of the others.
//! - The reason is mandatory, and a rule that another makes pointless is an error; only the very
//!   same rule may stand in several files.
//!
//! Every policy must allow what the report of a denial needs ([`REPORTER`]).
//!
//! # The program
//! System calls are found by binary search, so that all cost about the same at run time, and the
//! kernel, which at installation walks the program once for every system call number to learn
//! which are always allowed, is done soon: a policy of 60 calls and 45 ioctl numbers installs in
//! 60 µs, where a list of comparisons takes 220 µs. The architecture is checked first: a call
//! through another system-call table kills the process. See [`Policy::program`].

#![forbid(unsafe_code)]

mod bpf;
mod generate;
mod parse;
mod symbols;

use std::path::{Path, PathBuf};

pub use bpf::{Denial, Instruction};
pub use generate::{compile, describe};
pub use parse::{Action, Place, Policy, Rule, Test};
pub use symbols::{symbols, syscall_name, syscall_number, syscalls};
use thiserror::Error;

/// System calls that the report of a denial makes; a policy that lacks one is an error.
pub const REPORTER: &[&str] = &["write"];

/// What is wrong with a policy.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or folder cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A folder of policies holds none.
    #[error("{}: there is no file with the extension .policy here", .0.display())]
    Empty(PathBuf),
    /// A line is not a rule of the language.
    #[error("{place}: found {found}; allowed: {allowed}")]
    Syntax {
        /// File and line.
        place: Place,
        /// What stands there.
        found: String,
        /// What could stand there.
        allowed: String,
    },
    /// A rule can never decide anything.
    #[error("{place}: {rule} is decided by {earlier} already; allowed: one of the two")]
    Duplicate {
        /// File and line of the later rule.
        place: Place,
        /// The later rule.
        rule: String,
        /// File and line of the other.
        earlier: Place,
    },
    /// The reporter of denials could not work under this policy.
    #[error(
        "{file}: `{syscall}` is not allowed, which the report of a denial needs; see `include base`"
    )]
    Reporter {
        /// The policy's file.
        file: String,
        /// The system call that is missing.
        syscall: &'static str,
    },
    /// The kernel takes at most 4096 instructions.
    #[error("policy {name} compiles to {length} instructions; allowed: 4096")]
    TooLong {
        /// The policy.
        name: String,
        /// Its length.
        length: usize,
    },
}

/// Reads all policies of a folder, sorted by name.
pub fn load(folder: &Path) -> Result<Vec<Policy>, Error> {
    let file_error = |source| Error::File {
        path: folder.to_owned(),
        source,
    };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(file_error)? {
        let path = entry.map_err(file_error)?.path();
        if path.extension().is_some_and(|e| e == "policy") {
            paths.push(path);
        }
    }
    paths.sort();
    if paths.is_empty() {
        return Err(Error::Empty(folder.to_owned()));
    }
    paths.iter().map(|path| load_file(path)).collect()
}

fn load_file(path: &Path) -> Result<Policy, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    Policy::parse(&name, &path.display().to_string(), &text, &|other| {
        let file = format!("{other}.policy");
        [path.with_file_name(&file), common_folder().join(&file)]
            .into_iter()
            .find_map(|path| {
                let text = std::fs::read_to_string(&path).ok()?;
                Some((path.display().to_string(), text))
            })
    })
}

/// The folder of the fragments that `include` takes.
pub fn common_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("common")
}
