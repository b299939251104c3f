//! The connections: what packets and sockets do to them.

mod deliver;
mod packets;
mod successor;

pub use deliver::{Buffers, Delivery};
pub use packets::Incoming;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anemone_device::Host;
use anemone_ipc::Channel;
use anemone_ipc::device::{FromDevice, ToDevice};
use anemone_log::warn_limited;
use libc::iovec;

use crate::packet::{HOST_CID, Header, SHUTDOWN_RCV, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::parts;
use crate::state::{RESETS, SLOTS, Slot, State, flag, phase, receiving};
use crate::sys::{self, Poller, Ready};

/// Key under which the supervisor keeps the state; the sockets' keys are their slots behind it.
const STATE_KEY: u64 = 0;
/// Clients that have not said what they want. A new one takes the place of the oldest.
const MAX_HELLOS: usize = 64;
/// Requests to the supervisor that wait for an answer.
const MAX_DIALING: usize = 64;
/// Longest `CONNECT <port>\n`.
const MAX_LINE: usize = 32;

/// A connection's part that does not outlive the process.
#[derive(Debug, Default)]
struct Socket {
    fd: Option<OwnedFd>,
    readable: bool,
    writable: bool,
    no_more: bool,
    /// It is in the list of those with packets without data.
    in_control: bool,
    /// It is in the list of those with data.
    in_data: bool,
    /// Bytes have been in its buffer.
    buffered: bool,
    /// It counts as one that the supervisor is to answer.
    asked: bool,
}

/// A packet without data for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Outgoing {
    /// The packet.
    header: Header,
    /// The connection and the wishes that are fulfilled with it; `None` for a refusal.
    wish: Option<(u16, u32)>,
}

/// All connections.
pub struct Connections {
    cid: u64,
    state: State,
    /// The supervisor has the state.
    kept: bool,
    /// The state of an earlier process, not looked at yet, and its sockets.
    restored: Option<State>,
    restored_sockets: HashMap<u64, OwnedFd>,
    host: Option<Host>,
    broker: Option<Channel>,
    poller: Poller,
    sockets: Vec<Option<Socket>>,
    ports: HashMap<(u32, u32), u16>,
    /// Free slots among those that have been used.
    free: BTreeSet<u16>,
    control: VecDeque<u16>,
    data: VecDeque<u16>,
    hellos: VecDeque<u16>,
    dials: VecDeque<u16>,
    dialing: usize,
}

fn socket_key(slot: u16) -> u64 {
    STATE_KEY + 1 + u64::from(slot)
}

impl Connections {
    /// None yet. With a `broker`, that is asked to connect in place of the supervisor.
    pub fn new(cid: u64, broker: Option<Channel>) -> io::Result<Self> {
        Ok(Self {
            cid,
            state: State::new()?,
            kept: false,
            restored: None,
            restored_sockets: HashMap::new(),
            host: None,
            broker,
            poller: Poller::new()?,
            sockets: Vec::new(),
            ports: HashMap::new(),
            free: BTreeSet::new(),
            control: VecDeque::new(),
            data: VecDeque::new(),
            hellos: VecDeque::new(),
            dials: VecDeque::new(),
            dialing: 0,
        })
    }

    /// The way to the supervisor.
    pub fn attach(&mut self, host: &Host) {
        self.host = Some(host.clone());
    }

    /// What an earlier process has had kept.
    pub fn restore(&mut self, key: u64, fd: OwnedFd) {
        if key != STATE_KEY {
            self.restored_sockets.insert(key, fd);
            return;
        }
        match State::open(fd) {
            Ok(state) => self.restored = Some(state),
            Err(error) => log::warn!("the connections of the earlier process are lost: {error}"),
        }
    }

    /// Becomes readable when a socket has something to do.
    pub fn poller(&self) -> BorrowedFd<'_> {
        self.poller.watch()
    }

    /// The channel to the process that connects, without a supervisor.
    pub fn broker(&self) -> Option<BorrowedFd<'_>> {
        self.broker.as_ref().map(AsFd::as_fd)
    }

    /// Whether so many refusals wait for the guest that it has to take some first.
    pub fn is_congested(&self) -> bool {
        self.state.resets() >= RESETS - SLOTS
    }

    fn slot(&self, number: u16) -> &Slot {
        self.state.slot(number)
    }

    fn socket(&mut self, number: u16) -> Option<&mut Socket> {
        self.sockets.get_mut(usize::from(number))?.as_mut()
    }

    fn fd(&self, number: u16) -> Option<BorrowedFd<'_>> {
        let socket = self.sockets.get(usize::from(number))?.as_ref()?;
        socket.fd.as_ref().map(AsFd::as_fd)
    }

    /// Numbers of the slots in use.
    fn in_use(&self) -> Vec<u16> {
        let numbers = (0..).zip(&self.sockets);
        numbers
            .filter_map(|(number, socket)| socket.is_some().then_some(number))
            .collect()
    }

    // Slots.

    fn allocate(&mut self) -> Option<u16> {
        let number = match self.free.pop_first() {
            Some(number) => number,
            None if self.sockets.len() < SLOTS => {
                self.sockets.push(None);
                self.sockets.len() as u16 - 1
            }
            None => {
                self.reclaim()?;
                self.free.pop_first()?
            }
        };
        self.sockets[usize::from(number)] = Some(Socket::default());
        let slot = self.slot(number);
        slot.generation.set(slot.generation.get().wrapping_add(1));
        for word in [
            &slot.guest_port,
            &slot.host_port,
            &slot.flags,
            &slot.line,
            &slot.preface,
            &slot.to_guest,
            &slot.guest_buffer,
            &slot.guest_taken,
            &slot.told,
        ] {
            word.set(0);
        }
        slot.taken.set(0);
        slot.sent.set(0);
        Some(number)
    }

    /// Ends a connection that one side has left already, for a new one.
    fn reclaim(&mut self) -> Option<()> {
        let ended = flag::HOST_RCV | flag::HOST_SEND;
        let number = self.in_use().into_iter().find(|&number| {
            let slot = self.slot(number);
            slot.phase.get() == phase::LINGER || slot.flags.get() & ended == ended
        })?;
        self.close(number, true);
        Some(())
    }

    /// Names a connection among all that ever had its slot.
    fn token(&self, number: u16) -> u64 {
        u64::from(number) | u64::from(self.slot(number).generation.get()) << 32
    }

    fn watch(&mut self, number: u16, fd: OwnedFd) {
        let token = self.token(number);
        if let Err(error) = self.poller.add(fd.as_fd(), token) {
            // Without events the connection stands still until it is closed.
            warn_limited!("a socket cannot be watched: {error}");
        }
        if let Some(socket) = self.socket(number) {
            socket.fd = Some(fd);
            socket.writable = true;
        }
    }

    fn keep(&self, number: u16, fd: &OwnedFd) {
        if let Some(host) = &self.host
            && let Err(error) = host.keep(socket_key(number), fd.as_fd())
        {
            warn_limited!("a connection will not survive this process: {error}");
        }
    }

    /// Ends a connection; with `reset` the guest is told.
    fn close(&mut self, number: u16, reset: bool) {
        let Some(socket) = self
            .sockets
            .get_mut(usize::from(number))
            .and_then(Option::take)
        else {
            return;
        };
        let slot = self.state.slot(number);
        let ports = (slot.guest_port.get(), slot.host_port.get());
        let named = self.ports.get(&ports) == Some(&number);
        if named {
            self.ports.remove(&ports);
        }
        if reset && named && self.state.resets() < RESETS {
            self.state.push_reset(ports.0, ports.1, TYPE_STREAM);
        }
        slot.phase.set(phase::FREE);
        if socket.asked {
            self.dialing = self.dialing.saturating_sub(1);
        }
        if let Some(fd) = socket.fd {
            self.poller.remove(fd.as_fd());
            // The supervisor has a copy, so closing alone would not end it.
            sys::shut_down(fd.as_fd(), libc::SHUT_RDWR);
            if let Some(host) = &self.host {
                host.forget(socket_key(number));
            }
        }
        if socket.buffered {
            self.state.release_buffer(number);
        }
        self.free.insert(number);
    }

    /// Has packets without data sent.
    fn wish(&mut self, number: u16, wants: u32) {
        self.slot(number).flags.add(wants);
        if let Some(socket) = self.socket(number)
            && !std::mem::replace(&mut socket.in_control, true)
        {
            self.control.push_back(number);
        }
    }

    /// Has the socket read, if it can be.
    fn offer_data(&mut self, number: u16) {
        let slot = self.slot(number);
        let closed = flag::HOST_SEND | flag::GUEST_RCV;
        if slot.phase.get() != phase::OPEN || slot.flags.has(closed) {
            return;
        }
        if let Some(socket) = self.socket(number)
            && socket.readable
            && !std::mem::replace(&mut socket.in_data, true)
        {
            self.data.push_back(number);
        }
    }

    // The host's side.

    /// A client of the host has connected.
    pub fn accept(&mut self, fd: OwnedFd) {
        while self.hellos.len() >= MAX_HELLOS {
            if let Some(oldest) = self.hellos.pop_front() {
                self.close(oldest, false);
            }
        }
        // Without room the client sees the end of the connection.
        if self.is_congested() {
            return;
        }
        let Some(number) = self.allocate() else {
            warn_limited!("a client of the host was refused: {SLOTS} connections are open");
            return;
        };
        self.keep(number, &fd);
        self.slot(number).phase.set(phase::HELLO);
        self.hellos.push_back(number);
        self.watch(number, fd);
    }

    /// Handles what has happened to sockets; false if that was nothing.
    pub fn poll(&mut self) -> bool {
        let events = self.poller.ready();
        for event in &events {
            self.socket_ready(event);
        }
        !events.is_empty()
    }

    fn socket_ready(&mut self, event: &Ready) {
        let number = event.token as u16;
        let generation = (event.token >> 32) as u32;
        let Some(socket) = self.socket(number) else {
            return;
        };
        socket.readable |= event.readable;
        socket.no_more |= event.no_more;
        let waited = event.writable && !std::mem::replace(&mut socket.writable, event.writable);
        let slot = self.slot(number);
        if slot.generation.get() != generation {
            return;
        }
        if waited {
            self.watch_room(number, false);
        }
        match slot.phase.get() {
            phase::HELLO => self.hello(number),
            phase::OPENING if event.hung_up => self.close(number, true),
            phase::OPEN | phase::LINGER => {
                if event.hung_up {
                    self.host_takes_no_more(number);
                }
                self.flush(number);
                self.offer_data(number);
            }
            _ => {}
        }
    }

    /// A client says what it wants: `CONNECT <port>\n`. The line stays in the socket until the
    /// connection is open.
    fn hello(&mut self, number: u16) {
        let mut line = [0; MAX_LINE];
        let Some(fd) = self.fd(number) else {
            return;
        };
        let length = match sys::peek(fd, &mut line) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => 0,
        };
        let end = line[..length].iter().position(|&byte| byte == b'\n');
        let over = length == 0 || length == MAX_LINE;
        let gone = self.socket(number).is_none_or(|socket| socket.no_more);
        let port = match end {
            Some(end) => connect_line(&line[..end]),
            // The rest of the line is to come.
            None if !over && !gone => return,
            None => None,
        };
        self.hellos.retain(|&other| other != number);
        let (Some(port), Some(end)) = (port, end) else {
            self.close(number, false);
            return;
        };
        let host_port = loop {
            let candidate = self.state.next_port();
            if !self.ports.contains_key(&(port, candidate)) {
                break candidate;
            }
        };
        let slot = self.slot(number);
        slot.guest_port.set(port);
        slot.host_port.set(host_port);
        slot.line.set(end as u32 + 1);
        slot.flags.set(flag::WANT_REQUEST);
        slot.phase.set(phase::OPENING);
        self.ports.insert((port, host_port), number);
        self.wish(number, 0);
    }

    /// The host's program does not read any more: what it was to get is dropped.
    fn host_takes_no_more(&mut self, number: u16) {
        let slot = self.slot(number);
        slot.sent.set(slot.taken.get().max(slot.sent.get()));
        slot.flags.add(flag::HOST_RCV);
    }

    /// Writes pieces to the socket; how many bytes it took. `sent` counts them, whatever becomes
    /// of this process.
    fn send(&mut self, number: u16, pieces: &mut [iovec]) -> usize {
        let before = self.slot(number).sent.get();
        let Some(fd) = self.fd(number) else {
            return 0;
        };
        let mark = self.state.send();
        let message = mark.prepare(pieces);
        mark.base.set(before);
        mark.active.set(u32::from(number) + 1);
        // SAFETY: the pieces lie in the state's or in guest memory, which stay mapped.
        let result = unsafe { sys::send(fd, message) };
        let moved = mark.moved().unwrap_or(0);
        self.slot(number).sent.set(before + u64::from(moved));
        mark.active.set(0);
        match result {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if let Some(socket) = self.socket(number) {
                    socket.writable = false;
                }
                self.watch_room(number, true);
            }
            Err(_) => self.host_takes_no_more(number),
        }
        moved as usize
    }

    fn watch_room(&self, number: u16, on: bool) {
        if let Some(fd) = self.fd(number)
            && let Err(error) = self.poller.watch_room(fd, self.token(number), on)
        {
            warn_limited!("a socket cannot be watched: {error}");
        }
    }

    /// Writes what waits for the socket.
    fn flush(&mut self, number: u16) {
        loop {
            let slot = self.slot(number);
            let writable = self.sockets[usize::from(number)]
                .as_ref()
                .is_some_and(|socket| socket.writable);
            if slot.backlog() == 0 || !writable {
                break;
            }
            let mut pieces = self.state.pieces(number, slot.sent.get(), slot.taken.get());
            self.send(number, &mut pieces);
        }
        self.settle(number);
    }

    /// Draws the conclusions from a connection's numbers and flags.
    fn settle(&mut self, number: u16) {
        let slot = self.slot(number);
        let flags = slot.flags.get();
        let empty = slot.backlog() == 0;
        if slot.phase.get() == phase::LINGER {
            if empty {
                self.close(number, false);
            }
            return;
        }
        if slot.phase.get() != phase::OPEN {
            return;
        }
        let both = flag::GUEST_RCV | flag::GUEST_SEND;
        if flags & both == both && empty {
            // The guest has closed and everything is delivered: the answer is RST (5.10.6.6).
            self.close(number, true);
            return;
        }
        if let Some(fd) = self.fd(number) {
            if flags & flag::GUEST_SEND != 0 && empty {
                sys::shut_down(fd, libc::SHUT_WR);
            }
            if flags & flag::GUEST_RCV != 0 {
                sys::shut_down(fd, libc::SHUT_RD);
            }
        }
        let mut wants = 0;
        let untold = (flags & flag::HOST_RCV != 0 && flags & flag::TOLD_RCV == 0)
            || (flags & flag::HOST_SEND != 0 && flags & flag::TOLD_SEND == 0);
        if untold {
            wants |= flag::WANT_SHUTDOWN;
        }
        let freed = slot.forwarded().wrapping_sub(slot.told.get());
        if freed >= State::buffer(number) / 4 {
            wants |= flag::WANT_UPDATE;
        }
        if wants & !flags != 0 {
            self.wish(number, wants);
        }
    }

    // Asking for connections to the host's sockets.

    /// Asks for as many as may be asked for at a time.
    pub fn dial(&mut self) {
        while self.dialing < MAX_DIALING {
            let Some(number) = self.dials.pop_front() else {
                return;
            };
            let slot = self.slot(number);
            if slot.phase.get() != phase::DIALING {
                continue;
            }
            let id = self.token(number);
            let port = slot.host_port.get();
            let asked = match (&self.broker, &self.host) {
                (Some(broker), _) => broker
                    .send(&FromDevice::Dial { id, port }, &[])
                    .map_err(io::Error::other),
                (None, Some(host)) => host.dial(id, port),
                (None, None) => Err(io::ErrorKind::NotConnected.into()),
            };
            match asked {
                Ok(()) => {
                    self.dialing += 1;
                    if let Some(socket) = self.socket(number) {
                        socket.asked = true;
                    }
                }
                Err(error) => {
                    warn_limited!("port {port} of the host cannot be asked for: {error}");
                    self.close(number, true);
                }
            }
        }
    }

    /// The broker has answered.
    pub fn take_answers(&mut self) {
        for _ in 0..MAX_DIALING {
            let Some(broker) = &self.broker else {
                return;
            };
            let mut received = match broker.recv::<ToDevice>() {
                Ok(received) => received,
                Err(error) if error.is_would_block() => return,
                Err(error) => {
                    log::warn!("the guest cannot connect to the host any more: {error}");
                    self.broker = None;
                    return;
                }
            };
            if let ToDevice::Dialed { id, socket } = received.message {
                let fd = socket.and_then(|index| received.take(index).ok());
                self.dialed(id, fd);
            }
        }
    }

    /// An answer: the connected socket, or none.
    pub fn dialed(&mut self, id: u64, fd: Option<OwnedFd>) {
        let number = id as u16;
        let Some(socket) = self.socket(number) else {
            return;
        };
        let asked = socket.asked;
        let slot = self.slot(number);
        let current = slot.phase.get() == phase::DIALING
            && slot.generation.get() == (id >> 32) as u32
            && asked;
        // Else the guest has given up meanwhile.
        if !current {
            return;
        }
        self.dialing = self.dialing.saturating_sub(1);
        if let Some(socket) = self.socket(number) {
            socket.asked = false;
        }
        match fd {
            Some(fd) => {
                self.keep(number, &fd);
                self.connected(number, fd);
            }
            None => self.close(number, true),
        }
    }

    /// The host's program has the connection: the guest is told.
    fn connected(&mut self, number: u16, fd: OwnedFd) {
        let slot = self.slot(number);
        slot.flags.add(flag::WANT_RESPONSE);
        slot.phase.set(phase::OPEN);
        self.watch(number, fd);
        self.wish(number, 0);
    }

    // To the guest.

    fn header(&self, number: u16, operation: u16) -> Header {
        let slot = self.slot(number);
        let forwarded = slot.forwarded();
        slot.told.set(forwarded);
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: slot.host_port.get(),
            dst_port: slot.guest_port.get(),
            kind: TYPE_STREAM,
            op: operation,
            buf_alloc: State::buffer(number),
            fwd_cnt: forwarded,
            ..Header::default()
        }
    }

    /// The header of a packet with data.
    fn data_header(&self, number: u16, length: u32) -> Header {
        Header {
            len: length,
            ..self.header(number, op::RW)
        }
    }

    /// The next packet without data. It stays the next until [`sent`](Self::sent).
    fn next_packet(&mut self) -> Option<Outgoing> {
        if let Some((guest_port, host_port, kind)) = self.state.first_reset() {
            return Some(Outgoing {
                header: Header {
                    src_cid: HOST_CID,
                    dst_cid: self.cid,
                    src_port: host_port,
                    dst_port: guest_port,
                    kind,
                    op: op::RST,
                    ..Header::default()
                },
                wish: None,
            });
        }
        while let Some(&number) = self.control.front() {
            let listed = self.socket(number).is_some_and(|socket| socket.in_control);
            let flags = self.slot(number).flags.get();
            if !listed || flags & flag::WANTS == 0 {
                self.control.pop_front();
                if let Some(socket) = self.socket(number) {
                    socket.in_control = false;
                }
                continue;
            }
            let (want, operation) = [
                (flag::WANT_REQUEST, op::REQUEST),
                (flag::WANT_RESPONSE, op::RESPONSE),
                (flag::WANT_SHUTDOWN, op::SHUTDOWN),
                (flag::WANT_CREDIT, op::CREDIT_REQUEST),
            ]
            .into_iter()
            .find(|(want, _)| flags & want != 0)
            .unwrap_or((flag::WANT_UPDATE, op::CREDIT_UPDATE));
            let mut header = self.header(number, operation);
            if operation == op::SHUTDOWN {
                let slot = self.slot(number);
                if flags & flag::HOST_RCV != 0 {
                    slot.flags.add(flag::TOLD_RCV);
                    header.flags |= SHUTDOWN_RCV;
                }
                if flags & flag::HOST_SEND != 0 {
                    slot.flags.add(flag::TOLD_SEND);
                    header.flags |= SHUTDOWN_SEND;
                }
            }
            // Every packet tells the credit.
            let wish = Some((number, want | flag::WANT_UPDATE));
            return Some(Outgoing { header, wish });
        }
        None
    }

    /// The guest has the packet of [`next_packet`](Self::next_packet).
    fn sent(&mut self, packet: &Outgoing) {
        match packet.wish {
            None => self.state.pop_reset(),
            Some((number, bits)) => {
                self.slot(number).flags.remove(bits);
                // The next one has its turn.
                if self.control.front() == Some(&number) {
                    self.control.pop_front();
                    self.control.push_back(number);
                }
            }
        }
    }

    /// The next connection whose socket is to be read. It loses its turn.
    fn next_data(&mut self) -> Option<u16> {
        while let Some(number) = self.data.pop_front() {
            let listed = self
                .socket(number)
                .is_some_and(|socket| std::mem::take(&mut socket.in_data));
            if listed && self.slot(number).phase.get() == phase::OPEN {
                return Some(number);
            }
        }
        None
    }

    /// Not all that waits in a socket has been read.
    fn may_have_more(&mut self, number: u16) {
        if let Some(socket) = self.socket(number) {
            socket.readable = true;
        }
    }

    /// Gives a connection the next turn.
    fn first_again(&mut self, number: u16) {
        self.may_have_more(number);
        self.offer_data(number);
        if self.data.back() == Some(&number) {
            self.data.rotate_right(1);
        }
    }

    /// How many bytes to read from a connection's socket for the guest now, at most `most`. What
    /// comes after that is an event of its own.
    fn readable(&mut self, number: u16, most: usize) -> Option<usize> {
        let slot = self.slot(number);
        let credit = slot.credit();
        if credit == 0 {
            if !slot.flags.has(flag::ASKED) {
                slot.flags.add(flag::ASKED);
                self.wish(number, flag::WANT_CREDIT);
            }
            return None;
        }
        self.skip_line(number);
        let no_more = self.socket(number)?.no_more;
        let waiting = sys::waiting(self.fd(number)?).unwrap_or(0);
        let length = waiting.min(most).min(credit as usize);
        if length == waiting && !no_more {
            self.socket(number)?.readable = false;
        }
        if waiting == 0 {
            if no_more {
                self.host_sends_no_more(number);
            }
            return None;
        }
        Some(length)
    }

    fn host_sends_no_more(&mut self, number: u16) {
        self.slot(number).flags.add(flag::HOST_SEND);
        self.settle(number);
    }

    /// Takes the CONNECT line out of the socket.
    fn skip_line(&mut self, number: u16) {
        let slot = self.slot(number);
        let line = slot.line.get();
        let Some(fd) = self.fd(number) else {
            return;
        };
        if line == 0 {
            return;
        }
        let mut bytes = [0; MAX_LINE];
        let length = (line as usize).min(MAX_LINE);
        let mark = self.state.receive();
        let mut part = [parts::of(&mut bytes[..length])];
        mark.prepare(0, &mut part);
        mark.rooms[0].set(length as u32);
        mark.count.set(1);
        mark.slot.set(number.into());
        mark.base.set(line);
        mark.what.set(receiving::LINE);
        // SAFETY: the buffer outlives the call. The line has been seen there, so it succeeds.
        let result = unsafe { sys::receive(fd, mark.messages(), 1) };
        slot.line.set(line.saturating_sub(mark.total()));
        mark.what.set(receiving::NOTHING);
        if let Err(error) = result {
            log::debug!("the CONNECT line has gone: {error}");
        }
    }
}

/// The port in `CONNECT <port>`.
fn connect_line(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    let port = text.strip_prefix("CONNECT ")?;
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    port.parse().ok().filter(|_| digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_line_of_the_convention_is_understood() {
        assert_eq!(connect_line(b"CONNECT 52"), Some(52));
        assert_eq!(connect_line(b"CONNECT 4294967295\r"), Some(u32::MAX));
        for line in [
            "CONNECT",
            "CONNECT ",
            "CONNECT 4294967296",
            "CONNECT -1",
            "CONNECT +1",
            "CONNECT  1",
            "connect 1",
            "CONNECT 1 ",
            "CONNECT 0x1",
            "",
        ] {
            assert_eq!(connect_line(line.as_bytes()), None, "{line}");
        }
        assert_eq!(connect_line(b"CONNECT \xff"), None);
    }
}
