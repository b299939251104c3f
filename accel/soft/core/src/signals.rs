//! How other threads get a CPU's attention, also while it sleeps in HLT.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anemone_soft_mmu::ATTENTION_MMU;

/// The local APIC's inbox has something.
pub const ATTENTION_APIC: u32 = 1 << 8;
/// Decoded code was overwritten.
pub const ATTENTION_CODE: u32 = 1 << 9;
/// [`Cpu::run`](crate::Cpu::run) is to return.
pub const ATTENTION_KICK: u32 = 1 << 10;

const _: () = assert!((ATTENTION_APIC | ATTENTION_CODE | ATTENTION_KICK) & ATTENTION_MMU == 0);

/// The attention word of one CPU and the means to wake it.
#[derive(Debug, Default)]
pub struct Signals {
    word: Arc<AtomicU32>,
    sleeps: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Signals {
    /// The word, as [`anemone_soft_mmu::Mmu::new`] wants it.
    pub fn word(&self) -> &Arc<AtomicU32> {
        &self.word
    }

    /// Sets bits in the word and wakes the CPU.
    pub fn raise(&self, bits: u32) {
        self.word.fetch_or(bits, Ordering::SeqCst);
        if self.sleeps.load(Ordering::SeqCst) {
            drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    /// Takes bits: whether one of them was set.
    pub fn take(&self, bits: u32) -> bool {
        self.word.load(Ordering::Relaxed) & bits != 0
            && self.word.fetch_and(!bits, Ordering::SeqCst) & bits != 0
    }

    /// Sleeps until one of `bits` is set, at most `limit`. The caller's MMU is parked.
    pub fn sleep(&self, bits: u32, limit: Option<Duration>) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleeps.store(true, Ordering::SeqCst);
        if self.word.load(Ordering::SeqCst) & bits == 0 {
            guard = match limit {
                Some(limit) => {
                    let waited = self.wake.wait_timeout(guard, limit);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self
                    .wake
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
        self.sleeps.store(false, Ordering::SeqCst);
        drop(guard);
    }
}
