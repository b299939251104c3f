//! Which guest memory is free, and who has taken what.

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::layout::MEMORY_MAP_MAX;
use crate::{BootRequest, Error, RangeKind};

const PAGE: u64 = 4096;

/// The guest's memory and what has been put into it.
pub(crate) struct Places {
    low_ram_end: u64,
    /// Memory in ascending order; ranges that touch are one.
    ram: Vec<Range<u64>>,
    /// What has been taken, by whom, in ascending order.
    taken: Vec<(Range<u64>, &'static str)>,
}

impl Places {
    /// All of the guest's memory. Checks its map against itself and against the memory there is.
    pub(crate) fn new(memory: &GuestMemoryMmap, request: &BootRequest<'_>) -> Result<Self, Error> {
        let mut ram: Vec<Range<u64>> = Vec::new();
        let mut previous = 0;
        for (entry, range) in request.memory_map.iter().enumerate() {
            let wrong = |why| Error::MemoryMap { entry, why };
            if entry >= MEMORY_MAP_MAX {
                return Err(wrong("the boot protocols have room for 128 entries"));
            }
            let end = range.start.checked_add(range.size);
            let end = end.ok_or_else(|| wrong("the end exceeds 64 bits"))?;
            if range.start < previous || range.size == 0 {
                return Err(wrong("it is empty, or not after the one before"));
            }
            previous = end;
            if range.kind != RangeKind::Ram {
                continue;
            }
            let size = usize::try_from(range.size).unwrap_or(usize::MAX);
            if !memory.check_range(GuestAddress(range.start), size) {
                return Err(wrong("there is no memory behind it"));
            }
            match ram.last_mut() {
                Some(last) if last.end == range.start => last.end = end,
                _ => ram.push(range.start..end),
            }
        }
        Ok(Self {
            low_ram_end: request.low_ram_end,
            ram,
            taken: Vec::new(),
        })
    }

    /// One piece of memory that has been taken from the others.
    pub(crate) fn within(range: Range<u64>) -> Self {
        Self {
            low_ram_end: range.end,
            ram: vec![range],
            taken: Vec::new(),
        }
    }

    /// Takes exactly `range`.
    pub(crate) fn take(&mut self, what: &'static str, range: Range<u64>) -> Result<(), Error> {
        let Range { start, end } = range;
        if !self
            .ram
            .iter()
            .any(|ram| ram.start <= start && end <= ram.end)
        {
            let low_ram_end = self.low_ram_end;
            return Err(Error::NoMemory {
                what,
                start,
                end,
                low_ram_end,
            });
        }
        let after = self.taken.partition_point(|(taken, _)| taken.end <= start);
        match self.taken.get(after) {
            Some((taken, other)) if taken.start < end => Err(Error::Overlap {
                what,
                start,
                end,
                other,
            }),
            _ => {
                self.taken.insert(after, (range, what));
                Ok(())
            }
        }
    }

    /// Takes whole pages for `size` bytes, the highest that are free below `limit`, and returns
    /// their address.
    pub(crate) fn take_highest(
        &mut self,
        what: &'static str,
        size: u64,
        limit: u64,
    ) -> Result<u64, Error> {
        let mut largest = 0;
        for piece in self.free(limit).rev() {
            let end = piece.end / PAGE * PAGE;
            if let Some(start) = end.checked_sub(size) {
                let start = start / PAGE * PAGE;
                if start >= piece.start {
                    self.take(what, start..start + size)?;
                    return Ok(start);
                }
            }
            largest = largest.max(end.saturating_sub(piece.start.next_multiple_of(PAGE)));
        }
        Err(Error::NoRoom {
            what,
            size,
            limit,
            largest,
        })
    }

    /// The pieces of memory below `limit` that nobody has taken, in ascending order.
    fn free(&self, limit: u64) -> impl DoubleEndedIterator<Item = Range<u64>> + use<> {
        let mut pieces = Vec::new();
        for ram in &self.ram {
            let mut start = ram.start;
            for (taken, _) in &self.taken {
                if taken.start >= ram.start && taken.end <= ram.end {
                    pieces.push(start..taken.start);
                    start = taken.end;
                }
            }
            pieces.push(start..ram.end);
        }
        pieces
            .into_iter()
            .map(move |piece| piece.start..piece.end.min(limit))
            .filter(|piece| !piece.is_empty())
    }
}
