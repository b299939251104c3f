//! Topology: one package, one thread per core; the APIC id is the core's number.

use crate::features::{Feature, HYPERVISOR, TSC_DEADLINE, X2APIC};
use crate::leaf::{Leaf, find};

/// Leaf 1 EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;

/// What every accelerator has whether it says so by CPUID or not: Linux looks for the
/// paravirtual leaves only under a hypervisor, and KVM reports its timer as a capability.
pub(crate) const ALWAYS: [Feature; 3] = [X2APIC, TSC_DEADLINE, HYPERVISOR];

/// Makes the answers those of CPU `index` of `count`.
pub(crate) fn apply(leaves: &mut Vec<Leaf>, index: u32, count: u32) {
    let shift = count.next_power_of_two().trailing_zeros();
    leaves.retain(|l| !matches!(l.function, 0xB | 0x1F));
    for l in leaves.iter_mut() {
        match l.function {
            0x1 => {
                l.ebx = l.ebx & 0x0000_FFFF | index << 24 | count.min(255) << 16;
                l.edx = if count > 1 { l.edx | HTT } else { l.edx & !HTT };
            }
            // Deterministic cache parameters: first and second level belong to a core, the third
            // to the package. Intel also reports the cores per package here.
            0x4 | 0x8000_001D if l.eax & 0x1F != 0 => {
                let sharing = if l.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                l.eax = l.eax & 0x3FFF | sharing << 14;
                if l.function == 0x4 {
                    l.eax |= ((1u32 << shift) - 1).min(63) << 26;
                }
            }
            // AMD: number of threads less one, and the bits of the APIC id they take.
            0x8000_0008 => l.ecx = l.ecx & !0xF0FF | shift << 12 | (count - 1),
            // AMD: extended APIC id, core id, one thread per core, node 0 of 1.
            0x8000_001E => (l.eax, l.ebx, l.ecx) = (index, index, 0),
            _ => {}
        }
    }
    for feature in ALWAYS {
        feature.set(leaves);
    }
    if find(leaves, 0, 0).is_some_and(|l| l.eax >= 0xB) {
        // Thread level, then core level, then the empty level that ends the list.
        let levels = [(0, 1, 1), (shift, count, 2), (0, 0, 0)];
        leaves.extend((0u32..).zip(levels).map(|(level, (bits, cpus, kind))| {
            Leaf::sub(0xB, level, [bits, cpus, level | kind << 8, index])
        }));
    }
}
