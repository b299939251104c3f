//! A block device instead of a file. Needs root and the loop driver.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::path::Path;
use std::process::Command;

use anemone_driver::Process;
use anemone_driver::blk::Blk;
use common::{BINARY, Image, SECTOR, connect};

/// A loop device over an image.
struct Loop(String);

impl Loop {
    fn new(image: &Path, sector_size: &str) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", sector_size])
            .arg(image)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "losetup: {error}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
#[ignore = "needs root and the loop driver"]
fn every_request() {
    for (io, sector_size, block_size) in [("uring", "512", 512u32), ("sync", "4096", 4096)] {
        let image = Image::new(8 << 20);
        let device_node = Loop::new(&image.path(), sector_size);
        let args = ["--image", &device_node.0, "--io", io];
        let mut process = Process::start(BINARY, &args).unwrap();
        let mut device = connect(&mut process);
        let config = device.frontend.config(0, 60).unwrap();
        assert_eq!(config[..8], (16384u64).to_le_bytes());
        assert_eq!(config[20..24], block_size.to_le_bytes());
        let mut expected = image.bytes();
        let mut blk = Blk::new(&device.memory, &mut device.queues[0], 1 << 16);
        assert_eq!(blk.read(8, 8 * SECTOR).unwrap(), expected[4096..8192]);
        blk.write(16, &[3; 4096]).unwrap();
        expected[8192..12288].fill(3);
        blk.write_zeroes(24, 64, false).unwrap();
        expected[24 * SECTOR..88 * SECTOR].fill(0);
        blk.write_zeroes(96, 64, true).unwrap();
        expected[96 * SECTOR..160 * SECTOR].fill(0);
        // Not whole blocks of the larger size: zeroed by writing.
        blk.write_zeroes(201, 3, true).unwrap();
        expected[201 * SECTOR..204 * SECTOR].fill(0);
        blk.discard(4096, 4096).unwrap();
        expected[4096 * SECTOR..8192 * SECTOR].fill(0);
        blk.flush().unwrap();
        assert_eq!(
            blk.read(200, 8 * SECTOR).unwrap(),
            expected[200 * SECTOR..208 * SECTOR]
        );
        assert!(image.bytes() == expected, "{io}");
        drop(device);
        assert!(process.terminate().unwrap().success());
    }
}
