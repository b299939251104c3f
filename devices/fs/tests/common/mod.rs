//! What the tests of this package share.

#![allow(dead_code, reason = "not every test needs all of it")]

use std::fs;
use std::path::{Path, PathBuf};

use anemone_driver::{Device, Options, Process};
use tempfile::TempDir;

pub const BINARY: &str = env!("CARGO_BIN_EXE_anemone-fs");
/// The queue of ordinary requests.
pub const QUEUE: usize = 1;
/// Data in one request.
pub const DATA: u32 = 256 << 10;

/// A shared directory and the process that shares it.
pub struct Shared {
    pub process: Process,
    pub device: Device,
    folder: TempDir,
}

impl Shared {
    /// With further arguments.
    pub fn start(args: &[&str]) -> Self {
        Self::prepared(args, |_| {})
    }

    /// With a directory that was filled before.
    pub fn prepared(args: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        Self::set_up(args, prepare, &options())
    }

    /// With another set-up of the device.
    pub fn with(options: &Options) -> Self {
        Self::set_up(&[], |_| {}, options)
    }

    fn set_up(args: &[&str], prepare: impl FnOnce(&Path), options: &Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("share");
        fs::create_dir(&root).unwrap();
        prepare(&root);
        let root = root.to_str().unwrap();
        let args = [&["--tag", "test", "--directory", root], args].concat();
        let mut process = Process::start(BINARY, &args).unwrap();
        let device = process.device(options).unwrap();
        Self {
            process,
            device,
            folder,
        }
    }

    /// The shared directory.
    pub fn root(&self) -> PathBuf {
        self.folder.path().join("share")
    }

    /// Something in the shared directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Something beside the shared directory.
    pub fn outside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

pub fn options() -> Options {
    Options {
        queues: 2,
        memory: 32 << 20,
        ..Options::default()
    }
}

/// Mounts, as `$mount`.
#[macro_export]
macro_rules! mount {
    ($shared:expr) => {{
        let device = &mut $shared.device;
        anemone_driver::fs::Mount::new(
            &device.memory,
            &mut device.queues[common::QUEUE],
            common::DATA,
        )
        .unwrap()
    }};
}
