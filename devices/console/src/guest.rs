//! The guest's side of the console: the two virtqueues of virtio-console, or a byte stream.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use anemone_device::{RingError, Vring};
use anemone_log::warn_limited;
use virtio_queue::{DescriptorChainRwIter, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::state::{Lane, State};

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
    /// The chain in progress when the ring was last stopped has come again.
    resumed: bool,
}

struct Partial {
    head: u16,
    rest: DescriptorChainRwIter<Arc<GuestMemoryMmap>>,
    addr: GuestAddress,
    left: u32,
    /// Bytes that were taken before the ring was last stopped.
    skip: u64,
}

impl Ring {
    pub fn new(vring: Vring) -> Self {
        Self {
            vring,
            broken: false,
            partial: None,
            resumed: false,
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
    pub fn take_output(&mut self, state: &mut State) -> bool {
        self.guarded(|ring| ring.try_take_output(state))
    }

    /// Gives the guest its input. Whether anything was done.
    pub fn give_input(&mut self, state: &mut State) -> bool {
        self.guarded(|ring| ring.try_give_input(state))
    }

    /// Ends the use of the ring; the next available index. A chain that was begun comes again when
    /// the ring starts; where that cannot be, what is left of it is dropped.
    pub fn stop(mut self) -> u16 {
        if let Some(partial) = self.partial.take_if(|_| !self.vring.is_tracked()) {
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

    fn try_take_output(&mut self, state: &mut State) -> Result<bool, RingError> {
        let mut done = 0;
        while state.output_room() > 0 && done < CHAINS_PER_CALL {
            let mut partial = match self.partial.take() {
                Some(partial) => partial,
                None => {
                    // Before it is taken: it counts as begun from the moment it is.
                    let resumes = self.vring.pops_again() && !self.resumed;
                    if !resumes {
                        state.begin_chain();
                    }
                    let Some(chain) = self.vring.pop()? else {
                        // More has come meanwhile, or a driver plays with the index: it counts.
                        if self.vring.enable_kicks()? {
                            done += 1;
                            continue;
                        }
                        break;
                    };
                    self.resumed |= resumes;
                    Partial {
                        head: chain.head_index(),
                        rest: chain.readable(),
                        addr: GuestAddress(0),
                        left: 0,
                        skip: state.chain_progress(),
                    }
                }
            };
            done += 1;
            if partial.copy(&self.vring.memory, state) {
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

    fn try_give_input(&mut self, state: &mut State) -> Result<bool, RingError> {
        let mut done = 0;
        while state.input_len() > 0 && done < CHAINS_PER_CALL {
            let Some(chain) = self.vring.pop()? else {
                if self.vring.enable_kicks()? {
                    done += 1;
                    continue;
                }
                break;
            };
            done += 1;
            let head = chain.head_index();
            let mut bytes = [0; CHUNK];
            let mut written = 0;
            for buffer in chain.writable() {
                let mut addr = buffer.addr();
                let mut left = buffer.len() as usize;
                while left > 0 {
                    let length = state.peek_input(written, &mut bytes[..left.min(CHUNK)]);
                    if length == 0 {
                        break;
                    }
                    if let Err(error) = self.vring.memory.write_slice(&bytes[..length], addr) {
                        warn_limited!("a buffer of the driver is not in guest memory: {error}");
                        break;
                    }
                    left -= length;
                    written += length;
                    addr.0 = addr.0.wrapping_add(length as u64);
                }
            }
            // The used index tells whether the guest has got them.
            state.give(written, self.vring.queue.next_used().wrapping_add(1));
            // Not more than the input holds.
            self.vring.push_used(head, written as u32)?;
            state.given();
        }
        if done > 0 {
            self.vring.notify()?;
        }
        Ok(done > 0)
    }
}

impl Partial {
    /// Copies to the output what it has room for; whether the chain is used up.
    fn copy(&mut self, memory: &GuestMemoryMmap, state: &mut State) -> bool {
        let mut bytes = [0; CHUNK];
        while state.output_room() > 0 {
            let skip = self.skip.min(self.left.into());
            self.skip -= skip;
            // Not more than is left.
            self.left -= skip as u32;
            self.addr.0 = self.addr.0.wrapping_add(skip);
            if self.left == 0 {
                match self.rest.next() {
                    Some(buffer) => (self.addr, self.left) = (buffer.addr(), buffer.len()),
                    None => return true,
                }
                continue;
            }
            let length = CHUNK.min(state.output_room()).min(self.left as usize);
            let part = &mut bytes[..length];
            if let Err(error) = memory.read_slice(part, self.addr) {
                warn_limited!("a buffer of the driver is not in guest memory: {error}");
                return true;
            }
            state.put_output(part);
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
    /// A non-blocking stream socket.
    pub fn new(file: File) -> Self {
        Self { file, open: true }
    }

    /// The descriptor, until the other process has gone.
    pub fn file(&self) -> Option<&File> {
        self.open.then_some(&self.file)
    }

    /// Takes the guest's output. Whether anything was done.
    pub fn take_output(&mut self, state: &mut State) -> bool {
        let mut bytes = [0; CHUNK];
        let room = state.output_room().min(CHUNK);
        if !self.open || room == 0 {
            return false;
        }
        match state.receive(Lane::Output, self.file.as_fd(), &mut bytes[..room]) {
            Ok(n) if n > 0 => {
                state.put_output(&bytes[..n]);
                true
            }
            result => self.check(result),
        }
    }

    /// Gives the guest its input. Whether anything was done.
    pub fn give_input(&mut self, state: &mut State) -> bool {
        let mut bytes = [0; CHUNK];
        let length = state.peek_input(0, &mut bytes);
        if !self.open || length == 0 {
            return false;
        }
        match self.file.write(&bytes[..length]) {
            Ok(n) if n > 0 => {
                state.skip_input(n);
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
