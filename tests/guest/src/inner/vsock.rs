//! Sockets to the host, from inside a guest: the program of the step `vsock` of
//! `tests/guest/inner/init.sh`. What it finds wrong it says in a line `guest: FAIL`.
//!
//! `BYTES` go to the host's port 1024 and come back, while as many come from the host to the guest's
//! port 2048 and go back. Nobody listens at the host's port 1.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::thread;

use anemone_guest_init::pattern::Pattern;
use anemone_guest_init::sockets::{GUEST_PORT, HOST_PORT};

const HOST_CID: u32 = 2;
const NOBODY: u32 = 1;
const SEED: u64 = 17;

fn main() -> ExitCode {
    let bytes = std::env::args().nth(1).and_then(|text| text.parse().ok());
    match run(bytes.unwrap_or(1 << 20)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("guest: FAIL vsock: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(bytes: u64) -> io::Result<()> {
    match connect(NOBODY) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {}
        other => return Err(said(format!("a port without a listener: {other:?}"))),
    }
    let listener = listen()?;
    println!("guest: vsock listens");
    let server = thread::spawn(move || serve(&listener));
    let socket = connect(HOST_PORT)?;
    let mut writer = File::from(socket.try_clone()?);
    let mut reader = File::from(socket);
    let sending = thread::spawn(move || -> io::Result<()> {
        let mut pattern = Pattern::new(SEED);
        let mut left = bytes;
        while left > 0 {
            let part = pattern.take(left.min(60_000) as usize);
            writer.write_all(&part)?;
            left -= part.len() as u64;
        }
        shut_down(&writer)
    });
    let (mut pattern, mut buffer, mut came) = (Pattern::new(SEED), vec![0; 40_000], 0);
    loop {
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
    let served = server.join().map_err(|_| said("a thread died".into()))??;
    println!("guest: vsock {served} bytes from the host and back");
    Ok(())
}

fn said(text: String) -> io::Error {
    io::Error::other(text)
}

/// Sends back what the first client sends, until it sends no more.
fn serve(listener: &OwnedFd) -> io::Result<u64> {
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    let client = unsafe { libc::accept(listener.as_raw_fd(), none, std::ptr::null_mut()) };
    let mut reader = File::from(owned(client)?);
    let mut writer = reader.try_clone()?;
    let bytes = io::copy(&mut reader, &mut writer)?;
    shut_down(&writer)?;
    Ok(bytes)
}

fn connect(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(HOST_CID, port);
    // SAFETY: the address is as long as said.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) })?;
    Ok(socket)
}

fn listen() -> io::Result<OwnedFd> {
    let socket = socket()?;
    let address = address(libc::VMADDR_CID_ANY, GUEST_PORT);
    // SAFETY: as above.
    unsafe {
        check(libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            LENGTH,
        ))?;
        check(libc::listen(socket.as_raw_fd(), 8))?;
    }
    Ok(socket)
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: an all-zero sockaddr_vm is valid.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    address
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    owned(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })
}

fn shut_down(socket: &File) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_WR) })
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    check(fd)?;
    // SAFETY: the callers pass the result of a call that has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(rc: libc::c_int) -> io::Result<()> {
    match rc {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
