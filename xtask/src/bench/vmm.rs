//! The virtual machine monitors that are compared, all on the same tiny guest.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anemone_guest_init::jail::Process;
use anyhow::Result;

use crate::build::Binaries;
use crate::packages::Packages;
use crate::{sh, tiny};

/// Guest memory of every VM here.
pub const MEMORY_MIB: u32 = 512;

/// One way to start a VM.
#[derive(Debug)]
pub struct Vmm {
    /// Name in tables.
    pub name: String,
    program: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
}

impl Vmm {
    fn from_command(name: &str, command: &Command) -> Self {
        let environment = command
            .get_envs()
            .filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned())))
            .collect();
        Self {
            name: name.to_string(),
            program: command.get_program().to_owned(),
            arguments: command.get_args().map(ToOwned::to_owned).collect(),
            environment,
        }
    }

    /// Name of one of its processes in tables. Unpacked programs run under their package's own
    /// loader, which says nothing.
    pub fn label(&self, process: &Process) -> String {
        match process.program.starts_with("ld-linux") {
            true => self.name.clone(),
            false => process.program.clone(),
        }
    }

    /// Starts the VM in a process group of its own, without input or output.
    pub fn spawn(&self) -> Result<sh::Guarded> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.environment.iter().map(|(k, v)| (k, v)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        sh::spawn(&mut command)
    }
}

/// `anemone` with 0, 1 (console) or 3 (console, disk, entropy) device processes. `instance` tells
/// VMs that run at the same time apart.
pub fn ours(product: &Binaries, devices: usize, instance: usize) -> Result<Vmm> {
    let folder = sh::build_dir(&format!("bench/vm-{instance}"));
    fs::create_dir_all(&folder)?;
    let mut command = product.command("anemone");
    command
        .args(["run", "--accel", "kvm", "--memory"])
        .arg(format!("{MEMORY_MIB}M"))
        .arg("--kernel")
        .arg(tiny_kernel()?);
    if devices >= 1 {
        let console = folder.join("console.log");
        command
            .arg("--console")
            .arg(format!("file={}", console.display()));
    } else {
        command.args(["--console", "none"]);
    }
    if devices >= 3 {
        let disk = folder.join("disk.img");
        fs::File::create(&disk)?.set_len(64 << 20)?;
        command
            .arg("--disk")
            .arg(format!("path={}", disk.display()));
        command.arg("--rng");
    }
    let name = format!("anemone, {devices} device processes");
    Ok(Vmm::from_command(&name, &command))
}

/// QEMU's smallest machine, and what the environment names.
pub fn others(packages: &Packages) -> Result<Vec<Vmm>> {
    let mut list = vec![microvm(packages)?];
    if let Some(program) = std::env::var_os("FIRECRACKER") {
        list.push(firecracker(&program)?);
    }
    if let Some(program) = std::env::var_os("CLOUD_HYPERVISOR") {
        let mut command = Command::new(&program);
        command
            .arg("--kernel")
            .arg(tiny_kernel()?)
            .arg("--memory")
            .arg(format!("size={MEMORY_MIB}M"))
            .args(["--cpus", "boot=1", "--console", "off", "--serial", "off"]);
        list.push(Vmm::from_command("cloud-hypervisor", &command));
    }
    Ok(list)
}

fn microvm(packages: &Packages) -> Result<Vmm> {
    let mut command = packages.qemu()?;
    command
        .args(["-M", "microvm,pit=off,pic=off,rtc=off,isa-serial=off"])
        .args([
            "-accel",
            "kvm",
            "-cpu",
            "host,-arch-capabilities",
            "-smp",
            "1",
            "-m",
        ])
        .arg(MEMORY_MIB.to_string())
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(tiny_kernel()?);
    Ok(Vmm::from_command("QEMU microvm", &command))
}

fn firecracker(program: &OsString) -> Result<Vmm> {
    let config: PathBuf = sh::build_dir("bench/firecracker.json");
    let content = serde_json::json!({
        "boot-source": { "kernel_image_path": tiny_kernel()?, "boot_args": "" },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": MEMORY_MIB },
    });
    fs::write(&config, content.to_string())?;
    let mut command = Command::new(program);
    command.arg("--no-api").arg("--config-file").arg(&config);
    Ok(Vmm::from_command("Firecracker", &command))
}

fn tiny_kernel() -> Result<PathBuf> {
    let path = sh::build_dir("guest/tiny.elf");
    if Path::new(&path).exists() {
        Ok(path)
    } else {
        tiny::kernel()
    }
}
