//! The console device (virtio 1.3, 5.3) with its single port, and what it does for a byte stream.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anemone_device::{Device, Host, Vring, Watch};
use anemone_log::warn_limited;
use virtio_queue::QueueT;

use crate::endpoint::{ARRIVAL, Endpoint, INPUT, OUTPUT};
use crate::escape::{Action, Escape, HELP};
use crate::guest::{Ring, Stream};
use crate::state::{Lane, READ_SIZE, State};
use crate::sys;

/// The configuration has the size of the terminal.
const VIRTIO_CONSOLE_F_SIZE: u64 = 1 << 0;

const RECEIVEQ: usize = 0;
const TRANSMITQ: usize = 1;

/// Tokens of the queues' kicks are the queues' numbers.
const STREAM: u64 = 2;

/// Rounds of moving bytes in one go, so that a busy guest does not keep the main loop.
const ROUNDS: usize = 16;
/// How long the last output may take at the end of the process, and how long a pause in it.
const LAST_WORDS: Duration = Duration::from_secs(1);
const LAST_PAUSE_MS: i32 = 200;
// What the supervisor keeps.
const KEPT_STATE: u64 = 0;
const KEPT_CLIENT: u64 = 1;

/// The device.
pub struct Console {
    endpoint: Endpoint,
    /// The two virtqueues, while they are started.
    rings: [Option<Ring>; 2],
    /// In place of virtqueues.
    stream: Option<Stream>,
    /// Bytes on their way.
    state: State,
    /// The supervisor keeps the state.
    state_kept: bool,
    /// The supervisor keeps a client.
    client_kept: bool,
    /// The escape key has a meaning.
    escape: bool,
    host: Option<Host>,
    columns: u16,
    rows: u16,
}

impl Console {
    /// A console for virtqueues, or for a byte stream if there is one.
    pub fn new(endpoint: Endpoint, escape: bool, stream: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(fd) = &stream {
            sys::set_nonblocking(fd.as_fd())?;
        }
        let (columns, rows) = endpoint.size().unwrap_or((0, 0));
        Ok(Self {
            endpoint,
            rings: [None, None],
            stream: stream.map(|fd| Stream::new(fd.into())),
            state: State::new()?,
            state_kept: false,
            client_kept: false,
            escape,
            host: None,
            columns,
            rows,
        })
    }

    /// Moves bytes both ways until nothing moves.
    fn pump(&mut self) {
        for _ in 0..ROUNDS {
            let written = self.flush();
            let (mut taken, mut given) = (false, false);
            let state = &mut self.state;
            if let Some(ring) = &mut self.rings[TRANSMITQ] {
                taken = ring.take_output(state);
            }
            if let Some(ring) = &mut self.rings[RECEIVEQ] {
                given = ring.give_input(state);
            }
            if let Some(stream) = &mut self.stream {
                taken = stream.take_output(state);
                given = stream.give_input(state);
            }
            if !(written || taken || given) {
                return;
            }
        }
        // There is more; after what else the main loop has to do.
        for ring in self.rings.iter().flatten() {
            ring.vring.kick_again();
        }
    }

    /// Has the supervisor keep what a process that replaces this one needs.
    fn keep_state(&mut self) {
        let Some(host) = self.host.as_ref().filter(|_| !self.state_kept) else {
            return;
        };
        if let Err(error) = host.keep(KEPT_STATE, self.state.fd()) {
            warn_limited!("a restart would lose bytes: {error}");
        }
        self.state_kept = true;
    }

    /// The same for the client of the socket, which comes and goes.
    fn keep_client(&mut self) {
        let Some(host) = &self.host else { return };
        match self.endpoint.client() {
            Some(client) if !self.client_kept => {
                if let Err(error) = host.keep(KEPT_CLIENT, client) {
                    warn_limited!("a restart would lose the client: {error}");
                }
                self.client_kept = true;
            }
            None if self.client_kept => {
                host.forget(KEPT_CLIENT);
                self.client_kept = false;
            }
            _ => {}
        }
    }

    /// Writes what the endpoint takes. Whether it took any.
    fn flush(&mut self) -> bool {
        let mut any = false;
        while self.state.output_len() > 0 && self.endpoint.write(&mut self.state) {
            any = true;
        }
        any
    }

    fn read_input(&mut self) {
        let mut bytes = [0; READ_SIZE];
        let room = READ_SIZE.min(self.state.input_room() / 2);
        let length = self.endpoint.read(&mut self.state, &mut bytes[..room]);
        if length > 0 {
            self.take_input(&bytes[..length]);
        }
    }

    /// Takes what has been typed.
    fn take_input(&mut self, bytes: &[u8]) {
        if !self.escape {
            self.state.put_input(bytes, false);
            return;
        }
        let mut escape = Escape::new(self.state.escaped());
        let mut input = Vec::with_capacity(2 * bytes.len());
        let keys = bytes.iter();
        let actions: Vec<_> = keys
            .filter_map(|&key| escape.key(key, |bytes| input.extend(bytes)))
            .collect();
        // Counted first: the user who misses something presses the key again.
        self.state.put_input(&input, escape.escaped());
        for action in actions {
            match (action, &self.host) {
                (Action::Quit, Some(host)) => host.quit_requested(),
                (Action::Power, Some(host)) => host.power_requested(),
                (Action::Help, _) => self.state.insert_output(HELP),
                _ => {}
            }
        }
    }
}

impl Device for Console {
    fn features(&self) -> u64 {
        VIRTIO_CONSOLE_F_SIZE
    }

    fn queue_count(&self) -> usize {
        2
    }

    /// cols, rows (16 bits each), max_nr_ports, emerg_wr (32 bits each).
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 12];
        config[..2].copy_from_slice(&self.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.rows.to_le_bytes());
        config[4] = 1;
        config
    }

    fn start_queue(&mut self, vring: Vring) -> io::Result<()> {
        let index = vring.index;
        if index == RECEIVEQ {
            self.state.resolve_giving(vring.queue.next_used());
        }
        self.rings[index] = Some(Ring::new(vring));
        Ok(())
    }

    fn stop_queue(&mut self, index: usize) -> u16 {
        // The last the guest said before it went.
        self.pump();
        self.rings[index].take().map_or(0, Ring::stop)
    }

    fn event_fds(&self) -> Vec<Watch<'_>> {
        let mut watches = Vec::with_capacity(4);
        let hungry = self.state.output_room() > 0;
        for (index, ring) in self.rings.iter().enumerate() {
            // While the endpoint does not keep up, the guest has to wait.
            let wanted = index == RECEIVEQ || hungry;
            if let Some(ring) = ring.as_ref().filter(|ring| wanted && ring.is_live()) {
                watches.push((ring.vring.kick.as_fd(), index as u64));
            }
        }
        if let Some(stream) = self.stream.as_ref().filter(|_| hungry) {
            watches.extend(stream.file().map(|file| (file.as_fd(), STREAM)));
        }
        watches.extend(self.endpoint.watch_input(self.state.input_room() > 1));
        watches
    }

    fn output_fds(&self) -> Vec<Watch<'_>> {
        let mut watches = Vec::with_capacity(2);
        if self.state.output_len() > 0 {
            watches.extend(self.endpoint.output().map(|fd| (fd, OUTPUT)));
        }
        if let Some(stream) = self.stream.as_ref().filter(|_| self.state.input_len() > 0) {
            watches.extend(stream.file().map(|file| (file.as_fd(), STREAM)));
        }
        watches
    }

    fn handle_event(&mut self, token: u64) {
        self.keep_state();
        match token {
            INPUT => self.read_input(),
            ARRIVAL => self.endpoint.arrival(),
            OUTPUT | STREAM => {}
            index => {
                if let Some(Some(ring)) = self.rings.get_mut(index as usize) {
                    ring.kicked();
                }
            }
        }
        self.keep_client();
        self.pump();
        self.keep_client();
    }

    fn attach(&mut self, host: &Host) {
        self.host = Some(host.clone());
    }

    fn restore(&mut self, key: u64, fd: OwnedFd) {
        match key {
            KEPT_STATE => match State::restore(fd) {
                Ok(state) => {
                    self.state = state;
                    self.state_kept = true;
                    self.endpoint.resume(&mut self.state);
                    let output = self.state.uncounted(Lane::Output);
                    self.state.put_output(&output);
                    let input = self.state.uncounted(Lane::Input);
                    self.take_input(&input);
                }
                Err(why) => warn_limited!("what an earlier process has left is of no use: {why}"),
            },
            KEPT_CLIENT => {
                self.endpoint.restore_client(fd);
                self.client_kept = true;
            }
            _ => {}
        }
    }

    fn window_size(&mut self, columns: u16, rows: u16) {
        (self.columns, self.rows) = (columns, rows);
        if let Some(host) = &self.host {
            host.config_changed();
        }
    }
}

impl Drop for Console {
    /// The guest's last words are worth a moment.
    fn drop(&mut self) {
        let end = Instant::now() + LAST_WORDS;
        while Instant::now() < end {
            self.pump();
            let Some(output) = self.endpoint.output() else {
                return;
            };
            if self.state.output_len() == 0 || sys::poll(output, libc::POLLOUT, LAST_PAUSE_MS) == 0
            {
                return;
            }
        }
    }
}
