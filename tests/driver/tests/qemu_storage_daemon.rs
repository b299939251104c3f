//! The loop driver against a back end we did not write.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use anemone_driver::blk::{Blk, Requests, request, status};
use anemone_driver::{Device, Error, Options, Process, features};

fn daemon(image: &std::path::Path) -> Process {
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!(
            "driver=file,node-name=disk,discard=unmap,filename={}",
            image.display()
        ))
        .stdin(Stdio::null());
    Process::with(command, |command, socket| {
        command.arg("--export").arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
            socket.display()
        ));
    })
    .unwrap()
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length)
        .map(|i| (i as u8).wrapping_mul(7) ^ seed)
        .collect()
}

fn round_trip(device: &mut Device) {
    let memory = device.memory.clone();
    for queue in &mut device.queues {
        let mut blk = Blk::new(&memory, queue, 8192);
        let data = pattern(3, 8192);
        blk.write(8, &data).unwrap();
        blk.flush().unwrap();
        assert_eq!(blk.read(8, 8192).unwrap(), data);
        blk.write_zeroes(9, 2, false).unwrap();
        blk.discard(8, 1).unwrap();
        assert_eq!(blk.read(9, 1024).unwrap(), vec![0; 1024]);
        assert_eq!(blk.read(11, 512).unwrap(), data[3 * 512..4 * 512]);
        assert!(matches!(
            blk.read(1 << 40, 512),
            Err(Error::Status(status::IOERR))
        ));
    }
}

#[test]
fn requests_reach_the_disk_with_and_without_event_idx() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut daemon = daemon(&image);
    for mask in [!0, !features::EVENT_IDX] {
        let options = Options {
            queues: 2,
            features: mask,
            ..Options::default()
        };
        let mut device = daemon.device(&options).unwrap();
        round_trip(&mut device);
        assert_eq!(
            device.stop_queue(0).unwrap(),
            device.queues[0].available_index()
        );
    }
    let written = std::fs::read(&image).unwrap();
    assert_eq!(
        written[11 * 512..12 * 512],
        pattern(3, 8192)[3 * 512..4 * 512]
    );
}

#[test]
fn many_requests_in_flight_all_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    // Every sector says which it is.
    let sectors = (0..2048u64).flat_map(|sector| {
        let mut bytes = [0; 512];
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
        bytes
    });
    std::fs::write(&image, sectors.collect::<Vec<u8>>()).unwrap();
    let mut daemon = daemon(&image);
    let mut device = daemon.device(&Options::default()).unwrap();
    let memory = device.memory.clone();
    let queue = &mut device.queues[0];
    for indirect in [false, true] {
        let mut requests = Requests::new(&memory, queue.size(), 32, 4096, indirect);
        let (mut sent, mut done) = (0u64, 0);
        let mut sector_of = [0u64; 32];
        // Enough to pass the end of the 16-bit indices.
        let total = 70_000;
        while done < total {
            while sent < total {
                let sector = sent * 37 % 256 * 8;
                let slot = requests.submit(&memory, queue, request::IN, sector, 4096);
                let Some(slot) = slot else { break };
                sector_of[slot] = sector;
                sent += 1;
            }
            queue.publish();
            queue.kick();
            assert!(queue.wait(Duration::from_secs(20)).unwrap());
            while let Some(finished) = requests.finish(&memory, queue) {
                assert_eq!(finished.status, status::OK);
                assert_eq!(finished.written, 4097);
                let data = memory.read_vec(requests.data(finished.slot), 8);
                assert_eq!(data, sector_of[finished.slot].to_le_bytes());
                done += 1;
            }
        }
        assert_eq!(requests.in_flight(), 0);
    }
}
