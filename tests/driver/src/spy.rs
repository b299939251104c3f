//! A hostile back end: an entropy source that does its work, and uses all that it is given to look
//! for a secret in the guest's memory.
//!
//! It reports in lines, one for each thing it has tried:
//!
//! ```text
//! descriptor of MESSAGE: DEV:INODE, BYTES bytes
//! region at ADDRESS: BYTES bytes
//! served N
//! looked at BYTES bytes: found N
//! tried WHAT: OUTCOME
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anemone_vhost_user::message::{
    F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, InflightDescription, protocol_features,
};
use anemone_vhost_user::{Backend, Command, Connection, ReceivedRegion, VringAddr};

use crate::device::features;
use crate::queue::{Descriptor, flags};
use crate::{Error, Memory, Result};

/// How often it looks.
const PERIOD: Duration = Duration::from_millis(200);
/// How long a front end may take for anything.
const PATIENCE: Duration = Duration::from_secs(5);
/// Length of its in-flight region, more than enough.
const INFLIGHT: u64 = 64 << 10;
/// Codes of requests to the front end (Spec, "Back-end message types") that would give it more.
const MORE: [(&str, u32, usize); 4] = [
    ("BACKEND_IOTLB_MSG", 1, 40),
    ("BACKEND_VRING_HOST_NOTIFIER_MSG", 3, 24),
    ("BACKEND_SHARED_OBJECT_LOOKUP", 8, 16),
    ("BACKEND_SHMEM_MAP", 9, 40),
];

/// A file of the front end, mapped whole.
struct Mapping {
    start: *mut u8,
    length: usize,
}

impl Mapping {
    fn new(file: &File) -> io::Result<Self> {
        let length = file.metadata()?.len() as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            start: start.cast(),
            length,
        })
    }

    fn check(&self, offset: u64, length: usize) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        (offset.checked_add(length)? <= self.length).then_some(offset)
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(at) = self.check(offset, data.len()) {
            // SAFETY: inside the mapping; others may write meanwhile, and bytes are always valid.
            unsafe {
                std::ptr::copy_nonoverlapping(self.start.add(at), data.as_mut_ptr(), data.len());
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(at) = self.check(offset, data.len()) {
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.start.add(at), data.len()) };
        }
    }

    /// How often the secret is there.
    fn count(&self, secret: &[u8]) -> usize {
        let (mut found, mut at) = (0, 0);
        while at < self.length {
            // SAFETY: both areas are readable for their lengths; others may write to the first
            // meanwhile, and bytes are always valid.
            let hit = unsafe {
                libc::memmem(
                    self.start.add(at).cast(),
                    self.length - at,
                    secret.as_ptr().cast(),
                    secret.len(),
                )
            };
            if hit.is_null() {
                break;
            }
            found += 1;
            at = hit as usize - self.start as usize + secret.len();
        }
        found
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, to which nothing refers any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

struct Region {
    guest: u64,
    user: u64,
    size: u64,
    offset: u64,
    mapping: Mapping,
}

struct Spy<'a> {
    backend: Backend,
    secret: &'a [u8],
    report: &'a mut dyn Write,
    regions: Vec<Region>,
    size: u16,
    rings: Option<VringAddr>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    requests: Option<Connection>,
    /// Its own, which the front end has a descriptor of.
    inflight: Option<Mapping>,
    /// Next entry of the available ring.
    next: u16,
    served: usize,
    forged: bool,
    asked: bool,
}

/// Serves one front end until it hangs up. After `patience` requests of the guest the spy forges its
/// rings, after twice as many it asks for more than it was given.
///
/// # Errors
/// The conversation or the report fails.
pub fn serve(
    socket: UnixStream,
    secret: &[u8],
    patience: usize,
    report: &mut dyn Write,
) -> Result<()> {
    let mut spy = Spy {
        backend: Backend::new(socket, PATIENCE),
        secret,
        report,
        regions: Vec::new(),
        size: 0,
        rings: None,
        kick: None,
        call: None,
        requests: None,
        inflight: None,
        next: 0,
        served: 0,
        forged: false,
        asked: false,
    };
    let mut looked = Instant::now();
    loop {
        let kick = spy.kick.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut poll = [entry(spy.backend.as_fd().as_raw_fd()), entry(kick)];
        // SAFETY: two initialised entries; a negative descriptor is skipped.
        unsafe { libc::poll(poll.as_mut_ptr(), 2, PERIOD.as_millis() as i32) };
        loop {
            match spy.backend.try_recv() {
                Ok(Some(incoming)) => {
                    let (code, reply) = (incoming.code, incoming.need_reply);
                    spy.obey(incoming.command, code, reply)?;
                }
                Ok(None) => break,
                Err(anemone_vhost_user::Error::Closed) => return Ok(()),
                Err(error) => return Err(Error::VhostUser(error)),
            }
        }
        if poll[1].revents != 0
            && let Some(kick) = &spy.kick
        {
            let mut count = [0u8; 8];
            // SAFETY: eight bytes are writable.
            unsafe { libc::read(kick.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
        }
        if looked.elapsed() >= PERIOD {
            spy.look()?;
            looked = Instant::now();
        }
        spy.serve_guest()?;
        if spy.served >= patience && !spy.forged {
            spy.forged = true;
            spy.forge()?;
        }
        if spy.served >= 2 * patience && !spy.asked {
            spy.asked = true;
            spy.ask_for_more()?;
        }
    }
}

impl Spy<'_> {
    fn obey(&mut self, command: Command, code: u32, need_reply: bool) -> Result<()> {
        match command {
            Command::GetFeatures => {
                let features = features::VERSION_1 | features::INDIRECT_DESC | F_PROTOCOL_FEATURES;
                return Ok(self.backend.reply_u64(code, features)?);
            }
            Command::GetProtocolFeatures => {
                let features = protocol_features::MQ
                    | protocol_features::REPLY_ACK
                    | protocol_features::INFLIGHT_SHMFD
                    | protocol_features::BACKEND_REQ;
                return Ok(self.backend.reply_u64(code, features)?);
            }
            Command::GetQueueNum => return Ok(self.backend.reply_u64(code, 1)?),
            Command::GetVringBase { index } => {
                self.kick = None;
                return Ok(self.backend.reply_vring_base(index, self.next)?);
            }
            Command::GetInflightFd(asked) => {
                let memory = Memory::new(INFLIGHT)?;
                let file = File::from(memory.as_fd().try_clone_to_owned()?);
                let description = InflightDescription {
                    size: INFLIGHT,
                    offset: 0,
                    ..asked
                };
                let region = Some((&description, file.as_fd()));
                self.backend.reply_inflight(region)?;
                self.inflight = Some(Mapping::new(&file)?);
                return Ok(());
            }
            Command::SetInflightFd { fd, .. } => self.describe("SET_INFLIGHT_FD", Some(&fd))?,
            Command::SetMemTable(table) => self.map(table)?,
            Command::SetVringNum { size, .. } => self.size = size as u16,
            Command::SetVringBase { base, .. } => self.next = base as u16,
            Command::SetVringAddr { addr, .. } => self.rings = Some(addr),
            Command::SetVringKick { fd, .. } => {
                self.describe("SET_VRING_KICK", fd.as_ref())?;
                self.kick = fd;
            }
            Command::SetVringCall { fd, .. } => {
                self.describe("SET_VRING_CALL", fd.as_ref())?;
                self.call = fd;
            }
            Command::SetVringErr { fd, .. } => self.describe("SET_VRING_ERR", fd.as_ref())?,
            Command::SetBackendReqFd(fd) => {
                self.describe("SET_BACKEND_REQ_FD", Some(&fd))?;
                self.requests = Some(Connection::new(fd.into()));
            }
            _ => {}
        }
        if need_reply {
            self.backend.reply_u64(code, 0)?;
        }
        Ok(())
    }

    fn describe(&mut self, message: &str, fd: Option<&OwnedFd>) -> Result<()> {
        if let Some(fd) = fd {
            let (inode, length) = identity(fd.as_fd())?;
            writeln!(
                self.report,
                "descriptor of {message}: {inode}, {length} bytes"
            )?;
        }
        Ok(())
    }

    fn map(&mut self, table: Vec<ReceivedRegion>) -> Result<()> {
        self.regions.clear();
        for region in table {
            self.describe("SET_MEM_TABLE", Some(&region.fd))?;
            let file = File::from(region.fd);
            let (guest, size) = (region.guest_addr, region.size);
            writeln!(self.report, "region at {guest:#x}: {size} bytes")?;
            let grown = file.set_len(file.metadata()?.len() + (1 << 20));
            self.outcome(
                "to make the memory larger",
                grown.map_err(|e| e.to_string()),
            )?;
            // All of the file, not only the part that was meant.
            let mapping = Mapping::new(&file)?;
            self.regions.push(Region {
                guest,
                size,
                user: region.user_addr,
                offset: region.offset,
                mapping,
            });
        }
        Ok(())
    }

    fn outcome(&mut self, what: &str, result: std::result::Result<(), String>) -> Result<()> {
        let text = match result {
            Ok(()) => "allowed".to_owned(),
            Err(error) => format!("refused ({error})"),
        };
        writeln!(self.report, "tried {what}: {text}")?;
        Ok(self.report.flush()?)
    }

    fn look(&mut self) -> Result<()> {
        if self.regions.is_empty() {
            return Ok(());
        }
        let given = self.regions.iter().map(|r| &r.mapping);
        let all = given.chain(&self.inflight);
        let found: usize = all.clone().map(|m| m.count(self.secret)).sum();
        let bytes: usize = all.map(|m| m.length).sum();
        writeln!(self.report, "looked at {bytes} bytes: found {found}")?;
        Ok(self.report.flush()?)
    }

    /// The region of a user address, and where in its file that is.
    fn user(&self, address: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|r| {
            let at = address.checked_sub(r.user).filter(|at| *at < r.size)?;
            Some((r, r.offset + at))
        })
    }

    fn word(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        if let Some((region, at)) = self.user(address) {
            region.mapping.read(at, &mut bytes);
        }
        u16::from_le_bytes(bytes)
    }

    fn put(&self, address: u64, data: &[u8]) {
        if let Some((region, at)) = self.user(address) {
            region.mapping.write(at, data);
        }
    }

    /// Fills the guest's buffers, as an entropy source does.
    fn serve_guest(&mut self) -> Result<()> {
        let (Some(rings), true) = (self.rings, self.kick.is_some() && self.size > 0) else {
            return Ok(());
        };
        let before = self.served;
        while self.next != self.word(rings.available + 2) {
            let slot = u64::from(self.next % self.size);
            let head = self.word(rings.available + 4 + 2 * slot);
            let mut bytes = [0; 16];
            if let Some((region, at)) = self.user(rings.descriptor + 16 * u64::from(head)) {
                region.mapping.read(at, &mut bytes);
            }
            let addr = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
            let length = u32::from_le_bytes(bytes[8..12].try_into().unwrap_or_default());
            let answer: Vec<u8> = (0..length.min(4096)).map(|i| (i as u8) ^ 0xC3).collect();
            let place = self.regions.iter().find_map(|r| {
                let at = addr.checked_sub(r.guest).filter(|at| *at < r.size)?;
                Some((r, r.offset + at))
            });
            if let Some((region, at)) = place {
                region.mapping.write(at, &answer);
            }
            self.give_back(&rings, head.into(), answer.len() as u32);
            self.served += 1;
        }
        if self.served != before {
            writeln!(self.report, "served {}", self.served)?;
            self.report.flush()?;
        }
        Ok(())
    }

    fn give_back(&mut self, rings: &VringAddr, head: u32, length: u32) {
        let slot = u64::from(self.next % self.size);
        let entry = rings.used + 4 + 8 * slot;
        self.put(entry, &head.to_le_bytes());
        self.put(entry + 4, &length.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.put(rings.used + 2, &self.next.to_le_bytes());
        self.interrupt();
    }

    fn interrupt(&self) {
        if let Some(call) = &self.call {
            // SAFETY: eight bytes are readable.
            unsafe { libc::write(call.as_raw_fd(), 1u64.to_ne_bytes().as_ptr().cast(), 8) };
        }
    }

    /// Requests of its own that would show it more.
    fn ask_for_more(&mut self) -> Result<()> {
        for (name, code, length) in MORE {
            let Some(connection) = &mut self.requests else {
                return Ok(());
            };
            let deadline = Instant::now() + PATIENCE;
            let sent = connection.send(code, FLAG_NEED_REPLY, &vec![0; length], &[], deadline);
            let answer = sent.and_then(|()| connection.recv(deadline));
            let result = match answer {
                Ok(reply) if reply.payload == [0; 8] || !reply.fds.is_empty() => Ok(()),
                Ok(reply) => Err(format!("code {:?}", reply.payload.first())),
                Err(error) => Err(error.to_string()),
            };
            self.outcome(name, result)?;
        }
        Ok(())
    }

    /// Makes its rings say that buffers lie all over the guest's memory, and looks whether anything of
    /// that comes.
    fn forge(&mut self) -> Result<()> {
        let Some(rings) = self.rings else {
            return Ok(());
        };
        for address in [0u64, 1 << 20, 2 << 20, 16 << 20, 32 << 20] {
            for index in 0..self.size {
                let descriptor = Descriptor {
                    addr: address + 4096 * u64::from(index),
                    len: 1 << 20,
                    flags: if index % 2 == 0 { flags::WRITE } else { 0 },
                    next: 0,
                };
                let at = rings.descriptor + 16 * u64::from(index);
                self.put(at, &descriptor.bytes());
            }
            self.interrupt();
            std::thread::sleep(Duration::from_millis(20));
            self.look()?;
        }
        for head in 0..u32::from(self.size) {
            self.give_back(&rings, head, u32::MAX);
            self.look_once_in(head)?;
        }
        // An index from nowhere.
        self.put(
            rings.used + 2,
            &self.next.wrapping_add(0x7000).to_le_bytes(),
        );
        self.interrupt();
        std::thread::sleep(Duration::from_millis(50));
        self.look()?;
        // These rings are of no use any more.
        self.kick = None;
        writeln!(self.report, "tried forged rings: done")?;
        Ok(self.report.flush()?)
    }

    /// Looking takes time: not after each of many steps.
    fn look_once_in(&mut self, step: u32) -> Result<()> {
        if step.is_multiple_of(64) {
            std::thread::sleep(Duration::from_millis(10));
            self.look()?;
        }
        Ok(())
    }
}

/// `DEV:INODE` and length of what a descriptor refers to.
///
/// # Errors
/// It refers to nothing.
pub fn identity(fd: BorrowedFd<'_>) -> io::Result<(String, u64)> {
    let metadata = File::from(fd.try_clone_to_owned()?).metadata()?;
    Ok((
        format!("{}:{}", metadata.dev(), metadata.ino()),
        metadata.len(),
    ))
}
