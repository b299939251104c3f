//! The decimal adjustments against the host, which still has them in 32-bit code: a far return into a
//! stub below 4 GiB and a far jump back.

use std::arch::asm;

use anemone_soft_native::{Flags, aaa, aad, aam, aas, daa, das};

struct Stub(*mut u8);

impl Stub {
    fn new(operation: &[u8]) -> Self {
        // SAFETY: a fresh private mapping in the low 2 GiB.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                8192,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        let page = page.cast::<u8>();
        // xchg eax, ecx; sahf; xchg eax, ecx; the operation; xchg eax, ecx; lahf; xchg eax, ecx
        let mut code = vec![0x91, 0x9e, 0x91];
        code.extend(operation);
        code.extend([0x91, 0x9f, 0x91, 0xea]);
        code.extend((page as u32 + 64).to_le_bytes());
        code.extend([0x33, 0]);
        // SAFETY: the page is this function's; it becomes executable after the writes.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), page, code.len());
            // Back in 64-bit mode: jmp r11
            std::ptr::copy_nonoverlapping([0x41, 0xff, 0xe3].as_ptr(), page.add(64), 3);
            assert_eq!(
                libc::mprotect(page.cast(), 4096, libc::PROT_READ | libc::PROT_EXEC),
                0
            );
        }
        Self(page)
    }

    fn run(&self, ax: u16, flags: Flags) -> (u16, Flags) {
        let (mut eax, mut ecx) = (u32::from(ax), u32::from(flags.to_ax()));
        // SAFETY: the stub touches EAX, ECX and the flags only and comes back to the label.
        unsafe {
            asm!(
                // The switch may drop the upper half of RSP, so the second page is the stack.
                "mov r10, rsp",
                "lea rsp, [{page} + 8192]",
                "lea r11, [rip + 2f]",
                "push 0x23",
                "push {page}",
                ".byte 0x48, 0xcb",
                "2:",
                "mov rsp, r10",
                page = in(reg) self.0,
                inout("eax") eax,
                inout("ecx") ecx,
                out("r10") _,
                out("r11") _,
            );
        }
        (eax as u16, Flags::from_ax(ecx as u16 & 0xff00))
    }
}

fn without(flags: Flags, undefined: Flags) -> Flags {
    flags.replace(undefined.union(Flags::OF), Flags::NONE)
}

fn carries() -> impl Iterator<Item = Flags> {
    (0..4).map(|bits| {
        Flags::NONE
            .with(Flags::CF, bits & 1 != 0)
            .with(Flags::AF, bits & 2 != 0)
    })
}

#[test]
fn packed_adjustments_equal_the_host() {
    for (operation, ours) in [(0x27, daa as fn(u8, Flags) -> (u8, Flags)), (0x2f, das)] {
        let stub = Stub::new(&[operation]);
        for al in 0..=255u8 {
            for flags in carries() {
                let (result, after) = ours(al, flags);
                let (expected, host) = stub.run(al.into(), flags);
                let none = Flags::NONE;
                assert_eq!(
                    (u16::from(result), without(after, none)),
                    (expected, without(host, none)),
                    "{al:x} {flags:?}"
                );
            }
        }
    }
}

#[test]
fn unpacked_adjustments_equal_the_host() {
    // SF, ZF and PF are undefined.
    let undefined = Flags::SF.union(Flags::ZF).union(Flags::PF);
    for (operation, ours) in [(0x37, aaa as fn(u16, Flags) -> (u16, Flags)), (0x3f, aas)] {
        let stub = Stub::new(&[operation]);
        for ax in 0..=u16::MAX {
            for flags in carries() {
                let (result, after) = ours(ax, flags);
                let (expected, host) = stub.run(ax, flags);
                assert_eq!(
                    (result, without(after, undefined)),
                    (expected, without(host, undefined)),
                    "{ax:x} {flags:?}"
                );
            }
        }
    }
}

#[test]
fn adjustments_with_a_base_equal_the_host() {
    let undefined = Flags::AF.union(Flags::CF);
    assert!(aam(5, 0).is_err());
    for base in [1, 2, 7, 10, 16, 255] {
        let (divide, multiply) = (Stub::new(&[0xd4, base]), Stub::new(&[0xd5, base]));
        for ax in 0..=u16::MAX {
            let (result, after) = aam(ax as u8, base).unwrap();
            let (expected, host) = divide.run(ax, Flags::NONE);
            assert_eq!(
                (result, without(after, undefined)),
                (expected, without(host, undefined)),
                "aam {ax:x}"
            );
            let (result, after) = aad(ax, base);
            let (expected, host) = multiply.run(ax, Flags::NONE);
            assert_eq!(
                (result, without(after, undefined)),
                (expected, without(host, undefined)),
                "aad {ax:x}"
            );
        }
    }
}
