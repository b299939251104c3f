//! The file system that the guest mounts: requests become operations on the shared directory.
//!
//! Every operation takes a directory that is open and one name in it, which is neither `.` nor `..`
//! nor contains a `/`, and follows no symbolic link: links are the guest's to follow. What is found
//! under a name is compared with what the guest means by it.

mod attribute;
mod directory;
mod file;
mod name;

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anemone_device::Host;

use crate::fuse::{self, Fields, Out, init, op, set};
use crate::ids::IdMap;
use crate::request::Request;
use crate::state::{Ident, Mapping, Seen, Stage};
use crate::sys::{self, Outcome};
use crate::table::{Location, ROOT_NODE, Table, is_name};

/// Bytes of data in one read or write at most. The guest's queue may allow less.
const MAX_TRANSFER: u32 = 1 << 20;
/// Key under which the supervisor keeps the tables.
const STATE_KEY: u64 = 0;
/// Keys of handles' descriptors have this bit, and the number of the handle's record.
const HANDLE_KEY: u64 = 1 << 32;

/// What the guest may keep in its caches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Nothing.
    None,
    /// Names and attributes for a second, data until a file is opened that has changed.
    #[default]
    Auto,
    /// Everything: nobody else changes the directory.
    Always,
}

/// How a directory is shared.
#[derive(Debug, Default)]
pub struct Settings {
    pub cache: Cache,
    pub read_only: bool,
    pub users: IdMap,
    pub groups: IdMap,
    /// New files belong to the guest's users, not to the user that runs this process.
    pub act: bool,
    /// The user and group that run it.
    pub own: (u32, u32),
}

/// The shared directory and what the guest knows of it.
pub struct FileSystem {
    root: Arc<OwnedFd>,
    root_ident: Ident,
    settings: Settings,
    table: Mutex<Table>,
    host: OnceLock<Host>,
    /// Descriptors that the supervisor has kept, until the tables are taken over.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    state: Option<OwnedFd>,
    handles: HashMap<u32, OwnedFd>,
    /// The supervisor has the tables of this process.
    begun: bool,
}

/// Where a file is now.
enum Place {
    /// This name in this directory.
    Name(Arc<OwnedFd>, CString),
    /// It has no name, but is open.
    Open(Arc<OwnedFd>),
}

/// A file, and its status when it was found.
struct Found {
    node: u32,
    place: Place,
    stat: libc::stat,
}

/// What becomes of a request.
enum Answer {
    Reply(Outcome<Out>),
    /// So many bytes are in the reply's place already.
    InPlace(usize),
    /// The kernel would wait.
    WouldBlock,
}

impl FileSystem {
    /// Shares a directory.
    ///
    /// # Errors
    /// The directory has no status, or memory cannot be had.
    pub fn new(root: OwnedFd, settings: Settings) -> std::io::Result<Self> {
        let stat = sys::stat_fd(root.as_fd()).map_err(std::io::Error::from_raw_os_error)?;
        Ok(Self {
            root: Arc::new(root),
            root_ident: Ident::of(&stat),
            settings,
            table: Mutex::new(Table::new(Mapping::new()?)),
            host: OnceLock::new(),
            kept: Mutex::default(),
        })
    }

    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn attach(&self, host: &Host) {
        // Set once.
        let _ = self.host.set(host.clone());
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // The tables are such that they can be taken over at any moment.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a descriptor that an earlier process had kept.
    pub fn restore(&self, key: u64, fd: OwnedFd) {
        let mut kept = self.kept();
        match key {
            STATE_KEY => kept.state = Some(fd),
            _ => match u32::try_from(key ^ HANDLE_KEY) {
                Ok(record) => drop(kept.handles.insert(record, fd)),
                Err(_) => log::warn!("a descriptor was kept under the unknown key {key:#x}"),
            },
        }
    }

    /// A queue starts: the tables of an earlier process are taken over if there are any, and
    /// those in use are kept for a later one.
    pub fn begin(&self) {
        let mut kept = self.kept();
        if std::mem::replace(&mut kept.begun, true) {
            return;
        }
        if let Some(state) = kept.state.take() {
            let handles = std::mem::take(&mut kept.handles);
            let taken = Mapping::of_earlier(state)
                .map_err(|e| e.to_string())
                .and_then(|mapping| Table::of_earlier(mapping, handles, self.root_ident));
            match taken {
                Ok(table) => {
                    *self.table() = table;
                    return;
                }
                Err(why) => log::error!(
                    "what the earlier process left behind is of no use, the guest must mount \
                     again: {why}"
                ),
            }
        }
        self.keep(STATE_KEY, self.table().mapping().as_fd());
    }

    fn keep(&self, key: u64, fd: BorrowedFd<'_>) {
        if let Some(host) = self.host.get()
            && let Err(error) = host.keep(key, fd)
        {
            anemone_log::warn_limited!("descriptor {} is not kept: {error}", fd.as_raw_fd());
        }
    }

    fn forget_kept(&self, record: u32) {
        if let Some(host) = self.host.get() {
            host.forget(HANDLE_KEY | u64::from(record));
        }
    }

    /// The guest has gone: it has nothing open and knows nothing.
    pub fn unmount(&self) {
        self.start_over(None);
    }

    fn start_over(&self, root: Option<Ident>) {
        let open = self.table().start_over(root);
        for record in open {
            self.forget_kept(record);
        }
    }

    /// Carries out a request. Returns the number of bytes written to the guest, or `None`, with
    /// nothing done, if `may_block` is false and the kernel might wait long.
    pub fn serve(&self, request: &mut Request, may_block: bool) -> Option<u32> {
        if !may_block && is_slow(request) {
            return None;
        }
        let journaled = is_journaled(request);
        if journaled && let Some(reply) = self.note_begin(request) {
            return Some(request.answer(reply.as_deref().map_err(|&e| e)));
        }
        let answer = match self.dispatch(request, may_block) {
            Answer::Reply(reply) => reply,
            Answer::InPlace(len) => return Some(request.answer_in_place(len)),
            Answer::WouldBlock => return None,
        };
        let reply = answer.as_ref().map(|out| &out.0[..]).map_err(|&e| e);
        if journaled {
            let (queue, head) = request.place;
            if let Some(entry) = self.table().entry(queue, head) {
                entry.end(reply);
            }
        }
        let written = request.answer(reply);
        Some(written)
    }

    /// Carries out a request of the urgent queue, on the main thread: nothing but forgetting. Other
    /// requests do not belong there (virtio 1.3, 5.11.6).
    pub fn serve_urgent(&self, request: &mut Request) -> u32 {
        match request.header.opcode {
            op::FORGET | op::BATCH_FORGET => self.serve(request, true).unwrap_or(0),
            _ => request.answer(Err(libc::ENOSYS)),
        }
    }

    /// Notes in the journal that a request begins. The reply, if it has ended before.
    fn note_begin(&self, request: &mut Request) -> Option<Outcome<Vec<u8>>> {
        let header = &request.header;
        let (queue, head) = request.place;
        let mut table = self.table();
        let entry = table.entry(queue, head)?;
        let stage = match request.again {
            true => entry.stage(header.unique, header.opcode, header.nodeid),
            false => None,
        };
        match stage {
            None => {
                entry.begin(header.unique, header.opcode, header.nodeid);
                None
            }
            Some(Stage::Begun) => {
                request.seen = entry.seen();
                let (counted, handle) = (entry.take_counted(), entry.take_handle());
                for node in counted {
                    table.take_back(node);
                }
                let closed = table.close(handle);
                drop(table);
                if let Ok((record, _)) = closed {
                    self.forget_kept(record);
                }
                None
            }
            Some(Stage::Ended(reply)) => Some(reply),
        }
    }

    /// What the names of a request meant before it was begun for the first time, and whether that
    /// was in an earlier process.
    fn before(
        &self,
        request: &Request,
        look: impl FnOnce() -> Outcome<[Seen; 2]>,
    ) -> Outcome<([Seen; 2], bool)> {
        if let Some(seen) = request.seen {
            return Ok((seen, true));
        }
        let seen = look()?;
        let (queue, head) = request.place;
        if let Some(entry) = self.table().entry(queue, head) {
            entry.see(seen);
        }
        Ok((seen, false))
    }

    fn dispatch(&self, request: &mut Request, may_block: bool) -> Answer {
        match request.header.opcode {
            op::READ => return self.read(request, may_block),
            op::INIT => return Answer::Reply(self.init(request)),
            _ => {}
        }
        let request = &*request;
        let changes = matches!(
            request.header.opcode,
            op::SETATTR
                | op::SYMLINK
                | op::MKNOD
                | op::MKDIR
                | op::UNLINK
                | op::RMDIR
                | op::RENAME
                | op::RENAME2
                | op::LINK
                | op::CREATE
                | op::WRITE
                | op::SETXATTR
                | op::REMOVEXATTR
                | op::FALLOCATE
                | op::COPY_FILE_RANGE
        );
        if changes && self.settings.read_only {
            return Answer::Reply(Err(libc::EROFS));
        }
        Answer::Reply(match request.header.opcode {
            op::LOOKUP => self.lookup(request),
            op::FORGET | op::BATCH_FORGET => self.forget(request),
            op::GETATTR => self.get_attributes(request),
            op::SETATTR => self.set_attributes(request),
            op::READLINK => self.read_link(request),
            op::SYMLINK => self.symlink(request),
            op::MKNOD => self.mknod(request),
            op::MKDIR => self.mkdir(request),
            op::UNLINK => self.unlink(request, 0),
            op::RMDIR => self.unlink(request, libc::AT_REMOVEDIR),
            op::RENAME | op::RENAME2 => self.rename(request),
            op::LINK => self.link(request),
            op::OPEN => self.open(request),
            op::CREATE => self.create(request),
            op::WRITE => self.write(request),
            op::STATFS => self.statfs(request),
            op::RELEASE | op::RELEASEDIR => self.release(request),
            op::FSYNC | op::FSYNCDIR => self.fsync(request),
            op::SYNCFS => self.sync_all(),
            op::SETXATTR => self.set_xattr(request),
            op::GETXATTR => self.get_xattr(request),
            op::LISTXATTR => self.list_xattr(request),
            op::REMOVEXATTR => self.remove_xattr(request),
            op::OPENDIR => self.open_directory(request),
            op::READDIR => self.read_directory(request, false),
            op::READDIRPLUS => self.read_directory(request, true),
            op::ACCESS => self.access(request),
            op::FALLOCATE => self.allocate(request),
            op::LSEEK => self.seek(request),
            op::COPY_FILE_RANGE => self.copy_range(request),
            op::DESTROY => {
                self.unmount();
                Ok(Out::default())
            }
            // Nothing here waits so long that it would have to be interrupted. The guest's kernel sends FLUSH
            // once and learns that closing a file needs no word of its own.
            _ => Err(libc::ENOSYS),
        })
    }

    /// A mount begins.
    fn init(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (major, minor) = (args.u32()?, args.u32()?);
        let mut out = Out::default();
        if major > fuse::MAJOR {
            // The guest is to try again with this one.
            out.u32(fuse::MAJOR).u32(fuse::MINOR).zeroes(56);
            return Ok(out);
        }
        if major < fuse::MAJOR || minor < fuse::OLDEST_MINOR {
            log::warn!("the guest speaks FUSE {major}.{minor}, too old for this file system");
            return Err(libc::EPROTO);
        }
        let (readahead, offered) = (args.u32()?, args.u32()?);
        self.start_over(Some(self.root_ident));
        let mut wanted = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::EXPORT_SUPPORT
            | init::BIG_WRITES
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2;
        if self.settings.cache != Cache::None {
            wanted |= init::CACHE_SYMLINKS;
        }
        if self.settings.cache == Cache::Auto {
            wanted |= init::AUTO_INVAL_DATA;
        }
        out.u32(fuse::MAJOR)
            .u32(minor.min(fuse::MINOR))
            .u32(readahead)
            .u32(offered & wanted)
            .u16(64) // max_background
            .u16(48) // congestion_threshold
            .u32(MAX_TRANSFER)
            .u32(1) // time_gran
            .u16((MAX_TRANSFER / 4096) as u16)
            .u16(0) // map_alignment
            .zeroes(32);
        Ok(out)
    }

    /// The directory behind a node, open.
    fn directory(&self, node: u32) -> Outcome<Arc<OwnedFd>> {
        if node == ROOT_NODE {
            return Ok(Arc::clone(&self.root));
        }
        // The way up to a directory that is open.
        let mut way: Vec<(u32, CString, Ident)> = Vec::new();
        let mut dir = {
            let mut table = self.table();
            let mut at = node;
            loop {
                if at == ROOT_NODE {
                    break Arc::clone(&self.root);
                }
                if let Some(dir) = table.directory(at) {
                    break dir;
                }
                let record = table.record(at);
                if record.used == 0 || record.kind != libc::S_IFDIR {
                    return Err(libc::ENOTDIR);
                }
                let ident = record.ident;
                let Location { parent, name } = table.location(at).ok_or(libc::ESTALE)?;
                way.push((at, name, ident));
                at = parent;
            }
        };
        for (at, name, ident) in way.into_iter().rev() {
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            let next = sys::open(dir.as_fd(), &name, flags, 0).map_err(stale)?;
            if Ident::of(&sys::stat_fd(next.as_fd())?) != ident {
                return Err(libc::ESTALE);
            }
            dir = Arc::new(next);
            let mut table = self.table();
            let record = table.record(at);
            if record.used != 0 && record.ident == ident {
                table.keep_directory(at, &dir);
            }
        }
        Ok(dir)
    }

    /// The directory that a request names as its node, and its record.
    fn parent(&self, nodeid: u64) -> Outcome<(u32, Arc<OwnedFd>)> {
        let node = self.table().node(nodeid)?;
        Ok((node, self.directory(node)?))
    }

    /// Where a file is now.
    fn find(&self, nodeid: u64) -> Outcome<Found> {
        let (node, kind, ident, location) = {
            let table = self.table();
            let node = table.node(nodeid)?;
            let record = table.record(node);
            (node, record.kind, record.ident, table.location(node))
        };
        if kind == libc::S_IFDIR {
            let dir = self.directory(node)?;
            return Ok(Found {
                node,
                stat: sys::stat(dir.as_fd(), c".")?,
                place: Place::Name(dir, c".".to_owned()),
            });
        }
        if let Some(Location { parent, name }) = location
            && let Ok(dir) = self.directory(parent)
            && let Ok(stat) = sys::stat(dir.as_fd(), &name)
            && (Ident::of(&stat), stat.st_mode & libc::S_IFMT) == (ident, kind)
        {
            let place = Place::Name(dir, name);
            return Ok(Found { node, place, stat });
        }
        let fd = self.table().any_open(node, false).ok_or(libc::ESTALE)?;
        let stat = sys::stat_fd(fd.as_fd())?;
        let place = Place::Open(fd);
        Ok(Found { node, place, stat })
    }

    /// Opens a file that was found.
    fn open_found(&self, found: &Found, flags: i32) -> Outcome<Arc<OwnedFd>> {
        match &found.place {
            Place::Name(dir, name) => {
                let fd = sys::open(dir.as_fd(), name, flags, 0)?;
                if Ident::of(&sys::stat_fd(fd.as_fd())?) != Ident::of(&found.stat) {
                    return Err(libc::ESTALE);
                }
                Ok(Arc::new(fd))
            }
            Place::Open(fd) if flags & libc::O_ACCMODE == libc::O_RDONLY => Ok(Arc::clone(fd)),
            Place::Open(_) => self.table().any_open(found.node, true).ok_or(libc::ESTALE),
        }
    }

    /// The descriptor of an open file or directory of the node, and the flags it was opened with.
    fn opened(&self, fh: u64, nodeid: u64) -> Outcome<(Arc<OwnedFd>, u32)> {
        let (record, handle) = self.table().handle(fh, nodeid)?;
        if let Some(fd) = handle.fd {
            return Ok((fd, handle.flags));
        }
        // The supervisor had no copy of it.
        let fd = self.open_found(&self.find(nodeid)?, handle.flags as i32)?;
        self.table().reopened(record, &fd);
        if handle.flags & libc::O_DIRECTORY as u32 == 0 {
            self.keep(HANDLE_KEY | u64::from(record), fd.as_fd());
        }
        Ok((fd, handle.flags))
    }

    /// Registers what was opened; the handle's number.
    fn register(&self, request: &Request, node: u32, flags: i32, fd: Arc<OwnedFd>) -> Outcome<u64> {
        let is_file = flags & libc::O_DIRECTORY == 0;
        let kept = is_file.then(|| Arc::clone(&fd));
        let (fh, record) = self
            .table()
            .open(node, flags as u32, fd, Some(request.place))?;
        // A directory's position is in each request, so one that is opened again is the same.
        if let Some(fd) = kept {
            self.keep(HANDLE_KEY | u64::from(record), fd.as_fd());
        }
        Ok(fh)
    }

    fn timeout(&self) -> u64 {
        match self.settings.cache {
            Cache::None => 0,
            Cache::Auto => 1,
            Cache::Always => 24 * 60 * 60,
        }
    }

    fn attr(&self, out: &mut Out, stat: &libc::stat) {
        let users = (&self.settings.users, &self.settings.groups);
        out.attr(stat, users.0.guest(stat.st_uid), users.1.guest(stat.st_gid));
    }

    /// `fuse_entry_out` of a node.
    fn entry(&self, out: &mut Out, nodeid: u64, stat: &libc::stat) {
        out.u64(nodeid)
            .u64(0) // generation: part of the number
            .u64(self.timeout())
            .u64(self.timeout())
            .u32(0)
            .u32(0);
        self.attr(out, stat);
    }

    /// Counts what is under a name as looked up, and describes it.
    fn found(
        &self,
        request: &Request,
        parent: u32,
        dir: &OwnedFd,
        name: &CStr,
        out: &mut Out,
    ) -> Outcome<u32> {
        let stat = sys::stat(dir.as_fd(), name)?;
        let (ident, kind) = (Ident::of(&stat), stat.st_mode & libc::S_IFMT);
        let (node, nodeid) = {
            let mut table = self.table();
            let entry = Some(request.place);
            let node = table.look_up(ident, kind, parent, name.to_bytes(), entry)?;
            (node, table.nodeid(node))
        };
        self.entry(out, nodeid, &stat);
        Ok(node)
    }

    /// Takes the place of the guest's user, for what is made in its name.
    fn act(&self, request: &Request) -> Outcome<Option<sys::Acting>> {
        if !self.settings.act {
            return Ok(None);
        }
        let uid = self.settings.users.host(request.header.uid);
        let gid = self.settings.groups.host(request.header.gid);
        match (uid, gid) {
            (Some(uid), Some(gid)) => sys::Acting::new(uid, gid, self.settings.own).map(Some),
            _ => Err(libc::EPERM),
        }
    }

    /// Clears set-user-id and set-group-id as a write by a user without privilege would. Where this process
    /// has no privilege itself the host's kernel does it.
    fn clear_privilege(&self, fd: BorrowedFd<'_>) -> Outcome<()> {
        if !self.settings.act {
            return Ok(());
        }
        let mode = sys::stat_fd(fd)?.st_mode;
        let mut less = mode & !libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 {
            less &= !libc::S_ISGID;
        }
        match less == mode {
            true => Ok(()),
            false => sys::chmod_fd(fd, less & 0o7777),
        }
    }
}

/// Whether the kernel might wait for a device for long. Reads are tried first.
fn is_slow(request: &Request) -> bool {
    match request.header.opcode {
        op::FSYNC | op::FSYNCDIR | op::SYNCFS | op::FALLOCATE | op::COPY_FILE_RANGE => true,
        op::SETATTR => valid_bits(request) & set::SIZE != 0,
        op::WRITE => write_flags(request) & (libc::O_SYNC | libc::O_DSYNC) as u32 != 0,
        _ => false,
    }
}

/// Whether the request would do something else if it were carried out twice.
fn is_journaled(request: &Request) -> bool {
    match request.header.opcode {
        op::LOOKUP
        | op::FORGET
        | op::BATCH_FORGET
        | op::SYMLINK
        | op::MKNOD
        | op::MKDIR
        | op::UNLINK
        | op::RMDIR
        | op::RENAME
        | op::RENAME2
        | op::LINK
        | op::OPEN
        | op::OPENDIR
        | op::CREATE
        | op::SETXATTR
        | op::REMOVEXATTR
        | op::READDIRPLUS => true,
        op::WRITE => write_flags(request) & libc::O_APPEND as u32 != 0,
        _ => false,
    }
}

/// `fuse_setattr_in.valid`.
fn valid_bits(request: &Request) -> u32 {
    Fields(&request.args).u32().unwrap_or(0)
}

/// `fuse_write_in.flags`: those of the guest's file.
fn write_flags(request: &Request) -> u32 {
    let mut args = Fields(&request.args);
    args.skip(32).and_then(|()| args.u32()).unwrap_or(0)
}

/// A name in a request.
fn name(text: &[u8]) -> Outcome<CString> {
    if text.len() > fuse::NAME_MAX {
        return Err(libc::ENAMETOOLONG);
    }
    match is_name(text) {
        true => CString::new(text).map_err(|_| libc::EINVAL),
        false => Err(libc::EINVAL),
    }
}

/// What is there under a name.
fn seen(dir: &OwnedFd, name: &CStr) -> Outcome<Seen> {
    match sys::stat(dir.as_fd(), name) {
        Ok(stat) => Ok(Seen {
            there: 1 + u64::from(stat.st_mode & libc::S_IFMT),
            ident: Ident::of(&stat),
        }),
        Err(libc::ENOENT) => Ok(Seen::default()),
        Err(error) => Err(error),
    }
}

/// The way to a file that was there has gone.
fn stale(error: i32) -> i32 {
    match error {
        libc::ENOENT | libc::ENOTDIR | libc::ELOOP => libc::ESTALE,
        other => other,
    }
}
