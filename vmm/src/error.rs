//! Why a machine cannot be built or run.

use thiserror::Error;

/// An error that ends this process. Before the guest runs its text goes to the user.
#[derive(Debug, Error)]
pub enum Error {
    /// A system call failed.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The configuration cannot be built.
    #[error("{0}")]
    Config(String),
    /// The supervisor broke the protocol.
    #[error("control protocol: {0}")]
    Protocol(&'static str),
    /// The control channel failed.
    #[error("{0}")]
    Channel(#[from] anemone_ipc::Error),
    /// A descriptor that the supervisor should have left is not there.
    #[error("{0}")]
    Inherited(#[from] anemone_process::Error),
    /// The accelerator failed.
    #[error("{0}")]
    Accel(#[from] anemone_accel_api::Error),
    /// The kernel cannot be loaded.
    #[error("{0}")]
    Boot(#[from] anemone_boot::Error),
    /// A device's back end does not serve.
    #[error("device `{id}`: {source}")]
    Device {
        /// Its id.
        id: String,
        /// What is wrong.
        source: anemone_virtio::Error,
    },
    /// The jail could not be entered.
    #[error("sandbox: {0}")]
    Jail(#[from] anemone_sandbox::Error),
}

impl Error {
    /// For `map_err` on a system call.
    pub fn os(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Os { what, source }
    }
}
