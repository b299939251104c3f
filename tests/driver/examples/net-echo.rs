//! `net-echo SOCKET COUNT`: drives a vhost-user-net back end that sends every frame back, as DPDK's
//! testpmd does, and checks that frames return as they were.

use std::error::Error;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anemone_driver::net::{Receiver, Sender, feature};
use anemone_driver::{Device, Options, features};

const QUEUE_SIZE: u16 = 256;
/// Longest wait for the first frame: the other side may still be starting.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, count] = &arguments[..] else {
        return Err("usage: net-echo SOCKET COUNT".into());
    };
    let count: u32 = count.parse()?;
    let options = Options {
        queues: 2,
        queue_size: QUEUE_SIZE,
        memory: 64 << 20,
        // What a queue pair needs, and nothing that a control queue or offloads would.
        features: feature::MRG_RXBUF | features::VERSION_1 | features::EVENT_IDX,
        ..Options::default()
    };
    let mut device = Device::connect(UnixStream::connect(socket)?, &options)?;
    let memory = device.memory.clone();
    let mut rx = Receiver::new(&memory, QUEUE_SIZE, QUEUE_SIZE.into(), 2048);
    let mut tx = Sender::new(&memory, QUEUE_SIZE, 16, 2000);
    let [rx_queue, tx_queue] = &mut device.queues[..] else {
        return Err("there are not two queues".into());
    };
    rx.refill(rx_queue);
    let frame = |number: u32| {
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
        bytes.extend(number.to_le_bytes());
        bytes.resize(60 + number as usize % 1400, number as u8);
        bytes
    };
    // Frames that come before the other side forwards are lost.
    let end = Instant::now() + PATIENCE;
    loop {
        if Instant::now() > end {
            return Err("no frame comes back".into());
        }
        tx.send(tx_queue, &[0; 12], &frame(u32::MAX))?;
        if rx_queue.wait(Duration::from_millis(100))? {
            break;
        }
    }
    for number in 0..count {
        let sent = frame(number);
        tx.send(tx_queue, &[0; 12], &sent)?;
        loop {
            let back = rx.receive(rx_queue)?.frame;
            if back == sent {
                break;
            }
            if back != frame(u32::MAX) {
                return Err(format!("frame {number} came back as another one").into());
            }
        }
    }
    println!("{count} frames came back");
    Ok(())
}
