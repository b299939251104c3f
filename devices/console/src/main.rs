//! `anemone-console`: a guest's console in a process of its own. Serves virtio-console over
//! vhost-user, or the byte stream of the monitor's UART, towards a terminal of the host.
//!
//! ```text
//!   guest                      device                        endpoint
//!   transmitq ─┐           ┌─ output, 4 KiB ─▶ standard streams, pseudo-terminal,
//!   receiveq  ◀┴─ guest ◀──┴─ input,  4 KiB ◀─ file, UNIX socket
//!   or a stream                    ▲ escape
//! ```
//!
//! Both buffers are in memory that the supervisor keeps ([`state`]), and so is the client of a UNIX
//! socket: a process that replaces this one goes on with the next byte.

mod device;
mod endpoint;
mod escape;
mod guest;
mod state;
mod sys;

anemone_sandbox::include_policies!();

use std::error::Error;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use anemone_device::lexopt::{self, Parser, ValueExt};
use anemone_device::{About, Common, Filter, Program};

use device::Console;
use endpoint::Endpoint;

/// Where the bytes go on the host.
enum Target {
    Stdio,
    Pty,
    PtyFd(OwnedFd),
    File(PathBuf),
    FileFd(OwnedFd),
    Unix(PathBuf),
    UnixFd(OwnedFd),
}

#[derive(Default)]
struct Options {
    target: Option<Target>,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    escape: bool,
    stream: Option<OwnedFd>,
}

impl Program for Options {
    type Device = Console;

    const FILTER: &'static Filter = &policies::MAIN;

    const ABOUT: About = About {
        name: "anemone-console",
        version: env!("CARGO_PKG_VERSION"),
        summary: "a guest's console (virtio-console over vhost-user, or a byte stream)",
        options: "\
  --stdio               standard input and output; a terminal is put into raw mode
  --input-fd N          with --output-fd: the same on inherited descriptors, whose terminal
  --output-fd N         mode is the parent's business
  --pty                 a new pseudo-terminal, its name is printed
  --pty-fd N            the master of a pseudo-terminal
  --file PATH           append the output to a file; no input
  --file-fd N           the same on an inherited descriptor
  --unix PATH           listen there for one client at a time
  --unix-fd N           a listening socket
  --escape              Ctrl-A is the escape key: then x ends the VM, p presses the power
                        button, h shows this, Ctrl-A sends Ctrl-A
  --stream-fd N         serve this stream socket instead of vhost-user
",
    };

    fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        let target = match name {
            "stdio" => Target::Stdio,
            "pty" => Target::Pty,
            "pty-fd" => Target::PtyFd(fd(parser)?),
            "file" => Target::File(parser.value()?.into()),
            "file-fd" => Target::FileFd(fd(parser)?),
            "unix" => Target::Unix(parser.value()?.into()),
            "unix-fd" => Target::UnixFd(fd(parser)?),
            "input-fd" => {
                self.input = Some(fd(parser)?);
                return Ok(true);
            }
            "output-fd" => {
                self.output = Some(fd(parser)?);
                return Ok(true);
            }
            "escape" => {
                self.escape = true;
                return Ok(true);
            }
            "stream-fd" => {
                self.stream = Some(fd(parser)?);
                return Ok(true);
            }
            _ => return Ok(false),
        };
        if self.target.replace(target).is_some() {
            return Err("more than one place for the console is named".into());
        }
        Ok(true)
    }

    fn serves_vhost_user(&self) -> bool {
        self.stream.is_none()
    }

    fn open(self, _: &Common) -> Result<Console, Box<dyn Error>> {
        let endpoint = match (self.target, self.input, self.output) {
            (Some(target), None, None) => open(target)?,
            (None, Some(input), Some(output)) => Endpoint::pair(Some(input), output)?,
            _ => {
                return Err(
                    "one of --stdio, --input-fd with --output-fd, --pty, --pty-fd, --file, \
                     --file-fd, --unix and --unix-fd is needed"
                        .into(),
                );
            }
        };
        Ok(Console::new(endpoint, self.escape, self.stream)?)
    }
}

fn fd(parser: &mut Parser) -> Result<OwnedFd, lexopt::Error> {
    parser.value()?.parse_with(anemone_device::parse_fd)
}

fn open(target: Target) -> Result<Endpoint, Box<dyn Error>> {
    let named = |path: &PathBuf, error: std::io::Error| format!("{}: {error}", path.display());
    Ok(match target {
        Target::Stdio => {
            let input = std::io::stdin().as_fd().try_clone_to_owned()?;
            let output = std::io::stdout().as_fd().try_clone_to_owned()?;
            Endpoint::stdio(input, output)?
        }
        Target::Pty => {
            let (master, name) = sys::open_pty()?;
            let mut stdout = std::io::stdout();
            writeln!(stdout, "{name}").and_then(|()| stdout.flush())?;
            Endpoint::pty(master)?
        }
        Target::PtyFd(master) => Endpoint::pty(master)?,
        Target::File(path) => {
            let file = OpenOptions::new().create(true).append(true).open(&path);
            Endpoint::pair(None, file.map_err(|e| named(&path, e))?.into())?
        }
        Target::FileFd(file) => Endpoint::pair(None, file)?,
        Target::Unix(path) => {
            let listener = anemone_device::listen(&path);
            Endpoint::unix(listener.map_err(|e| named(&path, e))?)?
        }
        Target::UnixFd(fd) => Endpoint::unix(UnixListener::from(fd))?,
    })
}

fn main() -> ExitCode {
    anemone_device::run::<Options>()
}
