//! Which layers of the jail are in force.

use std::fmt;
use std::io;
use std::str::FromStr;

use thiserror::Error;

/// A layer of the jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// The process dies with its parent.
    ParentDeath,
    /// No core dumps; bounded descriptors and, where asked for, file size.
    ResourceLimits,
    /// A user namespace without any user.
    UserNamespace,
    /// No other process has a number here. It is begun in, and so for the process that starts this
    /// one to make.
    PidNamespace,
    /// A mount namespace of its own.
    MountNamespace,
    /// System V IPC and POSIX message queues of its own.
    IpcNamespace,
    /// A host name of its own.
    UtsNamespace,
    /// A root of the control groups of its own.
    CgroupNamespace,
    /// The root directory is empty and read-only.
    EmptyRoot,
    /// No capability is permitted, effective, inheritable or ambient.
    Capabilities,
    /// No capability can be gained by executing a program.
    BoundingSet,
    /// No privilege can be gained by executing a program.
    NoNewPrivileges,
    /// Landlock denies all that this kernel lets it deny: files, TCP ports, abstract sockets and
    /// signals outside.
    Landlock,
    /// Other processes of the same user can neither trace it nor look into its memory.
    NotDumpable,
    /// System calls can be filtered. That they are is up to [`restrict`](crate::restrict).
    SystemCallFilter,
}

impl Layer {
    /// All layers in the order of their application.
    pub const ALL: [Layer; 15] = [
        Layer::ParentDeath,
        Layer::ResourceLimits,
        Layer::UserNamespace,
        Layer::PidNamespace,
        Layer::MountNamespace,
        Layer::IpcNamespace,
        Layer::UtsNamespace,
        Layer::CgroupNamespace,
        Layer::EmptyRoot,
        Layer::Capabilities,
        Layer::BoundingSet,
        Layer::NoNewPrivileges,
        Layer::Landlock,
        Layer::NotDumpable,
        Layer::SystemCallFilter,
    ];

    /// Its name in texts.
    pub fn name(self) -> &'static str {
        match self {
            Layer::ParentDeath => "parent-death",
            Layer::ResourceLimits => "resource-limits",
            Layer::UserNamespace => "user-namespace",
            Layer::PidNamespace => "pid-namespace",
            Layer::MountNamespace => "mount-namespace",
            Layer::IpcNamespace => "ipc-namespace",
            Layer::UtsNamespace => "uts-namespace",
            Layer::CgroupNamespace => "cgroup-namespace",
            Layer::EmptyRoot => "empty-root",
            Layer::Capabilities => "capabilities",
            Layer::BoundingSet => "bounding-set",
            Layer::NoNewPrivileges => "no-new-privileges",
            Layer::Landlock => "landlock",
            Layer::NotDumpable => "not-dumpable",
            Layer::SystemCallFilter => "system-call-filter",
        }
    }
}

/// Whether a layer is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// It is.
    Active,
    /// The host refuses it, with this error number.
    Refused(i32),
    /// Nobody asked for it.
    #[default]
    NotAsked,
}

impl State {
    /// The state after a system call that answered like this.
    pub(crate) fn of(result: io::Result<()>) -> Self {
        match result {
            Ok(()) => State::Active,
            // All errors here come from the system.
            Err(e) => State::Refused(e.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}

/// The layers of one process.
///
/// As text, one layer a line: `NAME: active`, `NAME: not asked for` or
/// `NAME: refused, errno N (TEXT)`. [`FromStr`] reads what [`fmt::Display`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layers {
    states: [State; Layer::ALL.len()],
    landlock_abi: u32,
}

impl Layers {
    /// Bytes of the binary form.
    pub(crate) const BYTES: usize = 4 * (Layer::ALL.len() + 1);

    /// The state of a layer.
    pub fn state(&self, layer: Layer) -> State {
        self.states[layer as usize]
    }

    /// Whether a layer is in force.
    pub fn is_active(&self, layer: Layer) -> bool {
        self.state(layer) == State::Active
    }

    /// Version of Landlock's interface in use; 0 where there is none.
    pub fn landlock_abi(&self) -> u32 {
        self.landlock_abi
    }

    /// The layers that the host refuses.
    pub fn refused(&self) -> impl Iterator<Item = (Layer, io::Error)> {
        Layer::ALL
            .into_iter()
            .filter_map(|layer| match self.state(layer) {
                State::Refused(errno) => Some((layer, io::Error::from_raw_os_error(errno))),
                _ => None,
            })
    }

    pub(crate) fn set(&mut self, layer: Layer, state: State) {
        self.states[layer as usize] = state;
    }

    pub(crate) fn set_landlock_abi(&mut self, abi: u32) {
        self.landlock_abi = abi;
    }

    /// A form that can be made without allocating, for a forked child.
    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let numbers = self.states.iter().map(|state| match state {
            State::Active => 0,
            State::NotAsked => -1,
            State::Refused(errno) => *errno,
        });
        let numbers = numbers.chain([self.landlock_abi as i32]);
        for (four, number) in bytes.chunks_exact_mut(4).zip(numbers) {
            four.copy_from_slice(&number.to_ne_bytes());
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let mut layers = Self::default();
        let mut numbers = bytes
            .chunks_exact(4)
            .map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
        for (state, number) in layers.states.iter_mut().zip(&mut numbers) {
            *state = match number {
                0 => State::Active,
                -1 => State::NotAsked,
                errno => State::Refused(errno),
            };
        }
        layers.landlock_abi = numbers.next().unwrap_or(0) as u32;
        layers
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for layer in Layer::ALL {
            write!(f, "{}: ", layer.name())?;
            match self.state(layer) {
                State::Active if layer == Layer::Landlock => {
                    writeln!(f, "active, ABI {}", self.landlock_abi)?;
                }
                State::Active => writeln!(f, "active")?,
                State::NotAsked => writeln!(f, "not asked for")?,
                // The error's own text ends with "(os error N)"; the number stands in front here.
                State::Refused(errno) => {
                    let text = io::Error::from_raw_os_error(errno).to_string();
                    let text = text.split(" (os error").next().unwrap_or_default();
                    writeln!(f, "refused, errno {errno} ({text})")?;
                }
            }
        }
        Ok(())
    }
}

/// A text is not a list of layers.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{0}` is not a line like `landlock: active, ABI 7`")]
pub struct ParseLayersError(String);

impl FromStr for Layers {
    type Err = ParseLayersError;

    fn from_str(text: &str) -> Result<Self, ParseLayersError> {
        let mut layers = Self::default();
        for line in text.lines() {
            let wrong = || ParseLayersError(line.to_owned());
            let (name, state) = line.split_once(": ").ok_or_else(wrong)?;
            let layer = Layer::ALL
                .into_iter()
                .find(|l| l.name() == name)
                .ok_or_else(wrong)?;
            let state = if let Some(abi) = state.strip_prefix("active, ABI ") {
                layers.landlock_abi = abi.parse().map_err(|_| wrong())?;
                State::Active
            } else if let Some(rest) = state.strip_prefix("refused, errno ") {
                let errno = rest.split(' ').next().unwrap_or_default();
                State::Refused(errno.parse().map_err(|_| wrong())?)
            } else if state == "active" {
                State::Active
            } else if state == "not asked for" {
                State::NotAsked
            } else {
                return Err(wrong());
            };
            layers.set(layer, state);
        }
        Ok(layers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_round_trip() {
        let mut layers = Layers::default();
        layers.set(Layer::UserNamespace, State::Refused(libc::EPERM));
        layers.set(Layer::Landlock, State::Active);
        layers.set_landlock_abi(7);
        layers.set(Layer::EmptyRoot, State::Active);
        let text = layers.to_string();
        assert!(text.contains("user-namespace: refused, errno 1 (Operation not permitted)\n"));
        assert!(text.contains("landlock: active, ABI 7\n"));
        assert!(text.contains("parent-death: not asked for\n"));
        assert_eq!(text.parse(), Ok(layers));
        assert_eq!(Layers::from_bytes(&layers.to_bytes()), layers);
        assert_eq!(layers.refused().count(), 1);
        for bad in [
            "nonsense",
            "moon: active",
            "landlock: maybe",
            "landlock: active, ABI x",
        ] {
            assert_eq!(bad.parse::<Layers>(), Err(ParseLayersError(bad.to_owned())));
        }
    }
}
