//! The back end: receives requests in decoded form and answers them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::connection::{Connection, Message};
use crate::message::{
    BACKEND_CONFIG_CHANGE, FLAG_NEED_REPLY, FLAG_REPLY, InflightDescription, MAX_CONFIG_SIZE,
    MAX_REGIONS, Reader, Request, VRING_ADDR_LOG, VRING_NO_FD, VringAddr, Writer,
};
use crate::{Error, Result};

/// A part of guest memory as received. Nothing in it has been checked against the file.
#[derive(Debug)]
pub struct ReceivedRegion {
    /// Guest physical address of its first byte.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address by which [`VringAddr`] refers to its first byte.
    pub user_addr: u64,
    /// Where in the file it begins.
    pub offset: u64,
    /// The file.
    pub fd: OwnedFd,
}

/// A request of the front end. Its length, its flags and its descriptors fit the request; the
/// values (ring numbers, addresses, features) are the receiver's to check.
#[derive(Debug)]
#[allow(missing_docs, reason = "the variants are the requests of the Spec")]
pub enum Command {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetMemTable(Vec<ReceivedRegion>),
    SetVringNum {
        index: u32,
        size: u32,
    },
    SetVringAddr {
        index: u32,
        addr: VringAddr,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringCall {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringErr {
        index: u32,
        fd: Option<OwnedFd>,
    },
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    GetConfig {
        offset: u32,
        size: u32,
    },
    SetConfig {
        offset: u32,
        data: Vec<u8>,
    },
    SetBackendReqFd(OwnedFd),
    /// Only the numbers of queues and entries mean something.
    GetInflightFd(InflightDescription),
    SetInflightFd {
        description: InflightDescription,
        fd: OwnedFd,
    },
    ResetDevice,
    /// A request this crate does not know, by its code.
    Unknown(u32),
}

/// A request and how to answer it.
#[derive(Debug)]
pub struct Incoming {
    /// The request.
    pub command: Command,
    /// Its code, which the reply repeats.
    pub code: u32,
    /// Whether the front end waits for an acknowledgement.
    pub need_reply: bool,
}

/// The back end of one connection.
#[derive(Debug)]
pub struct Backend {
    connection: Connection,
    timeout: Duration,
}

impl Backend {
    /// Listens on a connected socket; sending a reply may take at most `timeout`.
    pub fn new(socket: UnixStream, timeout: Duration) -> Self {
        Self {
            connection: Connection::new(socket),
            timeout,
        }
    }

    /// The next request, if one has arrived in full.
    ///
    /// # Errors
    /// [`Error::Closed`] when the front end has gone, [`Error::Protocol`] for a malformed message,
    /// after which the connection cannot go on.
    pub fn try_recv(&mut self) -> Result<Option<Incoming>> {
        match self.connection.try_recv()? {
            Some(message) => decode(message).map(Some),
            None => Ok(None),
        }
    }

    /// Answers with a number: feature bits, a queue count, or an acknowledgement (0 is success).
    pub fn reply_u64(&mut self, code: u32, value: u64) -> Result<()> {
        self.reply(code, &value.to_ne_bytes())
    }

    /// Answers GET_VRING_BASE.
    pub fn reply_vring_base(&mut self, index: u32, base: u16) -> Result<()> {
        let payload = Writer::default().u32(index).u32(base.into()).0;
        self.reply(Request::GetVringBase.code(), &payload)
    }

    /// Answers GET_CONFIG; `None` is an error.
    pub fn reply_config(&mut self, offset: u32, data: Option<&[u8]>) -> Result<()> {
        let data = data.unwrap_or(&[]);
        // GET_CONFIG bounds the length.
        let payload = Writer::default().u32(offset).u32(data.len() as u32).u32(0);
        self.reply(Request::GetConfig.code(), &payload.bytes(data).0)
    }

    /// Answers GET_INFLIGHT_FD; `None` is an error.
    pub fn reply_inflight(
        &mut self,
        region: Option<(&InflightDescription, BorrowedFd<'_>)>,
    ) -> Result<()> {
        const NOTHING: InflightDescription = InflightDescription {
            size: 0,
            offset: 0,
            queues: 0,
            queue_size: 0,
        };
        let code = Request::GetInflightFd.code();
        match region {
            Some((description, fd)) => self.reply_with(code, &description.write(), &[fd]),
            None => self.reply(code, &NOTHING.write()),
        }
    }

    fn reply(&mut self, code: u32, payload: &[u8]) -> Result<()> {
        self.reply_with(code, payload, &[])
    }

    fn reply_with(&mut self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        self.connection
            .send(code, FLAG_REPLY, payload, fds, deadline)
    }
}

impl AsFd for Backend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

fn decode(message: Message) -> Result<Incoming> {
    let code = message.code;
    if message.flags & FLAG_REPLY != 0 {
        return Err(Error::protocol(format!(
            "request {code} is marked as a reply"
        )));
    }
    let need_reply = message.flags & FLAG_NEED_REPLY != 0;
    let command = match Request::from_code(code) {
        Some(request) => decode_payload(request, &message.payload, message.fds)?,
        None => Command::Unknown(code),
    };
    Ok(Incoming {
        command,
        code,
        need_reply,
    })
}

fn decode_payload(request: Request, payload: &[u8], fds: Vec<OwnedFd>) -> Result<Command> {
    let mut reader = Reader::new(&request, payload);
    let mut fds = Fds { request, fds };
    let command = match request {
        Request::GetFeatures => Command::GetFeatures,
        Request::SetFeatures => Command::SetFeatures(reader.u64()?),
        Request::SetOwner => Command::SetOwner,
        Request::ResetOwner => Command::ResetOwner,
        Request::SetMemTable => memory_table(&mut reader, &mut fds)?,
        Request::SetVringNum => Command::SetVringNum {
            index: reader.u32()?,
            size: reader.u32()?,
        },
        Request::SetVringAddr => {
            let (index, flags) = (reader.u32()?, reader.u32()?);
            let (descriptor, used, available) = (reader.u64()?, reader.u64()?, reader.u64()?);
            let log = reader.u64()?;
            Command::SetVringAddr {
                index,
                addr: VringAddr {
                    descriptor,
                    used,
                    available,
                    log: (flags & VRING_ADDR_LOG != 0).then_some(log),
                },
            }
        }
        Request::SetVringBase => Command::SetVringBase {
            index: reader.u32()?,
            base: reader.u32()?,
        },
        Request::GetVringBase => {
            let index = reader.u32()?;
            reader.u32()?;
            Command::GetVringBase { index }
        }
        Request::SetVringKick => {
            let (index, fd) = vring_fd(&mut reader, &mut fds)?;
            Command::SetVringKick { index, fd }
        }
        Request::SetVringCall => {
            let (index, fd) = vring_fd(&mut reader, &mut fds)?;
            Command::SetVringCall { index, fd }
        }
        Request::SetVringErr => {
            let (index, fd) = vring_fd(&mut reader, &mut fds)?;
            Command::SetVringErr { index, fd }
        }
        Request::GetProtocolFeatures => Command::GetProtocolFeatures,
        Request::SetProtocolFeatures => Command::SetProtocolFeatures(reader.u64()?),
        Request::GetQueueNum => Command::GetQueueNum,
        Request::SetVringEnable => {
            let (index, value) = (reader.u32()?, reader.u32()?);
            if value > 1 {
                return Err(Error::protocol(format!("{request} with value {value}")));
            }
            Command::SetVringEnable {
                index,
                enable: value == 1,
            }
        }
        Request::SetBackendReqFd => Command::SetBackendReqFd(fds.take()?),
        Request::GetConfig => {
            let (offset, data) = config(request, &mut reader)?;
            Command::GetConfig {
                offset,
                size: data.len() as u32,
            }
        }
        Request::SetConfig => {
            let (offset, data) = config(request, &mut reader)?;
            Command::SetConfig {
                offset,
                data: data.to_vec(),
            }
        }
        Request::GetInflightFd => Command::GetInflightFd(InflightDescription::read(&mut reader)?),
        Request::SetInflightFd => Command::SetInflightFd {
            description: InflightDescription::read(&mut reader)?,
            fd: fds.take()?,
        },
        Request::ResetDevice => Command::ResetDevice,
    };
    reader.finish()?;
    fds.finish()?;
    Ok(command)
}

/// The descriptors of a message, taken in order; none may be left.
struct Fds {
    request: Request,
    fds: Vec<OwnedFd>,
}

impl Fds {
    fn take(&mut self) -> Result<OwnedFd> {
        if self.fds.is_empty() {
            return Err(Error::protocol(format!(
                "{} with too few file descriptors",
                self.request
            )));
        }
        Ok(self.fds.remove(0))
    }

    fn finish(self) -> Result<()> {
        if self.fds.is_empty() {
            return Ok(());
        }
        Err(Error::protocol(format!(
            "{} with {} file descriptors too many",
            self.request,
            self.fds.len()
        )))
    }
}

fn memory_table(reader: &mut Reader<'_>, fds: &mut Fds) -> Result<Command> {
    let count = reader.u32()? as usize;
    reader.u32()?;
    if count == 0 || count > MAX_REGIONS {
        return Err(Error::protocol(format!(
            "a memory table of {count} regions, 1 to {MAX_REGIONS} are possible"
        )));
    }
    let mut regions = Vec::with_capacity(count);
    for _ in 0..count {
        regions.push(ReceivedRegion {
            guest_addr: reader.u64()?,
            size: reader.u64()?,
            user_addr: reader.u64()?,
            offset: reader.u64()?,
            fd: fds.take()?,
        });
    }
    Ok(Command::SetMemTable(regions))
}

/// Spec, "A vring descriptor index": bits 0 to 7 the ring, bit 8 set without a descriptor.
fn vring_fd(reader: &mut Reader<'_>, fds: &mut Fds) -> Result<(u32, Option<OwnedFd>)> {
    let value = reader.u64()?;
    let fd = match value & VRING_NO_FD {
        0 => Some(fds.take()?),
        _ => None,
    };
    Ok(((value & 0xff) as u32, fd))
}

/// Offset and data of a configuration message.
fn config<'a>(request: Request, reader: &mut Reader<'a>) -> Result<(u32, &'a [u8])> {
    let (offset, size, _flags) = (reader.u32()?, reader.u32()?, reader.u32()?);
    let data = reader.rest();
    if size as usize != data.len() || data.len() > MAX_CONFIG_SIZE {
        return Err(Error::protocol(format!(
            "{request} of {size} bytes with {} bytes of data",
            data.len()
        )));
    }
    Ok((offset, data))
}

/// Sends the back end's own requests over the socket of SET_BACKEND_REQ_FD. It never asks for an
/// acknowledgement, so that a front end cannot make a device wait.
#[derive(Debug)]
pub struct BackendRequestSender {
    connection: Connection,
}

impl BackendRequestSender {
    /// Sends over `socket`.
    pub fn new(socket: UnixStream) -> Self {
        Self {
            connection: Connection::new(socket),
        }
    }

    /// Tells the front end to read the device configuration again.
    ///
    /// # Errors
    /// [`Error::Timeout`] if the socket is full: the front end has not read what it was told.
    pub fn config_changed(&mut self) -> Result<()> {
        self.connection
            .send(BACKEND_CONFIG_CHANGE, 0, &[], &[], Instant::now())
    }
}
