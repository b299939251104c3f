//! Tiny guests on the host's KVM.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;

use anemone_accel_api::{Verdict, Vm, conformance, self_test, spawn};

use super::KvmVm;

/// `/dev/kvm`, or `None` where its absence was declared acceptable.
fn device() -> Option<OwnedFd> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file.into()),
        Err(e) => {
            let allowed = std::env::var("ANEMONE_ALLOW_MISSING").unwrap_or_default();
            assert!(
                allowed.split(',').any(|name| name == "kvm"),
                "/dev/kvm: {e}; to go on without it set ANEMONE_ALLOW_MISSING=kvm"
            );
            None
        }
    }
}

/// A virtual machine for [`conformance`]; only called where there is KVM.
fn make() -> Box<dyn Vm> {
    Box::new(KvmVm::new(device().unwrap(), anemone_cpu::HOST, &spawn).unwrap())
}

/// Runs a test of [`conformance`] where there is KVM.
fn conforms(test: fn(conformance::Make<'_>)) {
    if device().is_some() {
        test(&make);
    }
}

#[test]
fn port_and_memory_accesses_reach_the_bus() {
    conforms(conformance::port_and_memory_accesses_reach_the_bus);
}

#[test]
fn doorbell_only_counts() {
    conforms(conformance::doorbell_only_counts);
}

#[test]
fn kick_ends_an_endless_loop_even_when_it_comes_first() {
    conforms(conformance::kick_ends_an_endless_loop_even_when_it_comes_first);
}

#[test]
fn state_survives_a_round_trip_to_another_vm() {
    conforms(conformance::state_survives_a_round_trip_to_another_vm);
}

#[test]
fn event_on_a_route_reaches_the_local_apic() {
    conforms(conformance::event_on_a_route_reaches_the_local_apic);
}

#[test]
fn self_test_gives_a_verdict() {
    let Some(device) = device() else { return };
    match self_test(KvmVm::new(device, anemone_cpu::HOST, &spawn).unwrap()).unwrap() {
        Verdict::Usable => {}
        Verdict::Unusable(reason) => assert!(!reason.is_empty()),
    }
}

#[test]
fn models_are_what_the_host_can_do() {
    let Some(first) = device() else { return };
    let offered = crate::offered_cpuid(first).unwrap();
    for model in anemone_cpu::MODELS {
        let Some(device) = device() else { return };
        let missing = model.missing(&offered);
        match KvmVm::new(device, model.name, &spawn)
            .unwrap()
            .create_vcpu(0, 2)
        {
            Ok(_) => assert!(missing.is_empty(), "{missing:?}"),
            Err(e) => {
                let text = e.to_string();
                assert!(missing.iter().all(|name| text.contains(name)), "{text}");
                assert!(!missing.is_empty(), "{text}");
            }
        }
    }
    let Some(device) = device() else { return };
    let vm = KvmVm::new(device, "no-such-model", &spawn).unwrap();
    assert!(vm.create_vcpu(0, 1).is_err());
}
