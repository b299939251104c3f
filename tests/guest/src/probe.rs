//! Proof that KVM works in the outer guest, without any part of Anemone: a failure of this
//! scenario is a failure of the rig.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

// Numbers of include/uapi/linux/kvm.h.
const KVM_GET_API_VERSION: u64 = 0xAE00;
const KVM_CREATE_VM: u64 = 0xAE01;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xAE04;
const KVM_CREATE_VCPU: u64 = 0xAE41;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
const KVM_RUN: u64 = 0xAE80;
const KVM_SET_REGS: u64 = 0x4090_AE82;
const KVM_GET_SREGS: u64 = 0x8138_AE83;
const KVM_SET_SREGS: u64 = 0x4138_AE84;
const KVM_EXIT_IO: u32 = 2;
const KVM_EXIT_HLT: u32 = 5;

const SREGS_SIZE: usize = 0x138;
const REGS_SIZE: usize = 0x90;
const PAGE: usize = 4096;

/// Real-mode code: adds 2 and 3, writes the sum to port 0x10, halts.
const CODE: [u8; 8] = [
    0xB0, 0x02, // mov al, 2
    0x04, 0x03, // add al, 3
    0xE6, 0x10, // out 0x10, al
    0xF4, // hlt
    0x90,
];

fn call(fd: i32, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: the callers pass what the request expects: a number, or the address of a live
    // buffer of the size that the request's number encodes.
    let rc = unsafe { libc::ioctl(fd, request, argument) };
    if rc < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::other(format!("ioctl {request:#x}: {error}")));
    }
    Ok(rc)
}

fn map(length: usize, flags: i32, fd: i32) -> io::Result<*mut u8> {
    // SAFETY: asks for a new mapping; nothing existing is replaced.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            0,
        )
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(address.cast())
}

/// Runs the guest; an error says what went wrong. Its few mappings and descriptors stay for the
/// life of the process.
pub fn run_tiny_guest() -> io::Result<()> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let version = call(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0)?;
    if version != 12 {
        return Err(io::Error::other(format!("KVM API version {version}")));
    }
    let vm = call(kvm.as_raw_fd(), KVM_CREATE_VM, 0)?;
    let memory = map(PAGE, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1)?;
    // SAFETY: the mapping is a page long.
    unsafe { ptr::copy_nonoverlapping(CODE.as_ptr(), memory, CODE.len()) };
    // struct kvm_userspace_memory_region: slot and flags, address, size, host address.
    let region: [u64; 4] = [0, 0x1000, PAGE as u64, memory as u64];
    call(vm, KVM_SET_USER_MEMORY_REGION, region.as_ptr() as u64)?;
    let vcpu = call(vm, KVM_CREATE_VCPU, 0)?;
    let size = call(kvm.as_raw_fd(), KVM_GET_VCPU_MMAP_SIZE, 0)?;
    let run = map(usize::try_from(size).unwrap_or(0), libc::MAP_SHARED, vcpu)?;

    let mut sregs = [0u8; SREGS_SIZE];
    call(vcpu, KVM_GET_SREGS, sregs.as_mut_ptr() as u64)?;
    // struct kvm_segment cs comes first: base (u64), limit (u32), selector (u16).
    sregs[0..8].fill(0);
    sregs[12..14].fill(0);
    call(vcpu, KVM_SET_SREGS, sregs.as_ptr() as u64)?;
    let mut regs = [0u64; REGS_SIZE / 8];
    regs[16] = 0x1000; // rip
    regs[17] = 2; // rflags: the bit that is always set
    call(vcpu, KVM_SET_REGS, regs.as_ptr() as u64)?;

    let mut sum = None;
    loop {
        call(vcpu, KVM_RUN, 0)?;
        // struct kvm_run: exit_reason is the u32 at 8; at 32 begins the exit's own part, for an
        // I/O exit direction, size, port (u16), count (u32), data offset (u64).
        // SAFETY: the mapping is at least a page and the kernel has just written it.
        let reason = unsafe { ptr::read_volatile(run.add(8).cast::<u32>()) };
        match reason {
            KVM_EXIT_IO => {
                // SAFETY: as above; the kernel's data offset lies inside the mapping.
                sum = Some(unsafe {
                    let offset = ptr::read_volatile(run.add(40).cast::<u64>());
                    ptr::read_volatile(run.add(usize::try_from(offset).unwrap_or(0)))
                });
            }
            KVM_EXIT_HLT if sum == Some(5) => return Ok(()),
            other => {
                return Err(io::Error::other(format!("exit {other} with sum {sum:?}")));
            }
        }
    }
}
