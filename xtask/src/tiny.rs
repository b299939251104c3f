//! A guest of a few bytes for tests and benchmarks on hosts whose KVM runs no stock kernel: an
//! ELF file with a PVH note (Xen's x86/HVM direct boot ABI) and a 64-bit entry at the same place.
//! Its code means the same in 32-bit and in 64-bit mode.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::sh;

/// Port that the guest writes first: a place where nothing is, so that the write leaves the guest.
pub const FIRST_PORT: u16 = 0x80;

/// Where the file is loaded: the first address that every loader accepts.
const LOAD_ADDRESS: u64 = 0x10_0000;
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const NOTE: usize = HEADER + 2 * PROGRAM_HEADER;
const NOTE_LENGTH: usize = 20;
const CODE: usize = NOTE + NOTE_LENGTH + 4;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Note type of the 32-bit physical entry (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Writes the port, then halts for ever with interrupts off.
const HOLD: [u8; 6] = [
    0xE6,
    FIRST_PORT as u8, // out 0x80, al
    0xFA,             // cli
    0xF4,             // hlt
    0xEB,
    0xFD, // jmp to the hlt
];

/// The file's content.
pub fn elf() -> Vec<u8> {
    let entry = LOAD_ADDRESS + CODE as u64;
    let length = (CODE + HOLD.len()) as u64;
    let mut out = Vec::new();
    // e_ident: class 64, little endian, version 1.
    out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    out.extend_from_slice(&2u16.to_le_bytes()); // executable
    out.extend_from_slice(&62u16.to_le_bytes()); // x86-64
    out.extend_from_slice(&1u32.to_le_bytes());
    out.extend_from_slice(&entry.to_le_bytes());
    out.extend_from_slice(&(HEADER as u64).to_le_bytes()); // program headers follow
    out.extend_from_slice(&0u64.to_le_bytes()); // no sections
    out.extend_from_slice(&0u32.to_le_bytes());
    for half in [HEADER, PROGRAM_HEADER, 2, 64, 0, 0] {
        out.extend_from_slice(&(half as u16).to_le_bytes());
    }
    program_header(&mut out, PT_LOAD, 0, length);
    program_header(&mut out, PT_NOTE, NOTE as u64, NOTE_LENGTH as u64);
    for word in [4, 4, XEN_ELFNOTE_PHYS32_ENTRY] {
        out.extend_from_slice(&u32::to_le_bytes(word));
    }
    out.extend_from_slice(b"Xen\0");
    // The address is below 4 GiB.
    out.extend_from_slice(&(entry as u32).to_le_bytes());
    out.resize(CODE, 0);
    out.extend_from_slice(&HOLD);
    out
}

fn program_header(out: &mut Vec<u8>, kind: u32, offset: u64, length: u64) {
    let address = LOAD_ADDRESS + offset;
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&7u32.to_le_bytes()); // readable, writable, executable
    for value in [offset, address, address, length, length, 4] {
        out.extend_from_slice(&value.to_le_bytes());
    }
}

/// Writes the file into the build folder.
pub fn kernel() -> Result<PathBuf> {
    let path = sh::build_dir("guest/tiny.elf");
    sh::fresh(&path)?;
    fs::write(&path, elf())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_of_both_kinds_points_at_the_code() {
        let elf = elf();
        let entry = u64::from_le_bytes(elf[24..32].try_into().unwrap());
        let pvh = u32::from_le_bytes(elf[NOTE + 16..NOTE + 20].try_into().unwrap());
        assert_eq!(entry, u64::from(pvh));
        let at = (entry - LOAD_ADDRESS) as usize;
        assert_eq!(elf[at..], HOLD);
        assert_eq!(at % 4, 0);
    }

    #[test]
    fn readelf_agrees() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.elf");
        fs::write(&path, elf()).unwrap();
        let Ok(output) = std::process::Command::new("readelf")
            .args(["-l", "-n", "-h"])
            .arg(&path)
            .output()
        else {
            eprintln!("readelf is not installed: nothing to compare with");
            return;
        };
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.stderr.is_empty(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(text.contains("0x1000c8"), "{text}");
        assert!(text.contains("Xen"), "{text}");
    }
}
