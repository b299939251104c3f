//! What `/proc` must show of every process of a running VM (proc(5)): a seccomp filter on each
//! thread, no_new_privs, no capability, and no descriptor beyond those of its role.

use std::fs;
use std::path::Path;

/// A process of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// File name of the program, as it was started.
    pub program: String,
}

/// `pid` and all processes below it, parents first.
pub fn family(pid: u32) -> Vec<Process> {
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let parent = found[next];
        found.extend(all_pids().filter(|&p| parent_of(p) == Some(parent)));
        next += 1;
    }
    found.into_iter().filter_map(describe).collect()
}

/// All processes whose program's name starts with `prefix`.
pub fn named(prefix: &str) -> Vec<Process> {
    all_pids()
        .filter_map(describe)
        .filter(|p| p.program.starts_with(prefix))
        .collect()
}

fn all_pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn describe(pid: u32) -> Option<Process> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let first = line.split(|&b| b == 0).next()?;
    let path = String::from_utf8_lossy(first).into_owned();
    let program = Path::new(&path).file_name()?.to_str()?.to_string();
    Some(Process { pid, program })
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    field(&status, "PPid")?.parse().ok()
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

/// Everything that is wrong with a process; empty if it is in its jail. `files` are paths it may
/// hold open besides what its role needs, such as its disk image.
pub fn problems(process: &Process, files: &[&str]) -> Vec<String> {
    let Process { pid, program } = process;
    let mut found = Vec::new();
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let tid = task.file_name().to_string_lossy().into_owned();
        match fs::read_to_string(task.path().join("status")) {
            Ok(status) => {
                let wrong = status_problems(&status);
                found.extend(wrong.map(|w| format!("{program} thread {tid}: {w}")));
            }
            Err(error) => found.push(format!("{program} thread {tid}: {error}")),
        }
    }
    if found.is_empty() && fs::metadata(format!("/proc/{pid}/task")).is_err() {
        found.push(format!("{program}: process {pid} is gone"));
    }
    match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(list) => {
            for entry in list.flatten() {
                let number = entry.file_name().to_string_lossy().into_owned();
                // A descriptor may be closed between the listing and this.
                let Ok(target) = fs::read_link(entry.path()) else {
                    continue;
                };
                let target = target.to_string_lossy();
                if !may_hold(program, &number, &target, files) {
                    found.push(format!("{program}: descriptor {number} is {target}"));
                }
            }
        }
        Err(error) => found.push(format!("{program}: descriptors: {error}")),
    }
    found
}

/// What the status of one thread must say.
fn status_problems(status: &str) -> impl Iterator<Item = String> + '_ {
    const EXPECTED: [(&str, &str); 6] = [
        ("Seccomp", "2"),
        ("NoNewPrivs", "1"),
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapInh", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
    ];
    EXPECTED.iter().filter_map(|(name, want)| {
        let got = field(status, name).unwrap_or("absent");
        (got != *want).then(|| format!("{name} is {got}, not {want}"))
    })
}

/// Whether a program's role explains an open descriptor.
fn may_hold(program: &str, number: &str, target: &str, files: &[&str]) -> bool {
    const EVERYWHERE: &[&str] = &[
        "socket:[",
        "pipe:[",
        "/dev/null",
        "anon_inode:[eventfd",
        "anon_inode:[eventpoll]",
        "anon_inode:[signalfd]",
        "anon_inode:[timerfd]",
    ];
    let role: &[&str] = match program {
        "anemone-vmm" => &[
            "/memfd:",
            "/dev/kvm",
            "anon_inode:kvm-vm",
            "anon_inode:kvm-vcpu",
        ],
        "anemone-blk" => &["/memfd:", "anon_inode:[io_uring]"],
        "anemone-console" => &["/memfd:", "/dev/pts/", "/dev/ptmx", "/dev/tty"],
        "anemone-rng" => &["/memfd:"],
        "anemone" => &[
            "anon_inode:[pidfd]",
            "/dev/tty",
            "/dev/pts/",
            "/dev/kvm",
            "/memfd:",
        ],
        _ => &[],
    };
    // Standard error is where every process of the VM reports, wherever the user sent it.
    let standard_error = number == "2";
    standard_error
        || EVERYWHERE.iter().chain(role).any(|p| target.starts_with(p))
        || files.contains(&target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_read_field_by_field() {
        let jailed = "Name:\tx\nCapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n\
            CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\nCapAmb:\t0000000000000000\n\
            NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        assert_eq!(status_problems(jailed).count(), 0);
        let free = jailed.replace("Seccomp:\t2", "Seccomp:\t0");
        let wrong: Vec<_> = status_problems(&free).collect();
        assert_eq!(wrong, ["Seccomp is 0, not 2"]);
    }

    #[test]
    fn a_file_is_allowed_only_by_name() {
        let image = ["/images/root.img"];
        assert!(may_hold("anemone-blk", "5", "/images/root.img", &image));
        assert!(!may_hold("anemone-vmm", "5", "/images/root.img", &[]));
        assert!(!may_hold("anemone-blk", "5", "anon_inode:kvm-vm", &image));
        assert!(!may_hold("anemone-vmm", "0", "/etc/passwd", &[]));
    }

    #[test]
    fn this_test_is_not_in_a_jail() {
        let me = std::process::id();
        let family = family(me);
        assert_eq!(family[0].pid, me);
        assert!(
            problems(&family[0], &[])
                .iter()
                .any(|p| p.contains("NoNewPrivs"))
        );
    }
}
