//! First program of the outer guest of the nested-KVM rig: makes a system of it, runs the
//! scenarios that the kernel command line names, and tells the host over the second serial port.
//!
//! `rig.run=a,b,c` names scenarios; `rig.interactive` gives the inner guest's shell on the first
//! serial port instead. On a host, `--list` prints what there is.

mod probe;
mod scenarios;
mod sys;
mod vm;

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::protocol::Line;

fn main() {
    if std::process::id() != 1 {
        list();
        return;
    }
    if let Err(error) = run() {
        println!("{}", Line::Fail("rig".into(), error.to_string()));
    }
    if let Err(error) = sys::power_off() {
        println!("cannot power off: {error}");
    }
    loop {
        thread::park();
    }
}

fn list() {
    for scenario in scenarios::ALL {
        println!("{} {}", scenario.name, scenario.about);
    }
}

fn run() -> io::Result<()> {
    sys::make_file_tree()?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let interactive = cmdline.split_whitespace().any(|w| w == "rig.interactive");
    if !interactive {
        redirect_output("/dev/ttyS1")?;
    }
    sys::load_modules()?;
    fs::set_permissions("/dev/kvm", Permissions::from_mode(0o666))?;
    if interactive {
        return shell();
    }
    thread::spawn(|| {
        loop {
            println!("{}", Line::Tick);
            thread::sleep(Duration::from_secs(1));
        }
    });
    let names = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("rig.run="))
        .unwrap_or_default();
    for name in names.split(',') {
        run_scenario(name);
    }
    println!("{}", Line::End);
    Ok(())
}

fn run_scenario(name: &str) {
    println!("{}", Line::Begin(name.into()));
    let start = Instant::now();
    let result = match scenarios::ALL.iter().find(|s| s.name == name) {
        Some(scenario) => (scenario.run)(),
        None => Err("there is no such scenario".into()),
    };
    let result = result.and_then(|()| vm::expect_nothing_left());
    let _ = vm::expect_nothing_left();
    let line = match result {
        Ok(()) => {
            let millis = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            Line::Pass(name.into(), millis)
        }
        Err(why) => Line::Fail(name.into(), why),
    };
    println!("{line}");
}

/// Sends standard output and standard error to a terminal, unprocessed.
fn redirect_output(path: &str) -> io::Result<()> {
    let port = sys::open_raw_terminal(path)?;
    for fd in [1, 2] {
        // SAFETY: both are plain descriptor numbers; replacing these two is the purpose.
        if unsafe { libc::dup2(port.as_raw_fd(), fd) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The demonstration's guest with its console on the first serial port.
fn shell() -> io::Result<()> {
    vm::give_to_user(Path::new("/dev/vda"))?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/ttyS0")?;
    let standard = || -> io::Result<Stdio> { Ok(OwnedFd::from(port.try_clone()?).into()) };
    let mut command = vm::run_command(vm::USER, "console=hvc0 anemone.steps=uname,shell,poweroff");
    command
        .args([
            "--console",
            "stdio",
            "--disk",
            "path=/dev/vda",
            "--rng",
            "--cpus",
            "2",
        ])
        .stdin(standard()?)
        .stdout(standard()?)
        .stderr(standard()?);
    // SAFETY: the closure makes system calls only, which is allowed between fork and exec.
    unsafe { command.pre_exec(sys::take_terminal) };
    let status = command.status()?;
    println!("anemone: {status}");
    Ok(())
}
