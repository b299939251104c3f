//! Makes another process execute a system call of our choice, through ptrace(2): proof that the
//! filter of a running process, not only the file it was made from, forbids it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0F, 0x05];

/// A system call with three arguments; a pointer argument may be 0, the filter sees numbers only.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Name for messages.
    pub name: &'static str,
    /// Number.
    pub number: i64,
    /// First three arguments.
    pub arguments: [u64; 3],
}

/// Makes the thread `tid` of process `pid` execute a call. It must raise SIGSYS, with which the
/// process is left alone: the first process of a PID namespace does not die of it while it is traced.
pub fn must_be_denied(pid: u32, tid: u32, call: Call) -> Result<()> {
    match execute(pid, tid, call, "")? {
        None => Ok(()),
        Some(result) => bail!("{} was not denied: it returned {result}", call.name),
    }
}

/// What `openat` answers in the first thread of a process, which stays stopped.
pub fn openat(pid: u32, path: &str, flags: i32) -> Result<i64> {
    let call = Call {
        name: "openat",
        number: libc::SYS_openat,
        // AT_FDCWD as a signed 32-bit number.
        arguments: [0xFFFF_FF9C, TEXT, flags as u64],
    };
    execute(pid, pid, call, path)?.context("openat was denied")
}

/// An argument that stands for the address of a text.
const TEXT: u64 = 0xDEAD_BEEF_0000_0000;

/// Makes a thread execute a call. The result is the call's, or none if a filter denied it.
fn execute(pid: u32, tid: u32, call: Call, text: &str) -> Result<Option<i64>> {
    let gadget = find_syscall(pid)?;
    let tid = tid as i32;
    ptrace(libc::PTRACE_SEIZE, tid, 0).context("ptrace seize")?;
    ptrace(libc::PTRACE_INTERRUPT, tid, 0).context("ptrace interrupt")?;
    wait_stop(tid)?;

    // SAFETY: an all-zero struct of plain numbers.
    let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    let at = &raw mut regs as u64;
    ptrace(libc::PTRACE_GETREGS, tid, at).context("ptrace get registers")?;
    regs.rip = gadget;
    regs.rax = call.number as u64;
    // Not in a system call any more: nothing is to be restarted.
    regs.orig_rax = u64::MAX;
    // Below what the thread itself has on its stack (System V ABI, red zone).
    let address = regs.rsp - 1024;
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    memory.write_all_at(&[text.as_bytes(), &[0]].concat(), address)?;
    let value = |argument| if argument == TEXT { address } else { argument };
    [regs.rdi, regs.rsi, regs.rdx] = call.arguments.map(value);
    ptrace(libc::PTRACE_SETREGS, tid, &raw const regs as u64).context("ptrace set registers")?;

    // What comes goes to the process as if we were not there: its handler of the filter's signal
    // reports the denial and ends it. A step is enough to see a call that returns; its trap may come
    // after the signal, and would end the process if it were alone then.
    let mut signal = 0;
    let mut denied = false;
    let mut request = libc::PTRACE_SINGLESTEP;
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        ensure!(
            Instant::now() < end,
            "{} neither returned nor was denied",
            call.name
        );
        ptrace(request, tid, signal).context("ptrace continue")?;
        let status = wait(tid)?;
        if libc::WIFSIGNALED(status) {
            let by = libc::WTERMSIG(status);
            ensure!(
                denied && by == libc::SIGSYS,
                "ended by signal {by}, not by SIGSYS"
            );
            return Ok(None);
        }
        if libc::WIFEXITED(status) {
            bail!(
                "{} ended the process with exit {}",
                call.name,
                libc::WEXITSTATUS(status)
            );
        }
        match libc::WSTOPSIG(status) {
            libc::SIGTRAP if denied => {
                ptrace(libc::PTRACE_DETACH, tid, 0).context("ptrace detach")?;
                return Ok(None);
            }
            libc::SIGTRAP => {
                let at = &raw mut regs as u64;
                ptrace(libc::PTRACE_GETREGS, tid, at).context("ptrace get registers")?;
                if regs.rip == gadget + SYSCALL.len() as u64 {
                    return Ok(Some(regs.rax as i64));
                }
                signal = 0;
            }
            libc::SIGSYS if denied => {
                let signal = libc::SIGSYS as u64;
                ptrace(libc::PTRACE_DETACH, tid, signal).context("ptrace detach")?;
                return Ok(None);
            }
            libc::SIGSYS => {
                signal = libc::SIGSYS as u64;
                denied = true;
                request = libc::PTRACE_CONT;
            }
            other => signal = other as u64,
        }
    }
}

/// Address of a `syscall` instruction in a process.
fn find_syscall(pid: u32) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    for line in maps
        .lines()
        .filter(|l| l.contains("r-xp") && !l.contains("[v"))
    {
        let (start, rest) = line.split_once('-').context("maps")?;
        let (end, _) = rest.split_once(' ').context("maps")?;
        let start = u64::from_str_radix(start, 16)?;
        let end = u64::from_str_radix(end, 16)?;
        let mut code = vec![0; usize::try_from(end - start)?];
        memory.read_exact_at(&mut code, start)?;
        if let Some(at) = code.windows(2).position(|w| w == SYSCALL) {
            return Ok(start + at as u64);
        }
    }
    bail!("no syscall instruction in process {pid}")
}

fn ptrace(request: libc::c_uint, tid: i32, data: u64) -> io::Result<()> {
    // SAFETY: the data is a number, or the address of a live register struct for the two requests
    // that take one; the other process's state is its own.
    let rc = unsafe { libc::ptrace(request, tid, ptr::null_mut::<libc::c_void>(), data) };
    if rc < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn wait(tid: i32) -> Result<i32> {
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    let rc = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
    if rc < 0 {
        return Err(io::Error::last_os_error()).context("waitpid");
    }
    Ok(status)
}

fn wait_stop(tid: i32) -> Result<()> {
    let status = wait(tid)?;
    ensure!(
        libc::WIFSTOPPED(status),
        "the process ended before it was touched"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A process without a filter: what is injected is executed, and that is told apart from a
    /// denial.
    #[test]
    fn a_call_that_is_allowed_is_noticed() {
        let sleeper = crate::sh::spawn(Command::new("sleep").arg("60")).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let pid = sleeper.0.id();
        let call = Call {
            name: "getppid",
            number: libc::SYS_getppid,
            arguments: [0; 3],
        };
        let error = must_be_denied(pid, pid, call).unwrap_err().to_string();
        let own = std::process::id();
        assert_eq!(error, format!("getppid was not denied: it returned {own}"));
    }
}
