//! What outlives the process: the connections, in a memory file that the supervisor keeps.
//!
//! The process may be killed between any two instructions. Every value is stored in program order
//! (release stores, which the compiler does not move), so what a later process finds is what an
//! earlier one had done up to some instruction. Nothing in it is trusted: positions and numbers are
//! checked before use ([`State::check`]).

use std::cell::UnsafeCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::sys;

/// Most connections at a time.
pub const SLOTS: usize = 2048;
/// The first connections get large buffers, so that a few have full speed.
const LARGE_SLOTS: usize = 64;
const LARGE_BUFFER: u32 = 256 << 10;
const SMALL_BUFFER: u32 = 32 << 10;
/// Room of a buffer beyond the guest's credit: for the answer to CONNECT.
const SLACK: usize = 4096;

/// Most guest buffers that one call fills.
pub const BATCH: usize = 16;
/// Refusals on their way to the guest. Every connection can end while as many wait.
pub const RESETS: usize = 2 * SLOTS;
/// `msg_len` of a message that the kernel has not handled.
pub const UNTOUCHED: u32 = u32::MAX;

/// Says that the file is one of this layout.
const MAGIC: u64 = u64::from_le_bytes(*b"avsock\x00\x01");

/// States of a connection.
pub mod phase {
    /// There is none.
    pub const FREE: u32 = 0;
    /// A client of the host has connected and is to send its CONNECT line.
    pub const HELLO: u32 = 1;
    /// The guest is to answer the request of a client.
    pub const OPENING: u32 = 2;
    /// The host's socket for a request of the guest is being connected.
    pub const DIALING: u32 = 3;
    /// Open.
    pub const OPEN: u32 = 4;
    /// The guest has closed it and forgotten; bytes for the host are left.
    pub const LINGER: u32 = 5;
}

/// Flags of a connection.
pub mod flag {
    /// The guest does not receive any more.
    pub const GUEST_RCV: u32 = 1;
    /// The guest does not send any more.
    pub const GUEST_SEND: u32 = 2;
    /// The host's program does not receive any more.
    pub const HOST_RCV: u32 = 1 << 2;
    /// The host's program does not send any more, and the guest has it all.
    pub const HOST_SEND: u32 = 1 << 3;
    /// The guest has been told [`HOST_RCV`].
    pub const TOLD_RCV: u32 = 1 << 4;
    /// The guest has been told [`HOST_SEND`].
    pub const TOLD_SEND: u32 = 1 << 5;
    /// A REQUEST is to be sent.
    pub const WANT_REQUEST: u32 = 1 << 8;
    /// A RESPONSE is to be sent.
    pub const WANT_RESPONSE: u32 = 1 << 9;
    /// A SHUTDOWN is to be sent.
    pub const WANT_SHUTDOWN: u32 = 1 << 10;
    /// A CREDIT_UPDATE is to be sent.
    pub const WANT_UPDATE: u32 = 1 << 11;
    /// A CREDIT_REQUEST is to be sent.
    pub const WANT_CREDIT: u32 = 1 << 12;
    /// What is to be sent.
    pub const WANTS: u32 = 0xff << 8;
    /// A CREDIT_REQUEST has not been answered yet.
    pub const ASKED: u32 = 1 << 16;
}

/// A number in the file.
#[derive(Debug)]
#[repr(transparent)]
pub struct Word(AtomicU32);

impl Word {
    /// Its value.
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Stores it after everything before.
    pub fn set(&self, value: u32) {
        self.0.store(value, Ordering::Release);
    }

    /// Whether one of these bits is set.
    pub fn has(&self, bits: u32) -> bool {
        self.get() & bits != 0
    }

    /// Sets bits.
    pub fn add(&self, bits: u32) {
        self.set(self.get() | bits);
    }

    /// Clears bits.
    pub fn remove(&self, bits: u32) {
        self.set(self.get() & !bits);
    }
}

/// A position in a stream.
#[derive(Debug)]
#[repr(transparent)]
pub struct Position(AtomicU64);

impl Position {
    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// Stores it after everything before.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Release);
    }
}

/// A connection.
#[derive(Debug)]
#[repr(C)]
pub struct Slot {
    /// See [`phase`].
    pub phase: Word,
    /// Tells connections apart that had the same slot.
    pub generation: Word,
    /// Port on the guest's side.
    pub guest_port: Word,
    /// Port on the host's side.
    pub host_port: Word,
    /// See [`flag`].
    pub flags: Word,
    /// Bytes of the CONNECT line, still in the socket.
    pub line: Word,
    /// Bytes at the start of the stream to the host that are not the guest's.
    pub preface: Word,
    /// Bytes that the guest has been sent.
    pub to_guest: Word,
    /// The guest's buffer size.
    pub guest_buffer: Word,
    /// Bytes that the guest has taken out of its buffer.
    pub guest_taken: Word,
    /// `fwd_cnt` that the guest has been told last.
    pub told: Word,
    padding: Word,
    /// Position in the stream to the host up to which bytes have come.
    pub taken: Position,
    /// Position up to which the socket has them. Beyond `taken` while a packet is being handled.
    pub sent: Position,
}

impl Slot {
    /// Bytes of the guest that its program's counterpart has (`fwd_cnt`).
    pub fn forwarded(&self) -> u32 {
        self.sent.get().saturating_sub(self.preface.get().into()) as u32
    }

    /// Bytes that wait for the socket.
    pub fn backlog(&self) -> u64 {
        self.taken.get().saturating_sub(self.sent.get())
    }

    /// Bytes that the guest can take now.
    pub fn credit(&self) -> u32 {
        let unread = self.to_guest.get().wrapping_sub(self.guest_taken.get());
        self.guest_buffer.get().saturating_sub(unread)
    }
}

/// A packet of the guest that is being handled.
#[derive(Debug)]
#[repr(C)]
pub struct PacketMark {
    /// Not zero: the rest is valid.
    pub active: Word,
    /// The chain.
    pub head: Word,
    /// The ring's used index at that time: tells the chain from a later one with the same head.
    pub used: Word,
    /// The connection.
    pub slot: Word,
    /// Its `taken` before the packet.
    pub base: Position,
}

/// Bytes that are being written to a socket.
#[repr(C)]
pub struct SendMark {
    /// Number of the connection plus one; zero: nothing is being written.
    pub active: Word,
    padding: Word,
    /// Its `sent` before.
    pub base: Position,
    /// The system call's argument, whose `msg_len` the kernel writes.
    message: UnsafeCell<libc::mmsghdr>,
}

/// What a [`ReceiveMark`] is about.
pub mod receiving {
    /// Nothing.
    pub const NOTHING: u32 = 0;
    /// Bytes of a socket into guest buffers.
    pub const DATA: u32 = 1;
    /// A packet without data; `bits` are the wishes it fulfils.
    pub const CONTROL: u32 = 2;
    /// The oldest refusal.
    pub const RESET: u32 = 3;
    /// The CONNECT line, out of the way.
    pub const LINE: u32 = 4;
}

/// What is on its way to the guest.
#[repr(C)]
pub struct ReceiveMark {
    /// See [`receiving`].
    pub what: Word,
    /// The connection.
    pub slot: Word,
    /// Its generation.
    pub generation: Word,
    /// The ring's used index before.
    pub used: Word,
    /// Number of guest buffers.
    pub count: Word,
    /// Flags that go when the packet is there.
    pub bits: Word,
    /// `to_guest` or `line` before.
    pub base: Word,
    padding: Word,
    /// The chains.
    pub heads: [Word; BATCH],
    /// Room in each.
    pub rooms: [Word; BATCH],
    /// The system call's argument.
    messages: [UnsafeCell<libc::mmsghdr>; BATCH],
}

/// A refusal on its way to the guest.
#[derive(Debug)]
#[repr(C)]
struct Reset {
    guest_port: Word,
    host_port: Word,
    kind: Word,
}

#[repr(C)]
struct Layout {
    magic: Position,
    /// Where the search for a free host port goes on.
    next_port: Word,
    reset_first: Word,
    reset_end: Word,
    padding: Word,
    packet: PacketMark,
    send: SendMark,
    receive: ReceiveMark,
    resets: [Reset; RESETS],
    slots: [Slot; SLOTS],
}

const PAGE: usize = 4096;
const BUFFERS: usize = size_of::<Layout>().next_multiple_of(PAGE);
const LARGE_REGION: usize = LARGE_BUFFER as usize + SLACK;
const SMALL_REGION: usize = SMALL_BUFFER as usize + SLACK;
const SIZE: usize = BUFFERS + LARGE_SLOTS * LARGE_REGION + (SLOTS - LARGE_SLOTS) * SMALL_REGION;

/// The file, mapped.
pub struct State {
    file: OwnedFd,
    start: ptr::NonNull<u8>,
}

impl State {
    /// An empty one.
    pub fn new() -> io::Result<Self> {
        let state = Self::map(sys::memory_file(SIZE as u64)?)?;
        state.layout().magic.set(MAGIC);
        Ok(state)
    }

    /// One of an earlier process.
    pub fn open(file: OwnedFd) -> io::Result<Self> {
        let file = File::from(file);
        if file.metadata()?.len() != SIZE as u64 {
            return Err(io::Error::other("its length is not that of a state"));
        }
        let state = Self::map(file.into())?;
        match state.layout().magic.get() {
            MAGIC => Ok(state),
            _ => Err(io::Error::other("it is not a state of this version")),
        }
    }

    fn map(file: OwnedFd) -> io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), SIZE, rights, flags, file.as_raw_fd(), 0) };
        match ptr::NonNull::new(start.cast()) {
            Some(start) if !ptr::eq(start.as_ptr(), libc::MAP_FAILED.cast()) => {
                Ok(Self { file, start })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn layout(&self) -> &Layout {
        // SAFETY: the mapping is as long as `Layout` at least and page-aligned, lives as long as
        // `self`, and every bit pattern is valid: atomics and cells of plain numbers and pointers.
        unsafe { self.start.cast().as_ref() }
    }

    /// The file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A connection's slot.
    pub fn slot(&self, number: u16) -> &Slot {
        &self.layout().slots[usize::from(number)]
    }

    /// The packet being handled.
    pub fn packet(&self) -> &PacketMark {
        &self.layout().packet
    }

    /// The bytes being written.
    pub fn send(&self) -> &SendMark {
        &self.layout().send
    }

    /// What is on its way to the guest.
    pub fn receive(&self) -> &ReceiveMark {
        &self.layout().receive
    }

    /// The next host port to try.
    pub fn next_port(&self) -> u32 {
        // From 2^30 on: nobody listens there in a guest or names such a port in a path.
        const FIRST: u32 = 1 << 30;
        let port = self.layout().next_port.get().max(FIRST);
        let next = if port >= (FIRST << 1) - 1 {
            FIRST
        } else {
            port + 1
        };
        self.layout().next_port.set(next);
        port
    }

    /// Number of refusals that wait.
    pub fn resets(&self) -> usize {
        let layout = self.layout();
        let count = layout
            .reset_end
            .get()
            .wrapping_sub(layout.reset_first.get());
        (count as usize).min(RESETS)
    }

    /// Adds a refusal. The caller has seen that there is room.
    pub fn push_reset(&self, guest_port: u32, host_port: u32, kind: u16) {
        let layout = self.layout();
        let end = layout.reset_end.get();
        let reset = &layout.resets[end as usize % RESETS];
        reset.guest_port.set(guest_port);
        reset.host_port.set(host_port);
        reset.kind.set(kind.into());
        layout.reset_end.set(end.wrapping_add(1));
    }

    /// The oldest refusal: guest port, host port, type.
    pub fn first_reset(&self) -> Option<(u32, u32, u16)> {
        if self.resets() == 0 {
            return None;
        }
        let layout = self.layout();
        let reset = &layout.resets[layout.reset_first.get() as usize % RESETS];
        let kind = reset.kind.get() as u16;
        Some((reset.guest_port.get(), reset.host_port.get(), kind))
    }

    /// Removes the oldest refusal.
    pub fn pop_reset(&self) {
        if self.resets() > 0 {
            let first = &self.layout().reset_first;
            first.set(first.get().wrapping_add(1));
        }
    }

    /// Size of the buffer of a connection that the guest is told.
    pub fn buffer(number: u16) -> u32 {
        match usize::from(number) < LARGE_SLOTS {
            true => LARGE_BUFFER,
            false => SMALL_BUFFER,
        }
    }

    /// Offset and length of a connection's buffer.
    fn region(number: u16) -> (usize, usize) {
        let number = usize::from(number);
        match number.checked_sub(LARGE_SLOTS) {
            None => (BUFFERS + number * LARGE_REGION, LARGE_REGION),
            Some(small) => (
                BUFFERS + LARGE_SLOTS * LARGE_REGION + small * SMALL_REGION,
                SMALL_REGION,
            ),
        }
    }

    /// Where in memory the bytes `from..to` of a connection's stream to the host lie, in two
    /// pieces at most. Longer than the buffer, it is cut.
    pub fn pieces(&self, number: u16, from: u64, to: u64) -> [libc::iovec; 2] {
        let (offset, size) = Self::region(number);
        let length = usize::try_from(to.saturating_sub(from)).map_or(size, |n| n.min(size));
        let at = (from % size as u64) as usize;
        let first = length.min(size - at);
        let piece = |at: usize, length| libc::iovec {
            // SAFETY: inside the region, which is inside the mapping.
            iov_base: unsafe { self.start.as_ptr().add(offset + at) }.cast(),
            iov_len: length,
        };
        [piece(at, first), piece(0, length - first)]
    }

    /// Gives the memory of a connection's buffer back.
    pub fn release_buffer(&self, number: u16) {
        let (offset, size) = Self::region(number);
        // SAFETY: whole pages of the mapping, whose content nobody needs any more. On failure they
        // stay in use.
        unsafe {
            libc::madvise(
                self.start.as_ptr().add(offset).cast(),
                size,
                libc::MADV_REMOVE,
            )
        };
    }

    /// Whether the numbers of a slot that an earlier process has left make sense.
    pub fn check(&self, number: u16) -> bool {
        let slot = self.slot(number);
        let (taken, sent) = (slot.taken.get(), slot.sent.get());
        let window = u64::from(Self::buffer(number));
        let preface = u64::from(slot.preface.get());
        slot.phase.get() <= phase::LINGER
            && preface <= SLACK as u64
            && taken < 1 << 62
            && sent < 1 << 62
            && taken.saturating_sub(sent) <= window + preface
            && sent.saturating_sub(taken) <= window
    }

    /// Forgets everything.
    pub fn clear(&self) {
        let layout = self.layout();
        layout.packet.active.set(0);
        layout.send.active.set(0);
        layout.receive.what.set(receiving::NOTHING);
        layout.reset_first.set(layout.reset_end.get());
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, which nothing refers to any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), SIZE) };
    }
}

/// An argument of `sendmmsg` or `recvmmsg` that the kernel has not handled yet.
fn untouched(parts: &mut [libc::iovec]) -> libc::mmsghdr {
    // SAFETY: an all-zero msghdr is valid: null pointers with zero lengths.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_iov = parts.as_mut_ptr();
    message.msg_hdr.msg_iovlen = parts.len();
    message.msg_len = UNTOUCHED;
    message
}

/// The bytes that the kernel has moved for a message.
fn moved(message: &UnsafeCell<libc::mmsghdr>) -> Option<u32> {
    // SAFETY: inside the mapping; nobody writes meanwhile.
    let length = unsafe { (&raw const (*message.get()).msg_len).read_volatile() };
    (length != UNTOUCHED).then_some(length)
}

impl SendMark {
    /// Prepares a message that sends `parts`, and what to pass to the kernel.
    pub fn prepare(&self, parts: &mut [libc::iovec]) -> *mut libc::mmsghdr {
        // SAFETY: inside the mapping, and this thread is the only one that uses it.
        unsafe { self.message.get().write_volatile(untouched(parts)) };
        self.message.get()
    }

    /// The bytes that the kernel has sent; `None` if it has not come to it.
    pub fn moved(&self) -> Option<u32> {
        moved(&self.message)
    }
}

impl ReceiveMark {
    /// Prepares message `index`, which receives into `parts`.
    pub fn prepare(&self, index: usize, parts: &mut [libc::iovec]) {
        // SAFETY: inside the mapping, and this thread is the only one that uses it.
        unsafe { self.messages[index].get().write_volatile(untouched(parts)) };
    }

    /// The messages, for the kernel.
    pub fn messages(&self) -> *mut libc::mmsghdr {
        self.messages[0].get()
    }

    /// The bytes that the kernel has put into buffer `index`.
    pub fn moved(&self, index: usize) -> u32 {
        let moved = moved(&self.messages[index]).unwrap_or(0);
        moved.min(self.rooms[index].get())
    }

    /// Number of buffers, within bounds.
    pub fn count(&self) -> usize {
        (self.count.get() as usize).min(BATCH)
    }

    /// All bytes that the kernel has put into the buffers.
    pub fn total(&self) -> u32 {
        (0..self.count()).fold(0, |sum: u32, index| sum.wrapping_add(self.moved(index)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_do_not_overlap_and_end_with_the_file() {
        let mut end = BUFFERS;
        for number in 0..SLOTS as u16 {
            let (offset, size) = State::region(number);
            assert_eq!(offset, end);
            assert!(size > State::buffer(number) as usize && size % PAGE == 0);
            end = offset + size;
        }
        assert_eq!(end, SIZE);
    }

    #[test]
    fn pieces_wrap_around_inside_the_buffer() {
        let state = State::new().unwrap();
        let (_, size) = State::region(100);
        let size = size as u64;
        let [first, second] = state.pieces(100, 3 * size - 10, 3 * size + 20);
        assert_eq!((first.iov_len, second.iov_len), (10, 20));
        assert_eq!(
            first.iov_base as usize + 10 - size as usize,
            second.iov_base as usize
        );
        let [first, second] = state.pieces(100, 5, u64::MAX);
        assert_eq!(first.iov_len + second.iov_len, size as usize);
        let [first, second] = state.pieces(100, 7, 7);
        assert_eq!((first.iov_len, second.iov_len), (0, 0));
    }

    #[test]
    fn another_process_finds_what_was_stored_and_nonsense_is_seen() {
        let state = State::new().unwrap();
        let slot = state.slot(2047);
        slot.phase.set(phase::OPEN);
        slot.taken.set(100);
        slot.sent.set(40);
        state.push_reset(5, 6, 1);
        let copy = state.file().try_clone_to_owned().unwrap();
        drop(state);
        let state = State::open(copy).unwrap();
        assert_eq!(state.slot(2047).backlog(), 60);
        assert_eq!(state.first_reset(), Some((5, 6, 1)));
        assert!(state.check(2047));
        state.slot(2047).taken.set(1 << 40);
        assert!(!state.check(2047));
        state.slot(2047).taken.set(0);
        state.slot(2047).phase.set(77);
        assert!(!state.check(2047));
        state.layout().reset_end.set(123_456_789);
        assert!(state.resets() <= RESETS);
        state.layout().magic.set(7);
        assert!(State::open(state.file().try_clone_to_owned().unwrap()).is_err());
        assert!(State::open(sys::memory_file(4096).unwrap()).is_err());
    }

    #[test]
    fn the_kernel_says_in_the_file_how_much_it_moved() {
        let state = State::new().unwrap();
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut bytes = *b"0123456789";
        let mut parts = [libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }];
        let mark = state.send();
        let message = mark.prepare(&mut parts);
        assert_eq!(mark.moved(), None);
        // SAFETY: prepared from live buffers.
        unsafe { sys::send(a.as_fd(), message) }.unwrap();
        assert_eq!(mark.moved(), Some(10));
        let mark = state.receive();
        let mut target = [0u8; 12];
        let mut parts = [0, 4, 8].map(|at| libc::iovec {
            iov_base: target[at..].as_mut_ptr().cast(),
            iov_len: 4,
        });
        for (index, part) in parts.iter_mut().enumerate() {
            mark.prepare(index, std::slice::from_mut(part));
            mark.rooms[index].set(4);
        }
        mark.count.set(3);
        // SAFETY: as above.
        unsafe { sys::receive(b.as_fd(), mark.messages(), 3) }.unwrap();
        assert_eq!([0, 1, 2].map(|i| mark.moved(i)), [4, 4, 2]);
        assert_eq!(mark.total(), 10);
        assert_eq!(&target[..10], b"0123456789");
        mark.prepare(0, &mut parts[..1]);
        // SAFETY: as above.
        unsafe { sys::receive(b.as_fd(), mark.messages(), 1) }.unwrap_err();
        assert_eq!(mark.moved(0), 0);
    }
}
