//! A guest that tries to get out of the share, to confuse the process or to exhaust it.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[macro_use]
mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use anemone_driver::fs::{Args, Attr, Mount, ROOT, op, read_args, set};
use anemone_driver::{Buffer, Descriptor, flags};
use common::Shared;

/// Random numbers (xorshift64*), the same ones for the same seed.
struct Random(u64);

impl Random {
    fn seeded() -> Self {
        let seed = match std::env::var("ANEMONE_SEED") {
            Ok(text) => text.parse().unwrap(),
            Err(_) => 0x5eed_f00d,
        };
        println!("ANEMONE_SEED={seed}");
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A share with ways out of it, and a secret outside.
fn with_ways_out() -> Shared {
    let shared = Shared::prepared(&[], |root| {
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join("dir/file"), b"inside").unwrap();
        symlink("../secret", root.join("relative")).unwrap();
        symlink(root.parent().unwrap().join("secret"), root.join("absolute")).unwrap();
        symlink("..", root.join("up")).unwrap();
        symlink("/", root.join("top")).unwrap();
        symlink("/proc/self/fd", root.join("proc")).unwrap();
    });
    fs::write(shared.outside("secret"), b"secret").unwrap();
    shared
}

#[test]
fn no_name_leads_out() {
    let mut shared = with_ways_out();
    let outside = shared.outside("secret");
    let mut mount = mount!(shared);
    let dir = mount.lookup(ROOT, "dir").unwrap().nodeid;
    for name in [
        "..",
        "../secret",
        "dir/file",
        "/etc/passwd",
        "/",
        "",
        "a/",
        &"x".repeat(256),
    ] {
        let refused = |result: Result<(), i32>, what: &str| {
            let error = result.unwrap_err();
            let right = [libc::EINVAL, libc::ENAMETOOLONG].contains(&error);
            assert!(right, "{what} of {name:?}: {error}");
        };
        if name != ".." {
            refused(mount.lookup(ROOT, name).map(drop), "LOOKUP");
        }
        refused(mount.mkdir(ROOT, name, 0o700).map(drop), "MKDIR");
        refused(
            mount.create(dir, name, libc::O_RDWR, 0o600).map(drop),
            "CREATE",
        );
        let one = Args::new().name(name);
        refused(
            mount.call(op::UNLINK, dir, one.clone(), 0).map(drop),
            "UNLINK",
        );
        refused(mount.call(op::RMDIR, dir, one, 0).map(drop), "RMDIR");
        let rename = Args::new().u64(ROOT).name("file").name(name);
        refused(mount.call(op::RENAME, dir, rename, 0).map(drop), "RENAME");
        let rename = Args::new().u64(dir).name(name).name("new");
        refused(mount.call(op::RENAME, ROOT, rename, 0).map(drop), "RENAME");
        let link = Args::new().name(name).name("target");
        refused(
            mount.call(op::SYMLINK, ROOT, link, 128).map(drop),
            "SYMLINK",
        );
    }
    // A link is a link and not what it points at.
    for name in ["relative", "absolute", "up", "top", "proc"] {
        let entry = mount.lookup(ROOT, name).unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(
            mount.open(entry.nodeid, libc::O_RDONLY).unwrap_err(),
            libc::ELOOP
        );
        assert_eq!(
            mount.opendir(entry.nodeid).unwrap_err(),
            libc::ENOTDIR,
            "{name}"
        );
        assert_eq!(
            mount.lookup(entry.nodeid, "secret").unwrap_err(),
            libc::ENOTDIR
        );
        assert_eq!(
            mount.create(ROOT, name, libc::O_RDWR, 0o600).unwrap_err(),
            libc::ELOOP
        );
        let size = Attr::default();
        assert!(mount.setattr(entry.nodeid, set::SIZE, &size, 0).is_err());
    }
    assert_eq!(mount.lookup(ROOT, "..").unwrap().nodeid, ROOT);
    assert_eq!(fs::read(outside).unwrap(), b"secret");
}

#[test]
fn what_the_host_puts_in_place_of_a_name_is_not_taken_for_it() {
    let mut shared = with_ways_out();
    let (root, outside) = (shared.root(), shared.outside("elsewhere"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), b"secret").unwrap();
    let mut mount = mount!(shared);
    let dir = mount.lookup(ROOT, "dir").unwrap().nodeid;
    let file = mount.lookup(dir, "file").unwrap().nodeid;
    let fh = mount.open(file, libc::O_RDWR).unwrap();
    // Another file, and a link out of the share, under the name that the guest knows.
    fs::rename(root.join("dir/file"), root.join("kept")).unwrap();
    fs::write(root.join("dir/file"), b"another").unwrap();
    let again = mount.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(mount.read(file, again, 0, 10).unwrap(), b"inside");
    mount.release(file, again).unwrap();
    fs::remove_file(root.join("dir/file")).unwrap();
    symlink(outside.join("file"), root.join("dir/file")).unwrap();
    mount.write(file, fh, 0, b"INSIDE", 0).unwrap();
    assert_eq!(fs::read(root.join("kept")).unwrap(), b"INSIDE");
    mount.release(file, fh).unwrap();
    let gone = mount.open(file, libc::O_RDONLY).unwrap_err();
    assert_eq!(gone, libc::ESTALE, "no open file says where it is");
    assert_eq!(mount.getattr(file), Err(libc::ESTALE));
    assert_eq!(
        mount.lookup(ROOT, "kept").unwrap().nodeid,
        file,
        "found again"
    );
    assert_eq!(mount.getattr(file).unwrap().size, 6);
    // A directory that becomes a link out of the share.
    let before = mount.mkdir(dir, "sub", 0o755).unwrap().nodeid;
    fs::remove_file(root.join("dir/file")).unwrap();
    fs::rename(root.join("dir"), root.join("moved")).unwrap();
    symlink(&outside, root.join("dir")).unwrap();
    assert!(mount.getattr(dir).is_ok(), "it is open, wherever it is");
    assert_eq!(mount.lookup(dir, "file").unwrap_err(), libc::ENOENT);
    assert!(mount.getattr(before).is_ok());
    let link = mount.lookup(ROOT, "dir").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    // A directory that the host takes out of the share: nothing in it can be opened any more.
    fs::write(root.join("moved/inner"), b"text").unwrap();
    let inner = mount.lookup(dir, "inner").unwrap().nodeid;
    fs::rename(root.join("moved"), outside.join("taken")).unwrap();
    assert!(mount.open(inner, libc::O_RDONLY).is_err());
    assert!(mount.create(dir, "new", libc::O_RDWR, 0o600).is_err());
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"secret");
}

#[test]
fn races_with_the_host_never_lead_out() {
    let mut shared = with_ways_out();
    let (root, outside) = (shared.root(), shared.outside("elsewhere"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), b"secret").unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (mut read, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The directory is there, a link out of the share is there, in turns.
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::rename(root.join("dir"), root.join("aside")).unwrap();
                symlink(&outside, root.join("dir")).unwrap();
                fs::remove_file(root.join("dir")).unwrap();
                fs::rename(root.join("aside"), root.join("dir")).unwrap();
            }
        });
        let mut mount = mount!(shared);
        // The host may be stopped for a while in any state, also in one where nothing is there.
        let mut tries = 0;
        while tries < 3000 || read < 100 {
            tries += 1;
            let Ok(dir) = mount.lookup(ROOT, "dir") else {
                refused += 1;
                continue;
            };
            let opened = mount.lookup(dir.nodeid, "file").and_then(|file| {
                let fh = mount.open(file.nodeid, libc::O_RDWR)?;
                let text = mount.read(file.nodeid, fh, 0, 10);
                mount.release(file.nodeid, fh).unwrap();
                mount.forget(file.nodeid, 1);
                text
            });
            match opened {
                Ok(text) => {
                    assert_eq!(text, b"inside");
                    read += 1;
                }
                Err(_) => refused += 1,
            }
            mount.forget(dir.nodeid, 1);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    println!("{read} times read, {refused} times refused");
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"secret");
}

#[test]
fn numbers_that_were_never_given_out_are_refused() {
    let mut shared = with_ways_out();
    let mut mount = mount!(shared);
    let dir = mount.lookup(ROOT, "dir").unwrap().nodeid;
    let file = mount.lookup(dir, "file").unwrap().nodeid;
    let fh = mount.open(file, libc::O_RDWR).unwrap();
    for nodeid in [0, 2, 99, u64::MAX, file + 1, file ^ 1 << 32, 1 << 32 | 1] {
        assert_eq!(mount.getattr(nodeid), Err(libc::ESTALE), "{nodeid:#x}");
        assert_eq!(mount.lookup(nodeid, "x").unwrap_err(), libc::ESTALE);
        mount.forget(nodeid, u64::MAX);
    }
    for handle in [0, fh + 1, fh ^ 1 << 32, u64::MAX] {
        assert_eq!(
            mount.read(file, handle, 0, 1),
            Err(libc::EBADF),
            "{handle:#x}"
        );
        assert_eq!(mount.release(file, handle), Ok(()));
    }
    assert_eq!(
        mount.read(dir, fh, 0, 1),
        Err(libc::EBADF),
        "a handle of another file"
    );
    assert_eq!(mount.readdir(file, fh, false, 500), Err(libc::ENOTDIR));
    let fh_dir = mount.opendir(dir).unwrap();
    assert_eq!(mount.read(dir, fh_dir, 0, 10), Err(libc::EISDIR));
    mount.forget(ROOT, u64::MAX);
    assert!(mount.getattr(ROOT).is_ok());
    mount.forget(file, u64::MAX);
    assert_eq!(
        mount.read(file, fh, 0, 10).unwrap(),
        b"inside",
        "it is open"
    );
    // Offsets past what a file can have, more data than there is.
    assert_eq!(mount.read(file, fh, u64::MAX, 10), Err(libc::EINVAL));
    assert_eq!(
        mount.write(file, fh, u64::MAX - 2, b"abc", 0),
        Err(libc::EINVAL)
    );
    let call = Args::new().u64(fh).u64(0).u32(500).u32(0).u64(0).u64(0);
    assert_eq!(mount.call(op::WRITE, file, call, 8), Err(libc::EINVAL));
    assert_eq!(
        mount
            .call(op::READ, file, read_args(fh, 0, u32::MAX), 10)
            .unwrap(),
        b"inside"
    );
    assert_eq!(
        mount
            .readdir(dir, fh_dir, true, u32::MAX)
            .map(|list| list.len()),
        Ok(3)
    );
}

#[test]
fn requests_that_are_cut_short_are_refused() {
    let mut shared = with_ways_out();
    let mut mount = mount!(shared);
    let file = mount.walk("dir/file").unwrap().nodeid;
    for opcode in 0..60 {
        for length in [0, 1, 3, 7, 8, 15] {
            if opcode == op::DESTROY || opcode == op::FORGET {
                continue;
            }
            // Zeroes, which as far as they go are valid arguments of some.
            let reply = mount.call(opcode, file, Args::new().bytes(&vec![0; length]), 200);
            if reply.is_ok() {
                let harmless = [
                    op::BATCH_FORGET,
                    op::READLINK,
                    op::STATFS,
                    op::RELEASE,
                    op::RELEASEDIR,
                ]
                .contains(&opcode);
                let with_enough =
                    [op::OPEN, op::LOOKUP, op::ACCESS, op::LISTXATTR, op::SYNCFS].contains(&opcode);
                assert!(
                    harmless || with_enough,
                    "opcode {opcode}, {length} bytes: {reply:?}"
                );
            }
        }
    }
    assert_eq!(mount.getattr(file).unwrap().size, 6);
}

#[test]
fn chains_that_are_no_requests_come_back_unread() {
    let mut shared = with_ways_out();
    let device = &mut shared.device;
    let memory = device.memory.clone();
    let place = memory.alloc(8192, 4096);
    let queue = &mut device.queues[common::QUEUE];
    let buffer = |len| Buffer { addr: place, len };
    for (readable, writable) in [
        (vec![buffer(39)], vec![buffer(16)]),
        (vec![buffer(40)], vec![buffer(16)]),
        (vec![], vec![buffer(100)]),
        (vec![buffer(8000)], vec![]),
    ] {
        queue.add(&readable, &writable).unwrap();
        queue.publish();
        queue.kick();
        assert!(queue.wait(Duration::from_secs(20)).unwrap());
        assert_eq!(queue.take_used().unwrap().len, 0);
    }
    // A length in the header that is more than there is, and an address outside memory.
    memory.write(place, &[0xff; 40]);
    queue.add(&[buffer(40)], &[buffer(16)]).unwrap();
    queue.publish();
    queue.kick();
    assert!(queue.wait(Duration::from_secs(20)).unwrap());
    assert_eq!(queue.take_used().unwrap().len, 0);
    queue.write_descriptor(
        7,
        &Descriptor {
            addr: 1 << 60,
            len: 40,
            flags: flags::WRITE,
            next: 0,
        },
    );
    queue.offer_raw(7);
    assert!(queue.wait(Duration::from_secs(20)).unwrap());
    assert_eq!(queue.take_used().unwrap().len, 0);
    let mut mount = mount!(shared);
    assert!(mount.getattr(ROOT).is_ok());
}

#[test]
fn descriptors_are_bounded() {
    let mut shared = with_ways_out();
    let mut mount = mount!(shared);
    let file = mount.walk("dir/file").unwrap().nodeid;
    let mut open = Vec::new();
    let error = loop {
        match mount.open(file, libc::O_RDONLY) {
            Ok(fh) => open.push(fh),
            Err(error) => break error,
        }
    };
    println!("{} files were open", open.len());
    assert!([libc::ENFILE, libc::EMFILE].contains(&error), "{error}");
    assert_eq!(mount.read(file, open[0], 0, 10).unwrap(), b"inside");
    for fh in open.drain(..) {
        mount.release(file, fh).unwrap();
    }
    assert!(mount.open(file, libc::O_RDONLY).is_ok());
}

/// Requests of all kinds with arguments that are now right, now wrong.
#[test]
fn random_requests_do_no_harm() {
    const REQUESTS: u64 = 20_000;
    let mut shared = with_ways_out();
    let (outside, root) = (shared.outside("secret"), shared.root());
    let mut random = Random::seeded();
    {
        let mut mount = mount!(shared);
        let mut nodes = vec![ROOT];
        let mut handles = vec![0];
        let mut answers = [0u64; 2];
        for _ in 0..REQUESTS {
            let opcode = 1 + random.below(53) as u32;
            if opcode == op::INIT || (opcode == op::DESTROY && random.below(50) != 0) {
                continue;
            }
            let some = |random: &mut Random, list: &[u64]| match random.below(8) {
                0 => random.next(),
                _ => list[random.below(list.len() as u64) as usize],
            };
            let node = some(&mut random, &nodes);
            let mut args = Args::new();
            for _ in 0..random.below(5) {
                args = match random.below(6) {
                    0 => args.u32(random.next() as u32),
                    1 => args.u32(random.below(4) as u32),
                    2 => args.u64(some(&mut random, &handles)),
                    3 => args.u64(some(&mut random, &nodes)),
                    4 => args.u64(random.below(5000)),
                    _ => {
                        let names = [
                            "dir", "file", "new", "relative", "..", "top", "x/y", "user.a",
                        ];
                        args.name(names[random.below(names.len() as u64) as usize])
                    }
                };
            }
            let reply = known(&mut mount, &mut random, opcode, node, &handles, args);
            answers[usize::from(reply.is_ok())] += 1;
            if let Ok(bytes) = reply {
                let number = |at: usize| {
                    let part = bytes.get(at..at + 8)?;
                    Some(u64::from_ne_bytes(part.try_into().unwrap()))
                };
                match opcode {
                    op::LOOKUP | op::MKDIR | op::MKNOD | op::SYMLINK | op::LINK => {
                        nodes.extend(number(0))
                    }
                    op::CREATE => {
                        nodes.extend(number(0));
                        handles.extend(number(128));
                    }
                    op::OPEN | op::OPENDIR => handles.extend(number(0)),
                    op::DESTROY => {
                        let args = Args::new().u32(7).u32(38).u32(0).u32(0).bytes(&[0; 48]);
                        mount.call(op::INIT, 0, args, 64).unwrap();
                        nodes.truncate(1);
                    }
                    _ => {}
                }
            }
        }
        println!("{} requests failed, {} succeeded", answers[0], answers[1]);
        assert!(answers[1] > REQUESTS / 50);
        assert!(mount.getattr(ROOT).is_ok());
    }
    assert_eq!(fs::read(outside).unwrap(), b"secret");
    let parent: Vec<_> = fs::read_dir(root.parent().unwrap()).unwrap().collect();
    assert_eq!(parent.len(), 2, "share and secret, and nothing else");
    assert!(shared.process.is_running());
}

/// A request that is well-formed half of the time.
fn known(
    mount: &mut Mount<'_>,
    random: &mut Random,
    opcode: u32,
    node: u64,
    handles: &[u64],
    args: Args,
) -> Result<Vec<u8>, i32> {
    let fh = handles[random.below(handles.len() as u64) as usize];
    let number = random.below(6);
    let name = ["a", "b", "dir", "file", "sub", "relative"][number as usize];
    let args = match opcode {
        _ if random.below(2) == 0 => args,
        op::LOOKUP | op::UNLINK | op::RMDIR => Args::new().name(name),
        op::MKDIR => Args::new().u32(0o755).u32(0).name(name),
        op::MKNOD => Args::new()
            .u32(libc::S_IFREG | 0o644)
            .u32(0)
            .u64(0)
            .name(name),
        op::SYMLINK => Args::new().name(name).name("../secret"),
        op::RENAME => Args::new().u64(node).name(name).name("b"),
        op::LINK => Args::new().u64(node).name(name),
        op::CREATE => Args::new()
            .u32(libc::O_RDWR as u32)
            .u32(0o644)
            .u64(0)
            .name(name),
        op::OPEN | op::OPENDIR => Args::new().u32(number as u32 & 2).u32(0),
        op::READ | op::READDIR | op::READDIRPLUS => read_args(fh, random.below(3), 4096),
        op::GETATTR => Args::new().u32(1).u32(0).u64(fh),
        op::RELEASE => Args::new().u64(fh).u64(0).u64(0),
        op::FORGET => {
            mount.forget(node, number);
            return Err(0);
        }
        _ => args,
    };
    mount.call(opcode, node, args, 4096)
}
