//! The board's registers, driven as a guest's CPU would.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use anemone_accel_api::{Error, IoAddress, MemorySlot, MsiMessage, Result, Route, Vcpu};

use super::*;

/// An accelerator that only remembers messages.
#[derive(Default)]
struct Messages(Mutex<Vec<MsiMessage>>);

const NOT_NEEDED: Error = Error::Unsupported {
    accel: "test",
    what: "this",
};

impl Vm for Messages {
    fn name(&self) -> &'static str {
        "test"
    }
    unsafe fn map_memory(&self, _: MemorySlot) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn unmap_memory(&self, _: u32) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn dirty_log(&self, _: u32) -> Result<Vec<u64>> {
        Err(NOT_NEEDED)
    }
    fn create_vcpu(&self, _: u32, _: u32) -> Result<Box<dyn Vcpu>> {
        Err(NOT_NEEDED)
    }
    fn add_ioeventfd(&self, _: BorrowedFd<'_>, _: IoAddress, _: Option<u16>) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn remove_ioeventfd(&self, _: BorrowedFd<'_>, _: IoAddress, _: Option<u16>) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn set_msi_route(&self, _: Route, _: Option<MsiMessage>) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn add_irqfd(&self, _: BorrowedFd<'_>, _: Route) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn remove_irqfd(&self, _: BorrowedFd<'_>, _: Route) -> Result<()> {
        Err(NOT_NEEDED)
    }
    fn signal_msi(&self, message: MsiMessage) -> Result<()> {
        self.0.lock().unwrap().push(message);
        Ok(())
    }
    fn clock(&self) -> Result<u64> {
        Err(NOT_NEEDED)
    }
    fn set_clock(&self, _: u64) -> Result<()> {
        Err(NOT_NEEDED)
    }
}

#[derive(Default)]
struct Outcomes(Mutex<Vec<Outcome>>);

impl Signals for Outcomes {
    fn signal(&self, outcome: Outcome) {
        self.0.lock().unwrap().push(outcome);
    }
}

fn board() -> (Board, Arc<Messages>, Arc<Outcomes>) {
    let (messages, outcomes) = (Arc::<Messages>::default(), Arc::<Outcomes>::default());
    (
        Board::new(messages.clone(), outcomes.clone()),
        messages,
        outcomes,
    )
}

fn read32(board: &Board, address: u64) -> u32 {
    let mut data = [0; 4];
    board.mmio_read(address, &mut data);
    u32::from_le_bytes(data)
}

fn ioapic_write(board: &Board, register: u32, value: u32) {
    board.mmio_write(map::IOAPIC_BASE, &register.to_le_bytes());
    board.mmio_write(map::IOAPIC_BASE + 0x10, &value.to_le_bytes());
}

#[test]
fn power_registers_act_only_on_their_values() {
    let (board, _, outcomes) = board();
    for (port, data) in [
        (map::SLEEP_CONTROL, &[0x14][..]),
        (map::SLEEP_CONTROL, &[0x20]),
        (map::SLEEP_CONTROL, &[0x34, 0]),
        (map::SLEEP_STATUS, &[0x80]),
        (map::RESET, &[0]),
        (map::RESET, &[2]),
        (0x64, &[0xFE]),
        (0xCF9, &[6]),
    ] {
        board.port_write(port, data);
    }
    assert_eq!(*outcomes.0.lock().unwrap(), []);
    board.port_write(map::SLEEP_CONTROL, &[0x34]);
    board.port_write(map::RESET, &[1]);
    assert_eq!(
        *outcomes.0.lock().unwrap(),
        [Outcome::Shutdown, Outcome::Reset]
    );
    let mut status = [0xFF];
    board.port_read(map::SLEEP_STATUS, &mut status);
    assert_eq!(status, [0]);
}

#[test]
fn power_button_reaches_the_programmed_cpu() {
    let (board, messages, _) = board();
    board.raise(PowerEvent::Button);
    assert!(
        messages.0.lock().unwrap().is_empty(),
        "the pin is masked after reset"
    );
    ioapic_write(&board, 0x10 + 2 * u32::from(map::GED_GSI) + 1, 3 << 24);
    ioapic_write(&board, 0x10 + 2 * u32::from(map::GED_GSI), 0x0831);
    let expected = MsiMessage {
        address: 0xFEE0_3004,
        data: 0x31,
    };
    assert_eq!(*messages.0.lock().unwrap(), [expected], "the edge was kept");
    board.raise(PowerEvent::Button);
    assert_eq!(messages.0.lock().unwrap().len(), 2);
    let mut word = [0xFF; 4];
    board.port_read(map::GED_EVENTS, &mut word);
    assert_eq!(u32::from_le_bytes(word), 8);
    board.port_read(map::GED_EVENTS, &mut word);
    assert_eq!(u32::from_le_bytes(word), 0, "reading cleared it");
}

#[test]
fn ioapic_identifies_itself_and_ignores_what_is_read_only() {
    let (board, _, _) = board();
    board.mmio_write(map::IOAPIC_BASE, &[1]);
    assert_eq!(read32(&board, map::IOAPIC_BASE + 0x10), 0x0017_0020);
    ioapic_write(&board, 0x10, 0xFFFF_FFFF);
    assert_eq!(read32(&board, map::IOAPIC_BASE + 0x10), 0x0001_AFFF);
    ioapic_write(&board, 0x40, 0);
    assert_eq!(
        read32(&board, map::IOAPIC_BASE + 0x10),
        u32::MAX,
        "beyond the table"
    );
    assert_eq!(read32(&board, map::IOAPIC_BASE + 0x20), u32::MAX);
}

#[test]
fn nothing_answers_elsewhere() {
    let (board, _, outcomes) = board();
    // The keyboard controller, real-time clock, timer, interrupt controllers and all the rest of
    // a PC, and every port that is not listed.
    let decoded = board.ports();
    for port in 0..=u16::MAX {
        if decoded
            .iter()
            .any(|(first, count, _)| (*first..first + count).contains(&port))
        {
            continue;
        }
        for width in [1, 2, 4] {
            let mut data = vec![0; width];
            board.port_read(port, &mut data);
            assert_eq!(data, vec![0xFF; width], "port {port:#x}");
            board.port_write(port, &data);
        }
    }
    for address in [
        0xA_0000,
        0xFED0_0000,
        0xFED4_0000,
        map::PCI32_BASE,
        u64::MAX - 3,
    ] {
        assert_eq!(read32(&board, address), u32::MAX, "{address:#x}");
        board.mmio_write(address, &[0; 8]);
    }
    assert_eq!(*outcomes.0.lock().unwrap(), []);
}

#[cfg(feature = "serial")]
#[test]
fn uart_moves_bytes_both_ways_and_interrupts() {
    let (mut board, messages, _) = board();
    let serial = board.add_serial(Box::new(|| {}));
    ioapic_write(&board, 0x10 + 2 * u32::from(map::SERIAL_GSI), 0x0024);
    for byte in b"hi" {
        board.port_write(map::SERIAL, &[*byte]);
    }
    assert!(!serial.transmit(|out| {
        assert_eq!(out, b"hi");
        1
    }));
    assert!(serial.transmit(|out| out.len()));
    board.port_write(map::SERIAL + 1, &[1]); // interrupt on received data
    serial.receive(b"ok");
    assert_eq!(
        messages.0.lock().unwrap().last().map(|m| m.data),
        Some(0x24)
    );
    let mut byte = [0];
    board.port_read(map::SERIAL, &mut byte);
    assert_eq!(byte, *b"o");
    for _ in 0..200_000 {
        board.port_write(map::SERIAL, b"x");
    }
    serial.transmit(|out| {
        assert!(out.len() <= 64 << 10);
        0
    });
}
