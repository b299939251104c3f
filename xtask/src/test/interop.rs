//! Other programs on the other side of our protocols. QEMU boots a stock kernel from our
//! vhost-user-blk server; our VMM on qemu-storage-daemon's export is the nested rig's scenario
//! `foreign-disk`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::disk::RootDisk;
use crate::initramfs;
use crate::packages::Packages;
use crate::report::Outcome;
use crate::sh;

use super::Context;

/// A stock kernel boots in 3 to 5 s under emulation.
const PATIENCE: Duration = Duration::from_secs(180);

pub fn run(context: &Context, _: &[String]) -> Result<Vec<Outcome>> {
    let packages = context.packages()?;
    let server = context.product()?.path("anemone-blk");
    let uring = qemu_boots(packages, &server, 2, &[]);
    let sync = qemu_boots(packages, &server, 1, &["--io", "sync"]);
    Ok(vec![
        Outcome::of("qemu boots from anemone-blk, two queues", uring),
        Outcome::of("qemu boots from anemone-blk without io_uring", sync),
    ])
}

fn qemu_boots(packages: &Packages, server: &Path, queues: u32, arguments: &[&str]) -> Result<()> {
    let folder = sh::fresh_dir("interop")?;
    let guest = initramfs::guest(packages)?;
    let disk = RootDisk::make(packages, &folder.join("root.img"))?;
    let socket = folder.join("blk.sock");
    let mut server = Command::new(server);
    server
        .arg("--socket")
        .arg(&socket)
        .arg("--image")
        .arg(&disk.image)
        .args(["--queues", &queues.to_string()])
        .args(arguments)
        .stdin(Stdio::null());
    let mut server = sh::spawn(&mut server)?;
    sh::wait_for_path(&socket, Duration::from_secs(10))?;

    let mut qemu = packages.qemu()?;
    qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", "256"])
        .args([
            "-object",
            "memory-backend-memfd,id=memory,size=256M,share=on",
        ])
        .args(["-M", "q35,memory-backend=memory"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&guest.kernel)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args(["-append", "console=ttyS0 anemone.steps=uname,disk,poweroff"])
        .arg("-chardev")
        .arg(format!("socket,id=disk,path={}", socket.display()))
        .arg("-device")
        .arg(format!(
            "vhost-user-blk-pci,chardev=disk,num-queues={queues}"
        ));
    let done = sh::run_limited(&mut qemu, PATIENCE)?;
    ensure!(
        done.code() == Some(0) && done.output.contains("guest: done"),
        "the guest did not finish:\n{}",
        done.output
    );
    ensure!(!done.output.contains("guest: FAIL"), "{}", done.output);
    ensure!(
        server.0.try_wait()?.is_none(),
        "anemone-blk ended with its client"
    );
    // It must end by SIGTERM, with everything written.
    // SAFETY: no pointers; the process is our child and has not been waited for.
    unsafe { libc::kill(server.0.id() as i32, libc::SIGTERM) };
    let ended = sh::wait_limited(&mut server.0, Duration::from_secs(10))?;
    ensure!(
        ended.is_some_and(|s| s.success()),
        "anemone-blk did not end on SIGTERM: {ended:?}"
    );
    disk.verify(packages)
}
