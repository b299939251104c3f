//! What a network card's process is given: a tap, or the way to passt.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anemone_config::{Card, Protocol, Uplink};
use anemone_ipc::Channel;
use anemone_ipc::device::FromDevice;

use crate::error::{Error, printable, system};
use crate::programs::Programs;
use crate::spawn::{Process, Program};
use crate::sys;
use crate::tap::{self, Tap};

/// Time that passt may take to start; its keeper gives up earlier.
const START_LIMIT: Duration = Duration::from_secs(15);
/// Time that its keeper may take to end it.
const END_LIMIT: Duration = Duration::from_secs(2);
/// Largest packet that `anemone-net` takes.
const MAX_MTU: u16 = 65517;

/// A network card's files and processes.
#[derive(Debug)]
pub struct OpenCard {
    card: Card,
    uplink: OpenUplink,
}

#[derive(Debug)]
enum OpenUplink {
    Tap(Tap),
    Passt(Keeper),
}

/// The program `anemone-passt`, which keeps passt running. passt needs network sockets, and this
/// process cannot start what has them once it is in its jail.
#[derive(Debug)]
struct Keeper {
    process: Process,
    /// It ends when this is closed.
    channel: Option<Channel>,
    /// The network device's end of the socket on which it asks for connections. Every process of
    /// the device gets it.
    socket: OwnedFd,
}

/// Where passt is: the configuration says it, or it lies beside the other programs or in `$PATH`.
pub fn find_passt(programs: &Programs, passt: Option<&Path>) -> Result<PathBuf, Error> {
    Ok(programs.find_or_in_path("passt", passt)?)
}

/// Finds what `run` would use, without starting it.
pub fn check(id: &str, card: &Card, programs: &Programs) -> Result<(), Error> {
    match &card.uplink {
        Uplink::Tap(name) => drop(tap::open(id, name, card.pairs)?),
        Uplink::User { passt, .. } => {
            find_passt(programs, passt.as_deref())?;
        }
    }
    Ok(())
}

/// Opens the tap, or starts passt and waits until it serves.
pub fn open(id: &str, card: &Card, programs: &Programs) -> Result<OpenCard, Error> {
    let uplink = match &card.uplink {
        Uplink::Tap(name) => OpenUplink::Tap(tap::open(id, name, card.pairs)?),
        Uplink::User { .. } => OpenUplink::Passt(Keeper::start(id, card, programs)?),
    };
    Ok(OpenCard {
        card: card.clone(),
        uplink,
    })
}

impl OpenCard {
    /// Adds the arguments of the card's process.
    pub fn pass<'a>(&'a self, program: &mut Program<'a>) {
        let mut mtu = self.card.mtu;
        match &self.uplink {
            OpenUplink::Tap(tap) => {
                for queue in &tap.queues {
                    program.fd_option("--tap-fd", queue.as_fd());
                }
                mtu = mtu.or(Some(tap.mtu.min(MAX_MTU)));
            }
            OpenUplink::Passt(keeper) => {
                program.fd_option("--keeper-fd", keeper.socket.as_fd());
            }
        }
        program.option("--mac", self.card.mac);
        if let Some(mtu) = mtu {
            program.option("--mtu", mtu);
        }
        if self.card.mac_filter {
            program.arg("--mac-filter");
        }
        for (option, bytes) in &self.card.rates {
            program.option(option, bytes);
        }
    }
}

impl Keeper {
    fn start(id: &str, card: &Card, programs: &Programs) -> Result<Self, Error> {
        let Uplink::User {
            forward,
            host_loopback,
            passt,
        } = &card.uplink
        else {
            return Err(Error::Failed(format!("network card `{id}` has no passt")));
        };
        let passt = find_passt(programs, passt.as_deref())?;
        let path = programs.find("anemone-passt", None)?;
        let (channel, far) = anemone_ipc::pair().map_err(system("socketpair"))?;
        channel
            .set_nonblocking(true)
            .map_err(system("socketpair"))?;
        let far = far.into_fd();
        let (socket, net) = anemone_ipc::pair().map_err(system("socketpair"))?;
        let net = net.into_fd();
        let mut program = Program::new(&path);
        program
            .fd_option("--control-fd", far.as_fd())
            .fd_option("--net-fd", net.as_fd())
            .option("--id", id)
            .arg("--passt")
            .arg(passt);
        for rule in forward {
            let option = match rule.protocol {
                Protocol::Tcp => "--tcp",
                Protocol::Udp => "--udp",
            };
            program.option(option, rule.to_passt());
        }
        if let Some(mtu) = card.mtu {
            program.option("--mtu", mtu);
        }
        if *host_loopback {
            program.arg("--host-loopback");
        }
        let mut keeper = Self {
            process: program.start()?,
            channel: Some(channel),
            socket: socket.into_fd(),
        };
        // Nothing else holds the far end then, and its end is seen.
        drop(far);
        keeper.wait(id)?;
        Ok(keeper)
    }

    /// Waits until passt serves: a port that is in use is found before anything else starts.
    fn wait(&mut self, id: &str) -> Result<(), Error> {
        let failed = |why: &str| Error::Refused(format!("network card `{id}`: {}", printable(why)));
        let Some(channel) = &self.channel else {
            return Ok(());
        };
        let mut ready = [sys::readable(channel.as_fd())];
        sys::poll(&mut ready, Some(START_LIMIT)).map_err(system("poll"))?;
        match channel
            .recv::<FromDevice>()
            .map(|received| received.message)
        {
            Ok(FromDevice::Ready { .. }) => Ok(()),
            Ok(FromDevice::Failed { message }) => Err(failed(&message)),
            Ok(_) => Err(failed("the keeper of passt broke the protocol")),
            Err(error) => Err(failed(&format!(
                "the keeper of passt does not start: {error}"
            ))),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.channel = None;
        // It removes the folder of the socket. If it does not, it is killed, and passt with it.
        self.process.wait(END_LIMIT);
    }
}
