//! Attempts on memory that others have: of a device process that serves its guest, through the
//! descriptors that it holds.

use std::mem;

use crate::attempts::{Attempt, each_descriptor};
use crate::call::{Refusal, call, is_readable};
use crate::outcome::Outcome;

const PAGE: u64 = 4096;
/// So much of a file is mapped at a time.
const WINDOW: u64 = 16 << 20;

/// What a page begins with in which the guest has a secret. The letters are apart here, so that
/// a program that has this code does not hold it.
const SECRET: [u8; 16] = {
    let apart = *b"a*n*e*m*o*n*e*'*s*-*s*e*c*r*e*t*";
    let mut together = [0; 16];
    let mut i = 0;
    while i < 16 {
        together[i] = apart[2 * i];
        i += 1;
    }
    together
};

/// The bytes to put at the start of a page of the guest.
pub fn secret() -> [u8; 16] {
    SECRET
}

/// Name of the attempt that succeeds for a process that is given all of guest memory.
pub const FIND: &str = "find the guest's secret";

/// The attempts of a device that serves.
pub const ATTEMPTS: &[Attempt] = &[
    Attempt {
        name: FIND,
        refusals: &[],
        run: |_| find(),
    },
    Attempt {
        name: "read a file past its end",
        refusals: &[libc::EFAULT],
        run: |_| each_descriptor(past_the_end),
    },
    Attempt {
        name: "lengthen memory that is shared",
        refusals: &[libc::EPERM],
        run: |_| each_descriptor(|fd| resized(fd, |size| size + PAGE)),
    },
    Attempt {
        name: "shorten memory that is shared",
        refusals: &[libc::EPERM],
        run: |_| each_descriptor(|fd| resized(fd, |size| size - PAGE)),
    },
    Attempt {
        name: "seal memory that is shared",
        refusals: &[libc::EPERM],
        run: |_| {
            each_descriptor(|fd| match memory_size(fd) {
                Some(_) => outcome(call(
                    libc::SYS_fcntl,
                    [
                        fd,
                        libc::F_ADD_SEALS as u64,
                        libc::F_SEAL_FUTURE_WRITE as u64,
                    ],
                )),
                None => Outcome::Nothing,
            })
        },
    },
];

fn outcome(answer: Result<i64, Refusal>) -> Outcome {
    match answer {
        Ok(value) => Outcome::Done(value as u64),
        Err(Refusal::Denied) => Outcome::Denied,
        Err(Refusal::Errno(errno)) => Outcome::Errno(errno),
    }
}

/// Status of a descriptor.
fn status(fd: u64) -> Option<libc::statx> {
    // SAFETY: plain numbers.
    let mut status: libc::statx = unsafe { mem::zeroed() };
    let room = &raw mut status as u64;
    let flags = libc::AT_EMPTY_PATH as u64;
    call(
        libc::SYS_statx,
        [fd, c"".as_ptr() as u64, flags, 0x7FF, room],
    )
    .ok()?;
    Some(status)
}

/// Length of a file without a name, which is shared memory.
fn memory_size(fd: u64) -> Option<u64> {
    let status = status(fd)?;
    let regular = u32::from(status.stx_mode) & libc::S_IFMT == libc::S_IFREG;
    (regular && status.stx_nlink == 0 && status.stx_size >= 2 * PAGE).then_some(status.stx_size)
}

/// Maps a part of a descriptor.
fn map(fd: u64, offset: u64, length: u64) -> Option<u64> {
    let (rights, shared) = (libc::PROT_READ as u64, libc::MAP_SHARED as u64);
    let start = call(libc::SYS_mmap, [0, length, rights, shared, fd, offset]);
    start.ok().map(|start| start as u64)
}

fn unmap(start: u64, length: u64) {
    let _ = call(libc::SYS_munmap, [start, length]);
}

/// Looks at each page of everything that can be mapped.
fn find() -> Outcome {
    let mut bytes = 0;
    for fd in crate::attempts::DESCRIPTORS {
        let Some(size) = status(fd).map(|status| status.stx_size & !(PAGE - 1)) else {
            continue;
        };
        for offset in (0..size).step_by(WINDOW as usize) {
            let length = WINDOW.min(size - offset);
            let Some(start) = map(fd, offset, length) else {
                break;
            };
            let found = (0..length).step_by(PAGE as usize).find(|at| {
                // SAFETY: the mapping covers it, and lies inside the file, which has its size
                // sealed if others may write to it.
                let page = unsafe { ((start + at) as *const [u8; 16]).read_volatile() };
                page == SECRET
            });
            unmap(start, length);
            if let Some(at) = found {
                return Outcome::Done(offset + at);
            }
            bytes += length;
        }
    }
    Outcome::Absent(bytes)
}

/// Reads the last page of a file, which must be possible, and the one after.
fn past_the_end(fd: u64) -> Outcome {
    let Some(size) = memory_size(fd) else {
        return Outcome::Nothing;
    };
    let size = size.next_multiple_of(PAGE);
    let Some(start) = map(fd, size - PAGE, 2 * PAGE) else {
        return Outcome::Nothing;
    };
    let inside = is_readable(start);
    let outside = is_readable(start + PAGE);
    unmap(start, 2 * PAGE);
    match inside {
        Ok(_) => outcome(outside),
        // Not even that: the attempt is wrong.
        Err(_) => Outcome::Errno(libc::EIO),
    }
}

fn resized(fd: u64, size: impl Fn(u64) -> u64) -> Outcome {
    let Some(old) = memory_size(fd) else {
        return Outcome::Nothing;
    };
    let new = size(old);
    let truncated = outcome(call(libc::SYS_ftruncate, [fd, new]));
    if new < old {
        return truncated;
    }
    let allocated = outcome(call(libc::SYS_fallocate, [fd, 0, old, new - old]));
    truncated.max(allocated)
}
