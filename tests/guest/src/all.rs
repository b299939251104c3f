//! One VM with every device, all of them at work at the same time.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anemone_guest_init::place::Place;
use anemone_guest_init::protocol::Line;
use anemone_guest_init::sockets;

use crate::net::{self, Server};
use crate::vm::{self, Result, Vm};
use crate::{balloon, share};

/// Bytes in each of the four directions of the sockets.
const SOCKET_BYTES: u64 = 4 << 20;
/// Bytes of the file that goes through the network.
const FILE_BYTES: usize = 2_000_000;
/// Sectors of each disk.
const SECTORS: u64 = 16 << 11;

/// Devices that see all of the guest's memory unless they are told otherwise.
const SHARED: [&str; 7] = [
    "anemone-blk[first]",
    "anemone-blk[second]",
    "anemone-fs[clients]",
    "anemone-fs[share]",
    "anemone-net[net0]",
    "anemone-pmem[pmem0]",
    "anemone-vsock[vsock]",
];

/// The other processes.
const OTHERS: [&str; 8] = [
    "anemone",
    "anemone-balloon[balloon]",
    "anemone-console[console]",
    "anemone-console[serial]",
    "anemone-passt[net0]",
    "anemone-rng[rng]",
    "anemone-vmm",
    "passt",
];

/// Every device with the exposure that it has by default.
pub fn shared(place: &Place) -> Result<()> {
    run(place, "")
}

/// No back end sees guest memory.
pub fn bounce(place: &Place) -> Result<()> {
    run(place, ",memory=bounce")
}

fn run(place: &Place, memory: &str) -> Result<()> {
    let content = Arc::new(net::payload(FILE_BYTES));
    let server = Server::start(Arc::clone(&content))?;
    let port = net::free_port()?;
    let folder = share::make(place)?;
    let (from, to) = (place.scratch("first.img"), place.scratch("second.img"));
    let first = vm::make_disk(place, &from, SECTORS, 1)?;
    vm::make_disk(place, &to, SECTORS, 2)?;
    vm::give_to_user(place, &place.disk).map_err(|e| e.to_string())?;
    let socket = place.scratch("vsock.sock");
    let socket = Path::new(&socket);
    let echo = sockets::serve(socket).map_err(|e| format!("vsock: {e}"))?;
    vm::give_to_user(place, &sockets::host_path(socket)).map_err(|e| e.to_string())?;
    let serial = place.scratch("serial.log");

    let passt = place.passt.display();
    let clients = place.clients.display();
    let options = [
        "--cpus=2".to_owned(),
        // A guest that is reset has failed, and what has done that is told.
        "--on-reboot=stop".to_owned(),
        "--log-level=info".to_owned(),
        "--memory".to_owned(),
        "320M".to_owned(),
        "--console".to_owned(),
        format!("stdio{memory}"),
        format!("--serial=file={serial}"),
        format!("--disk=path={from},id=first{memory}"),
        format!("--disk=path={to},id=second{memory}"),
        format!("--net=user,host-loopback,forward=tcp:{port}-80,passt={passt}{memory}"),
        format!("--fs=tag=share,path={folder},id=share{memory}"),
        format!("--fs=tag=clients,path={clients},readonly,id=clients{memory}"),
        format!("--vsock=socket={}{memory}", socket.display()),
        format!("--balloon=deflate-on-oom{memory}"),
        format!("--pmem=path={}{memory}", place.disk.display()),
        format!("--rng=rate=1M{memory}"),
    ];
    let steps = format!(
        "uname,net,serve,all,poweroff anemone.fetch={} anemone.vsock={SOCKET_BYTES}",
        server.port
    );
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let mut vm = Vm::start(place, &steps, &options)?;
    vm.wait_for("guest: all devices work")?;
    let path = socket.to_owned();
    let exchange = thread::spawn(move || sockets::exchange(&path, SOCKET_BYTES, false));
    balloon::ask(place, &vm, &["64M"])?;
    for _ in 0..3 {
        let fetched = curl(place, port)?;
        if fetched != *content {
            let length = fetched.len();
            return Err(format!("curl: {length} bytes, or others, of {FILE_BYTES}"));
        }
    }
    balloon::expect(place, &vm, "64.0 MiB of 64.0 MiB")?;
    doctor(place, &vm, memory)?;
    balloon::ask(place, &vm, &["0"])?;
    balloon::expect(place, &vm, "0.0 MiB of 0.0 MiB")?;
    let exchanged = exchange.join().map_err(|_| "a thread died")?;
    exchanged.map_err(|e| format!("sockets to the guest: {e}"))?;
    // What takes longest, so that all have been at work until here.
    vm.wait_for("guest: share written")
        .map_err(|e| vm.expect_said(&[]).err().unwrap_or(e))?;
    vm.type_text("\n")?;
    vm.expect_exit(0)?;

    let echoed = echo.join().map_err(|_| "a thread died")?;
    let echoed = echoed.map_err(|e| format!("sockets from the guest: {e}"))?;
    if echoed != SOCKET_BYTES {
        return Err(format!("{echoed} of {SOCKET_BYTES} bytes through a socket"));
    }
    vm.expect_said(&[
        "guest: random bytes from virtio_rng",
        "guest: pmem written",
        "guest: share written",
        &format!("guest: vsock {SOCKET_BYTES} bytes to the host and back"),
        &format!("guest: vsock {SOCKET_BYTES} bytes from the host and back"),
        "guest: all devices verified",
        "guest: done",
    ])?;
    vm::expect_content(&from, &first)?;
    vm::expect_content(&to, &first)?;
    share::verify(&folder)?;
    let written = std::fs::read_to_string(&serial).map_err(|e| format!("{serial}: {e}"))?;
    match written.contains("guest: the serial port works") {
        true => Ok(()),
        false => Err(format!("the serial port has {written:?}")),
    }
}

/// What curl gets of the guest's server through the forwarded port.
fn curl(place: &Place, port: u16) -> Result<Vec<u8>> {
    let url = format!("http://127.0.0.1:{port}/fetched");
    let output = vm::client(place, "curl")
        .args(["--silent", "--show-error", "--fail", "--max-time", "60"])
        .arg(&url)
        .output()
        .map_err(|e| format!("cannot start curl: {e}"))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Keeps what `anemone doctor --vm` tells of the VM beside the log, and looks at it.
fn doctor(place: &Place, vm: &Vm, memory: &str) -> Result<()> {
    // Jailed processes show themselves to root only, whoever has started them.
    let output = Command::new(place.programs.join("anemone"))
        .args(["doctor", "--vm", &vm.pid().to_string()])
        .env_clear()
        .output()
        .map_err(|e| format!("anemone doctor: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    for line in text.lines() {
        println!("{}", Line::Keep("doctor".into(), line.into()));
    }
    let problems = doctor_problems(&text, memory.is_empty());
    match problems.is_empty() {
        true => Ok(()),
        false => Err(problems.join("\n")),
    }
}

/// What is missing in doctor's text, or ought not to be there.
fn doctor_problems(text: &str, shared: bool) -> Vec<String> {
    let mut expected = [&SHARED[..], &OTHERS].concat();
    expected.sort_unstable();
    let parts: Vec<(&str, &str)> = text
        .split("\n\n")
        .skip(1)
        .filter_map(|part| Some((part.split_once(", pid ")?.0, part)))
        // passt runs under the name of the build for this CPU.
        .map(|(name, part)| match name.starts_with("passt.") {
            true => ("passt", part),
            false => (name, part),
        })
        .collect();
    let mut names: Vec<_> = parts.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    if names != expected {
        return vec![format!("doctor tells of {}", names.join(", "))];
    }
    let mut problems = Vec::new();
    for (name, part) in parts {
        let mut wanted = vec![
            "  descriptors\n",
            "  threads\n",
            "  limits  ",
            "  landlock  ",
            "  root  ",
        ];
        let sees_guest = name == "anemone-vmm" || shared && SHARED.contains(&name);
        wanted.push(match sees_guest {
            true => "  guest memory  327680 KiB mapped, writable",
            false => "  guest memory  none",
        });
        wanted.extend(match name {
            "anemone-blk[first]" => Some("/first.img "),
            "anemone-blk[second]" => Some("/second.img "),
            "anemone-console[serial]" => Some("/serial.log "),
            _ => None,
        });
        // passt and its keeper are in no jail of ours.
        if name != "passt" && name != "anemone-passt[net0]" {
            wanted.push(" no new privileges, no capability");
            if !part
                .lines()
                .any(|line| allowed(line).is_some_and(|n| n > 0))
            {
                problems.push(format!("{name}: no system calls are told"));
            }
            if part.contains("PRIVILEGES") || part.contains("HAS CAPABILITIES") {
                problems.push(format!("{name}: a thread is not in its jail"));
            }
        }
        let missing = wanted.iter().filter(|text| !part.contains(**text));
        problems.extend(missing.map(|text| format!("{name}: {text:?} is missing")));
    }
    problems
}

/// The count of a line like `  policy main: 21 system calls`.
fn allowed(line: &str) -> Option<u32> {
    let (_, rest) = line.strip_prefix("  policy ")?.split_once(": ")?;
    rest.strip_suffix(" system calls")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(name: &str) -> String {
        let guest = match name {
            "anemone-vmm" | "anemone-fs[share]" => "327680 KiB mapped, writable",
            name if SHARED.contains(&name) => "327680 KiB mapped, writable; 64 KiB of other",
            _ => "none",
        };
        format!(
            "\n{name}, pid 7, user 0\n  root          an empty directory\n  landlock  \
             ABI 7\n  guest memory  {guest}\n  \
             limits        open files 9\n  descriptors\n    9  /x/first.img  x\n    \
             10  /x/second.img  x\n    11  /x/serial.log  x\n  threads\n    7  x  policy main  1 \
             filter, no new privileges, no capability\n  policy main: 21 system calls\n    read\n"
        )
    }

    #[test]
    fn what_is_missing_in_a_report_is_named() {
        let all: Vec<_> = [&SHARED[..], &OTHERS].concat();
        let text: String = all.iter().map(|name| told(name)).collect();
        let text = format!("VM x, accelerator soft\n{text}");
        assert_eq!(doctor_problems(&text, true), [""; 0]);
        assert_eq!(doctor_problems(&text, false).len(), SHARED.len());
        let changed = |from: &str, to: &str| doctor_problems(&text.replace(from, to), true);
        assert!(changed("anemone-rng[rng]", "sh")[0].contains("doctor tells of anemone,"));
        assert_eq!(changed("/first.img", "/other.img").len(), 1);
        assert_eq!(changed("no capability", "HAS CAPABILITIES").len(), 2 * 13);
        assert_eq!(changed(": 21 system", ": 0 system").len(), 13);
        assert_eq!(changed("  root ", "").len(), 15);
    }
}
