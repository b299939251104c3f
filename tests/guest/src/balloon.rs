//! Scenarios with a memory balloon.

use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::place::Place;

use crate::vm::{self, Result, Vm};

/// MiB of guest memory that the host has pages for, by the VMM's descriptor of it.
pub fn resident_mib(vm: &Vm) -> Result<u64> {
    let vmm = vm.process("anemone-vmm")?;
    let folder = format!("/proc/{}/fd", vmm.pid);
    let entries = std::fs::read_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_memory = std::fs::read_link(&path)
            .is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:guest-memory"));
        if is_memory {
            let metadata = path.metadata().map_err(|e| format!("{folder}: {e}"))?;
            return Ok((metadata.blocks() * 512) >> 20);
        }
    }
    Err(format!("{folder}: no guest memory"))
}

/// Waits until the host has at most so many MiB for the guest.
fn expect_resident(vm: &Vm, most: u64) -> Result<u64> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let now = resident_mib(vm)?;
        if now <= most {
            return Ok(now);
        }
        if Instant::now() > end {
            return Err(format!(
                "the guest has {now} MiB of the host's memory, not {most}"
            ));
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// `anemone balloon` of this VM.
pub fn ask(place: &Place, vm: &Vm, size: &[&str]) -> Result<String> {
    let output = vm::anemone(place)
        .args(["balloon", &vm.pid().to_string()])
        .args(size)
        .output()
        .map_err(|e| format!("anemone balloon: {e}"))?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match output.status.success() {
        true => {
            println!("{text}");
            Ok(text)
        }
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Waits until the balloon says this.
pub fn expect(place: &Place, vm: &Vm, wanted: &str) -> Result<String> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let text = ask(place, vm, &[])?;
        if text.starts_with(wanted) {
            return Ok(text);
        }
        if Instant::now() > end {
            return Err(format!("the balloon says {text:?}, not {wanted:?}"));
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// Inflation, statistics, and deflation because the guest has no memory left.
pub fn balloon(place: &Place) -> Result<()> {
    let mut vm = Vm::start(
        place,
        "report,balloon,poweroff",
        &["--memory", "512M", "--balloon=deflate-on-oom"],
    )?;
    // A file has been in the guest's memory, all of which the host then has.
    vm.wait_for("guest: filled")?;
    vm.type_text("\n")?;
    vm.wait_for("guest: dropped")?;
    let before = resident_mib(&vm)?;
    vm.type_text("\n")?;
    ask(place, &vm, &["300M"])?;
    let text = expect(place, &vm, "300.0 MiB of 300.0 MiB")?;
    for statistic in [
        "free memory",
        "total memory",
        "available memory",
        "major faults",
    ] {
        if !text.contains(statistic) {
            return Err(format!("{text:?} does not tell the {statistic}"));
        }
    }
    let inflated = resident_mib(&vm)?;
    if before < 300 || inflated > 212 {
        return Err(format!(
            "{before} MiB before, {inflated} MiB with the balloon"
        ));
    }
    vm.wait_for("guest: ballooned")?;
    vm.type_text("\n")?;
    // The guest has taken back what it needed.
    vm.wait_for("guest: deflated")?;
    let needed = resident_mib(&vm)?;
    let text = ask(place, &vm, &["0"])?;
    if needed < 260 || text.starts_with("300.0 MiB") {
        return Err(format!(
            "a file of 260 MiB in {needed} MiB, and the balloon has {text}"
        ));
    }
    expect(place, &vm, "0.0 MiB of 0.0 MiB")?;
    println!("{before} MiB, with the balloon {inflated}, after deflation {needed}");
    vm.type_text("\n")?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: done"])
}

/// What the guest does not use goes back by itself.
pub fn free_page_reporting(place: &Place) -> Result<()> {
    report_to(place, "--balloon=reporting,memory=shared")
}

/// The same when the process never sees these pages.
pub fn free_page_reporting_bounced(place: &Place) -> Result<()> {
    report_to(place, "--balloon=reporting,memory=bounce")
}

fn report_to(place: &Place, balloon: &str) -> Result<()> {
    let arguments = ["--memory", "512M", balloon];
    let mut vm = Vm::start(place, "report,poweroff", &arguments)?;
    vm.wait_for("guest: filled")?;
    let large = resident_mib(&vm)?;
    if large < 300 {
        return Err(format!("a file of 300 MiB is in {large} MiB"));
    }
    vm.type_text("\n")?;
    vm.wait_for("guest: dropped")?;
    let small = expect_resident(&vm, large - 250)?;
    println!("{large} MiB with the file, {small} MiB without it");
    vm.type_text("\n")?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: done"])
}
