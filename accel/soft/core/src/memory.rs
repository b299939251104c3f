//! Segmented memory accesses.

use anemone_accel_api::Bus;
use anemone_soft_mmu::{Atomic, Context, Fault, Mmio, Value, bus_pieces, is_canonical};

use crate::cpu::{Cpu, Exception, Exec, seg, vector};
use crate::signals::ATTENTION_CODE;

/// The bus, with the local APIC's page in front of it.
struct Outside<'a> {
    cpu: &'a mut Cpu,
}

impl Cpu {
    /// The linear address of `size` bytes at `offset` in a segment, with the checks of
    /// segmentation (SDM volume 3, 5.3 to 5.5). In 64-bit mode there are none here: the MMU
    /// refuses addresses that are not canonical.
    #[inline(always)]
    pub(crate) fn linear(
        &mut self,
        segment: usize,
        offset: u64,
        size: usize,
        write: bool,
    ) -> Exec<u64> {
        if self.is_64bit() {
            return Ok(self.bases[segment].wrapping_add(offset));
        }
        self.linear_legacy(segment, offset, size, write)
    }

    fn linear_legacy(&mut self, number: usize, offset: u64, size: usize, write: bool) -> Exec<u64> {
        let segment = &self.segments[number];
        let last = offset.wrapping_add(size as u64 - 1);
        let limit = u64::from(segment.limit);
        let code = segment.kind & 8 != 0;
        let mut good = if !code && segment.kind & 4 != 0 {
            // Expand-down: above the limit, up to 64 KiB or 4 GiB.
            let top = if segment.big { 0xFFFF_FFFF } else { 0xFFFF };
            offset > limit && last <= top && offset <= last
        } else {
            last <= limit && offset <= last
        };
        if !self.real_segments() {
            let segment = &self.segments[number];
            // A null selector leaves the segment unusable, which is a segment not present here.
            good &= segment.present;
            good &= if write {
                !code && segment.kind & 2 != 0
            } else {
                !code || segment.kind & 2 != 0
            };
        }
        if !good {
            let which = if number == seg::SS {
                vector::SS
            } else {
                vector::GP
            };
            return Err(self.raise(Exception::with(which, 0)));
        }
        Ok(self.segments[number].base.wrapping_add(offset) & 0xFFFF_FFFF)
    }

    /// Loads from a linear address, as the current instruction's explicit access.
    #[inline(always)]
    pub(crate) fn load<T: Value>(&mut self, linear: u64) -> Exec<T> {
        match self.mmu.load(linear, self.context) {
            Ok(value) => Ok(value),
            Err(fault) => self.load_fault(fault),
        }
    }

    /// Stores to a linear address, as the current instruction's explicit access.
    #[inline(always)]
    pub(crate) fn store<T: Value>(&mut self, linear: u64, value: T) -> Exec {
        match self.mmu.store_hit(linear, value, self.context) {
            true => Ok(()),
            false => self.store_slow(linear, value, self.context),
        }
    }

    /// Loads from a system structure (descriptor tables, TSS): a supervisor access at any CPL.
    pub(crate) fn load_system<T: Value>(&mut self, linear: u64) -> Exec<T> {
        match self.mmu.load(linear, Context::Supervisor) {
            Ok(value) => Ok(value),
            Err(fault) => self.load_fault(fault),
        }
    }

    /// Stores to a system structure.
    pub(crate) fn store_system<T: Value>(&mut self, linear: u64, value: T) -> Exec {
        self.store_slow(linear, value, Context::Supervisor)
    }

    #[cold]
    fn load_fault<T: Value>(&mut self, fault: Fault) -> Exec<T> {
        match fault {
            Fault::Mmio(mmio) => Ok(self.bus_load(&mmio)),
            fault => Err(self.memory_fault(fault)),
        }
    }

    /// A store that the first-level TLB did not answer.
    #[cold]
    pub(crate) fn store_slow<T: Value>(&mut self, linear: u64, value: T, context: Context) -> Exec {
        match self.mmu.store(linear, value, context) {
            Ok(()) => {}
            Err(Fault::Mmio(mmio)) => self.bus_store(&mmio, value),
            Err(fault) => return Err(self.memory_fault(fault)),
        }
        self.after_slow_write();
        Ok(())
    }

    /// A write may have changed code that this CPU has decoded, even the block that runs.
    pub(crate) fn after_slow_write(&mut self) {
        if self.signals.take(ATTENTION_CODE) {
            self.drop_written_code();
        }
    }

    /// An atomic read-modify-write with LOCK; returns the old value.
    pub(crate) fn update<T: Atomic>(&mut self, linear: u64, change: impl Fn(T) -> T) -> Exec<T> {
        match self.mmu.update(linear, self.context, &change) {
            Ok(old) => {
                self.after_slow_write();
                Ok(old)
            }
            // The bus has no locked cycles: nobody but this machine's registers is there.
            Err(Fault::Mmio(mmio)) => {
                let old = self.bus_load(&mmio);
                self.bus_store(&mmio, change(old));
                Ok(old)
            }
            Err(fault) => Err(self.memory_fault(fault)),
        }
    }

    /// Makes sure that a write of `size` bytes (at most a page) would not fault, for instructions
    /// that write several places.
    pub(crate) fn probe_write(&mut self, linear: u64, size: usize) -> Exec {
        let last = linear.wrapping_add(size as u64 - 1);
        let last = if self.long_mode() {
            last
        } else {
            last & 0xFFFF_FFFF
        };
        if self.long_mode() && !is_canonical(last) {
            return Err(self.memory_fault(Fault::NonCanonical));
        }
        for at in [linear, last & !0xFFF] {
            let access = anemone_soft_mmu::Access::Write;
            if let Err(fault) = self.mmu.translate(at, access, self.context) {
                return Err(self.memory_fault(fault));
            }
            if (linear ^ last) & !0xFFF == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Turns a fault that is no bus access into the exception.
    #[cold]
    pub(crate) fn memory_fault(&mut self, fault: Fault) -> crate::cpu::Trap {
        match fault {
            Fault::PageFault { address, code } => self.raise(Exception {
                vector: vector::PF,
                error: Some(code),
                address,
            }),
            Fault::NonCanonical => self.raise(Exception::NON_CANONICAL),
            Fault::Mmio(_) => self.internal("a bus access where none can be made".into()),
        }
    }

    /// Completes a load outside memory.
    pub(crate) fn bus_load<T: Value>(&mut self, mmio: &Mmio) -> T {
        let mut bytes = [0; 32];
        for (at, range) in mmio.pieces() {
            if !self.mmu.read_physical(at, &mut bytes[range.clone()]) {
                Outside { cpu: self }.read(at, &mut bytes[range]);
            }
        }
        T::from_bytes(&bytes)
    }

    /// Completes a store outside memory.
    pub(crate) fn bus_store<T: Value>(&mut self, mmio: &Mmio, value: T) {
        let bytes = value.to_bytes();
        for (at, range) in mmio.pieces() {
            if !self.mmu.write_physical(at, &bytes[range.clone()]) {
                Outside { cpu: self }.write(at, &bytes[range]);
            }
        }
    }

    /// The machine. Parks the MMU meanwhile, since a register may wait or change memory slots.
    pub(crate) fn with_bus<R>(&mut self, work: impl FnOnce(&dyn Bus) -> R) -> Option<R> {
        let bus = self.bus?;
        // A device may compute in floating point.
        self.native.sync_mxcsr();
        // SAFETY: `run` sets it to a bus that it borrows until it returns, and clears it then.
        let bus = unsafe { bus.as_ref() };
        Some(self.mmu.parked(|| work(bus)))
    }
}

impl Outside<'_> {
    /// Offset in the local APIC's page.
    fn apic_offset(&self, at: u64, length: usize) -> Option<u64> {
        let page = self.cpu.apic.mmio_page()?;
        let offset = at.checked_sub(page)?;
        (offset + length as u64 <= 0x1000).then_some(offset)
    }

    fn read(&mut self, at: u64, data: &mut [u8]) {
        if let Some(offset) = self.apic_offset(at, data.len()) {
            let now = self.cpu.apic_now();
            self.cpu.apic.mmio_read(offset, data, now);
            return;
        }
        let answered = self.cpu.with_bus(|bus| {
            bus_pieces(at, data.len()).for_each(|(at, r)| bus.mmio_read(at, &mut data[r]));
        });
        if answered.is_none() {
            data.fill(0xFF);
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        if let Some(offset) = self.apic_offset(at, data.len()) {
            let now = self.cpu.apic_now();
            self.cpu.apic.mmio_write(offset, data, now);
            self.cpu.apic_written();
            return;
        }
        self.cpu.with_bus(|bus| {
            bus_pieces(at, data.len()).for_each(|(at, r)| bus.mmio_write(at, &data[r]));
        });
    }
}
