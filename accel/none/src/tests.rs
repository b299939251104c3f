//! The protocol over a real socket.

use std::io::BufRead;

use super::*;

/// Ports and addresses read as their low bits; writes are forgotten.
struct Echo;

impl Bus for Echo {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(address as u8);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

#[test]
fn requests_and_answers() {
    let (driver, machine) = UnixStream::pair().unwrap();
    let vm = NoneVm::new(Some(machine));
    let mut ram = vec![0u8; 0x1000];
    let slot = MemorySlot {
        slot: 0,
        guest: 0x1000,
        size: 0x1000,
        host: ram.as_mut_ptr(),
        read_only: false,
        log_dirty: false,
    };
    // SAFETY: `ram` lives until the end of the test and is not touched before.
    unsafe { vm.map_memory(slot).unwrap() };
    let (bell, line) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    vm.add_ioeventfd(bell.as_fd(), IoAddress::Mmio(0x9000), None)
        .unwrap();
    vm.set_msi_route(
        40,
        Some(MsiMessage {
            address: 0xFEE0_0000,
            data: 0x51,
        }),
    )
    .unwrap();
    vm.add_irqfd(line.as_fd(), 40).unwrap();
    line.signal();
    line.signal();
    vm.signal_msi(MsiMessage {
        address: 0xFEE0_1000,
        data: 0x52,
    })
    .unwrap();
    let mut vcpu = vm.create_vcpu(0, 1).unwrap();
    let run = std::thread::spawn(move || vcpu.run(&Echo).unwrap());

    let mut reader = BufReader::new(driver.try_clone().unwrap());
    let mut ask = |request: &str| {
        writeln!(&driver, "{request}").unwrap();
        let mut answer = String::new();
        reader.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    };
    assert_eq!(ask("in 0x3f8 2"), "ok 0xf8f8");
    assert_eq!(ask("out 1536 1 0x34"), "ok");
    assert_eq!(ask("write 0x1000 4 0x12345678"), "ok");
    assert_eq!(ask("read 0x1001 2"), "ok 0x3456");
    assert_eq!(ask("load 0x1000 5"), "ok 7856341200");
    assert_eq!(ask("store 0x1ffe abcd"), "ok");
    assert_eq!(ask("read 0x1ffe 2"), "ok 0xcdab");
    assert_eq!(ask("read 0x2011 1"), "ok 0x11");
    assert!(!bell.is_set());
    assert_eq!(ask("write 0x9000 2 0"), "ok");
    assert_eq!(bell.take(), 1);
    assert_eq!(ask("interrupts"), "ok 0xfee00000:0x51:2 0xfee01000:0x52:1");
    assert_eq!(ask("interrupts"), "ok");
    for wrong in [
        "",
        "halt",
        "in 1",
        "in 0x10000 1",
        "in 1 8",
        "read 0 3",
        "read zero 1",
        "load 0x1fff 2",
        "load 0x1000 0x10001",
        "store 0x1000 abc",
        "store 0x1000 xy",
        "write 1 1",
    ] {
        assert!(ask(wrong).starts_with("error "), "{wrong}");
    }
    drop((reader, driver));
    assert_eq!(run.join().unwrap(), Stop::Ended);
}

#[test]
fn kick_ends_the_wait() {
    let vm = NoneVm::new(None);
    let mut vcpu = vm.create_vcpu(1, 2).unwrap();
    vcpu.kicker().kick();
    assert_eq!(vcpu.run(&Echo).unwrap(), Stop::Kicked);
}
