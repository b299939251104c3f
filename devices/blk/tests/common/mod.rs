//! An image in a folder of its own and the process that serves it.

#![allow(dead_code, reason = "not every test file uses everything")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anemone_driver::{Device, Options, Process};
use tempfile::TempDir;

pub const BINARY: &str = env!("CARGO_BIN_EXE_anemone-blk");
pub const SECTOR: usize = 512;

/// virtio-blk feature bits (virtio 1.2, 5.2.3).
pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_MQ: u64 = 1 << 12;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

pub struct Image {
    folder: TempDir,
    pub file: File,
}

impl Image {
    /// An image of so many bytes, none of them zero.
    pub fn new(size: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(folder.path().join("image"))
            .unwrap();
        file.write_all_at(&content(size), 0).unwrap();
        Self { folder, file }
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// Serves the image.
    pub fn serve(&self, io: &str, args: &[&str]) -> Process {
        let path = self.path();
        let all = ["--image", path.to_str().unwrap(), "--io", io];
        Process::start(BINARY, &[&all[..], args].concat()).unwrap()
    }
}

/// What a new image contains.
pub fn content(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i / 512 + i % 255) as u8 | 1).collect()
}

/// The process, set up by a driver that accepts all features, with one queue.
pub fn connect(process: &mut Process) -> Device {
    process.device(&Options::default()).unwrap()
}

/// A small generator for reproducible choices (Marsaglia's xorshift).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
