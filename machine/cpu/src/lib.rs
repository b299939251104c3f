//! CPU models: what CPUID tells a guest.
//!
//! A model is a frozen table. Two hosts that can both run `x86-64-v2-1` show a guest the same
//! features, caches, identification and topology, whatever their processors are; a change makes
//! `x86-64-v2-2`. Two things are the host's in every model: the vendor, because guests choose
//! instructions by it that the other vendor's processors do not have (SYSCALL and SYSENTER in
//! 32-bit code), and the number of physical address bits, which the host's page tables decide.
//!
//! `host` is not frozen: it passes on what the accelerator offers, with the topology of the VM.
//!
//! Sources: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; x86-64 psABI 1.0, 3.1.1
//! (microarchitecture levels); Linux Documentation/virt/kvm/x86/cpuid.rst.
#![forbid(unsafe_code)]

mod features;
mod leaf;
mod models;
mod topology;

pub use features::Feature;
pub use leaf::{Leaf, Register};
pub use models::{MODELS, Model};
use thiserror::Error;

/// Name of the model that is not frozen.
pub const HOST: &str = "host";

/// Why a model cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// There is no such model.
    #[error("CPU model `{0}` is unknown; there are {list}", list = names().join(", "))]
    Unknown(String),
    /// The accelerator on this host lacks features of the model.
    #[error("this host cannot provide CPU model `{model}`: it lacks {}", missing.join(", "))]
    Missing {
        /// The model.
        model: &'static str,
        /// Names of the features.
        missing: Vec<&'static str>,
    },
}

/// The names of all models, `host` among them.
pub fn names() -> Vec<&'static str> {
    std::iter::once(HOST)
        .chain(MODELS.iter().map(|m| m.name))
        .collect()
}

/// What CPUID tells on CPU `index` of `count` (1 to 255). `offered` is what the accelerator can
/// provide on this host, with the paravirtual leaves.
///
/// # Errors
/// [`Error::Unknown`] and [`Error::Missing`].
pub fn cpuid(model: &str, offered: &[Leaf], index: u32, count: u32) -> Result<Vec<Leaf>, Error> {
    let mut leaves = if model == HOST {
        offered.to_vec()
    } else {
        let model = Model::find(model)?;
        let missing = model.missing(offered);
        if !missing.is_empty() {
            return Err(Error::Missing {
                model: model.name,
                missing,
            });
        }
        model.leaves(offered)
    };
    topology::apply(&mut leaves, index, count);
    Ok(leaves)
}

#[cfg(test)]
mod tests;
