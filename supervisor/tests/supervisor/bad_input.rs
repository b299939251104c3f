//! Everything that can be wrong with a configuration: status 2, a message that helps, and nothing
//! started.

use std::os::unix::fs::PermissionsExt;

use crate::common::{Lab, signal, sized};

/// Runs with these arguments only, and expects them to be refused.
#[track_caller]
fn refused(lab: &Lab, args: &[&str], parts: &[&str]) {
    let mut all = vec!["run", "--accel", "none,socket=accel"];
    all.extend(args);
    lab.anemone(&all).expect(2, parts);
    assert_eq!(lab.log("vmm"), "", "a process was started");
}

#[test]
fn command_line() {
    let lab = Lab::new();
    let k = ["--kernel", "kernel", "--console", "none"];
    let with = |more: &[&'static str]| [&k[..], more].concat();
    for (args, parts) in [
        (&["--cpus", "0"][..], &["--cpus", "`0`", "1 to 64"][..]),
        (&["--cpus", "65"], &["--cpus", "`65`", "1 to 64"]),
        (&["--cpus", "2,model=486"], &["model", "`486`", "`host`"]),
        (&["--memory", "16M"], &["--memory", "`16M`", "32M to 1T"]),
        (&["--memory", "33M"], &["--memory", "steps of 2M"]),
        (&["--memory", "lots"], &["--memory", "`lots`"]),
        (
            &["--disk", "path=a,colour=red"],
            &["--disk", "`colour`", "`readonly`"],
        ),
        (
            &["--disk", "a.qcow2,format=qcow2"],
            &["format", "`qcow2`", "`raw`"],
        ),
        (&["--disk", "x,format=nbd"], &["format", "`nbd`", "`raw`"]),
        (&["--disk", "a,slot=32"], &["slot", "`32`", "1 to 31"]),
        (
            &["--disk", "a,slot=9", "--disk", "b"],
            &["slot 9", "`disk0`", "`disk1`"],
        ),
        (&["--disk", "a,id=x", "--disk", "b,id=x"], &["`x`", "twice"]),
        (&["--machine", "pc"], &["pc", "virt-1"]),
        (
            &["--accel", "tcg"],
            &["--accel", "`tcg`", "`kvm`", "`soft`"],
        ),
        (&["--accel", "none"], &["socket=PATH"]),
        (&["--on-panic", "shrug"], &["shrug", "restart"]),
        (&["--sandbox", "off"], &["off", "log"]),
        (&["--gpu"], &["--gpu"]),
        (&["--console", "floppy"], &["floppy", "`pty`"]),
        (&["--serial", "file=a,unix=b"], &["serial", "only one"]),
        (&["--name", "a b"], &["--name", "a b", "letters"]),
        (&["--vsock", "cid=3"], &["`vsock`", "`socket`"]),
        (
            &["--vsock", "socket=v,cid=2"],
            &["--vsock", "2", "3 to 4294967294"],
        ),
        (
            &["--vsock", "no/such/folder/v"],
            &["vsock", "no/such/folder", "No such file"],
        ),
        (&["--vsock", "kernel"], &["vsock", "not a socket"]),
    ] {
        // A second `--accel` or `--console` replaces nothing: clap refuses it.
        let accel = args.contains(&"--accel");
        let console = args.contains(&"--console");
        if accel || console {
            let mut all = vec!["run", "--kernel", "kernel"];
            all.extend(args);
            lab.anemone(&all).expect(2, parts);
        } else {
            refused(&lab, &with(args), parts);
        }
    }
    let long = "x".repeat(2048);
    refused(
        &lab,
        &["--kernel", "kernel", "--cmdline", &long],
        &["--cmdline", "at most 2047 bytes"],
    );
    refused(
        &lab,
        &["--kernel", "kernel", "--serial", "stdio"],
        &["standard input", "none"],
    );
    refused(&lab, &[], &["`kernel` is missing"]);
    lab.anemone(&["fly"]).expect(2, &["fly"]);
    lab.anemone(&[]).expect(2, &["Usage"]);
}

#[test]
fn files_to_boot() {
    let lab = Lab::new();
    refused(
        &lab,
        &["--kernel", "missing"],
        &["kernel: missing: No such file"],
    );
    refused(&lab, &["--kernel", "."], &["kernel: .: not a regular file"]);
    lab.write("empty", "");
    refused(&lab, &["--kernel", "empty"], &["the file is empty"]);
    sized(lab.path("huge"), 64 << 20);
    refused(
        &lab,
        &["--kernel", "kernel", "--initrd", "huge", "--memory", "64M"],
        &["initrd: huge", "67108864 bytes do not fit", "memory"],
    );
    refused(
        &lab,
        &["--kernel", "kernel", "--initrd", "none.img"],
        &["initrd: none.img: No such file"],
    );
}

#[test]
fn a_kernel_that_may_not_be_read() {
    let lab = Lab::new();
    let path = lab.write("secret", "a kernel");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
    if std::fs::File::open(&path).is_ok() {
        // To root nothing is forbidden; a socket cannot be opened by anybody.
        std::fs::remove_file(&path).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        refused(
            &lab,
            &["--kernel", "secret"],
            &["kernel: secret: not a regular file"],
        );
    } else {
        refused(
            &lab,
            &["--kernel", "secret"],
            &["kernel: secret: Permission denied"],
        );
    }
}

#[test]
fn disks() {
    let lab = Lab::new();
    let refused = |disk: &str, parts: &[&str]| {
        let args = ["--kernel", "kernel", "--console", "none", "--disk", disk];
        refused(&lab, &args, parts);
    };
    refused("missing.img", &["disk `disk0`: missing.img: No such file"]);
    refused(
        ".,id=root",
        &["disk `root`: .: not a regular file or block device"],
    );
    sized(lab.path("odd.img"), 1025);
    refused(
        "odd.img",
        &["odd.img: the size of 1025 bytes is not a multiple of 512"],
    );
    sized(lab.path("empty.img"), 0);
    refused("empty.img", &["empty.img: the file is empty"]);
    let path = sized(lab.path("ro.img"), 1024);
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
    refused("ro.img", &["ro.img: it is read-only", "add `readonly`"]);
    refused("socket=nobody", &["disk0: nobody: cannot connect"]);
}

#[test]
fn a_disk_in_use() {
    let lab = Lab::new();
    sized(lab.path("a.img"), 1024);
    // A VM that runs until its power button is pressed.
    lab.write("vmm.script", "ready start power shutdown");
    let writer = lab.start(&["--disk", "a.img"]);
    let driver = lab.drive();
    lab.wait_for("the disk", || lab.log("disk0").contains("--image-fd"));

    let other = Lab::new();
    let image = lab.path("a.img").display().to_string();
    for more in ["", ",readonly"] {
        let disk = format!("{image}{more}");
        refused(
            &other,
            &["--kernel", "kernel", "--console", "none", "--disk", &disk],
            &["disk `disk0`", &image, "in use by another VM"],
        );
    }
    signal(&writer, libc::SIGTERM);
    lab.finish(writer).expect(0, &[]);
    drop(driver);

    // Readers share; the same image twice in one VM is no different from two VMs.
    other
        .run(&[
            "--disk",
            &format!("{image},readonly"),
            "--disk",
            &format!("{image},readonly"),
        ])
        .expect(0, &[]);
    refused(
        &Lab::new(),
        &[
            "--kernel",
            "kernel",
            "--console",
            "none",
            "--disk",
            &image,
            "--disk",
            &image,
        ],
        &["disk `disk1`", "in use by another VM or twice by this one"],
    );
}

#[test]
fn configuration_files() {
    let lab = Lab::new();
    for (text, parts) in [
        (
            "kernel = \"kernel\"\nmemroy = \"1G\"\n",
            &["vm.toml:2:", "`memroy`", "`memory`"][..],
        ),
        (
            "kernel = \"kernel\"\n[gpu]\n",
            &["vm.toml:2:", "`gpu`", "`disk`"],
        ),
        (
            "kernel = \"kernel\"\ncpus = 99\n",
            &["vm.toml:2:", "99", "1 to 64"],
        ),
        ("kernel = 7\n", &["vm.toml:1:", "string"]),
        ("kernel =\n", &["vm.toml:1:"]),
    ] {
        lab.write("vm.toml", text);
        lab.anemone(&["run", "vm.toml"]).expect(2, parts);
        lab.anemone(&["check", "vm.toml"]).expect(2, parts);
    }
    lab.anemone(&["run", "missing.toml"])
        .expect(2, &["configuration missing.toml: No such file"]);
    lab.anemone(&["run", "--rng", "rate=1000"]).expect(
        2,
        &["configuration rate=1000: No such file", "--rng=rate=1000"],
    );
    assert_eq!(lab.log("vmm"), "");
}

#[test]
fn programs_that_are_not_there() {
    let lab = Lab::new();
    sized(lab.path("a.img"), 1024);
    refused(
        &lab,
        &[
            "--kernel",
            "kernel",
            "--console",
            "none",
            "--disk",
            "a.img,binary=no-such",
        ],
        &["cannot find no-such", "`binary`"],
    );
    refused(
        &lab,
        &[
            "--kernel",
            "kernel",
            "--console",
            "none",
            "--net",
            "user,passt=no-such",
        ],
        &["cannot find no-such", "`passt`"],
    );
    refused(
        &lab,
        &[
            "--kernel",
            "kernel",
            "--console",
            "none",
            "--net",
            "tap=no-such",
        ],
        &["network card `net0`: tap `no-such`: there is no interface of that name"],
    );
    std::fs::remove_file(lab.path("anemone-rng")).unwrap();
    refused(
        &lab,
        &["--kernel", "kernel", "--console", "none", "--rng"],
        &["cannot find anemone-rng; looked in"],
    );
    std::fs::remove_file(lab.path("anemone-vmm")).unwrap();
    refused(&lab, &["--kernel", "kernel"], &["cannot find anemone-vmm"]);
}

#[test]
fn accelerators() {
    let lab = Lab::new();
    lab.write("self-test-kvm.script", "it emulates\x1b supervisor code\n");
    lab.write("self-test-soft.script", "no memory for\ncode\n");
    let outcome = lab.anemone(&["run", "--kernel", "kernel", "--console", "none"]);
    // With or without /dev/kvm, there is nothing for `auto`.
    outcome.expect(
        2,
        &[
            "no accelerator of this build",
            "\n  kvm: ",
            "\n  soft: no memory for code",
            "--accel NAME",
        ],
    );
    if std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
    {
        outcome.expect(2, &["kvm: it emulates  supervisor code"]);
    }
    assert_eq!(lab.log("vmm"), "");
}

#[test]
fn control_groups() {
    let lab = Lab::new();
    for (group, part) in [
        (
            "vms",
            "`cgroup`: found `vms`, allowed: auto, off or an absolute path",
        ),
        ("/proc", "cgroup: /proc is no cgroup of version 2"),
        ("/no/such", "cgroup: /no/such is no cgroup of version 2"),
        ("off,pids-max=7", "has no meaning without a control group"),
    ] {
        let args = ["--kernel", "kernel", "--console", "none", "--cgroup", group];
        refused(&lab, &args, &[part]);
    }
}
