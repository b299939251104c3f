//! The control group of a VM, where the kernel has all controllers of version 2.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anemone_guest_init::place::Place;

use crate::sys;
use crate::vm::{Result, Vm};

const ROOT: &str = "/sys/fs/cgroup";
const CONTROLLERS: &str = "+memory +cpu +pids";

/// Processes are in their groups, also one that has taken the place of another; limits are set; and
/// nothing is left at the end.
pub fn limited(place: &Place) -> Result<()> {
    let parent = Path::new(ROOT).join("vms");
    let prepared = sys::mount("cgroup2", ROOT, "cgroup2", 0)
        .and_then(|()| fs::write(format!("{ROOT}/cgroup.subtree_control"), CONTROLLERS))
        .and_then(|()| fs::create_dir(&parent));
    prepared.map_err(|e| format!("control groups: {e}"))?;
    // Nobody has delegated a group to the user here.
    let place = Place {
        user: None,
        ..place.clone()
    };
    let limits = "memory-max=600M,cpu-max=150,pids-max=300,device-memory-max=32M";
    let option = format!("{},{limits}", parent.display());
    let options = ["--cgroup", &option, "--name", "grouped", "--rng"];
    let mut vm = Vm::start(&place, "pause,rng,poweroff", &options)?;
    vm.wait_for("guest: waits for a line")?;
    let group = parent.join(format!("anemone-grouped-{}", vm.pid()));
    for (file, wanted) in [
        ("memory.max", "629145600"),
        ("cpu.max", "150000 100000"),
        ("pids.max", "300"),
        ("vmm/memory.max", "max"),
        ("device-rng/memory.max", "33554432"),
        ("device-console/memory.max", "33554432"),
    ] {
        let found = read(&group.join(file))?;
        if found.trim() != wanted {
            return Err(format!("{file} is {}, not {wanted}", found.trim()));
        }
    }
    has(&group, "supervisor", vm.pid())?;
    for (program, name) in [
        ("anemone-vmm", "vmm"),
        ("anemone-console", "device-console"),
        ("anemone-rng", "device-rng"),
    ] {
        has(&group, name, vm.process(program)?.pid)?;
    }
    vm.kill("anemone-rng")?;
    has(&group, "device-rng", vm.process("anemone-rng")?.pid)?;
    let used: u64 = read(&group.join("memory.current"))?
        .trim()
        .parse()
        .map_err(|e| format!("memory.current: {e}"))?;
    if used < 32 << 20 {
        return Err(format!("the VM's memory is not counted: {used} bytes"));
    }
    vm.type_text("on\n")?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: was told on", "guest: random bytes", "guest: done"])?;
    let end = Instant::now() + Duration::from_secs(10);
    while group.exists() {
        if Instant::now() > end {
            return Err(format!("{} is left", group.display()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let left = read(&parent.join("cgroup.subtree_control"))?;
    match left.trim() {
        "" => Ok(()),
        left => Err(format!("controllers are left: {left}")),
    }
}

/// Whether a process is in the group `name` of the VM's.
fn has(group: &Path, name: &str, pid: u32) -> Result<()> {
    let listed = read(&group.join(name).join("cgroup.procs"))?;
    match listed.lines().any(|line| line == pid.to_string()) {
        true => Ok(()),
        false => Err(format!("process {pid} is not in {name}, only: {listed}")),
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}
