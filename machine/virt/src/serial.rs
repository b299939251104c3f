//! The optional 16550 UART, around `vm-superio`'s model. Its registers are here, its bytes go to
//! and come from a console process through a bounded queue.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anemone_log::warn_limited;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Model};

use crate::ioapic::IoApic;
use crate::map::SERIAL_GSI;

/// Output bytes kept for a console that does not read. A guest that writes more loses them: a
/// UART has no flow control that would make it wait, and a vCPU must not.
const QUEUE: usize = 64 << 10;

struct Pin(Arc<IoApic>);

impl Trigger for Pin {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse(SERIAL_GSI);
        Ok(())
    }
}

#[derive(Default)]
struct Output(VecDeque<u8>);

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.0.len() + data.len() > QUEUE {
            warn_limited!("serial console: nobody reads, output of the guest is dropped");
        } else {
            self.0.extend(data);
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The UART.
pub struct Serial {
    model: Mutex<Model<Pin, NoEvents, Output>>,
    /// Called when there is output, or room for input.
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Serial {
    pub(crate) fn new(ioapic: Arc<IoApic>, wake: Box<dyn Fn() + Send + Sync>) -> Self {
        Self {
            model: Model::new(Pin(ioapic), Output::default()).into(),
            wake,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Model<Pin, NoEvents, Output>> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xFF);
        if let [byte] = data {
            let mut model = self.lock();
            let was_full = model.fifo_capacity() == 0;
            *byte = model.read(offset as u8);
            if was_full && model.fifo_capacity() > 0 {
                (self.wake)();
            }
        }
    }

    pub(crate) fn write(&self, offset: u16, data: &[u8]) {
        if let [byte] = data {
            let mut model = self.lock();
            let before = model.writer().0.len();
            if let Err(e) = model.write(offset as u8, *byte) {
                warn_limited!("serial console: {e}");
            }
            // Later bytes find the wake-up still pending.
            if before == 0 && !model.writer().0.is_empty() {
                (self.wake)();
            }
        }
    }

    /// Bytes of input that the receive queue has room for.
    pub fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// Gives input to the guest; `data` is at most [`room`](Self::room) bytes.
    pub fn receive(&self, data: &[u8]) {
        if let Err(e) = self.lock().enqueue_raw_bytes(data) {
            // Loopback mode, which the guest has chosen: the line is not connected.
            warn_limited!("serial console: input dropped: {e}");
        }
    }

    /// Lets `send` take output from the front of the queue; it returns how much it took.
    /// `true` if the queue is empty afterwards.
    pub fn transmit(&self, send: impl FnOnce(&[u8]) -> usize) -> bool {
        let mut model = self.lock();
        let queue = &mut model.writer_mut().0;
        let taken = send(queue.make_contiguous());
        queue.drain(..taken.min(queue.len()));
        queue.is_empty()
    }
}
