//! Control groups (cgroups(7), version 2): a group for the VM, with one for each of its processes, and
//! the limits that the configuration sets.
//!
//! ```text
//! PARENT/anemone-NAME-PID/supervisor, vmm, device-ID…
//! ```
//!
//! The parent is what the configuration names, or the group of this process if it has been delegated,
//! as systemd does for a service with `Delegate=yes`. A group that gives controllers to others has no
//! processes of its own, so this process moves, and back when the VM has ended.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anemone_config::{Cgroup, CgroupPlace};

use crate::error::Error;
use crate::sys;

/// Where the file system is by convention; the second beside version 1.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
/// Begins the names of the groups.
const PREFIX: &str = "anemone-";
/// The group of this process.
const SUPERVISOR: &str = "supervisor";
/// The group of the VMM.
pub const VMM: &str = "vmm";
/// The period of `cpu.max`, in microseconds.
const PERIOD: u64 = 100_000;

/// The name of the group of a device's process.
pub fn of_device(id: &str) -> String {
    format!("device-{id}")
}

/// The groups of a VM. Dropping it removes them, when their processes have ended.
#[derive(Debug)]
pub struct Groups {
    folder: PathBuf,
    /// Names, and `cgroup.procs` of each.
    members: Vec<(String, File)>,
    /// `cgroup.procs` where this process was before.
    home: File,
    /// What takes back changes of `cgroup.subtree_control`.
    controls: Vec<(File, String)>,
}

impl Groups {
    /// Makes the groups of a VM called `name` and moves this process into its own. None if the
    /// configuration wants none, or leaves it open and there is no delegation.
    pub fn make(wish: &Cgroup, name: &str, members: &[String]) -> Result<Option<Self>, Error> {
        let parent = match wish.place() {
            CgroupPlace::Off => return Ok(None),
            CgroupPlace::Auto => match delegated() {
                Ok(parent) => parent,
                Err(why) if wish.has_limits() => {
                    return Err(refused(format_args!(
                        "there is no group that limits could be set in: {why}; `path` can name one"
                    )));
                }
                Err(why) => {
                    log::debug!("no control group: {why}");
                    return Ok(None);
                }
            },
            CgroupPlace::Path(path) => {
                if !is_cgroup(path) {
                    let path = path.display();
                    return Err(refused(format_args!("{path} is no cgroup of version 2")));
                }
                path.to_owned()
            }
        };
        remove_old(&parent);
        let folder = parent.join(format!("{PREFIX}{name}-{}", std::process::id()));
        Self::make_in(&parent, folder, wish, members).map(Some)
    }

    fn make_in(
        parent: &Path,
        folder: PathBuf,
        wish: &Cgroup,
        members: &[String],
    ) -> Result<Self, Error> {
        let home = own().map_err(|why| refused(format_args!("{why}")))?;
        let home = open(&home.join("cgroup.procs"))?;
        let mut groups = Self {
            folder,
            members: Vec::new(),
            home,
            controls: Vec::new(),
        };
        make_folder(&groups.folder)?;
        for name in [SUPERVISOR]
            .into_iter()
            .chain(members.iter().map(String::as_str))
        {
            let folder = groups.folder.join(name);
            make_folder(&folder)?;
            let procs = open(&folder.join("cgroup.procs"))?;
            groups.members.push((name.to_owned(), procs));
        }
        let own = &groups.members[0].1;
        write(
            own,
            "0",
            &groups.folder.join(SUPERVISOR).join("cgroup.procs"),
        )?;
        let limits = [
            (
                "memory",
                "memory.max",
                wish.memory_max.map(|size| size.0.to_string()),
            ),
            (
                "cpu",
                "cpu.max",
                wish.cpu_max
                    .map(|percent| format!("{} {PERIOD}", u64::from(percent.get()) * PERIOD / 100)),
            ),
            (
                "pids",
                "pids.max",
                wish.pids_max.map(|count| count.get().to_string()),
            ),
        ];
        let of_device = wish.device_memory_max.map(|size| size.0.to_string());
        let mut needed: Vec<&str> = limits
            .iter()
            .filter(|(_, _, value)| value.is_some())
            .map(|(controller, _, _)| *controller)
            .collect();
        if of_device.is_some() && !needed.contains(&"memory") {
            needed.push("memory");
        }
        groups.enable(parent, &needed)?;
        if of_device.is_some() {
            let folder = groups.folder.clone();
            groups.enable(&folder, &["memory"])?;
        }
        for (_, file, value) in limits {
            if let Some(value) = value {
                set(&groups.folder.join(file), &value)?;
            }
        }
        if let Some(value) = of_device {
            for name in members.iter().filter(|name| *name != VMM) {
                set(&groups.folder.join(name).join("memory.max"), &value)?;
            }
        }
        Ok(groups)
    }

    /// Has a group give controllers to those below it.
    fn enable(&mut self, group: &Path, controllers: &[&str]) -> Result<(), Error> {
        let path = group.join("cgroup.subtree_control");
        let given = read(&path)?;
        let there = read(&group.join("cgroup.controllers"))?;
        let mut back = String::new();
        for controller in controllers {
            let has = |list: &str| list.split_whitespace().any(|word| word == *controller);
            if has(&given) {
                continue;
            }
            if !has(&there) {
                let there = there.trim();
                return Err(refused(format_args!(
                    "{} has no controller `{controller}`; it has: {there}",
                    group.display()
                )));
            }
            set(&path, &format!("+{controller}"))?;
            back += &format!("-{controller} ");
        }
        if !back.is_empty() {
            self.controls.push((open(&path)?, back));
        }
        Ok(())
    }

    /// Where a process joins the group of this name by writing "0".
    pub fn procs(&self, name: &str) -> Option<BorrowedFd<'_>> {
        let member = self.members.iter().find(|(known, _)| known == name);
        member.map(|(_, procs)| procs.as_fd())
    }

    /// The folder in which the VM's group is.
    pub fn parent(&self) -> &Path {
        self.folder.parent().unwrap_or(&self.folder)
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        // What is below gives its controllers up first.
        for (control, back) in self.controls.iter_mut().rev() {
            if let Err(error) = control.write_all(back.as_bytes()) {
                log::debug!("{}: {back}: {error}", self.folder.display());
            }
        }
        // Where it was may have become a place without processes.
        if let Err(error) = self.home.write_all(b"0") {
            log::warn!("{} stays: {error}", self.folder.display());
            return;
        }
        // Named one by one: this process may list no folder any more.
        let members = self.members.iter().map(|(name, _)| self.folder.join(name));
        for folder in members.chain([self.folder.clone()]) {
            if let Err(error) = fs::remove_dir(&folder) {
                log::warn!("{}: {error}", folder.display());
            }
        }
    }
}

fn refused(why: std::fmt::Arguments<'_>) -> Error {
    Error::Refused(format!("cgroup: {why}"))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    refused(format_args!("{}: {error}", path.display()))
}

fn make_folder(path: &Path) -> Result<(), Error> {
    fs::create_dir(path).map_err(|error| failed(path, &error))
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|error| failed(path, &error))
}

fn open(path: &Path) -> Result<File, Error> {
    let file = OpenOptions::new().write(true).open(path);
    file.map_err(|error| failed(path, &error))
}

fn write(mut file: &File, value: &str, path: &Path) -> Result<(), Error> {
    let written = file.write_all(value.as_bytes());
    written.map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => refused(format_args!(
            "{}: {value}: {error}: the group has processes of its own",
            path.display()
        )),
        _ => refused(format_args!("{}: {value}: {error}", path.display())),
    })
}

fn set(path: &Path, value: &str) -> Result<(), Error> {
    write(&open(path)?, value, path)
}

/// Removes a VM's group and those in it, all without processes.
fn remove(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        // Files disappear with their folder, and cannot be removed.
        let _ = fs::remove_dir(entry.path());
    }
    if let Err(error) = fs::remove_dir(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{}: {error}", folder.display());
    }
}

/// Removes the groups of VMs whose supervisors were killed.
fn remove_old(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.rsplit('-').next());
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            remove(&entry.path());
        }
    }
}

/// Whether a folder is a control group of version 2.
fn is_cgroup(path: &Path) -> bool {
    const MAGIC: i64 = 0x6367_7270;
    sys::file_system(path).is_ok_and(|kind| kind == MAGIC)
}

/// The group of a process.
pub fn of_process(process: &str) -> Result<PathBuf, String> {
    let file = format!("/proc/{process}/cgroup");
    let text = fs::read_to_string(&file).map_err(|error| format!("{file}: {error}"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or("this kernel has no control groups of version 2")?;
    let mount = MOUNTS
        .into_iter()
        .map(Path::new)
        .find(|path| is_cgroup(path));
    let mount = mount.ok_or("no control groups of version 2 are mounted at /sys/fs/cgroup")?;
    Ok(mount.join(path))
}

fn own() -> Result<PathBuf, String> {
    of_process("self")
}

/// The group of this process, if it has been given to this user to divide.
pub fn delegated() -> Result<PathBuf, String> {
    let group = own()?;
    let marked = |name: &CStr| has_mark(&group, name);
    // The marks of systemd (systemd.resource-control(5), Delegate=).
    if marked(c"user.delegate") || marked(c"trusted.delegate") {
        return Ok(group);
    }
    let text = group.display();
    Err(format!("{text} is not delegated (systemd: Delegate=yes)"))
}

fn has_mark(path: &Path, name: &CStr) -> bool {
    sys::attribute(path, name).is_some_and(|value| value == b"1")
}

/// What limits a process has by its groups: lines "FILE VALUE" of each group from its own upwards, as
/// far as they are set.
pub fn limits(group: &Path) -> Vec<String> {
    let mut limits = Vec::new();
    for (folder, name) in [(Some(group), ""), (group.parent(), " of the VM")] {
        let Some(folder) = folder else { continue };
        for file in ["memory.max", "cpu.max", "pids.max"] {
            let value = fs::read_to_string(folder.join(file)).unwrap_or_default();
            let value = value.trim();
            if !value.is_empty() && !value.starts_with("max") {
                limits.push(format!("{file}{name} {value}"));
            }
        }
    }
    limits
}
