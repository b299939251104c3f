//! A directory that the guest's step `fs` works in: what it finds there, and what it must leave.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use crate::pattern::Pattern;

/// File whose bytes the guest compares with their SHA-256 and reads in several ways.
pub const PAYLOAD: &str = "payload";
const LENGTH: usize = 2 << 20;

/// Makes what the guest expects.
///
/// # Errors
/// A file cannot be written, or sha256sum is not there.
pub fn fill(folder: &Path) -> Result<(), String> {
    let path = folder.join(PAYLOAD);
    fs::write(&path, Pattern::new(6).take(LENGTH))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    shell(folder, "sha256sum payload > payload.sha256")
}

/// The payload is still what it was, and nothing was added.
///
/// # Errors
/// What differs.
pub fn unchanged(folder: &Path) -> Result<(), String> {
    let found = names(folder)?;
    if found != ["payload", "payload.sha256"] {
        return Err(format!("the guest has left {found:?}"));
    }
    payload(folder)
}

/// Looks at everything that the guest has left: the digests that it took of what it had read
/// back are those of the files here, and names, links and modes are what it was to make.
///
/// # Errors
/// What differs.
pub fn written(folder: &Path) -> Result<(), String> {
    payload(folder)?;
    // busybox knows no more options.
    shell(folder, "sha256sum -c sums > /dev/null")?;
    let sums = fs::read_to_string(folder.join("sums")).map_err(|e| format!("sums: {e}"))?;
    // The symbolic link and a directory have none, a file in that directory has one.
    if sums.lines().count() != 102 {
        return Err(format!("the guest's sums are {sums}"));
    }
    let tree = folder.join("tree");
    let found = names(&tree)?;
    // 200 files but the hundred from 100 to 199, and three others.
    if found.len() != 103 || !found.iter().any(|name| name == "file.200") {
        return Err(format!("the guest has left {found:?}"));
    }
    let text = fs::read_to_string(tree.join("file.42")).map_err(|e| format!("file.42: {e}"))?;
    let io = |e: io::Error| format!("{}: {e}", tree.display());
    let link = fs::read_link(tree.join("link")).map_err(io)?;
    let hard = fs::metadata(tree.join("hard")).map_err(io)?;
    let file = fs::metadata(tree.join("file.7")).map_err(io)?;
    if text != "42\n"
        || link != Path::new("deep/busybox")
        || hard.nlink() != 2
        || file.mode() & 0o777 != 0o640
    {
        return Err(format!(
            "{text:?}, {link:?}, {} links, mode {:o}",
            hard.nlink(),
            file.mode()
        ));
    }
    Ok(())
}

fn payload(folder: &Path) -> Result<(), String> {
    let path = folder.join(PAYLOAD);
    let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    match bytes.len() == LENGTH && Pattern::new(6).continues_with(&bytes) {
        true => Ok(()),
        false => Err(format!("{} has changed", path.display())),
    }
}

/// What is in a folder, in order.
fn names(folder: &Path) -> Result<Vec<OsString>, String> {
    let list = || -> io::Result<Vec<OsString>> {
        let entries = fs::read_dir(folder)?;
        entries.map(|entry| Ok(entry?.file_name())).collect()
    };
    let mut names = list().map_err(|e| format!("{}: {e}", folder.display()))?;
    names.sort();
    Ok(names)
}

/// Runs a command of the shell in a folder.
fn shell(folder: &Path, command: &str) -> Result<(), String> {
    let output = Command::new("sh")
        .args(["-c", command])
        .current_dir(folder)
        .output()
        .map_err(|e| format!("{command}: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{command}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_is_seen() {
        let folder = std::env::temp_dir().join(format!("anemone-shared-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fill(&folder).unwrap();
        unchanged(&folder).unwrap();
        let error = written(&folder).unwrap_err();
        assert!(error.contains("sums"), "{error}");
        fs::write(folder.join("new"), "").unwrap();
        let error = unchanged(&folder).unwrap_err();
        assert!(error.contains("new"), "{error}");
        fs::remove_file(folder.join("new")).unwrap();
        let mut bytes = fs::read(folder.join(PAYLOAD)).unwrap();
        bytes[LENGTH / 2] ^= 1;
        fs::write(folder.join(PAYLOAD), bytes).unwrap();
        let error = unchanged(&folder).unwrap_err();
        assert!(error.contains("has changed"), "{error}");
        fs::remove_dir_all(&folder).unwrap();
    }
}
