//! Room in a queue's data area. The lowest place that fits is taken, so that what is touched stays
//! small while little is in flight.

use super::memory::PAGE;

/// Areas are whole multiples of this.
const UNIT: u64 = 64;

/// Free and taken parts of an area of memory.
#[derive(Debug)]
pub(super) struct Space {
    start: u64,
    size: u64,
    /// Start and length of each free part, by address, none beside another.
    free: Vec<(u64, u64)>,
    /// End of the highest part taken since the last [`trim`](Self::trim).
    touched: u64,
}

impl Space {
    /// An area that is free. `start` is a multiple of a page.
    pub fn new(start: u64, size: u64) -> Self {
        Self {
            start,
            size,
            free: vec![(start, size)],
            touched: start,
        }
    }

    /// Length of the whole.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Takes `length` bytes at a multiple of `align`, a power of two that is at least 64.
    pub fn take(&mut self, length: u64, align: u64) -> Option<u64> {
        let length = length.checked_next_multiple_of(UNIT)?;
        if length == 0 {
            return Some(self.start);
        }
        let (index, at) = self.free.iter().enumerate().find_map(|(index, part)| {
            let at = part.0.next_multiple_of(align);
            let end = at.checked_add(length)?;
            (end <= part.0 + part.1).then_some((index, at))
        })?;
        let (start, size) = self.free[index];
        let before = (start, at - start);
        let after = (at + length, start + size - at - length);
        let left = [before, after].into_iter().filter(|part| part.1 > 0);
        self.free.splice(index..=index, left);
        self.touched = self.touched.max(at + length);
        Some(at)
    }

    /// Gives back what [`take`](Self::take) gave for this length.
    pub fn give(&mut self, at: u64, length: u64) {
        let length = length.next_multiple_of(UNIT);
        if length == 0 {
            return;
        }
        let index = self.free.partition_point(|part| part.0 < at);
        self.free.insert(index, (at, length));
        let touches = |a: (u64, u64), b: (u64, u64)| a.0 + a.1 == b.0;
        if index + 1 < self.free.len() && touches(self.free[index], self.free[index + 1]) {
            self.free[index].1 += self.free.remove(index + 1).1;
        }
        if index > 0 && touches(self.free[index - 1], self.free[index]) {
            self.free[index - 1].1 += self.free.remove(index).1;
        }
    }

    /// Bytes up to the end of the highest part taken since the last [`trim`](Self::trim).
    pub fn touched(&self) -> u64 {
        self.touched - self.start
    }

    /// The free parts that have been taken since the last call, as whole pages.
    pub fn trim(&mut self) -> Vec<(u64, u64)> {
        let top = std::mem::replace(&mut self.touched, self.start);
        let mut parts = Vec::new();
        for &(start, size) in &self.free {
            let end = (start + size).min(top.next_multiple_of(PAGE)) & !(PAGE - 1);
            let start = start.next_multiple_of(PAGE);
            if start < end {
                parts.push((start, end - start));
            }
        }
        // What is taken counts the next time, too.
        let end = self.start + self.size;
        let last = self.free.last().filter(|part| part.0 + part.1 == end);
        self.touched = last.map_or(end, |part| part.0);
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lowest_place_is_taken_and_parts_join_again() {
        let mut space = Space::new(PAGE, 4 * PAGE);
        let a = space.take(100, 64).unwrap();
        let b = space.take(PAGE, PAGE).unwrap();
        let c = space.take(1, 64).unwrap();
        assert_eq!((a, b, c), (PAGE, 2 * PAGE, PAGE + 128));
        assert_eq!(space.take(2 * PAGE + 1, 64), None, "it is not there in one");
        space.give(a, 100);
        space.give(c, 1);
        space.give(b, PAGE);
        assert_eq!(space.free, [(PAGE, 4 * PAGE)]);
        assert_eq!(space.touched(), 2 * PAGE);
        assert_eq!(space.trim(), [(PAGE, 2 * PAGE)]);
        assert_eq!(space.touched(), 0);
        assert!(space.trim().is_empty());
        assert_eq!(space.take(u64::MAX, 64), None);
        assert_eq!(space.take(4 * PAGE, PAGE), Some(PAGE));
    }

    proptest! {
        #[test]
        fn parts_never_overlap(
            wishes in prop::collection::vec((0u64..9000, 0u32..3, any::<prop::sample::Index>()), 1..200)
        ) {
            let whole = PAGE..PAGE + 16 * PAGE;
            let mut space = Space::new(whole.start, 16 * PAGE);
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (length, align, victim) in wishes {
                let align = [64, 512, PAGE][align as usize];
                if let Some(at) = space.take(length, align) {
                    prop_assert!(length == 0 || at.is_multiple_of(align));
                    prop_assert!(whole.contains(&at) && at + length <= whole.end);
                    for &(other, size) in &taken {
                        prop_assert!(at + length <= other || other + size <= at || length == 0 || size == 0);
                    }
                    taken.push((at, length));
                } else if !taken.is_empty() {
                    let (at, length) = taken.swap_remove(victim.index(taken.len()));
                    space.give(at, length);
                }
                for (start, size) in space.trim() {
                    for &(other, length) in &taken {
                        prop_assert!(start + size <= other || other + length <= start || length == 0);
                    }
                }
            }
            for (at, length) in taken {
                space.give(at, length);
            }
            prop_assert_eq!(&space.free, &[(whole.start, 16 * PAGE)]);
        }
    }
}
