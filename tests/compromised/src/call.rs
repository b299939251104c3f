//! System calls as an attacker makes them, and the way back from one that a filter denies.
//!
//! A filter of ours answers with SIGSYS. Its handler, which has reported the call, may not return:
//! no policy has `rt_sigreturn`. It jumps instead, to where the call was made.

use std::arch::naked_asm;
use std::cell::Cell;
use std::ptr;

/// What [`raw`] returns for a call that the filter has denied: no system call does.
const DENIED: i64 = i64::MIN;

thread_local! {
    /// Stack pointer of the call under way; 0 if there is none.
    static UNDER_WAY: Cell<usize> = const { Cell::new(0) };
}

/// What a call came to.
pub type Answer = Result<i64, Refusal>;

/// Why a call was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The filter has raised SIGSYS, which ends the process in any other build.
    Denied,
    /// The kernel, or the filter in its place, has answered with this error.
    Errno(i32),
}

/// Makes a system call.
pub fn call<const N: usize>(number: i64, arguments: [u64; N]) -> Answer {
    let mut words = [0; 7];
    words[0] = number as u64;
    words[1..=N].copy_from_slice(&arguments);
    made(&words, raw)
}

/// Makes a system call with three small arguments by the table for 32-bit programs.
pub fn call_32(number: u32, arguments: [u32; 3]) -> Answer {
    let [a, b, c] = arguments.map(u64::from);
    made(&[number.into(), a, b, c, 0, 0, 0], raw_32)
}

type Raw = unsafe extern "C" fn(*const [u64; 7], *mut usize) -> i64;

fn made(words: &[u64; 7], raw: Raw) -> Answer {
    let result = UNDER_WAY.with(|place| {
        // SAFETY: both pointers are valid; what the call does to this process is the point of it.
        let result = unsafe { raw(words, place.as_ptr()) };
        place.set(0);
        result
    });
    match result {
        DENIED => Err(Refusal::Denied),
        -4095..0 => Err(Refusal::Errno(-result as i32)),
        _ => Ok(result),
    }
}

/// For the handler of SIGSYS, after its report: goes back to the attempt of this thread, or ends the
/// process where there is none.
pub fn go_back() {
    let stack = UNDER_WAY.get();
    if stack == 0 {
        // SAFETY: ends the process at once.
        unsafe { libc::_exit(128 + libc::SIGSYS) };
    }
    // SAFETY: `raw` has saved its registers there, and is below this handler on the same stack.
    unsafe { resume(stack) }
}

/// Saves the registers that belong to the caller, says where, and makes the call of the words.
#[unsafe(naked)]
unsafe extern "C" fn raw(words: *const [u64; 7], saved: *mut usize) -> i64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rsi], rsp",
        "mov rax, [rdi]",
        "mov rsi, [rdi + 16]",
        "mov rdx, [rdi + 24]",
        "mov r10, [rdi + 32]",
        "mov r8, [rdi + 40]",
        "mov r9, [rdi + 48]",
        "mov rdi, [rdi + 8]",
        "syscall",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// The same by the gate of 32-bit programs, whose result has 32 bits.
#[unsafe(naked)]
unsafe extern "C" fn raw_32(words: *const [u64; 7], saved: *mut usize) -> i64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rsi], rsp",
        "mov rax, [rdi]",
        "mov rbx, [rdi + 8]",
        "mov rcx, [rdi + 16]",
        "mov rdx, [rdi + 24]",
        "int 0x80",
        "cdqe",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

/// Returns from `raw` in its place, with [`DENIED`].
#[unsafe(naked)]
unsafe extern "C" fn resume(stack: usize) -> ! {
    naked_asm!(
        "mov rsp, rdi",
        "mov rax, {denied}",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        denied = const DENIED,
    )
}

/// Whether a word can be read at an address, without touching it: the kernel looks whether to wait
/// there.
pub fn is_readable(address: u64) -> Answer {
    let at_once = libc::timespec {
        tv_sec: 0,
        tv_nsec: 1,
    };
    let answer = call(
        libc::SYS_futex,
        [
            address,
            (libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG) as u64,
            0x005E_ED5E,
            ptr::from_ref(&at_once) as u64,
        ],
    );
    match answer {
        Err(Refusal::Errno(libc::EAGAIN | libc::ETIMEDOUT)) => Ok(0),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_made() {
        let own = i64::from(std::process::id());
        assert_eq!(call(libc::SYS_getpid, []), Ok(own));
        let wrong = call(libc::SYS_close, [u64::MAX]);
        assert_eq!(wrong, Err(Refusal::Errno(libc::EBADF)));
    }

    #[test]
    fn memory_is_readable_or_not() {
        let word = 7u32;
        assert_eq!(is_readable(ptr::from_ref(&word) as u64), Ok(0));
        let hole = is_readable(4096);
        assert_eq!(hole, Err(Refusal::Errno(libc::EFAULT)));
    }
}
