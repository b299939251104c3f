//! One virtqueue: takes requests from the ring, keeps the engine busy, returns them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anemone_device::{RingError, Vring};
use anemone_log::warn_limited;
use virtio_queue::QueueT;

use crate::engine::{Engine, Event};
use crate::request::{Disk, Progress, Request, Status};

/// Serves a ring from its start until it is stopped.
struct Server<'a> {
    ring: &'a mut Vring,
    disk: &'a Disk,
    engine: &'a mut dyn Engine,
    /// One for every request that the ring can hold; the token of an operation is its index.
    requests: Vec<Request>,
    free: Vec<u16>,
    /// Requests were returned to the driver since it was last signalled.
    returned: bool,
    /// Operations were handed to the engine since it last waited.
    submitted: bool,
    /// The driver has been asked for kicks.
    kicks: bool,
    /// The ring makes no sense; it is left alone until it is stopped.
    broken: bool,
}

/// Serves the ring until `stop` is set, then finishes what is in flight. Returns the index of the
/// next available entry. An error is one of the engine, after which nothing can be done.
pub fn serve(
    ring: &mut Vring,
    disk: &Disk,
    engine: &mut dyn Engine,
    stop: &AtomicBool,
) -> io::Result<u16> {
    let size = ring.queue.size();
    let mut server = Server {
        disk,
        engine,
        requests: (0..size).map(|_| Request::new()).collect(),
        free: (0..size).rev().collect(),
        returned: false,
        submitted: false,
        kicks: true,
        broken: false,
        ring,
    };
    let mut events = Vec::new();
    loop {
        let stopping = stop.load(Ordering::Acquire);
        let taken = !stopping && !server.broken && server.take_requests()?;
        if taken {
            server.refuse_kicks();
        }
        server.signal();
        if stopping && server.in_flight() == 0 {
            return Ok(server.ring.queue.next_avail());
        }
        // While there is work the guest need not kick. Only a queue about to sleep asks for it.
        let block = !taken
            && !std::mem::take(&mut server.submitted)
            && (stopping || server.broken || server.free.is_empty() || server.may_sleep());
        server.submitted = false;
        server.engine.wait(block, &mut events)?;
        for event in events.drain(..) {
            server.handle(event)?;
        }
        server.signal();
    }
}

impl Server<'_> {
    fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    fn set_broken(&mut self, error: &RingError) {
        self.broken = true;
        self.ring.give_up(error);
    }

    /// Starts the requests that the guest has made available; false if there were none.
    fn take_requests(&mut self) -> io::Result<bool> {
        let memory = Arc::clone(&self.ring.memory);
        let mut taken = false;
        // Bounded: a guest that adds requests without end must not keep a stop request waiting.
        for _ in 0..self.requests.len() {
            let Some(&token) = self.free.last() else {
                break;
            };
            let chain = match self.ring.pop() {
                Ok(Some(chain)) => chain,
                Ok(None) => break,
                Err(error) => {
                    self.set_broken(&error);
                    break;
                }
            };
            taken = true;
            let head = chain.head_index();
            let request = &mut self.requests[usize::from(token)];
            match request.start(&memory, chain, self.ring.features, self.disk) {
                Ok(progress) => {
                    self.free.pop();
                    self.proceed(token, progress)?;
                }
                Err(malformed) => {
                    warn_limited!(
                        "queue {}: a request is returned unread: {malformed}",
                        self.ring.index
                    );
                    self.give_back(head, 0);
                }
            }
        }
        Ok(taken)
    }

    fn handle(&mut self, event: Event) -> io::Result<()> {
        match event {
            Event::Done { token, result } => {
                let progress = self.requests[usize::from(token)].advance(result);
                if progress == Progress::Finished(Status::IoError) {
                    self.report(result);
                }
                self.proceed(token, progress)
            }
            Event::KickLost => {
                warn_limited!("queue {}: its kick is not an eventfd", self.ring.index);
                self.broken = true;
                Ok(())
            }
        }
    }

    fn report(&self, result: i32) {
        if result < 0 {
            warn_limited!(
                "queue {}: {}",
                self.ring.index,
                io::Error::from_raw_os_error(-result)
            );
        } else {
            warn_limited!("queue {}: the image has been truncated", self.ring.index);
        }
    }

    fn proceed(&mut self, token: u16, progress: Progress) -> io::Result<()> {
        let request = &mut self.requests[usize::from(token)];
        match progress {
            Progress::Operation => {
                self.submitted = true;
                // SAFETY: the request and `ring.memory` live until the operation has ended: the
                // server returns only when nothing is in flight or when the process must end.
                unsafe { self.engine.submit(token, &request.op()) }
            }
            Progress::Finished(status) => {
                let head = request.head();
                let len = request.finish(status);
                self.free.push(token);
                self.give_back(head, len);
                Ok(())
            }
        }
    }

    fn give_back(&mut self, head: u16, len: u32) {
        match self.ring.push_used(head, len) {
            Ok(()) => self.returned = true,
            Err(error) => self.set_broken(&error),
        }
    }

    /// Signals the driver if something was returned and it wants to know.
    fn signal(&mut self) {
        if std::mem::take(&mut self.returned)
            && let Err(error) = self.ring.notify()
        {
            self.set_broken(&error);
        }
    }

    /// Tells the driver that its requests will be seen without kicks for now.
    fn refuse_kicks(&mut self) {
        if std::mem::take(&mut self.kicks)
            && let Err(error) = self.ring.disable_kicks()
        {
            self.set_broken(&error);
        }
    }

    /// Asks for kicks; false if more has become available meanwhile.
    fn may_sleep(&mut self) -> bool {
        self.kicks = true;
        match self.ring.enable_kicks() {
            Ok(more) => !more,
            Err(error) => {
                self.set_broken(&error);
                true
            }
        }
    }
}
