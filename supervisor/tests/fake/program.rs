//! Plays `anemone-vmm` and the device processes. What it does stands in files of the folder it
//! lies in, and what it has seen is written there:
//!
//! - `vmm.script`: one line per start of the VMM, the last one for all further starts; its words
//!   are the steps of [`vmm`].
//! - `ID.script`: the steps of the device `ID`, see [`device`]; one line per start, as above.
//! - `self-test-ACCELERATOR.script`: why the accelerator cannot be used, if it cannot.
//! - `NAME.log`: what the process called NAME was given.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::exit;
use std::time::Duration;

use anemone_ipc::device::{Balloon, FromDevice, ToDevice};
use anemone_ipc::vmm::{Accel, DeviceUse, Event, FromVmm, Summary, ToVmm};
use anemone_ipc::{CONTROL_FD, Channel, FdIndex};

fn main() {
    let program = env::current_exe().expect("/proc");
    let folder = program.parent().expect("a folder").to_owned();
    let args: Vec<String> = env::args().collect();
    if args[1] == "--self-test" {
        let script = folder.join(format!("self-test-{}.script", args[2]));
        let text = fs::read_to_string(script).unwrap_or_default();
        print!("{text}");
        exit(i32::from(!text.is_empty()));
    }
    if args[1] == "--cpu-models" {
        println!("model-1\tthe first\tx,y\tkvm=?\tsoft=y");
        exit(0);
    }
    // As the jail of a real child does.
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    // A parent outside of this PID namespace has no number.
    assert!(after(&args, "--parent-pid").is_some());
    assert_eq!(std::os::unix::process::parent_id(), 0);
    assert_eq!(std::process::id(), 1);
    assert_eq!(after(&args, "--control-fd").as_deref(), Some("3"));
    // SAFETY: the supervisor passes the control channel under this number; nothing else has it.
    let channel = Channel::new(unsafe { OwnedFd::from_raw_fd(CONTROL_FD) });
    if program.ends_with("anemone-vmm") {
        vmm(&folder, &channel, &args);
    } else {
        device(&folder, &channel, &args);
    }
}

fn after(args: &[String], name: &str) -> Option<String> {
    let at = args.iter().position(|arg| arg == name)?;
    args.get(at + 1).cloned()
}

/// Has the test write a line into a file: a process that is started under a running guest may open
/// none for writing. Returns when it is there.
fn note(folder: &Path, name: &str, text: &str) {
    let mut notes = UnixStream::connect(folder.join("notes")).expect("notes");
    writeln!(notes, "{name}.log {text}").expect("notes");
    notes.shutdown(Shutdown::Write).expect("notes");
    let end = notes.read(&mut [0]).expect("notes");
    assert_eq!(end, 0);
}

fn descriptors() -> String {
    let mut numbers: Vec<i32> = (0..64)
        .filter(|n| fs::symlink_metadata(format!("/proc/self/fd/{n}")).is_ok())
        .collect();
    numbers.sort_unstable();
    format!("{numbers:?}")
}

/// Steps: `refuse:TEXT`, `ready`, `start` (wait for it), `power` (wait for the button),
/// `shutdown`, `reset`, `panic`, `lost:ID` (its last connection), `reconnect` (wait for it, and
/// report it as done), `untouched:ID`, `serve` (answer and reconnect
/// until the power button is pressed, then shut down), `failed:TEXT`, `nonsense`, `kill:SIGNAL`, `exit:STATUS`,
/// `hang`. After the last step it exits with 0.
fn vmm(folder: &Path, channel: &Channel, args: &[String]) {
    let start = fs::read_to_string(folder.join("vmm.log"))
        .unwrap_or_default()
        .matches("started")
        .count();
    note(folder, "vmm", &format!("started {}", descriptors()));
    let [of, cpus] = ["--accel", "--cpus"].map(|name| after(args, name).unwrap_or_default());
    let devices = args.iter().filter(|arg| *arg == "--device").count();
    let plan = format!("threads for {of}, {cpus} CPUs, {devices} devices");
    note(folder, "vmm", &plan);
    let script = fs::read_to_string(folder.join("vmm.script")).expect("vmm.script");
    let lines: Vec<_> = script.lines().collect();
    let line = lines.get(start).or(lines.last()).expect("a line");
    let mut received = channel.recv::<ToVmm>().expect("configuration");
    let ToVmm::Configure(config) = &received.message else {
        panic!("expected a configuration");
    };
    let config = config.clone();
    let mut kernel = String::new();
    File::from(received.take(config.kernel).expect("kernel"))
        .read_to_string(&mut kernel)
        .expect("kernel");
    let memory = File::from(received.take(config.memory_fd).expect("memory"));
    assert_eq!(memory.metadata().expect("memory").len(), config.memory);
    assert!(memory.set_len(0).is_err(), "guest memory is not sealed");
    // Kept open as long as a real VMM would.
    let mut sockets = Vec::new();
    for device in &config.devices {
        let socket = device.socket.map(|index| received.take(index));
        sockets.push(socket.transpose().expect("socket"));
        note(
            folder,
            "vmm",
            &format!(
                "device {} type {} slot {} queues {} config {} connected {}",
                device.id,
                device.device_type,
                device.slot,
                device.queues,
                device.config_size,
                device.socket.is_some()
            ),
        );
    }
    if let Some(index) = config.acpi_dump {
        let mut table = b"DSDT\x28\0\0\0".to_vec();
        table.resize(40, 7);
        File::from(received.take(index).expect("dump"))
            .write_all(&table)
            .expect("dump");
    }
    if let Some(index) = config.serial {
        File::from(received.take(index).expect("serial"))
            .write_all(b"from the 16550\n")
            .expect("serial");
    }
    let accel = match config.accel {
        Accel::Kvm { .. } => "kvm",
        Accel::Soft => "soft",
        Accel::None { socket: Some(_) } => "none",
        Accel::None { socket: None } => "nothing",
    };
    note(
        folder,
        "vmm",
        &format!(
            "kernel {kernel:?} cmdline {:?} cpus {} memory {} accel {accel} panic {:?}",
            config.cmdline, config.cpus, config.memory, config.panic_device
        ),
    );
    let send = |message: &FromVmm| channel.send(message, &[]).expect("send");
    let event = |event: Event| send(&FromVmm::Event(event));
    // Of the one device that these scripts lose.
    let mut connection = 0;
    for step in line.split_whitespace() {
        let (word, value) = step.split_once(':').unwrap_or((step, ""));
        match word {
            "refuse" => send(&FromVmm::Refused {
                message: value.to_owned(),
            }),
            "ready" => send(&FromVmm::Ready(Summary {
                boot: "fake".to_owned(),
                memory_map: vec![(0, config.memory, "RAM".to_owned())],
                ports: vec![(0x600, 1, "sleep control".to_owned())],
                pci: vec![(0, "1234:5678".to_owned(), "host bridge".to_owned())],
                landlock: 0,
            })),
            "start" => match channel.recv::<ToVmm>() {
                Ok(received) => assert!(matches!(received.message, ToVmm::Start)),
                Err(anemone_ipc::Error::Closed) => exit(0),
                Err(error) => panic!("{error}"),
            },
            "power" => {
                let received = channel.recv::<ToVmm>().expect("message");
                assert!(matches!(received.message, ToVmm::PowerButton));
                note(folder, "vmm", "power button");
            }
            "shutdown" => event(Event::Shutdown),
            "reset" => event(Event::Reset {
                cause: "reset register".to_owned(),
            }),
            "panic" => event(Event::Panic),
            "lost" => event(Event::BackendLost {
                id: value.to_owned(),
                connection,
                reason: "no \x1b[31manswer".to_owned(),
            }),
            "reconnect" => {
                let mut received = channel.recv::<ToVmm>().expect("message");
                let ToVmm::Reconnect { id, .. } = &received.message else {
                    panic!("expected a connection");
                };
                let id = id.clone();
                if let &ToVmm::Reconnect {
                    connection: number,
                    socket,
                    ..
                } = &received.message
                {
                    assert!(number > connection);
                    connection = number;
                    sockets.push(Some(received.take(socket).expect("socket")));
                }
                note(folder, "vmm", &format!("reconnect {id} {connection}"));
                event(Event::BackendBack { id, connection });
            }
            "serve" => loop {
                let mut received = channel.recv::<ToVmm>().expect("message");
                match &received.message {
                    ToVmm::Devices => send(&FromVmm::Devices(vec![DeviceUse {
                        id: "rng".to_owned(),
                        untouched: Some("no driver".to_owned()),
                    }])),
                    ToVmm::Reconnect {
                        id,
                        connection: number,
                        socket,
                    } => {
                        let (id, socket) = (id.clone(), *socket);
                        connection = *number;
                        sockets.push(Some(received.take(socket).expect("socket")));
                        event(Event::BackendBack { id, connection });
                    }
                    ToVmm::PowerButton => {
                        event(Event::Shutdown);
                        break;
                    }
                    other => panic!("{other:?}"),
                }
            },
            "untouched" => send(&FromVmm::Devices(vec![DeviceUse {
                id: value.to_owned(),
                untouched: Some("no driver".to_owned()),
            }])),
            "failed" => event(Event::Failed {
                message: value.to_owned(),
            }),
            "nonsense" => channel.send(&"nonsense", &[]).expect("send"),
            other => common_step(other, value),
        }
    }
}

/// Steps: `ready`, `fail:TEXT`, `quit`, `power`, `keep:KEY`, `forget:KEY`, `dial:PORT` (the port is
/// the question's id, too; a socket that comes gets the id), and those of [`vmm`] that
/// end the process. After the last step it obeys its channel until that closes.
fn device(folder: &Path, channel: &Channel, args: &[String]) {
    let id = after(args, "--id").expect("--id");
    note(
        folder,
        &id,
        &format!("{} {}", args[1..].join(" "), descriptors()),
    );
    if let Some(fd) = after(args, "--file-fd") {
        // SAFETY: the supervisor passes the descriptor under this number; nothing else has it.
        let mut file = unsafe { File::from_raw_fd(fd.parse().expect("a number")) };
        file.write_all(b"console output\n").expect("file");
        note(folder, &id, &format!("file {}", file.as_raw_fd() > 3));
    }
    let starts = fs::read_to_string(folder.join(format!("{id}.log"))).expect("log");
    let start = starts.matches("--control-fd").count() - 1;
    let script = fs::read_to_string(folder.join(format!("{id}.script")));
    let script = script.unwrap_or("ready".to_owned());
    let lines: Vec<_> = script.lines().collect();
    let line = lines.get(start).or(lines.last()).expect("a line");
    let send = |message: &FromDevice| channel.send(message, &[]).expect("send");
    for step in line.split_whitespace() {
        let (word, value) = step.split_once(':').unwrap_or((step, ""));
        match word {
            "ready" => send(&FromDevice::Ready { landlock: 0 }),
            "fail" => send(&FromDevice::Failed {
                message: value.to_owned(),
            }),
            "quit" => send(&FromDevice::QuitRequested),
            "power" => send(&FromDevice::PowerRequested),
            "keep" => {
                let key = value.parse().expect("a number");
                let file = File::open(folder.join("kernel")).expect("kernel");
                let fd = FdIndex(0);
                let keep = FromDevice::Keep { key, fd };
                channel.send(&keep, &[file.as_fd()]).expect("send");
            }
            "dial" => {
                let port: u32 = value.parse().expect("a number");
                let id = port.into();
                send(&FromDevice::Dial { id, port });
            }
            "forget" => send(&FromDevice::Forget {
                key: value.parse().expect("a number"),
            }),
            other => common_step(other, value),
        }
    }
    let mut connections = Vec::new();
    loop {
        match channel.recv::<ToDevice>() {
            Ok(mut received) => match &received.message {
                ToDevice::Kept { keys } => {
                    let keys = keys.clone();
                    for fd in 0..keys.len() {
                        received.take(FdIndex(fd as u16)).expect("a descriptor");
                    }
                    note(folder, &id, &format!("kept {keys:?}"));
                }
                &ToDevice::Connect { socket } => {
                    connections.push(received.take(socket).expect("socket"));
                    note(folder, &id, "connect");
                }
                &ToDevice::Dialed {
                    id: question,
                    socket,
                } => {
                    if let Some(index) = socket {
                        let mut stream = File::from(received.take(index).expect("socket"));
                        write!(stream, "{question}").expect("socket");
                    }
                    let outcome = socket.map_or("refused", |_| "connected");
                    note(folder, &id, &format!("dialed {question} {outcome}"));
                }
                ToDevice::Balloon { target } => {
                    note(folder, &id, &format!("balloon {target:?}"));
                    send(&FromDevice::Balloon(Balloon {
                        target: target.unwrap_or(4096),
                        actual: 4096,
                        statistics: vec![(4, 3 << 20)],
                    }));
                }
                ToDevice::WindowSize { columns, rows } => {
                    note(folder, &id, &format!("window {columns}x{rows}"));
                }
            },
            Err(anemone_ipc::Error::Closed) => break,
            Err(error) => panic!("{error}"),
        }
    }
    note(folder, &id, "closed");
}

fn common_step(word: &str, value: &str) {
    match word {
        "sleep" => std::thread::sleep(Duration::from_millis(value.parse().expect("a number"))),
        "kill" => die_of(value.parse().expect("a number")),
        "exit" => exit(value.parse().expect("a number")),
        "hang" => loop {
            std::thread::park();
        },
        other => panic!("no step is called {other}"),
    }
}

/// Ends this process by a signal. It is the first of its PID namespace, which no signal ends that it
/// sends itself; so the kernel has to have a reason.
fn die_of(signal: i32) {
    let kill = libc::sock_filter {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: libc::SECCOMP_RET_KILL_PROCESS,
    };
    let program = libc::sock_fprog {
        len: 1,
        filter: (&raw const kill).cast_mut(),
    };
    // SAFETY: ends this process.
    unsafe {
        match signal {
            libc::SIGSEGV => {
                libc::signal(signal, libc::SIG_DFL);
                std::ptr::without_provenance::<u8>(16).read_volatile();
            }
            libc::SIGSYS => {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program);
            }
            libc::SIGKILL => {
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT);
                libc::getpid();
            }
            _ => {}
        }
    }
    panic!("signal {signal}");
}
