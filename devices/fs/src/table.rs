//! The files that the guest knows and those that it has open.
//!
//! A node has no descriptor: it is a name in a directory, and what is found there is compared with
//! the node's device and inode number. So a million nodes cost a million records and no descriptor,
//! and a process that takes over finds all of them again. Directories are open while they are in
//! use, in a cache. A file that the guest has open has a descriptor of its own, which the
//! supervisor keeps a copy of, so that it also stays when it loses its name.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::fuse::{NAME_MAX, ROOT};
use crate::state::{Entry, HandleRecord, Ident, MAX_HANDLES, Mapping, NOWHERE, Node};
use crate::sys::Outcome;

/// Directories that are kept open.
pub const DIRECTORIES: usize = 256;
/// Deepest directory below the root.
const MAX_DEPTH: usize = 2048;
/// Record of the root directory.
pub const ROOT_NODE: u32 = 0;

/// A directory in the cache.
#[derive(Debug)]
struct Directory {
    fd: Arc<OwnedFd>,
    /// When it was last used, by `Table::clock`.
    used: u64,
}

/// What is known of a node beside its record.
#[derive(Debug, Default, Clone, Copy)]
struct Bonds {
    /// Nodes whose parent it is.
    children: u32,
    /// Handles of it.
    handles: u32,
}

/// Where a node was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    pub parent: u32,
    pub name: CString,
}

/// An open file or directory.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Flags it was opened with.
    pub flags: u32,
    /// Absent after a restart if the supervisor had no copy.
    pub fd: Option<Arc<OwnedFd>>,
}

/// The tables.
#[derive(Debug)]
pub struct Table {
    mapping: Mapping,
    by_ident: HashMap<(Ident, u32), u32>,
    bonds: Vec<Bonds>,
    free_nodes: Vec<u32>,
    free_handles: Vec<u32>,
    fds: Vec<Option<Arc<OwnedFd>>>,
    directories: HashMap<u32, Directory>,
    clock: u64,
}

/// The number by which the guest knows a record: the generation above, the record below, from 1.
fn number(record: u32, generation: u32) -> u64 {
    (u64::from(generation) << 32) + u64::from(record) + 1
}

/// The record of a number, and its generation.
fn record_of(number: u64) -> Option<(u32, u32)> {
    let record = (number as u32).checked_sub(1)?;
    Some((record, (number >> 32) as u32))
}

fn is_directory(kind: u32) -> bool {
    kind == libc::S_IFDIR
}

impl Table {
    /// Tables in new memory.
    pub fn new(mapping: Mapping) -> Self {
        Self {
            mapping,
            by_ident: HashMap::new(),
            bonds: Vec::new(),
            free_nodes: Vec::new(),
            free_handles: Vec::new(),
            fds: Vec::new(),
            directories: HashMap::new(),
            clock: 0,
        }
    }

    /// The tables of an earlier process, checked, with the descriptors of its handles. `root` is the
    /// shared directory.
    ///
    /// # Errors
    /// What makes no sense in them, for the log.
    pub fn of_earlier(
        mapping: Mapping,
        mut kept: HashMap<u32, OwnedFd>,
        root: Ident,
    ) -> Result<Self, String> {
        let mut table = Self::new(mapping);
        let count = table.mapping.nodes().len();
        table.bonds = vec![Bonds::default(); count];
        for (number, node) in (0u32..).zip(table.mapping.nodes()) {
            if node.used == 0 {
                table.free_nodes.push(number);
                continue;
            }
            let what = |why: &str| format!("node {number} {why}");
            if node.kind & !libc::S_IFMT != 0 {
                return Err(what("is of no kind"));
            }
            if number == ROOT_NODE {
                if node.ident != root || !is_directory(node.kind) || node.parent != NOWHERE {
                    return Err(what("is not the shared directory"));
                }
            } else if node.parent != NOWHERE {
                let name = node.name.get(..node.name_len as usize);
                if !name.is_some_and(is_name) {
                    return Err(what("has no proper name"));
                }
                let parent = table.mapping.nodes().get(node.parent as usize);
                match parent {
                    Some(parent) if parent.used != 0 && is_directory(parent.kind) => {}
                    _ => return Err(what("is in no directory")),
                }
                let bonds = &mut table.bonds[node.parent as usize];
                bonds.children = bonds.children.saturating_add(1);
            }
            table.by_ident.insert((node.ident, node.kind), number);
        }
        if table.mapping.mounted() && table.mapping.nodes().first().is_none_or(|n| n.used == 0) {
            return Err("there is no root".to_owned());
        }
        let directories = 0..count as u32;
        for number in directories.filter(|&n| table.bonds[n as usize].children > 0) {
            if !table.leads_up(number, None) {
                return Err(format!("node {number} is in itself"));
            }
        }
        for (number, handle) in (0u32..).zip(table.mapping.handles()) {
            if handle.used == 0 {
                table.free_handles.push(number);
                table.fds.push(None);
                continue;
            }
            let node = table.mapping.nodes().get(handle.node as usize);
            if node.is_none_or(|node| node.used == 0) {
                return Err(format!("handle {number} is of no file"));
            }
            table.bonds[handle.node as usize].handles += 1;
            table.fds.push(kept.remove(&number).map(Arc::new));
        }
        // A kill has come between the making of a node and the word of it.
        for number in 0..count as u32 {
            table.free_if_unused(number);
        }
        table.free_nodes.reverse();
        table.free_handles.reverse();
        Ok(table)
    }

    /// The memory, for the supervisor to keep.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The journal's entry for a chain.
    pub fn entry(&self, queue: usize, head: u16) -> Option<Entry<'_>> {
        self.mapping.entry(queue, head)
    }

    /// Forgets everything, and knows the root if a mount begins. The numbers of the handles that
    /// were open are returned.
    pub fn start_over(&mut self, root: Option<Ident>) -> Vec<u32> {
        let open = (0u32..)
            .zip(self.mapping.handles())
            .filter(|(_, handle)| handle.used != 0)
            .map(|(number, _)| number)
            .collect();
        for node in self.mapping.nodes_mut() {
            node.used = 0;
        }
        for handle in self.mapping.handles_mut() {
            handle.used = 0;
        }
        self.mapping.set_mounted(root.is_some());
        self.by_ident.clear();
        self.bonds.clear();
        self.free_nodes.clear();
        self.free_handles.clear();
        self.fds.clear();
        self.directories.clear();
        if let Some(ident) = root
            && let Some(number) = self.mapping.add_node()
        {
            let node = &mut self.mapping.nodes_mut()[number as usize];
            *node = Node {
                used: 1,
                generation: 0,
                lookups: 1,
                ident,
                kind: libc::S_IFDIR,
                parent: NOWHERE,
                name_len: 0,
                name: [0; NAME_MAX + 1],
            };
            self.bonds.push(Bonds::default());
            self.by_ident.insert((ident, libc::S_IFDIR), number);
        }
        open
    }

    /// The record behind one of the guest's numbers.
    pub fn node(&self, nodeid: u64) -> Outcome<u32> {
        let (record, generation) = record_of(nodeid).ok_or(libc::ESTALE)?;
        let node = self.mapping.nodes().get(record as usize);
        match node {
            Some(node) if node.used != 0 && node.generation == generation => Ok(record),
            _ => Err(libc::ESTALE),
        }
    }

    /// The record of a valid node.
    pub fn record(&self, node: u32) -> &Node {
        &self.mapping.nodes()[node as usize]
    }

    fn record_mut(&mut self, node: u32) -> &mut Node {
        &mut self.mapping.nodes_mut()[node as usize]
    }

    /// The guest's number of a node.
    pub fn nodeid(&self, node: u32) -> u64 {
        match node {
            ROOT_NODE => ROOT,
            _ => number(node, self.record(node).generation),
        }
    }

    /// Where a node was last seen; the root is nowhere.
    pub fn location(&self, node: u32) -> Option<Location> {
        let record = self.record(node);
        if record.parent == NOWHERE {
            return None;
        }
        let name = record.name.get(..record.name_len as usize)?;
        Some(Location {
            parent: record.parent,
            name: CString::new(name).ok()?,
        })
    }

    /// Counts a lookup of what was found as `name` in `parent`, and notes it in the journal.
    pub fn look_up(
        &mut self,
        ident: Ident,
        kind: u32,
        parent: u32,
        name: &[u8],
        entry: Option<(usize, u16)>,
    ) -> Outcome<u32> {
        let number = match self.by_ident.get(&(ident, kind)) {
            Some(&number) => {
                self.place(number, parent, name);
                number
            }
            None => self.insert(ident, kind, parent, name)?,
        };
        let record = self.record_mut(number);
        record.lookups = record.lookups.checked_add(1).ok_or(libc::EOVERFLOW)?;
        if let Some(entry) = entry.and_then(|(queue, head)| self.mapping.entry(queue, head)) {
            entry.count(number);
        }
        Ok(number)
    }

    fn insert(&mut self, ident: Ident, kind: u32, parent: u32, name: &[u8]) -> Outcome<u32> {
        if !is_name(name) {
            return Err(libc::EINVAL);
        }
        let number = match self.free_nodes.pop() {
            Some(number) => number,
            None => {
                let number = self.mapping.add_node().ok_or(libc::ENFILE)?;
                self.bonds.push(Bonds::default());
                number
            }
        };
        let mut text = [0; NAME_MAX + 1];
        text[..name.len()].copy_from_slice(name);
        let record = self.record_mut(number);
        *record = Node {
            used: 0,
            generation: record.generation.wrapping_add(1),
            lookups: 0,
            ident,
            kind,
            parent,
            name_len: name.len() as u32,
            name: text,
        };
        crate::state::before_the_next_store();
        record.used = 1;
        self.bonds[number as usize] = Bonds::default();
        self.bonds[parent as usize].children += 1;
        self.by_ident.insert((ident, kind), number);
        Ok(number)
    }

    /// Notes where a node is now.
    fn place(&mut self, node: u32, parent: u32, name: &[u8]) {
        let record = self.record(node);
        let (old, known) = (record.parent, record.name.get(..record.name_len as usize));
        if node == ROOT_NODE || !is_name(name) || (old == parent && known == Some(name)) {
            return;
        }
        // A directory that seems to be below itself is one that the host shows in two places.
        if is_directory(record.kind) && !self.leads_up(parent, Some(node)) {
            return;
        }
        let record = self.record_mut(node);
        record.parent = NOWHERE;
        crate::state::before_the_next_store();
        record.name[..name.len()].copy_from_slice(name);
        record.name_len = name.len() as u32;
        crate::state::before_the_next_store();
        record.parent = parent;
        self.bonds[parent as usize].children += 1;
        if old != NOWHERE {
            self.bonds[old as usize].children -= 1;
            self.free_if_unused(old);
        }
    }

    /// Whether the way up from a node ends, and without passing `not`.
    fn leads_up(&self, mut node: u32, not: Option<u32>) -> bool {
        for _ in 0..MAX_DEPTH {
            if Some(node) == not {
                return false;
            }
            match self.record(node).parent {
                NOWHERE => return true,
                parent => node = parent,
            }
        }
        false
    }

    /// The name in this directory no longer means this file.
    pub fn lose(&mut self, ident: Ident, kind: u32, parent: u32, name: &[u8]) {
        let Some(&node) = self.by_ident.get(&(ident, kind)) else {
            return;
        };
        let record = self.record_mut(node);
        let here =
            record.parent == parent && record.name.get(..record.name_len as usize) == Some(name);
        if here {
            record.parent = NOWHERE;
            self.bonds[parent as usize].children -= 1;
            self.free_if_unused(parent);
        }
    }

    /// The file has another name now.
    pub fn moved(&mut self, ident: Ident, kind: u32, parent: u32, name: &[u8]) {
        if let Some(&node) = self.by_ident.get(&(ident, kind)) {
            self.place(node, parent, name);
        }
    }

    /// The guest forgets a node so many times.
    pub fn forget(&mut self, nodeid: u64, times: u64) {
        if let Ok(node) = self.node(nodeid)
            && node != ROOT_NODE
        {
            self.release(node, times);
        }
    }

    /// Takes a lookup back that was counted for a request which is to be carried out again.
    pub fn take_back(&mut self, node: u32) {
        let valid = self.mapping.nodes().get(node as usize);
        if valid.is_some_and(|record| record.used != 0) && node != ROOT_NODE {
            self.release(node, 1);
        }
    }

    fn release(&mut self, node: u32, times: u64) {
        let record = self.record_mut(node);
        record.lookups = record.lookups.saturating_sub(times);
        self.free_if_unused(node);
    }

    fn free_if_unused(&mut self, mut node: u32) {
        loop {
            let bonds = self.bonds[node as usize];
            let record = self.record_mut(node);
            let needed = record.lookups > 0 || bonds.children > 0 || bonds.handles > 0;
            if needed || record.used == 0 || node == ROOT_NODE {
                return;
            }
            record.used = 0;
            let (key, parent) = ((record.ident, record.kind), record.parent);
            if self.by_ident.get(&key) == Some(&node) {
                self.by_ident.remove(&key);
            }
            self.directories.remove(&node);
            self.free_nodes.push(node);
            if parent == NOWHERE {
                return;
            }
            self.bonds[parent as usize].children -= 1;
            node = parent;
        }
    }

    /// A directory that is open, if it is.
    pub fn directory(&mut self, node: u32) -> Option<Arc<OwnedFd>> {
        self.clock += 1;
        let directory = self.directories.get_mut(&node)?;
        directory.used = self.clock;
        Some(Arc::clone(&directory.fd))
    }

    /// Keeps a directory open, in place of the one that was not used for longest.
    pub fn keep_directory(&mut self, node: u32, fd: &Arc<OwnedFd>) {
        if self.directories.len() >= DIRECTORIES {
            let oldest = self.directories.iter().min_by_key(|(_, d)| d.used);
            if let Some((&oldest, _)) = oldest {
                self.directories.remove(&oldest);
            }
        }
        self.clock += 1;
        let (fd, used) = (Arc::clone(fd), self.clock);
        self.directories.insert(node, Directory { fd, used });
    }

    /// Takes a handle for a file that is being opened; its number for the guest, and that of its
    /// record.
    pub fn open(
        &mut self,
        node: u32,
        flags: u32,
        fd: Arc<OwnedFd>,
        entry: Option<(usize, u16)>,
    ) -> Outcome<(u64, u32)> {
        let record = match self.free_handles.pop() {
            Some(record) => record,
            None => {
                let record = self.mapping.add_handle().ok_or(libc::ENFILE)?;
                self.fds.push(None);
                record
            }
        };
        let handle = &mut self.mapping.handles_mut()[record as usize];
        let generation = handle.generation.wrapping_add(1);
        *handle = HandleRecord {
            used: 0,
            generation,
            node,
            flags,
        };
        let id = number(record, generation);
        if let Some(entry) = entry.and_then(|(queue, head)| self.mapping.entry(queue, head)) {
            entry.make_handle(id);
        }
        crate::state::before_the_next_store();
        self.mapping.handles_mut()[record as usize].used = 1;
        self.bonds[node as usize].handles += 1;
        self.fds[record as usize] = Some(fd);
        Ok((id, record))
    }

    fn handle_record(&self, fh: u64) -> Option<u32> {
        let (record, generation) = record_of(fh)?;
        let handle = self.mapping.handles().get(record as usize)?;
        (handle.used != 0 && handle.generation == generation).then_some(record)
    }

    /// An open file; it must be of this node.
    pub fn handle(&self, fh: u64, nodeid: u64) -> Outcome<(u32, Handle)> {
        let record = self.handle_record(fh).ok_or(libc::EBADF)?;
        let node = self.node(nodeid)?;
        let HandleRecord {
            node: of, flags, ..
        } = self.mapping.handles()[record as usize];
        if of != node {
            return Err(libc::EBADF);
        }
        let fd = self.fds[record as usize].clone();
        Ok((record, Handle { flags, fd }))
    }

    /// Gives a handle its descriptor back, after a restart.
    pub fn reopened(&mut self, record: u32, fd: &Arc<OwnedFd>) {
        if let Some(place) = self.fds.get_mut(record as usize) {
            *place = Some(Arc::clone(fd));
        }
    }

    /// A descriptor of an open handle of the node, one for writing if that is asked for.
    pub fn any_open(&self, node: u32, writing: bool) -> Option<Arc<OwnedFd>> {
        if self.bonds[node as usize].handles == 0 {
            return None;
        }
        self.mapping
            .handles()
            .iter()
            .zip(&self.fds)
            .filter(|(handle, _)| handle.used != 0 && handle.node == node)
            .filter(|(handle, _)| !writing || handle.flags & libc::O_ACCMODE as u32 != 0)
            .find_map(|(_, fd)| fd.clone())
    }

    /// Closes a handle; the number of its record, for what the supervisor keeps, and its
    /// descriptor, to be closed without the table's lock.
    pub fn close(&mut self, fh: u64) -> Outcome<(u32, Option<Arc<OwnedFd>>)> {
        let record = self.handle_record(fh).ok_or(libc::EBADF)?;
        let handle = &mut self.mapping.handles_mut()[record as usize];
        handle.used = 0;
        let node = handle.node;
        let fd = self.fds[record as usize].take();
        self.free_handles.push(record);
        self.bonds[node as usize].handles -= 1;
        self.free_if_unused(node);
        Ok((record, fd))
    }

    /// Nodes and handles in use.
    #[cfg(test)]
    fn in_use(&self) -> (usize, usize) {
        let nodes = self.mapping.nodes().iter().filter(|n| n.used != 0).count();
        let handles = self
            .mapping
            .handles()
            .iter()
            .filter(|h| h.used != 0)
            .count();
        (nodes, handles)
    }
}

const _: () = assert!(MAX_HANDLES < u32::MAX as usize);

/// Whether this can be the name of a directory entry.
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|&byte| byte == b'/' || byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u32 = libc::S_IFREG;
    const DIRECTORY: u32 = libc::S_IFDIR;

    fn ident(ino: u64) -> Ident {
        Ident { dev: 1, ino }
    }

    fn mounted() -> Table {
        let mut table = Table::new(Mapping::new().unwrap());
        assert!(table.start_over(Some(ident(1))).is_empty());
        table
    }

    fn again(table: Table) -> Result<Table, String> {
        let fd = table.mapping().as_fd().try_clone_to_owned().unwrap();
        drop(table);
        Table::of_earlier(Mapping::of_earlier(fd).unwrap(), HashMap::new(), ident(1))
    }

    fn open_file() -> Arc<OwnedFd> {
        Arc::new(tempfile::tempfile().unwrap().into())
    }

    #[test]
    fn a_node_lives_as_long_as_something_needs_it() {
        let mut table = mounted();
        let dir = table
            .look_up(ident(2), DIRECTORY, ROOT_NODE, b"dir", None)
            .unwrap();
        let file = table.look_up(ident(3), FILE, dir, b"file", None).unwrap();
        assert_eq!(table.look_up(ident(3), FILE, dir, b"file", None), Ok(file));
        let (dir_id, file_id) = (table.nodeid(dir), table.nodeid(file));
        table.forget(dir_id, 1);
        assert_eq!(table.node(dir_id), Ok(dir), "its child keeps it");
        let (fh, _) = table.open(file, 0, open_file(), None).unwrap();
        table.forget(file_id, u64::MAX);
        assert_eq!(table.node(file_id), Ok(file), "its handle keeps it");
        table.close(fh).unwrap();
        assert_eq!(
            (table.node(file_id), table.node(dir_id)),
            (Err(libc::ESTALE), Err(libc::ESTALE))
        );
        assert_eq!(table.close(fh).unwrap_err(), libc::EBADF);
        assert_eq!(table.in_use(), (1, 0));
        let other = table
            .look_up(ident(9), FILE, ROOT_NODE, b"x", None)
            .unwrap();
        assert_ne!(table.nodeid(other), dir_id);
        assert_ne!(table.nodeid(other), file_id, "a number is not used again");
        table.forget(ROOT, 5);
        assert_eq!(table.node(ROOT), Ok(ROOT_NODE));
    }

    #[test]
    fn names_change_and_go() {
        let mut table = mounted();
        let dir = table
            .look_up(ident(2), DIRECTORY, ROOT_NODE, b"dir", None)
            .unwrap();
        let file = table.look_up(ident(3), FILE, dir, b"a", None).unwrap();
        table.moved(ident(3), FILE, ROOT_NODE, b"b");
        let place = |parent, name: &str| {
            Some(Location {
                parent,
                name: CString::new(name).unwrap(),
            })
        };
        assert_eq!(table.location(file), place(ROOT_NODE, "b"));
        table.lose(ident(3), FILE, dir, b"a");
        assert_eq!(
            table.location(file),
            place(ROOT_NODE, "b"),
            "that was another name"
        );
        table.lose(ident(3), FILE, ROOT_NODE, b"b");
        assert_eq!(table.location(file), None);
        table.look_up(ident(3), FILE, dir, b"c", None).unwrap();
        assert_eq!(table.location(file), place(dir, "c"));
        // A directory never gets below itself, whatever the host shows.
        let inner = table
            .look_up(ident(4), DIRECTORY, dir, b"inner", None)
            .unwrap();
        table
            .look_up(ident(2), DIRECTORY, inner, b"loop", None)
            .unwrap();
        assert_eq!(table.location(dir), place(ROOT_NODE, "dir"));
        table
            .look_up(ident(1), DIRECTORY, inner, b"root", None)
            .unwrap();
        assert_eq!(table.location(ROOT_NODE), None);
        // An inode number that the host has used again for a file of another kind.
        let link = table
            .look_up(ident(3), libc::S_IFLNK, dir, b"c", None)
            .unwrap();
        assert_ne!(link, file);
    }

    #[test]
    fn everything_is_there_after_a_kill() {
        let mut table = mounted();
        let dir = table
            .look_up(ident(2), DIRECTORY, ROOT_NODE, b"dir", None)
            .unwrap();
        let gone = table
            .look_up(ident(5), FILE, ROOT_NODE, b"gone", None)
            .unwrap();
        let file = table.look_up(ident(3), FILE, dir, b"file", None).unwrap();
        let (fh, record) = table.open(file, 2, open_file(), None).unwrap();
        let ids = (table.nodeid(dir), table.nodeid(file));
        let gone_id = table.nodeid(gone);
        table.forget(gone_id, 1);

        let fd = table.mapping().as_fd().try_clone_to_owned().unwrap();
        drop(table);
        let kept = HashMap::from([(record, tempfile::tempfile().unwrap().into())]);
        let mut table =
            Table::of_earlier(Mapping::of_earlier(fd).unwrap(), kept, ident(1)).unwrap();
        assert!(table.mapping.mounted());
        assert_eq!((table.node(ids.0), table.node(ids.1)), (Ok(dir), Ok(file)));
        assert_eq!(table.location(file).unwrap().parent, dir);
        let (_, handle) = table.handle(fh, ids.1).unwrap();
        assert_eq!((handle.flags, handle.fd.is_some()), (2, true));
        assert!(table.any_open(file, true).is_some() && table.any_open(dir, false).is_none());
        assert_eq!(
            table.handle(fh, ids.0).unwrap_err(),
            libc::EBADF,
            "of another file"
        );
        table.forget(ids.0, 1);
        table.forget(ids.1, 1);
        table.close(fh).unwrap();
        assert_eq!(table.in_use(), (1, 0));
        let next = table
            .look_up(ident(8), FILE, ROOT_NODE, b"x", None)
            .unwrap();
        assert!(next <= file, "records are used again");
    }

    #[test]
    fn a_hostile_predecessor_is_found_out() {
        type Harm = fn(&mut Table);
        let harms: [(&str, Harm); 8] = [
            ("kind", |t| t.record_mut(1).kind = 7),
            ("name", |t| t.record_mut(1).name[0] = b'/'),
            ("name", |t| t.record_mut(1).name_len = 400),
            ("directory", |t| t.record_mut(1).parent = 99),
            ("directory", |t| t.record_mut(1).parent = 2),
            ("in itself", |t| {
                (t.record_mut(1).parent, t.record_mut(3).parent) = (3, 1)
            }),
            ("shared directory", |t| t.record_mut(0).ident = ident(7)),
            ("of no file", |t| t.mapping.handles_mut()[0].node = 1000),
        ];
        for (part, harm) in harms {
            let mut table = mounted();
            let dir = table
                .look_up(ident(2), DIRECTORY, ROOT_NODE, b"dir", None)
                .unwrap();
            let file = table.look_up(ident(3), FILE, dir, b"file", None).unwrap();
            table
                .look_up(ident(4), DIRECTORY, dir, b"inner", None)
                .unwrap();
            table.open(file, 0, open_file(), None).unwrap();
            harm(&mut table);
            let error = again(table).unwrap_err();
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(again(mounted()).is_ok());
    }

    #[test]
    fn names_that_lead_elsewhere_are_none() {
        for name in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0", &[b'x'; 256]] {
            assert!(!is_name(name), "{name:?}");
        }
        for name in [&b"..."[..], b".a", b"a b", &[b'x'; 255], b"\xff"] {
            assert!(is_name(name), "{name:?}");
        }
    }
}
