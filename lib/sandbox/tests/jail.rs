//! What a jailed process can reach: nothing. Each test runs as the user of the test run and, if
//! that is root, also as an ordinary user.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod common;

use std::ffi::CString;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use anemone_sandbox::{
    Access, Grant, Layer, Layers, Mode, ProcessJail, State, close_extra_fds, enter, probe,
};
use common::{User, call, filter, forbid, run, start, users};

fn jail() -> ProcessJail {
    // SAFETY: no arguments.
    let parent = unsafe { libc::getppid() };
    ProcessJail {
        parent_pid: Some(parent as u32),
        open_files: 50,
        file_size: Some(4096),
        ..ProcessJail::default()
    }
}

/// All layers but the one that the process that starts another makes.
fn assert_complete(layers: &Layers) {
    for layer in Layer::ALL {
        assert!(
            layers.is_active(layer) || layer == Layer::PidNamespace,
            "this host refuses layers:\n{layers}"
        );
    }
    assert_eq!(layers.state(Layer::PidNamespace), State::NotAsked);
}

fn open(path: &str, flags: libc::c_int) -> i64 {
    let path = CString::new(path).unwrap();
    call(
        libc::SYS_openat,
        [
            libc::AT_FDCWD as u64,
            path.as_ptr() as u64,
            flags as u64,
            0o600,
            0,
            0,
        ],
    )
}

#[test]
fn no_path_leads_anywhere() {
    for user in users() {
        let outcome = run(*user, || {
            assert_complete(&enter(&jail()).unwrap());
            for path in [
                "/",
                ".",
                "..",
                "../../..",
                "/proc",
                "/proc/self/mem",
                "/etc/passwd",
                "/dev/null",
                "/tmp",
                "/sys",
            ] {
                for flags in [
                    libc::O_RDONLY,
                    libc::O_WRONLY,
                    libc::O_RDWR | libc::O_CREAT,
                    libc::O_TMPFILE | libc::O_RDWR,
                ] {
                    assert!(open(path, flags) < 0, "{path} opens with {flags:#o}");
                }
            }
            // Not even without asking for rights, except the empty directory itself.
            for path in ["/proc", "/etc", "/dev", "/a", "../a"] {
                assert_eq!(open(path, libc::O_PATH), -i64::from(libc::ENOENT), "{path}");
            }
            assert!(std::fs::create_dir("/x").is_err());
            assert!(std::fs::exists("/etc").is_ok_and(|there| !there));
            0
        });
        assert_eq!(outcome.exit, Some(0), "{user:?}: {}", outcome.stderr);
    }
}

#[test]
fn no_socket_leads_anywhere() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = tcp.local_addr().unwrap().port();
    let name = format!("anemone-test-{}", std::process::id());
    let _abstract =
        UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    for user in users() {
        let outcome = run(*user, || {
            // First that both are reachable from outside of the jail.
            assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
            let address = SocketAddr::from_abstract_name(&name).unwrap();
            assert!(std::os::unix::net::UnixStream::connect_addr(&address).is_ok());
            enter(&jail()).unwrap();
            let tcp = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap_err();
            assert_eq!(tcp.raw_os_error(), Some(libc::EACCES));
            let listen = TcpListener::bind("127.0.0.1:0").unwrap_err();
            assert_eq!(listen.raw_os_error(), Some(libc::EACCES));
            let unix = std::os::unix::net::UnixStream::connect_addr(&address).unwrap_err();
            assert_eq!(unix.raw_os_error(), Some(libc::EPERM));
            0
        });
        assert_eq!(outcome.exit, Some(0), "{user:?}: {}", outcome.stderr);
    }
}

#[test]
fn no_process_can_be_touched_and_no_privilege_gained() {
    for user in users() {
        let mut sibling = start(*user, |handle| {
            handle.pause();
            0
        });
        assert!(
            sibling.wait_for_pause(),
            "it has become the user it is to be"
        );
        let target = sibling.pid as u64;
        let outcome = run(*user, || {
            assert_eq!(call(libc::SYS_kill, [target, 0, 0, 0, 0, 0]), 0);
            enter(&jail()).unwrap();
            let refused = -i64::from(libc::EPERM);
            assert_eq!(call(libc::SYS_kill, [target, 0, 0, 0, 0, 0]), refused);
            let attach = u64::from(libc::PTRACE_ATTACH);
            assert_eq!(
                call(libc::SYS_ptrace, [attach, target, 0, 0, 0, 0]),
                refused
            );
            // Who has changed the root cannot make a user namespace, and so none of the others.
            for flag in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET] {
                assert_eq!(
                    call(libc::SYS_unshare, [flag as u64, 0, 0, 0, 0, 0]),
                    refused
                );
            }
            assert!(call(libc::SYS_setresuid, [1, 1, 1, 0, 0, 0]) < 0);
            assert!(call(libc::SYS_setgroups, [0, 0, 0, 0, 0, 0]) < 0);
            assert!(call(libc::SYS_chroot, [c"/".as_ptr() as u64, 0, 0, 0, 0, 0]) < 0);
            let host = c"x".as_ptr() as u64;
            assert_eq!(call(libc::SYS_sethostname, [host, 1, 0, 0, 0, 0]), refused);
            let program = c"/proc/self/exe".as_ptr() as u64;
            assert_eq!(
                call(libc::SYS_execve, [program, 0, 0, 0, 0, 0]),
                -i64::from(libc::ENOENT)
            );
            assert!(
                call(libc::SYS_dup3, [1, 60, 0, 0, 0, 0]) < 0,
                "beyond the limit"
            );
            0
        });
        assert_eq!(outcome.exit, Some(0), "{user:?}: {}", outcome.stderr);
        assert_eq!(sibling.finish().exit, Some(0));
    }
}

#[test]
fn proc_shows_the_jail() {
    let main = filter("main", 0, "");
    for user in users() {
        let mut child = start(*user, |handle| {
            assert_complete(&enter(&jail()).unwrap());
            anemone_sandbox::restrict(main, Mode::On).unwrap();
            handle.pause();
            0
        });
        let paused = child.wait_for_pause();
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.pid));
        let (status, limits) = (read("status").unwrap(), read("limits").unwrap());
        // Another user's view of a process that is not dumpable.
        let owner = std::os::unix::fs::MetadataExt::uid(
            &std::fs::metadata(format!("/proc/{}/environ", child.pid)).unwrap(),
        );
        let outcome = child.finish();
        assert!(paused, "{}", outcome.stderr);
        let field = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_once(':').unwrap().1.trim().to_owned()
        };
        assert_eq!(field("NoNewPrivs"), "1");
        assert_eq!(field("Seccomp:".trim_end_matches(':')), "2");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{set}");
        }
        let limit = |name: &str| {
            let line = limits.lines().find(|l| l.starts_with(name)).unwrap();
            let words: Vec<_> = line[name.len()..].split_whitespace().collect();
            (words[0].to_owned(), words[1].to_owned())
        };
        assert_eq!(limit("Max core file size"), ("0".into(), "0".into()));
        assert_eq!(limit("Max open files"), ("50".into(), "50".into()));
        assert_eq!(limit("Max file size"), ("4096".into(), "4096".into()));
        assert_eq!(owner, 0, "not dumpable");
        assert_eq!(outcome.exit, Some(0), "{}", outcome.stderr);
    }
}

#[test]
fn log_mode_leaves_the_process_to_debuggers() {
    let outcome = run(User::Same, || {
        let layers = enter(&ProcessJail {
            mode: Mode::Log,
            ..jail()
        })
        .unwrap();
        assert_eq!(layers.state(Layer::NotDumpable), State::NotAsked);
        // SAFETY: integers only.
        unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }
    });
    assert_eq!(outcome.exit, Some(1), "{}", outcome.stderr);
}

#[test]
fn without_user_namespaces_the_other_layers_stay() {
    let unshare = [libc::SYS_unshare];
    for user in users() {
        let outcome = run(*user, || {
            forbid(&unshare, libc::EPERM as u16);
            let layers = enter(&jail()).unwrap();
            let refused = State::Refused(libc::EPERM);
            assert_eq!(layers.state(Layer::UserNamespace), refused);
            assert_eq!(layers.state(Layer::MountNamespace), refused);
            // Root needs no namespace for these, an ordinary user does.
            // SAFETY: no arguments.
            let root = unsafe { libc::geteuid() } == 0;
            let expected = if root { State::Active } else { refused };
            assert_eq!(layers.state(Layer::EmptyRoot), expected);
            assert_eq!(layers.state(Layer::BoundingSet), expected);
            for layer in [
                Layer::Capabilities,
                Layer::NoNewPrivileges,
                Layer::Landlock,
                Layer::NotDumpable,
                Layer::ParentDeath,
            ] {
                assert!(layers.is_active(layer), "{layers}");
            }
            assert!(open("/etc/passwd", libc::O_RDONLY) < 0);
            assert!(open("/", libc::O_RDONLY) < 0);
            0
        });
        assert_eq!(outcome.exit, Some(0), "{user:?}: {}", outcome.stderr);
    }
}

#[test]
fn without_new_mounts_root_falls_back_to_a_removed_directory() {
    let mounts = [libc::SYS_unshare, libc::SYS_fsopen];
    for user in users() {
        let outcome = run(*user, || {
            forbid(&mounts, libc::ENOSYS as u16);
            let layers = enter(&jail()).unwrap();
            // SAFETY: no arguments.
            if unsafe { libc::geteuid() } == 0 {
                assert!(layers.is_active(Layer::EmptyRoot), "{layers}");
                assert_eq!(open("/etc", libc::O_PATH), -i64::from(libc::ENOENT));
            } else {
                // An ordinary user can make such a directory, but not make it the root.
                let refused = State::Refused(libc::EPERM);
                assert_eq!(layers.state(Layer::EmptyRoot), refused);
            }
            0
        });
        assert_eq!(outcome.exit, Some(0), "{user:?}: {}", outcome.stderr);
    }
    let left = std::fs::read_dir("/dev/shm")
        .unwrap()
        .flatten()
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("anemone-jail-")
        });
    assert_eq!(left.count(), 0);
}

#[test]
fn without_landlock_the_other_layers_stay() {
    let landlock = [libc::SYS_landlock_create_ruleset];
    for user in users() {
        let outcome = run(*user, || {
            forbid(&landlock, libc::ENOSYS as u16);
            let layers = enter(&jail()).unwrap();
            assert_eq!(layers.state(Layer::Landlock), State::Refused(libc::ENOSYS));
            assert_eq!(layers.landlock_abi(), 0);
            assert!(layers.is_active(Layer::EmptyRoot), "{layers}");
            assert_eq!(
                open("/etc/passwd", libc::O_RDONLY),
                -i64::from(libc::ENOENT)
            );
            assert!(open("/x", libc::O_RDWR | libc::O_CREAT) < 0);
            0
        });
        assert_eq!(outcome.exit, Some(0), "{user:?}: {}", outcome.stderr);
    }
}

/// What `open` answers for each path under rules that leave one object to one use.
fn opened_under(object: &std::path::Path, access: Access, paths: &[(&str, libc::c_int)]) -> String {
    let outcome = run(User::Same, || {
        let object = std::fs::File::open(object).unwrap();
        let grant = Grant {
            object: object.as_raw_fd(),
            access,
        };
        anemone_sandbox::landlock(&[grant], true).unwrap();
        let opens = |at: &usize| open(paths[*at].0, paths[*at].1) >= 0;
        (0..paths.len()).filter(opens).map(|at| 1 << at).sum()
    });
    let opened = outcome.exit.expect("an exit status");
    let sign = |at| if opened >> at & 1 == 1 { '+' } else { '-' };
    (0..paths.len()).map(sign).collect()
}

#[test]
fn landlock_leaves_what_is_granted() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (file, other, new) = (path("file"), path("other"), path("new"));
    for name in [&file, &other] {
        std::fs::write(name, "text").unwrap();
    }
    let all = [
        (file.as_str(), libc::O_RDONLY),
        (&file, libc::O_RDWR),
        (&other, libc::O_RDONLY),
        (&new, libc::O_RDWR | libc::O_CREAT),
        ("/etc/passwd", libc::O_RDONLY),
    ];
    let beneath = folder.path();
    let single = beneath.join("file");
    for (object, access, expected) in [
        (beneath, Access::Read, "+-+--"),
        (beneath, Access::Change, "++++-"),
        (&single, Access::ReadFile, "+----"),
        (&single, Access::ReadWriteFile, "++---"),
        (beneath, Access::Execute, "+-+--"),
        (beneath, Access::Remove, "-----"),
    ] {
        let opened = opened_under(object, access, &all);
        assert_eq!(opened, expected, "{access:?}");
        let _ = std::fs::remove_file(&new);
    }
}

#[test]
fn landlock_leaves_names_to_be_removed_and_programs_to_be_started() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    for (access, removes, starts) in [
        (Access::Remove, true, false),
        (Access::Execute, false, true),
        (Access::Read, false, false),
    ] {
        // By another process: a descriptor that is open for writing would go to the children of other tests, and
        // the file could not be started meanwhile.
        let copied = std::process::Command::new("cp")
            .arg(std::env::current_exe().unwrap())
            .arg(&file)
            .status();
        assert!(copied.unwrap().success());
        let outcome = run(User::Same, || {
            let object = std::fs::File::open(folder.path()).unwrap();
            let grant = Grant {
                object: object.as_raw_fd(),
                access,
            };
            anemone_sandbox::landlock(&[grant], true).unwrap();
            assert_eq!(std::fs::remove_file(&file).is_ok(), removes, "{access:?}");
            let path = CString::new(file.to_str().unwrap()).unwrap();
            call(libc::SYS_dup2, [2, 1, 0, 0, 0, 0]);
            // The program is this one: it lists its tests.
            let list = c"--list";
            let arguments = [path.as_ptr(), list.as_ptr(), std::ptr::null()];
            let environment = [std::ptr::null::<u8>()];
            let arguments = arguments.as_ptr() as u64;
            let environment = environment.as_ptr() as u64;
            call(
                libc::SYS_execve,
                [path.as_ptr() as u64, arguments, environment, 0, 0, 0],
            );
            7
        });
        assert_eq!(outcome.exit == Some(0), starts, "{access:?} {outcome:?}");
    }
}

#[test]
fn landlock_tells_signals_apart() {
    let mut sibling = start(User::Same, |handle| {
        handle.pause();
        0
    });
    assert!(sibling.wait_for_pause());
    let target = sibling.pid as u64;
    for (signals, expected) in [(true, 0), (false, -i64::from(libc::EPERM))] {
        let outcome = run(User::Same, || {
            let abi = anemone_sandbox::landlock(&[], signals).unwrap();
            let sent = call(libc::SYS_kill, [target, 0, 0, 0, 0, 0]);
            i32::from(abi >= 6 && sent != expected)
        });
        assert_eq!(outcome.exit, Some(0), "{signals}");
    }
    assert_eq!(sibling.finish().exit, Some(0));
}

#[test]
fn refused_layers_are_reported_loudly() {
    let outcome = run(User::Same, || {
        anemone_log::init("test", log::LevelFilter::Warn);
        forbid(&[libc::SYS_landlock_create_ruleset], libc::ENOSYS as u16);
        enter(&jail()).unwrap();
        0
    });
    let line =
        "test: warn: this host refuses layers of the jail: landlock: Function not implemented";
    assert!(outcome.stderr.contains(line), "{}", outcome.stderr);
}

#[test]
fn the_process_dies_with_its_parent() {
    // The parent pauses with a jailed child, then ends; the child must end too, which closes its
    // end of the pipe.
    let (read, write) = std::io::pipe().unwrap();
    let parent = start(User::Same, |handle| {
        let child = start(User::Same, |inner| {
            enter(&jail()).unwrap();
            inner.pause();
            0
        });
        let mut child = child;
        let ready = child.wait_for_pause();
        handle.pause();
        i32::from(!ready)
    });
    drop(write);
    assert_eq!(parent.finish().exit, Some(0));
    let mut poll = libc::pollfd {
        fd: read.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd. The time bound is only there to end a failing test.
    assert_eq!(unsafe { libc::poll(&raw mut poll, 1, 10_000) }, 1);
    assert_ne!(poll.revents & libc::POLLHUP, 0);
}

#[test]
fn a_parent_that_is_gone_is_an_error() {
    let outcome = run(User::Same, || {
        let error = enter(&ProcessJail {
            parent_pid: Some(1 << 30),
            ..jail()
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "the parent process 1073741824 is gone");
        0
    });
    assert_eq!(outcome.exit, Some(0), "{}", outcome.stderr);
}

#[test]
fn a_process_with_threads_is_refused() {
    let outcome = run(User::Same, || {
        let (send, receive) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || receive.recv());
        let error = enter(&jail()).unwrap_err();
        assert!(error.to_string().contains("several threads"), "{error}");
        drop(send);
        assert!(thread.join().unwrap().is_err());
        0
    });
    assert_eq!(outcome.exit, Some(0), "{}", outcome.stderr);
}

#[test]
fn probing_changes_nothing_here() {
    let before = std::fs::read_to_string("/proc/self/status").unwrap();
    let layers = probe().unwrap();
    let after = std::fs::read_to_string("/proc/self/status").unwrap();
    let privileges = |status: &str| -> Vec<String> {
        let names = ["Cap", "NoNewPrivs", "Seccomp", "Uid"];
        let lines = status
            .lines()
            .filter(|l| names.iter().any(|n| l.starts_with(n)));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(privileges(&before), privileges(&after));
    assert!(open("/etc/passwd", libc::O_RDONLY) >= 0);
    let outcome = run(User::Same, || {
        let own = enter(&jail()).unwrap();
        let same = |layer| own.state(layer) == layers.state(layer);
        let mut others = Layer::ALL.into_iter().filter(|l| *l != Layer::PidNamespace);
        i32::from(!others.all(same))
    });
    assert_eq!(outcome.exit, Some(0), "{}", outcome.stderr);
    assert!(layers.is_active(Layer::PidNamespace), "{layers}");
}

#[test]
fn extra_descriptors_are_closed() {
    let outcome = run(User::Same, || {
        let is_open = |fd: i32| {
            // SAFETY: integers only.
            unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
        };
        for fd in [10, 11, 12, 20] {
            assert_eq!(call(libc::SYS_dup2, [1, fd, 0, 0, 0, 0]), fd as i64);
        }
        close_extra_fds(&[12, 10, 1]).unwrap();
        let open: Vec<_> = (0..64).filter(|fd| is_open(*fd)).collect();
        assert_eq!(open, [0, 1, 2, 10, 12]);
        close_extra_fds(&[]).unwrap();
        assert!(!is_open(10));
        0
    });
    assert_eq!(outcome.exit, Some(0), "{}", outcome.stderr);
}
