//! Which CPU has decoded which page of guest memory, and who is told when it is written.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anemone_soft_mmu::{CodeWatch, Memory, PAGE_SIZE};

use crate::signals::{ATTENTION_CODE, Signals};

/// After so many writes to a page, code on it is dropped by the byte and the page stays watched:
/// code and data share it, and decoding all of it again each time costs more than slow writes.
const SHARED_PAGE: u32 = 16;

/// Bytes that were written on a page with code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    /// Guest-physical address.
    pub physical: u64,
    /// Bytes, within one page.
    pub length: usize,
}

#[derive(Default)]
struct Page {
    /// Bit n of word n / 64: CPU n has decoded code there.
    cpus: [u64; 4],
}

#[derive(Default)]
pub(crate) struct Pages {
    watched: HashMap<u64, Page>,
    /// Number of times a page was written while it held code.
    writes: HashMap<u64, u32>,
}

/// Shared by the CPUs of a VM; the [`CodeWatch`] of its memory.
pub struct CodeRegistry {
    pages: Mutex<Pages>,
    inboxes: Vec<(Arc<Signals>, Mutex<Vec<Written>>)>,
}

impl CodeRegistry {
    /// A registry for the CPUs with these attention words.
    pub fn new(signals: &[Arc<Signals>]) -> Arc<Self> {
        Arc::new(Self {
            pages: Mutex::default(),
            inboxes: signals
                .iter()
                .map(|s| (s.clone(), Mutex::default()))
                .collect(),
        })
    }

    /// The lock under which code is decoded and entered. Take it while parked.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A memory slot is gone: what was decoded from it is dropped, and memory that comes in its place
    /// is watched anew. Call it after [`Memory::remove_slot`].
    pub fn slot_removed(&self, guest: u64, size: u64) {
        let mut pages = self.lock();
        let range = guest..guest.saturating_add(size);
        pages.writes.retain(|page, _| !range.contains(page));
        for (physical, page) in pages.watched.extract_if(|page, _| range.contains(page)) {
            let length = PAGE_SIZE as usize;
            self.tell(&page, Written { physical, length });
        }
    }

    /// Tells the CPUs that have decoded from a page what happened to it.
    fn tell(&self, page: &Page, written: Written) {
        for (cpu, (signals, inbox)) in self.inboxes.iter().enumerate() {
            if page.cpus[cpu / 64 % 4] >> (cpu % 64) & 1 != 0 {
                let mut inbox = inbox.lock().unwrap_or_else(PoisonError::into_inner);
                inbox.push(written);
                drop(inbox);
                signals.raise(ATTENTION_CODE);
            }
        }
    }

    /// What was written since CPU `cpu` last asked.
    pub(crate) fn take(&self, cpu: u32) -> Vec<Written> {
        self.inboxes.get(cpu as usize).map_or_else(Vec::new, |i| {
            std::mem::take(&mut *i.1.lock().unwrap_or_else(PoisonError::into_inner))
        })
    }
}

impl Pages {
    /// Notes that a CPU is about to decode from the page; false if the page must be protected
    /// first, with the lock held.
    pub(crate) fn enter(&mut self, page: u64, cpu: u32) -> bool {
        let known = self.watched.contains_key(&page);
        let entry = self.watched.entry(page).or_default();
        entry.cpus[cpu as usize / 64 % 4] |= 1 << (cpu % 64);
        known
    }
}

impl CodeWatch for CodeRegistry {
    fn code_written(&self, memory: &Memory, _: Option<u32>, physical: u64, length: usize) {
        let page = physical & !(PAGE_SIZE - 1);
        let mut pages = self.lock();
        let count = pages.writes.entry(page).or_default();
        *count = count.saturating_add(1);
        if *count < SHARED_PAGE {
            let entry = pages.watched.remove(&page);
            memory.release_code(page);
            if let Some(entry) = entry {
                let whole = Written {
                    physical: page,
                    length: PAGE_SIZE as usize,
                };
                self.tell(&entry, whole);
            }
        } else {
            match pages.watched.get(&page) {
                Some(entry) => self.tell(entry, Written { physical, length }),
                None => memory.release_code(page),
            }
        }
    }
}
