//! Users and groups: what the guest calls those of the host.

use std::str::FromStr;

/// What an id becomes that has no name on the other side (Linux's overflow id).
const NOBODY: u32 = 65534;

/// A translation between the guest's ids and the host's. Without ranges they are the same.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IdMap {
    /// First id of the guest, first id of the host, how many.
    ranges: Vec<(u32, u32, u32)>,
}

impl IdMap {
    /// What the guest calls an id of the host.
    pub fn guest(&self, host: u32) -> u32 {
        if self.ranges.is_empty() {
            return host;
        }
        let inside = |&(guest, first, count): &(u32, u32, u32)| {
            let at = host.checked_sub(first)?;
            (at < count).then(|| guest + at)
        };
        self.ranges.iter().find_map(inside).unwrap_or(NOBODY)
    }

    /// The host's id behind one of the guest's.
    pub fn host(&self, guest: u32) -> Option<u32> {
        if self.ranges.is_empty() {
            return Some(guest);
        }
        self.ranges.iter().find_map(|&(first, host, count)| {
            let at = guest.checked_sub(first)?;
            (at < count).then(|| host + at)
        })
    }
}

impl FromStr for IdMap {
    type Err = String;

    /// `GUEST:HOST:COUNT`, several joined by `+`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not GUEST:HOST:COUNT, or several joined by `+`");
        let mut ranges: Vec<(u32, u32, u32)> = Vec::new();
        for part in text.split('+') {
            let numbers: Vec<u32> = part
                .split(':')
                .map(|number| number.parse().map_err(|_| wrong()))
                .collect::<Result<_, _>>()?;
            let [guest, host, count] = numbers[..] else {
                return Err(wrong());
            };
            if count == 0 || guest.checked_add(count).is_none() || host.checked_add(count).is_none()
            {
                return Err(format!("`{part}` is not a range of ids, 0 to 4294967294"));
            }
            let meets = |a: u32, b: u32, many: u32| a < b + many && b < a + count;
            if ranges
                .iter()
                .any(|&(g, h, many)| meets(guest, g, many) || meets(host, h, many))
            {
                return Err(format!("`{part}` overlaps another range"));
            }
            ranges.push((guest, host, count));
        }
        Ok(Self { ranges })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated_both_ways() {
        let map: IdMap = "0:1000:1+1:100000:65536".parse().unwrap();
        for (guest, host) in [(0, 1000), (1, 100_000), (65536, 165_535)] {
            assert_eq!((map.guest(host), map.host(guest)), (guest, Some(host)));
        }
        assert_eq!((map.guest(0), map.host(65537)), (NOBODY, None));
        let same = IdMap::default();
        assert_eq!((same.guest(7), same.host(7)), (7, Some(7)));
    }

    #[test]
    fn what_is_no_map_is_refused() {
        for text in [
            "",
            "0:1",
            "0:1:2:3",
            "a:1:1",
            "0:0:0",
            "0:4294967295:1",
            "0:5:9+8:90:1",
            "0:5:9+90:13:2",
        ] {
            assert!(text.parse::<IdMap>().is_err(), "{text}");
        }
        assert!("0:5:9+9:14:1".parse::<IdMap>().is_ok());
    }
}
