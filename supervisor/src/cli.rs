//! The command line.

use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;

use anemone_config::{
    Accel, Balloon, Cgroup, CommandLine, Config, Console, Cpus, Disk, Fs, Id, Machine, Memory, Net,
    OnPanic, OnReboot, PanicDevice, Pmem, Restart, Rng, Sandbox, Serial, Short, SinkType, Size,
    Switch, VhostUser, Vm, Vsock, keyvalue,
};
use clap::builder::{PossibleValuesParser, TypedValueParser, ValueParser};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueHint};
use log::LevelFilter;

use crate::error::Error;
use crate::registry;

/// Runs virtual machines: a small machine without legacy devices for Linux guests, with every
/// device in a jailed process of its own.
#[derive(Debug, Parser)]
#[command(name = "anemone", version, max_term_width = 100, after_help = STATUS)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Most detailed level that this program and its processes log to standard error.
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        default_value = "warn",
        value_parser = words::<LevelFilter>(&["off", "error", "warn", "info", "debug", "trace"])
    )]
    pub log_level: LevelFilter,
}

const STATUS: &str = "\
Exit status: 0 the guest shut down, 1 the VM failed, 2 bad configuration or usage.

Environment: ANEMONE_LIBEXEC names the folder of the programs that anemone starts. Without it
they are looked for beside anemone itself, then in ../libexec/anemone.";

const RUN_EXAMPLES: &str = "\
Examples:
  anemone run vm.toml
  anemone run --kernel vmlinuz --initrd initrd.img --cmdline 'console=hvc0 root=/dev/vda' \\
              --cpus 4 --memory 2G --disk root.img --disk data.img,readonly,id=data
  anemone run vm.toml --console pty --serial file=boot.log

An option replaces what the file says about the same thing as a whole; --disk, --fs and --pmem add
to those of the file. In lists of keys, a comma that belongs to a value is written twice.

On a terminal, Ctrl-A is the escape key of the console: Ctrl-A x ends the VM, Ctrl-A p presses the
power button, Ctrl-A h lists the keys, Ctrl-A Ctrl-A sends one Ctrl-A to the guest.

SIGINT, SIGTERM and SIGHUP press the guest's power button. A second one, or 10 seconds without the
guest powering off, ends the VM.

Exit status: 0 the guest shut down, 1 the VM failed, 2 bad configuration or usage.";

const CHECK_EXAMPLES: &str = "\
Examples:
  anemone check vm.toml
  anemone check vm.toml > complete.toml
  anemone check vm.toml --dump-acpi tables && iasl -d tables/DSDT.aml

Nothing runs, and no image is locked or written. What is printed is a configuration file with every
default written out; the machine that it makes stands in comments.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM.
    #[command(after_help = RUN_EXAMPLES)]
    Run {
        /// The VM.
        #[command(flatten)]
        vm: Box<VmArgs>,
        /// Write the ACPI tables of the machine into this folder, one file each.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dump_acpi: Option<PathBuf>,
    },
    /// Validate a VM and print it with all defaults, its memory map, PCI slots and ports.
    #[command(after_help = CHECK_EXAMPLES)]
    Check {
        /// The VM.
        #[command(flatten)]
        vm: Box<VmArgs>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Write the ACPI tables of the machine into this folder, one file each.
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dump_acpi: Option<PathBuf>,
    },
    /// Print the accelerators, machines, CPU models and devices of this build.
    Devices {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the CPU models, their features, and which this host can provide.
    ///
    /// A frozen model is the same on every host and in every release: a guest that was started on
    /// one host finds the same CPU on another.
    CpuModels {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the state of a running VM and its processes, or of all VMs of this user.
    Status {
        /// Name of the VM, or process id of its `anemone run`.
        #[arg(value_name = "NAME|PID")]
        vm: Option<String>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Put a new process in the place of a device's, under the running guest.
    ///
    /// The old process finishes what is in flight. The program is looked at anew, so that a newer one
    /// at the same path is put to use.
    RestartDevice {
        /// Name of the VM, or process id of its `anemone run`.
        #[arg(value_name = "NAME|PID")]
        vm: String,
        /// Id of the device.
        id: String,
    },
    /// Print how large the memory balloon of a running VM is, how large it is to be, and the guest's
    /// statistics; give it another size first if there is one.
    Balloon {
        /// Name of the VM, or process id of its `anemone run`.
        #[arg(value_name = "NAME|PID")]
        vm: String,
        /// How much the balloon is to take from the guest, for example 256M; 0 for nothing.
        size: Option<Size>,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Press the power button of a running VM.
    PowerButton {
        /// Name of the VM, or process id of its `anemone run`.
        #[arg(value_name = "NAME|PID")]
        vm: String,
    },
    /// Print what this host offers, which layers of the jail work here, and what each process may
    /// do.
    Doctor {
        /// Print JSON.
        #[arg(long)]
        json: bool,
        /// Print the system calls that each process may make, with the reasons.
        #[arg(long, conflicts_with = "json")]
        policies: bool,
        /// Print what each process of a running VM may touch: descriptors, guest memory, system
        /// calls (with `--policies`, and the reasons), namespaces, limits. Root names VMs of other users
        /// by their PID.
        #[arg(long, value_name = "NAME|PID")]
        vm: Option<String>,
    },
}

/// The VM: a file, options, or both.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// Configuration file.
    #[arg(value_name = "VM.toml", value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// Kernel image: bzImage or ELF.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    initrd: Option<PathBuf>,
    /// Kernel command line; by default it names the consoles of the machine.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<CommandLine>,
    /// Name of the VM in messages.
    #[arg(long, value_name = "NAME")]
    name: Option<Id>,
    /// Machine and version.
    #[arg(long, value_parser = words::<Machine>(Machine::WORDS))]
    machine: Option<Machine>,
    /// What runs the guest: auto (the first that can run a stock kernel), kvm, or
    /// none,socket=PATH (no CPU, a test drives the machine).
    #[arg(long, value_name = "TYPE[,KEY=VALUE]", value_parser = list::<Accel>)]
    accel: Option<Accel>,
    /// Virtual CPUs, 1 to 64: N[,model=host].
    #[arg(long, value_name = "COUNT[,KEY=VALUE]", value_parser = list::<Cpus>)]
    cpus: Option<Cpus>,
    /// Guest memory, for example 512M or 2G.
    #[arg(long, value_name = "SIZE", value_parser = list::<Memory>)]
    memory: Option<Memory>,
    /// A disk; may be given several times. Keys: path, format=raw, readonly, id, slot, queues,
    /// serial, binary; or socket=PATH for a vhost-user-blk back end that already runs.
    #[arg(
        long,
        value_name = "PATH[,KEY=VALUE...]",
        value_parser = list::<Disk>,
        value_hint = ValueHint::FilePath
    )]
    disk: Vec<Disk>,
    /// A network card; may be given several times: user (passt, which needs no privilege) or
    /// tap=NAME. Keys: forward=tcp:[ADDRESS:]PORT-PORT+..., host-loopback, passt; mac, mac-filter,
    /// mtu, queues, rx-rate, rx-burst, tx-rate, tx-burst (bytes per second, bytes), id, slot, binary.
    #[arg(long, value_name = "user|tap=NAME[,KEY=VALUE...]", value_parser = list::<Net>)]
    net: Vec<Net>,
    /// Where the virtio console goes: stdio (the default), pty, file=PATH, unix=PATH or none.
    /// Other keys: id, slot, binary, socket.
    #[arg(long, value_name = "SINK[,KEY=VALUE...]", value_parser = list::<Console>)]
    console: Option<Console>,
    /// Where a 16550 serial port goes: stdio, pty, file=PATH, unix=PATH or none (the default).
    /// Other keys: id, binary.
    #[arg(long, value_name = "SINK[,KEY=VALUE...]", value_parser = list::<Serial>)]
    serial: Option<Serial>,
    /// An entropy source. Keys: rate (bytes per second), id, slot, binary, socket; or off.
    #[arg(
        long,
        value_name = "KEY=VALUE...",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        value_parser = switch::<Rng>
    )]
    rng: Option<Switch<Rng>>,
    /// A memory balloon. Keys: size (taken from the guest at first), deflate-on-oom, reporting,
    /// stats-interval (seconds), id, slot, binary; or off.
    #[arg(
        long,
        value_name = "KEY=VALUE...",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        value_parser = switch::<Balloon>
    )]
    balloon: Option<Switch<Balloon>>,
    /// A directory of this host that the guest mounts; may be given several times. Keys: tag (the name by
    /// which the guest mounts it), path, readonly, cache (none, auto, always), queues, owner (self,
    /// guest), uid-map, gid-map, memory, id, slot, binary, socket.
    #[arg(long, value_name = "tag=TAG,path=PATH[,KEY=VALUE...]", value_parser = list::<Fs>)]
    fs: Vec<Fs>,
    /// Persistent memory, a file that the guest maps; may be given several times. Keys: path, size,
    /// readonly, id, slot, binary.
    #[arg(
        long,
        value_name = "PATH[,KEY=VALUE...]",
        value_parser = list::<Pmem>,
        value_hint = ValueHint::FilePath
    )]
    pmem: Vec<Pmem>,
    /// Sockets between the guest and this host: socket=PATH, where programs of this host connect
    /// with a line `CONNECT <port>`; the guest connects to PATH_PORT. Keys: cid (the guest's address,
    /// by default 3), socket, id, slot, binary.
    #[arg(long, value_name = "socket=PATH[,KEY=VALUE...]", value_parser = list::<Vsock>)]
    vsock: Option<Vsock>,
    /// A device whose vhost-user back end somebody else has started; may be given several times.
    /// Keys: type (net, blk, console, rng, scsi, input, vsock, sound, fs, i2c, gpio and others, or a
    /// number), socket, queues, config-size, memory, id, slot.
    #[arg(
        long,
        value_name = "TYPE,socket=PATH[,KEY=VALUE...]",
        value_parser = list::<VhostUser>,
        value_hint = ValueHint::FilePath
    )]
    vhost_user: Vec<VhostUser>,
    /// The device by which the guest reports a kernel panic: on (the default), off or slot=N.
    #[arg(long, value_name = "on|off|slot=N", value_parser = switch::<PanicDevice>)]
    panic_device: Option<Switch<PanicDevice>>,
    /// What happens when the guest resets.
    #[arg(long, value_name = "ACTION", value_parser = words::<OnReboot>(OnReboot::WORDS))]
    on_reboot: Option<OnReboot>,
    /// What happens when the guest's kernel panics.
    #[arg(long, value_name = "ACTION", value_parser = words::<OnPanic>(OnPanic::WORDS))]
    on_panic: Option<OnPanic>,
    /// What happens when a device process ends while the VM runs: always (it is started again; the
    /// default) or never (the VM ends). Other keys: limit (COUNT/SECONDS, by default 10/60; more
    /// restarts of one process end the VM), never (ids of devices with + between them).
    #[arg(long, value_name = "POLICY[,KEY=VALUE...]", value_parser = list::<Restart>)]
    restart: Option<Restart>,
    /// The jail of all processes: kill on a forbidden system call, or only report it.
    #[arg(long, value_name = "MODE", value_parser = words::<Sandbox>(Sandbox::WORDS))]
    sandbox: Option<Sandbox>,
    /// Control group in which the VM gets one of its own: auto (that of this process if it has been
    /// delegated; the default), off, or its path. Other keys: memory-max, cpu-max (percent of one
    /// CPU), pids-max, device-memory-max (of each device process).
    #[arg(long, value_name = "PATH|auto|off[,KEY=VALUE...]", value_parser = list::<Cgroup>)]
    cgroup: Option<Cgroup>,
}

fn list<T: Short>(text: &str) -> Result<T, keyvalue::Error> {
    T::from_text(text)
}

fn switch<T: Short + Default>(text: &str) -> Result<Switch<T>, keyvalue::Error> {
    Switch::from_text(text)
}

/// One of a few words, which help and completions list.
fn words<T>(allowed: &'static [&'static str]) -> ValueParser
where
    T: FromStr<Err: Display> + Clone + Send + Sync + 'static,
{
    let parser = PossibleValuesParser::new(allowed);
    ValueParser::new(parser.try_map(|word| word.parse::<T>().map_err(|e| e.to_string())))
}

/// The command line as `clap` describes it, for manual pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

impl VmArgs {
    /// Reads the file, lays the options over it, and checks the whole.
    pub(crate) fn resolve(self) -> Result<Vm, Error> {
        let mut config = match &self.file {
            Some(path) => Config::from_file(path)?,
            None => Config::default(),
        };
        self.lay_over(&mut config);
        if config.console.is_none() && registry::device("console").is_err() {
            config.console = Some(Console {
                kind: Some(SinkType::None),
                ..Console::default()
            });
        }
        if config.panic_device.is_none() && registry::machine_part("panic-device").is_err() {
            config.panic_device = Some(Switch::Off);
        }
        let vm = config.resolve()?;
        registry::check_machine(&vm)?;
        Ok(vm)
    }

    fn lay_over(self, config: &mut Config) {
        fn replace<T>(target: &mut T, value: Option<T>) {
            if let Some(value) = value {
                *target = value;
            }
        }
        fn replace_optional<T>(target: &mut Option<T>, value: Option<T>) {
            if value.is_some() {
                *target = value;
            }
        }
        replace_optional(&mut config.kernel, self.kernel);
        replace_optional(&mut config.initrd, self.initrd);
        replace_optional(&mut config.cmdline, self.cmdline);
        replace_optional(&mut config.name, self.name);
        replace(&mut config.machine, self.machine);
        replace(&mut config.accel, self.accel);
        replace(&mut config.cpus, self.cpus);
        replace(&mut config.memory, self.memory);
        config.disk.extend(self.disk);
        config.net.extend(self.net);
        replace_optional(&mut config.console, self.console);
        replace_optional(&mut config.serial, self.serial);
        replace_optional(&mut config.rng, self.rng);
        replace_optional(&mut config.balloon, self.balloon);
        config.fs.extend(self.fs);
        config.pmem.extend(self.pmem);
        replace_optional(&mut config.vsock, self.vsock);
        config.vhost_user.extend(self.vhost_user);
        replace_optional(&mut config.panic_device, self.panic_device);
        replace(&mut config.on_reboot, self.on_reboot);
        replace(&mut config.on_panic, self.on_panic);
        replace(&mut config.restart, self.restart);
        replace(&mut config.sandbox, self.sandbox);
        replace(&mut config.cgroup, self.cgroup);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(line: &str) -> Result<Vm, Error> {
        let words = line.split_whitespace();
        match Cli::try_parse_from(["anemone", "run"].into_iter().chain(words))
            .expect("a valid command line")
            .command
        {
            Command::Run { vm, .. } => vm.resolve(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn clap_accepts_the_definition() {
        command().debug_assert();
    }

    #[test]
    fn options_replace_and_disks_add_up() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        std::fs::write(
            &file,
            "kernel = \"/k\"\ncpus = 2\nmemory = \"1G\"\nrng = \"rate=1K\"\ndisk = [\"/a\"]\n",
        )
        .unwrap();
        let vm = resolve(&format!(
            "{} --cpus 4 --disk /b,readonly --rng --console none",
            file.display()
        ))
        .unwrap();
        assert_eq!(vm.config.cpus.count.get(), 4);
        assert_eq!(vm.config.memory.size.bytes(), 1 << 30);
        let names: Vec<_> = vm.devices.iter().map(|device| device.id.as_str()).collect();
        assert_eq!(names, ["rng", "disk0", "disk1"]);
        // `--rng` replaces the table of the file, its rate included.
        assert!(matches!(
            vm.config.rng,
            Some(Switch::On(Rng { rate: None, .. }))
        ));
    }

    #[test]
    fn rng_does_not_swallow_the_file() {
        let error = resolve("--rng /no/such.toml").unwrap_err().to_string();
        assert!(error.contains("/no/such.toml"), "{error}");
        let vm = resolve("--kernel k --rng=rate=2K,slot=5").unwrap();
        assert!(vm.devices.iter().any(|device| device.slot == 5));
        let vm = resolve("--kernel k --rng=off").unwrap();
        assert_eq!(vm.devices.len(), 1);
    }
}
