//! CPUID of one vCPU: what KVM offers, with the topology of this VM.
//!
//! One package, one thread per core; the APIC id is the core number. Sources: Intel SDM volume
//! 2A, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

use anemone_accel_api::{Error, Result};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// Leaf 1 ECX: the APIC can run in x2APIC mode.
const X2APIC: u32 = 1 << 21;
/// Leaf 1 ECX: the APIC timer has a TSC-deadline mode. KVM does not report it here but as a capability.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: running under a hypervisor. Linux looks for KVM's leaves only if it is set.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;

/// Fills in what differs per vCPU: `index` of `count`.
pub(crate) fn for_vcpu(offered: &CpuId, index: u32, count: u32) -> Result<CpuId> {
    let shift = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = offered
        .as_slice()
        .iter()
        .filter(|e| !matches!(e.function, 0xB | 0x1F))
        .copied()
        .collect();
    for e in &mut entries {
        match e.function {
            0x1 => {
                e.ebx = e.ebx & 0x0000_FFFF | index << 24 | count.min(255) << 16;
                e.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
                e.edx = if count > 1 { e.edx | HTT } else { e.edx & !HTT };
            }
            // Deterministic cache parameters: first and second level belong to a core, the
            // third to the package. Intel also reports the cores per package here.
            0x4 | 0x8000_001D if e.eax & 0x1F != 0 => {
                let sharing = if e.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                e.eax = e.eax & 0x3FFF | sharing << 14;
                if e.function == 0x4 {
                    e.eax |= ((1u32 << shift) - 1).min(63) << 26;
                }
            }
            // AMD: number of threads less one, and the bits of the APIC id they take.
            0x8000_0008 => e.ecx = e.ecx & !0xF0FF | shift << 12 | (count - 1),
            // AMD: extended APIC id, core id, one thread per core, node 0 of 1.
            0x8000_001E => (e.eax, e.ebx, e.ecx) = (index, index, 0),
            _ => {}
        }
    }
    let basic_leaves = entries
        .iter()
        .find(|e| e.function == 0)
        .map_or(0, |e| e.eax);
    if basic_leaves >= 0xB {
        // Thread level, then core level, then the empty level that ends the list.
        for (level, (eax, ebx, kind)) in [(0, 1, 1), (shift, count, 2), (0, 0, 0)]
            .into_iter()
            .enumerate()
        {
            let level = level as u32;
            entries.push(kvm_cpuid_entry2 {
                function: 0xB,
                index: level,
                flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: level | kind << 8,
                edx: index,
                ..Default::default()
            });
        }
    }
    CpuId::from_entries(&entries).map_err(|_| {
        Error::Guest(format!(
            "{} CPUID entries are too many for KVM",
            entries.len()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topology_of_the_third_of_six() {
        let leaf = |function, eax, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ecx,
            ..Default::default()
        };
        let offered = CpuId::from_entries(&[
            leaf(0, 0x10, 0),
            leaf(1, 0, 0),
            leaf(4, 0x163, 0),
            leaf(0x8000_0008, 0x3030, 0xFFFF),
        ])
        .unwrap();
        let cpuid = for_vcpu(&offered, 2, 6).unwrap();
        let get = |function, index| {
            *cpuid
                .as_slice()
                .iter()
                .find(|e| e.function == function && e.index == index)
                .unwrap()
        };
        assert_eq!(get(1, 0).ebx, 2 << 24 | 6 << 16);
        assert_eq!(get(1, 0).ecx, X2APIC | TSC_DEADLINE | HYPERVISOR);
        assert_eq!(get(4, 0).eax, 0x163 | 5 << 14 | 7 << 26);
        assert_eq!(get(0x8000_0008, 0).ecx & 0xF0FF, 3 << 12 | 5);
        assert_eq!(
            (get(0xB, 0).eax, get(0xB, 0).ebx, get(0xB, 0).ecx),
            (0, 1, 0x100)
        );
        assert_eq!(
            (get(0xB, 1).eax, get(0xB, 1).ebx, get(0xB, 1).ecx),
            (3, 6, 0x201)
        );
        assert_eq!(get(0xB, 2).ecx, 2);
        assert!((0..3).all(|level| get(0xB, level).edx == 2));
    }
}
