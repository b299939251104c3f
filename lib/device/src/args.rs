//! The command line that all device processes share.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use anemone_process::inherited_fd;
use anemone_sandbox::Mode;
use lexopt::{Arg, Parser, ValueExt};
use log::LevelFilter;

use crate::Program;

/// What `--help` and `--version` say.
#[derive(Debug, Clone, Copy)]
pub struct About {
    /// Name of the binary.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// One sentence: what it is.
    pub summary: &'static str,
    /// The device's own options, one or more lines each, indented like those of the frame.
    pub options: &'static str,
}

const COMMON_OPTIONS: &str = "\
  --socket PATH         listen there and serve vhost-user front ends, one after the other
  --id NAME             name of the device in log lines
  --sandbox on|log      jail: kill on a forbidden system call (on, the default) or report it
  --log-level LEVEL     off, error, warn (the default), info, debug or trace
  --help                this text
  --version             name and version

Options of a process that the supervisor starts:
  --control-fd N        control channel, instead of --socket
  --fd N                connected vhost-user socket, the first connection
  --parent-pid PID      end when this process, the parent, ends
";

/// The arguments of the frame.
#[derive(Debug)]
pub struct Common {
    /// Name of the device in log lines.
    pub id: Option<String>,
    /// Whether the jail kills or reports.
    pub sandbox: Mode,
    /// Most detailed level that is logged.
    pub log_level: LevelFilter,
    /// The process with which this one ends.
    pub parent_pid: Option<u32>,
    /// Where to listen, when there is no supervisor.
    pub socket: Option<PathBuf>,
    pub(crate) control: Option<OwnedFd>,
    pub(crate) connection: Option<OwnedFd>,
}

impl Common {
    /// Whether a supervisor has started the process.
    pub fn supervised(&self) -> bool {
        self.control.is_some()
    }
}

/// What the command line asks for.
pub(crate) enum Request<P> {
    Serve(P, Common),
    /// Print this and end.
    Print(String),
}

/// Reads the command line (without the name of the program).
pub(crate) fn parse<P: Program>(
    args: impl IntoIterator<Item = impl Into<OsString>>,
) -> Result<Request<P>, lexopt::Error> {
    let mut program = P::default();
    let mut common = Common {
        id: None,
        sandbox: Mode::On,
        log_level: LevelFilter::Warn,
        parent_pid: None,
        socket: None,
        control: None,
        connection: None,
    };
    let mut parser = Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        let name = match arg {
            Arg::Long(name) => name.to_owned(),
            Arg::Short('h') => "help".to_owned(),
            other => return Err(other.unexpected()),
        };
        match name.as_str() {
            "help" => return Ok(Request::Print(help(&P::ABOUT))),
            "version" => {
                let About { name, version, .. } = P::ABOUT;
                return Ok(Request::Print(format!("{name} {version}\n")));
            }
            "id" => common.id = Some(parser.value()?.string()?),
            "socket" => common.socket = Some(parser.value()?.into()),
            "sandbox" => common.sandbox = parser.value()?.parse()?,
            "log-level" => common.log_level = parser.value()?.parse_with(log_level)?,
            "parent-pid" => common.parent_pid = Some(parser.value()?.parse()?),
            "control-fd" => common.control = Some(parser.value()?.parse_with(parse_fd)?),
            "fd" => common.connection = Some(parser.value()?.parse_with(parse_fd)?),
            _ => {
                if !program.option(&name, &mut parser)? {
                    return Err(Arg::Long(&name).unexpected());
                }
            }
        }
    }
    let vhost_user = program.serves_vhost_user();
    if !vhost_user && (common.socket.is_some() || common.connection.is_some()) {
        return Err("--socket and --fd do not go with a byte stream".into());
    }
    if vhost_user && common.socket.is_some() == common.control.is_some() {
        return Err("one of --socket and --control-fd is needed".into());
    }
    if common.connection.is_some() && !common.supervised() {
        return Err("--fd needs --control-fd".into());
    }
    Ok(Request::Serve(program, common))
}

fn log_level(text: &str) -> Result<LevelFilter, &'static str> {
    text.parse()
        .map_err(|_| "not one of off, error, warn, info, debug, trace")
}

fn help(about: &About) -> String {
    let About {
        name,
        version,
        summary,
        options,
    } = about;
    format!(
        "{name} {version}: {summary}\n\nUsage: {name} --socket PATH [OPTION...]\n\n\
         Options of this device:\n{options}\nOptions of every device:\n{COMMON_OPTIONS}"
    )
}

/// [`inherited_fd`] for the value of an option, as [`ValueExt::parse_with`] wants it.
///
/// # Errors
/// As for [`inherited_fd`], or the text is not a number.
pub fn parse_fd(text: &str) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
    Ok(inherited_fd(text.parse()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Filter};
    use std::error::Error;

    #[derive(Debug, Default)]
    struct Test {
        speed: u32,
        stream: bool,
    }

    struct Nothing;

    impl Device for Nothing {
        fn features(&self) -> u64 {
            0
        }
        fn queue_count(&self) -> usize {
            0
        }
        fn config(&self) -> Vec<u8> {
            Vec::new()
        }
        fn start_queue(&mut self, _: crate::Vring) -> std::io::Result<()> {
            Ok(())
        }
        fn stop_queue(&mut self, _: usize) -> u16 {
            0
        }
    }

    impl Program for Test {
        type Device = Nothing;
        const FILTER: &'static Filter = &Filter::new("test", 0, &[], &[]);
        const ABOUT: About = About {
            name: "anemone-test",
            version: "1.2",
            summary: "a test",
            options: "  --speed N             how fast\n",
        };
        fn option(&mut self, name: &str, parser: &mut Parser) -> Result<bool, lexopt::Error> {
            match name {
                "speed" => self.speed = parser.value()?.parse()?,
                "stream" => self.stream = true,
                _ => return Ok(false),
            }
            Ok(true)
        }
        fn serves_vhost_user(&self) -> bool {
            !self.stream
        }
        fn open(self, _: &Common) -> Result<Nothing, Box<dyn Error>> {
            Ok(Nothing)
        }
    }

    fn outcome(line: &str) -> Result<Request<Test>, String> {
        parse(line.split_whitespace()).map_err(|e| e.to_string())
    }

    #[test]
    fn own_and_common_options() {
        let line = "--speed 7 --socket /s --id disk0 --sandbox log --log-level debug";
        match outcome(line) {
            Ok(Request::Serve(program, common)) => {
                assert_eq!(program.speed, 7);
                assert_eq!(common.id.as_deref(), Some("disk0"));
                assert_eq!(common.sandbox, Mode::Log);
                assert_eq!(common.log_level, LevelFilter::Debug);
                assert!(!common.supervised());
            }
            _ => panic!("not parsed"),
        }
        assert!(matches!(outcome("--stream"), Ok(Request::Serve(..))));
    }

    #[test]
    fn help_and_version() {
        match outcome("--help") {
            Ok(Request::Print(text)) => {
                assert!(text.contains("--speed N") && text.contains("--socket PATH"));
            }
            _ => panic!("no help"),
        }
        match outcome("--version") {
            Ok(Request::Print(text)) => assert_eq!(text, "anemone-test 1.2\n"),
            _ => panic!("no version"),
        }
    }

    #[test]
    fn errors_name_what_is_wrong() {
        for (line, part) in [
            ("", "--socket"),
            ("--speed x --socket /s", "x"),
            ("--unknown --socket /s", "--unknown"),
            ("stray", "stray"),
            ("--socket /s --sandbox off", "on, log"),
            ("--socket /s --fd 0", "--control-fd"),
            ("--control-fd 9999", "9999"),
            ("--stream --socket /s", "byte stream"),
        ] {
            match outcome(line) {
                Err(error) => assert!(error.contains(part), "{line}: {error}"),
                Ok(_) => panic!("{line} was accepted"),
            }
        }
    }
}
