//! The VM's side of the control socket. Nothing here waits: a client that sends or reads slowly
//! delays nobody but itself.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anemone_log::warn_limited;

use super::folder;
use super::protocol::{MAX_REQUEST, Request, Response};
use crate::sys;

/// Clients at a time. A further one takes the place of the one that has been silent for longest.
const MAX_CLIENTS: usize = 16;
/// Longest that an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a client waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    /// What the VMM says about the use of devices.
    Use,
    /// Another process in the place of this device's.
    Restart(usize),
    /// What the guest says about the balloon that is this device.
    Balloon(usize),
}

/// A client, by a number that no other one ever has.
pub type ClientId = u64;

#[derive(Debug)]
struct Client {
    id: ClientId,
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    waits: Option<(Waits, Instant)>,
    heard: Instant,
}

/// The socket and those who have connected to it. Dropping it removes the socket.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    clients: Vec<Client>,
    next: ClientId,
}

impl Server {
    /// Listens for a VM of this name, if it has one.
    pub fn new(name: Option<&str>) -> io::Result<Self> {
        let folder = folder::path();
        folder::make(&folder)?;
        folder::list(&folder)?;
        let path = folder.join(folder::socket_name(name, std::process::id()));
        // A process of the past may have had the same number.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path,
            clients: Vec::new(),
            next: 0,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What to watch for reading: the listener, then each client that has something to say or has
    /// not taken its answer.
    pub fn watched(&self) -> impl Iterator<Item = (BorrowedFd<'_>, libc::c_short)> {
        let clients = self.clients.iter().map(|client| {
            let events = if client.output.is_empty() {
                libc::POLLIN
            } else {
                libc::POLLOUT
            };
            (client.stream.as_fd(), events)
        });
        std::iter::once((self.listener.as_fd(), libc::POLLIN)).chain(clients)
    }

    /// When there is something to do that no descriptor tells: a client has waited long enough, or
    /// has sent its next request before it had its answer.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        let clients = self.clients.iter();
        clients
            .filter_map(|client| match client.waits {
                Some((_, until)) => Some(until),
                None => (client.output.is_empty() && client.input.contains(&b'\n')).then_some(now),
            })
            .min()
    }

    /// Takes what has come and sends what can be sent; returns the requests.
    pub fn turn(&mut self, now: Instant) -> Vec<(ClientId, Request)> {
        while let Ok((stream, _)) = self.listener.accept() {
            self.admit(stream, now);
        }
        let mut requests = Vec::new();
        self.clients.retain_mut(|client| match client.turn(now) {
            Ok(request) => {
                requests.extend(request.map(|request| (client.id, request)));
                true
            }
            // It has gone, or says what is no request.
            Err(_) => false,
        });
        requests
    }

    fn admit(&mut self, stream: UnixStream, now: Instant) {
        match sys::peer_user(stream.as_fd()) {
            Ok(user) if user == 0 || user == sys::effective_user() => {}
            Ok(user) => {
                warn_limited!("control socket: user {user} is not allowed to connect");
                return;
            }
            Err(error) => {
                warn_limited!("control socket: {error}");
                return;
            }
        }
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS {
            let oldest = (0..self.clients.len()).min_by_key(|index| self.clients[*index].heard);
            self.clients.remove(oldest.unwrap_or(0));
        }
        self.next += 1;
        self.clients.push(Client {
            id: self.next,
            stream,
            input: Vec::new(),
            output: Vec::new(),
            waits: None,
            heard: now,
        });
    }

    /// Remembers what a client waits for.
    pub fn wait(&mut self, id: ClientId, waits: Waits, limit: Option<Duration>) {
        let until = Instant::now() + limit.unwrap_or(PATIENCE);
        if let Some(client) = self.clients.iter_mut().find(|client| client.id == id) {
            client.waits = Some((waits, until));
        }
    }

    /// The clients that wait for this.
    pub fn waiting(&self, wanted: Waits) -> Vec<ClientId> {
        let waits = |client: &&Client| client.waits.is_some_and(|(waits, _)| waits == wanted);
        self.clients.iter().filter(waits).map(|c| c.id).collect()
    }

    /// The clients whose time is over, and what they wait for.
    pub fn late(&self, now: Instant) -> Vec<(ClientId, Waits)> {
        self.clients
            .iter()
            .filter_map(|client| Some((client.id, client.waits?)))
            .filter(|(_, (_, until))| *until <= now)
            .map(|(id, (waits, _))| (id, waits))
            .collect()
    }

    /// Answers a client, unless it has gone.
    pub fn answer(&mut self, id: ClientId, response: &Response) {
        let Some(client) = self.clients.iter_mut().find(|client| client.id == id) else {
            return;
        };
        client.waits = None;
        match serde_json::to_vec(response) {
            Ok(text) => {
                client.output = text;
                client.output.push(b'\n');
            }
            Err(error) => warn_limited!("control socket: {error}"),
        }
    }
}

impl Server {
    /// Sends answers as far as they are taken.
    pub fn flush(&mut self) {
        self.clients.retain_mut(|client| client.send().is_ok());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody else cares whether it is still there.
        let _ = fs::remove_file(&self.path);
    }
}

impl Client {
    /// Sends what can be sent; an error ends the connection.
    fn send(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends and takes what can be; an error ends the connection.
    fn turn(&mut self, now: Instant) -> io::Result<Option<Request>> {
        self.send()?;
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.heard = now;
                    self.input.extend_from_slice(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if self.input.len() > MAX_REQUEST {
                return Err(io::Error::other("the request is too long"));
            }
        }
        // One at a time: the next request waits until this one is answered, and the answer taken.
        if self.waits.is_some() || !self.output.is_empty() {
            return Ok(None);
        }
        let Some(end) = self.input.iter().position(|byte| *byte == b'\n') else {
            return Ok(None);
        };
        let line: Vec<u8> = self.input.drain(..=end).collect();
        match serde_json::from_slice(&line) {
            Ok(request) => Ok(Some(request)),
            Err(error) => {
                let message = format!("not a request: {error}");
                self.output = serde_json::to_vec(&Response::Failed { message })?;
                self.output.push(b'\n');
                Ok(None)
            }
        }
    }
}
