//! Directories of the host that the guest mounts.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::short::Short;
use crate::value::{Exposure, Id, ShareCache, ShareOwner, Within, serde_as_text};
use crate::vm::{Backend, Device, Invalid, Kind, Names, backend, exposure, refuse_empty};

/// PCI slot of the first, unless the configuration names another.
const FIRST_SLOT: u16 = 20;

/// A directory of this host that the guest mounts, or a vhost-user-fs back end that already runs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Fs {
    /// The name by which the guest mounts it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tag: Option<Tag>,
    /// The directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The guest cannot change anything.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
    /// What the guest may keep in its caches, by default `auto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<ShareCache>,
    /// Number of request queues, by default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<Within<1, 16>>,
    /// Whose new files are, by default `self`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<ShareOwner>,
    /// What the guest calls users of this host; by default the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid_map: Option<IdMap>,
    /// What the guest calls groups of this host; by default the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gid_map: Option<IdMap>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Name in messages, by default `fs` and the number of the share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 20 and the number of the share.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// Program to use in place of `anemone-fs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
    /// UNIX socket of a vhost-user-fs back end that already runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl Short for Fs {
    const MAIN_KEY: Option<&'static str> = None;
}

/// What a shared directory is to the guest.
#[derive(Debug, Clone, PartialEq)]
pub struct Share {
    /// The name by which the guest mounts it.
    pub tag: Tag,
    /// The directory; absent where the back end is a [`Backend::Socket`].
    pub path: Option<PathBuf>,
    /// The guest cannot change anything.
    pub readonly: bool,
    /// What the guest may keep in its caches.
    pub cache: ShareCache,
    /// Number of request queues.
    pub queues: u16,
    /// Whose new files are.
    pub owner: ShareOwner,
    /// What the guest calls users of this host.
    pub uid_map: Option<IdMap>,
    /// What the guest calls groups of this host.
    pub gid_map: Option<IdMap>,
}

impl Fs {
    /// Fills in the defaults and checks.
    pub(crate) fn resolve(&mut self, number: u16, names: &mut Names) -> Result<Device, Invalid> {
        let id = names.take_id(&mut self.id, &format!("fs{number}"))?;
        let backend = backend(&id, self.binary.as_ref(), self.socket.as_ref())?;
        let tag = self
            .tag
            .clone()
            .ok_or_else(|| Invalid::NoTag(id.to_string()))?;
        if matches!(backend, Backend::Socket(_)) {
            let own: [(&'static str, bool); 6] = [
                ("path", self.path.is_some()),
                ("readonly", self.readonly),
                ("cache", self.cache.is_some()),
                ("owner", self.owner.is_some()),
                ("uid-map", self.uid_map.is_some()),
                ("gid-map", self.gid_map.is_some()),
            ];
            if let Some((key, _)) = own.into_iter().find(|(_, given)| *given) {
                return Err(Invalid::Meaningless {
                    owner: id.to_string(),
                    key,
                    because: "beside `socket`: the back end has its own settings",
                });
            }
        } else {
            if self.path.is_none() {
                return Err(Invalid::NoDirectory(id.to_string()));
            }
            refuse_empty(&format!("{id}: path"), self.path.as_deref())?;
            self.cache.get_or_insert_default();
            self.owner.get_or_insert_default();
        }
        let queues = *self.queues.get_or_insert(Within::min());
        let share = Share {
            tag,
            path: self.path.clone(),
            readonly: self.readonly,
            cache: self.cache.unwrap_or_default(),
            queues: queues.get(),
            owner: self.owner.unwrap_or_default(),
            uid_map: self.uid_map.clone(),
            gid_map: self.gid_map.clone(),
        };
        let slot = FIRST_SLOT.saturating_add(number);
        let kind = Kind::Fs(share);
        Ok(Device {
            slot: names.take_slot(&id, &mut self.slot, slot)?,
            // One for urgent requests beside them (virtio 1.3, 5.11.2).
            queues: 1 + queues.get(),
            memory: exposure(&mut self.memory, &kind, &backend),
            backend,
            kind,
            id,
        })
    }
}

impl Share {
    /// Configuration space of the device: `struct virtio_fs_config` without `notify_buf_size`
    /// (virtio 1.3, 5.11.4).
    pub fn config(&self) -> Vec<u8> {
        let mut config = self.tag.0.clone().into_bytes();
        config.resize(Tag::MAX, 0);
        config.extend_from_slice(&u32::from(self.queues).to_le_bytes());
        config
    }
}

/// The name by which a guest mounts a shared directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// Longest tag in bytes (virtio 1.3, 5.11.4).
    const MAX: usize = 36;

    fn allowed() -> String {
        format!(
            "a text of 1 to {} bytes without control characters",
            Self::MAX
        )
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Tag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = (1..=Self::MAX).contains(&text.len()) && !text.contains(char::is_control);
        fits.then(|| Self(text.to_owned()))
            .ok_or_else(Self::allowed)
    }
}

/// A translation of users or groups: `GUEST:HOST:COUNT`, several joined by `+`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap(String);

impl IdMap {
    fn allowed() -> String {
        "ranges GUEST:HOST:COUNT joined by `+`, of which no two overlap".to_owned()
    }
}

impl fmt::Display for IdMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for IdMap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut ranges: Vec<[u32; 3]> = Vec::new();
        for part in text.split('+') {
            let numbers: Result<Vec<u32>, _> = part.split(':').map(str::parse).collect();
            let range: [u32; 3] = numbers
                .ok()
                .and_then(|numbers| numbers.try_into().ok())
                .ok_or_else(Self::allowed)?;
            let [guest, host, count] = range;
            let ends = guest.checked_add(count).zip(host.checked_add(count));
            let apart = |&[g, h, n]: &[u32; 3]| {
                ends.is_some_and(|(guest_end, host_end)| {
                    (g >= guest_end || guest >= g + n) && (h >= host_end || host >= h + n)
                })
            };
            if count == 0 || ends.is_none() || !ranges.iter().all(apart) {
                return Err(Self::allowed());
            }
            ranges.push(range);
        }
        Ok(Self(text.to_owned()))
    }
}

serde_as_text!(Tag);
serde_as_text!(IdMap);
