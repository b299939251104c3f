//! Where the control sockets of a user's VMs are.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::sys;

/// End of every socket's name.
const SUFFIX: &str = ".sock";

/// The folder: `anemone` in `$XDG_RUNTIME_DIR`; without that variable `/run/anemone` for root and
/// `/tmp/anemone-UID` for others.
pub fn path() -> PathBuf {
    let user = sys::effective_user();
    match env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(folder) if folder.is_absolute() => folder.join("anemone"),
        _ if user == 0 => "/run/anemone".into(),
        _ => format!("/tmp/anemone-{user}").into(),
    }
}

/// Where the folder of another user is: with the runtime directory that a session has, and without.
pub fn paths_of(user: u32) -> [PathBuf; 2] {
    [
        format!("/run/user/{user}/anemone").into(),
        format!("/tmp/anemone-{user}").into(),
    ]
}

/// Makes sure that the folder is there and that nobody else can change what is in it.
pub fn make(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => check(folder, sys::effective_user()),
    }
}

/// The folder must be one, this user's own, and closed to others. In `/tmp` somebody else may have
/// made it.
pub fn check(folder: &Path, user: u32) -> io::Result<()> {
    let metadata = fs::symlink_metadata(folder)?;
    let why = if !metadata.is_dir() {
        "not a folder"
    } else if metadata.uid() != user {
        "belongs to another user"
    } else if metadata.mode() & 0o077 != 0 {
        "is open to other users; its mode must be 0700"
    } else {
        return Ok(());
    };
    Err(io::Error::other(why))
}

/// The name of a VM's socket.
pub fn socket_name(name: Option<&str>, pid: u32) -> String {
    match name {
        Some(name) => format!("{name}-{pid}{SUFFIX}"),
        None => format!("{pid}{SUFFIX}"),
    }
}

/// A socket in the folder.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// The socket.
    pub path: PathBuf,
    /// Name of the VM; without one, the process id.
    pub name: String,
    /// Process id of its supervisor.
    pub pid: u32,
}

/// The socket of a VM in the folder of another user, in which nothing is changed.
pub fn find(folder: &Path, user: u32, pid: u32) -> Option<Found> {
    check(folder, user).ok()?;
    let entries = fs::read_dir(folder).ok()?;
    entries
        .flatten()
        .filter_map(|entry| parse(&entry.path()))
        .find(|found| found.pid == pid)
}

/// All sockets in the folder, by name; those that VMs of the past have left are removed.
pub fn list(folder: &Path) -> io::Result<Vec<Found>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let Some(found) = parse(&path) else { continue };
        if Path::new(&format!("/proc/{}", found.pid)).exists() {
            all.push(found);
        } else {
            // Another one may be doing the same.
            let _ = fs::remove_file(&path);
        }
    }
    all.sort_by(|a, b| (&a.name, a.pid).cmp(&(&b.name, b.pid)));
    Ok(all)
}

fn parse(path: &Path) -> Option<Found> {
    let stem = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?;
    let (name, pid) = stem.rsplit_once('-').unwrap_or((stem, stem));
    Some(Found {
        path: path.to_owned(),
        name: name.to_owned(),
        pid: pid.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{File, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn folders_of_others_are_refused() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("anemone");
        make(&folder).unwrap();
        make(&folder).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o750)).unwrap();
        assert!(make(&folder).unwrap_err().to_string().contains("0700"));
        let link = parent.path().join("link");
        std::os::unix::fs::symlink(parent.path(), &link).unwrap();
        assert!(
            make(&link)
                .unwrap_err()
                .to_string()
                .contains("not a folder")
        );
        assert!(make(&folder.join("no/such")).is_err());
        // Those of another user are that user's.
        let own = sys::effective_user();
        let mode = |mode| fs::set_permissions(&folder, Permissions::from_mode(mode)).unwrap();
        mode(0o700);
        File::create(folder.join("web-7.sock")).unwrap();
        assert!(find(&folder, own, 7).is_some_and(|vm| vm.name == "web"));
        assert_eq!(find(&folder, own, 8), None);
        assert_eq!(find(&folder, own + 1, 7), None);
        mode(0o750);
        assert_eq!(find(&folder, own, 7), None);
    }

    #[test]
    fn what_vms_of_the_past_have_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let own = std::process::id();
        let names = [
            socket_name(Some("web-1"), own),
            socket_name(None, own),
            // No process has this number: it is above the kernel's limit.
            socket_name(Some("old"), 0x7FFF_FFFF),
            "note.txt".to_owned(),
        ];
        for name in &names {
            File::create(folder.path().join(name)).unwrap();
        }
        let found = list(folder.path()).unwrap();
        let found: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.pid)).collect();
        assert_eq!(found, [(own.to_string().as_str(), own), ("web-1", own)]);
        let left = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 3, "the old socket is gone and the note is not");
    }
}
