//! `anemone doctor --vm`: what each process of a running VM may touch, as the kernel has it in
//! `/proc` (proc(5)).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::Serialize;

use crate::cgroup;
use crate::control::protocol::{self, Status};
use crate::doctor::POLICIES;
use crate::error::{Error, printable};
use crate::registry::VMM;

/// The program of the supervisor.
const SUPERVISOR: &str = "anemone";
/// The program of a shared directory.
const SHARE: &str = "anemone-fs";
/// The namespaces that are told.
const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "ipc", "uts", "net", "cgroup"];
/// The limits that are told, as `/proc/PID/limits` names them.
const LIMITS: [&str; 4] = [
    "Max open files",
    "Max file size",
    "Max core file size",
    "Max locked memory",
];

/// A VM: all its processes.
#[derive(Debug, Serialize)]
pub struct Report {
    name: String,
    accel: String,
    processes: Vec<Process>,
}

/// What of a VM decides on the policies of its processes.
#[derive(Clone, Copy)]
struct About<'a> {
    accel: &'a str,
    /// Whether a directory is shared.
    shares: bool,
}

#[derive(Debug, Serialize)]
struct Process {
    pid: u32,
    program: String,
    /// Name of the device, of a device process.
    id: Option<String>,
    user: String,
    descriptors: Vec<Descriptor>,
    memory: Memory,
    /// Namespaces, and whether each is the process's own (not that of this command).
    namespaces: BTreeMap<&'static str, bool>,
    root: String,
    /// Version of Landlock's interface, as the process has told when it was ready; absent where it has
    /// not.
    landlock: Option<u32>,
    /// Its control group, and the limits that it has by that.
    group: Option<String>,
    group_limits: Vec<String>,
    /// What it may open by name with that.
    reaches: Vec<String>,
    limits: BTreeMap<&'static str, String>,
    threads: Vec<Thread>,
    policies: Vec<Policy>,
}

#[derive(Debug, Serialize)]
struct Descriptor {
    number: u32,
    target: String,
    meaning: &'static str,
}

/// What a process sees of the guest's memory, in bytes.
#[derive(Debug, Serialize)]
struct Memory {
    guest_mapped: u64,
    guest_writable: bool,
    /// It could map guest memory: it has the descriptor.
    guest_descriptor: bool,
    /// Other memory that processes share: bounce and in-flight regions, queues of io_uring.
    shared: u64,
}

#[derive(Debug, Serialize)]
struct Thread {
    tid: u32,
    /// Its number in the PID namespace of the process, as the process's own reports have it.
    inside: u32,
    name: String,
    /// The policy that it has taken on last, where that is known.
    policy: Option<String>,
    filters: u32,
    no_new_privileges: bool,
    /// Whether any of permitted, effective, inheritable and ambient capabilities is left.
    capabilities: bool,
}

#[derive(Debug, Serialize)]
struct Policy {
    name: &'static str,
    system_calls: usize,
    rules: Vec<Rule>,
}

#[derive(Debug, Serialize)]
struct Rule {
    rule: &'static str,
    reason: &'static str,
}

impl Report {
    /// Looks at the processes of a VM.
    ///
    /// # Errors
    /// This user may not look.
    pub fn of(vm: &Status) -> Result<Self, Error> {
        let pids = family(vm.pid);
        let ram = guest_memory(&pids);
        let about = About {
            accel: &vm.accel,
            shares: pids
                .iter()
                .any(|pid| program(*pid).as_deref() == Some(SHARE)),
        };
        let mut processes = Vec::new();
        for pid in pids {
            let told = vm.processes.iter().find(|p| p.pid == Some(pid));
            match Process::look(pid, about, ram.as_ref(), told) {
                Ok(process) => processes.push(process),
                // It has ended meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(Error::Failed(format!(
                        "process {pid}: {error}: jailed processes show themselves to root only"
                    )));
                }
            }
        }
        Ok(Self {
            name: vm.name.clone(),
            accel: vm.accel.clone(),
            processes,
        })
    }

    /// The report for people. With `reasons`, each rule with its reason.
    pub fn text(&self, reasons: bool) -> String {
        let mut text = format!("VM {}, accelerator {}\n", self.name, self.accel);
        for process in &self.processes {
            process.write(&mut text, reasons);
        }
        text
    }
}

/// A process and all below it: passt is started by a process of its own. Each parent comes before
/// its children.
fn family(first: u32) -> Vec<u32> {
    let parents: BTreeMap<u32, u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let parent = status(&format!("/proc/{pid}"))?.get("PPid")?.parse().ok()?;
            Some((pid, parent))
        })
        .collect();
    let mut pids = Vec::new();
    let mut left = vec![first];
    while let Some(pid) = left.pop() {
        pids.push(pid);
        // Numbers may have been used again while they were read: none comes twice.
        let children = parents
            .iter()
            .rev()
            .filter(|(child, parent)| **parent == pid && !pids.contains(child));
        left.extend(children.map(|(child, _)| *child));
    }
    pids
}

/// The effective user of a process.
pub fn user_of(pid: u32) -> Option<u32> {
    let status = status(&format!("/proc/{pid}"))?;
    status.get("Uid")?.split_whitespace().nth(1)?.parse().ok()
}

/// The words of a process's command line.
fn words(pid: u32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|b| *b == 0)
        .map(|word| printable(&String::from_utf8_lossy(word)))
        .collect()
}

fn program(pid: u32) -> Option<String> {
    let words = words(pid);
    let name = Path::new(words.first()?).file_name()?;
    Some(name.to_string_lossy().into_owned())
}

fn status(folder: &str) -> Option<BTreeMap<String, String>> {
    let text = fs::read_to_string(format!("{folder}/status")).ok()?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Some(
        fields
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect(),
    )
}

/// Device and inode of the guest's memory, as the VMM has it mapped.
fn guest_memory(pids: &[u32]) -> Option<(String, u64)> {
    let vmm = pids
        .iter()
        .find(|pid| program(**pid).is_some_and(|p| p == VMM))?;
    let maps = fs::read_to_string(format!("/proc/{vmm}/maps")).ok()?;
    maps.lines()
        .filter_map(Mapping::parse)
        .find(|mapping| mapping.path.starts_with("/memfd:guest-memory"))
        .map(|mapping| (mapping.device.to_owned(), mapping.inode))
}

/// A line of `/proc/PID/maps`.
struct Mapping<'a> {
    size: u64,
    rights: &'a str,
    device: &'a str,
    inode: u64,
    path: &'a str,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Self {
            size: hex(end)?.checked_sub(hex(start)?)?,
            rights: fields.next()?,
            device: fields.nth(1)?,
            inode: fields.next()?.parse().ok()?,
            path: fields.next().unwrap_or_default(),
        })
    }
}

impl Process {
    fn look(
        pid: u32,
        about: About<'_>,
        ram: Option<&(String, u64)>,
        told: Option<&protocol::Process>,
    ) -> io::Result<Self> {
        let folder = format!("/proc/{pid}");
        let words = words(pid);
        let program = program(pid).unwrap_or_default();
        let status = status(&folder).ok_or(io::ErrorKind::NotFound)?;
        let id = words.iter().position(|word| word == "--id");
        let ram_inode = ram.map(|(_, inode)| *inode);
        let mut descriptors = Vec::new();
        let mut guest_descriptor = false;
        for entry in fs::read_dir(format!("{folder}/fd"))? {
            let entry = entry?;
            let name = entry.file_name();
            let (Ok(target), Some(number)) = (
                fs::read_link(entry.path()),
                name.to_str().and_then(|name| name.parse().ok()),
            ) else {
                continue;
            };
            let target = printable(&target.to_string_lossy());
            if target.starts_with("/memfd:guest-memory") {
                let inode = fs::metadata(entry.path()).map(|m| m.ino()).ok();
                guest_descriptor |= inode.is_some() && inode == ram_inode;
            }
            descriptors.push(Descriptor {
                number,
                meaning: meaning(&target),
                target,
            });
        }
        descriptors.sort_by_key(|fd| fd.number);
        let maps = fs::read_to_string(format!("{folder}/maps"))?;
        let mut memory = Memory {
            guest_mapped: 0,
            guest_writable: false,
            guest_descriptor,
            shared: 0,
        };
        for mapping in maps.lines().filter_map(Mapping::parse) {
            let is_ram = |(device, inode): &(String, u64)| {
                mapping.device == device && mapping.inode == *inode
            };
            if ram.is_some_and(is_ram) {
                memory.guest_mapped += mapping.size;
                memory.guest_writable |= mapping.rights.contains('w');
            } else if mapping.rights.ends_with('s') {
                memory.shared += mapping.size;
            }
        }
        let group = cgroup::of_process(&pid.to_string()).ok();
        let threads = threads(pid, &program, &words, about)?;
        let policies = POLICIES
            .iter()
            .filter(|(of, name, _, _)| {
                // Only those that a thread has; all where that is not known.
                *of == program
                    && threads
                        .iter()
                        .any(|t| t.policy.as_ref().is_none_or(|p| p == name))
            })
            .map(|(_, name, system_calls, text)| Policy {
                name,
                system_calls: *system_calls,
                rules: text.lines().filter_map(Rule::parse).collect(),
            })
            .collect();
        Ok(Self {
            pid,
            id: id.and_then(|at| words.get(at + 1).cloned()),
            program,
            user: status
                .get("Uid")
                .and_then(|ids| ids.split_whitespace().nth(1))
                .unwrap_or("?")
                .to_owned(),
            descriptors,
            memory,
            namespaces: namespaces(&folder),
            root: root(&folder),
            group: group
                .as_ref()
                .map(|group| printable(&group.to_string_lossy())),
            group_limits: group.as_deref().map(cgroup::limits).unwrap_or_default(),
            landlock: told.and_then(|told| told.landlock),
            reaches: told.map(|told| told.reaches.clone()).unwrap_or_default(),
            limits: limits(&folder),
            threads,
            policies,
        })
    }

    fn write(&self, text: &mut String, reasons: bool) {
        // Writing to a String cannot fail.
        let device = self
            .id
            .as_ref()
            .map_or(String::new(), |id| format!("[{id}]"));
        let _ = writeln!(
            text,
            "\n{}{device}, pid {}, user {}",
            self.program, self.pid, self.user
        );
        let own: Vec<_> = self
            .namespaces
            .iter()
            .filter(|(_, own)| **own)
            .map(|(n, _)| *n)
            .collect();
        let shared: Vec<_> = self
            .namespaces
            .iter()
            .filter(|(_, own)| !**own)
            .map(|(n, _)| *n)
            .collect();
        let _ = writeln!(
            text,
            "  namespaces    own: {}; the host's: {}",
            list(&own),
            list(&shared)
        );
        let _ = writeln!(text, "  root          {}", self.root);
        let _ = writeln!(text, "  landlock      {}", self.landlock_text());
        if let Some(group) = &self.group {
            let limits = self.group_limits.iter().map(|limit| format!(", {limit}"));
            let limits: String = limits.collect();
            let _ = writeln!(text, "  control group {group}{limits}");
        }
        let _ = writeln!(text, "  guest memory  {}", self.memory.text());
        let limits: Vec<_> = self
            .limits
            .iter()
            .map(|(name, value)| format!("{} {value}", name.trim_start_matches("Max ")))
            .collect();
        let _ = writeln!(text, "  limits        {}", limits.join(", "));
        let _ = writeln!(text, "  descriptors");
        // Descriptors that look alike are one line, and so are those that differ in a number only.
        let mut lines: Vec<(&Descriptor, usize)> = Vec::new();
        for fd in &self.descriptors {
            match lines
                .iter_mut()
                .find(|(first, _)| kind(&first.target) == kind(&fd.target))
            {
                Some((_, count)) => *count += 1,
                None => lines.push((fd, 1)),
            }
        }
        for (fd, count) in lines {
            let more = match count {
                1 => String::new(),
                _ => format!(" ({count} of them)"),
            };
            let _ = writeln!(
                text,
                "    {:>3}  {:<44}  {}{more}",
                fd.number, fd.target, fd.meaning
            );
        }
        let _ = writeln!(text, "  threads");
        for thread in &self.threads {
            let _ = writeln!(
                text,
                "    {:>7} ({:>2} inside)  {:<15}  policy {:<10}  {} filter{}, {}, {}",
                thread.tid,
                thread.inside,
                thread.name,
                thread.policy.as_deref().unwrap_or("?"),
                thread.filters,
                if thread.filters == 1 { "" } else { "s" },
                if thread.no_new_privileges {
                    "no new privileges"
                } else {
                    "MAY GAIN PRIVILEGES"
                },
                if thread.capabilities {
                    "HAS CAPABILITIES"
                } else {
                    "no capability"
                },
            );
        }
        for policy in &self.policies {
            let _ = writeln!(
                text,
                "  policy {}: {} system calls",
                policy.name, policy.system_calls
            );
            if reasons {
                for rule in &policy.rules {
                    let _ = writeln!(text, "    {:<44}  {}", rule.rule, rule.reason);
                }
            } else {
                let mut names: Vec<_> = policy
                    .rules
                    .iter()
                    .filter(|rule| !rule.rule.contains("errno="))
                    .filter_map(|rule| rule.rule.split(' ').next())
                    .collect();
                names.sort_unstable();
                names.dedup();
                let _ = writeln!(text, "    {}", names.join(" "));
            }
        }
    }
}

impl Process {
    /// What Landlock leaves of what has a name on the host.
    fn landlock_text(&self) -> String {
        let Some(abi) = self.landlock.filter(|abi| *abi > 0) else {
            return match self.landlock {
                Some(_) => "NOT IN USE: this kernel has none".to_owned(),
                None => "not in use".to_owned(),
            };
        };
        let files = match self.reaches.as_slice() {
            [] => "no file".to_owned(),
            places => format!("of all files only {}", places.join(", ")),
        };
        let ports = if abi < 4 { "" } else { "; no TCP port" };
        let others = match (abi, self.program.as_str()) {
            (..6, _) => "",
            // It ends those that it has started before.
            (_, SUPERVISOR) => "; no abstract socket",
            _ => "; no abstract socket, no signal to others",
        };
        format!("ABI {abi}: {files}{ports}{others}")
    }
}

fn list(words: &[&str]) -> String {
    match words {
        [] => "none".to_owned(),
        words => words.join(" "),
    }
}

impl Memory {
    fn text(&self) -> String {
        let size = |bytes: u64| format!("{} KiB", bytes >> 10);
        let guest = match (self.guest_mapped, self.guest_descriptor) {
            (0, false) => "none".to_owned(),
            (0, true) => "none mapped, but it has the descriptor".to_owned(),
            (mapped, _) => format!(
                "{} mapped, {}",
                size(mapped),
                if self.guest_writable {
                    "writable"
                } else {
                    "read-only"
                }
            ),
        };
        match self.shared {
            0 => guest,
            shared => format!("{guest}; {} of other shared memory", size(shared)),
        }
    }
}

impl Rule {
    fn parse(line: &'static str) -> Option<Self> {
        let (rule, reason) = line.split_once("  # ")?;
        Some(Self { rule, reason })
    }
}

/// A descriptor's target without the number of a socket, pipe or namespace.
fn kind(target: &str) -> &str {
    match target.split_once(":[") {
        Some((kind @ ("socket" | "pipe" | "user"), _)) => kind,
        _ => target,
    }
}

/// What a descriptor is good for.
fn meaning(target: &str) -> &'static str {
    const MEANINGS: &[(&str, &str)] = &[
        ("/memfd:guest-memory", "the guest's memory"),
        ("/memfd:anemone-code", "code of software CPUs"),
        ("/memfd:", "memory shared with another process"),
        ("socket:", "a connection, made before the jail or handed in"),
        ("pipe:", "a pipe"),
        ("user:[", "the user namespace of a device process"),
        (
            "anon_inode:[eventfd",
            "an event counter: kick, interrupt or wake-up",
        ),
        ("anon_inode:[eventpoll", "waits for other descriptors"),
        ("anon_inode:[signalfd", "signals as messages"),
        ("anon_inode:[timerfd", "a timer"),
        ("anon_inode:[io_uring", "operations on its files"),
        ("anon_inode:[pidfd", "a child"),
        ("anon_inode:kvm-vm", "the virtual machine"),
        ("anon_inode:kvm-vcpu", "a vCPU"),
        ("/dev/kvm", "the accelerator"),
        ("/dev/null", "nothing"),
        ("/dev/net/tun", "a tap"),
        ("/dev/pts/", "a terminal"),
        ("/dev/ptmx", "a pseudo-terminal"),
        ("/dev/tty", "a terminal"),
    ];
    let known = MEANINGS.iter().find(|(start, _)| target.starts_with(start));
    known.map_or(
        "named by the configuration, or below what it names, or standard error",
        |(_, meaning)| meaning,
    )
}

fn namespaces(folder: &str) -> BTreeMap<&'static str, bool> {
    let link = |folder: &str, name: &str| fs::read_link(format!("{folder}/ns/{name}")).ok();
    NAMESPACES
        .into_iter()
        .filter_map(|name| {
            let theirs = link(folder, name)?;
            Some((name, link("/proc/self", name)? != theirs))
        })
        .collect()
}

/// What the process has as its root directory.
fn root(folder: &str) -> String {
    let path = format!("{folder}/root/");
    let same = |a: &Path, b: &Path| -> Option<bool> {
        let (a, b) = (fs::metadata(a).ok()?, fs::metadata(b).ok()?);
        Some((a.dev(), a.ino()) == (b.dev(), b.ino()))
    };
    if same(Path::new(&path), Path::new("/")) == Some(true) {
        return "the host's".to_owned();
    }
    match fs::read_dir(&path).map(Iterator::count) {
        Ok(0) => "an empty directory".to_owned(),
        Ok(entries) => format!("a directory of its own with {entries} entries"),
        Err(error) => format!("cannot be looked at: {error}"),
    }
}

fn limits(folder: &str) -> BTreeMap<&'static str, String> {
    let text = fs::read_to_string(format!("{folder}/limits")).unwrap_or_default();
    let hard = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().nth(1).map(str::to_owned)
    };
    LIMITS
        .into_iter()
        .filter_map(|name| Some((name, hard(name)?)))
        .collect()
}

fn threads(pid: u32, program: &str, words: &[String], about: About<'_>) -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        let Some(status) = status(&path.to_string_lossy()) else {
            continue;
        };
        let field = |name: &str| status.get(name).map_or("", String::as_str);
        let name = printable(field("Name"));
        let tid = field("Pid").parse().unwrap_or(0);
        let filters = field("Seccomp_filters").parse().unwrap_or(0);
        const SETS: [&str; 4] = ["CapInh", "CapPrm", "CapEff", "CapAmb"];
        threads.push(Thread {
            policy: policy_of(program, words, about, &name, tid == pid, filters).map(str::to_owned),
            tid,
            inside: field("NSpid")
                .split_whitespace()
                .next_back()
                .and_then(|number| number.parse().ok())
                .unwrap_or(tid),
            name,
            filters,
            no_new_privileges: field("NoNewPrivs") == "1",
            capabilities: SETS.iter().any(|set| field(set).bytes().any(|b| b != b'0')),
        });
    }
    threads.sort_by_key(|thread| thread.tid);
    Ok(threads)
}

/// The policy that a thread has taken on, by its name: threads are named after what they do.
fn policy_of(
    program: &str,
    words: &[String],
    about: About<'_>,
    thread: &str,
    first: bool,
    filters: u32,
) -> Option<&'static str> {
    if filters == 0 {
        return Some("none");
    }
    // passt has jailed itself.
    if !POLICIES.iter().any(|(of, ..)| *of == program) {
        return Some("its own");
    }
    match (program, thread) {
        (VMM, _) if first => Some(if filters > 1 { "run" } else { "main" }),
        (VMM, name) if name.starts_with("vcpu") => Some(match about.accel {
            "soft" => "vcpu-soft",
            "none" => "vcpu-none",
            _ => "vcpu",
        }),
        (VMM, name) if name.starts_with("dev-") => Some("device"),
        (VMM, "irqfd") => Some("irqfd"),
        (VMM, "cpuid") => Some("cpuid"),
        (SUPERVISOR, _) => Some(match (about.accel, about.shares) {
            ("soft", true) => "soft-share",
            ("soft", false) => "soft",
            (_, true) => "share",
            (_, false) => "main",
        }),
        (_, "sandbox-log") => None,
        ("anemone-pmem", "flush") => Some("flush"),
        (SHARE, _) if !first => Some(match words {
            words if words.iter().any(|word| word == "--readonly") => "read",
            words if words.windows(2).any(|two| two == ["--owner", "guest"]) => "owner",
            _ => "queue",
        }),
        _ if first => Some("main"),
        _ => Some("queue"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_read() {
        let line = "7f00-8f00 rw-s 00000000 00:01 42      /memfd:guest-memory (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!((mapping.size, mapping.inode), (0x1000, 42));
        assert_eq!((mapping.rights, mapping.device), ("rw-s", "00:01"));
        assert_eq!(mapping.path, "/memfd:guest-memory");
        assert!(
            Mapping::parse("7ffc0000-7ffc1000 r-xp 0 00:00 0").is_some_and(|m| m.path.is_empty())
        );
        assert!(Mapping::parse("nonsense").is_none());
    }

    #[test]
    fn descriptors_that_look_alike_have_one_kind() {
        assert_eq!(kind("socket:[17]"), kind("socket:[18]"));
        assert_ne!(kind("socket:[17]"), kind("pipe:[17]"));
        assert_ne!(kind("anon_inode:[eventfd]"), kind("anon_inode:[pidfd]"));
        assert_ne!(kind("/a:[1]"), kind("/a:[2]"));
    }

    #[test]
    fn a_share_has_the_policy_of_what_it_allows() {
        let about = About {
            accel: "kvm",
            shares: true,
        };
        let policy = |words: &[&str], first| {
            let words: Vec<_> = words.iter().map(|&word| word.to_owned()).collect();
            policy_of(SHARE, &words, about, "queue1", first, 1)
        };
        assert_eq!(policy(&["--readonly"], true), Some("main"));
        assert_eq!(policy(&["--tag", "a", "--readonly"], false), Some("read"));
        assert_eq!(policy(&["--owner", "guest"], false), Some("owner"));
        assert_eq!(policy(&["--owner", "self"], false), Some("queue"));
        let supervisor =
            |accel, shares| policy_of(SUPERVISOR, &[], About { accel, shares }, "anemone", true, 1);
        assert_eq!(supervisor("kvm", true), Some("share"));
        assert_eq!(supervisor("soft", false), Some("soft"));
    }

    #[test]
    fn memory_is_told_apart() {
        let memory = |guest_mapped, guest_descriptor, shared| {
            let guest_writable = true;
            Memory {
                guest_mapped,
                guest_writable,
                guest_descriptor,
                shared,
            }
            .text()
        };
        assert_eq!(memory(0, false, 0), "none");
        assert_eq!(memory(0, true, 0), "none mapped, but it has the descriptor");
        assert_eq!(memory(4096, true, 0), "4 KiB mapped, writable");
        assert_eq!(memory(0, false, 8192), "none; 8 KiB of other shared memory");
    }
}
