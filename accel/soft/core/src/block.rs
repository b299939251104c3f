//! Blocks of decoded operations and how they are found.
//!
//! A block is the code from one address to the next instruction that changes the flow, at most to
//! the end of its page. It is kept by guest-physical address and mode and knows nothing of its
//! linear address, so a page mapped twice is decoded once. Three ways lead to a block:
//!
//! 1. a link from the block before, for direct jumps;
//! 2. the jump cache, by linear address, for returns and indirect jumps;
//! 3. translation of the address, then the table by physical address; then decoding.
//!
//! The first two hold only while translations do: they carry the epoch, a number that
//! changes whenever the guest changes its address space.
//!
//! A block whose code was overwritten is taken out of the table, a new epoch forgets the links to
//! it, and its operations are replaced by one that leaves the block, in case it is running.

use std::cell::Cell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr::NonNull;
use std::rc::Rc;

use anemone_soft_mmu::PAGE_SIZE;
use anemone_soft_native::Thunk;
use iced_x86::Instruction;

use crate::code::Written;
use crate::cpu::{Cpu, Exec};

/// How an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    /// Go on with the next operation.
    Next,
    /// The block is over, [`Cpu::rip`] is the address after it.
    Fall,
    /// A direct jump was taken to [`Cpu::rip`].
    Taken,
    /// [`Cpu::rip`] is set, to anywhere.
    Indirect,
    /// The machine state changed: look at everything before going on at [`Cpu::rip`].
    Leave,
    /// The instruction did not complete: [`Cpu::stopped`].
    Trap,
}

/// Carries out an operation.
pub(crate) type OpFn = fn(&mut Cpu, &Op) -> Step;

/// Carries out an instruction that has no fast operation. [`Cpu::rip`] and [`Cpu::next`] are set.
pub(crate) type Handler = fn(&mut Cpu, &Instruction) -> Exec;

/// One decoded instruction. What the fields mean is up to the function.
pub(crate) struct Op {
    pub run: Cell<OpFn>,
    /// Immediate, jump target relative to the block, or the address of a [`Whole`].
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: i64,
    /// Base register of the memory operand, [`crate::cpu::reg::ZERO`] for none.
    pub base: u8,
    /// Index register, likewise.
    pub index: u8,
    /// log2 of the index's factor.
    pub scale: u8,
    /// Segment register of the memory operand.
    pub segment: u8,
    /// Destination register.
    pub dst: u8,
    /// Source register.
    pub src: u8,
    /// Length of the instruction in bytes.
    pub length: u8,
    /// For direct jumps and the end of the block: number of the link.
    pub extra: u8,
    /// Bytes from the block's first instruction to this one.
    pub offset: u16,
}

/// An instruction that is carried out as a whole by a handler or a thunk.
pub(crate) struct Whole {
    pub instruction: Instruction,
    pub handler: Handler,
    pub thunk: Option<Thunk>,
    /// First bytes of the instruction, for messages and the x87 environment.
    pub bytes: [u8; 15],
}

/// What the decoding of a block depends on, besides its bytes. Bits: see [`Cpu::mode_key`].
pub(crate) type ModeKey = u32;

pub(crate) struct Link {
    epoch: Cell<u64>,
    rip: Cell<u64>,
    block: Cell<Option<NonNull<Block>>>,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            epoch: Cell::new(0),
            rip: Cell::new(0),
            block: Cell::new(None),
        }
    }
}

impl Link {
    #[inline(always)]
    pub(crate) fn get(&self, epoch: u64, rip: u64) -> Option<NonNull<Block>> {
        if self.epoch.get() == epoch && self.rip.get() == rip {
            self.block.get()
        } else {
            None
        }
    }

    pub(crate) fn set(&self, epoch: u64, rip: u64, block: NonNull<Block>) {
        self.epoch.set(epoch);
        self.rip.set(rip);
        self.block.set(Some(block));
    }
}

pub(crate) struct Block {
    /// Guest-physical address of the first byte.
    pub physical: u64,
    pub mode: ModeKey,
    /// The code, to compare when memory may have changed behind the CPU's back.
    pub bytes: Box<[u8]>,
    pub ops: Box<[Op]>,
    /// What the operations point at.
    pub wholes: Box<[Box<Whole>]>,
    /// Guest-physical address of the second page, if the one instruction of the block crosses.
    pub second: Option<u64>,
    /// Version of its page now, and when its bytes were last compared.
    pub version: Rc<Cell<u32>>,
    pub checked: Cell<u32>,
    /// For [`Step::Fall`] and [`Step::Taken`], by [`Op::extra`].
    pub links: Box<[Link]>,
}

impl Block {
    /// Whether the bytes must be compared with memory; if so, notes that they are being.
    pub(crate) fn is_suspect(&self) -> bool {
        let version = self.version.get();
        self.checked.replace(version) != version
    }
}

#[derive(Default)]
struct Page {
    blocks: Vec<NonNull<Block>>,
    /// Raised when memory may have changed unseen.
    version: Rc<Cell<u32>>,
}

/// Hashes physical addresses, which the guest may choose: a bad choice costs it time only.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|b| self.write_u64((*b).into()));
    }
    fn write_u64(&mut self, value: u64) {
        // The table takes its place from the low bits and a tag from the high ones.
        let mixed = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ mixed >> 32;
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<AddressHasher>>;

/// Number of entries of the jump cache and of the table by physical address.
const CACHE: usize = 4096;
const TABLE: usize = 1 << 16;

/// Bytes of blocks after which all are dropped.
const LIMIT: usize = 96 << 20;

/// The blocks of one CPU.
pub(crate) struct Blocks {
    /// Changes with every change of translation.
    pub epoch: u64,
    cache: Box<[Link]>,
    table: Box<[Option<NonNull<Block>>]>,
    all: Map<(u64, ModeKey), NonNull<Block>>,
    pages: Map<u64, Page>,
    /// Taken out of the tables, still pointed at by links or by the CPU.
    dead: Vec<NonNull<Block>>,
    size: usize,
}

impl Default for Blocks {
    fn default() -> Self {
        Self {
            epoch: 1,
            cache: (0..CACHE).map(|_| Link::default()).collect(),
            table: vec![None; TABLE].into(),
            all: Map::default(),
            pages: Map::default(),
            dead: Vec::new(),
            size: 0,
        }
    }
}

fn slot(physical: u64, mode: ModeKey) -> usize {
    let mixed = physical ^ physical >> 16 ^ u64::from(mode) << 7;
    mixed as usize & (TABLE - 1)
}

fn cache_slot(rip: u64) -> usize {
    (rip ^ rip >> 12) as usize & (CACHE - 1)
}

fn page_of(physical: u64) -> u64 {
    physical & !(PAGE_SIZE - 1)
}

impl Blocks {
    /// The jump cache's answer for an address. The mode is part of the question: at another
    /// privilege level the translation may not be allowed.
    #[inline(always)]
    pub(crate) fn cached(&self, rip: u64, mode: ModeKey) -> Option<NonNull<Block>> {
        let block = self.cache[cache_slot(rip)].get(self.epoch, rip)?;
        // SAFETY: an entry of this epoch is not freed: `collect` begins a new one.
        (unsafe { block.as_ref() }.mode == mode).then_some(block)
    }

    pub(crate) fn remember(&self, rip: u64, block: NonNull<Block>) {
        self.cache[cache_slot(rip)].set(self.epoch, rip, block);
    }

    /// Translations changed.
    #[inline]
    pub(crate) fn new_epoch(&mut self) {
        self.epoch += 1;
    }

    /// Looks a block up by physical address.
    pub(crate) fn find(&mut self, physical: u64, mode: ModeKey) -> Option<NonNull<Block>> {
        let at = slot(physical, mode);
        if let Some(block) = self.table[at] {
            // SAFETY: blocks in the table are alive.
            let b = unsafe { block.as_ref() };
            if b.physical == physical && b.mode == mode {
                return Some(block);
            }
        }
        let block = *self.all.get(&(physical, mode))?;
        self.table[at] = Some(block);
        Some(block)
    }

    /// The version of a page for a new block on it.
    pub(crate) fn version(&mut self, physical: u64) -> Rc<Cell<u32>> {
        self.pages
            .entry(page_of(physical))
            .or_default()
            .version
            .clone()
    }

    /// Enters a new block.
    pub(crate) fn insert(&mut self, block: Block) -> NonNull<Block> {
        self.size += size_of::<Block>()
            + block.ops.len() * size_of::<Op>()
            + block.wholes.len() * size_of::<Whole>()
            + 64;
        let (physical, mode, second) = (block.physical, block.mode, block.second);
        let block = NonNull::from(Box::leak(Box::new(block)));
        // Both halves of the instruction may lie in one page that is mapped twice.
        let other = second.filter(|at| page_of(*at) != page_of(physical));
        for at in [Some(physical), other].into_iter().flatten() {
            let page = self.pages.entry(page_of(at)).or_default();
            page.blocks.push(block);
        }
        self.table[slot(physical, mode)] = Some(block);
        self.all.insert((physical, mode), block);
        block
    }

    /// Memory of the page may have changed without a write of a CPU.
    pub(crate) fn suspect(&mut self, physical: u64) {
        if let Some(page) = self.pages.get(&page_of(physical)) {
            page.version.set(page.version.get().wrapping_add(1));
        }
    }

    /// Takes a block out of use. Its memory stays until [`collect`](Self::collect).
    pub(crate) fn drop_block(&mut self, block: NonNull<Block>) {
        // Links and the jump cache may know it.
        self.new_epoch();
        // SAFETY: blocks are freed by `collect` only.
        let b = unsafe { block.as_ref() };
        for op in &b.ops {
            op.run.set(leave);
        }
        let at = slot(b.physical, b.mode);
        if self.table[at] == Some(block) {
            self.table[at] = None;
        }
        if self.all.get(&(b.physical, b.mode)) == Some(&block) {
            self.all.remove(&(b.physical, b.mode));
        }
        for page in [Some(b.physical), b.second].into_iter().flatten() {
            if let Some(page) = self.pages.get_mut(&page_of(page)) {
                page.blocks.retain(|other| *other != block);
            }
        }
        self.dead.push(block);
    }

    /// Drops the blocks whose code was written.
    pub(crate) fn drop_written(&mut self, written: Written) {
        let Some(page) = self.pages.get(&page_of(written.physical)) else {
            return;
        };
        let start = written.physical;
        let end = start + written.length as u64;
        let hit: Vec<_> = page
            .blocks
            .iter()
            .copied()
            .filter(|block| {
                // SAFETY: blocks of a page are alive.
                let b = unsafe { block.as_ref() };
                let crosses = b.second.is_some_and(|s| page_of(s) == page_of(start));
                crosses || b.physical < end && start < b.physical + b.bytes.len() as u64
            })
            .collect();
        for block in hit {
            self.drop_block(block);
        }
    }

    /// Whether there is so much that [`collect`](Self::collect) should be called.
    #[inline(always)]
    pub(crate) fn is_full(&self) -> bool {
        self.size > LIMIT
    }

    /// Drops everything. No block may be running.
    pub(crate) fn collect(&mut self) {
        self.new_epoch();
        self.table.fill(None);
        self.pages.clear();
        let live = self.all.drain().map(|(_, block)| block);
        for block in live.chain(self.dead.drain(..)) {
            // SAFETY: it came from a box, is in one of the two lists, once, and nothing points at
            // it any more: links carry an older epoch.
            drop(unsafe { Box::from_raw(block.as_ptr()) });
        }
        self.size = 0;
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.collect();
    }
}

/// The operation of a block that is out of use: look the code up again from here.
fn leave(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.rip = cpu.at(op);
    Step::Leave
}
