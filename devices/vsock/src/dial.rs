//! Connecting to the host's sockets.
//!
//! The device process cannot: no path leads out of its jail. It asks the supervisor with nothing but
//! the port's number. Without a supervisor a second process of this program, started before the
//! jail is entered, answers the same questions; it ends with the device process, which holds the
//! other end of its standard input.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anemone_ipc::device::{FromDevice, ToDevice};
use anemone_ipc::{Channel, FdIndex};

/// The option that makes this program answer the questions.
pub const OPTION: &str = "--dial-for";

/// Starts the process that connects to `path` and the port's number; the channel to it.
pub fn start(path: &Path) -> io::Result<Channel> {
    let (ours, theirs) = anemone_ipc::pair()?;
    let path: PathBuf = std::path::absolute(path)?;
    Command::new("/proc/self/exe")
        .arg(OPTION)
        .arg(path)
        .stdin(Stdio::from(theirs.into_fd()))
        .stdout(Stdio::null())
        .spawn()?;
    ours.set_nonblocking(true)?;
    Ok(ours)
}

/// If the command line asks for it, answers questions until nobody can ask any more.
pub fn serve(arguments: &[OsString]) -> Option<ExitCode> {
    match arguments {
        [option, path] if option == OsStr::new(OPTION) => {}
        _ => return None,
    }
    let outcome = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(|fd| answer(&Channel::new(fd), Path::new(&arguments[1])));
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

fn answer(channel: &Channel, path: &Path) {
    while let Ok(received) = channel.recv::<FromDevice>() {
        let FromDevice::Dial { id, port } = received.message else {
            continue;
        };
        let socket: Option<OwnedFd> = anemone_process::dial(path, port).ok();
        let message = ToDevice::Dialed {
            id,
            socket: socket.as_ref().map(|_| FdIndex(0)),
        };
        let fds: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
        if channel.send(&message, &fds).is_err() {
            break;
        }
    }
}
