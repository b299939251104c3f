//! A file on storage, the process that flushes it, and a way to hold that process up.

#![allow(dead_code, reason = "not every test file uses everything")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use anemone_driver::Process;
use tempfile::TempDir;

pub const BINARY: &str = env!("CARGO_BIN_EXE_anemone-pmem");
pub const LONG: Duration = Duration::from_secs(20);
pub const SIZE: u64 = 2 << 20;
const PAGE: u64 = 4096;

/// A file in the folder of the build: what is in /tmp may never be written to any storage.
pub struct Backing {
    folder: TempDir,
    file: File,
}

impl Backing {
    pub fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(folder.path().join("memory"))
            .unwrap();
        file.set_len(SIZE).unwrap();
        Self { folder, file }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("memory")
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn serve(&self, args: &[&str]) -> Process {
        let path = self.path();
        let all = ["--file", path.to_str().unwrap()];
        Process::start(BINARY, &[&all[..], args].concat()).unwrap()
    }

    /// Writes to some pages, as a guest does: into the page cache.
    pub fn dirty(&self, seed: u64) {
        for i in 0..8 {
            let page = (seed * 37 + i * 61) % (SIZE / PAGE);
            let bytes = [seed as u8 | 1; 64];
            self.file.write_all_at(&bytes, page * PAGE).unwrap();
        }
    }

    /// Pages in the page cache that are not on the storage yet.
    pub fn unwritten(&self) -> u64 {
        self.unwritten_in(0, SIZE)
    }

    /// Those of a part of the file.
    pub fn unwritten_in(&self, offset: u64, length: u64) -> u64 {
        unwritten(&self.file, offset, length)
            .expect("cachestat (Linux 6.5) on the file system of the build")
    }
}

/// cachestat(2): dirty pages and pages that are being written.
fn unwritten(file: &File, offset: u64, length: u64) -> io::Result<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Stat {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let range = Range { offset, length };
    let mut stat = Stat::default();
    // SAFETY: both structures have the kernel's layout and outlive the call.
    let rc = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut stat,
            0,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stat.dirty + stat.writeback)
}

/// A thread of another process that does nothing, until this is dropped.
pub struct Stopped(libc::pid_t);

impl Stopped {
    /// Stops the thread of this name. A jailed process may be traced by root only.
    pub fn new(process: u32, name: &str) -> io::Result<Self> {
        let thread = std::fs::read_dir(format!("/proc/{process}/task"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|path| std::fs::read_to_string(path.join("comm")).unwrap().trim() == name)
            .expect("a thread of that name");
        let number = thread.file_name().unwrap().to_str().unwrap();
        let number: libc::pid_t = number.parse().unwrap();
        // SAFETY: no pointers; the thread is one of a child of this process.
        unsafe {
            if libc::ptrace(libc::PTRACE_SEIZE, number, 0, 0) != 0 {
                return Err(io::Error::last_os_error());
            }
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, number, 0, 0), 0);
            let mut status = 0;
            assert_eq!(libc::waitpid(number, &raw mut status, libc::__WALL), number);
            assert!(libc::WIFSTOPPED(status));
        }
        Ok(Self(number))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // SAFETY: no pointers; the thread is stopped by this thread.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0) };
    }
}
