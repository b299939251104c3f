//! Requests on what a file has beside its data: mode, owner, times, extended attributes.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::{FileSystem, Found, Place, valid_bits};
use crate::fuse::{self, Fields, Out, set};
use crate::request::Request;
use crate::state::Seen;
use crate::sys::{self, Outcome};

impl FileSystem {
    fn attr_out(&self, stat: &libc::stat) -> Out {
        let mut out = Out::default();
        out.u64(self.timeout()).u32(0).u32(0);
        self.attr(&mut out, stat);
        out
    }

    pub(super) fn get_attributes(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (flags, _, fh) = (args.u32()?, args.u32()?, args.u64()?);
        let nodeid = request.header.nodeid;
        if flags & fuse::GETATTR_FH != 0
            && let Ok((fd, _)) = self.opened(fh, nodeid)
        {
            return Ok(self.attr_out(&sys::stat_fd(fd.as_fd())?));
        }
        Ok(self.attr_out(&self.find(nodeid)?.stat))
    }

    pub(super) fn set_attributes(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        args.skip(8)?;
        let valid = valid_bits(request);
        let (fh, size, _lock_owner) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime, mtime, _ctime) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_nsec, mtime_nsec, _ctime_nsec) = (args.u32()?, args.u32()?, args.u32()?);
        let (mode, _, uid, gid, _) = (
            args.u32()?,
            args.u32()?,
            args.u32()?,
            args.u32()?,
            args.u32()?,
        );
        let nodeid = request.header.nodeid;
        let found = self.find(nodeid)?;
        if valid & set::SIZE != 0 {
            let handle = (valid & set::FH != 0)
                .then(|| self.opened(fh, nodeid))
                .transpose()?;
            let writable = |flags: &u32| flags & libc::O_ACCMODE as u32 != 0;
            let fd = match handle {
                Some((fd, flags)) if writable(&flags) => fd,
                _ if found.stat.st_mode & libc::S_IFMT == libc::S_IFREG => {
                    self.open_found(&found, libc::O_WRONLY)?
                }
                _ => return Err(libc::EINVAL),
            };
            sys::truncate(fd.as_fd(), size)?;
            if valid & set::KILL_SUIDGID != 0 {
                self.clear_privilege(fd.as_fd())?;
            }
        }
        if valid & (set::UID | set::GID) != 0 {
            let id = |bit, map: &crate::ids::IdMap, id| match valid & bit {
                0 => Ok(u32::MAX),
                _ => map.host(id).filter(|&id| id != u32::MAX).ok_or(libc::EPERM),
            };
            let uid = id(set::UID, &self.settings.users, uid)?;
            let gid = id(set::GID, &self.settings.groups, gid)?;
            let (dir, name) = named(&found.place);
            // An id that this process's namespace does not have.
            let refused = |error| {
                if error == libc::EINVAL {
                    libc::EPERM
                } else {
                    error
                }
            };
            sys::chown(dir, name, uid, gid).map_err(refused)?;
        }
        if valid & set::MODE != 0 {
            let mode = mode & 0o7777;
            match &found.place {
                // There is no call that leaves the target of a link alone (before Linux 6.6).
                _ if found.stat.st_mode & libc::S_IFMT == libc::S_IFLNK => {
                    return Err(libc::EOPNOTSUPP);
                }
                Place::Name(dir, name) => sys::chmod(dir.as_fd(), name, mode)?,
                Place::Open(fd) => sys::chmod_fd(fd.as_fd(), mode)?,
            }
        }
        if valid & (set::ATIME | set::MTIME) != 0 {
            let time = |given: u32, now: u32, seconds: u64, nsec: u32| libc::timespec {
                tv_sec: seconds as i64,
                tv_nsec: match (valid & given, valid & now) {
                    (0, _) => libc::UTIME_OMIT,
                    (_, 0) => i64::from(nsec),
                    _ => libc::UTIME_NOW,
                },
            };
            let times = [
                time(set::ATIME, set::ATIME_NOW, atime, atime_nsec),
                time(set::MTIME, set::MTIME_NOW, mtime, mtime_nsec),
            ];
            match &found.place {
                Place::Name(dir, name) => sys::set_times(dir.as_fd(), Some(name), &times)?,
                Place::Open(fd) => sys::set_times(fd.as_fd(), None, &times)?,
            }
        }
        let (dir, name) = named(&found.place);
        Ok(self.attr_out(&sys::stat(dir, name)?))
    }

    /// Opens a file for its extended attributes, as one who may read or write it. Only regular files
    /// and directories can have those of users (xattr(7)); others have none and get none.
    fn open_for_attributes(&self, found: &Found, none: i32) -> Outcome<Arc<OwnedFd>> {
        match found.stat.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFDIR => {}
            _ => return Err(none),
        }
        match self.open_found(found, libc::O_RDONLY) {
            Err(libc::EACCES) => self.open_found(found, libc::O_WRONLY),
            other => other,
        }
    }

    pub(super) fn get_xattr(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (size, _) = (args.u32()?, args.u32()?);
        let name = self.attribute_name(args.text()?)?;
        let found = self.find(request.header.nodeid)?;
        let fd = self.open_for_attributes(&found, libc::ENODATA)?;
        let mut value = vec![0; (size as usize).min(65536)];
        let length = sys::get_attribute(fd.as_fd(), &name, &mut value)?;
        value.truncate(length);
        Ok(sized(size, value, length))
    }

    pub(super) fn list_xattr(&self, request: &Request) -> Outcome<Out> {
        let size = Fields(&request.args).u32()?;
        let found = self.find(request.header.nodeid)?;
        let all = match self.open_for_attributes(&found, libc::ENODATA) {
            Ok(fd) => sys::list_attributes(fd.as_fd())?,
            Err(libc::ENODATA) => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut list = Vec::new();
        for name in all.split_inclusive(|&byte| byte == 0) {
            let text = name.strip_suffix(&[0]).unwrap_or(name);
            if self.attribute_name(text).is_ok() {
                list.extend_from_slice(name);
            }
        }
        let length = list.len();
        if size != 0 && length > size as usize {
            return Err(libc::ERANGE);
        }
        Ok(sized(size, list, length))
    }

    pub(super) fn set_xattr(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (size, flags) = (args.u32()?, args.u32()? as i32);
        let name = self.attribute_name(args.text()?)?;
        let value = args.bytes(size as usize)?;
        let found = self.find(request.header.nodeid)?;
        let fd = self.open_for_attributes(&found, libc::EPERM)?;
        let ([before, _], again) = self.attribute_before(request, &fd, &name)?;
        // Carried out before, it is there; it was not, and it would have to be new.
        let flags = match again && before.there == 0 {
            true => flags & !libc::XATTR_CREATE,
            false => flags,
        };
        sys::set_attribute(fd.as_fd(), &name, value, flags)?;
        Ok(Out::default())
    }

    pub(super) fn remove_xattr(&self, request: &Request) -> Outcome<Out> {
        let name = self.attribute_name(Fields(&request.args).text()?)?;
        let found = self.find(request.header.nodeid)?;
        let fd = self.open_for_attributes(&found, libc::EPERM)?;
        let ([before, _], again) = self.attribute_before(request, &fd, &name)?;
        match sys::remove_attribute(fd.as_fd(), &name) {
            Err(libc::ENODATA) if again && before.there != 0 => {}
            other => other?,
        }
        Ok(Out::default())
    }

    /// Whether an attribute was there before the request was begun.
    fn attribute_before(
        &self,
        request: &Request,
        fd: &OwnedFd,
        name: &CStr,
    ) -> Outcome<([Seen; 2], bool)> {
        self.before(request, || {
            let there = match sys::get_attribute(fd.as_fd(), name, &mut []) {
                Err(libc::ENODATA) => 0,
                other => other.map(|_| 1)?,
            };
            let seen = Seen {
                there,
                ..Seen::default()
            };
            Ok([seen, Seen::default()])
        })
    }
}

/// A directory and a name in it, or what is open and no name.
fn named(place: &Place) -> (std::os::fd::BorrowedFd<'_>, &CStr) {
    match place {
        Place::Name(dir, name) => (dir.as_fd(), name),
        Place::Open(fd) => (fd.as_fd(), c""),
    }
}

/// The reply to a request for bytes: their number alone if the guest has room for none.
fn sized(room: u32, bytes: Vec<u8>, length: usize) -> Out {
    if room != 0 {
        return Out(bytes);
    }
    let mut out = Out::default();
    out.u32(length as u32).u32(0);
    out
}
