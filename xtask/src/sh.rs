//! Running other programs: progress lines, time limits, captured output.

use std::ffi::{CStr, CString};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Root of the checkout.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// A path under the build folder, which holds everything xtask makes.
pub fn build_dir(sub: &str) -> PathBuf {
    root().join("build").join(sub)
}

/// Says what is going on, on standard error.
pub fn progress(what: impl Display) {
    eprintln!("xtask: {what}");
}

/// Whether this process may do what root may.
pub fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Sets an extended attribute of a file or folder.
pub fn set_attribute(path: &Path, name: &CStr, value: &[u8]) -> Result<()> {
    let text = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both texts end with NUL; the value has the length given.
    let result = unsafe {
        let value = (value.as_ptr().cast(), value.len());
        libc::setxattr(text.as_ptr(), name.as_ptr(), value.0, value.1, 0)
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).with_context(|| path.display().to_string()),
    }
}

/// A command as the user would type it.
pub fn display(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// Runs a command with inherited output; a failure is an error.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", display(command)))?;
    if !status.success() {
        bail!("{} failed: {status}", display(command));
    }
    Ok(())
}

/// Runs a command quietly; a failure is an error that carries what it wrote.
pub fn quiet(command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", display(command)))?;
    if !output.status.success() {
        bail!(
            "{} failed: {}\n{}{}",
            display(command),
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// SHA-256 of bytes in hexadecimal, by coreutils.
pub fn sha256(bytes: &[u8]) -> Result<String> {
    let mut command = Command::new("sha256sum");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start sha256sum")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(bytes).context("sha256sum")?;
    }
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.split_whitespace().next() {
        Some(sum) if output.status.success() => Ok(sum.to_string()),
        _ => bail!("sha256sum failed: {}", output.status),
    }
}

/// What a program did that was given a time limit.
#[derive(Debug)]
pub struct Finished {
    /// Exit status; absent if the limit ended it.
    pub status: Option<ExitStatus>,
    /// Standard output and standard error, each whole, lossily decoded.
    pub output: String,
}

impl Finished {
    /// Exit code, if the program ended by itself.
    pub fn code(&self) -> Option<i32> {
        self.status.and_then(|s| s.code())
    }
}

/// Runs a command in a process group of its own, which is killed after `limit`.
pub fn run_limited(command: &mut Command, limit: Duration) -> Result<Finished> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = spawn(command)?;
    let out = drain(child.0.stdout.take());
    let err = drain(child.0.stderr.take());
    let status = wait_limited(&mut child.0, limit)?;
    if status.is_none() {
        kill_group(&child.0);
        child.0.wait()?;
    }
    let mut output = out.join().unwrap_or_default();
    output.push_str(&err.join().unwrap_or_default());
    Ok(Finished { status, output })
}

/// Waits for a child; `None` if it still runs after `limit`.
pub fn wait_limited(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Kills the process group that a child leads.
pub fn kill_group(child: &Child) {
    // A process id always fits; the group is the child's own.
    // SAFETY: plain system call without pointers.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
}

/// Starts a command in a process group of its own. It is killed when this program ends, however
/// that happens, and at the latest when it is dropped.
pub fn spawn(command: &mut Command) -> Result<Guarded> {
    command.process_group(0);
    // SAFETY: the closure makes one system call without pointers, which is allowed between fork
    // and exec.
    unsafe {
        command.pre_exec(
            || match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
        )
    };
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", display(command)))?;
    Ok(Guarded(child))
}

/// Makes this the only program that works in the build folder, waiting for another to end. Holds
/// as long as the result lives.
pub fn lock() -> Result<File> {
    let path = build_dir("lock");
    fs::create_dir_all(build_dir(""))?;
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    if file.try_lock().is_err() {
        progress("waiting for another xtask in this build folder");
        file.lock().with_context(|| path.display().to_string())?;
    }
    Ok(file)
}

/// Ends a child and collects it, if it is dropped before it has ended by itself.
#[derive(Debug)]
pub struct Guarded(pub Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            kill_group(&self.0);
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// Waits until `path` exists.
pub fn wait_for_path(path: &Path, limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    while !path.exists() {
        if Instant::now() > end {
            bail!("{} has not appeared after {limit:?}", path.display());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Removes a file or folder, if it is there, and makes the folder above it.
pub fn fresh(path: &Path) -> Result<()> {
    if path.is_dir() {
        fs::remove_dir_all(path).with_context(|| path.display().to_string())?;
    } else if path.exists() {
        fs::remove_file(path).with_context(|| path.display().to_string())?;
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    }
    Ok(())
}

/// A path under the build folder, made empty.
pub fn fresh_dir(sub: &str) -> Result<PathBuf> {
    let path = build_dir(sub);
    fresh(&path)?;
    fs::create_dir_all(&path).with_context(|| path.display().to_string())?;
    Ok(path)
}

fn drain<R: Read + Send + 'static>(source: Option<R>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            // A read error ends the text; what came before is still worth showing.
            let _ = source.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
