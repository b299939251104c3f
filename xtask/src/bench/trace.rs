//! Times of a VMM's first steps, taken by the kernel's own trace points (tracefs), so that no
//! VMM needs to be changed and none is slowed down more than another.
//!
//! A trace instance of our own follows this thread and everything it starts. Three events count:
//! the `execve` system call that starts the program, the first `ioctl(KVM_RUN)` of any of its
//! threads, and the first port access of the guest.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::sh;
use crate::tiny;

const TRACEFS: &str = "/sys/kernel/tracing";
/// `KVM_RUN` of include/uapi/linux/kvm.h.
const KVM_RUN: u32 = 0xAE80;

/// A trace instance; removed when dropped.
pub struct Trace {
    folder: PathBuf,
}

/// Milliseconds from the `execve` call on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// Until the first `ioctl(KVM_RUN)`.
    pub first_run: f64,
    /// Until the guest's first instruction has reached the host.
    pub first_effect: Option<f64>,
}

impl Trace {
    /// Sets the instance up. Needs root.
    pub fn new() -> Result<Self> {
        if !Path::new(TRACEFS).join("instances").exists() {
            sh::quiet(Command::new("mount").args(["-t", "tracefs", "none", TRACEFS]))
                .context("bench start reads kernel trace points, for which it must be root")?;
        }
        let folder = Path::new(TRACEFS).join(format!("instances/anemone-{}", std::process::id()));
        fs::create_dir(&folder)
            .context("bench start reads kernel trace points, for which it must be root")?;
        let trace = Self { folder };
        trace.set("trace_clock", "mono")?;
        trace.set("options/event-fork", "1")?;
        // SAFETY: takes nothing and cannot fail.
        let me = unsafe { libc::gettid() };
        trace.set("set_event_pid", &me.to_string())?;
        trace.set(
            "events/syscalls/sys_enter_ioctl/filter",
            &format!("cmd == {KVM_RUN}"),
        )?;
        trace.set("events/syscalls/sys_enter_ioctl/enable", "1")?;
        trace.set("events/syscalls/sys_enter_execve/enable", "1")?;
        // KVM's own events are there only where KVM is.
        trace
            .set(
                "events/kvm/kvm_pio/filter",
                &format!("port == {}", tiny::FIRST_PORT),
            )
            .and_then(|()| trace.set("events/kvm/kvm_pio/enable", "1"))
            .context("KVM has no trace points")?;
        Ok(trace)
    }

    /// Forgets what has been recorded.
    pub fn clear(&self) -> Result<()> {
        self.set("trace", "")
    }

    /// What has been recorded, once the guest has run.
    pub fn times(&self) -> Result<Option<Times>> {
        Ok(parse(&fs::read_to_string(self.folder.join("trace"))?))
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.folder.join(file), value).with_context(|| format!("tracefs: {file}"))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _: io::Result<()> = fs::remove_dir(&self.folder);
    }
}

/// Lines look like `  anemone-vmm-812  [001] .....  5321.123456: sys_ioctl(fd: 9, cmd: ae80, …)`.
fn parse(text: &str) -> Option<Times> {
    let events = || {
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| {
                let (head, event) = line.split_once(": ")?;
                let seconds: f64 = head.split_whitespace().next_back()?.parse().ok()?;
                Some((seconds * 1e3, event))
            })
    };
    let first = |name: &str| events().find(|(_, e)| e.starts_with(name)).map(|(t, _)| t);
    let start = first("sys_execve")?;
    Some(Times {
        first_run: first("sys_ioctl")? - start,
        first_effect: first("kvm_pio").map(|t| t - start),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_count_from_the_first_exec() {
        let text = "# tracer: nop\n#\n\
            \x20          xtask-812     [001] .....  5321.100000: sys_execve(filename: 7f, argv: 7f)\n\
            \x20        anemone-812     [001] .....  5321.101000: sys_execve(filename: 7f, argv: 7f)\n\
            \x20         vcpu 0-815     [000] .....  5321.103500: sys_ioctl(fd: 9, cmd: ae80, arg: 0)\n\
            \x20         vcpu 0-815     [000] .....  5321.103600: kvm_pio: pio_write at 0x80 size 1\n\
            \x20         vcpu 0-815     [000] .....  5321.103700: sys_ioctl(fd: 9, cmd: ae80, arg: 0)\n";
        let times = parse(text).unwrap();
        assert!((times.first_run - 3.5).abs() < 1e-3, "{times:?}");
        assert!((times.first_effect.unwrap() - 3.6).abs() < 1e-3);
        assert_eq!(parse("# tracer: nop\n"), None);
    }
}
