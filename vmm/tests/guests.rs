//! Guests of a few instructions on the software CPU and on KVM, in the whole process with its jail.

#![allow(clippy::unwrap_used, reason = "failures of helpers are the tests'")]

mod common;

use std::os::fd::AsFd;

use anemone_ipc::FdIndex;
use anemone_ipc::vmm::{Accel, Event, FromVmm, ToVmm};
use anemone_virt::map;

use common::{MORE_FDS, Vmm, kernel};

/// Runs a guest that consists of this 64-bit code, entered with paging on: on each accelerator it
/// must end with this event.
fn ends_with(code: &[u8], cpus: u32, event: &Event) {
    let kernel = kernel(code);
    let soft = (Accel::Soft, None);
    let device = FdIndex(MORE_FDS + 1);
    let kvm = common::kvm().map(|file| (Accel::Kvm { device }, Some(file)));
    for (accel, device) in [Some(soft), kvm].into_iter().flatten() {
        let what = format!("{accel:?}");
        let fds: Vec<_> = [Some(&kernel), device.as_ref()]
            .into_iter()
            .flatten()
            .map(AsFd::as_fd)
            .collect();
        let (mut vmm, answer) = Vmm::configure_with(&fds, |config| {
            config.accel = accel;
            config.kernel = FdIndex(MORE_FDS);
            config.cpus = cpus;
        });
        assert!(matches!(answer, FromVmm::Ready(_)), "{what}: {answer:?}");
        vmm.channel.send(&ToVmm::Start, &[]).unwrap();
        assert_eq!(&vmm.event(), event, "{what}");
        assert_eq!(vmm.child.wait().unwrap().code(), Some(0), "{what}");
    }
}

/// mov dx, PORT; mov al, VALUE; out dx, al
fn reset() -> [u8; 7] {
    let [low, high] = map::RESET.to_le_bytes();
    [0x66, 0xBA, low, high, 0xB0, map::RESET_VALUE, 0xEE]
}

#[test]
fn a_guest_writes_the_reset_register() {
    let code = [&reset()[..], &[0xF4]].concat(); // hlt
    let cause = "reset register".to_owned();
    ends_with(&code, 2, &Event::Reset { cause });
}

#[test]
fn a_guest_without_handlers_resets() {
    let cause = "triple fault".to_owned();
    // ud2; there is no IDT.
    ends_with(&[0x0F, 0x0B], 1, &Event::Reset { cause });
}

#[test]
fn a_guest_reads_its_machine() {
    let code = [
        &[0xB8][..], // mov eax, ECAM of the host bridge
        &(map::ECAM_BASE as u32).to_le_bytes(),
        &[0x81, 0x38, 0x86, 0x80, 0x37, 0x12], // cmp dword [rax], 0x12378086
        &[0x75, 0x07],                         // jne to the ud2
        &reset(),
        &[0x0F, 0x0B], // ud2
    ];
    let cause = "reset register".to_owned();
    ends_with(&code.concat(), 1, &Event::Reset { cause });
}

#[test]
fn a_cpu_model_that_cannot_be_had_is_refused_before_anything_runs() {
    let (_vmm, answer) = Vmm::configure(|config| {
        config.accel = Accel::Soft;
        config.cpu_model = "486".to_owned();
    });
    let FromVmm::Refused { message } = answer else {
        panic!("{answer:?}")
    };
    assert!(message.contains("`486` is unknown"), "{message}");
}
