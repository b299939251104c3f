//! Verified work for a device, from inside a guest: the part of `load_NAME` in
//! `tests/guest/inner/init.sh` that is no shell's. It works until there is a file `/stop`, and says
//! what it finds wrong in a line `guest: FAIL`.
//!
//! ```text
//! vsock         streams to and from the host, long ones and many short ones
//! net ADDRESS   streams to ADDRESS, and from the host
//! pmem DEVICE   numbered pages, written and flushed
//! memory        memory that is filled, read back, given up and taken again
//! ```

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anemone_guest_init::af_vsock::{Listener, Vsock};
use anemone_guest_init::pages::{self, PAGE, WRITERS};
use anemone_guest_init::sockets::{GUEST_PORT, HOST_PORT};
use anemone_guest_init::streams::{self, Control, Socket};

/// Streams that last as long as the load.
const LONG: u64 = 2;
/// Frames of a short one.
const SHORT: u64 = 8;
/// Pages that are written before they are flushed.
const BATCH: u64 = 4;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let rounds = match words[..] {
        ["vsock"] => vsock(),
        ["net", address] => net(address),
        ["pmem", device] => pmem(device),
        ["memory"] => memory(),
        _ => Err(io::Error::other(format!("no load {words:?}"))),
    };
    match rounds.and_then(|rounds| fs::write("/rounds", format!("{rounds}\n"))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("guest: FAIL {}: {error}", words.join(" "));
            ExitCode::FAILURE
        }
    }
}

/// What becomes true as soon as the work is to end.
fn stop() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    thread::spawn(move || {
        while !Path::new("/stop").exists() {
            thread::sleep(Duration::from_millis(50));
        }
        told.store(true, Ordering::Relaxed);
    });
    stop
}

fn vsock() -> io::Result<u64> {
    let listener = Listener::bind(GUEST_PORT)?;
    run_streams(
        || Vsock::connect(HOST_PORT),
        move || listener.accept(),
        true,
    )
}

fn net(address: &str) -> io::Result<u64> {
    let listener = TcpListener::bind(("0.0.0.0", GUEST_PORT as u16))?;
    let accept = move || listener.accept().map(|(socket, _)| socket);
    run_streams(|| TcpStream::connect(address), accept, false)
}

/// Streams of both sides; the number of frames that have come. With `short`, there are also many
/// connections, one after the other.
fn run_streams<S: Socket>(
    connect: impl Fn() -> io::Result<S>,
    accept: impl Fn() -> io::Result<S> + Send + 'static,
    short: bool,
) -> io::Result<u64> {
    let control = Control {
        stop: stop(),
        ..Control::default()
    };
    let open = Arc::new(AtomicUsize::new(0));
    {
        let (control, open) = (control.clone(), Arc::clone(&open));
        thread::spawn(move || {
            loop {
                let Ok(socket) = accept() else { return };
                let (control, open) = (control.clone(), Arc::clone(&open));
                open.fetch_add(1, Ordering::Relaxed);
                thread::spawn(move || {
                    if let Err(error) = streams::accept(socket, &control) {
                        println!("guest: FAIL from the host: {error}");
                    }
                    open.fetch_sub(1, Ordering::Relaxed);
                });
            }
        });
    }
    println!("guest: load listens");
    let mut long = Vec::new();
    for number in 0..LONG {
        let (socket, control) = (connect()?, control.clone());
        long.push(thread::spawn(move || {
            streams::begin(socket, number, u64::MAX, &control)
        }));
    }
    let mut number = LONG;
    while !control.stop.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(20));
        if short {
            let at = |e| io::Error::other(format!("connection {number}: {e}"));
            streams::begin(connect().map_err(at)?, number, SHORT, &control)?;
            number += 1;
        }
    }
    for stream in long {
        stream
            .join()
            .map_err(|_| io::Error::other("a thread died"))??;
    }
    while open.load(Ordering::Relaxed) > 0 {
        thread::sleep(Duration::from_millis(20));
    }
    println!("guest: {number} connections to the host");
    Ok(control.frames.load(Ordering::Relaxed))
}

/// A page where direct I/O wants it.
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

fn pmem(device: &str) -> io::Result<u64> {
    let stop = stop();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(device)?;
            let stop = Arc::clone(&stop);
            Ok(thread::spawn(move || write_pages(&file, writer, &stop)))
        })
        .collect::<io::Result<_>>()?;
    let mut sum = 0;
    for (writer, thread) in writers.into_iter().enumerate() {
        let count = thread
            .join()
            .map_err(|_| io::Error::other("a thread died"))??;
        println!("guest: writer {writer} has flushed {count} pages");
        sum += count;
    }
    Ok(sum)
}

/// Writes pages in turn, and reads back what was flushed; the number of pages.
fn write_pages(file: &File, writer: u64, stop: &AtomicBool) -> io::Result<u64> {
    let mut page = Box::new(Page([0; PAGE]));
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        for number in count..count + BATCH {
            page.0.copy_from_slice(&pages::content(writer, number));
            file.write_all_at(&page.0, pages::place(writer, number) * PAGE as u64)?;
        }
        file.sync_data()?;
        count += BATCH;
        // The oldest, and the newest.
        for number in [pages::latest(count).start, count - 1] {
            file.read_exact_at(&mut page.0, pages::place(writer, number) * PAGE as u64)?;
            if page.0[..] != pages::content(writer, number) {
                return Err(io::Error::other(format!(
                    "page {number} of writer {writer} is another one"
                )));
            }
        }
    }
    Ok(count)
}

/// Bytes of memory that are held at a time, in two halves.
const HELD: usize = 40 << 20;
/// Bytes that are touched at first, so that the host has them.
const TOUCHED: usize = 140 << 20;

/// Memory whose pages say which they are.
struct Memory {
    words: Vec<u64>,
    seed: u64,
}

impl Memory {
    /// Words between those that are written: eight in a page.
    const STEP: usize = PAGE / 8 / 8;

    fn fill(bytes: usize, seed: u64) -> Self {
        // Zeroed memory of this size is the kernel's, and not touched.
        let mut words = vec![0; bytes / 8];
        for (i, word) in words.iter_mut().enumerate().step_by(Self::STEP) {
            *word = Self::value(seed, i);
        }
        Self { words, seed }
    }

    fn value(seed: u64, index: usize) -> u64 {
        (seed << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    fn verify(&self) -> io::Result<()> {
        let mut words = self.words.iter().enumerate().step_by(Self::STEP);
        match words.find(|(i, word)| **word != Self::value(self.seed, *i)) {
            None => Ok(()),
            Some((i, word)) => Err(io::Error::other(format!(
                "memory {} has {word:#x} at {:#x}",
                self.seed,
                i * 8
            ))),
        }
    }
}

fn memory() -> io::Result<u64> {
    Memory::fill(TOUCHED, 0).verify()?;
    println!("guest: load listens");
    let stop = stop();
    let mut old = Memory::fill(HELD / 2, 0);
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        rounds += 1;
        let new = Memory::fill(HELD / 2, rounds);
        old.verify()?;
        old = new;
    }
    old.verify()?;
    let text = fs::read_to_string("/proc/vmstat")?;
    let count = |name: &str| -> i64 {
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        let found = lines.find(|(key, _)| *key == name);
        found.and_then(|(_, n)| n.parse().ok()).unwrap_or(-1)
    };
    let held = count("balloon_inflate") - count("balloon_deflate");
    println!("guest: the balloon holds {held} pages");
    Ok(rounds)
}
