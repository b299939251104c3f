//! The report of a crash, which needs no system call but `write`.
//!
//! The standard library reports overflows of a stack by handlers of its own. They need a second
//! stack for each thread, and with it five more system calls in every policy and 0.1 ms at each
//! start. They are installed only where there are no others, so these come first: before `main`.

use std::fmt::Write as _;
use std::mem;
use std::ptr;

use crate::report::Line;

#[used]
#[unsafe(link_section = ".init_array")]
static INSTALL: extern "C" fn() = install;

extern "C" fn install() {
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe. The call
        // cannot fail for these signals.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_crash as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(signal, &raw const action, ptr::null_mut());
        }
    }
}

/// Says where it was. An overflow of a stack ends the process without this: there is no room left
/// for it.
extern "C" fn on_crash(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes both to a handler with SA_SIGINFO.
    let (address, at) = unsafe {
        let context: *const libc::ucontext_t = context.cast();
        let registers = &(*context).uc_mcontext.gregs;
        ((*info).si_addr(), registers[libc::REG_RIP as usize])
    };
    let name = match signal {
        libc::SIGBUS => "SIGBUS",
        _ => "SIGSEGV",
    };
    let role = anemone_log::role();
    let mut line = Line::new();
    // Writing to a `Line` cannot fail.
    let _ = writeln!(
        line,
        "{role}: crashed: {name} at address {address:p}, rip {at:#x}"
    );
    line.print();
    // The signal is blocked here, so that the same fault again ends the process, without any
    // system call that a policy could forbid.
    loop {
        // SAFETY: for what is meant by a process that is at its end: the reads fault, or have no
        // effect.
        unsafe {
            std::arch::asm!(
                "mov {x}, [{x}]",
                "mov {x}, [{zero}]",
                x = inout(reg) address => _,
                zero = in(reg) 0usize,
                options(nostack, readonly)
            );
        }
    }
}
