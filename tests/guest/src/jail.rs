//! What `/proc` must show of every process of a running VM (proc(5)): a seccomp filter on each
//! thread, no_new_privs, no capability, no descriptor beyond those of its role, and no code but the
//! program's.

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
    let parents: Vec<_> = all_pids().map(|p| (p, parent_of(p))).collect();
    let mut found = vec![pid];
    let mut next = 0;
    while next < found.len() {
        let children = parents.iter().filter(|(_, p)| *p == Some(found[next]));
        let children: Vec<_> = children.map(|(child, _)| *child).collect();
        found.extend(children);
        next += 1;
    }
    found.into_iter().filter_map(describe).collect()
}

/// What the threads of a process are doing: a line each with name, state, clock ticks of user and
/// kernel time so far, and where in the kernel it waits.
pub fn threads(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let line = |task: fs::DirEntry| {
        let text = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let stat = text("stat");
        // The name may hold anything but ends with the last bracket (proc(5)).
        let mut rest = stat.rsplit(") ").next()?.split(' ');
        let (state, user, kernel) = (rest.next()?, rest.nth(10)?, rest.next()?);
        let (name, wchan, call) = (text("comm"), text("wchan"), text("syscall"));
        Some(format!(
            "{} {state} {user}+{kernel} ticks, {wchan}, system call {}",
            name.trim_end(),
            call.trim_end()
        ))
    };
    tasks.filter_map(line).collect()
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

/// Whether a process's first thread filters its system calls.
pub fn is_filtered(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    field(&status, "Seccomp") == Some("2")
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
    if is_jailed(program) {
        let wrong = namespace_problems(*pid, std::process::id());
        found.extend(wrong.map(|wrong| format!("{program}: {wrong}")));
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
    match fs::read_to_string(format!("/proc/{pid}/maps")) {
        Ok(maps) => {
            let foreign = foreign_code(program, &maps);
            found.extend(foreign.map(|line| format!("{program}: executable memory: {line}")));
            if !sees_guest(program) && maps.contains(GUEST_MEMORY) {
                found.push(format!("{program}: guest memory is mapped"));
            }
        }
        Err(error) => found.push(format!("{program}: memory: {error}")),
    }
    found
}

/// Whether a program is in a jail of ours from its start: the supervisor starts others, and passt
/// has a jail of its own.
fn is_jailed(program: &str) -> bool {
    !matches!(program, "anemone" | "anemone-passt" | "passt")
}

/// Namespaces that a process shares with another one, and its number in its own PID namespace.
fn namespace_problems(pid: u32, other: u32) -> impl Iterator<Item = String> {
    let link = |pid: u32, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
    let names = ["user", "pid", "mnt", "ipc", "uts", "cgroup"].into_iter();
    let shared = names.filter(move |name| {
        let theirs = link(pid, name);
        theirs.is_none() || theirs == link(other, name)
    });
    let shared = shared.map(|name| format!("the {name} namespace is not its own"));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let number = field(&status, "NSpid").and_then(|numbers| numbers.split_whitespace().nth(1));
    let first = number == Some("1");
    let second = (!first).then(|| "it is not the first process of a PID namespace".to_owned());
    shared.chain(second)
}

/// Guest memory, as the kernel names it.
const GUEST_MEMORY: &str = "/memfd:guest-memory";

/// Whether a program has guest memory by default.
fn sees_guest(program: &str) -> bool {
    !matches!(
        program,
        "anemone-balloon" | "anemone-console" | "anemone-rng"
    )
}

/// Mappings that are executable and either writable too or not from the program's file. The VMM may
/// have code that it made for software CPUs; it writes that through another mapping.
fn foreign_code<'a>(program: &'a str, maps: &'a str) -> impl Iterator<Item = &'a str> {
    maps.lines().filter(move |line| {
        let mut fields = line.split_whitespace();
        let rights = fields.nth(1).unwrap_or_default();
        let path = fields.nth(3).unwrap_or_default();
        let known = path.ends_with(&format!("/{program}"))
            || matches!(path, "[vdso]" | "[vsyscall]")
            || program == "anemone-vmm" && path == "/memfd:anemone-code";
        rights.contains('x') && (rights.contains('w') || !known)
    })
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
        "anemone-balloon" | "anemone-fs" | "anemone-pmem" | "anemone-rng" | "anemone-vsock" => {
            &["/memfd:"]
        }
        "anemone-net" => &["/memfd:", "/dev/net/tun"],
        "anemone" => &[
            "anon_inode:[pidfd]",
            "/dev/tty",
            "/dev/pts/",
            "/dev/kvm",
            "/memfd:",
            // The identities of a shared directory, for a process that takes over.
            "user:[",
        ],
        _ => &[],
    };
    // Standard error is where every process of the VM reports, wherever the user sent it.
    let standard_error = number == "2";
    let forbidden = !sees_guest(program) && target.starts_with(GUEST_MEMORY);
    standard_error
        || !forbidden && EVERYWHERE.iter().chain(role).any(|p| target.starts_with(p))
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
    fn guest_memory_is_for_those_who_have_it() {
        let guest = "/memfd:guest-memory (deleted)";
        assert!(may_hold("anemone-blk", "5", guest, &[]));
        assert!(!may_hold("anemone-rng", "5", guest, &[]));
        assert!(may_hold("anemone-rng", "5", "/memfd:bounce (deleted)", &[]));
    }

    #[test]
    fn code_is_the_programs_own_and_never_writable() {
        let text = "00400000-00500000 r-xp 00001000 fe:00 17 /bin/anemone-vmm\n";
        let buffer =
            "7f0000000000-7f0000100000 r-xs 00000000 00:01 9 /memfd:anemone-code (deleted)\n";
        let heap = "7f0000200000-7f0000300000 rw-p 00000000 00:00 0\n";
        let vdso = "7ffc00000000-7ffc00002000 r-xp 00000000 00:00 0 [vdso]\n";
        let good = [text, buffer, heap, vdso].concat();
        assert_eq!(foreign_code("anemone-vmm", &good).count(), 0);
        let wrong = foreign_code("anemone-blk", &good).count();
        assert_eq!(wrong, 2, "another program's text, and code that was made");
        let both = buffer.replace("r-xs", "rwxs");
        assert_eq!(foreign_code("anemone-vmm", &both).count(), 1);
        let anonymous = heap.replace("rw-p", "r-xp");
        assert_eq!(foreign_code("anemone-vmm", &anonymous).count(), 1);
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
        let shared: Vec<_> = namespace_problems(me, me).collect();
        assert_eq!(shared.len(), 7, "{shared:?}");
        assert!(
            problems(&family[0], &[])
                .iter()
                .any(|p| p.contains("NoNewPrivs"))
        );
    }
}
