//! Requests that list directories.

use std::ffi::CString;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Cache, FileSystem, Place};
use crate::fuse::{DIRENT, ENTRY_OUT, FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, Fields, Out};
use crate::request::Request;
use crate::state::MAX_COUNTED;
use crate::sys::{self, Outcome};
use crate::table::is_name;

/// Bytes of entries in one reply at most.
const MAX_LIST: usize = 128 << 10;
/// Bytes that are read from the kernel at once.
const BUFFER: usize = 32 << 10;

/// An entry as the kernel lists it.
struct Entry<'a> {
    ino: u64,
    /// Where the next one begins.
    offset: u64,
    kind: u8,
    name: &'a [u8],
}

impl FileSystem {
    pub(super) fn open_directory(&self, request: &Request) -> Outcome<Out> {
        let found = self.find(request.header.nodeid)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let Place::Name(dir, name) = &found.place else {
            return Err(libc::ENOTDIR);
        };
        let fd = sys::open(dir.as_fd(), name, flags, 0)?;
        let fh = self.register(request, found.node, flags, Arc::new(fd))?;
        let cache = match self.settings.cache {
            Cache::Always => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
            Cache::Auto | Cache::None => 0,
        };
        let mut out = Out::default();
        out.u64(fh).u32(cache).u32(0);
        Ok(out)
    }

    /// READDIR, and READDIRPLUS, which looks each entry up as well.
    pub(super) fn read_directory(&self, request: &Request, plus: bool) -> Outcome<Out> {
        let mut args = Fields(&request.args);
        let (fh, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let (fd, flags) = self.opened(fh, request.header.nodeid)?;
        if flags & libc::O_DIRECTORY as u32 == 0 {
            return Err(libc::ENOTDIR);
        }
        let (parent, dir) = self.parent(request.header.nodeid)?;
        let limit = (size as usize).min(request.room()).min(MAX_LIST);
        let mut buffer = vec![0; BUFFER.min(limit).max(1024)];
        let mut out = Out(Vec::with_capacity(limit));
        let mut counted = 0;
        sys::seek(fd.as_fd(), offset, libc::SEEK_SET)?;
        let length = match sys::read_directory(fd.as_fd(), &mut buffer) {
            // The directory has been removed.
            Err(libc::ENOENT) => 0,
            other => other?,
        };
        let mut list = &buffer[..length];
        while let Some(entry) = next(&mut list) {
            let head = if plus { ENTRY_OUT } else { 0 };
            let needed = (head + DIRENT + entry.name.len()).next_multiple_of(8);
            if out.0.len() + needed > limit || counted == MAX_COUNTED {
                return match out.0.is_empty() {
                    true => Err(libc::EINVAL),
                    false => Ok(out),
                };
            }
            if plus {
                let start = out.0.len();
                if is_name(entry.name) {
                    counted += 1;
                    let name = CString::new(entry.name).map_err(|_| libc::EIO)?;
                    if self.found(request, parent, &dir, &name, &mut out).is_err() {
                        // It has gone, or there are too many: only its name is told.
                        out.0.truncate(start);
                    }
                }
                out.0.resize(start + ENTRY_OUT, 0);
            }
            out.u64(entry.ino)
                .u64(entry.offset)
                .u32(entry.name.len() as u32)
                .u32(entry.kind.into())
                .bytes(entry.name);
            let padding = out.0.len().next_multiple_of(8) - out.0.len();
            out.zeroes(padding);
        }
        Ok(out)
    }
}

/// Takes the next `struct linux_dirent64` of a list.
fn next<'a>(list: &mut &'a [u8]) -> Option<Entry<'a>> {
    const NAME: usize = 19;
    let mut fields = Fields(list);
    let (ino, offset) = (fields.u64().ok()?, fields.u64().ok()?);
    let length = usize::from(u16::from_ne_bytes([*list.get(16)?, *list.get(17)?]));
    let kind = *list.get(18)?;
    let name = list.get(NAME..length)?;
    let end = name.iter().position(|&byte| byte == 0)?;
    *list = list.get(length..)?;
    Some(Entry {
        ino,
        offset,
        kind,
        name: &name[..end],
    })
}
