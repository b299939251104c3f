//! MAC addresses, and which frames pass.

use std::fmt;
use std::str::FromStr;

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Multicast or broadcast.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl FromStr for Mac {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = "not a MAC address of the form 02:00:00:00:00:01, unicast and not all zero";
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let digits =
                |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            let part = parts.next().filter(digits).ok_or(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong)?;
        }
        match parts.next() {
            None if !Self(mac).is_group() && mac != [0; 6] => Ok(Self(mac)),
            _ => Err(wrong),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Most multicast addresses that a driver can list; more means all.
const MAX_LISTED: usize = 64;

/// Lets a guest send as itself and receive what is meant for it.
#[derive(Debug, Clone)]
pub struct Filter {
    own: Mac,
    /// The multicast addresses that the driver listens to; all of them when absent.
    groups: Option<Vec<Mac>>,
}

impl Filter {
    /// The filter of a guest with this address, which has not said anything.
    pub fn new(own: Mac) -> Self {
        Self { own, groups: None }
    }

    /// Whether the guest may send a frame that begins so.
    pub fn may_send(&self, frame: &[u8]) -> bool {
        frame.get(6..12) == Some(&self.own.0[..])
    }

    /// Whether the guest gets a frame that begins so.
    pub fn may_receive(&self, frame: &[u8]) -> bool {
        let Some(&[a, b, c, d, e, f]) = frame.get(..6) else {
            return false;
        };
        let to = Mac([a, b, c, d, e, f]);
        if !to.is_group() || to.0 == [0xff; 6] {
            return to == self.own || to.is_group();
        }
        self.groups.as_ref().is_none_or(|list| list.contains(&to))
    }

    /// The driver listens to these groups, or to all.
    pub fn set_groups(&mut self, groups: Option<Vec<Mac>>) {
        self.groups = groups.filter(|list| list.len() <= MAX_LISTED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: &str, from: &str) -> Vec<u8> {
        let address = |text: &str| -> Vec<u8> {
            let bytes = text.split(':').map(|b| u8::from_str_radix(b, 16).unwrap());
            bytes.collect()
        };
        [address(to), address(from), vec![8, 0]].concat()
    }

    #[test]
    fn addresses() {
        let mac: Mac = "02:0a:ff:00:10:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:0a:ff:00:10:01");
        for wrong in [
            "",
            "02:0a:ff:00:10",
            "02:0a:ff:00:10:01:02",
            "2:a:ff:0:10:1",
            "03:00:00:00:00:01",
            "00:00:00:00:00:00",
            "02:00:00:00:00:+1",
            "02-00-00-00-00-01",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_own_frames_pass() {
        let own = "02:00:00:00:00:01";
        let other = "02:00:00:00:00:02";
        let (broadcast, group) = ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:fb");
        let mut filter = Filter::new(own.parse().unwrap());
        assert!(filter.may_send(&frame(other, own)));
        assert!(!filter.may_send(&frame(own, other)));
        assert!(!filter.may_send(&frame(own, group)));
        assert!(!filter.may_send(&[0; 11]));
        for (to, passes) in [
            (own, true),
            (other, false),
            (broadcast, true),
            (group, true),
        ] {
            assert_eq!(filter.may_receive(&frame(to, other)), passes, "{to}");
        }
        filter.set_groups(Some(Vec::new()));
        assert!(!filter.may_receive(&frame(group, other)));
        assert!(filter.may_receive(&frame(broadcast, other)));
        filter.set_groups(Some(vec![Mac([1, 0, 0x5e, 0, 0, 0xfb])]));
        assert!(filter.may_receive(&frame(group, other)));
        filter.set_groups(Some(vec![Mac([1, 0, 0, 0, 0, 0]); MAX_LISTED + 1]));
        assert!(filter.may_receive(&frame(group, other)));
        assert!(!filter.may_receive(&[0xff; 5]));
    }
}
