//! The process is killed at random moments under verified load, and another takes its place.
//!
//! Several users of the guest work at once, each in a directory of its own and each with a request
//! in flight. A user knows what every request must answer, so an operation that happens twice or
//! not at all, a handle or node that is lost, or a count that is wrong is found.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anemone_driver::fs::{
    Args, Call, Entry, Mount, ROOT, Requests, dirents, op, read_args, write_call,
};
use anemone_driver::{Bounced, Kills, Memory, Options, Random, Replaceable};
use common::{BINARY, QUEUE};

const KILLS: usize = 200;
const USERS: usize = 8;
const FILES: usize = 6;
const BLOCK: usize = 4096;
const BLOCKS: u64 = 8;
const MOST: u32 = 128 << 10;

/// A file, whatever its names are.
struct Model {
    nodeid: u64,
    /// Its handle, or 0.
    fh: u64,
    content: Vec<u8>,
    /// It has had several names. When the one that the device knows goes, an operation that names
    /// no other is told so by ESTALE, and Linux looks up the name that it was given and tries again.
    names: bool,
}

/// What a user waits for.
#[derive(Debug)]
enum Step {
    Create(String),
    Write(usize, usize, Vec<u8>),
    Append(usize, Vec<u8>),
    Read(usize),
    Rename(String, String),
    Link(usize, String),
    Unlink(String),
    Open(usize),
    Close(usize),
    Lookup(String),
    Mkdir(String),
    Rmdir(String),
    List,
    Forget,
}

struct User {
    dir: u64,
    /// Handle of the directory.
    dir_fh: u64,
    files: Vec<Model>,
    /// Index of the file under each name.
    names: BTreeMap<String, usize>,
    folders: BTreeMap<String, u64>,
    /// Nodes to forget, each once.
    forgotten: Vec<u64>,
    step: Option<Step>,
    next: u32,
}

fn content(random: &mut Random, len: usize) -> Vec<u8> {
    let seed = random.below(u64::MAX);
    (0..len as u64)
        .map(|i| (seed.wrapping_add(i).wrapping_mul(0x9e37_79b9) >> 7) as u8)
        .collect()
}

fn call(opcode: u32, nodeid: u64, args: Args, room: u32) -> Call {
    Call {
        opcode,
        nodeid,
        args: args.done(),
        data: 0,
        room: Some(room),
    }
}

fn number(reply: &[u8]) -> u64 {
    u64::from_ne_bytes(reply[..8].try_into().unwrap())
}

impl User {
    fn new(dir: u64, dir_fh: u64) -> Self {
        Self {
            dir,
            dir_fh,
            files: Vec::new(),
            names: BTreeMap::new(),
            folders: BTreeMap::new(),
            forgotten: Vec::new(),
            step: None,
            next: 0,
        }
    }

    fn links(&self, file: usize) -> u32 {
        self.names.values().filter(|other| **other == file).count() as u32
    }

    /// One of the open files, also of those without a name.
    fn open_file(&self, random: &mut Random) -> Option<usize> {
        let open: Vec<_> = (0..self.files.len())
            .filter(|&f| self.files[f].fh != 0)
            .collect();
        let at = random.below(open.len().max(1) as u64) as usize;
        open.get(at).copied()
    }

    fn name(&self, random: &mut Random) -> Option<String> {
        let at = random.below(self.names.len().max(1) as u64) as usize;
        self.names.keys().nth(at).cloned()
    }

    fn new_name(&mut self) -> String {
        self.next += 1;
        format!("name {}", self.next)
    }

    /// The next request, and the data that must be in its slot.
    fn begin(&mut self, random: &mut Random) -> (Call, Vec<u8>) {
        loop {
            if let Some((call, data, step)) = self.propose(random) {
                self.step = Some(step);
                return (call, data);
            }
        }
    }

    fn propose(&mut self, random: &mut Random) -> Option<(Call, Vec<u8>, Step)> {
        if let Some(nodeid) = self.forgotten.pop() {
            let forget = Call {
                opcode: op::FORGET,
                nodeid,
                args: Args::new().u64(1).done(),
                ..Call::default()
            };
            return Some((forget, Vec::new(), Step::Forget));
        }
        let dir = self.dir;
        let plain = |call, step| Some((call, Vec::new(), step));
        let few = self.names.len() < FILES;
        match random.below(18) {
            0 | 1 if few => {
                let name = self.new_name();
                let flags = (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32;
                let args = Args::new().u32(flags).u32(0o600).u64(0).name(&name);
                plain(call(op::CREATE, dir, args, 144), Step::Create(name))
            }
            2..=4 => {
                let file = self.open_file(random)?;
                let block = random.below(BLOCKS) as usize;
                let data = content(random, BLOCK);
                let Model { nodeid, fh, .. } = self.files[file];
                let call = write_call(nodeid, fh, (block * BLOCK) as u64, BLOCK as u32, 0);
                Some((call, data.clone(), Step::Write(file, block, data)))
            }
            5 | 6 => {
                let file = self.open_file(random)?;
                let Model {
                    nodeid,
                    fh,
                    content: before,
                    ..
                } = &self.files[file];
                let len = 1 + random.below(300) as usize;
                if before.len() + len > MOST as usize {
                    return None;
                }
                let data = content(random, len);
                let call = write_call(*nodeid, *fh, 0, len as u32, libc::O_APPEND);
                Some((call, data.clone(), Step::Append(file, data)))
            }
            7 | 8 => {
                let file = self.open_file(random)?;
                let Model { nodeid, fh, .. } = self.files[file];
                plain(
                    call(op::READ, nodeid, read_args(fh, 0, MOST), MOST),
                    Step::Read(file),
                )
            }
            9 => {
                let from = self.name(random)?;
                let to = match random.below(2) {
                    0 => self.new_name(),
                    _ => self.name(random).filter(|to| *to != from)?,
                };
                let args = Args::new().u64(dir).name(&from).name(&to);
                plain(call(op::RENAME, dir, args, 0), Step::Rename(from, to))
            }
            10 if few => {
                let name = self.name(random)?;
                let (file, to) = (self.names[&name], self.new_name());
                let args = Args::new().u64(self.files[file].nodeid).name(&to);
                plain(call(op::LINK, dir, args, 128), Step::Link(file, to))
            }
            11 | 12 => {
                let name = self.name(random)?;
                plain(
                    call(op::UNLINK, dir, Args::new().name(&name), 0),
                    Step::Unlink(name),
                )
            }
            13 => {
                let file = self.open_file(random)?;
                let Model { nodeid, fh, .. } = self.files[file];
                let args = Args::new().u64(fh).u64(0).u64(0);
                plain(call(op::RELEASE, nodeid, args, 0), Step::Close(file))
            }
            14 => {
                let file = self.names[&self.name(random)?];
                let Model { nodeid, fh, .. } = self.files[file];
                if fh != 0 {
                    return None;
                }
                let args = Args::new().u32(libc::O_RDWR as u32).u32(0);
                plain(call(op::OPEN, nodeid, args, 16), Step::Open(file))
            }
            15 => {
                let name = self.name(random)?;
                plain(
                    call(op::LOOKUP, dir, Args::new().name(&name), 128),
                    Step::Lookup(name),
                )
            }
            16 if self.folders.len() < 2 => {
                let name = self.new_name();
                let args = Args::new().u32(0o700).u32(0).name(&name);
                plain(call(op::MKDIR, dir, args, 128), Step::Mkdir(name))
            }
            16 => {
                let name = self.folders.keys().next()?.clone();
                plain(
                    call(op::RMDIR, dir, Args::new().name(&name), 0),
                    Step::Rmdir(name),
                )
            }
            17 => {
                let args = read_args(self.dir_fh, 0, MOST);
                plain(call(op::READDIRPLUS, dir, args, MOST), Step::List)
            }
            _ => None,
        }
    }

    fn end(&mut self, reply: Option<Result<Vec<u8>, i32>>) {
        let step = self.step.take().unwrap();
        let Some(reply) = reply else {
            assert!(matches!(step, Step::Forget), "{step:?} has no reply");
            return;
        };
        let reply = match reply {
            Ok(reply) => reply,
            Err(libc::ESTALE) if self.may_be_stale(&step) => return,
            Err(error) => panic!("{step:?}: {}", std::io::Error::from_raw_os_error(error)),
        };
        match step {
            Step::Create(name) => {
                let model = Model {
                    nodeid: Entry::from_bytes(&reply).nodeid,
                    fh: number(&reply[128..]),
                    content: Vec::new(),
                    names: false,
                };
                self.names.insert(name, self.files.len());
                self.files.push(model);
            }
            Step::Write(file, block, data) => {
                let content = &mut self.files[file].content;
                let end = (block + 1) * BLOCK;
                content.resize(content.len().max(end), 0);
                content[block * BLOCK..end].copy_from_slice(&data);
            }
            Step::Append(file, data) => self.files[file].content.extend(data),
            Step::Read(file) => {
                assert!(reply == self.files[file].content, "file {file} reads wrong");
            }
            Step::Rename(from, to) => {
                let file = self.names[&from];
                // Of two names of one file both stay (rename(2)).
                if self.names.get(&to) != Some(&file) {
                    self.lose(&to);
                    self.names.remove(&from);
                    self.names.insert(to, file);
                }
            }
            Step::Link(file, to) => {
                let entry = Entry::from_bytes(&reply);
                let told = (entry.nodeid, entry.attr.nlink);
                assert_eq!(told, (self.files[file].nodeid, self.links(file) + 1));
                self.names.insert(to, file);
                self.files[file].names = true;
            }
            Step::Unlink(name) => self.lose(&name),
            Step::Open(file) => self.files[file].fh = number(&reply),
            Step::Close(file) => self.files[file].fh = 0,
            Step::Lookup(name) => {
                let entry = Entry::from_bytes(&reply);
                self.forgotten.push(entry.nodeid);
                let file = self.names[&name];
                let model = &self.files[file];
                let told = (entry.nodeid, entry.attr.size, entry.attr.nlink);
                let right = (model.nodeid, model.content.len() as u64, self.links(file));
                assert_eq!(told, right, "{name}");
            }
            Step::Mkdir(name) => {
                let nodeid = Entry::from_bytes(&reply).nodeid;
                assert_eq!(self.folders.insert(name, nodeid), None);
            }
            Step::Rmdir(name) => self.forgotten.extend(self.folders.remove(&name)),
            Step::List => {
                let mut told = Vec::new();
                for entry in dirents(&reply, true) {
                    if let Some(nodeid) = entry.entry.map(|e| e.nodeid).filter(|id| *id != 0) {
                        self.forgotten.push(nodeid);
                        told.push(String::from_utf8(entry.name).unwrap());
                    }
                }
                told.sort();
                assert_eq!(told, self.all_names());
            }
            Step::Forget => panic!("FORGET has a reply"),
        }
    }

    fn may_be_stale(&self, step: &Step) -> bool {
        match step {
            Step::Open(file) | Step::Link(file, _) => self.files[*file].names,
            _ => false,
        }
    }

    /// A name has gone, and what was looked up under it when it was made.
    fn lose(&mut self, name: &str) {
        if let Some(file) = self.names.remove(name) {
            self.forgotten.push(self.files[file].nodeid);
        }
    }

    fn all_names(&self) -> Vec<String> {
        let mut names: Vec<_> = self
            .names
            .keys()
            .chain(self.folders.keys())
            .cloned()
            .collect();
        names.sort();
        names
    }

    /// The host has exactly what this user was told.
    fn compare(&self, dir: &std::path::Path) {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if let Some(&file) = self.names.get(&name) {
                let right = fs::read(dir.join(&name)).unwrap() == self.files[file].content;
                assert!(right, "{name} in {}", dir.display());
            }
            names.push(name);
        }
        names.sort();
        assert_eq!(names, self.all_names());
    }
}

fn start(folder: &std::path::Path, options: &Options) -> Replaceable {
    let directory: OwnedFd = fs::File::open(folder).unwrap().into();
    let args = ["--tag", "t", "--directory-fd", "5"];
    Replaceable::start(BINARY, &args, vec![directory], options).unwrap()
}

#[test]
fn nothing_is_lost_or_done_twice() {
    everything_once(&common::options());
}

#[test]
fn nothing_is_lost_or_done_twice_with_a_bounce() {
    everything_once(&Options {
        bounce: Some(Bounced::usual(26, 2)),
        ..common::options()
    });
}

fn everything_once(options: &Options) {
    let folder = tempfile::tempdir().unwrap();
    let mut device = start(folder.path(), options);
    let memory = device.device.memory.clone();
    let mut users = Vec::new();
    {
        let queue = &mut device.device.queues[QUEUE];
        let mut mount = Mount::new(&memory, queue, MOST).unwrap();
        for user in 0..USERS {
            let dir = mount
                .mkdir(ROOT, format!("user {user}"), 0o755)
                .unwrap()
                .nodeid;
            users.push(User::new(dir, mount.opendir(dir).unwrap()));
        }
    }
    let mut queues = [4096, MOST].map(|data| Requests::new(&memory, 128, USERS, data));
    // The user who waits for each slot.
    let mut waiting = [[None; USERS]; 2];
    let mut kills = Kills::new(options.kills(KILLS), Duration::from_millis(6));
    let mut done = 0;
    while !kills.done() || waiting.iter().flatten().any(Option::is_some) {
        let idle = users
            .iter_mut()
            .enumerate()
            .filter(|(_, user)| user.step.is_none());
        let over = kills.done();
        for (number, user) in idle.filter(|_| !over) {
            let (call, data) = user.begin(kills.random());
            let at = usize::from(call.opcode != op::FORGET);
            let slot = queues[at].next_slot().unwrap();
            memory.write(queues[at].data(slot), &data);
            let submitted = queues[at].submit(&memory, &mut device.device.queues[at], &call);
            assert_eq!(submitted, Some(slot));
            waiting[at][slot] = Some(number);
        }
        for queue in &mut device.device.queues {
            queue.publish();
            queue.kick();
        }
        kills.strike(&mut device).unwrap();
        device.kept().unwrap();
        let wait = kills.wait().min(Duration::from_micros(200));
        device.device.queues[QUEUE].wait(wait).unwrap();
        for (at, requests) in queues.iter_mut().enumerate() {
            while let Some(finished) = requests.finish(&memory, &mut device.device.queues[at]) {
                let user = waiting[at][finished.slot].take().unwrap();
                users[user].end(finished.reply);
                done += 1;
            }
        }
    }
    for queue in &device.device.queues {
        assert_eq!(queue.strays(), 0, "a request was returned twice");
    }
    for (number, user) in users.iter().enumerate() {
        user.compare(&folder.path().join(format!("user {number}")));
    }
    kills.report("anemone-fs");
    let files = || users.iter().flat_map(|user| &user.files);
    let open: Vec<_> = files().filter(|file| file.fh != 0).collect();
    println!(
        "{done} requests, {} of {} files are open",
        open.len(),
        files().count()
    );
    // One more, and what was open is open; forgotten nodes and closed handles take no room.
    device.replace().unwrap();
    for some in open.chunks(100) {
        let queue = &mut device.device.queues[QUEUE];
        let mut mount = Mount::unmounted(&memory, queue, MOST);
        for file in some {
            let read = mount.read(file.nodeid, file.fh, 0, MOST).unwrap();
            assert!(read == file.content);
            mount.release(file.nodeid, file.fh).unwrap();
        }
        // The process waits when nobody hears what it has to say.
        device.serve().unwrap();
    }
    let kept = device.kept().unwrap().len();
    println!("{kept} descriptors are kept when all files are closed");
    // The tables, and files that were being opened when the process was killed in the few
    // instructions between an end and the note of it.
    assert!(kept <= 1 + KILLS / 20);
}

#[test]
fn a_file_without_a_name_and_one_that_cannot_be_opened_again_stay_open() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = start(folder.path(), &common::options());
    let memory = device.device.memory.clone();
    let flags = libc::O_RDWR | libc::O_CREAT;
    let (gone, moved, dir) = {
        let queue = &mut device.device.queues[QUEUE];
        let mut mount = Mount::new(&memory, queue, MOST).unwrap();
        let gone = mount.create(ROOT, "gone", flags, 0o600).unwrap();
        mount.write(gone.0.nodeid, gone.1, 0, b"gone", 0).unwrap();
        mount
            .call(op::UNLINK, ROOT, Args::new().name("gone"), 0)
            .unwrap();
        let moved = mount.create(ROOT, "moved", flags, 0).unwrap();
        let dir = mount.mkdir(ROOT, "dir", 0o755).unwrap().nodeid;
        let fh = mount.opendir(dir).unwrap();
        (gone, moved, (dir, fh))
    };
    // The host does what the guest does not know.
    fs::rename(folder.path().join("moved"), folder.path().join("elsewhere")).unwrap();
    for _ in 0..3 {
        device.replace().unwrap();
        let queue = &mut device.device.queues[QUEUE];
        let mut mount = Mount::unmounted(&memory, queue, MOST);
        assert_eq!(mount.read(gone.0.nodeid, gone.1, 0, 10).unwrap(), b"gone");
        mount.write(moved.0.nodeid, moved.1, 0, b"text", 0).unwrap();
        let names = mount.readdir(dir.0, dir.1, false, 4096).unwrap();
        assert_eq!(names.len(), 2, "dots");
    }
    assert_eq!(fs::read(folder.path().join("elsewhere")).unwrap(), b"text");
}

#[test]
fn tables_that_make_no_sense_are_not_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let mut device = start(folder.path(), &common::options());
    let memory = device.device.memory.clone();
    let dir = {
        let queue = &mut device.device.queues[QUEUE];
        let mut mount = Mount::new(&memory, queue, MOST).unwrap();
        mount.mkdir(ROOT, "dir", 0o755).unwrap().nodeid
    };
    // What a process that the guest has taken over could leave behind: the parent of the first
    // node after the root is a node that never was.
    let state = device.kept().unwrap()[&0].try_clone().unwrap();
    let file = fs::File::from(state);
    for offset in (4096..8192).step_by(4) {
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xfe; 4], offset).unwrap();
    }
    device.replace().unwrap();
    {
        let queue = &mut device.device.queues[QUEUE];
        let mut mount = Mount::unmounted(&memory, queue, MOST);
        assert_eq!(mount.getattr(dir), Err(libc::ESTALE));
    }
    let queue = &mut device.device.queues[QUEUE];
    let mut mount: Mount<'_> = Mount::new(&memory as &Memory, queue, MOST).unwrap();
    assert!(mount.lookup(ROOT, "dir").is_ok(), "it can be mounted again");
}
