//! A guest for tests that compare instructions with the host's CPU.

use std::sync::{Arc, Mutex};

use anemone_accel_api::{Bus, MemorySlot, Segment};
use anemone_soft_apic::{Apics, Platform};
use anemone_soft_mmu::{Memory, Paging, cr0, cr4, efer};
use anemone_soft_native::Flags;
use iced_x86::RflagsBits;

use crate::block::Step;
use crate::clock::Clock;
use crate::code::CodeRegistry;
use crate::cpu::{Config, Cpu, Exception, Shared, Stopped, reg, seg};
use crate::signals::Signals;
use crate::system::cpuid::{Cpuid, offered};

#[path = "../../../native/tests/harness/generate.rs"]
pub(super) mod generate;
#[path = "../../../native/tests/harness/native.rs"]
#[allow(clippy::unwrap_used, clippy::undocumented_unsafe_blocks)]
pub(super) mod native;

use native::Block;

pub(super) const PAGE: usize = 4096;
/// Guest memory, one slot at 0.
pub(super) const MEMORY: usize = 2 << 20;
/// Code, linear and physical.
pub(super) const CODE: u64 = 0x1_0000;
pub(super) const CODE_END: u64 = 0x3_0000;
/// The two pages of operands, linear and physical.
pub(super) const DATA: u64 = 0x6_0000;
/// A physical page where the bus is.
pub(super) const OUTSIDE: u64 = 1 << 32;
/// Page table of the lowest 2 MiB.
pub(super) const TABLE: u64 = 0x4000;

/// Host pages of their own.
pub(super) struct Pages {
    pub(super) base: *mut u8,
    length: usize,
}

impl Pages {
    pub(super) fn new(length: usize) -> Self {
        // SAFETY: a new mapping.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self {
            base: base.cast(),
            length,
        }
    }

    pub(super) fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.length);
        // SAFETY: within the mapping, which no reference covers.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    pub(super) fn read(&self, at: usize, length: usize) -> Vec<u8> {
        assert!(at + length <= self.length);
        let mut bytes = vec![0; length];
        // SAFETY: within the mapping, which no reference covers.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), bytes.as_mut_ptr(), length) };
        bytes
    }

    pub(super) fn protect(&self, at: usize, protection: libc::c_int) {
        // SAFETY: an own page; only the tests' instructions touch it, under a handler.
        let done = unsafe { libc::mprotect(self.base.add(at).cast(), PAGE, protection) };
        assert_eq!(done, 0);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: an own mapping.
        unsafe { libc::munmap(self.base.cast(), self.length) };
    }
}

pub(super) struct Nobody;

impl Platform for Nobody {
    fn wake(&self, _: u32) {}
    fn end_of_interrupt(&self, _: u8) {}
}

/// A device that is a page of memory.
pub(super) struct Device(pub(super) Mutex<[u8; PAGE]>);

impl Bus for Device {
    fn port_read(&self, _: u16, _: &mut [u8]) {}
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        let at = (address - OUTSIDE) as usize;
        data.copy_from_slice(&self.0.lock().unwrap()[at..at + data.len()]);
    }
    fn mmio_write(&self, address: u64, data: &[u8]) {
        let at = (address - OUTSIDE) as usize;
        self.0.lock().unwrap()[at..at + data.len()].copy_from_slice(data);
    }
}

/// A CPU at privilege level 0 with paging, and its memory.
pub(super) struct Guest {
    pub(super) cpu: Cpu,
    pub(super) device: Box<Device>,
    pub(super) memory: Pages,
    /// Linear address of the next instruction.
    pub(super) cursor: u64,
    /// Linear address at which the code segment begins.
    pub(super) code_base: u64,
}

/// What the second page of operands is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Second {
    Memory,
    ReadOnly,
    Absent,
    Device,
}

impl Guest {
    pub(super) fn new() -> Self {
        let memory = Pages::new(MEMORY);
        let signals = vec![Arc::new(Signals::default())];
        let code = CodeRegistry::new(&signals);
        let slots = Memory::new(code.clone());
        let slot = MemorySlot {
            slot: 0,
            guest: 0,
            size: MEMORY as u64,
            host: memory.base,
            read_only: false,
            log_dirty: false,
        };
        // SAFETY: the pages are dropped after the CPU.
        unsafe { slots.add_slot(slot).unwrap() };
        let features = anemone_soft_apic::Features {
            physical_bits: 40,
            x2apic: true,
            tsc_deadline: true,
        };
        let apics = Apics::new(1, features, Box::new(Nobody));
        let apic = apics.create(0).unwrap();
        let shared = Arc::new(Shared {
            memory: slots,
            apics,
            code,
            clock: Clock::new(),
            signals,
        });
        let cpuid = Cpuid::new(offered());
        let mut cpu = Cpu::new(Config {
            shared,
            index: 0,
            apic,
            cpuid,
            code: crate::code_memory().unwrap(),
        })
        .unwrap();
        let entry = |at: u64, value: u64| memory.write(at as usize, &value.to_le_bytes());
        entry(0x1000, 0x2000 | 7);
        entry(0x2000, 0x3000 | 7);
        entry(0x3000, TABLE | 7);
        for page in 0..512 {
            entry(TABLE + 8 * page, page << 12 | 7);
        }
        let device = Box::new(Device(Mutex::new([0; PAGE])));
        let bus: *const dyn Bus = &*device;
        cpu.bus = std::ptr::NonNull::new(bus.cast_mut());
        cpu.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::MP;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.efer = efer::LME | efer::LMA;
        cpu.xcr0 = 7;
        cpu.mmu
            .set_paging(Paging {
                cr0: cpu.cr0,
                cr3: 0x1000,
                cr4: cpu.cr4,
                efer: cpu.efer,
            })
            .unwrap();
        let mut guest = Self {
            cpu,
            device,
            memory,
            cursor: CODE,
            code_base: 0,
        };
        guest.segment(seg::CS, 0xB, |cs| cs.long = true);
        for number in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            guest.segment(number, 3, |_| {});
        }
        guest
    }

    pub(super) fn segment(&mut self, number: usize, kind: u8, change: impl Fn(&mut Segment)) {
        let mut segment = Segment {
            limit: u32::MAX,
            kind,
            present: true,
            code_or_data: true,
            ..Segment::default()
        };
        change(&mut segment);
        self.cpu.set_segment(number, segment);
    }

    /// Makes the second page of operands something else.
    pub(super) fn second(&mut self, second: Second) {
        let page = DATA + PAGE as u64;
        let entry = match second {
            Second::Memory => page | 7,
            Second::ReadOnly => page | 5,
            Second::Absent => 0,
            Second::Device => OUTSIDE | 7,
        };
        self.memory
            .write((TABLE + 8 * (page >> 12)) as usize, &entry.to_le_bytes());
        self.cpu.mmu.invlpg(page);
    }

    /// Executes one instruction.
    pub(super) fn run(&mut self, bytes: &[u8]) -> Result<(), Exception> {
        if self.cursor == CODE_END {
            self.cpu.blocks.collect();
            self.cursor = CODE;
        }
        let mut padded = [0x90; 16];
        padded[..bytes.len()].copy_from_slice(bytes);
        self.memory.write(self.cursor as usize, &padded);
        let cpu = &mut self.cpu;
        cpu.rip = self.cursor - self.code_base;
        self.cursor += 16;
        let block = cpu.block(cpu.mode_key(true)).unwrap();
        // SAFETY: blocks live until they are collected, above.
        let op = unsafe { &block.as_ref().ops[0] };
        assert_eq!(usize::from(op.length), bytes.len(), "{bytes:02x?}");
        cpu.leave_block = false;
        cpu.set_gpr(reg::BLOCK, cpu.rip);
        match (op.run.get())(cpu, op) {
            Step::Next => Ok(()),
            Step::Trap => match cpu.stopped.take() {
                Some(Stopped::Exception(exception)) => Err(exception),
                other => panic!("{bytes:02x?}: {other:?}"),
            },
            other => panic!("{bytes:02x?}: {other:?}"),
        }
    }

    pub(super) fn load(&mut self, block: &Block) {
        for (number, value) in block.gpr.iter().enumerate() {
            self.cpu.set_gpr(number, *value);
        }
        self.cpu.set_flags(Flags::from_rflags(block.rflags));
        self.cpu.native.load_xsave_image(&block.area.0).unwrap();
    }

    pub(super) fn operands(&self, second: Second) -> Vec<u8> {
        let mut bytes = self.memory.read(DATA as usize, 2 * PAGE);
        if second == Second::Device {
            bytes[PAGE..].copy_from_slice(&*self.device.0.lock().unwrap());
        }
        bytes
    }

    pub(super) fn set_operands(&mut self, second: Second, bytes: &[u8]) {
        self.memory.write(DATA as usize, bytes);
        if second == Second::Device {
            self.device
                .0
                .lock()
                .unwrap()
                .copy_from_slice(&bytes[PAGE..]);
            self.memory.write(DATA as usize + PAGE, &[0xA5; PAGE]);
        }
    }
}

/// The decoder's flag bits as bits of RFLAGS.
pub(super) fn arithmetic(bits: u32) -> u64 {
    let map = [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ];
    map.iter()
        .filter(|(bit, _)| bits & bit != 0)
        .map(|(_, at)| 1 << at)
        .sum()
}
