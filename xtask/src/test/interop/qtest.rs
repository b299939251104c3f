//! QEMU without a guest: its CPU is halted, and the test is the driver of its virtio-blk device, over
//! the qtest socket and the file that is its memory. What remains of QEMU is the front end.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::packages::Packages;
use crate::sh::{self, Guarded};

/// Bytes of a request's data.
pub const DATA: u64 = 4096;
/// Requests in flight at most; each has three descriptors.
pub const SLOTS: u16 = 32;

const SIZE: u16 = 128;
const MEMORY: u64 = 64 << 20;
/// Slot of the device on bus 0, and where its registers are put.
const DEVICE: u32 = 3;
const REGISTERS: u64 = 0xd000_0000;
// Guest addresses of the queue's parts and of the requests.
const TABLE: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x10_1000;
const USED: u64 = 0x10_2000;
const HEADERS: u64 = 0x11_0000;
const BUFFERS: u64 = 0x20_0000;
/// A status that no device writes.
const NONE: u8 = 0xaa;
/// Requests of virtio-blk (virtio 1.3, 5.2.6).
const OUT: u32 = 1;

/// QEMU and its device, as the driver sees it.
pub struct Machine {
    _qemu: Guarded,
    socket: BufReader<UnixStream>,
    memory: File,
    notify: u64,
    available: u16,
    used: u16,
}

impl Machine {
    /// Starts QEMU with a vhost-user-blk device whose back end listens at `backend`, and sets the
    /// device up as a driver does.
    pub fn start(packages: &Packages, folder: &Path, backend: &Path) -> Result<Self> {
        let (path, ram) = (folder.join("qtest"), folder.join("memory"));
        // Debian's QEMU has no accelerator without a CPU. This firmware is HLT all over.
        let firmware = folder.join("firmware");
        fs::write(&firmware, vec![0xf4; 64 << 10])?;
        let mut qemu = packages.qemu()?;
        qemu.arg("-bios").arg(&firmware);
        qemu.args(["-accel", "tcg", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-m", "64"])
            .args(["-M", "q35,memory-backend=memory"])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=memory,size=64M,share=on,mem-path={}",
                ram.display()
            ))
            .arg("-qtest")
            .arg(format!("unix:{},server=on,wait=off", path.display()))
            .args(["-qtest-log", "none"])
            .arg("-chardev")
            .arg(format!(
                "socket,id=backend,path={},reconnect=1",
                backend.display()
            ))
            .arg("-device")
            .arg(format!(
                "vhost-user-blk-pci,chardev=backend,num-queues=1,queue-size={SIZE},addr={DEVICE}"
            ));
        let qemu = sh::spawn(qemu.stdin(Stdio::null()))?;
        sh::wait_for_path(&path, super::START)?;
        let socket = UnixStream::connect(&path).context("QEMU's qtest socket")?;
        socket.set_read_timeout(Some(super::START))?;
        let memory = File::options().read(true).write(true).open(&ram)?;
        ensure!(memory.metadata()?.len() == MEMORY, "QEMU's memory file");
        let mut machine = Self {
            _qemu: qemu,
            socket: BufReader::new(socket),
            memory,
            notify: 0,
            available: 0,
            used: 0,
        };
        machine.set_up()?;
        Ok(machine)
    }

    /// One command of the qtest protocol; the number it answers with, if any.
    fn command(&mut self, text: &str) -> Result<u64> {
        writeln!(self.socket.get_mut(), "{text}")?;
        loop {
            let mut line = String::new();
            ensure!(
                self.socket.read_line(&mut line)? > 0,
                "QEMU ended at {text}"
            );
            let mut words = line.split_whitespace();
            match words.next() {
                Some("OK") => {
                    let number = words.next().and_then(|word| word.strip_prefix("0x"));
                    return Ok(u64::from_str_radix(number.unwrap_or("0"), 16)?);
                }
                Some("IRQ") => {}
                _ => bail!("QEMU answers {text} with {line}"),
            }
        }
    }

    fn config_read(&mut self, offset: u32) -> Result<u32> {
        let address = 1 << 31 | DEVICE << 11 | (offset & !3);
        self.command(&format!("outl 0xcf8 {address:#x}"))?;
        Ok(self.command("inl 0xcfc")? as u32)
    }

    fn config_write(&mut self, offset: u32, value: u32) -> Result<()> {
        let address = 1 << 31 | DEVICE << 11 | offset;
        self.command(&format!("outl 0xcf8 {address:#x}"))?;
        self.command(&format!("outl 0xcfc {value:#x}"))?;
        Ok(())
    }

    /// virtio 1.3, 3.1 and 4.1.
    fn set_up(&mut self) -> Result<()> {
        const COMMON: u32 = 1;
        const NOTIFY: u32 = 2;
        const MEMORY_AND_MASTER: u32 = 6;
        let (mut common, mut notify) = (None, None);
        let mut at = self.config_read(0x34)? & 0xff;
        let mut bar = 0;
        while at != 0 {
            let head = self.config_read(at)?;
            // A vendor's capability: length, type; then the BAR, the offset in it.
            if head & 0xff == 9 {
                let place = (self.config_read(at + 4)? & 7, self.config_read(at + 8)?);
                match head >> 24 {
                    COMMON => (bar, common) = (place.0, Some(place.1)),
                    NOTIFY => notify = Some(place.1),
                    _ => {}
                }
            }
            at = head >> 8 & 0xff;
        }
        let (Some(common), Some(notify)) = (common, notify) else {
            bail!("QEMU's device has no virtio capabilities");
        };
        // 64 bits wide, as all with these registers.
        self.config_write(0x10 + 4 * bar, REGISTERS as u32)?;
        self.config_write(0x14 + 4 * bar, 0)?;
        self.config_write(4, MEMORY_AND_MASTER)?;
        let base = REGISTERS + u64::from(common);
        let steps: &[(&str, u64, u64)] = &[
            ("writeb", 0x14, 0),
            ("writeb", 0x14, 1),
            ("writeb", 0x14, 3),
            // Nothing but VIRTIO_F_VERSION_1.
            ("writel", 0x08, 0),
            ("writel", 0x0c, 0),
            ("writel", 0x08, 1),
            ("writel", 0x0c, 1),
            ("writeb", 0x14, 11),
            ("writew", 0x16, 0),
            ("writew", 0x18, SIZE.into()),
            ("writel", 0x20, TABLE),
            ("writel", 0x24, 0),
            ("writel", 0x28, AVAILABLE),
            ("writel", 0x2c, 0),
            ("writel", 0x30, USED),
            ("writel", 0x34, 0),
            ("writew", 0x1c, 1),
            ("writeb", 0x14, 15),
        ];
        for (command, offset, value) in steps {
            let at = base + offset;
            self.command(&format!("{command} {at:#x} {value:#x}"))?;
        }
        let status = self.command(&format!("readb {:#x}", base + 0x14))?;
        ensure!(status == 15, "QEMU's device has status {status:#x}");
        self.notify = REGISTERS + u64::from(notify);
        Ok(())
    }

    /// Writes `data` at `sector` by the request with number `slot`, which is not in flight.
    pub fn write(&mut self, slot: u16, sector: u64, data: &[u8]) -> Result<()> {
        let (n, head) = (u64::from(slot), 3 * slot);
        let (header, buffer) = (HEADERS + 64 * n, BUFFERS + DATA * n);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&OUT.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.write_all_at(&bytes, header)?;
        self.memory.write_all_at(&[NONE], header + 32)?;
        self.memory.write_all_at(data, buffer)?;
        let parts = [(header, 16, 1), (buffer, DATA, 1), (header + 32, 1, 2)];
        for (i, (address, length, flags)) in (0..).zip(parts) {
            let descriptor = u128::from(address)
                | u128::from(length) << 64
                | flags << 96
                | u128::from(head + i + 1) << 112;
            let at = TABLE + 16 * u64::from(head + i);
            self.memory.write_all_at(&descriptor.to_le_bytes(), at)?;
        }
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_all_at(&head.to_le_bytes(), entry)?;
        self.available = self.available.wrapping_add(1);
        let index = self.available.to_le_bytes();
        self.memory.write_all_at(&index, AVAILABLE + 2)?;
        let at = self.notify;
        self.command(&format!("writew {at:#x} 0x0"))?;
        Ok(())
    }

    /// The slot of the next request that was returned; `None` if there is none for so long.
    pub fn returned(&mut self, patience: Duration) -> Result<Option<u16>> {
        let end = Instant::now() + patience;
        let mut index = [0; 2];
        loop {
            self.memory.read_exact_at(&mut index, USED + 2)?;
            if u16::from_le_bytes(index) != self.used {
                break;
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        let mut head = [0; 4];
        let entry = USED + 4 + 8 * u64::from(self.used % SIZE);
        self.memory.read_exact_at(&mut head, entry)?;
        self.used = self.used.wrapping_add(1);
        let slot = u32::from_le_bytes(head) / 3;
        ensure!(slot < SLOTS.into(), "an unknown request was returned");
        let mut status = [0];
        self.memory
            .read_exact_at(&mut status, HEADERS + 64 * u64::from(slot) + 32)?;
        ensure!(status == [0], "a write ended with status {}", status[0]);
        Ok(Some(slot as u16))
    }
}
