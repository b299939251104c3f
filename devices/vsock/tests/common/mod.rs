//! A device process, a guest, and a folder for the host's sockets.

#![allow(dead_code, reason = "each test uses a part")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anemone_driver::vsock::Guest;
use anemone_driver::{Device, Options, Process};
use tempfile::TempDir;

pub const CID: u64 = 52;
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what should not happen to happen.
pub const MOMENT: Duration = Duration::from_millis(200);

pub struct Setup {
    pub process: Process,
    pub guest: Guest,
    pub folder: TempDir,
}

pub fn options() -> Options {
    Options {
        queues: 3,
        ..Options::default()
    }
}

pub fn start() -> Setup {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let args = ["--cid", "52", "--listen", path.to_str().unwrap()];
    let mut process = Process::start(env!("CARGO_BIN_EXE_anemone-vsock"), &args).unwrap();
    let device: Device = process.device(&options()).unwrap();
    Setup {
        process,
        guest: Guest::new(device, CID),
        folder,
    }
}

impl Setup {
    /// Where programs of the host connect.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("v")
    }

    /// A program of the host listens for the guest.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("v_{port}"))).unwrap()
    }

    /// A program of the host connects.
    pub fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A stream from the host: the guest's end and the host's.
    pub fn host_stream(&mut self, port: u32) -> (usize, UnixStream) {
        let mut client = self.client();
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        self.guest.listening.insert(port);
        let came = self.guest.poll_until(|guest| !guest.accepted.is_empty());
        assert!(came.unwrap(), "no request");
        let number = self.guest.accepted.pop_front().unwrap();
        let expected = format!("OK {}\n", self.guest.streams[number].ports.1);
        assert_eq!(read_line(&mut client), expected);
        (number, client)
    }

    /// A stream from the guest: the guest's end and the host's.
    pub fn guest_stream(&mut self, listener: &UnixListener, port: u32) -> (usize, UnixStream) {
        let number = self.guest.connect(port).unwrap();
        let open = self
            .guest
            .poll_until(|guest| guest.streams[number].open || guest.streams[number].reset);
        assert!(
            open.unwrap() && !self.guest.streams[number].reset,
            "refused"
        );
        let (server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        (number, server)
    }

    /// The guest writes all of it.
    pub fn write_all(&mut self, number: usize, mut data: &[u8]) {
        while !data.is_empty() {
            let written = self.guest.write(number, data).unwrap();
            data = &data[written..];
            if written == 0 {
                self.guest.poll(Duration::from_millis(20)).unwrap();
            }
        }
    }

    /// The guest reads so many bytes.
    pub fn read_exact(&mut self, number: usize, length: usize) -> Vec<u8> {
        let mut data = Vec::new();
        let came = self.guest.poll_until(|guest| {
            data.extend(guest.read(number).unwrap());
            data.len() >= length
        });
        assert!(came.unwrap(), "only {} of {length} bytes came", data.len());
        assert_eq!(data.len(), length);
        data
    }

    /// Waits for the guest's stream to be reset.
    pub fn wait_reset(&mut self, number: usize) {
        let reset = self.guest.poll_until(|guest| guest.streams[number].reset);
        assert!(reset.unwrap(), "stream {number} is not reset");
    }

    /// Waits until the other side has shut so much down.
    pub fn wait_shut(&mut self, number: usize, flags: u32) {
        let shut = self
            .guest
            .poll_until(|guest| guest.streams[number].shut & flags == flags);
        assert!(shut.unwrap(), "stream {number} is not shut down");
    }
}

/// A line, and not a byte more.
pub fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        match stream.read(&mut byte) {
            Ok(1) => line.push(byte[0]),
            other => panic!("{other:?} after {line:?}"),
        }
    }
    String::from_utf8(line).unwrap()
}

/// Bytes of which none can be missing or doubled unseen.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
