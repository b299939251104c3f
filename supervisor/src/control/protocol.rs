//! What a client asks of a running VM, and the answers. Each is one line of JSON.

use std::fmt;
use std::path::PathBuf;

use anemone_ipc::device::Balloon;
use serde::{Deserialize, Serialize};

/// Most bytes of a request, with the end of its line.
pub const MAX_REQUEST: usize = 4096;
/// Most bytes of a response that a client takes.
pub const MAX_RESPONSE: u64 = 1 << 20;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What the VM is made of, and how it is.
    Status,
    /// Put another process in the place of a device's, in which what is in flight is finished
    /// first. The program at its path is started, which may be a newer one.
    RestartDevice {
        /// Id of the device.
        id: String,
    },
    /// How the memory balloon is.
    Balloon {
        /// How large it is to be from now on, in bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    /// Press the guest's power button.
    PowerButton,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Response {
    /// To [`Request::Status`].
    Status(Box<Status>),
    /// The device is served by another process.
    Restarted {
        /// Milliseconds for which the guest has waited.
        pause: f64,
    },
    /// To [`Request::Balloon`].
    Balloon(BalloonState),
    /// It is done.
    Done,
    /// It is not.
    Failed {
        /// Why.
        message: String,
    },
}

/// A memory balloon. All but the target is what the guest says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BalloonState {
    /// How large it is to be, in bytes.
    pub target: u64,
    /// How large it is, in bytes.
    pub actual: u64,
    /// The guest's statistics as it told them last; none before its driver has told any.
    pub statistics: Vec<Statistic>,
}

/// One of a guest's statistics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Statistic {
    /// Its name, such as `free memory`.
    pub name: String,
    /// Its value.
    pub value: u64,
    /// Whether that is a number of bytes; otherwise of times.
    pub bytes: bool,
}

impl From<&Balloon> for BalloonState {
    fn from(state: &Balloon) -> Self {
        let known = state.statistics.iter().filter_map(|&(tag, value)| {
            let (name, bytes) = Balloon::statistic(tag)?;
            Some(Statistic {
                name: name.to_owned(),
                value,
                bytes,
            })
        });
        Self {
            target: state.target,
            actual: state.actual,
            statistics: known.collect(),
        }
    }
}

impl fmt::Display for BalloonState {
    /// In a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        write!(f, "{} of {}", mib(self.actual), mib(self.target))?;
        for statistic in &self.statistics {
            let value = match statistic.bytes {
                true => mib(statistic.value),
                false => statistic.value.to_string(),
            };
            write!(f, ", {} {value}", statistic.name)?;
        }
        Ok(())
    }
}

/// A running VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Status {
    /// Its name; without one, the process id of its supervisor.
    pub name: String,
    /// Process id of its supervisor.
    pub pid: u32,
    /// `starting`, `running`, `stopping`, or `disconnected`: the guest has reset and waits for an
    /// external back end.
    pub phase: String,
    /// Accelerator: `kvm`, `soft` or `none`.
    pub accel: String,
    /// Its processes: the supervisor, the VMM, the devices in their order, the serial port.
    pub processes: Vec<Process>,
}

/// A process of a VM, or a back end that somebody else has started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Process {
    /// `supervisor`, `vmm`, or the kind of device: `blk`, `console`, …
    pub role: String,
    /// Id of the device, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Process id; none while there is no process, and for external back ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// The program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// The socket of an external back end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// `serving`, or `lost`: the guest waits for it.
    pub state: String,
    /// How often another process has taken its place.
    pub restarts: u64,
    /// Milliseconds for which the guest has waited the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_pause: Option<f64>,
    /// What it sees of guest memory: `none`, `shared` (all of it), or `bounce` (a region of its own,
    /// through which the VMM copies).
    pub memory: String,
    /// Version of Landlock's interface that its jail uses, as it has told; 0 where the host has none.
    /// Absent for back ends that somebody else has started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub landlock: Option<u32>,
    /// What it may open by name then: paths, and what for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reaches: Vec<String>,
    /// Why the guest has never used the device, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub untouched: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_is_described_in_a_line() {
        let state = BalloonState::from(&Balloon {
            target: 300 << 20,
            actual: 3 << 19,
            statistics: vec![(4, 1 << 30), (2, 7), (99, 1)],
        });
        assert_eq!(
            state.to_string(),
            "1.5 MiB of 300.0 MiB, free memory 1024.0 MiB, major faults 7"
        );
        let request: Request = serde_json::from_str("{\"balloon\":{}}").unwrap();
        assert_eq!(request, Request::Balloon { size: None });
    }
}
