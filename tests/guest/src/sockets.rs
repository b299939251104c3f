//! The host's side of the guest programs `anemone-guest-vsock` and `anemone-guest-load`, with the sockets of the convention:
//! `PATH` leads to the guest, and the guest to `PATH_PORT`.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::pattern::Pattern;

/// Port of the host to which the guest's program connects.
pub const HOST_PORT: u32 = 1024;
/// Port at which the guest's program listens.
pub const GUEST_PORT: u32 = 2048;
/// Longest wait for a byte, and for the guest to listen; an emulated CPU is slow.
const PATIENCE: Duration = Duration::from_secs(180);

/// Where the guest's program arrives.
pub fn host_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{HOST_PORT}"));
    name.into()
}

/// Sends back what the guest sends to the host's port, until it sends no more; how much that was.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(path: &Path) -> io::Result<JoinHandle<io::Result<u64>>> {
    let listener = UnixListener::bind(host_path(path))?;
    Ok(thread::spawn(move || {
        let (mut reader, _) = listener.accept()?;
        reader.set_read_timeout(Some(PATIENCE))?;
        let mut writer = reader.try_clone()?;
        let bytes = io::copy(&mut reader, &mut writer)?;
        writer.shutdown(Shutdown::Write)?;
        Ok(bytes)
    }))
}

/// Connects to the guest, when it listens, sends so many bytes and compares what comes back. With `plain`
/// the connection ends as a whole when all has come, otherwise one direction after the other.
///
/// # Errors
/// The guest does not listen in time, or something else comes back.
pub fn exchange(path: &Path, bytes: u64, plain: bool) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut reader = loop {
        match connect(path) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > end => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    };
    let mut writer = reader.try_clone()?;
    let sending = thread::spawn(move || -> io::Result<()> {
        let mut pattern = Pattern::new(5);
        let mut left = bytes;
        while left > 0 {
            let part = pattern.take(left.min(100_000) as usize);
            writer.write_all(&part)?;
            left -= part.len() as u64;
        }
        match plain {
            true => Ok(()),
            false => writer.shutdown(Shutdown::Write),
        }
    });
    let (mut pattern, mut buffer, mut came) = (Pattern::new(5), vec![0; 100_000], 0);
    while !plain || came < bytes {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        if !pattern.continues_with(&buffer[..n]) {
            return Err(io::Error::other(format!("wrong bytes after {came}")));
        }
        came += n as u64;
    }
    sending
        .join()
        .map_err(|_| io::Error::other("a thread died"))??;
    match came == bytes {
        true => Ok(()),
        false => Err(io::Error::other(format!("{came} of {bytes} bytes came"))),
    }
}

/// A connection that the guest has accepted.
///
/// # Errors
/// It has not, or has not said so.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "CONNECT {GUEST_PORT}")?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend(byte);
    }
    match line.starts_with(b"OK ") {
        true => Ok(stream),
        false => Err(io::Error::other("no OK")),
    }
}
