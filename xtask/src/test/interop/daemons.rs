//! Vhost-user daemons of the rust-vmm project and virtiofsd, built from the Cargo registry.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::packages::Packages;
use crate::sh;
use crate::test::Missing;

use super::{Context, log};

/// The daemons and the versions that are known to be what the tests expect.
const DAEMONS: &[(&str, &str)] = &[
    ("vhost-device-console", "0.1.0"),
    ("vhost-device-rng", "0.1.0"),
    ("vhost-device-vsock", "0.3.0"),
    ("virtiofsd", "1.14.0"),
];
/// Shared libraries that some of them are linked with. Packages for programs that use them bring them;
/// the names for the linker are made here.
const LIBRARIES: &[(&str, &str)] = &[
    ("libcap-ng.so", "libcap-ng.so.0"),
    ("libseccomp.so", "libseccomp.so.2"),
];

/// The program of that name, built if it is not there yet. What it says goes to its log.
pub fn command(context: &Context, name: &str) -> Result<Command> {
    let Some((_, version)) = DAEMONS.iter().find(|(known, _)| *known == name) else {
        bail!("{name} is not one of the daemons");
    };
    let base = sh::build_dir("daemons");
    fs::create_dir_all(&base).with_context(|| base.display().to_string())?;
    let lock = File::create(base.join("lock"))?;
    lock.lock().context("build/daemons/lock")?;
    let libraries = base.join("lib");
    let mut daemon = Command::new(base.join("bin").join(name));
    daemon.env("LD_LIBRARY_PATH", &libraries).stderr(log(name)?);
    let stamp = base.join(format!("{name}-{version}"));
    if Path::new(daemon.get_program()).is_file() && stamp.is_file() {
        return Ok(daemon);
    }
    copy_libraries(context.packages()?, &libraries)?;
    sh::progress(format_args!("building {name} {version}"));
    let mut install = Command::new("cargo");
    install
        .args(["install", "--quiet", "--locked", "--debug", "--force"])
        .args([name, "--version", version])
        .arg("--root")
        .arg(&base)
        .env("CARGO_TARGET_DIR", base.join("target"))
        .env("LIBRARY_PATH", &libraries)
        // Outside of this workspace, whose settings are not meant for it.
        .current_dir("/");
    sh::quiet(&mut install).map_err(|e| Missing(format!("{name} {version}: {e:#}")))?;
    File::create(stamp)?;
    Ok(daemon)
}

/// Puts the libraries where the linker and the loader find them under their names.
fn copy_libraries(packages: &Packages, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for (linked, loaded) in LIBRARIES {
        let from = packages.library(loaded)?;
        fs::copy(&from, folder.join(loaded)).with_context(|| from.display().to_string())?;
        let link = folder.join(linked);
        sh::fresh(&link)?;
        symlink(loaded, &link).with_context(|| link.display().to_string())?;
    }
    Ok(())
}
