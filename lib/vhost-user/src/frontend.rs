//! The front end: asks, waits and checks the answers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::connection::{Connection, Message};
use crate::message::{
    BACKEND_CONFIG_CHANGE, FLAG_NEED_REPLY, FLAG_REPLY, InflightDescription, MAX_CONFIG_SIZE,
    MAX_REGIONS, Reader, Request, VRING_ADDR_LOG, VringAddr, Writer, protocol_features,
};
use crate::{Error, Result};

/// A part of guest memory that the back end may map.
#[derive(Debug, Clone, Copy)]
pub struct MemoryRegion<'a> {
    /// Guest physical address of its first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address by which [`VringAddr`] refers to its first byte.
    pub user_addr: u64,
    /// The memory, as a file that can be mapped.
    pub fd: BorrowedFd<'a>,
    /// Where in the file it begins.
    pub offset: u64,
}

/// The front end of one connection. Every call is one request; it returns when the back end has
/// answered or, without REPLY_ACK, when a request without an answer has been sent; but see
/// [`set_vring_enable`](Frontend::set_vring_enable).
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    timeout: Duration,
    protocol_features: u64,
}

impl Frontend {
    /// Speaks over a connected socket; each wait for the back end is at most `timeout` long.
    pub fn new(socket: UnixStream, timeout: Duration) -> Self {
        Self {
            connection: Connection::new(socket),
            timeout,
            protocol_features: 0,
        }
    }

    /// Takes the back end for this session.
    pub fn set_owner(&mut self) -> Result<()> {
        self.set(Request::SetOwner, &[], &[])
    }

    /// Asks the back end to give up the session. Old back ends stop all rings, others ignore it.
    pub fn reset_owner(&mut self) -> Result<()> {
        self.set(Request::ResetOwner, &[], &[])
    }

    /// Stops all rings and puts the device into its initial state.
    pub fn reset_device(&mut self) -> Result<()> {
        self.need(protocol_features::RESET_DEVICE, Request::ResetDevice)?;
        self.set(Request::ResetDevice, &[], &[])
    }

    /// The virtio features of the device, with
    /// [`F_PROTOCOL_FEATURES`](crate::message::F_PROTOCOL_FEATURES) if it has any of those.
    pub fn features(&mut self) -> Result<u64> {
        self.get_u64(Request::GetFeatures)
    }

    /// Sets the virtio features in use.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.set(
            Request::SetFeatures,
            &Writer::default().u64(features).0,
            &[],
        )
    }

    /// The [protocol features](crate::message::protocol_features) of the back end.
    pub fn protocol_features(&mut self) -> Result<u64> {
        self.get_u64(Request::GetProtocolFeatures)
    }

    /// Sets the protocol features in use. With REPLY_ACK among them, every request from now on
    /// waits until the back end has acknowledged it.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let payload = Writer::default().u64(features).0;
        self.set(Request::SetProtocolFeatures, &payload, &[])?;
        self.protocol_features = features;
        Ok(())
    }

    /// How many virtqueues the device has.
    pub fn queue_num(&mut self) -> Result<u64> {
        self.need(protocol_features::MQ, Request::GetQueueNum)?;
        self.get_u64(Request::GetQueueNum)
    }

    /// Reads `size` bytes of device configuration, at most [`MAX_CONFIG_SIZE`].
    pub fn config(&mut self, offset: u32, size: u32) -> Result<Vec<u8>> {
        let request = Request::GetConfig;
        self.need(protocol_features::CONFIG, request)?;
        let length = config_length(size as usize)?;
        let payload = config_payload(offset, &vec![0; length]);
        let reply = self.ask(request, &payload)?;
        let mut reader = Reader::new(&request, &reply);
        let header = (|| Ok((reader.u32()?, reader.u32()?, reader.u32()?)))();
        let (got_offset, got_size, _flags) = header.or_else(|error| self.give_up(error))?;
        let data = reader.rest();
        if got_size == 0 && data.is_empty() && size != 0 {
            // Spec, GET_CONFIG: no data is how the back end reports an error.
            return Err(Error::Refused(request, 0));
        }
        if got_offset != offset || got_size != size || data.len() != length {
            return self.give_up(Error::protocol(format!(
                "{request}: asked for {size} bytes at {offset}, got {got_size} at {got_offset}"
            )));
        }
        Ok(data.to_vec())
    }

    /// Writes device configuration on behalf of the driver.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<()> {
        self.need(protocol_features::CONFIG, Request::SetConfig)?;
        config_length(data.len())?;
        self.set(Request::SetConfig, &config_payload(offset, data), &[])
    }

    /// Replaces the back end's view of guest memory: 1 to [`MAX_REGIONS`] regions.
    pub fn set_mem_table(&mut self, regions: &[MemoryRegion<'_>]) -> Result<()> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(Error::protocol(format!(
                "a memory table of {} regions, 1 to {MAX_REGIONS} are possible",
                regions.len()
            )));
        }
        let mut payload = Writer::default().u32(regions.len() as u32).u32(0);
        for region in regions {
            payload = payload
                .u64(region.guest_addr)
                .u64(region.size)
                .u64(region.user_addr)
                .u64(region.offset);
        }
        let fds: Vec<_> = regions.iter().map(|region| region.fd).collect();
        self.set(Request::SetMemTable, &payload.0, &fds)
    }

    /// Sets the number of entries of a ring.
    pub fn set_vring_num(&mut self, index: u16, size: u16) -> Result<()> {
        self.set_vring_state(Request::SetVringNum, index, size.into())
    }

    /// Sets where a ring lies.
    pub fn set_vring_addr(&mut self, index: u16, addr: &VringAddr) -> Result<()> {
        let flags = if addr.log.is_some() {
            VRING_ADDR_LOG
        } else {
            0
        };
        let payload = Writer::default()
            .u32(index.into())
            .u32(flags)
            .u64(addr.descriptor)
            .u64(addr.used)
            .u64(addr.available)
            .u64(addr.log.unwrap_or(0))
            .0;
        self.set(Request::SetVringAddr, &payload, &[])
    }

    /// Sets the index of the available ring from which the back end goes on.
    pub fn set_vring_base(&mut self, index: u16, base: u16) -> Result<()> {
        self.set_vring_state(Request::SetVringBase, index, base.into())
    }

    /// Stops a ring and returns the index of the available ring at which it stopped.
    pub fn get_vring_base(&mut self, index: u16) -> Result<u16> {
        let request = Request::GetVringBase;
        let payload = Writer::default().u32(index.into()).u32(0).0;
        let reply = self.ask(request, &payload)?;
        let mut reader = Reader::new(&request, &reply);
        let state = (|| Ok((reader.u32()?, reader.u32()?, reader.finish()?)))();
        let (got, base, ()) = state.or_else(|error| self.give_up(error))?;
        match u16::try_from(base) {
            Ok(base) if got == u32::from(index) => Ok(base),
            _ => self.give_up(Error::protocol(format!(
                "{request} of ring {index} was answered with ring {got}, base {base}"
            ))),
        }
    }

    /// Sets the eventfd by which the driver's notifications reach the back end.
    pub fn set_vring_kick(&mut self, index: u16, fd: BorrowedFd<'_>) -> Result<()> {
        self.set_vring_fd(Request::SetVringKick, index, fd)
    }

    /// Sets the eventfd by which the back end interrupts the driver.
    pub fn set_vring_call(&mut self, index: u16, fd: BorrowedFd<'_>) -> Result<()> {
        self.set_vring_fd(Request::SetVringCall, index, fd)
    }

    /// Sets the eventfd by which the back end reports that it gave up a ring.
    pub fn set_vring_err(&mut self, index: u16, fd: BorrowedFd<'_>) -> Result<()> {
        self.set_vring_fd(Request::SetVringErr, index, fd)
    }

    /// Lets the back end process a ring or keeps it from doing so. Returns when it has done so, also without
    /// REPLY_ACK: back ends drop a kick that comes while a ring is not enabled, so that one which
    /// overtakes this request would be lost.
    pub fn set_vring_enable(&mut self, index: u16, enable: bool) -> Result<()> {
        self.set_vring_state(Request::SetVringEnable, index, enable.into())?;
        if self.acknowledged() {
            return Ok(());
        }
        // Requests are carried out in order, so the answer to a later one tells as much.
        self.features().map(drop)
    }

    /// Gives the back end a socket for its own requests; the other end belongs to a
    /// [`BackendRequestReceiver`].
    pub fn set_backend_req_fd(&mut self, socket: BorrowedFd<'_>) -> Result<()> {
        self.need(protocol_features::BACKEND_REQ, Request::SetBackendReqFd)?;
        self.set(Request::SetBackendReqFd, &[], &[socket])
    }

    /// Asks for memory in which the back end tracks what it has in flight on `queues` virtqueues of
    /// up to `queue_size` entries: a file, and length and offset of the memory in it. Nothing is in
    /// flight in it. Keep it while the driver uses the device, and ask anew when the driver has
    /// reset it: what it was then in flight must not be taken up again.
    ///
    /// # Errors
    /// [`Error::Protocol`], after which the connection is shut down, also if the file is not sealed
    /// against shrinking or is shorter than the back end says: a later back end that maps it would
    /// be killed. [`Error::Refused`] if the back end has none to give.
    pub fn get_inflight_fd(&mut self, queues: u16, queue_size: u16) -> Result<(OwnedFd, u64, u64)> {
        let request = Request::GetInflightFd;
        self.need(protocol_features::INFLIGHT_SHMFD, request)?;
        let asked = InflightDescription {
            size: 0,
            offset: 0,
            queues,
            queue_size,
        };
        let deadline = self.send_question(request, &asked.write())?;
        let (payload, mut fds) = self.reply_with_fds(request, deadline)?;
        let mut reader = Reader::new(&request, &payload);
        let description = InflightDescription::read(&mut reader)
            .and_then(|description| reader.finish().map(|()| description));
        let InflightDescription { size, offset, .. } =
            description.or_else(|error| self.give_up(error))?;
        if size == 0 && fds.is_empty() {
            return Err(Error::Refused(request, 0));
        }
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
            return self.give_up(Error::protocol(format!(
                "{request} was answered with {size} bytes, and not with one descriptor"
            )));
        };
        match check_sealed(fd.as_fd(), size, offset) {
            Ok(()) => Ok((fd, size, offset)),
            Err(why) => self.give_up(Error::protocol(format!("{request}: {why}"))),
        }
    }

    /// Gives the back end the memory of [`get_inflight_fd`](Self::get_inflight_fd), which it or an
    /// earlier one has made: it goes on with what is in flight there. To be sent before rings are
    /// enabled.
    pub fn set_inflight_fd(
        &mut self,
        fd: BorrowedFd<'_>,
        size: u64,
        offset: u64,
        queues: u16,
        queue_size: u16,
    ) -> Result<()> {
        let request = Request::SetInflightFd;
        self.need(protocol_features::INFLIGHT_SHMFD, request)?;
        let description = InflightDescription {
            size,
            offset,
            queues,
            queue_size,
        };
        self.set(request, &description.write(), &[fd])
    }

    fn set_vring_state(&mut self, request: Request, index: u16, value: u32) -> Result<()> {
        let payload = Writer::default().u32(index.into()).u32(value).0;
        self.set(request, &payload, &[])
    }

    fn set_vring_fd(&mut self, request: Request, index: u16, fd: BorrowedFd<'_>) -> Result<()> {
        if index > 0xff {
            return Err(Error::protocol(format!(
                "{request}: ring {index}, the message has room for 0 to 255"
            )));
        }
        self.set(request, &Writer::default().u64(index.into()).0, &[fd])
    }

    fn need(&self, feature: u64, request: Request) -> Result<()> {
        if self.protocol_features & feature == 0 {
            return Err(Error::NotNegotiated(request));
        }
        Ok(())
    }

    fn get_u64(&mut self, request: Request) -> Result<u64> {
        let reply = self.ask(request, &[])?;
        let mut reader = Reader::new(&request, &reply);
        let value = reader
            .u64()
            .and_then(|value| reader.finish().map(|()| value));
        value.or_else(|error| self.give_up(error))
    }

    /// Whether requests without an answer are acknowledged.
    fn acknowledged(&self) -> bool {
        self.protocol_features & protocol_features::REPLY_ACK != 0
    }

    /// A request that has no answer but the acknowledgement.
    fn set(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let acked = self.acknowledged();
        let flags = if acked { FLAG_NEED_REPLY } else { 0 };
        let deadline = Instant::now() + self.timeout;
        self.connection
            .send(request.code(), flags, payload, fds, deadline)
            .or_else(|error| self.give_up(error))?;
        if !acked {
            return Ok(());
        }
        let reply = self.reply(request, deadline)?;
        let mut reader = Reader::new(&request, &reply);
        match reader.u64().and_then(|code| reader.finish().map(|()| code)) {
            Ok(0) => Ok(()),
            Ok(code) => Err(Error::Refused(request, code)),
            Err(error) => self.give_up(error),
        }
    }

    /// A request that has an answer; returns its payload.
    fn ask(&mut self, request: Request, payload: &[u8]) -> Result<Vec<u8>> {
        let deadline = self.send_question(request, payload)?;
        self.reply(request, deadline)
    }

    /// Until when the answer must have come.
    fn send_question(&mut self, request: Request, payload: &[u8]) -> Result<Instant> {
        let deadline = Instant::now() + self.timeout;
        self.connection
            .send(request.code(), 0, payload, &[], deadline)
            .or_else(|error| self.give_up(error))?;
        Ok(deadline)
    }

    fn reply(&mut self, request: Request, deadline: Instant) -> Result<Vec<u8>> {
        let (payload, fds) = self.reply_with_fds(request, deadline)?;
        if fds.is_empty() {
            return Ok(payload);
        }
        self.give_up(Error::protocol(format!(
            "{request} was answered with {} descriptors",
            fds.len()
        )))
    }

    fn reply_with_fds(
        &mut self,
        request: Request,
        deadline: Instant,
    ) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
        let Message {
            code,
            flags,
            payload,
            fds,
        } = match self.connection.recv(deadline) {
            Ok(message) => message,
            Err(error) => return self.give_up(error),
        };
        if code != request.code() || flags != FLAG_REPLY {
            return self.give_up(Error::protocol(format!(
                "{request} was answered by a message with code {code}, flags {flags:#x}"
            )));
        }
        Ok((payload, fds))
    }

    /// Where the boundaries of messages or the state of the peer are in doubt, nothing more can be
    /// said over this connection.
    fn give_up<T>(&mut self, error: Error) -> Result<T> {
        self.connection.shutdown();
        Err(error)
    }
}

/// For waiting until the back end hangs up. It is never readable otherwise.
impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

/// Checks that a file is at least as long as `offset + size` and can never become shorter.
fn check_sealed(fd: BorrowedFd<'_>, size: u64, offset: u64) -> std::result::Result<(), String> {
    // SAFETY: F_GET_SEALS takes no pointer; the descriptor is open.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & libc::F_SEAL_SHRINK == 0 {
        return Err("its file is not memory that is sealed against shrinking".into());
    }
    // SAFETY: lseek takes no pointer. The position of a file of memory is of no importance.
    let length = unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_END) };
    let length = u64::try_from(length).map_err(|_| io::Error::last_os_error().to_string())?;
    let fits = offset.checked_add(size).is_some_and(|end| end <= length);
    if size == 0 || !fits {
        return Err(format!(
            "{size:#x} bytes at {offset:#x} of a file of {length:#x} bytes"
        ));
    }
    Ok(())
}

fn config_length(size: usize) -> Result<usize> {
    if size > MAX_CONFIG_SIZE {
        return Err(Error::protocol(format!(
            "{size} bytes of configuration, a message holds at most {MAX_CONFIG_SIZE}"
        )));
    }
    Ok(size)
}

/// Spec, "Virtio device config space": offset, size, flags (0: written by the driver), data.
fn config_payload(offset: u32, data: &[u8]) -> Vec<u8> {
    let header = Writer::default().u32(offset).u32(data.len() as u32).u32(0);
    header.bytes(data).0
}

/// What a back end asks of the front end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendRequest {
    /// The device configuration has changed: read it again, tell the driver.
    ConfigChange,
}

/// The front end's side of the socket given to
/// [`set_backend_req_fd`](Frontend::set_backend_req_fd). Poll it for reading.
#[derive(Debug)]
pub struct BackendRequestReceiver {
    connection: Connection,
    timeout: Duration,
}

impl BackendRequestReceiver {
    /// Receives over `socket`; sending an acknowledgement may take at most `timeout`.
    pub fn new(socket: UnixStream, timeout: Duration) -> Self {
        Self {
            connection: Connection::new(socket),
            timeout,
        }
    }

    /// The next request if one has arrived, acknowledged if the back end asked for that. A request
    /// this front end did not invite is refused and ends the conversation.
    pub fn try_recv(&mut self) -> Result<Option<BackendRequest>> {
        let Some(message) = self.connection.try_recv()? else {
            return Ok(None);
        };
        let known = message.code == BACKEND_CONFIG_CHANGE
            && message.flags & FLAG_REPLY == 0
            && message.payload.is_empty()
            && message.fds.is_empty();
        if message.flags & FLAG_NEED_REPLY != 0 {
            self.connection.send(
                message.code,
                FLAG_REPLY,
                &u64::from(!known).to_ne_bytes(),
                &[],
                Instant::now() + self.timeout,
            )?;
        }
        if !known {
            self.connection.shutdown();
            return Err(Error::protocol(format!(
                "the back end sent a request with code {} that was not invited",
                message.code
            )));
        }
        Ok(Some(BackendRequest::ConfigChange))
    }
}

impl AsFd for BackendRequestReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}
