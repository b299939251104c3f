//! Bytes on their way, in memory that outlives the process.
//!
//! A process may be killed between any two instructions, and the one that replaces it goes on at the
//! byte where it stopped. So what is on its way lies in a file of memory that the supervisor keeps:
//!
//! ```text
//!   log      16 KiB   output; position of the file: where the endpoint goes on
//!   records   4 KiB   all other positions, twice, and which of the two counts; bytes being received
//!   input     4 KiB   input that the guest has not got
//! ```
//!
//! Bytes are moved first and counted then, by one store that makes the other record count. Where a
//! system call moves bytes, the store cannot happen in the same moment:
//!
//! - Output leaves by sendfile, by which the kernel itself moves the file's position. The pages may
//!   then be read by the peer for as long as it likes, so each is replaced before it is used again.
//! - A file to which output is appended knows by its length what has arrived.
//! - What comes from a socket is looked at, and then received over its complement: memory tells whether it
//!   was received.
//! - Input reaches the guest with the used index of its ring, which is compared with what it was
//!   to become.
//!
//! What remains, if the process is killed in the very microsecond: a key from a terminal or pipe
//! that was read and not counted is lost; output to a device that sendfile does not serve, and input
//! to a UART, that was written and not counted is repeated.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

/// Most bytes on their way in each direction.
pub const CAPACITY: usize = 4096;
/// Bytes taken from the endpoint at once. Each may become two by the escape key.
pub const READ_SIZE: usize = 256;

const PAGE: usize = 4096;
const LOG_SIZE: usize = 4 * PAGE;
const RECORDS: usize = LOG_SIZE;
/// Bytes that are looked at and then received, for input and output.
const SEEN: [usize; 2] = [RECORDS + 1024, RECORDS + 1024 + READ_SIZE];
const RECEIVED: [usize; 2] = [RECORDS + 2048, RECORDS + 2048 + READ_SIZE];
const RING: usize = RECORDS + PAGE;
const SIZE: usize = RING + CAPACITY;

/// Words of a record.
const WORDS: usize = 8;

/// What is received from a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The guest's input, from the endpoint.
    Input,
    /// The guest's output, from the stream of a UART.
    Output,
}

/// Positions count from the start of the console; in the rings they are taken modulo their size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Record {
    /// End of the output.
    output: u64,
    /// What it was when the chain of the transmit queue in progress was begun.
    chain: u64,
    /// End and start of the input.
    input: u64,
    given: u64,
    /// What `given` becomes when the used index of the receive queue becomes `used`.
    giving: Option<(u64, u16)>,
    /// Bytes of each lane that are looked at and about to be received.
    seen: [u16; 2],
    /// The last key was the escape key.
    escaped: bool,
    /// While output is appended to a file: how long it was, and the output's start.
    appending: Option<(u64, u64)>,
}

impl Record {
    fn words(&self) -> [u64; WORDS] {
        let (giving, used) = self.giving.unwrap_or_default();
        let (length, start) = self.appending.unwrap_or_default();
        let flags = u64::from(self.giving.is_some())
            | u64::from(self.escaped) << 1
            | u64::from(self.appending.is_some()) << 2
            | u64::from(used) << 16
            | u64::from(self.seen[0]) << 32
            | u64::from(self.seen[1]) << 48;
        [
            self.output,
            self.chain,
            self.input,
            self.given,
            giving,
            flags,
            length,
            start,
        ]
    }

    /// `None` if it says what cannot be.
    fn from_words(words: [u64; WORDS]) -> Option<Self> {
        let [output, chain, input, given, giving, flags, length, start] = words;
        let record = Self {
            output,
            chain,
            input,
            given,
            giving: (flags & 1 != 0).then_some((giving, (flags >> 16) as u16)),
            seen: [(flags >> 32) as u16, (flags >> 48) as u16],
            escaped: flags & 2 != 0,
            appending: (flags & 4 != 0).then_some((length, start)),
        };
        let fits = |start, end: u64| end.checked_sub(start).is_some_and(|n| n <= CAPACITY as u64);
        let valid = chain <= output
            && output < 1 << 62
            && input < 1 << 62
            && fits(given, input)
            && record
                .giving
                .is_none_or(|(to, _)| fits(given, to) && to <= input)
            && record
                .appending
                .is_none_or(|(_, start)| fits(start, output))
            && record
                .seen
                .iter()
                .all(|&seen| usize::from(seen) <= READ_SIZE);
        valid.then_some(record)
    }
}

/// The bytes on their way and how far they are.
pub struct State {
    file: File,
    memory: NonNull<u8>,
    record: Record,
    /// Start of the output.
    sent: u64,
    /// The kernel can replace pages and send them.
    sendfile: bool,
}

impl State {
    /// Nothing on its way.
    pub fn new() -> io::Result<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"console".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nothing else owns.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(SIZE as u64)?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: F_ADD_SEALS takes no pointer.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Self::map(file)
    }

    /// What an earlier process has left.
    ///
    /// # Errors
    /// It is no state, for the log.
    pub fn restore(fd: OwnedFd) -> Result<Self, String> {
        let mut file = File::from(fd);
        let length = file.metadata().map_err(|e| e.to_string())?.len();
        if length != SIZE as u64 {
            return Err(format!("{length} bytes, not {SIZE}"));
        }
        let position = file.stream_position().map_err(|e| e.to_string())?;
        let mut state = Self::map(file).map_err(|e| e.to_string())?;
        let slot = (state.word(2 * WORDS).load(Ordering::Acquire) & 1) as usize;
        let words = std::array::from_fn(|i| state.word(slot * WORDS + i).load(Ordering::Relaxed));
        state.record = Record::from_words(words).ok_or("its positions cannot be")?;
        // The position in the log is that of the first byte that has not been sent.
        let waiting = (state.record.output.wrapping_sub(position)) % LOG_SIZE as u64;
        let sent = state.record.output.checked_sub(waiting);
        state.sent = sent
            .filter(|_| waiting <= CAPACITY as u64 && position <= LOG_SIZE as u64)
            .ok_or("its output cannot be")?;
        Ok(state)
    }

    fn map(file: File) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                ptr::null_mut(),
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            file,
            memory,
            record: Record::default(),
            sent: 0,
            sendfile: true,
        })
    }

    /// The file, for the supervisor to keep.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(8 * index < SEEN[0] - RECORDS);
        // SAFETY: in the mapping, which lives as long as `self`; aligned, as the mapping is by pages;
        // only accessed through atomics.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(RECORDS + 8 * index).cast()) }
    }

    /// Makes `record` what counts.
    fn commit(&mut self) {
        let selector = self.word(2 * WORDS);
        let slot = (selector.load(Ordering::Relaxed) & 1) as usize ^ 1;
        for (i, word) in self.record.words().into_iter().enumerate() {
            self.word(slot * WORDS + i).store(word, Ordering::Relaxed);
        }
        selector.store(slot as u64, Ordering::Release);
    }

    /// Copies into the memory from `start` on.
    fn store(&mut self, start: usize, bytes: &[u8]) {
        assert!(start + bytes.len() <= SIZE);
        // SAFETY: inside the mapping, to which no reference exists.
        unsafe {
            let to = self.memory.as_ptr().add(start);
            ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    /// Copies from the memory.
    fn load(&self, start: usize, bytes: &mut [u8]) {
        assert!(start + bytes.len() <= SIZE);
        // SAFETY: as for `store`.
        unsafe {
            let from = self.memory.as_ptr().add(start);
            ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len());
        }
    }

    // Output.

    /// Bytes that wait for the endpoint.
    pub fn output_len(&self) -> usize {
        (self.record.output - self.sent) as usize
    }

    /// How many more it takes.
    pub fn output_room(&self) -> usize {
        CAPACITY.saturating_sub(self.output_len())
    }

    /// Adds output that is not of the chain in progress; what there is no room for is lost.
    pub fn insert_output(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(self.output_room())];
        self.record.chain += bytes.len() as u64;
        self.put_output(bytes);
    }

    /// Adds output; what there is no room for is lost.
    pub fn put_output(&mut self, bytes: &[u8]) {
        let mut bytes = &bytes[..bytes.len().min(self.output_room())];
        let mut end = self.record.output;
        while !bytes.is_empty() {
            let at = (end % LOG_SIZE as u64) as usize;
            if at.is_multiple_of(PAGE) && self.sendfile {
                self.replace_page(at);
            }
            let (now, later) = bytes.split_at(bytes.len().min(PAGE - at % PAGE));
            self.store(at, now);
            end += now.len() as u64;
            bytes = later;
        }
        self.record.output = end;
        self.record.seen[Lane::Output as usize] = 0;
        self.commit();
    }

    /// Gives the log another page at `at`. All its bytes have been sent, and may be on their way.
    fn replace_page(&mut self, at: usize) {
        // SAFETY: a page of the mapping, to which no reference exists; it reads as zeroes then.
        let rc = unsafe {
            let page = self.memory.as_ptr().add(at).cast();
            libc::madvise(page, PAGE, libc::MADV_REMOVE)
        };
        self.sendfile = rc == 0;
    }

    /// A chain of the transmit queue is about to be taken for the first time.
    pub fn begin_chain(&mut self) {
        if self.record.chain != self.record.output {
            self.record.chain = self.record.output;
            self.commit();
        }
    }

    /// Bytes of the chain in progress that are in the output.
    pub fn chain_progress(&self) -> u64 {
        self.record.output - self.record.chain
    }

    /// Sends output to `endpoint`, at most `limit` bytes; how many.
    pub fn send(&mut self, endpoint: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        if !self.sendfile {
            return self.write(endpoint, limit);
        }
        let at = (self.sent % LOG_SIZE as u64) as usize;
        if at == 0 {
            // The position may be the end.
            self.file.rewind()?;
        }
        let length = self.output_len().min(limit).min(LOG_SIZE - at);
        let (to, from) = (endpoint.as_raw_fd(), self.file.as_raw_fd());
        // SAFETY: without an offset no pointer is passed.
        let n = unsafe { libc::sendfile(to, from, ptr::null_mut(), length) };
        if let Ok(n) = usize::try_from(n) {
            self.sent += n as u64;
            return Ok(n);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        self.sendfile = false;
        self.write(endpoint, limit)
    }

    fn write(&mut self, endpoint: BorrowedFd<'_>, limit: usize) -> io::Result<usize> {
        let at = (self.sent % LOG_SIZE as u64) as usize;
        let length = self.output_len().min(limit).min(LOG_SIZE - at);
        // SAFETY: so many bytes from `at` on are in the mapping, to which no reference exists.
        let n = unsafe {
            let from = self.memory.as_ptr().add(at).cast();
            libc::write(endpoint.as_raw_fd(), from, length)
        };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        self.skip_output(n);
        Ok(n)
    }

    /// Appends output to a file; how many bytes.
    pub fn append(&mut self, file: &File) -> io::Result<usize> {
        self.record.appending = Some((file.metadata()?.len(), self.sent));
        self.commit();
        let result = self.write(file.as_fd(), CAPACITY);
        self.record.appending = None;
        self.commit();
        result
    }

    /// Goes on with a file to which output was being appended when an earlier process ended.
    pub fn resolve_append(&mut self, file: &File) {
        if let Some((before, start)) = self.record.appending.take() {
            let now = file.metadata().map_or(before, |data| data.len());
            let written = now.saturating_sub(before).min(self.record.output - start);
            self.seek_output(start + written);
            self.commit();
        }
    }

    /// Output that nobody gets.
    pub fn skip_output(&mut self, count: usize) {
        let count = count.min(self.output_len());
        self.seek_output(self.sent + count as u64);
    }

    fn seek_output(&mut self, sent: u64) {
        self.sent = sent;
        // Only fails for a file that is not what it was checked to be.
        let _ = self.file.seek(SeekFrom::Start(self.sent % LOG_SIZE as u64));
    }

    // Input.

    /// Bytes that wait for the guest.
    pub fn input_len(&self) -> usize {
        (self.record.input - self.record.given) as usize
    }

    /// How many more it takes.
    pub fn input_room(&self) -> usize {
        CAPACITY - self.input_len()
    }

    /// Whether the last key was the escape key.
    pub fn escaped(&self) -> bool {
        self.record.escaped
    }

    /// Adds input; there is room for it. The state of the escape key goes with it.
    pub fn put_input(&mut self, bytes: &[u8], escaped: bool) {
        let bytes = &bytes[..bytes.len().min(self.input_room())];
        let at = (self.record.input % CAPACITY as u64) as usize;
        let (first, rest) = bytes.split_at(bytes.len().min(CAPACITY - at));
        self.store(RING + at, first);
        self.store(RING, rest);
        self.record.input += bytes.len() as u64;
        self.record.escaped = escaped;
        self.record.seen[Lane::Input as usize] = 0;
        self.commit();
    }

    /// Copies input from `skip` bytes after its start on; how many bytes.
    pub fn peek_input(&self, skip: usize, bytes: &mut [u8]) -> usize {
        let length = bytes.len().min(self.input_len().saturating_sub(skip));
        let at = ((self.record.given + skip as u64) % CAPACITY as u64) as usize;
        let (first, rest) = bytes[..length].split_at_mut(length.min(CAPACITY - at));
        self.load(RING + at, first);
        self.load(RING, rest);
        length
    }

    /// The guest is about to get `count` bytes; it has them when the used index is `used`.
    pub fn give(&mut self, count: usize, used: u16) {
        let to = self.record.given + count.min(self.input_len()) as u64;
        self.record.giving = Some((to, used));
        self.commit();
    }

    /// The guest has them.
    pub fn given(&mut self) {
        if let Some((to, _)) = self.record.giving.take() {
            self.record.given = to;
            self.commit();
        }
    }

    /// `count` bytes have gone where no ring tells how many.
    pub fn skip_input(&mut self, count: usize) {
        self.record.given += count.min(self.input_len()) as u64;
        self.commit();
    }

    /// The receive queue starts with its used index at `used`.
    pub fn resolve_giving(&mut self, used: u16) {
        match self.record.giving {
            Some((_, then)) if then == used => self.given(),
            Some(_) => {
                self.record.giving = None;
                self.commit();
            }
            None => {}
        }
    }

    /// Receives up to `bytes.len()` bytes from a stream socket. If the process is killed before they
    /// are counted by [`put_input`](Self::put_input) or [`put_output`](Self::put_output), they are
    /// [`uncounted`](Self::uncounted) or come from the socket again.
    pub fn receive(
        &mut self,
        lane: Lane,
        socket: BorrowedFd<'_>,
        bytes: &mut [u8],
    ) -> io::Result<usize> {
        let (seen_at, received_at) = (SEEN[lane as usize], RECEIVED[lane as usize]);
        let limit = bytes.len().min(READ_SIZE);
        let seen = self.recv(socket, seen_at, limit, libc::MSG_PEEK)?;
        if seen == 0 {
            return Ok(0);
        }
        let bytes = &mut bytes[..seen];
        self.load(seen_at, bytes);
        let complement: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
        self.store(received_at, &complement);
        self.record.seen[lane as usize] = seen as u16;
        self.commit();
        self.recv(socket, received_at, seen, 0)
    }

    fn recv(
        &mut self,
        socket: BorrowedFd<'_>,
        at: usize,
        length: usize,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        // SAFETY: READ_SIZE bytes from each place in SEEN and RECEIVED on are in the mapping, to
        // which no reference exists.
        let n = unsafe {
            let to = self.memory.as_ptr().add(at).cast();
            libc::recv(socket.as_raw_fd(), to, length, flags | libc::MSG_DONTWAIT)
        };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Bytes that an earlier process has received and not counted; to be counted now.
    pub fn uncounted(&self, lane: Lane) -> Vec<u8> {
        let length = usize::from(self.record.seen[lane as usize]);
        let (mut seen, mut received) = (vec![0; length], vec![0; length]);
        self.load(SEEN[lane as usize], &mut seen);
        self.load(RECEIVED[lane as usize], &mut received);
        let count = seen.iter().zip(&received).take_while(|(a, b)| a == b);
        seen[..count.count()].to_vec()
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, which nothing refers to any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), SIZE) };
    }
}

// SAFETY: the mapping belongs to this value and is only accessed through it.
unsafe impl Send for State {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    /// What the next process finds, with a position of the file of its own.
    fn again(state: &State) -> Result<State, String> {
        State::restore(state.file.try_clone().unwrap().into())
    }

    fn output(state: &mut State) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        while state.output_len() > 0 {
            state.send(ours.as_fd(), 1000).unwrap();
        }
        drop(ours);
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn output_goes_on_at_the_byte_where_it_stopped() {
        let mut state = State::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (mut put, mut got) = (0u32, Vec::new());
        for step in 0..400usize {
            let bytes: Vec<u8> = (0..step % 97 * 11)
                .map(|i| (put as usize + i) as u8)
                .collect();
            put += bytes.len().min(state.output_room()) as u32;
            state.put_output(&bytes);
            if state.output_len() > 0 {
                state.send(ours.as_fd(), step % 1013 + 1).unwrap();
            }
            state = again(&state).unwrap();
            // The peer may take its time: what was sent does not change any more.
            if step % 7 == 0 {
                let mut part = vec![0; step * 3];
                theirs.set_nonblocking(true).unwrap();
                let n = theirs.read(&mut part).unwrap_or(0);
                got.extend_from_slice(&part[..n]);
            }
        }
        theirs.set_nonblocking(false).unwrap();
        while state.output_len() > 0 {
            state.send(ours.as_fd(), 4096).unwrap();
        }
        drop(ours);
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), put as usize);
        assert!(got.iter().enumerate().all(|(i, &byte)| byte == i as u8));
    }

    #[test]
    fn a_chain_goes_on_where_it_stopped() {
        let mut state = State::new().unwrap();
        state.put_output(b"before");
        state.begin_chain();
        state.put_output(b"chain");
        state.insert_output(b"help");
        let mut state = again(&state).unwrap();
        assert_eq!(state.chain_progress(), 5);
        assert_eq!(output(&mut state), b"beforechainhelp");
        state.begin_chain();
        assert_eq!(again(&state).unwrap().chain_progress(), 0);
    }

    #[test]
    fn a_file_tells_what_has_been_appended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let open = || {
            File::options()
                .create(true)
                .append(true)
                .open(&path)
                .unwrap()
        };
        let mut file = open();
        let mut state = State::new().unwrap();
        state.put_output(b"0123456789");
        assert_eq!(state.append(&file).unwrap(), 10);
        state.put_output(b"abcdef");
        // Killed after some of it was written, before and after the position was moved.
        for moved in [false, true] {
            state.record.appending = Some((file.metadata().unwrap().len(), state.sent));
            state.commit();
            file.write_all(if moved { b"ef" } else { b"abcd" }).unwrap();
            if moved {
                state.skip_output(2);
            }
            state = again(&state).unwrap();
            state.resolve_append(&open());
        }
        assert_eq!(state.output_len(), 0);
        assert_eq!(std::fs::read(path).unwrap(), b"0123456789abcdef");
    }

    #[test]
    fn input_is_received_once_and_given_once() {
        let mut state = State::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"typed").unwrap();
        let mut bytes = [0; READ_SIZE];
        // Killed after it was looked at, but not received: it comes from the socket again.
        assert_eq!(
            state
                .receive(Lane::Input, ours.as_fd(), &mut bytes)
                .unwrap(),
            5
        );
        state.store(RECEIVED[0], &b"typed".map(|byte| !byte));
        let mut state = again(&state).unwrap();
        assert!(state.uncounted(Lane::Input).is_empty());
        // Killed after it was received, before it was counted.
        theirs.write_all(b"again").unwrap();
        assert_eq!(
            state
                .receive(Lane::Input, ours.as_fd(), &mut bytes)
                .unwrap(),
            5
        );
        let mut state = again(&state).unwrap();
        assert_eq!(state.uncounted(Lane::Input), b"again");
        state.put_input(b"again", true);
        let mut state = again(&state).unwrap();
        assert!(state.uncounted(Lane::Input).is_empty() && state.escaped());
        // Killed before and after the used index moved.
        state.give(3, 8);
        let mut state = again(&state).unwrap();
        state.resolve_giving(7);
        assert_eq!(state.input_len(), 5);
        state.give(3, 8);
        let mut state = again(&state).unwrap();
        state.resolve_giving(8);
        let mut rest = [0; 10];
        assert_eq!(state.peek_input(0, &mut rest), 2);
        assert_eq!(&rest[..2], b"in");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut random = 88172645463325252u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut refused = 0;
        for round in 0..2000 {
            let state = State::new().unwrap();
            for i in 0..=2 * WORDS {
                let bits = if round % 2 == 0 { 64 } else { 12 };
                let word = next() >> (64 - bits) >> (next() % bits);
                state.word(i).store(word, Ordering::Relaxed);
            }
            (&state.file)
                .seek(SeekFrom::Start(next() % (2 * SIZE as u64)))
                .unwrap();
            match again(&state) {
                Ok(mut state) => {
                    state.resolve_giving(0);
                    state.resolve_append(&state.file.try_clone().unwrap());
                    state.put_output(&[1; 5000]);
                    state.put_input(&[2; 5000], false);
                    assert!(state.output_len() <= CAPACITY && state.input_len() <= CAPACITY);
                    state.skip_output(5000);
                    state.skip_input(5000);
                }
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 100 && refused < 2000, "{refused}");
        assert!(State::restore(File::open("/dev/null").unwrap().into()).is_err());
    }
}
