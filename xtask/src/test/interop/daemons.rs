//! Vhost-user daemons of the rust-vmm project, built from the Cargo registry.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::sh;
use crate::test::Missing;

/// The daemons and the versions that are known to be what the tests expect.
const DAEMONS: &[(&str, &str)] = &[
    ("vhost-device-console", "0.1.0"),
    ("vhost-device-rng", "0.1.0"),
    ("vhost-device-vsock", "0.3.0"),
];

/// The program of that name, built if it is not there yet.
pub fn program(name: &str) -> Result<PathBuf> {
    let Some((_, version)) = DAEMONS.iter().find(|(known, _)| *known == name) else {
        bail!("{name} is not one of the daemons");
    };
    let base = sh::build_dir("daemons");
    std::fs::create_dir_all(&base).with_context(|| base.display().to_string())?;
    let lock = File::create(base.join("lock"))?;
    lock.lock().context("build/daemons/lock")?;
    let program = base.join("bin").join(name);
    let stamp = base.join(format!("{name}-{version}"));
    if program.is_file() && stamp.is_file() {
        return Ok(program);
    }
    sh::progress(format_args!("building {name} {version}"));
    let mut install = Command::new("cargo");
    install
        .args(["install", "--quiet", "--locked", "--debug", "--force"])
        .args([name, "--version", version])
        .arg("--root")
        .arg(&base)
        .env("CARGO_TARGET_DIR", base.join("target"))
        // Outside of this workspace, whose settings are not meant for it.
        .current_dir("/");
    sh::quiet(&mut install).map_err(|e| Missing(format!("{name} {version}: {e:#}")))?;
    File::create(stamp)?;
    Ok(program)
}
