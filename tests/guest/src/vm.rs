//! A VM under test: `anemone run` as a child, its output, its end.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::jail::{self, Process};
use anemone_guest_init::place::{Guest, Place};
use anemone_guest_init::protocol::TIME_RAN_OUT;

use crate::sys;

/// What a scenario says when it fails.
pub type Result<T> = std::result::Result<T, String>;

#[derive(Default)]
struct Text {
    text: Mutex<(String, bool)>,
    changed: Condvar,
}

impl Text {
    fn push(&self, line: &str) {
        let mut guard = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        guard.0.push_str(line);
        guard.0.push('\n');
        self.changed.notify_all();
    }

    fn close(&self) {
        let mut guard = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        guard.1 = true;
        self.changed.notify_all();
    }

    fn snapshot(&self) -> String {
        let guard = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        guard.0.clone()
    }

    /// Waits for a text that begins at `from` or later; where it ends.
    fn wait_for(&self, from: usize, wanted: &str, limit: Duration) -> Result<usize> {
        let end = Instant::now() + limit;
        let mut guard = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let new = guard.0.get(from..).unwrap_or_default();
            if let Some(at) = new.find(wanted) {
                return Ok(from + at + wanted.len());
            }
            let left = end.saturating_duration_since(Instant::now());
            if guard.1 || left.is_zero() {
                let why = if guard.1 {
                    "the output ended"
                } else {
                    TIME_RAN_OUT
                };
                return Err(format!("{why} before {wanted:?} appeared"));
            }
            guard = self
                .changed
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Copies lines from `source` to the log and to `text`.
fn follow(source: impl Read + Send + 'static, text: &Arc<Text>) -> thread::JoinHandle<()> {
    let text = Arc::clone(text);
    thread::spawn(move || {
        let mut source = BufReader::new(source);
        let mut line = Vec::new();
        // A pty whose other side has gone reads as an error: the end all the same.
        while matches!(source.read_until(b'\n', &mut line), Ok(n) if n > 0) {
            let shown = String::from_utf8_lossy(&line);
            let shown = shown.trim_end();
            println!("{shown}");
            text.push(shown);
            line.clear();
        }
        text.close();
    })
}

/// A running VM. Dropping it kills what is left of it.
pub struct Vm {
    child: Child,
    output: Arc<Text>,
    console: Option<(File, Arc<Text>)>,
    readers: Vec<thread::JoinHandle<()>>,
    patience: Duration,
}

impl Vm {
    /// Starts `anemone run` with the first of the place's guests and `arguments`.
    pub fn start(place: &Place, steps: &str, arguments: &[&str]) -> Result<Self> {
        let guest = place.guests.first().ok_or("there is no guest")?;
        Self::start_guest(place, guest, steps, arguments)
    }

    /// The same with a given guest.
    pub fn start_guest(
        place: &Place,
        guest: &Guest,
        steps: &str,
        arguments: &[&str],
    ) -> Result<Self> {
        let cmdline = format!("console=hvc0 anemone.steps={steps}");
        let mut command = run_command(place, guest, &cmdline);
        for (option, value) in [("--console", "stdio"), ("--memory", "256M")] {
            if !arguments.contains(&option) {
                command.args([option, value]);
            }
        }
        command.args(arguments);
        Self::spawn(place, command)
    }

    /// Starts a command that is a VM.
    pub fn spawn(place: &Place, mut command: Command) -> Result<Self> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command
            .spawn()
            .map_err(|e| format!("cannot start anemone: {e}"))?;
        let output = Arc::new(Text::default());
        let errors = Arc::clone(&output);
        let mut readers = Vec::new();
        readers.extend(child.stdout.take().map(|s| follow(s, &output)));
        readers.extend(child.stderr.take().map(|s| follow(s, &errors)));
        Ok(Self {
            child,
            output,
            console: None,
            readers,
            patience: place.patience,
        })
    }

    /// Process id of the supervisor.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the guest or a process of the VM has said something.
    pub fn wait_for(&self, text: &str) -> Result<()> {
        let source = self.console.as_ref().map_or(&self.output, |c| &c.1);
        source
            .wait_for(0, text, self.patience)
            .map(|_| ())
            .inspect_err(|_| self.show_threads())
    }

    /// Waits until a line with this text has come on standard output or standard error after the
    /// first `from` bytes, which end a line. Returns what came from there on up to the end of that
    /// line.
    pub fn wait_for_line(&self, from: usize, text: &str) -> Result<String> {
        let at = self
            .output
            .wait_for(from, text, self.patience)
            .inspect_err(|_| self.show_threads())?;
        let all = self
            .output
            .text
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Lines come whole.
        let rest = all.0.get(at..).unwrap_or_default();
        let end = at + rest.find('\n').map_or(rest.len(), |length| length + 1);
        Ok(all.0.get(from..end).unwrap_or_default().to_string())
    }

    /// Logs what all threads do, twice, so that those that run can be told from those that wait.
    fn show_threads(&self) {
        for _ in 0..2 {
            for process in self.processes() {
                for thread in jail::threads(process.pid) {
                    println!("{} {}: {thread}", process.program, process.pid);
                }
            }
            thread::sleep(Duration::from_secs(1));
        }
    }

    /// Everything that has been said so far.
    pub fn said(&self) -> String {
        let mut all = self.output.snapshot();
        if let Some((_, text)) = &self.console {
            all.push_str(&text.snapshot());
        }
        all
    }

    /// Types on the console.
    pub fn type_text(&mut self, text: &str) -> Result<()> {
        let result = match (&mut self.console, &mut self.child.stdin) {
            (Some((file, _)), _) => file.write_all(text.as_bytes()),
            (None, Some(stdin)) => stdin.write_all(text.as_bytes()),
            (None, None) => return Err("the console has no input".into()),
        };
        result.map_err(|e| format!("cannot type on the console: {e}"))
    }

    /// Opens the pseudo-terminal that `anemone run --console pty` names.
    pub fn open_pty(&mut self) -> Result<()> {
        self.output.wait_for(0, "/dev/pts/", self.patience)?;
        let said = self.output.snapshot();
        let at = said.find("/dev/pts/").unwrap_or(0);
        let path: String = said[at..]
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '/')
            .collect();
        let file = sys::open_raw_terminal(&path).map_err(|e| format!("{path}: {e}"))?;
        let reader = file.try_clone().map_err(|e| e.to_string())?;
        let text = Arc::new(Text::default());
        // The reader ends with the pty, which may be after this VM: it is not waited for.
        drop(follow(reader, &text));
        self.console = Some((file, text));
        Ok(())
    }

    /// Sends a signal to the supervisor.
    pub fn signal(&self, signal: i32) -> Result<()> {
        sys::kill(self.pid() as i32, signal).map_err(|e| format!("kill: {e}"))
    }

    /// The processes of the VM, supervisor first.
    pub fn processes(&self) -> Vec<Process> {
        jail::family(self.pid())
    }

    /// The process that runs `program`.
    pub fn process(&self, program: &str) -> Result<Process> {
        self.processes()
            .into_iter()
            .find(|p| p.program == program)
            .ok_or_else(|| format!("no process runs {program}"))
    }

    /// Kills the process that runs `program`, and waits until another one has taken its place in
    /// the guest's sight, or the VM has ended.
    pub fn kill(&mut self, program: &str) -> Result<()> {
        let old = self.process(program)?;
        sys::kill(old.pid as i32, libc::SIGKILL).map_err(|e| format!("{program}: {e}"))?;
        let end = Instant::now() + self.patience;
        while Instant::now() < end {
            let ended = self.child.try_wait().map_err(|e| e.to_string())?.is_some();
            let replaced = self.process(program).is_ok_and(|new| new.pid != old.pid);
            if ended || replaced {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err(format!("nothing has replaced {program}"))
    }

    /// Waits for the end, which must have this exit code.
    pub fn expect_exit(&mut self, code: i32) -> Result<()> {
        let end = Instant::now() + self.patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().map_err(|e| e.to_string())? {
                break status;
            }
            if Instant::now() > end {
                self.show_threads();
                return Err(format!("{TIME_RAN_OUT} before the VM ended"));
            }
            thread::sleep(Duration::from_millis(20));
        };
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        match (status.code(), status.signal()) {
            (Some(got), _) if got == code => Ok(()),
            (Some(got), _) => Err(format!("exit status {got}, not {code}")),
            (None, signal) => Err(format!("ended by signal {signal:?}, not by exit {code}")),
        }
    }

    /// Everything said must contain these texts, and no failure of the guest's own checks.
    pub fn expect_said(&self, texts: &[&str]) -> Result<()> {
        let said = self.said();
        if let Some(line) = said.lines().find(|l| l.contains("guest: FAIL")) {
            return Err(line.to_string());
        }
        match texts.iter().find(|t| !said.contains(**t)) {
            Some(text) => Err(format!("{text:?} was not said")),
            None => Ok(()),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // The group may hold more than the child; it is the child's own.
            let _ = sys::kill(-(self.pid() as i32), libc::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// `anemone run` of a guest with a kernel command line of its own.
pub fn run_command(place: &Place, guest: &Guest, cmdline: &str) -> Command {
    let mut command = anemone(place);
    command
        .args(["run", "--accel", &place.accel])
        .arg("--kernel")
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initramfs)
        .args(["--cmdline", cmdline])
        .current_dir(&place.scratch);
    command
}

/// `anemone`, as the user that VMs run as.
pub fn anemone(place: &Place) -> Command {
    let mut command = Command::new(place.programs.join("anemone"));
    command.env_clear();
    if let Some(user) = place.user {
        command.uid(user).gid(user);
    }
    command
}

/// A program of [`Place::clients`].
pub fn client(place: &Place, name: &str) -> Command {
    let folder = &place.clients;
    let mut command = Command::new(folder.join("lib64/ld-linux-x86-64.so.2"));
    command
        .arg("--library-path")
        .arg(folder.join("lib"))
        .arg(folder.join("bin").join(name))
        .env_clear();
    command
}

/// Waits until no process of any VM is left. Processes without a parent are this one's: it is the
/// first of all, or has said that it takes them (`sys::adopt_orphans`).
pub fn expect_nothing_left() -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    let own = std::process::id();
    loop {
        sys::reap_orphans();
        let mut left = jail::family(own);
        left.retain(|process| process.pid != own);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            let names: Vec<_> = left.iter().map(|p| p.program.as_str()).collect();
            for process in &left {
                let _ = sys::kill(process.pid as i32, libc::SIGKILL);
            }
            return Err(format!("left behind: {}", names.join(", ")));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Makes a file of `sectors` sectors of 512 bytes that VMs may write, each sector filled with its
/// number and `seed`.
pub fn make_disk(place: &Place, path: &str, sectors: u64, seed: u64) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    for sector in 0..sectors {
        for word in 0..64 {
            let value = (sector << 8 | word).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed;
            content.extend_from_slice(&value.to_le_bytes());
        }
    }
    write_disk(place, path, &content)?;
    Ok(content)
}

/// Copies the place's root disk for VMs to write.
pub fn copy_disk(place: &Place, to: &str) -> Result<()> {
    let from = &place.template;
    let content = std::fs::read(from).map_err(|e| format!("{}: {e}", from.display()))?;
    write_disk(place, to, &content)
}

fn write_disk(place: &Place, path: &str, content: &[u8]) -> Result<()> {
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.write_all(content)?;
        give_to_user(place, Path::new(path))
    };
    write().map_err(|e: std::io::Error| format!("{path}: {e}"))
}

/// Makes the user that VMs run as the owner.
pub fn give_to_user(place: &Place, path: &Path) -> std::io::Result<()> {
    let Some(user) = place.user else {
        return Ok(());
    };
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: a NUL-terminated path.
    if unsafe { libc::chown(name.as_ptr(), user, user) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Whether a file still has this content.
pub fn expect_content(path: &str, content: &[u8]) -> Result<()> {
    let now = std::fs::read(path).map_err(|e| format!("{path}: {e}"))?;
    if now.len() != content.len() {
        return Err(format!(
            "{path} has {} bytes, not {}",
            now.len(),
            content.len()
        ));
    }
    match now.iter().zip(content).position(|(a, b)| a != b) {
        Some(at) => Err(format!("{path} differs at byte {at}")),
        None => Ok(()),
    }
}
