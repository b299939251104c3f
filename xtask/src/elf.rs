//! What an executable says about itself: size of its code, shared libraries it asks for (System V
//! ABI, chapters 4 and 5; 64-bit little-endian files only).

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const SHT_DYNAMIC: u32 = 6;
const DT_NEEDED: u64 = 1;

/// The facts of one file.
#[derive(Debug, PartialEq, Eq)]
pub struct Image {
    /// Bytes of the section `.text`.
    pub text: u64,
    /// Names of shared libraries.
    pub needed: Vec<String>,
}

struct Section {
    name: usize,
    kind: u32,
    offset: u64,
    size: u64,
    link: u32,
}

impl Image {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| path.display().to_string())?;
        Self::parse(&bytes).with_context(|| path.display().to_string())
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(
            bytes.starts_with(b"\x7fELF\x02\x01"),
            "not a 64-bit little-endian ELF file"
        );
        let table = number(bytes, 0x28, 8)?;
        let size = number(bytes, 0x3A, 2)?;
        let count = number(bytes, 0x3C, 2)?;
        let names = number(bytes, 0x3E, 2)?;
        let sections = (0..count)
            .map(|i| section(bytes, table + i * size))
            .collect::<Result<Vec<_>>>()?;
        let names = sections.get(names as usize).context("no section names")?;
        let mut text = 0;
        let mut needed = Vec::new();
        for section in &sections {
            if string(bytes, names.offset + section.name as u64)? == ".text" {
                text = section.size;
            }
            if section.kind == SHT_DYNAMIC {
                let strings = sections
                    .get(section.link as usize)
                    .context("the dynamic section has no strings")?;
                for entry in (0..section.size).step_by(16) {
                    if number(bytes, section.offset + entry, 8)? == DT_NEEDED {
                        let at = number(bytes, section.offset + entry + 8, 8)?;
                        needed.push(string(bytes, strings.offset + at)?);
                    }
                }
            }
        }
        Ok(Self { text, needed })
    }
}

fn section(bytes: &[u8], at: u64) -> Result<Section> {
    Ok(Section {
        name: number(bytes, at, 4)? as usize,
        kind: number(bytes, at + 4, 4)? as u32,
        offset: number(bytes, at + 0x18, 8)?,
        size: number(bytes, at + 0x20, 8)?,
        link: number(bytes, at + 0x28, 4)? as u32,
    })
}

fn number(bytes: &[u8], at: u64, length: usize) -> Result<u64> {
    let at = usize::try_from(at)?;
    let field = at.checked_add(length).and_then(|end| bytes.get(at..end));
    let mut padded = [0; 8];
    padded[..length].copy_from_slice(field.context("the file is cut short")?);
    Ok(u64::from_le_bytes(padded))
}

fn string(bytes: &[u8], at: u64) -> Result<String> {
    let rest = bytes
        .get(usize::try_from(at)?..)
        .context("the file is cut short")?;
    let end = rest.iter().position(|&b| b == 0).unwrap_or(rest.len());
    Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_is_static_and_the_shell_is_not() {
        let own = Image::read(&std::env::current_exe().unwrap()).unwrap();
        assert!(own.text > 10_000);
        assert!(own.needed.is_empty(), "{own:?}");
        let shell = Image::read(Path::new("/bin/sh")).unwrap();
        assert!(
            shell.needed.iter().any(|n| n.starts_with("libc.so")),
            "{shell:?}"
        );
    }

    #[test]
    fn nonsense_is_an_error() {
        assert!(Image::parse(b"").is_err());
        assert!(Image::parse(b"\x7fELF\x02\x01").is_err());
    }
}
