//! Kernels made by hand, and a guest to load them into.
#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "all of it is test code")]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::process::{Command, Stdio};

use anemone_boot::{BootRequest, Entry, Error, MemoryRange, RangeKind, load};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const MIB: u64 = 1 << 20;
pub const RAM: u64 = 64 * MIB;
pub const ACPI: u64 = 0x9_0000;
pub const ACPI_END: u64 = 0xA_0000;
pub const HOLE: u64 = 0xF_0000;
pub const HOLE_END: u64 = MIB;
pub const KERNEL: u64 = 16 * MIB;
pub const KERNEL_MEMORY: u64 = 8 * MIB;

/// A guest with 64 MiB, of which two ranges below 1 MiB are not its own.
pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub map: Vec<MemoryRange>,
    pub low_ram_end: u64,
}

pub fn range(start: u64, end: u64, kind: RangeKind) -> MemoryRange {
    let size = end - start;
    MemoryRange { start, size, kind }
}

impl Guest {
    pub fn new(low_ram_end: u64) -> Self {
        let ranges = [(GuestAddress(0), low_ram_end as usize)];
        Self {
            memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
            map: vec![
                range(0, ACPI, RangeKind::Ram),
                range(ACPI, ACPI_END, RangeKind::Acpi),
                range(ACPI_END, HOLE, RangeKind::Ram),
                range(HOLE, HOLE_END, RangeKind::Reserved),
                range(HOLE_END, low_ram_end, RangeKind::Ram),
            ],
            low_ram_end,
        }
    }

    pub fn boot(
        &self,
        kernel: &File,
        initrd: Option<&File>,
        cmdline: &str,
    ) -> Result<Entry, Error> {
        let request = BootRequest {
            kernel,
            initrd,
            cmdline,
            memory_map: &self.map,
            rsdp: ACPI,
            low_ram_end: self.low_ram_end,
        };
        load(&self.memory, &request)
    }

    pub fn kernel(&self, bytes: &[u8]) -> Result<Entry, Error> {
        self.boot(&file(bytes), None, "console=hvc0")
    }

    pub fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let address = GuestAddress(address);
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }

    pub fn u16(&self, address: u64) -> u16 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn u32(&self, address: u64) -> u32 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn u64(&self, address: u64) -> u64 {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    /// The text up to a NUL.
    pub fn text(&self, address: u64) -> String {
        let bytes = self.read(address, 4096);
        let end = bytes.iter().position(|byte| *byte == 0).unwrap();
        String::from_utf8(bytes[..end].to_vec()).unwrap()
    }

    /// The part of the map that is not the guest's has not been written.
    pub fn assert_untouched(&self) {
        for (start, end) in [(0, 0x1000), (ACPI, ACPI_END), (HOLE, HOLE_END)] {
            let bytes = self.read(start, (end - start) as usize);
            assert!(bytes.iter().all(|byte| *byte == 0), "{start:#x}");
        }
    }
}

/// A file without a name.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// Bytes that are different everywhere, half of them repetitive, with the call instructions that
/// the x86 filter of xz rewrites.
pub fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if state & 1 == 0 {
            bytes.extend_from_slice(&state.to_le_bytes());
        } else {
            bytes.push(0xE8);
            bytes.extend_from_slice(&((state >> 8) as u32 & 0xFFFF).to_le_bytes());
        }
    }
    bytes.truncate(length);
    bytes
}

pub struct Load {
    pub address: u64,
    pub bytes: Vec<u8>,
    pub memory_size: u64,
}

/// Three segments such as a kernel has: text, data, and data that is mostly zero.
pub fn segments() -> Vec<Load> {
    let segment = |address, seed, size: usize, zero: u64| Load {
        address,
        bytes: content(seed, size),
        memory_size: size as u64 + zero,
    };
    vec![
        segment(KERNEL, 3, 150_000, 0),
        segment(KERNEL + MIB, 5, 70_001, 0),
        segment(KERNEL + 2 * MIB, 7, 4_096, MIB),
    ]
}

/// An ELF file, whose fields tests overwrite to make it wrong.
pub fn elf(entry: u64, loads: &[Load], notes: &[u8]) -> Vec<u8> {
    let count = loads.len() + usize::from(!notes.is_empty());
    let mut bytes = vec![0; 64 + count * 56];
    bytes[..7].copy_from_slice(b"\x7FELF\x02\x01\x01");
    put(&mut bytes, 16, &2u16.to_le_bytes());
    put(&mut bytes, 18, &62u16.to_le_bytes());
    put(&mut bytes, 20, &1u32.to_le_bytes());
    put(&mut bytes, 24, &entry.to_le_bytes());
    put(&mut bytes, 32, &64u64.to_le_bytes());
    put(&mut bytes, 52, &64u16.to_le_bytes());
    put(&mut bytes, 54, &56u16.to_le_bytes());
    put(&mut bytes, 56, &(count as u16).to_le_bytes());
    for (index, load) in loads.iter().enumerate() {
        let at = 64 + index * 56;
        let offset = bytes.len().next_multiple_of(4096);
        put(&mut bytes, at, &1u32.to_le_bytes());
        put(&mut bytes, at + 8, &(offset as u64).to_le_bytes());
        let virtual_address = load.address.wrapping_add(0xFFFF_FFFF_8000_0000);
        put(&mut bytes, at + 16, &virtual_address.to_le_bytes());
        put(&mut bytes, at + 24, &load.address.to_le_bytes());
        put(
            &mut bytes,
            at + 32,
            &(load.bytes.len() as u64).to_le_bytes(),
        );
        put(&mut bytes, at + 40, &load.memory_size.to_le_bytes());
        put(&mut bytes, at + 48, &0x20_0000u64.to_le_bytes());
        bytes.resize(offset, 0);
        bytes.extend_from_slice(&load.bytes);
    }
    if !notes.is_empty() {
        let at = 64 + loads.len() * 56;
        let offset = bytes.len() as u64;
        put(&mut bytes, at, &4u32.to_le_bytes());
        put(&mut bytes, at + 8, &offset.to_le_bytes());
        put(&mut bytes, at + 32, &(notes.len() as u64).to_le_bytes());
        put(&mut bytes, at + 40, &(notes.len() as u64).to_le_bytes());
        put(&mut bytes, at + 48, &4u64.to_le_bytes());
        bytes.extend_from_slice(notes);
    }
    bytes
}

pub fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&(name.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&kind.to_le_bytes());
    for part in [name, value] {
        bytes.extend_from_slice(part);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// The ELF file that the payloads of [`bzimage`] contain.
pub fn vmlinux() -> Vec<u8> {
    elf(KERNEL + 0x100, &segments(), &note(b"Xen\0", 18, &[0; 8]))
}

/// A bzImage of protocol 2.15 around a payload.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP_SECTORS: usize = 3;
    const PAYLOAD_OFFSET: usize = 0x300;
    let setup = (SETUP_SECTORS + 1) * 512;
    let mut bytes = vec![0; setup + PAYLOAD_OFFSET];
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let size = (bytes.len() - setup) as u32 / 16;
    let seed = content(11, PAYLOAD_OFFSET);
    put(&mut bytes, setup, &seed);
    bytes[0x1F1] = SETUP_SECTORS as u8;
    put(&mut bytes, 0x1F4, &size.to_le_bytes());
    put(&mut bytes, 0x1FE, &0xAA55u16.to_le_bytes());
    bytes[0x200] = 0xEB;
    bytes[0x201] = 0x6A;
    put(&mut bytes, 0x202, b"HdrS");
    put(&mut bytes, 0x206, &0x020Fu16.to_le_bytes());
    put(&mut bytes, 0x20E, &0x200u16.to_le_bytes());
    // Loaded high, and a heap that nobody will have.
    bytes[0x211] = 0x81;
    put(&mut bytes, 0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(&mut bytes, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut bytes, 0x236, &0x7Fu16.to_le_bytes());
    put(&mut bytes, 0x238, &2047u32.to_le_bytes());
    put(&mut bytes, 0x248, &(PAYLOAD_OFFSET as u32).to_le_bytes());
    put(&mut bytes, 0x24C, &(payload.len() as u32).to_le_bytes());
    put(&mut bytes, 0x258, &KERNEL.to_le_bytes());
    put(&mut bytes, 0x260, &(KERNEL_MEMORY as u32).to_le_bytes());
    put(
        &mut bytes,
        0x400,
        b"6.1.0-test (someone@somewhere) #1 SMP\0",
    );
    bytes
}

/// Compresses a kernel and appends its size, as the kernel's build does.
pub fn payload(format: &str, kernel: &[u8]) -> Vec<u8> {
    // The kernel's build asks for the best compression; the formats are the same.
    let command: &[&str] = match format {
        "gzip" => &["gzip", "-n", "-f", "-9"],
        "xz" => &[
            "xz",
            "--check=crc32",
            "--x86",
            "--lzma2=preset=1,dict=32MiB",
        ],
        "lzma" => &["xz", "--format=lzma", "-1"],
        "zstd" => &["zstd", "-3", "--long=27"],
        "LZ4" => &["lz4", "-l", "-9", "-", "-"],
        other => panic!("{other}"),
    };
    let mut bytes = filter(command, kernel);
    if format != "gzip" {
        bytes.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
    }
    bytes
}

/// All formats that [`payload`] knows.
pub const FORMATS: [&str; 5] = ["gzip", "xz", "lzma", "zstd", "LZ4"];

/// What a program makes of its standard input.
pub fn filter(command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            let packages = "gzip, xz-utils, zstd, lz4";
            panic!("{} must be installed ({packages}): {error}", command[0])
        });
    let mut stdin = child.stdin.take().unwrap();
    let mut output = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_to_end(&mut output).unwrap();
    });
    assert!(child.wait().unwrap().success());
    output
}
