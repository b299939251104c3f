//! The memory balloon.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::short::Short;
use crate::value::{Exposure, Id, Size, Within};
use crate::vm::{Backend, Device, Invalid, Kind, Names, exposure, refuse_empty};

/// PCI slot unless the configuration names another.
const SLOT: u16 = 4;
/// The balloon grows by pages of this many bytes (virtio 1.3, 5.5.6).
const PAGE: u64 = 4096;

/// The memory balloon: takes memory from the guest and gives it back to the host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Balloon {
    /// How much it is to take at first; by default nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// The guest may take pages back before it kills a process for memory.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub deflate_on_oom: bool,
    /// The guest reports pages that are free, and the host takes them back.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub reporting: bool,
    /// Seconds from one question for the guest's statistics to the next; by default it is not asked
    /// regularly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats_interval: Option<Within<1, 3600>>,
    /// Name in messages, by default `balloon`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Id>,
    /// PCI slot, by default 4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Within<1, 31>>,
    /// How much of guest memory its back end sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Exposure>,
    /// Program to use in place of `anemone-balloon`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub binary: Option<PathBuf>,
}

impl Short for Balloon {
    const MAIN_KEY: Option<&'static str> = None;
}

impl Balloon {
    /// Fills in the defaults and checks. The guest has so many bytes of `memory`.
    pub(crate) fn resolve(&mut self, memory: u64, names: &mut Names) -> Result<Device, Invalid> {
        let id = names.take_id(&mut self.id, "balloon")?;
        let binary = self.binary.clone();
        refuse_empty(&format!("{id}: binary"), binary.as_deref())?;
        let size = *self.size.get_or_insert(Size(0));
        if !size.0.is_multiple_of(PAGE) || size.0 >= memory {
            return Err(Invalid::BalloonSize {
                id: id.to_string(),
                size,
                memory: Size(memory),
            });
        }
        let backend = Backend::Process(binary);
        let kind = Kind::Balloon {
            size: size.0,
            deflate_on_oom: self.deflate_on_oom,
            reporting: self.reporting,
            stats_interval: self.stats_interval.map(Within::get),
        };
        Ok(Device {
            slot: names.take_slot(&id, &mut self.slot, SLOT)?,
            // Inflation, deflation, statistics, and reports of free pages if there are any.
            queues: 3 + u16::from(self.reporting),
            memory: exposure(&mut self.memory, &kind, &backend),
            backend,
            kind,
            id,
        })
    }
}
