//! Guests of a few instructions on the software CPU, in the whole process with its jail.

#![allow(clippy::unwrap_used, reason = "failures of helpers are the tests'")]

mod common;

use std::os::fd::AsFd;

use anemone_ipc::FdIndex;
use anemone_ipc::vmm::{Accel, Event, FromVmm, ToVmm};
use anemone_virt::map;

use common::{MORE_FDS, Vmm, kernel};

/// Starts a guest that consists of this 64-bit code, entered with paging on.
fn run(code: &[u8], cpus: u32) -> Vmm {
    let kernel = kernel(code);
    let (vmm, answer) = Vmm::configure_with(&[kernel.as_fd()], |config| {
        config.accel = Accel::Soft;
        config.kernel = FdIndex(MORE_FDS);
        config.cpus = cpus;
    });
    assert!(matches!(answer, FromVmm::Ready(_)), "{answer:?}");
    vmm.channel.send(&ToVmm::Start, &[]).unwrap();
    vmm
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
    assert_eq!(run(&code, 2).event(), Event::Reset { cause });
}

#[test]
fn a_guest_without_handlers_resets() {
    let cause = "triple fault".to_owned();
    // ud2; there is no IDT.
    assert_eq!(run(&[0x0F, 0x0B], 1).event(), Event::Reset { cause });
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
    assert_eq!(run(&code.concat(), 1).event(), Event::Reset { cause });
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
