//! Writes the ACPI tables that the VMM has built, one file each.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use thiserror::Error as ThisError;

/// More than any machine needs; what lies beyond is not read.
const LONGEST: u64 = 4 << 20;
/// Length of a table's header (ACPI 6.5, 5.2.6).
const HEADER: usize = 36;
/// Length of the root pointer (ACPI 6.5, 5.2.5.3), which is no table.
const ROOT_POINTER: usize = 36;

/// The tables could not be written.
#[derive(Debug, ThisError)]
pub enum Error {
    /// A file could not be written.
    #[error("--dump-acpi: {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// What the VMM wrote cannot be read.
    #[error("--dump-acpi: the tables cannot be read: {0}")]
    Read(#[from] io::Error),
    /// What the VMM wrote is no list of tables.
    #[error("--dump-acpi: byte {offset}: found {found}, expected an ACPI table")]
    NotATable {
        /// Where.
        offset: usize,
        /// What.
        found: String,
    },
}

/// Splits `dump`, tables one after the other, into `folder`/SIGNATURE.aml; a second table of one
/// signature is SIGNATURE2.aml.
pub fn write(dump: OwnedFd, folder: &Path) -> Result<(), Error> {
    let mut file = File::from(dump);
    file.rewind()?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes)?;
    let error = |path: &Path, source| Error::Write {
        path: path.to_owned(),
        source,
    };
    fs::create_dir_all(folder).map_err(|e| error(folder, e))?;
    let tables = split(&bytes)?;
    for (index, (signature, table)) in tables.iter().enumerate() {
        let earlier = tables[..index]
            .iter()
            .filter(|(other, _)| other == signature);
        let name = match earlier.count() {
            0 => format!("{signature}.aml"),
            n => format!("{signature}{}.aml", n + 1),
        };
        let path = folder.join(name);
        fs::write(&path, table).map_err(|e| error(&path, e))?;
    }
    Ok(())
}

/// The tables and their signatures. Signatures become names of files, so only the characters
/// that the specification uses are taken. Zeros between tables are padding; the root
/// pointer is left out.
fn split(bytes: &[u8]) -> Result<Vec<(&str, &[u8])>, Error> {
    let mut tables = Vec::new();
    let mut offset = 0;
    while let Some(padding) = bytes[offset..].iter().position(|byte| *byte != 0) {
        offset += padding;
        let rest = &bytes[offset..];
        if rest.starts_with(b"RSD PTR ") && rest.len() >= ROOT_POINTER {
            offset += ROOT_POINTER;
            continue;
        }
        let (signature, length) = head(rest).map_err(|found| Error::NotATable { offset, found })?;
        let table = rest.get(..length).ok_or_else(|| Error::NotATable {
            offset,
            found: format!("{signature} with a length of {length}"),
        })?;
        tables.push((signature, table));
        offset += length;
    }
    Ok(tables)
}

/// Signature and length of the table at the start of `bytes`, or what stands there instead.
fn head(bytes: &[u8]) -> Result<(&str, usize), String> {
    let length = bytes.get(4..).and_then(|rest| rest.first_chunk());
    let length = length.map(|four| u32::from_le_bytes(*four) as usize);
    let signature = bytes.get(..4).unwrap_or(bytes);
    let valid = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit();
    match (std::str::from_utf8(signature), length) {
        (Ok(text), Some(length)) if signature.iter().all(valid) => {
            if length >= HEADER {
                Ok((text, length))
            } else {
                Err(format!("{text} with a length of {length}"))
            }
        }
        _ => Err(format!("the bytes {signature:02x?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn table(signature: &str, length: u32) -> Vec<u8> {
        let mut table = signature.as_bytes().to_vec();
        table.extend(length.to_le_bytes());
        table.resize(length as usize, 0xA5);
        table
    }

    #[test]
    fn each_table_becomes_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut dump = tempfile::tempfile().unwrap();
        let mut rsdp = b"RSD PTR \xffANEMON\x02....\x24\0\0\0".to_vec();
        rsdp.resize(36, 1);
        let parts = [table("DSDT", 100), table("SSDT", 36), table("SSDT", 40)];
        dump.write_all(&rsdp).unwrap();
        dump.write_all(&parts.join(&[0; 28][..])).unwrap();
        write(dump.into(), &folder.path().join("new")).unwrap();
        for (name, content) in ["DSDT", "SSDT", "SSDT2"].iter().zip(&parts) {
            let path = folder.path().join(format!("new/{name}.aml"));
            assert_eq!(&fs::read(path).unwrap(), content);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for bytes in [
            table("../x", 40),
            table("DSDT", 40)[..39].to_vec(),
            b"DSDT\x23\0\0\0".to_vec(),
            b"DSDT\xff\xff\xff\xff".to_vec(),
            b"DSD".to_vec(),
            b"RSD PTR .....................".to_vec(),
        ] {
            assert!(split(&bytes).is_err(), "{bytes:?}");
        }
        assert!(split(&[]).unwrap().is_empty());
    }
}
