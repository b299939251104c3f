//! Plays the supervisor and, through the accelerator `none`, the guest's CPU.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses a part; failures are theirs"
)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use anemone_ipc::vmm::{Accel, Event, FromVmm, Summary, ToVmm, VmConfig};
use anemone_ipc::{CONTROL_FD, Channel, FdIndex, VERSION, pair};

pub const MEMORY: u64 = 64 << 20;
pub const ECAM: u64 = 0xFC00_0000;
pub const PANIC_SLOT: u8 = 3;
/// Index of the first descriptor that a test adds.
pub const MORE_FDS: u16 = 4;

pub fn memfd(size: u64) -> File {
    // SAFETY: a NUL-terminated name; the new descriptor is owned by the File at once.
    let file = unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

/// The same, sealed against resizing.
pub fn sealed(size: u64) -> File {
    // SAFETY: a NUL-terminated name; the new descriptor is owned by the File at once.
    let file = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        let fd = libc::memfd_create(c"bounce".as_ptr(), flags);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no pointers.
    let failed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
    assert_eq!(failed, 0);
    file
}

/// The smallest kernel, which halts.
pub fn tiny_kernel() -> File {
    kernel(&[0xF4])
}

/// An ELF executable with one segment of code at 16 MiB.
pub fn kernel(code: &[u8]) -> File {
    let mut elf = vec![0u8; 0x1000];
    elf[..16].copy_from_slice(b"\x7FELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes()); // ET_EXEC
    put(18, &62u16.to_le_bytes()); // EM_X86_64
    put(20, &1u32.to_le_bytes());
    put(24, &0x100_0000u64.to_le_bytes()); // entry
    put(32, &64u64.to_le_bytes()); // program headers
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes()); // PT_LOAD
    put(68, &5u32.to_le_bytes());
    put(72, &0x1000u64.to_le_bytes()); // offset
    put(80, &0x100_0000u64.to_le_bytes()); // virtual address
    put(88, &0x100_0000u64.to_le_bytes()); // physical address
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    put(112, &0x1000u64.to_le_bytes());
    elf.extend_from_slice(code);
    let mut file = memfd(0);
    file.write_all(&elf).unwrap();
    file
}

/// `/dev/kvm`, or `None` where its absence was declared acceptable.
pub fn kvm() -> Option<File> {
    let file = File::options().read(true).write(true).open("/dev/kvm");
    let allowed = std::env::var("ANEMONE_ALLOW_MISSING").unwrap_or_default();
    let may_lack = allowed.split(',').any(|name| name == "kvm");
    assert!(file.is_ok() || may_lack, "/dev/kvm: {file:?}");
    file.ok()
}

pub struct Vmm {
    pub child: Child,
    pub channel: Channel,
    pub driver: BufReader<UnixStream>,
    pub serial: UnixStream,
    /// Guest memory.
    pub memory: File,
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Vmm {
    /// Starts the process and sends it a configuration.
    pub fn configure(change: impl FnOnce(&mut VmConfig)) -> (Self, FromVmm) {
        Self::configure_with(&[], change)
    }

    /// The same with more descriptors, the first of them at [`MORE_FDS`].
    pub fn configure_with(
        more: &[BorrowedFd<'_>],
        change: impl FnOnce(&mut VmConfig),
    ) -> (Self, FromVmm) {
        let mut config = VmConfig {
            version: VERSION,
            machine: "virt-1".to_owned(),
            accel: Accel::None {
                socket: Some(FdIndex(0)),
            },
            cpus: 1,
            cpu_model: "host".to_owned(),
            memory: MEMORY,
            memory_fd: FdIndex(1),
            kernel: FdIndex(2),
            initrd: None,
            cmdline: "console=ttyS0".to_owned(),
            devices: Vec::new(),
            serial: Some(FdIndex(3)),
            panic_device: Some(PANIC_SLOT),
            acpi_dump: None,
        };
        change(&mut config);
        let (ours, theirs) = pair().unwrap();
        let theirs = theirs.into_fd();
        let mut command = Command::new(env!("CARGO_BIN_EXE_anemone-vmm"));
        command
            .args(["--control-fd", "3", "--parent-pid"])
            .arg(std::process::id().to_string())
            .stdin(Stdio::null());
        let accel = match config.accel {
            Accel::Kvm { .. } => "kvm",
            Accel::Soft => "soft",
            Accel::None { .. } => "none",
        };
        // The command line has fewer CPUs than a configuration that is refused for their number.
        let cpus = config.cpus.min(anemone_virt::map::CPUS_MAX);
        command.args(["--accel", accel, "--cpus", &cpus.to_string()]);
        for device in config.devices.iter().filter(|d| d.socket.is_some()) {
            command.args(["--device", &device.id]);
        }
        let raw = theirs.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe; the descriptor is open in the child.
        unsafe {
            command.pre_exec(move || match libc::dup2(raw, CONTROL_FD) {
                CONTROL_FD => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let child = command.spawn().unwrap();
        drop(theirs);
        let (driver, driver_end) = UnixStream::pair().unwrap();
        let (serial, serial_end) = UnixStream::pair().unwrap();
        let (memory, kernel) = (memfd(config.memory), tiny_kernel());
        let mut fds = vec![
            driver_end.as_fd(),
            memory.as_fd(),
            kernel.as_fd(),
            serial_end.as_fd(),
        ];
        fds.extend(more);
        ours.send(&ToVmm::Configure(Box::new(config)), &fds)
            .unwrap();
        let answer = ours.recv().unwrap().message;
        (
            Self {
                child,
                channel: ours,
                driver: BufReader::new(driver),
                serial,
                memory,
            },
            answer,
        )
    }

    pub fn start() -> (Self, Summary) {
        let (vmm, answer) = Self::configure(|_| ());
        let FromVmm::Ready(summary) = answer else {
            panic!("{answer:?}")
        };
        vmm.channel.send(&ToVmm::Start, &[]).unwrap();
        (vmm, summary)
    }

    pub fn ask(&mut self, request: &str) -> String {
        writeln!(self.driver.get_mut(), "{request}").unwrap();
        let mut answer = String::new();
        self.driver.read_line(&mut answer).unwrap();
        let answer = answer.trim_end();
        answer
            .strip_prefix("ok")
            .unwrap_or_else(|| panic!("{request}: {answer}"))
            .trim()
            .to_owned()
    }

    pub fn number(&mut self, request: &str) -> u64 {
        let answer = self.ask(request);
        u64::from_str_radix(answer.trim_start_matches("0x"), 16).unwrap()
    }

    /// The next event. What is told about devices at the end is not one.
    pub fn event(&self) -> Event {
        loop {
            match self.channel.recv().unwrap().message {
                FromVmm::Event(event) => return event,
                FromVmm::Devices(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}
