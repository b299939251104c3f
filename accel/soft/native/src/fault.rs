//! #MF and #XM that the host raises for the guest.
//!
//! Thunks run with the guest's own exception masks. A guest that unmasks an exception, which is
//! rare, and meets it makes the host's kernel send SIGFPE; the handler continues the thunk at its
//! fault exit, and [`crate::NativeCpu::run`] reports the fault. So the state after a fault is exact by
//! construction, and masked exceptions cost nothing. A SIGFPE from any other code goes to the
//! action that was installed before.

use std::cell::Cell;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

/// The thunk that this thread runs: its first byte, one past its last, its fault exit.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub start: usize,
    pub end: usize,
    pub exit: usize,
}

thread_local! {
    /// Constant and without destructor, so that the handler's access allocates nothing.
    pub(crate) static WINDOW: Cell<Window> = const { Cell::new(Window { start: 0, end: 0, exit: 0 }) };
}

static PREVIOUS: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

/// Installs the handler, once in the process. Before a jail forbids `rt_sigaction`; `rt_sigreturn` must
/// stay allowed.
///
/// # Errors
/// That of `sigaction`.
pub(crate) fn install() -> io::Result<()> {
    let result = PREVIOUS.get_or_init(|| {
        let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all-zero is a valid sigaction, and both pointers are to live values; the handler
        // has the signature that SA_SIGINFO asks for.
        unsafe {
            (*action.as_mut_ptr()).sa_sigaction = on_sigfpe as *const () as usize;
            (*action.as_mut_ptr()).sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            if libc::sigaction(libc::SIGFPE, action.as_ptr(), previous.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error()
                    .raw_os_error()
                    .unwrap_or(libc::EINVAL));
            }
            Ok(previous.assume_init())
        }
    });
    match result {
        Ok(_) => Ok(()),
        Err(code) => Err(io::Error::from_raw_os_error(*code)),
    }
}

extern "C" fn on_sigfpe(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    let window = WINDOW.get();
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let rip = unsafe { &mut (*context).uc_mcontext.gregs[libc::REG_RIP as usize] };
    let at = *rip as usize;
    if (window.start..window.end).contains(&at) {
        *rip = window.exit as i64;
        return;
    }
    // Not ours: the instruction runs again under the action that was there before.
    if let Some(Ok(previous)) = PREVIOUS.get() {
        // SAFETY: restores an action that the kernel handed out.
        unsafe { libc::sigaction(libc::SIGFPE, previous, ptr::null_mut()) };
    }
}
