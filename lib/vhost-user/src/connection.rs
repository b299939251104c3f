//! One vhost-user socket: whole messages with their descriptors, never waiting past a deadline.

use std::io;
use std::mem::size_of;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use crate::message::{
    FLAG_NEED_REPLY, FLAG_REPLY, HEADER_SIZE, MAX_PAYLOAD, MAX_REGIONS, VERSION, VERSION_MASK,
};
use crate::{Error, Result};

/// A complete message. Its version, its flags and the bounds of its length have been checked.
#[derive(Debug)]
pub struct Message {
    /// Request code.
    pub code: u32,
    /// Flags without the version.
    pub flags: u32,
    /// Payload.
    pub payload: Vec<u8>,
    /// Descriptors that came with it, all closed on exec.
    pub fds: Vec<OwnedFd>,
}

/// A vhost-user stream socket.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// The bytes of an incomplete message.
    buffer: Vec<u8>,
    /// The descriptors of an incomplete message.
    fds: Vec<OwnedFd>,
}

impl Connection {
    /// Wraps a connected socket, blocking or not.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            buffer: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// Sends one message. `flags` are those besides the version.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Timeout`] or [`Error::Io`]; [`Error::Protocol`] if the message is
    /// over the limits of this crate.
    pub fn send(
        &mut self,
        code: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<()> {
        if payload.len() > MAX_PAYLOAD || fds.len() > MAX_REGIONS {
            return Err(Error::protocol(format!(
                "a message of {} bytes and {} descriptors is over the limit of {MAX_PAYLOAD} and {MAX_REGIONS}",
                payload.len(),
                fds.len()
            )));
        }
        let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(&(flags | VERSION).to_ne_bytes());
        // The length has been checked against MAX_PAYLOAD above.
        bytes.extend_from_slice(&(payload.len() as u32).to_ne_bytes());
        bytes.extend_from_slice(payload);
        let mut sent = 0;
        while sent < bytes.len() {
            // The descriptors travel with the first byte.
            let fds = if sent == 0 { fds } else { &[] };
            match send_some(&self.socket, &bytes[sent..], fds) {
                Ok(n) => sent += n,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        wait(self.socket.as_fd(), libc::POLLOUT, deadline)?;
                    }
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(socket_error(error)),
                },
            }
        }
        Ok(())
    }

    /// Takes the next message if it has arrived in full; keeps an incomplete one for later.
    ///
    /// # Errors
    /// [`Error::Closed`] between two messages; [`Error::Protocol`] for a wrong version, unknown flags,
    /// a length or a number of descriptors over the limit, or an end inside a message.
    pub fn try_recv(&mut self) -> Result<Option<Message>> {
        loop {
            let mut need = HEADER_SIZE;
            if self.buffer.len() >= HEADER_SIZE {
                need += payload_size(&self.buffer)?;
                if self.buffer.len() == need {
                    return Ok(Some(self.take_message()));
                }
            }
            let filled = self.buffer.len();
            self.buffer.resize(need, 0);
            let received = recv_some(&self.socket, &mut self.buffer[filled..], &mut self.fds);
            let n = match &received {
                Ok(n) => *n,
                Err(_) => 0,
            };
            self.buffer.truncate(filled + n);
            match received {
                Ok(0) if filled == 0 => return Err(Error::Closed),
                Ok(0) => {
                    return Err(Error::protocol("the connection ended inside a message"));
                }
                Ok(_) if self.fds.len() > MAX_REGIONS => return Err(too_many_fds()),
                Ok(_) => {}
                Err(RecvError::FdsCut) => return Err(too_many_fds()),
                Err(RecvError::Io(error)) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(socket_error(error)),
                },
            }
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// Those of [`try_recv`](Self::try_recv), and [`Error::Timeout`].
    pub fn recv(&mut self, deadline: Instant) -> Result<Message> {
        loop {
            if let Some(message) = self.try_recv()? {
                return Ok(message);
            }
            wait(self.socket.as_fd(), libc::POLLIN, deadline)?;
        }
    }

    /// Ends the conversation in both directions. The peer sees the end; later calls fail.
    pub fn shutdown(&self) {
        // Fails only if the peer has gone already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn take_message(&mut self) -> Message {
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&self.buffer[at..at + 4]);
            u32::from_ne_bytes(bytes)
        };
        let message = Message {
            code: word(0),
            flags: word(4) & !VERSION_MASK,
            payload: self.buffer[HEADER_SIZE..].to_vec(),
            fds: std::mem::take(&mut self.fds),
        };
        self.buffer.clear();
        message
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Checks the header at the start of `bytes` and returns the payload size in it.
fn payload_size(bytes: &[u8]) -> Result<usize> {
    let word = |at: usize| {
        let mut word = [0; 4];
        word.copy_from_slice(&bytes[at..at + 4]);
        u32::from_ne_bytes(word)
    };
    let (flags, size) = (word(4), word(8) as usize);
    if flags & VERSION_MASK != VERSION {
        return Err(Error::protocol(format!(
            "message of protocol version {}, only {VERSION} is known",
            flags & VERSION_MASK
        )));
    }
    if flags & !(VERSION_MASK | FLAG_REPLY | FLAG_NEED_REPLY) != 0 {
        return Err(Error::protocol(format!(
            "message with unknown flags {flags:#x}"
        )));
    }
    if size > MAX_PAYLOAD {
        return Err(Error::protocol(format!(
            "message with a payload of {size} bytes, at most {MAX_PAYLOAD} are allowed"
        )));
    }
    Ok(size)
}

fn too_many_fds() -> Error {
    Error::protocol(format!(
        "message with more than {MAX_REGIONS} file descriptors"
    ))
}

fn socket_error(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed,
        _ => Error::Io(error),
    }
}

/// Waits until `fd` is ready for `events` or has hung up.
fn wait(fd: BorrowedFd<'_>, events: libc::c_short, deadline: Instant) -> Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // One more than the whole milliseconds, so that a deadline just ahead is not missed.
        let timeout = libc::c_int::try_from(left.as_millis() + 1).unwrap_or(libc::c_int::MAX);
        let mut poll = libc::pollfd {
            fd: fd.as_raw_fd(),
            events,
            revents: 0,
        };
        // SAFETY: `poll` is one valid pollfd.
        let n = unsafe { libc::poll(&raw mut poll, 1, timeout) };
        if n > 0 {
            return Ok(());
        }
        if n < 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error.into());
            }
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout);
        }
    }
}

/// Ancillary data for [`MAX_REGIONS`] descriptors: a header of 16 bytes and 4 bytes for each.
type Control = [u64; 2 + MAX_REGIONS * size_of::<RawFd>() / 8];

fn send_some(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut control: Control = [0; _];
    let mut iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: an all-zero msghdr is valid: null pointers with zero lengths.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    if !fds.is_empty() {
        // The caller has checked the count against MAX_REGIONS.
        let length = size_of_val(fds) as u32;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: arithmetic only.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(length) } as usize;
        let cmsg: *mut libc::cmsghdr = control.as_mut_ptr().cast();
        // SAFETY: `control` is zeroed, aligned, and has room for the header and MAX_REGIONS
        // descriptors.
        unsafe {
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(length) as usize;
            let data: *mut RawFd = libc::CMSG_DATA(cmsg).cast();
            for (i, fd) in fds.iter().enumerate() {
                data.add(i).write_unaligned(fd.as_raw_fd());
            }
        }
    }
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the header points at `bytes` and `control`, both alive and of the lengths given.
    let n = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

enum RecvError {
    /// More descriptors than there was room for; the kernel closed the rest.
    FdsCut,
    Io(io::Error),
}

/// Receives up to `bytes.len()` bytes; descriptors that come with them are added to `fds`.
fn recv_some(
    socket: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> std::result::Result<usize, RecvError> {
    let mut control: Control = [0; _];
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: an all-zero msghdr is valid: null pointers with zero lengths.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the header points at `bytes` and `control`, both alive and of the lengths given.
    let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let n = usize::try_from(n).map_err(|_| RecvError::Io(io::Error::last_os_error()))?;
    // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR stay inside the control buffer the kernel has just
    // filled; an SCM_RIGHTS message holds whole descriptors that now belong to this process alone.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&raw const header);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let data: *const RawFd = libc::CMSG_DATA(cmsg).cast();
                let length = (*cmsg).cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..length / size_of::<RawFd>() {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&raw const header, cmsg);
        }
    }
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(RecvError::FdsCut);
    }
    Ok(n)
}
