//! What power-up and INIT set, and what INIT leaves.

use super::*;
use crate::state::tests::Guest;

#[test]
fn the_state_after_power_up() {
    let mut guest = Guest::new();
    guest.cpu.set_gpr(reg::RAX, 1);
    guest.cpu.dr[0] = 1;
    guest.cpu.xcr0 = 7;
    guest.cpu.msrs.lstar = 1;
    guest.cpu.nmi_blocked = true;
    guest.cpu.activity = Activity::Halted;
    guest.cpu.reset();
    let cpu = &mut guest.cpu;
    assert_eq!(
        (cpu.cr0, cpu.cr2, cpu.cr4, cpu.efer),
        (0x6000_0010, 0, 0, 0)
    );
    assert_eq!((cpu.cr3(), cpu.xcr0, cpu.msrs.lstar), (0, 1, 0));
    assert_eq!(cpu.dr, [0, 0, 0, 0, 0, 0, 0xFFFF_0FF0, 0x400]);
    assert_eq!((cpu.rip, cpu.rflags(), cpu.cpl), (0xFFF0, 2, 0));
    assert_eq!(cpu.bases[..6], [0, 0xFFFF_0000, 0, 0, 0, 0]);
    assert!(cpu.segments.iter().all(|s| s.present && s.limit == 0xFFFF));
    assert_eq!((cpu.idtr.base, cpu.idtr.limit), (0, 0xFFFF));
    assert_eq!(cpu.gdtr, cpu.idtr);
    // Signature: a family that has long mode.
    assert_eq!(cpu.gpr(reg::RAX), 0);
    assert!(cpu.gpr(reg::RDX) >> 8 & 0xF >= 6);
    assert!(!cpu.nmi_blocked);
    assert_eq!(cpu.activity, Activity::Running);
    let image = cpu.native.xsave_image();
    assert_eq!((&image[..2], image[FTW]), (&[0x40, 0][..], 0xFF));
    assert_eq!(image[MXCSR], [0x80, 0x1F, 0, 0]);
}

#[test]
fn init_leaves_much() {
    let mut guest = Guest::new();
    let mut image = *guest.cpu.native.xsave_image();
    image[160] = 0x77;
    guest.cpu.native.load_xsave_image(&image).unwrap();
    guest.cpu.cr0 |= cr0::CD;
    guest.cpu.xcr0 = 7;
    guest.cpu.msrs.lstar = 1;
    guest.cpu.init();
    let cpu = &mut guest.cpu;
    // NW was clear.
    assert_eq!(cpu.cr0, cr0::CD | cr0::ET);
    assert_eq!((cpu.cr4, cpu.efer, cpu.rip), (0, 0, 0xFFF0));
    assert_eq!((cpu.xcr0, cpu.msrs.lstar), (7, 1));
    assert_eq!(cpu.native.xsave_image()[160], 0x77);
    cpu.startup(0x9F);
    let code = &cpu.segments[seg::CS];
    assert_eq!((code.selector, code.base), (0x9F00, 0x9_F000));
    assert_eq!((cpu.rip, cpu.activity), (0, Activity::Running));
}
