//! The outer end of a console: opened here, served by a console process.

use std::io::{IsTerminal, stdin};
use std::os::fd::{AsFd, OwnedFd};

use anemone_config::Sink;

use crate::error::{Error, system};
use crate::files::{self, Listener};
use crate::spawn::{Program, Stdio};
use crate::sys;

/// Where a console's bytes go, opened.
#[derive(Debug)]
pub enum OpenSink {
    /// Standard input and output.
    Stdio {
        /// Input is a terminal: the escape key works.
        terminal: bool,
    },
    /// The controlling end of a pseudo-terminal.
    Pty(OwnedFd),
    /// A file opened for appending.
    File(OwnedFd),
    /// A listening socket.
    Unix(Listener),
}

/// Opens a sink; `owner` is the console in messages.
pub fn open(owner: &str, sink: &Sink) -> Result<OpenSink, Error> {
    Ok(match sink {
        Sink::Stdio => OpenSink::Stdio {
            terminal: stdin().is_terminal(),
        },
        Sink::Pty => {
            let (fd, number) = sys::open_pty().map_err(system("open a pseudo-terminal"))?;
            eprintln!("anemone: {owner} is at /dev/pts/{number}");
            OpenSink::Pty(fd)
        }
        Sink::File(path) => OpenSink::File(files::open_output(owner, path)?),
        Sink::Unix(path) => OpenSink::Unix(files::listen(owner, path)?),
    })
}

impl OpenSink {
    /// Gives the sink to a console process that is about to start.
    pub fn pass<'a>(&'a self, program: &mut Program<'a>) {
        match self {
            Self::Stdio { terminal } => {
                program.arg("--stdio").stdio(Stdio::Inherit);
                if *terminal {
                    program.arg("--escape");
                }
            }
            Self::Pty(fd) => {
                program.fd_option("--pty-fd", fd.as_fd());
            }
            Self::File(fd) => {
                program.fd_option("--file-fd", fd.as_fd());
            }
            Self::Unix(listener) => {
                program.fd_option("--unix-fd", listener.socket.as_fd());
            }
        }
    }

    /// Whether this is standard input and output.
    pub fn is_stdio(&self) -> bool {
        matches!(self, Self::Stdio { .. })
    }
}
