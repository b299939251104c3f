//! Asking a running VM.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use super::folder::{self, Found};
use super::protocol::{MAX_RESPONSE, Process, Request, Response, Status};
use crate::error::{Error, printable};
use crate::inspect;
use crate::sys;

/// Longest that a VM may take to answer; it gives up earlier by itself.
const PATIENCE: Duration = Duration::from_secs(60);

/// The running VMs of this user.
fn running() -> Result<Vec<Found>, Error> {
    let folder = folder::path();
    let failed = |error| Error::Failed(format!("{}: {error}", folder.display()));
    match folder::check(&folder, sys::effective_user()) {
        Ok(()) => folder::list(&folder).map_err(failed),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// The running VM with this name or process id.
fn find(target: &str) -> Result<Found, Error> {
    let mut all = running()?;
    let names: Vec<_> = all
        .iter()
        .map(|vm| format!("{} (pid {})", vm.name, vm.pid))
        .collect();
    all.retain(|vm| vm.pid.to_string() == target || vm.name == target);
    if all.is_empty() && sys::effective_user() == 0 {
        all.extend(of_another_user(target));
    }
    match (all.len(), names.is_empty()) {
        (1, _) => Ok(all.remove(0)),
        (0, true) => Err(Error::NoSuchVm(format!(
            "no VM `{target}` runs: none of this user does"
        ))),
        (0, false) => Err(Error::NoSuchVm(format!(
            "no VM `{target}` runs; there are: {}",
            names.join(", ")
        ))),
        _ => Err(Error::NoSuchVm(format!(
            "several VMs are called `{target}`; name one by its pid: {}",
            names.join(", ")
        ))),
    }
}

/// The VM with this process id, whosever it is: root is heard by all of them.
fn of_another_user(target: &str) -> Option<Found> {
    let pid = target.parse().ok()?;
    let user = inspect::user_of(pid)?;
    folder::paths_of(user)
        .iter()
        .find_map(|folder| folder::find(folder, user, pid))
}

/// Asks one VM.
fn ask(vm: &Found, request: &Request) -> Result<Response, Error> {
    let failed = |error: &dyn std::fmt::Display| {
        Error::Failed(format!("VM `{}`, pid {}: {error}", vm.name, vm.pid))
    };
    let mut stream = sys::connect_now(&vm.path).map_err(|e| failed(&e))?;
    // The name of the socket says whose it is; in another user's folder it can say anything.
    let peer = sys::peer_user(stream.as_fd()).map_err(|e| failed(&e))?;
    if Some(peer) != inspect::user_of(vm.pid) {
        return Err(failed(&format_args!("user {peer} listens in its place")));
    }
    stream
        .set_read_timeout(Some(PATIENCE))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .map_err(|e| failed(&e))?;
    let mut line = serde_json::to_vec(request).map_err(|e| failed(&e))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(|e| failed(&e))?;
    let mut text = String::new();
    BufReader::new(stream.take(MAX_RESPONSE))
        .read_line(&mut text)
        .map_err(|e| failed(&e))?;
    if text.is_empty() {
        return Err(failed(&"it has ended"));
    }
    match serde_json::from_str(&text).map_err(|e| failed(&e))? {
        Response::Failed { message } => Err(failed(&printable(&message))),
        response => Ok(response),
    }
}

fn status_of(vm: &Found) -> Result<Status, Error> {
    match ask(vm, &Request::Status)? {
        Response::Status(status) if status.pid == vm.pid => Ok(*status),
        other => Err(Error::Failed(format!("an unexpected answer: {other:?}"))),
    }
}

/// The status of the VM with this name or process id.
///
/// # Errors
/// There is no such VM, there are several of that name, or it does not answer.
pub fn status(target: &str) -> Result<Status, Error> {
    status_of(&find(target)?)
}

/// `anemone status`: of one VM, or of all of this user.
pub fn print_status(target: Option<&str>, json: bool) -> Result<(), Error> {
    let all = match target {
        Some(target) => vec![status(target)?],
        None => {
            let found = running()?;
            let all = found.iter().map(status_of);
            all.collect::<Result<_, _>>()?
        }
    };
    let text = if json {
        let text = match target {
            Some(_) => serde_json::to_string_pretty(&all[0]),
            None => serde_json::to_string_pretty(&all),
        };
        text.map_err(|e| Error::Failed(e.to_string()))? + "\n"
    } else if all.is_empty() {
        "no VM of this user runs\n".to_owned()
    } else {
        all.iter().map(text).collect::<Vec<_>>().join("\n")
    };
    print!("{text}");
    Ok(())
}

/// `anemone restart-device`.
pub fn restart_device(target: &str, id: &str) -> Result<(), Error> {
    let request = Request::RestartDevice { id: id.to_owned() };
    match ask(&find(target)?, &request)? {
        Response::Restarted { pause } => {
            println!("device {id} is served by a new process; the guest has waited {pause:.1} ms");
            Ok(())
        }
        other => Err(Error::Failed(format!("an unexpected answer: {other:?}"))),
    }
}

/// `anemone balloon`.
pub fn balloon(target: &str, size: Option<u64>, json: bool) -> Result<(), Error> {
    let state = match ask(&find(target)?, &Request::Balloon { size })? {
        Response::Balloon(state) => state,
        other => return Err(Error::Failed(format!("an unexpected answer: {other:?}"))),
    };
    let text = if json {
        serde_json::to_string_pretty(&state).map_err(|e| Error::Failed(e.to_string()))?
    } else {
        printable(&state.to_string())
    };
    println!("{text}");
    Ok(())
}

/// `anemone power-button`.
pub fn power_button(target: &str) -> Result<(), Error> {
    ask(&find(target)?, &Request::PowerButton).map(|_| ())
}

fn text(status: &Status) -> String {
    let mut text = String::new();
    let Status {
        name,
        pid,
        phase,
        accel,
        ..
    } = status;
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{}: pid {pid}, {}, accelerator {}",
        printable(name),
        printable(phase),
        printable(accel)
    );
    for process in &status.processes {
        let _ = writeln!(text, "    {}", printable(&line(process)));
    }
    text
}

fn line(process: &Process) -> String {
    let role = match &process.device {
        Some(device) => format!("{device} ({})", process.role),
        None => process.role.clone(),
    };
    let what = match (&process.program, &process.socket) {
        (Some(path), _) | (None, Some(path)) => path.display().to_string(),
        (None, None) => String::new(),
    };
    let pid = process.pid.map_or("-".to_owned(), |pid| pid.to_string());
    let mut line = format!(
        "{role:<22}{pid:>8}  {:<9}memory {:<8}{what}",
        process.state, process.memory
    );
    if process.restarts > 0 {
        line += &format!(", restarts {}", process.restarts);
    }
    if let Some(pause) = process.last_pause {
        line += &format!(", last pause {pause:.1} ms");
    }
    if let Some(why) = &process.untouched {
        line += &format!(", not used: {why}");
    }
    line
}
