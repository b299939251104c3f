//! The other side of a queue pair: a tap or a socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::iovec;

use crate::stream::{BadLength, Incoming};

/// Where frames come from and go to.
#[derive(Debug)]
pub enum Port {
    /// A frame is what one `read` returns and one `write` takes: a tap, or a datagram or
    /// sequenced-packet socket.
    Packets {
        /// The descriptor, non-blocking.
        fd: OwnedFd,
        /// A frame is preceded by a `virtio_net_hdr`: a tap.
        header: bool,
        /// The tap's queue is attached.
        active: bool,
    },
    /// Frames in a byte stream.
    Stream(Stream),
}

/// A connection that may come and go.
#[derive(Debug)]
pub struct Stream {
    /// The socket, non-blocking; absent after it has failed.
    pub fd: Option<OwnedFd>,
    /// What the peer has sent.
    pub incoming: Incoming,
    /// The rest of a frame of which the peer has taken a part.
    pub unsent: Vec<u8>,
    /// The last read has fetched everything there was.
    drained: bool,
}

impl Stream {
    /// Frames over `fd`, from the beginning of one.
    pub fn new(fd: Option<OwnedFd>) -> Self {
        Self {
            fd,
            incoming: Incoming::new(),
            unsent: Vec::new(),
            drained: false,
        }
    }

    /// Goes on with another connection, or with none.
    pub fn replace(&mut self, fd: Option<OwnedFd>) {
        self.fd = fd;
        self.incoming.clear();
        self.unsent.clear();
        self.drained = false;
    }

    /// Writes the rest of the frame that was begun. False if the peer does not take all of it.
    pub fn send_rest(&mut self) -> io::Result<bool> {
        while !self.unsent.is_empty() {
            let Some(fd) = &self.fd else {
                self.unsent.clear();
                break;
            };
            match write(fd.as_fd(), &[crate::buffers::piece(&self.unsent)])? {
                Some(count) => drop(self.unsent.drain(..count)),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Reads what the peer has sent. False if that is nothing, which is known without a try after a
    /// read that found less than there was room for.
    pub fn receive(&mut self) -> Result<bool, StreamError> {
        if std::mem::take(&mut self.drained) {
            return Ok(false);
        }
        let Some(fd) = &self.fd else {
            return Ok(false);
        };
        let room = self.incoming.room();
        let length = room.len();
        match read(fd.as_fd(), &[crate::buffers::piece_mut(room)])? {
            Some(0) => Err(StreamError::Closed),
            Some(count) => {
                self.drained = count < length;
                self.incoming.add(count);
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// Why a connection cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer is gone.
    #[error("the peer has closed the connection")]
    Closed,
    /// The peer makes no sense.
    #[error(transparent)]
    Length(#[from] BadLength),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads into pieces of memory; `None` if there is nothing.
pub fn read(fd: BorrowedFd<'_>, to: &[iovec]) -> io::Result<Option<usize>> {
    // SAFETY: the callers list memory that is mapped and that only this call writes, or that is
    // shared with the guest.
    let n = unsafe { libc::readv(fd.as_raw_fd(), to.as_ptr(), to.len() as libc::c_int) };
    result(n)
}

/// Writes pieces of memory; `None` if the other side does not take anything.
pub fn write(fd: BorrowedFd<'_>, from: &[iovec]) -> io::Result<Option<usize>> {
    // SAFETY: the callers list memory that is mapped; the kernel only reads it.
    let n = unsafe { libc::writev(fd.as_raw_fd(), from.as_ptr(), from.len() as libc::c_int) };
    result(n)
}

fn result(n: isize) -> io::Result<Option<usize>> {
    if let Ok(n) = usize::try_from(n) {
        return Ok(Some(n));
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
        _ => Err(error),
    }
}
