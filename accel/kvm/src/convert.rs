//! Between the accelerator-independent state and KVM's structures.

use anemone_accel_api::{DescriptorTable, Regs, Segment, Sregs, VcpuEvents};
use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR,
    KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_dtable, kvm_regs, kvm_segment,
    kvm_sregs, kvm_vcpu_events,
};

/// Copies the fields that have the same name on both sides.
macro_rules! same_fields {
    ($type:ident, $from:expr, $($field:ident),+) => {
        $type { $($field: $from.$field),+ }
    };
}

pub(crate) fn regs_from_kvm(r: &kvm_regs) -> Regs {
    same_fields!(
        Regs, r, rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip,
        rflags
    )
}

pub(crate) fn regs_to_kvm(r: &Regs) -> kvm_regs {
    same_fields!(
        kvm_regs, r, rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15,
        rip, rflags
    )
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        kind: s.type_,
        present: s.present != 0 && s.unusable == 0,
        dpl: s.dpl,
        big: s.db != 0,
        code_or_data: s.s != 0,
        long: s.l != 0,
        granularity: s.g != 0,
        available: s.avl != 0,
    }
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind,
        present: s.present.into(),
        dpl: s.dpl,
        db: s.big.into(),
        s: s.code_or_data.into(),
        l: s.long.into(),
        g: s.granularity.into(),
        avl: s.available.into(),
        unusable: (!s.present).into(),
        ..Default::default()
    }
}

fn table_from_kvm(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: t.base,
        limit: t.limit,
    }
}

fn table_to_kvm(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        ..Default::default()
    }
}

pub(crate) fn sregs_from_kvm(s: &kvm_sregs) -> Sregs {
    Sregs {
        cs: segment_from_kvm(&s.cs),
        ds: segment_from_kvm(&s.ds),
        es: segment_from_kvm(&s.es),
        fs: segment_from_kvm(&s.fs),
        gs: segment_from_kvm(&s.gs),
        ss: segment_from_kvm(&s.ss),
        tr: segment_from_kvm(&s.tr),
        ldt: segment_from_kvm(&s.ldt),
        gdt: table_from_kvm(&s.gdt),
        idt: table_from_kvm(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
    }
}

pub(crate) fn sregs_to_kvm(s: &Sregs) -> kvm_sregs {
    kvm_sregs {
        cs: segment_to_kvm(&s.cs),
        ds: segment_to_kvm(&s.ds),
        es: segment_to_kvm(&s.es),
        fs: segment_to_kvm(&s.fs),
        gs: segment_to_kvm(&s.gs),
        ss: segment_to_kvm(&s.ss),
        tr: segment_to_kvm(&s.tr),
        ldt: segment_to_kvm(&s.ldt),
        gdt: table_to_kvm(&s.gdt),
        idt: table_to_kvm(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        ..Default::default()
    }
}

pub(crate) fn events_from_kvm(e: &kvm_vcpu_events) -> VcpuEvents {
    VcpuEvents {
        exception: (e.exception.injected != 0).then(|| {
            let code = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
            (e.exception.nr, code)
        }),
        interrupt: (e.interrupt.injected != 0).then_some(e.interrupt.nr),
        nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
        nmi_masked: e.nmi.masked != 0,
        interrupt_shadow: e.interrupt.shadow != 0,
        sipi_vector: e.sipi_vector as u8,
    }
}

pub(crate) fn events_to_kvm(e: &VcpuEvents) -> kvm_vcpu_events {
    let mut out = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING
            | KVM_VCPUEVENT_VALID_SHADOW
            | KVM_VCPUEVENT_VALID_SIPI_VECTOR,
        sipi_vector: e.sipi_vector.into(),
        ..Default::default()
    };
    if let Some((vector, code)) = e.exception {
        out.exception.injected = 1;
        out.exception.nr = vector;
        out.exception.has_error_code = code.is_some().into();
        out.exception.error_code = code.unwrap_or(0);
    }
    if let Some(vector) = e.interrupt {
        out.interrupt.injected = 1;
        out.interrupt.nr = vector;
    }
    if e.interrupt_shadow {
        out.interrupt.shadow = (KVM_X86_SHADOW_INT_MOV_SS | KVM_X86_SHADOW_INT_STI) as u8;
    }
    out.nmi.pending = e.nmi_pending.into();
    out.nmi.masked = e.nmi_masked.into();
    out
}
