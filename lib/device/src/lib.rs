//! Frame of a device back end: a process that serves one virtio device over vhost-user.
//!
//! (Interface draft; the implementation of `run` follows.)

use std::os::fd::OwnedFd;
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// One started virtqueue, handed to the device. It owns the ring until [`Device::stop_queue`].
pub struct Vring {
    /// Number of the queue.
    pub index: usize,
    /// The ring; `next_avail` is where the front end said.
    pub queue: virtio_queue::Queue,
    /// Guest memory of this moment. A new table restarts all queues.
    pub memory: Arc<GuestMemoryMmap>,
    /// Readable when the guest has made descriptors available (an eventfd, non-blocking).
    pub kick: OwnedFd,
    /// Written to raise the queue's interrupt (an eventfd); absent while the front end polls.
    pub call: Option<OwnedFd>,
    /// virtio features the driver has accepted.
    pub features: u64,
}

/// A virtio device, as its back end process implements it.
///
/// All methods are called on the main thread. A device may serve its rings on threads of its own
/// (started in `start_queue`) or on the main thread through [`Device::event_fds`].
pub trait Device {
    /// Device-specific virtio feature bits offered. The frame adds VIRTIO_F_VERSION_1,
    /// VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC and the vhost-user ones.
    fn features(&self) -> u64;
    /// Number of virtqueues.
    fn queue_count(&self) -> usize;
    /// Device-specific configuration as it is now.
    fn config(&self) -> Vec<u8>;
    /// The driver wrote configuration bytes.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// A ring has been set up, enabled and kicked off.
    fn start_queue(&mut self, ring: Vring) -> std::io::Result<()>;
    /// Finish or drop what the ring has in flight, stop using it; returns the next available index.
    fn stop_queue(&mut self, index: usize) -> u16;
    /// Descriptors the main loop should watch for reading: kicks of rings served on the main
    /// thread and inputs of the device, each with a token. Asked again after every callback.
    fn event_fds(&self) -> Vec<(std::os::fd::BorrowedFd<'_>, u64)> {
        Vec::new()
    }
    /// The descriptor with this token is readable.
    fn handle_event(&mut self, _token: u64) {}
}
