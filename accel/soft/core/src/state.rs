//! The state of a CPU as the machine saves and restores it. The CPU does not run meanwhile, and its MMU is
//! parked before and after.

#[cfg(test)]
pub(crate) mod tests;

use anemone_accel_api::{Msr, Regs, Sregs, VcpuEvents, VcpuState};
use anemone_soft_mmu::{Paging, cr0, efer};
use anemone_soft_native::XSAVE_SIZE;

use crate::cpu::{self, Activity, Cpu, Exception, rflags, seg};
use crate::system::{Event, msr};

/// Where XSTATE_BV lies in an XSAVE image: which components it has (SDM volume 1, 13.4.2).
const XSTATE_BV: usize = 512;
/// The components: where they lie, and their state after INIT unless that is zero.
const X87: [std::ops::Range<usize>; 2] = [0..24, 32..160];
const SSE: std::ops::Range<usize> = 160..416;
const AVX: std::ops::Range<usize> = 576..XSAVE_SIZE;
/// FCW after INIT.
const FCW_INIT: [u8; 2] = 0x37F_u16.to_le_bytes();

impl Cpu {
    /// Everything that the guest can observe. Not while the guest runs.
    pub fn state(&mut self) -> VcpuState {
        // The end of an interrupt by memory was settled when `run` came back.
        let now = self.shared.clock.now_with(self.msrs.tsc_offset);
        self.poll_apic(now);
        let msrs = msr::saved()
            .filter_map(|index| {
                let value = self.read_msr(index)?;
                Some(Msr { index, value })
            })
            .collect();
        let [d0, d1, d2, d3, _, _, d6, d7] = self.dr;
        self.mmu.park();
        VcpuState {
            regs: self.regs(),
            sregs: self.sregs(),
            xcr0: self.xcr0,
            xsave: self.native.xsave_image().to_vec(),
            debug: [d0, d1, d2, d3, d6, d7],
            msrs,
            lapic: self.apic.page(now),
            events: VcpuEvents {
                exception: None,
                interrupt: None,
                nmi_pending: self.nmi_pending,
                nmi_masked: self.nmi_blocked,
                interrupt_shadow: self.shadow,
                sipi_vector: 0,
            },
            waiting_for_sipi: self.activity == Activity::WaitForStartup,
            halted: self.activity == Activity::Halted,
        }
    }

    fn regs(&self) -> Regs {
        let [
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
        ] = std::array::from_fn(|n| self.gpr(n));
        Regs {
            rax,
            rbx,
            rcx,
            rdx,
            rsi,
            rdi,
            rsp,
            rbp,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: self.rip,
            rflags: self.rflags(),
        }
    }

    fn sregs(&self) -> Sregs {
        let s = &self.segments;
        Sregs {
            cs: s[seg::CS],
            ds: s[seg::DS],
            es: s[seg::ES],
            fs: s[seg::FS],
            gs: s[seg::GS],
            ss: s[seg::SS],
            tr: self.tr,
            ldt: self.ldtr,
            gdt: self.gdtr,
            idt: self.idtr,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3(),
            cr4: self.cr4,
            cr8: self.apic.cr8(),
            efer: self.efer,
            apic_base: self.apic.base(),
        }
    }

    /// Sets the general and system registers.
    ///
    /// # Errors
    /// A message: values that the CPU cannot have together.
    pub fn set_registers(&mut self, regs: &Regs, sregs: &Sregs) -> Result<(), String> {
        let done = self.restore_registers(regs, sregs);
        self.mmu.park();
        done
    }

    fn restore_registers(&mut self, regs: &Regs, sregs: &Sregs) -> Result<(), String> {
        let long = sregs.cr0 & cr0::PG != 0 && sregs.efer & efer::LME != 0;
        if long != (sregs.efer & efer::LMA != 0) {
            return Err("EFER.LMA does not go with CR0.PG and EFER.LME".into());
        }
        if !self.is_offered_cr4(sregs.cr4) || !self.is_offered_efer(sregs.efer) {
            let (cr4, efer) = (sregs.cr4, sregs.efer);
            return Err(format!(
                "the CPU model lacks what CR4 {cr4:#x} or EFER {efer:#x} enables"
            ));
        }
        self.apic
            .restore_base(sregs.apic_base)
            .map_err(|_| format!("APIC base {:#x} is not valid", sregs.apic_base))?;
        self.mmu
            .set_paging(Paging {
                cr0: sregs.cr0,
                cr3: sregs.cr3,
                cr4: sregs.cr4,
                efer: sregs.efer,
            })
            .map_err(|_| format!("CR3 {:#x} leads to PDPTEs with reserved bits", sregs.cr3))?;
        self.apic
            .set_cr8(sregs.cr8)
            .map_err(|_| format!("CR8 {:#x} is not valid", sregs.cr8))?;
        self.cr0 = sregs.cr0 | cr0::ET;
        self.cr2 = sregs.cr2;
        self.cr4 = sregs.cr4;
        self.efer = sregs.efer;
        self.gdtr = sregs.gdt;
        self.idtr = sregs.idt;
        self.tr = sregs.tr;
        self.ldtr = sregs.ldt;
        for (number, segment) in [
            (seg::CS, sregs.cs),
            (seg::DS, sregs.ds),
            (seg::ES, sregs.es),
            (seg::FS, sregs.fs),
            (seg::GS, sregs.gs),
            (seg::SS, sregs.ss),
        ] {
            self.segments[number] = segment;
        }
        let general = [
            regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
            regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
        ];
        for (number, value) in general.into_iter().enumerate() {
            self.set_gpr(number, value);
        }
        self.rip = regs.rip;
        self.stopped = None;
        self.set_rflags(regs.rflags);
        // SDM volume 3, 5.5: the privilege level is that of the stack.
        let cpl = if !self.protected() {
            0
        } else if self.system_flags & rflags::VM != 0 {
            3
        } else {
            sregs.ss.dpl & 3
        };
        self.set_cpl(cpl);
        self.update_bases();
        self.blocks.new_epoch();
        self.apic_changed();
        Ok(())
    }

    /// Restores what [`state`](Self::state) returned, here or on a CPU of another accelerator.
    ///
    /// # Errors
    /// A message: what this CPU cannot have. It must not run then.
    pub fn set_state(&mut self, state: &VcpuState) -> Result<(), String> {
        let done = self.restore(state);
        self.mmu.park();
        done
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), String> {
        self.restore_registers(&state.regs, &state.sregs)?;
        if !self.is_valid_xcr0(state.xcr0) {
            return Err(format!("XCR0 {:#x} is not valid", state.xcr0));
        }
        self.xcr0 = state.xcr0;
        self.set_xsave(&state.xsave)?;
        let [d0, d1, d2, d3, d6, d7] = state.debug;
        self.dr[..4].copy_from_slice(&[d0, d1, d2, d3]);
        self.set_dr6(d6);
        self.set_dr7(d7);
        // The TSC before the APIC's timer, which may count by it, and that before its deadline.
        let (first, rest): (Vec<_>, Vec<_>) = state.msrs.iter().partition(|m| m.index == msr::TSC);
        first.into_iter().try_for_each(|m| self.set_saved_msr(m))?;
        let now = self.shared.clock.now_with(self.msrs.tsc_offset);
        self.apic.set_page(&state.lapic, now);
        rest.into_iter().try_for_each(|m| self.set_saved_msr(m))?;
        let events = &state.events;
        self.nmi_pending = events.nmi_pending;
        self.nmi_blocked = events.nmi_masked;
        self.shadow = events.interrupt_shadow;
        self.activity = if state.waiting_for_sipi {
            Activity::WaitForStartup
        } else if state.halted {
            Activity::Halted
        } else {
            Activity::Running
        };
        self.apic_written();
        self.deliver_in_flight(events)
    }

    fn set_saved_msr(&mut self, msr: &Msr) -> Result<(), String> {
        let Msr { index, value } = *msr;
        self.restore_msr(index, value)
            .ok_or_else(|| format!("the value {value:#x} for MSR {index:#x} is not valid"))
    }

    /// An image in the standard format; components that it lacks are as after INIT.
    fn set_xsave(&mut self, image: &[u8]) -> Result<(), String> {
        let Some(image) = image.first_chunk::<XSAVE_SIZE>() else {
            return Err(format!("the XSAVE image has only {} bytes", image.len()));
        };
        let mut image = *image;
        let present = image[XSTATE_BV];
        if present & 1 == 0 {
            X87.into_iter().for_each(|range| image[range].fill(0));
            image[..2].copy_from_slice(&FCW_INIT);
        }
        if present & 2 == 0 {
            image[SSE].fill(0);
        }
        if present & 4 == 0 {
            image[AVX].fill(0);
        }
        let loaded = self.native.load_xsave_image(&image);
        loaded.map_err(|error| error.to_string())
    }

    /// Delivers what another accelerator was about to.
    fn deliver_in_flight(&mut self, events: &VcpuEvents) -> Result<(), String> {
        let event = match (events.exception, events.interrupt) {
            (Some((vector, error)), _) => Event::Exception(Exception {
                vector,
                error,
                address: if vector == cpu::vector::PF {
                    self.cr2
                } else {
                    0
                },
            }),
            (None, Some(vector)) => Event::External(vector),
            (None, None) => return Ok(()),
        };
        self.deliver(event)
            .map_err(|_| "the CPU would shut down at once".into())
    }
}
