//! Writer of initial RAM file systems: cpio archives in the "newc" format, as the Linux kernel
//! reads them (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;
use std::io::{self, Write};

const MAGIC: &str = "070701";
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

/// An archive being written. Folders above an entry are made when they are first needed.
pub struct Writer<W: Write> {
    out: W,
    written: u64,
    inode: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Writer<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
            folders: BTreeSet::new(),
        }
    }

    /// Adds a folder, and those above it. Names have no leading slash.
    pub fn folder(&mut self, name: &str) -> io::Result<()> {
        if name.is_empty() || !self.folders.insert(name.to_string()) {
            return Ok(());
        }
        self.parents(name)?;
        self.entry(name, DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a regular file with the given permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        self.parents(name)?;
        self.entry(name, REGULAR | permissions, (0, 0), content)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.parents(name)?;
        self.entry(name, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device node.
    pub fn character(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.parents(name)?;
        self.entry(name, CHARACTER | 0o600, (major, minor), &[])
    }

    /// Writes the trailer and gives the output back.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, name: &str) -> io::Result<()> {
        match name.rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, dev: (u32, u32), data: &[u8]) -> io::Result<()> {
        let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, "file above 4 GiB");
        let size = u32::try_from(data.len()).map_err(too_large)?;
        let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        self.inode += 1;
        let mut header = String::from(MAGIC);
        for field in [
            self.inode, mode, 0, // user
            0, // group
            links, 0, // modification time: archives of equal content are equal
            size, 0, 0, // device the file was on
            dev.0, dev.1, name_size, 0, // checksum, unused in this variant
        ] {
            header.push_str(&format!("{field:08X}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(data)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let missing = (4 - self.written % 4) % 4;
        self.put(&[0; 3][..missing as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        writer.file("bin/tool", 0o755, b"12345").unwrap();
        writer.file("empty", 0o644, b"").unwrap();
        writer.symlink("bin/sh", "tool").unwrap();
        writer.character("dev/console", 5, 1).unwrap();
        writer.folder("bin").unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn every_entry_is_aligned_and_folders_come_once_and_first() {
        let archive = sample();
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        assert_eq!(text.matches(MAGIC).count(), 7);
        assert!(text.find("bin\0").unwrap() < text.find("bin/tool\0").unwrap());
    }

    /// GNU cpio, where it is installed or fetched, reads the archive back.
    #[test]
    fn cpio_reads_it() {
        let fetched = crate::sh::build_dir("packages/root/bin/cpio");
        let program = if fetched.exists() {
            fetched
        } else {
            "cpio".into()
        };
        let child = Command::new(program)
            .args(["-t", "-v", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            eprintln!("cpio is not installed: nothing to compare with");
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let listing = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 6, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[0].ends_with(" bin"));
        assert!(lines[1].starts_with("-rwxr-xr-x") && lines[1].ends_with(" bin/tool"));
        assert!(lines[3].starts_with("lrwxrwxrwx") && lines[3].ends_with(" bin/sh -> tool"));
        assert!(lines[5].starts_with("crw-------") && lines[5].ends_with(" dev/console"));
    }
}
