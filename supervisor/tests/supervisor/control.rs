//! The control socket of a running VM, with fake programs behind it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Child;

use crate::common::{Lab, sized};

/// A VM called `web` with a disk and an entropy source, and its driver.
fn running(lab: &Lab) -> (Child, UnixStream) {
    sized(lab.path("a.img"), 1 << 20);
    lab.write("vmm.script", "ready start serve");
    let child = lab.start(&["--name", "web", "--rng", "--disk", "a.img"]);
    let driver = lab.drive();
    lab.wait_for("the guest", || {
        lab.anemone_beside(&["status", "web"])
            .stdout
            .contains("running")
    });
    (child, driver)
}

fn socket(lab: &Lab, child: &Child) -> UnixStream {
    let name = format!("anemone/web-{}.sock", child.id());
    UnixStream::connect(lab.path(&name)).unwrap()
}

fn ask(stream: &UnixStream, request: &str) -> String {
    (&*stream).write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

/// What the kernel has of each process, here of fakes, which are in no jail.
#[test]
fn doctor_tells_what_the_processes_of_a_vm_may_touch() {
    let lab = Lab::new();
    let (mut child, _driver) = running(&lab);
    let outcome = lab.anemone_beside(&["doctor", "--vm", "web"]);
    outcome.expect(0, &[]);
    for part in [
        "VM web, accelerator none\n",
        &format!("\nanemone, pid {}, user ", child.id()),
        "\nanemone-vmm, pid ",
        "\nanemone-rng[rng], pid ",
        "\nanemone-blk[disk0], pid ",
        &lab.path("a.img").display().to_string(),
        "policy main        1 filter, no new privileges",
    ] {
        assert!(outcome.stdout.contains(part), "{part}: {outcome:?}");
    }
    let json = lab.anemone_beside(&["doctor", "--vm", "web", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    let processes = report["processes"].as_array().unwrap();
    assert_eq!(processes.len(), 4, "{report}");
    assert_eq!(processes[0]["threads"][0]["filters"], 1, "the supervisor");
    assert_eq!(processes[0]["memory"]["guest_mapped"], 0, "the supervisor");
    lab.anemone_beside(&["doctor", "--vm", "moon"])
        .expect(2, &["moon"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn status_restart_and_power_button() {
    let lab = Lab::new();
    let (child, _driver) = running(&lab);
    let pid = child.id().to_string();
    let outcome = lab.anemone_beside(&["status", &pid]);
    outcome.expect(0, &[]);
    for part in [
        &format!("web: pid {pid}, running, accelerator none"),
        "supervisor",
        "anemone-vmm",
        "rng (rng)",
        "not used: no driver",
        "disk0 (blk)",
        "memory shared",
    ] {
        assert!(outcome.stdout.contains(part), "{part}: {outcome:?}");
    }
    let json = lab.anemone_beside(&["status", "web", "--json"]).stdout;
    let status: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(status["name"], "web");
    assert_eq!(status["processes"][3]["restarts"], 0);
    let before = status["processes"][3]["pid"].clone();

    let outcome = lab.anemone_beside(&["restart-device", "web", "disk0"]);
    outcome.expect(0, &[]);
    assert!(outcome.stdout.contains("the guest has waited"));
    lab.wait_for("the new process", || {
        lab.log("disk0").matches("--control-fd").count() == 2
    });
    let disk = lab.log("disk0");
    // The old one was asked to end, and the new one has all but the connection from its start.
    assert_eq!(disk.matches("closed\n").count(), 1, "{disk}");
    assert_eq!(disk.matches("--control-fd").count(), 2, "{disk}");
    let json = lab.anemone_beside(&["status", "--json"]).stdout;
    let all: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(all[0]["processes"][3]["restarts"], 1);
    assert_ne!(all[0]["processes"][3]["pid"], before);

    lab.anemone_beside(&["restart-device", "web", "moon"])
        .expect(1, &["there is no device `moon`; there are: rng, disk0"]);
    lab.anemone_beside(&["status", "moon"])
        .expect(2, &["no VM `moon` runs; there are: web (pid "]);
    lab.anemone_beside(&["power-button", "web"]).expect(0, &[]);
    lab.finish(child).expect(0, &[]);
    let left = fs::read_dir(lab.path("anemone")).unwrap().count();
    assert_eq!(left, 0, "the socket is left behind");
    lab.anemone_beside(&["status"]).expect(0, &[]);
    lab.anemone_beside(&["status", "web"])
        .expect(2, &["no VM `web` runs"]);
}

#[test]
fn the_size_of_the_balloon() {
    let lab = Lab::new();
    lab.write("vmm.script", "ready start serve");
    let child = lab.start(&["--name", "soft", "--memory", "512M", "--balloon=size=8K"]);
    let _driver = lab.drive();
    lab.wait_for("the device", || {
        lab.anemone_beside(&["status", "soft"])
            .stdout
            .contains("running")
    });
    assert!(lab.log("balloon").contains("--target 8192"));
    let print = |words: &[&str]| {
        let outcome = lab.anemone_beside(&[&["balloon", "soft"], words].concat());
        outcome.expect(0, &[]);
        outcome.stdout
    };
    let text = print(&["300M"]);
    assert_eq!(text, "0.0 MiB of 300.0 MiB, free memory 3.0 MiB\n");
    assert!(lab.log("balloon").contains("balloon Some(314572800)"));
    let state: serde_json::Value = serde_json::from_str(&print(&["--json"])).unwrap();
    assert_eq!(state["actual"], 4096);
    assert_eq!(state["statistics"][0]["name"], "free memory");
    assert!(lab.log("balloon").contains("balloon None"));
    for size in ["512M", "4000"] {
        lab.anemone_beside(&["balloon", "soft", size])
            .expect(1, &["a multiple of 4K below the 512M"]);
    }
    lab.anemone_beside(&["balloon", "soft", "much"])
        .expect(2, &["much"]);
    lab.anemone_beside(&["power-button", "soft"]).expect(0, &[]);
    lab.finish(child).expect(0, &[]);
    let (child, _driver) = running(&lab);
    lab.anemone_beside(&["balloon", "web"])
        .expect(1, &["the VM has no balloon"]);
    lab.anemone_beside(&["power-button", "web"]).expect(0, &[]);
    lab.finish(child).expect(0, &[]);
}

#[test]
fn clients_that_misbehave() {
    let lab = Lab::new();
    let (child, _driver) = running(&lab);
    let folder = fs::metadata(lab.path("anemone")).unwrap();
    assert_eq!(folder.permissions().mode() & 0o777, 0o700);
    let stream = socket(&lab, &child);
    assert!(ask(&stream, "\"nonsense\"\n").contains("not a request"));
    assert!(ask(&stream, "{\"status\":\n").contains("not a request"));
    // Several at once, and one in pieces.
    assert!(ask(&stream, "\"status\"\n\"status\"\n").contains("\"web\""));
    let mut second = String::new();
    BufReader::new(&stream).read_line(&mut second).unwrap();
    (&stream).write_all(b"\"sta").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(ask(&stream, "tus\"\n").contains("\"web\""));
    // Too long.
    let stream = socket(&lab, &child);
    let _ = (&stream).write_all(&[b'x'; 10_000]);
    let mut rest = Vec::new();
    let ended = (&stream).read_to_end(&mut rest);
    assert!(ended.is_err() || rest.is_empty());
    // More clients than there is room for, none of which reads.
    let silent: Vec<_> = (0..40)
        .map(|_| {
            let stream = socket(&lab, &child);
            let _ = (&stream).write_all("\"status\"\n".repeat(100).as_bytes());
            stream
        })
        .collect();
    assert!(ask(&socket(&lab, &child), "\"status\"\n").contains("\"web\""));
    lab.anemone_beside(&["power-button", "web"]).expect(0, &[]);
    lab.finish(child).expect(0, &[]);
    drop(silent);
}

#[test]
fn without_a_place_for_the_socket_the_vm_runs() {
    let lab = Lab::new();
    lab.write("anemone", "not a folder");
    lab.run(&[])
        .expect(0, &["there is no control socket: not a folder"]);
}
