//! Scenarios with a directory of the host.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anemone_guest_init::place::Place;

use crate::vm::{self, Result, Vm};

/// A directory with a payload and its checksum.
pub fn make(place: &Place) -> Result<String> {
    let folder = place.scratch("share");
    std::fs::create_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
    vm::make_disk(place, &format!("{folder}/payload"), 4096, 0x7368_6172)?;
    checksums(&folder, "sha256sum payload > payload.sha256")?;
    vm::give_to_user(place, Path::new(&folder)).map_err(|e| format!("{folder}: {e}"))?;
    Ok(folder)
}

/// Runs sha256sum in a folder.
fn checksums(folder: &str, command: &str) -> Result<()> {
    let output = Command::new("sh")
        .args(["-c", command])
        .current_dir(folder)
        .output()
        .map_err(|e| format!("sha256sum: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{command}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// What programs do with files.
pub fn read_write(place: &Place) -> Result<()> {
    let folder = make(place)?;
    let share = format!("tag=share,path={folder}");
    let mut vm = Vm::start(place, "fs,poweroff", &["--fs", &share, "--cpus", "2"])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: share written", "guest: done"])?;
    verify(&folder)
}

/// Looks at the tree that the guest's step `fs` has left.
pub fn verify(folder: &str) -> Result<()> {
    checksums(folder, "sha256sum -c sums payload.sha256 > /dev/null")?;
    let folder = Path::new(folder);
    let tree = folder.join("tree");
    let mut names = std::fs::read_dir(&tree)
        .and_then(|entries| {
            entries
                .map(|e| Ok(e?.file_name()))
                .collect::<std::io::Result<Vec<_>>>()
        })
        .map_err(|e| format!("{}: {e}", tree.display()))?;
    names.sort();
    let sums = std::fs::read_to_string(folder.join("sums")).map_err(|e| e.to_string())?;
    // 200 files but the hundred from 100 to 199, and three others.
    if names.len() != 103 || !names.iter().any(|name| name == "file.200") {
        return Err(format!("the guest has left {names:?}"));
    }
    // The symbolic link and a directory have none, a file in that directory has one.
    if sums.lines().count() != 102 {
        return Err(format!("the guest's sums are {sums}"));
    }
    let link = std::fs::read_link(tree.join("link")).map_err(|e| e.to_string())?;
    let metadata = |name: &str| std::fs::metadata(tree.join(name)).map_err(|e| e.to_string());
    let (hard, file) = (metadata("hard")?, metadata("file.7")?);
    if link != Path::new("deep/busybox") || hard.nlink() != 2 || file.mode() & 0o777 != 0o640 {
        return Err(format!(
            "{link:?}, {} links, mode {:o}",
            hard.nlink(),
            file.mode()
        ));
    }
    Ok(())
}

/// The guest cannot change anything.
pub fn read_only(place: &Place) -> Result<()> {
    let folder = make(place)?;
    let share = format!("tag=share,path={folder},readonly");
    let mut vm = Vm::start(place, "fsro,poweroff", &["--fs", &share])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: share unchanged", "guest: done"])?;
    checksums(
        &folder,
        "sha256sum -c payload.sha256 > /dev/null && test ! -e new",
    )
}
