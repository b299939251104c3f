//! Devices of any type whose back end somebody else has started.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::short::Short;
use crate::value::{Exposure, Id, ValueError, Within};
use crate::vm::{Backend, Device, Invalid, Kind, Names, exposure, refuse_empty};

/// PCI slot of the first one unless the configuration names another.
const FIRST_SLOT: u16 = 28;

/// Most descriptors of a virtqueue: what every back end in use can take. A front end cannot ask.
const QUEUE_SIZE: u16 = 128;

/// A device whose vhost-user back end already runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VhostUser {
    /// What it is: a name or the number of a virtio device type.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<DeviceType>,
    /// UNIX socket at which the back end listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Number of virtqueues, by default what is usual for the type.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<Within<1, 126>>,
    /// Bytes of device-specific configuration, by default what is usual for the type.
    #[serde(rename = "config-size", skip_serializing_if = "Option::is_none")]
    pub config_size: Option<Within<0, 256>>,
    /// Most descriptors of a virtqueue, a power of two, by default 128.
    #[serde(rename = "queue-size", skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<Within<2, 256>>,
    /// What the back end sees of guest memory, by default `bounce`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Name in messages, by default `vhost-user` and the number of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 28 and the number of the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
}

impl Short for VhostUser {
    const MAIN_KEY: Option<&'static str> = Some("type");
}

impl VhostUser {
    /// Fills in the defaults and checks.
    pub(crate) fn resolve(&mut self, number: u16, names: &mut Names) -> Result<Device, Invalid> {
        let id = names.take_id(&mut self.id, &format!("vhost-user{number}"))?;
        let missing = |key| Invalid::Missing {
            owner: id.to_string(),
            key,
        };
        let kind = self.kind.ok_or_else(|| missing("type"))?;
        let socket = self.socket.clone().ok_or_else(|| missing("socket"))?;
        refuse_empty(&format!("{id}: socket"), Some(&socket))?;
        let usual = kind.usual();
        let queues = match self.queues {
            Some(queues) => queues,
            None => {
                let queues = usual.map(|usual| usual.queues);
                let queues = queues.ok_or_else(|| missing("queues"))?;
                Within::new(queues).map_err(|_| missing("queues"))?
            }
        };
        let config_size = match self.config_size {
            Some(size) => size,
            None => {
                let size = usual.map(|usual| usual.config_size);
                let size = size.ok_or_else(|| missing("config-size"))?;
                Within::new(size).map_err(|_| missing("config-size"))?
            }
        };
        let queue_size = self.queue_size.map_or(QUEUE_SIZE, Within::get);
        if !queue_size.is_power_of_two() {
            return Err(Invalid::QueueSize {
                owner: id.to_string(),
                found: queue_size,
            });
        }
        (self.queues, self.config_size) = (Some(queues), Some(config_size));
        self.queue_size = Within::new(queue_size).ok();
        let device_type = kind;
        let kind = Kind::External {
            device_type,
            config_size: config_size.get(),
            queue_size,
        };
        let backend = Backend::Socket(socket);
        let memory = exposure(&mut self.memory, &kind, &backend);
        if memory == Exposure::Bounce && ADDRESSING.contains(&device_type.0) {
            return Err(Invalid::NeedsMemory {
                owner: id.to_string(),
                kind: device_type.to_string(),
            });
        }
        Ok(Device {
            slot: names.take_slot(&id, &mut self.slot, FIRST_SLOT.saturating_add(number))?,
            queues: queues.get(),
            memory,
            backend,
            kind,
            id,
        })
    }
}

/// What is usual for a type of device.
#[derive(Debug, Clone, Copy)]
struct Usual {
    name: &'static str,
    number: u16,
    queues: u16,
    /// Length of its configuration structure.
    config_size: u16,
}

const fn usual(name: &'static str, number: u16, queues: u16, config_size: u16) -> Usual {
    Usual {
        name,
        number,
        queues,
        config_size,
    }
}

/// The types that have a name here (virtio 1.3, section 5), with the queues without which a driver
/// does not start, and their configuration up to the fields that every back end has.
const TYPES: &[Usual] = &[
    usual("net", 1, 2, 12),
    usual("blk", 2, 1, 60),
    usual("console", 3, 2, 12),
    usual("rng", 4, 1, 0),
    usual("balloon", 5, 2, 8),
    usual("scsi", 8, 3, 36),
    usual("9p", 9, 1, 256),
    usual("gpu", 16, 2, 16),
    usual("input", 18, 2, 136),
    usual("vsock", 19, 3, 8),
    usual("crypto", 20, 2, 56),
    usual("iommu", 23, 2, 40),
    usual("mem", 24, 1, 56),
    usual("sound", 25, 4, 12),
    usual("fs", 26, 2, 40),
    usual("pmem", 27, 1, 16),
    usual("rpmb", 28, 1, 3),
    usual("scmi", 32, 2, 0),
    usual("i2c", 34, 1, 0),
    usual("can", 36, 3, 2),
    usual("gpio", 41, 2, 8),
];

/// Types whose requests name guest memory by its address, besides the buffers of their chains: gpu,
/// iommu and mem (virtio 1.3, 5.7, 5.13 and 5.15).
const ADDRESSING: &[u16] = &[16, 23, 24];

/// A virtio device type (virtio 1.3, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceType(u16);

impl DeviceType {
    /// The largest: PCI has room for device ids up to 0x107F (virtio 1.3, 4.1.2).
    const MAX: u16 = 63;

    /// The number.
    pub fn get(self) -> u16 {
        self.0
    }

    fn usual(self) -> Option<&'static Usual> {
        TYPES.iter().find(|usual| usual.number == self.0)
    }

    fn new(number: u64) -> Option<Self> {
        let number = u16::try_from(number).ok()?;
        (1..=Self::MAX).contains(&number).then_some(Self(number))
    }

    fn allowed() -> String {
        let names: Vec<_> = TYPES.iter().map(|usual| usual.name).collect();
        format!(
            "a virtio device type, 1 to {}, or one of {}",
            Self::MAX,
            names.join(", ")
        )
    }
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.usual() {
            Some(usual) => f.write_str(usual.name),
            None => write!(f, "{}", self.0),
        }
    }
}

impl FromStr for DeviceType {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let named = TYPES.iter().find(|usual| usual.name == text);
        let number = named.map(|usual| u64::from(usual.number));
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = number.or_else(|| text.parse().ok().filter(|_| digits));
        number.and_then(Self::new).ok_or_else(|| ValueError {
            found: text.to_owned(),
            allowed: Self::allowed(),
        })
    }
}

impl Serialize for DeviceType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.usual() {
            Some(usual) => serializer.serialize_str(usual.name),
            None => serializer.serialize_u16(self.0),
        }
    }
}

impl<'de> Deserialize<'de> for DeviceType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameOrNumber;

        impl Visitor<'_> for NameOrNumber {
            type Value = DeviceType;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&DeviceType::allowed())
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<DeviceType, E> {
                DeviceType::new(number)
                    .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(number), &self))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<DeviceType, E> {
                let positive = u64::try_from(number).ok().and_then(DeviceType::new);
                positive.ok_or_else(|| E::invalid_value(Unexpected::Signed(number), &self))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<DeviceType, E> {
                text.parse()
                    .map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_any(NameOrNumber)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_by_name_and_number() {
        for usual in TYPES {
            let by_name: DeviceType = usual.name.parse().unwrap();
            let by_number: DeviceType = usual.number.to_string().parse().unwrap();
            assert_eq!((by_name.get(), by_name), (usual.number, by_number));
            assert_eq!(by_name.to_string(), usual.name);
        }
        assert_eq!("63".parse::<DeviceType>().unwrap().to_string(), "63");
        for text in ["0", "64", "-1", "floppy", "", "+4"] {
            let error = text.parse::<DeviceType>().unwrap_err().to_string();
            assert!(error.contains("net, blk, console"), "{error}");
        }
    }
}
