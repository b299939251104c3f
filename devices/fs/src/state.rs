//! What must outlive the process, in memory that the supervisor keeps for the next one.
//!
//! ```text
//!   header │ nodes: one record each │ handles: one record each │ journal: one entry per descriptor
//! ```
//!
//! The memory is a sealed memfd that is as long as its tables can ever be; what is not used takes
//! no pages. A process can be killed between any two instructions, so records become valid by one
//! last store and invalid by one first store. What is found at a start was written by a process that
//! the guest may have taken over: every number is checked before it is used.
//!
//! The journal makes an operation that changes something happen once, although the queue hands a
//! request that was in flight out again: see [`Entry`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::slice;
use std::sync::atomic::{Ordering, compiler_fence};

use crate::fuse::{ENTRY_OUT, NAME_MAX};
use crate::sys;

/// Nodes at most. The guest's kernel holds one for each file that it has in its caches.
pub const MAX_NODES: usize = 1 << 20;
/// Open files and directories at most.
pub const MAX_HANDLES: usize = 1 << 15;
/// Queues at most, with the one for urgent requests.
pub const MAX_QUEUES: usize = 17;
/// Entries of a queue at most.
pub const MAX_QUEUE_SIZE: usize = 1024;
/// Lookups that one request counts at most, for READDIRPLUS.
pub const MAX_COUNTED: usize = 64;
/// Longest reply that is recorded: an entry and a handle.
pub const MAX_RECORDED: usize = ENTRY_OUT + 16;

/// No node: the parent of one that has no name in the share any more.
pub const NOWHERE: u32 = u32::MAX;

const MAGIC: u64 = u64::from_ne_bytes(*b"anem-fs1");

/// Two numbers that identify a file on the host, device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(C)]
pub struct Ident {
    pub dev: u64,
    pub ino: u64,
}

impl Ident {
    pub fn of(stat: &libc::stat) -> Self {
        Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }
    }
}

/// The first page.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Header {
    magic: u64,
    /// Counted up with each mount: what is older in the journal is void.
    epoch: u32,
    /// Nodes from here on have never been used.
    nodes: u32,
    /// Handles from here on have never been used.
    handles: u32,
    /// The guest has a mount.
    mounted: u32,
}

/// A file that the guest knows.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Node {
    /// Not 0 while it is valid.
    pub used: u32,
    /// Which user of this record it is: part of the number that the guest has.
    pub generation: u32,
    /// How often the guest has been told of it and has not forgotten.
    pub lookups: u64,
    pub ident: Ident,
    /// `S_IFMT` bits.
    pub kind: u32,
    /// The directory in which it was seen, or [`NOWHERE`].
    pub parent: u32,
    pub name_len: u32,
    pub name: [u8; NAME_MAX + 1],
}

/// An open file or directory.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct HandleRecord {
    /// Not 0 while it is valid.
    pub used: u32,
    /// As in [`Node`].
    pub generation: u32,
    /// The file.
    pub node: u32,
    /// Flags it was opened with.
    pub flags: u32,
}

/// Where a request in the journal stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// It may have had its effect, or a part of it.
    Begun,
    /// It has ended with this reply: an error number, or the bytes after the header.
    Ended(Result<Vec<u8>, i32>),
}

/// One request in the journal. There is an entry for every descriptor that a chain can begin with, so
/// a request in flight has one of its own.
///
/// Order of the stores: `begin` (request, then `stage`), `seen` (what the names meant before), the
/// operation itself, lookups counted and handles made, `end` (reply, then `stage`). A request that
/// is found begun is carried out again with the knowledge of `seen`; what it counted and made is
/// taken back first. Counting comes before the note of it and forgetting after, so that a kill in
/// between leaves a node too long, never too short.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct EntryRecord {
    /// 0: nothing, 1: begun, 2: ended.
    stage: u32,
    epoch: u32,
    unique: u64,
    nodeid: u64,
    opcode: u32,
    /// 0: `seen` is not valid.
    has_seen: u32,
    seen: [Seen; 2],
    /// A handle that was made, or 0.
    handle: u64,
    counted: u32,
    counts: [u32; MAX_COUNTED],
    error: i32,
    reply_len: u32,
    reply: [u8; MAX_RECORDED],
}

/// What a name meant before an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Seen {
    /// Not 0 if there was something: this.
    pub there: u64,
    pub ident: Ident,
}

/// The next store does not come before those of the text above. The process that reads the memory
/// comes after this one has ended, so the compiler is all that could change the order.
pub fn before_the_next_store() {
    compiler_fence(Ordering::SeqCst);
}

const PAGE: usize = 4096;
const NODES_AT: usize = PAGE;
const HANDLES_AT: usize = NODES_AT + (MAX_NODES * size_of::<Node>()).next_multiple_of(PAGE);
const JOURNAL_AT: usize =
    HANDLES_AT + (MAX_HANDLES * size_of::<HandleRecord>()).next_multiple_of(PAGE);
/// Length of the memory.
pub const LENGTH: usize =
    JOURNAL_AT + (MAX_QUEUES * MAX_QUEUE_SIZE * size_of::<EntryRecord>()).next_multiple_of(PAGE);

/// The memory, mapped.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    fd: OwnedFd,
}

// SAFETY: the mapping belongs to this value until it is dropped.
unsafe impl Send for Mapping {}

impl Mapping {
    /// New memory, all zero.
    pub fn new() -> io::Result<Self> {
        let fd = sys::sealed_memory(c"anemone-fs", LENGTH)?;
        let mut mapping = Self::map(fd)?;
        mapping.header_mut().magic = MAGIC;
        Ok(mapping)
    }

    /// The memory of an earlier process.
    pub fn of_earlier(fd: OwnedFd) -> io::Result<Self> {
        if !sys::is_sealed_memory(&fd, LENGTH) {
            return Err(io::Error::other("it is not a memory of this version"));
        }
        let mapping = Self::map(fd)?;
        let header = mapping.header();
        let fits = header.nodes as usize <= MAX_NODES && header.handles as usize <= MAX_HANDLES;
        match header.magic == MAGIC && fits {
            true => Ok(mapping),
            false => Err(io::Error::other("its header makes no sense")),
        }
    }

    fn map(fd: OwnedFd) -> io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            let (none, number) = (ptr::null_mut(), fd.as_raw_fd());
            libc::mmap(none, LENGTH, rights, libc::MAP_SHARED, number, 0)
        };
        match start {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            start => Ok(Self {
                start: start.cast(),
                fd,
            }),
        }
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping begins with it. Nobody else has the memory mapped: the supervisor
        // only holds the descriptor, and the earlier process has ended.
        unsafe { &*self.start.cast() }
    }

    fn header_mut(&mut self) -> &mut Header {
        // SAFETY: as for `header`; `self` is borrowed alone.
        unsafe { &mut *self.start.cast() }
    }

    fn table<T>(&self, at: usize, count: usize) -> *mut [T] {
        debug_assert!(at + count * size_of::<T>() <= LENGTH && at.is_multiple_of(align_of::<T>()));
        // SAFETY: inside the mapping, by the constants above.
        ptr::slice_from_raw_parts_mut(unsafe { self.start.add(at) }.cast(), count)
    }

    /// Nodes that were ever used.
    pub fn nodes(&self) -> &[Node] {
        // SAFETY: as for `header`. Every bit pattern is a record.
        unsafe { &*self.table(NODES_AT, self.header().nodes as usize) }
    }

    /// Nodes that were ever used.
    pub fn nodes_mut(&mut self) -> &mut [Node] {
        // SAFETY: as for `nodes`; `self` is borrowed alone.
        unsafe { &mut *self.table(NODES_AT, self.header().nodes as usize) }
    }

    /// Handles that were ever used.
    pub fn handles(&self) -> &[HandleRecord] {
        // SAFETY: as for `nodes`.
        unsafe { &*self.table(HANDLES_AT, self.header().handles as usize) }
    }

    /// Handles that were ever used.
    pub fn handles_mut(&mut self) -> &mut [HandleRecord] {
        // SAFETY: as for `nodes_mut`.
        unsafe { &mut *self.table(HANDLES_AT, self.header().handles as usize) }
    }

    /// One more node; its number, or `None` if there are [`MAX_NODES`].
    pub fn add_node(&mut self) -> Option<u32> {
        let header = self.header_mut();
        let number = header.nodes;
        let fits = (number as usize) < MAX_NODES;
        header.nodes += u32::from(fits);
        fits.then_some(number)
    }

    /// One more handle; its number, or `None` if there are [`MAX_HANDLES`].
    pub fn add_handle(&mut self) -> Option<u32> {
        let header = self.header_mut();
        let number = header.handles;
        let fits = (number as usize) < MAX_HANDLES;
        header.handles += u32::from(fits);
        fits.then_some(number)
    }

    /// Whether the guest has a mount.
    pub fn mounted(&self) -> bool {
        self.header().mounted != 0
    }

    /// A mount begins or ends: the tables are empty and the journal is void.
    pub fn set_mounted(&mut self, mounted: bool) {
        let header = self.header_mut();
        header.nodes = 0;
        header.handles = 0;
        header.epoch = header.epoch.wrapping_add(1);
        header.mounted = mounted.into();
    }

    /// The journal's entry for a chain, if the queue can have such.
    pub fn entry(&self, queue: usize, head: u16) -> Option<Entry<'_>> {
        let head = usize::from(head);
        if queue >= MAX_QUEUES || head >= MAX_QUEUE_SIZE {
            return None;
        }
        let journal = self.table::<EntryRecord>(JOURNAL_AT, MAX_QUEUES * MAX_QUEUE_SIZE);
        Some(Entry {
            // SAFETY: the index is less than the number of entries.
            at: unsafe {
                journal
                    .cast::<EntryRecord>()
                    .add(queue * MAX_QUEUE_SIZE + head)
            },
            epoch: self.header().epoch,
            mapping: std::marker::PhantomData,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping of `map`, which nothing refers to any more.
        unsafe { libc::munmap(self.start.cast(), LENGTH) };
    }
}

/// A request in the journal. All accesses are volatile copies of numbers, so that they happen in the
/// order of the program, and every number is checked when it is used.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    at: *mut EntryRecord,
    epoch: u32,
    mapping: std::marker::PhantomData<&'a Mapping>,
}

macro_rules! field {
    ($entry:expr, $($field:tt)+) => {
        // SAFETY: the entry lies in the mapping, which is borrowed.
        unsafe { (&raw mut (*$entry.at).$($field)+) }
    };
}

impl Entry<'_> {
    fn get<T: Copy>(from: *mut T) -> T {
        // SAFETY: callers pass fields of the entry, numbers or arrays of them.
        unsafe { from.read_volatile() }
    }

    fn set<T: Copy>(to: *mut T, value: T) {
        // SAFETY: as for `get`.
        unsafe { to.write_volatile(value) };
        before_the_next_store();
    }

    /// A request begins.
    pub fn begin(&self, unique: u64, opcode: u32, nodeid: u64) {
        Self::set(field!(self, stage), 0);
        Self::set(field!(self, epoch), self.epoch);
        Self::set(field!(self, unique), unique);
        Self::set(field!(self, nodeid), nodeid);
        Self::set(field!(self, opcode), opcode);
        Self::set(field!(self, has_seen), 0);
        Self::set(field!(self, handle), 0);
        Self::set(field!(self, counted), 0);
        Self::set(field!(self, stage), 1);
    }

    /// Where this request stands, if it is in the entry.
    pub fn stage(&self, unique: u64, opcode: u32, nodeid: u64) -> Option<Stage> {
        let same = Self::get(field!(self, epoch)) == self.epoch
            && Self::get(field!(self, unique)) == unique
            && Self::get(field!(self, opcode)) == opcode
            && Self::get(field!(self, nodeid)) == nodeid;
        match Self::get(field!(self, stage)) {
            1 if same => Some(Stage::Begun),
            2 if same => Some(Stage::Ended(match Self::get(field!(self, error)) {
                0 => {
                    let reply = Self::get(field!(self, reply));
                    let length = Self::get(field!(self, reply_len)) as usize;
                    Ok(reply[..length.min(reply.len())].to_vec())
                }
                error => Err(error),
            })),
            _ => None,
        }
    }

    /// What the names meant before, if that was noted.
    pub fn seen(&self) -> Option<[Seen; 2]> {
        let valid = Self::get(field!(self, has_seen)) != 0;
        valid.then(|| Self::get(field!(self, seen)))
    }

    /// Notes what the names mean.
    pub fn see(&self, seen: [Seen; 2]) {
        Self::set(field!(self, seen), seen);
        Self::set(field!(self, has_seen), 1);
    }

    /// Notes that a lookup was counted.
    pub fn count(&self, node: u32) {
        let counted = Self::get(field!(self, counted));
        if let Some(index) = usize::try_from(counted).ok().filter(|&i| i < MAX_COUNTED) {
            Self::set(field!(self, counts[index]), node);
            Self::set(field!(self, counted), counted + 1);
        }
    }

    /// The lookups that were counted; they are the caller's to take back.
    pub fn take_counted(&self) -> Vec<u32> {
        let count = Self::get(field!(self, counted)) as usize;
        let counts = Self::get(field!(self, counts));
        Self::set(field!(self, counted), 0);
        slice::from_ref(&counts).as_flattened()[..count.min(MAX_COUNTED)].to_vec()
    }

    /// Notes the handle that is being made.
    pub fn make_handle(&self, handle: u64) {
        Self::set(field!(self, handle), handle);
    }

    /// The handle that was made, or 0; it is the caller's to close.
    pub fn take_handle(&self) -> u64 {
        let handle = Self::get(field!(self, handle));
        Self::set(field!(self, handle), 0);
        handle
    }

    /// The request has ended. A reply that is too long is not recorded: such a request is carried out again.
    pub fn end(&self, reply: Result<&[u8], i32>) {
        match reply {
            Ok(bytes) => {
                let mut record = [0; MAX_RECORDED];
                let Some(start) = record.get_mut(..bytes.len()) else {
                    return;
                };
                start.copy_from_slice(bytes);
                Self::set(field!(self, reply), record);
                Self::set(field!(self, reply_len), bytes.len() as u32);
                Self::set(field!(self, error), 0);
            }
            Err(error) => Self::set(field!(self, error), error),
        }
        Self::set(field!(self, stage), 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_outlives_a_mapping() {
        let mapping = Mapping::new().unwrap();
        let fd = mapping.as_fd().try_clone_to_owned().unwrap();
        let entry = mapping.entry(3, 1023).unwrap();
        assert_eq!(entry.stage(0, 0, 0), None);
        entry.begin(7, 9, 1);
        entry.see([
            Seen::default(),
            Seen {
                there: 1,
                ident: Ident { dev: 2, ino: 3 },
            },
        ]);
        entry.count(5);
        entry.count(6);
        entry.make_handle(77);
        drop(mapping);

        let again = Mapping::of_earlier(fd.try_clone().unwrap()).unwrap();
        let entry = again.entry(3, 1023).unwrap();
        assert_eq!(entry.stage(8, 9, 1), None, "another request");
        assert_eq!(entry.stage(7, 9, 1), Some(Stage::Begun));
        assert_eq!(entry.seen().unwrap()[1].ident.ino, 3);
        assert_eq!(entry.take_counted(), [5, 6]);
        assert_eq!(entry.take_counted(), [0u32; 0]);
        assert_eq!((entry.take_handle(), entry.take_handle()), (77, 0));
        entry.end(Ok(b"reply"));
        assert_eq!(
            entry.stage(7, 9, 1),
            Some(Stage::Ended(Ok(b"reply".to_vec())))
        );
        entry.end(Err(libc::ENOENT));
        assert_eq!(entry.stage(7, 9, 1), Some(Stage::Ended(Err(libc::ENOENT))));
        drop(again);

        let mut again = Mapping::of_earlier(fd).unwrap();
        again.set_mounted(true);
        assert_eq!(
            again.entry(3, 1023).unwrap().stage(7, 9, 1),
            None,
            "another mount"
        );
        assert!(again.entry(MAX_QUEUES, 0).is_none());
        assert!(again.entry(0, MAX_QUEUE_SIZE as u16).is_none());
    }

    #[test]
    fn tables_grow_to_their_ends() {
        let mut mapping = Mapping::new().unwrap();
        for number in 0..MAX_HANDLES as u32 {
            assert_eq!(mapping.add_handle(), Some(number));
        }
        assert_eq!(mapping.add_handle(), None);
        assert_eq!(mapping.handles().len(), MAX_HANDLES);
        assert_eq!(mapping.add_node(), Some(0));
        mapping.nodes_mut()[0].name[NAME_MAX] = 1;
        assert_eq!(mapping.nodes()[0].name[NAME_MAX], 1);
    }

    #[test]
    fn memory_of_another_kind_is_refused() {
        let short = sys::sealed_memory(c"test", LENGTH - PAGE).unwrap();
        assert!(Mapping::of_earlier(short).is_err());
        let empty = sys::sealed_memory(c"test", LENGTH).unwrap();
        assert!(Mapping::of_earlier(empty).is_err(), "no magic number");
        let file = tempfile::tempfile().unwrap();
        file.set_len(LENGTH as u64).unwrap();
        assert!(
            Mapping::of_earlier(file.into()).is_err(),
            "a file can be cut short"
        );
        let mut mapping = Mapping::new().unwrap();
        mapping.header_mut().nodes = MAX_NODES as u32 + 1;
        let fd = mapping.as_fd().try_clone_to_owned().unwrap();
        assert!(
            Mapping::of_earlier(fd).is_err(),
            "more nodes than there is room for"
        );
    }
}
