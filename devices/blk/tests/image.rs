//! What can be served, what cannot, and what happens when the image changes underneath.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::process::{Command, Output};

use anemone_driver::blk::{Blk, status};
use anemone_driver::{Error, Options, Supervised};
use common::{BINARY, Image, SECTOR, connect};

/// Runs the process, which is expected to end by itself.
fn refused(args: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let Output { status, stderr, .. } = Command::new(BINARY)
        .args(args)
        .arg("--socket")
        .arg(folder.path().join("socket"))
        .output()
        .unwrap();
    let text = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(2), "{args:?}: {text}");
    assert!(!folder.path().join("socket").exists());
    text
}

#[test]
fn images_that_cannot_be_served() {
    let image = Image::new(4096);
    let path = image.path();
    let path = path.to_str().unwrap();
    image.file.set_len(4097).unwrap();
    let text = refused(&["--image", path]);
    assert!(
        text.contains("4097 bytes") && text.contains("multiple of 512"),
        "{text}"
    );
    let text = refused(&["--image", "/nonexistent/image"]);
    assert!(
        text.contains("/nonexistent/image") && text.contains("No such file"),
        "{text}"
    );
    let text = refused(&["--readonly", "--image", "/dev"]);
    assert!(
        text.contains("neither a regular file nor a block device"),
        "{text}"
    );
    let text = refused(&["--image", "/dev/null"]);
    assert!(
        text.contains("neither a regular file nor a block device"),
        "{text}"
    );
    let text = refused(&[]);
    assert!(text.contains("--image"), "{text}");
    for (option, value, part) in [
        ("--queues", "0", "1 to 64"),
        ("--queues", "65", "1 to 64"),
        ("--serial", "a text of 21 letters.", "20 bytes"),
        ("--io", "aio", "uring"),
        ("--image-fd", "77", "77"),
    ] {
        let text = refused(&["--image", path, option, value]);
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn an_image_has_one_writer() {
    for io in ["uring", "sync"] {
        let image = Image::new(4096);
        let path = image.path();
        let path = path.to_str().unwrap();
        let mut process = image.serve(io, &[]);
        let device = connect(&mut process);
        for args in [&["--image", path][..], &["--readonly", "--image", path]] {
            let text = refused(args);
            assert!(
                text.contains(path) && text.contains("in use by another process"),
                "{text}"
            );
        }
        // A queue has run. The lock still goes with the process, not some time later.
        drop(device);
        drop(process);
        let mut first = image.serve(io, &["--readonly"]);
        connect(&mut first);
        // Readers share it.
        let mut second = image.serve(io, &["--readonly"]);
        connect(&mut second);
        let text = refused(&["--image", path]);
        assert!(text.contains("in use by another process"), "{text}");
    }
}

#[test]
fn a_truncated_image_gives_errors_where_it_ends() {
    for io in ["uring", "sync"] {
        let image = Image::new(1 << 20);
        let mut process = image.serve(io, &[]);
        let mut device = connect(&mut process);
        let mut blk = Blk::new(&device.memory, &mut device.queues[0], 8192);
        image.file.set_len(5000).unwrap();
        assert_eq!(blk.read(8, SECTOR).unwrap(), image.bytes()[4096..4608]);
        for (sector, len) in [(9, 512), (8, 4096), (1000, 8192)] {
            match blk.read(sector, len) {
                Err(Error::Status(status::IOERR)) => {}
                other => panic!("{io} {sector} {len}: {other:?}"),
            }
        }
        assert_eq!(blk.read(0, 4096).unwrap(), image.bytes()[..4096]);
        image.file.set_len(1 << 20).unwrap();
        assert_eq!(blk.read(1000, 4096).unwrap(), [0; 4096]);
    }
}

#[test]
fn a_supervised_process_gets_its_image_open() {
    for io in ["uring", "sync"] {
        let image = Image::new(1 << 16);
        let fd = File::options()
            .read(true)
            .write(true)
            .open(image.path())
            .unwrap();
        let args = ["--image-fd", "5", "--io", io];
        let mut process = Supervised::start(BINARY, &args, vec![fd.into()]).unwrap();
        process.ready().unwrap();
        let mut device = process.device(&Options::default()).unwrap();
        let mut blk = Blk::new(&device.memory, &mut device.queues[0], 4096);
        blk.write(3, &[9; SECTOR]).unwrap();
        assert_eq!(image.bytes()[3 * SECTOR..4 * SECTOR], [9; SECTOR]);
        assert!(process.close().unwrap().success());
    }
}

#[test]
fn a_descriptor_for_reading_makes_no_writable_disk() {
    let image = Image::new(1 << 16);
    let fd = File::open(image.path()).unwrap();
    assert!(fd.as_raw_fd() > 2);
    let mut process = Supervised::start(BINARY, &["--image-fd", "5"], vec![fd.into()]).unwrap();
    match process.control.recv().unwrap().message {
        anemone_ipc::device::FromDevice::Failed { message } => {
            assert!(message.contains("--readonly"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(process.wait().unwrap().code(), Some(2));
}
