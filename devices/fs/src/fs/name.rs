//! Requests that look names up, make and remove them.
//!
//! A kill can come between an operation and the note of its reply. What the names meant before was
//! noted first, so the operation that is carried out again knows whether what it finds is its own work.

use std::ffi::CString;
use std::os::fd::AsFd;

use super::{FileSystem, Found, Place, name, seen};
use crate::fs::Cache;
use crate::fuse::{self, ENTRY_OUT, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, Fields, Out};
use crate::request::Request;
use crate::state::{Ident, Seen};
use crate::sys::{self, Outcome};

/// Flags of an open that are the host's business. The others are the guest kernel's own.
const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_SYNC | libc::O_DSYNC;

impl Seen {
    fn was_there(&self) -> bool {
        self.there != 0
    }

    /// `S_IFMT` bits.
    fn kind(&self) -> u32 {
        (self.there as u32).wrapping_sub(1)
    }
}

impl FileSystem {
    pub(super) fn lookup(&self, request: &Request) -> Outcome<Out> {
        let text = Fields(&request.args).text()?;
        let mut out = Out::default();
        if text == b"." || text == b".." {
            self.lookup_dots(request, text == b"..", &mut out)?;
            return Ok(out);
        }
        let name = name(text)?;
        let (parent, dir) = self.parent(request.header.nodeid)?;
        self.found(request, parent, &dir, &name, &mut out)?;
        Ok(out)
    }

    /// For a guest that exports the file system: the node itself, or the directory that it is in.
    fn lookup_dots(&self, request: &Request, up: bool, out: &mut Out) -> Outcome<()> {
        let nodeid = request.header.nodeid;
        let nodeid = match up {
            false => nodeid,
            true => {
                let table = self.table();
                let node = table.node(nodeid)?;
                let parent = table
                    .location(node)
                    .map_or(node, |location| location.parent);
                table.nodeid(parent)
            }
        };
        let found = self.find(nodeid)?;
        let (ident, kind) = (Ident::of(&found.stat), found.stat.st_mode & libc::S_IFMT);
        {
            let mut table = self.table();
            // Counted where it is, under the name that it has.
            let location = table.location(found.node);
            let (parent, name) = match &location {
                Some(location) => (location.parent, location.name.to_bytes()),
                None => (found.node, &b"."[..]),
            };
            table.look_up(ident, kind, parent, name, Some(request.place))?;
        }
        self.entry(out, nodeid, &found.stat);
        Ok(())
    }

    /// FORGET has no reply. Its end is noted before anything is forgotten: see the journal.
    pub(super) fn forget(&self, request: &Request) -> Outcome<Out> {
        let mut table = self.table();
        let (queue, head) = request.place;
        if let Some(entry) = table.entry(queue, head) {
            entry.end(Ok(&[]));
        }
        let mut args = Fields(&request.args);
        if request.header.opcode == fuse::op::FORGET {
            table.forget(request.header.nodeid, args.u64()?);
            return Ok(Out::default());
        }
        let count = args.u32()?;
        args.skip(4)?;
        for _ in 0..count {
            // What was counted but is not there ends the list.
            let (Ok(nodeid), Ok(times)) = (args.u64(), args.u64()) else {
                break;
            };
            table.forget(nodeid, times);
        }
        Ok(Out::default())
    }

    /// Makes something under a new name.
    fn make(
        &self,
        request: &Request,
        text: &[u8],
        make: impl FnOnce(std::os::fd::BorrowedFd<'_>, &std::ffi::CStr) -> Outcome<()>,
    ) -> Outcome<Out> {
        let name = name(text)?;
        let (parent, dir) = self.parent(request.header.nodeid)?;
        let look = || Ok([seen(&dir, &name)?, Seen::default()]);
        let ([before, _], again) = self.before(request, look)?;
        let acting = self.act(request)?;
        match make(dir.as_fd(), &name) {
            // It was not there before, so it is ours.
            Err(libc::EEXIST) if again && !before.was_there() => {}
            other => other?,
        }
        drop(acting);
        let mut out = Out::default();
        self.found(request, parent, &dir, &name, &mut out)?;
        Ok(out)
    }

    pub(super) fn mkdir(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (mode, _umask) = (args.u32()?, args.u32()?);
        self.make(request, args.text()?, |dir, name| {
            sys::make_directory(dir, name, mode & 0o7777)
        })
    }

    pub(super) fn mknod(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (mode, rdev) = (args.u32()?, args.u32()?);
        args.skip(8)?;
        self.make(request, args.text()?, |dir, name| {
            sys::make_node(dir, name, mode, fuse::device(rdev))
        })
    }

    pub(super) fn symlink(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let text = args.text()?;
        let target = CString::new(args.text()?).map_err(|_| libc::EINVAL)?;
        self.make(request, text, |dir, name| {
            sys::make_symlink(dir, name, &target)
        })
    }

    pub(super) fn link(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let old = self.find(args.u64()?)?;
        // Where it has another name, the guest's kernel looks that up and asks again.
        let Place::Name(old_dir, old_name) = &old.place else {
            return Err(libc::ESTALE);
        };
        self.make(request, args.text()?, |dir, name| {
            sys::link((old_dir.as_fd(), old_name), dir, name)
        })
    }

    pub(super) fn unlink(&self, request: &Request, flags: i32) -> Outcome<Out> {
        let name = name(Fields(&request.args).text()?)?;
        let (parent, dir) = self.parent(request.header.nodeid)?;
        let look = || Ok([seen(&dir, &name)?, Seen::default()]);
        let ([before, _], again) = self.before(request, look)?;
        if !again || seen(&dir, &name)? == before {
            sys::unlink(dir.as_fd(), &name, flags)?;
        } else if !before.was_there() {
            return Err(libc::ENOENT);
        }
        // Else it has gone already, and what is there now was made later.
        let mut table = self.table();
        table.lose(before.ident, before.kind(), parent, name.to_bytes());
        Ok(Out::default())
    }

    pub(super) fn rename(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let new_parent = args.u64()?;
        let mut flags = 0;
        if request.header.opcode == fuse::op::RENAME2 {
            flags = args.u32()?;
            args.skip(4)?;
        }
        if flags & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return Err(libc::EINVAL);
        }
        let (old, new) = (name(args.text()?)?, name(args.text()?)?);
        let (old_parent, old_dir) = self.parent(request.header.nodeid)?;
        let (new_parent, new_dir) = self.parent(new_parent)?;
        let look = || Ok([seen(&old_dir, &old)?, seen(&new_dir, &new)?]);
        let (before, again) = self.before(request, look)?;
        let exchange = flags & libc::RENAME_EXCHANGE != 0;
        let done = again && before[0].was_there() && before[0] != before[1] && {
            let now = look()?;
            now[1] == before[0] && (now[0] == before[1] || !exchange && now[0] != before[0])
        };
        if !done {
            let (from, to) = ((old_dir.as_fd(), &*old), (new_dir.as_fd(), &*new));
            sys::rename(from, to, flags)?;
        }
        let mut table = self.table();
        let [from, to] = before;
        if exchange {
            table.moved(to.ident, to.kind(), old_parent, old.to_bytes());
        } else if from.ident != to.ident {
            table.lose(to.ident, to.kind(), new_parent, new.to_bytes());
        }
        table.moved(from.ident, from.kind(), new_parent, new.to_bytes());
        Ok(Out::default())
    }

    pub(super) fn open(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (flags, open_flags) = (args.u32()? as i32, args.u32()?);
        let truncate = flags & libc::O_TRUNC != 0;
        if self.settings.read_only && (truncate || flags & libc::O_ACCMODE != libc::O_RDONLY) {
            return Err(libc::EROFS);
        }
        let found = self.find(request.header.nodeid)?;
        let flags = open_kind(&found, flags)?;
        let fd = self.open_found(&found, flags)?;
        if truncate {
            sys::truncate(fd.as_fd(), 0)?;
            if open_flags & fuse::OPEN_KILL_SUIDGID != 0 {
                self.clear_privilege(fd.as_fd())?;
            }
        }
        let fh = self.register(request, found.node, flags, fd)?;
        let mut out = Out::default();
        out.u64(fh).u32(self.cache_flags()).u32(0);
        Ok(out)
    }

    fn cache_flags(&self) -> u32 {
        match self.settings.cache {
            Cache::None => FOPEN_DIRECT_IO,
            Cache::Auto => 0,
            Cache::Always => FOPEN_KEEP_CACHE,
        }
    }

    pub(super) fn create(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (flags, mode) = (args.u32()? as i32, args.u32()?);
        let (_umask, open_flags) = (args.u32()?, args.u32()?);
        let name = name(args.text()?)?;
        let (parent, dir) = self.parent(request.header.nodeid)?;
        let look = || Ok([seen(&dir, &name)?, Seen::default()]);
        let ([before, _], again) = self.before(request, look)?;
        let mut how = (flags & (OPEN_FLAGS | libc::O_EXCL)) | libc::O_CREAT;
        if again && !before.was_there() {
            // What is there is ours, or nothing is.
            how &= !libc::O_EXCL;
        }
        let acting = self.act(request)?;
        let opened = match sys::open(dir.as_fd(), &name, how, mode & 0o7777) {
            // Made by us, with a mode that does not let us open it twice.
            Err(libc::EACCES) if again && !before.was_there() => {
                sys::unlink(dir.as_fd(), &name, 0)?;
                sys::open(dir.as_fd(), &name, how | libc::O_EXCL, mode & 0o7777)
            }
            other => other,
        };
        let fd = opened?;
        drop(acting);
        let mut out = Out(Vec::with_capacity(ENTRY_OUT + 16));
        let node = self.found(request, parent, &dir, &name, &mut out)?;
        let stat = sys::stat_fd(fd.as_fd())?;
        let same = self.table().record(node).ident == Ident::of(&stat);
        let kind = stat.st_mode & libc::S_IFMT;
        let prepared = match (same, kind) {
            (true, libc::S_IFREG) if flags & libc::O_TRUNC != 0 && stat.st_size != 0 => {
                sys::truncate(fd.as_fd(), 0).and_then(|()| {
                    match open_flags & fuse::OPEN_KILL_SUIDGID {
                        0 => Ok(()),
                        _ => self.clear_privilege(fd.as_fd()),
                    }
                })
            }
            (true, libc::S_IFREG) => Ok(()),
            (true, _) => Err(libc::EINVAL),
            (false, _) => Err(libc::ESTALE),
        };
        let flags = how & OPEN_FLAGS;
        let registered =
            prepared.and_then(|()| self.register(request, node, flags, std::sync::Arc::new(fd)));
        match registered {
            Ok(fh) => {
                out.u64(fh).u32(self.cache_flags()).u32(0);
                Ok(out)
            }
            Err(error) => {
                // The guest never hears of the node.
                self.table().take_back(node);
                Err(error)
            }
        }
    }
}

/// The flags with which a file is opened, if it is one that can be: pipes, sockets and devices are opened
/// by the guest's kernel and not here.
fn open_kind(found: &Found, flags: i32) -> Outcome<i32> {
    match found.stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => Ok(flags & OPEN_FLAGS),
        libc::S_IFDIR => Err(libc::EISDIR),
        libc::S_IFLNK => Err(libc::ELOOP),
        _ => Err(libc::EINVAL),
    }
}
