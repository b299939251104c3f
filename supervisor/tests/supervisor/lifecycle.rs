//! From start to end, through everything that can happen in between, with fake programs.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use crate::common::{Lab, signal, sized};

#[test]
fn a_guest_that_shuts_down() {
    let lab = Lab::new();
    sized(lab.path("a.img"), 1 << 20);
    lab.run(&[
        "--disk",
        "a.img,readonly,serial=S1,queues=2,id=root",
        "--rng=rate=1K",
        "--cpus",
        "3",
        "--memory",
        "64M",
        "--log-level",
        "info",
    ])
    .expect(0, &[]);
    let vmm = lab.log("vmm");
    // Standard input, output and error, and the control channel.
    assert!(vmm.starts_with("started [0, 1, 2, 3]\n"), "{vmm}");
    assert!(
        vmm.contains("device rng type 4 slot 2 queues 1 config 0 connected true"),
        "{vmm}"
    );
    assert!(
        vmm.contains("device root type 2 slot 8 queues 2 config 60 connected true"),
        "{vmm}"
    );
    assert!(
        vmm.contains(
            "kernel \"a kernel\" cmdline \"\" cpus 3 memory 67108864 accel none panic Some(3)"
        ),
        "{vmm}"
    );
    let disk = lab.log("root");
    for part in [
        "--control-fd 3",
        "--sandbox on",
        "--log-level info",
        "--id root",
        "--fd 4",
        "--image-fd 5 --queues 2 --readonly --serial S1 [0, 1, 2, 3, 4, 5]\n",
        "closed\n",
    ] {
        assert!(disk.contains(part), "lacks {part}: {disk}");
    }
    assert!(
        lab.log("rng")
            .contains("--fd 4 --rate 1024 [0, 1, 2, 3, 4]")
    );
    assert!(!lab.path("accel").exists(), "the socket is left behind");
}

#[test]
fn reboot_starts_a_new_vmm_and_keeps_the_devices() {
    let lab = Lab::new();
    sized(lab.path("a.img"), 1024);
    lab.write(
        "vmm.script",
        "ready start reset\nready start reset\nready start shutdown",
    );
    lab.run(&["--disk", "a.img", "--serial", "file=serial.txt"])
        .expect(0, &[]);
    let vmm = lab.log("vmm");
    assert_eq!(vmm.matches("started").count(), 3, "{vmm}");
    // The kernel is read from its beginning each time.
    assert_eq!(vmm.matches("kernel \"a kernel\"").count(), 3, "{vmm}");
    let disk = lab.log("disk0");
    assert_eq!(disk.matches("--control-fd").count(), 1, "{disk}");
    assert_eq!(disk.matches("connect\n").count(), 2, "{disk}");
    // A byte stream goes on as it is.
    assert_eq!(lab.log("serial").matches("connect\n").count(), 0);
    lab.run(&["--on-reboot", "stop"]).expect(0, &[]);
}

#[test]
fn a_guest_that_resets_over_and_over_goes_on() {
    let lab = Lab::new();
    let script = "ready start reset\n".repeat(12) + "ready start shutdown";
    lab.write("vmm.script", script);
    lab.run(&[]).expect(0, &[]);
    assert_eq!(lab.log("vmm").matches("started").count(), 13);
}

#[test]
fn on_reboot_stop_ends_the_vm() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start reset");
    lab.run(&["--on-reboot", "stop"]).expect(0, &[]);
    assert_eq!(lab.log("vmm").matches("started").count(), 1);
}

#[test]
fn kernel_panics() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start panic hang\nready start shutdown");
    lab.run(&[]).expect(1, &["the guest's kernel panicked"]);
    let lab = Lab::new();
    lab.write("vmm.script", "ready start panic hang\nready start shutdown");
    lab.run(&["--on-panic", "restart"])
        .expect(0, &["starting it again"]);
    assert_eq!(lab.log("vmm").matches("started").count(), 2);
    let lab = Lab::new();
    lab.write("vmm.script", "ready start panic shutdown");
    lab.run(&["--on-panic", "ignore"])
        .expect(0, &["it goes on"]);
}

#[test]
fn what_a_vmm_can_do_wrong() {
    for (script, status, parts) in [
        ("refuse:truncated", 2, &["error: truncated"][..]),
        ("exit:3", 1, &["anemone-vmm, pid ", "exited with status 3"]),
        (
            "kill:11",
            1,
            &["anemone-vmm, pid ", "was killed by SIGSEGV"],
        ),
        ("kill:31", 1, &["SIGSYS", "reports above"]),
        ("ready start kill:9", 1, &["was killed by SIGKILL"]),
        ("ready start exit:0", 1, &["exited with status 0"]),
        (
            "ready start nonsense hang",
            1,
            &["broke the protocol", "malformed"],
        ),
        ("ready ready hang", 1, &["broke the protocol"]),
        (
            "ready start failed:reason hang",
            1,
            &["anemone-vmm, pid ", "reason"],
        ),
        (
            "ready start lost:rng hang",
            1,
            &["device `rng`: anemone-rng, pid ", "no  [31manswer"],
        ),
        (
            "ready start lost:moon hang",
            1,
            &["broke the protocol", "there is no device `moon`"],
        ),
    ] {
        let lab = Lab::new();
        lab.write("vmm.script", script);
        lab.run(&["--rng", "--restart", "never"])
            .expect(status, parts);
    }
}

#[test]
fn what_a_device_can_do_wrong() {
    for (script, parts) in [
        (
            "exit:1",
            &["device `rng`: anemone-rng, pid ", "exited with status 1"][..],
        ),
        ("fail:why", &["device `rng`: anemone-rng, pid ", "why"]),
        (
            "ready sleep:100 kill:11",
            &["device `rng`: anemone-rng, pid ", "killed by SIGSEGV"],
        ),
        ("ready sleep:100 kill:31", &["device `rng`", "SIGSYS"]),
        ("ready quit", &["device `rng`", "broke the protocol"]),
    ] {
        let lab = Lab::new();
        lab.write("vmm.script", "ready start hang");
        lab.write("rng.script", script);
        lab.run(&["--rng", "--restart", "always,never=rng"])
            .expect(1, parts);
    }
}

/// The device names a port, and nothing else: before the VM runs, in the supervisor's jail, and from
/// the next process.
#[test]
fn a_guest_is_connected_to_the_sockets_of_the_host() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start serve");
    let script = "dial:7 ready sleep:200 kill:9\nready dial:8 dial:9 dial:7\n";
    lab.write("vsock.script", script);
    let listener = UnixListener::bind(lab.path("v_7")).unwrap();
    // A listener that takes no more, which must not hold the supervisor up.
    let full = UnixListener::bind(lab.path("v_9")).unwrap();
    let mut waiting = Vec::new();
    full.set_nonblocking(true).unwrap();
    fill(&lab.path("v_9"), &mut waiting);
    let child = lab.start(&["--vsock", "socket=v,cid=9"]);
    let _driver = lab.drive();
    // The first process ends before it has taken its connection.
    for expected in ["", "7"] {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, expected);
    }
    lab.wait_for("answers", || {
        lab.log("vsock").contains("dialed 7 connected")
    });
    let log = lab.log("vsock");
    assert!(log.contains("dialed 8 refused"), "nobody listens: {log}");
    assert!(log.contains("dialed 9 refused"), "the queue is full: {log}");
    assert!(lab.path("v").exists());
    signal(&child, libc::SIGTERM);
    lab.finish(child).expect(0, &[]);
    let log = lab.log("vsock");
    assert!(log.contains("--cid 9 --listen-fd "), "{log}");
    assert!(!lab.path("v").exists(), "the socket is left behind");
}

/// Connects until the listener's queue is full.
fn fill(path: &std::path::Path, streams: &mut Vec<std::os::fd::OwnedFd>) {
    let (folder, name) = (path.parent().unwrap(), path.file_name().unwrap());
    let base = folder.join(name.to_str().unwrap().trim_end_matches("_9"));
    while let Ok(stream) = anemone_process::dial(&base, 9) {
        streams.push(stream);
        assert!(streams.len() < 100_000, "the queue has no end");
    }
}

#[test]
fn how_a_device_ended_says_more_than_what_the_vmm_saw() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start lost:rng hang");
    lab.write("rng.script", "ready sleep:50 kill:11");
    lab.run(&["--rng", "--restart", "never"])
        .expect(1, &["killed by SIGSEGV"]);
}

#[test]
fn signals() {
    // The guest powers off.
    let lab = Lab::new();
    lab.write("vmm.script", "ready start power shutdown");
    for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let lab = Lab::new();
        lab.write("vmm.script", "ready start power shutdown");
        let child = lab.start(&["--rng"]);
        let _driver = lab.drive();
        lab.wait_for("the device", || lab.log("rng").contains("--fd"));
        std::thread::sleep(std::time::Duration::from_millis(100));
        signal(&child, number);
        lab.finish(child).expect(0, &[]);
        assert!(lab.log("vmm").contains("power button"));
    }
    // It does not, and a second signal ends it.
    lab.write("vmm.script", "ready start power hang");
    let child = lab.start(&[]);
    let _driver = lab.drive();
    lab.wait_for("the VMM", || lab.log("vmm").contains("kernel"));
    std::thread::sleep(std::time::Duration::from_millis(100));
    signal(&child, libc::SIGTERM);
    lab.wait_for("the power button", || {
        lab.log("vmm").contains("power button")
    });
    signal(&child, libc::SIGTERM);
    lab.finish(child).expect(1, &["second signal, SIGTERM"]);
    // While nobody drives the machine, and while it starts.
    let lab = Lab::new();
    let child = lab.start(&[]);
    lab.wait_for("the socket", || lab.path("accel").exists());
    signal(&child, libc::SIGINT);
    lab.finish(child)
        .expect(2, &["SIGINT before a driver connected"]);
    lab.write("vmm.script", "hang");
    let child = lab.start(&[]);
    let _driver = lab.drive();
    lab.wait_for("the VMM", || lab.log("vmm").contains("kernel"));
    signal(&child, libc::SIGINT);
    lab.finish(child)
        .expect(1, &["SIGINT before the guest ran"]);
}

#[test]
fn a_supervisor_that_is_killed_takes_its_children_with_it() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start hang");
    let child = lab.start(&["--rng"]);
    let _driver = lab.drive();
    lab.wait_for("the device", || lab.log("rng").contains("--fd"));
    lab.wait_for("the VMM", || lab.log("vmm").contains("kernel"));
    signal(&child, libc::SIGKILL);
    lab.wait_for("the end of all processes", || lab.processes().is_empty());
    let outcome = lab.finish(child);
    assert_eq!(outcome.status, None);
}

#[test]
fn consoles() {
    let lab = Lab::new();
    lab.run(&[
        "--console",
        "file=out.txt,id=con,slot=5",
        "--serial",
        "unix=ser.sock",
    ])
    .expect(0, &[]);
    assert_eq!(
        fs::read_to_string(lab.path("out.txt")).unwrap(),
        "console output\n"
    );
    let vmm = lab.log("vmm");
    assert!(
        vmm.contains("device con type 3 slot 5 queues 2 config 12 connected true"),
        "{vmm}"
    );
    assert!(
        vmm.contains("cmdline \"console=ttyS0 console=hvc0\""),
        "{vmm}"
    );
    let serial = lab.log("serial");
    assert!(
        serial.contains("--id serial --stream-fd 4 --unix-fd 5 [0, 1, 2, 3, 4, 5]"),
        "{serial}"
    );
    assert!(!lab.path("ser.sock").exists());
    let outcome = lab.run(&["--console", "pty"]);
    outcome.expect(0, &["anemone: console is at /dev/pts/"]);
    assert!(lab.log("console").contains("--pty-fd 5"));
    // Output is appended.
    lab.run(&["--console", "file=out.txt"]).expect(0, &[]);
    assert_eq!(
        fs::read_to_string(lab.path("out.txt")).unwrap(),
        "console output\nconsole output\n"
    );
}

#[test]
fn standard_input_and_output_belong_to_the_console_process() {
    let lab = Lab::new();
    lab.write("console.script", "ready sleep:50 quit");
    lab.write("vmm.script", "ready start hang");
    lab.run(&["--console", "stdio"]).expect(0, &[]);
    let console = lab.log("console");
    // Not a terminal: every byte is the guest's, there is no escape key.
    assert!(console.contains("--stdio ["), "{console}");
    lab.write("console.script", "ready sleep:50 power");
    lab.write("vmm.script", "ready start power shutdown");
    lab.run(&["--console", "stdio"]).expect(0, &[]);
}

#[test]
fn a_back_end_that_runs_already() {
    let lab = Lab::new();
    let listener = UnixListener::bind(lab.path("blk.sock")).unwrap();
    lab.write("vmm.script", "ready start reset\nready start shutdown");
    lab.run(&["--disk", "socket=blk.sock"]).expect(0, &[]);
    // One connection per VMM.
    for _ in 0..2 {
        listener.accept().unwrap();
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    assert!(
        lab.log("vmm")
            .contains("device disk0 type 2 slot 8 queues 1 config 60 connected true")
    );
}

#[test]
fn another_program_in_the_place_of_a_device() {
    let lab = Lab::new();
    sized(lab.path("a.img"), 1024);
    fs::rename(lab.path("anemone-blk"), lab.path("my-blk")).unwrap();
    lab.run(&["--disk", "a.img,binary=my-blk"]).expect(0, &[]);
    assert!(lab.log("disk0").contains("--image-fd"));
}

#[test]
fn the_driver_keeps_its_connection() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start power shutdown");
    let child = lab.start(&[]);
    let mut driver = lab.drive();
    lab.wait_for("the VMM", || lab.log("vmm").contains("accel none"));
    std::thread::sleep(std::time::Duration::from_millis(100));
    signal(&child, libc::SIGTERM);
    lab.finish(child).expect(0, &[]);
    // It ends with the VM.
    let mut rest = Vec::new();
    assert_eq!(driver.read_to_end(&mut rest).unwrap(), 0);
    assert!(driver.write_all(b"x").is_err() || driver.read(&mut [0]).is_ok());
}

#[test]
fn the_software_cpu() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start reset\nready start shutdown");
    let soft = [
        "run",
        "--kernel",
        "kernel",
        "--console",
        "none",
        "--cpus",
        "3",
    ];
    let outcome = lab.anemone(&[&soft[..], &["--accel", "soft"]].concat());
    outcome.expect(0, &[]);
    assert_eq!(
        outcome.stderr, "",
        "nothing to say about what was asked for"
    );
    // Each VMM process is told before it reads anything.
    let vmm = lab.log("vmm");
    assert_eq!(
        vmm.matches("threads for soft, 3 CPUs, 0 devices\n").count(),
        2,
        "{vmm}"
    );
    assert_eq!(vmm.matches("accel soft").count(), 2, "{vmm}");
}

#[test]
fn auto_takes_the_software_cpu_where_kvm_is_of_no_use() {
    let lab = Lab::new();
    lab.write("self-test-kvm.script", "it emulates supervisor code\n");
    let outcome = lab.anemone(&["run", "--kernel", "kernel", "--console", "none"]);
    // Where /dev/kvm is not there, the reason is another.
    outcome.expect(0, &["the accelerator is `soft`, because kvm: "]);
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    let vmm = lab.log("vmm");
    assert!(
        vmm.contains("threads for soft, 1 CPUs, 0 devices\n") && vmm.contains("accel soft"),
        "{vmm}"
    );

    let lab = Lab::new();
    let outcome = lab.anemone(&["run", "--kernel", "kernel", "--console", "none"]);
    outcome.expect(0, &[]);
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    let vmm = lab.log("vmm");
    assert_eq!(vmm.contains("accel kvm"), kvm.is_ok(), "{vmm}");
    assert_eq!(outcome.stderr.is_empty(), kvm.is_ok(), "{}", outcome.stderr);
}

#[test]
fn cpu_models_by_accelerator() {
    let outcome = Lab::new().anemone(&["cpu-models"]);
    outcome.expect(0, &[]);
    for part in ["model-1", "kvm: cannot be asked", "soft: lacks y"] {
        assert!(outcome.stdout.contains(part), "{}", outcome.stdout);
    }
}

#[test]
fn check_builds_with_the_software_cpu_if_it_is_asked_for() {
    let lab = Lab::new();
    let check = [
        "check", "--kernel", "kernel", "--accel", "soft", "--cpus", "2",
    ];
    lab.write("vmm.script", "ready start");
    lab.anemone(&check).expect(0, &[]);
    let vmm = lab.log("vmm");
    assert!(
        vmm.contains("threads for soft, 2 CPUs, 0 devices\n") && vmm.contains("accel soft"),
        "{vmm}"
    );
    lab.write("vmm.script", "refuse:lacks-avx2");
    lab.anemone(&check).expect(2, &["lacks-avx2"]);
}

#[test]
fn check_prints_a_configuration_and_the_machine() {
    let lab = Lab::new();
    sized(lab.path("a.img"), 1024);
    lab.write(
        "vm.toml",
        "kernel = \"kernel\"\ndisk = [\"a.img,readonly\"]\ncpus = 2\n",
    );
    let outcome = lab.anemone(&["check", "vm.toml", "--dump-acpi", "tables"]);
    outcome.expect(0, &[]);
    assert!(outcome.stdout.contains("slot = 8"), "{}", outcome.stdout);
    assert!(
        outcome
            .stdout
            .contains("#   slot  0  1234:5678  host bridge"),
        "{}",
        outcome.stdout
    );
    let vmm = lab.log("vmm");
    assert!(vmm.contains("accel nothing"), "{vmm}");
    assert!(vmm.contains("connected false"), "{vmm}");
    assert_eq!(fs::read(lab.path("tables/DSDT.aml")).unwrap().len(), 40);
    // What it prints is a configuration that means the same.
    lab.write("full.toml", &outcome.stdout);
    let kernel = lab.path("kernel");
    let kernel = fs::canonicalize(kernel).unwrap();
    assert!(
        outcome.stdout.contains(&format!("{kernel:?}")),
        "{}",
        outcome.stdout
    );
    let again = lab.anemone(&["check", "full.toml"]);
    again.expect(0, &[]);
    assert_eq!(again.stdout, outcome.stdout);
    let json = lab.anemone(&["check", "vm.toml", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(value["config"]["cpus"]["count"], 2);
    assert_eq!(value["machine"]["boot"], "fake");
    lab.write("vmm.script", "refuse:truncated");
    lab.anemone(&["check", "vm.toml"]).expect(2, &["truncated"]);
    lab.write("vmm.script", "exit:4");
    lab.anemone(&["check", "vm.toml"])
        .expect(1, &["exited with status 4"]);
}

#[test]
fn acpi_tables_of_a_run() {
    let lab = Lab::new();
    lab.run(&["--dump-acpi", "tables"]).expect(0, &[]);
    assert!(lab.path("tables/DSDT.aml").exists());
}

#[test]
fn devices_and_doctor_report() {
    let lab = Lab::new();
    let text = lab.anemone(&["devices"]);
    text.expect(0, &[]);
    for part in ["* kvm", "blk", "virt-1", "0x608", "panic-device"] {
        assert!(text.stdout.contains(part), "lacks {part}: {}", text.stdout);
    }
    let json = lab.anemone(&["devices", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(value["devices"][0]["name"], "balloon");
    assert_eq!(value["machines"][0]["name"], "virt-1");

    let text = lab.anemone(&["doctor"]);
    text.expect(0, &[]);
    for part in ["kvm", "landlock", "io_uring", "anemone-vmm", "open files"] {
        assert!(text.stdout.contains(part), "lacks {part}: {}", text.stdout);
    }
    let json = lab.anemone(&["doctor", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    let policies = value["policies"].as_array().unwrap();
    assert!(
        policies
            .iter()
            .any(|policy| policy["program"] == "anemone-blk")
    );
    // More than a pipe holds, so it is read meanwhile.
    let policies = lab.anemone_beside(&["doctor", "--policies"]);
    assert!(
        policies.stdout.contains("# anemone-vmm, "),
        "{}",
        policies.stdout
    );
}
