//! Several sending threads, several receiving ones: nothing may be lost, none may sleep on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, Thread};

use anemone_accel_api::MsiMessage;
use anemone_soft_apic::{Apics, Features, Now, Platform};

const RECEIVERS: u32 = 3;
const SENDERS: u32 = 4;
const ROUNDS: u32 = 3000;
const FIRST: u32 = 0x20;

/// Wakes parked threads.
struct Threads(Vec<Thread>);

impl Platform for Threads {
    fn wake(&self, cpu: u32) {
        self.0[cpu as usize].unpark();
    }
    fn end_of_interrupt(&self, _: u8) {}
}

/// Each sender has a vector of its own per receiver and sends the next interrupt only after the
/// last one was handled: a lost one, or a lost wake-up, stops the test for good.
#[test]
fn no_interrupt_and_no_wake_up_is_lost() {
    let features = Features {
        physical_bits: 46,
        x2apic: true,
        tsc_deadline: true,
    };
    let handled: Arc<Vec<AtomicU32>> = Arc::new(
        (0..RECEIVERS * SENDERS)
            .map(|_| AtomicU32::new(0))
            .collect(),
    );
    let stop = Arc::new(AtomicBool::new(false));
    let (give, take) = std::sync::mpsc::channel();
    let mut handles = Vec::new();
    let mut receivers = Vec::new();
    for cpu in 0..RECEIVERS {
        let (send_apics, get_apics) = std::sync::mpsc::channel::<Arc<Apics>>();
        let (handled, stop, give) = (handled.clone(), stop.clone(), give.clone());
        let handle = thread::spawn(move || {
            let mut apic = get_apics.recv().unwrap().create(cpu).unwrap();
            apic.mmio_write(0xF0, &0x1FFu32.to_le_bytes(), Now::default());
            give.send(()).unwrap();
            while !stop.load(Ordering::SeqCst) {
                if !apic.attention() {
                    thread::park();
                }
                let _ = apic.poll(Now::default());
                while let Some(vector) = apic.acknowledge() {
                    let sender = u32::from(vector) - FIRST;
                    handled[(cpu * SENDERS + sender) as usize].fetch_add(1, Ordering::SeqCst);
                    apic.end_of_interrupt();
                }
            }
        });
        receivers.push(handle.thread().clone());
        handles.push((handle, send_apics));
    }
    let apics = Apics::new(RECEIVERS, features, Box::new(Threads(receivers)));
    for (_, send) in &handles {
        send.send(apics.clone()).unwrap();
        take.recv().unwrap();
    }
    thread::scope(|scope| {
        for sender in 0..SENDERS {
            let (apics, handled) = (&apics, &handled);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    // Some to all at once, some to one after the other, some level-triggered.
                    let data = (FIRST + sender) | ((round & 1) << 15);
                    let send = |destination: u64| {
                        apics.signal_msi(MsiMessage {
                            address: 0xFEE0_0000 | destination << 12,
                            data,
                        })
                    };
                    if round & 2 == 0 {
                        assert_eq!(send(0xFF), RECEIVERS);
                    } else {
                        (0..RECEIVERS).for_each(|cpu| assert_eq!(send(cpu.into()), 1));
                    }
                    for cpu in 0..RECEIVERS {
                        let count = &handled[(cpu * SENDERS + sender) as usize];
                        while count.load(Ordering::SeqCst) <= round {
                            thread::yield_now();
                        }
                    }
                }
            });
        }
    });
    stop.store(true, Ordering::SeqCst);
    for (cpu, (handle, _)) in (0..).zip(handles) {
        apics.nudge(cpu);
        handle.join().unwrap();
    }
    for count in handled.iter() {
        assert_eq!(count.load(Ordering::SeqCst), ROUNDS);
    }
}
