//! The io_uring engine. One system call submits a batch of operations and waits for ends of
//! operations, kicks and stop requests.
//!
//! The ring is made before the process enters its jail, which then needs no `io_uring_setup`. It
//! is restricted to the operations used here, all on registered files, so that whoever takes over
//! the process can neither open nor connect anything with it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter, cqueue, opcode};

use super::{Engine, Event, Op, perform};

/// Submission slots: a full batch of a queue of 256 takes two system calls.
const SUBMISSIONS: u32 = 128;
/// Completion slots: a queue of 256 with everything in flight, and the ring's own operations.
const COMPLETIONS: u32 = 512;

// Indices of the registered files.
const IMAGE: Fixed = Fixed(0);
const STOP: Fixed = Fixed(1);
const KICK: Fixed = Fixed(2);

// User data: a token of the caller, or one of these.
const STOP_DATA: u64 = 1 << 32;
const KICK_DATA: u64 = 2 << 32;
const CANCEL_DATA: u64 = 3 << 32;

// io_uring_register operations (linux/io_uring.h) left to an enabled ring.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_RING_FDS: u8 = 20;

/// A ring that has been made and restricted but does not run yet.
pub struct DisabledRing(IoUring);

impl DisabledRing {
    /// Makes a ring for the image. Fails where the kernel has no io_uring, forbids it, or is
    /// older than 6.1.
    pub fn new(image: &impl AsRawFd, stop: BorrowedFd<'_>) -> io::Result<Self> {
        let ring: IoUring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)?;
        let submitter = ring.submitter();
        submitter.register_files(&[image.as_raw_fd(), stop.as_raw_fd(), -1])?;
        let operations = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        let mut restrictions: Vec<_> = operations.map(Restriction::sqe_op).into();
        restrictions.extend([
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
            Restriction::register_op(REGISTER_FILES_UPDATE),
            Restriction::register_op(REGISTER_RING_FDS),
        ]);
        submitter.register_restrictions(&mut restrictions)?;
        Ok(Self(ring))
    }
}

/// Carries out operations with a ring. Bound to the thread that made it.
pub struct UringEngine<'r> {
    submitter: Submitter<'r>,
    submissions: SubmissionQueue<'r>,
    completions: CompletionQueue<'r>,
    image: RawFd,
    kick_armed: bool,
    /// The kick descriptor cannot be polled; trying again would spin.
    kick_lost: bool,
    stop_armed: bool,
    /// Ends of operations that were carried out on the spot.
    done: Vec<Event>,
}

impl<'r> UringEngine<'r> {
    /// Enables the ring for the calling thread, the only one that may use it from now on.
    pub fn new(ring: &'r mut DisabledRing, image: &'r impl AsRawFd) -> io::Result<Self> {
        let (mut submitter, submissions, completions) = ring.0.split();
        submitter.register_enable_rings()?;
        // Saves the look-up of the ring's descriptor in each call. Nothing is lost without it.
        let _ = submitter.register_ring_fd();
        Ok(Self {
            submitter,
            submissions,
            completions,
            image: image.as_raw_fd(),
            kick_armed: false,
            kick_lost: false,
            stop_armed: false,
            done: Vec::new(),
        })
    }

    /// Queues an entry, making room first if need be.
    ///
    /// # Safety
    ///
    /// As for [`Engine::submit`].
    unsafe fn push(&mut self, entry: &Entry) -> io::Result<()> {
        // SAFETY: the caller vouches for the memory that the entry names.
        while unsafe { self.submissions.push(entry) }.is_err() {
            self.submissions.sync();
            self.enter(0)?;
            self.submissions.sync();
        }
        Ok(())
    }

    fn enter(&mut self, wait_for: usize) -> io::Result<()> {
        const GETEVENTS: u32 = 1;
        let submit = {
            self.submissions.sync();
            self.submissions.len() as u32
        };
        // GETEVENTS even without waiting: kicks and ends of asynchronous operations are delivered
        // to this ring in such calls only.
        // SAFETY: no argument structure is passed.
        let entered = unsafe {
            self.submitter
                .enter::<libc::sigset_t>(submit, wait_for as u32, GETEVENTS, None)
        };
        match entered {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // EBUSY, EAGAIN: the kernel lacks room or memory until completions are taken.
                Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Arms the polls that are not: both stay for every kick and stop request to come, and report
    /// each once. Nothing has to be read to make them report again.
    fn arm(&mut self) -> io::Result<()> {
        if !self.kick_armed && !self.kick_lost {
            self.poll(KICK, KICK_DATA)?;
            self.kick_armed = true;
        }
        if !self.stop_armed {
            self.poll(STOP, STOP_DATA)?;
            self.stop_armed = true;
        }
        Ok(())
    }

    fn poll(&mut self, file: Fixed, data: u64) -> io::Result<()> {
        let entry = opcode::PollAdd::new(file, libc::POLLIN as u32)
            .multi(true)
            .build()
            .user_data(data);
        // SAFETY: names no memory.
        unsafe { self.push(&entry) }
    }

    fn take_completions(&mut self, events: &mut Vec<Event>) {
        self.completions.sync();
        for entry in &mut self.completions {
            match entry.user_data() {
                STOP_DATA => self.stop_armed = cqueue::more(entry.flags()),
                KICK_DATA => {
                    self.kick_armed = cqueue::more(entry.flags());
                    if entry.result() < 0 && entry.result() != -libc::ECANCELED {
                        self.kick_lost = true;
                        events.push(Event::KickLost);
                    }
                }
                CANCEL_DATA => {}
                token => events.push(Event::Done {
                    // Only tokens given by `submit` are left.
                    token: token as u16,
                    result: entry.result(),
                }),
            }
        }
        self.completions.sync();
    }
}

impl Engine for UringEngine<'_> {
    fn attach(&mut self, kick: RawFd) -> io::Result<()> {
        self.submitter.register_files_update(KICK.0, &[kick])?;
        self.arm()
    }

    unsafe fn submit(&mut self, token: u16, op: &Op<'_>) -> io::Result<()> {
        let entry = match *op {
            Op::Read { buffers, offset } => match buffers {
                [one] => opcode::Read::new(IMAGE, one.iov_base.cast(), length(one))
                    .offset(offset)
                    .build(),
                many => opcode::Readv::new(IMAGE, many.as_ptr(), many.len() as u32)
                    .offset(offset)
                    .build(),
            },
            Op::Write {
                buffers,
                offset,
                stable,
            } => {
                let flags = if stable { libc::RWF_DSYNC } else { 0 };
                match buffers {
                    [one] => opcode::Write::new(IMAGE, one.iov_base.cast(), length(one))
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                    many => opcode::Writev::new(IMAGE, many.as_ptr(), many.len() as u32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Op::Sync => opcode::Fsync::new(IMAGE)
                .flags(FsyncFlags::DATASYNC)
                .build(),
            Op::Allocate { mode, offset, len } => opcode::Fallocate::new(IMAGE, len)
                .offset(offset)
                .mode(mode)
                .build(),
            Op::Discard { .. } => {
                // SAFETY: the caller keeps the buffers valid beyond this call.
                let result = unsafe { perform(self.image, op) };
                self.done.push(Event::Done { token, result });
                return Ok(());
            }
        };
        // SAFETY: the caller keeps what the entry names valid until its event.
        unsafe { self.push(&entry.user_data(u64::from(token))) }
    }

    fn wait(&mut self, block: bool, events: &mut Vec<Event>) -> io::Result<()> {
        self.arm()?;
        let block = block && self.done.is_empty();
        self.enter(usize::from(block))?;
        events.append(&mut self.done);
        self.take_completions(events);
        Ok(())
    }

    fn detach(&mut self) -> io::Result<()> {
        if self.kick_armed {
            // Removing the poll instead would fail while a kick is being reported.
            let entry = opcode::AsyncCancel::new(KICK_DATA)
                .build()
                .flags(Flags::FIXED_FILE)
                .user_data(CANCEL_DATA);
            // SAFETY: names no memory.
            unsafe { self.push(&entry) }?;
        }
        let mut ignored = Vec::new();
        while self.kick_armed {
            self.enter(1)?;
            self.take_completions(&mut ignored);
        }
        self.submitter.register_files_update(KICK.0, &[-1])?;
        self.kick_lost = false;
        Ok(())
    }
}

/// A descriptor's length is a u32, so one buffer's is as well.
fn length(buffer: &libc::iovec) -> u32 {
    u32::try_from(buffer.iov_len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};

    use super::*;

    fn eventfd() -> OwnedFd {
        // SAFETY: no pointer; a non-negative result is a new descriptor.
        unsafe {
            let fd = libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(fd)
        }
    }

    /// Whoever controls the process gets no more from the ring than the image and its eventfds.
    #[test]
    fn a_ring_does_nothing_but_its_work() {
        let image = tempfile::tempfile().unwrap();
        let stop = eventfd();
        let mut ring = DisabledRing::new(&image, stop.as_fd()).unwrap();
        let mut engine = UringEngine::new(&mut ring, &image).unwrap();
        let kick = eventfd();
        engine.attach(kick.as_raw_fd()).unwrap();
        let mut buffer = [0u8; 8];
        let unregistered = io_uring::types::Fd(image.as_raw_fd());
        let entries = [
            opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Read::new(unregistered, buffer.as_mut_ptr(), 8).build(),
            opcode::Write::new(unregistered, buffer.as_ptr(), 8).build(),
            opcode::Nop::new().build().flags(Flags::FIXED_FILE),
        ];
        let mut events = Vec::new();
        for (token, entry) in entries.iter().enumerate() {
            // SAFETY: the buffer and the name outlive the loop, at whose end nothing is in flight.
            unsafe { engine.push(&entry.clone().user_data(token as u64)) }.unwrap();
            events.clear();
            engine.wait(true, &mut events).unwrap();
            let (token, result) = (token as u16, -libc::EACCES);
            assert_eq!(events, [Event::Done { token, result }], "{entry:?}");
        }
        let refused = engine.submitter.register_buffers_sparse(1).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        engine.detach().unwrap();
    }
}
