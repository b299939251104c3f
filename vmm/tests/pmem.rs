//! Persistent memory as the guest finds it, with the accelerator `none`.

#![allow(clippy::unwrap_used, reason = "failures of helpers are the tests'")]

mod common;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anemone_ipc::FdIndex;
use anemone_ipc::vmm::{Device, FromVmm, Pmem, ToVmm};
use anemone_virt::map;

use common::{ECAM, MEMORY, MORE_FDS, Vmm, memfd};

const SIZE: u64 = 4 << 20;

fn device(slot: u8, file: u16, size: u64, read_only: bool) -> Device {
    Device {
        id: format!("pmem{slot}"),
        device_type: 27,
        slot,
        queues: 1,
        queue_size: 256,
        config_size: 0,
        config: None,
        socket: None,
        bounce: None,
        pmem: Some(Pmem {
            file: FdIndex(MORE_FDS + file),
            size,
            read_only,
        }),
    }
}

fn machine(files: &[&File], devices: Vec<Device>) -> (Vmm, FromVmm) {
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    Vmm::configure_with(&fds, |config| config.devices = devices)
}

#[test]
fn the_guest_finds_the_file_where_the_configuration_space_says() {
    let (first, second) = (memfd(SIZE), memfd(2 * SIZE));
    first.write_all_at(b"contents", SIZE - 8).unwrap();
    second.write_all_at(b"read me!", 0).unwrap();
    let devices = vec![
        device(25, 0, SIZE, false),
        device(24, 1, SIZE, true), // only its first half
    ];
    let (mut vmm, answer) = machine(&[&first, &second], devices);
    let FromVmm::Ready(summary) = answer else {
        panic!("{answer:?}")
    };
    vmm.channel.send(&ToVmm::Start, &[]).unwrap();
    let base = map::pmem_base(MEMORY);
    for (slot, start) in [(24, base), (25, base + map::PMEM_ALIGN)] {
        let what = format!("persistent memory `pmem{slot}`");
        assert!(summary.memory_map.contains(&(start, SIZE, what)));
        let config = ECAM + (slot << 15);
        assert_eq!(vmm.number(&format!("read {config:#x} 4")), 0x105B_1AF4);
        vmm.ask(&format!("write {:#x} 2 6", config + 4));
        let space = map::slot_bar_base(slot as u8) + 0x2000;
        let mut field = |at: u64| {
            let low = vmm.number(&format!("read {:#x} 4", space + at));
            low | vmm.number(&format!("read {:#x} 4", space + at + 4)) << 32
        };
        assert_eq!((field(0), field(8)), (start, SIZE), "slot {slot}");
    }
    let writable = base + map::PMEM_ALIGN;
    let read = |vmm: &mut Vmm, at: u64| {
        let value = vmm.number(&format!("read {at:#x} 8"));
        value.to_le_bytes()
    };
    assert_eq!(&read(&mut vmm, writable + SIZE - 8), b"contents");
    assert_eq!(&read(&mut vmm, base), b"read me!");
    let value = u64::from_le_bytes(*b"changed!");
    vmm.ask(&format!("write {:#x} 8 {value:#x}", writable + SIZE - 8));
    let mut bytes = [0; 8];
    first.read_exact_at(&mut bytes, SIZE - 8).unwrap();
    assert_eq!(&bytes, b"changed!");
    // Dropped, as a ROM does it.
    vmm.ask(&format!("write {base:#x} 8 {value:#x}"));
    assert_eq!(&read(&mut vmm, base), b"read me!");
    // Nothing lies behind it.
    assert_eq!(read(&mut vmm, base + SIZE), [0xFF; 8]);
}

#[test]
fn memory_that_cannot_be_is_refused() {
    let file = memfd(SIZE);
    let huge = 1 << 48;
    for (device, part) in [
        (device(24, 0, SIZE + (1 << 20), false), "2 MiB"),
        (device(24, 0, 0, false), "2 MiB"),
        (device(24, 0, 2 * SIZE, false), "shorter"),
        (device(24, 0, huge, false), "address bits"),
        (
            Device {
                config_size: 16,
                ..device(24, 0, SIZE, false)
            },
            "configuration",
        ),
    ] {
        let (_vmm, answer) = machine(&[&file], vec![device]);
        let FromVmm::Refused { message } = answer else {
            panic!("{answer:?}")
        };
        assert!(message.contains(part), "{part}: {message}");
    }
}
