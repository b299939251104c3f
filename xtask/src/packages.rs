//! Debian packages as test counterparts and guests, without installing any of them.
//!
//! Everything happens in `build/packages`: a package state of our own (so that what the host has
//! installed neither helps nor hinders), and one root folder that packages are unpacked into;
//! what only some commands need is in folders of its own. Programs are started through the dynamic
//! loader in the root folder. This needs apt tools and a network the first time, and no privileges
//! at all.

use std::collections::{BTreeMap, BTreeSet};
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
/// The package that installs a Debian system into a folder. The host has Perl, which all Debian
/// systems have, and apt.
const BOOTSTRAP: &str = "mmdebstrap";
/// DPDK with its test program; unpacked apart, with everything it depends on.
const DPDK: &str = "dpdk-dev";
/// Reads and writes in many patterns, and verifies them; unpacked apart, with everything it depends on.
const FIO: &str = "fio";
/// User-mode networking; unpacked alone.
const PASST: &str = "passt";
/// Clients that run in guests, in a folder of their own, with everything they depend on.
const CLIENTS: (&str, &[&str]) = ("clients", &["curl", "iperf3"]);

/// Debian's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Flavour {
    /// For virtual machines: few drivers, fetched with everything else.
    Cloud,
    /// For all machines.
    Amd64,
    /// The same with PREEMPT_RT.
    Rt,
}

impl Flavour {
    /// Every one of them.
    pub const ALL: [Self; 3] = [Self::Cloud, Self::Amd64, Self::Rt];

    /// Short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Amd64 => "amd64",
            Self::Rt => "rt",
        }
    }

    /// The metapackage whose first dependency is the kernel.
    fn metapackage(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Amd64 => "linux-image-amd64",
            Self::Rt => "linux-image-rt-amd64",
        }
    }
}

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Which of them it is.
    pub flavour: Flavour,
    /// `uname -r` of it.
    pub release: String,
    /// A bzImage.
    pub image: PathBuf,
    /// Folder of its modules, which is named as the release.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kernel whose package is unpacked in `root`.
    fn find(flavour: Flavour, root: &Path) -> Result<Self> {
        let release = kernel_release(root)?;
        Ok(Self {
            flavour,
            image: root.join(format!("boot/vmlinuz-{release}")),
            modules: root.join("lib/modules").join(&release),
            release,
        })
    }
}

/// The unpacked packages.
#[derive(Debug, Clone)]
pub struct Packages {
    base: PathBuf,
    root: Root,
    cloud: Kernel,
}

/// Makes sure that all packages are there, fetching them if needed.
pub fn fetch() -> Result<Packages> {
    let base = sh::build_dir("packages");
    fs::create_dir_all(&base).with_context(|| base.display().to_string())?;
    let lock = File::create(base.join("lock"))?;
    lock.lock().context("build/packages/lock")?;

    let stamp = base.join("complete");
    let cloud = Flavour::Cloud;
    let wanted = format!("{TOOLS:?} {GUEST:?} {}", cloud.metapackage());
    let root = base.join("root");
    if fs::read_to_string(&stamp).unwrap_or_default() != wanted {
        sh::fresh(&stamp)?;
        sh::fresh(&root)?;
        download_and_unpack(&base, &root)?;
        fs::write(&stamp, wanted)?;
    }
    let cloud = Kernel::find(cloud, &root)?;
    Ok(Packages {
        base,
        root: Root(root),
        cloud,
    })
}

impl Packages {
    /// The cloud kernel, a bzImage.
    pub fn kernel(&self) -> PathBuf {
        self.cloud.image.clone()
    }

    /// `uname -r` of the cloud kernel.
    pub fn release(&self) -> &str {
        &self.cloud.release
    }

    /// The cloud kernel.
    pub fn cloud(&self) -> &Kernel {
        &self.cloud
    }

    /// One of Debian's kernels. Those other than the cloud kernel are fetched when they are first
    /// asked for: each has 70 MB, 400 MB when unpacked.
    pub fn kernel_of(&self, flavour: Flavour) -> Result<Kernel> {
        if flavour == Flavour::Cloud {
            return Ok(self.cloud.clone());
        }
        let root = self.alone(flavour.name(), |apt| apt.dependency(flavour.metapackage()))?;
        Kernel::find(flavour, &root)
    }

    /// Path of mmdebstrap, a Perl script, which is fetched when it is first asked for.
    pub fn mmdebstrap(&self) -> Result<PathBuf> {
        let root = self.alone(BOOTSTRAP, |_| Ok(BOOTSTRAP.to_string()))?;
        Ok(root.join("usr/bin/mmdebstrap"))
    }

    /// Path of passt, which is fetched when it is first asked for. It runs with the host's own C
    /// library.
    pub fn passt(&self) -> Result<PathBuf> {
        let root = self.alone(PASST, |_| Ok(PASST.to_string()))?;
        Ok(root.join("usr/bin/passt"))
    }

    /// fio and the libraries that it loads, as of [`Root::with_libraries`], fetched when they are first
    /// asked for.
    pub fn fio(&self) -> Result<Vec<(String, PathBuf)>> {
        self.complete(FIO, &[FIO], 60)?.with_libraries(FIO)
    }

    /// DPDK's testpmd, which is fetched when it is first asked for, with its virtual devices and without
    /// huge pages. It looks for devices by name only: it would refuse a path with a folder that others
    /// can write to.
    pub fn testpmd(&self) -> Result<Command> {
        let root = self.complete(DPDK, &[DPDK], 70)?.0;
        let folders = [
            "lib/x86_64-linux-gnu",
            "usr/lib/x86_64-linux-gnu",
            "usr/lib/x86_64-linux-gnu/dpdk/pmds-23.0",
        ]
        .map(|folder| root.join(folder));
        let mut command = Command::new(folders[0].join("ld-linux-x86-64.so.2"));
        command
            .arg("--library-path")
            .arg(std::env::join_paths(&folders)?)
            .arg(root.join("usr/bin/dpdk-testpmd"));
        for driver in ["bus_vdev", "mempool_ring", "net_virtio", "net_vhost"] {
            command.args(["-d", &format!("librte_{driver}.so.23")]);
        }
        let prefix = format!("--file-prefix=anemone-{}", std::process::id());
        command
            .args(["-l", "0,1", "--no-huge", "-m", "128", "--no-pci"])
            .arg(prefix);
        Ok(command)
    }

    /// The archives of a Debian release that this host's apt knows, as lines of a sources.list.
    pub fn archives(&self, codename: &str) -> Result<String> {
        let lines = Apt::new(&self.base)?.archives(codename)?;
        if lines.is_empty() {
            bail!("apt of this host knows no archive of Debian {codename}");
        }
        Ok(lines)
    }

    /// Unpacks one package without what it depends on into a folder of its own.
    fn alone(&self, folder: &str, package: impl FnOnce(&Apt) -> Result<String>) -> Result<PathBuf> {
        self.apart(folder, |apt| {
            let package = package(apt)?;
            sh::progress(format_args!("fetching {package}"));
            Ok(BTreeSet::from([package]))
        })
    }

    /// Unpacks packages with everything they depend on, so many MB, into a folder of their own.
    fn complete(&self, folder: &str, packages: &[&str], megabytes: u32) -> Result<Root> {
        let root = self.apart(folder, |apt| {
            sh::progress(format_args!(
                "fetching {} ({megabytes} MB)",
                packages.join(", ")
            ));
            apt.closure(packages)
        })?;
        Ok(Root(root))
    }

    /// Unpacks packages into a folder of their own, unless that has been done.
    fn apart(
        &self,
        folder: &str,
        wanted: impl FnOnce(&Apt) -> Result<BTreeSet<String>>,
    ) -> Result<PathBuf> {
        let lock = File::create(self.base.join("lock"))?;
        lock.lock().context("build/packages/lock")?;
        let root = self.base.join(folder);
        let stamp = root.join("complete");
        if !stamp.exists() {
            sh::fresh(&root)?;
            let apt = Apt::new(&self.base)?;
            // The lists may be older than the archive by now.
            apt.update()?;
            let wanted = wanted(&apt)?;
            apt.unpack(&wanted, &root)?;
            fs::write(&stamp, "")?;
        }
        Ok(root)
    }

    /// The static busybox.
    pub fn busybox(&self) -> PathBuf {
        self.root.0.join("bin/busybox")
    }

    /// A command that runs an unpacked program with its own loader and libraries.
    pub fn tool(&self, name: &str) -> Result<Command> {
        let root = &self.root;
        let program = root.program(name)?;
        let mut command = Command::new(root.loader());
        command
            .arg("--library-path")
            .arg(root.library_path())
            .arg(program)
            .env("QEMU_MODULE_DIR", root.library_dirs()[1].join("qemu"))
            .env("MKE2FS_CONFIG", root.0.join("etc/mke2fs.conf"));
        Ok(command)
    }

    /// QEMU for x86-64, with the folders of its firmware.
    pub fn qemu(&self) -> Result<Command> {
        let mut command = match std::env::var_os("QEMU") {
            Some(installed) => return Ok(Command::new(installed)),
            None => self.tool("qemu-system-x86_64")?,
        };
        for dir in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            command.arg("-L").arg(self.root.0.join(dir));
        }
        Ok(command)
    }

    /// An unpacked program and every shared object it loads; see [`Root::with_libraries`].
    pub fn with_libraries(&self, name: &str) -> Result<Vec<(String, PathBuf)>> {
        self.root.with_libraries(name)
    }

    /// Path of a shared library that the packages have brought.
    pub fn library(&self, name: &str) -> Result<PathBuf> {
        self.root.library(name)
    }

    /// curl and iperf3 with all shared objects they load, to be run anywhere, and busybox: fetched
    /// when they are first asked for. In the folder a program is started as `lib64/ld-linux-x86-64.so.2
    /// --library-path lib bin/NAME`.
    pub fn clients(&self) -> Result<BTreeMap<String, PathBuf>> {
        let (folder, packages) = CLIENTS;
        let root = self.complete(folder, packages, 25)?;
        let mut files = BTreeMap::from([("bin/busybox".to_string(), self.busybox())]);
        for name in packages {
            files.extend(root.with_libraries(name)?);
        }
        Ok(files)
    }

    /// passt and what it runs with in a root of its own: it finds its C library by itself.
    pub fn passt_with_libraries(&self) -> Result<Vec<(String, PathBuf)>> {
        let passt = self.passt()?;
        let mut files = vec![
            ("lib64/ld-linux-x86-64.so.2".to_string(), self.root.loader()),
            (
                "lib/x86_64-linux-gnu/libc.so.6".to_string(),
                self.root.library_dirs()[0].join("libc.so.6"),
            ),
        ];
        // It starts the one that fits the CPU.
        for name in ["passt", "passt.avx2"] {
            files.push((format!("bin/{name}"), passt.with_file_name(name)));
        }
        Ok(files)
    }

    /// A search path on which the unpacked programs come first, for tests that call them by name.
    pub fn search_path(&self) -> Result<OsString> {
        let folder = sh::fresh_dir("packages/bin")?;
        for name in BY_NAME {
            let script = format!(
                "#!/bin/sh\nexec '{}' --library-path '{}' '{}' \"$@\"\n",
                self.root.loader().display(),
                self.root.library_path(),
                self.root.program(name)?.display()
            );
            let path = folder.join(name);
            fs::write(&path, script)?;
            fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        }
        let own = std::env::var_os("PATH").unwrap_or_default();
        let folders = [folder].into_iter().chain(std::env::split_paths(&own));
        Ok(std::env::join_paths(folders)?)
    }
}

/// A folder in which packages are unpacked.
#[derive(Debug, Clone)]
struct Root(PathBuf);

impl Root {
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
            // The loader goes by its path, and is there already.
            if let Some((soname, rest)) = line.trim().split_once(" => ")
                && !soname.starts_with('/')
            {
                let path = rest.split(" (").next().unwrap_or(rest);
                if path.contains("not found") {
                    bail!("{name} needs {soname}, which no package has brought");
                }
                files.push((format!("lib/{soname}"), PathBuf::from(path)));
            }
        }
        Ok(files)
    }

    /// An unpacked shared library, which may lie in either of two folders.
    fn library(&self, name: &str) -> Result<PathBuf> {
        let mut places = self.library_dirs().into_iter().map(|dir| dir.join(name));
        places
            .find(|path| path.exists())
            .with_context(|| format!("no package has brought {name}"))
    }

    fn program(&self, name: &str) -> Result<PathBuf> {
        ["usr/bin", "bin", "usr/sbin", "sbin", "usr/lib/qemu"]
            .iter()
            .map(|dir| self.0.join(dir).join(name))
            .find(|path| path.exists())
            .with_context(|| format!("no package has brought {name}"))
    }

    fn loader(&self) -> PathBuf {
        self.library_dirs()[0].join("ld-linux-x86-64.so.2")
    }

    fn library_dirs(&self) -> [PathBuf; 2] {
        [
            self.0.join("lib/x86_64-linux-gnu"),
            self.0.join("usr/lib/x86_64-linux-gnu"),
        ]
    }

    fn library_path(&self) -> String {
        let [first, second] = self.library_dirs();
        // Ceph's libraries look for others of theirs where they are installed.
        let third = second.join("ceph");
        format!(
            "{}:{}:{}",
            first.display(),
            second.display(),
            third.display()
        )
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

    /// Reads the package lists. Returns what apt had to say: a third-party source that does not
    /// answer is of no concern if the packages are found.
    fn update(&self) -> Result<String> {
        let output = self.command("apt-get").arg("update").output()?;
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// See [`Packages::archives`].
    fn archives(&self, codename: &str) -> Result<String> {
        let output = sh::quiet(self.command("apt-get").args([
            "indextargets",
            "--format",
            "$(ORIGIN) $(CODENAME) deb $(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
            "Architecture: amd64",
        ]))?;
        let lines: BTreeSet<String> = String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.strip_prefix("Debian "))
            .filter_map(|line| line.split_once(' '))
            .filter(|(name, _)| name.split('-').next() == Some(codename))
            .map(|(_, archive)| format!("{archive}\n"))
            .collect();
        Ok(lines.into_iter().collect())
    }

    /// Downloads packages and unpacks them, and nothing that they depend on, into `root`.
    fn unpack(&self, wanted: &BTreeSet<String>, root: &Path) -> Result<()> {
        let debs = root.with_extension("debs");
        sh::fresh(&debs)?;
        fs::create_dir_all(&debs)?;
        sh::quiet(
            self.command("apt-get")
                .current_dir(&debs)
                .arg("download")
                .args(wanted),
        )?;
        sh::progress("unpacking");
        for entry in fs::read_dir(&debs)? {
            let path = entry?.path();
            if path.extension() == Some(OsStr::new("deb")) {
                sh::quiet(Command::new("dpkg-deb").arg("-x").arg(&path).arg(root))?;
            }
        }
        fs::remove_dir_all(&debs)?;
        Ok(())
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
    let said = apt.update()?;
    let mut wanted = apt
        .closure(TOOLS)
        .with_context(|| format!("apt-get update said: {said}"))?;
    wanted.insert(apt.dependency(Flavour::Cloud.metapackage())?);
    wanted.extend(GUEST.iter().map(ToString::to_string));

    sh::progress(format_args!("fetching {} packages (80 MB)", wanted.len()));
    apt.unpack(&wanted, root)
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
