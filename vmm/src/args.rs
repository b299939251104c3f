//! The command line. Only the supervisor writes it, so it is short.

use anemone_sandbox::Mode as SandboxMode;
use lexopt::prelude::*;

use crate::jail;
use crate::threads::Plan;

const HELP: &str = "\
anemone-vmm: runs the CPUs of one Anemone virtual machine

It is started by `anemone` and takes its orders over the control channel.

Options:
  --control-fd 3        the control channel is descriptor 3 (its only place)
  --parent-pid PID      end when this process is no longer the parent
  --sandbox on|log      on: a forbidden system call kills (default); log: it is reported
  --log-level LEVEL     off, error, warn (default), info, debug or trace
  --accel NAME, --cpus N, --device ID
                        start the threads of a machine with this accelerator, so many CPUs and, for
                        each --device, a back end; and make what the CPUs of accelerator `soft` need
  --self-test ACCEL     tell whether accelerator `kvm` or `soft` runs stock kernels here;
                        /dev/kvm is open as descriptor 4
  --cpu-models          print the CPU models, one a line, with what each accelerator lacks of
                        them; /dev/kvm, if there is one, is open as descriptor 4
  --help, --version     print and exit
";

/// What to do.
pub enum Mode {
    Print(String),
    Run,
    SelfTest(String),
    CpuModels,
}

/// The parsed command line.
pub struct Args {
    pub mode: Mode,
    pub jail: jail::Settings,
    pub log_level: log::LevelFilter,
    /// The machine whose threads are started.
    pub plan: Plan,
}

impl Args {
    pub fn parse() -> Result<Self, String> {
        let mut args = Self {
            mode: Mode::Run,
            jail: jail::Settings {
                mode: SandboxMode::On,
                parent_pid: None,
            },
            log_level: log::LevelFilter::Warn,
            plan: Plan::default(),
        };
        let mut parser = lexopt::Parser::from_env();
        loop {
            match args.option(&mut parser) {
                Ok(true) => {}
                Ok(false) => return Ok(args),
                Err(e) => return Err(format!("{e}; see --help")),
            }
        }
    }

    /// Takes one option; `false` at the end.
    fn option(&mut self, parser: &mut lexopt::Parser) -> Result<bool, lexopt::Error> {
        let Some(arg) = parser.next()? else {
            return Ok(false);
        };
        match arg {
            Long("control-fd") => {
                let number: i32 = parser.value()?.parse()?;
                if number != anemone_ipc::CONTROL_FD {
                    return Err(format!("--control-fd {number}: it is always 3").into());
                }
            }
            Long("parent-pid") => self.jail.parent_pid = Some(parser.value()?.parse()?),
            Long("sandbox") => {
                self.jail.mode = parser.value()?.parse_with(|text| match text {
                    "on" => Ok(SandboxMode::On),
                    "log" => Ok(SandboxMode::Log),
                    _ => Err("the allowed values are `on` and `log`"),
                })?;
            }
            Long("log-level") => {
                self.log_level = parser.value()?.parse_with(|text| {
                    text.parse()
                        .map_err(|_| "the levels are off, error, warn, info, debug, trace")
                })?;
            }
            Long("accel") => self.plan.accel = parser.value()?.string()?,
            Long("device") => self.plan.devices.push(parser.value()?.string()?),
            Long("cpus") => {
                self.plan.cpus = parser.value()?.parse_with(|text| match text.parse() {
                    Ok(number @ 0..=anemone_virt::map::CPUS_MAX) => Ok(number),
                    _ => Err("not a number of CPUs"),
                })?;
            }
            Long("self-test") => self.mode = Mode::SelfTest(parser.value()?.string()?),
            Long("cpu-models") => self.mode = Mode::CpuModels,
            Long("help") => self.mode = Mode::Print(HELP.to_owned()),
            Long("version") => {
                self.mode = Mode::Print(format!("anemone-vmm {}\n", env!("CARGO_PKG_VERSION")));
            }
            other => return Err(other.unexpected()),
        }
        Ok(true)
    }
}
