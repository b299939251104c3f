//! `anemone-blk`: a disk in a process of its own. Serves virtio-blk over vhost-user from a raw file
//! or a block device.
//!
//! ```text
//!   main thread          vhost-user, configuration space       device
//!   queue0, queue1, …    ring ─▶ requests ─▶ engine ─▶ ring    worker: queue: request, engine
//! ```

mod device;
mod engine;
mod image;
mod queue;
mod request;
mod worker;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Common, Filter, Program};

use device::Block;
use image::Image;
use request::{Disk, ID_SIZE};

/// More queues than any guest has use for; the front end lists one descriptor pair for each.
const MAX_QUEUES: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Io {
    /// io_uring where it works and pays.
    Auto,
    Uring,
    Sync,
}

struct Blk {
    image: Option<PathBuf>,
    image_fd: Option<OwnedFd>,
    read_only: bool,
    queues: usize,
    id: [u8; ID_SIZE],
    io: Io,
}

impl Default for Blk {
    fn default() -> Self {
        Self {
            image: None,
            image_fd: None,
            read_only: false,
            queues: 1,
            id: [0; ID_SIZE],
            io: Io::Auto,
        }
    }
}

impl Program for Blk {
    type Device = Block;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-blk",
        version: env!("CARGO_PKG_VERSION"),
        summary: "a virtio disk from a raw file or a block device",
        options: "\
  --image PATH          the file or block device; it is locked against other users
  --image-fd N          the same, opened and locked by the parent process
  --readonly            the guest can only read
  --queues N            number of virtqueues, 1 (the default) to 64
  --serial TEXT         what the guest sees as the disk's serial number, up to 20 bytes
  --io uring|sync       how the image is accessed; by default with io_uring where it works
",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "image" => self.image = Some(parser.value()?.into()),
            "image-fd" => {
                let number = parser.value()?.parse()?;
                let fd = anemone_device::inherited_fd(number);
                self.image_fd = Some(fd.map_err(|e| lexopt::Error::Custom(Box::new(e)))?);
            }
            "readonly" => self.read_only = true,
            "queues" => self.queues = parser.value()?.parse_with(parse_queues)?,
            "serial" => self.id = parser.value()?.parse_with(parse_serial)?,
            "io" => self.io = parser.value()?.parse_with(parse_io)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(self, common: &Common) -> Result<Block, Box<dyn Error>> {
        let image = match (self.image, self.image_fd) {
            (Some(path), None) => Image::open(&path, self.read_only)?,
            (None, Some(fd)) => Image::from_fd(fd, self.read_only)?,
            _ => return Err("one of --image and --image-fd is needed".into()),
        };
        let in_memory = image.in_memory();
        let disk = Arc::new(Disk {
            image,
            id: self.id,
            writeback: AtomicBool::new(true),
        });
        let uring = || Block::new(Arc::clone(&disk), self.queues, true, common.sandbox);
        let device = match self.io {
            Io::Uring => uring().map_err(|e| format!("io_uring does not work here: {e}"))?,
            // Nothing ever waits for a file in memory, but through a ring the kernel hands each
            // write to one over to a helper thread.
            Io::Auto if !in_memory => match uring() {
                Ok(device) => device,
                Err(error) => {
                    log::warn!("io_uring does not work here ({error}): using --io sync");
                    Block::new(disk, self.queues, false, common.sandbox)?
                }
            },
            Io::Auto | Io::Sync => Block::new(disk, self.queues, false, common.sandbox)?,
        };
        Ok(device)
    }
}

fn parse_queues(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(queues @ 1..=MAX_QUEUES) => Ok(queues),
        _ => Err(format!("not a number from 1 to {MAX_QUEUES}")),
    }
}

fn parse_serial(text: &str) -> Result<[u8; ID_SIZE], String> {
    let mut id = [0; ID_SIZE];
    match id.get_mut(..text.len()) {
        Some(start) => start.copy_from_slice(text.as_bytes()),
        None => return Err(format!("longer than {ID_SIZE} bytes")),
    }
    Ok(id)
}

fn parse_io(text: &str) -> Result<Io, &'static str> {
    match text {
        "uring" => Ok(Io::Uring),
        "sync" => Ok(Io::Sync),
        _ => Err("only \"uring\" and \"sync\" are possible"),
    }
}

fn main() -> ExitCode {
    anemone_device::run::<Blk>()
}
