//! Bytes between a guest and each kind of endpoint, with peers that come, go and stall.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anemone_driver::{Process, Supervised};
use anemone_ipc::device::{FromDevice, ToDevice};
use anemone_vhost_user::BackendRequest;
use common::{BINARY, Guest, LONG, options, pattern};

fn connect(path: &Path) -> UnixStream {
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(LONG)).unwrap();
                return stream;
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn guest(process: &mut Process) -> Guest {
    Guest::new(process.device(&options()).unwrap())
}

/// A guest on a console with a UNIX socket and its first client.
fn unix() -> (tempfile::TempDir, Process, Guest, UnixStream) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console");
    let mut process = Process::start(BINARY, &["--unix", path.to_str().unwrap()]).unwrap();
    let mut guest = guest(&mut process);
    let mut client = connect(&path);
    // The client has been accepted: nothing that follows is lost.
    client.write_all(b"!").unwrap();
    assert_eq!(guest.read(1), b"!");
    (folder, process, guest, client)
}

fn expect(from: &mut impl Read, text: &[u8]) {
    let mut got = vec![0; text.len()];
    from.read_exact(&mut got).unwrap();
    assert_eq!(got, text);
}

#[test]
fn a_client_of_the_socket_talks_with_the_guest() {
    let (_folder, mut process, mut guest, mut client) = unix();
    client.write_all(b"root\n").unwrap();
    assert_eq!(guest.read(5), b"root\n");
    guest.write(b"Password: ");
    expect(&mut client, b"Password: ");
    assert_eq!(process.terminate().unwrap().code(), Some(0));
}

#[test]
fn a_slow_client_holds_the_guest_and_loses_nothing() {
    let (_folder, _process, mut guest, mut client) = unix();
    // More than all buffers on the way.
    let text = pattern(1 << 20);
    guest.publish(&text);
    assert!(!guest.written(Duration::from_millis(50)));
    // The other direction is not held up.
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.read(10), b"still here");
    expect(&mut client, &text);
    assert!(guest.written(LONG));
}

#[test]
fn input_waits_for_the_guest_and_nothing_is_lost() {
    let (_folder, _process, mut guest, mut client) = unix();
    let text = pattern(1 << 20);
    client.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut quiet = 0;
    // Until nobody takes any more for a while.
    while quiet < 20 {
        match client.write(&text[sent..]) {
            Ok(n) => (sent, quiet) = (sent + n, 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                quiet += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
    assert!(sent < text.len(), "the device took everything");
    assert_eq!(guest.read(sent), text[..sent]);
}

#[test]
fn clients_come_and_go_one_at_a_time() {
    let (folder, mut process, mut guest, mut first) = unix();
    guest.write(b"one");
    expect(&mut first, b"one");
    let mut second = connect(&folder.path().join("console"));
    guest.write(b"still one");
    expect(&mut first, b"still one");
    drop(first);
    second.write_all(b"two").unwrap();
    assert_eq!(guest.read(3), b"two");
    guest.write(b"now two");
    expect(&mut second, b"now two");
    drop(second);
    // Nobody is there: the guest goes on, what it says is lost.
    for _ in 0..100 {
        guest.write(&pattern(4000));
    }
    let mut third = connect(&folder.path().join("console"));
    third.write_all(b"x").unwrap();
    assert_eq!(guest.read(1), b"x");
    guest.write(b"three");
    expect(&mut third, b"three");
    assert!(process.is_running());
}

#[test]
fn a_client_that_leaves_while_the_guest_waits_sets_it_free() {
    let (_folder, _process, mut guest, client) = unix();
    guest.publish(&pattern(1 << 20));
    assert!(!guest.written(Duration::from_millis(20)));
    drop(client);
    assert!(guest.written(LONG));
}

/// The last words of a guest whose monitor ends right after.
#[test]
fn output_is_not_lost_when_the_monitor_goes() {
    for _ in 0..20 {
        let (_folder, _process, mut guest, mut client) = unix();
        guest.publish(b"reboot: Power down\n");
        drop(guest);
        expect(&mut client, b"reboot: Power down\n");
    }
}

#[test]
fn a_new_guest_finds_a_working_console() {
    let (_folder, mut process, mut first, mut client) = unix();
    // Stops in the middle of a chain.
    first.publish(&pattern(1 << 20));
    assert!(!first.written(Duration::from_millis(20)));
    drop(first);
    let mut second = guest(&mut process);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        while !all.ends_with(b"second guest") {
            let mut bytes = [0; 4096];
            let n = client.read(&mut bytes).unwrap();
            all.extend(&bytes[..n]);
        }
        all
    });
    second.write(b"second guest");
    let all = reader.join().unwrap();
    // What came of the first chain came in order.
    let kept = all.len() - b"second guest".len();
    assert_eq!(all[..kept], pattern(1 << 20)[..kept]);
}

#[test]
fn a_pseudo_terminal_can_be_opened_and_closed_and_opened() {
    let mut command = Command::new(BINARY);
    command.arg("--pty").stdout(Stdio::piped());
    let mut process = Process::with(command, |command, socket| {
        command.arg("--socket").arg(socket);
    })
    .unwrap();
    let mut name = String::new();
    let stdout = process.child().stdout.take().unwrap();
    BufReader::new(stdout).read_line(&mut name).unwrap();
    let mut guest = guest(&mut process);
    for round in 0..3u8 {
        // Nobody has it open. More than a terminal's buffer.
        for _ in 0..10 {
            guest.write(&pattern(4000));
        }
        let mut terminal = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(name.trim_end())
            .unwrap();
        // No echo, no line editing: bytes go as they are.
        let keys = [b'0' + round, b'\r', 0x03, 0x04, b'\n'];
        terminal.write_all(&keys).unwrap();
        assert_eq!(guest.read(keys.len()), keys);
        guest.write(b"\x1b[1mhello\n\r\x00");
        expect(&mut terminal, b"\x1b[1mhello\n\r\x00");
    }
    assert!(process.is_running());
}

#[test]
fn a_file_gets_all_output_at_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    std::fs::write(&path, b"earlier\n").unwrap();
    let mut process = Process::start(BINARY, &["--file", path.to_str().unwrap()]).unwrap();
    let mut guest = guest(&mut process);
    let text = pattern(300_000);
    guest.write(&text);
    guest.write(b"end");
    assert_eq!(process.terminate().unwrap().code(), Some(0));
    let written = std::fs::read(&path).unwrap();
    assert_eq!(written, [&b"earlier\n"[..], &text, b"end"].concat());
}

#[test]
fn standard_streams_may_end() {
    let mut command = Command::new(BINARY);
    command
        .arg("--stdio")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut process = Process::with(command, |command, socket| {
        command.arg("--socket").arg(socket);
    })
    .unwrap();
    let mut guest = guest(&mut process);
    let mut stdin = process.child().stdin.take().unwrap();
    let mut stdout = process.child().stdout.take().unwrap();
    stdin.write_all(b"in").unwrap();
    assert_eq!(guest.read(2), b"in");
    guest.write(b"out");
    expect(&mut stdout, b"out");
    drop(stdin);
    guest.write(b"more");
    expect(&mut stdout, b"more");
    drop(stdout);
    for _ in 0..100 {
        guest.write(&pattern(4000));
    }
    assert!(process.is_running());
}

/// A pseudo-terminal of the test's own: master and name of the other side.
fn terminal() -> (File, String) {
    let master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/ptmx")
        .unwrap();
    let (unlock, mut number, fd) = (0i32, 0i32, master.as_raw_fd());
    // SAFETY: both ioctls access one int through the pointer.
    unsafe {
        assert_eq!(libc::ioctl(fd, libc::TIOCSPTLCK, &raw const unlock), 0);
        assert_eq!(libc::ioctl(fd, libc::TIOCGPTN, &raw mut number), 0);
    }
    (master, format!("/dev/pts/{number}"))
}

fn local_flags(terminal: &File) -> u32 {
    // SAFETY: an all-zero termios is valid and tcgetattr fills it.
    unsafe {
        let mut mode: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &raw mut mode), 0);
        mode.c_lflag
    }
}

#[test]
fn a_terminal_is_raw_meanwhile_and_has_its_size_told() {
    let (mut master, name) = terminal();
    let size = libc::winsize {
        ws_row: 33,
        ws_col: 101,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize.
    let rc = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    assert_eq!(rc, 0);
    let other = OpenOptions::new()
        .read(true)
        .write(true)
        .open(name)
        .unwrap();
    let before = local_flags(&other);
    assert_ne!(before & libc::ECHO, 0);
    let mut command = Command::new(BINARY);
    command
        .args(["--stdio", "--escape"])
        .stdin(other.try_clone().unwrap())
        .stdout(other.try_clone().unwrap());
    let mut process = Process::with(command, |command, socket| {
        command.arg("--socket").arg(socket);
    })
    .unwrap();
    let mut guest = guest(&mut process);
    let config = guest.device.frontend.config(0, 12).unwrap();
    assert_eq!(config, [101, 0, 33, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(local_flags(&other) & (libc::ECHO | libc::ICANON), 0);
    master.write_all(b"ls\r").unwrap();
    assert_eq!(guest.read(3), b"ls\r");
    guest.write(b"file\r\n");
    expect(&mut master, b"file\r\n");
    // The descriptor that the parent shares stays as it was.
    // SAFETY: F_GETFL takes no pointer.
    let flags = unsafe { libc::fcntl(other.as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & libc::O_NONBLOCK, 0);
    // The escape key, without a supervisor.
    master.write_all(b"\x01x").unwrap();
    let status = process.wait().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(local_flags(&other), before);
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which are new and have no other owner.
    unsafe {
        assert_eq!(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

#[test]
fn the_escape_key_reaches_the_supervisor_and_the_window_size_the_guest() {
    let ((input, keys), (screen, output)) = (pipe(), pipe());
    let args = ["--input-fd", "5", "--output-fd", "6", "--escape"];
    let mut process = Supervised::start(BINARY, &args, vec![input, output]).unwrap();
    process.ready().unwrap();
    let mut guest = Guest::new(process.device(&options()).unwrap());
    let (mut keys, mut screen) = (File::from(keys), File::from(screen));
    keys.write_all(b"a\x01pb\x01\x01\x01zc\x01x\x01h").unwrap();
    let received = || loop {
        match process.control.recv::<FromDevice>().unwrap().message {
            FromDevice::Keep { .. } => {}
            other => return other,
        }
    };
    assert_eq!(received(), FromDevice::PowerRequested);
    assert_eq!(received(), FromDevice::QuitRequested);
    assert_eq!(guest.read(6), b"ab\x01\x01zc");
    let mut help = [0; 32];
    screen.read_exact(&mut help).unwrap();
    assert!(String::from_utf8_lossy(&help).contains("Ctrl-A x"));
    let message = ToDevice::WindowSize {
        columns: 132,
        rows: 50,
    };
    process.control.send(&message, &[]).unwrap();
    let requests = guest.device.requests.as_mut().unwrap();
    let change = loop {
        match requests.try_recv().unwrap() {
            Some(request) => break request,
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    assert_eq!(change, BackendRequest::ConfigChange);
    let config = guest.device.frontend.config(0, 4).unwrap();
    assert_eq!(config, [132, 0, 50, 0]);
    assert_eq!(process.close().unwrap().code(), Some(0));
}

#[test]
fn the_stream_of_a_uart_is_carried_both_ways_to_its_last_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("serial");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let args = ["--stream-fd", "5", "--unix-fd", "6"];
    let fds = vec![theirs.into(), listener.into()];
    let process = Supervised::start_stream(BINARY, &args, fds).unwrap();
    process.ready().unwrap();
    let mut uart = ours;
    let mut client = connect(&path);
    client.write_all(b"input").unwrap();
    expect(&mut uart, b"input");
    uart.write_all(b"output").unwrap();
    expect(&mut client, b"output");
    // The monitor ends, and the supervisor ends the console.
    let text = pattern(100_000);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        all
    });
    uart.write_all(&text).unwrap();
    drop(uart);
    assert_eq!(process.close().unwrap().code(), Some(0));
    assert_eq!(reader.join().unwrap(), text);
}

#[test]
fn the_process_is_jailed() {
    let (_folder, mut process, mut guest, mut client) = unix();
    guest.write(b"up");
    expect(&mut client, b"up");
    let pid = process.child().id();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        line.unwrap()[name.len()..].trim().to_owned()
    };
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("CapEff:"), "0000000000000000");
    assert_eq!(field("Threads:"), "1");
}

#[test]
fn bad_arguments_end_with_status_2() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let socket = socket.to_str().unwrap();
    for args in [
        &[][..],
        &["--stdio", "--pty"],
        &["--input-fd", "0"],
        &["--stdio", "--input-fd", "0", "--output-fd", "1"],
        &["--file", "/nowhere/file"],
        &["--unix", "/nowhere/socket"],
        &["--file-fd", "77"],
        &["--pty-fd", "0"],
    ] {
        let output = Command::new(BINARY)
            .args(["--socket", socket])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(!output.stderr.is_empty());
    }
    assert!(!Path::new(socket).exists());
}
