//! `anemone-vsock`: sockets between a guest and the host (virtio-vsock over vhost-user), on the host
//! as UNIX sockets.
//!
//! ```text
//!   guest                    device                          host
//!   connect(2, P)  ─ tx ─▶ REQUEST ─▶ Dial ─▶ supervisor ─▶ connects to PATH_P
//!                  ◀ rx ─  RESPONSE ◀ Dialed ◀┘
//!   listen(P)      ◀ rx ─  REQUEST ◀─ CONNECT P ◀────────── a program connects to PATH
//!                  ─ tx ─▶ RESPONSE ─▶ OK p ────────────▶
//! ```
//!
//! # A process that may be killed at any moment
//!
//! The supervisor keeps a copy of every socket and of one memory file, [`state`], and the next
//! process goes on with them: no byte is lost and none comes twice. Three facts make that possible:
//!
//! - Stores to the memory file survive the process, in program order. A later process finds what
//!   the earlier one had done up to some instruction.
//! - `sendmmsg` and `recvmmsg` write the number of bytes they have moved to their argument before
//!   they return, and a process is not killed inside a system call that does not wait. The argument
//!   lies in the memory file: with a value in `msg_len` that the kernel never writes, put there before
//!   the call, a later process knows exactly whether and how far the call came. No other system call
//!   moves a stream's bytes, and one is under way at a time.
//! - A chain is in flight from `pop` until its used element is visible; the next process gets it
//!   again. The ring's used index in a mark tells whether a chain is that of the mark or a later one
//!   with the same head.
//!
//! From the guest ([`PacketMark`](state::PacketMark), [`SendMark`](state::SendMark)): the mark has
//! the connection's `taken` before the packet. If `taken` has moved when the chain comes again, the
//! packet was handled. If not, `sent` tells how many of its bytes the socket has; the rest follows.
//! What the socket does not take goes to a buffer in the memory file, visible when `taken` moves.
//!
//! To the guest ([`ReceiveMark`](state::ReceiveMark)): bytes are read straight into guest buffers,
//! whose chains are in flight and named in the mark. Those that the used ring does not show yet get
//! their header and are returned by the next process, before anything else happens on the ring.
//! Packets without data fulfil wishes, flags that are cleared once the used ring shows the packet.
//!
//! A connection whose slot makes no sense, or whose socket is not there, is reset. If the state is
//! lost as a whole, the guest gets the TRANSPORT_RESET event.
//!
//! # Bounds
//!
//! A fixed number of connections, a fixed buffer for each that is the guest's credit, at most one
//! answer for each packet. A socket that is not read only fills its own buffer; a connection whose
//! guest program does not read only stops the reading of its own socket.

mod connections;
mod device;
mod dial;
mod packet;
mod parts;
mod state;
mod sys;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Common, Filter, Program};

use device::Vsock;

/// Addresses that a guest can have: 0 to 2 are reserved, the last means any (virtio 1.3, 5.10.4).
const CIDS: std::ops::RangeInclusive<u64> = 3..=0xffff_fffe;

#[derive(Default)]
struct Options {
    cid: Option<u64>,
    path: Option<PathBuf>,
    listener: Option<OwnedFd>,
}

impl Program for Options {
    type Device = Vsock;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-vsock",
        version: env!("CARGO_PKG_VERSION"),
        summary: "sockets between a guest and the host (virtio-vsock over vhost-user)",
        options: "\
  --cid N               the guest's address, 3 to 4294967294
  --listen PATH         listen there for programs that connect to the guest, and connect the guest
                        to PATH_PORT
  --listen-fd N         a listening socket; the supervisor, if there is one, connects the guest to the host
",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        match name {
            "cid" => self.cid = Some(parser.value()?.parse_with(cid)?),
            "listen" => self.path = Some(parser.value()?.into()),
            "listen-fd" => {
                self.listener = Some(parser.value()?.parse_with(anemone_device::parse_fd)?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn open(self, _: &Common) -> Result<Vsock, Box<dyn Error>> {
        let cid = self.cid.ok_or("--cid is needed")?;
        let (listener, broker) = match (self.path, self.listener) {
            (Some(path), None) => {
                let listener = anemone_device::listen(&path)
                    .map_err(|e| format!("{}: {e}", path.display()))?;
                (listener, Some(dial::start(&path)?))
            }
            (None, Some(listener)) => (UnixListener::from(listener), None),
            _ => return Err("one of --listen and --listen-fd is needed".into()),
        };
        Ok(Vsock::new(cid, listener, broker)?)
    }
}

fn cid(text: &str) -> Result<u64, &'static str> {
    text.parse()
        .ok()
        .filter(|cid| CIDS.contains(cid))
        .ok_or("not an address from 3 to 4294967294")
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    match dial::serve(&arguments) {
        Some(status) => status,
        None => anemone_device::run::<Options>(),
    }
}
