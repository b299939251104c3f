//! Somebody at the console of a guest: waits for what it says, types, and reads answers.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::sh;

/// How often the user is told what is being waited for.
const REMINDER: Duration = Duration::from_secs(30);

/// A running VM whose console is its standard input and output.
pub struct Console {
    vm: sh::Guarded,
    chunks: Receiver<Vec<u8>>,
    log: File,
    /// What has been said and not been taken yet.
    text: String,
    commands: u32,
}

impl Console {
    /// Starts a VM. Everything it says, on standard error as well, goes to the file `log` too.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        sh::fresh(log)?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut vm = sh::spawn(command)?;
        let (sender, chunks) = mpsc::channel();
        read_chunks(vm.0.stdout.take(), sender.clone());
        read_chunks(vm.0.stderr.take(), sender);
        Ok(Self {
            vm,
            chunks,
            log: File::create(log).with_context(|| log.display().to_string())?,
            text: String::new(),
            commands: 0,
        })
    }

    /// Waits for a text and returns what was said before it.
    pub fn wait_for(&mut self, wanted: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        let mut remind = Instant::now() + REMINDER;
        loop {
            if let Some(at) = self.text.find(wanted) {
                let rest = self.text.split_off(at + wanted.len());
                let mut before = std::mem::replace(&mut self.text, rest);
                before.truncate(at);
                return Ok(before);
            }
            let now = Instant::now();
            ensure!(
                now < end,
                "{wanted:?} has not appeared after {limit:?}; the last line is {:?}",
                self.last_line()
            );
            if now >= remind {
                sh::progress(format_args!(
                    "  still waiting for {wanted:?}; the last line is {:?}",
                    self.last_line()
                ));
                remind = now + REMINDER;
            }
            match self.chunks.recv_timeout(end.min(remind) - now) {
                Ok(chunk) => self.take(&chunk)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let status = sh::wait_limited(&mut self.vm.0, REMINDER)?;
                    bail!(
                        "the VM ended ({status:?}) before {wanted:?} appeared; the last line is {:?}",
                        self.last_line()
                    );
                }
            }
        }
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let input = self.vm.0.stdin.as_mut().context("no console input")?;
        match input.write_all(format!("{line}\n").as_bytes()) {
            // The VM has ended; why is in what it said, which the next wait reports.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => other.context("typing on the console"),
        }
    }

    /// Runs a command in the shell at the console. Returns its exit status and what it wrote, with
    /// plain line ends.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<(i32, String)> {
        // The shell computes the numbers, so the echo of what is typed does not hold them.
        self.commands += 1;
        let n = self.commands;
        self.type_line(&format!(
            "echo begin-$((1000+{n})); {command}; echo end-$((1000+{n}))=$?."
        ))?;
        self.wait_for(&format!("begin-{}\r\n", 1000 + n), limit)?;
        let output = self.wait_for(&format!("end-{}=", 1000 + n), limit)?;
        let status = self.wait_for(".", limit)?;
        let status = status.parse().context("exit status of a command")?;
        Ok((status, output.replace("\r\n", "\n")))
    }

    /// Waits for the end of the VM; returns its exit code.
    pub fn end(&mut self, limit: Duration) -> Result<Option<i32>> {
        let end = Instant::now() + limit;
        while let Ok(chunk) = self
            .chunks
            .recv_timeout(end.saturating_duration_since(Instant::now()))
        {
            self.take(&chunk)?;
        }
        match sh::wait_limited(
            &mut self.vm.0,
            end.saturating_duration_since(Instant::now()),
        )? {
            Some(status) => Ok(status.code()),
            None => bail!(
                "the VM has not ended after {limit:?}; the last line is {:?}",
                self.last_line()
            ),
        }
    }

    fn take(&mut self, chunk: &[u8]) -> Result<()> {
        self.log.write_all(chunk)?;
        self.text.push_str(&String::from_utf8_lossy(chunk));
        Ok(())
    }

    /// The last line that shows something.
    fn last_line(&self) -> String {
        let text = plain(&self.text);
        let mut lines = text.lines().rev().map(str::trim);
        lines
            .find(|line| !line.is_empty())
            .unwrap_or_default()
            .to_string()
    }
}

/// A text without the control sequences of a terminal (ECMA-48: ESC, `[` with what follows up to
/// a letter, or one character).
fn plain(text: &str) -> String {
    let mut shown = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\u{1b}' {
            shown.push(c);
        } else if chars.next() == Some('[') {
            chars.find(|c| ('@'..='~').contains(c));
        }
    }
    shown
}

fn read_chunks(source: Option<impl Read + Send + 'static>, sender: Sender<Vec<u8>>) {
    thread::spawn(move || {
        let Some(mut source) = source else { return };
        let mut buffer = [0; 4096];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return,
                Ok(length) if sender.send(buffer[..length].to_vec()).is_err() => return,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// A shell that ends its lines as a terminal does.
    fn shell(dir: &Path) -> Console {
        let mut command = Command::new("sh");
        command.args(["-c", "echo ready; sh 2>&1 | sed -u 's/$/\\r/'"]);
        Console::start(&mut command, &dir.join("log")).unwrap()
    }

    #[test]
    fn commands_have_output_and_status() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = shell(dir.path());
        assert_eq!(console.wait_for("ready", LIMIT).unwrap(), "");
        let (status, output) = console.run("echo one; echo two; (exit 3)", LIMIT).unwrap();
        assert_eq!((status, output.as_str()), (3, "one\ntwo\n"));
        let (status, output) = console.run("true", LIMIT).unwrap();
        assert_eq!((status, output.as_str()), (0, ""));
        console.type_line("exit 0").unwrap();
        assert_eq!(console.end(LIMIT).unwrap(), Some(0));
        let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
        assert!(log.contains("begin-1001") && log.contains("two"));
    }

    #[test]
    fn colours_and_movements_are_left_out() {
        let text = "\u{1b}M\r\u{1b}[K[\u{1b}[0;31m*\u{1b}[0m] a job\u{1b}";
        assert_eq!(plain(text), "\r[*] a job");
    }

    #[test]
    fn silence_and_an_early_end_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = shell(dir.path());
        let late = console.wait_for("login:", Duration::from_millis(300));
        assert!(late.unwrap_err().to_string().contains("not appeared"));
        console.type_line("exit").unwrap();
        let early = console.wait_for("login:", LIMIT).unwrap_err().to_string();
        assert!(
            early.contains("ended") && early.contains("ready"),
            "{early}"
        );
    }
}
