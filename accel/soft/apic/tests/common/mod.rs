//! A platform that records what it is told.

#![expect(clippy::unwrap_used, reason = "a helper of tests")]
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anemone_soft_apic::{Apic, Apics, BASE_ENABLE, BASE_EXTENDED, Features, Now, Platform};

pub const FEATURES: Features = Features {
    physical_bits: 46,
    x2apic: true,
    tsc_deadline: true,
};

#[derive(Default)]
pub struct Record {
    pub wakes: AtomicU32,
    pub ended: Mutex<Vec<u8>>,
}

struct Recorder(Arc<Record>);

impl Platform for Recorder {
    fn wake(&self, _: u32) {
        self.0.wakes.fetch_add(1, Ordering::Relaxed);
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.0.ended.lock().unwrap().push(vector);
    }
}

/// APICs as after reset, with what they tell the platform.
pub fn machine(cpus: u32) -> (Arc<Apics>, Vec<Apic>, Arc<Record>) {
    let record = Arc::<Record>::default();
    let apics = Apics::new(cpus, FEATURES, Box::new(Recorder(record.clone())));
    let each = (0..cpus).map(|cpu| apics.create(cpu).unwrap()).collect();
    (apics, each, record)
}

#[allow(dead_code, reason = "not every test file needs all helpers")]
pub fn enter_x2apic(apic: &mut Apic) {
    apic.set_base(apic.base() | BASE_ENABLE | BASE_EXTENDED)
        .unwrap();
}

#[allow(dead_code, reason = "not every test file needs all helpers")]
pub fn write(apic: &mut Apic, offset: u64, value: u32) {
    apic.mmio_write(offset, &value.to_le_bytes(), Now::default());
}

#[allow(dead_code, reason = "not every test file needs all helpers")]
pub fn read(apic: &mut Apic, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    apic.mmio_read(offset, &mut bytes, Now::default());
    u32::from_le_bytes(bytes)
}
