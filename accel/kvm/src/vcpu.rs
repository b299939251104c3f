//! One vCPU on KVM: the run loop, kicking, and its state.

use std::cell::Cell;
use std::ptr;
use std::sync::Once;

use anemone_accel_api::{
    Bus, Error, LapicState, Msr, Regs, Result, Sregs, Stop, Vcpu, VcpuKick, VcpuState,
};
use kvm_bindings::{
    CpuId, KVM_EXIT_IO_IN, KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_run, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use crate::{convert, failed};

/// IA32_MISC_ENABLE, and its bit for fast string operations.
const MISC_ENABLE: (u32, u64) = (0x1A0, 1);
/// IA32_MTRR_DEF_TYPE: MTRRs on, everything write-back, as firmware would leave it.
const MTRR_DEF_TYPE: (u32, u64) = (0x2FF, 1 << 11 | 6);

/// A vCPU on KVM.
pub(crate) struct KvmVcpu {
    fd: VcpuFd,
    /// MSRs that make up the saved state on this host.
    msrs: Vec<u32>,
}

thread_local! {
    /// The shared page of the vCPU that runs on this thread, for the kick's signal handler.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that takes a vCPU thread out of KVM_RUN.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Makes the next KVM_RUN of this thread return at once. Setting the flag in the handler closes
/// the gap between "is a kick pending?" and entering the guest.
extern "C" fn on_kick(_: libc::c_int) {
    let page = RUN_PAGE.with(Cell::get);
    if !page.is_null() {
        // SAFETY: the page belongs to the vCPU of this thread and is unmapped only after
        // RUN_PAGE has been cleared; one byte, which KVM only reads.
        unsafe { ptr::write_volatile(&raw mut (*page).immediate_exit, 1) };
    }
}

fn install_handler() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: an all-zero sigaction is valid; the handler only writes one byte.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_kick as *const () as usize;
            libc::sigaction(kick_signal(), &action, ptr::null_mut());
        }
    });
}

/// Kicks the thread that took it.
struct KvmKick {
    process: libc::pid_t,
    thread: libc::pid_t,
}

impl VcpuKick for KvmKick {
    fn kick(&self) {
        // SAFETY: plain system call on integers. A thread that is gone makes it fail, which is fine.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, kick_signal()) };
    }
}

impl KvmVcpu {
    pub(crate) fn new(fd: VcpuFd, kvm: &Kvm, cpuid: CpuId) -> Result<Self> {
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        let entries = [MISC_ENABLE, MTRR_DEF_TYPE].map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
        set_msrs(&fd, &entries)?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            fd,
            msrs: msrs.as_slice().to_vec(),
        })
    }

    /// Carries out the port access that KVM describes in the shared page. A string instruction
    /// arrives as several accesses of one width.
    fn port_access(&mut self, bus: &dyn Bus) {
        let page: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: KVM has just set the exit reason that makes `io` the valid union member, and
        // places `count` times `size` bytes at `data_offset` inside the mapped page. Nothing
        // else refers to them until the next KVM_RUN.
        let (io, data) = unsafe {
            let io = (*page).__bindgen_anon_1.io;
            let length = usize::from(io.size) * io.count as usize;
            let start = page.cast::<u8>().add(io.data_offset as usize);
            (io, std::slice::from_raw_parts_mut(start, length))
        };
        for item in data.chunks_exact_mut(usize::from(io.size).max(1)) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                bus.port_read(io.port, item);
            } else {
                bus.port_write(io.port, item);
            }
        }
    }

    /// A description of the CPU for errors that end the guest.
    fn dump(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(r), Ok(s)) => format!(
                "rip {:#x} cs {:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} \
                 rsi {:#x} rdi {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
                r.rip,
                s.cs.selector,
                r.rsp,
                r.rflags,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer
            ),
            _ => "registers unreadable".to_owned(),
        }
    }
}

/// Sets MSRs; all of them must be known to this host.
fn set_msrs(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<()> {
    // KVM takes a bounded number at a time.
    for part in entries.chunks(64) {
        let list = Msrs::from_entries(part)
            .map_err(|_| Error::Guest("too many MSRs for KVM".to_owned()))?;
        let done = fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?;
        if let Some(refused) = part.get(done) {
            return Err(Error::Guest(format!(
                "this host's KVM refuses the value {:#x} for MSR {:#x}",
                refused.data, refused.index
            )));
        }
    }
    Ok(())
}

/// The MSRs of `indices` that can be read. Some that KVM lists cannot, depending on CPUID.
fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(64)];
        let entries: Vec<_> = part
            .iter()
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut list = Msrs::from_entries(&entries)
            .map_err(|_| Error::Guest("too many MSRs for KVM".to_owned()))?;
        let done = fd.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
        let read = list.as_slice().iter().take(done);
        found.extend(read.map(|e| Msr {
            index: e.index,
            value: e.data,
        }));
        // KVM stops at the first that it cannot read: leave that one out.
        rest = &rest[if done < part.len() { done + 1 } else { done }..];
    }
    Ok(found)
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn Bus) -> Result<Stop> {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => self.port_access(bus),
                Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
                // With the local APIC in the kernel a halted vCPU waits there; this exit only
                // passes by.
                Ok(VcpuExit::Hlt) => {}
                Ok(VcpuExit::Shutdown) => return Ok(Stop::TripleFault),
                Ok(VcpuExit::Intr) => return Ok(Stop::Kicked),
                Ok(VcpuExit::InternalError) => {
                    return Err(Error::Guest(format!(
                        "KVM could not emulate an instruction of the guest: {}",
                        self.dump()
                    )));
                }
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return Err(Error::Guest(format!(
                        "the processor refused to enter the guest (reason {reason:#x}, CPU {cpu}): {}",
                        self.dump()
                    )));
                }
                Ok(other) => {
                    let what = format!("{other:?}");
                    return Err(Error::Guest(format!(
                        "unexpected exit {what}: {}",
                        self.dump()
                    )));
                }
                Err(e) if e.errno() == libc::EINTR => {
                    self.fd.set_kvm_immediate_exit(0);
                    return Ok(Stop::Kicked);
                }
                Err(e) if e.errno() == libc::EAGAIN => {}
                Err(e) => return Err(failed("KVM_RUN")(e)),
            }
        }
    }

    fn kicker(&mut self) -> Box<dyn VcpuKick> {
        install_handler();
        let page: *mut kvm_run = self.fd.get_kvm_run();
        RUN_PAGE.with(|slot| slot.set(page));
        // SAFETY: both calls only return numbers.
        let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
        Box::new(KvmKick { process, thread })
    }

    fn state(&self) -> Result<VcpuState> {
        let fd = &self.fd;
        let mp_state = fd
            .get_mp_state()
            .map_err(failed("KVM_GET_MP_STATE"))?
            .mp_state;
        let events = fd
            .get_vcpu_events()
            .map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        let debug = fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
        let xcrs = fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
        let xsave = fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        Ok(VcpuState {
            regs: convert::regs_from_kvm(&fd.get_regs().map_err(failed("KVM_GET_REGS"))?),
            sregs: convert::sregs_from_kvm(&fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?),
            xcr0: xcrs.xcrs[..xcrs.nr_xcrs as usize]
                .iter()
                .find(|x| x.xcr == 0)
                .map_or(1, |x| x.value),
            xsave: xsave
                .region
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect(),
            debug: [
                debug.db[0],
                debug.db[1],
                debug.db[2],
                debug.db[3],
                debug.dr6,
                debug.dr7,
            ],
            msrs: get_msrs(fd, &self.msrs)?,
            lapic: LapicState(Box::new(lapic.regs.map(|b| b as u8))),
            events: convert::events_from_kvm(&events),
            waiting_for_sipi: mp_state == KVM_MP_STATE_UNINITIALIZED,
            halted: mp_state == KVM_MP_STATE_HALTED,
        })
    }

    fn set_registers(&mut self, regs: &Regs, sregs: &Sregs) -> Result<()> {
        let kvm_sregs = convert::sregs_to_kvm(sregs);
        self.fd
            .set_sregs(&kvm_sregs)
            .map_err(failed("KVM_SET_SREGS"))?;
        self.fd
            .set_regs(&convert::regs_to_kvm(regs))
            .map_err(failed("KVM_SET_REGS"))
    }

    fn set_state(&mut self, state: &VcpuState) -> Result<()> {
        let fd = &self.fd;
        // Order: system registers switch the modes that others are checked against, XCR0 before
        // the state it enables, the APIC before the timer MSRs that arm it, events last.
        fd.set_sregs(&convert::sregs_to_kvm(&state.sregs))
            .map_err(failed("KVM_SET_SREGS"))?;
        fd.set_regs(&convert::regs_to_kvm(&state.regs))
            .map_err(failed("KVM_SET_REGS"))?;
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = state.xcr0;
        fd.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))?;
        let mut xsave = kvm_xsave::default();
        let bytes = state.xsave.chunks_exact(4);
        for (word, bytes) in xsave.region.iter_mut().zip(bytes) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        // SAFETY: without dynamically enabled features KVM reads exactly this structure, and
        // none are enabled here.
        unsafe { fd.set_xsave(&xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        let lapic = kvm_lapic_state {
            regs: state.lapic.0.map(|b| b as _),
        };
        fd.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
        let entries: Vec<_> = state
            .msrs
            .iter()
            .map(|m| kvm_msr_entry {
                index: m.index,
                data: m.value,
                ..Default::default()
            })
            .collect();
        set_msrs(fd, &entries)?;
        let [d0, d1, d2, d3, dr6, dr7] = state.debug;
        let debug = kvm_debugregs {
            db: [d0, d1, d2, d3],
            dr6,
            dr7,
            ..Default::default()
        };
        fd.set_debug_regs(&debug)
            .map_err(failed("KVM_SET_DEBUGREGS"))?;
        let mp_state = if state.waiting_for_sipi {
            KVM_MP_STATE_UNINITIALIZED
        } else if state.halted {
            KVM_MP_STATE_HALTED
        } else {
            KVM_MP_STATE_RUNNABLE
        };
        fd.set_mp_state(kvm_mp_state { mp_state })
            .map_err(failed("KVM_SET_MP_STATE"))?;
        fd.set_vcpu_events(&convert::events_to_kvm(&state.events))
            .map_err(failed("KVM_SET_VCPU_EVENTS"))
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        let page: *mut kvm_run = self.fd.get_kvm_run();
        RUN_PAGE.with(|slot| {
            if slot.get() == page {
                slot.set(ptr::null_mut());
            }
        });
    }
}
