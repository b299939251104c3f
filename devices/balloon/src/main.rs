//! `anemone-balloon`: takes memory from a guest and gives it back to the host, virtio-balloon over
//! vhost-user.

mod device;
mod pages;
mod saved;
mod statistics;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::num::NonZeroU32;
use std::process::ExitCode;
use std::time::Duration;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Common, Filter, Program};

use device::{Balloon, Settings};
use saved::PAGE;

#[derive(Default)]
struct Options {
    target: u64,
    deflate_on_oom: bool,
    reporting: bool,
    stats_interval: Option<NonZeroU32>,
}

impl Program for Options {
    type Device = Balloon;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-balloon",
        version: env!("CARGO_PKG_VERSION"),
        summary: "takes memory from a guest and gives it back (virtio-balloon over vhost-user)",
        options: "\
  --target BYTES        how large the balloon is to be at first, a multiple of 4096; 0 by default
  --deflate-on-oom      the guest may take pages back before it kills a process for memory
  --reporting           the guest reports pages that are free, and the host takes them back
  --stats-interval N    seconds from one question for the guest's statistics to the next
",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "target" => self.target = parser.value()?.parse_with(parse_target)?,
            "deflate-on-oom" => self.deflate_on_oom = true,
            "reporting" => self.reporting = true,
            "stats-interval" => self.stats_interval = Some(parser.value()?.parse()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(self, _: &Common) -> Result<Balloon, Box<dyn Error>> {
        let settings = Settings {
            target: self.target,
            deflate_on_oom: self.deflate_on_oom,
            reporting: self.reporting,
            interval: self
                .stats_interval
                .map(|seconds| Duration::from_secs(seconds.get().into())),
        };
        Ok(Balloon::new(&settings)?)
    }
}

fn parse_target(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(bytes) if bytes % PAGE == 0 && bytes / PAGE <= u64::from(u32::MAX) => Ok(bytes),
        _ => Err("not a multiple of 4096 below 16 TiB".to_owned()),
    }
}

fn main() -> ExitCode {
    anemone_device::run::<Options>()
}
