//! Moves the UART's bytes between its registers and the console process.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anemone_accel_api::EventFd;
use anemone_virt::{Board, Serial};

use crate::error::Error;

/// The UART's connection.
pub struct Pump {
    serial: Arc<Serial>,
    socket: UnixStream,
    wake: Arc<EventFd>,
    /// Output waits until the socket takes more.
    blocked: bool,
    /// The console process is gone; output goes nowhere.
    closed: bool,
}

impl Pump {
    /// Adds the UART to the board and connects it.
    pub fn new(board: &mut Board, socket: UnixStream) -> Result<Self, Error> {
        socket
            .set_nonblocking(true)
            .map_err(Error::os("serial socket"))?;
        let wake = Arc::new(EventFd::new().map_err(Error::os("eventfd"))?);
        let serial = {
            let wake = wake.clone();
            board.add_serial(Box::new(move || wake.signal()))
        };
        Ok(Self {
            serial,
            socket,
            wake,
            blocked: false,
            closed: false,
        })
    }

    /// What to poll: the socket and the UART's own event.
    pub fn poll_entries(&self) -> [libc::pollfd; 2] {
        let mut events = 0;
        if self.serial.room() > 0 {
            events |= libc::POLLIN;
        }
        if self.blocked {
            events |= libc::POLLOUT;
        }
        // With no events asked for, a hang-up would still be reported, again and again.
        let watch = !self.closed && events != 0;
        let socket = if watch { self.socket.as_raw_fd() } else { -1 };
        let wake = self.wake.as_fd().as_raw_fd();
        [
            libc::pollfd {
                fd: socket,
                events,
                revents: 0,
            },
            libc::pollfd {
                fd: wake,
                events: libc::POLLIN,
                revents: 0,
            },
        ]
    }

    /// Moves what can be moved now.
    pub fn run(&mut self) {
        self.wake.take();
        let mut buffer = [0; 64];
        let room = self.serial.room().min(buffer.len());
        if room > 0 && !self.closed {
            match (&self.socket).read(&mut buffer[..room]) {
                Ok(0) => self.closed = true,
                Ok(n) => self.serial.receive(&buffer[..n]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => self.closed = true,
            }
        }
        self.blocked = false;
        let (mut socket, mut blocked, mut closed) = (&self.socket, false, self.closed);
        while !self.serial.transmit(|output| {
            if closed {
                return output.len();
            }
            match socket.write(output) {
                Ok(n) => n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    blocked = true;
                    0
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => 0,
                Err(_) => {
                    closed = true;
                    output.len()
                }
            }
        }) && !blocked
        {}
        (self.blocked, self.closed) = (blocked, closed);
    }
}
