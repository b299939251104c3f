//! Runs scenarios, and tells xtask about them in lines.
//!
//! As the first program of the outer guest of the nested-KVM rig it makes a system of it, runs the
//! scenarios that the kernel command line names (`rig.run=a,b,c`), and writes the lines to the
//! second serial port. `rig.interactive` gives the inner guest's shell on the first serial port
//! instead.
//!
//! On a host, `--list ACCELERATOR` prints what there is, and `NAME KEY=VALUE...` runs a scenario;
//! the pairs say what is where, see [`Place`]. `--spy SOCKET SECRET` is a back end that looks for a
//! secret in the guest's memory.

mod all;
mod balloon;
mod groups;
mod iperf;
mod kills;
mod net;
mod probe;
mod scenarios;
mod share;
mod sys;
mod vm;
mod vsock;

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anemone_driver::spy;
use anemone_guest_init::place::Place;
use anemone_guest_init::protocol::Line;

fn main() {
    if std::process::id() != 1 {
        if let Err(error) = on_host() {
            println!("{}", Line::Fail("host".into(), error.to_string()));
        }
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

fn on_host() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        None => Err(io::Error::other("no scenario is named")),
        Some("--list") => {
            let accel = arguments.next().unwrap_or_default();
            for scenario in scenarios::ALL.iter().filter(|s| s.is_for(&accel)) {
                println!("{} {}", scenario.name, scenario.about);
            }
            Ok(())
        }
        Some("--spy") => spy(
            &arguments.next().unwrap_or_default(),
            &arguments.next().unwrap_or_default(),
        ),
        Some(name) => {
            let place = Place::parse(arguments).map_err(io::Error::other)?;
            sys::adopt_orphans()?;
            run_scenario(&place, name);
            println!("{}", Line::End);
            Ok(())
        }
    }
}

/// Serves an entropy source with all manners, and reports what it sees of the secret.
fn spy(socket: &str, secret: &str) -> io::Result<()> {
    let (connection, _) = UnixListener::bind(socket)?.accept()?;
    let served = spy::serve(
        connection,
        secret.as_bytes(),
        usize::MAX / 2,
        &mut io::stdout(),
    );
    served.map_err(io::Error::other)
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
    sys::make_network()?;
    if interactive {
        return shell(&rig("demo")?);
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
        let place = rig(name)?;
        run_scenario(&place, name);
        fs::remove_dir_all(&place.scratch)?;
    }
    println!("{}", Line::End);
    Ok(())
}

/// The outer guest, with an empty folder for a scenario to write.
fn rig(scenario: &str) -> io::Result<Place> {
    let place = Place::rig(scenario);
    fs::create_dir(&place.scratch)?;
    vm::give_to_user(&place, &place.scratch)?;
    Ok(place)
}

fn run_scenario(place: &Place, name: &str) {
    println!("{}", Line::Begin(name.into()));
    let start = Instant::now();
    let result = match scenarios::ALL.iter().find(|s| s.name == name) {
        Some(scenario) => (scenario.run)(place),
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
fn shell(place: &Place) -> io::Result<()> {
    vm::give_to_user(place, &place.disk)?;
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/ttyS0")?;
    let standard = || -> io::Result<Stdio> { Ok(OwnedFd::from(port.try_clone()?).into()) };
    let guest = place
        .guests
        .first()
        .ok_or_else(|| io::Error::other("there is no guest"))?;
    let mut command = vm::run_command(
        place,
        guest,
        "console=hvc0 anemone.steps=uname,shell,poweroff",
    );
    command
        .args(["--console", "stdio", "--memory", "256M", "--cpus", "2"])
        .arg("--disk")
        .arg(format!("path={}", place.disk.display()))
        .arg("--rng")
        .stdin(standard()?)
        .stdout(standard()?)
        .stderr(standard()?);
    // SAFETY: the closure makes system calls only, which is allowed between fork and exec.
    unsafe { command.pre_exec(sys::take_terminal) };
    let status = command.status()?;
    println!("anemone: {status}");
    Ok(())
}
