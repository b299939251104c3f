//! Numbered pages that a guest writes to persistent memory, and that are looked for in its file.

use std::ops::Range;

use crate::pattern::Pattern;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Writers, each with pages of its own.
pub const WRITERS: u64 = 2;
/// Pages of a writer, which it writes in turn.
const EACH: u64 = 256;

/// Index of the page that a writer's write with this number goes to.
pub fn place(writer: u64, number: u64) -> u64 {
    writer * EACH + number % EACH
}

/// What is written then.
pub fn content(writer: u64, number: u64) -> Vec<u8> {
    let mut page = [writer, number].map(u64::to_le_bytes).concat();
    page.extend(Pattern::new(number * WRITERS + writer).take(PAGE - page.len()));
    page
}

/// The latest write of each page, when a writer has done the writes before `count`.
pub fn latest(count: u64) -> Range<u64> {
    count.saturating_sub(EACH)..count
}

/// Looks in a file for the latest writes of a writer that has done so many.
///
/// # Errors
/// What is there instead of one.
pub fn verify(file: &[u8], writer: u64, count: u64) -> Result<(), String> {
    for number in latest(count) {
        let start = place(writer, number) as usize * PAGE;
        let found = file.get(start..start + PAGE).unwrap_or_default();
        if found != content(writer, number) {
            let told = found.chunks(8).nth(1).unwrap_or_default();
            let told = told.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b));
            return Err(format!(
                "write {number} of writer {writer} was acknowledged and is not in the file, which has \
                 {told} there"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_late_writes_are_found() {
        let mut file = vec![0; 2 * EACH as usize * PAGE];
        let mut write = |number: u64| {
            let start = place(1, number) as usize * PAGE;
            file[start..start + PAGE].copy_from_slice(&content(1, number));
            file.clone()
        };
        (0..300).for_each(|number| drop(write(number)));
        let file = write(300);
        assert_eq!(verify(&file, 1, 301), Ok(()));
        assert!(verify(&file, 1, 302).is_err());
        assert!(verify(&file, 1, 300).is_err());
        assert!(verify(&file, 0, 1).is_err());
        let mut late = file;
        let start = place(1, 299) as usize * PAGE;
        late[start..start + PAGE].copy_from_slice(&content(1, 299 - EACH));
        assert!(verify(&late, 1, 301).is_err());
    }
}
