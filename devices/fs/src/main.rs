//! `anemone-fs`: a directory of the host that a guest mounts, virtio-fs over vhost-user.
//!
//! ```text
//!   main thread           vhost-user, urgent requests               device
//!   queue1, queue2, …     ring ─▶ request ─▶ file system ─▶ ring    worker: request, fs
//!   slow0 … slow3         requests that wait for a disk             worker
//!                         what outlives the process                 table: state
//! ```

mod device;
mod fs;
mod fuse;
mod ids;
mod request;
mod state;
mod sys;
mod table;
mod worker;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Common, Filter, Program, parse_fd};

use device::{FsDevice, TAG_SIZE};
use fs::{Cache, FileSystem, Settings};
use state::MAX_QUEUES;

struct Options {
    tag: Option<[u8; TAG_SIZE]>,
    directory: Option<PathBuf>,
    directory_fd: Option<OwnedFd>,
    namespace: Option<OwnedFd>,
    queues: usize,
    settings: Settings,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            tag: None,
            directory: None,
            directory_fd: None,
            namespace: None,
            queues: 1,
            settings: Settings::default(),
        }
    }
}

impl Program for Options {
    type Device = FsDevice;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-fs",
        version: env!("CARGO_PKG_VERSION"),
        summary: "a directory of the host for a guest (virtio-fs over vhost-user)",
        options: "\
  --tag TEXT            the name by which the guest mounts it, 1 to 36 bytes
  --directory PATH      the directory
  --directory-fd N      the same, opened by the parent process
  --readonly            the guest can only read
  --cache none|auto|always
                        what the guest may keep: nothing, names and attributes for a second and
                        data while the file does not change (auto, the default), or everything
  --queues N            number of request queues, 1 (the default) to 16
  --owner self|guest    whose new files are: the user's that runs this process (self, the
                        default), or those of the guest's users, which needs root
  --uid-map GUEST:HOST:COUNT[+…], --gid-map GUEST:HOST:COUNT[+…]
                        what the guest calls users and groups of the host; the same by default
  --namespace-fd N      a user namespace to enter, made by the parent process
",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "tag" => self.tag = Some(parser.value()?.parse_with(parse_tag)?),
            "directory" => self.directory = Some(parser.value()?.into()),
            "directory-fd" => self.directory_fd = Some(parser.value()?.parse_with(parse_fd)?),
            "namespace-fd" => self.namespace = Some(parser.value()?.parse_with(parse_fd)?),
            "readonly" => self.settings.read_only = true,
            "cache" => self.settings.cache = parser.value()?.parse_with(parse_cache)?,
            "queues" => self.queues = parser.value()?.parse_with(parse_queues)?,
            "owner" => self.settings.act = parser.value()?.parse_with(parse_owner)?,
            "uid-map" => self.settings.users = parser.value()?.parse()?,
            "gid-map" => self.settings.groups = parser.value()?.parse()?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(mut self, common: &Common) -> Result<FsDevice, Box<dyn Error>> {
        let tag = self.tag.ok_or("--tag is needed")?;
        let directory = match (self.directory, self.directory_fd) {
            (Some(path), None) => OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
                .open(&path)
                .map_err(|e| format!("{}: {e}", path.display()))?
                .into(),
            (None, Some(fd)) => fd,
            _ => return Err("one of --directory and --directory-fd is needed".into()),
        };
        // SAFETY: integers only.
        let (uid, gid) = unsafe {
            // The guest's kernel has taken the mask of its process into account.
            libc::umask(0);
            (libc::geteuid(), libc::getegid())
        };
        if self.settings.act && uid != 0 {
            return Err("--owner guest needs root".into());
        }
        self.settings.own = (uid, gid);
        let namespace = match self.namespace {
            Some(namespace) => Some(namespace),
            None => anemone_sandbox::id_namespace()
                .inspect_err(|e| log::warn!("all files seem to belong to nobody: {e}"))
                .ok(),
        };
        let sandbox = common.sandbox;
        let fs = FileSystem::new(directory, self.settings)?;
        Ok(FsDevice::new(fs, tag, self.queues, namespace, sandbox))
    }
}

fn parse_tag(text: &str) -> Result<[u8; TAG_SIZE], String> {
    let mut tag = [0; TAG_SIZE];
    match tag.get_mut(..text.len()) {
        Some(start) if !text.is_empty() => start.copy_from_slice(text.as_bytes()),
        _ => return Err(format!("not 1 to {TAG_SIZE} bytes")),
    }
    Ok(tag)
}

fn parse_cache(text: &str) -> Result<Cache, &'static str> {
    match text {
        "none" => Ok(Cache::None),
        "auto" => Ok(Cache::Auto),
        "always" => Ok(Cache::Always),
        _ => Err("only \"none\", \"auto\" and \"always\" are possible"),
    }
}

fn parse_owner(text: &str) -> Result<bool, &'static str> {
    match text {
        "self" => Ok(false),
        "guest" => Ok(true),
        _ => Err("only \"self\" and \"guest\" are possible"),
    }
}

fn parse_queues(text: &str) -> Result<usize, String> {
    const MOST: usize = MAX_QUEUES - 1;
    match text.parse() {
        Ok(queues @ 1..=MOST) => Ok(queues),
        _ => Err(format!("not a number from 1 to {MOST}")),
    }
}

fn main() -> ExitCode {
    anemone_device::run::<Options>()
}
