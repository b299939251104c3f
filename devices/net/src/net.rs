//! Constants and layouts of the specification (virtio 1.3, 5.1).

/// Feature bits (5.1.3).
pub mod feature {
    /// The device takes packets with partial checksums.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes packets with partial checksums.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// `mtu` is valid.
    pub const MTU: u64 = 1 << 3;
    /// `mac` is valid.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP segments over IPv4 of up to 64 KiB.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The same over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The same with congestion marks.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes TCP segments over IPv4 of up to 64 KiB.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The same over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The same with congestion marks.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A packet may be spread over several chains of the receive queue.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// `status` is valid.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// It takes receive modes and MAC tables.
    pub const CTRL_RX: u64 = 1 << 18;
    /// Several queue pairs.
    pub const MQ: u64 = 1 << 22;
    /// The driver takes UDP packets over IPv4 that are to be segmented.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The same over IPv6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes UDP packets that are to be segmented.
    pub const HOST_USO: u64 = 1 << 56;
}

/// Length of `struct virtio_net_hdr` with `num_buffers` (5.1.6).
pub const HEADER_SIZE: usize = 12;
/// Offset of `num_buffers`.
pub const NUM_BUFFERS: usize = 10;
/// Destination, source and type.
pub const ETHERNET_HEADER: usize = 14;
/// Longest frame: 64 KiB of an IP packet, an Ethernet header, a VLAN tag.
pub const MAX_FRAME: usize = 65535 + ETHERNET_HEADER + 4;

/// Bits of `status` (5.1.4).
pub const STATUS_LINK_UP: u16 = 1;

/// Header of a packet (5.1.6).
pub type Header = [u8; HEADER_SIZE];

/// A header with nothing in it, for a packet in one buffer.
pub const PLAIN: Header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Checks the header of a packet that the driver sends, and takes out what it may not ask for with
/// the `features` accepted. `None` if the packet cannot be sent then.
pub fn check_header(mut header: Header, features: u64) -> Option<Header> {
    const NEEDS_CSUM: u8 = 1;
    const GSO_ECN: u8 = 0x80;
    let [flags, gso, ..] = header;
    let has = |bits| features & bits != 0;
    let allowed = match gso & !GSO_ECN {
        0 => gso == 0,
        1 => has(feature::HOST_TSO4),
        4 => has(feature::HOST_TSO6),
        5 => has(feature::HOST_USO),
        _ => false,
    };
    if !allowed || (gso & GSO_ECN != 0 && !has(feature::HOST_ECN)) {
        return None;
    }
    if !has(feature::CSUM) {
        // 5.1.6.2: the driver must not set anything then.
        return Some([0; HEADER_SIZE]);
    }
    header[0] = flags & NEEDS_CSUM;
    header[NUM_BUFFERS..].fill(0);
    Some(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use feature::{CSUM, HOST_ECN, HOST_TSO4, HOST_TSO6, HOST_USO};

    #[test]
    fn headers_ask_for_what_was_negotiated_only() {
        let header = |flags, gso| [flags, gso, 54, 0, 0xa0, 5, 34, 0, 16, 0, 7, 7];
        for (gso, needed) in [
            (0, 0),
            (1, HOST_TSO4),
            (4, HOST_TSO6),
            (5, HOST_USO),
            (0x81, HOST_TSO4 | HOST_ECN),
        ] {
            let clean = [1, gso, 54, 0, 0xa0, 5, 34, 0, 16, 0, 0, 0];
            let all = needed | CSUM;
            assert_eq!(check_header(header(0xff, gso), all), Some(clean));
            for bit in (0..64).map(|bit| 1 << bit).filter(|bit| needed & bit != 0) {
                assert_eq!(check_header(header(1, gso), all & !bit), None, "{gso}");
            }
        }
        for gso in [2, 3, 6, 0x80, 0xff] {
            assert_eq!(check_header(header(0, gso), !0), None, "{gso}");
        }
        assert_eq!(check_header(header(1, 0), 0), Some([0; HEADER_SIZE]));
    }
}
