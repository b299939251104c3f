//! Names: system calls of x86-64, and constants of the kernel's headers.

/// Numbers and names, one a line, from the kernel's table for x86-64
/// (arch/x86/entry/syscalls/syscall_64.tbl).
const SYSCALLS: &str = include_str!("syscalls.txt");

/// All system calls, by number.
pub fn syscalls() -> impl Iterator<Item = (u32, &'static str)> {
    SYSCALLS
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(number, name)| Some((number.parse().ok()?, name)))
}

/// The number of a system call.
pub fn syscall_number(name: &str) -> Option<u32> {
    syscalls()
        .find(|(_, known)| *known == name)
        .map(|(number, _)| number)
}

/// The name of a system call.
pub fn syscall_name(number: u32) -> Option<&'static str> {
    syscalls()
        .find(|(known, _)| *known == number)
        .map(|(_, name)| name)
}

/// Makes table entries of constants that `libc` has.
macro_rules! from_libc {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name as u32)),*] };
}

const LIBC: &[(&str, u32)] = from_libc! {
    PROT_NONE PROT_READ PROT_WRITE PROT_EXEC
    MAP_SHARED MAP_PRIVATE MAP_ANONYMOUS MAP_FIXED MAP_NORESERVE MAP_POPULATE MAP_STACK
    MAP_GROWSDOWN MAP_HUGETLB MAP_SHARED_VALIDATE MAP_TYPE
    MADV_DONTNEED MADV_FREE MADV_WILLNEED MADV_HUGEPAGE MADV_NOHUGEPAGE MADV_DONTDUMP
    MADV_DONTFORK MADV_REMOVE MADV_POPULATE_WRITE
    MREMAP_MAYMOVE
    CLONE_VM CLONE_FS CLONE_FILES CLONE_SIGHAND CLONE_THREAD CLONE_SYSVSEM CLONE_SETTLS
    CLONE_PARENT_SETTID CLONE_CHILD_CLEARTID CLONE_NEWUSER CLONE_NEWPID CLONE_PARENT
    FUTEX_WAIT FUTEX_WAKE FUTEX_WAIT_BITSET FUTEX_WAKE_BITSET FUTEX_REQUEUE FUTEX_CMP_REQUEUE
    FUTEX_LOCK_PI FUTEX_UNLOCK_PI FUTEX_PRIVATE_FLAG FUTEX_CLOCK_REALTIME
    F_DUPFD_CLOEXEC F_GETFD F_SETFD F_GETFL F_SETFL F_GET_SEALS F_ADD_SEALS F_OFD_SETLK
    F_GETPIPE_SZ FD_CLOEXEC O_NONBLOCK
    SIGABRT SIGBUS SIGFPE SIGSYS SIGTERM SIGUSR1 SIGWINCH
    PR_GET_NAME PR_SET_NAME PR_GET_SECCOMP PR_SET_NO_NEW_PRIVS PR_GET_NO_NEW_PRIVS
    PR_SET_VMA PR_SET_PDEATHSIG PR_SET_TIMERSLACK
    SECCOMP_SET_MODE_FILTER SECCOMP_GET_ACTION_AVAIL
    SIGCHLD CLONE_VFORK AF_UNIX SOL_SOCKET SO_ERROR SO_PEERCRED SO_DOMAIN SO_TYPE MSG_NOSIGNAL
    SHUT_RD SHUT_WR SHUT_RDWR
    FALLOC_FL_KEEP_SIZE FALLOC_FL_PUNCH_HOLE FALLOC_FL_ZERO_RANGE
    EPOLL_CTL_ADD EPOLL_CTL_DEL
    EFD_CLOEXEC EFD_NONBLOCK TFD_CLOEXEC TFD_NONBLOCK CLOCK_MONOTONIC CLOCK_REALTIME
    TCGETS TCSETS TCSETSW TCSETSF TIOCGWINSZ TIOCSWINSZ TIOCGPTN TIOCSPTLCK TIOCGPTPEER
    O_NOFOLLOW O_ACCMODE O_CREAT O_TRUNC AT_REMOVEDIR RWF_APPEND
    FIONBIO FIONREAD FIOCLEX
    SEEK_SET SEEK_CUR SEEK_END SEEK_DATA SEEK_HOLE
    RWF_DSYNC RWF_NOWAIT
    STATX_SIZE AT_EMPTY_PATH
    EPERM ENOMEM ENOSYS EACCES EINVAL ENOENT ENOTTY ENODEV EOPNOTSUPP
};

/// The first real-time signal that glibc leaves to programs (it keeps 32 and 33).
const SIGRTMIN: u32 = 34;

/// `_IO`, `_IOW`, `_IOR`, `_IOWR` (asm-generic/ioctl.h): direction, size of the argument, type
/// and number.
const fn io(kind: u8, number: u8) -> u32 {
    (kind as u32) << 8 | number as u32
}
const fn iow(kind: u8, number: u8, size: u32) -> u32 {
    1 << 30 | size << 16 | io(kind, number)
}
const fn ior(kind: u8, number: u8, size: u32) -> u32 {
    2 << 30 | size << 16 | io(kind, number)
}
const fn iowr(kind: u8, number: u8, size: u32) -> u32 {
    3 << 30 | size << 16 | io(kind, number)
}

const KVM: u8 = 0xAE;
const BLOCK: u8 = 0x12;

/// linux/kvm.h, linux/io_uring.h, linux/if_tun.h and linux/fs.h, which `libc` does not have.
const OTHER: &[(&str, u32)] = &[
    ("SIGRTMIN", SIGRTMIN),
    ("KVM_GET_API_VERSION", io(KVM, 0x00)),
    ("KVM_CREATE_VM", io(KVM, 0x01)),
    ("KVM_GET_MSR_INDEX_LIST", iowr(KVM, 0x02, 4)),
    ("KVM_CHECK_EXTENSION", io(KVM, 0x03)),
    ("KVM_GET_VCPU_MMAP_SIZE", io(KVM, 0x04)),
    ("KVM_GET_SUPPORTED_CPUID", iowr(KVM, 0x05, 8)),
    ("KVM_GET_MSR_FEATURE_INDEX_LIST", iowr(KVM, 0x0A, 4)),
    ("KVM_CREATE_VCPU", io(KVM, 0x41)),
    ("KVM_GET_DIRTY_LOG", iow(KVM, 0x42, 16)),
    ("KVM_SET_USER_MEMORY_REGION", iow(KVM, 0x46, 32)),
    ("KVM_SET_TSS_ADDR", io(KVM, 0x47)),
    ("KVM_SET_IDENTITY_MAP_ADDR", iow(KVM, 0x48, 8)),
    ("KVM_SET_GSI_ROUTING", iow(KVM, 0x6A, 8)),
    ("KVM_IRQFD", iow(KVM, 0x76, 32)),
    ("KVM_IOEVENTFD", iow(KVM, 0x79, 64)),
    ("KVM_SET_CLOCK", iow(KVM, 0x7B, 48)),
    ("KVM_GET_CLOCK", ior(KVM, 0x7C, 48)),
    ("KVM_RUN", io(KVM, 0x80)),
    ("KVM_GET_REGS", ior(KVM, 0x81, 144)),
    ("KVM_SET_REGS", iow(KVM, 0x82, 144)),
    ("KVM_GET_SREGS", ior(KVM, 0x83, 312)),
    ("KVM_SET_SREGS", iow(KVM, 0x84, 312)),
    ("KVM_GET_MSRS", iowr(KVM, 0x88, 8)),
    ("KVM_SET_MSRS", iow(KVM, 0x89, 8)),
    ("KVM_SET_SIGNAL_MASK", iow(KVM, 0x8B, 4)),
    ("KVM_GET_FPU", ior(KVM, 0x8C, 416)),
    ("KVM_SET_FPU", iow(KVM, 0x8D, 416)),
    ("KVM_GET_LAPIC", ior(KVM, 0x8E, 1024)),
    ("KVM_SET_LAPIC", iow(KVM, 0x8F, 1024)),
    ("KVM_SET_CPUID2", iow(KVM, 0x90, 8)),
    ("KVM_GET_MP_STATE", ior(KVM, 0x98, 4)),
    ("KVM_SET_MP_STATE", iow(KVM, 0x99, 4)),
    ("KVM_GET_VCPU_EVENTS", ior(KVM, 0x9F, 64)),
    ("KVM_SET_VCPU_EVENTS", iow(KVM, 0xA0, 64)),
    ("KVM_GET_DEBUGREGS", ior(KVM, 0xA1, 128)),
    ("KVM_SET_DEBUGREGS", iow(KVM, 0xA2, 128)),
    ("KVM_SET_TSC_KHZ", io(KVM, 0xA2)),
    ("KVM_GET_TSC_KHZ", io(KVM, 0xA3)),
    ("KVM_ENABLE_CAP", iow(KVM, 0xA3, 104)),
    ("KVM_GET_XSAVE", ior(KVM, 0xA4, 4096)),
    ("KVM_SET_XSAVE", iow(KVM, 0xA5, 4096)),
    ("KVM_SIGNAL_MSI", iow(KVM, 0xA5, 32)),
    ("KVM_GET_XCRS", ior(KVM, 0xA6, 392)),
    ("KVM_SET_XCRS", iow(KVM, 0xA7, 392)),
    ("KVM_KVMCLOCK_CTRL", io(KVM, 0xAD)),
    ("IORING_REGISTER_FILES_UPDATE", 6),
    ("IORING_REGISTER_ENABLE_RINGS", 12),
    ("IORING_REGISTER_RING_FDS", 20),
    ("IORING_UNREGISTER_RING_FDS", 21),
    ("TUNSETOFFLOAD", iow(b'T', 208, 4)),
    ("TUNSETQUEUE", iow(b'T', 217, 4)),
    ("BLKROGET", io(BLOCK, 94)),
    ("BLKSSZGET", io(BLOCK, 104)),
    ("BLKGETSIZE64", ior(BLOCK, 114, 8)),
    ("BLKDISCARD", io(BLOCK, 119)),
    ("BLKIOMIN", io(BLOCK, 120)),
    ("BLKIOOPT", io(BLOCK, 121)),
    ("BLKPBSZGET", io(BLOCK, 123)),
    ("BLKZEROOUT", io(BLOCK, 127)),
];

/// All constants a policy can name, with their values.
pub fn symbols() -> impl Iterator<Item = (&'static str, u32)> {
    LIBC.iter().chain(OTHER).copied()
}

pub(crate) fn symbol(name: &str) -> Option<u32> {
    symbols()
        .find(|(known, _)| *known == name)
        .map(|(_, value)| value)
}
