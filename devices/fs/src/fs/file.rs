//! Requests on open files: data, and making them durable.

use std::os::fd::AsFd;

use libc::iovec;

use super::{Answer, FileSystem, name, write_flags};
use crate::fuse::{self, Fields, OUT_HEADER, Out};
use crate::request::{Request, WRITE_IN};
use crate::state::{Ident, Seen};
use crate::sys::{self, Outcome};

/// Bytes that one COPY_FILE_RANGE copies at most; the guest asks again for the rest.
const MAX_COPY: u64 = 64 << 20;

impl FileSystem {
    /// Reads straight into the guest's memory.
    pub(super) fn read(&self, request: &mut Request, may_block: bool) -> Answer {
        let arguments = || -> Outcome<_> {
            let mut args = Fields(&request.args);
            let (fh, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
            Ok((self.opened(fh, request.header.nodeid)?.0, offset, size))
        };
        let (fd, mut offset, size) = match arguments() {
            Ok(arguments) => arguments,
            Err(error) => return Answer::Reply(Err(error)),
        };
        let size = (size as usize).min(request.room());
        let target = &mut request.target;
        target.copy_from(&request.reply);
        target.skip(OUT_HEADER);
        target.truncate(size);
        let mut flags = if may_block { 0 } else { libc::RWF_NOWAIT };
        let mut done = 0;
        while done < size {
            // SAFETY: the parts are guest memory, which the request keeps mapped.
            match unsafe { sys::read_at(fd.as_fd(), target.rest(), offset, flags) } {
                Ok(0) => break,
                Ok(n) => {
                    target.skip(n);
                    done += n;
                    offset += n as u64;
                }
                Err(libc::EINTR) => {}
                Err(libc::EAGAIN) if flags != 0 => return Answer::WouldBlock,
                // A file system that cannot tell.
                Err(libc::EOPNOTSUPP) if flags != 0 => flags = 0,
                Err(_) if done > 0 => break,
                Err(error) => return Answer::Reply(Err(error)),
            }
        }
        Answer::InPlace(done)
    }

    /// Writes straight from the guest's memory.
    pub(super) fn write(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (fh, offset, size, flags) = (args.u64()?, args.u64()?, args.u32()?, args.u32()?);
        if request.args.len() < WRITE_IN || size as usize != request.data.len() {
            return Err(libc::EINVAL);
        }
        let (fd, _) = self.opened(fh, request.header.nodeid)?;
        let append = write_flags(request) & libc::O_APPEND as u32 != 0;
        let parts = request.data.rest();
        let written = match append {
            true => self.append(request, &fd, parts, offset)?,
            // SAFETY: the parts are guest memory, which the request keeps mapped.
            false => unsafe { write_all(fd.as_fd(), parts, offset) }?,
        };
        if flags & fuse::WRITE_KILL_SUIDGID != 0 {
            self.clear_privilege(fd.as_fd())?;
        }
        let mut out = Out::default();
        out.u32(written as u32).u32(0);
        Ok(out)
    }

    /// Writes at the end of the file, wherever that is: the host may have written there, too. The
    /// end is noted first, so that a write that is carried out again finds its own work.
    fn append(
        &self,
        request: &Request,
        fd: &std::os::fd::OwnedFd,
        parts: &[iovec],
        offset: u64,
    ) -> Outcome<usize> {
        let look = || {
            let stat = sys::stat_fd(fd.as_fd())?;
            let end = Seen {
                there: stat.st_size as u64,
                ident: Ident::of(&stat),
            };
            Ok([end, Seen::default()])
        };
        let ([end, _], again) = self.before(request, look)?;
        let end = end.there;
        if again && is_there(fd.as_fd(), parts, end)? {
            return Ok(request.data.len());
        }
        // SAFETY: the parts are guest memory, which the request keeps mapped.
        unsafe { sys::write_at(fd.as_fd(), parts, offset, libc::RWF_APPEND) }
    }

    pub(super) fn release(&self, request: &Request) -> Outcome<Out> {
        let fh = Fields(&request.args).u64()?;
        // One that is closed already was closed by this very request, before a restart.
        let closed = self.table().close(fh);
        if let Ok((record, fd)) = closed {
            drop(fd);
            self.forget_kept(record);
        }
        Ok(Out::default())
    }

    /// FSYNC and FSYNCDIR.
    pub(super) fn fsync(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (fh, flags) = (args.u64()?, args.u32()?);
        let (fd, _) = self.opened(fh, request.header.nodeid)?;
        if self.settings.read_only {
            // The guest has written nothing.
            return Ok(Out::default());
        }
        sys::sync(fd.as_fd(), flags & fuse::FSYNC_DATA != 0)?;
        Ok(Out::default())
    }

    pub(super) fn sync_all(&self) -> Outcome<Out> {
        if self.settings.read_only {
            return Ok(Out::default());
        }
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let root = sys::open(self.root(), c".", flags, 0)?;
        sys::sync_all(root.as_fd())?;
        Ok(Out::default())
    }

    pub(super) fn allocate(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (fh, offset, length, mode) = (args.u64()?, args.u64()?, args.u64()?, args.u32()?);
        let known =
            libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        // The others move data, and would move them again when carried out again.
        if mode & !(known as u32) != 0 {
            return Err(libc::EOPNOTSUPP);
        }
        let (fd, _) = self.opened(fh, request.header.nodeid)?;
        sys::allocate(fd.as_fd(), mode, offset, length)?;
        Ok(Out::default())
    }

    pub(super) fn seek(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (fh, offset, whence) = (args.u64()?, args.u64()?, args.u32()? as i32);
        if whence != libc::SEEK_DATA && whence != libc::SEEK_HOLE {
            return Err(libc::EINVAL);
        }
        let (fd, _) = self.opened(fh, request.header.nodeid)?;
        let mut out = Out::default();
        out.u64(sys::seek(fd.as_fd(), offset, whence)?);
        Ok(out)
    }

    pub(super) fn copy_range(&self, request: &Request) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let mut long = || args.u64();
        let (fh_in, offset_in, nodeid_out) = (long()?, long()?, long()?);
        let (fh_out, offset_out, length, flags) = (long()?, long()?, long()?, long()?);
        if flags != 0 {
            return Err(libc::EINVAL);
        }
        let (from, _) = self.opened(fh_in, request.header.nodeid)?;
        let (to, _) = self.opened(fh_out, nodeid_out)?;
        let length = length.min(MAX_COPY) as usize;
        let n = sys::copy_range(from.as_fd(), offset_in, to.as_fd(), offset_out, length)?;
        let mut out = Out::default();
        out.u32(n as u32).u32(0);
        Ok(out)
    }

    pub(super) fn statfs(&self, request: &Request) -> Outcome<Out> {
        let found = self.find(request.header.nodeid)?;
        let stat = match &found.place {
            super::Place::Name(dir, _) => sys::statfs(dir.as_fd())?,
            super::Place::Open(fd) => sys::statfs(fd.as_fd())?,
        };
        let mut out = Out::default();
        out.u64(stat.f_blocks)
            .u64(stat.f_bfree)
            .u64(stat.f_bavail)
            .u64(stat.f_files)
            .u64(stat.f_ffree)
            .u32(stat.f_bsize as u32)
            .u32(stat.f_namelen as u32)
            .u32(stat.f_frsize as u32)
            .zeroes(28);
        Ok(out)
    }

    /// The guest's kernel decides by modes and owners; this is what the host says.
    pub(super) fn access(&self, request: &Request) -> Outcome<Out> {
        let mask = Fields(&request.args).u32()?;
        self.find(request.header.nodeid)?;
        match self.settings.read_only && mask & libc::W_OK as u32 != 0 {
            true => Err(libc::EROFS),
            false => Ok(Out::default()),
        }
    }

    pub(super) fn read_link(&self, request: &Request) -> Outcome<Out> {
        let found = self.find(request.header.nodeid)?;
        match &found.place {
            super::Place::Name(dir, name) => Ok(Out(sys::read_link(dir.as_fd(), name)?)),
            super::Place::Open(_) => Err(libc::EINVAL),
        }
    }

    /// What the name of an extended attribute may be: those of users, and file capabilities where new
    /// files belong to the guest's users. Others mean something to the host and not to the guest.
    pub(super) fn attribute_name(&self, text: &[u8]) -> Outcome<std::ffi::CString> {
        let allowed =
            text.starts_with(b"user.") || (self.settings.act && text == b"security.capability");
        match allowed {
            true => name(text).or(Err(libc::EINVAL)),
            false => Err(libc::EOPNOTSUPP),
        }
    }
}

/// Writes all parts unless the kernel says otherwise.
///
/// # Safety
/// As for [`sys::write_at`].
unsafe fn write_all(
    fd: std::os::fd::BorrowedFd<'_>,
    parts: &[iovec],
    offset: u64,
) -> Outcome<usize> {
    loop {
        // SAFETY: as the caller says.
        match unsafe { sys::write_at(fd, parts, offset, 0) } {
            Err(libc::EINTR) => {}
            other => return other,
        }
    }
}

/// Whether a file has these bytes at `offset`.
fn is_there(fd: std::os::fd::BorrowedFd<'_>, parts: &[iovec], mut offset: u64) -> Outcome<bool> {
    let mut wanted = vec![0u8; 64 << 10];
    let mut found = vec![0u8; 64 << 10];
    for part in parts {
        let mut at = part.iov_base.cast::<u8>();
        let mut left = part.iov_len;
        while left > 0 {
            let now = left.min(wanted.len());
            // SAFETY: the part lies in guest memory that the request keeps mapped.
            unsafe { std::ptr::copy_nonoverlapping(at, wanted.as_mut_ptr(), now) };
            let buffer = [iovec {
                iov_base: found.as_mut_ptr().cast(),
                iov_len: now,
            }];
            // SAFETY: the buffer is at least so long.
            let n = unsafe { sys::read_at(fd, &buffer, offset, 0) };
            match n {
                Ok(n) if n == now && found[..now] == wanted[..now] => {}
                // A file that is open for writing only cannot be compared; its length says enough.
                Err(libc::EBADF) => {
                    let size = sys::stat_fd(fd)?.st_size as u64;
                    return Ok(size >= offset + left as u64);
                }
                Ok(_) => return Ok(false),
                Err(error) => return Err(error),
            }
            at = at.wrapping_add(now);
            offset += now as u64;
            left -= now;
        }
    }
    Ok(true)
}
