//! Packets with descriptors over a `SOCK_SEQPACKET` socket.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use crate::FdIndex;

/// Longest message in bytes. A socket pair's default send buffer holds it.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Most descriptors one message may carry (the kernel's limit is 253).
pub const MAX_FDS: usize = 128;

/// Why a message could not be sent or received.
#[derive(Debug, Error)]
pub enum Error {
    /// The socket failed.
    #[error("control channel: {0}")]
    Io(#[from] io::Error),
    /// The peer closed its end.
    #[error("control channel: the peer has closed it")]
    Closed,
    /// The packet is longer than [`MAX_MESSAGE`] or carries more than [`MAX_FDS`] descriptors.
    #[error("control channel: message of {bytes} bytes and {fds} descriptors is over the limit")]
    TooLarge {
        /// Length of the message.
        bytes: usize,
        /// Number of descriptors.
        fds: usize,
    },
    /// The text is not a message of this protocol.
    #[error("control channel: malformed message: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A message names a descriptor that did not come with it, or names one twice.
    #[error("control channel: message refers to descriptor {0}, which did not come with it")]
    MissingFd(u16),
}

/// One end of a control socket. Receiving blocks unless the socket was made non-blocking.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

/// A message together with the descriptors that came with it.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    fds: Vec<Option<OwnedFd>>,
}

impl<T> Received<T> {
    /// Takes the descriptor at `index`; each can be taken once.
    pub fn take(&mut self, index: FdIndex) -> Result<OwnedFd, Error> {
        self.fds
            .get_mut(usize::from(index.0))
            .and_then(Option::take)
            .ok_or(Error::MissingFd(index.0))
    }
}

/// Makes two connected channels, both closed on exec.
pub fn pair() -> io::Result<(Channel, Channel)> {
    let mut fds: [RawFd; 2] = [-1; 2];
    // SAFETY: `fds` has room for the two descriptors the call writes.
    let rc = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so both are open descriptors that nothing else owns.
    Ok(unsafe {
        (
            Channel::new(OwnedFd::from_raw_fd(fds[0])),
            Channel::new(OwnedFd::from_raw_fd(fds[1])),
        )
    })
}

impl Channel {
    /// Wraps a `SOCK_SEQPACKET` socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Sends one message; `fds` is the list that its [`FdIndex`] values point into.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let text = serde_json::to_vec(message)?;
        if text.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(Error::TooLarge {
                bytes: text.len(),
                fds: fds.len(),
            });
        }
        let mut control = ControlBuffer::new();
        let mut iov = libc::iovec {
            iov_base: text.as_ptr().cast_mut().cast(),
            iov_len: text.len(),
        };
        // SAFETY: an all-zero msghdr is valid: null pointers with zero lengths.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        if !fds.is_empty() {
            control.fill(fds);
            header.msg_control = control.as_mut_ptr();
            header.msg_controllen = ControlBuffer::space(fds.len());
        }
        loop {
            // SAFETY: the header points at `text` and `control`, both alive and of the lengths given.
            let sent =
                unsafe { libc::sendmsg(self.socket.as_raw_fd(), &header, libc::MSG_NOSIGNAL) };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EPIPE | libc::ECONNRESET) => return Err(Error::Closed),
                _ => return Err(error.into()),
            }
        }
    }

    /// Receives one message. [`Error::Closed`] is the normal end of a conversation.
    pub fn recv<T: DeserializeOwned>(&self) -> Result<Received<T>, Error> {
        let mut text = vec![0u8; MAX_MESSAGE];
        let mut control = ControlBuffer::new();
        let mut iov = libc::iovec {
            iov_base: text.as_mut_ptr().cast(),
            iov_len: text.len(),
        };
        // SAFETY: an all-zero msghdr is valid: null pointers with zero lengths.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr();
        header.msg_controllen = ControlBuffer::space(MAX_FDS);
        let mut reset = false;
        let length = loop {
            // SAFETY: the header points at `text` and `control`, both alive and of the lengths given.
            let n = unsafe {
                libc::recvmsg(
                    self.socket.as_raw_fd(),
                    &raw mut header,
                    libc::MSG_CMSG_CLOEXEC,
                )
            };
            if let Ok(n) = usize::try_from(n) {
                break n;
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // A peer that ends with messages unread leaves this once, before its own last ones.
                Some(libc::ECONNRESET) if !std::mem::replace(&mut reset, true) => {}
                Some(libc::ECONNRESET) => return Err(Error::Closed),
                _ => return Err(error.into()),
            }
        };
        // SAFETY: the kernel has just filled the control buffer that `header` points at.
        let fds = unsafe { collect_fds(&header) };
        if length == 0 {
            return Err(Error::Closed);
        }
        if header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(Error::TooLarge {
                bytes: length,
                fds: fds.len(),
            });
        }
        let message = serde_json::from_slice(&text[..length])?;
        Ok(Received {
            message,
            fds: fds.into_iter().map(Some).collect(),
        })
    }

    /// Makes [`recv`](Self::recv) and [`send`](Self::send) return `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        let mut value = libc::c_int::from(on);
        // SAFETY: FIONBIO reads one int through the pointer.
        let rc = unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::FIONBIO, &raw mut value) };
        if rc == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Gives the socket back.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Error {
    /// Whether a non-blocking channel merely had nothing to offer.
    pub fn is_would_block(&self) -> bool {
        matches!(self, Error::Io(e) if e.kind() == io::ErrorKind::WouldBlock)
    }
}

/// Room for [`MAX_FDS`] descriptors as ancillary data, aligned for `cmsghdr`.
struct ControlBuffer {
    words: [MaybeUninit<u64>; Self::WORDS],
}

impl ControlBuffer {
    const WORDS: usize = (64 + MAX_FDS * size_of::<RawFd>()) / 8;

    fn new() -> Self {
        Self {
            words: [MaybeUninit::zeroed(); Self::WORDS],
        }
    }

    fn as_mut_ptr(&mut self) -> *mut libc::c_void {
        self.words.as_mut_ptr().cast()
    }

    /// Bytes that `count` descriptors need with their header.
    fn space(count: usize) -> usize {
        // MAX_FDS bounds `count`, so the product fits in 32 bits.
        // SAFETY: pure arithmetic on its argument.
        unsafe { libc::CMSG_SPACE((count * size_of::<RawFd>()) as u32) as usize }
    }

    fn fill(&mut self, fds: &[BorrowedFd<'_>]) {
        let bytes = (fds.len() * size_of::<RawFd>()) as u32;
        let header: *mut libc::cmsghdr = self.as_mut_ptr().cast();
        // SAFETY: the buffer is zeroed, aligned, and has room for the header and MAX_FDS
        // descriptors; the caller has checked the count.
        unsafe {
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            let data: *mut RawFd = libc::CMSG_DATA(header).cast();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
}

/// Takes ownership of all descriptors in a received header.
///
/// # Safety
/// `header` must come from a successful `recvmsg`, its control buffer unchanged since.
unsafe fn collect_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR stay inside the buffer the kernel filled; an
    // SCM_RIGHTS message holds whole descriptors that now belong to this process alone.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(header);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let data: *const RawFd = libc::CMSG_DATA(cmsg).cast();
                let bytes = (*cmsg).cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..bytes / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(header, cmsg);
        }
    }
    fds
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    #[test]
    fn last_words_of_a_peer_that_has_not_listened() {
        let (a, b) = pair().unwrap();
        a.send(&"unread", &[]).unwrap();
        b.send(&"farewell", &[]).unwrap();
        drop(b);
        assert_eq!(a.recv::<String>().unwrap().message, "farewell");
        assert!(matches!(a.recv::<String>(), Err(Error::Closed)));
    }

    #[test]
    fn message_and_descriptor_arrive_together() {
        let (a, b) = pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"through").unwrap();
        a.send(&("hello", 7u32), &[file.as_fd()]).unwrap();
        let mut got = b.recv::<(String, u32)>().unwrap();
        assert_eq!(got.message, ("hello".to_string(), 7));
        let mut copy = File::from(got.take(FdIndex(0)).unwrap());
        copy.rewind().unwrap();
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        assert!(matches!(got.take(FdIndex(0)), Err(Error::MissingFd(0))));
        assert!(matches!(got.take(FdIndex(1)), Err(Error::MissingFd(1))));
    }

    #[test]
    fn close_malformed_and_oversized_are_errors() {
        let (a, b) = pair().unwrap();
        a.send(&"not a number", &[]).unwrap();
        assert!(matches!(b.recv::<u32>(), Err(Error::Malformed(_))));
        let long = "x".repeat(MAX_MESSAGE);
        assert!(matches!(a.send(&long, &[]), Err(Error::TooLarge { .. })));
        drop(a);
        assert!(matches!(b.recv::<u32>(), Err(Error::Closed)));
        assert!(matches!(b.send(&1u32, &[]), Err(Error::Closed)));
    }

    #[test]
    fn nonblocking_receive_does_not_wait() {
        let (_a, b) = pair().unwrap();
        b.set_nonblocking(true).unwrap();
        assert!(b.recv::<u32>().unwrap_err().is_would_block());
    }
}
