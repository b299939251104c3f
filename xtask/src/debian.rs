//! A real Debian system on a disk: made by mmdebstrap from Debian's packages, systemd as its first
//! program, root without a password on the console.

use std::fs::{self, Permissions};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::console::Console;
use crate::disk;
use crate::packages::{Kernel, Packages};
use crate::sh;

/// The release that is installed, which the kernels are of as well.
const RELEASE: &str = "bookworm";
/// What is installed beside Debian's smallest set of packages with apt.
const INCLUDE: &[&str] = &[
    "dbus",
    "kmod",
    "login",
    "openssl",
    "python3",
    "systemd-sysv",
    "udev",
];
/// Files that nobody looks at in a test. (Not by dpkg's path-exclude: for that mmdebstrap runs a
/// Python script, and the host need not have Python.)
const REMOVED: &[&str] = &["usr/share/doc", "usr/share/man", "usr/share/locale"];
/// Files of the system as an administrator would set them up.
const FILES: &[(&str, &str)] = &[
    ("etc/hostname", "debian\n"),
    ("etc/hosts", "127.0.0.1 localhost\n127.0.1.1 debian\n"),
    ("etc/fstab", "/dev/vda / ext4 errors=remount-ro 0 1\n"),
    // systemd fills it in at the first start.
    ("etc/machine-id", ""),
    ("etc/resolv.conf", ""),
    (
        "etc/apt/sources.list",
        "deb http://deb.debian.org/debian bookworm main\n\
         deb http://deb.debian.org/debian-security bookworm-security main\n",
    ),
    // The command line has an option for the time that a start may take, none for a stop.
    (
        "etc/systemd/system.conf.d/slow-cpu.conf",
        "[Manager]\nDefaultTimeoutStopSec=30min\n",
    ),
];
/// Free space of the file system.
const SPARE_MIB: u64 = 256;

/// Kernel command line: the console, the disk, only kernel messages that matter on the console,
/// and time for a slow CPU.
pub const CMDLINE: &str = "console=hvc0 root=/dev/vda rw loglevel=4 \
    systemd.default_timeout_start_sec=1800 systemd.default_device_timeout_sec=1800 \
    systemd.service_watchdogs=no udev.event_timeout=1800";

/// Memory that the system is comfortable with.
pub const MEMORY: &str = "1G";

/// Longest time to the login prompt. An emulated CPU takes from one minute to several.
const BOOT: Duration = Duration::from_secs(30 * 60);
/// Longest time of a command, and of the shutdown.
const COMMAND: Duration = Duration::from_secs(10 * 60);

/// The image with the modules of a kernel, made when it is first asked for, or when what it is
/// made of has changed. To be copied before a guest may write it.
pub fn image(packages: &Packages, kernel: &Kernel) -> Result<PathBuf> {
    let folder = sh::build_dir("debian").join(kernel.flavour.name());
    let (image, stamp) = (folder.join("root.img"), folder.join("complete"));
    // The recipe is this file.
    let key = format!("{} {}", kernel.release, include_str!("debian.rs"));
    if image.exists() && fs::read_to_string(&stamp).is_ok_and(|text| text == key) {
        return Ok(image);
    }
    ensure!(
        sh::is_root(),
        "a Debian root file system has files of many owners: making one needs root"
    );
    sh::fresh(&folder)?;
    let tree = folder.join("tree");
    install(packages, &tree)?;
    configure(&tree)?;
    add_modules(&tree, kernel)?;
    make_image(packages, &tree, &image)?;
    fs::remove_dir_all(&tree)?;
    fs::write(&stamp, key)?;
    Ok(image)
}

/// Installs the packages into `tree`.
fn install(packages: &Packages, tree: &Path) -> Result<()> {
    let script = packages.mmdebstrap()?;
    let sources = tree.with_extension("sources");
    fs::create_dir_all(tree)?;
    fs::write(&sources, packages.archives(RELEASE)?)?;
    let start = Instant::now();
    sh::progress("installing Debian into a folder");
    // mmdebstrap mounts the host's /dev and /proc into the tree. In a mount namespace of its own
    // nothing of that outlives it, even if it is killed, and the tree can be removed.
    let done = Command::new("unshare")
        .args(["--mount", "perl"])
        .arg(script)
        .args(["--quiet", "--mode=root", "--variant=minbase"])
        .arg(format!("--include={}", INCLUDE.join(",")))
        .arg(RELEASE)
        .arg(tree)
        .arg("-")
        .stdin(fs::File::open(&sources)?)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .context("cannot start unshare")?;
    ensure!(
        done.status.success(),
        "mmdebstrap failed: {}\n{}",
        done.status,
        String::from_utf8_lossy(&done.stderr)
    );
    let seconds = start.elapsed().as_secs();
    sh::progress(format_args!("Debian is installed after {seconds} s"));
    Ok(())
}

fn configure(tree: &Path) -> Result<()> {
    for name in REMOVED {
        fs::remove_dir_all(tree.join(name)).with_context(|| name.to_string())?;
    }
    for (name, content) in FILES {
        let path = tree.join(name);
        sh::fresh(&path)?;
        fs::write(&path, content)?;
        fs::set_permissions(&path, Permissions::from_mode(0o644))?;
    }
    // Root logs in without a password.
    let path = tree.join("etc/shadow");
    let shadow = fs::read_to_string(&path)?;
    let opened: Vec<_> = shadow
        .lines()
        .map(|line| match line.strip_prefix("root:*:") {
            Some(rest) => format!("root::{rest}\n"),
            None => format!("{line}\n"),
        })
        .collect();
    ensure!(
        opened.iter().any(|line| line.starts_with("root::")),
        "{} has no locked root",
        path.display()
    );
    fs::write(&path, opened.concat())?;
    Ok(())
}

/// The modules of the kernel that will be booted, as its package would install them.
fn add_modules(tree: &Path, kernel: &Kernel) -> Result<()> {
    let folder = tree.join("usr/lib/modules");
    fs::create_dir_all(&folder)?;
    sh::quiet(
        Command::new("cp")
            .args(["-r", "--preserve=mode,timestamps"])
            .arg(&kernel.modules)
            .arg(&folder),
    )?;
    sh::quiet(
        Command::new("chroot")
            .arg(tree)
            .args(["/sbin/depmod", &kernel.release]),
    )?;
    Ok(())
}

fn make_image(packages: &Packages, tree: &Path, image: &Path) -> Result<()> {
    let used = sh::quiet(Command::new("du").args(["-sm"]).arg(tree))?;
    let used: u64 = String::from_utf8_lossy(&used.stdout)
        .split_whitespace()
        .next()
        .and_then(|text| text.parse().ok())
        .context("du has printed no size")?;
    // Inode tables are written here: else the guest's kernel does it in the background.
    sh::quiet(
        packages
            .tool("mkfs.ext4")?
            .args(["-q", "-F", "-L", "debian"])
            .args(["-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"])
            .arg(tree)
            .arg(image)
            .arg(format!("{}M", used + SPARE_MIB)),
    )?;
    sh::progress(format_args!("the root file system holds {used} MiB"));
    Ok(())
}

/// A copy of an image, for a guest to write.
pub fn copy(image: &Path, to: &Path) -> Result<()> {
    sh::fresh(to)?;
    sh::quiet(
        Command::new("cp")
            .args(["--sparse=always", "--reflink=auto"])
            .arg(image)
            .arg(to),
    )?;
    Ok(())
}

/// Boots the system, whose root is on `disk`, by `command`; does a few things at its console, and
/// powers it off. What the console shows goes to `log`.
pub fn check(packages: &Packages, command: &mut Command, disk: &Path, log: &Path) -> Result<()> {
    // Nobody can read the disk while the guest writes it.
    let installed = installed(packages, disk)?;
    let start = Instant::now();
    let seconds = || start.elapsed().as_secs();
    sh::progress(format_args!("booting; the console is in {}", log.display()));
    let mut console = Console::start(command, log)?;
    console.wait_for("Reached target", BOOT)?;
    sh::progress(format_args!("systemd runs after {} s", seconds()));
    console.wait_for("debian login: ", BOOT)?;
    sh::progress(format_args!("login prompt after {} s", seconds()));
    console.type_line("root")?;
    console.wait_for("root@debian:~#", COMMAND)?;
    // What follows is read by a program.
    console.run("export TERM=dumb SYSTEMD_PAGER= SYSTEMD_COLORS=0", COMMAND)?;

    state(&mut console)?;
    packages_listed(&mut console, installed)?;
    python(&mut console)?;
    openssl(&mut console)?;

    let token = random_token()?;
    console.run(&format!("echo {token} > /root/token"), COMMAND)?;
    sh::progress(format_args!("powering off after {} s", seconds()));
    console.type_line("systemctl poweroff")?;
    let code = console.end(COMMAND)?;
    ensure!(code == Some(0), "the VM ended with {code:?}, not status 0");
    disk::check(packages, disk)?;
    let written = disk::read(packages, disk, "/root/token")?;
    ensure!(
        String::from_utf8_lossy(&written).trim() == token,
        "what the guest wrote last is not on its disk"
    );
    sh::progress(format_args!("clean power-off after {} s", seconds()));
    Ok(())
}

/// All units have started, or those that have not are explained.
fn state(console: &mut Console) -> Result<()> {
    let (_, answer) = console.run("systemctl is-system-running --wait", BOOT)?;
    let answer = answer.trim();
    println!("systemctl is-system-running: {answer}");
    if answer == "running" {
        return Ok(());
    }
    ensure!(answer == "degraded", "the system is {answer}");
    let (_, failed) = console.run("systemctl --failed --plain --no-legend", COMMAND)?;
    let units: Vec<_> = failed
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    ensure!(!units.is_empty(), "degraded, but no unit has failed");
    for unit in units {
        let (_, why) = console.run(&format!("systemctl status --lines 20 {unit}"), COMMAND)?;
        println!("failed unit {unit}:\n{why}");
    }
    Ok(())
}

/// Number of packages that dpkg has installed.
fn installed(packages: &Packages, disk: &Path) -> Result<usize> {
    let dpkg = disk::read(packages, disk, "/var/lib/dpkg/status")?;
    let count = String::from_utf8_lossy(&dpkg)
        .lines()
        .filter(|line| *line == "Status: install ok installed")
        .count();
    ensure!(count > 0, "{} has no packages", disk.display());
    Ok(count)
}

/// apt must count what dpkg has installed.
fn packages_listed(console: &mut Console, installed: usize) -> Result<()> {
    let (status, output) = console.run("apt list --installed | wc -l", COMMAND)?;
    let lines = output.lines().last().unwrap_or_default();
    println!("apt list --installed | wc -l: {lines}");
    // The first line is a heading.
    ensure!(
        status == 0 && lines.trim() == (installed + 1).to_string(),
        "dpkg has installed {installed} packages; apt said:\n{output}"
    );
    Ok(())
}

fn python(console: &mut Console) -> Result<()> {
    let token = random_token()?;
    let program = format!(
        "import hashlib,ssl,math; print(hashlib.sha256(b\"{token}\").hexdigest(), math.sin(1), ssl.OPENSSL_VERSION)"
    );
    let (status, output) = console.run(&format!("python3 -c '{program}'"), COMMAND)?;
    print!("python3: {output}");
    let expected = format!(
        "{} 0.8414709848078965 OpenSSL 3",
        sh::sha256(token.as_bytes())?
    );
    ensure!(
        status == 0 && output.starts_with(&expected),
        "python3 should have printed {expected}"
    );
    Ok(())
}

/// OpenSSL 3 knows ciphers with authentication by `-evp` only.
fn openssl(console: &mut Console) -> Result<()> {
    let (status, output) =
        console.run("openssl speed -seconds 1 -evp aes-128-gcm sha256", COMMAND)?;
    ensure!(status == 0, "openssl speed failed:\n{output}");
    for name in ["AES-128-GCM", "sha256"] {
        let line = output
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name) && line.ends_with('k'))
            .with_context(|| format!("openssl speed has not told {name}:\n{output}"))?;
        println!("openssl speed: {line}");
        let rates = line.split_whitespace().skip(1);
        let measured = rates
            .filter_map(|text| text.strip_suffix('k')?.parse::<f64>().ok())
            .filter(|rate| *rate > 0.0)
            .count();
        ensure!(
            measured == 6,
            "openssl speed: {measured} of 6 sizes measured"
        );
    }
    Ok(())
}

fn random_token() -> Result<String> {
    let mut bytes = [0; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}
