//! Scenarios with a directory of the host.

use std::path::Path;

use anemone_guest_init::place::Place;
use anemone_guest_init::shared;

use crate::vm::{self, Result, Vm};

/// A directory with a payload and its checksum.
pub fn make(place: &Place) -> Result<String> {
    let folder = place.scratch("share");
    std::fs::create_dir(&folder).map_err(|e| format!("{folder}: {e}"))?;
    shared::fill(folder.as_ref())?;
    for path in [
        Path::new(&folder),
        &Path::new(&folder).join(shared::PAYLOAD),
    ] {
        vm::give_to_user(place, path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(folder)
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
    shared::written(folder.as_ref())
}

/// The guest cannot change anything.
pub fn read_only(place: &Place) -> Result<()> {
    let folder = make(place)?;
    let share = format!("tag=share,path={folder},readonly");
    let mut vm = Vm::start(place, "fsro,poweroff", &["--fs", &share])?;
    vm.expect_exit(0)?;
    vm.expect_said(&["guest: share unchanged", "guest: done"])?;
    shared::unchanged(folder.as_ref())
}
