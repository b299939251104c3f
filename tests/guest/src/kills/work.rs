//! The host's parts of the loads.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anemone_guest_init::pages;
use anemone_guest_init::place::Place;
use anemone_guest_init::sockets::{self, GUEST_PORT};
use anemone_guest_init::streams::{self, Control, Socket};

use super::Work;
use crate::balloon::{self, resident_mib};
use crate::net::make_tap;
use crate::sys;
use crate::vm::{self, Result, Vm};

/// A device that the guest verifies alone.
pub struct Alone {
    options: Vec<String>,
}

impl Alone {
    pub fn with(option: &str) -> Self {
        Self {
            options: vec![option.into()],
        }
    }

    /// A disk, and fio.
    pub fn disk(place: &Place) -> Result<Self> {
        let image = place.scratch("load.img");
        vm::make_disk(place, &image, 8192, 7)?;
        let mut options = vec!["--disk".into(), format!("path={image}")];
        options.extend(fio(place)?);
        Ok(Self { options })
    }
}

impl Work for Alone {
    fn options(&self) -> (Vec<String>, String) {
        (self.options.clone(), String::new())
    }

    fn ended(&mut self, _: &str) -> Result<()> {
        Ok(())
    }
}

/// fio, in persistent memory that cannot be written.
fn fio(place: &Place) -> Result<[String; 2]> {
    let image = place.fio.as_ref().ok_or("there is no fio here")?;
    let option = format!("path={},readonly,id=tools", image.display());
    Ok(["--pmem".into(), option])
}

/// A directory of the host, and fio.
pub struct Files {
    folder: String,
    fio: [String; 2],
}

impl Files {
    pub fn new(place: &Place) -> Result<Self> {
        let folder = place.scratch("load-share");
        fs::create_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
        let fio = fio(place)?;
        Ok(Self { folder, fio })
    }
}

impl Work for Files {
    fn options(&self) -> (Vec<String>, String) {
        let share = format!("tag=share,path={},id=share", self.folder);
        let mut options = vec!["--fs".into(), share];
        options.extend(self.fio.clone());
        (options, String::new())
    }

    /// Every line that the guest has appended is there, once.
    fn ended(&mut self, _: &str) -> Result<()> {
        let path = format!("{}/appended", self.folder);
        let text = fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
        let mut lines = text.lines().enumerate();
        match lines.find(|(i, line)| line.parse() != Ok(*i)) {
            Some((i, line)) => Err(format!("{path}: line {i} is {line:?}")),
            None => Ok(()),
        }
    }
}

/// The console itself.
pub struct Lines;

impl Work for Lines {
    fn options(&self) -> (Vec<String>, String) {
        (Vec::new(), String::new())
    }

    fn ended(&mut self, said: &str) -> Result<()> {
        every_line_once(said)
    }
}

/// The guest's numbered lines are all there, once, in order.
fn every_line_once(said: &str) -> Result<()> {
    let mut expected = 1u64;
    for line in said.lines() {
        let Some(number) = line.strip_prefix("guest: line ") else {
            continue;
        };
        if number.parse() != Ok(expected) {
            return Err(format!("line {number} came where {expected} belongs"));
        }
        expected += 1;
    }
    match expected {
        0..20 => Err(format!("only {expected} lines have come")),
        _ => Ok(()),
    }
}

/// Longest wait for a byte of a stream.
const SILENCE: Duration = Duration::from_secs(120);
/// Streams of the host that last as long as the kills; their numbers differ from those of the guest.
const LONG: u64 = 2;
/// Number of the first of them.
const FIRST: u64 = 1 << 40;
/// Frames of a short stream.
const SHORT: u64 = 8;

/// Where the guest is.
#[derive(Clone)]
enum Peer {
    /// Below this socket.
    Vsock(PathBuf),
    /// At this address.
    Net(&'static str),
}

/// The host and the guest on their tap.
const HOST: &str = "10.0.1.1";
const GUEST: &str = "10.0.1.2";

/// Streams of both sides.
pub struct Streams {
    peer: Peer,
    options: (Vec<String>, String),
    control: Control,
    long: Vec<JoinHandle<io::Result<u64>>>,
    short: Option<JoinHandle<io::Result<()>>>,
    refused: Arc<AtomicU64>,
    /// What was wrong with streams of the guest.
    wrong: Arc<Mutex<Vec<String>>>,
}

impl Streams {
    pub fn vsock(place: &Place) -> Result<Self> {
        let path = place.scratch("load.sock");
        let option = format!("socket={path},cid=77,id=vsock");
        let options = vec!["--vsock".into(), option];
        let streams = Self::new(Peer::Vsock(PathBuf::from(&path)), options, String::new());
        let host = sockets::host_path(Path::new(&path));
        let listener = UnixListener::bind(host).map_err(|e| format!("{path}: {e}"))?;
        streams.answer(move || listener.accept().map(|(socket, _)| socket));
        Ok(streams)
    }

    /// On a tap: what the host sends waits there while there is no process.
    pub fn net(place: &Place) -> Result<Self> {
        sys::leave_network().map_err(|e| format!("a network namespace: {e}"))?;
        make_tap(place, "load", &format!("{HOST}/24"))?;
        let fail = |e| format!("server: {e}");
        let listener = TcpListener::bind((HOST, 0)).map_err(fail)?;
        let port = listener.local_addr().map_err(fail)?.port();
        let options = vec!["--net".into(), "tap=load,id=net0".into()];
        let words = format!(" anemone.port={port} anemone.address={GUEST}/24,{HOST},{HOST}");
        let streams = Self::new(Peer::Net(GUEST), options, words);
        streams.answer(move || listener.accept().map(|(socket, _)| socket));
        Ok(streams)
    }

    fn new(peer: Peer, options: Vec<String>, words: String) -> Self {
        Self {
            peer,
            options: (options, words),
            control: Control::default(),
            long: Vec::new(),
            short: None,
            refused: Arc::default(),
            wrong: Arc::default(),
        }
    }

    /// Takes part in the guest's streams.
    fn answer<S: Socket>(&self, accept: impl Fn() -> io::Result<S> + Send + 'static) {
        let (control, wrong) = (self.control.clone(), Arc::clone(&self.wrong));
        thread::spawn(move || {
            loop {
                let Ok(socket) = accept() else { return };
                let (control, wrong) = (control.clone(), Arc::clone(&wrong));
                thread::spawn(move || {
                    if let Err(error) = streams::accept(socket, &control) {
                        let mut wrong = wrong.lock().unwrap_or_else(PoisonError::into_inner);
                        wrong.push(format!("from the guest: {error}"));
                    }
                });
            }
        });
    }
}

/// Connects to the guest over and over, one connection after the other. Only a connection that the
/// guest has not confirmed may be lost.
fn connect_often(path: &Path, control: &Control, refused: &AtomicU64) -> io::Result<()> {
    let mut number = FIRST + LONG;
    while !control.stop.load(Ordering::Relaxed) {
        match sockets::connect(path) {
            Ok(socket) => drop(streams::begin(socket, number, SHORT, control)?),
            Err(_) => drop(refused.fetch_add(1, Ordering::Relaxed)),
        }
        number += 1;
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Work for Streams {
    fn options(&self) -> (Vec<String>, String) {
        self.options.clone()
    }

    fn started(&mut self, vm: &Vm) -> Result<()> {
        vm.wait_for("guest: load listens")?;
        let fail = |e| format!("to the guest: {e}");
        for number in FIRST..FIRST + LONG {
            let control = self.control.clone();
            self.long.push(match &self.peer {
                Peer::Vsock(path) => {
                    let socket = sockets::connect(path).map_err(fail)?;
                    thread::spawn(move || streams::begin(socket, number, u64::MAX, &control))
                }
                Peer::Net(address) => {
                    let socket = TcpStream::connect((*address, GUEST_PORT as u16)).map_err(fail)?;
                    socket.set_read_timeout(Some(SILENCE)).map_err(fail)?;
                    thread::spawn(move || streams::begin(socket, number, u64::MAX, &control))
                }
            });
        }
        if let Peer::Vsock(path) = &self.peer {
            let (path, control) = (path.clone(), self.control.clone());
            let refused = Arc::clone(&self.refused);
            let work = move || connect_often(&path, &control, &refused);
            self.short = Some(thread::spawn(work));
        }
        // They are under way.
        let end = Instant::now() + SILENCE;
        while self.control.frames.load(Ordering::Relaxed) < 100 {
            if Instant::now() > end {
                return Err("nothing comes from the guest".into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn ending(&mut self, _: &Vm) -> Result<()> {
        self.control.stop.store(true, Ordering::Relaxed);
        let fail = |e| format!("to the guest: {e}");
        for stream in self.long.drain(..) {
            stream.join().map_err(|_| "a thread died")?.map_err(fail)?;
        }
        match self.short.take() {
            Some(thread) => thread.join().map_err(|_| "a thread died")?.map_err(fail),
            None => Ok(()),
        }
    }

    fn ended(&mut self, _: &str) -> Result<()> {
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        println!(
            "{} frames came from the guest; {} connections were not confirmed",
            self.control.frames.load(Ordering::Relaxed),
            self.refused.load(Ordering::Relaxed)
        );
        match wrong.first() {
            Some(wrong) => Err(wrong.clone()),
            None => Ok(()),
        }
    }
}

/// The number after `before` in a line of the guest.
fn told(said: &str, before: &str) -> Result<u64> {
    said.lines()
        .find_map(|line| line.split_once(before)?.1.split(' ').next()?.parse().ok())
        .ok_or_else(|| format!("the guest has not told {before:?}"))
}

/// Persistent memory, whose file is looked at afterwards.
pub struct Pmem {
    image: String,
}

impl Pmem {
    pub fn new(place: &Place) -> Result<Self> {
        let image = place.scratch("load.img");
        vm::make_disk(place, &image, 16 << 11, 9)?;
        Ok(Self { image })
    }
}

impl Work for Pmem {
    fn options(&self) -> (Vec<String>, String) {
        let option = format!("path={},id=pmem0", self.image);
        (vec!["--pmem".into(), option], String::new())
    }

    fn ended(&mut self, said: &str) -> Result<()> {
        let file = fs::read(&self.image).map_err(|e| format!("{}: {e}", self.image))?;
        for writer in 0..pages::WRITERS {
            let count = told(said, &format!("guest: writer {writer} has flushed "))?;
            if count == 0 {
                return Err(format!("writer {writer} has written nothing"));
            }
            pages::verify(&file, writer, count)?;
        }
        Ok(())
    }
}

/// MiB of the balloon when it is large.
const LARGE: f64 = 96.0;
/// MiB of the guest's memory.
const MEMORY: u64 = 256;

/// A balloon that grows and shrinks.
pub struct Balloon {
    place: Place,
    target: f64,
    last: f64,
    turns: u32,
}

impl Balloon {
    pub fn new(place: &Place) -> Self {
        Self {
            place: place.clone(),
            target: 0.0,
            last: 0.0,
            turns: 0,
        }
    }

    /// The size of the balloon, which must be on its way to the target.
    fn look(&mut self, vm: &Vm) -> Result<f64> {
        let text = balloon::ask(&self.place, vm, &[])?;
        let mut sizes = text.split(" MiB").filter_map(|part| {
            let number = part.rsplit(' ').next()?;
            number.parse::<f64>().ok()
        });
        let (Some(size), Some(target)) = (sizes.next(), sizes.next()) else {
            return Err(format!("the balloon says {text:?}"));
        };
        let way = [self.last.min(self.target), self.last.max(self.target)];
        if target != self.target || size < way[0] || size > way[1] {
            return Err(format!(
                "the balloon has {size} of {target} MiB on its way from {} to {} MiB",
                self.last, self.target
            ));
        }
        self.last = size;
        Ok(size)
    }

    fn turn(&mut self, vm: &Vm) -> Result<()> {
        self.target = LARGE - self.target;
        self.turns += 1;
        balloon::ask(&self.place, vm, &[&format!("{}M", self.target)]).map(drop)
    }

    fn arrive(&mut self, vm: &Vm) -> Result<()> {
        let end = Instant::now() + self.place.patience;
        while self.look(vm)? != self.target {
            if Instant::now() > end {
                return Err(format!("the balloon stays at {} MiB", self.last));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Work for Balloon {
    fn options(&self) -> (Vec<String>, String) {
        let memory = format!("{MEMORY}M");
        let options = ["--balloon", "--memory", &memory].map(str::to_string);
        (options.to_vec(), String::new())
    }

    fn started(&mut self, vm: &Vm) -> Result<()> {
        vm.wait_for("guest: load listens")?;
        self.turn(vm)
    }

    fn replaced(&mut self, vm: &Vm) -> Result<()> {
        match self.look(vm)? == self.target {
            true => self.turn(vm),
            false => Ok(()),
        }
    }

    fn ending(&mut self, vm: &Vm) -> Result<()> {
        self.arrive(vm)?;
        if self.target == 0.0 {
            self.turn(vm)?;
            self.arrive(vm)?;
        }
        // The guest has had all of its memory in use before.
        let resident = resident_mib(vm)?;
        println!("{} turns; {resident} MiB with the balloon", self.turns);
        match resident <= MEMORY - LARGE as u64 {
            true => Ok(()),
            false => Err(format!("{resident} MiB are used beside the balloon")),
        }
    }

    fn ended(&mut self, said: &str) -> Result<()> {
        let pages = told(said, "guest: the balloon holds ")?;
        let held = LARGE as u64 * 256;
        match pages == held {
            true => Ok(()),
            false => Err(format!("the guest's balloon has {pages} pages, not {held}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_doubled_and_swapped_lines_are_found() {
        let text = |numbers: &mut dyn Iterator<Item = u64>| -> String {
            numbers.map(|n| format!("guest: line {n}\n")).collect()
        };
        assert!(every_line_once(&text(&mut (1..200))).is_ok());
        assert!(every_line_once(&text(&mut (1..15))).is_err());
        assert!(every_line_once(&text(&mut (1..200).filter(|n| *n != 77))).is_err());
        assert!(every_line_once(&text(&mut (1..200).chain([199]))).is_err());
    }

    #[test]
    fn a_number_of_the_guest() {
        let said = "guest: writer 0 has flushed 12 pages\n";
        assert_eq!(told(said, "writer 0 has flushed "), Ok(12));
        assert!(told(said, "writer 1 has flushed ").is_err());
    }
}
