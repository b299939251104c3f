//! The guest's statistics (virtio 1.3, 5.5.6.3).

use anemone_device::BalloonState;

/// Bytes of one: tag and value, packed.
const LENGTH: usize = 10;
/// Bytes of a buffer that are looked at. Linux fills 100.
pub const MOST_BYTES: usize = LENGTH * BalloonState::STATISTICS;

/// Reads a buffer of the driver. Of a tag that comes twice the first counts; tags that do not exist
/// and values of all ones, which mean that there is none, are left out.
pub fn parse(bytes: &[u8]) -> Vec<(u16, u64)> {
    let mut statistics: Vec<(u16, u64)> = Vec::new();
    for one in bytes.chunks_exact(LENGTH) {
        let (tag, value) = one.split_at(2);
        let tag = u16::from_le_bytes([tag[0], tag[1]]);
        let value = value.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
        let known = BalloonState::statistic(tag).is_some();
        if known && value != u64::MAX && statistics.iter().all(|&(other, _)| other != tag) {
            statistics.push((tag, value));
        }
    }
    statistics
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_exists_is_passed_on() {
        let one = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes = [
            one(4, 1 << 40),
            one(999, 1),
            one(0, u64::MAX),
            one(4, 5),
            one(9, 3),
            vec![1, 2, 3],
        ];
        assert_eq!(parse(&bytes.concat()), [(4, 1 << 40), (9, 3)]);
        assert_eq!(parse(&[]), []);
    }
}
