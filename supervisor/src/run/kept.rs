//! Descriptors that a device process has kept for the one that replaces it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use anemone_ipc::device::ToDevice;
use anemone_ipc::{Channel, MAX_FDS};
use anemone_log::warn_limited;

/// What one device has had kept, by its keys. The device process is not trusted: there is room for
/// so many and no more.
#[derive(Debug, Default)]
pub struct Kept {
    room: usize,
    fds: BTreeMap<u64, OwnedFd>,
}

impl Kept {
    /// Room for this many.
    pub fn new(room: usize) -> Self {
        Self {
            room,
            fds: BTreeMap::new(),
        }
    }

    /// Keeps a descriptor, in place of the one with the same key. Without room it is not kept.
    pub fn keep(&mut self, id: &str, key: u64, fd: OwnedFd) {
        if self.fds.len() >= self.room && !self.fds.contains_key(&key) {
            warn_limited!(
                "device `{id}`: wants more than {} descriptors kept; a process that replaces it \
                 will lack some",
                self.room
            );
            return;
        }
        self.fds.insert(key, fd);
    }

    /// Forgets one.
    pub fn forget(&mut self, key: u64) {
        self.fds.remove(&key);
    }

    /// Gives copies of all to a process that has just been started.
    pub fn give(&self, channel: &Channel) -> Result<(), anemone_ipc::Error> {
        let all: Vec<_> = self.fds.iter().collect();
        for some in all.chunks(MAX_FDS) {
            let keys = some.iter().map(|(key, _)| **key).collect();
            let fds: Vec<_> = some.iter().map(|(_, fd)| fd.as_fd()).collect();
            channel.send(&ToDevice::Kept { keys }, &fds)?;
        }
        Ok(())
    }
}
