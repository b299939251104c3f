//! The VMM process and the channel to it.

use std::path::Path;
use std::time::Duration;

use anemone_ipc::Channel;

use crate::accel::{Environment, Opened};
use crate::cgroup;
use crate::clone::Namespaces;
use crate::error::{Error, system};
use crate::spawn::{Process, Program};

/// Time a process may take from closing its channel to its end.
const ENDING: Duration = Duration::from_secs(2);

/// A VMM process.
#[derive(Debug)]
pub struct Vmm {
    /// The process.
    pub process: Process,
    /// The channel to it, non-blocking.
    pub channel: Channel,
    /// Version of Landlock's interface that its jail uses, as it has told when it was ready.
    pub landlock: u32,
}

impl Vmm {
    /// Starts one; it waits for its configuration. Accelerator, CPUs and the `devices` with a
    /// back end are those that it will be told to use: it starts their threads.
    pub fn start(
        path: &Path,
        environment: Environment<'_>,
        accel: Option<&Opened>,
        cpus: u16,
        devices: &[&str],
    ) -> Result<Self, Error> {
        let (channel, theirs) = anemone_ipc::pair().map_err(system("socketpair"))?;
        channel
            .set_nonblocking(true)
            .map_err(system("socketpair"))?;
        let theirs = theirs.into_fd();
        let mut program = Program::new(path);
        control_options(&mut program, &theirs, environment);
        let groups = environment.groups;
        program
            .group(groups.and_then(|groups| groups.procs(cgroup::VMM)))
            .option("--accel", accel.map_or("none", Opened::name))
            .option("--cpus", cpus);
        for id in devices {
            program.option("--device", id);
        }
        Ok(Self {
            process: program.start()?,
            channel,
            landlock: 0,
        })
    }

    /// The error for a VMM that has closed its channel or ended.
    pub fn failure(&mut self) -> Error {
        Error::Failed(ending(&mut self.process))
    }
}

/// The options that all children in jails have in common, and their namespaces.
pub fn control_options<'a>(
    program: &mut Program<'a>,
    channel: &'a std::os::fd::OwnedFd,
    environment: Environment<'_>,
) {
    program
        .namespaces(Namespaces::New)
        .fd_option("--control-fd", std::os::fd::AsFd::as_fd(channel))
        .option("--parent-pid", std::process::id())
        .option("--sandbox", environment.sandbox)
        .option(
            "--log-level",
            environment.log_level.as_str().to_ascii_lowercase(),
        );
}

/// What became of a process that should still be there: "NAME, pid N, was killed by SIGNAL".
pub fn ending(process: &mut Process) -> String {
    let name = process.name();
    match process.wait(ENDING) {
        Some(exit) => format!("{name}, {exit}"),
        None => format!("{name}, closed its control channel but did not end"),
    }
}
