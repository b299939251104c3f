//! The console device (virtio 1.3, 5.3) with its single port, and what it does for a byte stream.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anemone_device::{Device, Host, Vring, Watch};

use crate::buffer::Buffer;
use crate::endpoint::{ARRIVAL, Endpoint, INPUT, OUTPUT};
use crate::escape::{Action, Escape, HELP};
use crate::guest::{Ring, Stream};
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
/// Bytes read from the endpoint at once. Each may become two by the escape key.
const READ_SIZE: usize = 256;

/// The device.
pub struct Console {
    endpoint: Endpoint,
    /// The two virtqueues, while they are started.
    rings: [Option<Ring>; 2],
    /// In place of virtqueues.
    stream: Option<Stream>,
    /// From the endpoint to the guest.
    input: Buffer,
    /// From the guest to the endpoint.
    output: Buffer,
    escape: Option<Escape>,
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
            input: Buffer::default(),
            output: Buffer::default(),
            escape: escape.then(Escape::default),
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
            if let Some(ring) = &mut self.rings[TRANSMITQ] {
                taken = ring.take_output(&mut self.output);
            }
            if let Some(ring) = &mut self.rings[RECEIVEQ] {
                given = ring.give_input(&mut self.input);
            }
            if let Some(stream) = &mut self.stream {
                taken = stream.take_output(&mut self.output);
                given = stream.give_input(&mut self.input);
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

    /// Writes what the endpoint takes. Whether it took any.
    fn flush(&mut self) -> bool {
        let mut any = false;
        while !self.output.is_empty() {
            let written = self.endpoint.write(self.output.front());
            if written == 0 {
                break;
            }
            self.output.consume(written);
            any = true;
        }
        any
    }

    fn read_input(&mut self) {
        let mut bytes = [0; READ_SIZE];
        let room = READ_SIZE.min(self.input.room() / 2);
        let length = self.endpoint.read(&mut bytes[..room]);
        let Some(escape) = &mut self.escape else {
            self.input.push(&bytes[..length]);
            return;
        };
        for &key in &bytes[..length] {
            let action = escape.key(key, |bytes| self.input.push(bytes));
            match (action, &self.host) {
                (Some(Action::Quit), Some(host)) => host.quit_requested(),
                (Some(Action::Power), Some(host)) => host.power_requested(),
                (Some(Action::Help), _) => self.output.push(HELP),
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
        let hungry = self.output.room() > 0;
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
        watches.extend(self.endpoint.watch_input(self.input.room() > 1));
        watches
    }

    fn output_fds(&self) -> Vec<Watch<'_>> {
        let mut watches = Vec::with_capacity(2);
        if !self.output.is_empty() {
            watches.extend(self.endpoint.output().map(|fd| (fd, OUTPUT)));
        }
        if let Some(stream) = self.stream.as_ref().filter(|_| !self.input.is_empty()) {
            watches.extend(stream.file().map(|file| (file.as_fd(), STREAM)));
        }
        watches
    }

    fn handle_event(&mut self, token: u64) {
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
        self.pump();
    }

    fn attach(&mut self, host: &Host) {
        self.host = Some(host.clone());
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
            if self.output.is_empty() || sys::poll(output, libc::POLLOUT, LAST_PAUSE_MS) == 0 {
                return;
            }
        }
    }
}
