//! Why a command did not succeed.

use std::io;

use thiserror::Error as ThisError;

use crate::{accel, acpi_dump, files, programs, registry, spawn, tap};

/// Why a command did not succeed.
#[derive(Debug, ThisError)]
pub enum Error {
    /// The configuration file is wrong.
    #[error(transparent)]
    File(#[from] anemone_config::Error),
    /// The configuration contradicts itself.
    #[error(transparent)]
    Invalid(#[from] anemone_config::Invalid),
    /// The configuration asks for something that is not in this build.
    #[error(transparent)]
    NotInBuild(#[from] registry::NotInBuild),
    /// A file of the configuration cannot be used.
    #[error(transparent)]
    Open(#[from] files::OpenError),
    /// A tap of the configuration cannot be used.
    #[error(transparent)]
    Tap(#[from] tap::TapError),
    /// No accelerator.
    #[error(transparent)]
    Accel(#[from] accel::Unavailable),
    /// A program is not there.
    #[error(transparent)]
    Program(#[from] programs::NotFound),
    /// The VMM cannot build the machine.
    #[error("{0}")]
    Refused(String),
    /// A program could not be started.
    #[error(transparent)]
    Spawn(#[from] spawn::Error),
    /// The ACPI tables could not be written.
    #[error(transparent)]
    AcpiDump(#[from] acpi_dump::Error),
    /// A process could not be told something.
    #[error(transparent)]
    Channel(#[from] anemone_ipc::Error),
    /// The command names a VM that does not run, or several.
    #[error("{0}")]
    NoSuchVm(String),
    /// The VM failed.
    #[error("{0}")]
    Failed(String),
    /// The system refused something the supervisor needs.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl Error {
    /// 2 for what the user can put right in the configuration, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::File(_)
            | Self::Invalid(_)
            | Self::NotInBuild(_)
            | Self::Open(_)
            | Self::Tap(_)
            | Self::Accel(_)
            | Self::Program(_)
            | Self::NoSuchVm(_)
            | Self::Refused(_) => 2,
            Self::Spawn(_)
            | Self::AcpiDump(_)
            | Self::Channel(_)
            | Self::Failed(_)
            | Self::System { .. } => 1,
        }
    }
}

/// For `map_err`: says what was tried.
pub fn system(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// Text of another process, fit for a terminal: one line without control characters, of bounded
/// length.
pub fn printable(text: &str) -> String {
    const LONGEST: usize = 1000;
    let mut line: String = text
        .trim()
        .chars()
        .take(LONGEST)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if text.trim().chars().nth(LONGEST).is_some() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_is_tamed() {
        assert_eq!(printable("a\x1b[2Jb\nc\n"), "a [2Jb c");
        assert_eq!(printable(&"x".repeat(5000)).chars().count(), 1001);
    }
}
