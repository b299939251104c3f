//! Every request, against the real process; the host's file system says what is right.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

#[macro_use]
mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{DirEntryExt, FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use anemone_driver::fs::{
    Args, Attr, Call, Entry, Mount, ROOT, Requests, op, read_args, set, write_call,
};
use anemone_driver::{Bounced, Options};
use common::Shared;

const PATIENCE: Duration = Duration::from_secs(20);

fn same(attr: &Attr, path: &std::path::Path) {
    let host = fs::symlink_metadata(path).unwrap();
    let told = (
        attr.ino,
        attr.size,
        attr.mode,
        attr.nlink,
        attr.mtime,
        attr.blocks,
    );
    let is = (
        host.ino(),
        host.len(),
        host.mode(),
        host.nlink() as u32,
        host.mtime() as u64,
        host.blocks(),
    );
    assert_eq!(told, is, "{}", path.display());
    assert_eq!(
        (attr.uid, attr.gid),
        (host.uid(), host.gid()),
        "{}",
        path.display()
    );
}

#[test]
fn the_configuration_has_tag_and_queues() {
    let mut shared = Shared::start(&["--queues", "3"]);
    let config = shared.device.frontend.config(0, 40).unwrap();
    assert_eq!(&config[..5], b"test\0");
    assert_eq!(config[36..], 3u32.to_le_bytes());
}

#[test]
fn init_agrees_on_what_both_know() {
    let mut shared = Shared::start(&[]);
    let mut mount = mount!(shared);
    let init = |major: u32, minor: u32, flags: u32| {
        Args::new()
            .u32(major)
            .u32(minor)
            .u32(4096)
            .u32(flags)
            .bytes(&[0; 48])
    };
    let word = |reply: &[u8], at: usize| u32::from_ne_bytes(reply[at..at + 4].try_into().unwrap());
    let reply = mount
        .call(op::INIT, 0, init(7, 31, 1 << 22 | 1 << 13), 64)
        .unwrap();
    assert_eq!((word(&reply, 0), word(&reply, 4)), (7, 31));
    assert_eq!(
        (word(&reply, 8), word(&reply, 12)),
        (4096, 1 << 22 | 1 << 13)
    );
    assert_eq!(word(&reply, 20), 1 << 20, "max_write");
    let reply = mount.call(op::INIT, 0, init(8, 0, 0), 64).unwrap();
    assert_eq!(word(&reply, 0), 7, "the guest is to come down");
    assert_eq!(
        mount.call(op::INIT, 0, init(6, 0, 0), 64),
        Err(libc::EPROTO)
    );
    assert_eq!(
        mount.call(op::INIT, 0, init(7, 12, 0), 64),
        Err(libc::EPROTO)
    );
    // Another mount knows nothing of the one before.
    let entry = mount.mkdir(ROOT, "dir", 0o755).unwrap();
    mount.call(op::INIT, 0, init(7, 38, 0), 64).unwrap();
    assert_eq!(mount.getattr(entry.nodeid), Err(libc::ESTALE));
    assert_eq!(
        mount.getattr(ROOT).unwrap().mode & libc::S_IFMT,
        libc::S_IFDIR
    );
    assert_eq!(mount.call(op::DESTROY, 0, Args::new(), 0), Ok(Vec::new()));
    assert_eq!(mount.getattr(ROOT), Err(libc::ESTALE));
}

#[test]
fn names_are_looked_up() {
    let mut shared = Shared::prepared(&[], |root| {
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        fs::write(root.join("a/b/c/file"), b"text").unwrap();
        symlink("a/b", root.join("link")).unwrap();
    });
    let paths = ["a", "a/b", "a/b/c", "a/b/c/file", "link"].map(|p| (p, shared.path(p)));
    let root = shared.root();
    let mut mount = mount!(shared);
    for (path, host) in &paths {
        let entry = mount.walk(path).unwrap();
        same(&entry.attr, host);
        assert_eq!(entry.entry_valid, 1);
        assert_eq!(
            mount.walk(path).unwrap().nodeid,
            entry.nodeid,
            "one number for one file"
        );
        same(&mount.getattr(entry.nodeid).unwrap(), host);
    }
    same(&mount.getattr(ROOT).unwrap(), &root);
    assert_eq!(mount.walk("a/none").unwrap_err(), libc::ENOENT);
    // For a guest that exports what it has mounted.
    let b = mount.walk("a/b").unwrap().nodeid;
    assert_eq!(mount.lookup(b, ".").unwrap().nodeid, b);
    assert_eq!(
        mount.lookup(b, "..").unwrap().nodeid,
        mount.walk("a").unwrap().nodeid
    );
    assert_eq!(
        mount.lookup(ROOT, "..").unwrap().nodeid,
        ROOT,
        "the share is the top"
    );
    // Forgotten as often as looked up, a node is no more.
    let file = mount.walk("a/b/c/file").unwrap().nodeid;
    mount.forget(file, 3);
    assert!(mount.getattr(file).is_err());
    let file = mount.walk("a/b/c/file").unwrap().nodeid;
    let batch = Args::new().u32(2).u32(0).u64(file).u64(1).u64(b).u64(1);
    let call = anemone_driver::fs::Call {
        opcode: op::BATCH_FORGET,
        args: batch.done(),
        ..Default::default()
    };
    drop(mount);
    let device = &mut shared.device;
    let memory = device.memory.clone();
    let mut requests = anemone_driver::fs::Requests::new(&memory, 128, 1, 4096);
    // Over the queue for urgent requests.
    requests
        .submit(&memory, &mut device.queues[0], &call)
        .unwrap();
    device.queues[0].publish();
    device.queues[0].kick();
    assert!(
        device.queues[0]
            .wait(std::time::Duration::from_secs(20))
            .unwrap()
    );
    assert_eq!(
        requests
            .finish(&memory, &mut device.queues[0])
            .unwrap()
            .reply,
        None
    );
    // What may take longer does not belong there.
    let lookup = anemone_driver::fs::Call {
        opcode: op::LOOKUP,
        nodeid: ROOT,
        args: Args::new().name("b").done(),
        room: Some(128),
        ..Default::default()
    };
    let urgent = &mut device.queues[0];
    requests.submit(&memory, urgent, &lookup).unwrap();
    urgent.publish();
    urgent.kick();
    assert!(urgent.wait(std::time::Duration::from_secs(20)).unwrap());
    let reply = requests.finish(&memory, urgent).unwrap().reply;
    assert_eq!(reply, Some(Err(libc::ENOSYS)));
    let queue = &mut device.queues[common::QUEUE];
    let mut mount = anemone_driver::fs::Mount::unmounted(&memory, queue, 4096);
    assert_eq!(mount.getattr(file), Err(libc::ESTALE));
    assert!(mount.getattr(b).is_ok(), "looked up more than once");
}

#[test]
fn files_are_made_read_and_written() {
    let mut shared = Shared::start(&[]);
    let path = shared.path("file");
    let other = shared.path("other");
    let mut mount = mount!(shared);
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
    let (entry, fh) = mount.create(ROOT, "file", flags, 0o640).unwrap();
    same(&entry.attr, &path);
    assert_eq!(entry.attr.mode & 0o7777, 0o640);
    assert_eq!(
        mount.create(ROOT, "file", flags, 0o640).unwrap_err(),
        libc::EEXIST
    );
    let data: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    for (number, part) in data.chunks(common::DATA as usize).enumerate() {
        let offset = u64::from(common::DATA) * number as u64;
        assert_eq!(
            mount.write(entry.nodeid, fh, offset, part, 0),
            Ok(part.len() as u32)
        );
    }
    assert!(fs::read(&path).unwrap() == data);
    let mut read = Vec::new();
    loop {
        let part = mount
            .read(entry.nodeid, fh, read.len() as u64, 100_000)
            .unwrap();
        if part.is_empty() {
            break;
        }
        read.extend(part);
    }
    assert!(read == data);
    // A file that was opened to be read is not written, and the other way round.
    let reader = mount.open(entry.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(
        mount.write(entry.nodeid, reader, 0, b"x", 0),
        Err(libc::EBADF)
    );
    let writer = mount
        .open(entry.nodeid, libc::O_WRONLY | libc::O_TRUNC)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(mount.read(entry.nodeid, writer, 0, 10), Err(libc::EBADF));
    // Data go to the end of the file wherever that is, if the guest appends.
    fs::write(&path, b"host").unwrap();
    assert_eq!(
        mount.write(entry.nodeid, writer, 0, b" guest", libc::O_APPEND),
        Ok(6)
    );
    assert_eq!(fs::read(&path).unwrap(), b"host guest");
    for fh in [fh, reader, writer] {
        mount.release(entry.nodeid, fh).unwrap();
        assert_eq!(mount.read(entry.nodeid, fh, 0, 10), Err(libc::EBADF));
    }
    // Without O_EXCL a file that is there is opened.
    let (again, fh) = mount
        .create(ROOT, "file", libc::O_RDWR | libc::O_TRUNC, 0o600)
        .unwrap();
    assert_eq!(
        (again.nodeid, again.attr.mode & 0o777),
        (entry.nodeid, 0o640)
    );
    assert_eq!(fs::read(&path).unwrap(), b"");
    // Space, holes, copies.
    let allocate =
        |fh, offset, length, mode| Args::new().u64(fh).u64(offset).u64(length).u32(mode).u32(0);
    mount
        .call(op::FALLOCATE, entry.nodeid, allocate(fh, 0, 1 << 20, 0), 0)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
    let collapse = libc::FALLOC_FL_COLLAPSE_RANGE as u32;
    let refused = mount.call(
        op::FALLOCATE,
        entry.nodeid,
        allocate(fh, 0, 4096, collapse),
        0,
    );
    assert_eq!(refused, Err(libc::EOPNOTSUPP));
    mount.write(entry.nodeid, fh, 0, &[7; 8192], 0).unwrap();
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    mount
        .call(op::FALLOCATE, entry.nodeid, allocate(fh, 0, 4096, punch), 0)
        .unwrap();
    let mut bytes = [1; 8192];
    File::open(&path)
        .unwrap()
        .read_exact_at(&mut bytes, 0)
        .unwrap();
    assert!(bytes[..4096] == [0; 4096] && bytes[4096..] == [7; 4096]);
    let seek = |fh, offset, whence: i32| Args::new().u64(fh).u64(offset).u32(whence as u32).u32(0);
    let reply = mount
        .call(op::LSEEK, entry.nodeid, seek(fh, 0, libc::SEEK_DATA), 8)
        .unwrap();
    assert_eq!(reply, 4096u64.to_ne_bytes());
    assert_eq!(
        mount.call(op::LSEEK, entry.nodeid, seek(fh, 0, libc::SEEK_SET), 8),
        Err(libc::EINVAL)
    );
    let (target, to) = mount.create(ROOT, "other", libc::O_RDWR, 0o600).unwrap();
    let copy = Args::new()
        .u64(fh)
        .u64(4096)
        .u64(target.nodeid)
        .u64(to)
        .u64(10)
        .u64(4096)
        .u64(0);
    let reply = mount
        .call(op::COPY_FILE_RANGE, entry.nodeid, copy, 8)
        .unwrap();
    assert_eq!(reply[..4], 4096u32.to_ne_bytes());
    assert_eq!(fs::read(&other).unwrap()[10..], [7; 4096]);
    let sync = |flags| Args::new().u64(fh).u32(flags).u32(0);
    assert_eq!(
        mount.call(op::FSYNC, entry.nodeid, sync(0), 0),
        Ok(Vec::new())
    );
    assert_eq!(
        mount.call(op::FSYNC, entry.nodeid, sync(1), 0),
        Ok(Vec::new())
    );
    assert_eq!(
        mount.call(op::SYNCFS, ROOT, Args::new().u64(0), 0),
        Ok(Vec::new())
    );
    let flush = Args::new().u64(fh).u64(0).u64(0);
    assert_eq!(
        mount.call(op::FLUSH, entry.nodeid, flush, 0),
        Err(libc::ENOSYS)
    );
}

#[test]
fn names_are_made_moved_and_removed() {
    let mut shared = Shared::start(&[]);
    let path = |name: &str| shared.path(name);
    let (dir, sub, fifo, link, hard, moved, socket) = (
        path("dir"),
        path("dir/sub"),
        path("fifo"),
        path("link"),
        path("hard"),
        path("dir/moved"),
        path("socket"),
    );
    let root = shared.root();
    let mut mount = mount!(shared);
    let made = mount.mkdir(ROOT, "dir", 0o750).unwrap();
    same(&made.attr, &dir);
    assert_eq!(made.attr.mode & 0o7777, 0o750);
    assert_eq!(mount.mkdir(ROOT, "dir", 0o750).unwrap_err(), libc::EEXIST);
    let sub_entry = mount.mkdir(made.nodeid, "sub", 0o700).unwrap();
    same(&sub_entry.attr, &sub);

    let mknod = |mode: u32, name: &str| Args::new().u32(mode).u32(0).u32(0).u32(0).name(name);
    mount
        .call(op::MKNOD, ROOT, mknod(libc::S_IFIFO | 0o600, "fifo"), 128)
        .unwrap();
    assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());
    mount
        .call(
            op::MKNOD,
            ROOT,
            mknod(libc::S_IFSOCK | 0o600, "socket"),
            128,
        )
        .unwrap();
    assert!(
        fs::symlink_metadata(&socket)
            .unwrap()
            .file_type()
            .is_socket()
    );
    let node = Entry::from_bytes(
        &mount
            .call(op::MKNOD, ROOT, mknod(libc::S_IFREG | 0o604, "file"), 128)
            .unwrap(),
    );
    assert_eq!(node.attr.mode, libc::S_IFREG | 0o604);
    // What only the guest's own kernel may open.
    let pipe = mount.lookup(ROOT, "fifo").unwrap().nodeid;
    assert_eq!(mount.open(pipe, libc::O_RDONLY).unwrap_err(), libc::EINVAL);
    assert_eq!(
        mount.open(made.nodeid, libc::O_RDONLY).unwrap_err(),
        libc::EISDIR
    );

    let args = Args::new().name("link").name("../../etc/passwd");
    let entry = Entry::from_bytes(&mount.call(op::SYMLINK, ROOT, args, 128).unwrap());
    same(&entry.attr, &link);
    assert_eq!(
        mount
            .call(op::READLINK, entry.nodeid, Args::new(), 4096)
            .unwrap(),
        b"../../etc/passwd"
    );
    assert_eq!(
        mount.open(entry.nodeid, libc::O_RDONLY).unwrap_err(),
        libc::ELOOP
    );

    let args = Args::new().u64(node.nodeid).name("hard");
    let entry = Entry::from_bytes(&mount.call(op::LINK, ROOT, args, 128).unwrap());
    assert_eq!((entry.nodeid, entry.attr.nlink), (node.nodeid, 2));
    same(&entry.attr, &hard);

    let rename = |to: u64, from: &str, name: &str| Args::new().u64(to).name(from).name(name);
    mount
        .call(op::RENAME, ROOT, rename(made.nodeid, "hard", "moved"), 0)
        .unwrap();
    assert!(!hard.exists() && moved.exists());
    same(&mount.getattr(node.nodeid).unwrap(), &moved);
    let rename2 = |to: u64, flags: u32, from: &str, name: &str| {
        Args::new().u64(to).u32(flags).u32(0).name(from).name(name)
    };
    let args = rename2(made.nodeid, libc::RENAME_NOREPLACE, "file", "moved");
    assert_eq!(mount.call(op::RENAME2, ROOT, args, 0), Err(libc::EEXIST));
    let args = rename2(made.nodeid, libc::RENAME_WHITEOUT, "file", "moved");
    assert_eq!(mount.call(op::RENAME2, ROOT, args, 0), Err(libc::EINVAL));
    let args = rename2(ROOT, libc::RENAME_EXCHANGE, "sub", "fifo");
    mount.call(op::RENAME2, made.nodeid, args, 0).unwrap();
    assert!(fs::symlink_metadata(&sub).unwrap().file_type().is_fifo() && fifo.is_dir());
    same(&mount.getattr(sub_entry.nodeid).unwrap(), &fifo);
    same(&mount.getattr(pipe).unwrap(), &sub);
    // A directory's children move with it.
    let deep = mount.mkdir(sub_entry.nodeid, "deep", 0o755).unwrap();
    mount
        .call(op::RENAME, ROOT, rename(made.nodeid, "fifo", "far"), 0)
        .unwrap();
    same(&mount.getattr(deep.nodeid).unwrap(), &dir.join("far/deep"));

    let name = |name: &str| Args::new().name(name);
    assert_eq!(
        mount.call(op::UNLINK, made.nodeid, name("far"), 0),
        Err(libc::EISDIR)
    );
    assert_eq!(
        mount.call(op::RMDIR, made.nodeid, name("far"), 0),
        Err(libc::ENOTEMPTY)
    );
    mount
        .call(op::RMDIR, sub_entry.nodeid, name("deep"), 0)
        .unwrap();
    mount.call(op::RMDIR, made.nodeid, name("far"), 0).unwrap();
    assert!(
        mount.getattr(deep.nodeid).is_ok_and(|attr| attr.nlink == 0),
        "removed, in the cache"
    );
    // An open file outlives its name.
    let fh = mount.open(node.nodeid, libc::O_RDWR).unwrap();
    for (parent, entry) in [(ROOT, "file"), (made.nodeid, "moved"), (made.nodeid, "sub")] {
        mount.call(op::UNLINK, parent, name(entry), 0).unwrap();
    }
    mount.write(node.nodeid, fh, 0, b"still here", 0).unwrap();
    assert_eq!(mount.read(node.nodeid, fh, 0, 100).unwrap(), b"still here");
    assert_eq!(mount.getattr(node.nodeid).unwrap().nlink, 0);
    let again = mount.open(node.nodeid, libc::O_RDONLY).unwrap();
    assert_eq!(mount.read(node.nodeid, again, 6, 100).unwrap(), b"here");
    mount
        .setattr(
            node.nodeid,
            set::MODE,
            &Attr {
                mode: 0o611,
                ..Attr::default()
            },
            0,
        )
        .unwrap();
    assert_eq!(mount.getattr(node.nodeid).unwrap().mode & 0o777, 0o611);
    mount.release(node.nodeid, fh).unwrap();
    mount.release(node.nodeid, again).unwrap();
    assert_eq!(mount.getattr(node.nodeid), Err(libc::ESTALE));
    assert_eq!(
        mount.call(op::UNLINK, ROOT, name("file"), 0),
        Err(libc::ENOENT)
    );
    let left: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[test]
fn attributes_are_set() {
    let mut shared = Shared::prepared(&[], |root| {
        fs::write(root.join("file"), b"0123456789").unwrap();
        symlink("file", root.join("link")).unwrap();
    });
    let (path, link) = (shared.path("file"), shared.path("link"));
    let root = shared.root();
    let mut mount = mount!(shared);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    let values = Attr {
        size: 4,
        mode: 0o4711,
        atime: 1_000_000,
        mtime: 2_000_000,
        ..Attr::default()
    };
    let attr = mount
        .setattr(
            node,
            set::SIZE | set::MODE | set::ATIME | set::MTIME,
            &values,
            0,
        )
        .unwrap();
    assert_eq!(
        (attr.size, attr.atime, attr.mtime),
        (4, 1_000_000, 2_000_000)
    );
    assert_eq!(attr.mode & 0o7777, 0o4711);
    same(&attr, &path);
    let attr = mount
        .setattr(node, set::MTIME | set::MTIME_NOW, &values, 0)
        .unwrap();
    assert!(attr.mtime > 2_000_000 && attr.atime == 1_000_000);
    assert_eq!(fs::read(&path).unwrap(), b"0123");
    // By a handle, although the mode allows nobody to open the file.
    let fh = mount.open(node, libc::O_RDWR).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o0)).unwrap();
    let attr = mount
        .setattr(node, set::SIZE | set::FH, &Attr { size: 2, ..values }, fh)
        .unwrap();
    assert_eq!(attr.size, 2);
    // Of a link, not of what it points at.
    let node = mount.lookup(ROOT, "link").unwrap().nodeid;
    let attr = mount.setattr(node, set::MTIME, &values, 0).unwrap();
    same(&attr, &link);
    assert_eq!(
        mount.setattr(node, set::MODE, &values, 0),
        Err(libc::EOPNOTSUPP)
    );
    // Of the shared directory itself.
    let values = Attr {
        mode: 0o711,
        ..values
    };
    let attr = mount
        .setattr(ROOT, set::MODE | set::MTIME, &values, 0)
        .unwrap();
    same(&attr, &root);
    let reply = mount.call(op::STATFS, ROOT, Args::new(), 80).unwrap();
    // SAFETY: plain numbers.
    let mut host: libc::statvfs = unsafe { std::mem::zeroed() };
    let text = std::ffi::CString::new(root.to_str().unwrap()).unwrap();
    // SAFETY: a C string and room for the result.
    assert_eq!(unsafe { libc::statvfs(text.as_ptr(), &raw mut host) }, 0);
    assert_eq!(reply[..8], host.f_blocks.to_ne_bytes());
    assert_eq!(reply[40..44], (host.f_bsize as u32).to_ne_bytes());
    assert_eq!(
        mount.call(op::ACCESS, ROOT, Args::new().u32(7).u32(0), 0),
        Ok(Vec::new())
    );
}

#[test]
fn extended_attributes_are_those_of_users() {
    let mut shared = Shared::prepared(&[], |root| {
        fs::write(root.join("file"), b"").unwrap();
        symlink("file", root.join("link")).unwrap();
    });
    let path = shared.path("file");
    let mut mount = mount!(shared);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    let put = |name: &str, value: &[u8], flags: i32| {
        Args::new()
            .u32(value.len() as u32)
            .u32(flags as u32)
            .name(name)
            .bytes(value)
    };
    let get = |name: &str, size: u32| Args::new().u32(size).u32(0).name(name);
    match mount.call(op::SETXATTR, node, put("user.one", b"value", 0), 0) {
        Err(libc::EOPNOTSUPP) => {
            panic!("{} is on a file system without attributes", path.display())
        }
        other => drop(other.unwrap()),
    }
    let mut buffer = [0u8; 16];
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: C strings, and a buffer of the length given.
    let n = unsafe {
        libc::getxattr(
            name.as_ptr(),
            c"user.one".as_ptr(),
            buffer.as_mut_ptr().cast(),
            16,
        )
    };
    assert_eq!(&buffer[..n as usize], b"value");
    let new = mount.call(
        op::SETXATTR,
        node,
        put("user.one", b"x", libc::XATTR_CREATE),
        0,
    );
    assert_eq!(new, Err(libc::EEXIST));
    let old = mount.call(
        op::SETXATTR,
        node,
        put("user.two", b"x", libc::XATTR_REPLACE),
        0,
    );
    assert_eq!(old, Err(libc::ENODATA));
    let big = vec![b'v'; 3000];
    mount
        .call(op::SETXATTR, node, put("user.big", &big, 0), 0)
        .unwrap();
    assert_eq!(
        mount
            .call(op::GETXATTR, node, get("user.one", 100), 100)
            .unwrap(),
        b"value"
    );
    assert_eq!(
        mount
            .call(op::GETXATTR, node, get("user.big", 4000), 4000)
            .unwrap(),
        big
    );
    assert_eq!(
        mount.call(op::GETXATTR, node, get("user.big", 100), 100),
        Err(libc::ERANGE)
    );
    let size = mount
        .call(op::GETXATTR, node, get("user.one", 0), 8)
        .unwrap();
    assert_eq!(size[..4], 5u32.to_ne_bytes());
    let list = mount
        .call(op::LISTXATTR, node, Args::new().u32(500).u32(0), 500)
        .unwrap();
    let mut names: Vec<_> = list.split(|&b| b == 0).filter(|n| !n.is_empty()).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"user.big"[..], b"user.one"]);
    let short = mount.call(op::LISTXATTR, node, Args::new().u32(5).u32(0), 500);
    assert_eq!(short, Err(libc::ERANGE));
    mount
        .call(op::REMOVEXATTR, node, Args::new().name("user.one"), 0)
        .unwrap();
    assert_eq!(
        mount.call(op::REMOVEXATTR, node, Args::new().name("user.one"), 0),
        Err(libc::ENODATA)
    );
    assert_eq!(
        mount.call(op::GETXATTR, node, get("user.one", 100), 100),
        Err(libc::ENODATA)
    );
    for name in [
        "security.selinux",
        "trusted.x",
        "system.posix_acl_access",
        "user",
        "",
    ] {
        let set = mount.call(op::SETXATTR, node, put(name, b"x", 0), 0);
        assert_eq!(set, Err(libc::EOPNOTSUPP), "{name}");
        assert_eq!(
            mount.call(op::GETXATTR, node, get(name, 9), 9),
            Err(libc::EOPNOTSUPP)
        );
    }
    let link = mount.lookup(ROOT, "link").unwrap().nodeid;
    assert_eq!(
        mount.call(op::SETXATTR, link, put("user.x", b"x", 0), 0),
        Err(libc::EPERM)
    );
    assert_eq!(
        mount.call(op::GETXATTR, link, get("user.x", 9), 9),
        Err(libc::ENODATA)
    );
    assert_eq!(
        mount.call(op::LISTXATTR, link, Args::new().u32(9).u32(0), 9),
        Ok(Vec::new())
    );
}

#[test]
fn directories_are_listed() {
    let mut shared = Shared::prepared(&[], |root| {
        for number in 0..700 {
            fs::write(
                root.join(format!("a file with number {number}")),
                vec![1; number],
            )
            .unwrap();
        }
        fs::create_dir(root.join("dir")).unwrap();
        symlink("nowhere", root.join("link")).unwrap();
    });
    let root = shared.root();
    let mut host: BTreeMap<Vec<u8>, u64> = fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_encoded_bytes(), entry.ino()))
        .collect();
    let mut mount = mount!(shared);
    let fh = mount.opendir(ROOT).unwrap();
    for size in [400, 4096, 100_000] {
        for plus in [false, true] {
            let list = mount.readdir(ROOT, fh, plus, size).unwrap();
            let mut seen = BTreeMap::new();
            for entry in list {
                if let Some(told) = entry.entry
                    && told.nodeid != 0
                {
                    let path = root.join(String::from_utf8(entry.name.clone()).unwrap());
                    same(&told.attr, &path);
                    same(&mount.getattr(told.nodeid).unwrap(), &path);
                    mount.forget(told.nodeid, 1);
                    assert!(mount.getattr(told.nodeid).is_err(), "counted once");
                }
                let dots = entry.name == b"." || entry.name == b"..";
                assert_eq!(plus && !dots, entry.entry.is_some_and(|e| e.nodeid != 0));
                if !dots {
                    assert_eq!(seen.insert(entry.name, entry.ino), None, "listed twice");
                }
            }
            assert!(seen == host, "size {size}, plus {plus}");
        }
    }
    assert_eq!(
        mount.call(op::READDIR, ROOT, read_args(fh, 0, 20), 20),
        Err(libc::EINVAL)
    );
    // What goes while the directory is open is no longer listed.
    fs::remove_dir(root.join("dir")).unwrap();
    host.remove(&b"dir"[..]);
    assert_eq!(
        mount.readdir(ROOT, fh, false, 4096).unwrap().len(),
        host.len() + 2
    );
    let sync = Args::new().u64(fh).u32(0).u32(0);
    assert_eq!(mount.call(op::FSYNCDIR, ROOT, sync, 0), Ok(Vec::new()));
    let args = Args::new().u64(fh).u64(0).u64(0);
    assert_eq!(mount.call(op::RELEASEDIR, ROOT, args, 0), Ok(Vec::new()));
    assert_eq!(mount.readdir(ROOT, fh, false, 4096), Err(libc::EBADF));
}

#[test]
fn a_share_for_reading_is_not_changed() {
    let mut shared = Shared::prepared(&["--readonly"], |root| {
        fs::write(root.join("file"), b"text").unwrap();
        fs::create_dir(root.join("dir")).unwrap();
        std::os::unix::fs::symlink("file", root.join("link")).unwrap();
    });
    let path = shared.path("file");
    let mut mount = mount!(shared);
    let node = mount.lookup(ROOT, "file").unwrap().nodeid;
    let fh = mount.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(mount.read(node, fh, 0, 10).unwrap(), b"text");
    let name = || Args::new().name("file");
    let refused = [
        mount.open(node, libc::O_RDWR).map(drop),
        mount.open(node, libc::O_RDONLY | libc::O_TRUNC).map(drop),
        mount.create(ROOT, "new", libc::O_RDWR, 0o600).map(drop),
        mount.mkdir(ROOT, "new", 0o700).map(drop),
        mount.write(node, fh, 0, b"x", 0).map(drop),
        mount
            .setattr(node, set::MODE, &Attr::default(), 0)
            .map(drop),
        mount.call(op::UNLINK, ROOT, name(), 0).map(drop),
        mount
            .call(op::RMDIR, ROOT, Args::new().name("dir"), 0)
            .map(drop),
        mount
            .call(
                op::RENAME,
                ROOT,
                Args::new().u64(ROOT).name("file").name("b"),
                0,
            )
            .map(drop),
        mount
            .call(op::LINK, ROOT, Args::new().u64(node).name("b"), 128)
            .map(drop),
        mount
            .call(op::SYMLINK, ROOT, Args::new().name("b").name("c"), 128)
            .map(drop),
        mount
            .call(
                op::SETXATTR,
                node,
                Args::new().u32(0).u32(0).name("user.x"),
                0,
            )
            .map(drop),
        mount
            .call(op::REMOVEXATTR, node, Args::new().name("user.x"), 0)
            .map(drop),
        mount
            .call(op::ACCESS, node, Args::new().u32(2).u32(0), 0)
            .map(drop),
    ];
    assert!(
        refused.iter().all(|r| *r == Err(libc::EROFS)),
        "{refused:?}"
    );
    // What only reads is there, all of it: the threads have a policy of their own for this.
    let seek = Args::new()
        .u64(fh)
        .u64(0)
        .u32(libc::SEEK_DATA as u32)
        .u32(0);
    let sync = || Args::new().u64(fh).u32(0).u32(0);
    let get = Args::new().u32(9).u32(0).name("user.none");
    let list = Args::new().u32(500).u32(0);
    assert_eq!(mount.call(op::LSEEK, node, seek, 8).unwrap(), [0; 8]);
    assert_eq!(mount.call(op::FSYNC, node, sync(), 0), Ok(Vec::new()));
    let sync_all = Args::new().u64(0);
    assert_eq!(mount.call(op::SYNCFS, ROOT, sync_all, 0), Ok(Vec::new()));
    assert_eq!(mount.call(op::GETXATTR, node, get, 9), Err(libc::ENODATA));
    assert_eq!(mount.call(op::LISTXATTR, node, list, 500), Ok(Vec::new()));
    assert!(mount.call(op::STATFS, ROOT, Args::new(), 80).is_ok());
    let link = mount.lookup(ROOT, "link").unwrap().nodeid;
    let target = mount.call(op::READLINK, link, Args::new(), 4096);
    assert_eq!(target.unwrap(), b"file");
    let dir = mount.opendir(ROOT).unwrap();
    assert!(mount.readdir(ROOT, dir, true, 4096).unwrap().len() >= 3);
    let mut text = String::new();
    File::open(path).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "text");
}

/// More of the largest requests at once than the region has room for.
#[test]
fn largest_requests_pass_with_a_bounce() {
    const LARGEST: u32 = 1 << 20;
    const COUNT: usize = 12;
    let mut shared = Shared::with(&Options {
        memory: 64 << 20,
        bounce: Some(Bounced::usual(26, 2)),
        ..common::options()
    });
    let memory = shared.device.memory.clone();
    let queue = &mut shared.device.queues[common::QUEUE];
    let mut mount = Mount::new(&memory, queue, 4096).unwrap();
    let flags = libc::O_RDWR | libc::O_CREAT;
    let (entry, fh) = mount.create(ROOT, "file", flags, 0o600).unwrap();
    let nodeid = entry.nodeid;
    let content = |number: usize| -> Vec<u8> {
        let word = |i: u32| (i ^ (number as u32) << 20).to_le_bytes();
        (0..LARGEST / 4).flat_map(word).collect()
    };
    let offset = |number: usize| number as u64 * u64::from(LARGEST);
    let mut requests = Requests::new(&memory, queue.size(), COUNT, LARGEST);
    for writes in [true, false] {
        let mut numbers = [0; COUNT];
        for number in 0..COUNT {
            let call = match writes {
                true => write_call(nodeid, fh, offset(number), LARGEST, 0),
                false => Call {
                    opcode: op::READ,
                    nodeid,
                    args: read_args(fh, offset(number), LARGEST).done(),
                    data: 0,
                    room: Some(LARGEST),
                },
            };
            let slot = requests.next_slot().unwrap();
            if writes {
                memory.write(requests.data(slot), &content(number));
            }
            assert_eq!(requests.submit(&memory, queue, &call), Some(slot));
            numbers[slot] = number;
        }
        queue.publish();
        queue.kick();
        while requests.in_flight() > 0 {
            assert!(queue.wait(PATIENCE).unwrap(), "a request is lost");
            while let Some(finished) = requests.finish(&memory, queue) {
                let reply = finished.reply.unwrap().unwrap();
                match writes {
                    true => assert_eq!(reply[..4], LARGEST.to_ne_bytes()),
                    false => assert!(reply == content(numbers[finished.slot])),
                }
            }
        }
    }
    let all: Vec<u8> = (0..COUNT).flat_map(content).collect();
    assert!(fs::read(shared.path("file")).unwrap() == all);
}

#[test]
fn new_files_belong_to_the_guests_user_if_that_is_asked_for() {
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        let folder = tempfile::tempdir().unwrap();
        let args = ["--tag", "test", "--owner", "guest", "--directory"];
        let mut command = std::process::Command::new(common::BINARY);
        let output = command.args(args).arg(folder.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("--owner guest needs root"), "{said}");
        return;
    }
    use std::os::unix::fs::MetadataExt;
    let mut shared = Shared::start(&["--owner", "guest", "--uid-map", "0:0:1+1000:2000:1"]);
    let path = shared.path("file");
    let mut mount = mount!(shared);
    let open = mount.create(ROOT, "mine", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(open.0.attr.uid, 0);
    mount.requests.user = (1000, 0);
    let (entry, fh) = mount.create(ROOT, "file", libc::O_RDWR, 0o4711).unwrap();
    assert_eq!(entry.attr.uid, 1000);
    // Writing takes the set-user-id bit away, by mode.
    mount.write(entry.nodeid, fh, 0, b"x", 0).unwrap();
    let attr = mount.getattr(entry.nodeid).unwrap();
    assert_eq!((attr.uid, attr.mode & 0o7777), (1000, 0o711));
    let status = fs::metadata(path).unwrap();
    assert_eq!(status.uid(), 2000);
}
