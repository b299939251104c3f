//! virtio-balloon as a driver uses it (virtio 1.3, 5.5).

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::{Buffer, Device, Error, Memory, Queue, Result};

/// Features.
#[allow(missing_docs, reason = "names of the specification")]
pub mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Longest wait for one chain.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until the device has returned a chain, and takes it.
///
/// # Errors
/// It does not come in time.
pub fn take(queue: &mut Queue) -> Result<u32> {
    if !queue.wait(PATIENCE)? {
        return Err(Error::Timeout("a chain is not returned"));
    }
    let used = queue.take_used();
    used.map(|used| used.head)
        .ok_or(Error::Timeout("a chain is not returned"))
}

/// Sends page numbers, from `list` on in guest memory, to the inflate or the deflate queue.
///
/// # Errors
/// The chain does not come back.
pub fn send_pages(memory: &Memory, queue: &mut Queue, list: u64, numbers: &[u32]) -> Result<()> {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    memory.write(list, &bytes);
    let buffer = Buffer {
        addr: list,
        len: bytes.len() as u32,
    };
    queue
        .add(&[buffer], &[])
        .ok_or(Error::Timeout("the queue is full"))?;
    queue.publish();
    queue.kick();
    take(queue).map(drop)
}

/// Target and actual size, in pages, as the device has them.
///
/// # Errors
/// The request fails.
pub fn sizes(device: &mut Device) -> Result<(u32, u32)> {
    let config = device.frontend.config(0, 8)?;
    let word = |at: usize| {
        let bytes = config.get(at..at + 4).unwrap_or_default();
        bytes.iter().rev().fold(0, |v, &b| v << 8 | u32::from(b))
    };
    Ok((word(0), word(4)))
}

/// Bytes of guest memory from `start` on that the host has given pages to.
///
/// # Errors
/// `lseek` fails.
pub fn present(memory: &Memory, start: u64) -> io::Result<u64> {
    let seek = |from: u64, what| {
        // SAFETY: no pointers.
        let at = unsafe { libc::lseek(memory.as_fd().as_raw_fd(), from as libc::off_t, what) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    };
    let (mut at, mut present) = (start, 0);
    loop {
        at = match seek(at, libc::SEEK_DATA) {
            Ok(data) => data,
            // No data after that.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(present),
            Err(error) => return Err(error),
        };
        let hole = seek(at, libc::SEEK_HOLE)?;
        present += hole - at;
        at = hole;
    }
}

/// Gives all of guest memory from `start` on pages, filled with a byte that is not zero.
pub fn fill(memory: &Memory, start: u64) {
    let page = [0xB7; PAGE as usize];
    for at in (start..memory.size()).step_by(PAGE as usize) {
        memory.write(at, &page);
    }
}
