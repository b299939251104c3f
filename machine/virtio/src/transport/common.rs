//! The common configuration structure (virtio 1.2, 4.1.4.3).

use crate::feature;

/// Length of the structure without the optional fields at its end.
pub(super) const LENGTH: usize = 56;
/// No MSI-X vector (virtio 1.2, 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xFFFF;
/// Most descriptors of a queue of a device whose back end has no lower limit.
pub const QUEUE_SIZE: u16 = 256;

/// Device status bits (virtio 1.2, 2.1).
pub(super) mod status {
    /// The driver knows how to drive the device.
    pub const DRIVER: u8 = 2;
    /// The driver can drive the device.
    pub const DRIVER_OK: u8 = 4;
    /// The driver has accepted features that it understands.
    pub const FEATURES_OK: u8 = 8;
    /// The device has met an error from which only a reset helps.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up on the device.
    pub const FAILED: u8 = 128;
}

/// One virtqueue as the driver is setting it up.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    pub size: u16,
    pub vector: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

impl Queue {
    /// A queue with at most `size` descriptors, as it is after a reset.
    fn reset(size: u16) -> Self {
        Self {
            size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// A write that concerns more than this structure.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// The device status, with the value written.
    Status(u8),
    /// The vector of the queue with this number.
    QueueVector(u16),
}

/// The registers.
#[derive(Debug)]
pub(super) struct Common {
    offered: u64,
    vectors: u16,
    /// Most descriptors of a queue.
    queue_size: u16,
    /// What is offered, and how many queues there are, after the next reset.
    next: (u64, u16),
    pub accepted: u64,
    device_select: u32,
    driver_select: u32,
    pub config_vector: u16,
    pub status: u8,
    pub generation: u8,
    queue_select: u16,
    pub queues: Vec<Queue>,
}

/// Half `select` of a 64-bit feature word; there are only two.
fn half(word: u64, select: u32) -> u32 {
    match select {
        0 => word as u32,
        1 => (word >> 32) as u32,
        _ => 0,
    }
}

impl Common {
    /// `queue_size` is the most descriptors of a queue, a power of two: the driver takes what it is
    /// offered, and vhost-user has no way to learn what a back end can take.
    pub(super) fn new(offered: u64, queues: u16, queue_size: u16, vectors: u16) -> Self {
        Self {
            offered,
            vectors,
            queue_size,
            next: (offered, queues),
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            generation: 0,
            queue_select: 0,
            queues: vec![Queue::reset(queue_size); queues.into()],
        }
    }

    /// Back to the state after power-on, except that the configuration generation goes on.
    pub(super) fn reset(&mut self) {
        let (offered, queues) = self.next;
        let fresh = Self::new(offered, queues, self.queue_size, self.vectors);
        *self = Self {
            generation: self.generation,
            ..fresh
        };
    }

    /// Takes what another back end offers. A driver that has negotiated keeps what it has
    /// accepted until it resets the device; what is no longer there for it is the error.
    pub(super) fn replace(&mut self, offered: u64, queues: u16) -> Result<(), String> {
        self.next = (offered, queues);
        if self.status & status::FEATURES_OK == 0 {
            self.offered = offered;
            if self.queues.iter().all(|q| !q.enabled) {
                self.queues
                    .resize(queues.into(), Queue::reset(self.queue_size));
            }
            return Ok(());
        }
        let lacks = self.accepted & !offered;
        if lacks != 0 {
            return Err(format!(
                "it does not offer the virtio features {lacks:#x}, which the driver uses"
            ));
        }
        match self.queues.iter().rposition(|q| q.enabled) {
            Some(last) if last >= usize::from(queues) => Err(format!(
                "it has {queues} queues; the driver uses queue {last}"
            )),
            _ => Ok(()),
        }
    }

    /// The structure as the driver reads it. A queue that does not exist reads as size 0.
    pub(super) fn bytes(&self) -> [u8; LENGTH] {
        let absent = Queue::reset(0);
        let queue = self
            .queues
            .get(usize::from(self.queue_select))
            .unwrap_or(&absent);
        let mut bytes = [0; LENGTH];
        let mut put = |offset: usize, data: &[u8]| {
            bytes[offset..offset + data.len()].copy_from_slice(data);
        };
        put(0, &self.device_select.to_le_bytes());
        put(4, &half(self.offered, self.device_select).to_le_bytes());
        put(8, &self.driver_select.to_le_bytes());
        put(12, &half(self.accepted, self.driver_select).to_le_bytes());
        put(16, &self.config_vector.to_le_bytes());
        put(18, &(self.queues.len() as u16).to_le_bytes());
        put(20, &[self.status, self.generation]);
        put(22, &self.queue_select.to_le_bytes());
        put(24, &queue.size.to_le_bytes());
        put(26, &queue.vector.to_le_bytes());
        put(28, &u16::from(queue.enabled).to_le_bytes());
        // The doorbell of a queue is at its number.
        put(30, &self.queue_select.to_le_bytes());
        put(32, &queue.descriptors.to_le_bytes());
        put(40, &queue.available.to_le_bytes());
        put(48, &queue.used.to_le_bytes());
        bytes
    }

    /// Carries out a write. Fields are set in the order of their addresses; one that is written
    /// in part keeps its other bytes.
    pub(super) fn fields_written(&mut self, offset: usize, data: &[u8]) -> Vec<Field> {
        const FIELDS: [(usize, usize); 12] = [
            (0, 4),
            (8, 4),
            (12, 4),
            (16, 2),
            (20, 1),
            (22, 2),
            (24, 2),
            (26, 2),
            (28, 2),
            (32, 8),
            (40, 8),
            (48, 8),
        ];
        let end = offset + data.len();
        let mut concerns = Vec::new();
        for (start, length) in FIELDS {
            if start >= end || start + length <= offset {
                continue;
            }
            let old = self.bytes();
            let mut value = [0; 8];
            for (i, byte) in value[..length].iter_mut().enumerate() {
                let at = start + i;
                *byte = match at.checked_sub(offset).and_then(|n| data.get(n)) {
                    Some(new) => *new,
                    None => old[at],
                };
            }
            concerns.extend(self.set(start, u64::from_le_bytes(value)));
        }
        concerns
    }

    fn set(&mut self, field: usize, value: u64) -> Option<Field> {
        let vector = |v: u64| {
            if v < u64::from(self.vectors) {
                v as u16
            } else {
                NO_VECTOR
            }
        };
        match field {
            0 => self.device_select = value as u32,
            8 => self.driver_select = value as u32,
            12 if self.status & status::FEATURES_OK == 0 => {
                let shift = match self.driver_select {
                    0 => 0,
                    1 => 32,
                    _ => return None,
                };
                self.accepted = self.accepted & !(0xFFFF_FFFF << shift) | value << shift;
            }
            16 => self.config_vector = vector(value),
            20 => return Some(Field::Status(value as u8)),
            22 => self.queue_select = value as u16,
            _ => {
                let index = self.queue_select;
                let vector = vector(value);
                let queue = self.queues.get_mut(usize::from(index))?;
                if field == 26 {
                    queue.vector = vector;
                    return Some(Field::QueueVector(index));
                }
                // What a queue consists of is fixed once it is enabled.
                if queue.enabled {
                    return None;
                }
                match field {
                    24 if (value as u16).is_power_of_two() && value <= self.queue_size.into() => {
                        queue.size = value as u16;
                    }
                    28 => queue.enabled = value == 1,
                    32 => queue.descriptors = value,
                    40 => queue.available = value,
                    48 => queue.used = value,
                    _ => {}
                }
            }
        }
        None
    }

    /// Takes a status other than zero. FEATURES_OK sticks only for features that were offered
    /// and include VERSION_1; DRIVER_OK only after that. NEEDS_RESET is the device's own.
    pub(super) fn set_status(&mut self, value: u8) {
        let acceptable =
            self.accepted & !self.offered == 0 && self.accepted & feature::VERSION_1 != 0;
        let mut new = value & !status::NEEDS_RESET | self.status & status::NEEDS_RESET;
        if self.status & status::FEATURES_OK == 0 && !acceptable {
            new &= !status::FEATURES_OK;
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        // Bits are only added; a reset is the way back.
        self.status |= new;
    }
}
