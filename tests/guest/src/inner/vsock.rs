//! Sockets to the host, from inside a guest: the program of the step `vsock` of
//! `tests/guest/inner/init.sh`. What it finds wrong it says in a line `guest: FAIL`.
//!
//! `BYTES` go to the host's port 1024 and come back, while as many come from the host to the guest's
//! port 2048 and go back. Nobody listens at the host's port 1.
//!
//! With `plain` as the second argument nothing is asked for but connections and bytes: a device need
//! not refuse a connection, nor let one direction of it end before the other.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::thread;

use anemone_guest_init::af_vsock::{Listener, Vsock};
use anemone_guest_init::pattern::Pattern;
use anemone_guest_init::sockets::{GUEST_PORT, HOST_PORT};
use anemone_guest_init::streams::Socket;

const NOBODY: u32 = 1;
const SEED: u64 = 17;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let bytes = arguments.first().and_then(|text| text.parse().ok());
    let plain = arguments.get(1).is_some_and(|text| text == "plain");
    match run(bytes.unwrap_or(1 << 20), plain) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("guest: FAIL vsock: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(bytes: u64, plain: bool) -> io::Result<()> {
    if !plain {
        match Vsock::connect(NOBODY) {
            Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {}
            other => return Err(said(format!("a port without a listener: {other:?}"))),
        }
    }
    let listener = Listener::bind(GUEST_PORT)?;
    println!("guest: vsock listens");
    let server = thread::spawn(move || serve(&listener, plain));
    let mut reader = Vsock::connect(HOST_PORT)?;
    let mut writer = reader.another()?;
    let sending = thread::spawn(move || -> io::Result<()> {
        let mut pattern = Pattern::new(SEED);
        let mut left = bytes;
        while left > 0 {
            let part = pattern.take(left.min(60_000) as usize);
            writer.write_all(&part)?;
            left -= part.len() as u64;
        }
        end_sending(&writer, plain)
    });
    let (mut pattern, mut buffer, mut came) = (Pattern::new(SEED), vec![0; 40_000], 0);
    while !plain || came < bytes {
        let n = reader.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        if !pattern.continues_with(&buffer[..n]) {
            return Err(said(format!("wrong bytes after {came}")));
        }
        came += n as u64;
    }
    sending.join().map_err(|_| said("a thread died".into()))??;
    if came != bytes {
        return Err(said(format!("{came} of {bytes} bytes came back")));
    }
    println!("guest: vsock {bytes} bytes to the host and back");
    drop(reader);
    let served = server.join().map_err(|_| said("a thread died".into()))??;
    println!("guest: vsock {served} bytes from the host and back");
    Ok(())
}

fn said(text: String) -> io::Error {
    io::Error::other(text)
}

/// Sends back what the first client sends, until it sends no more.
fn serve(listener: &Listener, plain: bool) -> io::Result<u64> {
    let mut reader = listener.accept()?;
    let mut writer = reader.another()?;
    let bytes = io::copy(&mut reader, &mut writer)?;
    end_sending(&writer, plain)?;
    Ok(bytes)
}

/// Lets the other side see the end of what was sent, and goes on reading.
fn end_sending(writer: &Vsock, plain: bool) -> io::Result<()> {
    match plain {
        true => Ok(()),
        false => writer.end_sending(),
    }
}
