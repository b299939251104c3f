//! Sockets of a guest to its host (vsock(7)).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::streams::Socket;

const HOST_CID: u32 = 2;
const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// A connection.
#[derive(Debug)]
pub struct Vsock(File);

impl Vsock {
    /// Connects to a port of the host.
    ///
    /// # Errors
    /// Nobody listens there, for one.
    pub fn connect(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(HOST_CID, port);
        // SAFETY: the address is as long as said.
        check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), LENGTH) })?;
        Ok(Self(File::from(socket)))
    }
}

impl Read for Vsock {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Vsock {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Socket for Vsock {
    fn another(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    fn end_sending(&self) -> io::Result<()> {
        // SAFETY: integers only.
        check(unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_WR) })
    }
}

/// A socket that is connected to.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens at a port of the guest.
    ///
    /// # Errors
    /// Somebody else does.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(libc::VMADDR_CID_ANY, port);
        // SAFETY: as above.
        unsafe {
            check(libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                LENGTH,
            ))?;
            check(libc::listen(socket.as_raw_fd(), 8))?;
        }
        Ok(Self(socket))
    }

    /// The next connection.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn accept(&self) -> io::Result<Vsock> {
        let none = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let client = unsafe { libc::accept(self.0.as_raw_fd(), none, std::ptr::null_mut()) };
        Ok(Vsock(File::from(owned(client)?)))
    }
}

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
