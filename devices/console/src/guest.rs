//! The guest's side of the console: the two virtqueues of virtio-console, or a byte stream.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use anemone_device::{RingError, Vring};
use anemone_log::warn_limited;
use virtio_queue::{DescriptorChainRwIter, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::buffer::Buffer;

/// Chains handled in one call, so that empty ones do not keep the main loop.
const CHAINS_PER_CALL: usize = 32;
/// Bytes moved at once.
const CHUNK: usize = 512;

/// A started virtqueue, unless the driver has broken it.
pub struct Ring {
    pub vring: Vring,
    broken: bool,
    /// A chain of the transmit queue that is not used up.
    partial: Option<Partial>,
}

struct Partial {
    head: u16,
    rest: DescriptorChainRwIter<Arc<GuestMemoryMmap>>,
    addr: GuestAddress,
    left: u32,
}

impl Ring {
    pub fn new(vring: Vring) -> Self {
        Self {
            vring,
            broken: false,
            partial: None,
        }
    }

    /// Whether its kick is of interest.
    pub fn is_live(&self) -> bool {
        !self.broken
    }

    /// Its kick is readable.
    pub fn kicked(&mut self) {
        self.broken |= !self.vring.clear_kick();
    }

    /// Takes the guest's output. Whether anything was done.
    pub fn take_output(&mut self, output: &mut Buffer) -> bool {
        self.guarded(|ring| ring.try_take_output(output))
    }

    /// Gives the guest its input. Whether anything was done.
    pub fn give_input(&mut self, input: &mut Buffer) -> bool {
        self.guarded(|ring| ring.try_give_input(input))
    }

    /// Ends the use of the ring; the next available index. What is left of a chain that was
    /// begun is dropped.
    pub fn stop(mut self) -> u16 {
        if let Some(partial) = self.partial.take() {
            let vring = &mut self.vring;
            let done = vring.push_used(partial.head, 0);
            if let Err(error) = done.and_then(|()| vring.notify()) {
                warn_limited!("{error}");
            }
        }
        self.vring.queue.next_avail()
    }

    fn guarded(&mut self, work: impl FnOnce(&mut Self) -> Result<bool, RingError>) -> bool {
        if self.broken {
            return false;
        }
        work(self).unwrap_or_else(|error| {
            self.vring.give_up(&error);
            self.broken = true;
            false
        })
    }

    fn try_take_output(&mut self, output: &mut Buffer) -> Result<bool, RingError> {
        let mut done = 0;
        while output.room() > 0 && done < CHAINS_PER_CALL {
            let mut partial = match self.partial.take() {
                Some(partial) => partial,
                None => match self.vring.pop()? {
                    Some(chain) => Partial {
                        head: chain.head_index(),
                        rest: chain.readable(),
                        addr: GuestAddress(0),
                        left: 0,
                    },
                    // More has come meanwhile, or a driver plays with the index: it counts.
                    None if self.vring.enable_kicks()? => {
                        done += 1;
                        continue;
                    }
                    None => break,
                },
            };
            done += 1;
            if partial.copy(&self.vring.memory, output) {
                self.vring.push_used(partial.head, 0)?;
            } else {
                self.partial = Some(partial);
            }
        }
        if done > 0 {
            self.vring.notify()?;
        }
        Ok(done > 0)
    }

    fn try_give_input(&mut self, input: &mut Buffer) -> Result<bool, RingError> {
        let mut done = 0;
        while !input.is_empty() && done < CHAINS_PER_CALL {
            let Some(chain) = self.vring.pop()? else {
                if self.vring.enable_kicks()? {
                    done += 1;
                    continue;
                }
                break;
            };
            done += 1;
            let head = chain.head_index();
            let mut written = 0u32;
            for buffer in chain.writable() {
                let mut addr = buffer.addr();
                let mut left = buffer.len() as usize;
                while left > 0 && !input.is_empty() {
                    let part = input.front();
                    let part = &part[..part.len().min(left)];
                    if let Err(error) = self.vring.memory.write_slice(part, addr) {
                        warn_limited!("a buffer of the driver is not in guest memory: {error}");
                        break;
                    }
                    let length = part.len();
                    input.consume(length);
                    left -= length;
                    written += length as u32;
                    addr.0 = addr.0.wrapping_add(length as u64);
                }
            }
            self.vring.push_used(head, written)?;
        }
        if done > 0 {
            self.vring.notify()?;
        }
        Ok(done > 0)
    }
}

impl Partial {
    /// Copies to `output` what it has room for; whether the chain is used up.
    fn copy(&mut self, memory: &GuestMemoryMmap, output: &mut Buffer) -> bool {
        let mut bytes = [0; CHUNK];
        while output.room() > 0 {
            if self.left == 0 {
                match self.rest.next() {
                    Some(buffer) => (self.addr, self.left) = (buffer.addr(), buffer.len()),
                    None => return true,
                }
                continue;
            }
            let length = CHUNK.min(output.room()).min(self.left as usize);
            let part = &mut bytes[..length];
            if let Err(error) = memory.read_slice(part, self.addr) {
                warn_limited!("a buffer of the driver is not in guest memory: {error}");
                return true;
            }
            output.push(part);
            self.left -= length as u32;
            self.addr.0 = self.addr.0.wrapping_add(length as u64);
        }
        false
    }
}

/// The byte stream of a UART that another process has.
pub struct Stream {
    file: File,
    open: bool,
}

impl Stream {
    /// A non-blocking descriptor.
    pub fn new(file: File) -> Self {
        Self { file, open: true }
    }

    /// The descriptor, until the other process has gone.
    pub fn file(&self) -> Option<&File> {
        self.open.then_some(&self.file)
    }

    /// Takes the guest's output. Whether anything was done.
    pub fn take_output(&mut self, output: &mut Buffer) -> bool {
        let mut bytes = [0; CHUNK];
        let room = output.room().min(CHUNK);
        if !self.open || room == 0 {
            return false;
        }
        match self.file.read(&mut bytes[..room]) {
            Ok(n) if n > 0 => {
                output.push(&bytes[..n]);
                true
            }
            result => self.check(result),
        }
    }

    /// Gives the guest its input. Whether anything was done.
    pub fn give_input(&mut self, input: &mut Buffer) -> bool {
        if !self.open || input.is_empty() {
            return false;
        }
        match self.file.write(input.front()) {
            Ok(n) if n > 0 => {
                input.consume(n);
                true
            }
            result => self.check(result),
        }
    }

    fn check(&mut self, result: io::Result<usize>) -> bool {
        let waits = result.is_err_and(|error| {
            matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            )
        });
        self.open = waits;
        false
    }
}
