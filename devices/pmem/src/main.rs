//! `anemone-pmem`: the flushes of persistent memory that a guest has mapped, virtio-pmem over
//! vhost-user.
//!
//! The memory itself is a file that the virtual machine monitor maps into the guest; the guest
//! reads and writes it without anybody's help. What is written is in the host's page cache then,
//! and this process brings it to the storage when the guest asks for it:
//!
//! ```text
//!   main thread    vhost-user, virtqueue      device     ── a batch waits ──▶
//!   flush          fdatasync of the file      flusher    ◀── how it ended ──
//! ```

mod device;
mod file;
mod flusher;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Common, Filter, Program};

use device::Pmem;
use file::Backing;
use flusher::Flusher;

#[derive(Default)]
struct Options {
    file: Option<PathBuf>,
    file_fd: Option<OwnedFd>,
    read_only: bool,
}

impl Program for Options {
    type Device = Pmem;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-pmem",
        version: env!("CARGO_PKG_VERSION"),
        summary: "flushes persistent memory of a guest (virtio-pmem over vhost-user)",
        options: "\
  --file PATH           the file or block device behind the memory; it is locked against other
                        users. The front end maps it and writes the configuration space
  --file-fd N           the same, opened and locked by the parent process
  --readonly            the guest can only read: flushes do nothing
",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "file" => self.file = Some(parser.value()?.into()),
            "file-fd" => {
                let number = parser.value()?.parse()?;
                let fd = anemone_device::inherited_fd(number);
                self.file_fd = Some(fd.map_err(|e| lexopt::Error::Custom(Box::new(e)))?);
            }
            "readonly" => self.read_only = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(self, common: &Common) -> Result<Pmem, Box<dyn Error>> {
        let backing = match (self.file, self.file_fd) {
            (Some(path), None) => Backing::open(&path, self.read_only)?,
            (None, Some(fd)) => Backing::from_fd(fd, self.read_only)?,
            _ => return Err("one of --file and --file-fd is needed".into()),
        };
        Ok(Pmem::new(Flusher::new(backing, common.sandbox)?))
    }
}

fn main() -> ExitCode {
    anemone_device::run::<Options>()
}
