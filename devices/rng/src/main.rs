//! `anemone-rng`: random numbers of the host for a guest, virtio-entropy over vhost-user.

mod device;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::num::NonZeroU64;
use std::process::ExitCode;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Bucket, Common, Filter, Program};

use device::Rng;

#[derive(Default)]
struct Options {
    rate: Option<NonZeroU64>,
}

impl Program for Options {
    type Device = Rng;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-rng",
        version: env!("CARGO_PKG_VERSION"),
        summary: "random numbers for a guest (virtio-entropy over vhost-user)",
        options: "  --rate BYTES          most bytes per second, 1 or more; as many as asked for by default\n",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "rate" => self.rate = Some(parser.value()?.parse()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(self, _: &Common) -> Result<Rng, Box<dyn Error>> {
        let bucket = self.rate.map(|rate| Bucket::new(rate, rate)).transpose()?;
        Ok(Rng::new(bucket))
    }
}

fn main() -> ExitCode {
    anemone_device::run::<Options>()
}
