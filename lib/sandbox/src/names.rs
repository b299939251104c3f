//! Names of system calls, without a table of pointers that each process would have to relocate.

/// Numbers and names, one a line, sorted by number.
const SYSCALLS: &str = include_str!("../../policy/src/syscalls.txt");

/// The name of an x86-64 system call. Async-signal-safe.
pub fn syscall(number: u32) -> Option<&'static str> {
    SYSCALLS
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(n, _)| n.parse() == Ok(number))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_libc() {
        for (number, name) in [
            (libc::SYS_read, "read"),
            (libc::SYS_openat, "openat"),
            (libc::SYS_rseq, "rseq"),
            (libc::SYS_pidfd_send_signal, "pidfd_send_signal"),
            (libc::SYS_mseal, "mseal"),
        ] {
            assert_eq!(syscall(number as u32), Some(name));
        }
        assert_eq!(syscall(400), None);
        assert_eq!(syscall(u32::MAX), None);
    }
}
