//! What a user can get wrong: each case must end with exit status 2 before anything has started,
//! with a message that names what is wrong, and leave no process behind.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anemone_guest_init::jail;
use anyhow::{Result, bail, ensure};

use crate::build::Binaries;
use crate::report::Outcome;
use crate::{sh, tiny};

use super::Context;

/// One case: name, arguments of `anemone run`, and words of which the message must hold one.
/// `DIR` stands for the folder of the files below.
struct Case {
    name: &'static str,
    arguments: &'static [&'static str],
    words: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        name: "no kernel",
        arguments: &["--memory", "128M"],
        words: &["kernel"],
    },
    Case {
        name: "kernel does not exist",
        arguments: &["--kernel", "DIR/absent"],
        words: &["absent"],
    },
    Case {
        name: "kernel is a folder",
        arguments: &["--kernel", "DIR"],
        words: &["kernel", "directory", "regular"],
    },
    Case {
        name: "kernel is empty",
        arguments: &["--kernel", "DIR/empty"],
        words: &["empty", "kernel", "short"],
    },
    Case {
        name: "kernel is noise",
        arguments: &["--kernel", "DIR/noise"],
        words: &["kernel", "format"],
    },
    Case {
        name: "truncated ELF",
        arguments: &["--kernel", "DIR/short.elf"],
        words: &["ELF", "truncated", "end"],
    },
    Case {
        name: "half a bzImage",
        arguments: &["--kernel", "DIR/half.bzimage"],
        words: &["kernel"],
    },
    Case {
        name: "bzImage that ends in its setup code",
        arguments: &["--kernel", "DIR/setup.bzimage"],
        words: &["kernel"],
    },
    Case {
        name: "initramfs does not exist",
        arguments: &["--kernel", "DIR/tiny.elf", "--initrd", "DIR/absent"],
        words: &["absent"],
    },
    Case {
        name: "initramfs larger than memory",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--initrd",
            "DIR/large",
            "--memory",
            "64M",
        ],
        words: &["memory"],
    },
    Case {
        name: "memory too small",
        arguments: &["--kernel", "DIR/tiny.elf", "--memory", "1M"],
        words: &["memory"],
    },
    Case {
        name: "memory is not a size",
        arguments: &["--kernel", "DIR/tiny.elf", "--memory", "much"],
        words: &["much"],
    },
    Case {
        name: "no vCPU",
        arguments: &["--kernel", "DIR/tiny.elf", "--cpus", "0"],
        words: &["cpu", "CPU"],
    },
    Case {
        name: "too many vCPUs",
        arguments: &["--kernel", "DIR/tiny.elf", "--cpus", "65"],
        words: &["64"],
    },
    Case {
        name: "restart limit without a time",
        arguments: &["--kernel", "DIR/tiny.elf", "--restart", "limit=5"],
        words: &["COUNT/SECONDS"],
    },
    Case {
        name: "restart names a device that is not there",
        arguments: &["--kernel", "DIR/tiny.elf", "--restart", "never=moon"],
        words: &["moon"],
    },
    Case {
        name: "unknown virtio device type",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--vhost-user",
            "floppy,socket=DIR/absent",
        ],
        words: &["floppy"],
    },
    Case {
        name: "external back end that is not there",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--vhost-user",
            "i2c,socket=DIR/absent",
        ],
        words: &["absent"],
    },
    Case {
        name: "unknown option",
        arguments: &["--kernel", "DIR/tiny.elf", "--floppy", "a"],
        words: &["floppy"],
    },
    Case {
        name: "unknown key of a disk",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--disk",
            "path=DIR/disk,colour=red",
        ],
        words: &["colour"],
    },
    Case {
        name: "network card without a network",
        arguments: &["--kernel", "DIR/tiny.elf", "--net", "mtu=1500"],
        words: &["net0", "tap"],
    },
    Case {
        name: "tap that is not there",
        arguments: &["--kernel", "DIR/tiny.elf", "--net", "tap=no-such-tap"],
        words: &["no-such-tap", "no interface"],
    },
    Case {
        name: "passt that is not there",
        arguments: &["--kernel", "DIR/tiny.elf", "--net", "user,passt=DIR/absent"],
        words: &["absent", "passt"],
    },
    Case {
        name: "passt that is another program",
        arguments: &["--kernel", "DIR/tiny.elf", "--net", "user,passt=/bin/ls"],
        words: &["passt exited with status 2"],
    },
    Case {
        name: "port that cannot be forwarded",
        arguments: &["--kernel", "DIR/tiny.elf", "--net", "user,forward=tcp:80"],
        words: &["forward", "tcp:8080-80"],
    },
    Case {
        name: "unknown disk format",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--disk",
            "path=DIR/disk,format=floppy",
        ],
        words: &["floppy"],
    },
    Case {
        name: "unknown memory exposure",
        arguments: &["--kernel", "DIR/tiny.elf", "--rng=memory=some"],
        words: &["memory", "some", "shared", "bounce"],
    },
    Case {
        name: "unknown machine",
        arguments: &["--kernel", "DIR/tiny.elf", "--machine", "pc"],
        words: &["virt-1"],
    },
    Case {
        name: "unknown accelerator",
        arguments: &["--kernel", "DIR/tiny.elf", "--accel", "magic"],
        words: &["magic"],
    },
    Case {
        name: "two devices in one slot",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--disk",
            "path=DIR/disk,slot=9",
            "--disk",
            "path=DIR/other,slot=9",
        ],
        words: &["slot"],
    },
    Case {
        name: "two devices of one name",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--disk",
            "path=DIR/disk,id=same",
            "--disk",
            "path=DIR/other,id=same",
        ],
        words: &["same"],
    },
    Case {
        name: "slot out of range",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--disk",
            "path=DIR/disk,slot=32",
        ],
        words: &["slot", "32"],
    },
    Case {
        name: "disk does not exist",
        arguments: &["--kernel", "DIR/tiny.elf", "--disk", "path=DIR/absent"],
        words: &["absent"],
    },
    Case {
        name: "disk of half a sector",
        arguments: &["--kernel", "DIR/tiny.elf", "--disk", "path=DIR/odd"],
        words: &["512"],
    },
    Case {
        name: "balloon as large as the guest's memory",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--memory",
            "64M",
            "--balloon=size=64M",
        ],
        words: &["64M"],
    },
    Case {
        name: "balloon of half a page",
        arguments: &["--kernel", "DIR/tiny.elf", "--balloon=size=2K"],
        words: &["4K"],
    },
    Case {
        name: "share of nothing",
        arguments: &["--kernel", "DIR/tiny.elf", "--fs", "tag=a,path=DIR/absent"],
        words: &["absent"],
    },
    Case {
        name: "share of a file",
        arguments: &["--kernel", "DIR/tiny.elf", "--fs", "tag=a,path=DIR/disk"],
        words: &["directory"],
    },
    Case {
        name: "share without a tag",
        arguments: &["--kernel", "DIR/tiny.elf", "--fs", "path=DIR"],
        words: &["tag"],
    },
    Case {
        name: "unknown owner of a share",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--fs",
            "tag=a,path=DIR,owner=me",
        ],
        words: &["self", "guest"],
    },
    Case {
        name: "impossible ids of a share",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--fs",
            "tag=a,path=DIR,uid-map=0:1",
        ],
        words: &["GUEST:HOST:COUNT"],
    },
    Case {
        name: "pmem of odd size",
        arguments: &["--kernel", "DIR/tiny.elf", "--pmem", "path=DIR/odd"],
        words: &["2 MiB"],
    },
    Case {
        name: "pmem larger than its file",
        arguments: &["--kernel", "DIR/tiny.elf", "--pmem", "DIR/disk,size=2M"],
        words: &["65536"],
    },
    Case {
        name: "pmem of half a piece",
        arguments: &["--kernel", "DIR/tiny.elf", "--pmem", "DIR/large,size=3M"],
        words: &["2M"],
    },
    Case {
        name: "pmem is a folder",
        arguments: &["--kernel", "DIR/tiny.elf", "--pmem", "DIR,size=2M"],
        words: &["regular file"],
    },
    Case {
        name: "one file as two persistent memories",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--pmem",
            "DIR/large",
            "--pmem",
            "DIR/large",
        ],
        words: &["in use"],
    },
    Case {
        name: "configuration file does not exist",
        arguments: &["DIR/absent.toml"],
        words: &["absent.toml"],
    },
    Case {
        name: "configuration file is not TOML",
        arguments: &["DIR/broken.toml"],
        words: &["broken.toml"],
    },
    Case {
        name: "unknown key in a configuration file",
        arguments: &["DIR/unknown.toml"],
        words: &["colour"],
    },
    Case {
        name: "console in a folder that does not exist",
        arguments: &[
            "--kernel",
            "DIR/tiny.elf",
            "--console",
            "file=DIR/absent/log",
        ],
        words: &["absent"],
    },
];

pub fn run(context: &Context, _: &[String]) -> Result<Vec<Outcome>> {
    let product = context.product()?;
    let folder = sh::fresh_dir("badinput")?;
    make_files(&folder, &context.packages()?.kernel())?;
    let mut outcomes: Vec<_> = CASES
        .iter()
        .map(|case| Outcome::of(case.name, check(product, &folder, case)))
        .collect();
    outcomes.push(Outcome::of("disk in use", disk_in_use(product, &folder)));
    if sh::is_root() {
        outcomes.push(Outcome::of(
            "unreadable files",
            unreadable(product, &folder),
        ));
    }
    Ok(outcomes)
}

fn make_files(folder: &Path, kernel: &Path) -> Result<()> {
    let elf = tiny::elf();
    let put = |name: &str, content: &[u8]| fs::write(folder.join(name), content);
    put("tiny.elf", &elf)?;
    put("short.elf", &elf[..100])?;
    put("empty", b"")?;
    put("noise", &[0x5A; 8192])?;
    put("disk", &[0; 65536])?;
    put("other", &[0; 65536])?;
    put("odd", &[0; 65536 + 100])?;
    put("broken.toml", b"[[disk\n")?;
    put("unknown.toml", b"colour = \"red\"\n")?;
    // A stock kernel without its second half, and one that ends within its setup code.
    let kernel = fs::read(kernel)?;
    put("half.bzimage", &kernel[..kernel.len() / 2])?;
    put("setup.bzimage", &kernel[..2048])?;
    fs::File::create(folder.join("large"))?.set_len(256 << 20)?;
    Ok(())
}

/// Runs `anemone run` with `DIR` replaced; it must refuse.
fn check(product: &Binaries, folder: &Path, case: &Case) -> Result<()> {
    let folder = folder.to_string_lossy();
    let mut command = product.command("anemone");
    command.arg("run");
    if !case.arguments.contains(&"--accel") {
        command.args(["--accel", ACCELERATOR]);
    }
    command.args(case.arguments.iter().map(|a| a.replace("DIR", &folder)));
    let done = sh::run_limited(&mut command, Duration::from_secs(20))?;
    refused(&done, case.words)?;
    nothing_left()
}

/// It needs nothing of the host.
const ACCELERATOR: &str = "soft";

fn refused(done: &sh::Finished, words: &[&str]) -> Result<()> {
    let said = &done.output;
    ensure!(
        done.code() == Some(2),
        "exit {:?}, not 2; it said:\n{said}",
        done.status
    );
    ensure!(!said.contains("panicked"), "a panic:\n{said}");
    ensure!(
        words.iter().any(|word| said.contains(word)),
        "the message holds none of {words:?}:\n{said}"
    );
    Ok(())
}

fn nothing_left() -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let left = jail::family(std::process::id());
        let left: Vec<_> = left
            .iter()
            .filter(|p| p.program.starts_with("anemone"))
            .collect();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            bail!("left behind: {left:?}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A disk that a server has locked cannot be had a second time.
fn disk_in_use(product: &Binaries, folder: &Path) -> Result<()> {
    let socket = folder.join("holder.sock");
    let disk = folder.join("disk");
    let mut holder = product.command("anemone-blk");
    holder
        .arg("--socket")
        .arg(&socket)
        .arg("--image")
        .arg(&disk)
        .stdin(Stdio::null());
    let holder = sh::spawn(&mut holder)?;
    sh::wait_for_path(&socket, Duration::from_secs(10))?;
    let mut command = product.command("anemone");
    command
        .args(["run", "--accel", ACCELERATOR, "--kernel"])
        .arg(folder.join("tiny.elf"))
        .arg("--disk")
        .arg(&disk);
    let done = sh::run_limited(&mut command, Duration::from_secs(20))?;
    drop(holder);
    refused(&done, &["in use", "lock"])
}

/// Files that the user may not read or write; root may everything, so another user tries.
fn unreadable(product: &Binaries, folder: &Path) -> Result<()> {
    const NOBODY: &str = "65534";
    // The build folder may lie where another user has no way in.
    let own = tempdir()?;
    for (name, path) in product.iter() {
        fs::copy(path, own.0.join(name))?;
    }
    for name in ["tiny.elf", "disk", "other"] {
        fs::copy(folder.join(name), own.0.join(name))?;
    }
    fs::set_permissions(own.0.join("disk"), Permissions::from_mode(0o444))?;
    fs::set_permissions(own.0.join("other"), Permissions::from_mode(0o600))?;
    let try_it = |arguments: &[&str], words: &[&str]| -> Result<()> {
        let mut command = std::process::Command::new("setpriv");
        command
            .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"])
            .arg(own.0.join("anemone"))
            .args(["run", "--accel", "none,socket=driver.sock"])
            .args(
                arguments
                    .iter()
                    .map(|a| a.replace("DIR", &own.0.to_string_lossy())),
            );
        refused(
            &sh::run_limited(&mut command, Duration::from_secs(20))?,
            words,
        )
    };
    try_it(&["--kernel", "DIR/other"], &["other"])?;
    try_it(
        &["--kernel", "DIR/tiny.elf", "--disk", "path=DIR/disk"],
        &["disk"],
    )
}

/// A folder under /tmp that others may look into; removed when dropped.
struct TempDir(std::path::PathBuf);

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tempdir() -> Result<TempDir> {
    let path = std::env::temp_dir().join(format!("anemone-badinput-{}", std::process::id()));
    fs::create_dir_all(&path)?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    Ok(TempDir(path))
}
