//! The control queue (virtio 1.3, 5.1.6.5).

use crate::filter::Mac;

/// Longest command that is read: a MAC table of more entries than anyone listens to.
pub const MAX_COMMAND: usize = 8192;
/// The command was carried out.
pub const OK: u8 = 0;
/// It was not.
pub const ERR: u8 = 1;

/// What a driver asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Use this many queue pairs.
    Pairs(u16),
    /// All frames, or all multicast frames.
    Everything {
        /// The mode that is set.
        mode: Mode,
        /// On or off.
        on: bool,
    },
    /// Listen to these multicast addresses.
    Groups(Vec<Mac>),
}

/// A receive mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All frames.
    Promiscuous,
    /// All multicast frames.
    AllMulticast,
}

/// Reads a command; `None` if it is not one of those that were offered.
pub fn parse(command: &[u8]) -> Option<Request> {
    const RX: u8 = 0;
    const MAC: u8 = 1;
    const MQ: u8 = 4;
    let mode = |mode, on: &[u8]| match on {
        [on, ..] => Some(Request::Everything { mode, on: *on != 0 }),
        [] => None,
    };
    match command {
        [RX, 0, data @ ..] => mode(Mode::Promiscuous, data),
        [RX, 1, data @ ..] => mode(Mode::AllMulticast, data),
        [MAC, 0, data @ ..] => {
            // Unicast addresses, then multicast ones. The first are not given more than one.
            let (_, rest) = table(data)?;
            table(rest).map(|(list, _)| Request::Groups(list))
        }
        [MQ, 0, low, high, ..] => Some(Request::Pairs(u16::from_le_bytes([*low, *high]))),
        _ => None,
    }
}

/// A number and so many addresses, and what comes after them.
fn table(data: &[u8]) -> Option<(Vec<Mac>, &[u8])> {
    let (count, data) = data.split_first_chunk::<4>()?;
    let bytes = usize::try_from(u32::from_le_bytes(*count))
        .ok()?
        .checked_mul(6)?;
    let (list, rest) = data.split_at_checked(bytes)?;
    let (addresses, _) = list.as_chunks::<6>();
    Some((addresses.iter().map(|bytes| Mac(*bytes)).collect(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commands() {
        assert_eq!(parse(&[4, 0, 3, 1]), Some(Request::Pairs(0x103)));
        let on = |mode, on| Some(Request::Everything { mode, on });
        assert_eq!(parse(&[0, 0, 1]), on(Mode::Promiscuous, true));
        assert_eq!(parse(&[0, 1, 0]), on(Mode::AllMulticast, false));
        let mut tables = vec![1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0];
        tables.extend([1, 0, 0x5e, 0, 0, 1, 0x33, 0x33, 0, 0, 0, 1]);
        let groups = vec![Mac([1, 0, 0x5e, 0, 0, 1]), Mac([0x33, 0x33, 0, 0, 0, 1])];
        assert_eq!(parse(&tables), Some(Request::Groups(groups)));
        for cut in 0..tables.len() {
            assert_eq!(parse(&tables[..cut]), None, "{cut}");
        }
        for wrong in [
            &[][..],
            &[4],
            &[4, 0, 1],
            &[4, 1, 1, 0],
            &[9, 9, 9],
            &[0, 7, 1],
            &[0, 0],
        ] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
        assert_eq!(parse(&[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0]), None);
    }

    proptest! {
        #[test]
        fn no_command_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
