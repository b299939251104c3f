//! Opens taps (linux/if_tun.h).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anemone_config::IfName;
use thiserror::Error;

use crate::sys;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const IFF_TAP: i16 = 0x0002;
const IFF_MULTI_QUEUE: i16 = 0x0100;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;

const DEVICE: &str = "/dev/net/tun";

/// A tap cannot be used.
#[derive(Debug, Error)]
#[error("network card `{id}`: tap `{tap}`: {reason}")]
pub struct TapError {
    id: String,
    tap: String,
    reason: Reason,
}

#[derive(Debug, Error)]
enum Reason {
    #[error("{DEVICE}: {0}")]
    Device(io::Error),
    #[error(
        "there is no interface of that name; make it with `ip tuntap add NAME mode tap user USER`"
    )]
    Absent,
    #[error(
        "not permitted: a tap belongs to the user that it was made for (`ip tuntap add NAME mode \
         tap user USER`), other users need CAP_NET_ADMIN"
    )]
    NotPermitted,
    #[error("it is in use by another VM or program")]
    Busy,
    #[error("the interface is not a tap")]
    NotATap,
    #[error("it has one queue; {0} need a tap made with `multi_queue`")]
    OneQueue(u16),
    #[error("{0}")]
    System(io::Error),
}

/// `struct ifreq` with a number.
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    value: i32,
    rest: [u8; 20],
}

impl IfReq {
    fn new(name: &IfName, value: i32) -> Self {
        let mut request = Self {
            name: [0; 16],
            value,
            rest: [0; 20],
        };
        // A name has 15 bytes at most, so that a NUL follows.
        for (to, from) in request.name.iter_mut().zip(name.as_str().bytes()) {
            *to = from;
        }
        request
    }
}

/// An open tap: a descriptor for each queue pair, and the interface's largest packet.
#[derive(Debug)]
pub struct Tap {
    /// One for each queue pair.
    pub queues: Vec<OwnedFd>,
    /// Largest IP packet.
    pub mtu: u16,
}

/// Opens an existing tap with so many queue pairs, with the header of virtio before each frame.
pub fn open(id: &str, name: &IfName, pairs: u16) -> Result<Tap, TapError> {
    let error = |reason| TapError {
        id: id.to_owned(),
        tap: name.to_string(),
        reason,
    };
    // The kernel would make an interface that does not exist, for who may do that.
    let mtu = mtu(name).map_err(|e| {
        error(match e.raw_os_error() {
            Some(libc::ENODEV) => Reason::Absent,
            _ => Reason::System(e),
        })
    })?;
    let mut queues: Vec<OwnedFd> = Vec::new();
    // A tap with one queue may have been made for several.
    let mut multi_queue = pairs > 1;
    while queues.len() < usize::from(pairs) {
        match attach(name, multi_queue) {
            Ok(queue) => queues.push(queue),
            Err(Attach::Open(e)) => return Err(error(Reason::Device(e))),
            Err(Attach::Tap(e)) => {
                let reason = match e.raw_os_error() {
                    Some(libc::EINVAL) if pairs == 1 && !multi_queue => {
                        multi_queue = true;
                        continue;
                    }
                    Some(libc::EINVAL) if pairs > 1 && attach(name, false).is_ok() => {
                        Reason::OneQueue(pairs)
                    }
                    Some(libc::EINVAL) => Reason::NotATap,
                    Some(libc::EPERM) => Reason::NotPermitted,
                    Some(libc::EBUSY) => Reason::Busy,
                    _ => Reason::System(e),
                };
                return Err(error(reason));
            }
        }
    }
    Ok(Tap { queues, mtu })
}

enum Attach {
    Open(io::Error),
    Tap(io::Error),
}

fn attach(name: &IfName, multi_queue: bool) -> Result<OwnedFd, Attach> {
    let device = Path::new(DEVICE);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map_err(Attach::Open)?;
    let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if multi_queue { IFF_MULTI_QUEUE } else { 0 };
    let mut request = IfReq::new(name, flags.into());
    // SAFETY: the request is a struct ifreq, which the call reads and writes.
    match unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } {
        -1 => Err(Attach::Tap(io::Error::last_os_error())),
        _ => Ok(file.into()),
    }
}

fn mtu(name: &IfName) -> io::Result<u16> {
    let mut request = IfReq::new(name, 0);
    // SAFETY: no pointers; the call makes a descriptor or fails.
    let socket = unsafe {
        sys::owned(libc::socket(
            libc::AF_UNIX,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            0,
        ))?
    };
    // SAFETY: the request is a struct ifreq, which the call reads and writes.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(u16::try_from(request.value).unwrap_or(u16::MAX)),
    }
}
