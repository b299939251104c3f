//! What a bounced device offers: nothing that its copying side cannot carry, and no request that its
//! queue has no room for.
//!
//! A request lies in the region as a whole. How large it can get is up to the driver, within what the
//! device tells: Linux makes requests of a network card, a file system or a socket of 1 MiB at most
//! whatever it is told, but those of a disk are limited by its configuration alone.

use super::chain::{BUFFERS_MAX, DESCRIPTOR};
use super::memory::PAGE;
use super::{BALLOON, BALLOON_F_FREE_PAGE_HINT, BALLOON_F_PAGE_POISON, BLOCK, SCSI};

/// VIRTIO_F_IN_ORDER: a back end returns several chains by one entry of the used ring.
const F_IN_ORDER: u64 = 1 << 35;
/// virtio-blk: `size_max` and `seg_max` are valid (virtio 1.2, 5.2.3).
const BLK_F_SIZE_MAX: u64 = 1 << 1;
const BLK_F_SEG_MAX: u64 = 1 << 2;
/// Their places in the configuration (5.2.4).
const BLK_SIZE_MAX: usize = 8;
const BLK_SEG_MAX: usize = 12;
/// Buffers of a request of a disk beside its data: header and status.
const BLK_OTHERS: u64 = 2;
/// virtio-scsi: places of `seg_max` and `max_sectors` (5.6.4), and what Linux takes for a
/// `max_sectors` of 0.
const SCSI_SEG_MAX: usize = 4;
const SCSI_MAX_SECTORS: usize = 8;
const SCSI_SECTORS: u32 = 0xFFFF;
/// Buffers of a SCSI command beside its data: request and response, and protection information both
/// ways.
const SCSI_OTHERS: u64 = 4;
const SECTOR: u64 = 512;

/// The room that each queue of a device has for data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub device_type: u16,
    pub room: u64,
}

impl Bounds {
    /// What the driver is offered of a back end's features.
    pub fn features(self, offered: u64) -> u64 {
        let offered = offered & !F_IN_ORDER;
        match self.device_type {
            BLOCK => offered | BLK_F_SIZE_MAX,
            // Hints are free memory in pieces of megabytes, and so are reported pages that have to keep
            // a pattern. Without these features the driver does without.
            BALLOON => offered & !(BALLOON_F_FREE_PAGE_HINT | BALLOON_F_PAGE_POISON),
            _ => offered,
        }
    }

    /// What [`features`](Self::features) has added to a back end's offer: it is not told that they
    /// were accepted.
    pub fn added(self, offered: u64) -> u64 {
        self.features(offered) & !offered
    }

    /// Limits requests in the configuration of a back end with these features.
    pub fn limit(self, features: u64, config: &mut [u8]) {
        match self.device_type {
            BLOCK => self.limit_disk(features, config),
            SCSI => self.limit_scsi(config),
            _ => {}
        }
    }

    fn limit_disk(self, features: u64, config: &mut [u8]) {
        // Without the feature the driver puts one segment into a request.
        let told = match features & BLK_F_SEG_MAX {
            0 => 1,
            _ => get(config, BLK_SEG_MAX).max(1),
        };
        let segments = self.segments(told, BLK_OTHERS);
        let size = (self.left(segments, BLK_OTHERS) / segments) & !(PAGE - 1);
        let size = u32::try_from(size).unwrap_or(u32::MAX);
        let said = match features & BLK_F_SIZE_MAX {
            0 => 0,
            _ => get(config, BLK_SIZE_MAX),
        };
        let size = if said == 0 { size } else { size.min(said) };
        put(config, BLK_SIZE_MAX, size);
        if features & BLK_F_SEG_MAX != 0 {
            put(config, BLK_SEG_MAX, segments as u32);
        }
    }

    fn limit_scsi(self, config: &mut [u8]) {
        let segments = self.segments(get(config, SCSI_SEG_MAX).max(1), SCSI_OTHERS);
        // Each segment may begin on a page of its own.
        let bytes = self
            .left(segments, SCSI_OTHERS)
            .saturating_sub(PAGE * segments)
            .max(PAGE);
        let sectors = u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX);
        let said = match get(config, SCSI_MAX_SECTORS) {
            0 => SCSI_SECTORS,
            said => said,
        };
        put(config, SCSI_SEG_MAX, segments as u32);
        put(config, SCSI_MAX_SECTORS, sectors.min(said));
    }

    /// As many segments as there is room for, each with two pages at least, and as a chain can have.
    fn segments(self, told: u32, others: u64) -> u64 {
        let most = BUFFERS_MAX as u64 - others;
        let room = self.left(most, others) / (2 * PAGE);
        u64::from(told).min(most).min(room).max(1)
    }

    /// Room for the data of a request with so many segments. All of them begin on pages; before
    /// and behind them lie a table of descriptors and the other buffers.
    fn left(self, segments: u64, others: u64) -> u64 {
        let table = (DESCRIPTOR * (segments + others)).next_multiple_of(PAGE);
        self.room.saturating_sub(table + PAGE * others)
    }
}

fn get(config: &[u8], at: usize) -> u32 {
    let bytes = config.get(at..).and_then(|rest| rest.first_chunk());
    bytes.copied().map_or(0, u32::from_le_bytes)
}

fn put(config: &mut [u8], at: usize, value: u32) {
    if let Some(bytes) = config.get_mut(at..at + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(room: u64, features: u64, size: u32, segments: u32) -> (u32, u32) {
        let bounds = Bounds {
            device_type: BLOCK,
            room,
        };
        let mut config = [0; 60];
        put(&mut config, BLK_SIZE_MAX, size);
        put(&mut config, BLK_SEG_MAX, segments);
        bounds.limit(features, &mut config);
        (get(&config, BLK_SIZE_MAX), get(&config, BLK_SEG_MAX))
    }

    #[test]
    fn segments_of_a_disk_fit_together() {
        let both = BLK_F_SIZE_MAX | BLK_F_SEG_MAX;
        assert_eq!(disk(16 << 20, BLK_F_SEG_MAX, 0, 254), (64 << 10, 254));
        assert_eq!(disk(4 << 20, BLK_F_SEG_MAX, 0, 254), (16 << 10, 254));
        assert_eq!(disk(16 << 20, both, 16 << 10, 126), (16 << 10, 126));
        assert_eq!(disk(16 << 20, both, 1 << 30, 126).0, 128 << 10);
        // One segment, a number that means nothing, and one that is too large.
        assert_eq!(disk(4 << 20, 0, 0, 254).1, 254);
        assert!(disk(4 << 20, 0, 0, 254).0 > 3 << 20);
        assert_eq!(disk(4 << 20, BLK_F_SEG_MAX, 0, 0).1, 1);
        assert_eq!(disk(64 << 20, BLK_F_SEG_MAX, 0, u32::MAX).1, 1022);
        let (size, segments) = disk(64 << 10, BLK_F_SEG_MAX, 0, 254);
        assert!(size >= 4096 && segments >= 1);
    }

    #[test]
    fn commands_of_scsi_fit() {
        let bounds = Bounds {
            device_type: SCSI,
            room: 8 << 20,
        };
        for (segments, sectors, expected) in [(126, 0, 15_336), (126, 2048, 2048), (0, 0, 16_336)] {
            let mut config = [0; 36];
            put(&mut config, SCSI_SEG_MAX, segments);
            put(&mut config, SCSI_MAX_SECTORS, sectors);
            bounds.limit(0, &mut config);
            assert_eq!(get(&config, SCSI_MAX_SECTORS), expected, "{segments}");
        }
        // A configuration that is too short for these says nothing.
        bounds.limit(0, &mut [0; 6]);
    }

    #[test]
    fn what_cannot_be_copied_is_not_offered() {
        let balloon = Bounds {
            device_type: BALLOON,
            room: 1 << 18,
        };
        assert_eq!(balloon.features(0b111_1111 | F_IN_ORDER), 0b110_0111 & 0x7F);
        assert_eq!(balloon.added(!0), 0);
        let disk = Bounds {
            device_type: BLOCK,
            room: 1 << 20,
        };
        assert_eq!(disk.added(0), BLK_F_SIZE_MAX);
        assert_eq!(disk.added(BLK_F_SIZE_MAX), 0);
    }
}
