//! CPUID between KVM's structures and the CPU models.

use anemone_accel_api::{Error, Result};
use anemone_cpu::Leaf;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// What KVM offers guests on this host.
pub(crate) fn from_kvm(offered: &CpuId) -> Vec<Leaf> {
    let leaf = |e: &kvm_cpuid_entry2| Leaf {
        function: e.function,
        index: e.index,
        indexed: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    };
    offered.as_slice().iter().map(leaf).collect()
}

/// What CPU `index` of `count` answers.
pub(crate) fn for_vcpu(model: &str, offered: &[Leaf], index: u32, count: u32) -> Result<CpuId> {
    let leaves = anemone_cpu::cpuid(model, offered, index, count)
        .map_err(|e| Error::CpuModel(e.to_string()))?;
    let entries: Vec<_> = leaves
        .iter()
        .map(|l| kvm_cpuid_entry2 {
            function: l.function,
            index: l.index,
            flags: if l.indexed {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: l.eax,
            ebx: l.ebx,
            ecx: l.ecx,
            edx: l.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        Error::Guest(format!(
            "{} CPUID entries are too many for KVM",
            entries.len()
        ))
    })
}
