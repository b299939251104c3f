//! Sockets between the guest and the host.

use std::fmt;
use std::path::PathBuf;

use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::short::Short;
use crate::value::{Exposure, Id, Within};
use crate::vm::{Backend, Device, Invalid, Kind, Names, exposure, refuse_empty};

/// PCI slot unless the configuration names another.
const SLOT: u16 = 5;
/// Receive, transmit and events (virtio 1.3, 5.10.2).
const QUEUES: u16 = 3;
/// Longest path in bytes: the kernel takes 107, and an underscore and a port of ten digits follow.
const MAX_PATH: usize = 96;

/// Sockets between the guest and the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address, by default 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cid: Option<Cid>,
    /// UNIX socket at which programs of this host connect to the guest; with `_` and a port's number
    /// behind it, where the guest connects to programs of this host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Name in messages, by default `vsock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Program to use in place of `anemone-vsock`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
}

impl Short for Vsock {
    const MAIN_KEY: Option<&'static str> = Some("socket");
}

impl Vsock {
    /// Fills in the defaults and checks.
    pub(crate) fn resolve(&mut self, names: &mut Names) -> Result<Device, Invalid> {
        let id = names.take_id(&mut self.id, "vsock")?;
        let binary = self.binary.clone();
        refuse_empty(&format!("{id}: binary"), binary.as_deref())?;
        let socket = self
            .socket
            .clone()
            .ok_or_else(|| Invalid::NoSocket(id.to_string()))?;
        refuse_empty(&format!("{id}: socket"), Some(&socket))?;
        let length = socket.as_os_str().len();
        if length > MAX_PATH {
            return Err(Invalid::LongSocket {
                owner: id.to_string(),
                length,
                most: MAX_PATH,
            });
        }
        let cid = *self.cid.get_or_insert_default();
        let backend = Backend::Process(binary);
        let kind = Kind::Vsock { cid, socket };
        Ok(Device {
            slot: names.take_slot(&id, &mut self.slot, SLOT)?,
            queues: QUEUES,
            memory: exposure(&mut self.memory, &kind, &backend),
            backend,
            kind,
            id,
        })
    }
}

/// A guest's address among sockets: 0 to 2 are reserved, the last means any (virtio 1.3, 5.10.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cid(u32);

impl Cid {
    const MIN: u32 = 3;
    const MAX: u32 = u32::MAX - 1;

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The address, if it is one that a guest can have.
    pub fn new(number: u64) -> Option<Self> {
        let number = u32::try_from(number).ok()?;
        (Self::MIN..=Self::MAX)
            .contains(&number)
            .then_some(Self(number))
    }
}

impl Default for Cid {
    fn default() -> Self {
        Self(Self::MIN)
    }
}

impl Serialize for Cid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de> Deserialize<'de> for Cid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;

        impl Visitor<'_> for Number {
            type Value = Cid;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {} to {}", Cid::MIN, Cid::MAX)
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Cid, E> {
                Cid::new(number)
                    .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Cid, E> {
                u64::try_from(number)
                    .ok()
                    .and_then(Cid::new)
                    .ok_or_else(|| E::invalid_value(Unexpected::Signed(number), &self))
            }
        }

        deserializer.deserialize_u64(Number)
    }
}
