//! The threads of the request queues. Each queue has one, which takes requests and carries out those
//! that the kernel serves from memory. What may have to wait for a disk goes to a pool of threads, so that a slow
//! request does not delay those behind it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use anemone_device::{Mode, RingError, Vring};
use anemone_log::warn_limited;
use virtio_queue::QueueT;

use crate::fs::FileSystem;
use crate::policies;
use crate::request::Request;

/// Serving a request needs little, and what is never touched costs nothing.
const STACK_SIZE: usize = 128 << 10;
/// Slow requests that are carried out at once.
const POOL_THREADS: usize = 4;

/// A queue that is being served, as its thread and the pool see it.
struct Shared {
    index: usize,
    ring: Mutex<Vring>,
    /// The ring makes no sense; it is left alone until it is stopped.
    broken: AtomicBool,
    stop: AtomicBool,
    /// An eventfd that ends a wait.
    wake: Arc<OwnedFd>,
    /// Requests that the pool has.
    pooled: Mutex<usize>,
    none_pooled: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panics ends the process (panic = abort), or a test.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn give_back(&self, request: &Request, written: u32) {
        let mut ring = lock(&self.ring);
        let pushed = ring.push_used(request.place.1, written);
        let result = pushed.and_then(|()| ring.notify());
        if let Err(error) = result {
            self.set_broken(&ring, &error);
        }
    }

    fn set_broken(&self, ring: &Vring, error: &RingError) {
        self.broken.store(true, Ordering::Release);
        ring.give_up(error);
    }

    /// Takes the next request; false if there is none.
    fn take(&self, request: &mut Request) -> bool {
        let mut ring = lock(&self.ring);
        loop {
            match ring.pop() {
                Ok(Some(chain)) => {
                    let again = ring.popped_again();
                    let head = chain.head_index();
                    match request.start(&ring.memory, chain, self.index, again) {
                        Ok(()) => return true,
                        Err(why) => {
                            let index = self.index;
                            warn_limited!("queue {index}: a request is returned unread: {why}");
                            if let Err(error) = ring.push_used(head, 0).and_then(|()| ring.notify())
                            {
                                self.set_broken(&ring, &error);
                                return false;
                            }
                        }
                    }
                }
                Ok(None) => return false,
                Err(error) => {
                    self.set_broken(&ring, &error);
                    return false;
                }
            }
            if self.stop.load(Ordering::Acquire) {
                return false;
            }
        }
    }

    /// Asks for kicks; false if there is more to do.
    fn may_sleep(&self) -> bool {
        let mut ring = lock(&self.ring);
        match ring.enable_kicks() {
            Ok(more) => !more,
            Err(error) => {
                self.set_broken(&ring, &error);
                true
            }
        }
    }

    fn refuse_kicks(&self) {
        let mut ring = lock(&self.ring);
        if let Err(error) = ring.disable_kicks() {
            self.set_broken(&ring, &error);
        }
    }

    /// Waits for a kick, or to be stopped.
    fn sleep(&self, kick: RawFd) {
        let broken = self.broken.load(Ordering::Acquire);
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut polls = [
            entry(self.wake.as_raw_fd()),
            entry(if broken { -1 } else { kick }),
        ];
        // SAFETY: two valid entries; a negative descriptor is skipped.
        unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
        if polls[1].revents != 0 && !lock(&self.ring).clear_kick() {
            warn_limited!("queue {}: its kick is not an eventfd", self.index);
            self.broken.store(true, Ordering::Release);
        }
    }

    fn serve(self: &Arc<Self>, fs: &FileSystem, pool: &Pool) {
        let kick = lock(&self.ring).kick.as_raw_fd();
        let mut request = Request::default();
        let mut kicks = true;
        while !self.stop.load(Ordering::Acquire) {
            let broken = self.broken.load(Ordering::Acquire);
            if !broken && self.take(&mut request) {
                if std::mem::take(&mut kicks) {
                    self.refuse_kicks();
                }
                match fs.serve(&mut request, false) {
                    Some(written) => self.give_back(&request, written),
                    None => pool.give(self, std::mem::take(&mut request)),
                }
            } else if broken || {
                kicks = true;
                self.may_sleep()
            } {
                self.sleep(kick);
            }
        }
    }
}

/// The thread of a queue, which lives as long as the process and serves the queue's ring whenever
/// it is started.
pub struct Worker {
    rings: Sender<Arc<Shared>>,
    /// Hears when the thread has let go of a ring.
    done: Receiver<()>,
    wake: Arc<OwnedFd>,
    shared: Option<Arc<Shared>>,
}

impl Worker {
    /// Starts the thread of queue `index`, which takes on its policy and waits for a ring.
    pub fn new(
        index: usize,
        fs: &Arc<FileSystem>,
        pool: &Arc<Pool>,
        sandbox: Mode,
    ) -> io::Result<Self> {
        // SAFETY: eventfd takes no pointer.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours.
        let wake = Arc::new(unsafe { OwnedFd::from_raw_fd(wake) });
        let (rings, rings_end) = channel::<Arc<Shared>>();
        let (done_end, done) = channel();
        let (fs, pool) = (Arc::clone(fs), Arc::clone(pool));
        Builder::new()
            .name(format!("queue{index}"))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                restrict(&fs, sandbox);
                while let Ok(queue) = rings_end.recv() {
                    queue.serve(&fs, &pool);
                    drop(queue);
                    // Who stops the ring waits for this.
                    let _ = done_end.send(());
                }
                anemone_sandbox::rest();
            })?;
        Ok(Self {
            rings,
            done,
            wake,
            shared: None,
        })
    }

    /// Serves a ring.
    pub fn start(&mut self, ring: Vring) -> io::Result<()> {
        let shared = Arc::new(Shared {
            index: ring.index,
            ring: Mutex::new(ring),
            broken: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            wake: Arc::clone(&self.wake),
            pooled: Mutex::new(0),
            none_pooled: Condvar::new(),
        });
        self.shared = Some(Arc::clone(&shared));
        let gone = |_| io::Error::other("its thread has ended");
        self.rings.send(shared).map_err(gone)
    }

    /// Finishes what is in flight; the index of the next available entry.
    pub fn stop(&mut self) -> u16 {
        let Some(shared) = self.shared.take() else {
            return 0;
        };
        shared.stop.store(true, Ordering::Release);
        let mut count = 1u64;
        let wake = self.wake.as_raw_fd();
        // SAFETY: 8 bytes are read from `count`.
        unsafe { libc::write(wake, (&raw const count).cast(), 8) };
        if self.done.recv().is_err() {
            log::error!("the thread of queue {} has ended badly", shared.index);
        }
        // Cleared here: the thread may have seen the flag before the eventfd was written.
        // SAFETY: at most 8 bytes are stored in `count`.
        unsafe { libc::read(wake, (&raw mut count).cast(), 8) };
        let mut pooled = lock(&shared.pooled);
        while *pooled > 0 {
            let wait = shared.none_pooled.wait(pooled);
            pooled = wait.unwrap_or_else(PoisonError::into_inner);
        }
        drop(pooled);
        lock(&shared.ring).queue.next_avail()
    }
}

/// Threads for slow requests.
pub struct Pool {
    jobs: Mutex<VecDeque<(Arc<Shared>, Request)>>,
    work: Condvar,
}

impl Pool {
    /// Starts the threads, which live as long as the process.
    pub fn start(fs: &Arc<FileSystem>, sandbox: Mode) -> io::Result<Arc<Self>> {
        let pool = Arc::new(Self {
            jobs: Mutex::default(),
            work: Condvar::new(),
        });
        for number in 0..POOL_THREADS {
            let (pool, fs) = (Arc::clone(&pool), Arc::clone(fs));
            Builder::new()
                .name(format!("slow{number}"))
                .stack_size(STACK_SIZE)
                .spawn(move || {
                    restrict(&fs, sandbox);
                    pool.serve(&fs);
                })?;
        }
        Ok(pool)
    }

    fn give(&self, queue: &Arc<Shared>, request: Request) {
        *lock(&queue.pooled) += 1;
        lock(&self.jobs).push_back((Arc::clone(queue), request));
        self.work.notify_one();
    }

    fn serve(&self, fs: &FileSystem) {
        let mut jobs = lock(&self.jobs);
        loop {
            let Some((queue, mut request)) = jobs.pop_front() else {
                jobs = self.work.wait(jobs).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(jobs);
            let written = fs.serve(&mut request, true).unwrap_or(0);
            queue.give_back(&request, written);
            // Guest memory must not stay mapped by a request that has ended.
            drop(request);
            let mut pooled = lock(&queue.pooled);
            *pooled -= 1;
            if *pooled == 0 {
                queue.none_pooled.notify_all();
            }
            drop(pooled);
            drop(queue);
            jobs = lock(&self.jobs);
        }
    }
}

/// Takes on the policy of the threads that carry out requests: what the configuration allows them.
fn restrict(fs: &FileSystem, sandbox: Mode) {
    let policy = match fs.settings() {
        settings if settings.read_only => &policies::READ,
        settings if settings.act => &policies::OWNER,
        _ => &policies::QUEUE,
    };
    if let Err(error) = anemone_sandbox::restrict(policy, sandbox) {
        log::error!("a thread cannot be restricted: {error}");
        std::process::exit(1);
    }
}
