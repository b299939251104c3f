//! `anemone-net`: a network card in a process of its own. Serves virtio-net over vhost-user from a
//! tap, from passt, or from a socket that carries frames.
//!
//! ```text
//!   main thread        vhost-user, control queue, passt       device: control, uplink ─▶ keeper
//!   pair0, pair1, …    receive queue ◀─ port ─▶ transmit      worker: pair: rx, tx, port
//! ```

mod buffers;
mod control;
mod device;
mod filter;
mod net;
mod pair;
mod port;
mod rx;
mod stream;
mod tap;
mod tx;
mod uplink;
mod worker;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Bucket, Common, Filter, Program, parse_fd};

use device::{Net, Settings, set_nonblocking};
use filter::Mac;
use pair::Pair;
use port::{Port, Stream};
use rx::Rx;
use tx::Tx;
use uplink::Uplink;
use worker::Worker;

/// What Ethernet has where nothing else is said.
const DEFAULT_MTU: u16 = 1500;
/// Smallest that IPv4 allows (RFC 791).
const MIN_MTU: u16 = 68;
/// Largest packet that, with an Ethernet header and a VLAN tag, passt takes.
const MAX_MTU: u16 = 65517;
/// As many as a VM has CPUs.
const MAX_PAIRS: usize = 64;

#[derive(Default)]
struct Options {
    taps: Vec<OwnedFd>,
    sockets: Vec<OwnedFd>,
    stream: Option<OwnedFd>,
    stream_path: Option<PathBuf>,
    keeper: Option<OwnedFd>,
    mac: Option<Mac>,
    mtu: Option<u16>,
    mac_filter: bool,
    rx: Rate,
    tx: Rate,
}

#[derive(Default, Clone, Copy)]
struct Rate {
    rate: Option<NonZeroU64>,
    burst: Option<NonZeroU64>,
}

impl Rate {
    fn bucket(self, name: &str) -> Result<Option<Bucket>, Box<dyn Error>> {
        match (self.rate, self.burst) {
            (None, Some(_)) => Err(format!("--{name}-burst needs --{name}-rate").into()),
            (None, None) => Ok(None),
            (Some(rate), burst) => Ok(Some(Bucket::new(rate, burst.unwrap_or(rate))?)),
        }
    }
}

impl Program for Options {
    type Device = Net;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-net",
        version: env!("CARGO_PKG_VERSION"),
        summary: "a network card for a guest (virtio-net over vhost-user)",
        options: "\
  --tap-fd N            a tap opened by the parent process; once for each queue pair
  --stream PATH         UNIX socket of passt: frames, each after its length in 4 bytes
  --stream-fd N         the same, connected by the parent process
  --keeper-fd N         socket of anemone-passt, which hands out connections to passt
  --socket-fd N         datagram or sequenced-packet socket, a frame each; once for each queue pair
  --mac ADDRESS         address of the guest; it chooses one itself by default
  --mtu BYTES           largest IP packet, 68 to 65517
  --mac-filter          only frames from and to the guest's address pass
  --rx-rate BYTES       most bytes per second to the guest
  --rx-burst BYTES      most bytes at once; by default as many as in a second
  --tx-rate BYTES       most bytes per second from the guest
  --tx-burst BYTES      most bytes at once; by default as many as in a second
",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "tap-fd" => self.taps.push(parser.value()?.parse_with(parse_fd)?),
            "socket-fd" => self.sockets.push(parser.value()?.parse_with(parse_fd)?),
            "stream" => self.stream_path = Some(parser.value()?.into()),
            "stream-fd" => self.stream = Some(parser.value()?.parse_with(parse_fd)?),
            "keeper-fd" => self.keeper = Some(parser.value()?.parse_with(parse_fd)?),
            "mac" => self.mac = Some(parser.value()?.parse()?),
            "mtu" => self.mtu = Some(parser.value()?.parse_with(parse_mtu)?),
            "mac-filter" => self.mac_filter = true,
            "rx-rate" => self.rx.rate = Some(parser.value()?.parse()?),
            "rx-burst" => self.rx.burst = Some(parser.value()?.parse()?),
            "tx-rate" => self.tx.rate = Some(parser.value()?.parse()?),
            "tx-burst" => self.tx.burst = Some(parser.value()?.parse()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(mut self, common: &Common) -> Result<Net, Box<dyn Error>> {
        if self.mac_filter && self.mac.is_none() {
            return Err("--mac-filter needs --mac".into());
        }
        let given = [
            !self.taps.is_empty(),
            !self.sockets.is_empty(),
            self.stream.is_some(),
            self.stream_path.is_some(),
            self.keeper.is_some(),
        ];
        if given.into_iter().filter(|given| *given).count() != 1 {
            return Err(
                "one of --tap-fd, --stream, --stream-fd, --keeper-fd and --socket-fd \
                        is needed"
                    .into(),
            );
        }
        let mut offloads = !0;
        let many = self.taps.len() > 1;
        for tap in &self.taps {
            offloads &= tap::prepare(tap.as_fd(), many)?;
        }
        if self.taps.is_empty() {
            offloads = 0;
        }
        let second: Vec<_> = self
            .taps
            .iter()
            .map(OwnedFd::try_clone)
            .collect::<io::Result<_>>()?;
        let uplink = self.keeper.take().map(Uplink::new).transpose()?;
        let settings = Settings {
            mac: self.mac,
            mtu: self.mtu,
            mac_filter: self.mac_filter,
            offloads,
        };
        let filter = self
            .mac
            .filter(|_| self.mac_filter)
            .map(filter::Filter::new);
        let mtu = self.mtu.unwrap_or(DEFAULT_MTU);
        let (rx_rate, tx_rate) = (self.rx, self.tx);
        let mut workers = Vec::new();
        for port in self.ports()? {
            let rx = Rx::new(mtu, rx_rate.bucket("rx")?, filter.clone());
            let tx = Tx::new(tx_rate.bucket("tx")?, filter.clone());
            workers.push(Worker::new(
                workers.len(),
                Pair::new(port, rx, tx),
                common.sandbox,
            )?);
        }
        if workers.len() > MAX_PAIRS {
            return Err(format!("more than {MAX_PAIRS} queue pairs").into());
        }
        Ok(Net::new(settings, workers, second, uplink))
    }
}

impl Options {
    fn ports(self) -> Result<Vec<Port>, Box<dyn Error>> {
        let taps = self.taps.into_iter().map(|fd| (fd, true));
        let sockets = self.sockets.into_iter().map(|fd| (fd, false));
        let mut ports = Vec::new();
        for (fd, header) in taps.chain(sockets) {
            set_nonblocking(&fd)?;
            ports.push(Port::Packets {
                fd,
                header,
                active: true,
            });
        }
        if ports.is_empty() {
            let connect = |path: PathBuf| {
                let socket = UnixStream::connect(&path);
                socket
                    .map(OwnedFd::from)
                    .map_err(|e| format!("{}: {e}", path.display()))
            };
            let path = self.stream_path.map(connect).transpose()?;
            let socket = path.or(self.stream);
            socket.as_ref().map(set_nonblocking).transpose()?;
            ports.push(Port::Stream(Stream::new(socket)));
        }
        Ok(ports)
    }
}

fn parse_mtu(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(mtu @ MIN_MTU..=MAX_MTU) => Ok(mtu),
        _ => Err(format!("not a number from {MIN_MTU} to {MAX_MTU}")),
    }
}

fn main() -> ExitCode {
    anemone_device::run::<Options>()
}
