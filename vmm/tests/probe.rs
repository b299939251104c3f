//! What the program tells of this host, in its jail.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output, Stdio};

/// Where the program finds `/dev/kvm`.
const DEVICE_FD: i32 = 4;

fn ask(question: &[&str], device: Option<&File>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anemone-vmm"));
    command.args(question).stdin(Stdio::null());
    if let Some(device) = device {
        let raw = device.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe; the descriptor is open in the child.
        unsafe {
            command.pre_exec(move || match libc::dup2(raw, DEVICE_FD) {
                DEVICE_FD => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
    }
    command.output().unwrap()
}

/// Whether stock kernels run is the host's affair. That the jail lets the question be answered is not.
fn has_a_verdict(accel: &str, device: Option<&File>) {
    let output = ask(&["--self-test", accel], device);
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => assert_eq!(output.stdout, b"", "{said}"),
        Some(1) => assert_ne!(output.stdout, b"", "{said}"),
        _ => panic!("{}: {said}", output.status),
    }
    assert_eq!(said, "");
}

#[test]
fn the_self_test_of_kvm_has_a_verdict() {
    if let Some(device) = common::kvm() {
        has_a_verdict("kvm", Some(&device));
    }
}

#[test]
fn the_self_test_of_the_software_cpu_has_a_verdict() {
    has_a_verdict("soft", None);
}

#[test]
fn the_cpu_models_are_told() {
    let device = common::kvm();
    let output = ask(&["--cpu-models"], device.as_ref());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    assert_ne!(output.stdout, b"");
}
