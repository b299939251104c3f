//! What a tap can do, and how it is told what the driver takes (linux/if_tun.h).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use thiserror::Error;

use crate::net::{HEADER_SIZE, feature};

const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

const TUN_F_CSUM: u32 = 0x01;
const TUN_F_TSO4: u32 = 0x02;
const TUN_F_TSO6: u32 = 0x04;
const TUN_F_TSO_ECN: u32 = 0x08;
const TUN_F_USO4: u32 = 0x20;
const TUN_F_USO6: u32 = 0x40;

const IFF_TAP: i16 = 0x0002;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;
const IFF_VNET_HDR: i16 = 0x4000;

/// `struct ifreq` with flags.
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

impl IfReq {
    fn new(flags: i16) -> Self {
        Self {
            name: [0; 16],
            flags,
            rest: [0; 22],
        }
    }
}

/// A descriptor is not a tap that can be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// Not a tap at all, or one that has been removed.
    #[error("not a tap: {0}")]
    Not(io::Error),
    /// It was opened in another way.
    #[error("the tap was opened without {0}")]
    Mode(&'static str),
    /// It takes no headers.
    #[error("the tap takes no virtio header of {HEADER_SIZE} bytes: {0}")]
    Header(io::Error),
}

fn ioctl(fd: BorrowedFd<'_>, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the callers pass a number, or the address of what the request reads or writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Checks a tap, sets its header size, and tells which features it can have.
pub fn prepare(fd: BorrowedFd<'_>, multi_queue: bool) -> Result<u64, TapError> {
    let mut request = IfReq::new(0);
    let address = (&raw mut request) as libc::c_ulong;
    ioctl(fd, TUNGETIFF, address).map_err(TapError::Not)?;
    // Whether it was opened with IFF_NO_PI is not told: that bit means something else here.
    let modes = [
        (IFF_TAP, "IFF_TAP"),
        (IFF_VNET_HDR, "IFF_VNET_HDR"),
        (
            if multi_queue { IFF_MULTI_QUEUE } else { 0 },
            "IFF_MULTI_QUEUE",
        ),
    ];
    for (mode, name) in modes {
        if request.flags & mode != mode {
            return Err(TapError::Mode(name));
        }
    }
    let size = HEADER_SIZE as libc::c_int;
    ioctl(fd, TUNSETVNETHDRSZ, (&raw const size) as libc::c_ulong).map_err(TapError::Header)?;

    use feature::{
        CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN,
        HOST_TSO4, HOST_TSO6, HOST_USO,
    };
    let tcp = GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
    let udp = GUEST_USO4 | GUEST_USO6;
    // What the tap does for the guest it also takes from the guest.
    let offers = [
        (
            GUEST_CSUM | tcp | udp,
            CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO,
        ),
        (GUEST_CSUM | tcp, CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN),
        (GUEST_CSUM, CSUM),
    ];
    let able = offers
        .into_iter()
        .find(|(guest, _)| set_offloads(fd, *guest).is_ok());
    // Nothing until the driver has said what it takes; that is what a tap begins with.
    let _ = set_offloads(fd, 0);
    Ok(able.map_or(0, |(guest, host)| guest | host))
}

/// Tells the tap what it may leave to the driver, which has accepted `features`.
pub fn set_offloads(fd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let bits = [
        (feature::GUEST_CSUM, TUN_F_CSUM),
        (feature::GUEST_TSO4, TUN_F_TSO4),
        (feature::GUEST_TSO6, TUN_F_TSO6),
        (feature::GUEST_ECN, TUN_F_TSO_ECN),
        (feature::GUEST_USO4, TUN_F_USO4),
        (feature::GUEST_USO6, TUN_F_USO6),
    ];
    let has = |bit| features & bit != 0;
    // Nothing works without checksums (virtio 1.3, 5.1.3.1).
    let offloads = match has(feature::GUEST_CSUM) {
        true => bits
            .iter()
            .filter(|(bit, _)| has(*bit))
            .map(|(_, tun)| tun)
            .sum(),
        false => 0u32,
    };
    ioctl(fd, TUNSETOFFLOAD, offloads.into())
}

/// Attaches a queue of a multi-queue tap, or detaches it: it then gets no frames.
pub fn attach(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let request = IfReq::new(if on {
        IFF_ATTACH_QUEUE
    } else {
        IFF_DETACH_QUEUE
    });
    ioctl(fd, TUNSETQUEUE, (&raw const request) as libc::c_ulong)
}
