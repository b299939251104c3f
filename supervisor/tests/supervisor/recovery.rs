//! Back ends that are lost while the guest runs, with fake programs.

use std::os::unix::net::UnixListener;

use crate::common::{Lab, sized};

/// The VMM's part: the guest goes on when the device is back.
const LOST_ONCE: &str = "ready start reconnect sleep:300 shutdown";

#[test]
fn a_killed_device_is_started_again_with_what_it_had() {
    let lab = Lab::new();
    sized(lab.path("a.img"), 1 << 20);
    lab.write("vmm.script", LOST_ONCE);
    lab.write(
        "disk0.script",
        "ready keep:7 keep:9 keep:7 keep:3 forget:9 forget:1 sleep:200 kill:9\nready",
    );
    lab.run(&["--disk", "a.img,readonly,serial=S1"]).expect(
        0,
        &[
            "device `disk0`: anemone-blk, pid ",
            "was killed by SIGKILL; it is started again",
            "device `disk0` serves again; the guest has waited ",
        ],
    );
    let disk = lab.log("disk0");
    let starts: Vec<_> = disk
        .lines()
        .filter(|l| l.contains("--control-fd"))
        .collect();
    assert_eq!(starts.len(), 2, "{disk}");
    assert!(starts[0].contains("--id disk0 --fd 4 --image-fd 5 --queues 1 --readonly --serial S1"));
    // The connection comes over the control channel, behind what was kept.
    assert!(
        starts[1]
            .ends_with("--id disk0 --image-fd 4 --queues 1 --readonly --serial S1 [0, 1, 2, 3, 4]"),
        "{disk}"
    );
    assert!(disk.contains("kept [3, 7]\nconnect\n"), "{disk}");
    assert!(lab.log("vmm").contains("reconnect disk0 1"));
    assert_eq!(lab.log("vmm").matches("started").count(), 1);
}

#[test]
fn too_many_kept_descriptors_are_refused() {
    let lab = Lab::new();
    lab.write("vmm.script", LOST_ONCE);
    let keep: String = (0..20).map(|key| format!("keep:{key} ")).collect();
    lab.write(
        "rng.script",
        format!("ready {keep} sleep:200 kill:9\nready"),
    );
    lab.run(&["--rng"])
        .expect(0, &["device `rng`: wants more than 4 descriptors kept"]);
    let rng = lab.log("rng");
    assert!(rng.contains("kept [0, 1, 2, 3]\n"), "{rng}");
}

#[test]
fn a_hung_device_is_killed_and_started_again() {
    let lab = Lab::new();
    lab.write(
        "vmm.script",
        "ready start lost:rng reconnect sleep:300 shutdown",
    );
    lab.run(&["--rng"]).expect(
        0,
        &[
            "device `rng`: anemone-rng, pid ",
            "no  [31manswer; it is started again",
        ],
    );
    assert_eq!(lab.log("rng").matches("--control-fd").count(), 2);
}

#[test]
fn a_device_that_breaks_the_protocol_is_replaced() {
    let lab = Lab::new();
    lab.write("vmm.script", LOST_ONCE);
    lab.write("rng.script", "ready sleep:200 quit hang\nready");
    lab.run(&["--rng"])
        .expect(0, &["it broke the protocol; it is started again"]);
}

#[test]
fn the_limit_ends_the_vm() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start hang");
    lab.write("rng.script", "ready sleep:200 kill:11\nready kill:11");
    lab.run(&["--rng", "--restart", "limit=3/60"]).expect(
        1,
        &[
            "it is started again in 10 ms",
            "it is started again in 20 ms",
            "error: device `rng`: anemone-rng, pid ",
            "was killed by SIGSEGV; that is more than 3 restarts within 60 seconds, the limit",
        ],
    );
    assert_eq!(lab.log("rng").matches("--control-fd").count(), 4);
}

#[test]
fn a_start_that_fails_counts_like_an_end() {
    let lab = Lab::new();
    lab.write(
        "vmm.script",
        "ready start reconnect reconnect reconnect sleep:300 shutdown",
    );
    lab.write(
        "rng.script",
        "ready sleep:200 kill:9\nfail:why\nexit:3\nready",
    );
    lab.run(&["--rng"]).expect(
        0,
        &[
            "why; it is started again in 10 ms",
            "exited with status 3; it is started again in 20 ms",
        ],
    );
}

#[test]
fn the_serial_port_goes_on() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start sleep:700 shutdown");
    lab.write("serial.script", "ready sleep:200 kill:9\nready");
    lab.run(&["--serial", "file=serial.txt"])
        .expect(0, &["device `serial`: anemone-console, pid "]);
    let serial = lab.log("serial");
    assert_eq!(
        serial.matches("--stream-fd 4 --file-fd 5").count(),
        2,
        "{serial}"
    );
}

#[test]
fn a_device_that_dies_while_the_guest_starts_again() {
    let lab = Lab::new();
    // The second VMM is thrown away, whether it refuses the device or has not looked yet.
    for second in ["hang", "refuse:gone"] {
        let lab_vmm = format!("ready start reset\n{second}\nready start shutdown");
        lab.write("vmm.script", lab_vmm);
        lab.write("rng.script", "ready sleep:300 kill:9\nready");
        lab.write("slow.script", "");
        let _ = std::fs::remove_file(lab.path("vmm.log"));
        let _ = std::fs::remove_file(lab.path("rng.log"));
        lab.run(&["--rng"]).expect(0, &["it is started again"]);
        assert_eq!(lab.log("vmm").matches("started").count(), 3, "{second}");
        assert_eq!(lab.log("rng").matches("--control-fd").count(), 2);
    }
}

#[test]
fn an_external_back_end_is_connected_to_again() {
    let lab = Lab::new();
    let path = lab.path("blk.sock");
    let listener = UnixListener::bind(&path).unwrap();
    lab.write("vmm.script", "ready start lost:disk0 reconnect shutdown");
    let child = lab.start(&["--disk", "socket=blk.sock"]);
    let _driver = lab.drive();
    // Gone for a while.
    let first = listener.accept().unwrap();
    drop(listener);
    std::fs::remove_file(&path).unwrap();
    lab.wait_for("the VMM", || lab.log("vmm").contains("accel none"));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let listener = UnixListener::bind(&path).unwrap();
    let second = listener.accept().unwrap();
    lab.finish(child).expect(
        0,
        &[
            "device `disk0`: the back end at ",
            "is lost: no  [31manswer; connecting again",
            "device `disk0` serves again",
        ],
    );
    drop((first, second));
}

#[test]
fn a_reset_waits_for_an_external_back_end() {
    let lab = Lab::new();
    let path = lab.path("blk.sock");
    let listener = UnixListener::bind(&path).unwrap();
    lab.write(
        "vmm.script",
        "ready start sleep:200 reset\nready start shutdown",
    );
    let child = lab.start(&["--disk", "socket=blk.sock"]);
    let _driver = lab.drive();
    let first = listener.accept().unwrap();
    drop(listener);
    std::fs::remove_file(&path).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(800));
    assert_eq!(lab.log("vmm").matches("started").count(), 1);
    let listener = UnixListener::bind(&path).unwrap();
    let second = listener.accept().unwrap();
    lab.finish(child)
        .expect(0, &["the guest starts when its back end is there"]);
    assert_eq!(lab.log("vmm").matches("started").count(), 2);
    drop((first, second));
}

#[test]
fn a_device_that_the_guest_never_used() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start untouched:rng shutdown");
    lab.run(&["--rng"])
        .expect(0, &["device `rng`: the guest never used it: no driver"]);
}
