//! Installing filters, and the report of a call that one of them denies.

use std::cell::Cell;
use std::fmt::Write as _;
use std::io;
use std::mem;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::filter::{Call, Filter, Instruction};
use crate::report::{Denied, Line, ThreadName};
use crate::{Error, Mode, monitor, report};

/// The policies of this process by their index, for the report.
static POLICIES: [AtomicPtr<Filter>; 16] = [const { AtomicPtr::new(ptr::null_mut()) }; 16];

thread_local! {
    /// Id and name of a thread that has restricted itself; of one that only inherits a policy the
    /// report tells neither.
    static THREAD: Cell<(i32, [u8; 16])> = const { Cell::new((0, [0; 16])) };
}

/// `si_code` of a SIGSYS that a filter has raised (asm-generic/siginfo.h).
const SYS_SECCOMP: i32 = 1;

/// The start of `siginfo_t` for SIGSYS on 64-bit machines (asm-generic/siginfo.h).
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    /// The data of the filter's trap action: the policy's index.
    errno: i32,
    code: i32,
    padding: i32,
    call_address: u64,
    number: i32,
    architecture: u32,
}

/// Restricts the calling thread, and threads and processes it starts later, to `filter`.
/// A second filter restricts further: what one denies stays denied.
///
/// A denied call is reported on standard error, then the process dies by SIGSYS. The report
/// needs a thread that does not block SIGSYS; one that does dies without it. A panic of any
/// thread ends the process with exit status 101. With [`Mode::Log`] the call is reported and
/// carried out.
///
/// # Errors
/// [`Error::Seccomp`] where the kernel cannot filter system calls.
pub fn restrict(filter: &'static Filter, mode: Mode) -> Result<(), Error> {
    match mode {
        Mode::On => {
            install_reporter();
            // Asked now, because a report may not ask.
            report::remember_process();
            identity();
            if let Some(slot) = POLICIES.get(usize::from(filter.index)) {
                slot.store(ptr::from_ref(filter).cast_mut(), Ordering::Release);
            }
            install(filter.program, 0).map_err(Error::Seccomp)?;
            #[cfg(feature = "compromised")]
            anemone_compromised::restricted(anemone_log::role(), filter.name);
            Ok(())
        }
        Mode::Log => monitor::restrict(filter),
    }
}

/// Waits for the end of the process: what a thread does that has nothing left to do. To end it
/// would take system calls that no policy has for that alone.
pub fn rest() -> ! {
    loop {
        std::thread::park();
    }
}

/// Installs a program for the calling thread; returns what the system call does.
pub(crate) fn install(program: &[Instruction], flags: libc::c_ulong) -> io::Result<i32> {
    let description = libc::sock_fprog {
        // A longer program is refused for its other length.
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    let attempt = || {
        // SAFETY: the description and the program it points at outlive the call, which only
        // reads them.
        unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const description,
            )
        }
    };
    let mut result = attempt();
    if result < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EACCES) {
        // Only a thread that can never gain privileges may filter itself.
        // SAFETY: integers only.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        result = attempt();
    }
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// The handler of SIGSYS never returns, so that a signal that it blocks stays blocked: the next denied
/// call ends the process. Where the next one is to be tried, nothing is blocked.
const OTHER_FLAGS: libc::c_int = match cfg!(feature = "compromised") {
    true => libc::SA_NODEFER,
    false => 0,
};

fn install_reporter() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        // SAFETY: an all-zero sigaction is valid; the handler is async-signal-safe. The call
        // cannot fail for this signal.
        unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_sigsys as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | OTHER_FLAGS;
            libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut());
        }
        install_panic_hook();
    });
}

/// A system call that no table has and no policy allows.
const DENIED_BY_ALL: libc::c_long = 0x3FFF_FFFF;

/// Reports the call and lets the signal take its course. Needs no system call but `write`.
extern "C" fn on_sigsys(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes both to a handler with SA_SIGINFO, and for SIGSYS the
    // information has this layout.
    let (info, registers) = unsafe {
        let context: *const libc::ucontext_t = context.cast();
        (&*info.cast::<SigsysInfo>(), &(*context).uc_mcontext.gregs)
    };
    if info.code == SYS_SECCOMP {
        let argument = |register: libc::c_int| registers[register as usize] as u64;
        let call = Call {
            number: info.number as u32,
            architecture: info.architecture,
            instruction_pointer: info.call_address,
            // The convention of the 64-bit table (arch/x86/entry/entry_64.S).
            arguments: [
                argument(libc::REG_RDI),
                argument(libc::REG_RSI),
                argument(libc::REG_RDX),
                argument(libc::REG_R10),
                argument(libc::REG_R8),
                argument(libc::REG_R9),
            ],
        };
        // SAFETY: the table holds null or pointers from static references.
        let policy = usize::try_from(info.errno)
            .ok()
            .and_then(|i| POLICIES.get(i))
            .and_then(|slot| unsafe { slot.load(Ordering::Acquire).as_ref() })
            .map_or("?", |filter| filter.name);
        let (thread, thread_name) = THREAD.get();
        Denied {
            thread,
            thread_name: ThreadName(thread_name),
            call,
            policy,
            let_through: None,
        }
        .print();
        #[cfg(feature = "compromised")]
        anemone_compromised::denied();
    }
    // SIGSYS is blocked until this handler returns. One more denied call sends it nevertheless,
    // with its default action (kernel/signal.c, force_sig_info_to_task).
    // SAFETY: no arguments.
    unsafe { libc::syscall(DENIED_BY_ALL) };
    // A thread without a filter, to which somebody has sent the signal.
    // SAFETY: integers only.
    unsafe {
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread_id(), libc::SIGSYS);
    }
}

/// A panic is told in one line and ends the process by its exit status: a backtrace would open
/// files, and `abort` would need system calls of its own.
fn install_panic_hook() {
    /// As the standard library has it for a panic of the first thread.
    const PANICKED: libc::c_int = 101;
    std::panic::set_hook(Box::new(|info| {
        let (role, message) = (anemone_log::role(), info.payload_as_str().unwrap_or("?"));
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("?");
        let mut line = Line::new();
        // Writing to a `Line` cannot fail. There always is a location.
        let _ = write!(line, "{role}: thread \"{thread}\" panicked");
        if let Some(place) = info.location() {
            let _ = write!(line, " at {place}");
        }
        let _ = writeln!(line, ": {message}");
        line.print();
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(PANICKED) };
    }));
}

/// Id and name of the calling thread, and whether this is the first call: the thread is asked then
/// only, because the policy that it has taken on since may forbid to ask.
pub(crate) fn identity() -> (i32, ThreadName, bool) {
    let (known, name) = THREAD.get();
    if known != 0 {
        return (known, ThreadName(name), false);
    }
    let (id, name) = (thread_id(), thread_name());
    THREAD.set((id, name.0));
    (id, name, true)
}

fn thread_id() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// The name of the calling thread.
fn thread_name() -> ThreadName {
    let mut name = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes, with a NUL.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    ThreadName(name)
}
