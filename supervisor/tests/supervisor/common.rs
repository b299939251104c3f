//! A folder with fake programs, and the real `anemone` in front of them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Time after which a test gives up. No test comes near it unless something hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// A place to run `anemone` in.
pub struct Lab {
    folder: tempfile::TempDir,
}

/// What a run left.
#[derive(Debug)]
pub struct Outcome {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Lab {
    /// A VMM that boots and shuts down, and devices that serve.
    pub fn new() -> Self {
        let lab = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        // The examples of a package lie beside the folder of its tests.
        let tests = std::env::current_exe().unwrap();
        let fake = tests.parent().unwrap().join("../examples/anemone-fake");
        for name in [
            "anemone-vmm",
            "anemone-blk",
            "anemone-console",
            "anemone-balloon",
            "anemone-rng",
            "anemone-net",
            "anemone-vsock",
        ] {
            fs::copy(&fake, lab.path(name)).unwrap();
        }
        lab.take_notes();
        lab.write("vmm.script", "ready start shutdown");
        lab.write("kernel", "a kernel");
        lab
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Writes down what the fake processes have to say: a name and a line each.
    fn take_notes(&self) {
        let notes = UnixListener::bind(self.path("notes")).unwrap();
        let folder = self.folder.path().to_owned();
        thread::spawn(move || {
            for note in notes.incoming() {
                // Closed when the line is written, which is what the other side waits for.
                let mut note = note.unwrap();
                let mut text = String::new();
                note.read_to_string(&mut text).unwrap();
                // Who was killed has written less.
                let Some((file, line)) = text.split_once(' ') else {
                    continue;
                };
                let mut log = File::options()
                    .append(true)
                    .create(true)
                    .open(folder.join(file))
                    .unwrap();
                log.write_all(line.as_bytes()).unwrap();
            }
        });
    }

    /// What the fake process called `name` has noted.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anemone"));
        command
            .args(args)
            .env("ANEMONE_LIBEXEC", self.folder.path())
            .env("XDG_RUNTIME_DIR", self.folder.path())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `anemone` with these arguments and checks that nothing is left behind.
    pub fn anemone(&self, args: &[&str]) -> Outcome {
        let child = self.command(args).spawn().unwrap();
        self.finish(child)
    }

    /// The same beside a VM that runs.
    pub fn anemone_beside(&self, args: &[&str]) -> Outcome {
        let output = self.command(args).output().unwrap();
        Outcome {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs `anemone run --kernel kernel --console none` with the accelerator `none`, whose driver
    /// is this test, and these arguments.
    pub fn run(&self, args: &[&str]) -> Outcome {
        let child = self.start(args);
        let _driver = self.drive();
        self.finish(child)
    }

    /// Starts what [`Lab::run`] runs. It waits for [`Lab::drive`].
    pub fn start(&self, args: &[&str]) -> Child {
        let mut all = vec!["run", "--kernel", "kernel", "--accel", "none,socket=accel"];
        all.extend(args);
        if !args.contains(&"--console") {
            all.extend(["--console", "none"]);
        }
        self.command(&all).spawn().unwrap()
    }

    /// Connects as the driver of the machine.
    pub fn drive(&self) -> UnixStream {
        let deadline = Instant::now() + LIMIT;
        loop {
            match UnixStream::connect(self.path("accel")) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "no listener: {error}"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until `done`.
    pub fn wait_for(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !done() {
            assert!(Instant::now() < deadline, "gave up waiting for {what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for the end of `anemone` and checks that nothing is left behind.
    pub fn finish(&self, mut child: Child) -> Outcome {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("anemone hangs");
            }
            thread::sleep(Duration::from_millis(2));
        };
        // Only now, since a process that is left behind would keep the pipes open for ever.
        assert_eq!(
            self.processes(),
            Vec::<String>::new(),
            "processes are left behind"
        );
        let mut outcome = Outcome {
            status: status.code(),
            stdout: String::new(),
            stderr: String::new(),
        };
        if let Some(mut pipe) = child.stdout.take() {
            pipe.read_to_string(&mut outcome.stdout).unwrap();
        }
        if let Some(mut pipe) = child.stderr.take() {
            pipe.read_to_string(&mut outcome.stderr).unwrap();
        }
        outcome
    }

    /// The processes that run a program of this folder.
    pub fn processes(&self) -> Vec<String> {
        let is_ours = |pid: &Path| {
            fs::read_link(pid.join("exe")).is_ok_and(|exe| exe.starts_with(self.folder.path()))
        };
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|pid| is_ours(pid))
            .map(|pid| fs::read_to_string(pid.join("comm")).unwrap_or_default())
            .collect()
    }
}

impl Outcome {
    /// Checks status and message.
    #[track_caller]
    pub fn expect(&self, status: i32, parts: &[&str]) {
        assert_eq!(self.status, Some(status), "{self:?}");
        for part in parts {
            assert!(
                self.stderr.contains(part),
                "lacks {part:?}: {}",
                self.stderr
            );
        }
    }
}

/// A file of this size.
pub fn sized(path: PathBuf, size: u64) -> PathBuf {
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// Sends a signal to a child that has not been waited for.
pub fn signal(child: &Child, number: i32) {
    // SAFETY: no pointers; the child has not been waited for, so its number is its own.
    unsafe { libc::kill(child.id().cast_signed(), number) };
}
