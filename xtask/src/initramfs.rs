//! The initial RAM file systems: of the guests under test, of a Debian system on a disk, and of the
//! outer guest of the nested rig, which holds the product and the first.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::build;
use crate::cpio::Writer;
use crate::modules::Modules;
use crate::packages::{Kernel, Packages};
use crate::sh;

/// Modules of the guest under test. The console comes first, so that what follows is seen. ext4
/// asks for the checksum by its algorithm, which is no dependency that its module names.
const GUEST_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtio_pmem",
    "nd_pmem",
    "virtio_net",
    "virtiofs",
    "pvpanic_pci",
    "button",
    "evdev",
    "crc32c_generic",
    "ext4",
];

/// Modules with which a root file system on a disk is reached; udev loads the others.
const ROOT_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
];

/// Programs of busybox that the guest's init uses, or that are handy in its shell.
const APPLETS: &[&str] = &[
    "awk",
    "basename",
    "cat",
    "chmod",
    "chroot",
    "clear",
    "cmp",
    "cp",
    "cut",
    "date",
    "dd",
    "df",
    "dmesg",
    "echo",
    "env",
    "find",
    "free",
    "grep",
    "head",
    "hexdump",
    "httpd",
    "insmod",
    "ip",
    "ls",
    "lsmod",
    "mkdir",
    "mount",
    "mv",
    "nproc",
    "poweroff",
    "ps",
    "reboot",
    "rm",
    "sed",
    "setsid",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stty",
    "switch_root",
    "sync",
    "tail",
    "timeout",
    "top",
    "tr",
    "udhcpc",
    "umount",
    "uname",
    "uptime",
    "usleep",
    "vi",
    "wc",
    "wget",
];

/// A guest that can be booted directly.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Stock Debian kernel.
    pub kernel: PathBuf,
    /// busybox, modules and a first program.
    pub initramfs: PathBuf,
}

/// The guest under test with the cloud kernel.
pub fn guest(packages: &Packages) -> Result<Guest> {
    guest_with(packages, packages.cloud())
}

/// The guest under test with a given kernel.
pub fn guest_with(packages: &Packages, kernel: &Kernel) -> Result<Guest> {
    let [sockets, load] = build::guest_programs()?;
    let programs = [
        ("bin/anemone-guest-vsock", sockets.as_path()),
        ("bin/anemone-guest-load", load.as_path()),
    ];
    small(
        packages,
        kernel,
        "guest",
        "inner/init.sh",
        GUEST_MODULES,
        &programs,
    )
}

/// A kernel and an initramfs that start the system on the first disk.
pub fn on_disk(packages: &Packages, kernel: &Kernel) -> Result<Guest> {
    small(
        packages,
        kernel,
        "root",
        "debian/init.sh",
        ROOT_MODULES,
        &[],
    )
}

/// busybox, some modules, a script of `tests/guest` as the first program, and other programs.
fn small(
    packages: &Packages,
    kernel: &Kernel,
    folder: &str,
    init: &str,
    modules: &[&str],
    programs: &[(&str, &Path)],
) -> Result<Guest> {
    let name = format!("guest/{folder}-{}.cpio", kernel.flavour.name());
    let path = sh::build_dir(&name);
    sh::fresh(&path)?;
    let mut archive = create(&path)?;
    archive.character("dev/console", 5, 1)?;
    for folder in ["proc", "sys", "tmp"] {
        archive.folder(folder)?;
    }
    put(&mut archive, "bin/busybox", 0o755, &packages.busybox())?;
    for applet in APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    let init = sh::root().join("tests/guest").join(init);
    put(&mut archive, "init", 0o755, &init)?;
    for (name, program) in programs {
        put(&mut archive, name, 0o755, program)?;
    }
    put_modules(&mut archive, kernel, modules)?;
    archive.finish()?;
    Ok(Guest {
        kernel: kernel.image.clone(),
        initramfs: path,
    })
}

/// Builds the initramfs of the guest of `bench soft`: busybox, and a program that init runs. No
/// module is needed for a serial port.
pub fn bench(packages: &Packages, program: &Path) -> Result<PathBuf> {
    let path = sh::build_dir("guest/bench.cpio");
    sh::fresh(&path)?;
    let mut archive = create(&path)?;
    archive.character("dev/console", 5, 1)?;
    put(&mut archive, "bin/busybox", 0o755, &packages.busybox())?;
    for applet in ["poweroff", "sh"] {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    put(&mut archive, "bin/anemone-guest-bench", 0o755, program)?;
    let init = sh::root().join("tests/guestbench/init.sh");
    put(&mut archive, "init", 0o755, &init)?;
    archive.finish()?;
    Ok(path)
}

/// Modules of the rig's outer guest.
const OUTER_MODULES: &[&str] = &["kvm_amd", "virtio_pci", "virtio_blk", "dummy"];

/// Programs of busybox that the outer guest has.
const OUTER_APPLETS: &[&str] = &["ip", "sh", "sha256sum"];

/// Builds the initramfs of the rig's outer guest at `path`: `init` is its first program, `files`
/// are pairs of a name in it and a file here.
pub fn outer(
    path: &Path,
    packages: &Packages,
    init: &Path,
    files: &[(String, PathBuf)],
) -> Result<()> {
    sh::fresh(path)?;
    let mut archive = create(path)?;
    archive.character("dev/console", 5, 1)?;
    put(&mut archive, "init", 0o755, init)?;
    put_modules(&mut archive, packages.cloud(), OUTER_MODULES)?;
    put(&mut archive, "bin/busybox", 0o755, &packages.busybox())?;
    for applet in OUTER_APPLETS {
        archive.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n",
    )?;
    archive.file("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")?;
    for (name, file) in files {
        put(&mut archive, name, 0o755, file)?;
    }
    archive.finish()?;
    Ok(())
}

fn create(path: &Path) -> Result<Writer<BufWriter<File>>> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    Ok(Writer::new(BufWriter::new(file)))
}

fn put(
    archive: &mut Writer<BufWriter<File>>,
    name: &str,
    permissions: u32,
    file: &Path,
) -> Result<()> {
    let content = fs::read(file).with_context(|| file.display().to_string())?;
    archive.file(name, permissions, &content)?;
    Ok(())
}

/// Puts modules under `modules/`, named so that the order of names is the order of loading.
fn put_modules(
    archive: &mut Writer<BufWriter<File>>,
    kernel: &Kernel,
    names: &[&str],
) -> Result<()> {
    let modules = Modules::scan(&kernel.modules)?;
    for (i, path) in modules.load_order(names)?.iter().enumerate() {
        let base = path.file_name().unwrap_or_default().to_string_lossy();
        put(archive, &format!("modules/{i:02}-{base}"), 0o644, path)?;
    }
    Ok(())
}
