//! virtio-fs requests (virtio 1.3, 5.11), with FUSE in them (Linux, include/uapi/linux/fuse.h).

use std::time::Duration;

use crate::{Buffer, Error, Memory, Queue, Result};

/// Longest wait for one request.
const PATIENCE: Duration = Duration::from_secs(20);
/// Room for a header with arguments, and for a header with a short reply.
const SHORT: u32 = 512;
/// Length of the header of a request and of a reply.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

/// The node of the root directory.
pub const ROOT: u64 = 1;

/// Operations.
#[allow(missing_docs, reason = "names of the header file")]
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
}

/// Bits that say what SETATTR sets.
#[allow(missing_docs, reason = "names of the header file")]
pub mod set {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// A request for [`Requests::submit`].
#[derive(Debug, Clone, Default)]
pub struct Call {
    /// One of [`op`].
    pub opcode: u32,
    /// The node it is about.
    pub nodeid: u64,
    /// What follows the header.
    pub args: Vec<u8>,
    /// Bytes of data after that, which are in the slot's [`data`](Requests::data) already.
    pub data: u32,
    /// Bytes that the reply may have after its header; `None` for a request without a reply.
    pub room: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    head: u64,
    data: u64,
    reply: u64,
}

/// Requests with memory of their own, `depth` of which may be in flight on one queue.
#[derive(Debug)]
pub struct Requests {
    slots: Vec<Slot>,
    data_len: u32,
    free: Vec<usize>,
    by_head: Vec<Option<(usize, u64)>>,
    unique: u64,
    /// User and group in whose name requests are made.
    pub user: (u32, u32),
}

/// A finished request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The slot that [`Requests::submit`] returned.
    pub slot: usize,
    /// What follows the header of the reply, or the error number; `None` if nothing was written.
    pub reply: Option<std::result::Result<Vec<u8>, i32>>,
}

impl Requests {
    /// Room for `depth` requests with up to `data_len` bytes of data each on queues of
    /// `queue_size` entries.
    pub fn new(memory: &Memory, queue_size: u16, depth: usize, data_len: u32) -> Self {
        let data_len = data_len.next_multiple_of(4096);
        let slots = (0..depth)
            .map(|_| Slot {
                head: memory.alloc((data_len.max(4096) + SHORT).into(), 16),
                data: memory.alloc(data_len.into(), 4096),
                reply: memory.alloc(SHORT.into(), 16),
            })
            .collect();
        Self {
            slots,
            data_len,
            free: (0..depth).rev().collect(),
            by_head: vec![None; queue_size.into()],
            unique: 2,
            user: (0, 0),
        }
    }

    /// The header of a request, as it is in memory.
    fn header(&mut self, call: &Call) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(IN_HEADER);
        let len = IN_HEADER as u32 + call.args.len() as u32 + call.data;
        self.unique += 2;
        bytes.extend_from_slice(&len.to_ne_bytes());
        bytes.extend_from_slice(&call.opcode.to_ne_bytes());
        bytes.extend_from_slice(&self.unique.to_ne_bytes());
        bytes.extend_from_slice(&call.nodeid.to_ne_bytes());
        bytes.extend_from_slice(&self.user.0.to_ne_bytes());
        bytes.extend_from_slice(&self.user.1.to_ne_bytes());
        bytes.resize(IN_HEADER, 0);
        bytes
    }

    /// Adds a request; its slot, or `None` when `depth` are in flight or the queue is full. Publish
    /// and kick afterwards.
    ///
    /// # Panics
    /// The request has more data than there is room for.
    pub fn submit(&mut self, memory: &Memory, queue: &mut Queue, call: &Call) -> Option<usize> {
        let slot = *self.free.last()?;
        let parts = self.slots[slot];
        let mut head = self.header(call);
        head.extend_from_slice(&call.args);
        assert!(
            head.len() <= (self.data_len.max(4096) + SHORT) as usize && call.data <= self.data_len
        );
        memory.write(parts.head, &head);
        let mut readable = vec![Buffer {
            addr: parts.head,
            len: head.len() as u32,
        }];
        let data = |len| Buffer {
            addr: parts.data,
            len,
        };
        if call.data > 0 {
            readable.push(data(call.data));
        }
        let mut writable = Vec::new();
        if let Some(room) = call.room {
            memory.write(parts.reply, &[0xaa; OUT_HEADER]);
            writable.push(Buffer {
                addr: parts.reply,
                len: OUT_HEADER as u32,
            });
            // A write has its data in the slot: its reply is short and beside the header.
            match call.data {
                0 if room > 0 => writable.push(data(room.min(self.data_len))),
                0 => {}
                _ => writable[0].len += room.min(64),
            }
        }
        let head = queue.add_indirect(&readable, &writable)?;
        self.free.pop();
        self.by_head[usize::from(head)] = Some((slot, self.unique));
        Some(slot)
    }

    /// Takes a finished request.
    ///
    /// # Panics
    /// The reply is not one to the request, or its lengths do not agree.
    pub fn finish(&mut self, memory: &Memory, queue: &mut Queue) -> Option<Finished> {
        let (slot, length) = self.finish_unread(memory, queue)?;
        let reply = length.map(|length| length.map(|len| self.reply_bytes(memory, slot, len)));
        Some(Finished { slot, reply })
    }

    /// Takes a finished request and leaves its reply where it is: the slot, and the length of what follows
    /// the reply's header or the error number; `None` if nothing was written.
    ///
    /// # Panics
    /// As for [`finish`](Self::finish).
    pub fn finish_unread(
        &mut self,
        memory: &Memory,
        queue: &mut Queue,
    ) -> Option<(usize, Option<Reply<usize>>)> {
        let used = queue.take_used()?;
        let (slot, unique) = self.by_head.get_mut(used.head as usize)?.take()?;
        self.free.push(slot);
        if used.len == 0 {
            return Some((slot, None));
        }
        let header = memory.read_vec(self.slots[slot].reply, OUT_HEADER);
        let word = |at: usize| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_ne_bytes(bytes)
        };
        assert_eq!(word(0), used.len, "length in the header and in the ring");
        let told = u64::from(word(8)) | u64::from(word(12)) << 32;
        assert_eq!(told, unique, "reply to another request");
        let length = match word(4) as i32 {
            0 => Ok(used.len as usize - OUT_HEADER),
            error => Err(-error),
        };
        Some((slot, Some(length)))
    }

    /// Bytes after the header: in the data's place, or beside it after a write.
    fn reply_bytes(&self, memory: &Memory, slot: usize, len: usize) -> Vec<u8> {
        let parts = self.slots[slot];
        let header = memory.read_vec(parts.head, 8);
        if header[4..8] == op::WRITE.to_ne_bytes() {
            return memory.read_vec(parts.reply + OUT_HEADER as u64, len);
        }
        memory.read_vec(parts.data, len)
    }

    /// Number of requests in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Guest address of a slot's data.
    pub fn data(&self, slot: usize) -> u64 {
        self.slots[slot].data
    }

    /// The slot that the next request will take.
    pub fn next_slot(&self) -> Option<usize> {
        self.free.last().copied()
    }
}

/// A reply: what follows its header, or an error number.
pub type Reply<T = Vec<u8>> = std::result::Result<T, i32>;

/// `fuse_attr`, as far as tests look at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "names of the header file")]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: u64,
    pub mtime: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
}

/// Bytes that are read from front to back.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn u32(&mut self) -> u32 {
        let (first, rest) = self.0.split_first_chunk().copied_or_panic();
        self.0 = rest;
        u32::from_ne_bytes(first)
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }
}

/// A reply that is too short is the test's failure.
trait CopiedOrPanic<'a> {
    fn copied_or_panic(self) -> ([u8; 4], &'a [u8]);
}

impl<'a> CopiedOrPanic<'a> for Option<(&'a [u8; 4], &'a [u8])> {
    #[allow(clippy::expect_used, reason = "a test fails")]
    fn copied_or_panic(self) -> ([u8; 4], &'a [u8]) {
        let (first, rest) = self.expect("the reply is too short");
        (*first, rest)
    }
}

fn attr(bytes: &mut Bytes<'_>) -> Attr {
    let (ino, size, blocks) = (bytes.u64(), bytes.u64(), bytes.u64());
    let (atime, mtime, _ctime) = (bytes.u64(), bytes.u64(), bytes.u64());
    let _nanoseconds = (bytes.u32(), bytes.u32(), bytes.u32());
    let (mode, nlink, uid, gid) = (bytes.u32(), bytes.u32(), bytes.u32(), bytes.u32());
    let (rdev, _blksize, _flags) = (bytes.u32(), bytes.u32(), bytes.u32());
    Attr {
        ino,
        size,
        blocks,
        atime,
        mtime,
        mode,
        nlink,
        uid,
        gid,
        rdev,
    }
}

/// `fuse_entry_out`: a node that was looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry {
    /// Its number.
    pub nodeid: u64,
    /// How long the name may be cached, in seconds.
    pub entry_valid: u64,
    /// Its attributes.
    pub attr: Attr,
}

impl Entry {
    /// Reads the reply to LOOKUP and its like.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut bytes = Bytes(bytes);
        let (nodeid, _generation, entry_valid) = (bytes.u64(), bytes.u64(), bytes.u64());
        let _rest = (bytes.u64(), bytes.u32(), bytes.u32());
        Self {
            nodeid,
            entry_valid,
            attr: attr(&mut bytes),
        }
    }
}

/// An entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dirent {
    /// Inode number.
    pub ino: u64,
    /// Where the next one begins.
    pub offset: u64,
    /// `DT_` number.
    pub kind: u32,
    /// Its name.
    pub name: Vec<u8>,
    /// What READDIRPLUS tells beside it.
    pub entry: Option<Entry>,
}

/// Reads the reply to READDIR or READDIRPLUS.
pub fn dirents(mut bytes: &[u8], plus: bool) -> Vec<Dirent> {
    let mut list = Vec::new();
    while !bytes.is_empty() {
        let mut entry = None;
        let mut length = 24;
        if plus {
            entry = Some(Entry::from_bytes(bytes));
            length += 128;
        }
        let mut fields = Bytes(&bytes[length - 24..]);
        let (ino, offset) = (fields.u64(), fields.u64());
        let (name_len, kind) = (fields.u32() as usize, fields.u32());
        list.push(Dirent {
            ino,
            offset,
            kind,
            name: fields.0[..name_len].to_vec(),
            entry,
        });
        bytes = &bytes[(length + name_len).next_multiple_of(8)..];
    }
    list
}

/// Arguments of requests, from numbers and names.
#[derive(Debug, Clone, Default)]
pub struct Args(Vec<u8>);

impl Args {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A 32-bit number.
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// A 64-bit number.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    /// A name and its NUL.
    pub fn name(mut self, name: impl AsRef<[u8]>) -> Self {
        self.0.extend_from_slice(name.as_ref());
        self.0.push(0);
        self
    }

    /// Bytes as they are.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// The arguments as bytes.
    pub fn done(self) -> Vec<u8> {
        self.0
    }
}

/// A mounted file system: one request at a time, each waited for. Panics if the device does not
/// answer, and if an answer is malformed.
#[derive(Debug)]
pub struct Mount<'a> {
    memory: &'a Memory,
    queue: &'a mut Queue,
    /// The requests; for their user.
    pub requests: Requests,
}

impl<'a> Mount<'a> {
    /// Mounts over `queue`, with up to `data_len` bytes of data in a request.
    ///
    /// # Errors
    /// The device does not answer.
    ///
    /// # Panics
    /// The device refuses.
    pub fn new(memory: &'a Memory, queue: &'a mut Queue, data_len: u32) -> Result<Self> {
        let mut mount = Self::unmounted(memory, queue, data_len);
        let args = Args::new()
            .u32(7)
            .u32(38)
            .u32(1 << 20)
            .u32(!(1 << 29))
            .bytes(&[0; 48]);
        let reply = mount.try_call(op::INIT, 0, args, 64)?;
        assert!(
            matches!(&reply, Ok(bytes) if bytes.len() == 64),
            "INIT: {reply:?}"
        );
        Ok(mount)
    }

    /// As [`new`](Self::new), for one that is mounted already or never.
    pub fn unmounted(memory: &'a Memory, queue: &'a mut Queue, data_len: u32) -> Self {
        let requests = Requests::new(memory, queue.size(), 1, data_len);
        Self {
            memory,
            queue,
            requests,
        }
    }

    /// Sends a request and waits for the reply.
    ///
    /// # Errors
    /// There is none in time.
    pub fn try_call(&mut self, opcode: u32, nodeid: u64, args: Args, room: u32) -> Result<Reply> {
        let call = Call {
            opcode,
            nodeid,
            args: args.done(),
            data: 0,
            room: Some(room),
        };
        self.run(&call)?
            .ok_or(Error::Timeout("a request has no reply"))
    }

    fn run(&mut self, call: &Call) -> Result<Option<Reply>> {
        self.requests
            .submit(self.memory, self.queue, call)
            .ok_or(Error::Timeout("an earlier request is still in flight"))?;
        self.queue.publish();
        self.queue.kick();
        if !self.queue.wait(PATIENCE)? {
            return Err(Error::Timeout("a request"));
        }
        match self.requests.finish(self.memory, self.queue) {
            Some(finished) => Ok(finished.reply),
            None => Err(Error::Timeout("an unknown chain was returned")),
        }
    }

    /// Sends any request.
    ///
    /// # Errors
    /// The error number of the reply.
    ///
    /// # Panics
    /// There is no reply.
    #[allow(clippy::expect_used, reason = "a test fails")]
    pub fn call(&mut self, opcode: u32, nodeid: u64, args: Args, room: u32) -> Reply {
        self.try_call(opcode, nodeid, args, room)
            .expect("the device answers")
    }

    /// LOOKUP.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn lookup(&mut self, parent: u64, name: impl AsRef<[u8]>) -> Reply<Entry> {
        let reply = self.call(op::LOOKUP, parent, Args::new().name(name), 128)?;
        Ok(Entry::from_bytes(&reply))
    }

    /// Looks up the components of a path.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn walk(&mut self, path: &str) -> Reply<Entry> {
        let mut entry = Entry {
            nodeid: ROOT,
            ..Entry::default()
        };
        for name in path.split('/') {
            entry = self.lookup(entry.nodeid, name)?;
        }
        Ok(entry)
    }

    /// GETATTR.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn getattr(&mut self, nodeid: u64) -> Reply<Attr> {
        let args = Args::new().u32(0).u32(0).u64(0);
        let reply = self.call(op::GETATTR, nodeid, args, 104)?;
        Ok(attr(&mut Bytes(&reply[16..])))
    }

    /// SETATTR, with what `valid` names of `values`; `times` are of access and of change.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn setattr(&mut self, nodeid: u64, valid: u32, values: &Attr, fh: u64) -> Reply<Attr> {
        let args = Args::new()
            .u32(valid)
            .u32(0)
            .u64(fh)
            .u64(values.size)
            .u64(0)
            .u64(values.atime)
            .u64(values.mtime)
            .u64(0)
            .u32(0)
            .u32(0)
            .u32(0)
            .u32(values.mode)
            .u32(0)
            .u32(values.uid)
            .u32(values.gid)
            .u32(0);
        let reply = self.call(op::SETATTR, nodeid, args, 104)?;
        Ok(attr(&mut Bytes(&reply[16..])))
    }

    /// MKDIR.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn mkdir(&mut self, parent: u64, name: impl AsRef<[u8]>, mode: u32) -> Reply<Entry> {
        let args = Args::new().u32(mode).u32(0).name(name);
        let reply = self.call(op::MKDIR, parent, args, 128)?;
        Ok(Entry::from_bytes(&reply))
    }

    /// CREATE: the node and the handle.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn create(
        &mut self,
        parent: u64,
        name: impl AsRef<[u8]>,
        flags: i32,
        mode: u32,
    ) -> Reply<(Entry, u64)> {
        let args = Args::new()
            .u32(flags as u32)
            .u32(mode)
            .u32(0)
            .u32(0)
            .name(name);
        let reply = self.call(op::CREATE, parent, args, 144)?;
        Ok((Entry::from_bytes(&reply), Bytes(&reply[128..]).u64()))
    }

    /// OPEN: the handle.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn open(&mut self, nodeid: u64, flags: i32) -> Reply<u64> {
        let reply = self.call(op::OPEN, nodeid, Args::new().u32(flags as u32).u32(0), 16)?;
        Ok(Bytes(&reply).u64())
    }

    /// RELEASE.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn release(&mut self, nodeid: u64, fh: u64) -> Reply<()> {
        let args = Args::new().u64(fh).u64(0).u64(0);
        self.call(op::RELEASE, nodeid, args, 0).map(drop)
    }

    /// READ.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn read(&mut self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Reply {
        self.call(op::READ, nodeid, read_args(fh, offset, size), size)
    }

    /// WRITE: how many bytes were written. `flags` are those of the open file.
    ///
    /// # Errors
    /// The error number of the reply.
    ///
    /// # Panics
    /// There is no reply.
    #[allow(clippy::expect_used, reason = "a test fails")]
    pub fn write(
        &mut self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: i32,
    ) -> Reply<u32> {
        let slot = self.requests.next_slot().expect("no request is in flight");
        self.memory.write(self.requests.data(slot), data);
        let call = write_call(nodeid, fh, offset, data.len() as u32, flags);
        let reply = self.run(&call).expect("the device answers");
        reply
            .expect("a write has a reply")
            .map(|reply| Bytes(&reply).u32())
    }

    /// OPENDIR: the handle.
    ///
    /// # Errors
    /// The error number of the reply.
    pub fn opendir(&mut self, nodeid: u64) -> Reply<u64> {
        let reply = self.call(op::OPENDIR, nodeid, Args::new().u32(0).u32(0), 16)?;
        Ok(Bytes(&reply).u64())
    }

    /// READDIR or READDIRPLUS, all entries from an offset on.
    ///
    /// # Errors
    /// The error number of a reply.
    pub fn readdir(&mut self, nodeid: u64, fh: u64, plus: bool, size: u32) -> Reply<Vec<Dirent>> {
        let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
        let mut all: Vec<Dirent> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |last| last.offset);
            let reply = self.call(opcode, nodeid, read_args(fh, offset, size), size)?;
            if reply.is_empty() {
                return Ok(all);
            }
            all.extend(dirents(&reply, plus));
        }
    }

    /// FORGET, which has no reply.
    ///
    /// # Panics
    /// It has one, or does not come back.
    #[allow(clippy::expect_used, reason = "a test fails")]
    pub fn forget(&mut self, nodeid: u64, times: u64) {
        let call = Call {
            opcode: op::FORGET,
            nodeid,
            args: Args::new().u64(times).done(),
            ..Call::default()
        };
        let reply = self.run(&call).expect("the device answers");
        assert_eq!(reply, None);
    }
}

/// Arguments of READ, READDIR and READDIRPLUS.
pub fn read_args(fh: u64, offset: u64, size: u32) -> Args {
    Args::new()
        .u64(fh)
        .u64(offset)
        .u32(size)
        .u32(0)
        .u64(0)
        .u32(0)
        .u32(0)
}

/// A WRITE of what is in its slot.
pub fn write_call(nodeid: u64, fh: u64, offset: u64, size: u32, flags: i32) -> Call {
    let args = Args::new().u64(fh).u64(offset).u32(size).u32(0).u64(0);
    Call {
        opcode: op::WRITE,
        nodeid,
        args: args.u32(flags as u32).u32(0).done(),
        data: size,
        room: Some(8),
    }
}
