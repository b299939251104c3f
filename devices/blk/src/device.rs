//! The block device: features, configuration space and its queues.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anemone_device::{Device, Host, Mode, Vring};
use anemone_log::warn_limited;

use crate::image::SECTOR_SIZE;
use crate::request::{Disk, MAX_RANGE_SECTORS, MAX_RANGES, feature};
use crate::worker::Worker;

/// Data segments in a request: a full chain of a queue of 256 without header and status.
const SEG_MAX: u32 = 254;
/// Offset of `writeback` in the configuration space.
const WRITEBACK: usize = 32;

/// Kept while the driver has chosen write-through. Only that it is kept matters: a process that
/// replaces this one must not take the driver's writes as durable only after a flush.
const KEPT_WRITE_THROUGH: u64 = 0;

/// A virtio-blk device.
pub struct Block {
    disk: Arc<Disk>,
    queues: Vec<Worker>,
    host: Option<Host>,
}

impl Block {
    /// A device with this many queues.
    pub fn new(disk: Arc<Disk>, queues: usize, uring: bool, sandbox: Mode) -> io::Result<Self> {
        let queues = (0..queues)
            .map(|index| Worker::new(index, Arc::clone(&disk), uring, sandbox))
            .collect::<io::Result<_>>()?;
        Ok(Self {
            disk,
            queues,
            host: None,
        })
    }

    fn set_writeback(&self, writeback: bool) {
        self.disk.writeback.store(writeback, Ordering::Relaxed);
        let Some(host) = &self.host else { return };
        if writeback {
            host.forget(KEPT_WRITE_THROUGH);
        } else if let Err(error) = host.keep(KEPT_WRITE_THROUGH, self.token()) {
            warn_limited!("a restart would lose the choice of write-through: {error}");
        }
    }

    /// Some descriptor.
    fn token(&self) -> BorrowedFd<'_> {
        self.queues[0].wake()
    }
}

impl Device for Block {
    fn features(&self) -> u64 {
        let always = feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY | feature::FLUSH;
        let access = if self.disk.image.read_only() {
            feature::RO
        } else {
            feature::CONFIG_WCE | feature::DISCARD | feature::WRITE_ZEROES
        };
        let queues = if self.queues.len() > 1 {
            feature::MQ
        } else {
            0
        };
        always | access | queues
    }

    fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// `struct virtio_blk_config` up to `write_zeroes_may_unmap` (virtio 1.2, 5.2.4).
    fn config(&self) -> Vec<u8> {
        let geometry = self.disk.image.geometry();
        let mut config = Vec::with_capacity(60);
        let mut field = |bytes: &[u8]| config.extend_from_slice(bytes);
        field(&self.disk.image.sectors().to_le_bytes());
        field(&[0; 4]); // size_max
        field(&SEG_MAX.to_le_bytes());
        field(&[0; 4]); // cylinders, heads, sectors
        field(&geometry.block_size.to_le_bytes());
        field(&[geometry.physical_exponent, geometry.alignment_offset]);
        field(&geometry.min_io.to_le_bytes());
        field(&geometry.opt_io.to_le_bytes());
        field(&[self.disk.writeback.load(Ordering::Relaxed).into(), 0]);
        field(&(self.queues.len() as u16).to_le_bytes());
        let block = 1u32 << geometry.physical_exponent;
        let discard_alignment = block * (geometry.block_size / SECTOR_SIZE as u32);
        field(&MAX_RANGE_SECTORS.to_le_bytes()); // max_discard_sectors
        field(&MAX_RANGES.to_le_bytes());
        field(&discard_alignment.to_le_bytes());
        field(&MAX_RANGE_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        field(&MAX_RANGES.to_le_bytes());
        field(&[1, 0, 0, 0]); // write_zeroes_may_unmap
        config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let value = WRITEBACK.checked_sub(offset).and_then(|at| data.get(at));
        if let Some(value) = value
            && !self.disk.image.read_only()
        {
            self.set_writeback(*value != 0);
        }
    }

    fn start_threads(&mut self) -> io::Result<()> {
        self.queues.iter_mut().try_for_each(Worker::start_thread)
    }

    fn start_queue(&mut self, ring: Vring) -> io::Result<()> {
        let flush_and_wce = feature::FLUSH | feature::CONFIG_WCE;
        if ring.features & flush_and_wce == feature::CONFIG_WCE {
            // The driver cannot flush, so it is told that it need not (virtio 1.2, 5.2.5.2).
            self.set_writeback(false);
        }
        match self.queues.get_mut(ring.index) {
            Some(queue) => queue.start(ring),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "there is no such queue",
            )),
        }
    }

    fn attach(&mut self, host: &Host) {
        self.host = Some(host.clone());
    }

    fn restore(&mut self, key: u64, _fd: OwnedFd) {
        if key == KEPT_WRITE_THROUGH {
            self.disk.writeback.store(false, Ordering::Relaxed);
        }
    }

    /// The choice stays kept: this is also the end of a process that is replaced in good order, and
    /// write-through is right for every driver.
    fn reset(&mut self) {
        self.disk.writeback.store(true, Ordering::Relaxed);
    }

    fn stop_queue(&mut self, index: usize) -> u16 {
        let stopped = self.queues.get_mut(index).and_then(Worker::stop);
        stopped.unwrap_or(0)
    }
}
