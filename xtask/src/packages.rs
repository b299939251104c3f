//! Debian packages as test counterparts and guests, without installing any of them.
//!
//! Everything happens in `build/packages`: a package state of our own (so that what the host has
//! installed neither helps nor hinders), the `.deb` files, and one root folder they are all
//! unpacked into. Programs in it are started through the dynamic loader in it. This needs apt
//! tools and a network the first time, and no privileges at all.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::sh;

/// Programs the tests run; unpacked with everything they depend on.
const TOOLS: &[&str] = &[
    "acpica-tools",
    "binutils",
    "cpio",
    "e2fsprogs",
    "gzip",
    "lz4",
    "qemu-system-x86",
    "qemu-utils",
    "xz-utils",
    "zstd",
];
/// Those that tests call by name.
const BY_NAME: &[&str] = &[
    "cpio",
    "gzip",
    "iasl",
    "lz4",
    "qemu-img",
    "qemu-io",
    "qemu-storage-daemon",
    "readelf",
    "xz",
    "zstd",
];
/// What goes into guests; unpacked alone.
const GUEST: &[&str] = &["busybox-static"];
/// The metapackage whose first dependency is the guest kernel.
const KERNEL: &str = "linux-image-cloud-amd64";

/// The unpacked packages.
#[derive(Debug, Clone)]
pub struct Packages {
    root: PathBuf,
    release: String,
}

/// Makes sure that all packages are there, fetching them if needed.
pub fn fetch() -> Result<Packages> {
    let base = sh::build_dir("packages");
    fs::create_dir_all(&base).with_context(|| base.display().to_string())?;
    let lock = File::create(base.join("lock"))?;
    lock.lock().context("build/packages/lock")?;

    let stamp = base.join("complete");
    let wanted = format!("{TOOLS:?} {GUEST:?} {KERNEL}");
    let root = base.join("root");
    if fs::read_to_string(&stamp).unwrap_or_default() != wanted {
        sh::fresh(&stamp)?;
        sh::fresh(&root)?;
        download_and_unpack(&base, &root)?;
        fs::write(&stamp, wanted)?;
    }
    let release = kernel_release(&root)?;
    Ok(Packages { root, release })
}

impl Packages {
    /// The guest kernel, a bzImage.
    pub fn kernel(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// `uname -r` of the guest kernel.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Folder of the guest kernel's modules.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// The static busybox.
    pub fn busybox(&self) -> PathBuf {
        self.root.join("bin/busybox")
    }

    /// A command that runs an unpacked program with its own loader and libraries.
    pub fn tool(&self, name: &str) -> Result<Command> {
        let program = self.program(name)?;
        let mut command = Command::new(self.loader());
        command
            .arg("--library-path")
            .arg(self.library_path())
            .arg(program)
            .env("QEMU_MODULE_DIR", self.library_dirs()[1].join("qemu"))
            .env("MKE2FS_CONFIG", self.root.join("etc/mke2fs.conf"));
        Ok(command)
    }

    /// QEMU for x86-64, with the folders of its firmware.
    pub fn qemu(&self) -> Result<Command> {
        let mut command = match std::env::var_os("QEMU") {
            Some(installed) => return Ok(Command::new(installed)),
            None => self.tool("qemu-system-x86_64")?,
        };
        for dir in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.join(dir));
        }
        Ok(command)
    }

    /// An unpacked program and every shared object it loads, loader first: pairs of the name it
    /// must have in a root of its own and the file here.
    pub fn with_libraries(&self, name: &str) -> Result<Vec<(String, PathBuf)>> {
        let program = self.program(name)?;
        let listing = sh::quiet(
            Command::new(self.loader())
                .arg("--library-path")
                .arg(self.library_path())
                .arg("--list")
                .arg(&program),
        )?;
        let mut files = vec![
            ("lib64/ld-linux-x86-64.so.2".to_string(), self.loader()),
            (format!("bin/{name}"), program),
        ];
        for line in String::from_utf8_lossy(&listing.stdout).lines() {
            if let Some((soname, rest)) = line.trim().split_once(" => ") {
                let path = rest.split(" (").next().unwrap_or(rest);
                if path.contains("not found") {
                    bail!("{name} needs {soname}, which no package has brought");
                }
                files.push((format!("lib/{soname}"), PathBuf::from(path)));
            }
        }
        Ok(files)
    }

    /// A search path on which the unpacked programs come first, for tests that call them by name.
    pub fn search_path(&self) -> Result<OsString> {
        let folder = sh::fresh_dir("packages/bin")?;
        for name in BY_NAME {
            let script = format!(
                "#!/bin/sh\nexec '{}' --library-path '{}' '{}' \"$@\"\n",
                self.loader().display(),
                self.library_path(),
                self.program(name)?.display()
            );
            let path = folder.join(name);
            fs::write(&path, script)?;
            fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        }
        let own = std::env::var_os("PATH").unwrap_or_default();
        let folders = [folder].into_iter().chain(std::env::split_paths(&own));
        Ok(std::env::join_paths(folders)?)
    }

    fn program(&self, name: &str) -> Result<PathBuf> {
        ["usr/bin", "bin", "usr/sbin", "sbin"]
            .iter()
            .map(|dir| self.root.join(dir).join(name))
            .find(|path| path.exists())
            .with_context(|| format!("no package in build/packages has brought {name}"))
    }

    fn loader(&self) -> PathBuf {
        self.library_dirs()[0].join("ld-linux-x86-64.so.2")
    }

    fn library_dirs(&self) -> [PathBuf; 2] {
        [
            self.root.join("lib/x86_64-linux-gnu"),
            self.root.join("usr/lib/x86_64-linux-gnu"),
        ]
    }

    fn library_path(&self) -> String {
        let [first, second] = self.library_dirs();
        format!("{}:{}", first.display(), second.display())
    }
}

/// apt with a state of its own: no lock, list or installed package of the host is involved.
struct Apt {
    base: PathBuf,
}

impl Apt {
    fn new(base: &Path) -> Result<Self> {
        for dir in ["apt/state/lists/partial", "apt/cache/archives/partial"] {
            fs::create_dir_all(base.join(dir))?;
        }
        fs::write(base.join("apt/status"), "")?;
        Ok(Self {
            base: base.join("apt"),
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let base = self.base.display();
        for option in [
            format!("Dir::State={base}/state"),
            format!("Dir::State::status={base}/status"),
            format!("Dir::Cache={base}/cache"),
            "Debug::NoLocking=1".to_string(),
            "APT::Sandbox::User=root".to_string(),
            "APT::Install-Recommends=0".to_string(),
        ] {
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    /// `name=version` of packages and all they depend on.
    fn closure(&self, names: &[&str]) -> Result<BTreeSet<String>> {
        let output = sh::quiet(
            self.command("apt-get")
                .args(["--print-uris", "-y", "install"])
                .args(names),
        )?;
        // One line per package: 'URI' NAME_VERSION_ARCH.deb SIZE HASH, the colon of an epoch
        // written as %3a.
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter(|line| line.starts_with('\''))
            .filter_map(|line| line.split(' ').nth(1))
            .filter_map(|file| {
                let mut parts = file.split('_');
                let (name, version) = (parts.next()?, parts.next()?);
                Some(format!("{name}={}", version.replace("%3a", ":")))
            })
            .collect())
    }

    /// First package a metapackage depends on.
    fn dependency(&self, name: &str) -> Result<String> {
        let output = sh::quiet(self.command("apt-cache").arg("depends").arg(name))?;
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_string)
            .with_context(|| format!("{name} depends on no kernel package"))
    }
}

fn download_and_unpack(base: &Path, root: &Path) -> Result<()> {
    for program in ["apt-get", "apt-cache", "dpkg-deb"] {
        if !on_path(program) {
            bail!("{program} is not there: the test counterparts come from a Debian archive");
        }
    }
    let apt = Apt::new(base)?;
    sh::progress("reading the package lists");
    let update = apt.command("apt-get").arg("update").output()?;
    // A third-party source that does not answer is of no concern if the packages are found.
    let mut wanted = apt.closure(TOOLS).with_context(|| {
        format!(
            "apt-get update said: {}",
            String::from_utf8_lossy(&update.stderr)
        )
    })?;
    wanted.insert(apt.dependency(KERNEL)?);
    wanted.extend(GUEST.iter().map(ToString::to_string));

    sh::progress(format_args!("fetching {} packages (80 MB)", wanted.len()));
    let debs = base.join("debs");
    sh::fresh(&debs)?;
    fs::create_dir_all(&debs)?;
    sh::quiet(
        apt.command("apt-get")
            .current_dir(&debs)
            .arg("download")
            .args(&wanted),
    )?;

    sh::progress("unpacking");
    for entry in fs::read_dir(&debs)? {
        let path = entry?.path();
        if path.extension() == Some(OsStr::new("deb")) {
            sh::quiet(Command::new("dpkg-deb").arg("-x").arg(&path).arg(root))?;
        }
    }
    Ok(())
}

fn kernel_release(root: &Path) -> Result<String> {
    let boot = root.join("boot");
    for entry in fs::read_dir(&boot).with_context(|| boot.display().to_string())? {
        let name = entry?.file_name();
        if let Some(release) = name.to_string_lossy().strip_prefix("vmlinuz-") {
            return Ok(release.to_string());
        }
    }
    bail!("no kernel in {}", boot.display())
}

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()))
}
